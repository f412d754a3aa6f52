import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

from interlayer import load, save
from interlayer.cli import app
from interlayer.core.quantizer import Grid, Packed, simulated
from interlayer.core.quantizer.layers import shift
from interlayer.models import Transformer
from interlayer.transform.quantize.fptq import FPTQ
from tests.families import model, output, transformed


def language(depth=2):
    torch.manual_seed(0)
    net = Transformer(16, 8, depth, 32, 2).eval()
    return net, torch.randint(16, (8, 8))


def test_the_range_of_inputs_chooses_how_they_are_rounded():
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
    x = torch.randn(64, 32)
    for gain, says, dynamic in (
        (1.0, "8 bits, one scale", False),
        (30.0, "equalised by 0", False),
        (300.0, "by token", True),
    ):
        start = copy.deepcopy(net)
        start[0].weight.data[3] = gain
        plan = FPTQ(group=16).plan(start, x)
        why = {r.name: r.why for r in plan.touched}
        top = float(start[0](x).detach().abs().max())
        assert says in why["1"] and f"inputs up to {top:.3g}" in why["1"] and "groups of 16" in why["1"]
        assert ("equalised" in why["1"]) == (gain == 30.0)
        assert plan.apply()[1].dynamic == dynamic
    assert (
        FPTQ(group=16, low=0.1, high=1e3).plan(net, x).touched[1].why.endswith("by token, no norm to equalise them in")
    )


