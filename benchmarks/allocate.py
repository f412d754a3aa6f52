"""Time of the budget's programme by layers, levels and method; the goal is rd-prune's, under 1 s for 200 layers of 100 levels."""

from __future__ import annotations

import math
import statistics
import time

import numpy as np

from benchmarks.harness import compare
from interlayer.core.allocate import Curve, allocate


def problem(layers: int, levels: int, seed: int = 0) -> tuple[list[Curve], int]:
    """Layers of 1e3 to 2e6 weights with falling losses, and a tenth of the weights as budget."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1000, 2_000_000, layers)
    shares = np.arange(levels + 1) / levels
    losses = [s * np.sort(draw.exponential(size=levels + 1))[::-1] for s in draw.exponential(size=layers)]
    return [Curve(np.rint(n * shares), loss) for n, loss in zip(sizes, losses, strict=True)], int(sizes.sum() // 10)


def seconds(layers: int, levels: int, method: str = "dynamic") -> float:
    """Median of 5."""
    curves, budget = problem(layers, levels)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        allocate(curves, budget, method=method)  # type: ignore[arg-type]
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def agree() -> bool:
    """The programme's loss is at most that of the integer programme with a budget smaller by a unit for each layer."""
    curves, budget = problem(40, 20)
    found, smaller = allocate(curves, budget), allocate(curves, budget * (1 - 40 / 10_000), method="integer")
    return found.cost[0] <= budget and found.loss <= smaller.loss + 1e-9


def main() -> None:
    """Growth with layers and levels, then all methods on one problem."""
    if not agree():
        raise RuntimeError("allocate: the dynamic programme is no optimum; no time is reported.")
    by_layers = {n: seconds(n, 100) for n in (25, 50, 100, 200, 400)}
    by_levels = {k: seconds(100, k) for k in (25, 50, 100, 200)}
    for what, times in (("layers (of 100 levels)", by_layers), ("levels (100 layers)", by_levels)):
        exponent = np.polyfit([math.log(n) for n in times], [math.log(t) for t in times.values()], 1)[0]
        print(f"seconds by {what}: {', '.join(f'{n}: {t:.3f}' for n, t in times.items())}; exponent {exponent:.2f}")
    print(
        f"rd-prune, 200 layers x 100 levels: {by_layers[200]:.2f} s, goal 1: {'met' if by_layers[200] < 1 else 'NOT met'}"
    )
    curves, budget = problem(50, 100)
    methods = ("dynamic", "integer", "bisection")
    compare("50 layers, 100 levels", {m: lambda m=m: allocate(curves, budget, method=m) for m in methods}, rounds=5)  # type: ignore[misc]
    for m in methods:
        print(f"  loss by {m}: {allocate(curves, budget, method=m).loss:.4f}")  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
