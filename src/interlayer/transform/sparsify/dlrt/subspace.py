"""A layer whose weight is a product of three factors, with orthonormal bases."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.factored import CONVOLUTIONS

LEAST = 2  # rank below which truncation never goes


class _Through(torch.autograd.Function):
    """``seen`` and a bias applied to x. Backwards, ``own`` stands in the place of ``seen``; the bias is a constant."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, seen: Tensor, own: Tensor, conv: tuple[Any, ...] | None, bias: Tensor | None = None
    ) -> Tensor:
        ctx.save_for_backward(x, own)
        ctx.conv = conv
        return _apply(x, seen, conv, bias)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        x, own = ctx.saved_tensors
        needs, seen_needs, own_needs = ctx.needs_input_grad[:3]
        if ctx.conv is None:
            back = d @ own if needs else None
            weight = d.flatten(0, -2).T @ x.flatten(0, -2)
        else:
            dims = [0] * (x.ndim - 2)
            back, weight, _ = torch.ops.aten.convolution_backward(
                d, x, own, None, *ctx.conv, False, dims, 1, [needs, True, False]
            )
        return back, weight if seen_needs else None, weight if own_needs else None, None, None


def _apply(x: Tensor, weight: Tensor, conv: tuple[Any, ...] | None, bias: Tensor | None = None) -> Tensor:
    if conv is None:
        return F.linear(x, weight, bias)
    return torch.ops.aten.convolution(x, weight, bias, *conv, False, [0] * (x.ndim - 2), 1)


class Subspace(nn.Module):
    """A linear map or a convolution with the weight ``U S V^T``, where U and V have orthonormal columns.

    No weight of full size is formed. A convolution's weight counts as a matrix [out, in * kernel].

    Args:
        layer: What it replaces; its weight is projected onto its ``rank`` largest singular values.
        rank: The rank at the start.

    Shapes: as the layer's.
    """

    U: Float[Tensor, "out rank"]
    V: Float[Tensor, "inputs rank"]
    around: Any

    def __init__(self, layer: nn.Module, rank: int) -> None:
        super().__init__()
        weight: Any = layer.weight
        bias: Any = layer.bias
        u, s, v = torch.linalg.svd(weight.detach().flatten(1).to(exact(weight)), full_matrices=False)
        self.register_buffer("U", u[:, :rank].to(weight.dtype).contiguous())
        self.register_buffer("V", v[:rank].T.to(weight.dtype).contiguous())
        self.S = nn.Parameter(s[:rank].diag().to(weight.dtype))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.shape = tuple(weight.shape)
        self.open: list[nn.Parameter] = []  # K and L, while their gradients are wanted
        self.conv, self.around = None, None
        if isinstance(layer, CONVOLUTIONS):
            settings: Any = (layer.stride, layer.padding, layer.dilation)
            if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
                kind = layer.padding_mode.replace("zeros", "constant")
                self.around = (layer._reversed_padding_repeated_twice, kind)
                settings = (layer.stride, (0,) * len(layer.stride), layer.dilation)
            self.conv = settings

    @property
    def rank(self) -> int:
        """The rank."""
        return self.S.shape[0]

    @property
    def most(self) -> int:
        """The largest rank that truncation leaves: half of the weight's smaller side, as the authors have it."""
        return max(LEAST, min(len(self.U), len(self.V)) // 2)

    def forward(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        """Apply the map."""
        width = x.shape[1] if self.conv and x.ndim == len(self.shape) else x.shape[-1]
        if width != self.shape[1] or (x.ndim != len(self.shape) if self.conv else x.ndim < 2):
            raise ValueError(f"Subspace: input {tuple(x.shape)}; expected {self.shape[1]} features, in batches.")
        if self.around:
            x = F.pad(x, *self.around)
        factors = [self.V, self.U, *(self.open or [self.S]), *([] if self.bias is None else [self.bias])]
        if torch.is_autocast_enabled(x.device.type):
            low = torch.get_autocast_dtype(x.device.type)
            x, factors = x.to(low), [f.to(low) for f in factors]
        v, u, *free = factors
        bias = None if self.bias is None else free.pop()
        kernel, one = (-1, *self.shape[1:]), (1,) * len(self.shape[2:])
        point = (one, (0,) * len(one), one) if self.conv else None
        u = u.view(*u.shape, *one)
        if self.open:
            k, lt = free
            inner = _Through.apply(x, v.T.reshape(kernel), lt.T.reshape(kernel), self.conv)
            return _Through.apply(inner, k.view(*k.shape, *one), u, point, bias)
        (s,) = free
        inner = _apply(_apply(x, v.T.reshape(kernel), self.conv), s.view(*s.shape, *one), point)
        return _apply(inner, u, point, bias)

    @property
    def weight(self) -> Tensor:
        """The whole weight, computed when it is asked for; code that reads it for its type or size finds it."""
        return (self.U @ self.S @ self.V.T).detach().view(self.shape)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in ("U", "S", "V"):  # the rank of what is loaded may be another
            if (value := state_dict.get(prefix + name)) is not None and value.ndim == 2:
                own = getattr(self, name)
                own.data = own.data.new_empty(value.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)


def exact(x: Tensor) -> torch.dtype:
    """The type in which factors are computed."""
    return torch.promote_types(x.dtype, torch.float32)
