"""What each operator does to labels; see ``moves`` for those that only move positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from interlayer.core.wiring import moves
from interlayer.core.wiring.indices import FREE, Label, Labels
from interlayer.core.wiring.labels import Labelling, Unknown, operands
from interlayer.core.wiring.moves import dropped, lead, moved


def _pointwise(tr: Labelling, out: Tensor, *args: Any, **kwargs: Any) -> Labels:
    made: Labels = [FREE] * out.ndim
    for t in operands(*args, *kwargs.values()):
        sizes = [1] * (out.ndim - t.ndim) + list(t.shape)
        for d, label in enumerate(lead(tr.get(t), out.ndim)):
            made[d] = tr.tie(made[d], FREE if sizes[d] == 1 and out.shape[d] > 1 else label, d)
    return made


def _same(tr: Labelling, out: Tensor, x: Tensor, *_: Any, **__: Any) -> Labels:
    return tr.get(x)


def _free(tr: Labelling, out: Tensor, *_: Any, **__: Any) -> Labels:
    return [FREE] * out.ndim


def _reduce(tr: Labelling, out: Tensor, x: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> Labels:
    if isinstance(dim, float):
        raise Unknown
    dims = range(x.ndim) if dim is None or dim == [] else [dim] if isinstance(dim, int) else dim
    dims = [d % x.ndim for d in dims]
    labels = tr.collapse(tr.get(x), dims)
    if out.ndim == x.ndim:
        return [None if d in dims else lab for d, lab in enumerate(labels)]
    one = [None if d in dims else lab for d, lab in enumerate(labels)]
    return dropped(
        [lab.take([0], axis=d) if isinstance(lab, np.ndarray) and d in dims else lab for d, lab in enumerate(one)], dims
    )


def _norm_p(tr: Labelling, out: Tensor, x: Tensor, p: Any = 2, dim: Any = None, *_: Any, **__: Any) -> Labels:
    return _reduce(tr, out, x, dim)


def _var(tr: Labelling, out: Tensor, x: Tensor, dim: Any = None, *_: Any, **__: Any) -> Labels:
    return _reduce(tr, out, x, dim)


def _softmax(tr: Labelling, out: Tensor, x: Tensor, dim: int, *_: Any, **__: Any) -> Labels:
    return tr.collapse(tr.get(x), [dim % x.ndim])


def _bmm(tr: Labelling, out: Tensor, a: Tensor, b: Tensor) -> Labels:
    """[(b,) n, k] x [(b,) k, m]."""
    left, right = tr.get(a), tr.get(b)
    rank = out.ndim
    swap = [*range(rank - 2), rank - 1, rank - 2]
    # b transposed has the rank and the batch axes of a, with the contracted axis last
    other = [np.transpose(lab, swap) if isinstance(lab := right[d], np.ndarray) else lab for d in swap]
    batch: Labels = [tr.tie(left[d], other[d], d) for d in range(rank - 2)]
    tr.contract(left[-1], other[-1], rank - 1)
    rows = tr.collapse(left, [rank - 1])[rank - 2]
    columns = tr.collapse(other, [rank - 1])[rank - 2]
    columns = np.transpose(columns, swap) if isinstance(columns, np.ndarray) else columns
    batch = [tr.collapse([*batch, None, lab], [rank - 1])[d] for d, lab in enumerate(batch)]
    return [*batch, rows, columns]


def _addmm(tr: Labelling, out: Tensor, bias: Tensor, a: Tensor, b: Tensor, **_: Any) -> Labels:
    return _plus(tr, out, _bmm(tr, out, a, b), bias)


def _plus(tr: Labelling, out: Tensor, labels: Labels, bias: Tensor) -> Labels:
    sizes = [1] * (out.ndim - bias.ndim) + list(bias.shape)
    extra = lead(tr.get(bias), out.ndim)
    return [tr.tie(lab, FREE if sizes[d] == 1 else extra[d], d) for d, lab in enumerate(labels)]


def _grouped_mm(
    tr: Labelling, out: Tensor, a: Tensor, b: Tensor, offsets: Tensor | None = None, *_: Any, **__: Any
) -> Labels:
    """[n, k] x [experts, k, m], where ``offsets`` cuts the n rows into one run for each expert."""
    if a.ndim != 2 or b.ndim != 3:
        raise Unknown
    left, right = tr.get(a), tr.get(b)
    tr.fix(left[0], 0, "is shared out over experts")
    tr.fix(right[0], 0, "is an expert's place")
    left = [
        lab.reshape(1, *lab.shape) if isinstance(lab, np.ndarray) else lab for lab in (None, *tr.collapse(left, [0, 1]))
    ]
    right = moved(tr.collapse(right, [0, 1, 2]), [0, 2, 1])
    tr.tie(left[2], right[2], 2)
    return [None, lab.reshape(1, -1) if isinstance(lab := right[1], np.ndarray) else lab]


def _mv(tr: Labelling, out: Tensor, a: Tensor, v: Tensor) -> Labels:
    left = tr.get(a)
    tr.contract(left[1], lead(tr.get(v), 2)[1], 1)
    return dropped([tr.collapse(left, [1])[0], None], [1])


def _dot(tr: Labelling, out: Tensor, a: Tensor, b: Tensor) -> Labels:
    tr.tie(tr.get(a)[0], tr.get(b)[0], 0)
    return []


def _convolution(
    tr: Labelling, out: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int,
) -> Labels:  # fmt: skip
    rank = x.ndim
    data, kernel = tr.get(x), tr.get(w)
    for d in range(2, rank):
        tr.fix(data[d], d, "is moved over by a kernel")
        tr.fix(kernel[d], d, "is a position of a kernel")
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


def _channels(tr: Labelling, x: Tensor, *weights: Tensor | None) -> Labels:
    labels = tr.get(x)
    for w in weights:
        if w is not None:
            label = tr.get(w)[0]
            shape = [-1 if d == 1 else 1 for d in range(x.ndim)]
            labels[1] = tr.tie(labels[1], label.reshape(shape) if isinstance(label, np.ndarray) else label, 1)
    return labels


def _batch_norm(tr: Labelling, out: Any, x: Tensor, w: Any, b: Any, mean: Any, var: Any, *_: Any) -> list[Labels]:
    labels = _channels(tr, x, w, b, mean, var)
    return [tr.collapse(labels, [d for d in range(x.ndim) if d != 1]) if mean is None else labels]


def _layer_norm(tr: Labelling, out: Any, x: Tensor, shape: Sequence[int], *weights: Any) -> list[Labels]:
    labels = tr.get(x)
    first = x.ndim - len(shape)
    for w in weights:
        if isinstance(w, Tensor):
            extra = lead(tr.get(w), x.ndim)
            labels = [tr.tie(lab, extra[d], d) if d >= first else lab for d, lab in enumerate(labels)]
    mixed = tr.collapse(labels, range(first, x.ndim))
    return [[*mixed[:first], *labels[first:]]]


def _group_norm(
    tr: Labelling, out: Any, x: Tensor, w: Any, b: Any, n: int, c: int, hw: int, groups: int, eps: float
) -> list[Labels]:
    labels = _channels(tr, x, w, b)
    if 1 < groups < c:
        tr.split(labels, list(x.shape), 1, groups, c // groups)
    return [labels]


def _weight_norm(tr: Labelling, out: Any, v: Tensor, g: Tensor, dim: int = 0) -> list[Labels]:
    """``g v / |v|``, the norm over all axes but one."""
    labels = tr.get(v)
    labels[dim] = tr.tie(labels[dim], tr.get(g)[dim], dim)
    mixed = tr.collapse(labels, [d for d in range(v.ndim) if d != dim])
    return [labels, [lab if d == dim else None for d, lab in enumerate(mixed)]]


def _spatial(dims: int, tr: Labelling, out: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Pooling and resizing over the last axes: batch and channels pass, the rest is moved over by a window."""
    keep = x.ndim - dims
    labels = tr.get(x)
    for d in range(keep, x.ndim):
        tr.fix(labels[d], d, "is moved over by a window")
    labels = tr.collapse(labels, range(keep, x.ndim))
    made: Labels = [*labels[:keep], *[None] * (x.ndim - keep)]
    return made if isinstance(out, Tensor) else [made]


