"""What training logs about its speed."""

import sys
import time
from types import SimpleNamespace

import torch
from tiny import tiny_model
from toy import toy_recipe
from transformers import Trainer

from calm import hardware
from calm.data.stories import write_stories
from calm.hardware import matrix_rate
from calm.training import overview
from calm.training.recipe import TrainingSettings
from calm.training.recipe_files import with_settings
from calm.training.speed import SpeedMeter
from calm.training.stages import train

CPU = torch.device("cpu")


def start_measuring(flops) -> SpeedMeter:
    """Speed from step 5 on, of steps with 100 tokens."""
    speed = SpeedMeter(100, flops, CPU, torch.float32)
    speed.on_train_begin(None, SimpleNamespace(global_step=5), None)
    return speed


def test_tokens_per_second_exclude_pauses(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    speed = start_measuring(None)
    with speed.pause():
        now += 3.0
    now += 0.5
    figures = speed.read(15)
    assert figures["tokens_per_second"] == 10 * 100 / 0.5
    assert "utilisation" not in figures  # The FLOPs are not known.
    assert speed.read(15) == {}


def test_peak_memory_is_left_out_if_the_system_does_not_report_it(monkeypatch):
    """As on Windows, which has no module `resource`."""
    monkeypatch.setitem(sys.modules, "resource", None)
    speed = start_measuring(None)
    time.sleep(0.01)
    assert speed.read(6).keys() == {"tokens_per_second"}


def test_utilisation_is_a_share_of_the_matrix_rate():
    speed = start_measuring(1e6)
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


def test_wide_models_train_with_faster_float32_products(monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "_has_faster_float32", lambda: True)
    seen = set()
    step = Trainer.training_step

    def record(self, model, *arguments):
        seen.add((model.config.hidden_size, torch.get_float32_matmul_precision()))
        return step(self, model, *arguments)

    monkeypatch.setattr(Trainer, "training_step", record)
    write_stories(tmp_path / "text.jsonl", 0, 12)
    recipe = with_settings(toy_recipe(tmp_path / "text.jsonl"), {"language_model.hidden_size": 128})
    train(recipe, tmp_path / "run")
    assert seen == {(16, "highest"), (128, "medium")}
    assert torch.get_float32_matmul_precision() == "highest"


def test_overview_times_steps_with_the_products_of_training(monkeypatch):
    seen = []
    monkeypatch.setattr(hardware, "_has_faster_float32", lambda: True)
    monkeypatch.setattr(
        overview, "_seconds_of", lambda *_: seen.append(torch.get_float32_matmul_precision()) or 1.0
    )
    wide = tiny_model(backbone_config={"hidden_size": 128})
    assert overview.seconds_per_step(wide, TrainingSettings(batch_tokens=64), 32) == 2.0
    assert seen == ["medium", "medium"]
