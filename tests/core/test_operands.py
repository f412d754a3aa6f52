"""Rounding of inputs by token and by channel, of attention's operands, logarithmic grids, and folds into norms."""

import copy
import functools
import importlib
import math

import pytest
import torch
from diffusers.models.attention_processor import SlicedAttnProcessor
from families import PLAIN, batch, model, output
from torch import nn

from interlayer import load, save
from interlayer.core.quantizer import (
    Grid,
    LogGrid,
    Multihead,
    Packed,
    Round,
    Scaled,
    nearest,
    observe,
    opened,
    opening,
    simulated,
)
from interlayer.core.quantizer import attention as attending
from interlayer.core.quantizer.attention import Attend, attentions, operands
from interlayer.core.quantizer.grid import log_naive
from interlayer.core.quantizer.layers import biased
from interlayer.core.quantizer.smooth import Fold, apply, fold
from interlayer.models import VisionTransformer

BYTES = Grid(8, kind="asymmetric")


def vit(depth=2):
    torch.manual_seed(0)
    return VisionTransformer(1, 8, patch=4, classes=3, depth=depth, width=8, heads=2).eval()


@pytest.mark.parametrize("base", ["2", "sqrt2"])
@pytest.mark.parametrize("bits", [3, 4])
def test_logarithmic_levels_are_powers_and_the_root_changes_base_exactly(base, bits):
    p = torch.cat((torch.randn(50, 20).mul(3).softmax(-1).flatten(), torch.tensor([0.0, 1.0]))).double()
    held = LogGrid(bits, base).fit(p)
    number = 2.0 if base == "2" else math.sqrt(2)
    torch.testing.assert_close(held.fake(p), log_naive(p, bits, number, float(held.scale)).double())
    codes = torch.arange(2**bits - 1)
    torch.testing.assert_close(held.values(codes).double(), number ** -codes.double(), atol=0, rtol=1e-6)
    assert held.values(torch.tensor(2**bits - 1)) == 0
    assert held.codes(p).dtype == torch.uint8 and held.codes(p).unique().numel() > 2 ** (bits - 1)
    by = {k: LogGrid(bits, base).fit(p, k) for k in ("minmax", "mse", 99.0)}
    errors = {k: float((h.fake(p) - p).square().sum()) for k, h in by.items()}
    assert errors["mse"] <= min(errors.values()) and by[99.0].scale < by["minmax"].scale
    x = p.float().requires_grad_()
    held.fake(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_an_affine_grid_covers_a_range_far_from_zero_and_tokens_have_their_own():
    x = torch.rand(7, 4) + 5
    held = Grid(4, kind="affine").fit(x)
    assert (held.fake(x) - x).abs().max() <= held.scale / 2 + 1e-6
    assert held.scale * 4 < Grid(4, kind="asymmetric").fit(x).scale
    for grid in (BYTES, Grid(4), Grid(4, kind="affine")):
        rows = grid.by_token(x)
        assert rows.scale.shape == (7, 1)
        torch.testing.assert_close(rows.fake(x), torch.stack([grid.fit(r).fake(r) for r in x]))


@pytest.mark.parametrize("kind", ["symmetric", "asymmetric", "affine"])
def test_inputs_are_rounded_by_token_and_by_channel(kind):
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 3), torch.randn(2, 4, 6) * torch.tensor([1.0, 9, 0.1, 1, 2, 5]) + 1
    grid = Grid(8, kind=kind)
    token = Packed(layer, Grid(8, 0), inputs=grid)
    torch.testing.assert_close(token(x), token.call(grid.by_token(x).fake(x), token.weight), atol=1e-4, rtol=1e-4)
    held = Grid(8, -1, kind).fit(x)
    channel = Packed(layer, Grid(8, 0), inputs=held)
    torch.testing.assert_close(channel(x), channel.call(held.fake(x), channel.weight))
    assert channel.input_scale.shape == (6,) and not hasattr(token, "input_scale")
    conv = nn.Conv2d(6, 3, 3, padding=1)
    image = x.permute(0, 2, 1)[..., None].expand(-1, -1, -1, 4).contiguous()
    for inputs in (grid, Grid(8, -3, kind).fit(image)):
        found = Packed(conv, Grid(8, 0), inputs=inputs)(image)
        torch.testing.assert_close(found, conv(image), atol=0.15, rtol=0.02)
    for made in (token, channel):
        torch.testing.assert_close(torch.compile(made, fullgraph=True, backend="aot_eager")(x), made(x))
        out = torch.export.export(made, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
        torch.testing.assert_close(out(x[:1]), made(x[:1]))
        assert torch.equal(copy.deepcopy(made)(x), made(x)) and ("by" in repr(made))
        given = x.clone().requires_grad_()
        made(given).sum().backward()
        assert given.grad.abs().sum() > 0


def test_ranges_are_found_for_each_module_and_feature():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    data = [torch.randn(20, 3, 6), torch.randn(5, 3, 6)]
    found = observe(net, data, {"0": Grid(4, -1, "affine"), "1": LogGrid(4), "2": Grid(8)})
    x = torch.cat(data).flatten(0, 1)
    torch.testing.assert_close(found["0"].scale, (x.amax(0) - x.amin(0)) / 15)
    assert found["2"].scale.shape == () and list(found) == ["0", "1", "2"]
    found = observe(net, data, Grid(4, -1), at="0", by="mse")
    torch.testing.assert_close(found["0"].scale, Grid(4, -1).fit(x, "mse").scale)


@pytest.mark.parametrize("name", ["mha", "gpt2", "llama", "vit", "bert", "t5", "bart"])
def test_opened_attention_gives_the_same_and_is_rounded_saved_and_loaded(name, tmp_path):
    start, given = model(name), batch(name)
    before = copy.deepcopy(start.state_dict())
    work, names, rows = opening(start)
    assert names and not rows
    torch.testing.assert_close(output(work, given), output(start, given), atol=2e-5, rtol=1e-4)
    for how in ({"data": given}, {"dynamic": True}):
        plan = nearest(start, Grid(8, 0), inputs=BYTES, attention=True, **how)
        assert set(names) <= {r.name for r in plan.touched}
        new = plan.apply().eval()
        assert sum(isinstance(m, Round) for m in new.modules()) == 4 * len(names)
        out = output(new, given)
        assert not torch.equal(out, output(nearest(start, Grid(8, 0), inputs=BYTES, **how).apply().eval(), given))
        save(new, tmp_path / str(len(how)))
        again = load(tmp_path / str(len(how)), base=functools.partial(model, name) if name in PLAIN else None)
        assert torch.equal(output(again.eval(), given), out)
        torch.testing.assert_close(output(simulated(new), given), out, atol=0.05, rtol=0.05)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), start.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["mha", "gpt2", "llama", "vit", "bert", "t5", "dit"])
