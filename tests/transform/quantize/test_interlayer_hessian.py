import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from interlayer import load
from interlayer.cli import app
from interlayer.core.curvature import Curvature
from interlayer.core.quantizer import Grid, Packed, layers, weight_of
from interlayer.core.quantizer.reconstruct import wide
from interlayer.transform.quantize.interlayer_hessian import (
    InterlayerHessian,
    Roofline,
    Work,
    agreement,
    path,
    size,
    works,
)
from tests.families import batch, model, output, transformed

WIDTHS = (8, 4, 2)


class Sum(nn.Module):
    """Linear maps of parts of the input that overlap, which add up: the squared error is quadratic in all weights."""

    def __init__(self):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(6, 4) for _ in range(3))

    def forward(self, x):
        return sum(m(x[:, 2 * i : 2 * i + 6]) for i, m in enumerate(self.maps))


@pytest.fixture(scope="module")
def quadratic():
    torch.manual_seed(0)
    net, x = Sum(), torch.randn(50, 10)
    held = {n: [Grid(b, 0, "asymmetric").fit(wide(m), "mse") for b in WIDTHS] for n, m in layers(net)[0].items()}
    return net, x, held


def at(net, held, levels):
    new = copy.deepcopy(net)
    with torch.no_grad():
        for (name, grids), k in zip(held.items(), levels, strict=True):
            weight_of(new.get_submodule(name)).copy_(grids[k].fake(wide(net.get_submodule(name))))
    return new


def test_pairs_of_layers_make_the_measure_exact_on_a_quadratic_model(quadratic):
    net, x, held = quadratic
    curve = InterlayerHessian(loss="square").curvature(net, [x], held)
    alone = Curvature(curve.pairs * torch.eye(3)[:, None, :, None])
    off = []
    for levels in itertools.product(range(3), repeat=3):
        real = float((at(net, held, levels)(x) - net(x)).square().mean().detach())
        assert curve.loss(levels) == pytest.approx(real, rel=1e-3)
        off.append(abs(alone.loss(levels) / real - 1))
    assert max(off) > 0.1


def test_the_path_takes_what_rises_least_for_what_it_saves_and_knows_pairs():
    """Two layers whose errors add up, and a third that is dearer alone: after the first the third goes, not the second."""
    pairs = torch.zeros(3, 2, 3, 2)
    pairs[0, 1, 0, 1], pairs[1, 1, 1, 1], pairs[2, 1, 2, 1] = 1.0, 1.1, 1.5
    pairs[0, 1, 1, 1] = pairs[1, 1, 0, 1] = 1.0
    costs = torch.tensor([[2.0, 1.0]] * 3)
    assert path(Curvature(pairs), costs) == [(0, 0, 0), (1, 0, 0), (1, 0, 1), (1, 1, 1)]
    alone = pairs * torch.eye(3)[:, None, :, None]
    assert path(Curvature(alone), costs) == [(0, 0, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1)]
    assert path(Curvature(pairs), torch.tensor([[2.0, 1.0], [2.0, 1.0], [9.0, 1.0]]))[1] == (0, 0, 1)
    assert path(Curvature(pairs), torch.ones(3, 2)) == [(0, 0, 0)]  # nothing to save


def test_bisection_finds_the_last_model_within_the_tolerance_in_few_passes(quadratic):
    net, x, held = quadratic
    tried = []
    whole = agreement(net, [x], "square")

    def score(new):
        tried.append(whole(new))
        return tried[-1]

    rule = InterlayerHessian(loss="square", tolerance=0.02, score=score)
    models = rule.path(net, [x], held, works(net, x, layers(net)[0]))
    found = rule.search(net, [x], held, models)
    assert len(tried) <= 2 + len(models).bit_length()
    scores = [whole(at(net, held, m)) for m in models]
    assert scores == sorted(scores, reverse=True)
    assert found == max((m for m, s in zip(models, scores, strict=True) if s >= 0.98), key=models.index)
    below_zero = InterlayerHessian(loss="square", tolerance=0.02, score=lambda new: whole(new) - 2)
    assert below_zero.search(net, [x], held, models) == found  # the same share of a score of -1
    with pytest.raises(ValueError, match="with 8 bits everywhere the score is below"):
        InterlayerHessian(loss="square", tolerance=0.0).search(net, [x], held, models)


def test_size_and_latency_are_those_of_packed_layers():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
    work = works(net, torch.zeros(5, 1, 8, 8), layers(net)[0])
    assert work == {"0": Work(36, 36 * 36.0), "3": Work(1440, 1440.0)}
    assert [size(work["3"], b) for b in (8, 4, 3, 2)] == [1440, 720, 720, 360]
    packed = Packed(net[3], Grid(4, axis=0))
    assert packed.codes.numel() == size(work["3"], 4)
    roof = Roofline(bandwidth=1e3, rate=1e4)
    assert roof(work["0"], 8) == pytest.approx(0.1296) and roof(work["3"], 8) == pytest.approx(1.44)
    assert roof(work["0"], 4) == pytest.approx(0.0648)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    x = torch.randn(256, 12)
    y = (x[:, :4] @ torch.randn(4, 5)).argmax(-1)
    net = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.eval(), list(x.split(64)), y


