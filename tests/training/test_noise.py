"""Training noise depends on the seed, the step and the block, so splitting a batch changes nothing."""

import pytest
import torch
from tiny import HEADS, tiny_model
from torch.testing import assert_close

from calm.core.chunks import IGNORED_LABEL
from calm.models.heads.contract import GenerativeHead
from calm.models.heads.energy import EnergyHead
from calm.training.noise import generators_of_blocks, number_of_block


def blocks(count=4):
    """Blocks in which some labels are ignored, and a second document starts in one."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 40, (count, 32), generator=generator)
    labels = ids.clone()
    labels[0, :3] = IGNORED_LABEL
    labels[1, 20:] = IGNORED_LABEL
    positions = torch.arange(8).repeat(count, 1)
    positions[2, 5:] = torch.arange(3)
    return ids, labels, positions


def test_noise_differs_between_seeds_steps_and_blocks():
    ids, _, _ = blocks()
    numbers = [number_of_block(row) for row in ids]
    assert len(set(numbers)) == len(numbers)

    def draws(seed, step, numbers):
        return [torch.rand((), generator=g).item() for g in generators_of_blocks(seed, step, numbers, "cpu")]

    assert draws(1, 2, numbers) == draws(1, 2, numbers)
    assert draws(1, 2, numbers[2:]) == draws(1, 2, numbers)[2:]
    different = draws(1, 2, numbers) + draws(1, 3, numbers) + draws(2, 2, numbers)
    assert len(set(different)) == len(different)


def loss_and_gradient(model, parts, total):
    """Loss and gradient of an optimizer step whose blocks come in several parts."""
    model.train().zero_grad()
    losses = []
    for ids, labels, positions in parts:
        numbers = [number_of_block(row) for row in ids]
        generators = generators_of_blocks(0, 5, numbers, torch.device("cpu"))
        batch = {"input_ids": ids, "labels": labels}
        if hasattr(model, "backbone"):
            batch["position_ids"] = positions
        noise = model.draw_training_noise(generators, **batch)
        loss = model(**batch, noise=noise, num_items_in_batch=total).loss
        loss.backward()
        losses.append(loss.detach())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return sum(losses), gradients


@pytest.mark.parametrize("kind", [*HEADS, "energy, integrated", "autoencoder"])
def test_split_batch_has_the_same_gradient(kind):
    if kind == "autoencoder":
        model = tiny_model().autoencoder.requires_grad_(True)
    else:
        head = {"head_type": kind.split(",")[0]} | ({} if kind == "decoder" else {"num_blocks": 1})
        if "energy" in kind:
            head |= {"noise_size": 8, "num_posterior_draws": 0 if "integrated" in kind else 5}
        model = tiny_model(head_config=head)
    ids, labels, positions = blocks()
    total = model.count_targets(labels, positions)
    expected = loss_and_gradient(model, [(ids, labels, positions)], total)
    order = [slice(2, 4), slice(0, 1), slice(1, 2)]
    actual = loss_and_gradient(model, [(ids[part], labels[part], positions[part]) for part in order], total)
    assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    # A batch in one part needs no count of the targets.
    uncounted = loss_and_gradient(model, [(ids, labels, positions)], None)
    assert_close(uncounted, expected)


def test_no_noise_is_drawn_for_a_head_that_does_not_implement_it():
    """Heads of other packages need not."""

    class Silent(EnergyHead):
        draw_noise = GenerativeHead.draw_noise

    model = tiny_model()
    model.head.__class__ = Silent
    generators = generators_of_blocks(0, 0, [1, 2, 3, 4], torch.device("cpu"))
    assert model.draw_training_noise(generators, *blocks()) is None
