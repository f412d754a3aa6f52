"""The records of a study: its runs as Optuna trials in a database.

One trial is one (arm, seed), or one (arm, learning rate) of the tuning. A trial that a killed process left behind is
noticed by its process (on the same machine) or by its heartbeat (anywhere), closed, and queued again. Records are
never overwritten: whatever finished stays.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import socket
import sqlite3
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.storages._rdb.models import TrialModel
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import make_url, update
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from interlayer.study.machine import alive, this_process, where
from interlayer.study.result import Run
from interlayer.study.spec import StudyError, plain
from interlayer.study.train import Record

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


def close_storage(storage: RDBStorage) -> None:
    """Give its connections back."""
    storage.remove_session()
    storage.engine.dispose()


def _open(url: str) -> RDBStorage:
    arguments: dict[str, Any] = {}
    if url.startswith("sqlite:///"):
        path = Path(url.removeprefix("sqlite:///"))
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=60)) as file:
            file.execute("PRAGMA journal_mode=WAL")
        # Each session closes its connection at its end, also where opening fails halfway.
        arguments = {"connect_args": {"timeout": 60}, "poolclass": NullPool}
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
        url: Database.
        name: Name of the study there.
        folder: Where checkpoints and kept weights go.
        uses: What each arm is made of, by name.
        higher: Whether more of the task's metric is better.
        resume: Keep the records there are.
    """

    def __init__(
        self, url: str, name: str, folder: Path, uses: Mapping[str, str], *, higher: bool = False, resume: bool = True
    ) -> None:
        self.name, self.folder, self.uses = name, folder, uses
        self.checkpoints = folder / "checkpoints" / name
        self.storage = open_storage(url)
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        close_storage(self.storage)

    def checkpoint(self, trial: FrozenTrial) -> Path:
        """Where a run keeps its state, so that one that is cut off goes on from there."""
        a = trial.user_attrs
        digest = hashlib.blake2b(repr((_key(trial), a.get("use"))).encode(), digest_size=6).hexdigest()
        return self.checkpoints / f"{digest}.pt"

    def weights(self, trial: FrozenTrial) -> Path | None:
        """Where the model of a judged run is saved."""
        a = trial.user_attrs
        return self.folder / "weights" / plain(a["arm"]) / f"seed-{a['seed']}" if a["phase"] == "run" else None

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
        rates = sorted(lr for _, _, lr in wanted if lr is not None)
        for arm, seed, lr in wanted:
            if (phase, arm, seed, lr if phase == "search" else None) not in there:
                params = {} if lr is None else {"lr": lr}
                attrs = {"phase": phase, "arm": arm, "use": self.uses.get(arm, arm), "seed": seed, "lr": lr}
                if phase == "search":
                    attrs["rates"] = [rates[0], rates[-1]]
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
            if not self._take(trial):
                continue
            self.storage.record_heartbeat(trial._trial_id)
            self.storage.set_trial_user_attr(trial._trial_id, "process", this_process())
            earlier = [
                t
                for t in self.trials()
                if t.number < trial.number and _key(t) == _key(trial) and t.state != TrialState.FAIL
            ]
            if earlier:  # two machines queued the same run at the same moment
                self.close(trial, "duplicate", f"the same as trial {earlier[0].number}")
                continue
            if trial.user_attrs["phase"] == "search":  # as a parameter, so that Optuna's own tools see it
                optuna.trial.Trial(self.study, trial._trial_id).suggest_float(
                    "lr", *trial.user_attrs["rates"], log=True
                )
            return trial
        return None

    def _take(self, trial: FrozenTrial) -> bool:
        """Whether this process took the trial: one statement, as Optuna's own two let two processes in at the same moment."""
        mine = (TrialModel.trial_id == trial._trial_id) & (TrialModel.state == TrialState.WAITING)
        with self.storage.engine.begin() as connection:
            now = {"state": TrialState.RUNNING, "datetime_start": datetime.now()}
            return connection.execute(update(TrialModel).where(mine).values(now)).rowcount == 1

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
            if process and process[0] == socket.gethostname() and not alive(process):
                self.close(trial, "killed", "its process was killed")
        with quiet():
            fail_stale_trials(self.study)
        trials = self.trials()
        open_ = {_key(t) for t in trials if t.state != TrialState.FAIL}
        killed: dict[Any, list[FrozenTrial]] = {}
        for t in trials:
            if t.state == TrialState.FAIL and t.user_attrs.get("kind", "killed") == "killed":
                killed.setdefault(_key(t), []).append(t)
        for key, dead in killed.items():
            if key in open_ or self._last()[key].user_attrs.get("kind", "killed") != "killed":
                continue
            attrs = {k: dead[-1].user_attrs.get(k) for k in ("phase", "arm", "use", "seed", "lr", "rates")}
            here = sum(t.number in self.closed for t in dead)
            if here >= KILLS:
                text = f"its process was killed {here} times; perhaps memory ran out. Fewer workers need less."
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
        return sum(k[1] in self.uses and _state(t) in ("done", "diverged") for k, t in self._last().items())

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

    def runs(self, phase: str) -> list[Run]:
        """The outcome of each run of a phase so far, for the study's arms."""
        found = [_run(t) for key, t in self._last().items() if key[0] == phase and key[1] in self.uses]
        order = list(self.uses)
        return sorted(found, key=lambda r: (order.index(r.arm), r.seed, r.lr or 0.0))


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
