"""The weights of a model as codes in memory cells, read with bit errors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from interlayer.core.faults.cells import Kind, check_kind, draw, expected, flip
from interlayer.core.pairing.seeds import seed_of
from interlayer.core.quantizer import Grid, layers, rounds, weight_of
from interlayer.core.quantizer.layers import is_conv1d
from interlayer.core.select import At


class Memory:
    """The weights of a model, quantised and stored; every ``seed`` is another array of cells, such as another chip.

    Linear maps and convolutions are stored, as ``core.quantizer.layers`` finds them; biases, norms, embeddings and shared weights
    are not, and are always read right (``skipped`` says why). The model is copied into codes and never changed.

    Cost: a byte for each weight; a read draws as many numbers as cells are faulty, and writes every weight once.

    Args:
        model: Any module.
        grid: How weights are rounded. On a symmetric grid codes are stored in two's complement, on the others they are
            never negative, so that a flip of the highest bit never changes a sign alone.
        at: Among which modules. Defaults to all.
        kind: What a faulty cell reads; see ``draw``.

    Attributes:
        codes: The stored codes by layer, outputs first.
        cells: Number of bits.
        skipped: The other weights, each with the reason.

    Raises:
        ValueError: No layer can be quantised, or a rate or kind out of range.

    Examples:
        >>> net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> memory = Memory(net, Grid(8))
        >>> chip = memory.faulty(0.01, seed=3)
        >>> memory.cells, memory.expected(0.01), 0 < memory.wrong(0.01, seed=3) < 500
        (18944, 189.44, True)
    """

    def __init__(self, model: nn.Module, grid: Grid, *, at: At | None = None, kind: Kind = "flip") -> None:
        check_kind(kind)
        chosen, self.skipped = layers(model, at, grid)
        self.model, self.grid, self.kind = model, grid, kind
        self._held = {name: grid.fit(weight_of(layer)) for name, layer in chosen.items()}
        self.codes = {name: self._held[name].codes(weight_of(layer).detach()) for name, layer in chosen.items()}
        self.cells = grid.bits * sum(c.numel() for c in self.codes.values())

    def expected(self, rate: float) -> float:
        """How many bits are read wrong on average."""
        return expected(self.cells, rate, self.kind)

    def masks(self, rate: float, seed: int) -> dict[str, Tensor]:
        """The bits that are read wrong, by layer. A layer's cells depend on seed and name, not on other layers."""
        return {
            name: draw(codes, self.grid.bits, rate, torch.Generator().manual_seed(seed_of(seed, name)), self.kind)
            for name, codes in self.codes.items()
        }

    def wrong(self, rate: float, seed: int) -> int:
        """How many bits are read wrong."""
        return sum(int(sum((m >> b & 1).sum() for b in range(self.grid.bits))) for m in self.masks(rate, seed).values())

    def read(self, rate: float = 0.0, seed: int = 0) -> dict[str, Tensor]:
        """The weights as they are read, by layer, outputs first."""
        masks = self.masks(rate, seed) if rate else {}
        found = {}
        for name, codes in self.codes.items():
            seen = flip(codes, masks[name], self.grid.bits) if masks else codes
            found[name] = self._held[name].values(seen)
        return found

    def weights(self, rate: float = 0.0, seed: int = 0) -> dict[str, Tensor]:
        """The same under the names and in the shapes of the model's parameters, for ``torch.func.functional_call``."""
        return {
            f"{name}.weight": value.T if is_conv1d(self.model.get_submodule(name)) else value
            for name, value in self.read(rate, seed).items()
        }

    def faulty(self, rate: float, seed: int) -> nn.Module:
        """A copy of the model with the weights as they are read: a plain model."""
        return rounds(self.model, self.read(rate, seed))
