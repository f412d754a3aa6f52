"""Helpers of all contracts: seeds, comparisons, and snapshots of a model that reveal changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@contextmanager
def seeded(seed: int = 0) -> Iterator[None]:
    """Set the seed inside, and restore the generator afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def make(build: Callable[[], Any], seed: int = 0) -> Any:
    """Call ``build`` under a known seed."""
    with seeded(seed):
        return build()


def require(condition: bool, message: str) -> None:
    """Raise unless the condition holds (also under ``python -O``)."""
    if not condition:
        raise AssertionError(message)


def tensors(value: Any) -> list[Tensor]:
    """The tensors in nested containers."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def model_and_data(inputs: Callable[[], tuple[Any, ...]]) -> tuple[nn.Module, Any]:
    """What an example gives: a model, and the data if there are any."""
    model, *data = make(inputs, 100)
    require(isinstance(model, nn.Module), f"inputs() must begin with a model, got {type(model).__name__}")
    return model, data[0] if data else None


def same(a: Any, b: Any, what: str, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Require equal tensors in two nested containers, bit for bit by default."""
    left, right = tensors(a), tensors(b)
    require(len(left) == len(right), f"{what}: {len(left)} tensors against {len(right)}")
    for x, y in zip(left, right, strict=True):
        require(x.shape == y.shape, f"{what}: shape {tuple(x.shape)} against {tuple(y.shape)}")
        close = torch.allclose(x, y, rtol=rtol, atol=atol, equal_nan=True) if rtol or atol else _identical(x, y)
        if not close:
            gap = (x.double() - y.double()).abs().max().item() if not x.is_complex() else float("nan")
            raise AssertionError(f"{what}: the numbers differ by up to {gap:.3g}")


def _identical(x: Tensor, y: Tensor) -> bool:
    if x.is_floating_point() or x.is_complex():
        return torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)) and torch.equal(x.isnan(), y.isnan())
    return torch.equal(x, y)


def finite(value: Any, what: str) -> None:
    """Require that no number is inf or nan."""
    for t in tensors(value):
        require(bool(torch.isfinite(t).all()), f"{what} has inf or nan")


def hooks(model: nn.Module) -> list[str]:
    """Every hook on a module or a parameter, as ``module.kind``."""
    found = [
        f"{name or 'model'}.{kind}" for name, m in model.named_modules() for kind in HOOKS for _ in getattr(m, kind)
    ]
    for name, p in model.named_parameters():
        found += [
            f"{name}.{k}" for k in ("_backward_hooks", "_post_accumulate_grad_hooks") for _ in getattr(p, k, None) or ()
        ]
    return found


def picture(model: nn.Module) -> dict[str, Any]:
    """A snapshot of weights, buffers, gradients, modes, hooks, modules and replaced methods."""
    found: dict[str, Any] = {f"hooks {i}": h for i, h in enumerate(hooks(model))}
    for name, m in model.named_modules():
        found[f"module {name}"] = (type(m), m.training)
        found[f"methods {name}"] = sorted(k for k, v in vars(m).items() if callable(v) and hasattr(type(m), k))
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        found[f"value {name}"] = t.detach().clone()
        found[f"gradient {name}"] = None if t.grad is None else t.grad.clone()
        found[f"setting {name}"] = (t.requires_grad, t.dtype, t.device, id(t))
    return found


def unchanged(before: dict[str, Any], model: nn.Module, who: str) -> None:
    """Require that the model equals its snapshot."""
    after = picture(model)
    for key in [*before, *(k for k in after if k not in before)]:
        require(key in before and key in after, f"{who} left or removed: {key}")
        a, b = before[key], after[key]
        equal = _identical(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape else False
        require(equal or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b), f"{who} changed: {key}")
