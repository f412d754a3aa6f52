"""A classifier behind a generator: in use, at low voltage, and what it saves."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from interlayer.core.faults import Kind, Memory, access_energy, voltage, weight_reads
from interlayer.core.quantizer import Grid
from interlayer.domains.hardware.neuralfuse.generators import BITS, Generator


class Fused(nn.Module):
    """A classifier behind the transformation of its input.

    Args:
        generator: Transforms the images.
        model: The classifier; its weights are left alone.

    Shapes: those of ``model``.
    """

    def __init__(self, generator: Generator, model: nn.Module) -> None:
        super().__init__()
        self.generator, self.model = generator, model

    def forward(self, x: Tensor | None = None, **named: Any) -> Any:
        """Transform the images (Hugging Face's models also take them by name), and call the model."""
        if x is not None:
            return self.model(self.generator(x), **named)
        main = getattr(self.model, "main_input_name", "x")
        if main not in named:
            raise ValueError(f"Fused: arguments {list(named)}; expected images, as the first argument or as {main!r}.")
        return self.model(**{**named, main: self.generator(named[main])})

    def faulty(self, rate: float, seed: int, *, bits: int = 8, kind: Kind = "flip") -> Fused:
        """A copy whose model is read from memory with bit errors; see ``core.faults.Memory``.

        Args:
            rate: Share of faulty bits; 0 for the nominal voltage.
            seed: Which array of cells.
            bits: Bits of a weight.
            kind: What a faulty cell reads.
        """
        return Fused(copy.deepcopy(self.generator), Memory(self.model, Grid(bits), kind=kind).faulty(rate, seed))

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Refuse: Hugging Face's format has no place for a generator."""
        raise ValueError(
            "save_pretrained: the model has a generator before its input, which from_pretrained would lose. Save all of it "
            "with interlayer.save(model, directory), or fused.model alone with its own save_pretrained."
        )


def energy_saved(fused: Fused, images: Tensor, rate: float, *, bits: int = 8) -> float:
    """The share of energy for reading weights that low voltage saves, the generator at nominal voltage included (equation 6).

    ``1 - e(v) - reads(G) / reads(M)``: v is the voltage with that error rate (``core.faults.voltage``), e an access' energy and the
    reads those of an output-stationary array (``core.faults.weight_reads``).

    Args:
        fused: What ``NeuralFuse`` gave.
        images: One or more inputs; energy does not depend on their values.
        rate: Share of faulty bits.
        bits: Bits of the classifier's weights.
    """
    of_model = weight_reads(fused.model, images[:1], bits=bits)
    return 1 - access_energy(voltage(rate)) - weight_reads(fused.generator, images[:1], bits=BITS) / of_model
