"""Restoration tasks: images made worse in known ways, pairs of patches to learn from, and measures of what was restored.

Images are float tensors [B, C, H, W] of numbers from 0 (black) to 1 (white).

- ``shrink``, ``enlarge``: bicubic resampling as super-resolution uses it; ``noisy``, ``blurred``; ``encode`` and ``decode``:
  real JPEG bytes; ``eight_bit``: what a file would hold.
- ``corrupt``: noise, blur, contrast and others in five levels, as robustness is measured.
- ``Pairs`` cuts the same patches from images and from their degraded versions.
- ``psnr``, ``ssim``, ``ms_ssim`` and, for sound, ``si_sdr`` give one number for each item of the batch.
"""

from interlayer.core.degraded.corruptions import KINDS, corrupt
from interlayer.core.degraded.degradations import (
    blurred,
    decode,
    eight_bit,
    encode,
    enlarge,
    modcrop,
    noisy,
    shrink,
    to_tensor,
)
from interlayer.core.degraded.measures import luma, ms_ssim, psnr, si_sdr, ssim
from interlayer.core.degraded.pairs import Pairs

__all__ = [
    "KINDS",
    "Pairs",
    "blurred",
    "corrupt",
    "decode",
    "eight_bit",
    "encode",
    "enlarge",
    "luma",
    "modcrop",
    "ms_ssim",
    "noisy",
    "psnr",
    "shrink",
    "si_sdr",
    "ssim",
    "to_tensor",
]
