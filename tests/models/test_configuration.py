"""Configurations refuse wrong arguments with one sentence, and survive a round trip."""

import pytest
from tiny import tiny_config

from calm.models.configuration import CalmAutoencoderConfig, CalmConfig


@pytest.mark.parametrize("name", ["num_encoder_layers", "num_decoder_layers"])
@pytest.mark.parametrize("layers", [0, 1, 3])
def test_odd_layer_counts_are_refused(name, layers):
    with pytest.raises(ValueError, match=f"{name} must be even"):
        CalmAutoencoderConfig(**{name: layers})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chunk_size": 0}, "chunk_size must be at least 1 and at most 1,024, got 0"),
        ({"token_dropout": 1.0}, "token_dropout must be at least 0 and below 1, got 1.0"),
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
def test_invalid_heads_are_refused(head, message):
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


def test_backbone_has_the_vocabulary_of_the_autoencoder():
    config = tiny_config(vocab_size=77)
    assert config.backbone_config.vocab_size == config.vocab_size == 77


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"autoencoder": {}, "hidden_size": 96}, "autoencoder cannot be set; give autoencoder_config"),
        (
            {"hidden_size": 96},
            "hidden_size is set in backbone_config, as backbone_config={'hidd",
        ),
        ({"vocab_size": 9}, "vocab_size is set in autoencoder_config"),
        ({"head": 3}, "head cannot be set; give head_config"),
        ({"reads_tokens": True}, "reads_tokens cannot be set; give backbone_input"),
        ({"state_size": 3}, "state_size cannot be set: it follows from"),
        ({"hiden_size": 96}, "CalmConfig has no field 'hiden_size'; did you mean 'hidden_size'"),
        ({"backbone": {"hidden_size": 3}}, "backbone cannot be set; give backbone_config"),
        ({"backbone_confg": {}}, "did you mean 'backbone_config'"),
        ({"autoencoder_config": [1]}, r"autoencoder_config must be a configuration or a mapping, got \[1\]"),
        ({"backbone_config": "llama"}, "backbone_config must be a configuration or a mapping, got 'llama'"),
        ({"backbone_config": {"hidden_size": "96"}}, "backbone_config: .*expected int, got str"),
        ({"backbone_config": {"hidden": 96}}, "backbone_config has no field 'hidden'"),
        ({"autoencoder_config": {"latent": 96}}, "no field 'latent'; did you mean 'latent_size'"),
        ({"autoencoder_config": {"latent_size": "96"}}, "latent_size must be a whole number, got '96'"),
        ({"autoencoder_config": {"kl_weight": None}}, "kl_weight must be a number, got None"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps must be a number, got 'small'"),
        ({"backbone_input": 3}, "backbone_input must be one of tokens, latents, both, got "),
    ],
)
def test_wrong_arguments_are_refused_with_one_sentence(arguments, message):
    with pytest.raises(ValueError, match=message) as raised:
        CalmConfig(**arguments)
    assert "\n" not in str(raised.value)


def test_message_lists_the_fields():
    with pytest.raises(ValueError, match="fields of CalmConfig are autoencoder_config, backbone_config"):
        CalmConfig(hidden_size=96)


def test_setting_a_field_of_a_nested_configuration_is_refused():
    config = tiny_config()
    with pytest.raises(ValueError, match="hidden_size is set in backbone_config"):
        config.hidden_size = 96


def test_extra_fields_of_transformers_and_users_are_accepted():
    extra = {
        "architectures": ["CalmForCausalLM"], "dtype": "float32", "_name_or_path": "x", "use_cache": True,
        "transformers_version": "5.17.0", "note": "mine", "auto_map": {}, "quantization_config": None,
        "attn_implementation": "sdpa", "id2label": {0: "a"}, "problem_type": None, "return_dict": True,
    }  # fmt: skip
    config = CalmConfig(**(tiny_config().to_dict() | extra))
    assert config.note == "mine" and config.hidden_size == 32
