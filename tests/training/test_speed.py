"""What training logs of its speed."""

import sys
import time
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model
from toy import toy_recipe
from transformers import Trainer

from calm import hardware
from calm.data.stories import write_stories
from calm.data.tasks import write_items
from calm.data.tokenizer import train_tokenizer
from calm.hardware import matrix_rate
from calm.training import overview
from calm.training.finetuning import finetune
from calm.training.finetuning_recipe import AnswerSettings, ExampleSettings, FinetuningRecipe, ThoughtSettings
from calm.training.recipe import TrainingSettings
from calm.training.speed import Speed
from calm.training.stages import train

CPU = torch.device("cpu")


def started(flops) -> Speed:
    speed = Speed(100, flops, CPU, torch.float32)
    speed.on_train_begin(None, SimpleNamespace(global_step=5), None)
    return speed


def test_tokens_per_second_without_pauses():
    speed = started(None)
    with speed.pause():
        time.sleep(0.3)
    time.sleep(0.05)
    figures = speed.read(15)
    assert 1000 / 0.3 < figures["tokens_per_second"] <= 1000 / 0.05
    assert "utilisation" not in figures  # The FLOPs are not known.
    assert speed.read(15) == {}


def test_no_peak_memory_where_the_system_does_not_tell(monkeypatch):
    """As on Windows, which has no module `resource`."""
    monkeypatch.setitem(sys.modules, "resource", None)
    speed = started(None)
    time.sleep(0.01)
    assert speed.read(6).keys() == {"tokens_per_second"}


def test_utilisation_is_a_share_of_the_matrix_rate():
    speed = started(1e6)
    time.sleep(0.05)
    figures = speed.read(6)
    expected = figures["tokens_per_second"] * 1e6 / matrix_rate(CPU, torch.float32)
    assert abs(figures["utilisation"] - expected) < 1e-3


def test_measuring_draws_no_random_numbers():
    matrix_rate.cache_clear()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    matrix_rate(CPU, torch.float32)
    assert torch.equal(torch.rand(3), expected)


@pytest.fixture
def precisions(monkeypatch):
    """The precisions of float32 products in the steps of training, on a processor where oneDNN is faster."""
    monkeypatch.setattr(hardware, "_has_faster_float32", lambda: True)
    seen = set()
    step = Trainer.training_step

    def noting(self, *arguments):
        seen.add(torch.get_float32_matmul_precision())
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "training_step", noting)
    yield seen
    assert torch.get_float32_matmul_precision() == "highest"


def test_training_on_blocks_multiplies_with_onednn(precisions, tmp_path):
    write_stories(tmp_path / "text.jsonl", 0, 12)
    train(toy_recipe(tmp_path / "text.jsonl"), tmp_path / "run")
    assert precisions == {"medium"}


def test_training_on_rows_of_any_length_does_not(precisions, tmp_path):
    write_items(tmp_path / "items.jsonl", "path", 2, 0, 40, False)
    tokenizer = train_tokenizer(["a b c d"], 300)
    head = {"head_type": "sequential"}
    tiny_model(vocab_size=len(tokenizer), head_config=head).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    recipe = FinetuningRecipe(
        model=str(tmp_path / "model"),
        examples=ExampleSettings(sources=str(tmp_path / "items.jsonl"), context=256),
        thoughts=ThoughtSettings(mode="drop", stages=0),
        training=TrainingSettings(steps=2, batch_tokens=512, evaluate_every=0),
        answers=AnswerSettings(number=0),
    )
    finetune(recipe, tmp_path / "run")
    assert precisions == {"highest"}


def test_the_overview_times_steps_as_they_are_trained(monkeypatch):
    seen = []
    monkeypatch.setattr(hardware, "_has_faster_float32", lambda: True)
    monkeypatch.setattr(
        overview, "_seconds_of", lambda *_: seen.append(torch.get_float32_matmul_precision()) or 1.0
    )
    assert overview.seconds_per_step(tiny_model(), TrainingSettings(batch_tokens=64), 32) == 2.0
    assert seen == ["medium", "medium"]
