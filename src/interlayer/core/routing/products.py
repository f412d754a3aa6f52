"""Products of runs of different length, each with the weight of its expert, from and to the tokens' order.

In the backward pass tokens are gathered again, and a gate's gradient is taken from the hidden features, so that only inputs and
hidden features are kept, as in a dense layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function

from interlayer.core.routing.routes import Routed


def _fused(x: Tensor, w: Tensor) -> bool:
    """Whether torch's grouped product has a kernel: it wants rows of whole 16 bytes."""
    return x.is_cuda and x.dtype == w.dtype == torch.bfloat16 and not (w.shape[-1] % 8 or w.shape[-2] % 8)


class _Product(Function):
    """``y_r = x_r w_e`` for each row r of the run of expert e."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, counts)
        if _fused(x, w):
            return F.grouped_mm(x.contiguous(), w, offs=counts.cumsum(0).int())
        out = x.new_empty(len(x), w.shape[-1])
        sizes = counts.tolist()
        for rows, weight, into in zip(x.split(sizes), w.unbind(), out.split(sizes), strict=True):
            if len(rows):
                torch.mm(rows, weight, out=into)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, w, counts = ctx.saved_tensors
        dx = _Product.apply(grad, w.mT, counts) if ctx.needs_input_grad[0] else None
        return dx, _Outer.apply(x, grad, counts) if ctx.needs_input_grad[1] else None, None


class _Outer(Function):
    """``w_e = sum_r x_r' y_r`` over the run of expert e: the weights' gradient of ``_Product``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, counts)
        out = x.new_empty(len(counts), x.shape[-1], y.shape[-1])
        if _fused(x, out):
            return F.grouped_mm(x.contiguous().mT, y.contiguous(), offs=counts.cumsum(0).int())
        sizes = counts.tolist()
        for left, right, into in zip(x.split(sizes), y.split(sizes), out.unbind(), strict=True):
            torch.mm(left.T, right, out=into)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, y, counts = ctx.saved_tensors
        return _Product.apply(y, grad.mT, counts), _Product.apply(x, grad, counts), None


class _Dispatch(Function):
    """``y_p = x_n w_e`` for the pairs p = (n, e)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, tokens, counts)
        return _Product.apply(x.index_select(0, tokens), w, counts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, w, tokens, counts = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = torch.zeros_like(x).index_add_(0, tokens, _Product.apply(grad, w.mT, counts))
        if ctx.needs_input_grad[1]:
            dw = _Outer.apply(x.index_select(0, tokens), grad, counts)
        return dx, dw, None, None


class _Combine(Function):
    """``out_n = sum_p g_p y_p w_e`` over the pairs p = (n, e) of a token."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, w: Tensor, gates: Tensor, tokens: Tensor, counts: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(y, w, gates, tokens, counts)
        parts = _Product.apply(y, w, counts).mul_(gates.to(y.dtype).unsqueeze(-1))
        return parts.new_zeros(size, w.shape[-1]).index_add_(0, tokens, parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, w, gates, tokens, counts = ctx.saved_tensors
        rows = grad.index_select(0, tokens).mul_(gates.to(y.dtype).unsqueeze(-1))
        dy = _Product.apply(rows, w.mT, counts)
        dw = _Outer.apply(y, rows, counts) if ctx.needs_input_grad[1] else None
        # The product of the ungated gradient with y, taken from the gated one. Where a gate is 0, so is its derivative in route's logits.
        dgates = (dy * y).sum(-1) / gates.masked_fill(gates == 0, 1)
        return dy, dw, dgates.to(gates.dtype), None, None, None


def _cast(*values: Tensor) -> list[Tensor]:
    """As autocast casts the arguments of a product."""
    kind = values[0].device.type
    if torch.is_autocast_enabled(kind) and values[0].dtype != torch.float64:
        return [v.to(torch.get_autocast_dtype(kind)) for v in values]
    return list(values)


def _check(who: str, rows: Tensor, count: int, weight: Tensor | None, experts: int) -> None:
    if rows.ndim != 2 or len(rows) != count:
        raise ValueError(f"{who}: rows {tuple(rows.shape)}; expected [{count}, features].")
    if weight is not None and (weight.ndim != 3 or weight.shape[:2] != (experts, rows.shape[1])):
        raise ValueError(
            f"{who}: weight {tuple(weight.shape)}; expected [{experts} experts, {rows.shape[1]} features, outputs]."
        )


@torch.compiler.disable
def grouped(x: Float[Tensor, "P D"], weight: Float[Tensor, "E D H"], counts: Int[Tensor, " E"]) -> Float[Tensor, "P H"]:
    """Multiply each expert's run of rows with its weight.

    Args:
        x: Rows sorted by expert.
        weight: One matrix for each expert.
        counts: Rows of each expert; they sum to P.

    Raises:
        ValueError: Shapes that do not fit.

    Examples:
        >>> grouped(torch.ones(3, 1), torch.tensor([[[2.0]], [[5.0]]]), torch.tensor([1, 2])).flatten()
        tensor([2., 5., 5.])
    """
    _check("grouped", x, int(counts.sum()), weight, len(counts))
    return _Product.apply(*_cast(x, weight), counts)


@torch.compiler.disable
def dispatch(x: Float[Tensor, "N D"], routed: Routed, weight: Float[Tensor, "E D H"] | None = None) -> Tensor:
    """The tokens of all pairs, sorted by expert; with a weight, times their expert's matrix: [P, D] or [P, H].

    Raises:
        ValueError: Shapes that do not fit.
    """
    _check("dispatch", x, routed.size, weight, len(routed.counts))
    if weight is None:
        return x.index_select(0, routed.tokens)
    return _Dispatch.apply(*_cast(x, weight), routed.tokens, routed.counts)


@torch.compiler.disable
def combine(y: Float[Tensor, "P H"], routed: Routed, weight: Float[Tensor, "E H D"] | None = None) -> Tensor:
    """The sum over a token's pairs, weighted by gates, of y; with a weight, of y times its expert's matrix: [N, H] or [N, D].

    A token without pairs gets zeros.

    Raises:
        ValueError: Shapes that do not fit.
    """
    _check("combine", y, len(routed.tokens), weight, len(routed.counts))
    if weight is None:
        parts = y * routed.gates.to(y.dtype).unsqueeze(-1)
        return parts.new_zeros(routed.size, y.shape[1]).index_add_(0, routed.tokens, parts)
    return _Combine.apply(*_cast(y, weight), routed.gates, routed.tokens, routed.counts, routed.size)
