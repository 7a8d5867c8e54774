"""What every generative head must do, and heads from outside the package."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from tiny import HEADS, tiny_config, tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from calm import CalmConfig, CalmForCausalLM
from calm.core.gaussian import DiagonalGaussian
from calm.errors import InputError
from calm.flops import Work, cost_of
from calm.models.blocks import ZeroLinear
from calm.models.generation.sampler_registry import sampler_from
from calm.models.heads import GenerativeHead, HeadConfig, LatentHead, Target, parse_head_config, register_head
from calm.models.heads.step_network import StepHeadConfig

every_head = pytest.mark.parametrize("head_type", HEADS)
ids = torch.randint(3, 40, (2, 16), generator=torch.Generator().manual_seed(5))


def model_with(head_type: str, **fields) -> CalmForCausalLM:
    return tiny_model(head_config={"head_type": head_type, **fields})


def loss_of(head, hidden: torch.Tensor, posterior: DiagonalGaussian, generator_=None) -> torch.Tensor:
    tokens = torch.randint(3, 40, (len(hidden), 4), generator=generator(9))
    return head.loss(hidden, Target(posterior, tokens), generator=generator_)


def draws_of(head, hidden: torch.Tensor, num_draws: int, randomness=None) -> torch.Tensor:
    """Latents, or the tokens of a head that draws tokens."""
    if isinstance(head, LatentHead):
        return head.sample_latents(hidden, num_draws, randomness)
    return head.draw_chunks(head.prepare(hidden), num_draws, randomness)


def states(head, count: int = 2, **options) -> torch.Tensor:
    """States as the model hands them to the head."""
    return torch.randn(count, 32 + head.config.extra_state_size, **options)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_these_tests_cover_every_known_head():
    names = dict.fromkeys(fields["head_type"] for fields in HEADS.values())
    with pytest.raises(ValueError, match=f"known heads: {', '.join(names)}"):
        parse_head_config({"head_type": "magic"})


@every_head
def test_draws_have_their_shape_and_follow_the_seed(head_type):
    head = model_with(head_type).head
    hidden = states(head, 3)
    draws = draws_of(head, hidden, 5, generator(1))
    is_latent = isinstance(head, LatentHead)
    assert draws.shape == (5, 3, 8 if is_latent else 4) and draws.isfinite().all()
    assert draws.dtype == (torch.float32 if is_latent else torch.int64)
    assert torch.equal(draws, draws_of(head, hidden, 5, generator(1)))
    assert not torch.equal(draws, draws_of(head, hidden, 5, generator(2)))
    assert (draws[0] - draws[1]).abs().max() > 1e-3  # Draws of a position differ from each other.


@every_head
def test_chunks_are_the_decoded_latents(head_type):
    model = model_with(head_type)
    hidden, head = states(model.head, 3), model.head
    chunks = model.draw_chunks(hidden, 5, generator(1))
    assert chunks.shape == (5, 3, 4) and chunks.dtype == torch.int64
    drawn = draws_of(head, hidden, 5, generator(1))
    expected = model.autoencoder.decode_tokens(drawn) if isinstance(head, LatentHead) else drawn
    assert torch.equal(chunks, expected)


@every_head
def test_a_temperature_that_the_head_does_not_take_is_refused(head_type):
    head = model_with(head_type).head
    lowest = head.config.lowest_temperature
    prepared = head.prepare(states(head))
    assert head.draw_chunks(prepared, 1, generator(), lowest).shape == (1, 2, 4)
    with pytest.raises(ValueError, match="temperature"):
        head.draw_chunks(prepared, 1, generator(), lowest - 0.01)
    with pytest.raises(ValueError, match="temperature"):
        head.draw_chunks(prepared, 1, generator(), 1.01)


@every_head
def test_damaged_weights_are_reported(head_type):
    model = model_with(head_type)
    with torch.no_grad():
        if hasattr(model.head, "norm"):
            model.head.norm.weight.fill_(torch.nan)
        else:
            network = next(
                getattr(model.head, n) for n in ("network", "coarse", "out") if hasattr(model.head, n)
            )
            (network.out if hasattr(network, "out") else network).weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        model.draw_chunks(states(model.head), 2, generator())


@pytest.mark.parametrize("old", ["draw", "draw_at", "begin_with", "read_chunks", "loss"])
def test_methods_of_the_old_contract_are_refused_with_their_new_names(old):
    with pytest.raises(TypeError, match=rf"OldHead.{old} is now .*docs/heads.md"):
        type("OldHead", (GenerativeHead,), {old: lambda self: None})
    with pytest.raises(TypeError, match=r"OldConfig.work is now flops"):
        type("OldConfig", (HeadConfig,), {"work": lambda self: None})


@every_head
def test_rows_with_separate_generators_are_independent(head_type):
    head = model_with(head_type).head
    hidden = states(head, 3)
    together = draws_of(head, hidden, 4, [generator(row) for row in range(3)])
    alone = draws_of(head, hidden[1:2], 4, [generator(1)])
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
def test_loss_has_one_value_for_each_position(head_type):
    head = model_with(head_type).head
    posterior = DiagonalGaussian(torch.randn(6, 8), torch.full((6, 8), -1.0))
    loss = loss_of(head, states(head, 6), posterior, generator())
    assert loss.shape == (6,) and loss.isfinite().all()


@pytest.mark.parametrize("head_type", sorted(set(HEADS) - {"decoder"}))  # It transforms the state itself.
def test_new_heads_draw_the_same_whatever_the_state(head_type):
    """The last layer is zero, so training starts from the same loss whatever the state is."""
    torch.manual_seed(0)
    head = CalmForCausalLM(tiny_config(head_config=HEADS[head_type])).head
    assert any(isinstance(module, ZeroLinear) for module in head.modules())
    first, second = (draws_of(head, states(head), 3, generator()) for _ in range(2))
    assert_close(first, second)


@every_head
def test_saved_and_loaded_head_draws_the_same(head_type, tmp_path):
    model = model_with(head_type)
    model.save_pretrained(tmp_path)
    loaded = CalmForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.head) is type(model.head) and loaded.config.head == model.config.head
    hidden = states(model.head)
    assert_close(draws_of(loaded.head, hidden, 3, generator()), draws_of(model.head, hidden, 3, generator()))


@every_head
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_heads_work_in_bfloat16_and_float64(head_type, dtype):
    model = model_with(head_type)
    hidden = states(model.head)
    if isinstance(model.head, LatentHead):
        noise = torch.randn((5, 2, 2, 8) if head_type == "diffusion" else (2, 2, 8))
        expected = model.head.sample_latents(hidden, 2, noise=noise)
        drawn = model.to(dtype).head.sample_latents(hidden.to(dtype), 2, noise=noise)
        error = (drawn.float() - expected).norm() / expected.norm()
        assert error < (0.1 if dtype == torch.bfloat16 else 1e-4)
    model = model.to(dtype)
    assert model.draw_chunks(hidden.to(dtype), 2, generator()).shape == (2, 2, 4)
    assert 16 < model.generate(ids, max_new_tokens=4, seed=0).shape[1] <= 20
    model.train()(ids, labels=ids, generator=generator()).loss.backward()


@every_head
def test_gradients_are_finite_under_autocast(head_type):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model = model_with(head_type).train()
        loss = model(ids, labels=ids, generator=generator()).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad.isfinite().all() for p in model.head.parameters())


@every_head
def test_compiled_loss_is_the_same(head_type):
    head = model_with(head_type).head
    hidden = states(head, 6)
    posterior = DiagonalGaussian(torch.randn(6, 8), torch.full((6, 8), -1.0))
    target = Target(posterior, torch.randint(3, 40, (6, 4), generator=generator(9)))
    compiled = torch.compile(head.loss, backend="eager")
    expected = head.loss(hidden, target, generator=generator())
    assert_close(compiled(hidden, target, generator=generator()), expected)


@every_head
def test_a_text_does_not_depend_on_its_neighbours(head_type):
    """Each row has its own random stream, however many draws the others take."""
    model = model_with(head_type)
    together = model.generate(ids, max_new_tokens=8, seed=3, max_draws=20)
    for row in range(2):
        alone = model.generate(ids[row : row + 1], max_new_tokens=8, seed=3, max_draws=20)
        assert torch.equal(together[row, : alone.shape[1]], alone[0])


@every_head
@pytest.mark.parametrize("sampler", ["exact", "pool"])
def test_every_sampler_works_at_low_temperature(head_type, sampler):
    model = model_with(head_type)
    settings = sampler_from(temperature=0.5, sampler=sampler, num_draws=20, max_draws=20)
    sampled = model.sample_chunks(states(model.head, 3), settings, generator())
    assert sampled.chunks_RK.shape == (3, 4)
    assert 16 < model.generate(ids, max_new_tokens=5, seed=0).shape[1] <= 21


@every_head
@pytest.mark.parametrize("draws", [1, 6])
def test_flops_agree_with_an_independent_counter(head_type, draws):
    """Except for what a head computes from the time alone, once for all positions, and biases of logits.

    The counter counts no additions, and does not know the fused attention of CPUs. Rotary angles are a matrix
    product in transformers 5.17, but not in 5.23.
    """
    model, positions = model_with(head_type), 10
    hidden = states(model.head, positions)
    flops = model.config.head.flops(32, 8)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        draws_of(model.head, hidden, draws)
    config = model.config.head
    time_flops = 2 * config.calls * (16 * 32 + 32 * 32) if isinstance(config, StepHeadConfig) else 0
    num_biases = {"sequential": 40, "classes": 7 + 6, "coarse_to_fine": 7 + 6, "parallel": 40}.get(
        head_type, 0
    )
    bias_flops = 2 * positions * draws * 4 * num_biases
    expected = positions * (flops.shared + draws * flops.per_draw)
    angle_flops = sum(counter.get_flop_counts().get("LlamaRotaryEmbedding", {}).values())
    assert counter.get_total_flops() - time_flops - angle_flops + bias_flops == expected
    cost = cost_of(model.config, Work(draws=draws))
    assert cost.inference["head"] * 4 == pytest.approx(expected / positions)


@every_head
def test_training_flops_agree_with_an_independent_counter(head_type):
    model, positions = model_with(head_type), 50
    hidden = states(model.head, positions, requires_grad=True)
    flops = model.config.head.flops(32, 8)
    posterior = DiagonalGaussian(torch.randn(positions, 8), torch.full((positions, 8), -1.0))
    with FlopCounterMode(display=False) as counter:
        loss_of(model.head, hidden, posterior).sum().backward()
    expected = positions * (flops.training_shared + flops.training_draws * flops.training_per_draw)
    # Noise, points and times get no gradient, so their layers save a pass.
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.12)


def test_sampling_fields_of_a_trained_head_can_change():
    model, hidden = model_with("flow"), torch.randn(2, 32)
    few = model.head.sample_latents(hidden, 3, generator())
    model.change_sampling(num_steps=9, solver="heun")
    assert model.config.head.num_steps == model.head.config.num_steps == 9
    assert not torch.equal(few, model.head.sample_latents(hidden, 3, generator()))
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
        drawn[sampler] = model.head.sample_latents(hidden, 3, generator())
        assert drawn[sampler].isfinite().all()
    noise = torch.randn(10, 3, 2, 8)
    model.change_sampling(sampler="ancestral")
    recorded = model.head.sample_latents(hidden, 3, noise=noise)
    assert torch.equal(recorded, model.head.sample_latents(hidden, 3, noise=noise))
    assert not torch.equal(drawn["ddim"], drawn["dpm"])


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
        ({"head_type": "energy", "layer_norm_eps": 0.0}, "layer_norm_eps must be above 0"),
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
        (
            {"head_type": "mean_flow"},
            "mean_flow head has moved out of the package, to examples/a_head_of_your_own.py",
        ),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        parse_head_config(fields)


@pytest.fixture
def external_heads(tmp_path, monkeypatch):
    """The head that docs/heads.md adds, as a module of another package."""
    from calm.models.heads import registry

    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    page = (Path(__file__).parents[3] / "docs/heads.md").read_text(encoding="utf-8")
    (tmp_path / "shifting_heads.py").write_text(page.split("```python\n")[-1].split("```")[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("shifting_heads", None)


def check_the_external_head():
    fields = tiny_config().to_dict() | {"head_config": {"head_type": "shift", "width": 0.1}}
    model = CalmForCausalLM(CalmConfig(**fields))
    assert type(model.head).__name__ == "ShiftHead"
    assert model.train()(ids, labels=ids).loss.isfinite()
    model.change_sampling(width=0.2)
    rows = [generator(row) for row in range(2)]
    assert model.draw_chunks(torch.randn(2, 32), 3, rows).shape == (3, 2, 4)
    assert model.generate(ids, max_new_tokens=4, seed=0).shape[1] <= 20
    with pytest.raises(InputError, match="FLOPs of a 'shift' head are not known"):
        cost_of(model.config)


def test_head_from_outside_the_package_can_be_registered(external_heads):
    with pytest.raises(ValueError, match="unknown head_type 'shift'"):
        parse_head_config({"head_type": "shift"})
    importlib.import_module("shifting_heads")  # It calls `calm.register_head`.
    check_the_external_head()


def test_a_head_of_an_installed_package_is_found_by_its_entry_point(external_heads):
    package = external_heads / "shifting_heads-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: shifting-heads\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[calm.heads]\nshift = shifting_heads\n")
    check_the_external_head()


def test_configuration_must_be_a_dataclass():
    class Forgotten(HeadConfig):
        width: float = 1.0

    with pytest.raises(TypeError, match="Forgotten must be a dataclass"):
        register_head("forgotten", Forgotten, LatentHead)


def test_noise_must_be_a_named_tuple_of_tensors():
    model = model_with("flow")
    model.head.draw_noise = lambda *_: torch.zeros(1, 3)
    with pytest.raises(TypeError, match=r"FlowHead.draw_noise must return a named tuple of tensors or None"):
        model.draw_training_noise([generator(), generator()], ids, ids)
