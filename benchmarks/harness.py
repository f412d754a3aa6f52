"""One harness for all timings: outputs must agree, candidates run in turn in one process, ratios come with their spread."""

from __future__ import annotations

import importlib.metadata
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass
class Ratio:
    """Time of ``ours`` as a multiple of ``peer``'s: median of the pairs, and their 10% and 90% quantiles."""

    ours: str
    peer: str
    median: float
    low: float
    high: float


def compare(
    title: str,
    candidates: dict[str, Callable[[], Any]],
    *,
    agree: Callable[[], bool] | None = None,
    rounds: int = 15,
    inner: int = 1,
    goal: dict[str, float] | None = None,
) -> list[Ratio]:
    """Time the first candidate against all others, one after the other in every round, and print the ratios.

    Args:
        title: What is timed.
        candidates: Name to a function without arguments; the first is ours.
        agree: Whether the outputs agree; without that nothing is reported.
        rounds: How often each runs, beside two rounds of warm-up.
        inner: Calls in one timing.
        goal: The largest ratio wanted against a peer, by its name.

    Raises:
        RuntimeError: The outputs do not agree.
    """
    if agree is not None and not agree():
        raise RuntimeError(f"{title}: outputs do not agree; no time is reported.")
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + 2):
        order = list(candidates) if number % 2 else list(reversed(candidates))
        for name in order:
            started = time.perf_counter()
            for _ in range(inner):
                candidates[name]()
            if number >= 2:
                times[name].append(time.perf_counter() - started)
    ours, *peers = candidates
    found = []
    print(title)
    for peer in peers:
        ratios = sorted(a / b for a, b in zip(times[ours], times[peer], strict=True))
        cut = statistics.quantiles(ratios, n=10)
        ratio = Ratio(ours, peer, statistics.median(ratios), cut[0], cut[-1])
        wanted = (goal or {}).get(peer)
        verdict = "" if wanted is None else f"  goal {wanted:g}: {'met' if ratio.median <= wanted else 'NOT met'}"
        print(f"  {ours} / {peer}: {ratio.median:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]{verdict}")
        found.append(ratio)
    return found


def version(package: str) -> str:
    """A peer's version, for the title."""
    return f"{package} {importlib.metadata.version(package)}"


def train_step(model: torch.nn.Module, loss: Callable[[], torch.Tensor], lr: float = 1e-4) -> Callable[[], None]:
    """Forward, backward and AdamW on the same batch."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr)

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        loss().backward()
        optimiser.step()

    return step
