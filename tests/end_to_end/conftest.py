"""Fixtures, once per test file: a folder with a trained toy run, and a baseline beside it."""

from pathlib import Path

import pytest
from toy import TOY

from calm.cli import main
from calm.data.stories import write_stories


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with text, a recipe and a trained toy run."""
    folder = tmp_path_factory.mktemp("root")
    write_stories(folder / "text.jsonl", 0, 40)
    (folder / "toy.yaml").write_text(TOY)
    main(["train", "--recipe", str(folder / "toy.yaml"), "--data.sources", str(folder / "text.jsonl"),
          "--output", str(folder / "run")])  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def baseline(root) -> Path:
    """An autoregressive model trained by the same command on the same prepared text."""
    main(["train", "--recipe", str(root / "toy.yaml"), "--model", "autoregressive", "--chunk_size", "1",
          "--data.sources", str(root / "run/data"), "--output", str(root / "baseline")])  # fmt: skip
    return root / "baseline/model"