def test_probabilities_that_are_observed_in_parts_have_the_ranges_of_the_whole(name, monkeypatch):
    work, names, _ = opening(model(name))
    given = batch(name)
    if name in ("gpt2", "llama", "bert"):
        given["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    grids = operands(names, BYTES, Grid(8, kind="unsigned"))
    calls = []
    for attend in (m for m in work.modules() if isinstance(m, Attend)):
        attend.probabilities.register_forward_hook(lambda m, args, out: calls.append(len(out)))
    monkeypatch.setattr(importlib.import_module("interlayer.core.quantizer.observe"), "KEPT", 7)
    for by in ("minmax", 80.0, "mse"):
        found = {}
        for fits in (2**18, 1):
            monkeypatch.setattr(attending, "FITS", fits)
            calls.clear()
            found[fits] = observe(work, given, grids, by=by)
            assert set(calls) == {2 if fits > 1 else 1}
        assert set(found[1]) == set(grids)
        for key, held in found[1].items():
            torch.testing.assert_close(held.scale, found[2**18][key].scale)
    calls.clear()
    torch.testing.assert_close(output(work, given), output(model(name), given), atol=2e-5, rtol=1e-4)
    assert set(calls) == {2}  # outside of observe they come whole


def test_attention_in_parts_gives_what_it_gives_at_once(monkeypatch):
    torch.manual_seed(0)
    attend, q, kv = Attend().eval(), torch.randn(5, 4, 3, 8), torch.randn(2, 5, 2, 6, 8)
    bias = {
        "none": None,
        "alike": torch.randn(4, 3, 6),
        "each": torch.randn(5, 1, 3, 6),
        "one": torch.randn(1, 4, 3, 6),
    }
    monkeypatch.setattr(attending, "FITS", 2 * 4 * 3 * 6)  # of two examples
    for added in bias.values():
        for mask in (None, torch.arange(6) < torch.tensor([6, 3, 4, 1, 2])[:, None]):
            met = {"causal": mask is None, "mask": mask, "bias": added}
            whole = attend.weigh(q, *kv, **met)
            with attending.apart(attend):
                parts, read = attend.weigh(q, *kv, **met), attend(q, *kv, **met)
                assert len(list(attend.parts(q, *kv, **met))) == 3
                assert attend(q[:0], *kv[:, :0], causal=True).shape == (0, 4, 3, 8)
                shared = attend(q[:1], *kv, causal=True)
            assert torch.allclose(shared, attend(q[:1].expand_as(q), *kv, causal=True))
            assert all(map(torch.allclose, parts, whole)) and torch.allclose(read, whole[0])


def test_the_parts_of_multi_head_attention_are_those_of_torch():
    torch.manual_seed(0)
    for options in ({}, {"batch_first": True}, {"kdim": 4, "vdim": 6}, {"bias": False}):
        old = nn.MultiheadAttention(8, 2, **options).eval()
        new = opened(nn.ModuleList([copy.deepcopy(old)]), ["0"])[0]
        assert isinstance(new, Multihead)
        q = torch.randn(3, 2, 8)
        k, v = torch.randn(3, 2, old.kdim), torch.randn(3, 2, old.vdim)
        size, items = (2, 3) if old.batch_first else (3, 2)
        hidden = torch.zeros(items, size, dtype=torch.bool)
        hidden[0, -1] = True
        future = torch.ones(size, size, dtype=torch.bool).triu(1)
        for given in (
            {}, {"need_weights": False}, {"average_attn_weights": False}, {"key_padding_mask": hidden},
            {"attn_mask": future}, {"attn_mask": torch.randn(size, size)}, {"attn_mask": torch.randn(2 * items, size, size)},
            {"attn_mask": future, "key_padding_mask": hidden},
        ):  # fmt: skip
            for a, b in zip(old(q, k, v, **given), new(q, k, v, **given), strict=True):
                assert a is b is None or torch.allclose(a, b, atol=1e-6)
    one = [t[:, 0] for t in (q, k, v)]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(old(*one), new(*one), strict=True))
    layer = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x = torch.randn(2, 3, 8)
    work, names, _ = opening(layer)
    assert len(names) == 2 and torch.allclose(work(x), layer(x), atol=1e-5)
    rounded = nearest(layer, Grid(8, 0), inputs=BYTES, attention=True, data=x).apply().eval()
    assert (rounded(x) - layer(x)).abs().max() < 0.3 and not torch.equal(rounded(x), layer(x))


