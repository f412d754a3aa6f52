"""Bases that are trained once and shared, and models that are judged as they are."""

import csv
import io

import pytest
import torch
from rich.console import Console
from torch import nn

from interlayer.models import MLP
from interlayer.study import StudyError, StudySpec, compare
from interlayer.study.engine import close_storage, open_storage

SETTINGS = {"task": "digits", "base": "trained:mlp(depth=2, width=16)", "seeds": 2, "steps": 20, "lr": 3e-3}


def study(out, **options):
    said = io.StringIO()
    spec = StudySpec.parse({**SETTINGS, "out": out, **options})
    return compare(spec, console=Console(file=said, width=200)), said.getvalue()


def phases(out):
    storage = open_storage(f"sqlite:///{out / 'study.db'}")
    (found,) = storage.get_all_studies()
    done = storage.get_all_trials(found._study_id)
    close_storage(storage)
    return [(t.user_attrs["phase"], t.user_attrs["arm"], t.user_attrs["seed"]) for t in done]


def test_a_base_is_trained_once_for_each_seed_and_shared_by_chains_of_transforms(tmp_path):
    arms = ["plain", "lamp(sparsity=0.5)", "lamp(sparsity=0.5)+painters(plan='skip', last=0)"]
    result, _ = study(tmp_path, arms=arms[:2])
    assert result.finished and sorted(phases(tmp_path)) == sorted(
        [("base", "(trained base)", s) for s in (0, 1)] + [("run", arm, s) for arm in arms[:2] for s in (0, 1)]
    )
    alone = compare(
        StudySpec.parse({**SETTINGS, "base": "mlp(depth=2, width=16)", "arms": ["plain"], "out": tmp_path / "alone"}),
        console=Console(file=io.StringIO()),
    )
    assert result.values("plain") == alone.values("plain")  # the same training, kept and read again
    assert result.values("lamp(sparsity=0.5)") != result.values("plain")
    costs = result.of("plain")[0].record.cost
    assert costs["disk"] > 4 * costs["parameters"] and 0 < costs["latency_1"] < 1 and "step_time" not in costs
    with (tmp_path / "results.csv").open() as file:
        assert {"disk", "latency_1", "latency_64"} <= set(next(csv.reader(file)))
    again, said = study(tmp_path, arms=[*arms[:2], "lamp(sparsity=0.5)+lamp(sparsity=0.9)"])
    assert len(phases(tmp_path)) == 8 and "trained base" not in said  # two runs more, and nothing trained
    assert again.values("lamp(sparsity=0.5)") == result.values("lamp(sparsity=0.5)")
    page = (tmp_path / "report.html").read_text()
    assert "on disk" in page and "forward of 64" in page and "lamp(sparsity=0.9)" in page


def test_models_are_merged_with_the_base_of_another_seed(tmp_path):
    result, _ = study(tmp_path, arms=["plain", "git-rebasin"], seeds=1)
    assert result.finished and ("base", "(trained base)", 10_000) in phases(tmp_path)
    assert result.values("git-rebasin") != result.values("plain")
    refused, said = study(tmp_path / "b", arms=["plain", "git-rebasin"], base="mlp(depth=2)", seeds=1)
    assert not refused.finished and "merges trained models; give the study the base 'trained:...'" in said


def test_a_learning_rate_is_searched_once_for_the_base(tmp_path):
    result, _ = study(tmp_path, arms=["plain", "lamp(sparsity=0.5)"], lr=None, rates=[1e-4, 1e-2], seeds=1)
    searched = [p for p in phases(tmp_path) if p[0] == "search"]
    assert len(searched) == 2 and {p[1] for p in searched} == {"(trained base)"}
    assert {r.lr for r in result.runs} == {1e-2}


def test_a_trained_model_is_judged_as_it_is(tmp_path):
    torch.manual_seed(0)
    model = MLP(64, 10, depth=2, width=16)
    for p in model.parameters():
        p.requires_grad_(False)
    x, y = torch.randn(30, 64), torch.arange(30) % 10
    result = compare(
        model=model, task=((x, y), (x, y)), arms=["plain", "lamp(sparsity=0.5)"], steps=0, seeds=1, out=tmp_path,
        console=Console(file=io.StringIO()),
    )  # fmt: skip
    assert result.finished, [r.error for r in result.runs]
    assert result.of("plain")[0].lr is None
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model.eval()(x), y).item()
    assert result.values("plain", "loss")[0] == pytest.approx(loss) and result.runs[0].record.steps == 0
    assert "the base is judged as it is" in (tmp_path / "report.html").read_text()


def test_an_arm_of_a_trained_base_is_refused_if_it_would_train(tmp_path):
    result, _ = study(tmp_path, arms=["plain", "rezero"], seeds=1)
    (refused,) = result.of("rezero")
    assert refused.state == "failed" and "trained once for all arms" in refused.error
    with pytest.raises(StudyError, match="steps"):
        study(tmp_path, steps=-1)


def test_simulators_are_arms_of_a_scenario(tmp_path):
    result, said = study(
        tmp_path,
        task="repeater-chain",
        base=None,
        arms=["plain", "distillation=1", "nosuch=1", "mlp"],
        seeds=2,
        lr=None,
    )
    assert [r.state for r in result.of("plain")] == ["done", "done"] and phases(tmp_path)[0][0] == "run"
    assert set(result.of("plain")[0].record.metrics) == {"key rate", "fidelity", "mean time"} and result.about["higher"]
    assert result.values("distillation=1", "fidelity")[0] > result.values("plain", "fidelity")[0]
    assert "nosuch" in result.of("nosuch=1")[0].error and "expected a simulator" in result.of("mlp")[0].error
    assert (
        "learning\nrate" not in said
        and "FLOPs" not in (tmp_path / "report.html").read_text().partition("What was run")[0]
    )


def test_a_stream_of_experiences_gives_accuracy_and_forgetting(tmp_path):
    arms = ["plain", "clr"]
    base = "convnet(width=4)"
    result, _ = study(tmp_path, task="digits-stream", base=base, arms=arms, seeds=1, steps=10, lr=3e-2, evaluations=1)
    assert result.finished, [r.error for r in result.runs]
    for run in result.runs:
        assert set(run.record.metrics) == {"accuracy", "forgetting"} and run.record.steps == 10
        assert len(run.record.curve) == 1 and run.record.curve[0]["forgetting"] >= 0
    by = {r.arm: r.record.metrics for r in result.runs}
    assert by["clr"]["forgetting"] == 0 and by["plain"]["forgetting"] > 0


def test_a_stream_needs_a_step_for_each_experience(tmp_path):
    base = "convnet(width=4)"
    refused, _ = study(tmp_path, task="digits-stream", base=base, arms=["plain"], seeds=1, steps=None, seconds=1.0)
    assert "a budget of 0 steps; expected at least 10, one for each experience" in refused.runs[0].error
