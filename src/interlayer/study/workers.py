"""Run the open trials of a study, in this process or in worker processes that live as long as the study."""

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
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any

import cloudpickle
import torch
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from interlayer.core.task import Task
from interlayer.study import tasks
from interlayer.study.arms import Arm
from interlayer.study.engine import HEARTBEAT, Engine
from interlayer.study.machine import where
from interlayer.study.progress import Progress
from interlayer.study.spec import StudyError
from interlayer.study.train import Diverged, Emit, Job, Record, train

IDLE = {"what": "idle"}


@dataclass
class Work:
    """What a worker must know to run any trial of a study.

    Args:
        engine: Arguments of its ``Engine``.
        task: The task, or the text that names it.
        arms: By name.
        job: What all runs share.
        threads: Threads of each worker.
        keep: Whether the models of judged runs are saved.
    """

    engine: Mapping[str, Any]
    task: Task | str
    arms: Mapping[str, Arm]
    job: Job
    threads: int = 1
    keep: bool = False
    loaded: Task | None = field(default=None, repr=False)

    def load(self) -> Task:
        """The task."""
        if self.loaded is None:
            self.loaded = tasks.load(self.task) if isinstance(self.task, str) else self.task
        return self.loaded

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "loaded": None}


def sentence(error: BaseException) -> str:
    """An error as one line of a report."""
    return str(error) if isinstance(error, StudyError | Diverged) else f"{type(error).__name__}: {error}"


def serve(engine: Engine, work: Work, emit: Emit) -> None:
    """Take queued trials and run them until none can be taken."""
    while (trial := engine.claim(set(work.arms))) is not None:
        with suppress(UpdateFinishedTrialError):  # it was taken for dead, closed, and is run again
            _run(engine, trial, work, emit)


def _run(engine: Engine, trial: FrozenTrial, work: Work, emit: Emit) -> None:
    attrs, task = trial.user_attrs, work.load()
    arm, seed, lr, phase = work.arms[attrs["arm"]], attrs["seed"], attrs["lr"], attrs["phase"]
    label = {"arm": arm.name, "seed": seed, "lr": lr if phase == "search" else None}

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
                arm, task, work.job, seed, lr=lr, emit=pass_on, record=record, checkpoint=engine.checkpoint(trial),
                keep=engine.weights(trial) if work.keep else None, measure=phase == "run" and seed == 0,
            )  # fmt: skip
        except Exception as error:
            put("record", _finite(record.data()))
            kind = "diverged" if isinstance(error, Diverged) else "failed"
            engine.close(trial, kind, sentence(error), traceback.format_exc())
            emit({"what": kind, "error": sentence(error), **label})
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


class Workers:
    """Runs what is queued; a context manager, whose end ends the worker processes.

    Args:
        engine: The records.
        work: What is run.
        progress: Where events are shown.
        count: Worker processes; with 1 everything runs in this process.
    """

    def __init__(self, engine: Engine, work: Work, progress: Progress, count: int) -> None:
        self.engine, self.work, self.progress, self.count = engine, work, progress, count
        self.processes: dict[Connection, SpawnProcess] = {}
        self.idle: set[Connection] = set()
        self.worked: set[int] = set()  # processes that got as far as to say something

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            process.terminate()
            process.join()

    def finish(self, arms: set[str]) -> None:
        """Run all open trials of these arms; wait for those that other machines run."""
        waiting = False
        while True:
            self.engine.revive()
            found = self.engine.open(arms)
            queued = sum(t.state == TrialState.WAITING for t in found)
            if not found and len(self.idle) == len(self.processes):
                return
            if self.count == 1 and queued:
                torch.set_num_threads(self.work.threads)
                serve(self.engine, self.work, self.progress.emit)
            elif self.count > 1 and (queued or len(self.idle) < len(self.processes)):
                self._send(queued)
                self._listen()
            else:
                if not waiting:
                    self.progress.line(f"waiting for {len(found)} run(s) of another process")
                waiting = True
                time.sleep(1)

    def _send(self, queued: int) -> None:
        """Wake idle workers and start missing ones, at most one for each queued trial."""
        busy = len(self.processes) - len(self.idle)
        for pipe in list(self.idle)[: max(queued - busy, 0)]:
            self.idle.remove(pipe)
            with suppress(OSError):  # it has just died, which `_listen` sees
                pipe.send("go")
        missing = min(self.count, queued) - len(self.processes)
        if missing > 0:
            content = self._content()
            for _ in range(missing):
                self._start(content)

    def _content(self) -> bytes:
        try:  # by value where it was defined in a notebook or a script
            return cloudpickle.dumps(self.work)
        except Exception as error:
            raise StudyError(
                f"the model or the task cannot be sent to worker processes ({sentence(error)}); set workers=1, or define them "
                "in a module and name it, as package.module:function."
            ) from error

    def _start(self, content: bytes) -> None:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_worker, args=(there, content), daemon=True)
        process.start()
        there.close()
        self.processes[here] = process

    def _listen(self) -> None:
        """Show what workers say, until one has nothing to do, one is gone, or a second has passed."""
        end = time.monotonic() + 1
        while (left := end - time.monotonic()) > 0:
            for pipe in wait(list(self.processes), timeout=left):
                assert isinstance(pipe, Connection)
                try:
                    event = pipe.recv()
                except (EOFError, OSError):
                    return self._bury(pipe)
                self.worked.add(self.processes[pipe].pid or 0)
                if event == IDLE:
                    self.idle.add(pipe)
                    end = 0.0
                else:
                    self.progress.emit(event)
        return None

    def _bury(self, pipe: Connection) -> None:
        """Note what a worker that died was running."""
        process = self.processes.pop(pipe)
        self.idle.discard(pipe)
        process.join()
        if process.pid not in self.worked:
            raise StudyError(f"a worker process ended with exit code {process.exitcode} before any run.")
        for trial in self.engine.trials(TrialState.RUNNING):
            held, attrs = trial.user_attrs.get("process"), trial.user_attrs
            if held and held[0] == socket.gethostname() and held[1] == process.pid:
                self.progress.line(
                    f"a worker ended with exit code {process.exitcode} in {attrs['arm']}, seed {attrs['seed']}"
                )
                self.engine.closed.add(trial.number)


def _worker(pipe: Connection, content: bytes) -> None:
    """A worker process; it ends with its parent, however that ends."""
    work: Work = pickle.loads(content)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    torch.set_num_threads(work.threads)
    say: Callable[[Any], None] = pipe.send
    with Engine(**work.engine) as engine, suppress(EOFError):  # the study is over
        while True:
            serve(engine, work, say)
            say(IDLE)
            pipe.recv()
