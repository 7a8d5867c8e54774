"""Configurations of checkpoints: `CalmAutoencoderConfig` and `CalmConfig`."""

from dataclasses import asdict, fields
from typing import Any, ClassVar, get_args

from transformers import LlamaConfig, PreTrainedConfig

from calm.errors import cause_of, shown
from calm.models.fields import check_fields, check_heads, check_names, declared_fields
from calm.models.foreign import check_functions
from calm.models.heads import HeadConfig, parse_head_config, with_sampling, with_training
from calm.models.hyperparameters import (
    AutoencoderHyperparameters,
    AutoencoderKind,
    BackboneInput,
    InputHyperparameters,
)
from calm.models.thoughts import thoughts_of
from calm.models.token_layers import layer_sizes

AUTOENCODER_KINDS = get_args(AutoencoderKind)


class CalmAutoencoderConfig(PreTrainedConfig, AutoencoderHyperparameters):
    """Configuration of the chunk autoencoder (paper section 2): its hyperparameters and the fields below.

    With kind "codes", each token has a fixed random code of Z / K dimensions, a latent concatenates the codes
    of its tokens, and nothing is trained (see calm.models.codes). In the "mlp" encoder and decoder, half of
    the blocks act on tokens, half on chunks.

    Args:
        vocab_size: Number of token ids V.
        chunk_size: Tokens per chunk K.
        dropped_token_id: Token id that replaces dropped tokens.
        rms_norm_eps: Epsilon of the norms.
        initializer_range: Standard deviation of new weights.
    """

    model_type = "calm_autoencoder"

    vocab_size: int = 4096
    chunk_size: int = 4
    dropped_token_id: int = 0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_names(type(self), kwargs)
        check_fields(self)
        for name in () if self.has_codes else ("num_encoder_layers", "num_decoder_layers"):
            if (layers := getattr(self, name)) < 2 or layers % 2:
                raise ValueError(
                    f"{name} must be even (half on tokens, half on chunks) and at least 2, got {layers}."
                )
        if self.kind not in AUTOENCODER_KINDS:
            raise ValueError(f"kind must be one of {', '.join(AUTOENCODER_KINDS)}, got '{self.kind}'.")
        if self.has_codes:
            if self.latent_size % self.chunk_size:
                raise ValueError(
                    f"latent_size must be a multiple of the chunk size {self.chunk_size} for codes, "
                    f"got {self.latent_size}."
                )
            self.hidden_size = self.latent_size // self.chunk_size
        super().__post_init__(**kwargs)

    @property
    def has_codes(self) -> bool:
        """Whether latents are concatenated fixed codes of tokens."""
        return self.kind == "codes"


BACKBONE_INPUTS = get_args(BackboneInput)
INPUT_PROJECTIONS = ("mlp", "last")
# Read-only properties of a `CalmConfig`, and the field that determines each; None for several.
_PROPERTIES = {
    "autoencoder": "autoencoder_config",
    "vocab_size": "autoencoder_config",
    "chunk_size": "autoencoder_config",
    "latent_size": "autoencoder_config",
    "backbone": "backbone_config",
    "hidden_size": "backbone_config",
    "num_hidden_layers": "backbone_config",
    "head": "head_config",
    "state_size": None,
    "input_size": None,
    "has_tied_scores": "head_config",
    "reads_tokens": "backbone_input",
    "reads_latents": "backbone_input",
}


