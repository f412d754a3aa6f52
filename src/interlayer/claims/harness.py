"""One harness for all claims: run the arms over seeds until each statement is decided, judge, and keep the result."""

from __future__ import annotations

import platform
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from interlayer.claims.expect import Comparison, Expect, Values
from interlayer.claims.result import ClaimResult, Judged
from interlayer.study.stats import looks

VERDICTS = ("holds", "partly", "not at this scale", "void")
LOOKS = looks(4, 12)
PILOT = 1000  # first pilot seed; results come from lower ones
Progress = Callable[[int, str, int], None]


class Scale(SimpleNamespace):
    """What ``measure`` gets: the fields of the chosen entry of ``scales``. Cached functions can take it."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(vars(self)))  # of the names alone: values may be lists


@dataclass(frozen=True)
class Statement:
    """One falsifiable sentence of a claim; build it with ``mechanism``, ``effect`` or ``check``.

    Attributes:
        says: The sentence.
        sort: ``mechanism``, ``effect`` or ``check``.
        expect: What must come out.
        twins: Arms that stand in the subject's place and must fail: the control, and a mechanism's mutant.
    """

    says: str
    sort: str
    expect: Expect
    twins: tuple[str, ...]

    @property
    def arms(self) -> tuple[str, ...]:
        """All arms that are needed to judge it."""
        return (*self.expect.arms, *self.twins)

    def judge(self, values: Values, errors: Iterable[str], at: tuple[int, ...] | None) -> Judged:
        """The verdict over the seeds that there are."""

        def rows(subject: str = "") -> list[Comparison]:
            used = [subject or arm if arm == self.expect.arm else arm for arm in self.expect.arms]
            if any(arm in errors for arm in used):
                return []
            return self.expect.judge(values, at, subject)

        mine, twins = rows(), {name: rows(name) for name in self.twins}
        verdict = "undecided"
        if mine and all(c.met for c in mine):
            verdict = "shows nothing" if any(t and all(c.met for c in t) for t in twins.values()) else "holds"
        elif any(c.contrary for c in mine):
            verdict = "contrary"
        return Judged(self.says, self.sort, verdict, mine, twins)


def mechanism(says: str, expect: Expect, *, control: str, mutant: str) -> Statement:
    """What follows from the construction, and must break with it.

    Args:
        says: The sentence; empty for the expectation's own words.
        expect: What must come out.
        control: An arm that is the same but for the idea (ablated, functionally null), and must fail.
        mutant: An arm with one line of the idea's equation wrong, which must fail too.
    """
    return Statement(says or str(expect), "mechanism", expect, (control, mutant))


def effect(says: str, expect: Expect, *, control: str) -> Statement:
    """What the paper says that the idea improves; see ``mechanism``."""
    return Statement(says or str(expect), "effect", expect, (control,))


def check(says: str, expect: Expect) -> Statement:
    """What must be true for the claim to show anything: a competent baseline, room above it."""
    return Statement(says or str(expect), "check", expect, ())


@dataclass(frozen=True)
class Claim:
    """An executable experiment for the sentences of a paper.

    Args:
        says: The claim in a sentence.
        measure: ``(arm, seed, scale) -> {metric: value}``; ``scale`` has the fields of the chosen entry of ``scales``.
        arms: What is compared. A mapping may hold what ``measure`` makes of each.
        statements: Each with its own control and verdict.
        scales: The sizes ``smoke`` (in tests), ``small`` (default) and ``full``.
        checks: Competence of the baselines and head room; the claim is void where one does not hold.
        pilots: What was tried on which pilot seeds (from 1000 up), and what was chosen by it.
        first_seed: The first of the seeds that results come from; above 0 where an earlier form of the claim had looked at those.
        build: ``(arm, scale) -> model``, so that the largest scale can be built without being run.

    Raises:
        ValueError: A control is one of the arms, a statement names an arm that is not there, or a scale is missing.

    Examples:
        >>> from interlayer.claims.expect import lowest
        >>> sizes = dict.fromkeys(("smoke", "small", "full"), {"steps": 3})
        >>> faster = effect("", lowest("x", "half", than=("same",)), control="not-half")
        >>> claim = Claim("halving falls faster", lambda arm, seed, scale: {"x": (2 + seed) ** -float(arm == "half")},
        ...               arms=("same", "half"), statements=(faster,), scales=sizes)
        >>> result = run(claim)
        >>> result.verdict, result.statements[0].says
        ('holds', 'x of half lower than of same')
    """

    says: str
    measure: Callable[[str, int, Any], Mapping[str, float]]
    arms: Sequence[str] | Mapping[str, Any]
    statements: Sequence[Statement]
    scales: Mapping[str, Mapping[str, Any]]
    checks: Sequence[Statement] = ()
    pilots: str = ""
    first_seed: int = 0
    build: Callable[[str, Any], nn.Module] | None = None

    def __post_init__(self) -> None:
        if not {"smoke", "small", "full"} <= self.scales.keys():
            raise ValueError(f"Claim: scales has {list(self.scales)}; expected smoke, small and full.")
        if both := set(self.controls) & set(self.arms):
            raise ValueError(f"Claim: control {both.pop()!r} is one of the arms; it must be a broken twin beside them.")
        for s in (*self.statements, *self.checks):
            if unknown := [a for a in s.expect.arms if a not in self.arms]:
                raise ValueError(
                    f"Claim: {s.says!r} names {unknown[0]!r}, which is not one of the arms {list(self.arms)}."
                )

    @property
    def controls(self) -> tuple[str, ...]:
        """The controls and mutants of all statements."""
        return tuple(dict.fromkeys(name for s in self.statements for name in s.twins))


def run(
    claim: Claim, scale: str = "small", seeds: int | Sequence[int] | None = None, progress: Progress | None = None
) -> ClaimResult:
    """Run the arms and controls over seeds, and judge each statement.

    Without ``seeds``, the statements are judged after 4, 6, 8 and 12 seeds with intervals that stay valid under these looks
    (see ``interlayer.study.stats``), and arms that only decided statements need are not run further; ``smoke`` runs one seed.

    A statement holds if every comparison's interval leaves out zero in the expected direction, is contrary if one leaves it
    out in the other, and shows nothing if its control or mutant meets it too. The claim holds if all statements hold, holds
    partly if some do, and is void if a check fails.

    Args:
        claim: The claim.
        scale: ``smoke``, ``small`` or ``full``.
        seeds: A number of seeds, from the claim's first on, or which; then intervals are plain 95% t intervals.
        progress: Called before each run with (runs done, arm, seed).

    Raises:
        ValueError: The claim has no such scale, or no seed was given.
    """
    import torch

    if scale not in claim.scales:
        raise ValueError(f"claim: no scale {scale!r}; there are {', '.join(claim.scales)}.")
    if seeds is None and scale == "smoke":
        seeds = 1
    count = LOOKS[-1] if seeds is None else seeds
    chosen = [claim.first_seed + i for i in range(count)] if isinstance(count, int) else list(count)
    if not chosen:
        raise ValueError("claim: no seed was given; at least one is needed.")
    at = LOOKS if seeds is None else None
    size = Scale(**claim.scales[scale])
    raw: dict[str, list[Mapping[str, float]]] = {arm: [] for arm in (*claim.arms, *claim.controls)}
    errors: dict[str, dict[str, str]] = {}
    decided: dict[int, Judged] = {}
    every = [*claim.statements, *claim.checks]
    start, done = time.process_time(), 0
    for look in at or (len(chosen),):
        needed = {arm for i, s in enumerate(every) if i not in decided for arm in s.arms}
        for number, seed in enumerate(chosen[:look]):
            for arm, rows in raw.items():
                if arm not in needed or len(rows) > number:
                    continue
                if progress:
                    progress(done, arm, seed)
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    try:
                        rows.append({m: float(v) for m, v in claim.measure(arm, seed, size).items()})
                    except Exception as error:
                        where = traceback.extract_tb(error.__traceback__)[-1]
                        text = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
                        errors.setdefault(arm, {})[str(seed)] = text
                        rows.append({})
                done += 1
        values = {arm: _columns(rows) for arm, rows in raw.items()}
        for i, s in enumerate(every):
            if i not in decided:
                found = s.judge(values, errors, at)
                if found.verdict != "undecided":
                    decided[i] = found
        if len(decided) == len(every):
            break
    used = chosen[: max(map(len, raw.values()))]
    return judge(claim, scale, used, values, errors, time.process_time() - start, decided, at)


def judge(
    claim: Claim,
    scale: str,
    seeds: list[int],
    values: dict[str, dict[str, list[float]]],
    errors: dict[str, dict[str, str]],
    seconds: float,
    decided: Mapping[int, Judged] | None = None,
    at: tuple[int, ...] | None = None,
) -> ClaimResult:
    """The result of values that were measured; ``decided`` holds the statements and checks that were judged at an earlier look."""
    import torch

    import interlayer

    every = [*claim.statements, *claim.checks]
    found = [(decided or {}).get(i) or s.judge(values, errors, at) for i, s in enumerate(every)]
    statements, checks = found[: len(claim.statements)], found[len(claim.statements) :]
    holding = sum(s.verdict == "holds" for s in statements)
    verdict = "holds" if holding == len(statements) else "partly" if holding else "not at this scale"
    notes = [f"Raised: {', '.join(errors)}."] if errors else []
    if failed := [c for c in checks if c.verdict != "holds"]:
        verdict = "void"
        notes.append(f"Not shown, so that nothing follows: {'; '.join(c.says for c in failed)}.")
    if len(seeds) == 1:
        notes.append("One seed gives no interval, so nothing is decided.")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "interlayer": interlayer.__version__}
    return ClaimResult(
        claim.says, scale, seeds, values, errors, statements, checks, list(claim.controls), verdict, " ".join(notes),
        claim.pilots, round(seconds, 2), datetime.now(UTC).date().isoformat(), versions,
    )  # fmt: skip


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name, float("nan")) for row in rows] for name in names}


def load(slug: str) -> Claim:
    """The claim of a system, found by its catalogue room and slug.

    Raises:
        LookupError: No such system, or it has no claim yet.
    """
    from interlayer import catalog

    system = catalog.get(slug)
    name = f"interlayer.claims.{system.room}.{system.stem}"
    try:
        return import_module(name).CLAIM
    except ModuleNotFoundError as error:
        if error.name and name.startswith(error.name):
            raise LookupError(f"claims: {slug!r} has no claim yet; its place would be {name}.") from error
        raise


def measured(slug: str) -> ClaimResult:
    """The claim of a system as last measured.

    Raises:
        LookupError: It was never measured.
    """
    from interlayer import catalog

    path = catalog.get(slug).result
    if not path.exists():
        raise LookupError(f"claims: {slug!r} was not measured yet; run `interlayer claim {slug} --store`.")
    return ClaimResult.from_json(path.read_text(encoding="utf-8"))
