"""Muon against its definition; which parameters get which update; schedules; optimizers by name."""

import pytest
import torch
from tiny import tiny_model
from torch import nn
from torch.testing import assert_close
from toy import toy_recipe
from transformers import LlamaConfig, LlamaForCausalLM

from calm import register_optimizer
from calm.data.stories import write_stories
from calm.errors import InputError
from calm.training import optimizers
from calm.training.check import check_steps
from calm.training.optimizers import build_optimizer, build_scheduler, check_optimizer
from calm.training.recipe import OptimizerSettings, TrainingSettings
from calm.training.recipe_files import with_settings
from calm.training.stages import train_autoencoder
from calm.training.thinking import reset_optimizer


def test_muon_steps_along_nearly_orthogonal_matrices():
    """The singular values of an update are near 1, whatever those of the gradient are."""
    layer = nn.Linear(24, 48, bias=False)
    before = layer.weight.detach().clone()
    optimizer = build_optimizer(layer, OptimizerSettings(learning_rate=0.1))
    u, _, v = torch.linalg.svd(torch.randn(48, 24), full_matrices=False)
    layer.weight.grad = u @ torch.diag(torch.logspace(-1, 1, 24)) @ v
    optimizer.step()
    # A tall matrix moves by lr · sqrt(rows / columns), in float32.
    update = (before - layer.weight.detach()) / (0.1 * 2**0.5)
    singular_values = torch.linalg.svdvals(update)
    assert singular_values.min() > 0.3
    assert singular_values.max() < 1.3
    assert_close(update @ v.T / (update @ v.T).norm(dim=0), u, atol=0.05, rtol=0)


def test_muon_is_computed_in_float32_on_a_cpu():
    layer = nn.Linear(8, 8, bias=False)
    optimizer = build_optimizer(layer, OptimizerSettings())
    group = optimizer.param_groups[0]
    (update,) = optimizer._orthogonalize(group, [torch.randn(8, 8)])
    assert update.dtype == torch.float32
    # They are not float32 numbers that were rounded to bfloat16 before.
    assert (update.bfloat16().float() != update).any()


def test_muon_is_computed_in_bfloat16_if_the_training_is():
    layer = nn.Linear(8, 8, bias=False)
    optimizer = build_optimizer(layer, OptimizerSettings(), "bf16")
    layer.weight.grad = torch.randn(8, 8)
    optimizer.step()
    resumed = build_optimizer(layer, OptimizerSettings())
    resumed.load_state_dict(optimizer.state_dict())
    for muon in (optimizer, resumed):
        (update,) = muon._orthogonalize(muon.param_groups[0], [torch.randn(8, 8)])
        assert (update.bfloat16().float() == update.float()).all()
        assert torch.linalg.svdvals(update.float()).sub(1).abs().max() < 0.7


def test_parameters_without_muon_get_the_updates_of_torch_adamw():
    """Over three steps: the bias correction depends on their number."""
    settings = OptimizerSettings(adamw_learning_rate=0.01, beta1=0.8, beta2=0.9, epsilon=1e-6)
    layers = [nn.Embedding(7, 3), nn.Embedding(7, 3)]
    layers[1].load_state_dict(layers[0].state_dict())
    expected = torch.optim.AdamW(
        layers[1].parameters(), 0.01, (0.8, 0.9), 1e-6, weight_decay=0.0, fused=False
    )
    for optimizer, layer in zip((build_optimizer(layers[0], settings), expected), layers, strict=True):
        for number in range(3):
            layer.weight.grad = torch.randn(7, 3, generator=torch.Generator().manual_seed(number))
            optimizer.step()
    assert_close(layers[0].weight, layers[1].weight)


def test_hidden_matrices_get_muon_and_other_parameters_adamw():
    model = tiny_model()
    optimizer = build_optimizer(model, OptimizerSettings())
    muon = {id(p) for group in optimizer.param_groups if group["use_muon"] for p in group["params"]}
    adamw = {id(p) for group in optimizer.param_groups if not group["use_muon"] for p in group["params"]}
    names = dict(model.named_parameters())
    assert id(names["backbone.layers.0.self_attn.q_proj.weight"]) in muon
    assert id(names["projection.expand.weight"]) in muon
    assert id(names["head.blocks.0.merge.weight"]) in muon
    for name in ("backbone.embed_tokens.weight", "head.noise_in.weight", "head.out.weight", "head.out.bias"):
        assert id(names[name]) in adamw
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert muon | adamw == trained
    assert not muon & adamw


def test_token_level_model_gets_muon_except_for_embeddings_and_norms():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes))
    optimizer = build_optimizer(model, OptimizerSettings())
    muon = {id(p) for group in optimizer.param_groups if group["use_muon"] for p in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in muon}
    assert "model.layers.0.mlp.up_proj.weight" in names
    assert not names & {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}


