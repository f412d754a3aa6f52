"""Quantisation: grids, rounding that gradients pass, ranges of activations, packed weights, products of bits."""

from interlayer.core.quantizer.grid import Grid, Scaled, fake, fake_naive, straight
from interlayer.core.quantizer.layers import BitMap, Bound, Packed, integer_product, weight_of
from interlayer.core.quantizer.nearest import layers, nearest, packs, restore, rounds, simulated
from interlayer.core.quantizer.observe import observe
from interlayer.core.quantizer.packing import bit_product, ones, pack, planes, stored, unpack

__all__ = [
    "BitMap", "Bound", "Grid", "Packed", "Scaled", "bit_product", "fake", "fake_naive", "integer_product", "layers", "nearest",
    "observe", "ones", "pack", "packs", "planes", "restore", "rounds", "simulated", "stored", "straight", "unpack", "weight_of",
]  # fmt: skip