def test_equalisation_is_folded_into_the_norm_and_exact():
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 5)).double()
    net[0].weight.data[:2] = 30
    x = torch.randn(40, 12).double()
    tops = net[0](x).detach().abs().amax(0)
    new = FPTQ(group=4, bits=8).plan(net, x).apply()
    scale = tops / torch.log2(2 + tops)
    torch.testing.assert_close(new[0].weight, net[0].weight / scale, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(new[0].bias, net[0].bias / scale, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(new[0](x).abs().amax(0), torch.log2(2 + tops), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(new[1].input_scale, torch.log2(2 + tops).max() / 127, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(new(x), net(x), atol=0.02 * float(net(x).detach().abs().max()), rtol=0)
    net[0].weight.data[5] = net[0].bias.data[5] = 0  # a feature that never moves
    assert FPTQ(group=4).plan(net, x).apply()(x).isfinite().all()


def naive(layer, x):
    """One output, one group after the other, in Python's integers."""
    size, held, weights = layer.grid.group or layer.shape[1], layer.scaled_inputs(x), layer.weights
    codes, weight = held.codes(x).tolist(), (layer.integers().short() + shift(layer.grid)).tolist()
    scale, zero = weights.scale.view(layer.shape[0], -1).tolist(), weights.zero.view(layer.shape[0], -1).tolist()
    across, back = held.scale.view(-1).tolist(), held.zero.view(-1).tolist()
    found = []
    for i, row in enumerate(codes):
        z, s = back[i % len(back)], across[i % len(across)]
        for o, w in enumerate(weight):
            sums = [
                sum((row[j] - z) * (w[j] - zero[o][g]) for j in range(g * size, (g + 1) * size)) * scale[o][g]
                for g in range(len(w) // size)
            ]
            found.append(sum(sums) * s + float(layer.bias[o]))
    return torch.tensor(found, dtype=x.dtype).view(len(codes), -1)


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("inputs", ["static", "dynamic"])
def test_groups_are_summed_from_integer_products(kind, inputs, monkeypatch):
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 5).requires_grad_(False), torch.randn(3, 24) + 0.5
    calls = []
    product = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: calls.append((a.dtype, b.dtype)) or product(a, b))
    grid = Grid(8, kind=kind)
    made = Packed(layer, Grid(4, 0, kind, 8), inputs=grid if inputs == "dynamic" else grid.fit(x))
    found = made(x)
    assert calls == [(torch.int8, torch.int8)] * 3 and made.codes.dtype == torch.uint8 and made.codes.numel() == 5 * 12
    torch.testing.assert_close(found, naive(made, x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        found, F.linear(made.scaled_inputs(x).fake(x), made.weight, layer.bias), atol=1e-5, rtol=1e-5
    )


def test_the_model_is_its_float_twin_in_three_tenths_of_the_space():
    net, x = language(depth=1)
    net = net.double()
    new = FPTQ(group=32, low=1.0).plan(net, x).apply().eval()
    with torch.no_grad():
        torch.testing.assert_close(new(x), simulated(new)(x), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(torch.compile(new, fullgraph=True, backend="aot_eager")(x), new(x))
    for m in (m for m in new.modules() if isinstance(m, Packed)):
        held = m.codes.numel() + 2 * m.scale.numel()  # scales in 16 bits
        assert held <= 0.30 * 2 * torch.Size(m.shape).numel()


def test_groups_fit_the_rows_and_options_act():
    net, x = language()
    sizes = {
        g: {m.grid.group for m in FPTQ(group=g).plan(net, x).apply().modules() if isinstance(m, Packed)}
        for g in (8, 24, 32, 128)
    }
    assert sizes == {8: {8}, 24: {16}, 32: {None, 32}, 128: {None}}
    assert FPTQ(group=20).grid(nn.Linear(37, 2)).group is None  # a prime has no groups
    ways = ({}, {"bits": 5}, {"group": 8}, {"low": 1.0}, {"low": 0.0, "high": 0.1})
    found = [FPTQ(**o).plan(net, x).apply().eval()(x) for o in ways]
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
    assert {r.name.split(".")[2] for r in FPTQ(at="trunk.blocks.0.**").plan(net, x).touched} == {"0"}


def test_everything_in_float_is_listed():
    start = model("gpt2")
    plan = FPTQ(group=8).plan(start, {"input_ids": torch.randint(32, (2, 8))})
    why = {r.name: r.why for r in plan.skipped}
    assert "its products stay in float" in why["transformer.h.0.attn"] and "its weight is also" in why["lm_head"]
    listed = {r.name for r in (*plan.touched, *plan.skipped)}
    assert all(
        n in listed for n, m in start.named_modules() if n and next(m.parameters(recurse=False), None) is not None
    )
    norm = FPTQ(group=8, low=0.1).plan(model("bert"), {"input_ids": torch.randint(32, (2, 8))})
    assert any("others read its output too" in r.why for r in norm.skipped)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_families_are_rounded_saved_and_generate(name, tmp_path):
    transformed(FPTQ(group=8, low=1.0), name, tmp_path / "there", refuses="packed weights")


def calibration():
    return [{"input_ids": torch.randint(32, (4, 8))}]


def test_the_command_rounds_a_folder_that_loads(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    model("gpt2").save_pretrained(tmp_path / "start")
    arguments = ["apply", "fptq", "--model", f"hf:{tmp_path / 'start'}", "--data", "test_fptq:calibration"]
    arguments += ["-o", "group=8", "-o", "low=1.0"]
    out = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "there")])
    assert out.exit_code == 0 and "equalised by transformer.h.0.ln_1" in out.output, out.output
    new = load(tmp_path / "there").eval()
    given = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
    assert isinstance(new.transformer.h[0].attn.c_attn, Packed) and output(new, given).isfinite().all()


def test_half_precision_and_a_saved_plain_model(tmp_path):
    net, x = language()
    half = copy.deepcopy(net).bfloat16()
    new = FPTQ(group=8, low=1.0).plan(half, x).apply()
    assert new(x).dtype == torch.bfloat16
    save(new, tmp_path / "there")
    again = load(tmp_path / "there", base=lambda: copy.deepcopy(half)).eval()
    assert torch.equal(again(x), new.eval()(x))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: FPTQ(bits=9), "bits 9, group 128; expected integers"),
        (lambda: FPTQ(group=0), "group 0"),
        (lambda: FPTQ(low=20.0, high=10.0), r"low=20\.0, high=10\.0; expected 0 <= low <= high"),
        (lambda: FPTQ().plan(language()[0]), "no calibration data"),
        (lambda: FPTQ().plan(nn.Sequential(nn.ReLU()), torch.ones(2, 3)), "no layer of Sequential can be quantised"),
        (lambda: FPTQ().plan(nn.Sequential(nn.Linear(3, 2)), torch.full((2, 3), torch.nan)), "inputs of 0 are not finite"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_error(call, says):
    with pytest.raises(ValueError, match=says):
        call()
