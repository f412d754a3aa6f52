"""Search for architectures: spaces of choices, mixed operations, networks of cells, and the alternating steps of DARTS."""

from interlayer.core.search.bilevel import architecture_gradients, held_out
from interlayer.core.search.cells import CellNet, Supernet, cell_space, read_genotype
from interlayer.core.search.operations import OPERATIONS, Mixed, operation
from interlayer.core.search.space import Space

__all__ = [
    "OPERATIONS",
    "CellNet",
    "Mixed",
    "Space",
    "Supernet",
    "architecture_gradients",
    "cell_space",
    "held_out",
    "operation",
    "read_genotype",
]
