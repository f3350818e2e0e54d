"""Figures of a sequence against hand-computed matrices, plain loops, tables and the standard library."""

from __future__ import annotations

import itertools
import math
import statistics
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gere import metrics
from gere.errors import ConfigError

# Three tasks, by hand: AP (60 + 40 + 80) / 3; BWT ((60 - 90) + (40 - 70)) / 2; FWT ((20 - 10) + (50 - 30)) / 2.
HAND = [[90, 20, 30], [70, 70, 50], [60, 40, 80]]
BEFORE = [0, 10, 30]
# From 0.95 two-sided, printed tables of Student's t.
T_95 = {
    1: 12.706,
    2: 4.303,
    3: 3.182,
    4: 2.776,
    5: 2.571,
    6: 2.447,
    9: 2.262,
    10: 2.228,
    29: 2.045,
    30: 2.042,
    120: 1.980,
}
T_99 = {1: 63.657, 2: 9.925, 3: 5.841, 7: 3.499, 20: 2.845}
NONE = float("nan")


def triangle(rows):
    return [[value if j <= i else None for j, value in enumerate(row)] for i, row in enumerate(rows)]


def test_by_hand():
    assert metrics.average_performance(HAND) == 60
    assert metrics.overall_performance(HAND) == pytest.approx((90 + (70 + 70) / 2 + 60) / 3, abs=1e-12)
    assert metrics.backward_transfer(HAND) == -30
    assert metrics.forward_transfer(HAND, BEFORE) == 15
    assert metrics.forgetting(HAND).tolist() == [30, 30]
    assert metrics.forgetting([[5, 0, 0], [7, 3, 0], [6, 4, 1]]).tolist() == [1, -1]


def test_the_papers_row():
    assert round(metrics.harmonic_mean(60.78, 74.48), 2) == 66.94
    assert round(metrics.harmonic_mean(60.7155, 74.0817), 4) == 66.7359
    assert round(metrics.harmonic_mean(66.2539, 64.4417), 4) == 65.3352


def test_what_was_not_evaluated_is_not_needed_above_the_diagonal():
    held = triangle(HAND)
    for figure in (metrics.average_performance, metrics.overall_performance, metrics.backward_transfer):
        assert figure(held) == figure(HAND)
    assert metrics.forgetting(held).tolist() == [30, 30]
    assert math.isnan(metrics.forward_transfer(held, BEFORE))
    assert math.isnan(metrics.forward_transfer(HAND, [0, None, 30]))
    held[2][1] = None
    assert math.isnan(metrics.average_performance(held)) and math.isnan(metrics.backward_transfer(held))
    assert np.isnan(metrics.forgetting(held)).tolist() == [False, True]


def test_a_run_that_is_not_at_its_end_counts_the_tasks_so_far():
    assert metrics.average_performance(HAND[:2]) == 70
    assert metrics.overall_performance(HAND[:2]) == 80
    assert metrics.backward_transfer(HAND[:2]) == -20
    assert metrics.forward_transfer(HAND[:2], BEFORE) == 10
    assert metrics.forgetting(HAND[:2]).tolist() == [20]


@pytest.mark.parametrize("rows", [[], np.zeros((0, 3))], ids=["empty", "no row"])
def test_nothing_trained(rows):
    for figure in (metrics.average_performance, metrics.overall_performance, metrics.backward_transfer):
        assert math.isnan(figure(rows))
    assert metrics.forgetting(rows).shape == (0,)


def test_one_task_has_nothing_to_transfer():
    assert metrics.average_performance([[7]]) == metrics.overall_performance([[7]]) == 7
    assert math.isnan(metrics.backward_transfer([[7]])) and math.isnan(metrics.forward_transfer([[7]], [1]))


matrices = st.integers(1, 6).flatmap(
    lambda size: st.lists(
        st.lists(st.floats(0, 1, width=32), min_size=size, max_size=size), min_size=size, max_size=size
    )
)