def test_the_result_is_within_the_tolerance_and_options_act(trained):
    net, data, y = trained
    x, before = torch.cat(data), copy.deepcopy(net.state_dict())
    seen = {}
    for name, options in {
        "base": {}, "tolerance": {"tolerance": 0.2}, "bits": {"bits": (3, 8)}, "by": {"by": "minmax"}, "at": {"at": "0"},
        "cost": {"cost": lambda work, bits: bits * float(work.weights == 288)},
        "score": {"score": lambda new: float((new(x).argmax(-1) == y).float().mean()), "tolerance": 0.5},
    }.items():  # fmt: skip
        new = InterlayerHessian(**{"tolerance": 0.05, **options}).plan(net, data).apply().eval()
        seen[name] = new(x).detach()
        if name in ("base", "tolerance"):
            same = float((seen[name].argmax(-1) == net(x).argmax(-1)).float().mean())
            assert 1 - {"tolerance": 0.2}.get(name, 0.05) <= same < 1
    assert [n for n, out in seen.items() if torch.equal(seen["base"], out)] == ["base"]
    rules = [InterlayerHessian(loss=loss) for loss in ("divergence", "square")]
    held = {n: [Grid(b, 0).fit(wide(m)) for b in WIDTHS] for n, m in layers(net)[0].items()}
    assert not torch.allclose(*(rule.curvature(net, data, held).pairs for rule in rules))
    fast = InterlayerHessian(tolerance=0.05, cost="latency").plan(net, data).apply().eval()
    assert any(m.grid.bits < 8 for m in fast if isinstance(m, Packed))
    plain = InterlayerHessian(tolerance=0.05, packed=False).plan(net, data).apply().eval()
    torch.testing.assert_close(plain(x), seen["base"])
    assert type(plain[0]) is nn.Linear and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_the_plan_lists_layers_with_their_widths_and_those_in_float():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.norm, self.idle = nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2)

        def forward(self, x):
            return self.norm(self.used(x))

    plan = InterlayerHessian(tolerance=0.5).plan(Net(), torch.randn(8, 4))
    assert [(r.name, r.why) for r in plan.touched] == [("used", "16 weights, 8 or 4 or 2 bits")]
    assert {r.name: r.why for r in plan.skipped}["idle"] == "never ran on the data" and len(plan.skipped) == 2


@pytest.mark.parametrize("name", ["gpt2", "resnet", "mha"])
def test_every_family_is_rounded_packed_saved_and_generates(name, tmp_path):
    rule = InterlayerHessian(bits=(4, 8), tolerance=0.9, loss="square")
    transformed(rule, name, tmp_path / "there", refuses="packed weights")


def test_floats_on_the_grid_are_a_hugging_face_model(tmp_path):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=16, n_positions=8)
    start, text = GPT2LMHeadModel(config).eval(), torch.randint(16, (4, 8))
    plain = InterlayerHessian(tolerance=0.9, packed=False).plan(start, text).apply().eval()
    plain.save_pretrained(tmp_path / "plain")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "plain").eval()
    assert torch.equal(again(text).logits, plain(text).logits)
    half = InterlayerHessian(tolerance=0.9).plan(start.bfloat16(), text).apply()
    assert half(text).logits.dtype == torch.bfloat16


def calibration():
    return [{"input_ids": torch.randint(32, (2, 6))} for _ in range(2)]


def test_the_command_rounds_a_hugging_face_folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    model("gpt2").save_pretrained(tmp_path / "start")
    source = f"hf:{tmp_path / 'start'}"
    arguments = ["apply", "interlayer-hessian", "--model", source, "--data", "test_interlayer_hessian:calibration"]
    out = CliRunner().invoke(app, [*arguments, "-o", "tolerance=0.9", "--out", str(tmp_path / "there")])
    assert out.exit_code == 0 and "8 or 4 or 2 bits" in out.output, out.output
    new = load(tmp_path / "there")
    assert isinstance(new.transformer.h[0].attn.c_attn, Packed) and output(new, batch("gpt2")).isfinite().all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: InterlayerHessian(bits=4), "bits 4; expected at least two integers"),
        (lambda: InterlayerHessian(bits=(4, 4)), "expected at least two integers"),
        (lambda: InterlayerHessian(bits=(1, 4)), "from 2 to 8"),
        (lambda: InterlayerHessian(tolerance=1.0), r"tolerance 1\.0; expected a share"),
        (lambda: InterlayerHessian(cost="energy"), "cost 'energy'; expected 'size', 'latency' or a function"),
        (lambda: InterlayerHessian(loss="hinge"), "loss 'hinge'"),
        (lambda: InterlayerHessian().plan(nn.Sequential(nn.Linear(2, 2))), "no calibration data"),
        (lambda: InterlayerHessian().plan(nn.Sequential(nn.Linear(2, 2)), torch.ones(3, 5)), "does not run on a batch"),
        (lambda: InterlayerHessian().plan(nn.Sequential(nn.Linear(2, 2), nn.Flatten(0)), torch.ones(3, 2)), "labels out"),
        (lambda: InterlayerHessian().plan(nn.Sequential(nn.ReLU()), torch.ones(3, 5)), "no layer of Sequential"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(call, says):
    with pytest.raises(ValueError, match=says):
        call()
