"""Intervals against the textbook."""

import math

import pytest
from scipy import stats

from interlayer.study.stats import interval, paired


def test_interval_is_students():
    values = [2.0, 4.0, 4.5, 7.0]
    found = interval(values)
    low, high = stats.t.interval(0.95, 3, loc=found.mean, scale=stats.sem(values))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_paired_is_the_one_sample_test():
    a, b = {0: 1.0, 1: 2.0, 2: 2.5, 7: 9.0}, {0: 1.5, 1: 2.2, 2: 3.5}
    found = paired(a, b)
    test = stats.ttest_rel([1.0, 2.0, 2.5], [1.5, 2.2, 3.5]).confidence_interval(0.95)
    assert found.n == 3 and (found.low, found.high) == (pytest.approx(test.low), pytest.approx(test.high))


def test_one_seed_has_no_interval_and_none_no_mean():
    assert math.isnan(interval([3.0]).half) and interval([3.0]).text(1) == "3.0"
    assert interval([]).text() == "–"
    assert interval([-1.0, -1.0]).text(2, sign=True) == "−1.00 ± 0.00"
