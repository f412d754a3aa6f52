from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel
from typer.testing import CliRunner

from interlayer import load, save
from interlayer.cli import app
from interlayer.core.quantizer import Grid, Packed, Round, simulated
from interlayer.models import Transformer, VisionTransformer
from interlayer.transform.quantize.repq_vit import RepQViT
from interlayer.transform.quantize.repquant import RepQuant
from tests.families import model, output, transformed


def vit():
    torch.manual_seed(0)
    return VisionTransformer(1, 8, patch=4, classes=3, depth=1, width=16, heads=2).eval(), torch.rand(16, 1, 8, 8)


def test_without_its_parts_it_is_repq_vit():
    net, x = vit()
    plain = RepQViT(bits=4, by="mse").plan(net, x).apply().eval()
    none = RepQuant(bits=4, steps=0, reconstruct=False).plan(net, x).apply().eval()
    assert torch.equal(none(x), plain(x))
    ways = ({}, {"steps": 0}, {"reconstruct": False}, {"bits": 5}, {"by": 99.9}, {"lr": 0.3}, {"steps": 40})
    found = [plain(x), *(RepQuant(**{"steps": 20, "by": "minmax"} | o).plan(net, x).apply().eval()(x) for o in ways)]
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


def test_clipping_starts_at_the_given_ranges_and_keeps_the_best():
    torch.manual_seed(0)
    x, maps = 3 + torch.randn(2048, 6), torch.randn(8, 6)
    x[:2, 4] = 13.0  # far out, above
    held = Grid(3, -1, "affine").fit(x)
    same = RepQuant(steps=0).clipped(x, maps, held)
    torch.testing.assert_close((same.scale, same.zero), (held.scale, held.zero), rtol=1e-4, atol=1e-4)
    found = RepQuant(bits=8, steps=150, lr=0.3).clipped(x, maps, held)
    rest = x[2:]
    errors = [float(((each.fake(rest) - rest) @ maps.T).square().mean()) for each in (found, held)]
    assert errors[0] < 0.8 * errors[1]
    low, high = -found.zero * found.scale, (15 - found.zero) * found.scale
    assert (
        high[4] < 30 and (high[:4] > 4).all() and low[4] < 3
    )  # the side that has outliers, of the feature that has them
    again = RepQuant(bits=8, steps=150, lr=0.3).clipped(x, maps, held)
    assert torch.equal(again.scale, found.scale)


def test_one_share_for_both_sides_where_zero_stays():
    torch.manual_seed(0)
    x = torch.randn(400, 6)
    x[0] = 30.0
    held = Grid(4, -1).fit(x)
    found = RepQuant(bits=8, steps=100, lr=0.3).clipped(x, torch.randn(8, 6), held)
    assert torch.equal(found.zero, held.zero) and (found.scale < held.scale).any()


def test_the_rebuilt_weight_is_the_least_squares_one():
    torch.manual_seed(0)
    x, layer = torch.randn(500, 4) @ torch.randn(4, 12) + 0.2 * torch.randn(500, 12), nn.Linear(12, 5)
    held = Grid(2, kind="asymmetric").fit(x)
    near = held.fake(x)
    start = Packed(layer, Grid(8, 0, "asymmetric"), inputs=held)
    new = RepQuant(bits=8).rebuilt(layer, start, near.T @ near, (x - near).T @ near, (x - near).mean(0), near.mean(0))
    ridge = 0.01 * (near.T @ near).diagonal().mean()
    rows = torch.cat((near, ridge.sqrt() * torch.eye(12)))  # least squares that stay near the weight
    wanted = (
        torch.linalg.lstsq(rows, torch.cat(((x - near) @ layer.weight.T, torch.zeros(12, 5)))).solution.T + layer.weight
    )
    torch.testing.assert_close(new.weight, wanted, atol=0.02, rtol=0)  # to a step of 8 bits
    torch.testing.assert_close(new(x).mean(0), layer(x).mean(0), atol=1e-4, rtol=0)
    losses = [float((m(x) - layer(x)).detach().square().mean()) for m in (new, start)]
    assert losses[0] < 0.6 * losses[1]


