"""Contracts of constructions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from interlayer.core.example import Example
from interlayer.core.kinds import Construction
from interlayer.testing.common import finite, make, require, same, tensors


def _built(example: Example) -> tuple[Construction, tuple[Any, ...], nn.Module]:
    construction, problem = make(example.make), make(example.inputs, 100)
    require(
        isinstance(construction, Construction), f"make() gave {type(construction).__name__}; expected a Construction"
    )
    model = make(lambda: construction.build(*problem), 1)
    require(isinstance(model, nn.Module), f"build() gave {type(model).__name__}; expected a torch.nn.Module")
    return construction, problem, model


def exact(example: Example) -> None:
    """The model gives the reference's outputs, up to the stated precision and without training."""
    require(
        example.outputs is not None, "the example compares nothing: give outputs=, what the model gives for the problem"
    )
    assert example.outputs is not None
    construction, problem, model = _built(example)
    with torch.no_grad():
        got = example.outputs(model, *problem)
    finite(got, "the model's output")
    for found, wanted in zip(tensors(got), tensors(construction.reference(*problem)), strict=True):
        require(found.shape == wanted.shape, f"output {tuple(found.shape)}, reference {tuple(wanted.shape)}")
        gap = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-300))
        require(gap <= example.precision, f"{gap:.3g} off, relative; {example.precision:.3g} was stated")


def untouched(example: Example) -> None:
    """Building changes no tensor of the problem."""
    construction, problem = make(example.make), make(example.inputs, 100)
    before = [t.clone() for t in tensors(problem)]
    construction.build(*problem)
    same(before, tensors(problem), "the problem before and after")


def seed(example: Example) -> None:
    """The same problem and seed give the same weights."""
    one, two = (_built(example)[2].state_dict() for _ in range(2))
    same(one, two, "two builds")


def wrong(example: Example) -> None:
    """A problem of another shape is a ``ValueError`` or ``TypeError``."""
    require(example.wrong is not None, "the example has no problem of a wrong shape: give wrong=")
    assert example.wrong is not None
    try:
        make(example.make).build(*make(example.wrong, 100))
    except (ValueError, TypeError):
        return
    raise AssertionError("a problem of a wrong shape is accepted")


CONSTRUCTION: dict[str, Callable[[Example], None]] = {
    "exact": exact,
    "untouched": untouched,
    "seed": seed,
    "wrong": wrong,
}
