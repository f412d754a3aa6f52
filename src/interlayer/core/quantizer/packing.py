"""Codes of 1 to 8 bits in bytes, and products of codes bit by bit."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Integer, UInt8
from torch import Tensor

TERNARY = 1.58  # the bits of codes 0, 1 and 2, of which five take a byte: log2(3), rounded

# Masks for counting the ones of a 64-bit word in parallel: pairs, fours, bytes, and their sum in the highest byte.
_PAIRS, _FOURS, _BYTES, _ONES = 0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F, 0x0101010101010101


def stored(bits: int) -> int:
    """The bits that a code takes in memory: the next of 1, 2, 4 and 8."""
    return next(n for n in (1, 2, 4, 8) if n >= bits)


def each(bits: float) -> int:
    """How many codes are in a byte.

    Examples:
        >>> [each(bits) for bits in (1, 1.58, 2, 3, 4, 8)]
        [8, 5, 4, 2, 2, 1]
    """
    return 5 if bits == TERNARY else 8 // stored(int(bits))


def digits(bits: float, device: torch.device | None = None) -> Integer[Tensor, " codes"]:
    """What each code of a byte counts: powers of 3 for three levels, else of 2."""
    base = 3 if bits == TERNARY else 2 ** stored(int(bits))
    return base ** torch.arange(each(bits), device=device)


def pack(codes: Integer[Tensor, "*rows n"], bits: float) -> UInt8[Tensor, "*rows m"]:
    """Put codes of 0 to ``2^bits - 1`` into bytes along the last axis, the first in the lowest bits.

    Args:
        codes: Integers.
        bits: 1 to 8. A code takes 1, 2, 4 or 8 bits; ``m`` is n times that over 8, rounded up. 1.58 packs codes 0 to 2, five in
            a byte, as a number to base 3.

    Raises:
        ValueError: A code is out of range.

    Examples:
        >>> pack(torch.tensor([1, 2, 3]), 4), pack(torch.tensor([2, 2, 2, 2, 2, 1]), 1.58)
        (tensor([33,  3], dtype=torch.uint8), tensor([242,   1], dtype=torch.uint8))
    """
    most = 2 if bits == TERNARY else 2 ** int(bits) - 1
    if codes.numel() and not (int(codes.min()) >= 0 and int(codes.max()) <= most):
        raise ValueError(
            f"pack: codes from {int(codes.min())} to {int(codes.max())}; expected 0 to {most} for {bits} bits."
        )
    filled = F.pad(codes.to(torch.uint8), (0, -codes.shape[-1] % each(bits))).unflatten(-1, (-1, each(bits)))
    return (filled * digits(bits, codes.device).to(torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack(packed: UInt8[Tensor, "*rows m"], bits: float, count: int) -> UInt8[Tensor, "*rows n"]:
    """The first ``count`` codes of each row.

    >>> unpack(pack(torch.tensor([1, 2, 3]), 4), 4, 3)
    tensor([1, 2, 3], dtype=torch.uint8)
    """
    if each(bits) == 1:
        return packed[..., :count]
    if each(bits) == 2:
        return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., :count]
    return F.embedding(packed.int(), byte_codes(bits, packed.device)).flatten(-2)[..., :count]


def byte_codes(bits: float, device: torch.device | None = None) -> UInt8[Tensor, "256 codes"]:
    """The codes that each value of a byte stands for."""
    base = 3 if bits == TERNARY else 2 ** stored(int(bits))
    values = torch.arange(256, device=device)[:, None]
    return (values // digits(bits, device) % base).to(torch.uint8)


def table_product(x: Float[Tensor, "rows n"], packed: UInt8[Tensor, "out m"], bits: float) -> Float[Tensor, "rows out"]:
    """``sum_i x_i c_i`` of floats with packed codes, without unpacking any: for each byte and each of its 256 values, the sum over
    its codes is computed once for all outputs, and each output adds up those of its bytes.

    Cost: ``256 m`` multiplications with as many codes as a byte holds, and ``m`` additions for each output and row. It pays for few
    rows and many outputs. Memory: ``256 m`` floats for each row, and an index for each byte.

    Args:
        x: Inputs.
        packed: What ``pack`` gave.
        bits: As for ``pack``.

    Examples:
        >>> codes = torch.tensor([[0, 1, 2], [2, 2, 1]])
        >>> table_product(torch.tensor([[1.0, 10.0, 100.0]]), pack(codes, 1.58), 1.58)
        tensor([[210., 122.]])
    """
    codes = byte_codes(bits, x.device).to(x)
    parts = F.pad(x, (0, packed.shape[1] * each(bits) - x.shape[1])).unflatten(1, (-1, each(bits)))
    sums = torch.einsum("rbc,vc->bvr", parts, codes).flatten().view(-1, len(x))
    first = 256 * torch.arange(packed.shape[1], dtype=torch.int32, device=x.device)
    return F.embedding_bag(packed.int() + first, sums, mode="sum").T


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
