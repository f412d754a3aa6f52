"""The records of a study: who may take a run, what counts, and databases that are new, shared, broken or full."""

import gc
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from optuna.trial import TrialState, create_trial

from interlayer.study import StudyError, StudySpec, compare, report
from interlayer.study import engine as module
from interlayer.study.engine import Engine, close_storage, open_storage
from interlayer.study.train import Job

KEY = ("plain", 0, None)
ATTRS = {"phase": "run", "arm": "plain", "seed": 0, "lr": None}


OPEN = []


def records(spec):
    OPEN.append(Engine(spec.url, spec.identity, spec.folder, {a.name: a.use for a in spec.arms}, higher=True))
    return OPEN[-1]


@pytest.fixture(autouse=True)
def closed():
    yield
    while OPEN:
        OPEN.pop().__exit__()


@pytest.fixture
def spec(tmp_path):
    return StudySpec(task="digits", arms=["plain"], seeds=1, lr=0.1, out=tmp_path)


def test_a_run_is_taken_once(spec, monkeypatch):
    """Two processes that see the same queued trial: the database gives it to one of them."""
    one, two = records(spec), records(spec)
    one.queue("run", [KEY])
    queued = two.trials(TrialState.WAITING)
    assert one.claim({"plain"}).number == 0
    with monkeypatch.context() as patch:
        patch.setattr(two, "trials", lambda *states: queued)
        assert two.claim({"plain"}) is None
    assert [t.state for t in one.trials()] == [TrialState.RUNNING]
    assert one.claim({"other"}) is None


def test_a_run_that_two_processes_queued_is_run_once(spec):
    engine = records(spec)
    for _ in range(2):
        engine.study.enqueue_trial({}, user_attrs=ATTRS)
    assert engine.claim({"plain"}).number == 0
    assert engine.claim({"plain"}) is None
    first, second = engine.trials()
    assert (first.state, second.state) == (TrialState.RUNNING, TrialState.FAIL)
    assert second.user_attrs["kind"] == "duplicate" and second.user_attrs["error"] == "the same as trial 0"
    engine.revive()  # a duplicate is not queued again
    assert len(engine.trials()) == 2
    assert engine._last()["run", "plain", 0, None].number == 0


@pytest.mark.parametrize("born", ["mine", "another's"])
def test_a_process_number_that_is_used_again_is_not_the_process(spec, born):
    engine = records(spec)
    engine.queue("run", [KEY])
    trial = engine.claim({"plain"})
    name, pid, mine = trial.user_attrs.get("process") or engine.trials()[0].user_attrs["process"]
    assert (name, pid) == (socket.gethostname(), os.getpid())
    process = [name, pid, mine if born == "mine" else "1"]
    engine.storage.set_trial_user_attr(trial._trial_id, "process", process)
    engine.revive()
    states = [t.state for t in engine.trials()]
    assert states == ([TrialState.RUNNING] if born == "mine" else [TrialState.FAIL, TrialState.WAITING])


def test_a_finished_run_counts_whatever_comes_after_it(spec):
    engine = records(spec)
    for state, value in (
        (TrialState.FAIL, None),
        (TrialState.COMPLETE, 0.9),
        (TrialState.FAIL, None),
        (TrialState.COMPLETE, 0.1),
    ):
        engine.study.add_trial(create_trial(state=state, value=value, user_attrs={**ATTRS, "kind": "killed"}))
    assert engine._last()["run", "plain", 0, None].number == 1 and engine.kept() == 1
    engine.revive()
    assert len(engine.trials()) == 4


def test_a_run_that_was_taken_for_dead_and_finished_elsewhere_is_left_alone(spec, monkeypatch):
    """A process that was only slow ends its trial after another one closed it."""
    from interlayer.study import workers
    from interlayer.study.arms import Arm

    engine = records(spec)
    engine.queue("run", [KEY])

    def slow(*_, record, **__):
        (trial,) = engine.trials(TrialState.RUNNING)
        assert engine.close(trial, "killed", "taken for dead")
        record.metrics["accuracy"] = 1.0

    monkeypatch.setattr(workers, "train", slow)
    said = []
    workers.serve(engine, workers.Work({}, "digits", {"plain": Arm("plain", "mlp")}, Job(steps=1)), said.append)
    assert [t.state for t in engine.trials()] == [TrialState.FAIL] and [e["what"] for e in said] == ["start"]
    assert not engine.close(engine.trials()[0], "failed", "again")


