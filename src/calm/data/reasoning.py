"""Questions with steps -> rows in which the first steps are left out, and thoughts are in their place.

Prompts have padding in front, as in `calm.data.examples`. Markers and thoughts are whole chunks, and every
step begins a chunk, so that leaving one out moves no other:

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
    """A question with what is thought and written.

    Args:
        before: Tokens of the prompt and of what is thought, in whole chunks.
        after: Tokens that are written, in whole chunks.
        labels: Labels of both: of what is written, and of thoughts that are supervised.
    """

    before: list[int]
    after: list[int]
    labels: list[int]


@dataclass(frozen=True)
class Layout:
    """How rows are laid out.

    Args:
        chunk_size: Tokens per chunk K.
        context: Tokens of a row at most.
        pad_token_id: Id of padding.
        thought: What stands for a thought, see `calm.models.thoughts.THOUGHT`.
    """

    chunk_size: int
    context: int
    pad_token_id: int
    thought: int

    def row(
        self, example: Example, left_out: int, thoughts: Sequence[int], step_labels: Sequence[int] = ()
    ) -> ThinkingRow:
        """A row; of a long prompt the end is kept.

        Args:
            example: The question.
            left_out: How many of its first steps are left out.
            thoughts: What goes before the answer: markers and thoughts, in whole chunks.
            step_labels: Labels of the same (see `step_labels`); none where they are not given.

        Raises:
            InputError: If there is no room for the prompt beside what is thought and written.
        """
        after, labels = self.answer(example, left_out)
        prompt = example.prompt[-self.room(len(after), len(thoughts)) :]
        front = [self.pad_token_id] * (-len(prompt) % self.chunk_size)
        before = [*front, *prompt, *thoughts]
        unlabelled = [IGNORED_LABEL] * (len(before) - len(step_labels))
        return ThinkingRow(before, after, [*unlabelled, *step_labels, *labels])

    def step_labels(self, example: Example, thoughts: Sequence[int], per_step: int) -> list[int]:
        """Labels of markers and thoughts: the steps in whose place the thoughts are.

        Args:
            example: The question.
            thoughts: See `row`.
            per_step: Thoughts in the place of a step; of one that has more chunks, so many are labels.
        """
        size, labels = self.chunk_size, [IGNORED_LABEL] * len(thoughts)
        number = len(thoughts) // size - 2  # But for the markers.
        for step, tokens in enumerate(example.steps[: number // per_step]):
            first = (1 + step * per_step) * size
            part = tokens[: per_step * size]
            labels[first : first + len(part)] = part
        return labels

    def room(self, num_written: int, num_thought: int) -> int:
        """Tokens of a prompt that fit beside so many that are written and thought.

        Raises:
            InputError: If there is no room for any.
        """
        room = self.context - num_written - num_thought
        if room < self.chunk_size:
            raise InputError(
                f"{num_thought} tokens of thoughts and {num_written} of steps and answer leave no room for "
                f"a prompt in a context of {self.context}; set examples.context higher."
            )
        return room // self.chunk_size * self.chunk_size

    def num_written(self, example: Example, left_out: int) -> int:
        """Tokens of `answer`."""
        chunks = [
            -(-len(part) // self.chunk_size) for part in (*example.steps[left_out:], example.completion)
        ]
        return sum(chunks) * self.chunk_size

    def answer(self, example: Example, left_out: int) -> tuple[list[int], list[int]]:
        """Tokens of the steps that are left and of the completion, and their labels."""
        after, labels = [], []
        for part in (*example.steps[left_out:], example.completion):
            padding = -len(part) % self.chunk_size
            after += [*part, *[self.pad_token_id] * padding]
            labels += [*part, *[IGNORED_LABEL] * padding]
        return after, labels

    def batch(self, rows: Sequence[ThinkingRow]) -> dict[str, Tensor]:
        """Rows side by side, so that what is written begins in the same column of all.

        Returns:
            Of R rows of C chunks: `input_ids`, `labels` and `attention_mask`, (R, C·K), `position_ids` and
            `is_thought`, (R, C).
        """
        size, longest = self.chunk_size, max(len(row.before) for row in rows)
        width = longest + max(len(row.after) for row in rows)
        ids_RT = torch.full((len(rows), width), self.pad_token_id)
        labels_RT = torch.full_like(ids_RT, IGNORED_LABEL)
        mask_RT = torch.zeros_like(ids_RT)
        for number, row in enumerate(rows):
            end = longest + len(row.after)
            ids_RT[number, longest - len(row.before) : end] = torch.tensor([*row.before, *row.after])
            labels_RT[number, longest - len(row.before) : end] = torch.tensor(row.labels)
            mask_RT[number, longest - len(row.before) : end] = 1
        mask_RC = mask_RT[:, ::size]
        is_thought_RC = ids_RT[:, ::size] == self.thought
        return {
            "input_ids": ids_RT.masked_fill(ids_RT == self.thought, self.pad_token_id),
            "labels": labels_RT,
            "attention_mask": mask_RT,
            "position_ids": positions_of(mask_RC),
            "is_thought": is_thought_RC,
        }
