"""Blocks of learned image compression: divisive normalisation, residual blocks that change the resolution, attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

OFFSET = 2.0**-18  # added in squares, so that gradients at zero are finite
LEAST = 1e-6  # of beta


class AtLeast(torch.autograd.Function):
    """``max(x, bound)``, whose gradient also passes below the bound where it would lift x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bound: float) -> Tensor:
        return x.clamp_min(bound)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.bound = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.where((x >= ctx.bound) | (grad < 0), grad, 0.0), None


class GDN(nn.Module):
    """Generalised divisive normalisation, ``y_i = x_i / sqrt(beta_i + sum_j gamma_ij x_j^2)`` (Ballé et al., arXiv:1511.06281).

    Args:
        width: Features.
        inverse: Multiply by the root instead.

    Examples:
        >>> GDN(1)(torch.full((1, 1, 1, 1), 10.0)).item()  # 10 / sqrt(1 + 0.1 * 100)
        3.015113...
    """

    def __init__(self, width: int, *, inverse: bool = False) -> None:
        super().__init__()
        self.inverse = inverse
        self.beta = nn.Parameter((torch.ones(width) + OFFSET**2).sqrt())
        self.gamma = nn.Parameter((0.1 * torch.eye(width) + OFFSET**2).sqrt())

    def forward(self, x: Float[Tensor, "B N H W"]) -> Float[Tensor, "B N H W"]:
        """Normalise."""
        beta = AtLeast.apply(self.beta, (LEAST + OFFSET**2) ** 0.5).square() - OFFSET**2
        gamma = AtLeast.apply(self.gamma, OFFSET).square() - OFFSET**2
        norm = F.conv2d(x.square(), gamma[..., None, None], beta)
        return x * (norm.sqrt() if self.inverse else norm.rsqrt())


class Residual(nn.Module):
    """Two 3x3 convolutions with a shortcut; with a stride the second is normalised, without it is activated.

    Args:
        ins: Features that come in.
        outs: Features that go out.
        stride: 2 halves the sides.
    """

    def __init__(self, ins: int, outs: int, *, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.conv1, self.conv2 = nn.Conv2d(ins, outs, 3, stride, 1), nn.Conv2d(outs, outs, 3, padding=1)
        self.norm = GDN(outs) if stride > 1 else nn.LeakyReLU()
        self.skip = nn.Conv2d(ins, outs, 1, stride) if stride > 1 or ins != outs else nn.Identity()

    def forward(self, x: Float[Tensor, "B N H W"]) -> Float[Tensor, "B M h w"]:
        """Add to the shortcut."""
        return self.norm(self.conv2(F.leaky_relu(self.conv1(x)))) + self.skip(x)


class Up(nn.Module):
    """A residual block that doubles the sides by sub-pixel convolutions.

    Args:
        ins: Features that come in.
        outs: Features that go out.
    """

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.up, self.skip = nn.Conv2d(ins, 4 * outs, 3, padding=1), nn.Conv2d(ins, 4 * outs, 3, padding=1)
        self.conv, self.norm = nn.Conv2d(outs, outs, 3, padding=1), GDN(outs, inverse=True)

    def forward(self, x: Float[Tensor, "B N h w"]) -> Float[Tensor, "B M H W"]:
        """Add to the shortcut."""
        return self.norm(self.conv(F.leaky_relu(shuffled(self.up(x))))) + shuffled(self.skip(x))


def shuffled(x: Float[Tensor, "B N h w"]) -> Float[Tensor, "B M H W"]:
    """``pixel_shuffle`` by 2, whose backward pass also takes empty batches.

    >>> x = torch.randn(2, 8, 3, 5)
    >>> torch.equal(shuffled(x), F.pixel_shuffle(x, 2))
    True
    """
    b, n, h, w = x.shape
    return x.view(b, n // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, n // 4, 2 * h, 2 * w)


class Unit(nn.Module):
    """A bottleneck of three convolutions with a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.body = nn.Sequential(
            nn.Conv2d(width, half, 1),
            nn.ReLU(),
            nn.Conv2d(half, half, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(half, width, 1),
        )

    def forward(self, x: Float[Tensor, "B N H W"]) -> Float[Tensor, "B N H W"]:
        """Add to the shortcut, then rectify."""
        return F.relu(x + self.body(x))


class AttentionBlock(nn.Module):
    """``x + a(x) sigmoid(b(x))``: attention without comparing places (Cheng et al., arXiv:2001.01568).

    Args:
        width: Features, an even number.
        units: Bottlenecks in each of a and b.
    """

    def __init__(self, width: int, units: int = 3) -> None:
        super().__init__()
        self.value = nn.Sequential(*(Unit(width) for _ in range(units)))
        self.gate = nn.Sequential(*(Unit(width) for _ in range(units)), nn.Conv2d(width, width, 1))

    def forward(self, x: Float[Tensor, "B N H W"]) -> Float[Tensor, "B N H W"]:
        """Attend."""
        return x + self.value(x) * self.gate(x).sigmoid()