def enter(url, out, count=4):
    """Open the same new database several times at the same moment, each with connections of its own."""
    barrier = threading.Barrier(count)

    def work(number):
        barrier.wait(60)
        spec = StudySpec(task="digits", arms=["plain"], seeds=1, lr=0.1, storage=url, out=out)
        engine = records(spec)
        engine.queue("run", [(f"arm{number}", 0, None)])
        taken = engine.claim({f"arm{number}"}) is not None
        close_storage(engine.storage)  # a session belongs to its thread
        return taken

    with ThreadPoolExecutor(count) as pool:
        return [done.result() for done in [pool.submit(work, n) for n in range(count)]]


def test_all_that_start_on_a_new_database_at_once_work(tmp_path):
    assert enter(f"sqlite:///{tmp_path}/study.db", tmp_path) == [True] * 4


@pytest.fixture
def postgres():
    """A server of its own, where PostgreSQL and its driver are installed."""
    pytest.importorskip("psycopg")
    found = [*Path("/usr/lib/postgresql").glob("*/bin/initdb"), *filter(None, [shutil.which("initdb")])]
    if not found:
        pytest.skip("PostgreSQL is not installed")
    folder = Path(tempfile.mkdtemp())
    data, user = folder / "data", {}
    if os.getuid() == 0:  # the server refuses to run as root
        user = {"user": "nobody"}
        folder.chmod(0o777)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    make = [found[0], "-D", data, "-U", "study", "-A", "trust", "-N"]
    subprocess.run(make, check=True, capture_output=True, cwd=folder, **user)
    server = subprocess.Popen(
        [found[0].with_name("postgres"), "-D", data, "-p", str(port), "-k", folder, "-h", "127.0.0.1", "-F"],
        cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **user,
    )  # fmt: skip
    ready = [found[0].with_name("pg_isready"), "-h", "127.0.0.1", "-p", str(port)]
    while subprocess.run(ready, check=False, capture_output=True).returncode:
        assert server.poll() is None
        time.sleep(0.05)
    yield f"postgresql+psycopg://study@127.0.0.1:{port}/postgres"
    gc.collect()
    server.send_signal(signal.SIGQUIT)
    server.wait()
    shutil.rmtree(folder)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of connections with which an opening failed
def test_all_that_start_on_a_new_server_at_once_work(postgres, tmp_path):
    assert enter(postgres, tmp_path) == [True] * 4


def test_a_missing_driver_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(ImportError) as error:
        open_storage("postgresql+psycopg://me:secret@host/db")
    assert str(error.value) == (
        "study: the database postgresql+psycopg://me:***@host/db needs the Python package 'psycopg': "
        'pip install "psycopg[binary]".'
    )


def study(out, **more):
    return StudySpec(**{"task": "digits", "arms": ["plain"], "seeds": 1, "steps": 2, "lr": 0.1, "out": out, **more})


@pytest.mark.parametrize("content", [b"this is no database" * 100, b"SQLite format 3\x00" + b"\x10\x00\x01\x01" * 300])
def test_a_broken_database_is_one_clear_line(tmp_path, content):
    (tmp_path / "study.db").write_bytes(content)
    for do in (lambda: compare(study(tmp_path)), lambda: report(tmp_path)):
        with pytest.raises(
            StudyError, match=r"cannot be read or written: (file is not a|.*malformed).*a broken file away"
        ) as error:
            do()
        assert "\n" not in str(error.value)


def test_a_url_that_is_none_is_one_clear_line(tmp_path):
    with pytest.raises(StudyError, match="study: the records in nonsense cannot be read or written: Could not parse"):
        compare(study(tmp_path, storage="nonsense"))


def test_a_full_disk_is_one_clear_line(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TRIES", 1)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limit[1]))
    try:
        with pytest.raises(StudyError, match=r"study.db cannot be read or written: .*(full|disk I/O error)"):
            compare(study(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_a_run_is_taken_once_at_the_same_moment(spec):
    """Workers that wake together and see the same queue."""
    one = records(spec)
    one.queue("run", [("plain", seed, None) for seed in range(12)])
    barrier = threading.Barrier(4)

    def work(_):
        engine, taken = records(spec), []
        barrier.wait(60)
        while (trial := engine.claim({"plain"})) is not None:
            taken.append(trial.number)
        close_storage(engine.storage)  # a session belongs to its thread
        return taken

    with ThreadPoolExecutor(4) as pool:
        found = [number for taken in pool.map(work, range(4)) for number in taken]
    assert sorted(found) == list(range(12))
