"""The facts of a run, taken from its recipe, its model and its history."""

import datetime

import pytest
from tiny import tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from calm.facts import facts_of
from calm.flops import training_flops
from calm.report.facts import AUTOENCODER, LANGUAGE_MODEL
from calm.training.recipe_files import read_recipe, with_settings

HISTORY = {
    AUTOENCODER: [{"seconds": 30.0}],
    LANGUAGE_MODEL: [{"seconds": 50.0}, {"loss": 1.0, "seconds": 60.0}],
}
CODES = {"autoencoder.kind": "codes", "language_model.head": {"head_type": "sequential"}}


@pytest.fixture
def recipe():
    """800 steps for the autoencoder, then 500 for the language model, of 2048 tokens each."""
    return with_settings(read_recipe("cpu_tiny"), {"data.context": 64})


def test_a_calm_with_its_own_autoencoder_has_two_stages(recipe):
    model = tiny_model()
    facts = facts_of(recipe, model, HISTORY)
    first, second = facts.stages
    assert (first.name, first.steps, first.tokens, first.seconds) == (AUTOENCODER, 800, 800 * 2048, 30.0)
    assert (second.name, second.steps, second.tokens, second.seconds) == (
        LANGUAGE_MODEL,
        500,
        500 * 2048,
        60.0,
    )
    assert first.flops == pytest.approx(800 * 2048 * training_flops(model.config.autoencoder, 64))
    assert second.flops == pytest.approx(500 * 2048 * training_flops(model.config, 64))
    assert facts.model == "CALM, K = 4, energy head" and facts.has_trained_autoencoder
    assert sum(facts.parameters.values()) == sum(p.numel() for p in model.parameters())
    assert {"autoencoder", "backbone", "head"} <= set(facts.parameters)
    assert facts.provenance.date.date() == datetime.date.today() and facts.provenance.hardware


def test_a_calm_with_codes_has_no_autoencoder_stage(recipe):
    facts = facts_of(
        with_settings(recipe, CODES), tiny_model(head_config={"head_type": "sequential"}), HISTORY
    )
    assert [stage.name for stage in facts.stages] == [LANGUAGE_MODEL]
    assert facts.model == "CALM, K = 4, sequential head" and not facts.has_trained_autoencoder


def test_a_calm_with_the_autoencoder_of_another_run_has_one_stage(recipe):
    facts = facts_of(with_settings(recipe, {"autoencoder.path": "somewhere"}), tiny_model(), HISTORY)
    assert [stage.name for stage in facts.stages] == [LANGUAGE_MODEL] and facts.has_trained_autoencoder


def test_a_transformer_has_one_stage(recipe):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes))
    facts = facts_of(with_settings(recipe, {"model": "autoregressive", "chunk_size": 1}), model, HISTORY)
    assert facts.model == "Transformer" and not facts.has_trained_autoencoder
    assert (
        facts.flops == pytest.approx(500 * 2048 * training_flops(model.config, 64)) and facts.seconds == 60.0
    )


def test_times_that_were_not_logged_are_unknown(recipe):
    for history in ({}, {AUTOENCODER: [], LANGUAGE_MODEL: [{"train_runtime": 5.0}]}):
        facts = facts_of(recipe, tiny_model(), history)
        assert [stage.seconds for stage in facts.stages] == [None, None] and facts.seconds is None
    assert facts.flops > 0
