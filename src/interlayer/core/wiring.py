"""Wiring: which axes of which weights are tied, found by watching one forward pass.

A hidden unit of a network is an index that several weights share: rows of one, columns of the next, an entry of a bias.
``trace`` finds these shared indices for any module that runs, without hand-written specifications and without looking at
names. The result says how the units can be permuted without changing the function; removing or matching units is the
same knowledge.

How. Every axis of every parameter starts with one *index* for each of its positions. While the model runs, each tensor
carries, for each of its axes, the indices of the positions there; an operator that adds, multiplies or contracts two
axes makes their indices equal. Splitting an axis (heads) makes each of its indices a pair (head, place in the head), and
joining axes (flatten) makes pairs again. What reaches an input, an output, data-dependent indexing or an operator without
a rule gets marks that tell its positions apart, so it can't be permuted. Indices that nothing tells apart are a group.
The groups are checked by running the permuted model once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Group", "Member", "Wiring", "trace"]


@dataclass(frozen=True, eq=False)
class Member:
    """One axis of one weight that moves with a group: ``index[i]`` are the positions on axis ``dim`` that unit i owns."""

    name: str
    dim: int
    index: Tensor  # [units, positions of each unit]


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
        """New weights of the same function: in each named group, place i takes what place ``perm[i]`` held.

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


def trace(model: nn.Module, *inputs: Any, **kwargs: Any) -> Wiring:
    """Run ``model(*inputs, **kwargs)`` once in evaluation mode and return its wiring. The model is left as it was.

    Examples:
        >>> from torch import nn
        >>> import torch
        >>> from interlayer.core.wiring import trace
        >>> wiring = trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 4))
        >>> [(g.size, [(m.name, m.dim) for m in g.members]) for g in wiring.groups.values()]
        [(8, [('0.weight', 0), ('0.bias', 0), ('2.weight', 1)])]
    """
    training = [(m, m.training) for m in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    hooks: list[Any] = []
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)  # the fused encoder layer is one operator; its parts have rules
        tracer = _Tracer(model)
        hooks = [
            module.register_forward_hook(partial(tracer.seen, name), with_kwargs=False)
            for name, module in model.named_modules()
            if name and not any(module.children())
        ]
        with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            with tracer:
                output = model(*inputs, **kwargs)
            while hooks:
                hooks.pop().remove()
            for leaf in _tensors(output):
                tracer.fix_all(leaf, "reaches the output")
            wiring = _collect(tracer)
            return _checked(wiring, model, inputs, kwargs, output)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for hook in hooks:
            hook.remove()
        for module, mode in training:
            module.training = mode


# ------------------------------------------------------------------------------------------------ indices

Axis = tuple[str, int]  # (weight or module, dim)
Keys = list[tuple[int, ...]]  # for each position of an axis, the basic indices that locate it
Array = NDArray[np.int64]
FREE = "free"  # the tensor is constant along this axis: any order is the same
Label = Array | str | None  # None: every position of the axis is told apart
Labels = list[Label]


class _Indices:
    """Union-find over indices; an index is basic, or a tuple of basic ones that locate it (head, place in the head)."""

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
        """The basic indices that locate i, outer first, constants last."""
        i = self.find(i)
        if i not in self.parts:
            return (i,)
        flat = [b for p in self.parts[i] for b in self.expand(p)]
        return (*(b for b in flat if b not in self.constant_ids), *(b for b in flat if b in self.constant_ids))

    def pack(self, parts: Sequence[int]) -> int:
        """The index that these basic indices locate together."""
        parts = [b for p in parts for b in self.expand(p)]
        key = (*(b for b in parts if b not in self.constant_ids), *(b for b in parts if b in self.constant_ids))
        if len(key) == 1:
            return key[0]
        if self.known is None:
            known: dict[tuple[int, ...], int] = {}
            for root in list(self.parts):
                other = known.setdefault(self.expand(root), root)
                if other != root:
                    self._join(root, other)  # the same place: what it is located by does not change
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
        self.marks[b] |= self.marks.pop(a)
        owners = self.owners.pop(a)
        if b not in self.parts:
            self.owners[b] |= owners
        self.known = None

    def define(self, i: int, parts: tuple[int, ...]) -> None:
        """Basic i turns out to be located by ``parts``."""
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
            while left and right and left[-1] == right[-1]:  # the same place inside, then the same place outside
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
                self.pin((a, b), "is tied to itself at another place")
            else:
                marks = self.marks[basic]
                self._join(basic, made)
                for mark in marks:
                    self.mark(made, mark)
        elif a in self.constant_ids or b in self.constant_ids:
            self.pin((a, b), "meets a fixed place")
        else:
            self._join(max(a, b), min(a, b))

    def pin(self, indices: Iterable[int], why: str) -> None:
        tag = self.tag(why)
        for i in indices:
            for b in self.expand(i):
                self.marks[b].add((tag, b))


