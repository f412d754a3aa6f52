"""What the README promises, row by row: each command runs on an ordinary module, and each slot has the parts that are named."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from interlayer import catalog, models
from interlayer.cli import app
from interlayer.study import StudySpec, tasks
from interlayer.study.arms import parse

ROOT = Path(__file__).parents[1]
NETS = """
import torch
from torch import nn


def build():
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))


def trained():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2))
"""
DATA = """
import torch


def task():
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long()
    return (x[:40], y[:40]), (x[40:], y[40:])
"""
SHORT = {"compare": "--steps 1 --seeds 1 --lr 0.001 --out out", "claim": "--scale smoke"}  # so that a row takes seconds


def commands(page):
    """The commands in the tables of a page."""
    rows = [
        line
        for line in (ROOT / page).read_text(encoding="utf-8").splitlines()
        if line.startswith("| to ") or "| the same" in line
    ]
    return [shlex.split(c)[1:] for row in rows for c in re.findall(r"`(interlayer [^`]+)`", row)]


README = commands("README.md")
LONG = [c for c in README if "stream=*" in " ".join(c)]


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with the modules that the README speaks of, and a tiny model under the name of a public one."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "nets.py").write_text(NETS, encoding="utf-8")
    (tmp_path / "mine" / "data.py").write_text(DATA, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "mine"}
    yield tmp_path
    for name in [n for n in sys.modules if n.partition(".")[0] == "mine"]:
        del sys.modules[name]
    sys.modules.update(kept)


def test_the_table_of_commands_is_read():
    assert (
        len(README) == 12
        and {c[0] for c in README} == {"compare", "apply", "run", "claim", "list", "show"}
        and len(LONG) == 1
    )


@pytest.mark.parametrize("command", [c for c in README if c not in LONG], ids=" ".join)
def test_commands_of_the_readme(command, mine):
    if "hf:gpt2" in command:  # a folder of that name comes before the hub
        from transformers import GPT2Config, GPT2LMHeadModel

        small = {"n_embd": 16, "n_head": 2, "vocab_size": 32, "bos_token_id": 0, "eos_token_id": 0}
        GPT2LMHeadModel(GPT2Config(n_layer=6, **small)).save_pretrained("gpt2")
    short = SHORT.get(command[0], "")
    if "digits-stream" in command:  # as many steps as there are tasks, of a smaller network
        short = short.replace("--steps 1", "--steps 10 --model convnet(depth=8,width=4)")
    done = CliRunner().invoke(app, [*command, *short.split()], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert done.stdout.strip()


@pytest.mark.parametrize("command", LONG, ids=" ".join)
def test_arms_of_long_comparisons_can_be_built(command):
    """All streams of the catalogue: built here, trained nowhere, as that takes half a minute."""
    options = dict(zip(command[1::2], command[2::2], strict=True))
    spec = StudySpec.from_values(None, {name.removeprefix("--"): value for name, value in options.items()})
    streams = [s.slug for s in catalog.load().values() if s.slot == "stream" and s.state == "ready"]
    assert [arm.name for arm in spec.arms] == ["plain", *streams]
    task = tasks.load(spec.task)
    for arm in spec.arms:
        assert sum(p.numel() for p in parse(arm.name, arm.use, spec.base or task.base).build(task.shape).parameters())


def test_slots_have_the_parts_that_the_docs_name():
    table = (ROOT / "docs" / "concepts.md").read_text(encoding="utf-8").partition("| slot |")[2].partition("\n\n")[0]
    rows = [row.split("|")[1:4] for row in table.splitlines()[2:]]
    assert [row[0].strip(" `") for row in rows] == catalog.slots()
    for slot, _, parts in rows:
        named = set(re.findall(r"`([\w-]+)`", parts))
        assert named and named <= set(catalog.builtins(slot.strip(" `")))


def test_public_names_of_the_readme_are_those_of_the_package():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    import interlayer

    assert set(re.findall(r"interlayer\.(\w+)\(", text)) <= set(interlayer.__all__)
    assert set(models.BASES) >= {"transformer", "vit", "mlp", "convnet"}
