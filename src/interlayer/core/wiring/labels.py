"""Labels: the indices that a tensor carries on each of its axes, and how operators join, split and tie them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from interlayer.core.wiring.indices import FREE, Array, Indices, Label, Labels


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in a nest of tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def view_key(t: Tensor) -> tuple[Any, ...]:
    """What two views of the same memory must share to be the same tensor."""
    return (t.data_ptr(), tuple(t.shape), t.stride(), t.dtype)


class Unknown(Exception):
    """A rule meets a case that it does not cover."""


class Labelling:
    """The labels of every tensor met in a pass, over one set of indices."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.ix = Indices()
        self.labels: dict[int, Labels] = {}
        self.alive: list[Tensor] = []  # keeps ids unique
        self.sources: dict[tuple[Any, ...], str] = {}
        self.storages: dict[int, list[str]] = defaultdict(list)
        self.axes: dict[tuple[str, int], Array] = {}
        self.outputs: dict[tuple[str, int], Array | None] = {}  # (module, axis); None if it differs along another axis
        self.aliases: dict[str, str] = {}
        self.used: set[str] = set()
        self.idle: set[int] = set()  # indices that were contracted with a constant
        self.weights: dict[str, Tensor] = {}
        names: dict[int, str] = {}
        for name, t in model.state_dict(keep_vars=True).items():
            if not isinstance(t, Tensor):
                continue
            if id(t) in names:
                self.aliases[name] = names[id(t)]
                continue
            names[id(t)] = name
            self.weights[name] = t
            labels: Labels = []
            for dim, n in enumerate(t.shape):
                tag = self.ix.tag()
                axis = np.array([self.ix.new(tag=tag) for _ in range(n)], dtype=np.int64)
                self.axes[name, dim] = axis
                labels.append(axis.reshape([-1 if d == dim else 1 for d in range(t.ndim)]) if n > 1 else None)
            self.put(t, labels)
            self.sources[view_key(t)] = name
            self.storages[t.untyped_storage().data_ptr()].append(name)

    # -- the labels of a tensor

    def put(self, t: Tensor, labels: Labels) -> None:
        self.labels[id(t)] = [None if n == 1 else lab for lab, n in zip(labels, t.shape, strict=True)]
        self.alive.append(t)

    def get(self, t: Any) -> Labels:
        """Labels of an argument; a tensor that no operator made (input, constant) is fixed."""
        if not isinstance(t, Tensor):
            return []
        if id(t) not in self.labels:
            name = self.sources.get(view_key(t)) if t.numel() else None
            if name is not None:  # `.data` of a weight makes a tensor that no operator made
                self.put(t, list(self.labels[id(self.weights[name])]))
            else:
                for other in self.storages.get(t.untyped_storage().data_ptr(), ()) if t.numel() else ():
                    self.used.add(other)
                    self.fix_all(self.weights[other], "is read through its raw storage")
                return [None] * t.ndim
        return list(self.labels[id(t)])

    def fix(self, label: Label, dim: int, why: str) -> None:
        """Mark the positions along the axis as distinct (the same way for every outer unit)."""
        if isinstance(label, np.ndarray):
            tag = self.ix.tag(why)
            for where, i in np.ndenumerate(label):
                self.ix.mark(int(i), (tag, where[dim]))

    def fix_all(self, t: Tensor, why: str) -> None:
        for dim, label in enumerate(self.get(t)):
            self.fix(label, dim, why)

    def tie(self, a: Label, b: Label, dim: int, why: str = "meets an input or a constant") -> Label:
        """Make two axes the same; both labels have the rank of the tensor where they meet."""
        if isinstance(a, str):
            return b
        if isinstance(b, str):
            return a
        if a is None or b is None:
            self.fix(a if b is None else b, dim, why)
            return None
        if a.shape[dim] != b.shape[dim]:
            self.fix(a, dim, why)
            self.fix(b, dim, why)
            return None
        for x, y in {(int(x), int(y)) for x, y in zip(*map(np.ravel, np.broadcast_arrays(a, b)), strict=True)}:
            self.ix.unite(x, y)
        return a if a.size <= b.size else b

    def contract(self, a: Label, b: Label, dim: int) -> None:
        """Tie two axes that are summed over; note units that were multiplied by a constant alone."""
        self.tie(a, b, dim)
        if isinstance(a, str) != isinstance(b, str):
            self.idle.update(int(i) for label in (a, b) if isinstance(label, np.ndarray) for i in label.ravel())

    def collapse(self, labels: Labels, dims: Iterable[int]) -> Labels:
        """An operator mixes along ``dims``: other axes can no longer be ordered differently at each place there."""
        out = list(labels)
        for dim in dims:
            for other, label in enumerate(out):
                if other != dim and isinstance(label, np.ndarray) and label.shape[dim] > 1:
                    first = label.take([0], axis=dim)
                    self.tie(label, np.broadcast_to(first, label.shape), other)
                    out[other] = first
        return out

    def merge(self, labels: Labels, shape: list[int], p: int) -> tuple[Labels, list[int]]:
        """Join axes p and p + 1."""
        a, b = shape[p], shape[p + 1]

        def joined(label: Array) -> Array:
            if label.shape[p] == label.shape[p + 1] == 1:
                return label.reshape(label.shape[:p] + label.shape[p + 1 :])
            full = np.broadcast_to(label, (*label.shape[:p], a, b, *label.shape[p + 2 :]))
            return full.reshape(*label.shape[:p], a * b, *label.shape[p + 2 :])

        outer, inner = labels[p], labels[p + 1]
        new: Label
        if a == 1 or b == 1:
            new = inner if a == 1 else outer
            new = joined(new) if isinstance(new, np.ndarray) else new
        elif outer is inner is None or (isinstance(outer, str) and isinstance(inner, str)):
            new = None if outer is None else FREE
        else:
            sizes = [1] * len(shape)
            sizes[p], sizes[p + 1] = a, b
            arrays = [x for x in (outer, inner) if isinstance(x, np.ndarray)]
            grid = np.broadcast_shapes(tuple(sizes), *(x.shape for x in arrays))
            flat = np.empty(grid, dtype=np.int64)
            tag = self.ix.tag()
            outer = np.broadcast_to(outer, grid) if isinstance(outer, np.ndarray) else outer
            inner = np.broadcast_to(inner, grid) if isinstance(inner, np.ndarray) else inner
            for where in np.ndindex(grid):
                x = int(outer[where]) if isinstance(outer, np.ndarray) else None
                y = int(inner[where]) if isinstance(inner, np.ndarray) else None
                if x is None:
                    x = self.ix.new(-1 if y is None else y, tag) if outer is not None else self.ix.constant(a, where[p])
                if y is None:
                    y = self.ix.new(x, tag) if inner is not None else self.ix.constant(b, where[p + 1])
                flat[where] = self.ix.pack((x, y))
            new = joined(flat)
        rest = [joined(lab) if isinstance(lab, np.ndarray) else lab for lab in labels]
        return [*rest[:p], new, *rest[p + 2 :]], [*shape[:p], a * b, *shape[p + 2 :]]

    def split(self, labels: Labels, shape: list[int], p: int, a: int, b: int) -> tuple[Labels, list[int]]:
        """Cut axis p into (a, b)."""

        def cut(label: Array) -> Array:
            sizes = (a, b) if label.shape[p] > 1 else (1, 1)
            return label.reshape(*label.shape[:p], *sizes, *label.shape[p + 1 :])

        label = labels[p]
        outer: Label
        inner: Label
        if not isinstance(label, np.ndarray):
            outer = inner = label
        elif a == 1 or b == 1:
            outer, inner = (None, cut(label)) if a == 1 else (cut(label), None)
        else:
            whole = np.moveaxis(cut(label), (p, p + 1), (-2, -1))
            out, inn = np.empty((*whole.shape[:-1], 1), dtype=np.int64), np.empty_like(whole)
            tag, fits = self.ix.tag(), True
            for where in np.ndindex(whole.shape[:-2]):
                fits = fits and self._blocks(whole[where], tag)
            if fits:
                for where in np.ndindex(whole.shape[:-1]):
                    places = [self.ix.expand(int(i)) for i in whole[where]]
                    common = set(places[0]).intersection(*places[1:])
                    out[(*where, 0)] = self.ix.pack([x for x in places[0] if x in common])
                    inn[where] = [self.ix.pack([x for x in place if x not in common]) for place in places]
                outer, inner = (self.slim(np.moveaxis(x, (-2, -1), (p, p + 1)), d) for x, d in ((out, p), (inn, p + 1)))
            else:
                self.fix(label, p, "is cut in a way that does not fit an earlier one")
                outer = inner = None
        rest = [cut(lab) if isinstance(lab, np.ndarray) else lab for lab in labels]
        return [*rest[:p], outer, inner, *rest[p + 1 :]], [*shape[:p], a, b, *shape[p + 1 :]]

    def _blocks(self, rows: Array, tag: int) -> bool:
        """Make the indices of a row share the row's address, and differ in the rest. False if they can't."""
        ix = self.ix
        for _ in range(2):
            places = [[ix.expand(int(i)) for i in row] for row in rows]
            common = [frozenset(row[0]).intersection(*row[1:]) for row in places]
            if all(common) and len(set(common)) == len(common):
                return all(len(set(row)) == len(row) for row in places)
            for slot in range(min(len(place) for row in places for place in row)):
                rows_of = {frozenset(place[slot] for place in row): row for row in places}
                sets = [dict.fromkeys(place[slot] for place in row) for row in rows_of.values()]
                flat = [x for s in sets for x in s]
                if len(set(flat)) == len(flat) and not ix.constant_ids.intersection(flat) and min(map(len, sets)) > 1:
                    for s in sets:
                        block = ix.new(tag=tag)
                        ix.owners[block] = set().union(*(ix.owners[x] for x in s))
                        for x in s:
                            ix.define(x, (block, ix.new(block, tag)))
                    break
            else:
                return False
        return False

    def slim(self, label: Array, dim: int) -> Label:
        """Drop what the label does not depend on; an axis of constants is fixed."""
        label = np.vectorize(self.ix.find, otypes=[np.int64])(label)
        for d in range(label.ndim):
            first = label.take([0], axis=d)
            if d != dim and (label == first).all():
                label = first
        return None if self.ix.constant_ids.issuperset(label.ravel().tolist()) else label
