"""How contracts build and run a module: pairs of module and inputs, changed inputs, outputs with gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from interlayer.core.example import Example
from interlayer.testing.common import make, require, tensors

Inputs = tuple[Any, ...]


def pair(example: Example, seed: int = 0) -> tuple[nn.Module, Inputs]:
    """A module and its inputs."""
    module = make(example.make, seed)
    require(isinstance(module, nn.Module), f"make() gave {type(module).__name__}; expected a torch.nn.Module")
    return module, make(example.inputs, 100)


def mapped(change: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """The inputs with every tensor changed."""
    return tuple(change(x) if isinstance(x, Tensor) else x for x in inputs)


def in_every_mode(contract: Callable[[Example], None]) -> Callable[[Example], None]:
    """The contract, held for the example and then for each of its ``modes``."""

    @wraps(contract)
    def held(example: Example) -> None:
        contract(example)
        for name, build in example.modes.items():
            try:
                contract(dataclasses.replace(example, make=build))
            except Exception as error:
                raise AssertionError(f"mode {name!r}: {type(error).__name__}: {error}") from error

    return held


def longer(inputs: Inputs) -> Inputs:
    """A batch of more than twice the size."""
    return mapped(lambda x: torch.cat((x, x, x[:1])), inputs)


def low_precision(inputs: Inputs) -> Inputs:
    """The inputs in bfloat16."""
    return mapped(lambda x: x.bfloat16() if x.is_floating_point() else x, inputs)


def double(inputs: Inputs) -> Inputs:
    """The inputs in float64."""
    return mapped(lambda x: x.double() if x.is_floating_point() else x, inputs)


def uneven(out: list[Tensor]) -> Tensor:
    """A fixed sum of outputs, in which no two numbers have the same weight."""
    weights = [torch.linspace(-1, 1.3, t.numel(), dtype=torch.float64, device=t.device).view(t.shape) for t in out]
    return torch.stack([(t.double() * w).sum() for t, w in zip(out, weights, strict=True)] or [torch.zeros(())]).sum()


def outcome(module: nn.Module, inputs: Inputs) -> tuple[list[Tensor], dict[str, Tensor | None]]:
    """Outputs, and gradients of an uneven sum of them."""
    module.zero_grad()
    out = [t for t in tensors(module(*inputs)) if t.is_floating_point()]
    require(bool(out), "the output has no floating-point tensor")
    if (loss := uneven(out)).requires_grad:
        loss.backward()
    return [t.detach() for t in out], {n: p.grad for n, p in module.named_parameters() if p.requires_grad}
