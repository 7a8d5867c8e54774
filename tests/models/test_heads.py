"""What every generative head must do, and a head from outside the package."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from tiny import HEADS, tiny_config, tiny_model
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from calm import CalmConfig, CalmForCausalLM
from calm.core.gaussian import DiagonalGaussian
from calm.core.temperature import TemperatureSettings
from calm.errors import InputError
from calm.flops import Work, cost_of
from calm.models.blocks import ZeroLinear
from calm.models.heads import parse_head_config
from calm.models.heads.mean_flow import MeanFlowNoise

every_head = pytest.mark.parametrize("head_type", HEADS)
ids = torch.randint(3, 40, (2, 16), generator=torch.Generator().manual_seed(5))


def model_with(head_type: str, **fields) -> CalmForCausalLM:
    return tiny_model(head_config={"head_type": head_type, **fields})


def loss_of(head, hidden: torch.Tensor, posterior: DiagonalGaussian, *arguments) -> torch.Tensor:
    """The loss, with tokens where the head needs them."""
    tokens = {"tokens_PK": torch.randint(3, 40, (len(hidden), 4), generator=generator(9))}
    return head.loss(hidden, posterior, *arguments, **(tokens if head.needs_tokens else {}))


def states(head, count: int = 2, **options) -> torch.Tensor:
    """States as the model hands them to the head."""
    return torch.randn(count, 32 + head.config.own_size, **options)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_list_of_heads_is_complete():
    with pytest.raises(ValueError, match=f"known heads: {', '.join(HEADS)}"):
        parse_head_config({"head_type": "magic"})


@every_head
def test_draws_have_the_shape_of_latents_and_follow_the_seed(head_type):
    head = model_with(head_type).head
    hidden = states(head, 3)
    draws = head.sample(hidden, 5, generator(1))
    assert draws.shape == (5, 3, 8) and draws.isfinite().all() and draws.dtype == torch.float32
    assert torch.equal(draws, head.sample(hidden, 5, generator(1)))
    assert not torch.equal(draws, head.sample(hidden, 5, generator(2)))
    assert (draws[0] - draws[1]).abs().max() > 1e-3  # Draws of a position differ from each other.


@every_head
def test_rows_with_generators_of_their_own_do_not_depend_on_each_other(head_type):
    head = model_with(head_type).head
    hidden = states(head, 3)
    together = head.sample(hidden, 4, [generator(row) for row in range(3)])
    alone = head.sample(hidden[1:2], 4, [generator(1)])
    assert_close(together[:, 1:2], alone)


@every_head
def test_the_loss_follows_the_seed_and_reaches_every_parameter(head_type):
    model = model_with(head_type).train()
    losses = [model(ids, labels=ids, generator=generator(3)).loss for _ in range(2)]
    assert losses[0] == losses[1] and losses[0].isfinite()
    losses[0].backward()
    without = [name for name, p in model.head.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert model.backbone.embed_tokens.weight.grad.any()
    assert model.autoencoder.encoder.embed_tokens.weight.grad is None


@every_head
def test_the_loss_is_one_number_for_each_position(head_type):
    head = model_with(head_type).head
    posterior = DiagonalGaussian(torch.randn(6, 8), torch.full((6, 8), -1.0))
    loss = loss_of(head, states(head, 6), posterior, generator())
    assert loss.shape == (6,) and loss.isfinite().all()


@every_head
def test_new_heads_start_without_an_effect_of_the_hidden_state(head_type):
    """The last layer is zero, so training starts from the same loss whatever the backbone says."""
    torch.manual_seed(0)
    head = CalmForCausalLM(tiny_config(head_config=HEADS[head_type])).head
    assert any(isinstance(module, ZeroLinear) for module in head.modules())
    one, other = (head.sample(states(head), 3, generator()) for _ in range(2))
    assert_close(one, other)


@every_head
def test_saved_and_loaded(head_type, tmp_path):
    model = model_with(head_type)
    model.save_pretrained(tmp_path)
    loaded = CalmForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.head) is type(model.head) and loaded.config.head == model.config.head
    hidden = states(model.head)
    assert_close(model.head.sample(hidden, 3, generator()), loaded.head.sample(hidden, 3, generator()))


@every_head
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_other_types(head_type, dtype):
    model = model_with(head_type)
    hidden = states(model.head)
    noise = torch.randn((5, 2, 2, 8) if head_type == "diffusion" else (2, 2, 8))
    noise = torch.rand(2, 2, 4) if head_type == "sequential" else noise
    expected = model.head.sample(hidden, 2, noise=noise)
    drawn = model.to(dtype).head.sample(hidden.to(dtype), 2, noise=noise)
    assert (drawn.float() - expected).norm() / expected.norm() < (0.1 if dtype == torch.bfloat16 else 1e-4)
    assert model.draw_chunks(hidden.to(dtype), 2, generator()).shape == (2, 2, 4)
    assert 16 < model.generate(ids, max_new_tokens=4, seed=0).shape[1] <= 20
    model.train()(ids, labels=ids, generator=generator()).loss.backward()


@every_head
def test_mixed_precision(head_type):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = model_with(head_type).train()
        loss = model(ids, labels=ids, generator=generator()).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.head.parameters())


@every_head
def test_a_compiled_loss_is_the_loss(head_type):
    head = model_with(head_type).head
    hidden = states(head, 6)
    posterior = DiagonalGaussian(torch.randn(6, 8), torch.full((6, 8), -1.0))
    compiled = torch.compile(loss_of, backend="eager")
    arguments = (head, hidden, posterior, generator())
    assert_close(compiled(*arguments), loss_of(head, hidden, posterior, generator()))


@every_head
def test_a_text_does_not_depend_on_its_neighbours(head_type):
    """Whatever number of draws a row takes, it has a stream of its own."""
    model = model_with(head_type)
    together = model.generate(ids, max_new_tokens=8, seed=3, max_draws=20)
    for row in range(2):
        alone = model.generate(ids[row : row + 1], max_new_tokens=8, seed=3, max_draws=20)
        assert torch.equal(together[row, : alone.shape[1]], alone[0])


@every_head
@pytest.mark.parametrize("sampler", ["exact", "pool"])
def test_chunks_at_low_temperature(head_type, sampler):
    model = model_with(head_type)
    settings = TemperatureSettings(temperature=0.5, sampler=sampler, num_draws=20, max_draws=20)
    sampled = model.sample_chunks(states(model.head, 3), settings, generator())
    assert sampled.chunks_RK.shape == (3, 4)
    assert 16 < model.generate(ids, max_new_tokens=5, seed=0).shape[1] <= 21


@every_head
@pytest.mark.parametrize("draws", [1, 6])
def test_operations_agree_with_an_independent_counter(head_type, draws):
    """But for what a head makes of the time alone, once for all positions."""
    model, positions = model_with(head_type), 10
    hidden = states(model.head, positions)
    work = model.config.head.work(32, 8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.head.sample(hidden, draws)
    of_time = 0
    if head_type not in ("energy", "sequential"):
        calls = {"flow": 4, "diffusion": 5, "mean_flow": 2, "categorical_flow": 4}[head_type]
        of_time = 2 * calls * (16 * 32 + 32 * 32)
    expected = 2 * positions * (work.shared + draws * work.per_draw)
    assert counter.get_total_flops() - of_time == expected
    cost = cost_of(model.config, Work(draws=draws))
    assert cost.inference["head"] * 4 == pytest.approx(expected / positions)


@every_head
def test_training_operations_agree_with_an_independent_counter(head_type):
    model, positions = model_with(head_type), 50
    hidden = states(model.head, positions, requires_grad=True)
    work = model.config.head.work(32, 8)
    posterior = DiagonalGaussian(torch.randn(positions, 8), torch.full((positions, 8), -1.0))
    with FlopCounterMode(display=False) as counter:
        loss_of(model.head, hidden, posterior).sum().backward()
    expected = 2 * positions * (work.training_shared + work.training_draws * work.training_per_draw)
    # No gradient goes to noise, points and times, so their layers take a pass less.
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.12)


def test_how_a_head_is_drawn_from_can_change():
    model, hidden = model_with("flow"), torch.randn(2, 32)
    few = model.head.sample(hidden, 3, generator())
    model.change_sampling(num_steps=9, solver="heun")
    assert model.config.head.num_steps == model.head.config.num_steps == 9
    assert not torch.equal(few, model.head.sample(hidden, 3, generator()))
    with pytest.raises(ValueError, match="'num_blocks' of a trained flow head cannot be changed"):
        model.change_sampling(num_blocks=2)
    with pytest.raises(ValueError, match="solver must be one of"):
        model.change_sampling(solver="magic")
    with pytest.raises(ValueError, match="no field 'num_stepz'; did you mean 'num_steps'"):
        model.change_sampling(num_stepz=2)
    assert model.config.head.solver == "heun"


def test_the_diffusion_head_draws_with_every_sampler():
    model, hidden = model_with("diffusion"), torch.randn(2, 32)
    drawn = {}
    for sampler in ("ancestral", "ddim", "dpm"):
        model.change_sampling(sampler=sampler, num_steps=10)
        drawn[sampler] = model.head.sample(hidden, 3, generator())
        assert drawn[sampler].isfinite().all()
    noise = torch.randn(10, 3, 2, 8)
    model.change_sampling(sampler="ancestral")
    recorded = model.head.sample(hidden, 3, noise=noise)
    assert torch.equal(recorded, model.head.sample(hidden, 3, noise=noise))
    assert not torch.equal(drawn["ddim"], drawn["dpm"])


def test_mean_flow_learns_the_plain_velocity_where_times_are_equal():
    head = model_with("mean_flow").head
    posterior = DiagonalGaussian(torch.randn(3, 8), torch.full((3, 8), -1.0))
    hidden, time = torch.randn(3, 32), torch.rand(4, 3)
    noise = MeanFlowNoise(torch.randn(4, 3, 8), torch.randn(4, 3, 8), time, time)
    data = posterior.sample(4, noise=noise.posterior)
    point = noise.start + time.unsqueeze(-1) * (data - noise.start)
    predicted = head.network(point, (10 * time, 0 * time), head.prepare(hidden))
    expected = (predicted - (data - noise.start)).square().mean(-1).mean(0)
    assert_close(head.loss(hidden, posterior, noise=noise), expected)


def test_mean_flow_takes_the_derivative_along_the_path():
    """Against a difference quotient."""
    head = model_with("mean_flow").head.double()
    posterior = DiagonalGaussian(torch.randn(3, 8).double(), torch.full((3, 8), -1.0).double())
    hidden, time = torch.randn(3, 32).double(), 0.8 * torch.rand(4, 3).double()
    noise = MeanFlowNoise(torch.randn(4, 3, 8).double(), torch.randn(4, 3, 8).double(), time, time + 0.2)
    velocity = posterior.sample(4, noise=noise.posterior) - noise.start

    def average(time):
        point = noise.start + time.unsqueeze(-1) * velocity
        return head.network(point, (10 * time, 10 * (noise.end - time)), head.prepare(hidden))

    change = (average(time + 1e-4) - average(time - 1e-4)) / 2e-4
    expected = (average(time) - velocity - 0.2 * change).square().mean(-1).mean(0)
    assert_close(head.loss(hidden, posterior, noise=noise), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"head_type": ["flow"]}, "head_type must be the name of a head"),
        ({"head_type": "flow", "solver": "rk4"}, "solver must be one of euler, midpoint, heun, got 'rk4'"),
        (
            {"head_type": "flow", "num_steps": None},
            "num_steps must be a whole number of at most .*, got None",
        ),
        (
            {"head_type": "flow", "num_steps": 2.5},
            "num_steps must be a whole number of at most .*, got 2.5",
        ),
        ({"head_type": "flow", "layer_norm_eps": -1.0}, "layer_norm_eps must be above 0"),
        ({"head_type": "diffusion", "data_bound": float("nan")}, "data_bound must be a finite number"),
        ({"head_type": "diffusion", "image_likelihood": 1}, "image_likelihood must be true or false"),
        ({"head_type": "diffusion", "num_timesteps": 1}, "num_timesteps must be at least 2"),
        ({"head_type": "diffusion", "sampler": "dpm", "num_steps": 1000}, "at most 967 for the sampler dpm"),
        ({"head_type": "energy", "alpha": "1"}, "alpha must be a finite number, got '1'"),
        ({"head_type": "flow", "num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"head_type": "flow", "time_bins": -1}, "time_bins must be at least 0"),
        ({"head_type": "flow", "frequency_size": 7}, "frequency_size must be even"),
        ({"head_type": "diffusion", "sampler": "euler"}, "sampler must be one of ancestral, ddim, dpm"),
        ({"head_type": "diffusion", "num_steps": 1001}, "at most 1000 for the sampler ancestral of a"),
        ({"head_type": "diffusion", "data_bound": -1.0}, "data_bound must be at least 0"),
        ({"head_type": "diffusion", "steps": 10}, "no field 'steps'"),
        ({"head_type": "mean_flow", "instant_fraction": 1.5}, "instant_fraction must lie in"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        parse_head_config(fields)


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """The head that docs/heads.md adds, as a module of another package."""
    from calm.models.heads import base

    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    page = (Path(__file__).parents[2] / "docs/heads.md").read_text(encoding="utf-8")
    (tmp_path / "shifting_heads.py").write_text(page.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("shifting_heads", None)


def check_the_outside_head_works():
    fields = tiny_config().to_dict() | {"head_config": {"head_type": "shift", "width": 0.1}}
    model = CalmForCausalLM(CalmConfig(**fields))
    assert type(model.head).__name__ == "ShiftHead"
    assert model.train()(ids, labels=ids).loss.isfinite()
    model.change_sampling(width=0.2)
    rows = [generator(row) for row in range(2)]
    assert model.draw_chunks(torch.randn(2, 32), 3, rows).shape == (3, 2, 4)
    assert model.generate(ids, max_new_tokens=4, seed=0).shape[1] <= 20
    with pytest.raises(InputError, match="operations of a 'shift' head are not known"):
        cost_of(model.config)


def test_a_head_from_outside_the_package(outside):
    with pytest.raises(ValueError, match="unknown head_type 'shift'"):
        parse_head_config({"head_type": "shift"})
    importlib.import_module("shifting_heads")  # It calls `calm.register_head`.
    check_the_outside_head_works()


def test_a_head_of_an_installed_package_is_found_by_its_entry_point(outside):
    package = outside / "shifting_heads-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: shifting-heads\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[calm.heads]\nshift = shifting_heads\n")
    check_the_outside_head_works()
