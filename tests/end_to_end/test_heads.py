"""Heads that draw in steps: train, evaluate and generate, also with other sampling settings."""

import json
from pathlib import Path

import pytest
from toy import TOY, failure

from calm.cli import main
from calm.data.stories import write_stories
from calm.models.heads.step_network import StepNetwork

HEADS = {
    "flow": {"head_type": "flow", "num_blocks": 1, "frequency_size": 16},
    "diffusion": {"head_type": "diffusion", "num_blocks": 1, "frequency_size": 16, "num_steps": 6},
    "categorical_flow": {"head_type": "categorical_flow", "num_blocks": 1, "frequency_size": 16, "rank": 8},
}
SEQUENTIAL = {"head_type": "sequential", "num_blocks": 1, "token_size": 8, "rank": 8}
CHANGES = {
    "flow": {"solver": "euler", "num_steps": 3},
    "diffusion": {"sampler": "dpm", "num_steps": 3},
    "categorical_flow": {"num_steps": 2},
}
# Calls of the network for a draw, before and after these changes.
CALLS = {"flow": (8, 3), "diffusion": (6, 3), "categorical_flow": (4, 2)}


@pytest.fixture(scope="module", params=HEADS)
def run(request, tmp_path_factory) -> Path:
    """A toy run with one of the heads; the folder has its name."""
    folder = tmp_path_factory.mktemp("heads") / request.param
    text, recipe = folder.with_suffix(".jsonl"), folder.with_suffix(".yaml")
    write_stories(text, 0, 40)
    recipe.write_text(TOY)
    main(["train", "--recipe", str(recipe), "--data.sources", str(text), "--output", str(folder),
          "--language_model.head", json.dumps(HEADS[request.param]),
          "--autoencoder.kind", "codes" if request.param == "categorical_flow" else "mlp",
          "--autoencoder.latent_size", "32" if request.param == "categorical_flow" else "8"])  # fmt: skip
    return folder


def test_train_evaluate_and_generate(run, capsys, monkeypatch):
    assert json.loads((run / "model/config.json").read_text())["head_config"]["head_type"] == run.name
    calls = []
    forward = StepNetwork.forward
    monkeypatch.setattr(StepNetwork, "forward", lambda *inputs: calls.append(1) or forward(*inputs))

    def network_calls(*arguments: str) -> int:
        calls.clear()
        main([*arguments])
        return len(calls)

    evaluate = ["evaluate", str(run / "model"), str(run / "data"), "--context", "64", "--max_blocks", "4"]
    generate = ["generate", str(run / "model"), "Once upon a time", "--max_new_tokens", "4"]
    generate += ["--temperature", "1"]
    before, after = CALLS[run.name]
    head = ["--head", json.dumps(CHANGES[run.name])]
    for command, expected in ((evaluate, "CALM"), (generate, "Once upon a time")):
        default, changed = network_calls(*command), network_calls(*command, *head)
        assert default * after == changed * before > 0
        assert expected in capsys.readouterr().out


def test_flops_depend_on_the_number_of_steps(run, capsys):
    def head_row(*options: str) -> str:
        main(["flops", str(run / "model"), "--draws", "5", *options])
        return next(line for line in capsys.readouterr().out.splitlines() if "head " in line)

    num_steps = {"flow": 8, "diffusion": 60, "categorical_flow": 8}[run.name]
    assert head_row() != head_row("--head", json.dumps({"num_steps": num_steps}))


def test_trained_settings_cannot_be_changed(run, capsys, tmp_path):
    model = run / "model"
    for command in (["generate", model, "Once"], ["evaluate", model, run / "data"], ["flops", model]):
        message = failure(capsys, *command, "--head", '{"num_blocks": 3}')
        assert f"'num_blocks' of a trained {run.name} head cannot be changed; these can: " in message
        assert "num_steps" in message
        assert "num_steps must be at least 1, got 0" in failure(
            capsys, *command, "--head", '{"num_steps": 0}'
        )
        assert "--head must be a mapping" in failure(capsys, *command, "--head", "five")
    assert "only a CALM has a head" in failure(capsys, "flops", "demo_baseline", "--head", '{"num_steps": 2}')


@pytest.mark.parametrize("head", [HEADS["categorical_flow"], SEQUENTIAL], ids=lambda head: head["head_type"])
def test_codes_need_no_trained_autoencoder(head, tmp_path, capsys):
    text, recipe = tmp_path / "text.jsonl", tmp_path / "recipe.yaml"
    write_stories(text, 0, 20)
    recipe.write_text(TOY)
    run = tmp_path / "run"
    train = ["train", "--recipe", recipe, "--data.sources", text, "--output", run]
    train += ["--language_model.head", json.dumps(head)]
    message = failure(capsys, *train)
    expected = (
        f"a {head['head_type']} head learns tokens and needs no trained autoencoder: set the autoencoder's"
    )
    assert expected in message
    codes = ["--autoencoder.kind", "codes"]
    message = failure(capsys, *train, *codes, "--autoencoder.latent_size", 8)
    assert "set autoencoder.latent_size to at least 32, not 8" in message
    main([*map(str, train), *codes, "--autoencoder.latent_size", "32"])
    assert list(json.loads((run / "history.json").read_text())) == ["language_model"]
    capsys.readouterr()
    main(["evaluate", str(run / "model"), str(run / "data"), "--context", "64", "--max_blocks", "4"])
    printed = capsys.readouterr().out
    assert "100.00" in printed  # Percent of the tokens are reconstructed.
    [*_, last] = [
        e for e in json.loads((run / "history.json").read_text())["language_model"] if "eval_brier_lm" in e
    ]
    assert ("perplexity" in printed) == ("eval_cross_entropy" in last) == (head is SEQUENTIAL)
    main(["generate", str(run / "model"), "Once upon a time", "--max_new_tokens", "4", "--seed", "1"])
    assert "Once upon a time" in capsys.readouterr().out
