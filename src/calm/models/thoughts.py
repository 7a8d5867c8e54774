"""Continuous thoughts: a model's last state is its next input (Coconut, Hao et al., arXiv 2412.06769).

Between a question and its answer the model takes n steps whose input is no token: each reads the state that
the one before ended with. Nothing is detached, so the loss of the answer trains all of them.

    question  <begin>  t1 ... tn  <end>  answer

The input at t1 is the state at <begin>, that at t(j + 1) the state at t(j). So n thoughts take n + 1 passes,
with a cache; those between the first and the last are one position long.

Shapes: B batch, C positions (chunks of a CALM, tokens of a Llama), D width.
"""

import itertools
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from transformers import LlamaModel, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from calm.errors import shown
from calm.models.caches import CACHE
from calm.ranges import NUM_THOUGHTS, Range

logger = logging.getLogger(__name__)
THOUGHT = -1
"""Stands for the tokens of a thought, where tokens stand in a row."""
THOUGHTS_AT_ONCE = 8
"""Thoughts, each a pass of its own, that are read before others who share the model have their turn."""
_SCALES = Range(0, 1e9, has_least=False)
_SMALLEST = 1e-12  # A mean square of 0 has no direction to keep.
Filling = Literal["state", "pause"]


@dataclass(frozen=True)
class Thoughts:
    """How a model thinks before it answers; a part of its configuration.

    Args:
        number: Thoughts n that it was trained with, and takes if nobody says otherwise.
        begin: Id of the token that goes before them; a chunk of a CALM is filled with it.
        end: Id of the token that goes behind them.
        filling: What a thought reads: the "state" before it, or in place of that ("pause") `begin` once more,
            which gives the same time to think, but no thread.
        scale: Root mean square that a state is brought to before it is read; None leaves it as it is.
    """

    number: int
    begin: int
    end: int
    filling: Filling = "state"
    scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("number", "begin", "end"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"thoughts.{name} must be a whole number, got {shown(getattr(self, name))}.")
        NUM_THOUGHTS.check("thoughts.number", self.number)
        if min(self.begin, self.end) < 0:
            raise ValueError("thoughts.begin and thoughts.end are ids of tokens, 0 and above.")
        if self.filling not in get_args(Filling):
            raise ValueError(f"thoughts.filling must be state or pause, got {shown(self.filling)}.")
        if self.scale is not None:
            if isinstance(self.scale, bool) or not isinstance(self.scale, int | float):
                raise ValueError(f"thoughts.scale must be a number or null, got {shown(self.scale)}.")
            _SCALES.check("thoughts.scale", self.scale)

    def tokens(self, chunk_size: int, number: int | None = None) -> list[int]:
        """What goes between question and answer: markers, and `THOUGHT` where a state is read.

        Args:
            chunk_size: Tokens per chunk K; 1 for a model of tokens.
            number: Thoughts; as the model was trained when None.
        """
        thought = THOUGHT if self.filling == "state" else self.begin
        number = self.number if number is None else number
        ids = [self.begin, *[thought] * number, self.end]
        return [one for one in ids for _ in range(chunk_size)]

    def as_dict(self) -> dict[str, Any]:
        """As a configuration keeps it."""
        return asdict(self)


def thoughts_of(config: PreTrainedConfig) -> Thoughts | None:
    """How a model was trained to think; None if it was not.

    Raises:
        ValueError: If the configuration does not say it properly.
    """
    noted = getattr(config, "thoughts", None)
    if noted is None:
        return None
    names = [field.name for field in fields(Thoughts)]
    if not isinstance(noted, dict) or set(noted) - set(names) or {"number", "begin", "end"} - set(noted):
        raise ValueError(f"thoughts must be a mapping of {', '.join(names)}, got {shown(noted)}.")
    thoughts = Thoughts(**noted)
    size = config.get_text_config().vocab_size
    if max(thoughts.begin, thoughts.end) >= size:
        raise ValueError(f"thoughts.begin and thoughts.end must be below the vocabulary's size {size}.")
    return thoughts


def unlearn_thoughts(config: PreTrainedConfig, name: str, how: str) -> None:
    """Let a model that is trained on without thoughts no longer take any, and log it.

    Args:
        config: Its configuration.
        name: Its folder or name.
        how: How it is trained on, for the message.
    """
    if thoughts_of(config) is not None:
        logger.warning("'%s' was trained to think; %s it unlearns that.", name, how)
        config.thoughts = None


def thoughts_for(config: PreTrainedConfig, number: int | None, *, warns: bool = False) -> Thoughts | None:
    """How a model thinks when it is asked for so many thoughts; None if it is not to think.

    Args:
        config: Its configuration.
        number: Thoughts; None for as many as it was trained with, which may be none.
        warns: Whether to log that a number is not one that the model was trained for.

    Raises:
        ValueError: If the number is out of range, or the model has no token that could be a marker.
    """
    trained = thoughts_of(config)
    if number is None:
        return trained
    if type(number) is not int:
        raise ValueError(f"num_thoughts must be a whole number, got {shown(number)}.")
    NUM_THOUGHTS.check("num_thoughts", number)
    if number == 0:
        return None
    if trained is None:
        if warns:
            logger.warning("This model was not trained to think (docs/thoughts.md).")
        return Thoughts(number, *default_markers(config))
    if warns and number > trained.number:
        logger.warning(
            "%d thoughts are more than the %d that the model was trained with, which mostly makes it worse.",
            number,
            trained.number,
        )
    return replace(trained, number=number)


