"""The records of a study: its runs as Optuna trials in a database.

One trial is one (arm, seed), or one (arm, learning rate) of the tuning. A trial that a killed process left behind is
noticed by its process (on the same machine) or by its heartbeat (anywhere), closed, and queued again. Records are
never overwritten: whatever finished stays.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import socket
import sqlite3
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from interlayer.study.result import Result, Run
from interlayer.study.spec import SEARCH_SEED, StudyError, StudySpec, plain, shown
from interlayer.study.task import Task
from interlayer.study.train import Record
from interlayer.version import __version__

HEARTBEAT, GRACE = 5, 30  # seconds
TRIES = 10  # to open a database that other processes open at the same moment
DRIVERS = {"psycopg": '"psycopg[binary]"', "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}  # as pip calls them
KILLS = 2  # a run whose process was killed this often is reported as failed


def open_storage(url: str) -> RDBStorage:
    """The database of the records, with heartbeats; SQLite in write-ahead mode, so that processes don't wait long.

    Raises:
        ImportError: The database needs a driver that is not installed; the message names it.
    """
    for tried in range(TRIES):
        try:
            return _open(url)
        except (DBAPIError, StorageInternalError, sqlite3.OperationalError):
            if tried + 1 == TRIES:
                raise
            time.sleep(0.1 * (tried + 1))  # another process is making the tables of a new database
    raise AssertionError


def _open(url: str) -> RDBStorage:
    arguments = {}
    if url.startswith("sqlite:///"):
        path = Path(url.removeprefix("sqlite:///"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=60)) as file:
            file.execute("PRAGMA journal_mode=WAL")
        arguments = {"connect_args": {"timeout": 60}}
    try:
        with quiet():
            return RDBStorage(url, engine_kwargs=arguments, heartbeat_interval=HEARTBEAT, grace_period=GRACE)
    except ImportError as error:
        driver = getattr(error.__cause__, "name", None) or "its driver"
        raise ImportError(
            f"study: the database {hidden(url)} needs the Python package {driver!r}: "
            f"pip install {DRIVERS.get(driver, driver)}."
        ) from error


@contextmanager
def plain_errors(url: str) -> Iterator[None]:
    """What goes wrong in the database as one ``StudyError``: a broken file, a full disk, a server that is away."""
    try:
        yield
    except (SQLAlchemyError, StorageInternalError, sqlite3.Error) as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        why = str(cause).partition("\n")[0].rstrip(".")
        raise StudyError(
            f"study: the records in {hidden(url)} cannot be read or written: {why}. "
            "Free space, move a broken file away, or name another database (--storage)."
        ) from error


def hidden(url: str) -> str:
    """A database URL without its password; the path of a file."""
    try:
        return url.removeprefix("sqlite:///") if url.startswith("sqlite:") else make_url(url).render_as_string()
    except ArgumentError:
        return url


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
        self.checkpoints = spec.folder / "checkpoints" / self.name
        self.uses = {arm.name: arm.use for arm in spec.arms}
        self.storage = open_storage(spec.url)
        with quiet():
            if not resume:
                shutil.rmtree(self.checkpoints, ignore_errors=True)
                if self.name in [s.study_name for s in self.storage.get_all_studies()]:
                    optuna.delete_study(study_name=self.name, storage=self.storage)
            direction = optuna.study.StudyDirection.MAXIMIZE if higher else optuna.study.StudyDirection.MINIMIZE
            self.study = optuna.create_study(
                study_name=self.name, storage=self.storage, direction=direction, load_if_exists=True
            )
        self.closed: set[int] = set()  # trials whose worker died under this very process

    def note(self, task: Task, base: str) -> None:
        """Write down what is run, for the report and the dashboard."""
        about = {k: getattr(task, k) for k in ("name", "metric", "higher", "unit", "item", "about")}
        spec = self.spec.model_dump(mode="json", exclude={"storage"})  # its URL may hold a password
        values = {"spec": spec, "about": about, "base": shown(base), "started": time.time()}
        for key, value in values.items():
            self.study.set_user_attr(key, value)

    def checkpoint(self, trial: FrozenTrial) -> Path:
        """Where a run keeps its state, so that one that is cut off goes on from there."""
        a = trial.user_attrs
        digest = hashlib.blake2b(repr((_key(trial), a.get("use"))).encode(), digest_size=6).hexdigest()
        return self.checkpoints / f"{digest}.pt"

    def weights(self, trial: FrozenTrial) -> Path | None:
        """Where the model of a judged run is saved."""
        a = trial.user_attrs
        return self.spec.folder / "weights" / plain(a["arm"]) / f"seed-{a['seed']}" if a["phase"] == "run" else None

    def write(self, key: str, value: Any) -> None:
        """Write down one more fact on the study."""
        self.study.set_user_attr(key, value)

    def trials(self, *states: TrialState) -> list[FrozenTrial]:
        """All trials in some states (in all, without any), but for those of an arm whose name now means another arm."""
        found = self.study.get_trials(deepcopy=False, states=states or None)
        return [t for t in found if self._means(t)]

    def _means(self, trial: FrozenTrial) -> bool:
        """Whether the trial's arm is still made of the same."""
        arm, use = trial.user_attrs.get("arm", ""), trial.user_attrs.get("use")
        return use is None or self.uses.get(arm, use) == use

    def queue(self, phase: str, wanted: list[tuple[str, int, float | None]]) -> None:
        """Queue each (arm, seed, learning rate) that is not done, running or queued; one that raised is tried again.

        Args:
            phase: ``search`` for runs that choose the learning rate, ``run`` for those that are judged.
            wanted: The runs.
        """
        there = {_key(t) for t in self.trials() if t.state != TrialState.FAIL or t.user_attrs.get("kind") == "diverged"}
        for arm, seed, lr in wanted:
            if (phase, arm, seed, None if phase == "run" else lr) not in there:
                params = {} if lr is None else {"lr": lr}
                attrs = {"phase": phase, "arm": arm, "use": self.uses.get(arm, arm), "seed": seed, "lr": lr}
                self.study.enqueue_trial(params, user_attrs=attrs)

    def refuse(self, arm: str, seed: int, found: dict[str, str]) -> None:
        """Record an arm that cannot be trained as failed."""
        attrs = {
            "phase": "run",
            "arm": arm,
            "use": self.uses.get(arm, arm),
            "seed": seed,
            "lr": None,
            "where": where(),
            **found,
        }
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
            if trial.user_attrs["phase"] == "search":  # as a parameter, so that Optuna's own tools see it
                rates = self.spec.rates
                optuna.trial.Trial(self.study, trial._trial_id).suggest_float("lr", min(rates), max(rates), log=True)
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
            attrs = {k: dead[-1].user_attrs.get(k) for k in ("phase", "arm", "use", "seed", "lr")}
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

    def kept(self) -> int:
        """How many runs of the study's arms have their result already."""
        names = {arm.name for arm in self.spec.arms}
        return sum(k[1] in names and _state(t) in ("done", "diverged") for k, t in self._last().items())

    def open(self, names: set[str]) -> list[FrozenTrial]:
        """Trials of these arms that are queued or running."""
        found = self.trials(TrialState.WAITING, TrialState.RUNNING)
        return [t for t in found if t.user_attrs.get("arm") in names]

    def best(self, arm: str) -> float | None:
        """The arm's best learning rate of those tried; None if every one diverged or failed."""
        done = [
            t
            for t in self.trials(TrialState.COMPLETE)
            if t.user_attrs.get("phase") == "search" and t.user_attrs["arm"] == arm
        ]
        sign = -1 if self.study.direction == optuna.study.StudyDirection.MAXIMIZE else 1
        return min(done, key=lambda t: sign * float(t.value or 0)).user_attrs["lr"] if done else None

    def result(self) -> Result:
        """The outcome so far: every run that there is, and those of the first look that are missing."""
        attrs, last = self.study.user_attrs, self._last()
        runs = []
        for arm in self.spec.arms:
            for seed in range(self.spec.looks[-1]):
                trial = last.get(("run", arm.name, seed, None))
                if trial is not None and (_state(trial) != "missing" or seed < self.spec.looks[0]):
                    runs.append(_run(trial))
                elif seed < self.spec.looks[0]:
                    runs.append(Run(arm.name, seed, "missing"))
        names = {arm.name for arm in self.spec.arms}
        search = [_run(t) for k, t in last.items() if k[0] == "search" and k[1] in names and k[2] == SEARCH_SEED]
        about = {**attrs["about"], "trivial": attrs.get("trivial", {})}
        return Result(self.spec, runs, search, about, attrs["base"], self.spec.folder, attrs.get("shared", {}))


def _key(trial: FrozenTrial) -> tuple[Any, ...]:
    a = trial.user_attrs
    return (a.get("phase"), a.get("arm"), a.get("seed"), a.get("lr") if a.get("phase") == "search" else None)


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


def _process() -> list[Any]:
    return [socket.gethostname(), os.getpid(), _born(os.getpid())]


def _born(pid: int) -> str:
    """When a process started, on systems that say: process numbers are used again."""
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
