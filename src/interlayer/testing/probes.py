"""Contracts of probes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from interlayer.core.example import Example
from interlayer.core.kinds import Comparison, Finding, Probe
from interlayer.testing.common import make, model_and_data, picture, require, seeded, unchanged
from interlayer.testing.findings import equal, sound


def _others(example: Example, model: nn.Module) -> tuple[nn.Module, ...]:
    return make(lambda: example.others(model))


def _find(example: Example, model: nn.Module, data: Any, others: tuple[nn.Module, ...] | None = None) -> Finding:
    probe = make(example.make)
    require(isinstance(probe, Probe), f"make() gave {type(probe).__name__}; expected a Probe")
    given = _others(example, model) if others is None else others
    with seeded(5):
        return probe(model, data, others=given) if isinstance(probe, Comparison) else probe(model, data)


def finding(example: Example) -> None:
    """Named tables with columns of equal length, and a figure that can be drawn, if there is one."""
    sound(_find(example, *model_and_data(example.inputs)))


def no_trace(example: Example) -> None:
    """Weights, gradients, modes, hooks and modules of the model are afterwards as they were, in both modes."""
    for training in (True, False):
        model, data = model_and_data(example.inputs)
        model.train(training)
        for p in list(model.parameters())[:1]:
            p.grad = torch.ones_like(p)  # a gradient of the user's own
        others = _others(example, model)
        before = [picture(m) for m in (model, *others)]
        _find(example, model, data, others)
        for seen, m in zip(before, (model, *others), strict=True):
            unchanged(seen, m, "the probe")


def planted(example: Example) -> None:
    """What the example planted in the model is found."""
    require(example.planted is not None, "the example plants nothing: give planted=, a check of the finding")
    assert example.planted is not None
    require(bool(example.planted(_find(example, *model_and_data(example.inputs)))), "the planted truth is not found")


def seed(example: Example) -> None:
    """The same seed gives the same tables."""
    first, second = (_find(example, *model_and_data(example.inputs)).tables for _ in range(2))
    require(equal(first, second), "the tables of the same seed differ")


def others(example: Example) -> None:
    """Other models than the probe takes, one more or one fewer, are a ValueError, not ignored."""
    model, data = model_and_data(example.inputs)
    probe, given = make(example.make), _others(example, model)
    if not isinstance(probe, Comparison):
        require(not given, "the example has other models; a probe that takes any is a Comparison")
        return
    for wrong in ([] if probe.more else [(*given, model)]) + [given[: probe.merges - 1]]:
        try:
            probe(model, data, others=wrong)
        except ValueError:
            continue
        raise AssertionError(f"{len(wrong)} other models instead of {len(given)} raise no ValueError")


PROBE: dict[str, Callable[[Example], None]] = {
    "finding": finding,
    "no_trace": no_trace,
    "others": others,
    "planted": planted,
    "seed": seed,
}
