"""One harness for all claims: run the arms over seeds, compare them in pairs, judge, and keep the result as JSON."""

from __future__ import annotations

import json
import math
import platform
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from interlayer.study.stats import interval

Scale = SimpleNamespace  # what `measure` gets: the fields of the chosen entry of `scales`
VERDICTS = ("holds", "partly", "not at this scale", "void")
LEVEL = 0.95  # of every interval

Values = Mapping[str, Mapping[str, Sequence[float]]]  # arm -> metric -> one value for each seed
Progress = Callable[[int, int, str, int], None]


@dataclass(frozen=True)
class Comparison:
    """One comparison of the subject with something, over paired seeds.

    ``gain`` is the mean by which the subject is better than asked for (above 0: right direction), ``low`` and ``high``
    the ends of its 95% t interval; with a single seed, or with a diverged run, there is none (nan). ``met`` says that
    the interval excludes zero in the expected direction.
    """

    metric: str
    arm: str
    than: str
    gain: float
    low: float
    high: float
    right: bool
    met: bool


@dataclass(frozen=True)
class Expectation:
    """That ``arm`` has the lowest (``sign`` 1) or highest (-1) ``metric``, by more than ``margin``.

    A negative margin asks only for "no worse by as much as that". Build it with ``lowest`` or ``highest``.
    """

    metric: str
    arm: str
    than: tuple[str, ...] | None
    margin: float
    sign: int

    def judge(self, values: Values, subject: str | None = None) -> list[Comparison]:
        """Compare over the seeds; ``subject`` stands in the arm's place when the control is judged."""
        than = self.than if self.than is not None else tuple(a for a in values if a != self.arm)
        mine = _column(values, subject or self.arm, self.metric)
        rows = []
        for other in than:
            theirs = _column(values, other, self.metric)
            gains = [_gain(self.sign, m, t, self.margin) for m, t in zip(mine, theirs, strict=True)]
            rows.append(_compare(self.metric, subject or self.arm, other, gains))
        return rows


@dataclass(frozen=True)
class Within:
    """That the mean of a fitted ``metric`` of ``arm`` lies between ``low`` and ``high``. Build it with ``fits``."""

    metric: str
    arm: str
    low: float
    high: float

    def judge(self, values: Values, subject: str | None = None) -> list[Comparison]:
        """Compare with both ends over the seeds."""
        mine = _column(values, subject or self.arm, self.metric)
        ends = [(self.low, -1, f">= {self.low:g}"), (self.high, 1, f"<= {self.high:g}")]
        return [
            _compare(self.metric, subject or self.arm, text, [_gain(sign, m, end, 0.0) for m in mine])
            for end, sign, text in ends
            if math.isfinite(end)
        ]


@dataclass(frozen=True)
class Ordered:
    """That ``metric`` rises along ``arms``, each step by more than ``margin``. Build it with ``ordered``."""

    metric: str
    arms: tuple[str, ...]
    margin: float
    arm: str

    def judge(self, values: Values, subject: str | None = None) -> list[Comparison]:
        """Compare each neighbour over the seeds."""
        arms = [subject if subject and a == self.arm else a for a in self.arms]
        rows = []
        for below, above in pairwise(arms):
            pairs = zip(_column(values, below, self.metric), _column(values, above, self.metric), strict=True)
            rows.append(_compare(self.metric, above, below, [_gain(-1, a, b, self.margin) for b, a in pairs]))
        return rows


Expect = Expectation | Within | Ordered


def lowest(metric: str, arm: str, than: Sequence[str] | None = None, margin: float = 0.0) -> Expectation:
    """Expect ``arm`` to have the lowest ``metric``, by more than ``margin``, of ``than`` (all other arms unless told)."""
    return Expectation(metric, arm, tuple(than) if than is not None else None, margin, 1)


def highest(metric: str, arm: str, than: Sequence[str] | None = None, margin: float = 0.0) -> Expectation:
    """Expect ``arm`` to have the highest ``metric``, by more than ``margin``, of ``than`` (all other arms unless told)."""
    return Expectation(metric, arm, tuple(than) if than is not None else None, margin, -1)


