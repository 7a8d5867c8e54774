"""How much text a model looks back on. One rule for all that write: a prompt and its new tokens must fit."""

from transformers import PreTrainedConfig

from calm.models.configuration import CalmConfig


def longest_context(config: PreTrainedConfig) -> int | None:
    """Tokens of the longest text; None where the configuration names no limit."""
    if isinstance(config, CalmConfig):
        return config.backbone.max_position_embeddings * config.chunk_size
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions


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


def check_room(config: PreTrainedConfig, num_tokens: int, num_new_tokens: int) -> None:
    """Raise ValueError if so many new tokens do not fit after a prompt of so many."""
    room = room_beside(config, num_tokens)
    if room is None or num_new_tokens <= room:
        return
    advice = f"ask for {room} at most, or shorten the prompt" if room else "shorten the prompt"
    raise ValueError(
        f"the prompt has {num_tokens} tokens and {num_new_tokens} are asked for, more than the context of "
        f"{longest_context(config)}; {advice}."
    )