# ------------------------------------------------------------------------------------------------ labels


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _view_key(t: Tensor) -> tuple[Any, ...]:
    return (t.data_ptr(), tuple(t.shape), t.stride(), t.dtype)


class _Tracer(TorchDispatchMode):
    """Carries labels through every operator that the forward pass runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.ix = _Indices()
        self.labels: dict[int, Labels] = {}
        self.alive: list[Tensor] = []  # keeps ids unique
        self.sources: dict[tuple[Any, ...], str] = {}
        self.storages: dict[int, list[str]] = defaultdict(list)
        self.axes: dict[tuple[str, int], Array] = {}
        self.outputs: dict[tuple[str, int], Array | None] = {}  # (module, axis); None if it differs along another axis
        self.aliases: dict[str, str] = {}
        self.used: set[str] = set()
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
            self.sources[_view_key(t)] = name
            self.storages[t.untyped_storage().data_ptr()].append(name)

    def seen(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        """Hook: note the indices of a module's output."""
        for t in _tensors(output)[:1]:
            for dim, label in enumerate(self.get(t)):
                if isinstance(label, np.ndarray):
                    self.outputs[name, dim] = label.ravel() if label.size == label.shape[dim] else None

    # -- the labels of a tensor

    def put(self, t: Tensor, labels: Labels) -> None:
        self.labels[id(t)] = [None if n == 1 else lab for lab, n in zip(labels, t.shape, strict=True)]
        self.alive.append(t)

    def get(self, t: Any) -> Labels:
        """Labels of an argument; a tensor that no operator made (input, constant) is fixed."""
        if not isinstance(t, Tensor):
            return []
        if id(t) not in self.labels:
            name = self.sources.get(_view_key(t)) if t.numel() else None
            if name is not None:  # `.data` of a weight makes a tensor behind our back
                self.put(t, list(self.labels[id(self.weights[name])]))
            else:
                for other in self.storages.get(t.untyped_storage().data_ptr(), ()) if t.numel() else ():
                    self.used.add(other)
                    self.fix_all(self.weights[other], "is read through its raw storage")
                return [None] * t.ndim
        return list(self.labels[id(t)])

    def fix(self, label: Label, dim: int, why: str) -> None:
        """Tell the positions along the axis apart (the same way for every outer unit)."""
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
        elif not isinstance(outer, np.ndarray) and not isinstance(inner, np.ndarray):
            new = None if outer is None or inner is None else FREE
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
                    assert y is not None
                    x = self.ix.new(y, tag) if outer is not None else self.ix.constant(a, where[p])
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
                outer, inner = (
                    self._slim(np.moveaxis(x, (-2, -1), (p, p + 1)), d) for x, d in ((out, p), (inn, p + 1))
                )
            else:
                self.fix(label, p, "is cut in a way that does not fit an earlier one")
                outer = inner = None
        rest = [cut(lab) if isinstance(lab, np.ndarray) else lab for lab in labels]
        return [*rest[:p], outer, inner, *rest[p + 1 :]], [*shape[:p], a, b, *shape[p + 1 :]]

    def _blocks(self, rows: Array, tag: int) -> bool:
        """See to it that the indices of each row share what locates the row, and differ in the rest."""
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

    def _slim(self, label: Array, dim: int) -> Label:
        """Drop what the label does not depend on; an axis of constants is fixed."""
        label = np.vectorize(self.ix.find, otypes=[np.int64])(label)
        for d in range(label.ndim):
            first = label.take([0], axis=d)
            if d != dim and (label == first).all():
                label = first
        return None if self.ix.constant_ids.issuperset(label.ravel().tolist()) else label

    # -- running

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        for t in given:
            name = self.sources.get(_view_key(t)) if t.numel() else None
            if name is not None:
                self.used.add(name)
        rule = RULES.get(func.overloadpacket.__name__.removesuffix("_") if hasattr(func, "overloadpacket") else "")
        if rule is None and torch.Tag.pointwise in func.tags:
            rule = _pointwise
        busy = any(lab is not None for t in given for lab in self.get(t))
        before = [(t, self.get(t)) for t in given] if func._schema.is_mutable else []
        out = func(*args, **kwargs)
        outs = _tensors(out)
        made: Any = None
        if rule is not None and (busy or rule in (_free, _expand)):
            try:
                made = rule(self, out, *args, **kwargs)
            except _Unknown:
                made = None
        if made is None:
            for t in given:
                self.fix_all(t, f"goes through {func}, which has no rule")
            made = [[None] * t.ndim for t in outs]
        elif isinstance(out, Tensor):
            made = [made]
        for t, labels in zip(outs, made, strict=False):
            self.put(t, labels)
        for t in outs[len(made) :]:
            self.put(t, [None] * t.ndim)
        if before and outs:
            self._written(outs[0], before)
        return out

    def _written(self, t: Tensor, before: list[tuple[Tensor, Labels]]) -> None:
        """An in-place write ends what was said to be constant in tensors that share the memory."""
        old = next((labels for u, labels in before if u is t), [])
        if any(isinstance(o, str) and not isinstance(n, str) for o, n in zip(old, self.labels[id(t)], strict=False)):
            self.fix_all(t, "is written in place into a constant")
            memory = t.untyped_storage().data_ptr()
            for other in self.alive:
                if other.untyped_storage().data_ptr() == memory:
                    self.labels[id(other)] = [None] * other.ndim


