"""Weights that are computed from other weights: masked, low-rank, shifted, tied.

All but ``tie`` are parametrisations (``torch.nn.utils.parametrize``), so they train, move and save like any weight.
Weights that another network generates need none: ``torch.func.functional_call(module, {"weight": w}, inputs)``.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from interlayer.core.record import BAKE, record, steps


class Masked(nn.Module):
    """The weight where the mask is true, zero elsewhere. Masked weights get no gradient."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.to(torch.bool))

    def forward(self, weight: Tensor) -> Tensor:
        """Weight and mask have one shape."""
        return weight.masked_fill(~self.mask, 0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Use a new value unchanged."""
        return weight


class LowRank(nn.Module):
    """The weight as a product of a tall and a wide factor; axes after the first count as one."""

    def __init__(self, shape: torch.Size, rank: int) -> None:
        super().__init__()
        self.shape, self.rank = tuple(shape), rank

    def forward(self, tall: Tensor, wide: Tensor) -> Tensor:
        """Multiply the factors."""
        return (tall @ wide).view(self.shape)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The factors nearest to ``weight`` in the Frobenius norm, with the singular values shared evenly."""
        u, s, v = torch.linalg.svd(weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32)), False)
        root, k = s[: self.rank].sqrt(), self.rank
        return (u[:, :k] * root).to(weight.dtype), (root[:, None] * v[:k]).to(weight.dtype)


class Shifted(nn.Module):
    """The weight plus a trainable difference."""

    def __init__(self, delta: Tensor) -> None:
        super().__init__()
        self.delta = nn.Parameter(delta.detach().clone())

    def forward(self, weight: Tensor) -> Tensor:
        """Add the difference."""
        return weight + self.delta

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Use a new value as the weight before the difference is added."""
        return weight


OURS = (Masked, LowRank, Shifted)


def mask(module: nn.Module, name: str, keep: Tensor) -> nn.Module:
    """Keep the weights where ``keep`` is true and zero the others, in place. Masking again replaces the mask.

    Examples:
        >>> layer = mask(nn.Linear(2, 1), "weight", torch.tensor([[True, False]]))
        >>> layer.weight[0, 1].item()
        0.0
    """
    weight = _weight(module, name)
    if keep.shape != weight.shape:
        raise ValueError(
            f"weights.mask: {name} is {tuple(weight.shape)}, the mask {tuple(keep.shape)}; expected one shape."
        )
    for part in _parts(module, name):
        if isinstance(part, Masked):
            part.mask.copy_(keep)
            return module
    _register(module, name, Masked(keep.to(weight.device)))
    return module


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks of a model by the name of the masked weight (``"conv.weight"``)."""
    return {
        f"{path}.{name}".lstrip("."): part.mask
        for path, module in model.named_modules()
        for name in _named(module)
        for part in _parts(module, name)
        if isinstance(part, Masked)
    }


def low_rank(module: nn.Module, name: str, rank: int) -> nn.Module:
    """Replace a weight by the product of two factors of that rank, in place, initialised with its best approximation."""
    weight = _weight(module, name)
    full = min(weight.flatten(1).shape) if weight.ndim > 1 else 0
    if not 0 < rank <= full:
        raise ValueError(
            f"weights.low_rank: rank {rank} for {name} of shape {tuple(weight.shape)}; expected 1 to {full}."
        )
    _register(module, name, LowRank(weight.shape, rank))
    return module


def shift(module: nn.Module, name: str, delta: Tensor | None = None) -> nn.Module:
    """Freeze a weight and add a trainable difference to it, in place. The difference is ``delta`` at first, or zero."""
    weight = _weight(module, name)
    delta = torch.zeros_like(weight) if delta is None else delta.to(weight)
    if delta.shape != weight.shape:
        raise ValueError(
            f"weights.shift: {name} is {tuple(weight.shape)}, delta {tuple(delta.shape)}; expected one shape."
        )
    _register(module, name, Shifted(delta))
    next(module.parametrizations[name].parameters(recurse=False)).requires_grad_(False)  # type: ignore[index, union-attr]
    return module


def tie(model: nn.Module, name: str, to: str) -> nn.Module:
    """Share one parameter between two names, in place: ``name`` becomes the parameter ``to`` (dotted names)."""
    source = model.get_parameter(to)
    if model.get_parameter(name).shape != source.shape:
        raise ValueError(
            f"weights.tie: {name} is {tuple(model.get_parameter(name).shape)}, {to} {tuple(source.shape)}; expected one shape."
        )
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, source)
    return model


def bake(model: nn.Module) -> nn.Module:
    """Copy a model, with plain weights instead of masked, low-rank and shifted ones. The outputs stay the same.

    Raises:
        ValueError: No weight of the model is parametrised by this module.
    """
    if not any(_parts(m, n) for m in model.modules() for n in _named(m) if _all_ours(m, n)):
        raise ValueError(f"weights.bake: {type(model).__name__} has no masked, low-rank or shifted weights.")
    new = strip(copy.deepcopy(model))
    if steps(new):
        record(new, BAKE, {}, {})
    return new


def strip(model: nn.Module) -> nn.Module:
    """Do what ``bake`` does, in place; a model without such weights stays unchanged. Shared weights stay shared."""
    done: dict[tuple[int, ...], nn.Parameter] = {}
    for module in list(model.modules()):
        for name in [n for n in _named(module) if _all_ours(module, n)]:
            stack: Any = module.parametrizations[name]  # type: ignore[index]
            key = tuple(id(t) for t in (*stack.parameters(), *stack.buffers()))
            trains = getattr(module, name).requires_grad
            if "original" in stack._parameters:  # torch writes into it, and it may be another module's too
                stack.original = nn.Parameter(stack.original.detach().clone())
            own_class(module)
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)
            plain = nn.Parameter(getattr(module, name).detach(), trains)
            done.setdefault(key, plain)
            module.register_parameter(name, done[key])
    return model


def _register(module: nn.Module, name: str, part: nn.Module) -> None:
    own_class(module)
    parametrize.register_parametrization(module, name, part)


def own_class(module: nn.Module) -> None:
    """Give a copy of a parametrised module a class of its own: copies share torch's generated class, which torch then alters."""
    cls = type(module)
    if parametrize.is_parametrized(module):
        content = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(cls.__name__, cls.__bases__, content)


def _named(module: nn.Module) -> list[str]:
    return list(module.parametrizations) if parametrize.is_parametrized(module) else []  # type: ignore[arg-type]


def _parts(module: nn.Module, name: str) -> tuple[nn.Module, ...]:
    return tuple(module.parametrizations[name]) if name in _named(module) else ()  # type: ignore[index]


def _all_ours(module: nn.Module, name: str) -> bool:
    return all(isinstance(part, OURS) for part in _parts(module, name))


def _weight(module: nn.Module, name: str) -> Tensor:
    weight = getattr(module, name, None)
    if not isinstance(weight, Tensor) or not (name in module._parameters or name in _named(module)):
        own = [n for n, _ in module.named_parameters(recurse=False)]
        raise ValueError(f"weights: {type(module).__name__} has no parameter {name!r}; it has {own or 'none'}.")
    return weight