def ordered(metric: str, *arms: str, margin: float = 0.0) -> Ordered:
    """Expect ``metric`` to rise along ``arms``. The control takes the place of the last."""
    return Ordered(metric, arms, margin, arms[-1])


def fits(metric: str, arm: str, low: float = -math.inf, high: float = math.inf) -> Within:
    """Expect a measured or fitted ``metric`` of ``arm``, such as an exponent, to lie between ``low`` and ``high``."""
    return Within(metric, arm, low, high)


@dataclass(frozen=True)
class Claim:
    """An executable experiment for one sentence of a paper.

    Args:
        says: The sentence, falsifiable, with numbers.
        measure: ``(arm, seed, scale) -> {metric: value}``; ``scale`` has the fields of the chosen entry of ``scales``.
        arms: What is compared.
        expect: One expectation or several that must all hold: ``lowest``, ``highest``, ``ordered``, ``fits``.
        control: An arm that ``measure`` also understands, broken on purpose; or several, one for each expectation. It is
            put in the subject's place, and the expectation must then fail; one that holds all the same tells nothing.
        scales: The sizes ``smoke`` (in tests), ``small`` (default) and ``full``.
        seeds: How many seeds unless told otherwise; ``smoke`` takes one.

    Raises:
        ValueError: An expectation names an arm that is not there, the control is one of the arms, or a scale is missing.

    Examples:
        >>> sizes = dict.fromkeys(("smoke", "small", "full"), {"steps": 3})
        >>> claim = Claim("halving falls faster", lambda arm, seed, scale: {"x": (2 + seed) ** -float(arm == "half")},
        ...               arms=("same", "half"), expect=lowest("x", "half"), control="not-half", scales=sizes)
        >>> run(claim).verdict
        'holds'
    """

    says: str
    measure: Callable[[str, int, Any], Mapping[str, float]]
    arms: Sequence[str]
    expect: Expect | Sequence[Expect]
    control: str | Sequence[str]
    scales: Mapping[str, Mapping[str, Any]]
    seeds: int = 3

    def __post_init__(self) -> None:
        if not {"smoke", "small", "full"} <= self.scales.keys():
            raise ValueError(f"Claim: scales has {list(self.scales)}; wanted smoke, small and full.")
        if len(self.controls) != len(self.expects):
            raise ValueError(
                f"Claim: {len(self.controls)} controls for {len(self.expects)} expectations; give one for all or one for each."
            )
        if both := set(self.controls) & set(self.arms):
            raise ValueError(f"Claim: control {both.pop()!r} is one of the arms; it must be a broken twin beside them.")
        for e in self.expects:
            named = (
                e.arms if isinstance(e, Ordered) else (e.arm, *((e.than or ()) if isinstance(e, Expectation) else ()))
            )
            if unknown := [a for a in named if a not in self.arms]:
                raise ValueError(
                    f"Claim: expectation names {unknown[0]!r}, which is not one of the arms {list(self.arms)}."
                )

    @property
    def expects(self) -> tuple[Expect, ...]:
        """The expectations as a tuple."""
        return (self.expect,) if isinstance(self.expect, Expectation | Within | Ordered) else tuple(self.expect)

    @property
    def controls(self) -> tuple[str, ...]:
        """The control of each expectation."""
        return (self.control,) * len(self.expects) if isinstance(self.control, str) else tuple(self.control)


