"""Shrink: channels, neurons and heads really removed, so that a model is smaller and faster."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from interlayer.core.delivery import guard
from interlayer.core.equal import named_tensors
from interlayer.core.record import TAKE, record
from interlayer.core.taps import at_rest
from interlayer.core.wiring.groups import Group, Wiring, run
from interlayer.core.wiring.labels import tensors
from interlayer.core.wiring.resize import Axes, Keep, attributes, configured, follow, sizes

NORM = re.compile(r"LayerNorm|RMSNorm")


def masked(model: nn.Module, keep: Keep, wiring: Wiring) -> dict[str, Tensor]:
    """The reference for ``take``: weights of the same shapes, zero wherever a removed unit owns a position.

    Run them with ``wiring.run(model, weights, *inputs)``.
    """
    state = {n: t.detach().clone() for n, t in model.state_dict().items() if isinstance(t, Tensor)}
    stays = _axes(model, keep, wiring)
    for name, value in state.items():
        for dim in range(value.ndim):
            if (at := stays.get((wiring.aliases.get(name, name), dim))) is not None:
                gone = torch.ones(value.shape[dim], dtype=torch.bool).index_fill_(0, at, False).nonzero()[:, 0]
                value.index_fill_(dim, gone.to(value.device), 0)
    return state


def take(
    model: nn.Module,
    keep: Keep,
    wiring: Wiring,
    *inputs: Any,
    **kwargs: Any,
) -> nn.Module:
    """A smaller model that has only some units of some groups; the model itself stays as it is.

    Every axis on which a removed unit owns a position becomes shorter. Where a configuration (of ``transformers``, ``diffusers`` or
    ``interlayer.models``) can express the new sizes, the result is a plain model of that configuration, which ``save_pretrained``
    carries. Otherwise it is a copy with shorter weights whose integer attributes follow; ``interlayer.save`` stores it
    without pickle, and ``save_pretrained`` refuses. The result is run once, and must give what the model gives with the
    removed units set to zero (``masked``) in all outputs whose shapes stay, unless a norm takes its statistics over the shortened axis.

    Takes the time of slicing each weight and of two or more forward passes; beside the result, a zeroed copy of the weights.

    Args:
        model: Any module that ``trace`` follows.
        keep: The units that stay, by the name of their group. Groups that are not named stay whole.
        wiring: What ``trace(model, ...)`` found.
        inputs: Positional arguments for the check; those of ``trace``.
        kwargs: Keyword arguments for the check.

    Raises:
        ValueError: No such group or unit, no unit left, or the model's code insists on a size.

    Examples:
        >>> from interlayer.core.wiring import trace
        >>> net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 4)
        >>> take(net, {"0.weight:0": [0, 2, 5]}, trace(net, x), x)
        Sequential(
          (0): Linear(in_features=4, out_features=3, bias=True)
          (1): ReLU()
          (2): Linear(in_features=3, out_features=3, bias=True)
        )
    """
    axes = _axes(model, keep, wiring)
    if not axes:
        return copy.deepcopy(model)
    keep = {name: _units(wiring, keep, name) for name in keep}
    cut = [wiring.groups[name] for name in keep if len(keep[name]) < wiring.groups[name].size]
    state = {}
    for name, value in model.state_dict().items():
        for dim in range(value.ndim if isinstance(value, Tensor) else 0):
            if (at := axes.get((wiring.aliases.get(name, name), dim))) is not None:
                value = value.index_select(dim, at.to(value.device))
        state[name] = value

    def output(net: nn.Module, weights: Mapping[str, Tensor] | None = None) -> list[Tensor]:
        with at_rest(net), torch.no_grad():
            found = net(*inputs, **kwargs) if weights is None else run(net, weights, *inputs, **kwargs)
            return [t for t in tensors(found) if t.is_floating_point()]

    expected, problem, second = output(model, masked(model, keep, wiring)), "", None
    for small in _candidates(model, state, axes, cut, keep, wiring):
        try:
            given = output(small)
        except Exception as error:  # whatever the model's own code raises where a size does not fit
            problem = problem or f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        pairs = [(a, b) for a, b in zip(expected, given, strict=True) if a.shape == b.shape]
        if pairs and all(_close(a, b) for a, b in pairs):
            return small
        second = second or small
    if second is not None and any(normed(model, g) for g in cut):
        return second
    raise ValueError(
        f"take: {type(model).__name__} does not work with fewer units of {', '.join(g.name for g in cut)} "
        f"({problem or 'its outputs are not those with the removed units set to zero'}): its code insists on a size. "
        "Keep the same number in every group that shares a size (all heads, all layers of an LSTM), choose other groups, or "
        "leave the shapes and set the units to zero with masked()."
    )


def normed(model: nn.Module, group: Group) -> bool:
    """Whether a norm takes its statistics over the units of a group, so that the others change when some are removed."""
    for m in (*group.members, *group.outputs):
        owner = _owner(model, m.name)
        if NORM.search(type(owner).__name__) or (isinstance(owner, nn.GroupNorm) and owner.num_groups == 1):
            return True
    return False


def restore(model: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
    """Give a base model the shapes and attributes that ``take`` recorded, in place; ``recipe.load`` fills in the weights."""
    own = dict(model.named_modules(remove_duplicate=False))
    olds, shared = named_tensors(model), dict[int, Any]()
    for name, shape in structure["shapes"].items():
        path, _, last = name.rpartition(".")
        old = olds[name]
        if len(shape) != old.ndim or any(not 0 < n <= most for n, most in zip(shape, old.shape, strict=True)):
            raise ValueError(
                f"take: {name} was {shape}; expected a part of {tuple(old.shape)}. Is the base the right one?"
            )
        if id(old) not in shared:
            shared[id(old)] = old.detach()[tuple(slice(n) for n in shape)].clone()
        shared[id(old)] = _put(own[path], last, shared[id(old)])
    for path, values in structure["attributes"].items():
        for name, value in values.items():
            if type(vars(own[path])[name]) not in (int, tuple) or not isinstance(value, int | list):
                raise ValueError(f"take: {path}.{name} was {str(value)[:40]}; expected a size. Is the recipe damaged?")
            setattr(own[path], name, value if isinstance(value, int) else tuple(value))
    return guard(model, "units removed that its configuration cannot express")


def _units(wiring: Wiring, keep: Keep, name: str) -> list[int]:
    """The units of a group that stay, in order."""
    if name not in wiring.groups:
        raise ValueError(f"take: no group named {name!r}; the groups are {', '.join(wiring.groups)}.")
    size = wiring.groups[name].size
    units = sorted(int(i) for i in torch.as_tensor(keep[name]).flatten().tolist())
    if not units or len(set(units)) < len(units) or units[0] < 0 or units[-1] >= size:
        raise ValueError(
            f"take: group {name!r} was to keep {units}; expected different units from 0 to {size - 1}, at least one. "
            "Give the numbers of the units that stay."
        )
    return units


def _axes(model: nn.Module, keep: Keep, wiring: Wiring) -> Axes:
    """For each axis that becomes shorter, the positions that stay."""
    shapes, gone = model.state_dict(), dict[tuple[str, int], Tensor]()
    for name in keep:
        out = torch.ones(wiring.groups[name].size if name in wiring.groups else 0, dtype=torch.bool)
        out[_units(wiring, keep, name)] = False
        for m in wiring.groups[name].members if out.any() else ():
            at = gone.setdefault((m.name, m.dim), torch.zeros(shapes[m.name].shape[m.dim], dtype=torch.bool))
            at[m.index[out].flatten()] = True
    if empty := [axis for axis, at in gone.items() if at.all()]:
        raise ValueError(
            f"take: nothing of {empty[0][0]} axis {empty[0][1]} would be left; keep a unit of each group on it."
        )
    return {axis: (~at).nonzero()[:, 0] for axis, at in gone.items()}


def _close(a: Tensor, b: Tensor) -> bool:
    size = a.abs().max() if a.numel() else a.new_ones(())
    return bool(((a - b).abs() <= (1e-3 if a.dtype.itemsize >= 4 else 5e-2) * size + 1e-6).all())


def _owner(model: nn.Module, name: str) -> nn.Module:
    """The module that holds a parameter, or that a name means."""
    module: Any = model
    for part in name.split("."):
        module = module._modules.get(part) or module
    return module


def _candidates(
    model: nn.Module, state: Mapping[str, Tensor], axes: Axes, cut: Sequence[Group], keep: Keep, wiring: Wiring
) -> Iterator[nn.Module]:
    """Models with the sliced weights, the plainest first."""
    yield from configured(model, state, sizes(model, axes, cut, keep, wiring))
    choices = attributes(model, axes, cut, keep, wiring)
    names = list(choices)
    subsets = [names, *([n for n in names if n != out] for out in names), []]
    for chosen in dict.fromkeys(map(tuple, subsets)):
        new = copy.deepcopy(model)
        own, twice = dict(new.named_modules()), dict(new.named_modules(remove_duplicate=False))
        before = {path: dict(vars(m)) for path, m in own.items()}
        olds, shared = named_tensors(new), dict[int, Any]()
        for name, value in state.items():
            path, _, last = name.rpartition(".")
            was = olds[name]
            if was.shape != value.shape:
                shared[id(was)] = _put(twice[path], last, shared.get(id(was), value))
        for path, module in own.items():
            follow(module, path, axes, cut)
        for kind in chosen:
            for path, name, size in choices[kind]:
                setattr(own[path], name, size)
        changed = {
            path: {n: v for n, v in vars(m).items() if type(v) in (int, tuple) and v != before[path].get(n)}
            for path, m in own.items()
        }
        shapes = {n: list(v.shape) for n, v in state.items() if v.shape != model.state_dict()[n].shape}
        record(new, TAKE, {}, {"shapes": shapes, "attributes": {p: a for p, a in changed.items() if a}})
        yield guard(new, "units removed that its configuration cannot express")


def _put(module: nn.Module, name: str, value: Tensor) -> Any:
    """Set a parameter or buffer of another shape."""
    if name in module._buffers:
        module._buffers[name] = value
        return value
    old = module._parameters[name]
    new = (
        value
        if isinstance(value, nn.Parameter)
        else nn.Parameter(value, old.requires_grad if old is not None else True)
    )
    setattr(module, name, new)  # recurrent layers of torch note it in a list, too
    return new
