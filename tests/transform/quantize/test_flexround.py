import copy
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from interlayer import load, save
from interlayer.cli import app
from interlayer.core.blockwise import Part, error
from interlayer.core.quantizer import Grid, Packed, Scaled, learned, simulated
from interlayer.models import MLP
from interlayer.transform.quantize.flexround import Division, FlexRound
from tests.families import batch, model, output, transformed

GRIDS = [Grid(3, None, "asymmetric"), Grid(4, 0, "asymmetric"), Grid(4), Grid(2, 0)]


def moved(weight, grid, size=0.3):
    """A rounder that has learned something."""
    made = Division(weight, grid.fit(weight, "mse", 2.4))
    with torch.no_grad():
        for p in made.parameters():
            p.add_(size * torch.randn_like(p))
    return made


def naive(made, weight):
    """The paper's equation, one weight after the other."""
    grid, out = made.held.grid, torch.empty_like(weight)
    for place in torch.cartesian_prod(*map(torch.arange, weight.shape)).tolist():
        o, i = place[:2]
        pick = (lambda t, o=o: float(t.flatten()[o])) if grid.axis == 0 else float
        s1, zero = pick(made.s1.detach().exp()), pick(made.held.zero)
        divisor = s1 * float(made.s2.detach()[tuple(place)].exp()) * float(made.s3.detach().exp().flatten()[o])
        if weight.ndim > 2:
            divisor *= float(made.s4.detach().exp().flatten()[i])
        code = min(max(round(float(weight[tuple(place)]) / divisor) + zero, grid.low), grid.high)
        out[tuple(place)] = s1 * (code - zero)
    return out


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 2, 3), (2, 3, 3)])
def test_rounding_is_the_equation_and_starts_at_the_nearest_level(grid, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    start = Division(weight, held := grid.fit(weight, "mse", 2.4))
    torch.testing.assert_close(start.value(weight).detach(), held.fake(weight), atol=1e-5, rtol=1e-5)
    sizes = {n: tuple(p.shape) for n, p in start.named_parameters()}
    ones = (1,) * (len(shape) - 2)
    wanted = {"s1": (shape[0],) if grid.axis == 0 else (), "s2": shape, "s3": (shape[0], 1, *ones)}
    assert sizes == wanted | ({"s4": (1, shape[1], *ones)} if ones else {})
    made = moved(weight, grid)
    torch.testing.assert_close(made.value(weight).detach(), naive(made, weight), atol=1e-5, rtol=1e-5)
    scaled, codes = made.found(weight)
    torch.testing.assert_close(scaled.values(codes), made.value(weight).detach(), atol=1e-6, rtol=1e-6)
    assert codes.dtype == (torch.int8 if grid.low else torch.uint8)
    assert not torch.equal(codes, held.codes(weight))  # with other scales other codes


@pytest.mark.parametrize("grid", GRIDS)
def test_gradients_follow_the_reciprocal_rule(grid):
    """dL/dS = -s1 W / S^2 dL/dW' inside the range; of a logarithm, S times that."""
    torch.manual_seed(1)
    weight, e = torch.randn(4, 5), torch.randn(4, 5)
    made = moved(weight, grid)
    made.value(weight).backward(e)
    with torch.no_grad():
        s, s1, zero = made.divisor(), grid.spread(made.s1, weight).exp(), grid.spread(made.held.zero, weight)
        exact = weight / s + zero
        inside = (exact.round() >= grid.low) & (exact.round() <= grid.high)
        by_s = -s1 * weight / s**2 * e * inside
        torch.testing.assert_close(made.s2.grad, s * by_s)
        torch.testing.assert_close(made.s3.grad, (s * by_s).sum(1, keepdim=True))
        common = made.value(weight) * e + s * by_s  # s1 is a factor of the value too
        torch.testing.assert_close(made.s1.grad, common.sum(1) if grid.axis == 0 else common.sum())
    twice = Division(weight, made.held)
    twice.value(weight).backward(torch.ones_like(e))
    twice_inside = (weight / twice.divisor()).round().add(zero).clamp(grid.low, grid.high) - zero == (
        weight / twice.divisor()
    ).round()
    ratio = twice.s2.grad[twice_inside] / weight[twice_inside]
    assert torch.allclose(
        ratio, torch.full_like(ratio, -1.0), atol=1e-4
    )  # in proportion to the weight, from the first step


# What the authors' quantiser gave on these numbers at 3 bits, for the tensor and for each channel: scale and zero of the whole range, the
# weight at first and with S2 and s3 as below, and the gradients of the logarithms of s1, S2 and s3.
WEIGHT = [[0.31, -0.72, 1.4, 0.05], [-1.1, 0.55, -0.21, 0.9], [0.02, -0.44, 0.63, -0.17]]
S2 = [[0.1, -0.2, 0.05, 0.0], [0.3, -0.1, 0.02, -0.25], [0.15, 0.08, -0.3, 0.12]]
S3 = [[0.05], [-0.1], [0.2]]
ERROR = [[1.0, -2, 3, 0.5], [0.7, -1.2, 2.1, -0.3], [1.5, 0.4, -0.9, 2.2]]
THEIRS = {
    None: (
        [0.357143], [3.0],
        [[0.357143, -0.714286, 1.428572, 0.0], [-1.071429, 0.714286, -0.357143, 1.071429], [0.0, -0.357143, 0.714286, -0.0]],
        [[0.357143, -0.714286, 1.428572, 0.0], [-1.071429, 0.714286, -0.357143, 1.428572], [0.0, -0.357143, 0.714286, -0.0]],
        [0.043557],
        [[-0.266819, -1.673042, -3.800317, -0.023781], [0.630423, 0.806126, 0.47773, 0.383148], [-0.021141, 0.133018, 0.626632, 0.27158]],
        [-5.763959, 2.297426, 1.010089],
    ),
    0: (
        [0.302857, 0.285714, 0.152857], [2.0, 4.0, 3.0],
        [[0.302857, -0.605714, 1.514286, 0.0], [-1.142857, 0.571429, -0.285714, 0.857143], [0.0, -0.458571, 0.611429, -0.152857]],
        [[0.302857, -0.605714, 1.211429, 0.0], [-0.857143, 0.571429, -0.285714, 0.857143], [0.0, -0.305714, 0.611429, -0.152857]],
        [1.057653, -0.228579, -0.6254],
        [[-0.266819, 0.0, -3.800318, -0.023781], [0.630423, 0.806126, 0.47773, -0.0], [-0.021141, 0.133018, -0.0, 0.27158]],
        [-4.090918, 1.914278, 0.383457],
    ),
}  # fmt: skip


@pytest.mark.parametrize("axis", THEIRS)
def test_values_and_gradients_are_the_authors(axis):
    weight = torch.tensor(WEIGHT)
    made = Division(weight, held := Grid(3, axis, "asymmetric").fit(weight))
    scale, zero, first, after, of_s1, of_s2, of_s3 = map(torch.tensor, THEIRS[axis])
    torch.testing.assert_close(held.scale.flatten(), scale, atol=1e-6, rtol=0)
    assert torch.equal(held.zero.flatten(), zero)
    torch.testing.assert_close(made.value(weight).detach(), first, atol=1e-5, rtol=0)
    with torch.no_grad():
        made.s2.copy_(torch.tensor(S2))
        made.s3.copy_(torch.tensor(S3))
    found = made.value(weight)
    torch.testing.assert_close(found.detach(), after, atol=1e-5, rtol=0)
    found.backward(torch.tensor(ERROR))
    for p, wanted in ((made.s1, of_s1), (made.s2, of_s2), (made.s3, of_s3)):
        torch.testing.assert_close(p.grad.flatten(), wanted.flatten(), atol=2e-5, rtol=0)


def test_a_block_ends_closer_than_the_nearest_levels_and_codes_move_more_than_one_step():
    torch.manual_seed(0)
    x = torch.randn(200, 16) @ torch.randn(16, 16)
    layer = nn.Linear(16, 16)
    nn.init.normal_(layer.weight)
    part = Part("0", layer, [((x,), {})], [layer(x).detach()])
    held = Grid(3, None, "asymmetric").fit(layer.weight.detach(), "mse", 2.4)
    scaled, codes = learned(Division, steps=200, lr=1e-2)(part, {"0": layer}, {"0": held})["0"]

    def loss(weight):
        return float(error(nn.functional.linear(x, weight, layer.bias), part.outputs[0]))

    with torch.no_grad():
        assert loss(scaled.values(codes)) < 0.6 * loss(held.fake(layer.weight))
    assert scaled.scale != held.scale and torch.equal(scaled.zero, held.zero)
    steps = (codes.float() - held.codes(layer.weight.detach()).float()).abs()
    assert steps.max() >= 1 and isinstance(layer.weight, nn.Parameter) and type(layer) is nn.Linear


@pytest.mark.parametrize("name", ["gpt2", "vit", "mha"])
def test_every_family_is_rounded_packed_saved_and_generates(name, tmp_path):
    transformed(FlexRound(steps=2), name, tmp_path / "there", refuses="packed weights")


def test_options_act():
    start, x = MLP(8, 3, depth=2, width=16), torch.randn(64, 8)
    base = {"steps": 6, "bits": 3}
    seen = {}
    for name, options in {
        "base": {}, "channel": {"per": "channel"}, "symmetric": {"kind": "symmetric"}, "minmax": {"by": "minmax"}, "steps": {"steps": 7},
        "lr": {"lr": 0.02}, "original": {"prefix": "original"}, "blocks": {"blocks": ["blocks.*.0", "head"]}, "bits": {"bits": 4},
        "seed": {"seed": 1},
    }.items():  # fmt: skip
        new = FlexRound(**{**base, **options}).plan(start, list(x.split(16))).apply().eval()
        seen[name] = new(x).detach()
        layer = new.blocks[0][0]
        assert layer.scale.shape == ((16,) if name == "channel" else ()) and (layer.grid.low < 0) == (
            name == "symmetric"
        )
    assert all(not torch.equal(seen["base"], out) for name, out in seen.items() if name != "base")
    only = FlexRound(at="blocks.*.0", **base).plan(start, x)
    assert {r.name for r in only.touched} == {"blocks.0.0", "blocks.1.0"}
    assert type(only.apply().head) is nn.Linear


def test_an_interrupted_run_goes_on_and_gives_the_same(tmp_path):
    start, x = MLP(8, 3, depth=3, width=16), torch.randn(32, 8)
    plan = FlexRound(steps=10, folder=tmp_path).plan(start, x)
    whole = plan.apply()
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 5 and all(p.suffix == ".safetensors" for p in kept)
    for path in kept[3:]:
        path.unlink()
    before = [os.stat(p).st_mtime_ns for p in kept[:3]]
    again = FlexRound(steps=10, folder=tmp_path).plan(start, x).apply()
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))
    assert [os.stat(p).st_mtime_ns for p in kept[:3]] == before and sorted(tmp_path.iterdir()) == kept
    FlexRound(steps=11, folder=tmp_path).plan(start, x).apply()
    assert len(list(tmp_path.iterdir())) == 10