class _Unknown(Exception):
    """A rule meets a case that it does not cover."""


# ------------------------------------------------------------------------------------------------ rules
# Each takes the tracer, the operator's result and its arguments and returns the labels of the result
# (of each result, if there are several).


def _lead(labels: Labels, rank: int) -> Labels:
    """Labels as the broadcast tensor of higher rank has them."""
    more = rank - len(labels)
    return [FREE] * more + [
        lab.reshape((1,) * more + lab.shape) if isinstance(lab, np.ndarray) else lab for lab in labels
    ]


def _pointwise(tr: _Tracer, out: Tensor, *args: Any, **kwargs: Any) -> Labels:
    made: Labels = [FREE] * out.ndim
    for t in _tensors((args, kwargs)):
        sizes = [1] * (out.ndim - t.ndim) + list(t.shape)
        for d, label in enumerate(_lead(tr.get(t), out.ndim)):
            made[d] = tr.tie(made[d], FREE if sizes[d] == 1 and out.shape[d] > 1 else label, d)
    return made


def _same(tr: _Tracer, out: Tensor, x: Tensor, *_: Any, **__: Any) -> Labels:
    return tr.get(x)


def _free(tr: _Tracer, out: Tensor, *_: Any, **__: Any) -> Labels:
    return [FREE] * out.ndim


def _reshape(tr: _Tracer, out: Tensor, x: Tensor, *_: Any, **__: Any) -> Labels:
    return _reshaped(tr, tr.get(x), list(x.shape), list(out.shape))


