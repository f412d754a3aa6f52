"""Run a study: all its trials, in this process or in several, until all are done; then the report."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cloudpickle
import torch
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from interlayer.core.equal import difference
from interlayer.core.pairing import Paired, shared
from interlayer.study import tasks
from interlayer.study.arms import Arm, parse
from interlayer.study.engine import HEARTBEAT, Engine, open_storage, plain_errors, where
from interlayer.study.loaders import LoaderTask
from interlayer.study.objects import Objects, shown
from interlayer.study.outputs import check_exports, write
from interlayer.study.progress import Progress
from interlayer.study.result import Result
from interlayer.study.spec import SEARCH_SEED, ArmSpec, StudyError, StudySpec
from interlayer.study.task import Task
from interlayer.study.train import Diverged, Record, check, device_of, takes_lr, train

Emit = Callable[[dict[str, Any]], None]


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
            where every seed begins).
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
        return _compare(spec, given, console or Console(), resume)


def _compare(spec: StudySpec, given: Objects, console: Console, resume: bool) -> Result:
    task = tasks.load(spec.task, given)
    if isinstance(task, LoaderTask) and "batch_size" in spec.model_fields_set:
        raise StudyError(
            f"batch_size: the batches of task {task.name!r} come from its own loaders; set their size there."
        )
    device_of(spec)
    check_exports(spec.export)
    base = spec.base or task.base
    spec.folder.mkdir(parents=True, exist_ok=True)
    engine = Engine(spec, task.higher, resume=resume)
    engine.note(task, base)
    (spec.folder / "study.toml").write_text(spec.model_copy(update={"storage": None}).to_toml(), encoding="utf-8")
    built = {a.name: _checked(partial(_read_and_check, a.name, a.use, base, given, task, spec)) for a in spec.arms}
    checked, share = _against_baseline(built, spec)
    engine.write("shared", share)
    arms = {name: found for name, found in checked.items() if isinstance(found, Arm)}
    sent = task if spec.task in given else None
    with Progress(console, spec, task.unit if task.metric == "loss" else task.metric) as progress:

        def refuse(name: str, found: dict[str, str]) -> None:
            for seed in range(spec.looks[0]):
                engine.refuse(name, seed, found)
            progress.emit({"what": "failed", "arm": name, "seed": None, "error": found["error"]})

        for name, found in checked.items():
            if isinstance(found, dict):
                refuse(name, found)
        if kept := engine.kept():
            progress.line(f"{kept} runs are in the records already and are not run again.")
        fixed = {name: arm.training.get("lr") or spec.lr for name, arm in arms.items()}
        searched = [name for name, lr in fixed.items() if lr is None and takes_lr(arms[name])]
        engine.queue("search", [(name, SEARCH_SEED, lr) for lr in spec.rates for name in searched])
        _work(engine, arms, task, sent, progress)
        rates = {name: engine.best(name) if name in searched else fixed[name] for name in arms}
        for name in [n for n in searched if rates[n] is None]:
            refuse(name, {"error": "every learning rate diverged or failed", "traceback": "", "kind": "diverged"})
            del arms[name]
        for look in spec.looks:
            going = list(arms) if look == spec.looks[0] else _undecided(engine.result(), arms)
            engine.queue("run", [(name, seed, rates[name]) for seed in range(look) for name in going])
            _work(engine, arms, task, sent, progress)
            _score_diverged(engine, task, progress)
    result = engine.result()
    write(result, console)
    return result


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


def _against_baseline(
    checked: dict[str, tuple[Arm, Paired[Any]] | dict[str, str]], spec: StudySpec
) -> tuple[dict[str, Arm | dict[str, str]], dict[str, float]]:
    """Refuse arms that equal the baseline; and by arm, the share of its initial noise that is the baseline's."""
    arms: dict[str, Arm | dict[str, str]] = {
        n: found if isinstance(found, dict) else found[0] for n, found in checked.items()
    }
    built = {n: found[1] for n, found in checked.items() if not isinstance(found, dict)}
    if spec.baseline not in built:
        return arms, {}
    plain, base = arms[spec.baseline], built[spec.baseline]
    for name in [n for n in built if n != spec.baseline and not spec.allow_equal]:
        arm = arms[name]
        assert isinstance(arm, Arm) and isinstance(plain, Arm)
        trained = (arm.training, arm.rule, arm.transform) == (plain.training, plain.rule, plain.transform)
        if trained and not difference(built[name].model, base.model):
            text = (
                f"arm {name!r} equals the baseline {spec.baseline!r}: the same modules, options, parameters and training. "
                "Change what it is made of, or allow equal arms (--allow-equal) to see how far chance alone goes."
            )
            arms[name] = {"error": text, "traceback": "", "kind": "refused"}
    return arms, {name: shared(found, base) for name, found in built.items()}


