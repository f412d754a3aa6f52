"""Two models of one structure, also of different widths: which units correspond, and how weights cross over."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from interlayer.core.wiring.groups import Group, Member, Wiring

Maps = Mapping[str, Tensor]
"""By the name of a group of the first model: ``[its units in the second, its units in the first]``. Column j says of which units
of the second model unit j is made up."""


class Move(NamedTuple):
    """Units of a group on one axis of a tensor, in both models."""

    group: Group
    mine: Member
    yours: Member


class Bridge:
    """Carries weights of a second model over to the widths and the order of units of a first.

    Groups correspond if they sit on the same axes of the same weights. Groups inside the units of another one, or across
    them (features of attention heads), need the same sizes in both models.

    Args:
        model: The first model.
        other: The second.
        ours: Wiring of the first, by ``trace``.
        theirs: Wiring of the second.

    Raises:
        ValueError: The models differ in more than the sizes of corresponding groups.

    Examples:
        >>> from interlayer.core.wiring import trace
        >>> a, b = (nn.Sequential(nn.Linear(2, n), nn.ReLU(), nn.Linear(n, 1)) for n in (3, 4))
        >>> bridge = Bridge(a, b, *(trace(m, torch.randn(1, 2)) for m in (a, b)))
        >>> halves = torch.zeros(4, 3).index_put((torch.arange(4), torch.tensor([0, 1, 2, 2])), torch.tensor([1, 1, 0.5, 0.5]))
        >>> carried = bridge.carry(b.state_dict(), {"0.weight:0": halves})
        >>> torch.allclose(carried["0.bias"][2], b[0].bias[2:].mean()), carried["2.weight"].shape
        (True, torch.Size([1, 3]))
    """

    def __init__(self, model: nn.Module, other: nn.Module, ours: Wiring, theirs: Wiring) -> None:
        self.ours, self.aliases = ours, ours.aliases
        shapes, others = (
            {n: tuple(t.shape) for n, t in m.state_dict().items() if isinstance(t, Tensor)} for m in (model, other)
        )
        odd = [n for n in [*shapes, *others] if len(shapes.get(n, "?")) != len(others.get(n, "?"))]
        odd = odd or [n for n in [*shapes, *others] if n not in shapes or n not in others]
        if odd:
            raise ValueError(
                f"Bridge: the models differ at {odd[0]!r}: {shapes.get(odd[0], 'nothing')} here, "
                f"{others.get(odd[0], 'nothing')} in the other. Both need the same layers."
            )
        self.shapes = shapes
        self.inner, bound = _bound(ours)
        self.theirs = _paired(ours, theirs, bound)
        self.axes: dict[tuple[str, int], list[Move]] = defaultdict(list)
        for group in ours.groups.values():
            for mine, yours in _members(group, self.theirs[group.name]):
                self.axes[mine.name, mine.dim].append(Move(group, mine, yours))
        for name, shape in shapes.items():
            for dim in range(len(shape)):
                top = self._moves(name, dim, nested=False)
                left = shape[dim] - sum(m.mine.index.numel() for m in top)
                if left != others[name][dim] - sum(m.yours.index.numel() for m in top):
                    why = ours.fixed.get((name, dim), "does not follow from a group of units")
                    raise ValueError(
                        f"Bridge: the models differ at {name!r}: {shape} here, {others[name]} in the other, and axis {dim} "
                        f"{why}. Only hidden units may differ in number."
                    )

    def _moves(self, name: str, dim: int, *, nested: bool) -> list[Move]:
        at = self.axes.get((self.aliases.get(name, name), dim), [])
        return [move for move in at if (move.group.name in self.inner) == nested]

    def carry(self, state: Mapping[str, Tensor], maps: Maps) -> dict[str, Tensor]:
        """The second model's weights in the shapes of the first: each axis mixed by the maps of the groups on it.

        ``maps`` needs an entry for every group. A permutation in every entry keeps the second model's function.
        """
        return {
            name: weight if weight.ndim == 0 or not weight.is_floating_point() else self._weight(name, weight, maps)
            for name, weight in state.items()
            if isinstance(weight, Tensor)
        }

    def _weight(self, name: str, weight: Tensor, maps: Maps, skip: int = -1) -> Tensor:
        for dim in range(weight.ndim):
            if dim != skip:
                weight = _mix(weight, dim, self._moves(name, dim, nested=False), maps)
                for move in self._moves(name, dim, nested=True):
                    weight = _mix(weight, dim, [Move(move.group, move.mine, move.mine)], maps)
        return weight

    def above(self, group: Group) -> list[Group]:
        """The groups in whose units this one's lie, the outermost first."""
        parent = self.ours.groups[group.parent[0]] if group.parent else None
        return [*self.above(parent), parent] if parent else []

    def ready(self, group: Group, member: Member, maps: set[str]) -> bool:
        """Whether all axes of a weight beside that of the group are fixed or have maps."""
        others = (self.axes.get((member.name, d), []) for d in range(len(self.shapes[member.name])) if d != member.dim)
        return all(g.name in maps for moves in others for g, _, _ in moves)

    def rows(self, group: Group, member: Member, weight: Tensor, maps: Maps) -> Tensor:
        """What each unit of the second model owns of a weight, ``[units, values]``, as the first one would see it.

        All axes beside that of the group are carried over; on that of the group, the units that this group's lie in.
        """
        weight = self._weight(member.name, weight, maps, skip=member.dim)
        at = {move.group.name: move for move in self.axes[member.name, member.dim]}
        for parent in self.above(group):
            weight = _mix(weight, member.dim, [at[parent.name]] if parent.name in at else [], maps)
        return at[group.name].yours.rows(weight)

    def within(self, group: Group, place: Member, x: Tensor, maps: Maps) -> Tensor:
        """The same for what the units of the second model show at a place in a module's output."""
        for parent in self.above(group):
            at = [Move(parent, a, b) for a, b in self.shown(parent) if (b.name, b.dim) == (place.name, place.dim)]
            x = _mix(x, place.dim, at, maps)
        return place.rows(x)

    def shown(self, group: Group) -> list[tuple[Member, Member]]:
        """Where the units show in both models: places in the outputs of modules."""
        yours = {(m.name, m.dim): m for m in self.theirs[group.name].outputs}
        return [(m, yours[m.name, m.dim]) for m in group.outputs if (m.name, m.dim) in yours]


