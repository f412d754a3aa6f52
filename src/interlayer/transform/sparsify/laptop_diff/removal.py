"""Residual layers taken out of any module: which can go, what stays in their place, and what the output loses by each."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from interlayer.core import taps
from interlayer.core.blockwise import CONTAINERS, call
from interlayer.core.kinds import Row
from interlayer.core.select import At, put, select
from interlayer.transform.sparsify._pruning import distortion, outputs

SHORTCUTS = ("conv_shortcut", "nin_shortcut", "skip_connection", "shortcut", "downsample")  # names of it inside a layer
Structure = dict[str, dict[str, Any]]


class Skip(nn.Module):
    """What is left of a residual layer without its branch: its input, or the shortcut of it.

    Args:
        shortcut: Brings the input to the output's shape, where the two differ.
        scale: What the layer divides its sum by.
        packed: Whether the layer returned a tuple.

    Examples:
        >>> Skip(packed=True)(torch.ones(1), None)
        (tensor([1.]),)
    """

    def __init__(self, shortcut: nn.Module | None = None, *, scale: float = 1.0, packed: bool = False) -> None:
        super().__init__()
        self.shortcut, self.scale, self.packed = shortcut, scale, packed

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first argument, whatever else the layer took."""
        x = args[0] if args else next(iter(kwargs.values()))
        x = (x if self.shortcut is None else self.shortcut(x)) / self.scale
        return (x,) if self.packed else x


def removable(model: nn.Module, data: Any, at: At | None = None) -> tuple[Structure, list[Row]]:
    """The layers that can be taken out of a model, with what their ``Skip`` needs, and those that cannot, with the reason.

    Args:
        model: Any module.
        data: Batches; the first one is run.
        at: Which modules. By default the members of lists that have parts of their own; of one that holds several of these, such
            as a stage of a U-Net, these count instead.
    """
    if at is None:
        lists = [(n, m) for n, m in model.named_modules() if isinstance(m, CONTAINERS)]
        there = {
            f"{n}.{child}".lstrip("."): m
            for n, each in lists
            for child, m in each.named_children()
            if next(m.children(), None) is not None
        }
    else:
        there = dict(select(model, at).chosen)
    structure, why, runs = Structure(), dict.fromkeys(there, "never ran on the data"), dict.fromkeys(there, 0)

    def look(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        runs[name] += 1
        x = args[0] if args else next(iter(kwargs.values()), None)
        y = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if not isinstance(output, Tensor | tuple) or len(y) != 1 or not isinstance(x, Tensor):
            why[name] = f"gives a {type(output).__name__} with {len(y)} tensors; expected one, of the first argument"
            return
        shortcut, why[name] = _shortcut(module, x, y[0]), ""
        if not shortcut and x.shape != y[0].shape:
            why[name] = f"makes {tuple(y[0].shape)} of {tuple(x.shape)} and has no shortcut that does"
        scale = float(getattr(module, "output_scale_factor", getattr(module, "rescale_output_factor", 1.0)))
        structure[name] = {"shortcut": shortcut, "scale": scale, "packed": isinstance(output, tuple)}

    handles = [
        m.register_forward_hook(lambda m, a, k, o, n=n: look(n, m, a, k, o), with_kwargs=True) for n, m in there.items()
    ]
    try:
        with taps.at_rest(model), torch.no_grad():
            call(model, taps.batches(data, "laptop-diff")[0])
    finally:
        for handle in handles:
            handle.remove()
    generates, owners = callable(getattr(model, "generate", None)), dict[int, list[str]]()
    for owner, p in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(p), []).append(owner)
    for name, module in there.items():
        if why[name]:
            continue
        shared = [o for p in module.parameters() for o in owners[id(p)] if not o.startswith(f"{name}.")]
        if runs[name] > 1:
            why[name] = f"runs {runs[name]} times in a pass"
        elif not saves(module, structure[name]):
            why[name] = "has no weights beside its shortcut"
        elif shared:
            why[name] = f"shares weights with {shared[0]}"
        elif generates and name.endswith(".0"):
            why[name] = "the cache counts its tokens by the first layer"
    for name in there if at is None else ():
        inner = [n for n in there if n.startswith(f"{name}.") and not why[n]]
        if len(inner) > 1 and not why[name] and not structure[name]["shortcut"]:
            why[name] = f"a stage of {len(inner)} layers, which go one by one"
    for name in there:
        outer = next((n for n in there if name.startswith(f"{n}.") and not why[n]), None)
        if outer and not why[name]:
            why[name] = f"within {outer}"
    skipped = [Row(n, type(m).__name__, why[n]) for n, m in there.items() if why[n]]
    return {n: structure[n] for n in there if not why[n]}, skipped


def _shortcut(module: nn.Module, x: Tensor, y: Tensor) -> str:
    """The name of a layer's own shortcut, if it has one that gives the output's shape."""
    for name in SHORTCUTS:
        found = getattr(module, name, None)
        if isinstance(found, nn.Module):
            try:
                fits = found(x).shape == y.shape
            except RuntimeError:  # it takes other channels: it is a part of the branch
                fits = False
            if fits:
                return name
    return ""


def _skip(module: nn.Module, how: Mapping[str, Any]) -> Skip:
    shortcut = getattr(module, how["shortcut"]) if how["shortcut"] else None
    return Skip(shortcut, scale=how["scale"], packed=how["packed"]).train(module.training)


def size(module: nn.Module) -> int:
    """Numbers in a module's parameters."""
    return sum(p.numel() for p in module.parameters())


def saves(module: nn.Module, how: Mapping[str, Any]) -> int:
    """Numbers that go with a layer's branch."""
    return size(module) - size(_skip(module, how))


def without(model: nn.Module, structure: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """Take layers out of a model, in place; ``structure`` is part of what ``removable`` found."""
    for name, how in structure.items():
        put(model, name, _skip(model.get_submodule(name), how))
    return model


def losses(model: nn.Module, structure: Mapping[str, Mapping[str, Any]], data: Any) -> dict[str, float]:
    """How far the output moves where each layer alone is missing: the mean square, a pass over the data for each.

    It is infinite where the model does not run without the layer, or overflows.

    Raises:
        ValueError: No data, or an output that is a loss or not finite.
    """
    batches, found = taps.batches(data, "laptop-diff"), dict[str, float]()
    with taps.at_rest(copy.deepcopy(model)) as work, torch.no_grad():
        whole = outputs(work, batches, "laptop-diff")
        for name, how in tqdm(structure.items(), "layers", disable=None, leave=False):
            layer = work.get_submodule(name)
            put(work, name, _skip(layer, how))
            try:
                found[name] = distortion(whole, taps.feed(work, batches), worst=False)
            except AttributeError:  # the model reads parts of this layer
                found[name] = math.inf
            put(work, name, layer)
    return found