def _undecided(result: Result, arms: Mapping[str, Arm]) -> list[str]:
    """The arms that need more seeds, and the baseline with them. An arm whose every run raised gets no more."""
    found = []
    for name in arms:
        apart = result.difference(name)
        if apart is not None and not apart.decided and any(r.state != "failed" for r in result.of(name)):
            found.append(name)
    return [result.spec.baseline, *found] if found and result.spec.baseline in arms else []


def _score_diverged(engine: Engine, task: Task, progress: Progress) -> None:
    """Note what a trivial predictor scores, if a run diverged: that is its score too."""
    if "trivial" in engine.study.user_attrs or all(r.state != "diverged" for r in engine.result().runs):
        return
    try:
        engine.write("trivial", task.trivial())
    except Exception as error:
        progress.line(
            f"task {task.name!r} gives no score of a trivial predictor ({_sentence(error)}): diverged runs are left out."
        )


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
            raise StudyError(f"report: there are no records in {source}; wanted a study's folder or a database URL.")
        url = f"sqlite:///{path.absolute()}"
    storage = open_storage(url)
    studies = [s for s in storage.get_all_studies() if "spec" in s.user_attrs]
    if not studies:
        raise StudyError(f"report: {source} holds no study of Interlayer.")
    last = max(studies, key=lambda s: s.user_attrs.get("started", 0))
    spec = StudySpec.model_validate({**last.user_attrs["spec"], "storage": url})
    spec = spec.model_copy(
        update={"out": Path(out) if out else Path(source) if Path(str(source)).is_dir() else spec.folder}
    )
    engine = Engine(spec, False, name=last.study_name)
    result = engine.result()
    result.spec = StudySpec.parse({**last.user_attrs["spec"], **({"export": export} if export else {})}, "report")
    check_exports(result.spec.export)
    spec.folder.mkdir(parents=True, exist_ok=True)
    result.out = spec.folder
    write(result, console)
    return result


def _read_and_check(
    name: str, use: str, base: str, given: Objects, task: Task, spec: StudySpec
) -> tuple[Arm, Paired[Any]]:
    arm = parse(name, use, base, given)
    built = check(arm, task, spec)
    return replace(arm, plan=built.plan), built


def _checked(make: Callable[[], tuple[Arm, Paired[Any]]]) -> tuple[Arm, Paired[Any]] | dict[str, str]:
    try:
        return make()
    except Exception as error:
        return {"error": _sentence(error), "traceback": traceback.format_exc(), "kind": "refused"}


def _sentence(error: BaseException) -> str:
    return str(error) if isinstance(error, StudyError | Diverged) else f"{type(error).__name__}: {error}"


def serve(engine: Engine, arms: dict[str, Arm], task: Task, emit: Emit) -> None:
    """Take queued trials and run them until none can be taken."""
    while (trial := engine.claim(set(arms))) is not None:
        with suppress(UpdateFinishedTrialError):  # it was taken for dead, closed, and is run again
            _run_one(engine, trial, arms[trial.user_attrs["arm"]], task, emit)


