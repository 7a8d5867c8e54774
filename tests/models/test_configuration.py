"""Configurations say what is wrong with them and survive a round trip."""

import pytest
from conftest import tiny_config

from calm.models.configuration import CalmAutoencoderConfig, CalmConfig


@pytest.mark.parametrize("name", ["num_encoder_layers", "num_decoder_layers"])
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_odd_layer_counts_are_refused(name, layers):
    with pytest.raises(ValueError, match=f"{name} must be even"):
        CalmAutoencoderConfig(**{name: layers})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1, got 0"),
        ({"token_dropout": 1.0}, r"token_dropout must lie in \[0, 1\), got 1.0"),
    ],
)
def test_values_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        CalmAutoencoderConfig(**changes)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"head_type": "magic"}, "unknown head_type 'magic'; known heads: energy"),
        ({"head_type": "energy", "num_drawz": 3}, "no field 'num_drawz'; did you mean 'num_draws'"),
        ({"head_type": "energy", "alpha": 2.0}, "alpha must lie in"),
        ({"head_type": "energy", "num_draws": 1}, "num_draws must be at least 2"),
    ],
)
def test_bad_heads_are_refused(head, message):
    with pytest.raises(ValueError, match=message):
        CalmConfig(head_config=head)


def test_round_trip(tmp_path):
    config = tiny_config(2)
    config.save_pretrained(tmp_path)
    loaded = CalmConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict() | {
        "transformers_version": loaded.to_dict()["transformers_version"]
    }
    assert (loaded.chunk_size, loaded.latent_size, loaded.hidden_size) == (2, 8, 32)


def test_the_backbone_has_the_vocabulary_of_the_autoencoder():
    config = tiny_config(vocab_size=77)
    assert config.backbone_config.vocab_size == config.vocab_size == 77
