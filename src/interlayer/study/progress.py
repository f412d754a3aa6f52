"""Live progress of a study: one bar for each arm in a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bars

from interlayer.study.spec import StudySpec


class Progress:
    """Shows the events that are passed to ``emit``.

    Args:
        console: Where.
        spec: The study.
        unit: What the metric is called.
    """

    def __init__(self, console: Console, spec: StudySpec, unit: str) -> None:
        self.console, self.unit, self.live = console, unit, console.is_terminal
        self.total = float(spec.looks[-1] + (0 if spec.lr else len(spec.rates)))
        self.shares: dict[str, dict[str, float]] = {}
        columns = ("[bold]{task.description}", BarColumn(24), "{task.fields[text]}")
        self.bars = Bars(
            *(TextColumn(c) if isinstance(c, str) else c for c in columns), console=console, disable=not self.live
        )
        self.rows: dict[str, Any] = {}
        for arm in spec.arms:
            self._row(arm.name)

    def _row(self, arm: str) -> Any:
        if arm not in self.rows:
            self.rows[arm] = self.bars.add_task(arm, total=self.total, text="waiting")
            self.shares[arm] = {}
        return self.rows[arm]

    def __enter__(self) -> Progress:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def line(self, text: str) -> None:
        """A line that stays."""
        self.bars.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def emit(self, event: dict[str, Any]) -> None:
        """Show an event of a run."""
        arm, what = event["arm"], event["what"]
        label = f"seed {event['seed']}" + (f", lr {event['lr']:.2g}" if event.get("lr") else "")
        row = self._row(arm)
        shares = self.shares[arm]
        if what == "step":
            shares[label] = event["share"]
            text = f"{label}  step {event['step']:>5}  loss {event['loss']:.4f}  {event['left']:4.0f} s left"
            self.bars.update(row, completed=sum(shares.values()), text=text)
        elif what == "start" and not self.live:
            self.line(f"{arm}, {label}: started")
        elif what == "eval" and not self.live and not event["last"]:
            self.line(f"{arm}, {label}: step {event['step']}, validation {event['value']:.4f} {self.unit}")
        elif what in ("done", "failed", "diverged"):
            shares[label] = self.total if event["seed"] is None else 1.0
            if what == "done":
                shown = ", ".join(f"{k} {v:.4f}" for k, v in event["metrics"].items())
            else:
                shown = f"{what}: {event['error'].splitlines()[0]}"
            self.bars.update(row, completed=sum(shares.values()), text=f"{label}  {shown}" if what == "done" else what)
            if not self.live or what != "done":
                self.line(f"{arm}{'' if event['seed'] is None else ', ' + label}: {shown}")
