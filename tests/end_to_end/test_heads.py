"""Flow, diffusion and MeanFlow heads from text to text, and changing how they are drawn from."""

import json
from pathlib import Path

import pytest
from toy import TOY, failure

from calm.cli import main
from calm.data.stories import write_stories

HEADS = {
    "flow": {"head_type": "flow", "num_blocks": 1, "frequency_size": 16},
    "diffusion": {"head_type": "diffusion", "num_blocks": 1, "frequency_size": 16, "num_steps": 6},
    "mean_flow": {"head_type": "mean_flow", "num_blocks": 1, "frequency_size": 16},
}
CHANGES = {"flow": {"solver": "euler"}, "diffusion": {"sampler": "dpm"}, "mean_flow": {"num_steps": 2}}


@pytest.fixture(scope="module", params=HEADS)
def run(request, tmp_path_factory) -> Path:
    """A toy run with one of the heads; the folder has its name."""
    folder = tmp_path_factory.mktemp("heads") / request.param
    text, recipe = folder.with_suffix(".jsonl"), folder.with_suffix(".yaml")
    write_stories(text, 0, 40)
    recipe.write_text(TOY)
    main(["train", "--recipe", str(recipe), "--data.sources", str(text), "--output", str(folder),
          "--language_model.head", json.dumps(HEADS[request.param])])  # fmt: skip
    return folder


def test_trained_scored_and_written_with(run, capsys):
    head = ["--head", json.dumps(CHANGES[run.name])]
    assert json.loads((run / "model/config.json").read_text())["head_config"]["head_type"] == run.name
    scores, texts = set(), set()
    for change in ([], head):
        main(["evaluate", str(run / "model"), str(run / "data"), "--context", "64", *change])
        scores.add(capsys.readouterr().out)
        main(["generate", str(run / "model"), "Once upon a time", "--max_new_tokens", "20", "--seed", "1",
              "--max_draws", "20", *change])  # fmt: skip
        texts.add(capsys.readouterr().out)
    assert all("CALM" in score for score in scores)
    assert all(text.startswith("Once upon a time") for text in texts)
    assert len(texts) == 2  # The change is seen.


def test_costs_follow_the_steps(run, capsys):
    def head_row(*change: str) -> str:
        main(["flops", str(run / "model"), "--draws", "5", *change])
        return next(line for line in capsys.readouterr().out.splitlines() if "head " in line)

    more = {"flow": 8, "diffusion": 60, "mean_flow": 2}[run.name]
    assert head_row() != head_row("--head", json.dumps({"num_steps": more}))


def test_what_cannot_change(run, capsys, tmp_path):
    model = run / "model"
    for verb in (["generate", model, "Once"], ["evaluate", model, run / "data"], ["flops", model]):
        message = failure(capsys, *verb, "--head", '{"num_blocks": 3}')
        assert f"'num_blocks' of a trained {run.name} head cannot be changed; what can: " in message
        assert "num_steps" in message
        assert "num_steps must be at least 1, got 0" in failure(capsys, *verb, "--head", '{"num_steps": 0}')
        assert "--head cannot be 'five'; its --help says" in failure(capsys, *verb, "--head", "five")
    assert "only a CALM has a head" in failure(capsys, "flops", "demo_baseline", "--head", '{"num_steps": 2}')