def test_four_bits_take_at_most_three_tenths_of_half_precision_and_the_float_form_is_a_plain_model(tmp_path):
    config = GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=16, n_positions=8)
    start, text = GPT2LMHeadModel(config).half().float().eval(), torch.randint(16, (4, 8))
    half = copy.deepcopy(start).half()
    for per in ("tensor", "channel"):
        new = FlexRound(steps=2, per=per).plan(half.float(), text).apply().half()
        matrices = [m for m in new.modules() if isinstance(m, Packed)]
        assert len(matrices) == 8
        held = sum(b.numel() * b.element_size() for m in matrices for b in m.buffers())
        assert held <= 0.30 * sum(2 * torch.Size(m.shape).numel() for m in matrices)
        save(new, tmp_path / per)
        rest = sum(p.numel() * 2 for p in new.parameters())
        assert (tmp_path / per / "model.safetensors").stat().st_size - rest <= held + 10_000  # names and shapes
    plain = FlexRound(steps=2, packed=False).plan(start, text).apply().eval()
    plain.save_pretrained(tmp_path / "plain")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "plain").eval()
    assert torch.equal(again(text).logits, plain(text).logits)
    assert len(plain.transformer.h[0].mlp.c_fc.weight.unique()) <= 16
    packed = FlexRound(steps=2).plan(start, text).apply().eval()
    torch.testing.assert_close(packed(text).logits, plain(text).logits)
    torch.testing.assert_close(simulated(packed)(text).logits, plain(text).logits)


