"""The engine: a study's runs as Optuna trials in a database, taken by one or more processes until all are done.

One trial is one (arm, seed), or one (arm, learning rate) of the tuning. A trial that a killed process left behind is
noticed by its process (on the same machine) or by its heartbeat (anywhere), closed, and queued again. Records are
never overwritten: whatever finished stays.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import platform
import socket
import sqlite3
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.exceptions import ExperimentalWarning, UpdateFinishedTrialError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from interlayer import __version__
from interlayer.study import tasks
from interlayer.study.arms import Arm, parse
from interlayer.study.progress import Progress
from interlayer.study.spec import StudyError, StudySpec
from interlayer.study.train import Diverged, Record, check, device_of, train

HEARTBEAT, GRACE = 5, 30  # seconds
KILLS = 2  # a run whose process was killed this often is reported as failed
Tell = Callable[[dict[str, Any]], None]


@dataclass
class Run:
    """One finished run as the report needs it.

    Attributes:
        state: ``done``, ``diverged``, ``failed`` or ``missing``.
    """

    arm: str
    seed: int
    state: str
    lr: float | None = None
    record: Record = field(default_factory=Record)
    error: str = ""
    traceback: str = ""
    where: dict[str, Any] = field(default_factory=dict)


@dataclass
class Result:
    """A study's outcome.

    Attributes:
        spec: What was run.
        runs: One for each arm and seed, in the order of the study.
        tuning: One for each tuning trial.
        about: The task as data: name, metric, higher, unit, item, about.
        base: The backbone.
        out: Folder of the report and the CSV files.
    """

    spec: StudySpec
    runs: list[Run]
    tuning: list[Run]
    about: dict[str, Any]
    base: str
    out: Path

    @property
    def finished(self) -> bool:
        """Whether every run ended with a result (an arm that diverged has one, one that raised has not)."""
        return all(run.state in ("done", "diverged") for run in self.runs)

    def of(self, arm: str) -> list[Run]:
        """The runs of an arm."""
        return [run for run in self.runs if run.arm == arm]

    def values(self, arm: str, metric: str = "") -> dict[int, float]:
        """Last value of a metric by seed, over the arm's finished runs."""
        metric = metric or self.about["metric"]
        return {
            r.seed: r.record.metrics[metric] for r in self.of(arm) if r.state == "done" and metric in r.record.metrics
        }


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