class CalmConfig(PreTrainedConfig, InputHyperparameters):
    """Configuration of a continuous autoregressive language model.

    New token embeddings have their own standard deviation, `embedding_initializer_range`: with 1, tokens stay
    distinct when a large learning rate moves them all alike; the published value is 0.02. `backbone_input` is
    "tokens" (the backbone's own embeddings), "latents" (the mean of the autoencoder's posterior), or "both".
    The paper compares them and uses tokens.

    Args:
        autoencoder_config: The frozen chunk autoencoder; a `CalmAutoencoderConfig` or its dict.
        backbone_config: The Llama-style decoder over chunks; a `LlamaConfig` or its dict. Its
            vocabulary is always that of the autoencoder; its `max_position_embeddings` counts chunks.
        head_config: The generative head: a dict with `head_type` and the fields of that head.
        initializer_range: Standard deviation of new weights outside the backbone.
        layer_norm_eps: Epsilon of the input projection's norm.
        thoughts: How the model thinks before it answers (see `calm.models.thoughts`); None if it does not.
        input_projection: How a chunk's embeddings become one vector: "mlp", as in the paper, or "last", the
            last token's embedding plus a zero-initialized linear map of all of them.
        final_norm: Whether the backbone ends with a norm.
    """

    model_type = "calm"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]

    autoencoder_config: CalmAutoencoderConfig | dict | None = None
    backbone_config: LlamaConfig | dict | None = None
    head_config: dict | None = None
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-6
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    thoughts: dict | None = None
    input_projection: str = "mlp"
    final_norm: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        check_names(type(self), kwargs, properties=_PROPERTIES)
        if self.backbone_input not in BACKBONE_INPUTS:
            raise ValueError(
                f"backbone_input must be one of {', '.join(BACKBONE_INPUTS)}, got '{self.backbone_input}'."
            )
        self._check_projection()
        autoencoder = self.autoencoder_config or {}
        if not isinstance(autoencoder, CalmAutoencoderConfig):
            autoencoder = CalmAutoencoderConfig(**_as_mapping("autoencoder_config", autoencoder))
        check_fields(self, autoencoder.vocab_size)
        backbone = self.backbone_config or {}
        if isinstance(backbone, LlamaConfig):
            backbone = backbone.to_dict()
        backbone = dict(_as_mapping("backbone_config", backbone))
        check_names(LlamaConfig, backbone, "backbone_config")
        backbone |= {
            "vocab_size": autoencoder.vocab_size,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "embedding_initializer_range": self.embedding_initializer_range,
        }
        self.autoencoder_config = autoencoder
        self.backbone_config = _llama_config(backbone)
        head = _as_mapping("head_config", self.head_config or {"head_type": "energy"})
        self.head_config = _with_sizes(dict(head), autoencoder, self.backbone_config)
        thoughts_of(self)  # Raises if they are malformed.
        super().__post_init__(**kwargs)

    def _check_projection(self) -> None:
        if self.input_projection not in INPUT_PROJECTIONS:
            raise ValueError(
                f"input_projection must be one of {', '.join(INPUT_PROJECTIONS)}, "
                f"got {shown(self.input_projection)}."
            )
        if self.input_projection == "last" and self.backbone_input != "tokens":
            raise ValueError(
                f"input_projection 'last' requires backbone_input 'tokens', got '{self.backbone_input}'."
            )
        if not isinstance(self.final_norm, bool):
            raise ValueError(f"final_norm must be true or false, got {shown(self.final_norm)}.")

    def __setattr__(self, name: str, value: Any) -> None:
        # transformers also sets arguments that are not fields this way, from_pretrained's included.
        if name in _PROPERTIES:
            raise ValueError(_read_only_message(name, value))
        super().__setattr__(name, value)

    @property
    def sub_configs(self) -> dict[str, type[PreTrainedConfig]]:
        """Nested configurations, in the form that transformers expects."""
        return {"autoencoder_config": CalmAutoencoderConfig, "backbone_config": LlamaConfig}

    @property
    def head(self) -> HeadConfig:
        """The typed configuration of the head."""
        assert self.head_config is not None
        return parse_head_config(self.head_config)

    def change_sampling(self, **changes: Any) -> None:
        """Change how the trained head samples, such as the number of solver steps.

        Args:
            **changes: New values of fields that the head's configuration lists in `sampling_fields`.

        Raises:
            ValueError: If the head has no such field, training depends on it, or a value is out of range.
        """
        self.head_config = asdict(with_sampling(self.head, changes))

    def change_training(self, **changes: Any) -> None:
        """Change how the head is trained from now on, such as its loss.

        Args:
            **changes: New values of fields that the head's configuration lists in `training_fields`.

        Raises:
            ValueError: If the head has no such field, its weights depend on it, or a value is out of range.
        """
        self.head_config = asdict(with_training(self.head, changes))

    @property
    def autoencoder(self) -> CalmAutoencoderConfig:
        """The configuration of the autoencoder, never a dict."""
        assert isinstance(self.autoencoder_config, CalmAutoencoderConfig)
        return self.autoencoder_config

    @property
    def backbone(self) -> LlamaConfig:
        """The configuration of the backbone, never a dict."""
        assert isinstance(self.backbone_config, LlamaConfig)
        return self.backbone_config

    @property
    def vocab_size(self) -> int:
        """Number of token ids V."""
        return self.autoencoder.vocab_size

    @property
    def chunk_size(self) -> int:
        """Tokens per chunk K."""
        return self.autoencoder.chunk_size

    @property
    def reads_tokens(self) -> bool:
        """Whether the backbone reads token embeddings."""
        return self.backbone_input != "latents"

    @property
    def reads_latents(self) -> bool:
        """Whether the backbone reads latents."""
        return self.backbone_input != "tokens"

    @property
    def has_tied_scores(self) -> bool:
        """Whether the head's output layer is tied to the backbone's token embeddings."""
        return bool(getattr(self.head, "has_tied_scores", False))

    @property
    def input_size(self) -> int:
        """Size of the input projection's input for one chunk."""
        tokens = self.chunk_size * self.hidden_size if self.reads_tokens else 0
        return tokens + (self.latent_size if self.reads_latents else 0)

    @property
    def latent_size(self) -> int:
        """Dimensions of a latent Z."""
        return self.autoencoder.latent_size

    @property
    def hidden_size(self) -> int:
        """Width of the backbone D."""
        return self.backbone.hidden_size

    @property
    def state_size(self) -> int:
        """Size of a chunk's state: the backbone's, plus the head's own embedding of the chunk."""
        return self.hidden_size + self.head.extra_state_size

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers of the backbone."""
        return self.backbone.num_hidden_layers


def _with_sizes(
    head: dict[str, Any], autoencoder: CalmAutoencoderConfig, backbone: LlamaConfig
) -> dict[str, Any]:
    """All fields of a head, with the sizes of other parts filled in."""
    config = parse_head_config(head)
    if config.needs_codes and not autoencoder.has_codes:
        raise ValueError(
            f"a {config.head_type} head learns tokens and needs no trained autoencoder: set the "
            f"autoencoder's kind to 'codes', not '{autoencoder.kind}'."
        )
    names = {field.name for field in fields(config)}
    sizes = {
        "vocab_size": autoencoder.vocab_size,
        "chunk_size": autoencoder.chunk_size,
        "layer_sizes": layer_sizes(backbone),
    }
    return asdict(config) | {name: size for name, size in sizes.items() if name in names}


def _read_only_message(name: str, value: Any) -> str:
    """Error message for setting a read-only property of a `CalmConfig`."""
    field, all_fields = _PROPERTIES[name], ", ".join(declared_fields(CalmConfig))
    if field is None:
        return f"{name} cannot be set: it follows from the sizes of backbone and autoencoder."
    if field.removesuffix("_config") == name or field == "backbone_input":
        return f"{name} cannot be set; give {field}. The fields of CalmConfig are {all_fields}."
    return (
        f"{name} is set in {field}, as {field}={{'{name}': {shown(value)}}}. "
        f"The fields of CalmConfig are {all_fields}."
    )


def _as_mapping(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a configuration or a mapping, got {shown(value)}.")
    return value


def _llama_config(values: dict[str, Any]) -> LlamaConfig:
    try:
        config = LlamaConfig(**values)
        check_fields(config)
        check_heads(config)
        check_functions(config)
    except Exception as error:  # The library that validates its fields has its own exception.
        raise ValueError(f"backbone_config: {cause_of(error)}") from error
    return config
