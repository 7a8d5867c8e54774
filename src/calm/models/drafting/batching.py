"""A batch of texts generated with a draft: they join and leave at any time, and each has its own rounds.

The interface is that of `calm.models.generation.batching.ChunkBatch`, so a server can use either.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from calm.core.random import generator_of_row
from calm.core.temperature import check_cuts, decodes_greedily
from calm.models.calm import CalmForCausalLM
from calm.models.drafting.draft import ChunkDrafter
from calm.models.drafting.generate import Drafting
from calm.models.drafting.text import DraftedText
from calm.models.generation.alternatives import ends_of, up_to_end
from calm.models.generation.rows import Failed, Row, Written
from calm.models.thoughts import Thoughts


@dataclass(frozen=True, kw_only=True)
class TokenSampler:
    """How a token-level model is sampled from.

    Args:
        temperature: T from 0 to 2; 0 is greedy decoding.
        top_p: Keep the likeliest tokens that make up this probability.
        min_p: Drop tokens whose probability is below this fraction of the likeliest token's.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"temperature must lie between 0 and 2, got {self.temperature:g}.")
        check_cuts(self.top_p, self.min_p)

    @property
    def is_greedy(self) -> bool:
        """Whether decoding is greedy."""
        return decodes_greedily(self.temperature)

    def processors(self, model: PreTrainedModel, ids_1T: Tensor, budget: int) -> LogitsProcessorList:
        """The logits processors that transformers' `generate` uses with these settings.

        They include those of the model's own generation configuration, such as a repetition penalty.
        """
        how: dict[str, Any] = {"do_sample": not self.is_greedy}
        if not self.is_greedy:
            how |= {"temperature": self.temperature, "top_k": 0, "top_p": self.top_p}
            how |= {"min_p": self.min_p} if self.min_p > 0 else {}
        writer: Any = model
        found: list[LogitsProcessorList] = []

        def take(
            _: PreTrainedModel, input_ids: Tensor, logits_processor: LogitsProcessorList, **others: Any
        ) -> Tensor:
            found.append(logits_processor)
            return input_ids

        mask_1T = torch.ones_like(ids_1T)
        writer.generate(ids_1T, attention_mask=mask_1T, custom_generate=take, max_new_tokens=budget, **how)
        return found[0]


@dataclass(eq=False)
class _Open:
    """A row, and its text once its first turn has come."""

    row: Row
    prompt: Sequence[int]
    text: DraftedText | None = None


class DraftedBatch:
    """Generates in turns, one round of one row per step: a pass for one text is as wide as a small batch.

    With the same seed, a row's text does not depend on the other rows.

    Args:
        model: The target model.
        draft: The CALM that drafts.
        num_chunks: Chunks per draft.
        max_rows: Rows that take turns; others wait.
        tokens_at_once: Prompt tokens that are read in one step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        draft: CalmForCausalLM,
        num_chunks: int = 1,
        max_rows: int = 16,
        tokens_at_once: int = 512,
    ) -> None:
        self._model, self._draft, self._num_chunks = model, draft, num_chunks
        self._max_rows, self._tokens_at_once = max_rows, tokens_at_once
        self._rows: deque[_Open] = deque()  # In order of their turns.
        self._waiting: deque[_Open] = deque()
        self._ends = frozenset(ends_of(model.generation_config))  # As in transformers' `generate`.

    def __len__(self) -> int:
        return len(self._rows) + len(self._waiting)

    def join(
        self,
        prompt: Sequence[int],
        sampler: Any,
        budget: int,
        seed: int,
        copy: int = 0,
        thoughts: Thoughts | None = None,
    ) -> Row:
        """Add a row.

        Args:
            prompt: Its tokens, at least one.
            sampler: A `TokenSampler`.
            budget: Maximum number of new tokens, at least 1.
            seed: Determines the text, together with the prompt and the copy.
            copy: Which of several texts with the same prompt and seed.
            thoughts: Must be None: drafts do not support them.
        """
        assert thoughts is None and isinstance(sampler, TokenSampler)
        row = Row(sampler, budget, generator_of_row(seed, prompt, copy, self._model.device))
        self._waiting.append(_Open(row, prompt))
        return row

    def step(self) -> list[Written | Failed]:
        """Run a round of the next row, which leaves if it ends or fails."""
        while self._waiting and len(self._rows) < self._max_rows:
            self._rows.append(self._waiting.popleft())
        if not self._rows:
            return []
        one = self._rows.popleft()
        try:
            written = self._advance(one)
        except Exception as error:
            one.row.has_ended = True
            return [Failed(one.row, error)]
        if not one.row.has_ended:
            self._rows.append(one)
        return [] if written is None else [written]

    def drop(self, row: Row) -> None:
        """Remove a row before its end; it may have left already."""
        row.has_ended = True
        self._rows = deque(one for one in self._rows if one.row is not row)
        self._waiting = deque(one for one in self._waiting if one.row is not row)

    def _advance(self, one: _Open) -> Written | None:
        """Run a round, or read a piece of the prompt and return None."""
        row, text = one.row, one.text
        if text is None:
            text = one.text = self._begun(one)
        if not text.read_ahead(self._tokens_at_once):
            return None
        accepted, drafted = text.counts.accepted, text.counts.drafted
        tokens = list(up_to_end(text.round(row.budget), self._ends))
        accepted, drafted = text.counts.accepted - accepted, text.counts.drafted - drafted
        row.budget -= len(tokens)
        ended_by: Literal["eos", "budget"] | None = None
        if tokens[-1] in self._ends:
            ended_by = "eos"
        elif row.budget == 0:
            ended_by = "budget"
        row.has_ended = ended_by is not None
        share = accepted / drafted if drafted else 1.0
        return Written(row, tokens, ended_by, num_draws=drafted, agreement=share, fell_back=False)

    def _begun(self, one: _Open) -> DraftedText:
        sampler: TokenSampler = one.row.sampler
        ids_1T = torch.tensor([list(one.prompt)], device=self._model.device)
        return DraftedText(
            self._model,
            ChunkDrafter(self._draft, sampler.temperature, self._num_chunks, lookup=Drafting.lookup),
            ids_1T,
            processors=sampler.processors(self._model, ids_1T, one.row.budget),
            is_greedy=sampler.is_greedy,
            generator=one.row.generator,
        )
