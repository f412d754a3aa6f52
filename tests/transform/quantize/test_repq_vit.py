import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from interlayer import load, save
from interlayer.cli import app
from interlayer.core.quantizer import Grid, LogGrid, LogScaled, Packed, Round, Scaled, simulated
from interlayer.core.quantizer.smooth import Fold, apply
from interlayer.models import VisionTransformer
from interlayer.transform.quantize import _repq
from interlayer.transform.quantize.repq_vit import RepQViT
from tests.families import model, output, transformed


def vit(**options):
    torch.manual_seed(0)
    sizes = {"patch": 4, "classes": 3, "depth": 2, "width": 16, "heads": 2}
    return VisionTransformer(1, 8, **(sizes | options)).eval(), torch.rand(16, 1, 8, 8)


# What the authors' quantisers gave at 4 bits on the inputs X, whose features have scales and zero points of their own; then the gain and
# bias of a norm and the weight and bias of the map after it as their reparameterisation leaves them.
X = [[0.3, 2.1, -7.0], [0.9, 1.2, 4.0], [-0.4, 3.3, 11.0], [0.1, 2.6, -2.0], [0.7, 1.9, 6.5]]
SCALE, ZERO = [0.0866648033, 0.1396266669, 1.1999746561], [5.0, -9.0, 6.0]
ROUNDED = [
    [0.2599944174, 2.0943999290, -7.1998481751], [0.8666480184, 1.2566399574, 3.5999240875], [-0.4333240092, 3.3510398865, 10.7997722626],
    [0.0866648033, 2.6529066563, -2.3999493122], [0.6933184266, 1.9547733068, 5.9998731613],
]  # fmt: skip
GAIN, BIAS, WEIGHT, SHIFT = [1.0, 0.5, 2.0], [0.2, 2.0, 1.0], [[0.5, -0.3, 0.2], [-0.8, 0.4, 0.1]], [0.1, -0.2]
GAIN2, BIAS2 = [5.4857573509, 1.7024757862, 0.7923868299], [3.1573133469, 2.2141571045, 2.9317779541]
WEIGHT2 = [[0.0911451206, -0.0881069824, 0.5048039556], [-0.1458321959, 0.117475979, 0.2524019778]]
SHIFT2 = [-1.7726640701, 0.0003411919]
P, LOG = (
    [1.0, 0.71, 0.5, 0.36, 0.24, 0.1, 0.03, 0.012],
    [0.9, 0.63639605, 0.45, 0.31819803, 0.225, 0.1125, 0.028125, 0.0140625],
)


def test_the_fold_is_that_of_the_authors():
    held = Scaled(Grid(4, -1, "affine"), torch.tensor(SCALE), torch.tensor(ZERO))
    torch.testing.assert_close(held.fake(torch.tensor(X)), torch.tensor(ROUNDED))
    whole, scale, shift = _repq.merged(held, True)
    torch.testing.assert_close(whole.scale, torch.tensor(0.4754220545))
    torch.testing.assert_close(whole.zero, torch.tensor(0.6666666865))
    norm, layer = nn.LayerNorm(3), nn.Linear(3, 2)
    for p, value in zip([*norm.parameters(), *layer.parameters()], (GAIN, BIAS, WEIGHT, SHIFT), strict=True):
        p.data.copy_(torch.tensor(value))
    apply(norm, [layer], Fold(["next"], scale, shift))
    for p, value in zip([*norm.parameters(), *layer.parameters()], (GAIN2, BIAS2, WEIGHT2, SHIFT2), strict=True):
        torch.testing.assert_close(p.detach(), torch.tensor(value), atol=1e-5, rtol=1e-5)
    found = LogScaled(LogGrid(4, "sqrt2"), torch.tensor(0.9)).fake(torch.tensor(P))
    torch.testing.assert_close(found, torch.tensor(LOG))


@pytest.mark.parametrize("far", [0.0, 5.0])
def test_the_fold_is_exact_in_floats_and_in_codes(far):
    torch.manual_seed(0)
    norm, layer = nn.LayerNorm(12).double(), nn.Linear(12, 5).double()
    norm.weight.data.mul_(torch.randn(12).mul(2).exp())
    norm.bias.data.add_(far * torch.randn(12))
    x = torch.randn(200, 12).double()
    y = norm(x).detach()
    fitted = Grid(4, -1, "affine").fit(y, 99.0)
    held = Scaled(fitted.grid, fitted.scale.double(), fitted.zero.double())
    wanted = layer(y).detach()
    naive = layer(held.fake(y)).detach()  # a scale and a zero point for each feature
    whole, scale, shift = _repq.merged(held, True)
    apply(norm, [layer], Fold(["next"], scale, shift))
    torch.testing.assert_close(layer(norm(x)).detach(), wanted, atol=1e-6, rtol=0)
    assert torch.equal(whole.codes(norm(x)), held.codes(y))
    torch.testing.assert_close(layer(whole.fake(norm(x))).detach(), naive, atol=1e-6, rtol=0)
    assert whole.scale.shape == whole.zero.shape == () and whole.zero != whole.zero.round()


