"""The engine: what is run once, what is kept, what fails alone."""

import csv
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from interlayer.study import StudyError, StudySpec, compare, report
from interlayer.study.engine import close_storage, open_storage

HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def _toys(monkeypatch):
    monkeypatch.syspath_prepend(HERE)


def run(out, *, resume=True, **options):
    settings = {
        "task": "digits",
        "base": "toy_models:net",
        "arms": ["plain", "width=4"],
        "seeds": 2,
        "steps": 12,
        "lr": 1e-3,
        "out": out,
    }
    console = Console(file=io.StringIO(), width=200)
    result = compare(StudySpec.parse({**settings, **options}), console=console, resume=resume)
    return result, console.file.getvalue()


def losses(result):
    return {(r.arm, r.seed): r.record.metrics.get("loss") for r in result.runs}


def trials(out):
    storage = open_storage(f"sqlite:///{out / 'study.db'}")
    (found,) = storage.get_all_studies()
    done = storage.get_all_trials(found._study_id)
    close_storage(storage)
    return done


def test_arms_of_a_seed_see_the_same_batches(tmp_path, monkeypatch):
    monkeypatch.setenv("TOY_LOG", str(tmp_path / "log"))
    run(tmp_path, base="toy_models:watched", seeds=1, steps=5, evaluations=1)
    sums = [line.split()[1] for line in (tmp_path / "log").read_text().splitlines()]
    # the two checks before training, then for each arm 5 steps and 2 more to count kept bytes and peak memory
    assert len(sums) == 2 + 2 * 7
    assert sums[2:7] == sums[9:14] and len(set(sums[2:7])) == 5


def test_finished_runs_are_kept_and_seeds_and_arms_can_be_added(tmp_path):
    first, _ = run(tmp_path)
    again, said = run(tmp_path)
    assert losses(again) == losses(first) and "4 runs are in the records" in said
    assert len(trials(tmp_path)) == 4
    more, _ = run(tmp_path, seeds=3, arms=["plain", "width=4", "width=8"])
    assert len(trials(tmp_path)) == 9 and more.finished
    assert {k: v for k, v in losses(more).items() if k in losses(first)} == losses(first)
    fresh, _ = run(tmp_path, resume=False)
    assert losses(fresh) == losses(first) and len(trials(tmp_path)) == 4


def test_killed_study_goes_on_where_it_was(tmp_path):
    spec = {
        "task": "digits",
        "base": "toy_models:slow",
        "arms": ["plain", "pause=0.021"],
        "seeds": 2,
        "steps": 25,
        "evaluations": 1,
        "lr": 1e-3,
        "out": str(tmp_path),
        "workers": 2,
    }
    code = f"from interlayer.study import *\nif __name__ == '__main__': compare(StudySpec(**{spec!r}))"
    script = tmp_path / "start.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [sys.executable, script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said = ""
    while "seed 1: started" not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {t.number: t for t in trials(tmp_path) if t.state.name == "COMPLETE"}
    assert before and any(t.state.name == "RUNNING" for t in trials(tmp_path))
    result, _ = run(tmp_path, **{k: v for k, v in spec.items() if k not in ("out", "workers")})
    after = {t.number: t for t in trials(tmp_path)}
    assert result.finished
    for number, trial in before.items():
        assert after[number].datetime_complete == trial.datetime_complete and after[number].values == trial.values
    done = [(t.user_attrs["arm"], t.user_attrs["seed"]) for t in after.values() if t.state.name == "COMPLETE"]
    assert sorted(done) == sorted((a, s) for a in ("plain", "pause=0.021") for s in (0, 1))
    assert any(t.user_attrs.get("kind") == "killed" for t in after.values())


