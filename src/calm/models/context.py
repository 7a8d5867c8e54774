"""Context lengths of models. One rule for all generation: a prompt and its new tokens must fit."""

from transformers import PreTrainedConfig

from calm.errors import InputError
from calm.models.configuration import CalmConfig
from calm.models.hyperparameters import chunk_size_of


def longest_context(config: PreTrainedConfig) -> int | None:
    """Length of the longest text in tokens; None if the configuration sets no limit."""
    if isinstance(config, CalmConfig):
        return config.backbone.max_position_embeddings * config.chunk_size
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions


def check_context(config: PreTrainedConfig, context: int) -> None:
    """Raise InputError if a model cannot read `context` tokens at once."""
    longest = longest_context(config) or context
    window = getattr(config.get_text_config(), "sliding_window", None) or longest
    if context > min(longest, window):
        raise InputError(
            f"the model reads at most {min(longest, window)} tokens at once, less than the context of "
            f"{context}; lower --context."
        )


def remaining_context(config: PreTrainedConfig, num_tokens: int) -> int | None:
    """Tokens that fit in the context beside `num_tokens` others; None if there is no limit.

    The others are the prompt or the new tokens. For a CALM both take whole chunks, since a prompt is padded
    in front.
    """
    longest = longest_context(config)
    if longest is None:
        return None
    chunk_size = chunk_size_of(config)
    return max(0, longest - -(-num_tokens // chunk_size) * chunk_size)


def check_room(config: PreTrainedConfig, num_tokens: int, num_new_tokens: int, num_thought: int = 0) -> None:
    """Raise ValueError if the context cannot hold the prompt, its thoughts and the new tokens.

    Args:
        config: The model's configuration.
        num_tokens: Tokens in the prompt.
        num_new_tokens: Tokens to generate.
        num_thought: Tokens that the thoughts take up; see `calm.models.thoughts.num_tokens_of`.
    """
    room = remaining_context(config, num_tokens + num_thought)
    if room is None or num_new_tokens <= room:
        return
    shorten = "shorten the prompt, or use fewer thoughts" if num_thought else "shorten the prompt"
    advice = f"request at most {room}, or {shorten}" if room else shorten
    thought = f", thoughts and their markers take {num_thought}" if num_thought else ""
    raise ValueError(
        f"the prompt has {num_tokens} tokens{thought}, and {num_new_tokens} new tokens are requested, more "
        f"than the context of {longest_context(config)}; {advice}."
    )
