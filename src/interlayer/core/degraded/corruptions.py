"""Common corruptions of images in five levels, for judging robustness and adaptation at test time."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from interlayer.core.degraded.degradations import blurred, checked, decode, encode

# Levels 1 to 5 of ImageNet-C and of CIFAR-10-C, from the benchmark's code (hendrycks/robustness).
LEVELS: dict[str, dict[str, tuple[float, ...]]] = {
    "gaussian-noise": {"imagenet": (0.08, 0.12, 0.18, 0.26, 0.38), "cifar": (0.04, 0.06, 0.08, 0.09, 0.10)},
    "shot-noise": {"imagenet": (60, 25, 12, 5, 3), "cifar": (500, 250, 100, 75, 50)},
    "impulse-noise": {"imagenet": (0.03, 0.06, 0.09, 0.17, 0.27), "cifar": (0.01, 0.02, 0.03, 0.05, 0.07)},
    "speckle-noise": {"imagenet": (0.15, 0.20, 0.35, 0.45, 0.60), "cifar": (0.06, 0.10, 0.12, 0.16, 0.20)},
    "gaussian-blur": {"imagenet": (1, 2, 3, 4, 6), "cifar": (0.4, 0.6, 0.7, 0.8, 1.0)},
    "brightness": {"imagenet": (0.1, 0.2, 0.3, 0.4, 0.5), "cifar": (0.05, 0.10, 0.15, 0.20, 0.30)},
    "contrast": {"imagenet": (0.4, 0.3, 0.2, 0.1, 0.05), "cifar": (0.75, 0.50, 0.40, 0.30, 0.15)},
    "pixelate": {"imagenet": (0.6, 0.5, 0.4, 0.3, 0.25), "cifar": (0.95, 0.90, 0.85, 0.75, 0.65)},
    "jpeg": {"imagenet": (25, 18, 15, 10, 7), "cifar": (80, 65, 58, 50, 40)},
}
KINDS = tuple(LEVELS)


def corrupt(
    x: Float[Tensor, "B C H W"],
    kind: str,
    level: int,
    seed: int = 0,
    *,
    table: Literal["imagenet", "cifar"] = "imagenet",
) -> Float[Tensor, "B C H W"]:
    """Images under one corruption of Hendrycks and Dietterich, "Benchmarking Neural Network Robustness", arXiv:1903.12261.

    Of their kinds, those that need no photographs of frost, no generated clouds and no library of image effects: ``KINDS``. Numbers
    are those of their code. Two differences: the result is not rounded to 8 bits, except by JPEG; and pixelation averages exact
    areas, where PIL's box filter takes whole pixels.

    Args:
        x: Images from 0 to 1.
        kind: One of ``KINDS``.
        level: 1 (weak) to 5 (strong).
        seed: Decides the noise, together with the shape. Kinds without noise don't read it.
        table: Strengths as for ImageNet (224 pixels) or for CIFAR-10 (32 pixels).

    Raises:
        TypeError: No tensor of float32 or float64.
        ValueError: An unknown kind, level or table; another shape, numbers out of 0 to 1; JPEG of other than 1 or 3 channels.

    Examples:
        >>> x = torch.rand(2, 3, 16, 16)
        >>> strong, weak = corrupt(x, "contrast", 5), corrupt(x, "contrast", 1)
        >>> bool(strong.std() < weak.std())
        True
        >>> torch.equal(corrupt(x, "shot-noise", 3, seed=1), corrupt(x, "shot-noise", 3, seed=1))
        True
    """
    if kind not in LEVELS:
        raise ValueError(f"corrupt: kind {kind!r}; expected one of {', '.join(KINDS)}.")
    if level not in range(1, 6):
        raise ValueError(f"corrupt: level {level!r}; expected 1 (weak) to 5 (strong).")
    if table not in LEVELS[kind]:
        raise ValueError(f"corrupt: table {table!r}; expected 'imagenet' or 'cifar'.")
    checked("corrupt", x, inside=True)
    strength = LEVELS[kind][table][level - 1]
    return _corrupted(x, kind, strength, torch.Generator().manual_seed(seed)).clamp(0, 1)


def _corrupted(x: Tensor, kind: str, strength: float, generator: torch.Generator) -> Tensor:
    def normal() -> Tensor:
        return torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)

    match kind:
        case "gaussian-noise":
            return x + strength * normal()
        case "speckle-noise":
            return x + strength * x * normal()
        case "shot-noise":  # photons: `strength` of them are white
            return (torch.poisson(x.cpu() * strength, generator=generator) / strength).to(x.device)
        case "impulse-noise":
            hit, salt = (torch.rand(x.shape, generator=generator).to(x.device) for _ in range(2))
            return torch.where(hit < strength, (salt < 0.5).to(x.dtype), x)
        case "gaussian-blur":
            return blurred(x, strength)
        case "brightness":  # the value of HSV rises; hue and saturation stay
            value = x.amax(1, keepdim=True)
            raised = (value + strength).clamp_max(1)
            return torch.where(value > 0, x * (raised / value.clamp_min(1e-12)), raised)
        case "contrast":
            mean = x.mean((2, 3), keepdim=True)
            return mean + strength * (x - mean)
        case "pixelate":
            height, width = (max(1, int(n * strength)) for n in x.shape[2:])
            return F.interpolate(F.adaptive_avg_pool2d(x, (height, width)), x.shape[2:], mode="nearest-exact")
        case _:
            return torch.cat([decode(encode(image[None], int(strength))) for image in x]).to(x)