def open_storage(url: str) -> RDBStorage:
    """The database of the records, with heartbeats; SQLite in write-ahead mode, so that processes don't wait long."""
    arguments = {}
    if url.startswith("sqlite:///"):
        path = Path(url.removeprefix("sqlite:///"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with sqlite3.connect(path, timeout=60) as file:
            file.execute("PRAGMA journal_mode=WAL")
        file.close()
        arguments = {"connect_args": {"timeout": 60}}
    with quiet():
        return RDBStorage(url, engine_kwargs=arguments, heartbeat_interval=HEARTBEAT, grace_period=GRACE)


@contextmanager
def quiet() -> Iterator[None]:
    """Optuna without its log lines and the notice that heartbeats are experimental."""
    optuna.logging.set_verbosity(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


class Engine:
    """A study's trials in their database.

    Args:
        spec: What is compared.
        higher: Whether more of the task's metric is better.
        resume: Keep the records there are.
        name: The study's name in the storage, if not the one that follows from ``spec``.
    """

    def __init__(self, spec: StudySpec, higher: bool, *, resume: bool = True, name: str = "") -> None:
        self.spec, self.name = spec, name or spec.identity
        self.storage = open_storage(spec.url)
        with quiet():
            if not resume and self.name in [s.study_name for s in self.storage.get_all_studies()]:
                optuna.delete_study(study_name=self.name, storage=self.storage)
            direction = optuna.study.StudyDirection.MAXIMIZE if higher else optuna.study.StudyDirection.MINIMIZE
            self.study = optuna.create_study(
                study_name=self.name, storage=self.storage, direction=direction, load_if_exists=True
            )
        self.closed: set[int] = set()  # trials whose worker died under this very process

    def note(self, task: tasks.Task, base: str) -> None:
        """Write down what is run, for the report and the dashboard."""
        about = {k: getattr(task, k) for k in ("name", "metric", "higher", "unit", "item", "about")}
        spec = self.spec.model_dump(mode="json", exclude={"storage"})  # its URL may hold a password
        values = {"spec": spec, "about": about, "base": base, "started": time.time()}
        for key, value in values.items():
            self.study.set_user_attr(key, value)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """All trials in some states (in all, without any)."""
        return self.study.get_trials(deepcopy=False, states=states or None)

    def queue(self, wanted: list[tuple[str, int, float | None]], tuned: bool = False) -> None:
        """Queue each (arm, seed, learning rate) that is not done, running or queued; one that raised is tried again."""
        there = {_key(t) for t in self.trials() if t.state != TrialState.FAIL or t.user_attrs.get("kind") == "diverged"}
        for arm, seed, lr in wanted:
            phase = "tune" if lr is not None and not tuned else "run"
            if (phase, arm, seed, None if phase == "run" else lr) not in there:
                params = {} if lr is None else {"lr": lr}
                self.study.enqueue_trial(params, user_attrs={"phase": phase, "arm": arm, "seed": seed, "lr": lr})

    def refuse(self, arm: str, seed: int, found: dict[str, str]) -> None:
        """Record an arm that cannot be trained as failed."""
        attrs = {"phase": "run", "arm": arm, "seed": seed, "lr": None, "where": where(), **found}
        known = self._last().get(("run", arm, seed, None))
        if known is None or (known.state == TrialState.FAIL and known.user_attrs.get("error") != found["error"]):
            self.study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL, user_attrs=attrs))

    def claim(self, names: set[str]) -> FrozenTrial | None:
        """Take one queued trial; None if there is none to take now."""
        for trial in self.trials(TrialState.WAITING):
            if trial.user_attrs.get("arm") not in names:
                continue
            try:
                if not self.storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING):
                    continue
            except UpdateFinishedTrialError:
                continue
            self.storage.record_heartbeat(trial._trial_id)
            self.storage.set_trial_user_attr(trial._trial_id, "process", _process())
            earlier = [
                t
                for t in self.trials()
                if t.number < trial.number and _key(t) == _key(trial) and t.state != TrialState.FAIL
            ]
            if earlier:  # two machines queued the same run at the same moment
                self.close(trial, "duplicate", f"the same as trial {earlier[0].number}")
                continue
            if trial.user_attrs["phase"] == "tune":  # as a parameter, so that Optuna's own tools see it
                grid = self.spec.grid()
                optuna.trial.Trial(self.study, trial._trial_id).suggest_float("lr", grid[0], grid[-1], log=True)
            return trial
        return None

    def close(self, trial: FrozenTrial, kind: str, error: str, trace: str = "") -> bool:
        """End a trial without a result; False if someone else just ended it."""
        try:
            for key, value in (("kind", kind), ("error", error), ("traceback", trace)):
                self.storage.set_trial_user_attr(trial._trial_id, key, value)
            return bool(self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL))
        except UpdateFinishedTrialError:
            return False

    def revive(self) -> None:
        """Close what killed processes left behind and queue it again, or give it up after ``KILLS`` times."""
        for trial in self.trials(TrialState.RUNNING):
            process = trial.user_attrs.get("process")
            if process and process[0] == socket.gethostname() and not _alive(process):
                self.close(trial, "killed", "its process was killed")
        with quiet():
            fail_stale_trials(self.study)
        trials = self.trials()
        alive = {_key(t) for t in trials if t.state != TrialState.FAIL}
        killed: dict[Any, list[FrozenTrial]] = {}
        for t in trials:
            if t.state == TrialState.FAIL and t.user_attrs.get("kind", "killed") == "killed":
                killed.setdefault(_key(t), []).append(t)
        for key, dead in killed.items():
            if key in alive or self._last()[key].user_attrs.get("kind", "killed") != "killed":
                continue
            attrs = {k: dead[-1].user_attrs[k] for k in ("phase", "arm", "seed", "lr")}
            here = sum(t.number in self.closed for t in dead)
            if here >= KILLS:
                text = f"its process was killed {here} times; perhaps memory ran out (workers = {self.spec.workers})"
                self.study.add_trial(
                    optuna.trial.create_trial(
                        state=TrialState.FAIL, user_attrs={**attrs, "kind": "failed", "error": text, "traceback": ""}
                    )
                )
            else:
                params = {} if attrs["lr"] is None else {"lr": attrs["lr"]}
                self.study.enqueue_trial(params, user_attrs=attrs)

    def _last(self) -> dict[Any, FrozenTrial]:
        """The trial that counts for each run: a finished one, else the newest that is no duplicate."""
        found: dict[Any, FrozenTrial] = {}
        for t in self.trials():
            if "arm" not in t.user_attrs or t.user_attrs.get("kind") == "duplicate":
                continue
            if found.get(_key(t)) is None or found[_key(t)].state != TrialState.COMPLETE:
                found[_key(t)] = t
        return found

    def kept(self, spec: StudySpec) -> int:
        """How many of the wanted runs have their result already."""
        last = self._last()
        keys = [("run", a.name, s, None) for a in spec.arms for s in spec.eval_seeds()]
        return sum(k in last and _state(last[k]) in ("done", "diverged") for k in keys)

    def open(self, names: set[str]) -> list[FrozenTrial]:
        """Trials of these arms that are queued or running."""
        found = self.trials(TrialState.WAITING, TrialState.RUNNING)
        return [t for t in found if t.user_attrs.get("arm") in names]

    def best(self, arm: str) -> float | None:
        """The arm's best learning rate; None if no tuning trial ended well."""
        done = [
            t
            for t in self.trials(TrialState.COMPLETE)
            if t.user_attrs.get("phase") == "tune" and t.user_attrs["arm"] == arm
        ]
        sign = -1 if self.study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
        return min(done, key=lambda t: sign * float(t.value or 0)).user_attrs["lr"] if done else None

    def result(self) -> Result:
        """The outcome so far."""
        attrs, last = self.study.user_attrs, self._last()
        runs = []
        for arm in self.spec.arms:
            for seed in self.spec.eval_seeds():
                trial = last.get(("run", arm.name, seed, None))
                runs.append(_run(trial) if trial else Run(arm.name, seed, "missing"))
        names = {arm.name for arm in self.spec.arms}
        tuning = [_run(t) for k, t in last.items() if k[0] == "tune" and k[1] in names] if self.spec.tune else []
        return Result(self.spec, runs, tuning, attrs["about"], attrs["base"], self.spec.folder)


