"""Groups of units that can be permuted, read off the indices after a pass, and checked."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from interlayer.core.wiring.indices import Array, Axis, Keys
from interlayer.core.wiring.labels import Labelling


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
        for group in self.groups.values():
            if group.name not in perms:
                continue
            perm = torch.as_tensor(perms[group.name], dtype=torch.long).cpu()
            if not torch.equal(perm.sort().values, torch.arange(group.size)):
                raise ValueError(f"Wiring.permute: group {group.name!r} wants a permutation of {group.size} units.")
            for member in group.members:
                for name in (member.name, *also[member.name]):
                    if name in out:
                        order = torch.arange(out[name].shape[member.dim])
                        order[member.index] = member.index[perm]
                        out[name] = out[name].index_select(member.dim, order.to(out[name].device))
        return out

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


def collect(tr: Labelling) -> Wiring:
    """Read the groups off the indices when everything has run."""
    ix = tr.ix

    def located(places: Array) -> list[tuple[int, ...]]:
        met: dict[tuple[int, ...], int] = defaultdict(int)
        out = []
        for i in places.tolist():
            key = ix.expand(i)
            met[key] += 1
            # positions of one axis that move together (q and k in a fused weight) are distinguished by their order
            out.append(key if met[key] == 1 else (*key, ix.constant(-1, met[key])))
        return out

    keys = {axis: located(places) for axis, places in tr.axes.items() if axis[0] in tr.used}
    homes: dict[int, set[Axis]] = defaultdict(set)  # the axes that an index locates something on
    for axis, located_by in keys.items():
        for b in {b for key in located_by for b in key}:
            homes[b].add(axis)
    # Such as the recurrent weights of a cell at its first step: nothing says what else moves with their columns.
    ix.pin({i for i in tr.idle if all(len(homes[b]) < 2 for b in ix.expand(i))}, "met only a constant")
    basics = sorted({b for places in keys.values() for key in places for b in key} - ix.constant_ids)

    chains: dict[int, tuple[int, ...]] = {}  # an index and what it lives in, innermost first

    def chain(b: int, busy: frozenset[int] = frozenset()) -> tuple[int, ...]:
        if b not in chains:
            if ix.owners[b] == {-1}:  # most: nothing that it lives in
                chains[b] = (b,)
                return chains[b]
            if b in busy:
                return (b,)
            above = []
            for owner in ix.owners[b]:
                parts = ix.expand(owner) if owner >= 0 else ()
                above.append({a for p in parts if p not in ix.constant_ids for a in chain(p, busy | {b})} - {b})
            common = set.intersection(*above) if above else set()
            chains[b] = (b, *sorted(common, key=lambda a: -len(chain(a, busy | {b}))))
        return chains[b]

    families: dict[tuple[int, frozenset[tuple[int, int]]], list[int]] = defaultdict(list)
    for b in basics:
        above = chain(b)[1:]
        families[above[0] if above else -1, frozenset(ix.marks[b])].append(b)
    rank = {b: (colour, n) for (_, colour), units in families.items() for n, b in enumerate(units)}

    def owners(keys: Mapping[Axis, Keys]) -> dict[int, dict[Axis, list[int]]]:
        """For each index, the positions on each axis that it locates."""
        owned: dict[int, dict[Axis, list[int]]] = defaultdict(lambda: defaultdict(list))
        for axis, places in keys.items():
            for position, key in enumerate(places):
                if len(key) == 1 and chains.get(key[0]) == key and key[0] not in ix.constant_ids:
                    owned[key[0]][axis].append(position)
                    continue
                for a in {a for b in key if b not in ix.constant_ids for a in chain(b)}:
                    owned[a][axis].append(position)
        return owned

    def members(
        units: list[int], keys: Mapping[Axis, Keys], owned: Mapping[int, Mapping[Axis, list[int]]]
    ) -> list[Any]:
        """Every axis that moves with the units; None for one where they don't own corresponding positions."""
        place = {b: n for n, b in enumerate(units)}
        return [
            member(axis, units, place, keys[axis], owned)
            for axis in dict.fromkeys(axis for b in units if b in owned for axis in owned[b])
        ]

    def member(axis: Axis, units: list[int], place: dict[int, int], keys: Keys, owned: Any) -> Member | None:
        alone = [owned[unit][axis] for unit in units]
        if all(len(at) == 1 and keys[at[0]] == (unit,) for unit, at in zip(units, alone, strict=True)):
            return Member(*axis, torch.tensor(alone))
        table: dict[Any, dict[int, int]] = defaultdict(dict)
        for unit in units:
            for position in owned[unit][axis]:
                key: list[Any] = []
                for b in keys[position]:
                    line = chain(b) if b not in ix.constant_ids else (b,)
                    inside = [n for n, a in enumerate(line) if a in place]
                    if inside and line[inside[0]] != unit:
                        return None  # one position belongs to two units of the group
                    key.append(tuple(rank[a] for a in line[: inside[0]]) if inside else b)
                table[tuple(key)][place[unit]] = position
        if any(len(row) < len(units) for row in table.values()):
            return None
        rows = sorted(([row[n] for n in range(len(units))] for row in table.values()), key=lambda r: r[0])
        return Member(*axis, torch.tensor(rows).T.contiguous())

    places = {axis: located(label) for axis, label in tr.outputs.items() if label is not None}
    owned, shown = (
        owners(keys),
        owners({axis: at for axis, at in places.items() if set().union(*at) <= {*rank, *ix.constant_ids}}),
    )
    order = {name: n for n, name in enumerate(tr.weights)}
    groups: dict[str, Group] = {}
    home: dict[int, tuple[str, int]] = {}
    moved: set[tuple[str, int]] = set()
    for (above_b, _), units in sorted(families.items(), key=lambda f: (len(chain(f[1][0])), f[1][0])):
        who = members(units, keys, owned) if len(units) > 1 else []
        if not who or None in who:
            continue
        who = sorted(who, key=lambda m: (order[m.name], m.dim))
        first = who[0]
        name = f"{first.name}:{first.dim}"
        if first.index.numel() < tr.weights[first.name].shape[first.dim] or name in groups:
            name += f"@{int(first.index.min())}"
        name += "'" * sum(g == name or g.rstrip("'") == name for g in groups)
        groups[name] = Group(
            name, len(units), tuple(who), tuple(filter(None, members(units, places, shown))), home.get(above_b)
        )
        home |= {b: (name, n) for n, b in enumerate(units)}
        moved |= {(m.name, m.dim) for m in who}
    fixed: dict[tuple[str, int], str] = {}
    for axis, label in tr.axes.items():
        if axis in moved or len(label) < 2:
            continue
        tags = sorted(tag for i in label[:1] for b in ix.expand(int(i)) for tag, _ in ix.marks[b] if tag in ix.reasons)
        why = ix.reasons[tags[0]] if tags else "has no two units alike"
        fixed[axis] = why if axis[0] in tr.used else "is not used by this forward pass"
    return Wiring(groups, fixed, tr.aliases)


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