@dataclass
class ClaimResult:
    """What a run of a claim gave.

    Attributes:
        says: The claim's sentence.
        scale: Name of the scale.
        seeds: The seeds that were run.
        values: ``values[arm][metric]`` has one value for each seed; the control is among the arms. nan: no such value.
        errors: ``errors[arm]`` says what the arm raised, by seed.
        comparisons: The subject against the others.
        controls: Names of the controls.
        control_failed: Whether an expectation failed for its control, as all must; else the verdict is void.
        control_comparisons: The controls, in the subject's place, against the others.
        verdict: One of ``VERDICTS``.
        note: Why the verdict is void, or that it rests on one seed.
        seconds: Time of the whole run.
        date: Day of the run (UTC).
        versions: Versions that it ran with.
    """

    says: str
    scale: str
    seeds: list[int]
    values: dict[str, dict[str, list[float]]]
    errors: dict[str, dict[str, str]]
    comparisons: list[Comparison]
    controls: list[str]
    control_failed: bool
    control_comparisons: list[Comparison]
    verdict: str
    note: str
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
        """What ``to_json`` wrote."""
        told = json.loads(text)
        told["values"] = {a: {m: [float(v) for v in vs] for m, vs in ms.items()} for a, ms in told["values"].items()}
        for name in ("comparisons", "control_comparisons"):
            for row in told[name]:
                row.update({k: float(row[k]) for k in ("gain", "low", "high")})
            told[name] = [Comparison(**row) for row in told[name]]
        return cls(**told)

    def __str__(self) -> str:
        lines = [f"{self.verdict}: {self.says}", f"  scale {self.scale}, seeds {self.seeds}, {self.seconds:.0f} s"]
        for arm, metrics in self.values.items():
            told = "  ".join(f"{m} {_mean(v):.4g}" for m, v in metrics.items())
            failed = "  raised: " + "; ".join(self.errors[arm].values()) if arm in self.errors else ""
            lines.append(f"  {arm + (' (control)' if arm in self.controls else ''):<28} {told}{failed}")
        for c, twin in zip(self.comparisons, self.control_comparisons, strict=True):
            mark = (
                "met, but by the control too"
                if c.met and twin.met
                else "met"
                if c.met
                else "right direction"
                if c.right
                else "not met"
            )
            lines.append(f"  {c.metric}: {c.arm} vs {c.than}: gain {c.gain:.4g} [{c.low:.4g}, {c.high:.4g}]  {mark}")
        lines.append(
            f"  control {', '.join(self.controls)}: "
            + ("failed, as it must" if self.control_failed else "DID NOT FAIL")
        )
        return "\n".join([*lines, *([f"  {self.note}"] if self.note else [])])


def run(
    claim: Claim, scale: str = "small", seeds: int | Sequence[int] | None = None, progress: Progress | None = None
) -> ClaimResult:
    """Run every arm and every control on every seed, and judge.

    Args:
        claim: The claim.
        scale: ``smoke``, ``small`` or ``full``.
        seeds: How many (0, 1, ...) or which; the claim's own number unless told, one for ``smoke``.
        progress: Called before each run with (runs done, runs in all, arm, seed).

    ``holds``: against every compared arm, the 95% interval of the paired differences over the seeds excludes zero in the
    expected direction, and every expectation fails for its control. ``partly``: the mean has the right direction
    everywhere, or the interval excludes zero somewhere where the control's does not. Otherwise ``not at this scale``.
    ``void``: no expectation failed for its control, or a control could not run, so that the experiment shows nothing. An
    arm that raises is recorded and counts as not met. A run that diverged (inf or nan) counts as worst.

    Raises:
        ValueError: The claim has no such scale.
    """
    import torch

    if scale not in claim.scales:
        raise ValueError(f"claim: no scale {scale!r}; there are {', '.join(claim.scales)}.")
    if seeds is None:
        seeds = 1 if scale == "smoke" else claim.seeds
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen:
        raise ValueError("claim: no seed was given; at least one is needed.")
    size = SimpleNamespace(**claim.scales[scale])
    arms = [*claim.arms, *dict.fromkeys(claim.controls)]
    raw: dict[str, list[Mapping[str, float]]] = {arm: [] for arm in arms}
    errors: dict[str, dict[str, str]] = {}
    start, done = time.perf_counter(), 0
    for seed in chosen:
        for arm in arms:
            if progress:
                progress(done, len(arms) * len(chosen), arm, seed)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                try:
                    raw[arm].append({m: float(v) for m, v in claim.measure(arm, seed, size).items()})
                except Exception as error:
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    told = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
                    errors.setdefault(arm, {})[str(seed)] = told
                    raw[arm].append({})
            done += 1
    values = {arm: _columns(rows) for arm, rows in raw.items()}
    return _judge(claim, scale, chosen, values, errors, time.perf_counter() - start)