def _key(trial: FrozenTrial) -> tuple[Any, ...]:
    a = trial.user_attrs
    return (a.get("phase"), a.get("arm"), a.get("seed"), a.get("lr") if a.get("phase") == "tune" else None)


def _state(trial: FrozenTrial) -> str:
    if trial.state == TrialState.COMPLETE:
        return "done"
    if trial.state == TrialState.FAIL:
        kind = trial.user_attrs.get("kind", "killed")
        return {"diverged": "diverged", "killed": "missing"}.get(kind, "failed")
    return "missing"


def _run(trial: FrozenTrial) -> Run:
    a = trial.user_attrs
    record = Record(**a.get("record", {}))
    return Run(
        a["arm"],
        a["seed"],
        _state(trial),
        a.get("lr"),
        record,
        a.get("error", ""),
        a.get("traceback", ""),
        a.get("where", {}),
    )


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


def _process() -> list[Any]:
    return [socket.gethostname(), os.getpid(), _born(os.getpid())]


def _born(pid: int) -> str:
    """When a process started, where the system tells: process numbers are used again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def _alive(process: list[Any]) -> bool:
    try:
        os.kill(process[1], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _born(process[1]) == process[2]


def where() -> dict[str, Any]:
    """The machine and the versions, for the report."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass
    return {
        "interlayer": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "optuna": optuna.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": f"{cpu}, {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": torch.get_num_threads(),
    }


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
