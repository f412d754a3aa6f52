"""How near a restored signal is to the clean one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from interlayer.core.degraded.degradations import checked, window


def luma(image: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 1 H W"]:
    """The channel Y of ITU-R BT.601 in studio range, 16/255 to 235/255: MATLAB's ``rgb2ycbcr``, which super-resolution uses.

    Raises:
        ValueError: No three channels.

    Examples:
        >>> luma(torch.ones(1, 3, 1, 1)) * 255
        tensor([[[[235.]]]])
    """
    if image.shape[1] != 3:
        raise ValueError(f"luma: image {tuple(image.shape)}; expected [batch, 3, height, width] in RGB.")
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64).view(3, 1, 1) / 255
    return (image * weights.to(image)).sum(1, keepdim=True) + 16 / 255


def _pair(who: str, estimate: Tensor, target: Tensor, border: int, y: bool) -> tuple[Tensor, Tensor]:
    """Both images in float64, in the channels and without the border that do not count."""
    pair = [checked(f"{who} ({name})", t, inside=True) for name, t in (("estimate", estimate), ("target", target))]
    if estimate.shape != target.shape:
        raise ValueError(
            f"{who}: estimate {tuple(estimate.shape)}, target {tuple(target.shape)}; expected equal shapes."
        )
    if border < 0 or 2 * border >= min(target.shape[2:]):
        raise ValueError(
            f"{who}: border {border} for an image {tuple(target.shape)}; expected less than half of each side."
        )
    one, two = ((luma(t) if y else t).double() for t in pair)
    inner = (..., slice(border, one.shape[2] - border), slice(border, one.shape[3] - border))
    return one[inner], two[inner]


def psnr(
    estimate: Float[Tensor, "B C H W"], target: Float[Tensor, "B C H W"], *, border: int = 0, y: bool = False
) -> Float[Tensor, " B"]:
    """Peak signal-to-noise ratio of each image in dB: ``-10 log10(mean squared error)``, where white is 1.

    Super-resolution by a factor s is measured with ``border=s, y=True`` on images of 8 bits (see ``eight_bit``).

    Args:
        estimate: Restored images.
        target: Clean images.
        border: Pixels at each side that do not count.
        y: Measure the channel Y of RGB images instead of all channels; see ``luma``.

    Raises:
        TypeError: No tensors of float32 or float64.
        ValueError: Shapes that differ, numbers outside of 0 to 1 or NaN, a border that leaves nothing.

    Examples:
        >>> psnr(torch.full((1, 1, 4, 4), 0.1), torch.zeros(1, 1, 4, 4))
        tensor([20.0000], dtype=torch.float64)
    """
    one, two = _pair("psnr", estimate, target, border, y)
    return -10 * (one - two).square().mean((1, 2, 3)).log10()


def ssim(
    estimate: Float[Tensor, "B C H W"], target: Float[Tensor, "B C H W"], *, border: int = 0, y: bool = False
) -> Float[Tensor, " B"]:
    """Structural similarity of each image, at most 1 (Wang et al. 2004, doi:10.1109/TIP.2003.819861).

    Gaussian windows of 11 x 11 pixels with standard deviation 1.5 that lie inside of the image; K1 = 0.01, K2 = 0.03; the mean
    over windows and channels. Args and Raises as for ``psnr``; sides below 11 pixels are refused too.

    Examples:
        >>> image = torch.rand(1, 3, 16, 16)
        >>> ssim(image, image)
        tensor([1.], dtype=torch.float64)
    """
    one, two = _pair("ssim", estimate, target, border, y)
    if min(one.shape[2:]) < 11:
        raise ValueError(f"ssim: {tuple(one.shape[2:])} pixels are left; expected at least 11 in height and width.")
    brightness, structure = _similar(one, two)
    return (brightness * structure).mean((1, 2, 3))


def ms_ssim(
    estimate: Float[Tensor, "B C H W"], target: Float[Tensor, "B C H W"], *, scales: int = 5
) -> Float[Tensor, " B"]:
    """Structural similarity at several scales (Wang et al. 2003, doi:10.1109/ACSSC.2003.1292216), each a halving of the one before.

    Contrast and structure count at every scale, brightness at the coarsest alone; a mean over windows that is below 0 counts as 0.
    With fewer than the five scales of the paper, their exponents are scaled to a sum of one.

    Args:
        estimate: Images.
        target: What they should be.
        scales: 1 to 5. The sides must be at least 11 pixels at the coarsest: 176 for five scales, 44 for three.

    Raises:
        ValueError: As for ``psnr``; other scales, or images that are too small for them.

    Examples:
        >>> image = torch.rand(1, 1, 48, 48)
        >>> ms_ssim(image, image, scales=3)
        tensor([1.], dtype=torch.float64)
    """
    one, two = _pair("ms_ssim", estimate, target, 0, False)
    if scales not in range(1, 6) or min(one.shape[2:]) < 11 * 2 ** (scales - 1):
        raise ValueError(
            f"ms_ssim: {tuple(one.shape[2:])} pixels at {scales} scales; expected 1 to 5 scales, and at least 11 pixels at the coarsest. "
            "Take fewer scales."
        )
    weights = torch.tensor([0.0448, 0.2856, 0.3001, 0.2363, 0.1333], dtype=one.dtype)[:scales]
    found = one.new_ones(one.shape[:2])
    for scale, weight in enumerate((weights / weights.sum() if scales < 5 else weights).tolist()):
        brightness, structure = _similar(one, two)
        part = brightness * structure if scale + 1 == scales else structure
        found = found * part.mean((2, 3)).clamp_min(0) ** weight
        one, two = F.avg_pool2d(one, 2), F.avg_pool2d(two, 2)
    return found.mean(1)


def _similar(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Similarity of brightness, and of contrast and structure, for each window."""
    means = window(torch.cat([one, two, one * one, two * two, one * two], 1), 1.5, 5).chunk(5, 1)
    a, b = means[:2]
    c1, c2 = 0.01**2, 0.03**2
    spread, joint = means[2] - a * a + means[3] - b * b, means[4] - a * b
    return (2 * a * b + c1) / (a * a + b * b + c1), (2 * joint + c2) / (spread + c2)


