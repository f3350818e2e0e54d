"""Which share of the line from base to tuned is taken: the largest within a budget, or the best at the task."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gere.blend.choice import Point, choose, grid, largest_within, within
from gere.errors import ConfigError
from gere.evaluation.general import GeneralChange


def change(value, interval=0.0):
    return GeneralChange(3 + value, value, interval, 8)


def line(height, interval=0.0):
    """A change that grows with the square of the share; it notes what was asked."""
    asked = []

    def measure(share):
        asked.append(share)
        return change(height * share**2, interval * share)

    return measure, asked


@pytest.mark.parametrize("points", [2, 3, 7, 11, 21])
def test_a_grid_goes_from_1_to_0_in_even_steps(points):
    shares = grid(points)
    assert shares[0] == 1 and shares[-1] == 0 and len(shares) == points
    assert {round(a - b, 4) for a, b in itertools.pairwise(shares)} == {round(1 / (points - 1), 4)}
    assert grid(11) == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0]


@given(st.floats(0.01, 5), st.floats(0, 1), st.floats(0, 2), st.integers(2, 21))
def test_the_largest_share_within_the_budget(height, interval, budget, points):
    measure, asked = line(height, interval)
    share, found = largest_within(measure, budget, grid(points))
    assert asked[0] == 1 and len(asked) == len({*asked}), "each once"
    assert found == measure(share) and within(found, budget)
    if share < 1:
        assert not within(measure(min(1.0, share + 0.0100001)), budget), "0.01 more is too much"


def test_the_interval_counts():
    sure, unsure = line(0.1)[0], line(0.1, interval=0.1)[0]
    assert largest_within(sure, 0.1, grid(11))[0] == 1.0
    # 0.1 a^2 + 0.1 a = 0.1 at a = 0.618.
    assert largest_within(unsure, 0.1, grid(11))[0] == 0.61


def test_as_few_shares_are_asked_as_it_takes():
    measure, asked = line(0.04)
    assert largest_within(measure, 0.05, grid(11)) == (1.0, change(0.04)) and asked == [1.0]
    measure, asked = line(1.0)
    assert largest_within(measure, 0.7, grid(11))[0] == 0.83  # sqrt(0.7) = 0.8367
    assert asked == [1.0, 0.9, 0.8, 0.85, 0.82, 0.83, 0.84]


def test_the_scan_comes_from_share_1():
    """A line that comes back down: the far part counts, since it is within the budget, too."""
    heights = {1.0: 0.0, 0.5: 9.0, 0.0: 0.0}
    assert largest_within(lambda share: change(heights[share]), 0.1, [0, 0.5, 1])[0] == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_not_within(value):
    share, found = largest_within(lambda share: change(value if share else 0.0), 1.0, grid(3))
    assert share == 0 and found.change == 0
    share, _ = largest_within(lambda share: change(0.0, math.nan if share > 0.5 else 0.0), 1.0, grid(3))
    assert share == 0.5


def test_share_0_is_within_any_budget():
    assert largest_within(lambda share: change(share), 0.0, [1.0]) == (0.0, change(0.0))


@pytest.mark.parametrize("budget", [-0.1, math.nan])
def test_a_budget_that_is_none(budget):
    with pytest.raises(ConfigError, match="budget"):
        largest_within(change, budget, grid(3))
    with pytest.raises(ConfigError, match="budget"):
        choose([Point(0.0, change(0), None)], budget, by_task=False)


POINTS = [
    Point(1.0, change(0.30), 0.40),
    Point(0.5, change(0.10, 0.02), 0.35),
    Point(0.25, change(0.05), 0.35),
    Point(0.0, change(0.0), 0.9),
]


@pytest.mark.parametrize(
    ("budget", "by_task", "share"),
    [
        (None, True, 0.25),  # of equal losses the one that forgets less
        (0.3, False, 1.0),
        (0.125, False, 0.5),
        (0.11, False, 0.25),
        (0.01, False, 0.0),
        (0.01, True, 0.0),
        (None, False, 1.0),
    ],
)
def test_a_point_is_chosen_from_those_measured(budget, by_task, share):
    assert choose(POINTS, budget, by_task).share == share
    assert choose(POINTS[::-1], budget, by_task).share == share


def test_a_choice_that_cannot_be_made_is_refused():
    with pytest.raises(ConfigError, match="None of the measured shares"):
        choose([Point(0.0, change(0), None)], None, by_task=True)
    with pytest.raises(ConfigError, match="2 shares"):
        choose([Point(1.0, None, math.nan), Point(0.0, None, math.inf)], None, by_task=True)
    with pytest.raises(ConfigError, match="budget"):
        choose([Point(1.0, None, 0.1)], 0.1, by_task=True)
