"""How fast does `calm prepare` tokenize, compared with the `tokenizers` library alone?

    python benchmarks/tokenizing.py                    # the embedded stories, written over and over
    python benchmarks/tokenizing.py my_texts.jsonl

Complete runs of `prepare` with an existing tokenizer (reading, splitting, tokenizing, writing) take turns
with `encode_batch_fast` on the same documents in memory.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import datasets
from measure import in_turns, machine, ratios

from calm.data.options import ReadingOptions
from calm.data.prepare import prepare
from calm.data.sources import load_documents
from calm.data.stories import write_stories
from calm.data.tokenizer import train_tokenizer


def main() -> None:
    """Print rates and their ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="*", help="text; the embedded stories if none is given")
    parser.add_argument("--stories", type=int, default=40_000)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sources = arguments.sources
        if not sources:
            write_stories(folder / "stories.jsonl", 0, arguments.stories)
            sources = [str(folder / "stories.jsonl")]
        texts = [row["text"] for row in load_documents(sources, ReadingOptions()).texts]
        tokenizer = train_tokenizer(iter(texts[:5000]), arguments.vocab_size)
        tokenizer.save_pretrained(folder / "tokenizer")
        fast = tokenizer.backend_tokenizer
        num_bytes = sum(len(text.encode()) for text in texts)

        def run_prepare() -> None:
            data = prepare(sources, folder / "out", tokenizer=str(folder / "tokenizer"), overwrite=True)
            info = json.loads((folder / "out/prepared.json").read_text())
            assert sum(info["documents"].values()) == len(texts) and len(data.train)

        def run_tokenizer() -> None:
            for start in range(0, len(texts), 1000):
                [encoding.ids for encoding in fast.encode_batch_fast(texts[start : start + 1000])]

        table = ratios(
            in_turns({"tokenizers alone": run_tokenizer, "calm prepare": run_prepare}, arguments.rounds),
            "tokenizers alone",
        )
    print(f"{machine()}, {os.cpu_count()} cores; {len(texts):,} documents, {num_bytes / 1e6:.0f} MB")
    print("| way | MB/s | of the library alone |\n|---|---|---|")
    for name, (seconds, ratio, least, most) in table.items():
        print(f"| {name} | {num_bytes / 1e6 / seconds:.1f} | {ratio:.2f} ({least:.2f} to {most:.2f}) |")


if __name__ == "__main__":
    main()
