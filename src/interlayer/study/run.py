"""Run a study: all its trials, in this process or in several, until all are done; then the report."""

from __future__ import annotations

import multiprocessing
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from interlayer.study import tasks
from interlayer.study.arms import Arm, parse
from interlayer.study.engine import HEARTBEAT, Engine, Result, open_storage, where
from interlayer.study.progress import Progress
from interlayer.study.spec import StudyError, StudySpec
from interlayer.study.train import Diverged, Record, check, device_of, train

Tell = Callable[[dict[str, Any]], None]


def compare(spec: StudySpec, *, console: Console | None = None, resume: bool = True) -> Result:
    """Train all arms side by side and report; runs that the storage already has are not run again.

    Args:
        spec: What is compared.
        console: Where progress and the table go.
        resume: Go on with the records there are; otherwise they are deleted and everything runs anew.

    Raises:
        StudyError: The study as such cannot be run. What is wrong with one arm is that arm's result.

    Examples:
        >>> result = compare(StudySpec(task="digits", arms=["plain", "rezero"], steps=100))  # doctest: +SKIP
    """
    from interlayer.study.report import write

    console = console or Console()
    task = tasks.load(spec.task)
    device_of(spec)
    base = spec.base or task.base
    spec.folder.mkdir(parents=True, exist_ok=True)
    engine = Engine(spec, task.higher, resume=resume)
    engine.note(task, base)
    (spec.folder / "study.toml").write_text(spec.model_copy(update={"storage": None}).to_toml(), encoding="utf-8")
    arms = {a.name: _checked(partial(_read_and_check, a.name, a.use, base, task, spec)) for a in spec.arms}
    good = {name: found for name, found in arms.items() if isinstance(found, Arm)}
    with Progress(console, spec, task.unit if task.metric == "loss" else task.metric) as progress:
        for name, found in arms.items():
            if isinstance(found, dict):
                for seed in spec.eval_seeds():
                    engine.refuse(name, seed, found)
                progress.tell({"what": "failed", "arm": name, "seed": None, "error": found["error"]})
        kept = engine.kept(spec)
        if kept:
            progress.line(
                f"{kept} of {len(spec.arms) * spec.seeds} runs are in the records already and are not run again."
            )
        if spec.tune:
            engine.queue([(name, 0, lr) for lr in spec.grid() for name in good])
            _work(engine, good, task, base, progress)
        best = {name: engine.best(name) for name in good} if spec.tune else {}
        for name in [n for n, lr in best.items() if lr is None]:
            found = {"error": "every tuning trial diverged or failed", "traceback": "", "kind": "diverged"}
            for seed in spec.eval_seeds():
                engine.refuse(name, seed, found)
            del good[name]
        engine.queue([(name, seed, best.get(name)) for seed in spec.eval_seeds() for name in good], tuned=True)
        _work(engine, good, task, base, progress)
    result = engine.result()
    write(result, console)
    return result


def report(source: str | Path, *, console: Console | None = None, out: str | Path | None = None) -> Result:
    """Write the table, the CSV files and the page again from the records.

    Args:
        source: A study's folder, or the URL of its database (the study last run there).
        console: Where the table goes.
        out: Folder to write to; the study's own unless told.
    """
    from interlayer.study.report import write

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
    result.spec = StudySpec.model_validate(last.user_attrs["spec"])
    spec.folder.mkdir(parents=True, exist_ok=True)
    result.out = spec.folder
    write(result, console or Console())
    return result


def _read_and_check(name: str, use: str, base: str, task: tasks.Task, spec: StudySpec) -> Arm:
    arm = parse(name, use, base)
    check(arm, task, spec)
    return arm


def _checked(make: Callable[[], Arm]) -> Arm | dict[str, str]:
    try:
        return make()
    except Exception as error:
        return {"error": _sentence(error), "traceback": traceback.format_exc(), "kind": "refused"}


def _sentence(error: BaseException) -> str:
    return str(error) if isinstance(error, StudyError | Diverged) else f"{type(error).__name__}: {error}"


def serve(engine: Engine, arms: dict[str, Arm], task: tasks.Task, tell: Tell) -> None:
    """Take queued trials and run them until none can be taken."""
    while (trial := engine.claim(set(arms))) is not None:
        attrs = trial.user_attrs
        arm, seed, lr = arms[attrs["arm"]], attrs["seed"], attrs["lr"]
        label = {"arm": arm.name, "seed": seed, "lr": lr if attrs["phase"] == "tune" else None}

        def told(event: dict[str, Any], label: dict[str, Any] = label, trial: FrozenTrial = trial) -> None:
            if event["what"] == "eval":
                engine.storage.set_trial_intermediate_value(trial._trial_id, int(event["step"]), event["value"])
            tell({**event, **label})

        tell({"what": "start", **label})
        record = Record()
        put = partial(engine.storage.set_trial_user_attr, trial._trial_id)
        put("where", where())
        begin = time.perf_counter()
        with _beating(engine, trial):
            try:
                train(arm, task, engine.spec, seed, lr=lr, tell=told, record=record)
            except Exception as error:
                put("record", _finite(record.data()))
                kind = "diverged" if isinstance(error, Diverged) else "failed"
                engine.close(trial, kind, _sentence(error), traceback.format_exc())
                tell({"what": kind, "error": _sentence(error), **label})
                continue
            except BaseException:  # stopped by hand, perhaps in a notebook that lives on
                engine.close(trial, "killed", "stopped")
                raise
            put("record", record.data())
            put("wall", time.perf_counter() - begin)
            try:
                engine.storage.set_trial_state_values(
                    trial._trial_id, TrialState.COMPLETE, [record.metrics[task.metric]]
                )
            except UpdateFinishedTrialError:  # it was taken for dead and is run again
                continue
        tell({"what": "done", "metrics": record.metrics, **label})


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


def _work(engine: Engine, arms: dict[str, Arm], task: tasks.Task, base: str, progress: Progress) -> None:
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
            serve(engine, arms, task, progress.tell)
        else:
            _processes(engine, arms, progress, min(engine.spec.workers, queued))


def _processes(engine: Engine, arms: dict[str, Arm], progress: Progress, count: int) -> None:
    queued = len(engine.trials(TrialState.WAITING))
    context = multiprocessing.get_context("spawn")
    workers = {}
    for _ in range(count):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_worker, args=(there, engine.spec, engine.name, arms), daemon=True)
        process.start()
        there.close()
        workers[here] = process
    pids = {p.pid: p for p in workers.values()}
    try:
        while workers:
            for pipe in wait(list(workers), timeout=1):
                assert isinstance(pipe, Connection)
                try:
                    progress.tell(pipe.recv())
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


def _worker(pipe: Connection, spec: StudySpec, name: str, arms: dict[str, Arm]) -> None:
    """A worker process; it ends with its parent, however that ends."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    torch.set_num_threads(spec.threads)
    task = tasks.load(spec.task)
    serve(Engine(spec, task.higher, name=name), arms, task, pipe.send)
    pipe.close()
