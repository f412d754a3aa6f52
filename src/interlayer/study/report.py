"""The outcome of a study as a table, as CSV files and as a page."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from interlayer.study.engine import Result
from interlayer.study.page import headline, page
from interlayer.study.stats import LEVEL, Interval, critical, interval


@dataclass(frozen=True)
class Row:
    """One arm's line in the table."""

    arm: str
    state: str
    metrics: dict[str, Interval]
    difference: Interval | None
    cost: dict[str, float]
    lr: float | None
    runs: int


def rows(result: Result) -> list[Row]:
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
            Row(
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


def better(row: Row, result: Result) -> bool | None:
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


def cells(row: Row, result: Result) -> dict[str, str]:
    """A line of the table as text by column heading."""
    about = result.about
    found = {
        "arm": row.arm,
        "validation loss": row.metrics["loss"].text() if "loss" in row.metrics else row.state or "–",
    }
    if about["metric"] != "loss":
        found[f"validation {about['metric']}"] = (
            row.metrics[about["metric"]].text() if about["metric"] in row.metrics else "–"
        )
    against = result.spec.baseline
    mark = "" if about["metric"] == "loss" else f"{about['metric']} "
    found[f"{mark}against {against}"] = "baseline" if row.difference is None else row.difference.text(sign=True)
    found["decided"] = {True: "better", False: "worse", None: "no"}[better(row, result)] if row.difference else "–"
    found["seeds"] = str(row.runs)
    found["learning rate"] = f"{row.lr:.2g}" if row.lr else "–"
    cost = row.cost
    found["parameters"] = human(cost["parameters"]) if "parameters" in cost else "–"
    found[f"FLOPs per {about['item']}"] = human(cost["flops"]) if "flops" in cost else "–"
    found["step time"] = f"{cost['step_time'] * 1e3:.3g} ms" if "step_time" in cost else "–"
    found["peak memory"] = human(cost["peak_memory"], "B") if "peak_memory" in cost else "–"
    return found


def write(result: Result, console: Console) -> None:
    """Print the table and write ``results.csv``, ``curves.csv`` and ``report.html`` to the study's folder."""
    lines = [cells(row, result) for row in rows(result)]
    table = Table(
        title=f"{result.about['name']}, {result.base}", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    for name in lines[0]:
        table.add_column(
            name.replace(" ", "\n", 1), justify="left" if name == "arm" else "right", no_wrap=True, overflow="fold"
        )
    for line in lines:
        table.add_row(*line.values())
    (console if console.is_terminal else Console(file=console.file, width=180)).print(table)
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    say(note(result))
    bad = [r for r in result.runs if r.state in ("failed", "diverged")]
    for arm, state, error in dict.fromkeys((r.arm, r.state, r.error.split("\n")[0]) for r in bad):
        seeds = ", ".join(str(r.seed) for r in bad if (r.arm, r.state) == (arm, state))
        say(f"{arm}, seed {seeds} {state}: {error}")
    csv_files(result)
    path = result.out / "report.html"
    path.write_text(page(result, rows(result), lines, note(result)), encoding="utf-8")
    say(f"report: {path}")


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
            f"Each arm ran until its difference to {spec.baseline} left out zero, at {', '.join(map(str, spec.looks))} seeds; "
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
    for key in ("parameters", "flops", "step_time", "peak_memory", "kept"):
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


def csv_files(result: Result) -> None:
    """``results.csv``: a line for each run. ``curves.csv``: a line for each value of each curve."""
    metrics = list(dict.fromkeys(k for r in result.runs for k in r.record.metrics))
    table = columns(result)
    with (result.out / "results.csv").open("w", newline="", encoding="utf-8") as file:
        sheet = csv.writer(file)
        sheet.writerow(table)
        sheet.writerows(["" if v is None else v for v in line] for line in zip(*table.values(), strict=True))
    with (result.out / "curves.csv").open("w", newline="", encoding="utf-8") as file:
        sheet = csv.writer(file)
        sheet.writerow(["arm", "seed", "step", "split", "metric", "value"])
        for r in result.runs:
            for step, value in r.record.train:
                sheet.writerow([r.arm, r.seed, int(step), "train", "loss", "" if value is None else value])
            for point in r.record.curve:
                for m in metrics:
                    if point.get(m) is not None:
                        sheet.writerow([r.arm, r.seed, int(point["step"]), "validation", m, point[m]])