def test_a_study_stopped_by_hand_goes_on_in_the_same_process(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("interlayer.study.workers.train", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
    result, _ = run(tmp_path)
    assert result.finished and sum(t.state.name == "COMPLETE" for t in trials(tmp_path)) == 4


def test_an_arm_that_fails_stops_nobody(tmp_path):
    arms = ["plain", "toy_models:breaks", "toy_models:unbuildable", "lr=1e30", "depth=3", "nosuch"]
    result, said = run(tmp_path, arms=arms, seeds=1)
    state = {r.arm: r for r in result.runs}
    assert state["plain"].state == "done" and not result.finished
    assert state["toy_models:breaks"].state == "failed" and "broken on purpose" in state["toy_models:breaks"].traceback
    assert "toy_models.py" in state["toy_models:breaks"].traceback and state["toy_models:breaks"].record.steps == 7
    assert "cannot be built on purpose" in state["toy_models:unbuildable"].error
    assert state["lr=1e30"].state == "diverged" and "nan" in state["lr=1e30"].error
    assert "takes no 'depth'" in state["depth=3"].error
    assert "there is no system 'nosuch'" in state["nosuch"].error
    # what cannot be built is told before anything is trained
    assert said.index("cannot be built on purpose") < said.index("plain, seed 0: started")
    page = (tmp_path / "report.html").read_text()
    assert "broken on purpose" in page and "Traceback" in page
    run(tmp_path, arms=arms, seeds=1)
    counts = [t.user_attrs["arm"] for t in trials(tmp_path)]
    assert {a: counts.count(a) for a in arms} == {**dict.fromkeys(arms, 1), "toy_models:breaks": 2}


def test_every_arm_tries_the_same_rates_and_is_judged_at_its_best(tmp_path):
    rates = [1e-3, 3e-2]
    result, _ = run(tmp_path, lr=None, rates=rates, arms=["plain", "width=4", "width=8+lr=0.02"], steps=6)
    tried = {
        arm: sorted(r.lr for r in result.search if r.arm == arm) for arm in ("plain", "width=4", "width=8+lr=0.02")
    }
    assert tried == {"plain": rates, "width=4": rates, "width=8+lr=0.02": []}
    assert {r.seed for r in result.search} == {1000} and {r.seed for r in result.runs} == {0, 1}
    for arm in ("plain", "width=4"):
        best = max((r for r in result.search if r.arm == arm), key=lambda r: r.record.metrics["accuracy"])
        assert {r.lr for r in result.of(arm)} == {best.lr}
    assert {r.lr for r in result.of("width=8+lr=0.02")} == {0.02}
    search = [t for t in trials(tmp_path) if t.user_attrs["phase"] == "search"]
    assert len(search) == 4 and all(t.params == {"lr": t.user_attrs["lr"]} for t in search)
    assert "Learning rates" in (tmp_path / "report.html").read_text()


def test_an_arm_runs_until_it_is_decided_and_the_baseline_as_long_as_anyone(tmp_path):
    arms = ["plain", "toy_models:net(width=1)", "toy_models:inert"]
    options = {"base": "toy_models:own", "arms": arms, "seeds": "4..6", "steps": 30, "evaluations": 2, "lr": 0.01}
    result, said = run(tmp_path, **options)
    assert [len(result.of(arm)) for arm in arms] == [6, 4, 6]
    worse, same = (result.difference(arm) for arm in arms[1:])
    assert worse.n == 4 and worse.high < 0 and same.n == 6 and not same.decided
    assert re.search(r"width=1\) .* worse +4 ", said) and re.search(r"inert .* no +6 ", said)
    page = (tmp_path / "report.html").read_text()
    assert "<h1>toy_models:net(width=1) is worse than plain</h1>" in page
    assert "Not decided with 6 seeds: toy_models:inert." in page
    count = len(trials(tmp_path))
    again, _ = run(tmp_path, **options)
    assert len(trials(tmp_path)) == count == 16 and losses(again) == losses(result)
    assert StudySpec(seeds="4..6").identity != StudySpec(seeds="4..8").identity  # a later end is another study


def test_a_diverged_run_counts_as_a_predictor_that_ignores_its_inputs(tmp_path):
    result, said = run(tmp_path, arms=["plain", "lr=1e30"])
    assert result.finished and [r.state for r in result.of("lr=1e30")] == ["diverged"] * 2
    assert list(result.values("lr=1e30", "loss").values()) == pytest.approx([2.303] * 2, abs=0.05)
    assert result.difference("lr=1e30").n == 2 and "counts as a predictor that ignores its inputs" in said
    alone, _ = run(tmp_path / "all", arms=["lr=1e30", "lr=1e31"])
    assert not alone.finished  # nothing but divergence


def test_a_run_that_ends_far_above_where_it_began_has_diverged(tmp_path):
    result, said = run(tmp_path, arms=["plain", "lr=30"], seeds=1)
    assert result.of("lr=30")[0].state == "diverged" and re.search(
        r"the loss is [\d.e+]+ at the end, and was [\d.]+ in the first", said
    )
    assert result.values("lr=30", "loss")[0] == pytest.approx(2.303, abs=0.05)


def test_an_arm_that_equals_the_baseline_is_refused_unless_allowed(tmp_path):
    result, said = run(tmp_path, arms=["plain", "width=16", "width=16+weight_decay=0.0"])
    assert {r.state for r in result.of("width=16")} == {"failed"} and "equals the baseline 'plain'" in said
    assert {r.state for r in result.of("width=16+weight_decay=0.0")} == {"done"}
    allowed, _ = run(tmp_path / "aa", arms=["plain", "width=16"], allow_equal=True)
    assert allowed.values("width=16") == allowed.values("plain")  # to the last bit


def test_parameters_without_effect_change_nothing_at_all(tmp_path):
    arms = ["plain", *(f"toy_models:inert(at={at!r})" for at in ("first", "middle", "last"))]
    result, _ = run(tmp_path, base="toy_models:own", arms=arms)
    curves = [[r.record.train for r in result.of(arm.name)] for arm in result.spec.arms]
    assert all(curve == curves[0] for curve in curves[1:])
    assert result.shared["toy_models:inert(at='first')"] == pytest.approx(1234 / (1234 + 12), abs=0.01)


def test_time_budget_ends_runs(tmp_path):
    result, _ = run(tmp_path, base="toy_models:slow", arms=["plain"], seeds=1, steps=None, seconds=0.3)
    (only,) = result.runs
    assert only.state == "done" and 0.3 <= only.record.seconds < 0.6 and only.record.steps <= 15


def test_report_is_written_again_from_the_records(tmp_path):
    result, _ = run(tmp_path)
    pages = {name: (tmp_path / name).read_text() for name in ("report.html", "results.csv", "curves.csv")}
    for name in pages:
        (tmp_path / name).unlink()
    again = report(tmp_path, console=Console(file=io.StringIO()))
    assert losses(again) == losses(result)
    assert {name: (tmp_path / name).read_text() for name in pages} == pages
    with pytest.raises(StudyError, match="no records"):
        report(tmp_path / "elsewhere")


def test_page_stands_alone_and_names_every_arm(tmp_path):
    _, said = run(tmp_path, arms=["plain", "width=4", {"name": "<wide & odd>", "use": "width=32"}])
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"(src|href)\s*=\s*\"[^#]|url\([^#]|@import|https?:|<script", page)
    for name in ("plain", "width=4", "&lt;wide &amp; odd&gt;"):
        assert page.count(name) >= 5
    assert "<wide" not in page and page.count("<svg") == 5
    assert "prefers-color-scheme" in page and "interlayer compare --study" in page
    assert all(word in said for word in ("parameters", "peak", "against", "±"))


def test_csv_holds_every_run_and_curve(tmp_path):
    result, _ = run(tmp_path)
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {(r["arm"], int(r["seed"])): float(r["loss"]) for r in rows} == losses(result)
    assert {r["arm"]: int(float(r["parameters"])) for r in rows} == {
        "plain": 64 * 16 + 16 + 170,
        "width=4": 64 * 4 + 4 + 50,
    }
    with (tmp_path / "curves.csv").open() as file:
        points = list(csv.DictReader(file))
    mine = [
        float(p["value"])
        for p in points
        if (p["arm"], p["seed"], p["split"], p["metric"]) == ("plain", "1", "validation", "loss")
    ]
    (run_one,) = [r for r in result.runs if (r.arm, r.seed) == ("plain", 1)]
    assert mine == [p["loss"] for p in run_one.record.curve] and len(mine) == 8
    assert sum(p["split"] == "train" for p in points) == 4 * 12


def test_one_seed_is_told(tmp_path):
    _, said = run(tmp_path, seeds=1, steps=2)
    assert "One seed: no intervals" in said


def test_what_layers_ask_for_is_added_to_the_loss(tmp_path):
    found = {}
    for weight in (0.0, 10.0):
        result, _ = run(
            tmp_path / str(weight), base=f"toy_models:shrinking(weight={weight})", arms=["lr=0.03"], steps=60
        )
        found[weight] = result.values("lr=0.03", "loss")[0]
        with (tmp_path / str(weight) / "curves.csv").open() as file:
            norms = [float(r["value"]) for r in csv.DictReader(file) if r["metric"] == "squared norm"]
        assert len(norms) == 2 * 60 and (norms[-1] < norms[0]) == (weight > 0)
    assert found[10.0] == pytest.approx(2.302, abs=0.02) and found[0.0] < 1.0  # all weights shrunk: every class alike
