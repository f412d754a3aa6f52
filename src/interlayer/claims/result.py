"""What a run of a claim gave, as data: kept as one small JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from interlayer.claims.expect import Comparison


@dataclass
class Judged:
    """A statement or check with its verdict.

    Attributes:
        says: The sentence.
        sort: ``mechanism``, ``effect`` or ``check``.
        verdict: ``holds``, ``contrary``, ``undecided`` or ``shows nothing`` (its control or mutant meets it too).
        comparisons: The subject against the others.
        twins: The same comparisons with the control, and the mutant, in the subject's place.
    """

    says: str
    sort: str
    verdict: str
    comparisons: list[Comparison]
    twins: dict[str, list[Comparison]] = field(default_factory=dict)


@dataclass
class ClaimResult:
    """What a run of a claim gave.

    Attributes:
        says: The claim's sentence.
        scale: Name of the scale.
        seeds: The seeds that were run; an arm that only decided statements need has fewer values.
        values: ``values[arm][metric]`` has one value for each seed; controls are among the arms. nan: no such value.
        errors: ``errors[arm]`` holds what the arm raised, by seed.
        statements: Each with its verdict.
        checks: Competence and head room.
        controls: Names of the controls and mutants.
        verdict: ``holds``, ``partly``, ``not at this scale`` or ``void``.
        note: Why the verdict is void, and what else a reader must know.
        pilots: What was tried on pilot seeds, and chosen.
        seconds: CPU time of the whole run, which other work on the machine does not change.
        date: Day of the run (UTC).
        versions: Versions that it ran with.
    """

    says: str
    scale: str
    seeds: list[int]
    values: dict[str, dict[str, list[float]]]
    errors: dict[str, dict[str, str]]
    statements: list[Judged]
    checks: list[Judged]
    controls: list[str]
    verdict: str
    note: str
    pilots: str
    seconds: float
    date: str
    versions: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write one small, strict JSON file (inf and nan as strings); a system's place for it is ``System.result``."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """The result as strict JSON."""
        return json.dumps(_plain(asdict(self)), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ClaimResult:
        """Read what ``to_json`` wrote."""
        data = json.loads(text)
        data["values"] = {a: {m: [float(v) for v in vs] for m, vs in ms.items()} for a, ms in data["values"].items()}
        for part in ("statements", "checks"):
            data[part] = [
                Judged(
                    **{k: row[k] for k in ("says", "sort", "verdict")},
                    comparisons=_comparisons(row["comparisons"]),
                    twins={name: _comparisons(rows) for name, rows in row["twins"].items()},
                )
                for row in data[part]
            ]
        return cls(**data)

    def __str__(self) -> str:
        count = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
        lines = [f"{self.verdict}: {self.says}", f"  {self.scale} scale, {count}, {self.seconds:.0f} CPU seconds"]
        for s in [*self.checks, *self.statements]:
            lines.append(f"  {s.sort}, {s.verdict}: {s.says}")
            for c in s.comparisons:
                lines.append(f"    {c.metric}: {c.arm} against {c.than}: gain {_interval(c)}, {c.n} seeds")
            for name, rows in s.twins.items():
                failed = "meets it too" if rows and all(r.met for r in rows) else "fails, as it must"
                lines.append(f"    {name}: {failed} ({', '.join(f'{r.gain:.4g}' for r in rows)})")
        for arm, metrics in self.values.items():
            shown = "  ".join(f"{m} {mean(v):.4g}" for m, v in metrics.items())
            failed = "  raised: " + "; ".join(self.errors[arm].values()) if arm in self.errors else ""
            lines.append(f"  {arm + (' (control)' if arm in self.controls else ''):<28} {shown}{failed}")
        return "\n".join([*lines, *([f"  {self.note}"] if self.note else [])])


def mean(values: Sequence[float]) -> float:
    """The mean of the values that there are; NaN of nothing."""
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan


def _interval(c: Comparison) -> str:
    return f"{c.gain:.4g}" if math.isnan(c.low) else f"{c.gain:.4g} [{c.low:.4g}, {c.high:.4g}]"


def _comparisons(rows: Sequence[Mapping[str, Any]]) -> list[Comparison]:
    return [Comparison(**{**row, **{k: float(row[k]) for k in ("gain", "low", "high")}}) for row in rows]


def _plain(value: Any) -> Any:
    """Rounded to six digits, and strict JSON: inf and nan as strings."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
