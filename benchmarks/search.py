"""Steps of a search: the adaptive temperature beside plain DARTS, second order beside first, and a supernet beside its parts.

    python -m benchmarks.search

The gate comes first: small-temp at temperature 1 without noise is DARTS to the last bit. No peer runs beside them: nni 3.0, the
kept package with a DARTS search, requires typeguard below 4.1.3, and the peers of other benchmarks 4.6.1. The numbers of parameters
are compared with the authors' code in tests/core/test_search.py.
"""

from __future__ import annotations

import random
from statistics import median
from time import perf_counter

import torch

from interlayer.core.search import Space, Supernet
from interlayer.learn.search import DARTS
from interlayer.learn.search.small_temp import SmallTemp

OPERATIONS = ("skip_connect", "sep_conv_3x3")


def supernet() -> Supernet:
    """That of the claim."""
    torch.manual_seed(0)
    return Supernet(1, 10, width=4, layers=2, nodes=2, operations=OPERATIONS)


def gate() -> None:
    """Raise unless the ablated rule is DARTS."""
    x, y = torch.randn(32, 1, 8, 8), torch.arange(32) % 10
    states = []
    for rule in (DARTS(supernet()), SmallTemp(supernet(), adaptive=False, end=1.0, noise=0.0)):
        rule.step((x, y))
        states.append(rule.model.state_dict())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def seconds(rule: DARTS, steps: int = 15) -> float:
    """The median time of a step on a batch of 64."""
    x, y = torch.randn(64, 1, 8, 8), torch.arange(64) % 10
    times = []
    for _ in range(steps):
        start = perf_counter()
        rule.step((x, y))
        times.append(perf_counter() - start)
    return median(times[3:])


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    gate()
    base = seconds(DARTS(supernet()))
    rows = {
        "DARTS, first order": base,
        "DARTS, second order": seconds(DARTS(supernet(), unrolled=True)),
        "small-temp, temperatures given": seconds(SmallTemp(supernet(), adaptive=False, end=0.1)),
        "small-temp, adaptive": seconds(SmallTemp(supernet())),
    }
    for name, found in rows.items():
        print(f"{name:32} {1000 * found:7.1f} ms a step  {found / base:5.2f} x")
    space, draw = Space({str(i): range(8) for i in range(100)}), random.Random(0)
    start = perf_counter()
    point = space.sample(draw)
    for _ in range(200):
        point = space.mutate(point, draw)
    print(f"{'mutation among 100 choices':32} {5 * (perf_counter() - start):7.3f} ms")


if __name__ == "__main__":
    main()
