"""Every ready system that ``compare`` takes is an arm of a built-in task: it is built, checked, differs from plain and learns."""

import inspect
import math
from pathlib import Path

import pytest

from interlayer import catalog
from interlayer.core.equal import difference
from interlayer.core.experiences import StreamTask
from interlayer.models import BASES
from interlayer.study import tasks
from interlayer.study.arms import parse
from interlayer.study.train import Job, check, train

KINDS = ("layer", "model", "rule", "transform", "simulator")
READY = [s.slug for s in catalog.load().values() if s.kind in KINDS and s.state == "ready"]
# Where a system is tried whose row names no task.
USUAL = (
    ("digits", "mlp(depth=2, width=32)"),
    ("digits", "soft-trees(trees=8)"),
    ("digits", "convnet(depth=8, width=4)"),
    ("digits", "vit(depth=2, width=32, heads=2)"),
    ("digits", "resnet18(width=8)"),
    ("stdlib-bytes", "transformer(depth=2, width=32, heads=2)"),
)
# Bases that are sooner trained, or sample sooner, than a task's own.
SMALLER = {"stdlib-bytes": dict(USUAL)["stdlib-bytes"], "digits-flow": "dit(depth=1, width=16, heads=2)"}


def places(system):
    """Tasks and bases that are tried one after the other."""
    found = [(system.task, SMALLER.get(system.task) or tasks.load(system.task).base)] if system.task else USUAL
    return [(task, f"trained:{base}" if system.kind == "transform" else base) for task, base in found]


def short(system):
    """The arm's text; transforms that train or sample take two steps, or one epoch."""
    known = inspect.signature(system.resolve()).parameters if system.kind == "transform" else ()
    given = ", ".join(text for name, text in (("steps", "steps=2"), ("epochs", "epochs=1")) if name in known)
    return f"{system.slug}({given})" if given else system.slug


@pytest.mark.parametrize("slug", READY)
def test_every_system_is_an_arm_that_learns(slug, tmp_path):
    system, refused = catalog.get(slug), []
    for name, base in places(system):
        task = tasks.load(name)
        steps = len(task.stream) if isinstance(task, StreamTask) else int(task.learns)
        job = Job(4, steps, None, 1, "cpu", tmp_path, False)
        arm = parse(slug, short(system), base)
        try:
            built = check(arm, task, job)
        except ImportError as error:
            pytest.skip(str(error))
        except Exception as error:  # as in a study, where what is wrong with one arm is that arm's result
            refused.append(f"{name}, {base}: {type(error).__name__}: {error}")
            continue
        if system.kind in ("layer", "model") and base != slug:
            assert difference(built.model, check(parse("plain", "plain", base), task, job).model)
        if system.network and not system.slot:
            assert type(built.model) is system.resolve_network()
        record = train(arm, task, job, 0, lr=1e-3, measure=False)
        assert record.steps == steps and all(math.isfinite(v) for v in record.metrics.values())
        return
    pytest.fail(f"{slug} is an arm of no built-in task:\n" + "\n".join(refused))


def test_tasks_that_rows_name_exist():
    assert {s.task for s in catalog.load().values() if s.task} <= set(catalog.tasks())


@pytest.mark.parametrize("name", catalog.tasks())
def test_the_usual_base_of_a_task_is_known_and_in_the_docs(name):
    base = tasks.load(name).base
    assert base.partition("(")[0] in {*BASES, *catalog.load()}
    page = (Path(__file__).parents[2] / "docs" / "concepts.md").read_text(encoding="utf-8")
    table = page.partition("| task | what is learned |")[2].partition("\n\n")[0]
    rows = {row.split("|")[1].strip(" `"): row.split("|")[4] for row in table.splitlines()[2:]}
    assert f"`{base}`" in rows[name] and set(rows) == set(catalog.tasks())
