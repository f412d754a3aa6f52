"""The outcome of a study as a table, as CSV files and as a page."""

from __future__ import annotations

import csv
import math
import shutil
from collections.abc import Iterator, Sequence
from functools import partial

from rich import box
from rich.console import Console
from rich.table import Table

from interlayer.core.extras import need
from interlayer.study.page import page
from interlayer.study.result import Result, cells, columns, note, rows
from interlayer.study.spec import plain


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
    for kind in result.spec.export:
        EXPORTS[kind][1](result)
    path = result.out / "report.html"
    path.write_text(page(result, rows(result), lines, note(result)), encoding="utf-8")
    say(f"report: {path}")


def csv_files(result: Result) -> None:
    """``results.csv``: a line for each run. ``curves.csv``: a line for each value of each curve."""
    table = columns(result)
    with (result.out / "results.csv").open("w", newline="", encoding="utf-8") as file:
        sheet = csv.writer(file)
        sheet.writerow(table)
        sheet.writerows(["" if v is None else v for v in line] for line in zip(*table.values(), strict=True))
    with (result.out / "curves.csv").open("w", newline="", encoding="utf-8") as file:
        sheet = csv.writer(file)
        sheet.writerow(POINT)
        sheet.writerows(points(result))


POINT = ("arm", "seed", "step", "split", "metric", "value")


def points(result: Result) -> Iterator[tuple[str, int, int, str, str, float]]:
    """All points of all curves."""
    for r in result.runs:
        for step, value in r.record.train:
            if value is not None and math.isfinite(value):
                yield r.arm, r.seed, int(step), "train", "loss", value
        for name, found in r.record.asides.items():  # what layers reported beside their output
            for step, value in found:
                yield r.arm, r.seed, int(step), "train", name, value
        for point in r.record.curve:
            for metric in r.record.metrics:
                if point.get(metric) is not None:
                    yield r.arm, r.seed, int(point["step"]), "validation", metric, point[metric]


def parquet(result: Result) -> None:
    """``results.parquet`` and ``curves.parquet``, the same tables as the CSV files with their types."""
    pandas = need("pandas", "frames", "export 'parquet'")
    result.frame().to_parquet(result.out / "results.parquet")
    pandas.DataFrame(list(points(result)), columns=list(POINT)).to_parquet(result.out / "curves.parquet")


def tensorboard(result: Result) -> None:
    """The curves as scalars for TensorBoard, a run for each arm and seed, in ``tensorboard/``."""
    writer = need("torch.utils.tensorboard", "tensorboard", "export 'tensorboard'").SummaryWriter
    shutil.rmtree(result.out / "tensorboard", ignore_errors=True)
    for run in result.runs:
        mine = [p for p in points(result) if p[:2] == (run.arm, run.seed)]
        with writer(str(result.out / "tensorboard" / plain(run.arm) / f"seed-{run.seed}")) as board:
            for _, _, step, split, metric, value in mine:
                board.add_scalar(f"{metric}/{split}", value, step)


# What each form needs, and its writer.
EXPORTS = {"parquet": (("pandas", "pyarrow"), parquet), "tensorboard": (("torch.utils.tensorboard",), tensorboard)}


def check_exports(kinds: Sequence[str]) -> None:
    """Raise ImportError before anything is trained if an export cannot be written."""
    for kind in kinds:
        for module in EXPORTS[kind][0]:
            need(module, "frames" if kind == "parquet" else kind, f"export {kind!r}")
