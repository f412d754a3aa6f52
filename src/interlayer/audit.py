"""What the catalogue still lacks: rows without code, test, claim, result or docs, and results that the catalogue does not know."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Mapping
from importlib import import_module

from interlayer import catalog

WORKS = catalog.CHECKOUT / "tests" / "works.toml"


def clauses(works: str) -> list[str]:
    """What counts as working, clause by clause.

    >>> clauses("A gate at zero. Show: loss at equal steps; memory.")
    ['A gate at zero', 'loss at equal steps', 'memory']
    """
    return [part.removeprefix("Show: ").rstrip(".;") for part in re.split(r"(?<=[.;])\s+", works.strip())]


def unshown() -> list[str]:
    """Clauses of ready systems for which ``tests/works.toml`` names no test, statement, figure, contract or benchmark that exists."""
    shown = tomllib.loads(WORKS.read_text(encoding="utf-8")) if WORKS.exists() else {}
    systems = catalog.load()
    found = [f"works.toml: no system {slug!r}" for slug in shown if slug not in systems]
    for system in systems.values():
        if system.state == "ready":
            found += _unshown(system, shown.get(system.slug, {}))
    return found


def _unshown(system: catalog.System, shown: Mapping[str, list[str]]) -> list[str]:
    wanted = clauses(system.works)
    found = [f"{system.slug}: works.toml has {c!r}, which its row has not" for c in shown if c not in wanted]
    there = _evidence(system)
    for clause in wanted:
        names = shown.get(clause, [])
        if not names:
            found.append(f"{system.slug}: nothing shows {clause!r}")
        for name in names:
            kind, _, what = name.partition(": ")
            part = kind == "claim" and what and any(what in says for says in there["claim"])
            if not part and what not in there.get(kind, ()):
                found.append(f"{system.slug}: {clause!r} names {name!r}, which is not there")
    return found


def _evidence(system: catalog.System) -> dict[str, set[str]]:
    """What can show a clause: tests, the claim's statements and figures, contracts of the kind, benchmarks that name the system."""
    from interlayer.testing import contracts

    files = sorted(system.test.parent.glob(f"test_{system.stem}*.py"))
    trees = [ast.parse(f.read_text(encoding="utf-8")) for f in files]
    claim = import_module(f"interlayer.claims.{system.room}.{system.stem}").CLAIM
    figures = {arm: set(metrics) for arm, metrics in (system.measured() or {"values": {}})["values"].items()}
    timed = {p.stem: p.read_text(encoding="utf-8") for p in (catalog.CHECKOUT / "benchmarks").glob("*.py")}
    return {
        "test": {
            n.name for tree in trees for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test")
        },
        "claim": {statement.says for statement in claim.statements},
        "measured": {f"{metric} of {arm}" for arm in figures for metric in figures[arm]}
        | set.intersection(*(figures.get(arm, set()) for arm in claim.arms)),
        "contract": set(contracts(system.kind)),
        "benchmark": {name for name, text in timed.items() if system.slug in text or system.stem in text},
    }


def lacking() -> list[str]:
    """What half-finished systems lack. Those that are merely planned are no fault."""
    return [f"{s.slug}: lacks {', '.join(s.missing)}" for s in catalog.load().values() if s.state == "partial"]


def faults() -> list[str]:
    """Where the catalogue, the files and the README contradict each other."""
    systems = catalog.load()
    found = [
        f"{s.slug}: kind {s.kind!r} is not one of {catalog.KINDS}"
        for s in systems.values()
        if s.kind not in catalog.KINDS
    ]
    found += [f"{s.slug}: room {s.room!r} is unknown" for s in systems.values() if s.room not in catalog.rooms()]
    found += [
        f"{s.slug}: slot {s.slot!r} is unknown" for s in systems.values() if s.slot and s.slot not in catalog.slots()
    ]
    results = {p.stem for p in (catalog.PACKAGE / "claims" / "results").glob("*.json")}
    found += [f"{slug}: a result without a system" for slug in sorted(results - set(systems))]
    for room in catalog.rooms():
        known = {s.stem for s in systems.values() if s.room == room and s.code}
        tasks = (where.partition(":")[0].rpartition(".") for where in catalog.tasks().values())
        known |= {stem for place, _, stem in tasks if place == room}
        folder = catalog.PACKAGE.joinpath(*room.split("."))
        there = {p.stem for p in folder.glob("*") if not p.name.startswith("_")} if folder.is_dir() else set()
        found += [f"{room}.{stem}: code without a row in the catalogue" for stem in sorted(there - known)]
    readme = catalog.CHECKOUT / "README.md"
    if readme.exists() and table() not in readme.read_text(encoding="utf-8"):
        found.append("README.md: the table of rooms is not that of the catalogue; `make readme` writes it")
    return found


def table() -> str:
    """The README's table of rooms with counts, from the catalogue."""
    lines = ["| room | what it holds | ready | systems |", "| --- | --- | ---: | ---: |"]
    systems = catalog.load().values()
    for room, holds in catalog.rooms().items():
        here = [s for s in systems if s.room == room]
        lines.append(f"| `{room}` | {holds} | {sum(s.state == 'ready' for s in here)} | {len(here)} |")
    ready = sum(s.state == "ready" for s in systems)
    return "\n".join([*lines, f"| | all | {ready} | {len(systems)} |"])


def write_readme() -> None:
    """Put the table into the README."""
    readme = catalog.CHECKOUT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition("<!-- rooms -->")
    after = rest.partition("<!-- /rooms -->")[2]
    readme.write_text(f"{before}<!-- rooms -->\n{table()}\n<!-- /rooms -->{after}", encoding="utf-8")


def main() -> None:
    """Print every fault and the counts; exit with 1 if there is a fault."""
    systems = catalog.load().values()
    found = lacking() + faults() + unshown()
    print("\n".join(found))
    print(
        ", ".join(f"{sum(s.state == state for s in systems)} {state}" for state in catalog.STATES),
        f"{len(found)} faults",
        sep="; ",
    )
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