def test_a_feature_that_does_not_move_does_no_harm():
    net, x = vit()
    norms = net.trunk.stream.norms
    norms[0].weight.data[3] = 0
    norms[0].bias.data[3] = 2.0
    new = RepQViT(bits=8).plan(net, x).apply().eval()
    assert new(x).isfinite().all() and (new(x) - net(x)).abs().max() < 0.2 * net(x).abs().max()


def test_every_part_is_rounded_and_the_plan_says_how():
    net, x = vit()
    plan = RepQViT(bits=4).plan(net, x)
    why = {r.name: r.why for r in plan.touched}
    for i in range(2):
        assert f"folded into trunk.stream.norms.{2 * i}" in why[f"trunk.blocks.{i}.mixer.qkv"]
        assert f"folded into trunk.stream.norms.{2 * i + 1}" in why[f"trunk.blocks.{i}.mlp.up"]
        assert why[f"trunk.blocks.{i}.mixer"].startswith("queries, keys, values, probabilities")
        assert "folded" not in why[f"trunk.blocks.{i}.mlp.down"]
    assert "inputs 8 bits" in why["patches.embed"]
    new = plan.apply().eval()
    attend, qkv = new.trunk.blocks[0].mixer.attend, new.trunk.blocks[0].mixer.qkv
    assert [type(m) for m in (attend.queries, attend.keys, attend.values, attend.probabilities)] == [Round] * 4
    assert attend.probabilities.grid == LogGrid(4, "sqrt2") and qkv.inputs == Grid(4, kind="affine")
    assert qkv.input_scale.shape == () and qkv.scale.shape == (48,) and qkv.grid.bits == 4
    assert not any(isinstance(m, nn.Linear | nn.Conv2d) for m in new.modules())
    with torch.no_grad():
        torch.testing.assert_close(simulated(new)(x), new(x), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(torch.compile(new, fullgraph=True, backend="eager")(x), new(x))


def test_norms_and_maps_without_biases():
    start = model("llama")
    plan = RepQViT(bits=8).plan(start, {"input_ids": torch.randint(32, (4, 8))})
    assert "input_layernorm" in next(r.why for r in plan.touched if r.name.endswith("layers.0.self_attn.q_proj"))
    new = plan.apply()
    layer = new.model.layers[0].self_attn.q_proj
    assert layer.bias is None and layer.inputs.kind == "symmetric"
    bare = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3, bias=False))
    nn.init.normal_(bare[0].bias, 3)
    x = torch.randn(64, 6)
    new = RepQViT(bits=8).plan(bare, x).apply()
    assert new[1].bias.shape == (3,) and new[1].bias.abs().sum() > 0
    torch.testing.assert_close(new(x), bare(x), atol=0.1, rtol=0.1)
    again = _through(new, bare)
    assert torch.equal(again(x), new(x))


def _through(new, start):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        save(new, Path(folder) / "there")
        return load(Path(folder) / "there", base=lambda: copy.deepcopy(start))


@pytest.mark.parametrize("name", ["vit", "gpt2", "mha"])
def test_families_are_rounded_saved_and_generate(name, tmp_path):
    transformed(RepQViT(bits=8), name, tmp_path / "there", refuses="packed weights")


def test_options_act():
    net, x = vit()
    seen = {
        str(o): RepQViT(**o).plan(net, x).apply().eval()(x) for o in ({}, {"bits": 5}, {"by": "mse"}, {"by": "minmax"})
    }
    found = list(seen.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
    part = RepQViT(at="trunk.blocks.0.**").plan(net, x)
    assert {r.name.split(".")[2] for r in part.touched} == {"0"}
    half, y = copy.deepcopy(net).bfloat16(), x.bfloat16()
    assert RepQViT(bits=8).plan(half, y).apply()(y).dtype == torch.bfloat16


def calibration():
    return [{"pixel_values": torch.rand(8, 1, 8, 8)}]


def test_the_command_rounds_a_folder_which_loads(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    model("vit").save_pretrained(tmp_path / "start")
    arguments = [
        "apply",
        "repq-vit",
        "--model",
        f"hf:{tmp_path / 'start'}",
        "--data",
        "test_repq_vit:calibration",
        "-o",
        "bits=6",
    ]
    out = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "there")])
    assert out.exit_code == 0 and "folded into vit.layers.0.layernorm_before" in out.output, out.output
    new = load(tmp_path / "there").eval()
    assert isinstance(new.vit.layers[0].attention.q_proj, Packed)
    assert output(new, {"pixel_values": torch.ones(1, 1, 8, 8)}).isfinite().all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: RepQViT(bits=1), "bits 1; expected an integer from 2 to 8"),
        (lambda: RepQViT(by="all"), "by='all'; expected"),
        (lambda: RepQViT(by=20.0), r"by=20\.0"),
        (lambda: RepQViT().plan(vit()[0]), "no calibration data"),
        (lambda: RepQViT().plan(vit()[0], []), "no calibration data"),
        (lambda: RepQViT().plan(nn.Sequential(nn.ReLU()), torch.ones(2, 3)), "no layer of Sequential can be quantised"),
    ],
)
def test_bad_input_is_one_clear_error(call, says):
    with pytest.raises(ValueError, match=says):
        call()
