"""RMSNorm: normalisation by the root mean square, without centring."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.example import Example


class RMSNorm(nn.Module):
    """Divide each vector by its root mean square, or by that of its first part, and scale it by a learned gain.

    Paper: Zhang and Sennrich, "Root Mean Square Layer Normalization", arXiv:1910.07467.

    Equation (section 3): ``y_i = g_i x_i / RMS(x)`` with ``RMS(x) = sqrt(1/k sum_{j<=k} x_j^2 + eps)``, ``k = n``, or
    ``k = ceil(p n)`` for the partial norm (the authors' code rounds down). The paper's equation has no eps and its code
    adds 1e-8 to the root itself; here eps stands under the root, as in torch.

    While the mean square is far above eps, scaling ``x``, or the weights that made it, by a positive number changes
    nothing. Vectors with a mean square near or below eps come out shorter: at ``x`` of about 1e-3 and the default 1e-6
    by ``sqrt(2)``. A shift of ``x`` always changes the result.

    Args:
        width: Features D.
        partial: Share p of the features, from the first, that the statistic is taken from.
        eps: Added to the mean square. None is the machine epsilon of the type that it is computed in: 1.2e-7 for float32
            and the half types, 2.2e-16 for float64.
        bias: Whether to add a learned bias (the paper's has none).

    Shapes: [..., D] to [..., D], in the type of the input. bfloat16 and float16 are computed in float32.

    Raises:
        ValueError: ``partial`` outside (0, 1], ``width`` below 1, or an input whose last size is not ``width``.

    Examples:
        >>> import torch
        >>> norm = RMSNorm(64, partial=0.5)
        >>> x = torch.randn(3, 64)
        >>> torch.allclose(norm(100 * x), norm(x), atol=1e-5)
        True
    """

    def __init__(self, width: int, *, partial: float = 1.0, eps: float | None = 1e-6, bias: bool = False) -> None:
        super().__init__()
        if width < 1 or not 0 < partial <= 1:
            raise ValueError(
                f"RMSNorm: width {width} and partial {partial}; expected a width of at least 1 and a share in (0, 1]."
            )
        self.width, self.partial, self.eps = width, partial, eps
        self.first = math.ceil(partial * width - 1e-9)  # 1e-9: 0.07 * 100 is 7.000000000000001
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Normalise the last dimension."""
        if x.ndim == 0 or x.shape[-1] != self.width:
            raise ValueError(
                f"RMSNorm: input {tuple(x.shape)}; expected [..., {self.width}], the width it was built with."
            )
        wide = torch.promote_types(x.dtype, torch.float32)
        eps = torch.finfo(wide).eps if self.eps is None else self.eps
        if torch.compiler.is_compiling() or self.first < self.width or x.dtype != self.weight.dtype or x.dtype != wide:
            y = rms_norm_naive(x.to(wide), self.weight.to(wide), self.first, eps)  # a compiler fuses it
        elif x.device.type == "cpu":
            y, _ = RMS.apply(x, self.weight, eps)
        else:
            y = F.rms_norm(x, (self.width,), self.weight, eps)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"{self.width}, partial={self.partial}, eps={self.eps}, bias={self.bias is not None}"


def rms_norm_naive(x: Tensor, weight: Tensor, first: int, eps: float) -> Tensor:
    """The equation as the paper writes it."""
    return x * torch.rsqrt(x[..., :first].square().mean(-1, keepdim=True) + eps) * weight


class RMS(torch.autograd.Function):
    """``rms_norm_naive`` over all features on a CPU in eager mode, where torch has no fused kernel of its own.

    The backward pass uses that of the layer norm, with r for the inverse standard deviation and 0 for the mean: ``dw`` is exact,
    and ``dx`` lacks ``r mean(w dy)``, which the layer norm's mean subtracts and which is added again.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        rows_ND = x.reshape(-1, x.shape[-1])
        r_N1 = torch.linalg.vector_norm(rows_ND, dim=1, keepdim=True)
        r_N1.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
        return torch.mul(rows_ND, r_N1).mul_(weight).view(x.shape), r_N1

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, ctx.eps = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, weight, output[1])
        ctx.save_for_forward(x, weight, output[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r_N1 = ctx.saved_tensors
        n = x.shape[-1]
        if torch.is_grad_enabled():  # for second derivatives: the same with differentiable operations
            r = torch.rsqrt(x.square().mean(-1, keepdim=True) + ctx.eps)
            dx = r * weight * dy - x * (r**3 * (dy * weight * x).sum(-1, keepdim=True) / n)
            return dx, (r * x * dy).reshape(-1, n).sum(0), None
        rows_ND, dy_ND = x.reshape(-1, n), dy.reshape(-1, n)
        dx_ND, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            dy_ND, rows_ND, [n], torch.zeros_like(r_N1), r_N1, weight, None, [True, True, False]
        )
        dx_ND.add_(torch.mv(dy_ND, weight).unsqueeze_(1).mul_(r_N1).mul_(1 / n))
        return dx_ND.view(x.shape), dweight, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, dweight: Tensor, _: None) -> tuple[Tensor, None]:
        x, weight, r_N1 = ctx.saved_tensors
        r = r_N1.view(*x.shape[:-1], 1)
        change = dx - x * (r.square() * (x * dx).mean(-1, keepdim=True))
        return r * (change * weight + x * dweight), None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, weight: Tensor, eps: float) -> Any:
        """Rows are independent; with batched weights, use the equation."""
        at = in_dims[0]
        x = x.movedim(at, 0) if at is not None else x.expand(info.batch_size, *x.shape)
        if in_dims[1] is None:
            return RMS.apply(x, weight, eps), (0, None)
        weight = weight.movedim(in_dims[1], 0)
        y = rms_norm_naive(x, weight.reshape(len(weight), *[1] * (x.ndim - 2), -1), x.shape[-1], eps)
        return (y, x.new_empty(0, 1)), (0, None)


EXAMPLE = Example(
    make=lambda: RMSNorm(12),
    inputs=lambda: (torch.randn(3, 5, 12),),
    odd=lambda: (torch.randn(2, 7, 1, 12),),
    axis=1,
    causal=True,
    modes={"partial": lambda: RMSNorm(12, partial=0.5, bias=True)},
)
