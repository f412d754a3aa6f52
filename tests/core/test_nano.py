"""Trained small models: made once, kept under everything that determines them, whole at any moment."""

import os
import stat
import subprocess
import sys

import pytest
import torch
from torch import nn

from interlayer.core.nano import cache, keep, nano
from interlayer.core.pairing import paired

RACE = """
import torch
from torch import nn
from interlayer.core.nano import nano
def train(model):
    with torch.no_grad():
        model.weight.add_(1.0)
print(nano(lambda: nn.Linear(200, 200), train, task="race", kind="linear").weight.double().sum().item())
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "interlayer" / "nano"


def made(runs, **how):
    def train(model):
        runs.append(how)
        nn.init.constant_(model[0].weight, float(torch.rand(())))

    build = lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))  # noqa: E731
    return nano(build, train, **{"task": "t", "kind": "k", **how})


def test_it_is_trained_once_and_comes_back_the_same():
    runs = []
    first, second = made(runs), made(runs)
    assert len(runs) == 1 and not second.training
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("how", [{"task": "other"}, {"kind": "other"}, {"seed": 1}, {"steps": 3}])
def test_whatever_determines_it_makes_another(how):
    runs = []
    made(runs)
    made(runs, **how)
    assert len(runs) == 2


def test_other_initial_weights_make_another():
    runs = []
    for value in (0.0, 1.0):
        nano(
            lambda value=value: nn.Linear(1, 1).requires_grad_(False).apply(lambda m: m.weight.fill_(value)),
            runs.append,
            task="t",
            kind="k",
        )
    assert len(runs) == 2


def test_the_random_state_stays():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    made([])
    made([])
    assert torch.equal(before, torch.get_rng_state())


def test_tied_weights_and_plain_modes(folder):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

    for _ in range(2):
        model = nano(Tied, lambda m: nn.init.ones_(m.a.weight), task="t", kind="tied")
    assert model.b.weight is model.a.weight and bool((model.a.weight == 1).all())
    (path,) = folder.iterdir()
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_two_processes_at_once(folder):
    runs = [subprocess.Popen([sys.executable, "-c", RACE], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    sums = {run.communicate()[0] for run in runs}
    assert len(sums) == 1 and all(run.returncode == 0 for run in runs)
    assert len(list(folder.iterdir())) == 1


def test_what_is_no_plain_data_is_refused():
    with pytest.raises(TypeError, match=r"nano: .*plain data in \['data'\]"):
        made([], data=torch.ones(1))


def test_keep_replaces_a_file(tmp_path):
    for value in (1.0, 2.0):
        keep(tmp_path / "x" / "a.safetensors", {"a": torch.full((2,), value)})
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["a.safetensors"]
    assert cache() == tmp_path / "interlayer"


def test_it_trains_where_gradients_are_off():
    with torch.no_grad():
        nano(lambda: nn.Linear(1, 1), lambda m: m(torch.ones(1)).backward(), task="t", kind="grad")


def test_a_model_that_is_paired_by_seed_holds_the_same_trained_one_for_every_seed():
    runs = []

    def build():
        return nn.ModuleDict({"base": made(runs), "head": nn.Linear(2, 2)})

    a, b = (paired(build, seed).model for seed in (0, 1))
    assert len(runs) == 1 and torch.equal(a["base"][0].weight, b["base"][0].weight)
    assert not torch.equal(a["head"].weight, b["head"].weight)
