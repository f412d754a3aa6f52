import math

import numpy as np
import pytest

from interlayer.core.allocate import BINS, Allocation, Curve, allocate


def problem(seed, layers=5, levels=4, budgets=1, unit=1, convex=False):
    """Seeded curves with whole costs in multiples of a unit, and a budget of half of the dearest choice."""
    draw = np.random.default_rng(seed)
    curves = []
    for _ in range(layers):
        cost = unit * np.sort(draw.integers(0, 30, (levels, budgets)), 0)
        loss = np.sort(draw.exponential(size=levels))[::-1]
        if convex:
            cost = unit * np.arange(levels)[:, None] * draw.integers(1, 5)
            loss = np.append(np.cumsum(np.sort(draw.exponential(size=levels - 1)))[::-1], 0)
        curves.append(Curve(cost, loss))
    return curves, np.sum([c.cost.max(0) for c in curves], 0) // 2


def test_by_hand():
    curves = [Curve([4, 2, 1], [0.0, 1.0, 5.0]), Curve([8, 4, 2], [0.0, 2.0, 3.5]), Curve([3], [0.25])]
    for method in ("dynamic", "integer", "every"):
        assert allocate(curves, 9, method=method) == Allocation((1, 1, 0), (9.0,), 3.25)
        assert allocate(curves, 10.9, method=method) == Allocation((1, 1, 0), (9.0,), 3.25)
        assert allocate(curves, 99, method=method) == Allocation((0, 0, 0), (15.0,), 0.25)
        assert allocate(curves, 6, method=method) == Allocation((2, 2, 0), (6.0,), 8.75)
    assert allocate(curves, 9, method="bisection") == Allocation((1, 1, 0), (9.0,), 3.25)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("unit", [1, 7, 10**9])
def test_dynamic_programme_and_integer_programme_find_the_optimum(seed, unit):
    curves, (budget,) = problem(seed, unit=unit)
    best = allocate(curves, budget, method="every")
    for method in ("dynamic", "integer"):
        found = allocate(curves, budget, method=method)
        assert found.loss == pytest.approx(best.loss) and found.cost[0] <= budget * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("convex", [False, True])
def test_bisection_finds_the_optimum_for_what_it_spends(seed, convex):
    curves, (budget,) = problem(seed, convex=convex)
    found = allocate(curves, budget, method="bisection")
    assert found.cost[0] <= budget
    assert found.loss == pytest.approx(allocate(curves, found.cost[0], method="every").loss)
    if convex:  # what is left would not pay for one more step of any layer that the optimum takes
        assert budget - found.cost[0] < max(np.diff(np.sort(c.cost[:, 0])).max() for c in curves)


def test_bisection_splits_layers_that_are_alike():
    curves = [Curve([0, 1], [1.0, 0.0])] * 10
    assert allocate(curves, 7, method="bisection").loss == 3.0


@pytest.mark.parametrize("seed", range(6))
def test_several_budgets(seed):
    curves, budgets = problem(seed, budgets=2)
    best, found = (allocate(curves, budgets, method=m) for m in ("every", "integer"))
    assert found.loss == pytest.approx(best.loss) and all(c <= b for c, b in zip(found.cost, budgets, strict=True))


def test_a_fine_budget_is_rounded_and_always_holds():
    draw = np.random.default_rng(0)
    curves = [
        Curve(np.rint(n * np.linspace(0, 1, 21)), np.sort(draw.exponential(size=21))[::-1])
        for n in draw.integers(10**5, 10**7, 30)
    ]
    budget = sum(c.cost.max() for c in curves) / 10 + 0.5
    rounded, exact = (allocate(curves, budget, method=m) for m in ("dynamic", "integer"))
    assert rounded.cost[0] <= budget
    # no worse than the optimum of a budget that is smaller by one unit for each layer
    smaller = allocate(curves, budget * (1 - len(curves) / BINS), method="integer")
    assert exact.loss <= rounded.loss <= smaller.loss


def test_the_integer_programme_holds_a_budget_to_the_last_unit():
    curves = [Curve([10**8 - 50, 10**8 + 3], [1.0, 0.0]), Curve([0, 40], [0.5, 0.0])]
    for method in ("integer", "every"):
        assert allocate(curves, 10**8, method=method) == Allocation((0, 1), (10**8 - 10,), 1.0)
        assert allocate([Curve([10**8, 10**8 + 3], [1.0, 0.0])], 10**8, method=method).choice == (0,)


def test_forbidden_levels_keep_their_numbers():
    curves = [Curve([1, 2, 3], [math.inf, 5.0, 1.0]), Curve([1, 2, 3], [4.0, math.inf, 0.0])]
    for method in ("dynamic", "integer", "bisection", "every"):
        assert allocate(curves, 4, method=method) == Allocation((2, 0), (4.0,), 5.0)
        assert allocate(curves, 3, method=method).choice == (1, 0)


def test_costs_of_zero_and_no_room():
    free = [Curve([0, 0], [2.0, 1.0]), Curve([0.0, 1e-20], [3.0, 0.0])]
    for method in ("dynamic", "integer", "bisection", "every"):
        assert allocate(free[:1], 0, method=method) == Allocation((1,), (0.0,), 1.0)
    for method in ("dynamic", "bisection", "every"):
        assert allocate(free, 0, method=method).choice == (1, 0)


@pytest.mark.parametrize(
    ("given", "options", "says"),
    [
        (([Curve([2, 3], [1, 0]), Curve([4], [0])], 5), {}, r"budget 5; the cheapest levels cost 6. Raise"),
        (([Curve([1, math.pi], [math.inf, 0])], 2), {}, r"the cheapest levels cost 3.14159"),
        (([Curve([[9, 0], [0, 9]], [0, 0])], (5, 6)), {"method": "integer"}, "5 and 6; the nearest one costs 0 and 9"),
        (([Curve([[9, 0], [0, 9]], [0, 0])], (5, 6)), {"method": "every"}, "5 and 6; the nearest one costs 0 and 9"),
        (([Curve([[1, 1]], [0])], (5, 5)), {}, "dynamic takes one budget, got 2. Use method='integer'"),
        (([Curve([1], [0])], (5, 5)), {"method": "integer"}, r"2 budgets for curves with \[1\] costs"),
        (([], 5), {}, "no curve was given"),
        (([Curve([1], [0])], 5), {"method": "greedy"}, "'greedy'; expected one of dynamic, integer, bisection, every"),
    ],
)
def test_clear_errors(given, options, says):
    with pytest.raises(ValueError, match=says):
        allocate(*given, **options)


@pytest.mark.parametrize(
    ("cost", "loss", "says"),
    [
        ([1, 2], [0], "expected one loss"),
        ([], [], "at least one level"),
        ([-1], [0], "negative"),
        ([1], [math.nan], "NaN"),
        ([1], [math.inf], "forbid every level"),
    ],
)
def test_curves_that_are_none(cost, loss, says):
    with pytest.raises(ValueError, match=says):
        Curve(cost, loss)
