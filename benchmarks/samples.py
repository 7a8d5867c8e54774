"""Write a page with unselected texts of several models at several temperatures.

    python benchmarks/samples.py CALM=runs/a/model baseline=runs/b/model --prompt "The old house" \
        --output samples.md

Every model continues the same prompt with the seeds 1, 2, ...; no text is left out.
"""

import argparse
from pathlib import Path

from calm.models.loading import load_language_model_and_tokenizer
from calm.texts import continue_texts


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", help="name=folder of each model")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--temperatures", nargs="+", type=float, default=[1.0, 0.5, 0.25])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--title", default="Samples")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if invalid := [model for model in arguments.models if "=" not in model]:
        parser.error(f"a model must be name=folder, not '{invalid[0]}'.")
    lines = [f"## {arguments.title}", "", f"All continue: *{arguments.prompt}*", ""]
    for name_and_folder in arguments.models:
        name, folder = name_and_folder.split("=", 1)
        model, tokenizer = load_language_model_and_tokenizer(folder)
        for temperature in arguments.temperatures:
            lines += [f"### {name}, T = {temperature:g}", ""]
            for seed in range(1, arguments.seeds + 1):
                [text] = continue_texts(
                    model,
                    tokenizer,
                    [arguments.prompt],
                    max_new_tokens=arguments.tokens,
                    temperature=temperature,
                    seed=seed,
                )
                lines.append(f"{seed}. {as_markdown(text)}")
            lines.append("")
    arguments.output.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    print(arguments.output)


def as_markdown(text: str) -> str:
    """A text as one line, with all markup escaped."""
    text = " ".join(text.split()).replace("\\", "\\\\")
    for mark in "*_`<>[]#|":
        text = text.replace(mark, f"\\{mark}")
    return text


if __name__ == "__main__":
    main()