def _reshaped(tr: _Tracer, labels: Labels, old: list[int], new: list[int]) -> Labels:
    if 0 in old or any(isinstance(n, torch.SymInt) for n in old):
        raise _Unknown
    i = j = 0
    while i < len(old) or j < len(new):  # match axes from the left, in runs of equal product
        if j == len(new) or (i < len(old) and old[i] == 1 and new[j] != 1):
            if len(old) == 1:
                labels, old = [], []
            else:
                q = i - 1 if i else 0
                labels, old = tr.merge(labels, old, q)
            continue
        if i == len(old) or (new[j] == 1 and old[i] != 1):
            labels = [np.expand_dims(lab, i) if isinstance(lab, np.ndarray) else lab for lab in labels]
            labels, old = [*labels[:i], None, *labels[i:]], [*old[:i], 1, *old[i:]]
        elif old[i] < new[j]:
            labels, old = tr.merge(labels, old, i)
            continue
        elif old[i] > new[j]:
            if old[i] % new[j]:
                labels, old = tr.merge(labels, old, i)
                continue
            labels, old = tr.split(labels, old, i, new[j], old[i] // new[j])
        i, j = i + 1, j + 1
    return labels


def _moved(tr: _Tracer, x: Tensor, order: Sequence[int]) -> Labels:
    labels = tr.get(x)
    order = [d % x.ndim for d in order]
    return [np.transpose(lab, order) if isinstance(lab := labels[d], np.ndarray) else lab for d in order]


def _permute(tr: _Tracer, out: Tensor, x: Tensor, dims: Sequence[int]) -> Labels:
    return _moved(tr, x, dims)


def _transpose(tr: _Tracer, out: Tensor, x: Tensor, a: int = 0, b: int = 1) -> Labels:
    if x.ndim < 2:
        return tr.get(x)
    order = list(range(x.ndim))
    order[a], order[b] = order[b], order[a]
    return _moved(tr, x, order)


def _unsqueeze(tr: _Tracer, out: Tensor, x: Tensor, dim: int) -> Labels:
    dim %= out.ndim
    labels = [np.expand_dims(lab, dim) if isinstance(lab, np.ndarray) else lab for lab in tr.get(x)]
    return [*labels[:dim], None, *labels[dim:]]


def _dropped(labels: Labels, dims: Iterable[int]) -> Labels:
    """Take away axes of size 1."""
    gone = set(dims)
    return [
        np.squeeze(lab, tuple(gone)) if isinstance(lab, np.ndarray) else lab
        for d, lab in enumerate(labels)
        if d not in gone
    ]


def _squeeze(tr: _Tracer, out: Tensor, x: Tensor, dim: int | Sequence[int] | None = None) -> Labels:
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    return _dropped(tr.get(x), [d % x.ndim for d in dims if x.shape[d] == 1])


def _expand(tr: _Tracer, out: Tensor, x: Tensor, *_: Any, **__: Any) -> Labels:
    sizes = [1] * (out.ndim - x.ndim) + list(x.shape)
    labels = _lead(tr.get(x), out.ndim)
    return [FREE if sizes[d] == 1 and out.shape[d] > 1 else labels[d] for d in range(out.ndim)]


def _taken(tr: _Tracer, labels: Labels, dim: int, places: Any) -> Labels:
    """Only some places of an axis, in some order: they are told apart from the others."""
    label = labels[dim]
    if isinstance(label, np.ndarray):
        axis = [int(i) for i in np.moveaxis(label, dim, 0).reshape(label.shape[dim], -1).ravel()]
        part = set(np.moveaxis(label, dim, 0)[places].ravel().tolist())
        if len(part) < len(set(axis)):
            inside = [tr.ix.expand(i) for i in part]
            outside = [tr.ix.expand(i) for i in set(axis) - part]
            tag = tr.ix.tag("is one of few selected places" if len(part) == 1 else "")
            for slot in range(min(map(len, inside + outside))):
                chosen = {p[slot] for p in inside}
                if chosen.isdisjoint(p[slot] for p in outside):
                    for i in chosen:
                        tr.ix.marks[i].add((tag, -1))
                    break
            else:
                tr.fix(label, dim, "is sliced across its units")
    return [
        lab if not isinstance(lab, np.ndarray) or (lab.shape[dim] == 1) else np.take(lab, places, axis=dim)
        for lab in labels
    ]


def _select(tr: _Tracer, out: Tensor, x: Tensor, dim: int, index: int) -> Labels:
    dim %= x.ndim
    return _dropped(_taken(tr, tr.get(x), dim, np.array([index % x.shape[dim]])), [dim])


def _slice(
    tr: _Tracer, out: Tensor, x: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Labels:
    dim %= x.ndim
    return _taken(tr, tr.get(x), dim, np.arange(x.shape[dim])[slice(start, end, step)])


def _split(tr: _Tracer, out: Sequence[Tensor], x: Tensor, sizes: Any, dim: int = 0) -> list[Labels]:
    dim %= x.ndim
    edges = np.cumsum([0, *(t.shape[dim] for t in out)])
    return [_taken(tr, tr.get(x), dim, np.arange(a, b)) for a, b in pairwise(edges)]


def _unbind(tr: _Tracer, out: Sequence[Tensor], x: Tensor, dim: int = 0) -> list[Labels]:
    return [_select(tr, t, x, dim, i) for i, t in enumerate(out)]


def _flip(tr: _Tracer, out: Tensor, x: Tensor, dims: Sequence[int]) -> Labels:
    labels = tr.get(x)
    for dim in dims:
        labels = _taken(tr, labels, dim % x.ndim, np.arange(x.shape[dim])[::-1])
    return labels


def _joined(tr: _Tracer, parts: list[Labels], sizes: list[int], dim: int) -> Labels:
    rank = len(parts[0])
    made: Labels = [FREE] * rank
    for d in range(rank):
        if d != dim:
            for part in parts:
                made[d] = tr.tie(made[d], part[d], d)
    own = [part[dim] for part in parts]
    if not any(isinstance(lab, np.ndarray) for lab in own):
        made[dim] = FREE if all(isinstance(lab, str) for lab in own) and len(own) == 1 else None
        return made
    arrays: list[Array] = []
    for label, size in zip(own, sizes, strict=True):
        if isinstance(label, np.ndarray):
            arrays.append(label)
            continue
        fresh = np.array([tr.ix.new() for _ in range(size)], dtype=np.int64)
        arrays.append(fresh.reshape([-1 if d == dim else 1 for d in range(rank)]))
        if label is None:
            tr.fix(arrays[-1], dim, "meets an input or a constant")
    roots = [{tr.ix.find(int(i)) for i in label.ravel()} for label in arrays]
    if sum(map(len, roots)) > len(set().union(*roots)):  # the same units twice: told apart by where they stand
        pack = np.vectorize(lambda i, n: tr.ix.pack((int(i), tr.ix.constant(len(own), int(n)))), otypes=[np.int64])
        arrays = [pack(label, n) for n, label in enumerate(arrays)]
    grid = np.broadcast_shapes(*(tuple(1 if d == dim else s for d, s in enumerate(a.shape)) for a in arrays))
    made[dim] = np.concatenate(
        [np.broadcast_to(a, (*grid[:dim], a.shape[dim], *grid[dim + 1 :])) for a in arrays], axis=dim
    )
    for d, label in enumerate(made):  # an axis that differed along the joined one has been tied part by part
        if d != dim and isinstance(label, np.ndarray) and label.shape[dim] > 1:
            made[d] = tr.collapse(made, [dim])[d]
    return made


def _cat(tr: _Tracer, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Labels:
    parts = [t for t in tensors if t.ndim == out.ndim]
    dim %= out.ndim
    collapsed = [tr.collapse(tr.get(t), [dim]) if len(parts) > 1 else tr.get(t) for t in parts]
    return _joined(tr, collapsed, [t.shape[dim] for t in parts], dim)


def _stack(tr: _Tracer, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Labels:
    parts = [_unsqueeze(tr, out, t, dim) for t in tensors]
    return _joined(tr, parts, [1] * len(parts), dim % out.ndim)


def _pad(tr: _Tracer, out: Tensor, x: Tensor, pad: Sequence[int], value: Any = 0) -> Labels:
    labels = tr.get(x)
    for n in range(len(pad) // 2):
        dim = x.ndim - 1 - n
        before, after = pad[2 * n], pad[2 * n + 1]
        if min(before, after) < 0:
            raise _Unknown
        if before or after:
            filler: Labels = [FREE] * x.ndim
            parts = [(filler, before), (labels, x.shape[dim]), (filler, after)]
            parts = [(lab, size) for lab, size in parts if size]
            labels = _joined(tr, [lab for lab, _ in parts], [size for _, size in parts], dim)
    return labels


def _reduce(tr: _Tracer, out: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Labels:
    if isinstance(dim, float):
        raise _Unknown
    dims = range(x.ndim) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    dims = [d % x.ndim for d in dims]
    labels = tr.collapse(tr.get(x), dims)
    if out.ndim == x.ndim:
        return [None if d in dims else lab for d, lab in enumerate(labels)]
    one = [None if d in dims else lab for d, lab in enumerate(labels)]
    return _dropped(
        [lab.take([0], axis=d) if isinstance(lab, np.ndarray) and d in dims else lab for d, lab in enumerate(one)], dims
    )


def _norm_p(tr: _Tracer, out: Tensor, x: Tensor, p: Any = 2, dim: Any = None, *_: Any, **__: Any) -> Labels:
    return _reduce(tr, out, x, dim)


def _var(tr: _Tracer, out: Tensor, x: Tensor, dim: Any = None, *_: Any, **__: Any) -> Labels:
    return _reduce(tr, out, x, dim)


def _softmax(tr: _Tracer, out: Tensor, x: Tensor, dim: int, *_: Any, **__: Any) -> Labels:
    return tr.collapse(tr.get(x), [dim % x.ndim])


def _bmm(tr: _Tracer, out: Tensor, a: Tensor, b: Tensor) -> Labels:
    """[(b,) n, k] x [(b,) k, m]."""
    left, right = tr.get(a), tr.get(b)
    rank = out.ndim
    swap = [*range(rank - 2), rank - 1, rank - 2]
    # b transposed has the rank and the batch axes of a, with the contracted axis last
    other = [np.transpose(lab, swap) if isinstance(lab := right[d], np.ndarray) else lab for d in swap]
    batch: Labels = [tr.tie(left[d], other[d], d) for d in range(rank - 2)]
    tr.tie(left[-1], other[-1], rank - 1)
    rows = tr.collapse(left, [rank - 1])[rank - 2]
    columns = tr.collapse(other, [rank - 1])[rank - 2]
    columns = np.transpose(columns, swap) if isinstance(columns, np.ndarray) else columns
    batch = [tr.collapse([*batch, None, lab], [rank - 1])[d] for d, lab in enumerate(batch)]
    return [*batch, rows, columns]


def _addmm(tr: _Tracer, out: Tensor, bias: Tensor, a: Tensor, b: Tensor, **_: Any) -> Labels:
    return _plus(tr, out, _bmm(tr, out, a, b), bias)


def _plus(tr: _Tracer, out: Tensor, labels: Labels, bias: Tensor) -> Labels:
    sizes = [1] * (out.ndim - bias.ndim) + list(bias.shape)
    extra = _lead(tr.get(bias), out.ndim)
    return [tr.tie(lab, FREE if sizes[d] == 1 else extra[d], d) for d, lab in enumerate(labels)]


def _mv(tr: _Tracer, out: Tensor, a: Tensor, v: Tensor) -> Labels:
    left = tr.get(a)
    tr.tie(left[1], _lead(tr.get(v), 2)[1], 1)
    return _dropped([tr.collapse(left, [1])[0], None], [1])


def _dot(tr: _Tracer, out: Tensor, a: Tensor, b: Tensor) -> Labels:
    tr.tie(tr.get(a)[0], tr.get(b)[0], 0)
    return []


def _convolution(
    tr: _Tracer, out: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int,
) -> Labels:  # fmt: skip
    rank = x.ndim
    data, kernel = tr.get(x), tr.get(w)
    for d in range(2, rank):
        tr.fix(data[d], d, "is moved over by a kernel")
        tr.fix(kernel[d], d, "is a place of a kernel")
    data = tr.collapse(data, range(1, rank))
    a, b = (0, 1) if transposed else (1, 0)  # axes of w: in, out

    def alone(label: Label, axis: int) -> Label:  # as axis 1 of a tensor whose other axes have size 1
        return label.reshape(1, -1, *[1] * (rank - 2)) if isinstance(label, np.ndarray) else label

    if groups == 1:
        tr.tie(data[1], alone(kernel[a], a), 1)
        made = alone(kernel[b], b)
    else:
        sizes = list(x.shape)
        grouped, _ = tr.split(data, sizes, 1, groups, x.shape[1] // groups)
        whole = alone(kernel[0], 0)  # axis 0 of w holds (group, unit) of the outputs, or of the inputs if transposed
        cut, _ = tr.split(
            [None, whole, *[None] * (rank - 2)], [1, w.shape[0], *[1] * (rank - 2)], 1, groups, w.shape[0] // groups
        )
        tr.tie(grouped[1], cut[1], 1)
        inner = kernel[1].reshape(1, 1, -1, *[1] * (rank - 2)) if isinstance(kernel[1], np.ndarray) else kernel[1]
        if transposed:
            tr.tie(grouped[2], cut[2], 2)
            made = tr.merge([None, cut[1], inner, *[None] * (rank - 2)], [1, groups, w.shape[1], *[1] * (rank - 2)], 1)[
                0
            ][1]
        else:
            if w.shape[1] > 1:
                tr.tie(grouped[2], inner, 2)
            made = whole
    if bias is not None:
        made = tr.tie(made, alone(tr.get(bias)[0], 0), 1)
    return [data[0], made, *[None] * (rank - 2)]


def _channels(tr: _Tracer, x: Tensor, *weights: Tensor | None) -> Labels:
    labels = tr.get(x)
    for w in weights:
        if w is not None:
            label = tr.get(w)[0]
            shape = [-1 if d == 1 else 1 for d in range(x.ndim)]
            labels[1] = tr.tie(labels[1], label.reshape(shape) if isinstance(label, np.ndarray) else label, 1)
    return labels


def _batch_norm(tr: _Tracer, out: Any, x: Tensor, w: Any, b: Any, mean: Any, var: Any, *_: Any) -> list[Labels]:
    labels = _channels(tr, x, w, b, mean, var)
    return [tr.collapse(labels, [d for d in range(x.ndim) if d != 1]) if mean is None else labels]


def _layer_norm(tr: _Tracer, out: Any, x: Tensor, shape: Sequence[int], *weights: Any) -> list[Labels]:
    labels = tr.get(x)
    first = x.ndim - len(shape)
    for w in weights:
        if isinstance(w, Tensor):
            extra = _lead(tr.get(w), x.ndim)
            labels = [tr.tie(lab, extra[d], d) if d >= first else lab for d, lab in enumerate(labels)]
    mixed = tr.collapse(labels, range(first, x.ndim))
    return [[*mixed[:first], *labels[first:]]]


def _group_norm(
    tr: _Tracer, out: Any, x: Tensor, w: Any, b: Any, n: int, c: int, hw: int, groups: int, eps: float
) -> list[Labels]:
    labels = _channels(tr, x, w, b)
    if 1 < groups < c:
        tr.split(labels, list(x.shape), 1, groups, c // groups)
    return [labels]


def _spatial(tr: _Tracer, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Pooling and resizing: batch and channels pass, the rest is moved over by a window."""
    keep = x.ndim - (1 if "1d" in str(type(out)) else 2) if x.ndim < 4 else 2
    labels = tr.get(x)
    for d in range(keep, x.ndim):
        tr.fix(labels[d], d, "is moved over by a window")
    labels = tr.collapse(labels, range(keep, x.ndim))
    made: Labels = [*labels[:keep], *[None] * (x.ndim - keep)]
    return made if isinstance(out, Tensor) else [made]


def _embedding(tr: _Tracer, out: Tensor, w: Tensor, ids: Tensor, *_: Any, **__: Any) -> Labels:
    labels = tr.get(w)
    tr.fix(labels[0], 0, "is indexed by data")
    tr.fix_all(ids, "is used as an index")
    return [
        *[None] * ids.ndim,
        *_lead(_dropped([labels[0] if labels[0] is None else None, *tr.collapse(labels, [0])[1:]], [0]), out.ndim)[
            ids.ndim :
        ],
    ]


def _index(tr: _Tracer, out: Tensor, x: Tensor, indices: Sequence[Tensor | None]) -> Labels:
    where = [d for d, i in enumerate(indices) if i is not None]
    if len(where) != 1 or indices[where[0]].dtype == torch.bool:  # type: ignore[union-attr]
        raise _Unknown
    dim, index = where[0], indices[where[0]]
    assert index is not None
    return _gathered(tr, x, dim, index)


def _index_select(tr: _Tracer, out: Tensor, x: Tensor, dim: int, index: Tensor) -> Labels:
    return _gathered(tr, x, dim % x.ndim, index)


def _gathered(tr: _Tracer, x: Tensor, dim: int, index: Tensor) -> Labels:
    tr.fix_all(index, "is used as an index")
    labels = tr.get(x)
    tr.fix(labels[dim], dim, "is indexed by data")
    labels = tr.collapse(labels, [dim])
    made: Labels = []
    for d, lab in enumerate(labels):
        if d == dim:
            made += [None] * index.ndim
        elif isinstance(lab, np.ndarray):
            made.append(lab.reshape(*lab.shape[:dim], *[1] * index.ndim, *lab.shape[dim + 1 :]))
        else:
            made.append(lab)
    return made


def _copy(tr: _Tracer, out: Tensor, x: Tensor, source: Tensor, *_: Any, **__: Any) -> Labels:
    return _plus(tr, out, tr.get(x), source)


RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("alias", "detach", "clone", "contiguous", "_to_copy", "to", "lift_fresh", "dropout", "native_dropout"), _same),
    **dict.fromkeys(("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"), _free),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten"), _reshape),
    **dict.fromkeys(("transpose", "t"), _transpose),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _split),
    **dict.fromkeys(("sum", "mean", "amax", "amin", "logsumexp", "any", "all"), _reduce),
    **dict.fromkeys(("var", "std", "var_mean", "std_mean"), _var),
    **dict.fromkeys(("linalg_vector_norm", "norm"), _norm_p),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax", "softmax"), _softmax),
    **dict.fromkeys(("mm", "bmm"), _bmm),
    **dict.fromkeys(("addmm", "baddbmm"), _addmm),
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "_batch_norm_no_update"), _batch_norm),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), _layer_norm),
    **dict.fromkeys(
        ("max_pool2d_with_indices", "avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d", "upsample_nearest2d",
         "upsample_bilinear2d", "max_pool2d", "mkldnn_max_pool2d"), _spatial),
    "permute": _permute, "unsqueeze": _unsqueeze, "squeeze": _squeeze, "expand": _expand, "select": _select, "slice": _slice,
    "unbind": _unbind, "flip": _flip, "cat": _cat, "stack": _stack, "constant_pad_nd": _pad, "mv": _mv, "dot": _dot,
    "convolution": _convolution, "native_group_norm": _group_norm, "embedding": _embedding, "index": _index,
    "index_select": _index_select, "copy": _copy,
}  # fmt: skip


# ------------------------------------------------------------------------------------------------ groups


def _collect(tr: _Tracer) -> Wiring:
    """Read the groups off the indices when everything has run."""
    ix = tr.ix

    def located(places: Array) -> list[tuple[int, ...]]:
        met: dict[tuple[int, ...], int] = defaultdict(int)
        out = []
        for i in places:
            key = ix.expand(int(i))
            met[key] += 1
            # places of one axis that move together (q and k in a fused weight) are told apart by their order
            out.append(key if met[key] == 1 else (*key, ix.constant(-1, met[key])))
        return out

    keys = {axis: located(places) for axis, places in tr.axes.items() if axis[0] in tr.used}
    basics = sorted({b for places in keys.values() for key in places for b in key} - ix.constant_ids)

    chains: dict[int, tuple[int, ...]] = {}  # an index and what it lives in, innermost first

    def chain(b: int, busy: frozenset[int] = frozenset()) -> tuple[int, ...]:
        if b not in chains:
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


def _checked(wiring: Wiring, model: nn.Module, inputs: Any, kwargs: Any, expected: Any) -> Wiring:
    """Run the permuted model; drop groups whose permutation changes the output."""
    state = {k: v for k, v in model.state_dict(keep_vars=True).items() if isinstance(v, Tensor)}
    perms = wiring.random()

    def kept(names: Iterable[str]) -> bool:
        moved = wiring.permute(state, {n: perms[n] for n in names})
        out = torch.func.functional_call(model, moved, inputs, kwargs, tie_weights=False)
        for a, b in zip(_tensors(expected), _tensors(out), strict=True):
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
    groups = {
        n: g for n, g in wiring.groups.items() if n not in dropped and (not g.parent or g.parent[0] not in dropped)
    }
    moved = {(m.name, m.dim) for g in groups.values() for m in g.members}
    fixed = dict(wiring.fixed)
    for n, g in wiring.groups.items():
        if n not in groups:
            why = "permuting it changed the output" if n in dropped else "is inside a group that was dropped"
            fixed |= {(m.name, m.dim): why for m in g.members if (m.name, m.dim) not in moved}
    return Wiring(groups, fixed, wiring.aliases)
