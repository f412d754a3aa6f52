"""Explicit Runge-Kutta methods as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge-Kutta method; with ``low``, an embedded pair that estimates its error.

    Args:
        a: Rows of the strictly lower triangle: the weights of earlier stages in stage i + 1.
        b: Weights of the stages.
        c: Times of the stages.
        order: Order of ``b``.
        low: Weights of the embedded solution, one order lower.

    Raises:
        ValueError: Weights that do not sum to one, rows that do not sum to their times, or a pair that is not FSAL.
    """

    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    c: tuple[float, ...]
    order: int
    low: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        rows = [0.0, *map(sum, self.a)]
        off = max(abs(row - time) for row, time in zip(rows, self.c, strict=True))
        off = max(off, *(abs(sum(w) - 1) for w in (self.b, self.low) if w))
        sizes = [len(row) for row in self.a] == list(range(1, len(self.b)))
        if off > 1e-12 or not sizes:
            raise ValueError(
                f"Tableau: sums are off by {off:.2g}, or rows are not of lengths 1, 2, ...; check the constants."
            )
        if self.low and (*self.a[-1], 0.0) != self.b:
            raise ValueError("Tableau: the last stage of an embedded pair must be the new state (first same as last).")


TABLEAUS = {
    "euler": Tableau((), (1.0,), (0.0,), 1),
    "midpoint": Tableau(((1 / 2,),), (0.0, 1.0), (0.0, 1 / 2), 2),
    "kutta": Tableau(((1 / 2,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6), (0.0, 1 / 2, 1.0), 3),
    "rk4": Tableau(
        ((1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), (0.0, 1 / 2, 1 / 2, 1.0), 4
    ),
    "bogacki-shampine": Tableau(
        ((1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9)),
        (2 / 9, 1 / 3, 4 / 9, 0.0),
        (0.0, 1 / 2, 3 / 4, 1.0),
        3,
        (7 / 24, 1 / 4, 1 / 3, 1 / 8),
    ),
    "dormand-prince": Tableau(
        (
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
            (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
        ),
        (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84, 0.0),
        (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0),
        5,
        (5179 / 57600, 0.0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40),
    ),
}


def combine(weights: tuple[float, ...], slopes: Sequence[Tensor]) -> Tensor:
    """The weighted sum of the slopes; a weight of zero costs nothing."""
    terms = [w * k for w, k in zip(weights, slopes, strict=False) if w]
    return sum(terms[1:], terms[0])
