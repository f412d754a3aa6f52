"""HeLU: ReLU in the forward pass, with another threshold in the backward pass."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.example import Example


class HeLU(nn.Module):
    """Hysteresis ReLU: zero below 0, but units less than ``alpha`` below 0 still get a gradient.

    Paper: Kimhi et al., "Hysteresis Activation Function for Efficient Inference", arXiv:2411.10573.

    Equation: ``y = max(x, 0)`` with the gradient ``dy/dx = 1`` where ``x > -alpha`` and 0 elsewhere. Inference is that of ReLU
    and costs the same. The default ``alpha`` is that of the authors' code (github.com/idankdev/helu).

    Args:
        alpha: How far below 0 the gradient reaches. Defaults to 0.05.

    Shapes: any.

    Raises:
        ValueError: A negative ``alpha``.

    Examples:
        >>> import torch
        >>> x = torch.tensor([-1.0, -0.04, 2.0], requires_grad=True)
        >>> y = HeLU()(x)
        >>> y.tolist(), torch.autograd.grad(y.sum(), x)[0].tolist()
        ([0.0, 0.0, 2.0], [0.0, 1.0, 1.0])
    """

    def __init__(self, alpha: float = 0.05) -> None:
        super().__init__()
        if alpha < 0:
            raise ValueError(f"HeLU: alpha {alpha} is negative; the backward threshold lies at -alpha, below 0.")
        self.alpha = alpha

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """ReLU."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(
                f"HeLU: input {x.dtype if isinstance(x, Tensor) else type(x).__name__}; expected a floating-point tensor."
            )
        return Hysteresis.apply(x, self.alpha) if torch.is_grad_enabled() else torch.relu(x)

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"alpha={self.alpha}"


class Hysteresis(torch.autograd.Function):
    """Rectify; let the gradient through where ``x > -alpha``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, alpha: float) -> Tensor:
        return torch.relu(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        x, ctx.alpha = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(dy, x, -ctx.alpha), None


EXAMPLE = Example(
    make=lambda: HeLU(1.0),
    inputs=lambda: (torch.randn(3, 5),),
    odd=lambda: (torch.randn(2, 1, 7),),
    axis=1,
    causal=True,
    wrong=lambda: ("text",),
    gradient="surrogate",
    twin=lambda layer: lambda x: torch.relu(x + layer.alpha),
)
