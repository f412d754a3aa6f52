"""Two-point neurons: context from neighbouring units amplifies or suppresses what a unit transmits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.config import configured
from interlayer.core.data import DataShape
from interlayer.core.example import Example


def modulate(drive: Tensor, context: Tensor) -> Tensor:
    """Asynchronous modulatory transfer function ``ReLU6(R^2 + 2 R + C (1 + |R|))`` of drive R and context C.

    Without context, a weak positive drive is about doubled and a negative one above -2 is blocked. A context of the same sign
    raises the output; one of the opposite sign silences even a strong drive.
    """
    return F.relu6(drive * (drive + 2) + context * (1 + drive.abs()))


class TwoPoint(nn.Module):
    """A layer of units with two points of integration: receptive-field drive, and context that modulates its transmission.

    Paper: Adeel et al., "Unlocking the potential of two-point cells for energy-efficient and resilient training of deep
    nets", arXiv:2211.01950.

    Equation: ``y = ReLU6(R^2 + 2 R + C (1 + |R|))`` with ``R = W x + b`` and ``C = W_L l + W_U u`` from local context l (units of
    the same layer, mostly of other streams) and universal context u (shared by all streams). The transfer function
    is that of the authors' later work (arXiv:2505.06257) and agrees with its code (ARIA-Funded-TREND/HMS), whose other variants use
    other functions. No code of this paper was found by title, method or author, and of its text only the abstract could be read.

    Args:
        inputs: Features of the receptive field.
        outputs: Units N.
        local: Features of the local context.
        universal: Features of the universal context.
        transfer: Maps drive and context to the output; ``point`` gives ordinary units.

    Shapes: [..., inputs], [..., local], [..., universal] to [..., N].

    Raises:
        ValueError: An input with another number of features.

    Examples:
        >>> import torch
        >>> layer = TwoPoint(8, 4, local=4, universal=3)
        >>> layer(torch.randn(2, 8), torch.randn(2, 4), torch.randn(2, 3)).shape
        torch.Size([2, 4])
    """

    def __init__(self, inputs: int, outputs: int, *, local: int, universal: int, transfer: Any = modulate) -> None:
        super().__init__()
        self.drive = nn.Linear(inputs, outputs)
        self.local = nn.Linear(local, outputs, bias=False)
        self.universal = nn.Linear(universal, outputs, bias=False)
        self.transfer = transfer

    def forward(
        self, x: Float[Tensor, "*B inputs"], local: Float[Tensor, "*B local"], universal: Float[Tensor, "*B universal"]
    ) -> Float[Tensor, "*B N"]:
        """The units' outputs."""
        for name, given, part in (
            ("x", x, self.drive),
            ("local", local, self.local),
            ("universal", universal, self.universal),
        ):
            if given.shape[-1] != part.in_features:
                raise ValueError(f"TwoPoint: {name} {tuple(given.shape)}; expected [..., {part.in_features}].")
        return self.transfer(self.drive(x), self.local(local) + self.universal(universal))


def point(drive: Tensor, context: Tensor) -> Tensor:
    """A point neuron: drive and context are one sum, ``ReLU6(R + C)``."""
    return F.relu6(drive + context)


@configured
class MCC(nn.Module):
    """Multisensory cooperative computing: one stream of two-point layers for each sense, with the others as context.

    In every layer, a stream's local context is the drives of the other streams. The universal context is one vector for all
    streams: the sum of learned projections of all senses and, layer by layer, of all streams' outputs.

    Args:
        senses: Features of each sense.
        units: Units of each layer of a stream.
        outputs: Features that are read from the last layers of all streams.
        universal: Features of the universal context.
        depth: Layers of each stream.
        two_point: Whether units are two-point; otherwise point neurons with the same connections.

    Shapes: one [B, features] for each sense to [B, outputs].

    Raises:
        ValueError: Senses or features that differ in number from what it was built for.

    Examples:
        >>> import torch
        >>> MCC((16, 12), units=8, outputs=5)(torch.randn(3, 16), torch.randn(3, 12)).shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        senses: Sequence[int],
        *,
        units: int = 64,
        outputs: int = 10,
        universal: int = 16,
        depth: int = 2,
        two_point: bool = True,
    ) -> None:
        super().__init__()
        if len(senses) < 2 or depth < 1:
            raise ValueError(f"MCC: {len(senses)} senses and depth {depth}; expected at least two and one.")
        self.senses = list(senses)
        others = (len(senses) - 1) * units
        self.layers = nn.ModuleList(
            nn.ModuleList(
                TwoPoint(
                    units if layer else size,
                    units,
                    local=others,
                    universal=universal,
                    transfer=modulate if two_point else point,
                )
                for size in senses
            )
            for layer in range(depth)
        )
        whole = [sum(senses), *[len(senses) * units] * (depth - 1)]
        self.share = nn.ModuleList(nn.Linear(size, universal, bias=False) for size in whole)
        self.read = nn.Linear(len(senses) * units, outputs)

    @classmethod
    def for_task(cls, shape: DataShape, **options: Any) -> Self:
        """A network for a task with several vectors as inputs."""
        if shape.kind != "vectors":
            raise ValueError(f"MCC: takes several vectors, not {shape.kind}. Take a task such as 'audiovisual'.")
        return cls(shape.senses, outputs=shape.classes, **options)

    def units(self, *senses: Tensor) -> list[Tensor]:
        """Outputs of every layer, all streams side by side: [B, senses x units] each."""
        if [s.shape[-1] for s in senses] != self.senses:
            raise ValueError(f"MCC: senses of {[tuple(s.shape) for s in senses]}; expected last sizes {self.senses}.")
        xs, universal, seen = list(senses), torch.zeros((), device=senses[0].device), []
        for share, layer in zip(self.share, self.layers, strict=True):
            cells = [cast(TwoPoint, cell) for cell in cast(nn.ModuleList, layer)]
            universal = universal + share(torch.cat(xs, -1))
            drives = [cell.drive(x) for cell, x in zip(cells, xs, strict=True)]
            xs = []
            for i, cell in enumerate(cells):
                local = torch.cat([d for j, d in enumerate(drives) if j != i], -1)
                xs.append(cell.transfer(drives[i], cell.local(local) + cell.universal(universal)))
            seen.append(torch.cat(xs, -1))
        return seen

    def forward(self, *senses: Float[Tensor, "B _"]) -> Float[Tensor, "B outputs"]:
        """Read out of the last layer."""
        return self.read(self.units(*senses)[-1])


EXAMPLE = Example(
    make=lambda: TwoPoint(6, 5, local=4, universal=3),
    inputs=lambda: (torch.randn(3, 5, 6), torch.randn(3, 5, 4), torch.randn(3, 5, 3)),
    odd=lambda: (torch.randn(7, 6), torch.randn(7, 4), torch.randn(7, 3)),
    wrong=lambda: (torch.randn(3, 6), torch.randn(3, 5), torch.randn(3, 3)),
    axis=1,
    modes={"point neurons": lambda: TwoPoint(6, 5, local=4, universal=3, transfer=point)},
)
