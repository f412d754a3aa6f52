"""Scenarios as plain data: what each kind takes, and one sentence for what is wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from typing import Any

from interlayer import catalog
from interlayer.domains.quantum.netsquid.chain import ORDERS
from interlayer.domains.quantum.netsquid.compact import FORMALISMS
from interlayer.domains.quantum.netsquid.hardware import DEVICES, Device, device

KINDS: dict[str, dict[str, Any]] = {
    "repeater-chain": {
        "device": "ensemble", "parameters": {}, "formalism": "bell-diagonal", "nodes": [2, 3, 5],
        "length": [25e3, 50e3, 100e3, 150e3, 200e3], "pairs": 100, "distillation": 0, "order": "asap",
    },
    "switch": {
        "device": "ensemble", "parameters": {"modes": 1}, "formalism": "bell-diagonal", "users": [3, 6, 9],
        "length": [10e3, 25e3, 50e3], "buffer": 1, "duration": 1.0,
    },
    "teleport": {
        "device": "ensemble", "parameters": {}, "formalism": "density", "length": [10e3, 20e3, 40e3], "repetitions": 120,
    },
    "memory": {"device": "nv", "parameters": {}, "formalism": "density", "times": [0.0, 0.01, 0.03, 0.1, 0.3, 1.0],
               "repetitions": 100},
}  # fmt: skip
# By key: the least, the most, and whether a whole number is wanted.
RANGES = {
    "nodes": (2, 2000, True), "users": (2, 1000, True), "length": (1.0, 1e8, False), "pairs": (1, 10**6, True),
    "distillation": (0, 6, True), "buffer": (1, 10**6, True), "duration": (1e-9, 1e9, False), "repetitions": (1, 10**6, True),
    "times": (0.0, 1e9, False),
}  # fmt: skip
LISTS = ("nodes", "users", "length", "times")
JOINT = ("ket", "density", "stabiliser")  # formalisms that hold a single qubit


def read(scenario: Mapping[str, Any] | None) -> tuple[str, dict[str, Any], Device]:
    """The kind, its values with defaults filled in, and the device.

    Raises:
        ValueError: Something is unknown or out of range.
    """
    given = dict(scenario or {})
    kind = given.pop("kind", "repeater-chain")
    if not isinstance(kind, str) or kind not in KINDS:
        near = catalog.nearest(str(kind), KINDS)
        raise ValueError(f"netsquid: no scenario of kind {kind!r}.{near} There are {', '.join(KINDS)}.")
    values = dict(KINDS[kind])
    if unknown := [key for key in given if key not in values]:
        near = catalog.nearest(unknown[0], values)
        raise ValueError(f"netsquid: {kind} has no key {unknown[0]!r}.{near} There are kind, {', '.join(values)}.")
    if "device" in given and "parameters" not in given:
        given["parameters"] = {}
    values |= given
    for key in RANGES.keys() & values.keys():
        values[key] = _numbers(kind, key, values[key])
    for key, known in (("formalism", list(FORMALISMS)), ("device", list(DEVICES)), ("order", list(ORDERS))):
        if key in values and values[key] not in known:
            near = catalog.nearest(str(values[key]), known)
            raise ValueError(f"netsquid: no {key} {values[key]!r}.{near} There are {', '.join(known)}.")
    if kind == "teleport" and values["formalism"] not in JOINT:
        raise ValueError(f"netsquid: teleport needs a formalism of single qubits; expected one of {', '.join(JOINT)}.")
    if not isinstance(values["parameters"], Mapping):
        raise ValueError(f"netsquid: parameters is {values['parameters']!r}; expected a table such as {{t2 = 0.1}}.")
    made = device(values["device"], dict(values["parameters"]))
    if kind == "repeater-chain":
        for nodes in values["nodes"]:
            tries = (2 - nodes) * math.log10(made.swap_success)
            if tries > 7:
                raise ValueError(
                    f"netsquid: {nodes} nodes whose swaps succeed with {made.swap_success:.3g} may need 1e{tries:.0f} tries; "
                    "expected at most 1e7. Use fewer nodes, or swap_success = 1 in parameters."
                )
    if kind == "switch" and made.interfaces == 1:
        raise ValueError(
            f"netsquid: a switch makes pairs with all users at once; {values['device']} has one optical interface. "
            "Set interfaces = 2 in parameters."
        )
    return kind, values, made


def _numbers(kind: str, key: str, value: Any) -> Any:
    low, high, whole = RANGES[key]
    several = isinstance(value, list | tuple) and key in LISTS
    for number in value if several else [value]:
        good = isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
        if not good or not low <= number <= high or (whole and number != int(number)):
            what = "a whole number" if whole else "a number"
            raise ValueError(f"netsquid: {key} of {kind} is {number!r}; expected {what} from {low:g} to {high:g}.")
    if several and not value:
        raise ValueError(f"netsquid: {key} of {kind} is empty; expected at least one number.")
    chosen = [int(v) if whole else float(v) for v in (value if several else [value])]
    if key == "times":
        return sorted(chosen)
    return chosen if key in LISTS else chosen[0]


def grid(values: Mapping[str, Any], *keys: str) -> list[tuple[Any, ...]]:
    """All combinations of the lists of some keys."""
    return list(product(*(values[key] for key in keys)))
