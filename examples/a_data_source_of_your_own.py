"""Train on files that calm does not know: film subtitles (.srt), in one file of your own.

    python examples/a_data_source_of_your_own.py films/ --output runs/films

A format is a suffix and a function that gives the documents of a file. Everything after that is calm's:
folders, compression (.srt.gz), the tokenizer, held-out text, streams.

For the `calm` command to know the format as well, put this file in a package and name it as an entry point.
`calm train --recipe laptop_quick --data.sources films/` then reads subtitles:

    [project.entry-points."calm.formats"]
    srt = "my_package.subtitles"
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from calm import read_recipe, register_format, train, with_settings
from calm.data.options import ReadingOptions
from calm.data.reading import numbered_lines
from calm.errors import InputError

# A subtitle is its number, its times, and one or more lines of what is said, up to a blank line:
#
#     17
#     00:01:05,200 --> 00:01:07,900
#     Nobody has seen the lighthouse keeper
#     since <i>Thursday</i>.
TIMES = re.compile(r"\d+:\d\d:\d\d[,.]\d{3} --> \d+:\d\d:\d\d[,.]\d{3}")
MARKUP = re.compile(r"</?\w+[^>]*>|\{\\[^}]*\}")


def read_subtitles(path: Path, options: ReadingOptions) -> Iterator[str]:
    """The documents of a file: here only one, what is said in the film, a subtitle a line.

    Args:
        path: The file. It may be compressed: `numbered_lines` takes care of that, of UTF-8, and of lines
            that are too long for the memory.
        options: What the user asked for. `text_field` and `separator` mean nothing to subtitles.

    Raises:
        InputError: If there are no subtitles in it. Such a mistake is shown as one sentence, so say which
            file, and what to do.
    """
    said: list[list[str]] = []
    is_said = False
    for _, line in numbered_lines(path, options.most_bytes):
        if TIMES.match(line):
            said.append([])
            is_said = True
        elif not line.strip():
            is_said = False
        elif is_said:
            said[-1].append(MARKUP.sub("", line).strip())
    if not said:
        raise InputError(f"'{path}' holds no subtitles; check that it is an .srt file.")
    # A format whose files hold many documents would yield them one by one.
    yield "\n".join(" ".join(lines) for lines in said if any(lines))


# From here on .srt files are read wherever a source of text is named. It stands outside of `main`, so that
# processes that are started to read files know it too.
register_format(".srt", read_subtitles)


def main() -> None:
    """Train a small model on subtitles."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", help="files, or folders of them")
    parser.add_argument("--output", default="runs/films", help="folder of the run")
    parser.add_argument("--recipe", default="laptop_quick", help="shipped name or .yaml file")
    arguments = parser.parse_args()
    recipe = with_settings(read_recipe(arguments.recipe), {"data.sources": arguments.sources})
    model = train(recipe, Path(arguments.output))
    print(f"model: {model}; try: calm generate {model}")


if __name__ == "__main__":
    main()
