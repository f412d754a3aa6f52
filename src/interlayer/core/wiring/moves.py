"""What operators that move positions do to labels: reshapes, transposes, slices, joins.

A rule takes the labelling, the operator's result and its arguments and returns the labels of the result (of each result,
if there are several).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interlayer.core.wiring.indices import FREE, NONE, Array, Labels, numbered
from interlayer.core.wiring.labels import Labelling, Unknown, along


def lead(labels: Labels, rank: int) -> Labels:
    """Labels as the broadcast tensor of higher rank has them."""
    more = rank - len(labels)
    return [FREE] * more + [
        lab.reshape((1,) * more + lab.shape) if isinstance(lab, np.ndarray) else lab for lab in labels
    ]


def reshape(tr: Labelling, out: Tensor, x: Tensor, *_: Any, **__: Any) -> Labels:
    """The rule of every operator that gives the same values another shape."""
    return reshaped(tr, tr.get(x), list(x.shape), list(out.shape))


def reshaped(tr: Labelling, labels: Labels, old: list[int], new: list[int]) -> Labels:
    """Cut and join axes from one shape to another."""
    if 0 in old or any(isinstance(n, torch.SymInt) for n in old):
        raise Unknown
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


def moved(labels: Labels, order: Sequence[int]) -> Labels:
    """Labels after their axes were reordered."""
    order = [d % len(labels) for d in order]
    return [np.transpose(lab, order) if isinstance(lab := labels[d], np.ndarray) else lab for d in order]


def permute(tr: Labelling, out: Tensor, x: Tensor, dims: Sequence[int]) -> Labels:
    """Axes in another order."""
    return moved(tr.get(x), dims)


def transpose(tr: Labelling, out: Tensor, x: Tensor, a: int = 0, b: int = 1) -> Labels:
    """Two axes exchanged."""
    if x.ndim < 2:
        return tr.get(x)
    order = list(range(x.ndim))
    order[a], order[b] = order[b], order[a]
    return moved(tr.get(x), order)


def shuffled(tr: Labelling, x: Tensor, cut: Sequence[int], order: Sequence[int], out: Tensor) -> Labels:
    """Cut axes, reorder them, and join them again."""
    labels = moved(reshaped(tr, tr.get(x), list(x.shape), list(cut)), order)
    return reshaped(tr, labels, [cut[d] for d in order], list(out.shape))


def pixel_shuffle(tr: Labelling, out: Tensor, x: Tensor, r: int) -> Labels:
    """Blocks of channels to positions."""
    *batch, _, height, width = x.shape
    n = len(batch)
    order = [*range(n), n, n + 3, n + 1, n + 4, n + 2]  # channel, row, row inside, column, column inside
    return shuffled(tr, x, [*batch, out.shape[n], r, r, height, width], order, out)


def pixel_unshuffle(tr: Labelling, out: Tensor, x: Tensor, r: int) -> Labels:
    """Positions to blocks of channels."""
    *batch, channels, height, width = x.shape
    n = len(batch)
    order = [*range(n), n, n + 2, n + 4, n + 1, n + 3]
    return shuffled(tr, x, [*batch, channels, height // r, r, width // r, r], order, out)


def channel_shuffle(tr: Labelling, out: Tensor, x: Tensor, groups: int) -> Labels:
    """Channels of all groups in turn."""
    return taken(tr, tr.get(x), 1, np.arange(x.shape[1]).reshape(groups, -1).T.ravel())


def glu(tr: Labelling, out: Tensor, x: Tensor, dim: int = -1) -> Labels:
    """One half of an axis gates the other."""
    dim, half = dim % x.ndim, out.shape[dim]
    values, gates = (taken(tr, tr.get(x), dim, np.arange(half) + start) for start in (0, half))
    return [tr.tie(a, b, d) for d, (a, b) in enumerate(zip(values, gates, strict=True))]


def unsqueeze(tr: Labelling, out: Tensor, x: Tensor, dim: int) -> Labels:
    """A new axis of size 1."""
    dim %= out.ndim
    labels = [np.expand_dims(lab, dim) if isinstance(lab, np.ndarray) else lab for lab in tr.get(x)]
    return [*labels[:dim], None, *labels[dim:]]


def dropped(labels: Labels, dims: Iterable[int]) -> Labels:
    """Take away axes of size 1."""
    gone = set(dims)
    return [
        np.squeeze(lab, tuple(gone)) if isinstance(lab, np.ndarray) else lab
        for d, lab in enumerate(labels)
        if d not in gone
    ]


def squeeze(tr: Labelling, out: Tensor, x: Tensor, dim: int | Sequence[int] | None = None) -> Labels:
    """Axes of size 1 taken away."""
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    return dropped(tr.get(x), [d % x.ndim for d in dims if x.shape[d] == 1])


def expand(tr: Labelling, out: Tensor, x: Tensor, *_: Any, **__: Any) -> Labels:
    """Axes of size 1 repeated."""
    sizes = [1] * (out.ndim - x.ndim) + list(x.shape)
    labels = lead(tr.get(x), out.ndim)
    return [FREE if sizes[d] == 1 and out.shape[d] > 1 else labels[d] for d in range(out.ndim)]


def taken(tr: Labelling, labels: Labels, dim: int, places: Any) -> Labels:
    """Only some positions of an axis, in some order: they are marked as distinct from the others."""
    label = labels[dim]
    if isinstance(label, np.ndarray):
        ids = tr.ix.same(np.moveaxis(label, dim, 0))
        part = ids[places]
        inside = np.isin(ids, part)
        if not inside.all():
            rows = tr.ix.rows(ids)
            tag = tr.ix.tag("is one of few selected positions" if len(np.unique(part)) == 1 else "")
            for slot in range(int((rows != NONE).sum(-1).min())):
                chosen = np.unique(rows[inside, slot])
                if not np.isin(chosen, rows[~inside, slot]).any():
                    tr.ix.mark(tag, chosen)
                    break
            else:
                tr.fix(label, dim, "is sliced across its units")
    return [
        lab if not isinstance(lab, np.ndarray) or (lab.shape[dim] == 1) else np.take(lab, places, axis=dim)
        for lab in labels
    ]


def select(tr: Labelling, out: Tensor, x: Tensor, dim: int, index: int) -> Labels:
    """One position of an axis."""
    dim %= x.ndim
    return dropped(taken(tr, tr.get(x), dim, np.array([index % x.shape[dim]])), [dim])


def sliced(
    tr: Labelling, out: Tensor, x: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Labels:
    """A range of an axis."""
    dim %= x.ndim
    return taken(tr, tr.get(x), dim, np.arange(x.shape[dim])[slice(start, end, step)])


def split(tr: Labelling, out: Sequence[Tensor], x: Tensor, sizes: Any, dim: int = 0) -> list[Labels]:
    """Several ranges of an axis."""
    dim %= x.ndim
    edges = np.cumsum([0, *(t.shape[dim] for t in out)])
    return [taken(tr, tr.get(x), dim, np.arange(a, b)) for a, b in pairwise(edges)]


def unbind(tr: Labelling, out: Sequence[Tensor], x: Tensor, dim: int = 0) -> list[Labels]:
    """All positions of an axis, each on its own."""
    return [select(tr, t, x, dim, i) for i, t in enumerate(out)]


def flip(tr: Labelling, out: Tensor, x: Tensor, dims: Sequence[int]) -> Labels:
    """Axes backwards."""
    labels = tr.get(x)
    for dim in dims:
        labels = taken(tr, labels, dim % x.ndim, np.arange(x.shape[dim])[::-1])
    return labels


def roll(tr: Labelling, out: Tensor, x: Tensor, shifts: Sequence[int], dims: Sequence[int] = ()) -> Labels:
    """Axes rotated."""
    if not dims:
        raise Unknown
    labels = tr.get(x)
    for shift, dim in zip(shifts, dims, strict=True):
        labels = taken(tr, labels, dim % x.ndim, np.roll(np.arange(x.shape[dim]), shift))
    return labels


def repeat(tr: Labelling, out: Tensor, x: Tensor, repeats: Sequence[int]) -> Labels:
    """Axes several times over."""
    labels, shape = lead(tr.get(x), out.ndim), [1] * (out.ndim - x.ndim) + list(x.shape)
    for d, times in enumerate(repeats):
        if times != 1:
            spread = [np.expand_dims(lab, d) if isinstance(lab, np.ndarray) else lab for lab in labels]
            labels, shape = tr.merge([*spread[:d], None, *spread[d:]], [*shape[:d], times, *shape[d:]], d)
    return labels


def as_strided(tr: Labelling, out: Tensor, x: Tensor, size: Sequence[int], stride: Sequence[int], *_: Any) -> Labels:
    """The end of global average pooling of a channels-last tensor: the same [n, c, 1, 1] under other strides."""
    if len(size) != 4 or size[2] * size[3] != 1 or list(stride) != [size[1], 1, size[1], size[1]]:
        raise Unknown
    return tr.get(x)


def joined(tr: Labelling, parts: list[Labels], sizes: list[int], dim: int) -> Labels:
    """Parts one after the other along an axis."""
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
        arrays.append(along(tr.ix.new(size), dim, rank))
        if label is None:
            tr.fix(arrays[-1], dim, "meets an input or a constant")
    ids = tr.ix.same(np.concatenate([label.ravel() for label in arrays]))
    owner = np.repeat(np.arange(len(arrays)), [label.size for label in arrays])
    # The same units twice: their position distinguishes them.
    if len(np.unique(numbered(ids, owner))) > len(np.unique(ids)):
        places = tr.ix.constant(len(own))
        arrays = [
            tr.ix.pack(np.stack((label, np.full_like(label, i)), -1)) for label, i in zip(arrays, places, strict=True)
        ]
    grid = np.broadcast_shapes(*(tuple(1 if d == dim else s for d, s in enumerate(a.shape)) for a in arrays))
    made[dim] = np.concatenate(
        [np.broadcast_to(a, (*grid[:dim], a.shape[dim], *grid[dim + 1 :])) for a in arrays], axis=dim
    )
    for d, label in enumerate(made):  # an axis that differed along the joined one has been tied part by part
        if d != dim and isinstance(label, np.ndarray) and label.shape[dim] > 1:
            made[d] = tr.collapse(made, [dim])[d]
    return made


def cat(tr: Labelling, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Labels:
    """Tensors one after the other along an axis."""
    parts = [t for t in tensors if t.ndim == out.ndim]
    dim %= out.ndim
    collapsed = [tr.collapse(tr.get(t), [dim]) if len(parts) > 1 else tr.get(t) for t in parts]
    return joined(tr, collapsed, [t.shape[dim] for t in parts], dim)


def stack(tr: Labelling, out: Tensor, tensors: Sequence[Tensor], dim: int = 0) -> Labels:
    """Each part keeps its own units; they are tied where an operator mixes along the new axis."""
    dim %= out.ndim
    parts = [unsqueeze(tr, out, t, dim) for t in tensors]
    made: Labels = [FREE] * out.ndim
    for d in range(out.ndim):
        own = [part[d] for part in parts]
        arrays = [lab for lab in own if isinstance(lab, np.ndarray)]
        if len(arrays) == len(own) and len({lab.shape for lab in arrays}) == 1:
            made[d] = tr.slim(np.concatenate(arrays, axis=dim), d)
        else:
            for label in own:
                made[d] = tr.tie(made[d], label, d)
    made[dim] = None
    return made


def pad(tr: Labelling, out: Tensor, x: Tensor, pad: Sequence[int], value: Any = 0) -> Labels:
    """Constants before and after an axis."""
    labels = tr.get(x)
    for n in range(len(pad) // 2):
        dim = x.ndim - 1 - n
        before, after = pad[2 * n], pad[2 * n + 1]
        if min(before, after) < 0:
            raise Unknown
        if before or after:
            filler: Labels = [FREE] * x.ndim
            parts = [(filler, before), (labels, x.shape[dim]), (filler, after)]
            parts = [(lab, size) for lab, size in parts if size]
            labels = joined(tr, [lab for lab, _ in parts], [size for _, size in parts], dim)
    return labels
