"""Intervals against the textbook."""

import math

import numpy as np
import pytest
from scipy import stats

from interlayer.study.stats import critical, interval, looks, paired, sequential


def test_interval_is_students():
    values = [2.0, 4.0, 4.5, 7.0]
    found = interval(values)
    low, high = stats.t.interval(0.95, 3, loc=found.mean, scale=stats.sem(values))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_paired_is_the_one_sample_test():
    a, b = {0: 1.0, 1: 2.0, 2: 2.5, 7: 9.0}, {0: 1.5, 1: 2.2, 2: 3.5}
    found = interval(paired(a, b))
    test = stats.ttest_rel([1.0, 2.0, 2.5], [1.5, 2.2, 3.5]).confidence_interval(0.95)
    assert found.n == 3 and (found.low, found.high) == (pytest.approx(test.low), pytest.approx(test.high))


def test_one_seed_has_no_interval_and_none_no_mean():
    assert math.isnan(interval([3.0]).half) and interval([3.0]).text(1) == "3.0"
    assert interval([]).text() == "–"
    assert interval([-1.0, -1.0]).text(2, sign=True) == "−1.00 ± 0.00"


@pytest.mark.parametrize("arms", [1, 4])
def test_factors_are_those_of_a_simulation_with_other_numbers(arms):
    at, count, level = (4, 6, 8, 12), 100_000, 0.05
    x = np.random.default_rng(7).standard_normal((count, 12))
    left_out = np.zeros(count, dtype=bool)
    for n, factor in zip(at, critical(at, level / arms), strict=True):
        part = x[:, :n]
        left_out |= abs(part.mean(1)) > factor * part.std(1, ddof=1) / np.sqrt(n)
        spent = level / arms * n / 12  # in proportion to n
        assert left_out.mean() == pytest.approx(spent, abs=5 * np.sqrt(spent / count))
    if arms == 1:
        assert critical(at) == pytest.approx((4.86, 3.84, 3.28, 2.63), abs=0.01)


def test_sequential_takes_the_last_look_that_is_reached():
    values = [1.0, 1.4, 0.8, 1.1, 3.0, 0.0, -2.0]
    found = sequential(values, looks(4, 12))
    assert found.n == 6 and found.half == pytest.approx(3.84 * np.std(values[:6], ddof=1) / np.sqrt(6), rel=2e-3)
    assert math.isnan(sequential(values[:3], looks(4, 12)).half) and not sequential(values[:3], looks(4, 12)).decided
    assert sequential(values[:4], looks(4, 12)).decided
    assert sequential([0.5] * 4, looks(4, 12)).decided  # nothing varies
