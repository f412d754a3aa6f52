"""Contracts of data-transforms."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor

from interlayer.core.example import Example
from interlayer.testing.common import make, require, same, seeded
from interlayer.testing.findings import equal


def _fields(data: Any) -> Any:
    """What a data object holds, as nested dictionaries."""
    held = data.to_dict() if hasattr(data, "to_dict") else data if isinstance(data, dict) else vars(data)
    return dict(held)


def untouched(example: Example) -> None:
    """The input is afterwards as it was."""
    transform, (data,) = make(example.make), make(example.inputs, 100)
    before = copy.deepcopy(_fields(data))
    transform(data)
    require(equal(before, _fields(data)), "the transform changed its input")


def changes(example: Example) -> None:
    """The result is data of the same kind, and not the same data."""
    transform, (data,) = make(example.make), make(example.inputs, 100)
    result = transform(data)
    require(type(result) is type(data), f"{type(data).__name__} went in, {type(result).__name__} came out")
    require(not equal(_fields(result), _fields(data)), "the transform changes nothing on its own example")


def seed(example: Example) -> None:
    """The same seed gives the same result."""
    (data,) = make(example.inputs, 100)
    results = []
    for _ in range(2):
        with seeded(5):
            results.append([v for v in _fields(make(example.make)(data)).values() if isinstance(v, Tensor)])
    same(results[0], results[1], "two results of one seed")


def known(example: Example) -> None:
    """Quantities with a closed form come out, and there is at least one."""
    require(example.known is not None, "the example knows no closed form: give known=")
    assert example.known is not None
    found = example.known()
    require(bool(found), "known() names no quantity with a closed form")
    for name, (value, exact, apart) in found.items():
        require(
            abs(value - exact) <= apart,
            f"{name}: {value:.6g} against the closed form {exact:.6g} (may be {apart:.2g} apart)",
        )


def invariances(example: Example) -> None:
    """What the result must keep, such as what a new numbering of the nodes does not change."""
    require(bool(example.invariances), "the example names no invariance: give invariances=")
    for name, keeps in example.invariances.items():
        (data,) = make(example.inputs, 100)
        require(keeps(make(example.make), data), f"not kept: {name}")


DATA_TRANSFORM: dict[str, Callable[[Example], None]] = {
    "untouched": untouched,
    "changes": changes,
    "seed": seed,
    "known": known,
    "invariances": invariances,
}
