"""Shrink: channels, neurons and heads really removed, so that a model is smaller and faster."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from interlayer.core.delivery import guard
from interlayer.core.record import TAKE, record, steps
from interlayer.core.taps import at_rest
from interlayer.core.wiring.groups import Group, Wiring, run
from interlayer.core.wiring.labels import tensors

Keep = Mapping[str, Any]
"""By the name of a group, the units that stay: integers, in any order."""
Axes = dict[tuple[str, int], Tensor]

NOT_SIZES = re.compile(r"kernel|stride|padding|dilation|layer|idx|index|depth|vocab|token|_id$|top_k|patch")
NORM = re.compile(r"LayerNorm|RMSNorm")
MOST = 5  # numbers of a configuration that are tried in all combinations


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
    read: Callable[[Any], Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """A smaller model that has only some units of some groups; the model itself stays as it is.

    Every axis on which a removed unit owns a position becomes shorter. Where a configuration (of ``transformers``, ``diffusers`` or
    ``interlayer.models``) can express the new sizes, the result is a plain model of that configuration, which ``save_pretrained``
    carries. Otherwise it is a copy with shorter weights whose integer attributes follow; ``interlayer.save`` stores it
    without pickle, and ``save_pretrained`` refuses. The result is run once, and must give what the model gives with the
    removed units set to zero (``masked``), unless a norm takes its statistics over the shortened axis.

    Takes the time of slicing each weight and of two or more forward passes; beside the result, a zeroed copy of the weights.

    Args:
        model: Any module that ``trace`` follows.
        keep: The units that stay, by the name of their group. Groups that are not named stay whole.
        wiring: What ``trace(model, ...)`` found.
        inputs: Positional arguments for the check; those of ``trace``.
        read: What of the output is compared. Defaults to all tensors in it whose shapes stay.
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
            return [t for t in tensors(read(found) if read else found) if t.is_floating_point()]

    expected, problem, second = output(model, masked(model, keep, wiring)), "", None
    for small in _candidates(model, state, axes, cut, keep, wiring):
        try:
            given = output(small)
        except Exception as error:  # whatever the model's own code raises where a size does not fit
            problem = problem or f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        pairs = [(a, b) for a, b in zip(expected, given, strict=True) if read or a.shape == b.shape]
        if pairs and all(a.shape == b.shape for a, b in pairs):
            if all(_close(a, b) for a, b in pairs):
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
    olds, shared = _stored(model), dict[int, Any]()
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
    sizes = _sizes(model, axes, cut, keep, wiring)
    yield from _configured(model, state, sizes)
    choices = _attributes(model, axes, cut, keep, wiring)
    names = list(choices)
    subsets = [names, *([n for n in names if n != out] for out in names), []]
    for chosen in dict.fromkeys(map(tuple, subsets)):
        new = copy.deepcopy(model)
        own, twice = dict(new.named_modules()), dict(new.named_modules(remove_duplicate=False))
        before = {path: dict(vars(m)) for path, m in own.items()}
        olds, shared = _stored(new), dict[int, Any]()
        for name, value in state.items():
            path, _, last = name.rpartition(".")
            was = olds[name]
            if was.shape != value.shape:
                shared[id(was)] = _put(twice[path], last, shared.get(id(was), value))
        for path, module in own.items():
            _follow(module, path, axes, cut)
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


