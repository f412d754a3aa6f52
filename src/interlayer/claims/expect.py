"""What a statement expects of the measured values: the lowest, the highest, an order, or a quantity in a range."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from interlayer.study.stats import Interval, interval, sequential

Values = Mapping[str, Mapping[str, Sequence[float]]]  # arm -> metric -> one value for each seed, in order


@dataclass(frozen=True)
class Comparison:
    """One comparison of the subject with something, over paired seeds.

    Attributes:
        metric: What is compared.
        arm: The subject.
        than: The other arm, or the end of a range.
        gain: Mean by which the subject is better than asked for; above 0 is the expected direction.
        low: Lower end of the interval of the gain; NaN where the seeds are too few, or a run diverged.
        high: Upper end.
        n: Seeds.
        met: Whether the interval leaves out zero in the expected direction.
        contrary: Whether it leaves out zero in the other direction.
    """

    metric: str
    arm: str
    than: str
    gain: float
    low: float
    high: float
    n: int
    met: bool
    contrary: bool


@dataclass(frozen=True)
class Extreme:
    """That ``arm`` has the lowest (``sign`` 1) or highest (-1) ``metric`` of some arms. Build it with ``lowest`` or ``highest``."""

    metric: str
    arm: str
    than: tuple[str, ...]
    margin: float
    sign: int

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that it needs."""
        return (self.arm, *self.than)

    def judge(self, values: Values, looks: tuple[int, ...] | None, subject: str = "") -> list[Comparison]:
        """Compare over the seeds.

        Args:
            values: What was measured.
            looks: The looks of the seeds' table; None for a number of seeds that was fixed beforehand.
            subject: Stands in the arm's place when a control is judged.
        """
        mine = _column(values, subject or self.arm, self.metric)
        rows = []
        for other in self.than:
            theirs = _column(values, other, self.metric)
            gains = [_gain(self.sign, m, t, self.margin) for m, t in zip(mine, theirs, strict=False)]
            rows.append(compare(self.metric, subject or self.arm, other, gains, looks))
        return rows

    def __str__(self) -> str:
        word = "lower" if self.sign > 0 else "higher"
        margin = (
            f" by {self.margin:g}"
            if self.margin > 0
            else f" or worse by less than {-self.margin:g}"
            if self.margin
            else ""
        )
        return f"{self.metric} of {self.arm} {word}{margin} than of {', '.join(self.than)}"


@dataclass(frozen=True)
class Within:
    """That ``metric`` of ``arm`` lies between ``low`` and ``high``. Build it with ``fits``."""

    metric: str
    arm: str
    low: float
    high: float

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that it needs."""
        return (self.arm,)

    def judge(self, values: Values, looks: tuple[int, ...] | None, subject: str = "") -> list[Comparison]:
        """Compare with both ends over the seeds; see ``Extreme.judge``."""
        mine = _column(values, subject or self.arm, self.metric)
        ends = [(self.low, -1, f">= {self.low:g}"), (self.high, 1, f"<= {self.high:g}")]
        return [
            compare(self.metric, subject or self.arm, text, [_gain(sign, m, end, 0.0) for m in mine], looks)
            for end, sign, text in ends
            if math.isfinite(end)
        ]

    def __str__(self) -> str:
        ends = [f"at least {self.low:g}"] * math.isfinite(self.low) + [f"at most {self.high:g}"] * math.isfinite(
            self.high
        )
        return f"{self.metric} of {self.arm} {' and '.join(ends)}"


@dataclass(frozen=True)
class Ordered:
    """That ``metric`` rises along ``arms``, each step by more than ``margin``. Build it with ``ordered``."""

    metric: str
    arms: tuple[str, ...]
    margin: float

    @property
    def arm(self) -> str:
        """The subject: the last."""
        return self.arms[-1]

    def judge(self, values: Values, looks: tuple[int, ...] | None, subject: str = "") -> list[Comparison]:
        """Compare each pair of neighbours over the seeds; see ``Extreme.judge``."""
        arms = [*self.arms[:-1], subject or self.arm]
        rows = []
        for below, above in pairwise(arms):
            pairs = zip(_column(values, below, self.metric), _column(values, above, self.metric), strict=False)
            rows.append(compare(self.metric, above, below, [_gain(-1, a, b, self.margin) for b, a in pairs], looks))
        return rows

    def __str__(self) -> str:
        return f"{self.metric} rises along {', '.join(self.arms)}"


Expect = Extreme | Within | Ordered


def lowest(metric: str, arm: str, than: Sequence[str], margin: float = 0.0) -> Extreme:
    """Expect ``arm`` to have a lower ``metric`` than each of ``than``, by more than ``margin``.

    A negative margin asks only for "no worse by as much as that".
    """
    return Extreme(metric, arm, tuple(than), margin, 1)


def highest(metric: str, arm: str, than: Sequence[str], margin: float = 0.0) -> Extreme:
    """Expect ``arm`` to have a higher ``metric`` than each of ``than``, by more than ``margin``; see ``lowest``."""
    return Extreme(metric, arm, tuple(than), margin, -1)


def ordered(metric: str, *arms: str, margin: float = 0.0) -> Ordered:
    """Expect ``metric`` to rise along ``arms``. The control takes the place of the last."""
    return Ordered(metric, arms, margin)


def fits(metric: str, arm: str, low: float = -math.inf, high: float = math.inf) -> Within:
    """Expect a measured or fitted ``metric`` of ``arm``, such as an exponent, to lie between ``low`` and ``high``."""
    return Within(metric, arm, low, high)


def compare(
    metric: str, arm: str, than: str, gains: Sequence[float], looks: tuple[int, ...] | None = None
) -> Comparison:
    """Judge the paired gains.

    A seed where the subject diverged fails the comparison. One where only the other diverged is a win whose size is
    unknown: the interval is that of the remaining seeds, or every seed must be a win where none remains.
    """
    if not gains or -math.inf in gains:
        return Comparison(metric, arm, than, -math.inf, math.nan, math.nan, len(gains), met=False, contrary=False)
    finite = [g for g in gains if math.isfinite(g)]
    if not finite:
        met = len(gains) >= (looks[0] if looks else 2)
        return Comparison(metric, arm, than, math.inf, math.nan, math.nan, len(gains), met=met, contrary=False)
    found: Interval = sequential(finite, looks) if looks else interval(finite)
    mean = math.inf if len(finite) < len(gains) else found.mean
    return Comparison(
        metric, arm, than, mean, found.low, found.high, len(gains), met=found.low > 0, contrary=found.high < 0
    )


def _column(values: Values, arm: str, metric: str) -> Sequence[float]:
    columns = values[arm]
    return columns.get(metric, [math.nan] * max((len(v) for v in columns.values()), default=0))


def _gain(sign: int, mine: float, theirs: float, margin: float) -> float:
    """By how much the subject is better than asked for; anything that is not finite is the worst there is."""
    if not math.isfinite(mine):
        return -math.inf
    return sign * (theirs - mine) - margin if math.isfinite(theirs) else math.inf
