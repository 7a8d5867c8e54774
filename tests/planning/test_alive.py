"""Live memory: what counts, until when, and under which label."""

import torch

from calm.planning.alive import GRADIENTS, WORKSPACE, AliveBytes, AssumeTrueMasks

KIB = 256  # Numbers in float32.


def test_views_extend_a_tensors_life_and_in_place_operations_are_free():
    weight = torch.ones(4 * KIB)
    with AliveBytes() as alive:
        first = torch.zeros(KIB)
        view = first.view(16, 16)[3:]
        first.add_(1)
        weight.mul_(2)  # Created before, so not counted.
        del first
        assert alive.peak() == {WORKSPACE: 1024}  # The view keeps the memory alive.
        second = view.new_zeros(2 * KIB)
        assert alive.peak() == {WORKSPACE: 3072}
        del view, second
        third = torch.zeros(KIB)
        assert alive.peak() == {WORKSPACE: 3072}
        del third


def test_peak_is_split_by_label():
    with AliveBytes() as alive:
        kept, temporary = torch.zeros(KIB), torch.zeros(KIB)
        del temporary
        alive.label([{"any": (kept,)}], "kept")
        later = torch.zeros(2 * KIB)
        alive.label_rest("rest")
        del later
        assert alive.peak() == {"kept": 1024, "rest": 2048}


def test_peak_without_gradients_can_be_another_moment():
    weight = torch.nn.Parameter(torch.zeros(8 * KIB))
    with AliveBytes() as alive:
        work = torch.zeros(3 * KIB)
        del work
        weight.grad = torch.zeros(8 * KIB)
        alive.label(weight.grad, GRADIENTS)
        more = torch.zeros(KIB)
        assert alive.peak() == {GRADIENTS: 8192, WORKSPACE: 1024}
        del more
    weight.grad = None
    # Until it had its label, the gradient counted as workspace.
    assert alive.peak_without_gradients() == {WORKSPACE: 8192}


def test_masks_are_assumed_to_be_all_true():
    mask = torch.tensor([[True, False], [False, False]])
    values = torch.arange(12.0).view(2, 2, 3)
    assert values[mask].shape == (1, 3)
    with AssumeTrueMasks():
        assert values[mask].shape == (4, 3)
        assert values[:, 1:][mask[:, 1:]].shape == (2, 3)
        assert torch.equal(values[torch.tensor([1])], values[1:])
