"""What `sample_chunks` promises a sampler: draws for any rows, in any order, at temperatures of the head."""

from dataclasses import dataclass, field

import pytest
import torch
from tiny import tiny_model

from calm.core.temperature import ChunkSample
from calm.models.generation import sampling
from calm.models.generation.sampling import sample_chunks


@dataclass(frozen=True)
class Asks:
    """A sampler that draws for the rows it is told, and notes what came."""

    rows: tuple[int, ...]
    of_head: float = 1.0
    came: list = field(default_factory=list, hash=False, compare=False)
    temperature: float = 1.0
    most_draws: int = 1

    def sample(self, draw, num_rows, randomness=None, reader=None):
        drawn_NRK = draw(1, torch.tensor(self.rows), self.of_head)
        self.came.append(drawn_NRK)
        ones = torch.ones(num_rows, dtype=torch.long)
        return ChunkSample(torch.zeros(num_rows, 4, dtype=torch.long), ones, ones, ones == 0, ones.double())


def states_of(model):
    return torch.randn(3, model.config.state_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rows", [(2, 0, 1), (1, 1, 2), (0, 1, 2, 2), (2,)])
def test_a_sampler_gets_the_rows_that_it_asks_for(rows):
    model = tiny_model()
    states = states_of(model)
    sampler = Asks(rows)
    sample_chunks(model, states, sampler, [torch.Generator().manual_seed(row) for row in range(3)])
    for row, drawn_K in zip(rows, sampler.came[0][0], strict=True):
        alone = model.head.draw_chunks(
            model.head.prepare(states[row : row + 1]), 1, [torch.Generator().manual_seed(row)]
        )
        if rows.count(row) == 1:  # Of a repeated row, the second draw goes on with its generator.
            assert drawn_K.equal(alone[0, 0])


@pytest.mark.parametrize("is_large", [False, True])
def test_a_temperature_that_the_head_does_not_take_is_an_error(is_large, monkeypatch):
    model = tiny_model()  # With the energy head.
    monkeypatch.setattr(sampling, "_LARGE_PROJECTION", 0 if is_large else 2**22)
    with pytest.raises(ValueError, match="temperature"):
        sample_chunks(model, states_of(model), Asks((0, 1, 2), 0.5, most_draws=2))