def _judge(
    claim: Claim,
    scale: str,
    seeds: list[int],
    values: dict[str, dict[str, list[float]]],
    errors: dict[str, dict[str, str]],
    seconds: float,
) -> ClaimResult:
    import torch

    rows: list[Comparison] = []
    control_rows: list[Comparison] = []
    empty: list[str] = []  # statements that their control meets too: they tell nothing of the subject
    for expect, control in zip(claim.expects, claim.controls, strict=True):
        rows += _rows(claim, expect, values, errors)
        theirs = _rows(claim, expect, values, errors, control)
        control_rows += theirs
        if all(c.met for c in theirs):
            empty.append(f"{expect.metric} ({control})")
    telling = any(c.met and not twin.met for c, twin in zip(rows, control_rows, strict=True))
    verdict = "not at this scale"
    if all(c.met for c in rows) and not empty:
        verdict = "holds"
    elif telling or (all(c.right for c in rows) and not empty):
        verdict = "partly"
    failed = len(empty) < len(claim.expects)
    controls = list(dict.fromkeys(claim.controls))
    raised = [arm for arm in errors if arm not in controls]
    notes = [f"Raised: {', '.join(raised)}."] if raised else []
    if empty:
        notes.append(f"Met by the control too, so that it tells nothing: {', '.join(empty)}.")
    if broken := [c for c in controls if c in errors]:
        failed, verdict = False, "void"
        notes.append(f"The control {broken[0]!r} raised, so that its failure shows nothing.")
    elif not failed:
        verdict = "void"
    if len(seeds) == 1:
        notes.append("One seed gives no interval: 'partly' is the best that it can show.")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "interlayer": _version()}
    return ClaimResult(
        claim.says, scale, seeds, values, errors, rows, controls, failed, control_rows, verdict, " ".join(notes),
        round(seconds, 2), datetime.now(UTC).date().isoformat(), versions,
    )  # fmt: skip


def _rows(
    claim: Claim, expect: Expect, values: Values, errors: Mapping[str, Any], control: str | None = None
) -> list[Comparison]:
    """The comparisons of an expectation; an arm that raised is not met, whichever side it is on."""
    # The control is judged against the same arms as the subject, never against itself or another control.
    pool = {arm: values[arm] for arm in (*claim.arms, *([control] if control else []))}
    if control and isinstance(expect, Expectation) and expect.than is None:
        expect = replace(expect, than=tuple(a for a in claim.arms if a != expect.arm))
    return [_unmet(c) if c.arm in errors or c.than in errors else c for c in expect.judge(pool, control)]


def _unmet(c: Comparison) -> Comparison:
    return Comparison(c.metric, c.arm, c.than, math.nan, math.nan, math.nan, right=False, met=False)


def _columns(rows: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name, math.nan) for row in rows] for name in names}


def _column(values: Values, arm: str, metric: str) -> Sequence[float]:
    count = max((len(v) for ms in values.values() for v in ms.values()), default=0)
    return values[arm].get(metric, [math.nan] * count)


def _gain(sign: int, mine: float, theirs: float, margin: float) -> float:
    """By how much the subject is better than asked for; anything that is not finite is the worst there is."""
    if not math.isfinite(mine):
        return -math.inf
    return sign * (theirs - mine) - margin if math.isfinite(theirs) else math.inf


def _compare(metric: str, arm: str, than: str, gains: Sequence[float]) -> Comparison:
    """Judge the paired gains.

    A seed where the subject diverged fails the comparison. One where only the other diverged is a win whose size is
    unknown: the interval is that of the remaining seeds, or every seed must be a win where fewer than two remain.
    """
    finite = [g for g in gains if math.isfinite(g)]
    told = interval(finite, LEVEL)
    mean, low, high = told.mean, told.low, told.high
    if -math.inf in gains or not gains:
        return Comparison(metric, arm, than, -math.inf, math.nan, math.nan, right=False, met=False)
    wins = len(gains) > len(finite)
    right = (mean > 0) if finite else True
    met = low > 0 if len(finite) > 1 else (wins and right and len(gains) > 1)
    return Comparison(metric, arm, than, math.inf if wins else mean, low, high, right=right, met=met)


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


def _version() -> str:
    import interlayer

    return str(getattr(interlayer, "__version__", ""))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _plain(value: Any) -> Any:
    """Rounded to six digits, and strict JSON: inf and nan as strings."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value
