"""What `calm train` and `calm finetune` print at the start and at the end."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from processes import launch
from toy import interrupt, toy_recipe

from calm import results
from calm.cli import main
from calm.data.prepared import load_prepared
from calm.data.stories import stories
from calm.errors import InputError
from calm.flops import training_flops
from calm.models.loading import load_autoencoder, load_model
from calm.storage.disk import read_json_lines
from calm.training import stages
from calm.training.overview import forecasts_of
from calm.training.recipe_files import with_settings, write_recipe
from calm.training.runs import Run


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories(0, 40)))
    return path


@pytest.fixture(scope="module")
def recipe_file(text, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    write_recipe(toy_recipe(text), path)
    return path


def test_train_prints_what_it_will_do_and_the_results(recipe_file, tmp_path, capsys):
    output = tmp_path / "two words"
    main(["train", "--recipe", str(recipe_file), "--output", str(output)])
    printed = capsys.readouterr()
    assert re.search(r"\d+ documents and [\d,]+ tokens to train on; .* held out", printed.err)
    assert re.search(
        r"autoencoder: .* parameters; 8 steps of 64 tokens, 512 in all .* epochs\); .* FLOPs", printed.err
    )
    assert re.search(r"language model: .* FLOPs; about", printed.err) and " in fp32; " in printed.err
    assert all(name in printed.out for name in ("BrierLM", "3-gram", "5-gram", "CALM", "ceiling"))
    beginnings = [beginning for beginning, _ in load_prepared(output / "data").held_out_beginnings(6)]
    shown = " ".join(printed.out.split())
    assert all(" ".join(beginning.split()) in shown for beginning in beginnings)
    report = (output / "report.html").read_text()
    assert "two words" in report and beginnings[0].split()[0] in report
    commands = re.findall(r"^(?:next: )? +(calm .*)$", printed.out, re.MULTILINE)
    assert [shlex.split(command)[1] for command in commands] == ["generate", "serve"]
    main(shlex.split(commands[0])[1:])
    assert capsys.readouterr().out.startswith(" ".join(beginnings[0].split()[:4]))
    main(["train", "--resume", "--output", str(output)])  # Nothing is left to do.
    assert capsys.readouterr().out.splitlines() == [f"model:  {output / 'model'}"]


def test_the_forecast_of_a_run_is_what_happens(text, tmp_path, monkeypatch):
    recipe, run = toy_recipe(text), tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt(patch, "language_model", 5)
        with pytest.raises(KeyboardInterrupt):
            stages.train(recipe, run)
    data = load_prepared(run / "data")
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    (forecast,) = forecasts_of(Run(recipe, run, resume=True), data)  # The autoencoder is finished.
    assert torch.equal(before, torch.random.get_rng_state())
    assert (forecast.name, forecast.steps, forecast.steps_done, forecast.tokens) == (
        "language model",
        8,
        3,
        8 * 64,
    )
    assert forecast.epochs == 8 * 64 / data.counts().tokens["train"]
    assert forecast.seconds is not None and forecast.seconds > 0
    assert "for the 5 steps left" in str(forecast)
    model = load_model(str(stages.train(recipe, run, resume=True)))
    assert forecast.parameters == sum(w.numel() for w in model.parameters() if w.requires_grad)
    assert forecast.flops == training_flops(model.config, 32) * 512
    stages_of_new = list(forecasts_of(Run(recipe, tmp_path / "new"), data))
    assert [stage.name for stage in stages_of_new] == ["autoencoder", "language model"]
    trained = load_autoencoder(run / "autoencoder")
    assert stages_of_new[0].parameters == sum(weight.numel() for weight in trained.parameters())


def test_a_quiet_run_prints_results_only(recipe_file, tmp_path, capsys):
    main(["train", "--recipe", str(recipe_file), "--output", str(tmp_path / "run"), "--quiet"])
    printed = capsys.readouterr()
    assert "BrierLM" in printed.out
    assert all(" held out are too few " in line for line in printed.err.splitlines())  # A warning.


def test_baselines_and_streamed_runs_print_results(text, tmp_path, capsys):
    changes = {
        "baseline": {"model": "autoregressive", "chunk_size": 1},
        "stream": {"data.streaming": True, "data.sample_documents": 40},
    }
    for name, settings in changes.items():
        write_recipe(with_settings(toy_recipe(text), settings), tmp_path / f"{name}.yaml")
        main(["train", "--recipe", str(tmp_path / f"{name}.yaml"), "--output", str(tmp_path / name)])
        printed = capsys.readouterr()
        assert "BrierLM" in printed.out and (tmp_path / name / "report.html").is_file()
        assert ("5-gram" in printed.out) == (name == "baseline")
        assert ("no n-gram floors: the training text is streamed" in printed.err) == (name == "stream")


def test_a_run_succeeds_even_if_its_scoring_fails(recipe_file, tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise InputError("the held-out text has no chunk to score; give more text.")

    monkeypatch.setattr(results, "score_model", refuse)
    main(["train", "--recipe", str(recipe_file), "--output", str(tmp_path / "run")])
    printed = capsys.readouterr()
    assert "no scores: the held-out text has no chunk to score" in printed.err
    assert printed.out == f"model:  {tmp_path / 'run/model'}\n"


def test_without_matplotlib_scores_are_printed_but_no_report_is_written(
    recipe_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(results, "is_installed", lambda package: package != "matplotlib")
    main(["train", "--recipe", str(recipe_file), "--output", str(tmp_path / "run")])
    printed = capsys.readouterr()
    assert "no report was written: it needs matplotlib" in printed.err and "BrierLM" in printed.out
    assert not (tmp_path / "run/report.html").exists()


def test_several_processes_print_results_once(recipe_file, tmp_path):
    done = launch(2, "--recipe", recipe_file, "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("BrierLM") == 1 and done.stdout.count("next:") == 1
    assert done.stderr.count("to train on;") == 1 and (tmp_path / "run/report.html").is_file()


def test_finetune_prints_answers(text, tmp_path, capsys):
    model = stages.train(toy_recipe(text), tmp_path / "base")
    # Characters at which str.splitlines would split the recorded answers.
    lines = [json.dumps({"prompt": f"p\u2028{n}", "completion": f" c\x85{n}"}) + "\n" for n in range(20)]
    (tmp_path / "examples.jsonl").write_text("".join(lines))
    options = ["--examples.sources", str(tmp_path / "examples.jsonl"), "--examples.context", "32"]
    steps = ["--training.steps", "2", "--training.batch_tokens", "64"]
    run = tmp_path / "tuned"
    main(["finetune", "--model", str(model), *options, *steps, "--output", str(run)])
    out = capsys.readouterr().out
    answers = read_json_lines(run / "answers.jsonl")
    assert answers and all(out.count(word) == len(answers[:3]) for word in ("expected:", "before:", "now:"))
    assert answers[0]["prompt"] in out and f"calm serve {run}" in out
