"""Read the groups off the indices after a pass.

The positions of all axes, of weights and of what modules return, make one table; the groups, their members and the order
of positions follow from sorting it. Most axes have the indices of another axis, so each run of them is in the table once.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from interlayer.core.wiring.groups import Group, Member, Wiring
from interlayer.core.wiring.indices import BASIC, CONSTANT, NONE, Array, Indices, numbered, repeats
from interlayer.core.wiring.labels import Labelling

UNUSED = "is not used by this forward pass"


class Table(NamedTuple):
    """Positions, and the rows of basic indices that address them."""

    run: Array
    position: Array
    rows: Array

    def only(self, keep: NDArray[np.bool]) -> Table:
        return Table(*(column[keep] for column in self))


class Families(NamedTuple):
    """Basic indices that nothing distinguishes."""

    inside: Array  # of each index, what it lives in, the innermost first
    number: Array  # of each index, its family, or -1
    unit: Array  # of each index, its place in the family
    rank: Array  # of each index; the same at the same place of families that are marked alike
    first: Array  # of each family, its first index
    size: Array  # of each family


def collect(tr: Labelling) -> Wiring:
    """The groups, before they are checked."""
    ix = tr.ix
    weights = {axis: ids for axis, ids in tr.axes.items() if axis[0] in tr.used}
    shown = {axis: ids for axis, ids in tr.outputs.items() if ids is not None}
    axes, labels = [*weights, *shown], [*weights.values(), *shown.values()]
    if not weights:
        return Wiring({}, {axis: UNUSED for axis, ids in tr.axes.items() if len(ids) > 1}, tr.aliases)
    table, having = _table(ix.rows(np.concatenate(labels)), [len(ids) for ids in labels])
    homes = np.array([sum(n < len(weights) for n in at) for at in having])  # on how many axes of weights a run is
    own = table.only(homes[table.run] > 0)
    _pin_idle(tr, own, homes)
    basics = np.unique(own.rows)
    basics = basics[ix.kind[basics] == BASIC]
    colours, reasons = _marks(ix, basics)
    families = _families(ix, basics, colours)
    strange = ((families.number[table.rows] < 0) & (ix.kind[table.rows] == BASIC)).any(1)  # only seen in outputs
    found: dict[int, list[tuple[int, Tensor | None]]] = defaultdict(list)
    for family, run, index in _members(families, table.only(~np.isin(table.run, table.run[strange]))):
        found[family] += [(n, index) for n in having[run]]

    groups: dict[str, Group] = {}
    names: dict[int, str] = {}
    taken = Counter[str]()
    depth = (families.inside[families.first] != NONE).sum(1)
    for f in np.lexsort((families.first, depth)).tolist():
        who = sorted(found[f], key=lambda m: m[0])
        on_weights = [index for n, index in who if n < len(weights)]
        if not on_weights or any(index is None for index in on_weights):
            continue
        all_members = [(n, Member(*axes[n], index)) for n, index in who if index is not None]
        members, outputs = (tuple(m for n, m in all_members if (n < len(weights)) == own) for own in (True, False))
        first = members[0]
        name = f"{first.name}:{first.dim}"
        if first.index.numel() < tr.weights[first.name].shape[first.dim] or name in groups:
            name += f"@{int(first.index.min())}"
        taken[name] += 1
        name += "'" * (taken[name] - 1)
        above = int(families.inside[families.first[f], 0]) if depth[f] else NONE
        home = names.get(int(families.number[above]))
        parent = (home, int(families.unit[above])) if home else None
        groups[name], names[f] = Group(name, int(families.size[f]), members, outputs, parent), name

    moved = {(m.name, m.dim) for g in groups.values() for m in g.members}
    stay = {axis: ids for axis, ids in tr.axes.items() if axis not in moved and len(ids) > 1}
    fixed: dict[tuple[str, int], str] = {}
    if stay:
        tags = reasons[ix.rows(np.array([ids[0] for ids in stay.values()]))].min(1).tolist()
        for axis, tag in zip(stay, tags, strict=True):
            why = ix.reasons.get(tag, "has no two units alike")
            fixed[axis] = why if axis[0] in tr.used else UNUSED
    return Wiring(groups, fixed, tr.aliases)


def _table(rows: Array, lengths: list[int]) -> tuple[Table, list[list[int]]]:
    """The different runs among some, and for each the numbers of those that are equal to it."""
    having: dict[bytes, list[int]] = defaultdict(list)
    ends = np.cumsum(lengths)
    for n, (end, length) in enumerate(zip(ends.tolist(), lengths, strict=True)):
        having[rows[end - length : end].tobytes()].append(n)
    first = [same[0] for same in having.values()]
    sizes = np.array(lengths)[first]
    run = np.repeat(np.arange(len(first)), sizes)
    position = np.arange(len(run)) - (np.cumsum(sizes) - sizes)[run]
    return Table(run, position, rows[(ends[first] - sizes)[run] + position]), list(having.values())


def _pin_idle(tr: Labelling, table: Table, homes: Array) -> None:
    """Pin what met only a constant and is on one axis alone.

    Such as the recurrent weights of a cell at its first step: nothing says what else moves with their columns.
    """
    if not tr.idle:
        return
    basic, run = table.rows.ravel(), table.run.repeat(table.rows.shape[1])
    once = repeats(numbered(basic, run)) == 0
    times = np.bincount(basic[once], homes[run[once]], minlength=tr.ix.size)
    times[NONE] = 0
    ids = np.unique(np.concatenate(tr.idle))
    tr.ix.pin(ids[(times[tr.ix.rows(ids)] < 2).all(1)], "met only a constant")


def _marks(ix: Indices, basics: Array) -> tuple[Array, Array]:
    """A number for what each basic index is marked with; and for all indices the first tag that has a reason."""
    none = np.iinfo(np.int64).max
    tags, events = list(ix.marks), [event for events in ix.marks.values() for event in events]
    rows = ix.rows(np.concatenate([ids.ravel() for ids, _ in events]))
    said = np.zeros((len(rows), 1), dtype=np.int64)
    for (ids, what), end in zip(events, np.cumsum([ids.size for ids, _ in events]).tolist(), strict=True):
        if what is not None:
            said[end - ids.size : end, 0] = np.broadcast_to(what, ids.shape).ravel() + 1
    sizes = [sum(ids.size for ids, _ in events) for events in ix.marks.values()]
    table, having = _table(np.concatenate((rows, said), 1), sizes)  # tags that say the same of the same indices are one
    first = np.array([min((tags[n] for n in same if tags[n] in ix.reasons), default=none) for same in having])
    at, slot = table.rows[:, :-1].nonzero()
    basic, run = table.rows[at, slot], table.run[at]
    reasons = np.full(ix.size, none)
    np.minimum.at(reasons, basic, first[run])

    mark = numbered(run, table.rows[at, -1])
    once = np.unique(numbered(basic, mark), return_index=True)[1]
    basic, mark = basic[once], mark[once]
    begin, count = np.searchsorted(basic, basics), np.bincount(basic, minlength=ix.size)[basics]
    colours = np.zeros_like(basics)
    for n in np.unique(count):
        same = (count == n).nonzero()[0]
        lists = np.ascontiguousarray(mark[begin[same, None] + np.arange(n)])
        kinds = np.unique(lists.view(np.dtype((np.void, 8 * n))), return_inverse=True)[1].ravel() if n else 0
        colours[same] = colours.max() + 1 + kinds
    return colours, reasons


def _families(ix: Indices, basics: Array, colours: Array) -> Families:
    """Basic indices that live in the same one and are marked alike."""
    inside = _inside(ix)
    parent = inside[basics, 0] if inside.shape[1] else np.zeros_like(basics)
    _, first, family = np.unique(numbered(parent, colours), return_index=True, return_inverse=True)
    number, unit, rank = np.full(ix.size, -1), np.zeros(ix.size, dtype=np.int64), np.zeros(ix.size, dtype=np.int64)
    number[basics], unit[basics] = family, repeats(family)
    rank[basics] = numbered(colours, unit[basics]) + 1
    return Families(inside, number, unit, rank, basics[first], np.bincount(family))


def _inside(ix: Indices) -> Array:
    """For each basic index, those that it lives in wherever it is met; the innermost first."""
    root, owner = ix.find(np.arange(ix.size)), ix.owner[: ix.size]
    free = np.zeros(ix.size, dtype=bool)  # it is met in nothing, too
    free[root[owner == NONE]] = True
    child = (owner > 0).nonzero()[0]
    child, outer = root[child], owner[child]
    for heirs, cut in ix.heirs:
        heirs, cut = root[heirs], root[cut]
        free[heirs[free[cut]]] = True
        if not free[cut].all():
            heir = np.zeros(ix.size, dtype=np.int64)
            heir[cut] = heirs
            more = heir[child] > 0
            child, outer = np.concatenate((child, heir[child[more]])), np.concatenate((outer, outer[more]))
    bound = ~free[child] & (ix.kind[child] == BASIC)
    child, rows = child[bound], ix.rows(outer[bound])
    rows[ix.kind[rows] == CONSTANT] = NONE
    inside = np.zeros((ix.size, 0), dtype=np.int64)
    waiting = np.zeros(ix.size, dtype=bool)
    waiting[child] = True
    while len(child):
        ready = ~np.isin(child, child[waiting[rows].any(1)])
        if not ready.any():  # they live in each other
            ready[:] = True
        inner, outer = child[ready], np.concatenate((rows[ready], inside[rows[ready]].reshape(ready.sum(), -1)), 1)
        outer[outer == inner[:, None]] = NONE
        at, slot = outer.nonzero()
        once = repeats(numbered(at, outer[at, slot])) == 0
        at, slot = at[once], slot[once]
        _, first, times = np.unique(numbered(inner[at], outer[at, slot]), return_index=True, return_counts=True)
        b, a = inner[at[first]], outer[at[first], slot[first]]
        always = times == np.bincount(inner)[b]
        b, a = b[always], a[always]
        order = np.lexsort((a, -(inside[a] != NONE).sum(1), b))
        b, a, place = b[order], a[order], repeats(b[order])
        inside = np.pad(inside, ((0, 0), (0, max(int(place.max(initial=-1)) + 1 - inside.shape[1], 0))))
        inside[b, place] = a
        waiting[inner] = False
        child, rows = child[~ready], rows[~ready]
    return inside


def _members(families: Families, table: Table) -> Iterator[tuple[int, int, Tensor | None]]:
    """For each family and run the positions of each unit; None where they don't own corresponding positions."""
    run, position, rows = table
    # Positions of one run that move together (q and k in a fused weight) are distinguished by their order.
    again = repeats(numbered(run, *rows.T))
    lines = np.concatenate((rows[..., None], families.inside[rows]), -1)
    number = families.number[lines]
    at, slot, up = np.append(families.size > 1, False)[number].nonzero()
    basic = lines[at, slot, up]
    once = repeats(numbered(at, basic)) == 0
    at, basic = at[once], basic[once]
    f, unit, run = families.number[basic], families.unit[basic], run[at]

    # What tells the positions of a unit apart: other indices, and the ranks of those inside the unit.
    lines, mine, depth = lines[at], number[at] == f[:, None, None], lines.shape[-1] - 1
    met, begin = mine.any(-1), mine.argmax(-1)
    others = np.where(met, NONE, lines[..., 0])
    ranks = np.where(np.arange(depth) < (met * begin)[..., None], families.rank[lines[..., :depth]], 0)
    key = numbered(again[at], *others.T, *ranks.reshape(len(at), rows.shape[1] * depth).T)

    where = numbered(f, run)
    bad = where[repeats(numbered(f, at)) > 0]  # there one position belongs to two units
    code = numbered(f, run, key, unit)
    order = np.argsort(code, kind="stable")
    order = order[np.diff(code[order], append=-1) != 0]
    f, run, key, unit, where, position = (x[order] for x in (f, run, key, unit, where, position[at]))
    member, begin = _stretches(where)
    row, head = _stretches(numbered(f, run, key))  # of a member: a position of each unit
    sound = ~np.isin(where[begin], bad)
    sound[member[head[np.bincount(row) < families.size[f[head]]]]] = False
    position = position[np.argsort(numbered(member, unit, position[head][row]), kind="stable")]
    for n, (i, j) in enumerate(pairwise([*begin.tolist(), len(position)])):
        owned = torch.tensor(position[i:j]).view(int(families.size[f[i]]), -1) if sound[n] else None
        yield int(f[i]), int(run[i]), owned


def _stretches(code: Array) -> tuple[Array, Array]:
    """For ordered numbers, which stretch of equal ones each is in, and where the stretches begin."""
    new = np.diff(code, prepend=-1) != 0
    return np.cumsum(new) - 1, new.nonzero()[0]
