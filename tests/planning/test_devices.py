"""Devices from the name of a card or from its figures."""

import itertools

import pytest

from calm.errors import InputError
from calm.planning.devices import CARDS, CardFigures, Device, Devices, devices_of

NO_FIGURES = CardFigures()


@pytest.mark.parametrize(
    ("text", "count", "card"),
    [
        ("8xH100", 8, "H100"),
        ("h200", 1, "H200"),
        ("64 x A100-80GB", 64, "A100-80"),
        ("2*rtx 4090", 2, "RTX-4090"),
        ("4X L4", 4, "L4"),
        ("NVIDIA H100", 1, "H100"),
        ("512xMI300X", 512, "MI300X"),
    ],
)
def test_cards_by_name(text, count, card):
    assert devices_of(text, NO_FIGURES) == Devices(count, CARDS[card])


def test_cards_by_figures():
    devices = devices_of("4", CardFigures(memory=24, flops=80, bandwidth=900, watts=350))
    assert devices == Devices(4, Device("card in numbers", 24 * 2**30, 80e12, 80e12, 900e9, 350))
    capped = devices_of("8xH100", CardFigures(watts=500)).device
    assert capped.watts == 500 and capped.half_flops == CARDS["H100"].half_flops


@pytest.mark.parametrize(
    ("text", "numbers", "message"),
    [
        ("8xH10", NO_FIGURES, "no card 'H10'.*use one of A100-40.*did you mean 'H100'"),
        ("toaster", NO_FIGURES, "no card 'toaster'; use one of A100-40, .*MI300X"),
        ("4090", NO_FIGURES, r"--devices 4090 names no card: add --memory, --flops, --bandwidth, --watts"),
        ("4", CardFigures(memory=24, watts=1), "--devices 4 names no card: add --flops, --bandwidth"),
        ("0xH100", NO_FIGURES, "the number of devices must be at least 1 .* got 0"),
        ("-3xH100", NO_FIGURES, "got -3"),
        ("", NO_FIGURES, "a count and a card, such as 8xH100"),
        ("8x", NO_FIGURES, "--devices 8 names no card"),
        ("9" * 30 + "xH100", NO_FIGURES, "number of devices must be"),
    ],
)
def test_mistakes_are_one_sentence(text, numbers, message):
    with pytest.raises(InputError, match=message) as error:
        devices_of(text, numbers)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_figures_must_be_positive_and_finite(value):
    with pytest.raises(InputError, match="memory must be above 0"):
        CardFigures(memory=value)


def test_table_of_cards_is_plausible():
    """Newer cards do not lose to older ones of their kind, and half precision is the faster one."""
    for card in CARDS.values():
        assert card.half_flops > 1.9 * card.single_flops and 0 < card.usable < card.memory
    generations = [CARDS[name] for name in ("A100-40", "A100-80", "H100", "H200", "B200")]
    for older, newer in itertools.pairwise(generations):
        assert newer.memory >= older.memory and newer.half_flops >= older.half_flops
        assert newer.bandwidth > older.bandwidth