def _stored(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, shared ones under each of their names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


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


def _follow(module: nn.Module, path: str, axes: Axes, cut: Sequence[Group]) -> None:
    """Set the sizes that a layer of torch keeps beside its weights."""
    shape = {n: p.shape for n, p in (*module._parameters.items(), *module._buffers.items()) if p is not None}
    weight: Any = shape.get("weight")

    def blocks(size: int, dim: int = 0) -> int:  # how many blocks of that many positions are left
        at = axes.get((f"{path}.weight".lstrip("."), dim))
        return int(weight[dim]) // size if at is None else len((at // size).unique())

    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight
    elif isinstance(module, nn.modules.conv._ConvNd):
        axis = module.in_channels if module.transposed else module.out_channels
        module.groups = blocks(axis // module.groups)
        a, b = int(weight[0]), int(weight[1]) * module.groups
        module.in_channels, module.out_channels = (a, b) if module.transposed else (b, a)
    elif isinstance(module, nn.GroupNorm) and weight:
        module.num_groups, module.num_channels = blocks(module.num_channels // module.num_groups), weight[0]
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = next((s[0] for s in shape.values() if s), module.num_features)
    elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
        module.normalized_shape = tuple(weight) if weight else _shown(module.normalized_shape, path, cut, axes)
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        module.num_embeddings, module.embedding_dim = weight
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight[0]
    elif isinstance(module, nn.RNNBase):
        module.input_size, module.hidden_size = shape["weight_ih_l0"][1], shape["weight_hh_l0"][1]
    elif isinstance(module, nn.RNNCellBase):
        module.input_size, module.hidden_size = shape["weight_ih"][1], shape["weight_hh"][1]
    elif type(module).__name__ == "Conv1D" and weight:  # transformers' linear layer of GPT-2
        module.nx, module.nf = weight


def _shown(shape: tuple[int, ...], path: str, cut: Sequence[Group], axes: Axes) -> tuple[int, ...]:
    """The shape over which a norm without weights works, by the units that it shows."""
    for group in cut:
        for m in group.outputs:
            if m.name == path and len(shape) == 1:
                first = group.members[0]
                left = len(axes[first.name, first.dim]) // first.index.shape[1]
                return (shape[0] - (group.size - left) * m.index.shape[1],)
    return shape


def _sizes(model: nn.Module, axes: Axes, cut: Sequence[Group], keep: Keep, wiring: Wiring) -> dict[int, int]:
    """Old sizes and new ones: of groups, of axes, and of groups in all units of another; those with the fewest weights first."""
    state, sizes = model.state_dict(), dict[int, int]()
    for group in sorted(cut, key=lambda g: len(g.members)):
        sizes.setdefault(group.size, len(keep[group.name]))
        for m in group.members:
            sizes.setdefault(state[m.name].shape[m.dim], len(axes[m.name, m.dim]))
    names, totals = {g.name for g in cut}, dict[tuple[str, str], list[int]]()
    for g in wiring.groups.values():  # such as all query heads, of which each key head has some
        if g.parent and names & {g.name, g.parent[0]}:
            total = totals.setdefault((g.parent[0], g.members[0].name), [0, 0])
            total[0] += g.size
            total[1] += (
                len(keep.get(g.name, range(g.size))) if g.parent[1] in keep.get(g.parent[0], [g.parent[1]]) else 0
            )
    for old, new in totals.values():
        if old != new:
            sizes.setdefault(old, new)
    return sizes


def _attributes(
    model: nn.Module, axes: Axes, cut: Sequence[Group], keep: Keep, wiring: Wiring
) -> dict[tuple[type, str], list[tuple[str, str, int]]]:
    """Integer attributes, near cut weights, that hold an old size: (module, name, new size), by class and name."""
    found: dict[tuple[type, str], list[tuple[str, str, int]]] = {}
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn.modules") and not isinstance(module, nn.MultiheadAttention):
            continue
        near = [g for g in cut if any(m.name.startswith(f"{path}.".lstrip(".")) for m in g.members)]
        sizes = _sizes(model, axes, near, keep, wiring) if near else {}
        for name, value in vars(module).items():
            if type(value) is int and not NOT_SIZES.search(name):
                new = sizes.get(value)
                if new is not None:
                    found.setdefault((type(module), name), []).append((path, name, new))
    return found


def _configured(model: nn.Module, state: Mapping[str, Tensor], sizes: Mapping[int, int]) -> Iterator[nn.Module]:
    """Models built anew from configurations with other sizes that give the shapes of the sliced weights, the fewest changes first."""
    home, config = type(model).__module__.split(".")[0], getattr(model, "config", None)
    if home not in ("transformers", "diffusers", "interlayer") or config is None or steps(model):
        return
    told = dict(config.to_dict() if home == "transformers" else config)
    new = {n: _resized(v, sizes) for n, v in told.items() if not n.startswith("_") and not NOT_SIZES.search(n)}
    other = {n: v for n, v in new.items() if v != told[n]}
    if told.get("n_inner", 0) is None and 4 * told["n_embd"] in sizes:  # GPT-2: four times the width
        other["n_inner"] = sizes[4 * told["n_embd"]]
    shapes = {n: tuple(v.shape) for n, v in state.items()}
    for count in range(1, min(len(other), MOST) + 1):
        for names in combinations(other, count):
            chosen = {n: other[n] for n in names}
            try:
                with torch.device("meta"):
                    built = _build(model, home, chosen)
            except Exception:  # whatever a constructor makes of sizes that do not go together
                continue
            if {n: tuple(v.shape) for n, v in built.state_dict().items()} == shapes:
                yield _filled(model, _build(model, home, chosen), state)


def _resized(value: Any, sizes: Mapping[int, int]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_resized(v, sizes) for v in value)
    return sizes.get(value, value) if type(value) is int else value


def _build(model: Any, home: str, changes: Mapping[str, Any]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        if home == "transformers":
            config = copy.deepcopy(model.config)
            if getattr(config, "head_dim", 0) is None:  # else it would follow from the number of heads
                config.head_dim = config.hidden_size // config.num_attention_heads
            for name, value in changes.items():
                setattr(config, name, value)
            return type(model)(config)
        if home == "diffusers":
            return type(model).from_config({**model.config, **changes})
        return type(model)(**{**model.config, **changes})


def _filled(model: nn.Module, new: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """The built model with the sliced weights, and everything else as in the model."""
    some = next(model.parameters())
    new = new.to(device=some.device, dtype=some.dtype)
    new.load_state_dict(dict(state))
    trains = {n: p.requires_grad for n, p in model.named_parameters()}
    for name, p in new.named_parameters():
        p.requires_grad_(trains[name])
    for name, module in new.named_modules():
        module.training = model.get_submodule(name).training
    if hasattr(model, "generation_config"):
        new.generation_config = copy.deepcopy(model.generation_config)
    return new
