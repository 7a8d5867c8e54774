"""What `sample_chunks` promises a sampler: draws for any rows, in any order, at the head's temperatures."""

from dataclasses import dataclass, field

import pytest
import torch
from tiny import tiny_model

from calm.core.temperature import ChunkSample
from calm.models.generation import sampling
from calm.models.generation.sampling import sample_chunks


@dataclass(frozen=True)
class RecordingSampler:
    """A sampler that draws once for the given rows, and records the draws."""

    rows: tuple[int, ...]
    head_temperature: float = 1.0
    recorded: list = field(default_factory=list, hash=False, compare=False)
    temperature: float = 1.0
    most_draws: int = 1

    def sample(self, draw, num_rows, randomness=None, reader=None):
        drawn_NRK = draw(1, torch.tensor(self.rows), self.head_temperature)
        self.recorded.append(drawn_NRK)
        ones = torch.ones(num_rows, dtype=torch.long)
        return ChunkSample(torch.zeros(num_rows, 4, dtype=torch.long), ones, ones, ones == 0, ones.double())


def states_of(model):
    return torch.randn(3, model.config.state_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rows", [(2, 0, 1), (1, 1, 2), (0, 1, 2, 2), (2,)])
def test_sampler_gets_draws_for_the_rows_that_it_requests(rows):
    model = tiny_model()
    states = states_of(model)
    sampler = RecordingSampler(rows)
    sample_chunks(model, states, sampler, [torch.Generator().manual_seed(row) for row in range(3)])
    for row, drawn_K in zip(rows, sampler.recorded[0][0], strict=True):
        alone = model.head.draw_chunks(
            model.head.prepare(states[row : row + 1]), 1, [torch.Generator().manual_seed(row)]
        )
        if rows.count(row) == 1:  # The second draw of a repeated row continues its generator.
            assert drawn_K.equal(alone[0, 0])


@pytest.mark.parametrize("is_large", [False, True])
def test_temperature_that_the_head_does_not_take_is_refused(is_large, monkeypatch):
    model = tiny_model()  # Its energy head takes no temperature.
    monkeypatch.setattr(sampling, "_LARGE_PROJECTION", 0 if is_large else 2**22)
    with pytest.raises(ValueError, match="temperature"):
        sample_chunks(model, states_of(model), RecordingSampler((0, 1, 2), 0.5, most_draws=2))
