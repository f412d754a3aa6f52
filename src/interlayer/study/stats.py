"""Means and paired differences over seeds, with intervals that stay valid when one looks several times."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.special import stdtrit  # the quantile of t; scipy.stats takes half a second to import

LEVEL = 0.05  # probability of a false positive, over all looks together
LADDER = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)  # numbers of seeds at which a comparison may stop


@dataclass(frozen=True)
class Interval:
    """A mean with the half width of its interval; ``half`` is NaN where the values are too few for one."""

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

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0

    def text(self, digits: int = 4, sign: bool = False) -> str:
        """``1.2345 ± 0.0012``; without the interval where there is none."""
        if not self.n:
            return "–"
        mean = f"{self.mean:{'+' if sign else ''}.{digits}f}".replace("-", "−")
        return mean if math.isnan(self.half) else f"{mean} ± {self.half:.{digits}f}"


def interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Student's t interval of a mean, for a number of values that was fixed beforehand.

    Args:
        values: One value for each seed.
        level: Probability that the interval misses the mean.

    Examples:
        >>> interval([1.0, 3.0]).text(1)
        '2.0 ± 12.7'
        >>> interval([2.0]).text(1)
        '2.0'
    """
    if len(values) < 2:
        return Interval(float(values[0]) if len(values) else math.nan, math.nan, len(values))
    return _interval(values, float(stdtrit(len(values) - 1, 1 - level / 2)))


def paired(values: Mapping[int, float], baseline: Mapping[int, float]) -> list[float]:
    """Differences to the baseline, in the order of the seeds that both have.

    Examples:
        >>> paired({0: 1.0, 1: 2.0}, {0: 1.5, 1: 2.5, 2: 9.0})
        [-0.5, -0.5]
    """
    return [values[seed] - baseline[seed] for seed in sorted(values) if seed in baseline]


def looks(least: int, most: int) -> tuple[int, ...]:
    """The numbers of the ladder between two numbers, and these themselves.

    Args:
        least: Seeds at the first look, at least 3.
        most: Seeds at the last look.

    Raises:
        ValueError: A range that is empty or starts below 3.

    Examples:
        >>> looks(4, 12)
        (4, 6, 8, 12)
    """
    if not 3 <= least <= most:
        raise ValueError(f"looks: seeds {least}..{most}; expected a rising range from 3 or more, such as 4..12")
    return (least, *(n for n in LADDER if least < n < most), *([most] if most > least else []))


@cache
def critical(at: tuple[int, ...], level: float = LEVEL) -> tuple[float, ...]:
    """Factors c of the intervals ``mean +- c s / sqrt(n)`` at each look, valid for all looks together.

    The error probability is spent in proportion to n: after n of the N values at the last look, the interval has left
    out the true mean with probability ``level * n / N``, for normal values. The first factor is Student's; the others
    come from a simulation of four million sequences with a fixed seed.

    Args:
        at: The looks, rising.
        level: Probability that any of the intervals misses the mean.

    Examples:
        >>> [round(c, 1) for c in critical((4, 6, 8, 12))]
        [4.9, 3.8, 3.3, 2.6]
    """
    found = [float(stdtrit(at[0] - 1, 1 - level * at[0] / at[-1] / 2))]
    if len(at) == 1:
        return tuple(found)
    count, chance = 4_000_000, np.random.default_rng(0)
    seen = np.concatenate([_t(chance.standard_normal((20_000, at[-1])), at) for _ in range(count // 20_000)])
    for before, look in enumerate(at[1:]):
        seen = seen[seen[:, before] <= found[-1]]
        crossing = round(level * (look - at[before]) / at[-1] * count)
        column = seen[:, before + 1]
        found.append(float(np.partition(column, len(column) - crossing)[len(column) - crossing]))
    return tuple(found)


def _t(values: np.ndarray, at: tuple[int, ...]) -> np.ndarray:
    """Absolute t statistics of each row's first values, a column for each look."""
    total, squares = values.cumsum(1), (values * values).cumsum(1)
    n = np.asarray(at)
    total, squares = total[:, n - 1], squares[:, n - 1]
    return (np.abs(total) / np.sqrt(n * (squares - total * total / n) / (n - 1))).astype(np.float32)


def sequential(values: Sequence[float], at: tuple[int, ...], level: float = LEVEL) -> Interval:
    """The interval at the last look that the values reach; without a half width before the first.

    It may be asked after every look, and the comparison stopped as soon as zero is left out.

    Args:
        values: One value for each seed, in the order in which they came.
        at: The looks.
        level: Probability of a false positive over all looks; for several comparisons in one study, divide it.

    Examples:
        >>> sequential([1.0, 1.2, 0.9, 1.1, 5.0], (4, 6, 8, 12)).n
        4
    """
    reached = [n for n in at if n <= len(values)]
    if not reached:
        return Interval(float(np.mean(values)) if len(values) else math.nan, math.nan, len(values))
    return _interval(values[: reached[-1]], critical(at, level)[len(reached) - 1])


def _interval(values: Sequence[float], factor: float) -> Interval:
    x = np.asarray(list(values), dtype=float)
    return Interval(float(x.mean()), factor * float(x.std(ddof=1)) / math.sqrt(len(x)), len(x))
