"""A folder with a trained toy run, and a baseline beside it, for each file of tests that asks."""

from pathlib import Path

import pytest
from toy import TOY

from calm.cli import main
from calm.data.stories import write_stories


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    """A folder with text, a recipe and a trained toy run."""
    folder = tmp_path_factory.mktemp("room")
    write_stories(folder / "text.jsonl", 0, 40)
    (folder / "toy.yaml").write_text(TOY)
    main(["train", "--recipe", str(folder / "toy.yaml"), "--data.sources", str(folder / "text.jsonl"),
          "--output", str(folder / "run")])  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def baseline(room) -> Path:
    """An autoregressive model trained by the same command on the same prepared text."""
    main(["train", "--recipe", str(room / "toy.yaml"), "--model", "autoregressive", "--chunk_size", "1",
          "--data.sources", str(room / "run/data"), "--output", str(room / "baseline")])  # fmt: skip
    return room / "baseline/model"
