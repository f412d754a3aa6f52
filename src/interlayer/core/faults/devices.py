"""Resistive cells that hold codes: one device for each bit, which may be stuck, and whose resistance is its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from interlayer.core.faults.cells import positions

Stuck = Literal["zero", "one", "both"]
LOW_RESISTANCE, HIGH_RESISTANCE = (
    3.99e2,
    5.74e8,
)  # ohm; means of the two states in the authors' public code of fault-qat


@dataclass(frozen=True)
class Devices:
    """The cells of one tensor of codes: a code is read as ``sum_b 2^b g_b``, where ``g_b`` is what the device of bit b conducts.

    A device conducts ``one`` where its bit is 1 and ``zero`` where it is 0, relative to a nominal device that is on. Ideal devices
    conduct 1 and 0, and a code is read as itself. A stuck device conducts the same whatever is written.

    Cost: two floats and a byte for each bit; a read is one pass for each bit.

    Args:
        one: [bits, *shape].
        zero: [bits, *shape].
        held: The bit that a device always reads, or -1 where it works, int8 [bits, *shape].

    Examples:
        >>> cells = draw_devices((3,), bits=2, stuck=0.5, seed=2)
        >>> cells.held.tolist(), cells.read(torch.tensor([3, 3, 3])).round().tolist()
        ([[1, -1, -1], [-1, 1, 0]], [3.0, 3.0, 1.0])
    """

    one: Tensor
    zero: Tensor
    held: Tensor

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return len(self.held)

    @property
    def exact(self) -> bool:
        """Whether devices conduct 1 or 0, to a thousandth, so that a code is read as a code."""
        one, zero = self.one - (self.held != 0).to(self.one), self.zero - (self.held == 1).to(self.zero)
        return not self.held.numel() or max(float(one.abs().max()), float(zero.abs().max())) < 1e-3

    def read(self, codes: Integer[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """What codes are read as, in units of the lowest bit."""
        found = torch.zeros_like(self.one[0])
        for bit in range(self.bits):
            found += 2**bit * torch.where(_is_one(codes, bit), self.one[bit], self.zero[bit])
        return found

    def keeps(self, codes: Integer[Tensor, "*shape"]) -> Bool[Tensor, "*shape"]:
        """Where a code has the bits that its stuck devices hold. All other codes are read as one that does."""
        found = torch.ones_like(self.held[0], dtype=torch.bool)
        for bit in range(self.bits):
            found &= (self.held[bit] < 0) | (self.held[bit].bool() == _is_one(codes, bit))
        return found

    def table(self, places: slice = slice(None)) -> tuple[Float[Tensor, "codes n"], Bool[Tensor, "codes n"]]:
        """What each of all codes is read as, and whether it keeps, in some places of the flattened tensor.

        Examples:
            >>> draw_devices((3,), bits=2).table(slice(1, 2))[0].round().flatten().tolist()
            [0.0, 1.0, 2.0, 3.0]
        """
        one, zero, held = (part.flatten(1)[:, places] for part in (self.one, self.zero, self.held))
        order = torch.arange(self.bits, device=one.device)
        bits = (torch.arange(2**self.bits, device=one.device)[:, None] >> order & 1).to(one)
        size = (2.0**order).to(one)[:, None]
        read = bits @ (size * one) + (1 - bits) @ (size * zero)
        return read, bits @ (held == 0).to(one) + (1 - bits) @ (held == 1).to(one) == 0

    def to(self, where: Tensor | torch.device) -> Devices:
        """The same on a device, or on a tensor's device in its type."""
        device = where.device if isinstance(where, Tensor) else where
        return Devices(self.one.to(where), self.zero.to(where), self.held.to(device))


def _is_one(codes: Tensor, bit: int) -> Tensor:
    return (codes.int() >> bit & 1).bool()


def draw_devices(
    shape: Sequence[int], bits: int, *, stuck: float = 0.0, at: Stuck = "both", spread: float = 0.0, seed: int = 0
) -> Devices:
    """Draw the cells of one tensor.

    Resistances are normal around the mean of a device's state, as in the authors' public code of ``fault-qat``; one that is not
    positive is the mean.

    Args:
        shape: Of the codes.
        bits: Bits of a code, 1 to 8.
        stuck: Share of devices that are stuck, 0 to 1.
        at: ``"zero"``, ``"one"``, or ``"both"`` with equal probability.
        spread: Standard deviation of a resistance relative to its mean.
        seed: Another seed is another chip.

    Raises:
        ValueError: A number out of range.

    Examples:
        >>> round(float(draw_devices((10000,), 4, spread=0.1).one.reciprocal().std()), 2)
        0.1
    """
    if not (isinstance(bits, int) and 1 <= bits <= 8) or at not in get_args(Stuck) or not 0 <= spread < 1:
        raise ValueError(
            f"faults: bits {bits!r}, stuck at {at!r}, spread {spread!r}; expected 1 to 8 bits, one of {', '.join(get_args(Stuck))}, "
            "and a relative standard deviation of at least 0 and below 1."
        )
    chance = torch.Generator().manual_seed(seed)
    size = (bits, *shape)
    count = torch.Size(size).numel()
    places = positions(count, stuck, chance)
    value = torch.randint(2, (len(places),), generator=chance) if at == "both" else torch.full_like(places, at == "one")
    held = torch.full((count,), -1, dtype=torch.int8).index_put_((places,), value.to(torch.int8)).view(size)
    on, off = (1 + spread * torch.randn(size, generator=chance) for _ in range(2))
    one = torch.where(on > 0, on, 1.0).reciprocal()
    zero = torch.where(off > 0, off, 1.0).reciprocal() * (LOW_RESISTANCE / HIGH_RESISTANCE)
    return Devices(torch.where(held == 0, zero, one), torch.where(held == 1, one, zero), held)


def read_naive(devices: Devices, codes: Tensor) -> Tensor:
    """What codes are read as, one cell after the other."""
    found = []
    for place, code in enumerate(codes.flatten().tolist()):
        cells = [(devices.one if code >> b & 1 else devices.zero)[b].flatten()[place] for b in range(devices.bits)]
        found.append(sum(2**b * float(g) for b, g in enumerate(cells)))
    return torch.tensor(found).view(codes.shape)
