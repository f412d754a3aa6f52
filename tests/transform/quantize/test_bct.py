import sys

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from interlayer import load, save
from interlayer.cli import app
from interlayer.core import recipe
from interlayer.core.quantizer import Around, Grid, Packed, PackedEmbedding, Round, simulated
from interlayer.models import Encoder, Transformer
from interlayer.transform.quantize.bct import BCT
from tests.families import model, transformed

quantized = sys.modules["interlayer.core.quantizer.layers"]


def net():
    torch.manual_seed(0)
    return Encoder(vocab=16, classes=3, length=8, depth=1, width=32, heads=2).eval()


def tokens(seed=0):
    return torch.randint(16, (4, 8), generator=torch.Generator().manual_seed(seed))


def test_every_part_is_rounded_and_the_plan_says_so():
    plan = BCT(bits=4, block=16, eight="head").plan(net())
    new = plan.apply()
    assert not plan.skipped
    parts = {n: m for n, m in new.named_modules() if isinstance(m, Packed | PackedEmbedding | Around | Round)}
    block = "trunk.blocks.0"
    assert isinstance(parts["embed"], PackedEmbedding) and parts["embed"].grid.bits == 4
    assert isinstance(parts["head"], Packed) and parts["head"].grid.bits == 8  # its outputs are the model's, and stay
    for n in ("mixer.qkv", "mixer.out", "mlp.up", "mlp.down"):
        assert isinstance(parts[f"{block}.{n}"], Around) and isinstance(parts[f"{block}.{n}.module"], Packed)
        assert parts[f"{block}.{n}.module"].grid == Grid(4, 0, group=16, powers=True)
    assert isinstance(parts[f"{block}.mlp.act"].module, nn.GELU)
    assert all(isinstance(parts[f"trunk.stream.{n}"].module, nn.LayerNorm) for n in ("norms.0", "norms.1", "last"))
    operands = {n.rsplit(".", 1)[1] for n, m in parts.items() if isinstance(m, Round)}
    assert operands == {"queries", "keys", "values", "probabilities"}
    assert {r.name for r in plan.touched} == {n for n in parts if "module" not in n and "attend" not in n} | {
        f"{block}.mixer"
    }


def test_what_runs_is_held_by_eight_bits():
    """Inputs and outputs of every part in the blocks lie on grids of 8 bits with scales that are powers of 2."""
    new, seen = BCT(block=16).plan(net()).apply().eval(), []

    def see(module, args, output):
        grid = module.grid if isinstance(module, Around) else Grid(8, kind=module.grid.kind, powers=True)
        held = grid.by_token(output)
        assert held.codes(output).dtype in (torch.int8, torch.uint8)
        seen.append(torch.equal(held.values(held.codes(output)), output))

    for m in new.modules():
        if isinstance(m, Around | Round):
            m.register_forward_hook(see)
    new(tokens())
    assert len(seen) == 12 and all(seen)


def test_linear_maps_multiply_integers_block_by_block(monkeypatch):
    new, x, shapes = BCT(bits=4, block=16).plan(net()).apply().eval(), tokens(), []
    product = quantized.integer_product
    monkeypatch.setattr(quantized, "integer_product", lambda a, b: shapes.append((*a.shape, a.dtype)) or product(a, b))
    with torch.no_grad():
        found = new(x)
    blocks = {32: 2, 128: 8}  # of the features that each of the four maps of the block, and the head, reads
    assert len(shapes) == 3 * blocks[32] + blocks[128] + blocks[32]
    assert {s[1:] for s in shapes} == {(16, torch.int8)}
    torch.testing.assert_close(
        found, simulated(new)(x), atol=0.05, rtol=0.05
    )  # a last bit may move a value to the next level


def test_scales_are_powers_chosen_by_the_squared_error():
    start, made = net(), BCT(bits=4, block=16).plan(net()).apply()
    layer, weight = made.get_submodule("trunk.blocks.0.mlp.down.module"), start.trunk.blocks[0].mlp.down.weight
    assert layer.exponent.dtype == torch.int8 and layer.exponent.shape == (32, 8)
    error = lambda w: (w - weight).unflatten(1, (8, 16)).square().sum(-1)  # noqa: E731
    ours = error(layer.weight)
    for step in (0.25, 0.5, 1, 2, 4):
        held = Grid(4, 0, group=16, powers=True).fit(weight)
        held = type(held)(held.grid, held.scale * step, held.zero)
        assert bool((ours <= error(held.fake(weight)) + 1e-9).all())


def test_the_weights_take_their_bits_and_a_byte_for_each_block():
    start, new = net(), BCT(bits=4, block=16).plan(net()).apply()
    packed = [m for m in new.modules() if isinstance(m, Packed | PackedEmbedding)]
    count = sum(m.packed_weights for m in packed)
    held = sum(t.numel() for m in packed for n, t in m.named_buffers() if n in ("codes", "exponent"))
    assert held * 8 == count * 4.5 and count == sum(p.numel() for p in start.parameters() if p.ndim == 2)


def test_every_option_changes_the_model(tmp_path):
    x = tokens()
    ways = ({}, {"bits": 4}, {"results": 4}, {"block": 16}, {"bits": 4, "eight": "embed"}, {"at": "trunk.**"})
    found = [BCT(**o).plan(net()).apply().eval()(x) for o in ways]
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])
    wanted = net()(x).detach()
    errors = [float((f.detach() - wanted).abs().max()) for f in found]
    assert errors[0] < 0.1 * float(wanted.abs().max()) and errors[0] < errors[1] and errors[0] < errors[2]
    new = BCT(bits=4, block=16).plan(net()).apply().eval()
    save(new, tmp_path / "there")
    assert torch.equal(load(tmp_path / "there")(x), new(x))


@pytest.mark.parametrize("name", ["bert", "gpt2", "resnet"])
def test_families_are_rounded_saved_and_generate(name, tmp_path):
    new = transformed(BCT(block=16), name, tmp_path, refuses="packed weights")
    assert any(isinstance(m, Around) for m in new.modules())


def test_what_stays_in_float_is_listed_with_the_reason():
    tied = {r.name: r.why for r in BCT().plan(Transformer(16, 8, 1, 32, 2)).skipped}
    assert tied["embed"] == "its weight is that of head too, stays in float" and "embed.weight" in tied["head"]
    called = {r.name: r.why for r in BCT().plan(nn.Sequential(nn.TransformerEncoderLayer(16, 2, 32))).skipped}
    assert called == {"0": "its relu is a function call, which stays in float"}
    norms = {r.name for r in BCT().plan(model("resnet")).skipped}
    assert any("normalization" in n for n in norms)  # of channels


def test_the_command_needs_no_data(tmp_path):
    recipe.save(net(), tmp_path / "base")
    out = CliRunner().invoke(
        app, ["apply", "bct", "--model", str(tmp_path / "base"), "--out", str(tmp_path / "small"), "-o", "bits=4"]
    )
    assert out.exit_code == 0, out.output
    assert load(tmp_path / "small").eval()(tokens()).shape == (4, 3)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: BCT(bits=1), r"bct: \{'bits': 1\}; expected integers, 2 to 8 bits"),
        (lambda: BCT(results=9), r"bct: \{'results': 9\}"),
        (lambda: BCT(block=0), r"bct: \{'block': 0\}"),
        (lambda: BCT(eight=nn.GELU).plan(net()), "names no layer or embedding that is rounded"),
        (lambda: BCT().plan(nn.Sequential(nn.Dropout())), "no layer of Sequential can be quantised"),
    ],
)
def test_clear_errors(call, says):
    with pytest.raises(ValueError, match=says):
        call()
