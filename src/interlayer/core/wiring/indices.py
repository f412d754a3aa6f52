"""Indices: what distinguishes the positions on the axes of weights, and which of them are the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count

import numpy as np
from numpy.typing import NDArray

Axis = tuple[str, int]  # (weight or module, dim)
Keys = list[tuple[int, ...]]  # for each position of an axis, the basic indices that address it
Array = NDArray[np.int64]
FREE = "free"  # the tensor is constant along this axis: any order is the same
Label = Array | str | None  # None: every position of the axis is distinct
Labels = list[Label]


class Indices:
    """Union-find over indices; an index is basic, or a tuple of basic ones that address it (head, position in the head)."""

    def __init__(self) -> None:
        self.up: list[int] = []
        self.parts: dict[int, tuple[int, ...]] = {}  # of a root, if it is not basic
        self.owners: dict[int, set[int]] = {}  # of a basic root: the outer indices it lives in; -1 = none
        self.marks: dict[int, set[tuple[int, int]]] = {}
        self.constants: dict[tuple[int, int], int] = {}
        self.constant_ids: set[int] = set()
        self.known: dict[tuple[int, ...], int] | None = {}  # tuple -> index; None when unions made it stale
        self.reasons: dict[int, str] = {}
        self._tag = count()

    def tag(self, why: str = "") -> int:
        tag = next(self._tag)
        if why:
            self.reasons[tag] = why
        return tag

    def new(self, owner: int = -1, tag: int | None = None) -> int:
        i = len(self.up)
        self.up.append(i)
        self.owners[i] = {owner}
        self.marks[i] = set() if tag is None else {(tag, -1)}
        return i

    def constant(self, size: int, place: int) -> int:
        if (size, place) not in self.constants:
            self.constants[size, place] = self.new()
            self.constant_ids.add(self.constants[size, place])
        return self.constants[size, place]

    def find(self, i: int) -> int:
        up = self.up
        while up[i] != i:
            up[i] = up[up[i]]
            i = up[i]
        return i

    def expand(self, i: int) -> tuple[int, ...]:
        """The basic indices that address i, outer first, constants last."""
        i = self.find(i)
        if i not in self.parts:
            return (i,)
        flat = [b for p in self.parts[i] for b in self.expand(p)]
        return (*(b for b in flat if b not in self.constant_ids), *(b for b in flat if b in self.constant_ids))

    def pack(self, parts: Sequence[int]) -> int:
        """The index that these basic indices address together."""
        parts = [b for p in parts for b in self.expand(p)]
        key = (*(b for b in parts if b not in self.constant_ids), *(b for b in parts if b in self.constant_ids))
        if len(key) == 1:
            return key[0]
        if self.known is None:
            known: dict[tuple[int, ...], int] = {}
            for root in list(self.parts):
                other = known.setdefault(self.expand(root), root)
                if other != root:
                    self._join(root, other)  # the same position: its address does not change
            self.known = known
        if key not in self.known:
            i = self.new()
            self.parts[i] = key
            self.known[key] = i
        return self.known[key]

    def mark(self, i: int, mark: tuple[int, int]) -> None:
        for b in self.expand(i):
            self.marks[b].add(mark)

    def _join(self, a: int, b: int) -> None:  # root a disappears in root b
        self.up[a] = b
        self.parts.pop(a, None)
        marks, owners = self.marks.pop(a), self.owners.pop(a)
        if marks:
            self.marks[b] |= marks
        if b not in self.parts and owners != self.owners[b]:
            self.owners[b] |= owners
        self.known = None

    def define(self, i: int, parts: tuple[int, ...]) -> None:
        """Record that basic index i is addressed by ``parts``."""
        i = self.find(i)
        marks = self.marks[i]
        self.parts[i] = parts
        self.known = None
        for part in parts:
            for mark in marks:
                self.mark(part, mark)

    def unite(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        if a == b:
            return
        if a in self.parts and b in self.parts:
            left, right = list(self.expand(a)), list(self.expand(b))
            self._join(a, b)
            while left and right and left[-1] == right[-1]:  # the same position inside, then the same one outside
                left.pop(), right.pop()
            while left and right and left[0] == right[0]:
                left.pop(0), right.pop(0)
            if len(left) == len(right) and not self.constant_ids.intersection(left + right):
                for x, y in zip(left, right, strict=True):
                    self.unite(x, y)
            elif min(len(left), len(right)) == 1:
                self.unite(self.pack(left), self.pack(right))
            else:
                self.pin((*left, *right), "is cut in two ways that do not fit")
        elif a in self.parts or b in self.parts:
            basic, made = (b, a) if a in self.parts else (a, b)
            if basic in self.constant_ids or basic in self.expand(made):
                self.pin((a, b), "is tied to itself at another position")
            else:
                marks = self.marks[basic]
                self._join(basic, made)
                for mark in marks:
                    self.mark(made, mark)
        elif a in self.constant_ids or b in self.constant_ids:
            self.pin((a, b), "meets a fixed position")
        else:
            self._join(max(a, b), min(a, b))

    def pin(self, indices: Iterable[int], why: str) -> None:
        tag = self.tag(why)
        for i in indices:
            for b in self.expand(i):
                self.marks[b].add((tag, b))
