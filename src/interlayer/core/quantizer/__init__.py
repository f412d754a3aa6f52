"""Quantisation: grids, rounding that gradients pass, ranges of activations, packed weights, products of bits."""

from interlayer.core.quantizer.around import Around, PackedEmbedding
from interlayer.core.quantizer.attended import Form, Piece, attended, forms
from interlayer.core.quantizer.attention import OPERANDS, Attend, Multihead, opened, opening
from interlayer.core.quantizer.corrected import Corrected, alternate
from interlayer.core.quantizer.gptq import columns, gptq
from interlayer.core.quantizer.grid import Grid, LogGrid, LogScaled, Scaled, fake, fake_naive, straight, through
from interlayer.core.quantizer.layers import BitMap, Bound, Packed, Round, integer_product, weight_of
from interlayer.core.quantizer.nearest import inner, layers, nearest, packs, restore, rounds, simulated
from interlayer.core.quantizer.observe import extremes, observe
from interlayer.core.quantizer.packing import bit_product, ones, pack, planes, stored, unpack
from interlayer.core.quantizer.reconstruct import AdaRound, Learned, Rounder, learned, reconstruct
from interlayer.core.quantizer.smooth import smooth
from interlayer.core.quantizer.timed import Clock, Learning, Timed, TimedRound, Tuned, split

__all__ = [
    "OPERANDS", "AdaRound", "Around", "Attend", "BitMap", "Bound", "Clock", "Corrected", "Form", "Grid", "Learned", "Learning",
    "LogGrid", "LogScaled", "Multihead", "Packed", "PackedEmbedding", "Piece", "Round", "Rounder", "Scaled", "Timed", "TimedRound",
    "Tuned", "alternate", "attended", "bit_product", "columns", "extremes", "fake", "fake_naive", "forms", "gptq", "inner",
    "integer_product", "layers", "learned", "nearest", "observe", "ones", "opened", "opening", "pack", "packs", "planes",
    "reconstruct", "restore", "rounds", "simulated", "smooth", "split", "stored", "straight", "through", "unpack", "weight_of",
]  # fmt: skip
