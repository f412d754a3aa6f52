"""Make the sizes that a model keeps beside its weights follow them: layers of torch, other attributes, configurations."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from interlayer.core.record import steps
from interlayer.core.wiring.groups import Group, Wiring

Keep = Mapping[str, Any]
"""By the name of a group, the units that stay: integers, in any order."""
Axes = dict[tuple[str, int], Tensor]

NOT_SIZES = re.compile(r"kernel|stride|padding|dilation|layer|idx|index|depth|vocab|token|_id$|top_k|patch")
MOST = 5  # numbers of a configuration that are tried in all combinations


def follow(module: nn.Module, path: str, axes: Axes, cut: Sequence[Group]) -> None:
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


def sizes(model: nn.Module, axes: Axes, cut: Sequence[Group], keep: Keep, wiring: Wiring) -> dict[int, int]:
    """Old sizes and new ones: of groups, of axes, and of groups in all units of another; those with the fewest weights first."""
    state, found = model.state_dict(), dict[int, int]()
    for group in sorted(cut, key=lambda g: len(g.members)):
        found.setdefault(group.size, len(keep[group.name]))
        for m in group.members:
            found.setdefault(state[m.name].shape[m.dim], len(axes[m.name, m.dim]))
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
            found.setdefault(old, new)
    return found


def attributes(
    model: nn.Module, axes: Axes, cut: Sequence[Group], keep: Keep, wiring: Wiring
) -> dict[tuple[type, str], list[tuple[str, str, int]]]:
    """Integer attributes, near cut weights, that hold an old size: (module, name, new size), by class and name."""
    found: dict[tuple[type, str], list[tuple[str, str, int]]] = {}
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn.modules") and not isinstance(module, nn.MultiheadAttention):
            continue
        near = [g for g in cut if any(m.name.startswith(f"{path}.".lstrip(".")) for m in g.members)]
        changed = sizes(model, axes, near, keep, wiring) if near else {}
        for name, value in vars(module).items():
            if type(value) is int and not NOT_SIZES.search(name):
                new = changed.get(value)
                if new is not None:
                    found.setdefault((type(module), name), []).append((path, name, new))
    return found


def configured(model: nn.Module, state: Mapping[str, Tensor], sizes: Mapping[int, int]) -> Iterator[nn.Module]:
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
