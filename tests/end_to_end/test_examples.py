"""The scripts of examples/ run, on small inputs."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest
from toy import TOY

from calm.data import formats
from calm.data.stories import stories, write_stories
from calm.data.tokenizer import train_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
FIXTURE = Path(__file__).parents[1] / "fixtures/energy_k4"


@pytest.fixture
def run(monkeypatch, capsys):
    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def text(tmp_path):
    write_stories(tmp_path / "text.jsonl", 0, 40)
    (tmp_path / "toy.yaml").write_text(TOY)
    return tmp_path / "text.jsonl"


def test_no_example_is_without_a_test():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "a_data_source_of_your_own",
        "a_head_of_your_own",
        "a_sampler_of_your_own",
        "conversations",
        "questions",
        "train_on_your_text",
        "load_a_published_checkpoint",
        "compare_with_a_transformer",
        "draft_for_a_transformer",
        "think_before_answering",  # In test_thoughts.py.
    }


def test_train_on_your_text(run, text, tmp_path):
    arguments = (text, "--output", tmp_path / "run", "--recipe", tmp_path / "toy.yaml", "--steps", 4)
    out = run("train_on_your_text", *arguments)
    assert "3-gram" in out and "CALM" in out and (tmp_path / "run/model/config.json").is_file()
    again = run("train_on_your_text", *arguments)  # Finds the finished run.
    assert again.splitlines()[-6:] == out.splitlines()[-6:]


def test_draft_for_a_transformer(run, tmp_path):
    out = run("draft_for_a_transformer", tmp_path, "--stories", 100, "--steps", 2)
    assert "the text is the same" in out and "T = 1:" in out
    assert run("draft_for_a_transformer", tmp_path).count(" passes instead of 120") == 2  # Reuses the models.


def test_a_data_source_of_your_own(run, tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "FORMATS", dict(formats.FORMATS))
    (tmp_path / "toy.yaml").write_text(TOY)
    for number, story in enumerate(stories(0, 40)):
        (tmp_path / f"{number}.srt").write_text(f"1\n00:00:01,000 --> 00:00:09,000\n{story}\n")
    arguments = (tmp_path, "--output", tmp_path / "run", "--recipe", tmp_path / "toy.yaml")
    out = run("a_data_source_of_your_own", *arguments)
    assert f"model: {tmp_path / 'run/model'}" in out and (tmp_path / "run/model/config.json").is_file()


def test_load_a_published_checkpoint(run, tmp_path):
    shutil.copytree(FIXTURE / "calm", tmp_path / "model")
    train_tokenizer(stories(0, 5), 300).save_pretrained(tmp_path / "model")
    out = run("load_a_published_checkpoint", FIXTURE / "autoencoder", tmp_path / "model", "a", "--tokens", 8)
    assert "K = 4, head energy" in out and "T = 1," in out and "T = 0.5," in out


def test_compare_with_a_transformer(run, text, tmp_path):
    arguments = (text, "--output", tmp_path / "runs", "--recipe", tmp_path / "toy.yaml")
    out = run("compare_with_a_transformer", *arguments)
    assert out.splitlines()[-1].endswith("report.html") and (tmp_path / "runs/report.html").is_file()
    trained = {path.parent.name for path in (tmp_path / "runs").glob("*/model")}
    assert len(trained) == 2 and "K4" in trained


def test_conversations(run, tmp_path):
    """Each answer continues the story, and the last one says something about the child in it."""
    assert "50 conversations" in run("conversations", tmp_path / "c.jsonl", "--number", 50)
    records = [json.loads(line)["messages"] for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    for messages in records:
        assert [message["role"] for message in messages] == ["user", "assistant"] * 3
        request, story, _, continuation, _, about = (message["content"] for message in messages)
        name = re.search(r"[A-Z]\w+", about.removeprefix("It is"))[0]
        assert name in request and name in story
        assert story.endswith((".", '"', "!", "?")) and continuation
    with pytest.raises(FileExistsError):
        run("conversations", tmp_path / "c.jsonl")


def test_questions(run, tmp_path):
    assert "50 questions" in run("questions", tmp_path / "q.jsonl", "--number", 50)
    records = [json.loads(line) for line in (tmp_path / "q.jsonl").read_text().splitlines()]
    assert len(records) == len({record["prompt"] for record in records}) == 50
    for record in records:
        story, answer = record["prompt"].split("\nQuestion:")[0], record["completion"]
        assert re.search(rf"\b{answer.strip()}\b", story), "the answer is not in the story"
    with pytest.raises(FileExistsError):
        run("questions", tmp_path / "q.jsonl")
