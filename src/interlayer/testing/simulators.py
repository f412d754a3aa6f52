"""Contracts of simulators."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from interlayer.core.example import Example
from interlayer.core.kinds import Finding, Simulator
from interlayer.testing.common import make, require, seeded
from interlayer.testing.findings import equal, sound


def _simulator(example: Example) -> Simulator:
    found = make(example.make)
    require(isinstance(found, Simulator), f"make() gave {type(found).__name__}; expected a Simulator")
    return found


def _run(example: Example, seed: int, scenario: Any = None, around: int = 0) -> Finding:
    with seeded(around):
        return _simulator(example).run(example.inputs()[0] if scenario is None else scenario, seed)


def finding(example: Example) -> None:
    """Tables of equal columns, a unit for every column of numbers, and the scenario as it was."""
    scenario = example.inputs()[0]
    before = copy.deepcopy(scenario)
    found = _run(example, 0, scenario)
    sound(found)
    require(scenario == before, "run changed the scenario")
    for table in found.tables.values():
        for column, values in table.items():
            numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
            require(not numbers or column in found.units, f"column {column!r} has no unit")


def known(example: Example) -> None:
    """Quantities with a closed form come out, and there is at least one."""
    found = _simulator(example).known()
    require(bool(found), "known() names no quantity with a closed form")
    for name, (value, exact, apart) in found.items():
        require(
            abs(value - exact) <= apart,
            f"{name}: {value:.6g} against the closed form {exact:.6g} (may be {apart:.2g} apart)",
        )


def seed(example: Example) -> None:
    """The same seed gives the same finding, whatever the global generators do."""
    first, second = _run(example, 3, around=1), _run(example, 3, around=2)
    require(equal(first.tables, second.tables), "the tables of the same seed differ")


def scenario(example: Example) -> None:
    """The default scenario can be named, and an unknown key is one clear error."""
    try:
        _run(example, 0, {**example.inputs()[0], "no-such-key": 1})
    except ValueError as error:
        require("no-such-key" in str(error), f"the error does not name the unknown key: {error}")
    else:
        raise AssertionError("an unknown key of the scenario is ignored")


SIMULATOR: dict[str, Callable[[Example], None]] = {
    "finding": finding,
    "known": known,
    "seed": seed,
    "scenario": scenario,
}
