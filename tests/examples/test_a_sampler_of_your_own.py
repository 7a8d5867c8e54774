"""The sampler of examples/a_sampler_of_your_own.py: its distribution, and that all of calm works with it."""

import importlib.util
import itertools
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from calm.models.generation import sampler_registry
from calm.models.generation.batching import ChunkBatch
from calm.models.generation.sampler_registry import sampler_from

FILE = Path(__file__).parents[2] / "examples/a_sampler_of_your_own.py"


@pytest.fixture
def example(monkeypatch):
    """The example as a module; its sampler is registered during this test only."""
    monkeypatch.setattr(sampler_registry, "_SAMPLERS", dict(sampler_registry._SAMPLERS))
    spec = importlib.util.spec_from_file_location("a_sampler_of_your_own", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_the_distribution_matches_an_enumeration_of_draws(example):
    p, draws, rows = [0.6, 0.3, 0.1], 4, 40_000
    expected = torch.zeros(3, dtype=torch.float64)
    for drawn in itertools.product(range(3), repeat=draws):  # Of three chunks, four draws always repeat one.
        repeated = next(chunk for index, chunk in enumerate(drawn) if chunk in drawn[:index])
        expected[repeated] += torch.tensor([p[chunk] for chunk in drawn]).double().prod()
    generator = torch.Generator().manual_seed(0)

    def draw(num_draws, rows_R):
        number = num_draws * len(rows_R)
        return torch.multinomial(torch.tensor(p), number, True, generator=generator).view(num_draws, -1, 1)

    result = example.RepeatSampler(max_draws=draws).sample(draw, rows)
    shares = torch.bincount(result.chunks_RK.flatten(), minlength=3) / rows
    standard_errors = (expected * (1 - expected) / rows).sqrt()
    assert ((shares - expected).abs() < 4 * standard_errors).all()
    assert result.num_needed_R.min() >= 2 and result.num_needed_R.max() <= 4
    assert not result.fell_back_R.any()


def test_generate_and_batches_accept_it_as_an_object_and_by_name(example):
    model, sampler = tiny_model(), example.RepeatSampler(max_draws=9)
    assert sampler_from(sampler="repeat", temperature=1.0, max_draws=9) == sampler
    prompt = torch.tensor([[5, 6, 7]])
    written = model.generate(prompt, max_new_tokens=8, sampler=sampler, seed=1)
    by_name = model.generate(prompt, max_new_tokens=8, sampler="repeat", max_draws=9, temperature=1.0, seed=1)
    assert torch.equal(written, by_name)
    batch = ChunkBatch(model)
    batch.join([5, 6, 7], sampler, 8, seed=1)
    tokens = [token for _ in range(2) for chunk in batch.step() for token in chunk.tokens]
    assert tokens == written[0, 3 : 3 + len(tokens)].tolist() and len(tokens) >= 1
    with pytest.raises(ValueError, match=r"has no temperature, got 0.5; pass 1"):
        model.generate(prompt, sampler="repeat", temperature=0.5)


def test_the_command_line_accepts_its_name(example, monkeypatch, capsys):
    command = ["x", "generate", "stories", "Once", "--sampler", "repeat", "--temperature", "1", "--seed", "1"]
    monkeypatch.setattr(sys, "argv", [*command, "--max_new_tokens", "8", "--max_draws", "20"])
    example.main()
    assert capsys.readouterr().out.startswith("Once")


def test_unregistered_it_is_an_unknown_sampler():
    with pytest.raises(ValueError, match="sampler must be one of exact, pool, head; got 'repeat'"):
        sampler_from(sampler="repeat")
