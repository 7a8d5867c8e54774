"""Models of a few thousand parameters, shared by all tests."""

import torch
from transformers import LlamaConfig

from calm.models.blocks import ZeroLinear
from calm.models.calm import CalmForCausalLM
from calm.models.configuration import CalmAutoencoderConfig, CalmConfig
from calm.models.thoughts import Thoughts
from calm.models.tokens import LlamaForCausalLM

PAD, EOS, BOS = 0, 1, 2
# Settings of the heads, by the names that tests use; `classes` is a sequential head with token classes.
HEADS: dict[str, dict] = {
    "energy": {"head_type": "energy", "noise_size": 8, "num_blocks": 1, "num_posterior_draws": 6},
    "flow": {"head_type": "flow", "num_blocks": 1, "num_steps": 2, "frequency_size": 16},
    "diffusion": {"head_type": "diffusion", "num_blocks": 1, "num_steps": 5, "frequency_size": 16},
    "categorical_flow": {
        "head_type": "categorical_flow",
        "num_blocks": 1,
        "frequency_size": 16,
        "rank": 6,
        "num_steps": 4,
    },
    "sequential": {"head_type": "sequential", "num_blocks": 1, "token_size": 5, "rank": 6},
    "classes": {"head_type": "sequential", "num_blocks": 1, "token_size": 5, "rank": 6, "num_classes": 7},
    "decoder": {"head_type": "decoder", "first_layers": 1, "last_layers": 1},
    "coarse_to_fine": {
        "head_type": "coarse_to_fine",
        "num_blocks": 1,
        "token_size": 5,
        "rank": 6,
        "num_classes": 7,
        "class_embedding_size": 5,
        "class_rank": 6,
    },
    "parallel": {"head_type": "parallel", "num_blocks": 1, "token_size": 5, "rank": 6},
}
WITH_CODES = ("categorical_flow", "sequential", "decoder", "coarse_to_fine", "parallel")


def tiny_llama(**changes) -> LlamaForCausalLM:
    """A token-level Llama in double precision, with the same weights each time."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**{"vocab_size": 40} | sizes | special | changes)).double().eval()


def tiny_config(chunk_size: int = 4, vocab_size: int = 40, **changes) -> CalmConfig:
    """The configuration of a CALM with a few thousand parameters."""
    special = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": BOS}
    backbone = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    head = changes.pop("head_config", {})
    defaults = HEADS.get(head.get("head_type", "energy"), {})
    head = defaults | head | ({"head_type": defaults["head_type"]} if defaults else {})
    head_type = head["head_type"]
    if head_type == "decoder":
        changes = {"input_projection": "last", "final_norm": False} | changes
    return CalmConfig(
        autoencoder_config=CalmAutoencoderConfig(
            kind="codes" if head_type in WITH_CODES else "mlp",
            vocab_size=vocab_size,
            chunk_size=chunk_size,
            latent_size=8,
            hidden_size=24,
            intermediate_size=32,
            **special,
        ),
        backbone_config=backbone | changes.pop("backbone_config", {}),
        head_config=head,
        **special,
        **changes,
    )


def tiny_model(chunk_size: int = 4, **changes) -> CalmForCausalLM:
    """A random model whose draws differ (the head's last layer starts at zero otherwise)."""
    model = CalmForCausalLM(tiny_config(chunk_size, **changes))
    with torch.no_grad():
        for module in model.head.modules():
            if isinstance(module, ZeroLinear):
                module.weight.normal_(std=1.0)
        if not model.config.autoencoder.has_codes:
            model.autoencoder.encoder.embed_tokens.weight.normal_(std=1.0)
        model.backbone.embed_tokens.weight.normal_(std=1.0)
    return model.eval()


def thinking_model(number: int = 3, chunk_size: int = 4, head_type: str = "sequential", **changes):
    """A random model whose output is sensitive to every thought, hence in double precision."""
    torch.manual_seed(4)
    model = tiny_model(chunk_size, head_config={"head_type": head_type}, **changes).double()
    with torch.no_grad():
        for weight in [*model.backbone.layers.parameters(), *model.head.parameters()]:
            if weight.ndim == 2:
                weight.mul_(10)
    model.config.thoughts = Thoughts(number, BOS, EOS, scale=1.0).as_dict()
    return model
