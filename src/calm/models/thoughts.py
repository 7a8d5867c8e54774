"""Continuous thoughts: the last hidden state is the next input (Coconut, Hao et al., arXiv 2412.06769).

Between question and answer the model takes n steps whose input is not a token but the previous step's last
hidden state. Nothing is detached, so the loss on the answer backpropagates through all of them.

    question  <begin>  t1 ... tn  <end>  answer

The input at t1 is the state at <begin>, and the input at t(j + 1) is the state at t(j). So n thoughts take
n + 1 forward passes with a cache; those between the first and the last are one position long.

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
from calm.models.hyperparameters import chunk_size_of
from calm.ranges import NUM_THOUGHTS, Range

logger = logging.getLogger(__name__)
THOUGHT = -1
"""Placeholder for the tokens of a thought in a sequence of token ids."""
THOUGHTS_AT_ONCE = 8
"""Most thoughts, one forward pass each, to run before other requests on the model get their turn."""
_SCALES = Range(0, 1e9, includes_low=False)
_EPS = 1e-12  # Keeps a zero state finite when it is rescaled.
Filling = Literal["state", "pause"]


@dataclass(frozen=True)
class Thoughts:
    """How a model thinks before it answers; a part of its configuration.

    Args:
        number: Number of thoughts n that it was trained with, and the default.
        begin: Id of the token before them; a CALM repeats it to fill a chunk.
        end: Id of the token after them, likewise.
        filling: What a thought reads: the previous "state", or ("pause") the token `begin` again, which gives
            as many steps but carries no state over.
        scale: Root mean square to which a state is rescaled before it is read; None leaves it unchanged.
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
            raise ValueError("thoughts.begin and thoughts.end must be token ids, 0 or above.")
        if self.filling not in get_args(Filling):
            raise ValueError(f"thoughts.filling must be state or pause, got {shown(self.filling)}.")
        if self.scale is not None:
            if isinstance(self.scale, bool) or not isinstance(self.scale, int | float):
                raise ValueError(f"thoughts.scale must be a number or null, got {shown(self.scale)}.")
            _SCALES.check("thoughts.scale", self.scale)

    def tokens(self, chunk_size: int, number: int | None = None) -> list[int]:
        """Token ids between question and answer: markers, and `THOUGHT` where a state is read.

        Args:
            chunk_size: Tokens per chunk K; 1 for a token-level model.
            number: Number of thoughts; as in training when None.
        """
        thought = THOUGHT if self.filling == "state" else self.begin
        number = self.number if number is None else number
        ids = [self.begin, *[thought] * number, self.end]
        return [token for token in ids for _ in range(chunk_size)]

    def as_dict(self) -> dict[str, Any]:
        """The fields, as stored in a configuration."""
        return asdict(self)


def thoughts_of(config: PreTrainedConfig) -> Thoughts | None:
    """How a model was trained to think; None if it was not.

    Raises:
        ValueError: If the configuration's entry is malformed.
    """
    entry = getattr(config, "thoughts", None)
    if entry is None:
        return None
    names = [field.name for field in fields(Thoughts)]
    if not isinstance(entry, dict) or set(entry) - set(names) or {"number", "begin", "end"} - set(entry):
        raise ValueError(f"thoughts must be a mapping of {', '.join(names)}, got {shown(entry)}.")
    thoughts = Thoughts(**entry)
    vocab_size = config.get_text_config().vocab_size
    if max(thoughts.begin, thoughts.end) >= vocab_size:
        raise ValueError(f"thoughts.begin and thoughts.end must be below the vocabulary size {vocab_size}.")
    return thoughts


def unlearn_thoughts(config: PreTrainedConfig, name: str, training: str) -> None:
    """Drop the thoughts of a model that is trained further without them, and log a warning.

    Args:
        config: Its configuration.
        name: Its folder or name.
        training: How it is trained further, for the message, such as "trained on text".
    """
    if thoughts_of(config) is not None:
        logger.warning("'%s' was trained with thoughts; %s, it will no longer use them.", name, training)
        config.thoughts = None


