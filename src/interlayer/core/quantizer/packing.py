"""Codes of 1 to 8 bits in bytes, and products of codes bit by bit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Int, Integer, UInt8
from torch import Tensor

# Masks for counting the ones of a 64-bit word in parallel: pairs, fours, bytes, and their sum in the highest byte.
_PAIRS, _FOURS, _BYTES, _ONES = 0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F, 0x0101010101010101


def stored(bits: int) -> int:
    """The bits that a code takes in memory: the next of 1, 2, 4 and 8."""
    return next(n for n in (1, 2, 4, 8) if n >= bits)


def pack(codes: Integer[Tensor, "*rows n"], bits: int) -> UInt8[Tensor, "*rows m"]:
    """Put codes of 0 to ``2^bits - 1`` into bytes along the last axis, the first in the lowest bits.

    Args:
        codes: Integers.
        bits: 1 to 8. A code takes 1, 2, 4 or 8 bits; ``m`` is n times that over 8, rounded up.

    Raises:
        ValueError: A code is out of range.

    Examples:
        >>> pack(torch.tensor([1, 2, 3]), 4)
        tensor([33,  3], dtype=torch.uint8)
    """
    if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) < 2**bits):
        raise ValueError(
            f"pack: codes from {int(codes.min())} to {int(codes.max())}; expected 0 to {2**bits - 1} for {bits} bits."
        )
    width = stored(bits)
    each = 8 // width
    filled = F.pad(codes.to(torch.uint8), (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each))
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=codes.device)
    return (filled << shifts).sum(-1, dtype=torch.uint8)


def unpack(packed: UInt8[Tensor, "*rows m"], bits: int, count: int) -> UInt8[Tensor, "*rows n"]:
    """The first ``count`` codes of each row.

    >>> unpack(pack(torch.tensor([1, 2, 3]), 4), 4, 3)
    tensor([1, 2, 3], dtype=torch.uint8)
    """
    width = stored(bits)
    if width == 8:
        return packed[..., :count]
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & (2**width - 1)).flatten(-2)[..., :count]


def planes(codes: Integer[Tensor, "*rows n"], bits: int) -> Int[Tensor, "*rows bits words"]:
    """The bits of codes as 64-bit words, bit by bit: word j of plane k holds bit k of codes 64 j to 64 j + 63."""
    places = torch.arange(bits, device=codes.device)[:, None]
    filled = F.pad(codes.long(), (0, -codes.shape[-1] % 64))
    each = ((filled[..., None, :] >> places) & 1).unflatten(-1, (-1, 64))
    return (each << torch.arange(64, device=codes.device)).sum(-1)


def ones(words: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """How many bits of each 64-bit word are set.

    >>> ones(torch.tensor([0, 7, -1]))
    tensor([ 0,  3, 64])
    """
    words = words - ((words >> 1) & _PAIRS)
    words = (words & _FOURS) + ((words >> 2) & _FOURS)
    return (((words + (words >> 4)) & _BYTES) * _ONES) >> 56


def bit_product(a: Int[Tensor, "*rows k words"], b: Int[Tensor, "*columns m words"]) -> Int[Tensor, "..."]:
    """``sum_i a_i b_i`` of integers given as bit planes: ``sum_k sum_m 2^(k+m) bitcount(and(a_k, b_m))``.

    Cost: one ``and`` and one bit count of every word of each plane of ``a`` with each plane of ``b``.

    Args:
        a: What ``planes`` gave.
        b: The same; its leading axes broadcast against those of ``a``.

    Examples:
        >>> a, b = torch.tensor([1, 2, 3]), torch.tensor([3, 0, 1])
        >>> bit_product(planes(a, 2), planes(b, 2)), (a * b).sum()
        (tensor(6), tensor(6))
    """
    found: Tensor | int = 0
    for k in range(a.shape[-2]):
        for m in range(b.shape[-2]):
            found = found + (ones(a[..., k, :] & b[..., m, :]).sum(-1) << (k + m))
    assert isinstance(found, Tensor)
    return found
