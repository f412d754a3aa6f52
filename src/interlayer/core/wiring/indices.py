"""Indices: what distinguishes the positions on the axes of weights, and which of them are the same."""

from __future__ import annotations

from collections import defaultdict
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.int64]
FREE = "free"  # the tensor is constant along this axis: any order is the same
Label = Array | str | None  # None: every position of the axis is distinct
Labels = list[Label]

BASIC, MADE, CONSTANT, NOTHING = range(4)
NONE, HEIR = 0, -1  # no index; as an owner: those of the indices that it was cut from


def numbered(*columns: Array) -> Array:
    """For each row of some columns of numbers, none below zero, one number: equal for equal rows, in their order."""
    code, most = columns[0], int(columns[0].max(initial=0)) + 1
    for column in columns[1:]:
        size = int(column.max(initial=0)) + 1
        if most * size > 2**62:
            code, column = (np.unique(x, return_inverse=True)[1] for x in (code, column))
            most = size = len(code)
        code, most = code * size + column, most * size
    return code


def repeats(code: Array) -> Array:
    """How often the number at each place stands at earlier ones."""
    order = np.argsort(code, kind="stable")
    place, ordered = np.arange(len(code)), code[order]
    first = np.ones(len(code), dtype=bool)
    first[1:] = ordered[1:] != ordered[:-1]
    out = np.empty_like(code)
    out[order] = place - np.maximum.accumulate(np.where(first, place, 0))
    return out


