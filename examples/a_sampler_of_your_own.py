"""A sampler outside the package, in one file: draw until some chunk comes a second time, and take that one.

    python examples/a_sampler_of_your_own.py generate stories "Once upon" --sampler repeat --temperature 1

That is the `calm` command with this sampler among those it knows; from Python, `generate` takes the object:

    model.generate(**prompt, sampler=RepeatSampler(max_draws=50))

It sharpens a distribution with a few draws and no temperature: the likelier a chunk, the sooner it comes a
second time. (What it gives is not P(x)^2 normalized, which is the exact sampler at T = 0.5.)
"""

from dataclasses import dataclass

import torch

from calm import register_sampler
from calm.cli import main
from calm.core.pool import Pool, TokenReader
from calm.core.random import Randomness
from calm.core.samplers import Draw
from calm.core.temperature import ChunkSample


@dataclass(frozen=True, kw_only=True)
class RepeatSampler:
    """Takes the first chunk that is drawn twice, or the first of all where none is.

    Args:
        temperature: Accepted so that the command line can pass one; 1 only.
        max_draws: Draws of a row, at least 2.
    """

    temperature: float = 1.0
    max_draws: int = 50

    def __post_init__(self) -> None:
        if self.temperature != 1:
            raise ValueError(f"the repeat sampler has no temperature, got {self.temperature:g}; pass 1.")
        if self.max_draws < 2:
            raise ValueError(f"max_draws must be at least 2, got {self.max_draws}.")

    @property
    def most_draws(self) -> int:
        """Draws of a row that are held at once."""
        return self.max_draws

    def sample(
        self, draw: Draw, num_rows: int, randomness: Randomness = None, reader: TokenReader | None = None
    ) -> ChunkSample:
        """One chunk for every row; shapes: R rows, N draws."""
        rows_R = torch.arange(num_rows)
        pool = Pool(draw(self.max_draws, rows_R), reader)
        number_RN = pool.number()  # Equal numbers for equal chunks.
        is_equal_RNN = number_RN.unsqueeze(2) == number_RN.unsqueeze(1)
        came_before_RN = is_equal_RNN.tril(-1).any(-1)
        first_R = came_before_RN.int().argmax(-1)  # 0 where nothing repeats: the first draw.
        made_R = torch.full_like(first_R, self.max_draws)
        agreement_R = is_equal_RNN[rows_R, first_R].double().mean(-1)
        is_repeated_R = came_before_RN.any(-1)
        needed_R = torch.where(is_repeated_R, first_R + 1, made_R)
        return ChunkSample(pool.chunks(first_R, rows_R), made_R, needed_R, ~is_repeated_R, agreement_R)


register_sampler("repeat", RepeatSampler)

if __name__ == "__main__":
    main()
