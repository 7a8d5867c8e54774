"""A batch of texts generated with a draft: they join and leave at any time, and take turns.

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
        settings: dict[str, Any] = {"do_sample": not self.is_greedy, "max_new_tokens": budget}
        if not self.is_greedy:
            settings |= {"temperature": self.temperature, "top_k": 0, "top_p": self.top_p}
            settings |= {"min_p": self.min_p} if self.min_p > 0 else {}
        captured: list[LogitsProcessorList] = []

        def capture(
            _: PreTrainedModel, input_ids: Tensor, logits_processor: LogitsProcessorList, **others: Any
        ) -> Tensor:
            captured.append(logits_processor)
            return input_ids

        generate: Any = model.generate
        generate(ids_1T, attention_mask=torch.ones_like(ids_1T), custom_generate=capture, **settings)
        return captured[0]


@dataclass(eq=False)
class _Entry:
    """A row, and its text from its first turn on."""

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
        self._active: deque[_Entry] = deque()  # In order of their turns.
        self._waiting: deque[_Entry] = deque()
        self._ends = frozenset(ends_of(model.generation_config))  # As in transformers' `generate`.

    def __len__(self) -> int:
        return len(self._active) + len(self._waiting)

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
            thoughts: Must be None: drafting does not support them.
        """
        assert thoughts is None and isinstance(sampler, TokenSampler)
        row = Row(sampler, budget, generator_of_row(seed, prompt, copy, self._model.device))
        self._waiting.append(_Entry(row, prompt))
        return row

    def step(self) -> list[Written | Failed]:
        """Run a round of the next row, which leaves if it ends or fails."""
        while self._waiting and len(self._active) < self._max_rows:
            self._active.append(self._waiting.popleft())
        if not self._active:
            return []
        entry = self._active.popleft()
        try:
            written = self._advance(entry)
        except Exception as error:
            entry.row.has_ended = True
            return [Failed(entry.row, error)]
        if not entry.row.has_ended:
            self._active.append(entry)
        return [] if written is None else [written]

    def drop(self, row: Row) -> None:
        """Remove a row before its end; it may have left already."""
        row.has_ended = True
        self._active = deque(entry for entry in self._active if entry.row is not row)
        self._waiting = deque(entry for entry in self._waiting if entry.row is not row)

    def _advance(self, entry: _Entry) -> Written | None:
        """Run a round, or read a piece of the prompt and return None."""
        row, text = entry.row, entry.text
        if text is None:
            text = entry.text = self._start_text(entry)
        if not text.read_ahead(self._tokens_at_once):
            return None
        accepted, drafted = text.counts.accepted, text.counts.drafted
        tokens = list(up_to_end(text.run_round(row.budget), self._ends))
        accepted, drafted = text.counts.accepted - accepted, text.counts.drafted - drafted
        row.budget -= len(tokens)
        ended_by: Literal["eos", "budget"] | None = None
        if tokens[-1] in self._ends:
            ended_by = "eos"
        elif row.budget == 0:
            ended_by = "budget"
        row.has_ended = ended_by is not None
        agreement = accepted / drafted if drafted else 1.0
        return Written(row, tokens, ended_by, num_draws=drafted, agreement=agreement, fell_back=False)

    def _start_text(self, entry: _Entry) -> DraftedText:
        sampler: TokenSampler = entry.row.sampler
        ids_1T = torch.tensor([list(entry.prompt)], device=self._model.device)
        return DraftedText(
            self._model,
            ChunkDrafter(self._draft, sampler.temperature, self._num_chunks, lookup=Drafting.lookup),
            ids_1T,
            processors=sampler.processors(self._model, ids_1T, entry.row.budget),
            is_greedy=sampler.is_greedy,
            generator=entry.row.generator,
        )
