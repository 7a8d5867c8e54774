"""Questions with steps -> rows in which thoughts replace the first steps.

Prompts are padded in front, as in `calm.data.examples`. Markers and thoughts are whole chunks, and every step
starts a chunk, so leaving one out does not shift the others against chunk boundaries:

    [pad pad p1 p2] [begin x 4] [thought] [thought] [end x 4] | [s1 s2 s3 s4] [s5 pad pad pad] [c1 EOS ..]
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calm.core.chunks import IGNORED_LABEL, positions_of
from calm.data.examples import Example
from calm.errors import InputError


@dataclass(frozen=True)
class ThinkingRow:
    """A question with its thoughts, written steps and answer.

    Args:
        before: Tokens of the prompt, markers and thoughts, in whole chunks.
        after: Tokens of the written steps and the answer, in whole chunks.
        labels: Labels of `before` and `after`; in `before`, only supervised thoughts have any.
    """

    before: list[int]
    after: list[int]
    labels: list[int]


@dataclass(frozen=True)
class RowLayout:
    """How rows are laid out.

    Args:
        chunk_size: Tokens per chunk K.
        context: Maximum tokens of a row.
        pad_token_id: Id of padding.
        thought: Placeholder id of a thought, see `calm.models.thoughts.THOUGHT`.
    """

    chunk_size: int
    context: int
    pad_token_id: int
    thought: int

    def row(
        self, example: Example, left_out: int, thoughts: Sequence[int], step_labels: Sequence[int] = ()
    ) -> ThinkingRow:
        """Lay out a row; a long prompt keeps its end.

        Args:
            example: The question.
            left_out: How many of its first steps are left out.
            thoughts: Markers and thoughts that precede the written steps and the answer, in whole chunks.
            step_labels: Labels of `thoughts` (see the method `step_labels`); empty without supervision.

        Raises:
            InputError: If there is no room for the prompt.
        """
        after, labels = self.answer(example, left_out)
        prompt = example.prompt[-self.room(len(after), len(thoughts)) :]
        front = [self.pad_token_id] * (-len(prompt) % self.chunk_size)
        before = [*front, *prompt, *thoughts]
        unlabelled = [IGNORED_LABEL] * (len(before) - len(step_labels))
        return ThinkingRow(before, after, [*unlabelled, *step_labels, *labels])

    def step_labels(self, example: Example, thoughts: Sequence[int], per_step: int) -> list[int]:
        """Labels of markers and thoughts: each thought is labelled with the step that it replaces.

        Args:
            example: The question.
            thoughts: See `row`.
            per_step: Thoughts per step; of a step with more chunks, only the first ones become labels.
        """
        size, labels = self.chunk_size, [IGNORED_LABEL] * len(thoughts)
        num_thoughts = len(thoughts) // size - 2  # Without the two markers.
        for step, tokens in enumerate(example.steps[: num_thoughts // per_step]):
            first = (1 + step * per_step) * size
            part = tokens[: per_step * size]
            labels[first : first + len(part)] = part
        return labels

    def room(self, num_written: int, num_thought: int) -> int:
        """Tokens of a prompt that fit beside the given numbers of written and thought tokens.

        Raises:
            InputError: If not even one chunk fits.
        """
        room = self.context - num_written - num_thought
        if room < self.chunk_size:
            raise InputError(
                f"{num_thought} tokens of thoughts and {num_written} of steps and answer leave no room for "
                f"a prompt in a context of {self.context}; set examples.context higher."
            )
        return room // self.chunk_size * self.chunk_size

    def num_written(self, example: Example, left_out: int) -> int:
        """Number of tokens that `answer` returns, padding included."""
        chunks = [
            -(-len(part) // self.chunk_size) for part in (*example.steps[left_out:], example.completion)
        ]
        return sum(chunks) * self.chunk_size

    def answer(self, example: Example, left_out: int) -> tuple[list[int], list[int]]:
        """Tokens of the remaining steps and the completion, and their labels."""
        after, labels = [], []
        for part in (*example.steps[left_out:], example.completion):
            padding = -len(part) % self.chunk_size
            after += [*part, *[self.pad_token_id] * padding]
            labels += [*part, *[IGNORED_LABEL] * padding]
        return after, labels

    def batch(self, rows: Sequence[ThinkingRow]) -> dict[str, Tensor]:
        """Collate rows into a batch, padded so that `after` starts in the same column in all of them.

        Returns:
            For R rows of C chunks: `input_ids`, `labels` and `attention_mask`, (R, C·K), `position_ids` and
            `is_thought`, (R, C).
        """
        size, longest = self.chunk_size, max(len(row.before) for row in rows)
        width = longest + max(len(row.after) for row in rows)
        ids_RT = torch.full((len(rows), width), self.pad_token_id)
        labels_RT = torch.full_like(ids_RT, IGNORED_LABEL)
        mask_RT = torch.zeros_like(ids_RT)
        for index, row in enumerate(rows):
            end = longest + len(row.after)
            ids_RT[index, longest - len(row.before) : end] = torch.tensor([*row.before, *row.after])
            labels_RT[index, longest - len(row.before) : end] = torch.tensor(row.labels)
            mask_RT[index, longest - len(row.before) : end] = 1
        mask_RC = mask_RT[:, ::size]
        is_thought_RC = ids_RT[:, ::size] == self.thought
        return {
            "input_ids": ids_RT.masked_fill(ids_RT == self.thought, self.pad_token_id),
            "labels": labels_RT,
            "attention_mask": mask_RT,
            "position_ids": positions_of(mask_RC),
            "is_thought": is_thought_RC,
        }
