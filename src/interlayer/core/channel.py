"""Wireless channels: complex symbols of limited power, noise and fading."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Fading = Literal["none", "block", "fast"]


def checked_snr(who: str, snr: Tensor, count: int) -> Tensor:
    """The signal-to-noise ratios in dB, one for each item.

    Raises:
        ValueError: Another shape, or a number that is not finite.
    """
    if not isinstance(snr, Tensor) or not snr.is_floating_point() or snr.shape != (count,):
        got = tuple(snr.shape) if isinstance(snr, Tensor) else type(snr).__name__
        raise ValueError(f"{who}: snr of {got}; expected one floating-point number in dB for each of {count} items.")
    return snr


def normalised(x: Float[Tensor, "B ..."], power: float = 1.0) -> Float[Tensor, "B ..."]:
    """Scale each item so that its complex symbols have this mean power; two real numbers are one symbol.

    Raises:
        ValueError: An odd number of real numbers, or a power that is not above 0.

    Examples:
        >>> normalised(torch.tensor([[3.0, 4.0]]), power=25.0)
        tensor([[3., 4.]])
    """
    if not power > 0:
        raise ValueError(f"normalised: power {power}; expected above 0.")
    flat = x.flatten(1)
    if flat.shape[1] % 2:
        raise ValueError(
            f"normalised: {flat.shape[1]} real numbers in an item; expected an even number, two for a symbol."
        )
    mean = flat.square().mean(1).clamp_min(torch.finfo(x.dtype).tiny)
    return x * (power / 2 / mean).sqrt().view(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class Channel:
    """``y = h x + n`` for complex symbols x of mean power 1, noise n of power ``10^(-snr / 10)`` and gains h of mean power 1.

    Real tensors in and out: the first half of an item's numbers are real parts, the second half imaginary parts. Differentiable.

    Args:
        fading: ``"none"``: h = 1 (AWGN). ``"block"``: one gain for each item. ``"fast"``: one for each symbol.
        line: Rician factor: power of the direct path over that of the scattered ones, as a plain ratio. 0 is Rayleigh fading.
        known: Whether the receiver knows h and divides by it (zero forcing). Without, it gets y as it is.

    Raises:
        ValueError: Unknown fading, or a factor below 0.

    Examples:
        >>> x = normalised(torch.randn(4, 2, 8, 8))
        >>> Channel()(x, torch.full((4,), 10.0)).shape
        torch.Size([4, 2, 8, 8])
        >>> bool(((Channel(fading="fast")(x, torch.full((4,), 100.0)) - x).abs() < 0.1).all())
        True
    """

    fading: Fading = "none"
    line: float = 0.0
    known: bool = True

    def __post_init__(self) -> None:
        if self.fading not in get_args(Fading):
            raise ValueError(f"Channel: fading {self.fading!r}; expected one of {', '.join(get_args(Fading))}.")
        if not 0 <= self.line < math.inf:
            raise ValueError(f"Channel: line {self.line}; expected 0 (Rayleigh) or more.")
        if self.fading == "none" and self.line:
            raise ValueError(
                f"Channel: line {self.line} without fading has no effect; expected fading='block' or 'fast'."
            )

    def __call__(
        self,
        x: Float[Tensor, "B ..."],
        snr: Float[Tensor, " B"],
        noise: Float[Tensor, "B ..."] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "B ..."]:
        """What arrives.

        Args:
            x: Symbols of mean power 1.
            snr: Of each item, in dB.
            noise: Standard normal numbers in the shape of x, for the noise. Drawn if not given.
            generator: What draws. Defaults to torch's own.

        Raises:
            ValueError: An odd number of real numbers in an item, or ratios or noise of other shapes.
        """
        snr = checked_snr("Channel", snr, x.shape[0])
        if math.prod(x.shape[1:]) % 2:
            raise ValueError(f"Channel: {tuple(x.shape)}; expected an even number of real numbers in an item.")
        if noise is None:
            noise = _normal(x.shape, x, generator)
        elif noise.shape != x.shape:
            raise ValueError(
                f"Channel: noise {tuple(noise.shape)} for symbols {tuple(x.shape)}; expected equal shapes."
            )
        scale = (0.5 * 10 ** (-snr / 10)).sqrt().to(x).view(-1, *[1] * (x.ndim - 1))
        if self.fading == "none":
            return x + scale * noise
        real, imaginary = x.flatten(1).chunk(2, 1)
        own = (x.shape[0], real.shape[1] if self.fading == "fast" else 1)
        direct, scattered = (self.line / (1 + self.line)) ** 0.5, (0.5 / (1 + self.line)) ** 0.5
        a, b = (scattered * _normal(own, x, generator) for _ in range(2))
        a = a + direct
        n, m = (scale * noise).flatten(1).chunk(2, 1)
        real, imaginary = a * real - b * imaginary + n, a * imaginary + b * real + m
        if self.known:
            power = (a * a + b * b).clamp_min(torch.finfo(x.dtype).tiny)
            real, imaginary = (a * real + b * imaginary) / power, (a * imaginary - b * real) / power
        return torch.cat((real, imaginary), 1).view(x.shape)

    def capacity(self, snr: float) -> float:
        """Bits that a symbol can carry at an SNR in dB, over long codes; with fading, on average over the gains.

        Raises:
            ValueError: A Rician factor other than 0, for which there is no closed form here.

        Examples:
            >>> Channel().capacity(0.0), round(Channel(fading="fast").capacity(0.0), 4)
            (1.0, 0.8603)
        """
        ratio = 10 ** (snr / 10)
        if self.fading == "none":
            return math.log2(1 + ratio)
        if self.line:
            raise ValueError(f"Channel.capacity: line {self.line}; expected 0. Average log2(1 + |h|^2 snr) over gains.")
        from scipy.special import exp1

        return float(math.exp(1 / ratio) * exp1(1 / ratio) / math.log(2))


def _normal(shape: torch.Size | tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