def _embedding(tr: Labelling, out: Tensor, w: Tensor, ids: Tensor, *_: Any, **__: Any) -> Labels:
    labels = tr.get(w)
    tr.fix(labels[0], 0, "is indexed by data")
    tr.fix_all(ids, "is used as an index")
    return [
        *[None] * ids.ndim,
        *lead(dropped([labels[0] if labels[0] is None else None, *tr.collapse(labels, [0])[1:]], [0]), out.ndim)[
            ids.ndim :
        ],
    ]


def _embedding_bag(
    tr: Labelling, out: Sequence[Tensor], w: Tensor, ids: Tensor, *rest: Any, **options: Any
) -> list[Labels]:
    for t in operands(*rest, *options.values()):
        tr.fix_all(t, "weighs or bounds a bag")
    return [[None, _embedding(tr, w[ids], w, ids)[-1]]]


def _topk(tr: Labelling, out: Sequence[Tensor], x: Tensor, k: int, dim: int = -1, *_: Any, **__: Any) -> list[Labels]:
    labels = tr.get(x)
    dim %= x.ndim
    tr.fix(labels[dim], dim, "is ranked")
    labels = [None if d == dim else lab for d, lab in enumerate(tr.collapse(labels, [dim]))]
    return [labels, list(labels)]