def _mix(x: Tensor, dim: int, moves: Sequence[Move], maps: Maps) -> Tensor:
    """Mix one axis of a tensor of the second model; positions of no group that has a map keep their order."""
    moves = [move for move in moves if move.group.name in maps]
    if not moves:
        return x
    old = x.movedim(dim, 0)
    mine = torch.cat([move.mine.index.flatten() for move in moves])
    yours = torch.cat([move.yours.index.flatten() for move in moves])
    size = len(old) - len(yours) + len(mine)
    if moves[0].mine.whole(size) and moves[0].yours.whole(len(old)):
        return torch.tensordot(maps[moves[0].group.name].T.to(old), old, 1).movedim(0, dim)
    new = old.new_zeros(size, *old.shape[1:])
    new[_others(size, mine)] = old[_others(len(old), yours)]
    for group, here, there in moves:
        new[here.index] = torch.tensordot(maps[group.name].T.to(old), old[there.index], 1)
    return new.movedim(0, dim)


def _others(size: int, taken: Tensor) -> Tensor:
    free = torch.ones(size, dtype=torch.bool)
    free[taken] = False
    return free.nonzero().flatten()


def _bound(wiring: Wiring) -> tuple[set[str], set[str]]:
    """Groups whose units lie in units of another or cross them, such as features and query heads that share values; and these
    with all others that they lie in or cross."""
    inner = {g.name for g in wiring.groups.values() if g.parent}
    bound = inner | {g.parent[0] for g in wiring.groups.values() if g.parent}
    met: dict[tuple[str, int], list[tuple[str, set[int]]]] = defaultdict(list)
    for group in wiring.groups.values():
        for m in group.members:
            at = set(m.index.flatten().tolist())
            if crossed := {name for name, taken in met[m.name, m.dim] if taken & at}:
                inner.add(group.name)
                bound |= {group.name, *crossed}
            met[m.name, m.dim].append((group.name, at))
    return inner, bound


def _paired(ours: Wiring, theirs: Wiring, bound: set[str]) -> dict[str, Group]:
    """For each group of the first model that of the second: on the same axes, and in the same order there."""

    def keyed(wiring: Wiring) -> dict[tuple[object, ...], list[Group]]:
        found: dict[tuple[object, ...], list[Group]] = defaultdict(list)
        for g in wiring.groups.values():
            found[(g.parent is not None, *((m.name, m.dim, m.index.shape[1]) for m in g.members))].append(g)
        return found

    mine, yours = keyed(ours), keyed(theirs)
    odd = [key for key in {**mine, **yours} if len(mine.get(key, ())) != len(yours.get(key, ()))]
    if odd:
        group = (mine.get(odd[0]) or yours[odd[0]])[0]
        raise ValueError(
            f"Bridge: units on the axes of {group.name!r} correspond to none in the other model. Both need the same layers, "
            "the same number of heads of the same size, and kernels of the same size."
        )
    pairs = {a.name: b for key, groups in mine.items() for a, b in zip(groups, yours[key], strict=True)}
    for group in ours.groups.values():
        other = pairs[group.name]
        alike = group.size == other.size and all(torch.equal(a.index, b.index) for a, b in _members(group, other))
        if group.name in bound and not alike:
            raise ValueError(
                f"Bridge: {group.name!r} has {group.size} units here and {other.size} in the other model, or of other sizes, "
                "and units lie in units (heads). Those need the same number and size in both models."
            )
    return pairs


def _members(group: Group, other: Group) -> list[tuple[Member, Member]]:
    return list(zip(group.members, other.members, strict=True))
