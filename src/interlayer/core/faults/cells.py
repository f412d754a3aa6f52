"""Which bits of stored codes are read wrong."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Int, Integer, UInt8
from torch import Tensor

Kind = Literal["flip", "stuck"]


def positions(count: int, rate: float, generator: torch.Generator) -> Int[Tensor, " found"]:
    """Each of ``count`` places with probability ``rate``, independently of all others, in ascending order.

    Draws the gaps between them, which are geometric, so time and memory grow with ``count * rate`` and not with ``count``.

    Args:
        count: Number of places.
        rate: 0 to 1.
        generator: Of the CPU.

    Raises:
        ValueError: The rate is out of range.

    Examples:
        >>> positions(10**12, 1e-12, torch.Generator().manual_seed(0)).shape[0] < 9
        True
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"faults: rate {rate!r}; expected a probability from 0 to 1, such as 0.01 for 1% of the bits.")
    if rate in (0, 1) or not count:
        return torch.arange(count if rate else 0)
    mean = count * rate
    draws = int(mean + 2 * math.sqrt(mean) + 2)  # mostly enough; else as many again
    found, last = list[Tensor](), torch.tensor(-1)
    while last < count:
        gaps = torch.empty(draws, dtype=torch.float64).geometric_(rate, generator=generator)
        found.append(last + gaps.clamp_max(2.0**53).long().clamp_max(count + 1).cumsum(0))
        last = found[-1][-1]
    all_ = torch.cat(found)
    return all_[: int(torch.searchsorted(all_, count))]


def draw(
    codes: Integer[Tensor, "*shape"], bits: int, rate: float, generator: torch.Generator, kind: Kind = "flip"
) -> UInt8[Tensor, "*shape"]:
    """Draw faulty cells, and give the bits of each code that are read wrong.

    Args:
        codes: int8 in two's complement, or uint8.
        bits: Bits of a code that are stored, 1 to 8.
        rate: Share of faulty cells, 0 to 1.
        generator: Of the CPU; the same one gives the same cells on every device.
        kind: ``"flip"``: a faulty cell reads the opposite of what was stored. ``"stuck"``: it always reads 0 or always reads
            1, with equal probability, which is right by chance half of the time.

    Raises:
        ValueError: Codes of another type, or bits, rate or kind out of range.

    Examples:
        >>> codes = torch.zeros(1000, dtype=torch.int8)
        >>> mask = draw(codes, 8, 0.01, torch.Generator().manual_seed(0))
        >>> wrong = flip(codes, mask, 8)
        >>> int((wrong != 0).sum()), torch.equal(flip(wrong, mask, 8), codes)
        (77, True)
    """
    _check(codes, bits, kind)
    places = positions(codes.numel() * bits, rate, generator)
    held = torch.randint(2, (len(places) if kind == "stuck" else 0,), generator=generator)
    places, held = places.to(codes.device), held.to(codes.device)
    which, bit = places // bits, places % bits
    if kind == "stuck":
        wrong = (codes.reshape(-1)[which].long() >> bit) & 1 != held
        which, bit = which[wrong], bit[wrong]
    mask = torch.zeros(codes.numel(), dtype=torch.uint8, device=codes.device)
    # The places are distinct, so that the sum of their bits is their union.
    return mask.scatter_add_(0, which, (1 << bit).to(torch.uint8)).view(codes.shape)


def draw_naive(codes: Tensor, bits: int, rate: float, generator: torch.Generator, kind: Kind = "flip") -> Tensor:
    """The same, one cell after the other."""
    places = positions(codes.numel() * bits, rate, generator).tolist()
    held = torch.randint(2, (len(places),), generator=generator).tolist() if kind == "stuck" else []
    masks = [0] * codes.numel()
    for number, place in enumerate(places):
        stored = int(codes.flatten()[place // bits]) >> place % bits & 1
        if kind == "flip" or stored != held[number]:
            masks[place // bits] |= 1 << place % bits
    return torch.tensor(masks, dtype=torch.uint8).view(codes.shape)


def flip(codes: Integer[Tensor, "*shape"], mask: UInt8[Tensor, "*shape"], bits: int) -> Integer[Tensor, "*shape"]:
    """Flip the bits of codes that are set in a mask; once more gives the codes back.

    Args:
        codes: int8 in two's complement of ``bits`` bits, or uint8.
        mask: What ``draw`` gave.
        bits: Bits of a code, 1 to 8.

    Raises:
        ValueError: Codes of another type, or bits out of range.

    Examples:
        >>> flip(torch.tensor([3, -4], dtype=torch.int8), torch.tensor([4, 4], dtype=torch.uint8), 3)
        tensor([-1,  0], dtype=torch.int8)
    """
    _check(codes, bits, "flip")
    if codes.dtype == torch.uint8:
        return codes ^ mask
    sign = 1 << (bits - 1)
    low = (codes.view(torch.uint8) ^ mask) & (2**bits - 1)
    return (((low ^ sign).short()) - sign).to(torch.int8)  # the sign bit again fills the bits above it


def flip_naive(codes: Tensor, mask: Tensor, bits: int) -> Tensor:
    """The same, one code after the other."""
    found = []
    for code, m in zip(codes.flatten().tolist(), mask.flatten().tolist(), strict=True):
        low = (code % 2**bits) ^ m
        found.append(low - 2**bits if codes.dtype == torch.int8 and low >= 2 ** (bits - 1) else low)
    return torch.tensor(found, dtype=codes.dtype).view(codes.shape)


def expected(cells: int, rate: float, kind: Kind = "flip") -> float:
    """How many of ``cells`` bits are read wrong on average: ``cells rate``, or half of it where cells are stuck.

    >>> expected(8000, 0.01), expected(8000, 0.01, "stuck")
    (80.0, 40.0)
    """
    return cells * rate / (2 if kind == "stuck" else 1)


def _check(codes: Tensor, bits: int, kind: str) -> None:
    if codes.dtype not in (torch.int8, torch.uint8):
        raise ValueError(
            f"faults: codes of {codes.dtype}; expected int8 or uint8, as core.quantizer's Scaled.codes gives."
        )
    if not (isinstance(bits, int) and 1 <= bits <= 8):
        raise ValueError(f"faults: bits {bits!r}; expected an integer from 1 to 8.")
    check_kind(kind)


def check_kind(kind: str) -> None:
    """Raise ValueError if a kind is unknown."""
    if kind not in get_args(Kind):
        raise ValueError(f"faults: kind {kind!r}; expected one of {', '.join(get_args(Kind))}.")
