"""Means and paired differences over seeds, with t intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean with the half width of its interval; ``half`` is NaN with fewer than two values."""

    mean: float
    half: float
    n: int

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half

    def text(self, digits: int = 4, sign: bool = False) -> str:
        """``1.2345 ± 0.0012``; without the interval where there is none."""
        if not self.n:
            return "–"
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}".replace("-", "−")
        return mean if math.isnan(self.half) else f"{mean} ± {self.half:.{digits}f}"


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Student's t interval of a mean.

    Args:
        values: One value for each seed.
        level: How sure the interval is to hold the mean.

    Examples:
        >>> interval([1.0, 3.0]).text(1)
        '2.0 ± 12.7'
        >>> interval([2.0]).text(1)
        '2.0'
    """
    x = np.asarray(list(values), dtype=float)
    if not len(x):
        return Interval(math.nan, math.nan, 0)
    if len(x) == 1:
        return Interval(float(x[0]), math.nan, 1)
    spread = float(x.std(ddof=1)) / math.sqrt(len(x))
    return Interval(float(x.mean()), float(stats.t.ppf((1 + level) / 2, len(x) - 1)) * spread, len(x))


def paired(values: Mapping[int, float], baseline: Mapping[int, float], level: float = 0.95) -> Interval:
    """Interval of the difference to the baseline over the seeds that both have.

    Args:
        values: Value of the arm by seed.
        baseline: Value of the baseline by seed.
        level: How sure the interval is to hold the mean difference.

    Examples:
        >>> paired({0: 1.0, 1: 2.0}, {0: 1.5, 1: 2.5, 2: 9.0}).mean
        -0.5
    """
    return interval([values[s] - baseline[s] for s in sorted(values) if s in baseline], level)
