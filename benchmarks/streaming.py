"""Does streaming text need a constant amount of memory?

    python benchmarks/streaming.py --gigabytes 5 --plot docs/plots/streaming_memory.png

It streams files of synthetic stories (links to a single file), tokenized and laid out in blocks as in
training. Every 5% it prints how much text has been read, and the memory of this process.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

from matplotlib.figure import Figure
from measure import machine, status

from calm.data.options import ReadingOptions
from calm.data.stories import stories
from calm.data.streaming import CURSOR, BlockStream, Position, StreamSettings
from calm.data.tokenizer import train_tokenizer

MEGABYTES_A_FILE = 50
TWENTIETHS = 20


def main() -> None:
    """Print a table, and draw the curve."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    documents = list(stories(0, 20_000))
    tokenizer = train_tokenizer(documents[:5000], 4096)
    text = "".join(json.dumps({"text": document}) + "\n" for document in documents)
    text *= max(1, round(MEGABYTES_A_FILE * 1e6 / len(text)))
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder, "0.jsonl")
        first.write_text(text)
        num_files = max(1, round(arguments.gigabytes * 1e9 / len(text)))
        for number in range(1, num_files):
            Path(folder, f"{number}.jsonl").symlink_to(first)
        settings = StreamSettings(sources=[folder], options=ReadingOptions(), chunk_size=4, block_size=1024)
        del documents
        points = read(
            BlockStream(settings, tokenizer, Position(1, 1)), num_files, len(text), text.count("\n")
        )
    if arguments.plot:
        draw(points, arguments.plot)


def read(stream: BlockStream, num_files: int, size: int, lines: int) -> list[tuple[float, float]]:
    """Read an epoch; return points (gigabytes read, MiB in memory) along the way."""
    print(f"{machine()}; {num_files} files of {size / 1e6:.0f} MB")
    print("| GB read | tokens | MiB in memory | MB/s |\n|---|---|---|---|")
    points: list[tuple[float, float]] = []
    start, due = time.perf_counter(), 0.0
    for num_blocks, block in enumerate(stream):
        epoch, shard, document = block[CURSOR][1:4].tolist()
        done = (shard + document / lines) * size / 1e9 if epoch == 0 else num_files * size / 1e9
        if done >= due:
            points.append((done, status("VmRSS") / 2**20))
            tokens, speed = num_blocks * 1024 / 1e6, done * 1e3 / (time.perf_counter() - start)
            print(f"| {done:.2f} | {tokens:,.0f} M | {points[-1][1]:,.0f} | {speed:.1f} |", flush=True)
            due = done + num_files * size / 1e9 / TWENTIETHS
        if epoch:
            break
    return points


def draw(points: list[tuple[float, float]], path: Path) -> None:
    """Draw the curve."""
    figure = Figure(figsize=(6, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), marker="o", markersize=3)
    axes.set(
        xlabel="text read, GB", ylabel="memory of the process, MiB", ylim=(0, 1.3 * max(y for _, y in points))
    )
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