def _index_put(
    tr: Labelling, out: Tensor, x: Tensor, indices: Sequence[Tensor | None], values: Tensor, *_: Any
) -> Labels:
    where = [d for d, i in enumerate(indices) if i is not None]
    if where != [0] or values.ndim != x.ndim:
        raise Unknown
    tr.fix_all(indices[0], "is used as an index")  # type: ignore[arg-type]
    mine, new = tr.get(x), tr.get(values)
    for labels in (mine, new):
        tr.fix(labels[0], 0, "is indexed by data")
    mine, new = (tr.collapse(labels, [0]) for labels in (mine, new))
    return [None, *(tr.tie(a, b, d + 1) for d, (a, b) in enumerate(zip(mine[1:], new[1:], strict=True)))]


def _index(tr: Labelling, out: Tensor, x: Tensor, indices: Sequence[Tensor | None]) -> Labels:
    where = [d for d, i in enumerate(indices) if i is not None]
    if len(where) != 1 or indices[where[0]].dtype == torch.bool:  # type: ignore[union-attr]
        raise Unknown
    dim, index = where[0], indices[where[0]]
    assert index is not None
    return _gathered(tr, x, dim, index)


def _index_select(tr: Labelling, out: Tensor, x: Tensor, dim: int, index: Tensor) -> Labels:
    return _gathered(tr, x, dim % x.ndim, index)


def _gathered(tr: Labelling, x: Tensor, dim: int, index: Tensor) -> Labels:
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


def _copy(tr: Labelling, out: Tensor, x: Tensor, source: Tensor, *_: Any, **__: Any) -> Labels:
    return _plus(tr, out, tr.get(x), source)


RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("alias", "detach", "clone", "contiguous", "_to_copy", "to", "lift_fresh", "dropout", "native_dropout"), _same),
    **dict.fromkeys(("zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"), _free),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten"), moves.reshape),
    **dict.fromkeys(("transpose", "t"), moves.transpose),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk", "unsafe_chunk"), moves.split),
    **dict.fromkeys(("sum", "mean", "amax", "amin", "logsumexp", "any", "all"), _reduce),
    **dict.fromkeys(("var", "std", "var_mean", "std_mean"), _var),
    **dict.fromkeys(("linalg_vector_norm", "norm"), _norm_p),
    **dict.fromkeys(("_softmax", "_log_softmax", "_safe_softmax", "softmax"), _softmax),
    **dict.fromkeys(("mm", "bmm"), _bmm),
    **dict.fromkeys(("addmm", "baddbmm"), _addmm),
    **dict.fromkeys(
        ("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "_batch_norm_no_update"), _batch_norm),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm"), _layer_norm),
    **{name.format(n): partial(_spatial, n) for n in (1, 2, 3) for name in (
        "max_pool{}d", "max_pool{}d_with_indices", "avg_pool{}d", "adaptive_avg_pool{}d", "_adaptive_avg_pool{}d",
        "adaptive_max_pool{}d", "mkldnn_max_pool{}d", "upsample_nearest{}d", "_upsample_nearest_exact{}d")},
    **{f"upsample_{kind}": partial(_spatial, int(kind[-2])) for kind in ("linear1d", "bilinear2d", "bicubic2d", "trilinear3d")},
    **dict.fromkeys(("channel_shuffle", "native_channel_shuffle"), moves.channel_shuffle),
    "permute": moves.permute, "unsqueeze": moves.unsqueeze, "squeeze": moves.squeeze, "expand": moves.expand,
    "select": moves.select, "slice": moves.sliced, "unbind": moves.unbind, "flip": moves.flip, "roll": moves.roll,
    "repeat": moves.repeat, "as_strided": moves.as_strided, "cat": moves.cat, "stack": moves.stack,
    "constant_pad_nd": moves.pad, "mv": _mv, "dot": _dot, "vdot": _dot,
    "convolution": _convolution, "native_group_norm": _group_norm, "embedding": _embedding, "index": _index,
    "index_select": _index_select, "copy": _copy, "_prelu_kernel": _pointwise, "glu": moves.glu, "pixel_shuffle": moves.pixel_shuffle,
    "pixel_unshuffle": moves.pixel_unshuffle, "_weight_norm_interface": _weight_norm, "_grouped_mm": _grouped_mm, "topk": _topk,
    "_embedding_bag": _embedding_bag, "index_put": _index_put,
}  # fmt: skip
FROM_NOTHING = (_free, moves.expand)  # these give labels to results of tensors that carry none


def rule_of(func: Any) -> Callable[..., Any] | None:
    """The rule of an operator; None where there is none."""
    rule = RULES.get(func.overloadpacket.__name__.removesuffix("_") if hasattr(func, "overloadpacket") else "")
    return _pointwise if rule is None and torch.Tag.pointwise in func.tags else rule
