"""Telling whether two models are the same: modules, options, parameters."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# What a module keeps for its own machinery, and the arguments that a model was made with (what they made is compared).
MACHINERY = frozenset({*vars(nn.Module()), "config"}) - {"training"}


def difference(a: nn.Module, b: nn.Module) -> str:
    """The first difference between two models in one sentence; empty if they are the same.

    Compared are the tree of modules (names, types and which are the same object), their options (plain attributes, and
    functions by their code), and the parameters and buffers with their values to the last bit and their ties.

    Args:
        a: A model.
        b: Another, built from the same noise.

    Examples:
        >>> difference(nn.ReLU(), nn.GELU())
        "'' is ReLU in one and GELU in the other."
        >>> difference(nn.Dropout(0.1), nn.Dropout(0.2))
        "'p' is 0.1 in one and 0.2 in the other."
        >>> difference(nn.ReLU(), nn.ReLU())
        ''
    """
    left, right = (dict(m.named_modules(remove_duplicate=False)) for m in (a, b))
    if odd := [name for name in {**left, **right} if name not in left or name not in right]:
        return f"only one has a module {odd[0]!r}."
    for name, module in left.items():
        other = right[name]
        if type(module) is not type(other):
            return f"{name!r} is {_class(module, other)} in one and {_class(other, module)} in the other."
        mine, theirs = (_options(m) for m in (module, other))
        for key in {**mine, **theirs}:
            if key not in mine or key not in theirs or not _same(mine[key], theirs[key]):
                shown = (repr(o.get(key)) for o in (mine, theirs))
                return f"{'.'.join(filter(None, (name, key)))!r} is {' in one and '.join(shown)} in the other."
    if ties(left) != ties(right):
        return "modules are shared in another way."
    tensors = [named_tensors(m) for m in (a, b)]
    if odd := [name for name in {**tensors[0], **tensors[1]} if name not in tensors[0] or name not in tensors[1]]:
        return f"only one has a parameter or buffer {odd[0]!r}."
    for name, tensor in tensors[0].items():
        if not _same(tensor, tensors[1][name]):
            return f"{name!r} differs in its numbers, type or requires_grad."
    if ties(tensors[0]) != ties(tensors[1]):
        return "parameters are tied in another way."
    return ""


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, shared ones under each of their names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def ties(named: Mapping[str, Any]) -> list[int]:
    """For each entry, the position of the first that is the same object."""
    first: dict[int, int] = {}
    return [first.setdefault(id(value), i) for i, value in enumerate(named.values())]


def _class(one: nn.Module, other: nn.Module) -> str:
    here, there = type(one), type(other)
    return here.__name__ if here.__name__ != there.__name__ else f"{here.__module__}.{here.__qualname__}"


def _options(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if k not in MACHINERY}


def _same(a: Any, b: Any) -> bool:
    """Whether two values stand for the same option. Objects that cannot be looked into are the same only if identical."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        alike = (a.shape, a.dtype, a.requires_grad, a.layout, a.device) == (
            b.shape,
            b.dtype,
            b.requires_grad,
            b.layout,
            b.device,
        )
        return alike and (a.is_meta or torch.equal(torch.nan_to_num(a.detach()), torch.nan_to_num(b.detach())))
    if isinstance(a, nn.Module):
        return not difference(a, b)
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, functools.partial):
        return _same((a.func, a.args, a.keywords), (b.func, b.args, b.keywords))
    if isinstance(a, types.FunctionType):
        cells = [[c.cell_contents for c in f.__closure__ or ()] for f in (a, b)]
        return a.__code__ == b.__code__ and _same(
            (a.__defaults__, a.__kwdefaults__, cells[0]), (b.__defaults__, b.__kwdefaults__, cells[1])
        )
    if isinstance(a, types.MethodType):
        return a.__func__ is b.__func__ and type(a.__self__) is type(b.__self__)
    if isinstance(
        a, int | float | complex | str | bytes | bool | frozenset | set | torch.dtype | torch.device | torch.Size
    ):
        return bool(a == b) or (isinstance(a, float) and math.isnan(a) and math.isnan(b))
    inner = getattr(a, "__dict__", None)
    return type(a).__module__ != "builtins" and inner is not None and _same(inner, vars(b))