def test_adamw_decays_matrices_only():
    optimizer = build_optimizer(tiny_model(), OptimizerSettings(name="adamw", weight_decay=0.1))
    assert isinstance(optimizer, torch.optim.AdamW)
    decays = {p.ndim: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays == {2: 0.1, 1: 0.0}


def test_other_optimizers_are_found_by_name():
    optimizer = build_optimizer(nn.Linear(2, 2), OptimizerSettings(name="lion", learning_rate=1e-3))
    assert type(optimizer).__name__ == "Lion"
    with pytest.raises(InputError, match="there is no optimizer 'adamm'"):
        build_optimizer(nn.Linear(2, 2), OptimizerSettings(name="adamm"))


OPTIMIZER_MODULE = """
import torch
from calm import register_optimizer


def build(model, settings):
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    return torch.optim.SGD(weights, settings.learning_rate, settings.momentum, **settings.extra)


register_optimizer("sgd_of_my_own", build)
"""


def test_optimizer_of_another_package_is_found_by_its_entry_point(tmp_path, monkeypatch):
    """The package is one file and its metadata."""
    package = tmp_path / "optimizers_of_mine-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: optimizers-of-mine\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[calm.optimizers]\nsgd_of_my_own = optimizers_of_mine\n")
    (tmp_path / "optimizers_of_mine.py").write_text(OPTIMIZER_MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(optimizers, "_BUILDERS", dict(optimizers._BUILDERS))
    write_stories(tmp_path / "text.jsonl", 0, 12)
    changes = {"autoencoder.training.optimizer.extra": {"nesterov": True}}
    recipe = with_settings(toy_recipe(tmp_path / "text.jsonl", optimizer="sgd_of_my_own"), changes)
    folder = train_autoencoder(recipe, tmp_path / "run")
    state = torch.load(tmp_path / "run/checkpoints/autoencoder/checkpoint-8/optimizer.pt", weights_only=True)
    assert (folder / "config.json").is_file()
    assert state["param_groups"][0]["nesterov"]


def test_optimizer_check_finds_rejected_settings_and_unknown_names():
    def build(model, settings):
        return torch.optim.SGD(model.parameters(), settings.learning_rate, **settings.extra)

    register_optimizer("refusing", build)
    try:
        with pytest.raises(InputError, match=r"'refusing' does not accept its settings .*no_such_argument"):
            check_optimizer(OptimizerSettings(name="refusing", extra={"no_such_argument": 1}))
        with pytest.raises(
            InputError, match="use muon, adamw, refusing or the name of one in pytorch_optimizer"
        ):
            check_optimizer(OptimizerSettings(name="adamm"))
    finally:
        del optimizers._BUILDERS["refusing"]


def test_check_accepts_an_optimizer_that_needs_parts_of_the_model(monkeypatch):
    def build(model, settings):
        return torch.optim.SGD([{"params": model.head.parameters()}], settings.learning_rate)

    monkeypatch.setattr(optimizers, "_BUILDERS", dict(optimizers._BUILDERS))
    register_optimizer("head_only", build)
    check_optimizer(OptimizerSettings(name="head_only"))
    optimizer = build_optimizer(tiny_model(), OptimizerSettings(name="head_only", learning_rate=0.5))
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("name", "rate", "is_warned"),
    [("adamw", 2e-2, True), ("adamw", 3e-4, False), ("adamw", 1e-2, False), ("muon", 2e-2, False)],
)
def test_adamw_at_the_learning_rate_of_muon_is_warned_about(name, rate, is_warned, caplog):
    settings = TrainingSettings(
        steps=2, batch_tokens=64, optimizer=OptimizerSettings(name=name, learning_rate=rate)
    )
    check_steps(settings, "language_model.training", 32, 1)
    assert ("is adamw with a learning rate of 0.02" in caplog.text) == is_warned


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", {0: 0.0, 1: 0.5, 2: 1.0, 9: 1.0}),
        ("linear", {2: 1.0, 6: 0.5, 9: 0.125}),
        ("warmup_stable_decay", {1: 0.5, 2: 1.0, 5: 1.0, 6: 1.0, 8: 0.5, 9: 0.25}),
    ],
)
def test_learning_rates_of_schedules(schedule, expected):
    settings = OptimizerSettings(
        name="adamw", learning_rate=1.0, schedule=schedule, warmup_steps=2, decay_fraction=0.4
    )
    optimizer = build_optimizer(nn.Linear(2, 2), settings)
    scheduler = build_scheduler(optimizer, settings, steps=10)
    rates = []
    for _ in range(10):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    for step, rate in expected.items():
        assert rates[step] == pytest.approx(rate), f"step {step} of {rates}"


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "stablespam", "schedulefreeadamw"])
def test_reset_optimizer_continues_like_a_new_one(name):
    def weights_after(steps_before):
        torch.manual_seed(1)
        layer = nn.Linear(4, 4)
        settings = OptimizerSettings(name=name, learning_rate=1e-2)
        optimizer = build_optimizer(layer, settings)
        start = [weight.detach().clone() for weight in layer.parameters()]
        for step in range(steps_before + 3):
            if step == steps_before:
                with torch.no_grad():
                    for weight, initial in zip(layer.parameters(), start, strict=True):
                        weight.copy_(initial)
                if steps_before:
                    reset_optimizer(optimizer, build_optimizer(layer, settings))
            generator = torch.Generator().manual_seed(step - steps_before)
            optimizer.zero_grad()
            layer(torch.randn(8, 4, generator=generator)).pow(2).sum().backward()
            optimizer.step()
        return torch.cat([weight.flatten() for weight in layer.parameters()])

    assert torch.equal(weights_after(0), weights_after(5))
