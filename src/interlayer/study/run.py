"""A study from beginning to end: read, check, run, report."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from interlayer.core.equal import difference
from interlayer.core.pairing import Paired, shared
from interlayer.core.task import Task
from interlayer.study import tasks
from interlayer.study.arms import TRAINED, Arm, Training, parse, resolve
from interlayer.study.engine import Engine, close_storage, open_storage, plain_errors
from interlayer.study.loaders import LoaderTask
from interlayer.study.objects import Objects, shown
from interlayer.study.outputs import check_exports, write
from interlayer.study.progress import Progress
from interlayer.study.result import Result, Run
from interlayer.study.spec import SEARCH_SEED, ArmSpec, StudyError, StudySpec
from interlayer.study.subject import takes_lr
from interlayer.study.train import OTHERS, Job, check
from interlayer.study.workers import Work, Workers, sentence

BASE = "(trained base)"  # the arm that trains what all arms of a study with a trained base share
Refusal = dict[str, str]
T = TypeVar("T")


def compare(
    spec: StudySpec | None = None,
    *,
    model: Any = None,
    task: Any = None,
    arms: Any = None,
    console: Console | None = None,
    resume: bool = True,
    **settings: Any,
) -> Result:
    """Train all arms side by side and report; runs that the storage already has are not run again.

    Args:
        spec: The whole study as data; or leave it out and give the parts:
        model: The model that the arms change: a text as in ``StudySpec.base``, a class or function that makes one (called with
            the data's shape if it has a first argument without default or one called ``shape``), or a module (its weights are
            where every seed begins; with ``steps=0`` it is judged as it is, which suits arms that are transforms).
        task: A text as in ``StudySpec.task``, a ``Task``, a pair of DataLoaders or other iterables of batches, a pair of
            (inputs, targets) as tensors or arrays, or a function that gives one of these.
        arms: A list of texts, classes, functions, modules and (name, one of these) pairs, or a mapping from names; a mapping in
            an arm's place has options, such as ``{"norm": "rmsnorm"}``.
        console: Where progress and the table go.
        resume: Go on with the records there are; otherwise they are deleted and everything runs anew.
        **settings: Other fields of ``StudySpec``: ``steps``, ``seeds``, ``lr``, ``out``, ...

    Returns:
        The outcome. A notebook shows its table; ``frame()`` gives the runs as a data frame.

    Raises:
        StudyError: The study as such cannot be run. What is wrong with one arm is that arm's result.

    Examples:
        >>> result = compare(StudySpec(task="digits", arms=["plain", "rezero"], steps=100))  # doctest: +SKIP
        >>> result = compare(model=Net, task=(train_loader, validation_loader),
        ...                  arms=["plain", "norm=rmsnorm", "activation=smelu"], steps=500)  # doctest: +SKIP
    """
    parts = {"base": model, "task": task, "arms": arms, **settings}
    given = Objects()
    if spec is None:
        spec = _of_parts({k: v for k, v in parts.items() if v is not None}, given)
    elif wrong := [k for k, v in parts.items() if v is not None]:
        raise StudyError(f"compare: {', '.join(wrong)} beside a StudySpec; give one or the other.")
    with plain_errors(spec.url):
        return _compare(_read(spec, given), console or Console(), resume)


def _of_parts(parts: dict[str, Any], given: Objects) -> StudySpec:
    """A study from Python as text; the objects behind that text are put into ``given``."""
    for key in ("base", "task"):
        if key in parts:
            parts[key] = given.text(parts[key], "data" if isinstance(parts[key], tuple | list) else "")
    arms = parts.get("arms")
    if isinstance(arms, Mapping):
        parts["arms"] = [{"name": name, "use": given.text(what, name)} for name, what in arms.items()]
    elif isinstance(arms, list | tuple):
        parts["arms"] = [_arm(what, given) for what in arms]
    return StudySpec.from_values(None, parts)


def _arm(what: Any, given: Objects) -> Any:
    if isinstance(what, str | ArmSpec):
        return what
    if isinstance(what, Mapping) and set(what) == {"name", "use"}:
        return {"name": what["name"], "use": given.text(what["use"], what["name"])}
    if isinstance(what, tuple) and len(what) == 2 and isinstance(what[0], str):
        return {"name": what[0], "use": given.text(what[1], what[0])}
    use = given.text(what)
    name = ", ".join(f"{k}={v}" for k, v in what.items()) if isinstance(what, Mapping) else shown(use)
    return {"name": name, "use": use}


@dataclass
class Study:
    """A study, read.

    Attributes:
        spec: As it was written, for the report.
        base: What the arms change, as text.
        task: What is learned.
        sent: The task as workers get it: its text, or itself where there is no text.
        arms: By name; or why there is none.
        job: What all runs share.
    """

    spec: StudySpec
    base: str
    task: Task
    sent: Task | str
    arms: dict[str, Arm | Refusal]
    job: Job


def _read(spec: StudySpec, given: Objects) -> Study:
    """Task, arms and budget of a study."""
    try:
        task = tasks.load(spec.task, given)
    except ValueError as error:
        raise StudyError(str(error)) from error
    if isinstance(task, LoaderTask) and "batch_size" in spec.model_fields_set:
        raise StudyError(
            f"batch_size: the batches of task {task.name!r} come from its own loaders; set their size there."
        )
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise StudyError("device: the study wants cuda, but torch sees no CUDA device here.")
    check_exports(spec.export)
    base = spec.base or task.base
    training = Training(spec.lr, spec.weight_decay, spec.warmup, spec.schedule, spec.clip)
    arms: dict[str, Arm | Refusal] = {
        a.name: _or_refused(partial(parse, a.name, a.use, base, given, training)) for a in spec.arms
    }
    if base.startswith(TRAINED):
        arms[BASE] = _or_refused(partial(parse, BASE, "plain", base, given, training))
    read = [arm for arm in arms.values() if isinstance(arm, Arm)]
    job = Job(
        spec.batch_size, None if spec.seconds else int(spec.budget["steps"]), spec.seconds, spec.evaluations,
        "cuda" if spec.device != "cpu" and torch.cuda.is_available() else "cpu", spec.folder / "bases" / spec.identity,
        any(arm.trained or arm.transforms for arm in read),
    )  # fmt: skip
    return Study(spec, base, task, task if spec.task in given else spec.task, arms, job)


def _or_refused(make: Callable[[], T]) -> T | Refusal:
    try:
        return make()
    except Exception as error:
        return {"error": sentence(error), "traceback": traceback.format_exc(), "kind": "refused"}


def _check(study: Study) -> dict[str, float]:
    """Try every arm, and refuse those that cannot work or that equal the baseline.

    Returns:
        By arm, the share of its initial noise that is the baseline's.
    """
    built: dict[str, Paired[Any]] = {}
    for name, arm in study.arms.items():
        if isinstance(arm, Arm):
            tried = _or_refused(partial(check, arm, study.task, study.job))
            if isinstance(tried, dict):
                study.arms[name] = tried
            else:
                study.arms[name], built[name] = replace(arm, plan=tried.plan), tried
    plain, base = study.arms[study.spec.baseline], built.get(study.spec.baseline)
    built.pop(BASE, None)
    if base is None or not isinstance(plain, Arm):
        return {}
    for name, found in built.items():
        arm = study.arms[name]
        assert isinstance(arm, Arm)
        made = [(a.training, a.rule, a.transforms) for a in (arm, plain)]
        if arm is plain or study.spec.allow_equal or made[0] != made[1] or difference(found.model, base.model):
            continue
        text = (
            f"arm {name!r} equals the baseline {plain.name!r}: the same modules, options, parameters and training. "
            "Change what it is made of, or allow equal arms (--allow-equal) to see how far chance alone goes."
        )
        study.arms[name] = {"error": text, "traceback": "", "kind": "refused"}
    return {name: shared(found, base) for name, found in built.items()}


def _compare(study: Study, console: Console, resume: bool) -> Result:
    spec, task = study.spec, study.task
    spec.folder.mkdir(parents=True, exist_ok=True)
    records: dict[str, Any] = {
        "url": spec.url, "name": spec.identity, "folder": spec.folder,
        "uses": {**{a.name: a.use for a in spec.arms}, **({BASE: study.base} if BASE in study.arms else {})},
        "higher": task.higher,
    }  # fmt: skip
    with Engine(**records, resume=resume) as engine:
        result = _run(study, engine, records, console)
    write(result, console)
    return result


def _run(study: Study, engine: Engine, records: dict[str, Any], console: Console) -> Result:
    spec, task = study.spec, study.task
    engine.write("spec", spec.model_dump(mode="json", exclude={"storage"}))  # its URL may hold a password
    engine.write(
        "about", {k: getattr(task, k) for k in ("name", "metric", "higher", "unit", "item", "about", "learns")}
    )
    engine.write("base", shown(study.base))
    engine.write("started", time.time())
    (spec.folder / "study.toml").write_text(spec.model_copy(update={"storage": None}).to_toml(), encoding="utf-8")
    engine.write("shared", _check(study))
    arms = {name: arm for name, arm in study.arms.items() if isinstance(arm, Arm)}
    work = Work(records, study.sent, arms, study.job, spec.threads, spec.keep, task)
    with (
        Progress(console, spec, task.unit if task.metric == "loss" else task.metric) as progress,
        Workers(engine, work, progress, spec.workers) as workers,
    ):
        for name, found in study.arms.items():
            if isinstance(found, dict):
                _refuse(name, found, engine, spec, progress)
        if kept := engine.kept():
            progress.line(f"{kept} runs are in the records already and are not run again.")
        rates = _rates(arms, engine, workers, spec, study.job, task.learns)
        for name in [n for n in arms if n not in rates]:
            why = {"error": "every learning rate diverged or failed", "traceback": "", "kind": "diverged"}
            _refuse(name, why, engine, spec, progress)
        _judge(rates, arms, engine, workers, study, progress)
    return _result(engine, spec)


def _refuse(name: str, why: Refusal, engine: Engine, spec: StudySpec, progress: Progress) -> None:
    if name != BASE:
        for seed in range(spec.looks[0]):
            engine.refuse(name, seed, why)
    progress.emit({"what": "failed", "arm": name, "seed": None, "error": why["error"]})


def _rates(
    arms: Mapping[str, Arm], engine: Engine, workers: Workers, spec: StudySpec, job: Job, learns: bool
) -> dict[str, float | None]:
    """The learning rate of each arm: its own, or the best of those that the study tries; an arm without any is left out."""
    fixed = {name: arm.training.lr for name, arm in arms.items()}
    if job.steps == 0 or not learns:
        return fixed
    trained = BASE in arms
    searched = [n for n, lr in fixed.items() if lr is None and takes_lr(arms[n]) and (n == BASE or not trained)]
    engine.queue("search", [(name, SEARCH_SEED, lr) for lr in spec.rates for name in searched])
    workers.finish(set(arms))
    best = {name: engine.best(name) if name in searched else fixed[name] for name in arms}
    if trained:
        best = dict.fromkeys(arms, best[BASE])
    return {n: lr for n, lr in best.items() if lr is not None or not takes_lr(arms[n])}


def _judge(
    rates: Mapping[str, float | None],
    arms: Mapping[str, Arm],
    engine: Engine,
    workers: Workers,
    study: Study,
    progress: Progress,
) -> None:
    """Run seeds until every arm is decided or has them all."""
    names = [n for n in rates if n != BASE]
    merged = max((resolve(use).merges for n in names for use in arms[n].transforms), default=0)
    for look in study.spec.looks:
        going = names if look == study.spec.looks[0] else _undecided(_result(engine, study.spec), names)
        if BASE in rates and going:
            seeds = [seed + OTHERS * i for seed in range(look) for i in range(merged + 1)]
            engine.queue("base", [(BASE, seed, rates[BASE]) for seed in seeds])
            workers.finish({BASE})
        engine.queue("run", [(name, seed, rates[name]) for seed in range(look) for name in going])
        workers.finish(set(names))
        _score_diverged(engine, study.task, progress)


def _undecided(result: Result, arms: list[str]) -> list[str]:
    """The arms that need more seeds, and the baseline with them. An arm whose every run raised gets no more."""
    found = []
    for name in arms:
        apart = result.difference(name)
        if apart is not None and not apart.decided and any(r.state != "failed" for r in result.of(name)):
            found.append(name)
    return [result.spec.baseline, *found] if found and result.spec.baseline in arms else []


def _score_diverged(engine: Engine, task: Task, progress: Progress) -> None:
    """Note what a trivial predictor scores, if a run diverged: that is its score too."""
    if "trivial" in engine.study.user_attrs or all(r.state != "diverged" for r in engine.runs("run")):
        return
    try:
        engine.write("trivial", task.trivial())
    except Exception as error:
        progress.line(
            f"task {task.name!r} gives no score of a trivial predictor ({sentence(error)}): diverged runs are left out."
        )


def _result(engine: Engine, spec: StudySpec) -> Result:
    """The outcome so far: every run that there is, and those of the first look that are missing."""
    attrs, least = engine.study.user_attrs, spec.looks[0]
    found = {(r.arm, r.seed): r for r in engine.runs("run")}
    wanted = [(arm.name, seed) for arm in spec.arms for seed in range(spec.looks[-1])]
    runs = [found.get(key, Run(*key, "missing")) for key in wanted]
    runs = [r for r in runs if r.state != "missing" or r.seed < least]
    about = {**attrs["about"], "trivial": attrs.get("trivial", {})}
    search = [r for r in engine.runs("search") if r.seed == SEARCH_SEED]
    return Result(spec, runs, search, about, attrs["base"], spec.folder, attrs.get("shared", {}))


def report(
    source: str | Path, *, console: Console | None = None, out: str | Path | None = None, export: str = ""
) -> Result:
    """Write the table, the CSV files and the page again from the records.

    Args:
        source: A study's folder, or the URL of its database (the study last run there).
        console: Where the table goes.
        out: Folder to write to. Defaults to the study's own.
        export: Other forms beside CSV, such as ``"parquet,tensorboard"``. Defaults to the study's own.

    Raises:
        StudyError: There are no records, or they cannot be read.
    """
    with plain_errors(str(source)):
        return _report(source, console or Console(), out, export)


def _report(source: str | Path, console: Console, out: str | Path | None, export: str) -> Result:
    url = str(source)
    if "://" not in url:
        path = Path(url)
        path = path / "study.db" if path.is_dir() else path
        if not path.is_file():
            raise StudyError(f"report: there are no records in {source}; expected a study's folder or a database URL.")
        url = f"sqlite:///{path.absolute()}"
    storage = open_storage(url)
    studies = [s for s in storage.get_all_studies() if "spec" in s.user_attrs]
    close_storage(storage)
    if not studies:
        raise StudyError(f"report: {source} holds no study of Interlayer.")
    last = max(studies, key=lambda s: s.user_attrs.get("started", 0))
    values = {**last.user_attrs["spec"], **({"export": export} if export else {})}
    spec = StudySpec.parse(values, "report")
    check_exports(spec.export)
    folder = Path(out) if out else Path(source) if Path(str(source)).is_dir() else spec.folder
    folder.mkdir(parents=True, exist_ok=True)
    with Engine(url, last.study_name, folder, {a.name: a.use for a in spec.arms}) as engine:
        result = replace(_result(engine, spec), out=folder)
    write(result, console)
    return result
