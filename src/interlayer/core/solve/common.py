"""What both solvers share: results, errors, and functions whose tensors are arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class SolverError(RuntimeError):
    """A solver did not get to its tolerance."""


@dataclass(frozen=True)
class Solved:
    """What a solver found.

    Attributes:
        value: The solution.
        evaluations: How often it called the function, in the forward pass.
        residual: What is left: for a fixed point the largest relative distance ``|f(z) - z| / |f(z)|``, for adaptive steps
            the largest error of a step that was taken, as a share of the tolerance; 0 for fixed steps, which estimate none.
    """

    value: Tensor
    evaluations: int
    residual: float


class Explicit:
    """A function as one of all tensors that get gradients: its inputs, and its parameters if it is a module.

    Called as ``explicit(tensors, *state)``. It runs under the autocast of the place where it was made, in a backward pass too;
    the cache of casts is off, because one that is filled without gradients would cut them off later.
    """

    def __init__(self, f: Callable[..., Tensor], inputs: Sequence[Tensor], like: Tensor) -> None:
        self.f, self.inputs = f, tuple(inputs)
        own = {n: p for n, p in f.named_parameters() if p.requires_grad} if isinstance(f, nn.Module) else {}
        self.names, self.where = [*own], [i for i, x in enumerate(self.inputs) if x.requires_grad]
        self.tensors = (*own.values(), *(self.inputs[i] for i in self.where))
        self.given, self.exact = like.dtype, torch.promote_types(like.dtype, torch.float32)
        device = like.device.type
        self.cast: tuple[Any, ...] = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def own(self) -> bool:
        """Whether the module still has the parameters that it had; not after ``torch.func.functional_call``."""
        now = dict(self.f.named_parameters()) if self.names and isinstance(self.f, nn.Module) else {}
        return all(now[name] is tensor for name, tensor in zip(self.names, self.tensors, strict=False))

    def __call__(self, tensors: Sequence[Tensor] | None, *state: Tensor) -> Tensor:
        """Evaluate with these tensors; None for its own. Low-precision states are kept, and solved, in float32."""
        if not (self.cast[2] or torch.is_autocast_enabled(self.cast[0])):
            return self._call(tensors, state)
        with torch.autocast(*self.cast, cache_enabled=False):
            return self._call(tensors, state)

    def _call(self, tensors: Sequence[Tensor] | None, state: tuple[Tensor, ...]) -> Tensor:
        given, inputs = [x.to(self.given) for x in state], list(self.inputs)
        if tensors is None:
            return self.f(*given, *inputs).to(self.exact)
        for i, x in zip(self.where, tensors[len(self.names) :], strict=True):
            inputs[i] = x
        if not self.names:
            return self.f(*given, *inputs).to(self.exact)
        assert isinstance(self.f, nn.Module)
        weights = dict(zip(self.names, tensors[: len(self.names)], strict=True))
        return functional_call(self.f, weights, (*given, *inputs)).to(self.exact)

    def closed(self, *state: Tensor) -> None:
        """Raise ValueError if a plain function captures tensors that would lose their gradients; evaluates it once.

        A module's own parameters are known.
        """
        if isinstance(self.f, nn.Module) or not torch.is_grad_enabled() or not state[-1].numel():
            return
        given = [x.detach().to(self.given) for x in state]
        if self.f(*given, *(x.detach() for x in self.inputs)).requires_grad:
            raise ValueError(
                "solve: f captures tensors that require gradients, which would get none. Make f a module that owns them, or give "
                "them as further arguments."
            )

    def wants(self, *state: Tensor) -> bool:
        """Whether anything here, or in the state, gets gradients."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in (*state, *self.tensors))
