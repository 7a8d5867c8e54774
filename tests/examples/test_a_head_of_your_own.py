"""The head of examples/a_head_of_your_own.py: its loss, and that all of calm works with it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_config, tiny_model
from torch.testing import assert_close
from toy import TOY

from calm import CalmForCausalLM
from calm.core.gaussian import DiagonalGaussian
from calm.data.stories import write_stories
from calm.flops import Work, cost_of
from calm.models.heads import Target, registry

EXAMPLES = Path(__file__).parents[2] / "examples"
FIELDS = {"head_type": "mean_flow", "num_blocks": 1, "frequency_size": 16}


@pytest.fixture
def example(monkeypatch):
    """The example as a module; its head is registered during this test only."""
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, "a_head_of_your_own", raising=False)
    import a_head_of_your_own

    return a_head_of_your_own


@pytest.fixture
def model(example) -> CalmForCausalLM:
    return tiny_model(head_config=FIELDS)


def posterior(dtype: torch.dtype = torch.float32) -> DiagonalGaussian:
    return DiagonalGaussian(torch.randn(3, 8, dtype=dtype), torch.full((3, 8), -1.0, dtype=dtype))


def loss(head, states, posterior_PZ, noise):
    return head.loss(states, Target(posterior_PZ, torch.zeros(3, 4).long()), noise)


def test_where_times_are_equal_the_loss_is_flow_matching(example, model):
    head, target = model.head, posterior()
    states, time = torch.randn(3, 32), torch.rand(4, 3)
    noise = example.MeanFlowNoise(torch.randn(4, 3, 8), torch.randn(4, 3, 8), time, time)
    data = target.sample(4, noise=noise.posterior)
    point = noise.start + time.unsqueeze(-1) * (data - noise.start)
    condition = head.prepare(states) + head.span(0 * time)
    predicted = head.network(point, 10 * time, condition)
    expected = (predicted - (data - noise.start)).square().mean(-1).mean(0)
    assert_close(loss(head, states, target, noise), expected)


def test_the_loss_has_the_derivative_along_the_path(example, model):
    """Against a difference quotient."""
    head, target = model.head.double(), posterior(torch.float64)
    states, time = torch.randn(3, 32).double(), 0.8 * torch.rand(4, 3).double()
    noise = example.MeanFlowNoise(
        torch.randn(4, 3, 8).double(), torch.randn(4, 3, 8).double(), time, time + 0.2
    )
    velocity = target.sample(4, noise=noise.posterior) - noise.start

    def average(time):
        point = noise.start + time.unsqueeze(-1) * velocity
        return head.network(point, 10 * time, head.prepare(states) + head.span(10 * (noise.end - time)))

    change = (average(time + 1e-4) - average(time - 1e-4)) / 2e-4
    expected = (average(time) - velocity - 0.2 * change).square().mean(-1).mean(0)
    assert_close(loss(head, states, target, noise), expected, rtol=1e-3, atol=1e-4)


def test_the_average_velocity_satisfies_its_identity(example):
    """For the field v(x, t) = x the average over [t, s] is x (e^(s-t) - 1) / (s - t)."""
    x, time = torch.tensor([[[0.7, -1.2]]], dtype=torch.float64), torch.tensor([[0.3]], dtype=torch.float64)
    end = torch.tensor([[0.8]], dtype=torch.float64)

    def average(x, time):
        span = (end - time).unsqueeze(-1)
        return x * torch.expm1(span) / span

    value, change = torch.func.jvp(average, (x, time), (x, torch.ones_like(time)))
    assert_close(example.average_velocity_target(x, change, time, end), value)


def test_every_parameter_is_trained_and_flops_are_counted(example, model):
    ids = torch.randint(3, 40, (2, 16))
    model.train()(ids, labels=ids).loss.backward()
    assert [name for name, p in model.head.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert cost_of(model.config, Work()).inference["head"] > 0
    model.change_sampling(num_steps=2)
    with pytest.raises(ValueError, match="instant_fraction must lie in"):
        tiny_config(head_config=FIELDS | {"instant_fraction": 1.5})


def test_train_evaluate_and_generate_from_the_command_line(example, tmp_path, monkeypatch, capsys):
    write_stories(tmp_path / "text.jsonl", 0, 40)
    (tmp_path / "toy.yaml").write_text(TOY)

    def command(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["a_head_of_your_own.py", *map(str, arguments)])
        example.main()
        return capsys.readouterr().out

    run = tmp_path / "run"
    command("train", "--recipe", tmp_path / "toy.yaml", "--data.sources", tmp_path / "text.jsonl",
            "--output", run, "--language_model.head", json.dumps(FIELDS))  # fmt: skip
    assert json.loads((run / "model/config.json").read_text())["head_config"]["head_type"] == "mean_flow"
    scores = command("evaluate", run / "model", run / "data", "--context", 64, "--max_blocks", 4)
    assert "BrierLM" in scores
    text = command("generate", run / "model", "Once", "--max_new_tokens", 4, "--head", '{"num_steps": 2}')
    assert text.startswith("Once")
