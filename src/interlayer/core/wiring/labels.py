"""Labels: the indices that a tensor carries on each of its axes, and how operators join, split and tie them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from interlayer.core.wiring.indices import CONSTANT, FREE, HEIR, NONE, Array, Indices, Label, Labels, numbered, repeats


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in a nest of tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def operands(*values: Any) -> list[Tensor]:
    """The tensors among an operator's arguments or results, and in lists of them."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += [t for t in value if isinstance(t, Tensor)]
    return found


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
        self.begins: set[int] = set()
        self.storages: dict[int, list[str]] = defaultdict(list)
        self.axes: dict[tuple[str, int], Array] = {}
        self.outputs: dict[tuple[str, int], Array | None] = {}  # (module, axis); None if it differs along another axis
        self.aliases: dict[str, str] = {}
        self.used: set[str] = set()
        self.idle: list[Array] = []  # indices that were contracted with a constant
        self.weights: dict[str, Tensor] = {}
        names: dict[int, str] = {}
        for name, t in model.state_dict(keep_vars=True).items():
            if isinstance(t, Tensor) and id(t) not in names:
                names[id(t)], self.weights[name] = name, t
            elif isinstance(t, Tensor):
                self.aliases[name] = names[id(t)]
        sizes = [n for t in self.weights.values() for n in t.shape]
        axes = iter(np.split(self.ix.new(sum(sizes)), np.cumsum(sizes[:-1])))
        for name, t in self.weights.items():
            labels: Labels = []
            for dim, n in enumerate(t.shape):
                self.axes[name, dim] = axis = next(axes)
                self.ix.mark(self.ix.tag(), axis)
                labels.append(along(axis, dim, t.ndim) if n > 1 else None)
            self.put(t, labels)
            self.sources[view_key(t)] = name
            self.begins.add(t.data_ptr())
            self.storages[t.untyped_storage().data_ptr()].append(name)

    # -- the labels of a tensor

    def put(self, t: Tensor, labels: Labels) -> None:
        self.labels[id(t)] = [None if n == 1 else lab for lab, n in zip(labels, t.shape, strict=True)]
        self.alive.append(t)

    def source(self, t: Tensor) -> str | None:
        """The weight whose memory a tensor shows."""
        return self.sources.get(view_key(t)) if t.data_ptr() in self.begins and t.numel() else None

    def get(self, t: Any) -> Labels:
        """Labels of an argument; a tensor that no operator made (input, constant) is fixed."""
        if not isinstance(t, Tensor):
            return []
        if id(t) not in self.labels:
            name = self.source(t)
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
            self.ix.mark(self.ix.tag(why), label, along(np.arange(label.shape[dim]), dim, label.ndim))

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
        x, y = (a, b) if a.shape == b.shape else np.broadcast_arrays(a, b)
        self.ix.unite(x.ravel(), y.ravel())
        return a if a.size <= b.size else b

    def contract(self, a: Label, b: Label, dim: int) -> None:
        """Tie two axes that are summed over; note units that were multiplied by a constant alone."""
        self.tie(a, b, dim)
        if isinstance(a, str) != isinstance(b, str):
            self.idle += [label.ravel() for label in (a, b) if isinstance(label, np.ndarray)]

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
            grid = np.broadcast_shapes(tuple(sizes), *(x.shape for x in (outer, inner) if isinstance(x, np.ndarray)))
            tag = self.ix.tag()

            def placed(label: Label, q: int, owner: Label) -> Array:
                if isinstance(label, str):
                    lives = np.broadcast_to(owner, grid).ravel() if isinstance(owner, np.ndarray) else NONE
                    return self.ix.new(int(np.prod(grid)), lives, tag).reshape(grid)
                return np.broadcast_to(
                    along(self.ix.constant(shape[q]), q, len(shape)) if label is None else label, grid
                )

            x = placed(outer, p, inner)
            new = joined(self.ix.pack(np.stack((x, placed(inner, p + 1, x)), -1)))
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
            tag = self.ix.tag()
            if all(self._blocks(rows, tag) for rows in whole.reshape(-1, a, b)):
                rows = self.ix.rows(whole)
                common = _common(rows)
                outer, inner = (
                    self.slim(np.moveaxis(self.ix.pack(x), (-2, -1), (p, p + 1)), d)
                    for x, d in ((common[..., None, :], p), (_without(rows, common), p + 1))
                )
            else:
                self.fix(label, p, "is cut in a way that does not fit an earlier one")
                outer = inner = None
        rest = [cut(lab) if isinstance(lab, np.ndarray) else lab for lab in labels]
        return [*rest[:p], outer, inner, *rest[p + 1 :]], [*shape[:p], a, b, *shape[p + 1 :]]

    def _blocks(self, ids: Array, tag: int) -> bool:
        """Make the indices of each row share the row's address, and differ in the rest. False if they can't."""
        ix, (a, b) = self.ix, ids.shape
        for _ in range(2):
            rows = ix.rows(ids)
            common = _common(rows)
            if common.any(1).all() and not repeats(numbered(*np.sort(common, 1).T)).any():
                alike = repeats(numbered(np.arange(a).repeat(b), *rows.reshape(a * b, -1).T)).any()
                return not alike and bool(_without(rows, common).any(-1).all())
            for slot in range(int((rows != NONE).sum(-1).min())):
                cut = self._disjoint(rows[:, :, slot])
                if cut is not None:
                    x, row = cut
                    begins = np.searchsorted(row, np.arange(row[-1] + 1))
                    new = ix.new(len(x) + len(begins), tag=tag)  # each block, and then what is inside
                    blocks, inside = new[begins + np.arange(len(begins))][row], new[np.arange(len(x)) + row + 1]
                    ix.owner[blocks], ix.owner[inside] = HEIR, blocks
                    ix.heirs.append((blocks, x))
                    ix.define(x, np.stack((blocks, inside), 1))
                    break
            else:
                return False
        return False

    def _disjoint(self, found: Array) -> tuple[Array, Array] | None:
        """The different indices in rows of which each two have the same ones or none in common, and the number of the row."""
        a, b = found.shape
        values, first, back = np.unique(found, return_index=True, return_inverse=True)
        home = (first // b)[back].reshape(a, b)  # the first row with an index
        sets, ordered = home[:, 0], np.sort(found, 1)
        sizes = 1 + (ordered[:, 1:] != ordered[:, :-1]).sum(1)
        if (
            (home != sets[:, None]).any()
            or (sizes != sizes[sets]).any()
            or sizes.min() < 2
            or (self.ix.kind[values] == CONSTANT).any()
        ):
            return None
        last = np.zeros_like(sets)
        last[sets] = np.arange(a)
        kept = found[last[np.unique(sets)]].ravel()
        place = np.sort(np.unique(kept, return_index=True)[1])
        return kept[place], place // b

    def slim(self, label: Array, dim: int) -> Label:
        """Drop what the label does not depend on; an axis of constants is fixed."""
        label = self.ix.same(label)
        for d in range(label.ndim):
            first = label.take([0], axis=d)
            if d != dim and (label == first).all():
                label = first
        return None if (self.ix.kind[label] == CONSTANT).all() else label


def along(values: Array, dim: int, rank: int) -> Array:
    """Values as one axis of a tensor whose others have size 1."""
    return values.reshape([-1 if d == dim else 1 for d in range(rank)])


def _common(rows: Array) -> Array:
    """The indices that all rows of a block share, in the order of the first row: ``[..., blocked, n]`` to ``[..., n]``."""
    first = rows[..., 0, :]
    shared = (rows[..., None, :] == first[..., None, :, None]).any(-1).all(-2)
    return np.where(shared, first, NONE)


def _without(rows: Array, common: Array) -> Array:
    """The rows of a block without the indices that they share."""
    return np.where((rows[..., None] == common[..., None, None, :]).any(-1), NONE, rows)