@given(matrices, st.lists(st.floats(0, 1, width=32), min_size=6, max_size=6))
def test_against_loops(a, start):
    size = len(a)
    rows = range(size)
    assert metrics.average_performance(a) == pytest.approx(sum(a[-1]) / size)
    means = [sum(a[i][j] for j in range(i + 1)) / (i + 1) for i in rows]
    assert metrics.overall_performance(a) == pytest.approx(sum(means) / size)
    lost = [max(a[i][j] for i in range(j, size - 1)) - a[-1][j] for j in range(size - 1)]
    assert metrics.forgetting(np.array(a)).tolist() == pytest.approx(lost)
    if size > 1:
        back = [a[-1][j] - a[j][j] for j in range(size - 1)]
        assert metrics.backward_transfer(a) == pytest.approx(sum(back) / (size - 1))
        forward = [a[j - 1][j] - start[j] for j in range(1, size)]
        assert metrics.forward_transfer(a, start[:size]) == pytest.approx(sum(forward) / (size - 1))
        learned = sum(a[i][i] for i in rows) / size
        together = learned + metrics.backward_transfer(a) * (size - 1) / size
        assert metrics.average_performance(a) == pytest.approx(together)
        assert sum(lost) / (size - 1) >= -metrics.backward_transfer(a) - 1e-9


@given(st.floats(0, 100), st.floats(0, 100))
def test_harmonic_mean_is_that_of_the_standard_library(general, task):
    assert metrics.harmonic_mean(general, task) == pytest.approx(
        statistics.harmonic_mean([general, task]), rel=1e-12, abs=1e-300
    )


def test_harmonic_mean_of_what_is_missing():
    for other in (0, 1):
        assert math.isnan(metrics.harmonic_mean(NONE, other)) and math.isnan(metrics.harmonic_mean(other, NONE))
    assert metrics.harmonic_mean(0, 50) == metrics.harmonic_mean(50, 0) == 0
    for pair in [(-1, 2), (2, -1), (math.inf, 1)]:
        with pytest.raises(ConfigError, match="at least 0"):
            metrics.harmonic_mean(*pair)


@pytest.mark.parametrize(("level", "table"), [(0.95, T_95), (0.99, T_99)])
def test_student_against_printed_tables(level, table):
    for freedom, printed in table.items():
        assert metrics.student_t(level, freedom) == pytest.approx(printed, abs=5.1e-4)


def test_student_against_closed_forms_and_the_normal():
    for level in (0.5, 0.9, 0.95, 0.999):
        assert metrics.student_t(level, 1) == pytest.approx(math.tan(math.pi * level / 2))
        assert metrics.student_t(level, 2) == pytest.approx(level * math.sqrt(2 / (1 - level**2)))
        normal = statistics.NormalDist().inv_cdf((1 + level) / 2)
        assert metrics.student_t(level, 100_001) == pytest.approx(normal, rel=1e-4)


def test_student_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    for level, freedom in itertools.product((0.5, 0.9, 0.95, 0.99), range(1, 60)):
        assert metrics.student_t(level, freedom) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-9)


def test_interval_by_hand():
    mean, half, size = metrics.interval([1.0, 2.0, 3.0])
    assert (mean, size) == (2, 3) and half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    values = [0.61, 0.64, 0.59, 0.66, 0.60]
    found = metrics.interval(values)
    assert found.mean == pytest.approx(statistics.fmean(values))
    assert found.half == pytest.approx(2.776445 * statistics.stdev(values) / math.sqrt(5), rel=1e-6)


def test_interval_of_one_and_of_nothing():
    assert metrics.interval([3.0]).mean == 3 and math.isnan(metrics.interval([3.0]).half)
    assert math.isnan(metrics.interval([]).mean) and metrics.interval([]).size == 0
    assert metrics.interval([2.0, 2.0]).half == 0
    with pytest.raises(ConfigError, match="between 0 and 1"):
        metrics.interval([1, 2], level=95)


def test_interval_covers_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(size=(4000, 3))
    found = [metrics.interval(row) for row in draws.tolist()]
    assert np.mean([abs(one.mean) <= one.half for one in found]) == pytest.approx(0.95, abs=0.012)


@pytest.mark.parametrize("bad", [[[1, 2], [3]], [["a"]], [1, 2], [[1], [2]], [[[1]]]], ids=repr)
def test_no_matrix(bad):
    with pytest.raises(ConfigError, match="cannot be computed"):
        metrics.average_performance(bad)


def test_before_of_other_tasks():
    with pytest.raises(ConfigError, match="3 scores"):
        metrics.forward_transfer(HAND, [1, 2])


def test_import_is_light():
    script = "import sys, gere.metrics; print(*{'torch', 'transformers', 'scipy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == ""
