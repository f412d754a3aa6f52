"""Bit errors: faulty cells of memory that holds quantised weights, at a rate or a supply voltage, and what reading it costs."""

from interlayer.core.faults.cells import Kind, draw, draw_naive, expected, flip, flip_naive, positions
from interlayer.core.faults.memory import Memory
from interlayer.core.faults.sram import access_energy, error_rate, voltage, weight_reads

__all__ = [
    "Kind", "Memory", "access_energy", "draw", "draw_naive", "error_rate", "expected", "flip", "flip_naive", "positions", "voltage",
    "weight_reads",
]  # fmt: skip