def num_tokens_of(thoughts: Thoughts | None, config: PreTrainedConfig) -> int:
    """Tokens that the context holds for what is thought, markers included."""
    return 0 if thoughts is None else len(thoughts.tokens(getattr(config, "chunk_size", 1)))


def num_at_once(is_thought_C: Tensor) -> int:
    """How many of some positions are read at once: those before what would be a thought too many."""
    return int((is_thought_C.cumsum(0) <= THOUGHTS_AT_ONCE).sum())


def default_markers(config: PreTrainedConfig) -> tuple[int, int]:
    """Tokens that every model knows and no text holds: its beginning and its end of a text.

    Raises:
        ValueError: If it has no end of a text.
    """
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if not ends or ends[0] is None:
        raise ValueError("the model has no end-of-text token to mark its thoughts with; name the markers.")
    return ends[0] if config.bos_token_id is None else config.bos_token_id, ends[0]


def scale_of(config: PreTrainedConfig) -> float | None:
    """What a model brings its states to before it reads them; see `Thoughts`."""
    thoughts = thoughts_of(config)
    return None if thoughts is None else thoughts.scale


class Thinking(NamedTuple):
    """Which positions of some rows are thoughts.

    Args:
        is_thought_BC: Those that read the state before them.
        scale: See `Thoughts`.
        before_BD: States before the first position, for rows that go on with a thought; what is behind their
            first D numbers is left out.
    """

    is_thought_BC: Tensor
    scale: float | None = None
    before_BD: Tensor | None = None

    def passes(self) -> Iterator[tuple[int, int]]:
        """First and end of the positions of each pass: one begins wherever a row thinks."""
        thinks_C = self.is_thought_BC.any(0).tolist()
        starts = [place for place, thinks in enumerate(thinks_C) if thinks or place == 0]
        return itertools.pairwise([*starts, len(thinks_C)])


def read_positions(
    backbone: LlamaModel,
    inputs_BCD: Tensor,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: Cache | None = None,
    thinking: Thinking | None = None,
) -> Tensor:
    """States (B, C, D) of some positions: by one pass of a backbone, or one more than there are thoughts.

    Rows may think at different positions, and any number of times: a row that does not think where another
    does reads its own input there.

    Args:
        backbone: The layers.
        inputs_BCD: What is read at each position; at thoughts it does not matter.
        mask: 1 on positions that hold text, those in the cache included, (B, all positions); without thoughts
            also 4D, added to attention scores.
        position_ids: Number of each position in its text, (B, C).
        cache: What was read before; these are added.
        thinking: Which of them are thoughts.

    Raises:
        ValueError: If a row begins with a thought and there is no state before it, or gradients are
            checkpointed, which drops the cache that thoughts need.
    """

    def read(inputs: Tensor, mask: Tensor | None, position_ids: Tensor | None, cache: Cache | None) -> Tensor:
        states: Tensor = backbone(
            inputs_embeds=inputs,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=cache is not None,
            return_dict=True,
            **{CACHE: cache},
        ).last_hidden_state
        return states

    if thinking is None:
        return read(inputs_BCD, mask, position_ids, cache)
    if backbone.training and getattr(backbone, "gradient_checkpointing", False):
        raise ValueError("thoughts need the cache that gradient checkpointing drops; turn that off.")
    cache = DynamicCache(config=backbone.config) if cache is None else cache
    earlier, last_BD, states = cache.get_seq_length(), thinking.before_BD, list[Tensor]()
    for first, end in thinking.passes():
        part_BcD = inputs_BCD[:, first:end]
        if thinking.is_thought_BC[:, first].any():
            if last_BD is None:
                raise ValueError("a row cannot begin with a thought: there is no state that it could read.")
            thought_BD = scaled(last_BD[:, : part_BcD.shape[-1]], thinking.scale).to(part_BcD.dtype)
            own_BD = torch.where(thinking.is_thought_BC[:, first, None], thought_BD, part_BcD[:, 0])
            part_BcD = torch.cat([own_BD.unsqueeze(1), part_BcD[:, 1:]], dim=1)
        of_part_BC = None if position_ids is None else position_ids[:, first:end]
        states.append(read(part_BcD, None if mask is None else mask[:, : earlier + end], of_part_BC, cache))
        reached_BD = states[-1][:, -1]
        if thinking.before_BD is not None and mask is not None:
            # A row of which there was nothing but padding is still where it was before.
            is_begun_B1 = mask[:, earlier : earlier + end].bool().any(-1, keepdim=True)
            reached_BD = torch.where(is_begun_B1, reached_BD, last_BD[:, : reached_BD.shape[-1]])  # type: ignore[index]
        last_BD = reached_BD
    return torch.cat(states, dim=1)


def scaled(states_PD: Tensor, scale: float | None) -> Tensor:
    """States as they are read again: as they are, or of this root mean square."""
    if scale is None:
        return states_PD
    wide_PD = states_PD.float() if states_PD.dtype in (torch.float16, torch.bfloat16) else states_PD
    factor_P1 = scale * wide_PD.pow(2).mean(-1, keepdim=True).clamp_min(_SMALLEST).rsqrt()
    return (wide_PD * factor_P1).to(states_PD.dtype)
