"""What the catalogue still lacks: rows without code, test, claim, result or docs, and results that the catalogue does not know."""

from __future__ import annotations

import sys

from interlayer import catalog


def faults() -> list[str]:
    """Contradictions in the catalogue. Systems that are merely planned are no fault; half-finished ones are."""
    systems = catalog.load()
    found = [f"{s.slug}: lacks {', '.join(s.missing)}" for s in systems.values() if s.state == "partial"]
    found += [
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
        folder = catalog.PACKAGE.joinpath(*room.split("."))
        there = {p.stem for p in folder.glob("*") if not p.name.startswith("_")} if folder.is_dir() else set()
        found += [f"{room}.{stem}: code without a row in the catalogue" for stem in sorted(there - known)]
    return found


def main() -> None:
    """Print every fault and the counts; exit with 1 if there is a fault."""
    systems = catalog.load().values()
    found = faults()
    print("\n".join(found))
    print(
        ", ".join(f"{sum(s.state == state for s in systems)} {state}" for state in catalog.STATES),
        f"{len(found)} faults",
        sep="; ",
    )
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
