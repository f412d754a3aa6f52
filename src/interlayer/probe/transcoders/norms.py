"""Norms with their scale held fixed, which makes them linear."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass
class Frozen:
    """A norm with its scale held fixed: ``norm(x) = gain * centre(x) * scale(x) + bias``; without a norm the identity."""

    gain: Float[Tensor, " D"]
    bias: Float[Tensor, " D"]
    centred: bool

    def centre(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Subtract the mean where the norm does."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def scale(self, x: Float[Tensor, "*B D"], y: Float[Tensor, "*B D"]) -> Float[Tensor, "*B"]:
        """The factor at ``x``, given that the norm's output is ``y``."""
        z = self.gain * self.centre(x)
        return ((y - self.bias) * z).sum(-1) / z.square().sum(-1).clamp(min=1e-12)

    def pull(self, v: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """The direction u before the norm with ``v . (norm(x) - bias) = scale u . x``."""
        return self.centre(self.gain * v)


def freeze(norm: nn.Module | None, like: Float[Tensor, "*B D"]) -> Frozen:
    """Read gain, bias and centring of a LayerNorm, an RMSNorm or an identity off two of its outputs."""
    kind = like if norm is None else next(norm.parameters(), like)
    ones = torch.ones(1, 1, like.shape[-1], dtype=kind.dtype, device=like.device)
    zeros = torch.zeros_like(ones)
    if norm is None:
        return Frozen(ones.reshape(-1), zeros.reshape(-1), False)
    bias, level = (norm(x).reshape(-1).float() for x in (zeros, ones))
    if not torch.allclose(bias, level, atol=1e-4):
        return Frozen(level - bias, bias, False)
    weight = getattr(norm, "weight", None)
    return Frozen(torch.ones_like(bias) if weight is None else weight.detach().float(), bias, True)
