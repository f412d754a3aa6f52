"""Faulty memory of quantised weights: bit errors at a rate or a supply voltage, what reading costs, and resistive cells."""

from interlayer.core.faults.cells import Kind, draw, draw_naive, expected, flip, flip_naive, positions
from interlayer.core.faults.devices import Devices, Stuck, draw_devices, read_naive
from interlayer.core.faults.memory import Memory
from interlayer.core.faults.sram import access_energy, error_rate, voltage, weight_reads

__all__ = [
    "Devices", "Kind", "Memory", "Stuck", "access_energy", "draw", "draw_devices", "draw_naive", "error_rate", "expected", "flip",
    "flip_naive", "positions", "read_naive", "voltage", "weight_reads",
]  # fmt: skip
