"""Scenarios of quantum networks as tasks, so that ``compare`` puts devices and protocols side by side."""

from __future__ import annotations

from functools import cache

from interlayer.core.task import ScenarioTask, Task


@cache
def repeater_chain() -> Task:
    """Secret key over a chain of three nodes over 40 km; an arm changes the device, the protocol or the distance."""
    scenario = {"kind": "repeater-chain", "device": "ensemble", "nodes": 3, "length": 40e3, "pairs": 30}
    return ScenarioTask(
        "repeater-chain", "netsquid", scenario, table="repeater chain", metrics=("key rate", "fidelity", "mean time"), unit="1/s",
        about="A repeater chain of three nodes over 40 km; 30 pairs are delivered in each run.",
    )  # fmt: skip