def calibration():
    return [{"input_ids": torch.randint(32, (2, 6))} for _ in range(2)]


def test_the_command_rounds_a_hugging_face_folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    model("gpt2").save_pretrained(tmp_path / "start")
    arguments = [
        "apply",
        "flexround",
        "--model",
        f"hf:{tmp_path / 'start'}",
        "--data",
        "test_flexround:calibration",
        "-o",
        "steps=2",
    ]
    out = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "there")])
    assert out.exit_code == 0 and "with block transformer.h.3" in out.output, out.output
    new = load(tmp_path / "there")
    assert isinstance(new.transformer.h[0].attn.c_attn, Packed) and output(new, batch("gpt2")).isfinite().all()
    refused = CliRunner().invoke(app, [*arguments[:4], "--plan"])
    assert refused.exit_code and "no calibration data" in refused.output + refused.stderr


def test_low_precision_models_are_rounded_in_their_own_type():
    start = MLP(8, 3, depth=1, width=16).bfloat16()
    new = FlexRound(steps=3).plan(start, torch.randn(16, 8).bfloat16()).apply()
    assert new(torch.ones(2, 8).bfloat16()).dtype == torch.bfloat16 and new.blocks[0][0].scale.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: FlexRound(bits=1), "bits 1; expected an integer from 2 to 8"),
        (lambda: FlexRound(bits=9), "bits 9"),
        (lambda: FlexRound(per="row"), "per 'row'; expected 'tensor' or 'channel'"),
        (lambda: FlexRound(kind="midrise"), "kind 'midrise'"),
        (lambda: FlexRound(prefix="float"), "prefix 'float'"),
        (lambda: FlexRound(steps=0), "steps 0"),
        (lambda: FlexRound(lr=0.0), r"lr 0\.0"),
        (lambda: FlexRound().plan(nn.Sequential(nn.Linear(2, 2))), "no calibration data"),
        (lambda: FlexRound().plan(nn.Sequential(nn.Linear(2, 2)), []), "no calibration data"),
        (lambda: FlexRound().plan(nn.Sequential(nn.Linear(2, 2)), ["text"]), "does not run on a batch of type str"),
        (
            lambda: FlexRound().plan(nn.Sequential(nn.Linear(2, 2)), torch.ones(3, 5)),
            "does not run on a batch of type Tensor",
        ),
        (
            lambda: FlexRound().plan(nn.Sequential(nn.ReLU()), torch.ones(3, 5)),
            "no layer of Sequential can be quantised",
        ),
        (
            lambda: FlexRound(blocks="1").plan(nn.Sequential(nn.Linear(2, 2), nn.Tanh()), torch.ones(3, 2)),
            "lies in a block",
        ),
    ],
)
def test_bad_input_is_one_clear_error(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_scaled_grids_are_those_of_the_range():
    held = Scaled(Grid(4), torch.tensor(0.5), torch.tensor(0.0))
    assert float(Division(torch.ones(2, 2), held).s1.detach().exp()) == pytest.approx(0.5)