def test_its_parts_bring_a_language_model_nearer():
    torch.manual_seed(0)
    net, x = Transformer(16, 8, 1, 32, 2).eval(), torch.randint(16, (32, 8))
    off = []
    for way in (RepQViT(bits=3, by="mse"), RepQuant(bits=3, steps=0), RepQuant(bits=3, steps=20)):
        new = way.plan(net, x).apply().eval()
        off.append(float((new(x) - net(x)).detach().square().mean()))
        assert isinstance(new.trunk.blocks[0].mixer.attend.probabilities, Round)
        torch.testing.assert_close(simulated(new)(x), new(x), atol=1e-3, rtol=1e-3)
    assert max(off[1:]) < 0.8 * off[0]


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_families_are_rounded_saved_and_generate(name, tmp_path):
    transformed(RepQuant(bits=8, steps=2), name, tmp_path / "there", refuses="packed weights")


def test_a_model_of_texts_and_images(tmp_path):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "initializer_range": 0.2,
    }
    words = {
        **sizes,
        "vocab_size": 32,
        "max_position_embeddings": 8,
        "bos_token_id": 0,
        "eos_token_id": 31,
        "pad_token_id": 1,
    }
    config = CLIPConfig(
        text_config=words,
        vision_config={**sizes, "image_size": 8, "patch_size": 4, "num_channels": 1},
        projection_dim=8,
    )
    net = CLIPModel(config).eval()
    given = {"input_ids": torch.randint(2, 32, (4, 6)), "pixel_values": torch.randn(4, 1, 8, 8)}
    plan = RepQuant(bits=8, steps=2).plan(net, given)
    why = {r.name: r.why for r in plan.touched}
    for part in ("text_model", "vision_model"):
        assert "folded into" in why[f"{part}.encoder.layers.0.self_attn.q_proj"]
        assert why[f"{part}.encoder.layers.0.self_attn"].startswith("queries, keys, values, probabilities")
    new = plan.apply().eval()
    with torch.no_grad():
        found, wanted = (m(**given).logits_per_image for m in (new, net))
        torch.testing.assert_close(found, wanted, atol=0.2 * float(wanted.abs().max()), rtol=0)
        save(new, tmp_path / "there")
        assert torch.equal(load(tmp_path / "there").eval()(**given).logits_per_image, found)


def test_models_without_norms_or_linear_maps():
    torch.manual_seed(0)
    bare, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)), torch.randn(64, 8)
    new = RepQuant(bits=8, steps=2).plan(bare, x).apply()
    torch.testing.assert_close(new(x), bare(x), atol=0.05, rtol=0)
    picture = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
    y = torch.randn(4, 1, 6, 6)
    assert torch.equal(
        RepQuant(bits=8).plan(picture, y).apply()(y), RepQViT(bits=8, by="mse").plan(picture, y).apply()(y)
    )


def calibration():
    return [{"pixel_values": torch.rand(8, 1, 8, 8)}]


def test_the_command_rounds_a_folder_that_loads(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    model("vit").save_pretrained(tmp_path / "start")
    arguments = ["apply", "repquant", "--model", f"hf:{tmp_path / 'start'}", "--data", "test_repquant:calibration"]
    out = CliRunner().invoke(app, [*arguments, "-o", "steps=2", "--out", str(tmp_path / "there")])
    assert out.exit_code == 0 and "folded into vit.layers.0.layernorm_before" in out.output, out.output
    new = load(tmp_path / "there").eval()
    assert isinstance(new.vit.layers[0].attention.q_proj, Packed)
    assert output(new, {"pixel_values": torch.ones(1, 1, 8, 8)}).isfinite().all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: RepQuant(bits=1), "repquant: bits 1; expected an integer from 2 to 8"),
        (lambda: RepQuant(steps=-1), "steps -1, lr"),
        (lambda: RepQuant(lr=0.0), r"lr 0\.0; expected"),
        (lambda: RepQuant().plan(vit()[0]), "repquant: no calibration data"),
    ],
)
def test_bad_input_is_one_clear_error(call, says):
    with pytest.raises(ValueError, match=says):
        call()
