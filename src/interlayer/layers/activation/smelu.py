"""SmeLU and RESCU: two straight lines joined so that value and gradient are continuous."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.example import Example

# How the gradient goes from the left slope (u = 0) to the right one (u = 1): its integral from 0 to u.
BLENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda u: u.square() / 2,
    "smoothstep": lambda u: u**3 - u**4 / 2,
    "cosine": lambda u: (u - torch.sin(torch.pi * u) / torch.pi) / 2,
}


class RESCU(nn.Module):
    """Rectified smooth continuous unit: slope ``g_-`` left of ``-alpha``, ``g_+`` right of ``beta``, and a blend between.

    Paper: Shamir et al., "Smooth activations and reproducibility in deep networks", arXiv:2010.09931.

    Equation: with ``u = clamp((x + alpha) / (alpha + beta), 0, 1)``, s the blend of the gradients and S its integral,
    ``y = t + g_- (x + alpha) + (g_+ - g_-) ((alpha + beta) S(u) + max(x - beta, 0))``, so that ``dy/dx = g_- + (g_+ - g_-) s(u)``.
    Any s that rises from 0 to 1 gives continuous value and gradient; ``s(u) = u`` gives the generalised SmeLU. To
    build RESCUs from the blend of the gradients is this project's formulation, and so are the blends other than ``linear``.

    Args:
        alpha: The left joint lies at ``-alpha``.
        beta: The right joint.
        left: Slope ``g_-``.
        right: Slope ``g_+``.
        offset: Value t at the left joint.
        blend: ``linear``, ``smoothstep`` or ``cosine``.

    Shapes: any.

    Raises:
        ValueError: Joints in the wrong order, or an unknown blend.

    Examples:
        >>> import torch
        >>> RESCU(alpha=1.0, beta=1.0, blend="cosine")(torch.tensor([-2.0, 0.0, 3.0]))
        tensor([0.0000, 0.1817, 3.0000])
    """

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        left: float = 0.0,
        right: float = 1.0,
        offset: float = 0.0,
        blend: str = "linear",
    ) -> None:
        super().__init__()
        if alpha + beta <= 0:
            raise ValueError(
                f"{type(self).__name__}: joints at {-alpha} and {beta}; expected the left one below the right one."
            )
        if blend not in BLENDS:
            raise ValueError(f"{type(self).__name__}: blend {blend!r} is not one of {list(BLENDS)}.")
        self.alpha, self.beta, self.left, self.right, self.offset, self.blend = alpha, beta, left, right, offset, blend

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The joined function."""
        span = self.alpha + self.beta
        u = ((x + self.alpha) / span).clamp(0, 1)
        y = (span * BLENDS[self.blend](u) + torch.relu(x - self.beta)) * (self.right - self.left)
        return y if self.left == self.offset == 0 else y + (self.offset + self.left * (x + self.alpha))

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"alpha={self.alpha}, beta={self.beta}, left={self.left}, right={self.right}, blend={self.blend!r}"


class SmeLU(RESCU):
    """Smooth ReLU: 0 below ``-beta``, x above ``beta``, and the parabola ``(x + beta)^2 / (4 beta)`` between.

    Paper: Shamir et al., "Smooth activations and reproducibility in deep networks", arXiv:2010.09931; the generalised form
    has its own left joint and slopes (see ``RESCU``). The paper tunes beta for each task; the default of 1 is this project's.

    Args:
        beta: Half width of the smooth part.
        alpha: The left joint lies at ``-alpha``. Defaults to ``beta``.
        left: Slope on the left.
        right: Slope on the right.
        offset: Value at the left joint.

    Shapes: any.

    Raises:
        ValueError: A half width that is not above 0.

    Examples:
        >>> import torch
        >>> SmeLU(0.5)(torch.tensor([-0.5, 0.0, 0.5, 2.0]))
        tensor([0.0000, 0.1250, 0.5000, 2.0000])
    """

    def __init__(
        self,
        beta: float = 1.0,
        *,
        alpha: float | None = None,
        left: float = 0.0,
        right: float = 1.0,
        offset: float = 0.0,
    ) -> None:
        super().__init__(alpha=beta if alpha is None else alpha, beta=beta, left=left, right=right, offset=offset)

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The parabola and its lines as one product: ``t (2 z - t) / (2 span)`` with z = x + alpha, t = clamp(z, 0, span)."""
        span = self.alpha + self.beta
        z = x + self.alpha
        t = z.clamp(0, span)
        y = t * (z - t / 2) * ((self.right - self.left) / span)
        return y if self.left == self.offset == 0 else y + (self.offset + self.left * z)


EXAMPLE = Example(
    make=lambda: SmeLU(0.7, alpha=1.5, left=0.1, right=1.2, offset=-0.2),
    inputs=lambda: (torch.randn(3, 5),),
    odd=lambda: (torch.randn(2, 1, 7),),
    axis=1,
    modes={blend: lambda blend=blend: RESCU(blend=blend) for blend in BLENDS},
    causal=True,
    wrong=lambda: ("text",),
)