def thoughts_for(config: PreTrainedConfig, number: int | None, *, warns: bool = False) -> Thoughts | None:
    """How a model thinks when asked for `number` thoughts; None if it should not think.

    Args:
        config: Its configuration.
        number: Number of thoughts; None for as many as in training, which may be none.
        warns: Whether to log a warning if the model was not trained for so many.

    Raises:
        ValueError: If the number is out of range, or the model has no token to use as a marker.
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
            logger.warning("This model was not trained with thoughts (docs/thoughts.md).")
        return Thoughts(number, *default_markers(config))
    if warns and number > trained.number:
        logger.warning(
            "%d thoughts are more than the %d that the model was trained with, which usually makes it worse.",
            number,
            trained.number,
        )
    return replace(trained, number=number)


def num_tokens_of(thoughts: Thoughts | None, config: PreTrainedConfig) -> int:
    """Tokens of context that thoughts take up, markers included."""
    return 0 if thoughts is None else len(thoughts.tokens(chunk_size_of(config)))


def num_at_once(is_thought_C: Tensor) -> int:
    """How many leading positions to read at once, so that at most `THOUGHTS_AT_ONCE` are thoughts."""
    return int((is_thought_C.cumsum(0) <= THOUGHTS_AT_ONCE).sum())


def default_markers(config: PreTrainedConfig) -> tuple[int, int]:
    """Default marker ids, which no text contains: BOS (EOS if there is none) and EOS.

    Raises:
        ValueError: If the model has no EOS.
    """
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if not ends or ends[0] is None:
        raise ValueError("the model has no EOS token to mark its thoughts with; specify the markers.")
    return ends[0] if config.bos_token_id is None else config.bos_token_id, ends[0]


def scale_of(config: PreTrainedConfig) -> float | None:
    """Root mean square to which a model rescales its states before it reads them; see `Thoughts`."""
    thoughts = thoughts_of(config)
    return None if thoughts is None else thoughts.scale


class Thinking(NamedTuple):
    """Which positions of a batch are thoughts.

    Args:
        is_thought_BC: Positions that read the previous state.
        scale: See `Thoughts`.
        before_BD: States before the first position, for rows that start with a thought; entries beyond the
            first D are ignored.
    """

    is_thought_BC: Tensor
    scale: float | None = None
    before_BD: Tensor | None = None

    def passes(self) -> Iterator[tuple[int, int]]:
        """Start and end position of each forward pass: a pass starts wherever any row has a thought."""
        has_thought_C = self.is_thought_BC.any(0).tolist()
        starts = [position for position, thinks in enumerate(has_thought_C) if thinks or position == 0]
        return itertools.pairwise([*starts, len(has_thought_C)])


def read_positions(
    backbone: LlamaModel,
    inputs_BCD: Tensor,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: Cache | None = None,
    thinking: Thinking | None = None,
) -> Tensor:
    """Backbone states (B, C, D) at all positions, in one forward pass, or one more than there are thoughts.

    Rows may think at different positions, and any number of times. Where only some rows have a thought, the
    others read their own input.

    Args:
        backbone: The backbone.
        inputs_BCD: Input of each position; ignored at thoughts.
        mask: 1 on positions that hold text, those in the cache included, (B, all positions); without thoughts
            also 4D, added to attention scores.
        position_ids: Index of each position in its text, (B, C).
        cache: Cache of earlier positions, to which these are added.
        thinking: Which positions are thoughts; none when None.

    Raises:
        ValueError: If a row starts with a thought without a state before it, or gradient checkpointing is
            on, which drops the cache that thoughts need.
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
        raise ValueError("thoughts need the KV cache, which gradient checkpointing drops; turn it off.")
    cache = DynamicCache(config=backbone.config) if cache is None else cache
    num_cached, last_BD, states = cache.get_seq_length(), thinking.before_BD, list[Tensor]()
    for start, end in thinking.passes():
        part_BcD = inputs_BCD[:, start:end]
        if thinking.is_thought_BC[:, start].any():
            if last_BD is None:
                raise ValueError("a row cannot begin with a thought: there is no earlier state to read.")
            thought_BD = rescale(last_BD[:, : part_BcD.shape[-1]], thinking.scale).to(part_BcD.dtype)
            first_BD = torch.where(thinking.is_thought_BC[:, start, None], thought_BD, part_BcD[:, 0])
            part_BcD = torch.cat([first_BD.unsqueeze(1), part_BcD[:, 1:]], dim=1)
        part_mask = None if mask is None else mask[:, : num_cached + end]
        part_position_ids = None if position_ids is None else position_ids[:, start:end]
        states.append(read(part_BcD, part_mask, part_position_ids, cache))
        state_BD = states[-1][:, -1]
        if thinking.before_BD is not None and mask is not None:
            # A row with nothing but padding so far keeps its earlier state.
            has_begun_B1 = mask[:, num_cached : num_cached + end].bool().any(-1, keepdim=True)
            state_BD = torch.where(has_begun_B1, state_BD, last_BD[:, : state_BD.shape[-1]])  # type: ignore[index]
        last_BD = state_BD
    return torch.cat(states, dim=1)


def rescale(states_PD: Tensor, scale: float | None) -> Tensor:
    """Rescale states to a root mean square before they are fed back; None leaves them unchanged."""
    if scale is None:
        return states_PD
    wide_PD = states_PD.float() if states_PD.dtype in (torch.float16, torch.bfloat16) else states_PD
    factor_P1 = scale * wide_PD.pow(2).mean(-1, keepdim=True).clamp_min(_EPS).rsqrt()
    return (wide_PD * factor_P1).to(states_PD.dtype)