class Indices:
    """Union-find over indices, in whole arrays. An index is basic, or made of basic ones that address it (head, position in the head).

    The *row* of an index lists the basic ones, outer first, constants last, filled up with zeros.
    """

    def __init__(self) -> None:
        self.size = 1
        self.compound = False  # not all indices are basic
        self.up: Array = np.zeros(1, dtype=np.int64)
        self.kind: NDArray[np.int8] = np.array([NOTHING], dtype=np.int8)
        self.owner: Array = np.zeros(1, dtype=np.int64)  # the outer index that one lives in, NONE, or HEIR
        self.parts: Array = np.zeros((1, 2), dtype=np.int64)  # of what is MADE
        self.heirs: list[tuple[Array, Array]] = []  # indices, and those that they have their owners from
        self.pairs: list[tuple[Array, Array]] = []  # the same, but not yet united
        # By tag: indices, and what it says of each (None: the same of all).
        self.marks: dict[int, list[tuple[Array, Array | None]]] = defaultdict(list)
        self.constants: dict[int, Array] = {}
        self.reasons: dict[int, str] = {}
        self._tag = count()

    def tag(self, why: str = "") -> int:
        tag = next(self._tag)
        if why:
            self.reasons[tag] = why
        return tag

    def new(self, number: int, owner: Any = NONE, tag: int | None = None) -> Array:
        begin, self.size = self.size, self.size + number
        if self.size > len(self.up):
            more = self.size + len(self.up)
            self.up = np.concatenate((self.up, np.arange(len(self.up), len(self.up) + more)))
            self.kind, self.owner, self.parts = (
                np.concatenate((old, np.zeros((more, *old.shape[1:]), dtype=old.dtype)))
                for old in (self.kind, self.owner, self.parts)
            )
        self.owner[begin : self.size] = owner
        ids = np.arange(begin, self.size)
        if tag is not None:
            self.mark(tag, ids)
        return ids

    def mark(self, tag: int, ids: Array, what: Array | None = None) -> None:
        """Distinguish indices by ``what`` a tag says of them. What they turn out to be made of is distinguished alike."""
        self.marks[tag].append((ids, what))

    def pin(self, ids: Array, why: str) -> None:
        """Distinguish the basic indices of some from all others."""
        if not len(ids):
            return
        rows = self.rows(ids)
        basic = rows[rows != NONE]
        self.mark(self.tag(why), basic, basic)

    def constant(self, size: int) -> Array:
        """An index for each position of an axis on which nothing moves."""
        if size not in self.constants:
            self.constants[size] = self.new(size)
            self.kind[self.constants[size]] = CONSTANT
            self.compound = True
        return self.constants[size]

    def find(self, ids: Array) -> Array:
        """The roots of what was united, so far as that is not a matter of parts."""
        if self.pairs:
            self._settle()
        up = self.up
        roots = up[ids]
        while ((above := up[roots]) != roots).any():
            up[ids] = roots = above
        return roots

    def rows(self, ids: Array) -> Array:
        """The rows of some indices, along one more axis."""
        return self._rows(ids[..., None])

    def _rows(self, rows: Array) -> Array:
        rows = self.find(rows)
        while (made := self.kind[rows] == MADE).any():
            some = made.any(-1)
            part, made = rows[some], made[some]
            wide = np.zeros((*part.shape, self.parts.shape[1]), dtype=np.int64)
            wide[..., 0] = part
            wide[made] = self.find(self.parts[part[made]])
            wide = self._ordered(wide.reshape(len(part), -1))
            rows = _wide(rows, wide.shape[-1])
            rows[some] = _wide(wide, rows.shape[-1])
        return rows

    def _ordered(self, rows: Array) -> Array:
        """Basic indices first, then constants, then nothing; without columns of nothing."""
        kinds = self.kind[rows]
        kinds[kinds == MADE] = BASIC
        if (kinds[..., 1:] < kinds[..., :-1]).any():
            order = np.argsort(kinds, axis=-1, kind="stable")
            rows, kinds = np.take_along_axis(rows, order, axis=-1), np.take_along_axis(kinds, order, axis=-1)
        width = rows.shape[-1]
        while width > 1 and (kinds[..., width - 1] == NOTHING).all():
            width -= 1
        return rows[..., :width]

    def same(self, ids: Array) -> Array:
        """One of the indices for all that are the same."""
        roots = self.find(ids)
        if not (self.kind[roots] == MADE).any():
            return roots
        rows = self.rows(roots)
        code = numbered(*np.moveaxis(rows, -1, 0)).ravel()
        _, first, back = np.unique(code, return_index=True, return_inverse=True)
        return roots.ravel()[first][back].reshape(ids.shape)

    def pack(self, rows: Array) -> Array:
        """The indices that rows of others address together."""
        rows = self._ordered(self._rows(rows))
        out = rows[..., 0].copy()
        several = (rows != NONE).sum(-1) > 1
        if several.any():
            out[several] = made = self.new(int(several.sum()))
            self.define(made, rows[several])
        return out

    def define(self, ids: Array, rows: Array) -> None:
        """Record that basic indices are addressed by rows of others."""
        width = rows.shape[1]
        if (more := width - self.parts.shape[1]) > 0:
            self.parts = np.pad(self.parts, ((0, 0), (0, more)))
        self.parts[ids, :width] = rows
        self.kind[ids] = MADE
        self.compound = True

    def unite(self, a: Array, b: Array) -> None:
        """Make pairs of indices the same: at once where parts may have to follow, else before a root is asked for."""
        self.pairs.append((a, b))
        if self.compound:
            self._settle()

    def _settle(self) -> None:
        pairs, self.pairs = self.pairs, []
        a, b = (np.concatenate(ids) for ids in zip(*pairs, strict=True))
        while True:
            a, b = self.find(a), self.find(b)
            differ = a != b
            if not differ.any():
                return
            a, b = a[differ], b[differ]
            other = (self.kind[a] != BASIC) | (self.kind[b] != BASIC)
            if other.any():
                if not other.all():
                    self.unite(a[~other], b[~other])
                self._fit(a[other, None], b[other, None])
                return
            np.minimum.at(self.up, np.maximum(a, b), np.minimum(a, b))

    def _fit(self, left: Array, right: Array) -> None:
        """Make pairs of rows the same."""
        if not len(left):
            return
        width = max(left.shape[1], right.shape[1])
        rows = _wide(self._rows(np.concatenate((_wide(left, width), _wide(right, width)))), 2)
        left, right = rows[: len(left)], rows[len(left) :]
        differ = (left != right).any(1)
        left, right = left[differ], right[differ]
        one, other = left[:, 1] == NONE, right[:, 1] == NONE
        for pick, how in ((one & other, self._alone), (one ^ other, self._addressed), (~(one | other), self._aligned)):
            if pick.any():
                how(left[pick], right[pick])
                self._fit(left[~pick], right[~pick])
                return

    def _alone(self, left: Array, right: Array) -> None:
        """Both rows are one index."""
        a, b = left[:, 0], right[:, 0]
        fixed = (self.kind[a] == CONSTANT) | (self.kind[b] == CONSTANT)
        self.pin(np.concatenate((a[fixed], b[fixed])), "meets a fixed position")
        self.unite(a[~fixed], b[~fixed])

    def _addressed(self, left: Array, right: Array) -> None:
        """One of the rows is one index, which turns out to be addressed by the other row."""
        one = left[:, 1] == NONE
        basic, made = np.where(one, left[:, 0], right[:, 0]), np.where(one[:, None], right, left)
        odd = (self.kind[basic] == CONSTANT) | (made == basic[:, None]).any(1)
        self.pin(np.concatenate((basic[odd], made[odd].ravel())), "is tied to itself at another position")
        basic, made = basic[~odd], made[~odd]
        ready = (repeats(basic) == 0) & ~np.isin(made, basic).any(1)
        if not ready.any():  # they address each other: one after the other
            ready[:1] = True
        self.define(basic[ready], made[ready])
        self._fit(basic[~ready, None], made[~ready])

    def _aligned(self, left: Array, right: Array) -> None:
        """Both rows have parts: the same position inside, then the same one outside, and the rest in pairs."""
        each, last = np.arange(len(left)), left.shape[1] - 1
        begin, n, m = np.zeros_like(each), (left != NONE).sum(1), (right != NONE).sum(1)
        while (same := (np.minimum(n, m) > 0) & (left[each, n - 1] == right[each, m - 1])).any():
            n, m = n - same, m - same
        while (
            same := (begin < np.minimum(n, m)) & (left[each, at := np.minimum(begin, last)] == right[each, at])
        ).any():
            begin = begin + same
        shapes = numbered(begin, n, m)
        for shape in np.unique(shapes):
            pick = (shapes == shape).nonzero()[0]
            p = pick[0]
            x, y = left[pick, begin[p] : n[p]], right[pick, begin[p] : m[p]]
            if x.shape == y.shape:
                still = ((self.kind[x] == CONSTANT) | (self.kind[y] == CONSTANT)).any(1)
                self.unite(x[~still].ravel(), y[~still].ravel())
                x, y = x[still], y[still]
            if min(x.shape[1], y.shape[1]) == 1:
                self._fit(x, y)
            else:
                self.pin(np.concatenate((x.ravel(), y.ravel())), "is cut in two ways that do not fit")


def _wide(rows: Array, width: int) -> Array:
    """Rows with at least so many slots."""
    if rows.shape[-1] >= width:
        return rows
    wide = np.zeros((*rows.shape[:-1], width), dtype=np.int64)
    wide[..., : rows.shape[-1]] = rows
    return wide
