"""Scenarios that simulators run, as tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from interlayer.core.data import Batch, DataShape
from interlayer.core.kinds import Finding, Simulator
from interlayer.core.task.base import Budget, Subject, Task


class ScenarioTask(Task):
    """A scenario that simulators run: an arm changes the simulator or the scenario, and is judged by what comes out.

    Args:
        name: Name in the report.
        simulator: The usual simulator, a slug of the catalogue.
        scenario: As the simulator takes it; options of an arm go over it.
        table: The table of the finding that counts.
        metrics: Its columns, the one that arms are compared by first; each is averaged over the rows.
        higher: Whether more of it is better.
        unit: Its unit.
        about: One line for the report.
    """

    learns = False
    shape = DataShape("vector", "values", classes=1, features=1)

    def __init__(
        self,
        name: str,
        simulator: str,
        scenario: Mapping[str, Any],
        *,
        table: str,
        metrics: Sequence[str],
        higher: bool = True,
        unit: str = "",
        about: str = "",
    ) -> None:
        self.name, self.base, self.scenario, self.table, self.metrics = name, simulator, scenario, table, tuple(metrics)
        self.metric, self.higher, self.unit, self.about = metrics[0], higher, unit, about

    def batches(self, seed: int, batch_size: int, split: str = "train") -> Iterator[Batch]:
        """There is nothing to learn from."""
        yield from ()

    def learn(self, subject: Subject, budget: Budget, seed: int) -> Iterator[float]:
        """Nothing is learned."""
        yield from ()

    def judge(self, subject: Subject, seed: int) -> dict[str, float]:
        """Means of the columns over a run of the subject's simulator.

        Raises:
            ValueError: The subject is no simulator, or its finding has no such table or column.
        """
        model = subject.model
        if not isinstance(model, Simulated):
            raise ValueError(
                f"task {self.name!r}: got a {type(model).__name__}; expected a simulator such as {self.base!r}."
            )
        found = model.run(self.scenario, seed).tables.get(self.table, {})
        if missing := [m for m in self.metrics if m not in found]:
            raise ValueError(
                f"task {self.name!r}: the run gave no {missing[0]!r} in a table {self.table!r}; expected "
                f"{', '.join(self.metrics)}. Take a simulator that measures them."
            )
        return {m: float(sum(found[m]) / len(found[m])) for m in self.metrics}


class Simulated(nn.Module):
    """A simulator as the subject of a study.

    Args:
        simulator: What runs.
        options: Keys of the scenario that an arm sets.
    """

    def __init__(self, simulator: Simulator, options: Mapping[str, Any]) -> None:
        super().__init__()
        self.simulator, self.options = simulator, dict(options)

    def run(self, scenario: Mapping[str, Any], seed: int) -> Finding:
        """Run the scenario with the arm's options."""
        return self.simulator.run({**scenario, **self.options}, seed)

    def extra_repr(self) -> str:
        """The options tell arms apart."""
        return f"{type(self.simulator).__name__}, {self.options}"
