"""Groups of units that can be permuted, read off the indices after a pass, and checked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

PART = 2**17  # numbers


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of one weight that moves with a group: ``index[i]`` are the positions on axis ``dim`` that unit i owns."""

    name: str
    dim: int
    index: Tensor  # [units, positions of each unit]

    def whole(self, size: int) -> bool:
        """Whether unit i is position i of an axis of that size, for all of them."""
        return self.index.shape == (size, 1) and torch.equal(self.index[:, 0], torch.arange(size))

    def rows(self, weight: Tensor) -> Tensor:
        """The part of a weight, or of an activation, that each unit owns: ``[units, values]``."""
        units = weight.movedim(self.dim, 0)
        owned = units if self.whole(len(units)) else units[self.index.to(weight.device)]
        return owned.reshape(len(self.index), -1)


@dataclass(frozen=True, eq=False)
class Group:
    """Units that can be permuted among each other; ``parent`` is (group, unit) if they live inside a unit of another.

    ``outputs`` are the activations where the units show: the axis ``dim`` of the first tensor that the module ``name``
    (one without children) returns.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    outputs: tuple[Member, ...] = ()
    parent: tuple[str, int] | None = None


@dataclass(frozen=True, eq=False)
class Wiring:
    """The permutable groups of a model, by name, and for each axis without one the reason.

    ``aliases`` maps further names of shared weights to the name that the groups use.
    """

    groups: dict[str, Group]
    fixed: dict[tuple[str, int], str]
    aliases: dict[str, str]

    def permute(self, state: Mapping[str, Tensor], perms: Mapping[str, Any]) -> dict[str, Tensor]:
        """New weights of the same function: in each named group, position i takes what position ``perm[i]`` held.

        Groups are permuted in the order of ``groups``, units of a parent before what is inside them.
        """
        out = dict(state)
        unknown = [name for name in perms if name not in self.groups]
        if unknown:
            raise ValueError(f"Wiring.permute: no group named {unknown[0]!r}; the groups are {list(self.groups)}.")
        also: dict[str, list[str]] = defaultdict(list)
        for alias, name in self.aliases.items():
            also[name].append(alias)
        orders: dict[str, dict[int, Tensor]] = defaultdict(dict)  # of each tensor along its axes, by all groups
        for group in self.groups.values():
            if group.name not in perms:
                continue
            perm = torch.as_tensor(perms[group.name], dtype=torch.long).cpu()
            if not torch.equal(perm.sort().values, torch.arange(group.size)):
                raise ValueError(f"Wiring.permute: group {group.name!r} wants a permutation of {group.size} units.")
            for member in group.members:
                for name in (member.name, *also[member.name]):
                    if name in out:
                        order = orders[name].setdefault(member.dim, torch.arange(out[name].shape[member.dim]))
                        order[member.index] = order[member.index[perm]]
        return out | {name: _reordered(out[name], moved) for name, moved in orders.items()}

    def random(self, seed: int = 0) -> dict[str, Tensor]:
        """A random permutation for every group."""
        generator = torch.Generator().manual_seed(seed)
        return {g.name: torch.randperm(g.size, generator=generator) for g in self.groups.values()}

    def __str__(self) -> str:
        lines = [f"{len(self.groups)} groups"]
        for g in self.groups.values():
            inside = f" inside unit {g.parent[1]} of {g.parent[0]}" if g.parent else ""
            lines.append(f"{g.name}: {g.size} units{inside}")
            lines += [f"    {m.name} axis {m.dim}, {m.index.shape[1]} positions each" for m in g.members]
        lines += [f"fixed: {name} axis {dim}: {why}" for (name, dim), why in self.fixed.items()]
        return "\n".join(lines)


def _reordered(t: Tensor, orders: Mapping[int, Tensor]) -> Tensor:
    """A tensor with other orders along its axes, made part by part: fresh memory for each axis would take most of the time."""
    (dim, order), *rest = sorted((d, o.to(t.device)) for d, o in orders.items())
    if not rest:
        return t.index_select(dim, order)
    made, at = torch.empty_like(t), 0
    for part in order.split(max(PART * len(order) // t.numel(), 1)):
        moved = t.index_select(dim, part)
        for other, along in rest:
            moved = moved.index_select(other, along)
        made.narrow(dim, at, len(part)).copy_(moved)
        at += len(part)
    return made


def run(model: nn.Module, state: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """``model(*args, **kwargs)`` with the weights of ``state``; the model keeps its own.

    Like ``torch.func.functional_call`` without ties, but a module that is registered at two places gets its weights
    under the first name alone: given both, torch leaves it with one of ``state``'s in the end.
    """
    own = {
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name in (*module._parameters, *module._buffers)
    }
    given = {name: t for name, t in state.items() if name in own}
    return torch.func.functional_call(model, given, args, kwargs, tie_weights=False)


def checked(
    wiring: Wiring,
    model: nn.Module,
    outputs: Callable[[Mapping[str, Tensor]], Sequence[Tensor]],
    expected: Sequence[Tensor],
) -> Wiring:
    """Run the permuted model; drop groups whose permutation changes the output."""
    state = {k: v for k, v in model.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
    perms = wiring.random()

    def kept(names: Iterable[str]) -> bool:
        moved = wiring.permute(state, {n: perms[n] for n in names})
        for a, b in zip(expected, outputs(moved), strict=True):
            if a.is_floating_point():
                size = a.abs().max() if a.numel() else 1.0
                if not (a - b).abs().le((1e-3 if a.dtype.itemsize >= 4 else 5e-2) * size + 1e-12).all():
                    return False
        return True

    def bad(names: list[str]) -> Iterator[str]:
        if names and not kept(names):
            if len(names) == 1:
                yield names[0]
            else:
                yield from bad(names[: len(names) // 2])
                yield from bad(names[len(names) // 2 :])

    dropped = set(bad(list(wiring.groups)))
    if not dropped:
        return wiring
    groups: dict[str, Group] = {}
    for n, g in wiring.groups.items():  # parents come first
        if n not in dropped and (not g.parent or g.parent[0] in groups):
            groups[n] = g
    moved = {(m.name, m.dim) for g in groups.values() for m in g.members}
    fixed = dict(wiring.fixed)
    for n, g in reversed(wiring.groups.items()):
        if n not in groups:
            why = "permuting it changed the output" if n in dropped else "is inside a group that was dropped"
            fixed |= {(m.name, m.dim): why for m in g.members if (m.name, m.dim) not in moved}
    return Wiring(groups, fixed, wiring.aliases)