def _run_one(engine: Engine, trial: FrozenTrial, arm: Arm, task: Task, emit: Emit) -> None:
    attrs = trial.user_attrs
    seed, lr = attrs["seed"], attrs["lr"]
    label = {"arm": arm.name, "seed": seed, "lr": lr if attrs["phase"] == "search" else None}

    def pass_on(event: dict[str, Any]) -> None:
        if event["what"] == "eval":
            engine.storage.set_trial_intermediate_value(trial._trial_id, int(event["step"]), event["value"])
        emit({**event, **label})

    emit({"what": "start", **label})
    record = Record()
    put = partial(engine.storage.set_trial_user_attr, trial._trial_id)
    put("where", where())
    begin = time.perf_counter()
    with _beating(engine, trial):
        try:
            train(
                arm, task, engine.spec, seed, lr=lr, emit=pass_on, record=record, checkpoint=engine.checkpoint(trial),
                keep=engine.weights(trial) if engine.spec.keep else None,
            )  # fmt: skip
        except Exception as error:
            put("record", _finite(record.data()))
            kind = "diverged" if isinstance(error, Diverged) else "failed"
            engine.close(trial, kind, _sentence(error), traceback.format_exc())
            emit({"what": kind, "error": _sentence(error), **label})
            return
        except BaseException:  # stopped by hand, perhaps in a notebook that lives on
            engine.close(trial, "killed", "stopped")
            raise
        put("record", record.data())
        put("wall", time.perf_counter() - begin)
        engine.storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [record.metrics[task.metric]])
    emit({"what": "done", "metrics": record.metrics, **label})


def _finite(data: Any) -> Any:
    """NaN and infinity as None: JSON has neither."""
    if isinstance(data, dict):
        return {k: _finite(v) for k, v in data.items()}
    if isinstance(data, list):
        return [_finite(v) for v in data]
    return None if isinstance(data, float) and data - data != 0 else data


@contextmanager
def _beating(engine: Engine, trial: FrozenTrial) -> Iterator[None]:
    """Record a heartbeat for the trial in a thread."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(HEARTBEAT):
            engine.storage.record_heartbeat(trial._trial_id)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _work(engine: Engine, arms: dict[str, Arm], task: Task, sent: Task | None, progress: Progress) -> None:
    """Run all open trials of these arms, here or in worker processes; wait for those that other machines run."""
    waiting = False
    while True:
        engine.revive()
        found = engine.open(set(arms))
        if not found:
            return
        queued = sum(t.state == TrialState.WAITING for t in found)
        if not queued:
            if not waiting:
                progress.line(f"waiting for {len(found)} run(s) of another process")
            waiting = True
            time.sleep(1)
        elif engine.spec.workers == 1:
            torch.set_num_threads(engine.spec.threads)
            serve(engine, arms, task, progress.emit)
        else:
            _processes(engine, arms, sent, progress, min(engine.spec.workers, queued))


def _processes(engine: Engine, arms: dict[str, Arm], sent: Task | None, progress: Progress, count: int) -> None:
    try:  # by value where it was defined in a notebook or a script
        content = cloudpickle.dumps((engine.spec, engine.name, arms, sent))
    except Exception as error:
        raise StudyError(
            f"the model or the task cannot be sent to worker processes ({_sentence(error)}); set workers=1, or define them in a "
            "module and name it, as package.module:function."
        ) from error
    queued = len(engine.trials(TrialState.WAITING))
    context = multiprocessing.get_context("spawn")
    workers = {}
    for _ in range(count):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_worker, args=(there, content), daemon=True)
        process.start()
        there.close()
        workers[here] = process
    pids = {p.pid: p for p in workers.values()}
    try:
        while workers:
            for pipe in wait(list(workers), timeout=1):
                assert isinstance(pipe, Connection)
                try:
                    progress.emit(pipe.recv())
                except (EOFError, OSError):
                    workers.pop(pipe).join()
    finally:
        for process in workers.values():
            process.terminate()
            process.join()
    if all(p.exitcode for p in pids.values()) and len(engine.trials(TrialState.WAITING)) == queued:
        raise StudyError(
            f"the worker processes ended with exit codes {[p.exitcode for p in pids.values()]} before any run."
        )
    for trial in engine.trials(TrialState.RUNNING):
        held = trial.user_attrs.get("process")
        if held and held[0] == socket.gethostname() and held[1] in pids:
            code = pids[held[1]].exitcode
            progress.line(
                f"a worker ended with exit code {code} in {trial.user_attrs['arm']}, seed {trial.user_attrs['seed']}"
            )
            engine.closed.add(trial.number)


def _worker(pipe: Connection, content: bytes) -> None:
    """A worker process; it ends with its parent, however that ends."""
    spec, name, arms, sent = pickle.loads(content)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    torch.set_num_threads(spec.threads)
    task = sent or tasks.load(spec.task)
    serve(Engine(spec, task.higher, name=name), arms, task, pipe.send)
    pipe.close()
