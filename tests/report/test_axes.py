"""Ticks and series of plots."""

import itertools

import pytest

from calm.report.axes import series_style, ticks_around


@pytest.mark.parametrize("low", [1e-3, 0.9, 1, 1.2, 2, 4.9, 5, 9.99, 3e17])
@pytest.mark.parametrize("spread", [1, 1.0001, 1.5, 4, 30, 1e3, 1e9, 1e30])
def test_ticks_are_few_round_numbers_around_the_range(low, spread):
    ticks = ticks_around(low, low * spread)
    assert 2 <= len(ticks) <= 6 and ticks == sorted(set(ticks))
    assert ticks[0] < low and low * spread < ticks[-1]
    assert all(f"{tick:e}"[0] in "125" and float(f"{tick:.0e}") == pytest.approx(tick) for tick in ticks)
    for ratio in (ticks[0] / low, low * spread / ticks[-1]):
        assert ratio > 0.08 or spread > 1e3  # Ticks extend at most about a decade beyond the range.


def test_first_thirty_series_all_look_different():
    styles = [tuple(series_style(number).values()) for number in range(30)]
    assert len(set(styles)) == 30 and series_style(30) == series_style(0)
    assert all(style[0] != following[0] for style, following in itertools.pairwise(styles))