class Idle(nn.Module):
    """An attention that nobody calls."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.MultiheadAttention(4, 2)

    def forward(self, x):
        return self.used(x)


def test_rounded_attention_is_compiled_and_exported():
    net, x = vit(1), torch.rand(4, 1, 8, 8)
    new = nearest(net, Grid(8, 0), inputs=BYTES, attention=True, data=x).apply().eval()
    torch.testing.assert_close(torch.compile(new, fullgraph=True, backend="aot_eager")(x), new(x))
    out = torch.export.export(new, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    torch.testing.assert_close(out(x[:3]), new(x[:3]))
    with torch.autocast("cpu", torch.bfloat16):
        assert new(x).isfinite().all()


def test_the_plan_names_the_attentions_that_it_reaches_and_those_that_stay_in_float():
    net, x = vit(), torch.rand(4, 1, 8, 8)
    assert {"trunk.blocks.0.mixer", "trunk.blocks.1.mixer"} == set(attentions(net)[0])
    part = nearest(net, Grid(8, 0), inputs=BYTES, attention=True, at="trunk.blocks.0.**", data=x)
    assert [r.name for r in part.touched if r.what == "attention"] == ["trunk.blocks.0.mixer"]
    other = VisionTransformer(1, 8, patch=4, classes=3, depth=1, width=8, heads=2, mixer="hopfield")
    plan = nearest(other, Grid(8, 0), inputs=BYTES, attention=True, data=x)
    assert any("stay in float" in r.why and "mixer" in r.name for r in plan.skipped)
    dit = model("dit")
    dit.transformer_blocks[0].attn1.set_processor(SlicedAttnProcessor(1))
    assert [(r.name, r.why) for r in attentions(dit)[1]] == [
        ("transformer_blocks.0.attn1", "its processor is a SlicedAttnProcessor, its products stay in float")
    ]
    plan = nearest(Idle(), Grid(8, 0), inputs=BYTES, attention=True, data=torch.ones(2, 4))
    assert "never ran" in {r.name: r.why for r in plan.skipped}["idle"]


def test_folds_are_exact_and_refused_where_others_read():
    torch.manual_seed(0)
    net = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3)).double()
    x, each = torch.randn(9, 5).double(), Fold(["1"], torch.rand(5).double() + 0.5, torch.randn(5).double())
    wanted, given = net(x), net[0](x)
    apply(net[0], [net[1]], each)
    torch.testing.assert_close(net(x), wanted, atol=1e-12, rtol=0)
    torch.testing.assert_close(net[0](x), (given + each.shift) / each.scale)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.LayerNorm(5), nn.LayerNorm(5)
            self.one, self.two = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x):
            x = self.a(x)
            return self.two(self.b(x + self.one(x)))

    both = Both().double()
    before = copy.deepcopy(both.state_dict())
    refused = fold(both, x, {"a": Fold(["one"], each.scale), "b": Fold(["two"], each.scale, each.shift)})
    assert list(refused) == ["a"] and "others read" in refused["a"]
    assert torch.equal(before["a.weight"], both.a.weight) and not torch.equal(before["b.weight"], both.b.weight)
    bare = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, 3, bias=False))
    with pytest.raises(ValueError, match="has no bias; expected scales alone"):
        apply(bare[0], [bare[1]], Fold(["1"], torch.ones(5), torch.ones(5)))
    assert biased(bare[1]).weight is bare[1].weight and biased(bare[1]).bias.shape == (3,) and bare[1].bias is None
    assert biased(net[1]) is net[1]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: LogGrid(9), "bits 9"),
        (lambda: LogGrid(4, "e"), "base 'e'"),
        (lambda: Packed(nn.Linear(4, 2), Grid(4, kind="affine")), "kind='affine'"),
        (lambda: Packed(nn.Linear(4, 2), Grid(4), inputs=Grid(8, -1)), "inputs with axis=-1"),
        (lambda: nearest(vit(), Grid(4), attention=True), "attention=True without inputs"),
        (lambda: nearest(vit(), Grid(4), dynamic=True), "expected both or neither, or dynamic=True"),
        (
            lambda: nearest(vit(), Grid(4), inputs=BYTES, dynamic=True, data=torch.ones(1, 1, 8, 8)),
            "dynamic=True in place of data",
        ),
    ],
)
def test_clear_errors(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_softcapped_attention_is_refused_at_plan_time():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=4
    )  # fmt: skip
    with pytest.raises(ValueError, match="passes softcap to its attention"):
        ids = torch.ones(1, 3, dtype=torch.long)
        nearest(Gemma2ForCausalLM(config), Grid(8, 0), inputs=BYTES, attention=True, data=ids)


def test_scaled_inputs_restore_in_low_precision():
    net = nn.Sequential(nn.Linear(8, 4)).bfloat16()
    x = torch.randn(3, 8).bfloat16()
    new = nearest(net, Grid(8, 0), inputs=Grid(8, -1, "affine"), data=x).apply()
    assert new(x).dtype == torch.bfloat16 and new[0].input_scale.dtype == torch.bfloat16
    assert isinstance(new[0].scaled_inputs(x), Scaled)