def si_sdr(estimate: Float[Tensor, "*B T"], target: Float[Tensor, "*B T"]) -> Float[Tensor, " *B"]:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al., arXiv:1811.02508).

    ``10 log10(|a s|^2 / |a s - e|^2)`` with ``a = <e, s> / |s|^2`` for the estimate e of s. Means are not removed.

    Args:
        estimate: Restored signals.
        target: Clean signals, none of them silent.

    Raises:
        TypeError: No tensors of float32 or float64.
        ValueError: Shapes that differ, NaN or infinite numbers, a silent target.

    Examples:
        >>> s = torch.tensor([3.0, 0.0])
        >>> [round(si_sdr(torch.tensor(e), s).item(), 2) for e in ([3.0, 0.3], [30.0, 3.0])]
        [20.0, 20.0]
    """
    for name, t in (("estimate", estimate), ("target", target)):
        if not isinstance(t, Tensor) or t.dtype not in (torch.float32, torch.float64):
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(f"si_sdr: {name} of {got}; expected a tensor of torch.float32 or float64.")
        if not torch.isfinite(t).all():
            raise ValueError(f"si_sdr: the {name} has NaN or infinite numbers. Leave that signal out.")
    if estimate.shape != target.shape or not target.ndim:
        raise ValueError(
            f"si_sdr: estimate {tuple(estimate.shape)}, target {tuple(target.shape)}; expected equal [..., T]."
        )
    e, s = estimate.double(), target.double()
    power = s.square().sum(-1, keepdim=True)
    if not power.all():
        raise ValueError("si_sdr: a target is silent, to which no ratio exists. Leave that signal out.")
    scaled = (e * s).sum(-1, keepdim=True) / power * s
    return 10 * (scaled.square().sum(-1) / (scaled - e).square().sum(-1)).log10()
