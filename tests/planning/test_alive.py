"""What is counted as alive."""

import torch

from calm.planning.alive import GRADIENTS, WORKSPACE, AliveBytes, AssumeTrueMasks

KIB = 256  # Numbers of float32.


def test_peaks_views_and_what_happens_in_place():
    weight = torch.ones(4 * KIB)
    with AliveBytes() as alive:
        one = torch.zeros(KIB)
        view = one.view(16, 16)[3:]
        one.add_(1)
        weight.mul_(2)  # Made before: not counted.
        del one
        assert alive.peak() == {WORKSPACE: 1024}  # The view keeps it.
        two = view.new_zeros(2 * KIB)
        assert alive.peak() == {WORKSPACE: 3072}
        del view, two
        three = torch.zeros(KIB)
        assert alive.peak() == {WORKSPACE: 3072}
        del three


def test_labels_count_at_the_moment_of_the_most():
    with AliveBytes() as alive:
        kept, passing = torch.zeros(KIB), torch.zeros(KIB)
        del passing
        alive.label([{"any": (kept,)}], "kept")
        later = torch.zeros(2 * KIB)
        alive.label_rest("rest")
        del later
        assert alive.peak() == {"kept": 1024, "rest": 2048}


def test_the_most_beside_gradients_is_another_moment():
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
    # While it was made, the gradient was no gradient yet.
    assert alive.peak_without_gradients() == {WORKSPACE: 8192}


def test_every_position_of_a_mask_is_taken():
    mask = torch.tensor([[True, False], [False, False]])
    values = torch.arange(12.0).view(2, 2, 3)
    assert values[mask].shape == (1, 3)
    with AssumeTrueMasks():
        assert values[mask].shape == (4, 3)
        assert values[:, 1:][mask[:, 1:]].shape == (2, 3)
        assert torch.equal(values[torch.tensor([1])], values[1:])
