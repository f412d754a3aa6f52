"""The outcome of a study: its runs, what is decided, and both as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from interlayer.core.extras import need
from interlayer.study.spec import StudySpec
from interlayer.study.stats import LEVEL, Interval, critical, interval, paired, sequential
from interlayer.study.train import Record


@dataclass
class Run:
    """One finished run as the report needs it.

    Attributes:
        state: ``done``, ``diverged``, ``failed`` or ``missing``.
    """

    arm: str
    seed: int
    state: str
    lr: float | None = None
    record: Record = field(default_factory=Record)
    error: str = ""
    traceback: str = ""
    where: dict[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """A study's outcome.

    Attributes:
        spec: What was run.
        runs: One for each arm and seed that was wanted, in the order of the study.
        search: One for each arm and learning rate that was tried.
        about: The task as data: name, metric, higher, unit, item, about, trivial (scores of a predictor that ignores its
            inputs; a diverged run counts as one).
        shared: By arm, the share of its random initial numbers that are the baseline's.
        base: The backbone.
        out: Folder of the report and the CSV files.
    """

    spec: StudySpec
    runs: list[Run]
    search: list[Run]
    about: dict[str, Any]
    base: str
    out: Path
    shared: dict[str, float] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        """Whether every run finished, and not all diverged. A diverged run counts as finished; one that raised does not."""
        states = {run.state for run in self.runs}
        return "done" in states and states <= {"done", "diverged"}

    def frame(self) -> Any:
        """The runs as a ``pandas.DataFrame``: arm, seed, state, learning rate, steps, seconds, metrics, costs and error.

        Raises:
            ImportError: pandas is not installed.
        """
        return need("pandas", "frames", "Result.frame").DataFrame(columns(self))

    def _repr_html_(self) -> str:
        """The table for a notebook."""
        return html(self)

    def of(self, arm: str) -> list[Run]:
        """The runs of an arm."""
        return [run for run in self.runs if run.arm == arm]

    def values(self, arm: str, metric: str = "") -> dict[int, float]:
        """Last value of a metric by seed, over the arm's finished runs; a diverged run has the trivial predictor's."""
        metric = metric or self.about["metric"]
        trivial = self.about.get("trivial", {})
        scores = {r.seed: r.record.metrics if r.state == "done" else trivial for r in self.of(arm)
                  if r.state in ("done", "diverged")}  # fmt: skip
        return {seed: found[metric] for seed, found in scores.items() if metric in found}

    def difference(self, arm: str, metric: str = "") -> Interval | None:
        """The arm's paired difference to the baseline with its interval; None for the baseline itself.

        Where arms stop as soon as they are decided, the interval holds for all looks and all arms of the study together.
        Otherwise it is a plain 95% t interval.
        """
        if arm == self.spec.baseline:
            return None
        apart = paired(self.values(arm, metric), self.values(self.spec.baseline, metric))
        if not self.spec.until_decided:
            return interval(apart)
        return sequential(apart, self.spec.looks, LEVEL / (len(self.spec.arms) - 1))


@dataclass(frozen=True)
class ArmRow:
    """One arm's line in the table."""

    arm: str
    state: str
    metrics: dict[str, Interval]
    difference: Interval | None
    cost: dict[str, float]
    lr: float | None
    runs: int


def rows(result: Result) -> list[ArmRow]:
    """The table's lines, one for each arm in the order of the study."""
    found = []
    for arm in result.spec.arms:
        runs = result.of(arm.name)
        done = [r for r in runs if r.state == "done"]
        bad = [r.state for r in runs if r.state != "done"]
        state = ", ".join(f"{bad.count(s)} of {len(runs)} {s}" for s in dict.fromkeys(bad))
        names = list(dict.fromkeys(k for r in done for k in r.record.metrics))
        keys = dict.fromkeys(k for r in done for k in r.record.cost)
        means = {k: [r.record.cost[k] for r in done if k in r.record.cost] for k in keys}
        found.append(
            ArmRow(
                arm.name,
                state,
                {m: interval(list(result.values(arm.name, m).values())) for m in names},
                result.difference(arm.name),
                {k: sum(v) / len(v) for k, v in means.items()},
                done[0].lr if done else None,
                len(done) + bad.count("diverged"),
            )
        )
    return found


def better(row: ArmRow, result: Result) -> bool | None:
    """Whether an arm is better than the baseline (True) or worse (False); None while it is not decided."""
    if row.difference is None or not row.difference.decided:
        return None
    return (row.difference.mean > 0) == result.about["higher"]


def human(value: float, unit: str = "") -> str:
    """A number with a metric prefix: ``human(1234567)`` is ``1.23 M``."""
    if math.isnan(value):
        return "–"
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def cells(row: ArmRow, result: Result) -> dict[str, str]:
    """A line of the table as text by column heading."""
    about, cost = result.about, row.cost
    metric, against = about["metric"], result.spec.baseline
    measured = {key for run in result.runs for key in run.record.cost}
    word = "validation " if about.get("learns", True) else ""
    found = {"arm": row.arm}
    scored = {name for run in result.runs for name in run.record.metrics}
    for name in dict.fromkeys(("loss", metric) if "loss" in scored or not scored else (metric,)):
        found[f"{word}{name}"] = row.metrics[name].text() if name in row.metrics else "–"
    if row.state and not row.metrics:
        found[list(found)[1]] = row.state
    mark = "" if metric == "loss" else f"{metric} "
    found[f"{mark}against {against}"] = "baseline" if row.difference is None else row.difference.text(sign=True)
    found["decided"] = {True: "better", False: "worse", None: "no"}[better(row, result)] if row.difference else "–"
    found["seeds"] = str(row.runs)
    if about.get("learns", True):
        found["learning rate"] = f"{row.lr:.2g}" if row.lr else "–"
        found["parameters"] = human(cost["parameters"]) if "parameters" in cost else "–"
        found[f"FLOPs per {about['item']}"] = human(cost["flops"]) if "flops" in cost else "–"
    for key, (heading, shown) in COSTS.items():
        if key in measured:
            found[heading] = shown(cost[key]) if key in cost else "–"
    return found


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def _bytes(size: float) -> str:
    return human(size, "B")


COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "step_time": ("step time", _time),
    "peak_memory": ("peak memory", _bytes),
    "disk": ("on disk", _bytes),
    "latency_1": ("forward of 1", _time),
    "latency_64": ("forward of 64", _time),
}


def headline(result: Result, found: Sequence[ArmRow]) -> tuple[str, str]:
    """What was decided, and what was not."""
    about, spec = result.about, result.spec
    metric, base = about["metric"], spec.baseline
    budget = f"{spec.budget['steps']:,} steps" if "steps" in spec.budget else f"{spec.seconds:g} s of training"
    judged = [r for r in found if metric in r.metrics]
    if not judged:
        return "No arm finished", "Every run failed, diverged or is still missing; the reasons are below."
    verdicts: dict[bool | None, list[str]] = {True: [], False: [], None: []}
    for r in found:
        if r.difference is not None and r.difference.n:
            verdicts[better(r, result)].append(r.arm)
    if not any(verdicts.values()):
        best = (max if about["higher"] else min)(judged, key=lambda r: r.metrics[metric].mean)
        return f"{best.arm}: validation {metric} {best.metrics[metric].mean:.4g} after {budget}", ""
    parts = [
        f"{_list(verdicts[k])} {'is' if len(verdicts[k]) == 1 else 'are'} {word} than {base}"
        for k, word in ((True, "better"), (False, "worse"))
        if verdicts[k]
    ]
    title = "; ".join(parts) if parts else f"Nothing is decided: no arm can be distinguished from {base}"
    text = (
        f"Validation {metric} after {budget}, each arm at its own best learning rate. "
        if not spec.lr
        else f"Validation {metric} after {budget}. "
    )
    if verdicts[None]:
        seeds = max(r.runs for r in found)
        text += f"Not decided with {seeds} seed{'s' if seeds > 1 else ''}: {_list(verdicts[None])}. "
        if not spec.until_decided and spec.looks[-1] < 4:
            text += "More seeds may decide it; --seeds 4..12 runs each arm until it is decided."
    return title, text


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def note(result: Result) -> str:
    """What the intervals are, and what the pairing is."""
    spec = result.spec
    if spec.looks[-1] < 2:
        return "One seed: no intervals, and a difference may be chance. Use more seeds, such as --seeds 4..12."
    text = "± of a score is the half width of its 95% t interval over the seeds. "
    if spec.until_decided:
        arms = len(spec.arms) - 1
        factors = ", ".join(f"{c:.2f}" for c in critical(spec.looks, LEVEL / max(arms, 1)))
        text += (
            f"Each arm got {', '.join(map(str, spec.looks[:-1]))} or {spec.looks[-1]} seeds, until its difference to "
            f"{spec.baseline} excluded zero; "
            f"± of a difference is c s / √n with c = {factors}, valid for all looks"
            + (f" and {arms} arms" if arms > 1 else "")
            + " together (5% false positives in all). "
        )
    else:
        text += "± of a difference is a plain 95% t interval, for each arm alone. "
    text += (
        "Differences are paired: arms of a seed start from the same noise in all weights of equal name and shape, and see "
        "the same batches and the same dropout."
    )
    if any(run.state == "diverged" for run in result.runs):
        trivial = result.about["trivial"]
        score = ", ".join(f"{k} {v:.4g}" for k, v in trivial.items())
        text += (
            f" A diverged run counts as a predictor that ignores its inputs ({score})."
            if trivial
            else " Diverged runs are left out."
        )
    return text


def columns(result: Result) -> dict[str, list[Any]]:
    """The runs as columns; None where a run has no such value."""
    runs = result.runs
    found: dict[str, list[Any]] = {
        "arm": [r.arm for r in runs],
        "seed": [r.seed for r in runs],
        "state": [r.state for r in runs],
        "lr": [r.lr for r in runs],
        "steps": [r.record.steps for r in runs],
        "seconds": [r.record.seconds for r in runs],
    }
    for metric in dict.fromkeys(k for r in runs for k in r.record.metrics):
        found[metric] = [r.record.metrics.get(metric) for r in runs]
    for key in ("parameters", "flops", "kept", *COSTS):
        found[key] = [r.record.cost.get(key) for r in runs]
    found["error"] = [r.error.partition("\n")[0] or None for r in runs]
    return found


def html(result: Result) -> str:
    """The table and what its intervals are, for a notebook."""
    lines = [cells(row, result) for row in rows(result)]
    head = "".join(f"<th>{escape(h)}</th>" for h in lines[0])
    body = "".join(f"<tr>{''.join(f'<td>{escape(v)}</td>' for v in line.values())}</tr>" for line in lines)
    return (
        f"<p><b>{escape(headline(result, rows(result))[0])}</b></p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        f"<p>{escape(note(result))}</p><p>Report: <code>{escape(str(result.out / 'report.html'))}</code></p>"
    )
