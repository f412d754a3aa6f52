"""What every finding keeps, of probes and simulators alike."""

from __future__ import annotations

import math
from typing import Any

import torch

from interlayer.core.kinds import Finding
from interlayer.testing.common import require


def sound(found: Finding) -> None:
    """Named tables with columns of equal length, units of columns that exist, and a figure that can be drawn."""
    require(isinstance(found, Finding) and bool(found.tables), "expected a Finding with at least one table")
    for name, table in found.tables.items():
        lengths = {column: len(values) for column, values in table.items()}
        require(len(set(lengths.values())) == 1, f"columns of table {name!r} differ in length: {lengths}")
        require(max(lengths.values()) > 0, f"table {name!r} is empty")
    columns = {column for table in found.tables.values() for column in table}
    require(set(found.units) <= columns, f"units of columns that are not there: {sorted(set(found.units) - columns)}")
    if found.figure is not None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        require(found.figure() is not None, "figure() gives nothing")
        pyplot.close("all")


def equal(a: Any, b: Any) -> bool:
    """Whether nested tables hold the same numbers; NaN equals NaN."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return bool(a == b) or (isinstance(a, float) and math.isnan(a) and math.isnan(b))
