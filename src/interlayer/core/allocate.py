"""Spend a budget over layers: each has a curve of levels, a level has a cost and a loss, and the losses add up.

``allocate`` picks one level for each layer so that the costs stay within the budget and the sum of losses is least. Sparsities,
bit widths, ranks and devices are levels alike; the curves come from whoever measures them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

Method = Literal["dynamic", "integer", "bisection", "every"]
BINS = 10_000  # units into which ``dynamic`` divides a budget whose costs have no larger common divisor
Floats = NDArray[np.float64]


class Curve:
    """The levels that a layer can have.

    Args:
        cost: What each level costs, at least 0; one number, or one for each of several budgets.
        loss: What each level loses. Infinity forbids a level.

    Shapes: ``cost`` [K] or [K, M] for M budgets, ``loss`` [K].

    Raises:
        ValueError: Shapes that do not match, no level that is allowed, a negative or infinite cost, or NaN.

    Examples:
        >>> Curve(cost=[4, 2, 1], loss=[0.0, 0.5, 3.0]).cost.tolist()
        [[4.0], [2.0], [1.0]]
    """

    def __init__(self, cost: ArrayLike, loss: ArrayLike) -> None:
        self.cost: Floats = np.asarray(cost, float)
        self.loss: Floats = np.asarray(loss, float)
        if self.cost.ndim == 1:
            self.cost = self.cost[:, None]
        if self.loss.ndim != 1 or self.cost.ndim != 2 or len(self.cost) != len(self.loss) or not self.cost.size:
            raise ValueError(
                f"Curve: cost {np.shape(cost)}, loss {np.shape(loss)}; expected one loss and one cost (or one for each "
                "budget) for each of at least one level."
            )
        if not (np.isfinite(self.cost).all() and (self.cost >= 0).all()):
            raise ValueError("Curve: a cost is negative or not finite; expected numbers of at least 0.")
        if np.isnan(self.loss).any() or (self.loss == -np.inf).any() or not np.isfinite(self.loss).any():
            raise ValueError(
                "Curve: the losses have NaN or minus infinity, or forbid every level; expected numbers, with infinity for "
                "levels that are forbidden."
            )


@dataclass(frozen=True)
class Allocation:
    """One level for each layer.

    Attributes:
        choice: Index of the level, by layer.
        cost: What they cost together, by budget.
        loss: What they lose together.
    """

    choice: tuple[int, ...]
    cost: tuple[float, ...]
    loss: float


def allocate(curves: Sequence[Curve], budget: float | Sequence[float], *, method: Method = "dynamic") -> Allocation:
    """Choose a level for each of L layers with K levels, at the least sum of losses within the budget.

    | method | finds | time | budgets |
    | --- | --- | --- | --- |
    | `dynamic` | the optimum; where costs are rounded, nothing worse than that of a budget smaller by L units | L K units | one |
    | `integer` | the optimum, by SciPy's HiGHS | exponential at worst, mostly far less | several |
    | `bisection` | the optimum for what it spends, which is nearly all where curves are convex | L K log(1 / precision) | one |
    | `every` | the optimum, by trying all choices | K^L | several |

    The units of ``dynamic`` are the largest common divisor of a layer's differences in cost. Where these are no whole numbers, or the
    budget has more than 10000 units after the cheapest levels are paid for, it is divided into 10000, and costs are rounded up to
    them. Every method holds the budget.

    Args:
        curves: One for each layer.
        budget: Largest sum of costs; one number, or one for each column of the costs.
        method: See the table.

    Raises:
        ValueError: No allocation meets the budget (the message has the nearest one that can be met), no curve, several budgets where
            the method takes one, or an unknown method.

    Examples:
        >>> bits = [Curve(cost=[2, 4, 8], loss=[9.0, 1.0, 0.0]), Curve(cost=[2, 4, 8], loss=[4.0, 2.0, 0.0])]
        >>> allocate(bits, 10)
        Allocation(choice=(1, 1), cost=(8.0,), loss=3.0)
    """
    if method not in METHODS:
        raise ValueError(f"allocate: method was {method!r}; expected one of {', '.join(METHODS)}.")
    if not curves:
        raise ValueError("allocate: no curve was given; expected one for each layer.")
    budgets = np.atleast_1d(np.asarray(budget, float))
    widths = {c.cost.shape[1] for c in curves}
    if budgets.ndim != 1 or widths != {len(budgets)} or np.isnan(budgets).any():
        raise ValueError(
            f"allocate: {budgets.size} budgets for curves with {sorted(widths)} costs a level; expected as many budgets as costs."
        )
    if len(budgets) > 1 and method in ("dynamic", "bisection"):
        raise ValueError(f"allocate: {method} takes one budget, got {len(budgets)}. Use method='integer'.")
    allowed = [Curve(c.cost[keep], c.loss[keep]) for c in curves for keep in [np.isfinite(c.loss)]]
    least = np.array([c.cost.min(0) for c in allowed]).sum(0)
    if (least > budgets).any():
        raise ValueError(
            f"allocate: no choice meets the budget {_shown(budgets)}; the cheapest levels cost {_shown(least)}. Raise the budget to that."
        )
    found = METHODS[method](allowed, budgets)
    if found is None:
        raise ValueError(
            f"allocate: no choice meets all budgets {_shown(budgets)}; the nearest one costs {_shown(_nearest(allowed, budgets))}. "
            "Raise the budgets to that."
        )
    choice = [int(np.flatnonzero(np.isfinite(c.loss))[k]) for c, k in zip(curves, found, strict=True)]
    cost = np.sum([c.cost[k] for c, k in zip(curves, choice, strict=True)], 0)
    loss = math.fsum(c.loss[k] for c, k in zip(curves, choice, strict=True))
    return Allocation(tuple(choice), tuple(cost.tolist()), loss)


def _dynamic(curves: Sequence[Curve], budgets: Floats) -> list[int]:
    """``best[n][b] = min_k loss[n][k] + best[n - 1][b - cost[n][k]]``, then back from the last layer."""
    extra = [c.cost[:, 0] - c.cost.min() for c in curves]  # above the cheapest level, which is paid for
    room = min(budgets[0] - sum(c.cost.min() for c in curves), sum(e.max() for e in extra))
    whole = all((e == np.rint(e)).all() for e in extra)
    unit = max(math.gcd(*(int(v) for e in extra for v in e)) if whole else 0, room / BINS) or 1.0
    # A whole number of units, but for rounding in floats, is that number.
    size = math.floor(room / unit * (1 + 1e-12))
    steps = [np.ceil(e / unit * (1 - 1e-12)).astype(np.int64) for e in extra]
    best = np.zeros((len(curves) + 1, size + 1))
    more = np.empty(size + 1)
    for n, (curve, step) in enumerate(zip(curves, steps, strict=True)):
        row = best[n + 1]
        row.fill(np.inf)
        for k in np.flatnonzero(step <= size):
            part = np.add(best[n, : size + 1 - step[k]], curve.loss[k], out=more[step[k] :])
            np.minimum(row[step[k] :], part, out=row[step[k] :])
    choice, left = [], size
    for n in reversed(range(len(curves))):
        loss = np.where(steps[n] <= left, best[n, left - np.minimum(steps[n], left)] + curves[n].loss, np.inf)
        choice.append(int(loss.argmin()))
        left -= int(steps[n][choice[-1]])
    return choice[::-1]


def _bisection(curves: Sequence[Curve], budgets: Floats) -> list[int]:
    """The multiplier at which ``min_k loss + multiplier * cost`` of every layer just meets the budget."""
    most = max(len(c.loss) for c in curves)
    costs = np.array([np.pad(c.cost[:, 0], (0, most - len(c.loss)), "edge") for c in curves])
    losses = np.array([np.pad(c.loss, (0, most - len(c.loss)), constant_values=np.inf) for c in curves])
    rows = np.arange(len(curves))

    def at(multiplier: float) -> tuple[NDArray[np.intp], float]:
        """Levels, the cheapest of equally good ones, and what they cost."""
        total = losses + multiplier * costs
        price = np.where(total == total.min(1, keepdims=True), costs, np.inf)
        level = np.where(price == price.min(1, keepdims=True), losses, np.inf).argmin(1)
        return level, float(costs[rows, level].sum())

    low, high = 0.0, 1.0
    if at(low)[1] <= budgets[0]:
        return [int(k) for k in at(low)[0]]
    while at(high)[1] > budgets[0]:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if at(middle)[1] > budgets[0] else (low, middle)
    (dear, _), (level, spent) = at(low), at(high)
    # Layers that change level at this very multiplier: as many as the budget has room for.
    for n in np.flatnonzero(dear != level):
        step = costs[n, dear[n]] - costs[n, level[n]]
        if spent + step <= budgets[0]:
            level[n], spent = dear[n], spent + step
    return [int(k) for k in level]


def _integer(curves: Sequence[Curve], budgets: Floats) -> list[int] | None:
    """A variable of 0 or 1 for each level; one level for each layer."""
    costs, losses = np.concatenate([c.cost for c in curves]), np.concatenate([c.loss for c in curves])
    scale = np.where(budgets > 0, budgets, 1.0) / 1e7  # the solver lets a limit be passed by 1e-6, now a 1e-13th of it
    solved = milp(
        losses,
        integrality=np.ones(len(losses), int),
        bounds=Bounds(0, 1),
        constraints=[_one_each(curves), LinearConstraint((costs / scale).T, -np.inf, budgets / scale)],
        options={"mip_rel_gap": 0.0},
    )
    if solved.x is None:
        return None
    return [int(part.argmax()) for part in np.split(solved.x, np.cumsum([len(c.loss) for c in curves])[:-1])]


def _nearest(curves: Sequence[Curve], budgets: Floats) -> Floats:
    """Costs of the choice whose largest excess over a budget, as a share of it, is least."""
    costs = np.concatenate([c.cost for c in curves])
    scale = np.maximum(np.abs(budgets), 1.0)
    excess = np.zeros(len(costs) + 1)
    excess[-1] = 1.0
    rows = np.hstack([(costs / scale).T, -np.ones((len(budgets), 1))])
    solved = milp(
        excess,
        integrality=1 - excess.astype(int),
        bounds=Bounds(0, np.append(np.ones(len(costs)), np.inf)),
        constraints=[_one_each(curves, more=1), LinearConstraint(rows, -np.inf, budgets / scale)],
    )
    return np.asarray(np.rint(np.asarray(solved.x)[:-1]) @ costs)


def _one_each(curves: Sequence[Curve], more: int = 0) -> LinearConstraint:
    """Exactly one level of each layer; ``more`` variables follow that have no part in it."""
    sizes = [len(c.loss) for c in curves]
    where = (np.repeat(np.arange(len(sizes)), sizes), np.arange(sum(sizes)))
    return LinearConstraint(csr_array((np.ones(sum(sizes)), where), shape=(len(sizes), sum(sizes) + more)), 1, 1)


def _every(curves: Sequence[Curve], budgets: Floats) -> list[int] | None:
    """The naive reference."""
    best, found = math.inf, None
    for choice in itertools.product(*(range(len(c.loss)) for c in curves)):
        cost = np.sum([c.cost[k] for c, k in zip(curves, choice, strict=True)], 0)
        loss = math.fsum(c.loss[k] for c, k in zip(curves, choice, strict=True))
        if loss < best and (cost <= budgets).all():
            best, found = loss, list(choice)
    return found


def _shown(values: Floats) -> str:
    return " and ".join(f"{v:g}" for v in values)


METHODS: dict[str, Callable[[Sequence[Curve], Floats], list[int] | None]] = {
    "dynamic": _dynamic,
    "integer": _integer,
    "bisection": _bisection,
    "every": _every,
}
