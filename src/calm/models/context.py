"""How much text a model looks back on. One rule for all that write: a prompt and its new tokens must fit."""

from transformers import PreTrainedConfig

from calm.errors import InputError
from calm.models.configuration import CalmConfig


def longest_context(config: PreTrainedConfig) -> int | None:
    """Tokens of the longest text; None where the configuration names no limit."""
    if isinstance(config, CalmConfig):
        return config.backbone.max_position_embeddings * config.chunk_size
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions


def check_context(config: PreTrainedConfig, context: int) -> None:
    """Raise InputError if a model cannot read so many tokens at once."""
    longest = longest_context(config) or context
    window = getattr(config.get_text_config(), "sliding_window", None) or longest
    if context > min(longest, window):
        raise InputError(
            f"the model reads at most {min(longest, window)} tokens at once, less than the context of "
            f"{context}; lower --context."
        )


def room_beside(config: PreTrainedConfig, num_tokens: int) -> int | None:
    """Tokens that fit in the context beside so many others; None where there is no limit.

    Beside a prompt, new tokens; beside new tokens, a prompt. For a CALM both take whole chunks, since the
    padding of a prompt goes in front of it.
    """
    longest = longest_context(config)
    if longest is None:
        return None
    size = config.chunk_size if isinstance(config, CalmConfig) else 1
    return max(0, longest - -(-num_tokens // size) * size)


def check_room(config: PreTrainedConfig, num_tokens: int, num_new_tokens: int, num_thought: int = 0) -> None:
    """Raise ValueError if so many new tokens do not fit after a prompt of so many, and what is thought.

    Args:
        config: Of the model.
        num_tokens: Tokens of the prompt.
        num_new_tokens: Tokens to write.
        num_thought: See `calm.models.thoughts.num_tokens_of`.
    """
    room = room_beside(config, num_tokens + num_thought)
    if room is None or num_new_tokens <= room:
        return
    less = "shorten the prompt, or take fewer thoughts" if num_thought else "shorten the prompt"
    advice = f"ask for {room} at most, or {less}" if room else less
    thought = f", thoughts and their markers take {num_thought}" if num_thought else ""
    raise ValueError(
        f"the prompt has {num_tokens} tokens{thought} and {num_new_tokens} are asked for, more than the "
        f"context of {longest_context(config)}; {advice}."
    )
