"""Ends of a text besides EOS: stop strings, a time limit, and the stopping criteria of transformers.

Shapes: A rows that have not ended, T tokens, K tokens per chunk.
"""

import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList

from calm.text.decoding import TextBuilder


class Stopping:
    """Checks each new chunk, token by token, and cuts it where its text ends.

    As in transformers, the text includes the stop string that ends it.

    Args:
        config: `stop_strings` and `max_time` are used.
        criteria: Stopping criteria of transformers; they get no scores.
        tokenizer: The model's tokenizer; stop strings need it.
        prompt_BT: Prompts.
        mask_BT: 1 on their tokens.

    Raises:
        ValueError: If there are stop strings but no tokenizer, or one is empty.
    """

    def __init__(
        self,
        config: GenerationConfig,
        criteria: StoppingCriteriaList | None,
        tokenizer: PreTrainedTokenizerBase | None,
        prompt_BT: Tensor,
        mask_BT: Tensor,
    ) -> None:
        self._criteria = StoppingCriteriaList(criteria or [])
        self._deadline = None if config.max_time is None else time.monotonic() + config.max_time
        self._builders: list[TextBuilder] = []
        stops = [config.stop_strings] if isinstance(config.stop_strings, str) else config.stop_strings or []
        if not stops:
            return
        if tokenizer is None:
            raise ValueError("stop_strings need the model's tokenizer; pass it as tokenizer.")
        if not all(stops):
            raise ValueError(f"stop_strings must not contain an empty string, got {stops!r}.")
        for row, mask in zip(prompt_BT, mask_BT.bool(), strict=True):
            self._builders.append(TextBuilder(tokenizer, stops, row[mask].tolist()))

    @property
    def is_needed(self) -> bool:
        """Whether anything but EOS can end a text."""
        return bool(self._criteria or self._builders) or self._deadline is not None

    def lengths(self, before_AT: Tensor, chunk_AK: Tensor, rows: Sequence[int]) -> Tensor:
        """Tokens of each chunk up to the end of its text, (A,); K + 1 if the text continues.

        Args:
            before_AT: Prompts and what was generated so far.
            chunk_AK: The new chunks.
            rows: Index of each row in the batch.
        """
        size = chunk_AK.shape[1]
        chunks = zip(rows, chunk_AK.tolist(), strict=True)
        until_stop = [self._until_stop(row, chunk) for row, chunk in chunks]
        length_A = torch.tensor(until_stop, device=chunk_AK.device)
        for length in range(1, size + 1) if self._criteria else ():
            is_done_A = self._criteria(torch.cat([before_AT, chunk_AK[:, :length]], dim=1), None)
            length_A = torch.where(is_done_A.to(length_A.device), length_A.clamp_max(length), length_A)
        is_late = self._deadline is not None and time.monotonic() > self._deadline
        return length_A.clamp_max(size) if is_late else length_A

    def _until_stop(self, row: int, tokens: list[int]) -> int:
        """Tokens up to the one that completes a stop string; one more than there are if none does."""
        for number, token in enumerate(tokens if self._builders else [], 1):
            self._builders[row].add([token])
            if self._builders[row].is_stopped:
                return number
        return len(tokens) + 1
