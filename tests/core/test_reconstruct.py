import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interlayer import load, save
from interlayer.core import taps
from interlayer.core.blockwise import Part
from interlayer.core.quantizer import AdaRound, Grid, gptq, learned, nearest, reconstruct, simulated, smooth
from interlayer.core.quantizer.gptq import columns, patches
from interlayer.core.quantizer.layers import weight_of
from interlayer.core.quantizer.reconstruct import Learned, annealed, through
from tests.families import batch, model, output

GRIDS = [Grid(3, None, "asymmetric"), Grid(4, 0), Grid(2, 0, "asymmetric", 4)]


def correlated(rows=200, width=8):
    torch.manual_seed(0)
    return torch.randn(rows, width) @ torch.randn(width, width) + 0.5


@pytest.mark.parametrize("grid", GRIDS)
def test_adaround_is_its_equation(grid):
    torch.manual_seed(1)
    weight = torch.randn(4, 8)
    held = grid.fit(weight, "mse")
    made = AdaRound(weight, held)
    inside = (made.value(weight) - weight).abs() < 1e-5  # it starts at the weight itself, within the range
    assert (inside | (held.values(held.codes(weight)).abs() < weight.abs())).all() and inside.float().mean() > 0.5
    with torch.no_grad():
        made.up.add_(torch.randn_like(made.up))
    exact = grid.grouped(weight) / grid.spread(held.scale, weight)
    h = [min(max(1.2 / (1 + math.exp(-float(v))) - 0.1, 0), 1) for v in made.up.detach().flatten()]
    zero = grid.spread(held.zero, weight).expand_as(exact).flatten()
    whole = [math.floor(float(e)) + up + float(z) for e, up, z in zip(exact.flatten(), h, zero, strict=True)]
    clipped = torch.tensor([min(max(w, grid.low), grid.high) for w in whole]) - zero
    expected = (clipped.view_as(exact) * grid.spread(held.scale, weight)).view(4, 8)
    torch.testing.assert_close(made.value(weight).detach(), expected, atol=1e-5, rtol=1e-5)
    assert made.penalty(0.1) is None
    for share, beta in ((0.2, 20.0), (0.6, 11.0), (1.0, 2.0)):
        assert annealed((share - 0.2) / 0.8) == pytest.approx(beta)
        wanted = 0.01 * sum(1 - abs(2 * x - 1) ** beta for x in h)
        assert float(made.penalty(share).detach()) == pytest.approx(wanted, rel=1e-3)
    scaled, codes = made.found(weight)
    hard = torch.tensor([math.floor(float(e)) + (up >= 0.5) for e, up in zip(exact.flatten(), h, strict=True)])
    expected = (hard + zero).clamp(grid.low, grid.high).view(4, 8)
    assert torch.equal(codes.float(), expected) and scaled is held


def test_the_penalty_drives_adaround_to_up_or_down_and_it_beats_the_nearest_levels():
    x = correlated()
    layer = nn.Linear(8, 8)
    wanted = layer(x).detach()
    part = Part("0", layer, [((x,), {})], [wanted])
    held = Grid(3, 0).fit(layer.weight.detach(), "mse")
    kept = []

    class Seen(AdaRound):
        def __init__(self, weight, held):
            super().__init__(weight, held)
            kept.append(self)

    (scaled, codes) = learned(Seen, steps=400, lr=3e-2, decay=False)(part, {"0": layer}, {"0": held})["0"]
    h = kept[0].share()
    assert ((h < 0.05) | (h > 0.95)).float().mean() > 0.7
    values = (scaled.values(codes), held.fake(layer.weight))
    errors = [float((F.linear(x, w, layer.bias) - wanted).detach().square().mean()) for w in values]
    assert errors[0] < 0.9 * errors[1]
    assert type(layer) is nn.Linear and layer.weight.requires_grad and layer.weight.grad is None


def naive_gptq(weight, moment, held, damp=0.01):
    """One column after the other, the inverse of what remains computed anew each time."""
    rest, out = weight.clone().double(), torch.zeros_like(weight)
    damped = moment.double() + damp * moment.double().diagonal().mean() * torch.eye(len(moment))
    grid, n = held.grid, weight.shape[1]
    for q in range(n):
        rounded = held.codes(rest.float())
        out[:, q] = rounded[:, q]
        error = rest[:, q] - held.values(rounded)[:, q].double()
        inverse = damped[q:, q:].inverse()
        rest[:, q:] -= error[:, None] / inverse[0, 0] * inverse[0]
    return out.to(torch.int8 if grid.low else torch.uint8)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("width", [8, 140])
def test_gptq_is_the_loop_over_columns(grid, width):
    x = correlated(400, width)
    weight = torch.randn(5, width)
    held, moment = grid.fit(weight, "mse"), x.T @ x
    found, moved = columns(weight, moment[None], held)
    assert torch.equal(held.codes(moved), found) and torch.equal(moved[:, 0], weight[:, 0])
    assert (found == naive_gptq(weight, moment, held)).float().mean() > 0.995  # a tie may fall the other way
    errors = [float((x @ (w - weight).T).square().mean()) for w in (held.values(found), held.fake(weight))]
    assert errors[0] < 0.8 * errors[1]
    moment[:, 0] = moment[0] = 0  # an input that is always zero
    assert (held.values(columns(weight, moment[None], held)[0])[:, 0] == 0).all()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, (3, 2), padding=1, stride=2, bias=False),
        nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding="same", bias=False),
        nn.Conv1d(4, 4, 3, groups=4, padding=1, padding_mode="circular", bias=False),
        nn.Linear(4, 6, bias=False),
    ],
)
def test_rows_of_inputs_times_the_weight_are_the_outputs(layer):
    x = torch.randn(2, 7, 4) if isinstance(layer, nn.Linear) else torch.randn(2, 4, *[7] * (layer.weight.ndim - 2))
    rows = patches(layer, x)
    groups = len(rows)
    found = rows @ layer.weight.flatten(1).view(groups, -1, rows.shape[-1]).mT  # [groups, rows, out]
    wanted = layer(x) if isinstance(layer, nn.Linear) else layer(x).flatten(2).mT
    torch.testing.assert_close(found.permute(1, 0, 2).flatten(1), wanted.flatten(0, 1))


METHODS = {"adaround": learned(AdaRound, steps=25, lr=3e-2, decay=False), "gptq": gptq()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["gpt2", "resnet", "mamba", "t5"])
def test_whole_models_are_closer_than_the_nearest_levels(name, method, tmp_path):
    start, data, grid = model(name), [batch(name)], Grid(4, None, "asymmetric")
    plan = reconstruct(start, data, grid, METHODS[method], name=method)
    new, exact = plan.apply().eval(), output(start, batch(name))
    errors = [
        float((output(m.eval(), batch(name)) - exact).square().mean())
        for m in (new, nearest(start, grid, by="mse").apply())
    ]
    assert errors[0] < errors[1]
    torch.testing.assert_close(output(simulated(new), batch(name)), output(new, batch(name)))
    save(new, tmp_path / "there")
    assert torch.equal(output(load(tmp_path / "there"), batch(name)), output(new, batch(name)))
    listed = {r.name for r in [*plan.touched, *plan.skipped]}
    assert all(
        n in listed for n, m in start.named_modules() if n and next(m.parameters(recurse=False), None) is not None
    )
    assert all("block" in r.why for r in plan.touched) and all(r.why for r in plan.skipped)
    plain = reconstruct(start, data, grid, METHODS[method], name=method, packed=False).apply().eval()
    torch.testing.assert_close(output(plain, batch(name)), output(new, batch(name)))


@pytest.mark.parametrize(
    "grid", [Grid(3, None, "asymmetric"), Grid(3), Grid(4, 0, "asymmetric"), Grid(2, None, "midrise")]
)
def test_learned_grids_are_the_fixed_ones_at_first_and_get_the_gradients_of_lsq(grid):
    torch.manual_seed(0)
    x, e = 2 * torch.randn(5, 6) + 0.5, torch.randn(5, 6)
    held = grid.fit(0.5 * x)
    made = Learned(held)
    torch.testing.assert_close(made(x).detach(), held.fake(x), atol=1e-5, rtol=1e-5)
    scale, zero = held.scale.clone().requires_grad_(), held.zero.clone().requires_grad_()
    (through(x.requires_grad_(), grid, scale, zero) * e).sum().backward()
    with torch.no_grad():
        step, nil = grid.spread(held.scale, x), grid.spread(held.zero, x)
        exact = x / step + nil
        inside = (exact >= grid.low) & (exact <= grid.high)
        by_scale = torch.where(inside, exact.round() - exact, exact.round().clamp(grid.low, grid.high) - nil) * e
        by_zero = torch.where(inside, torch.zeros_like(x), -step.expand_as(x)) * e
        axes = () if grid.axis is None else (1,)
        torch.testing.assert_close(x.grad, inside * e)
        torch.testing.assert_close(scale.grad, by_scale.sum(axes) if axes else by_scale.sum(), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(zero.grad, by_zero.sum(axes) if axes else by_zero.sum(), atol=1e-5, rtol=1e-4)
        made.log.add_(0.1)
        if made.shift is not None:
            made.shift.add_(0.3)
        found = made.found()
        torch.testing.assert_close(found.scale, held.scale * math.exp(0.1))
        assert (made.shift is None) == torch.equal(found.zero, held.zero)
        assert grid.kind == "midrise" or torch.equal(found.zero, found.zero.round().clamp(grid.low, grid.high))
        torch.testing.assert_close(made(x), found.fake(x), atol=1e-5, rtol=1e-5)


def layered():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    return net, [torch.randn(8, 2, 6, 6) for _ in range(3)]


@pytest.mark.parametrize("method", ["adaround", "gptq"])
def test_inputs_are_rounded_while_a_block_is_reconstructed_and_their_grids_are_learned(method):
    net, data = layered()
    coarse = Grid(2, None, "asymmetric")
    seen = []

    def watched(part, there, held):
        with taps.read(nn.ModuleList(there.values()), "*", side="input") as got:
            part.run(0)
        seen.extend(len(x.unique()) for x in got.values())
        return METHODS[method](part, there, held)

    plan = reconstruct(net, data, Grid(4, 0), watched, inputs=coarse, by="minmax")
    assert plan.touched[0].why == "72 weights, 4 bits symmetric, inputs 2 bits asymmetric, with block 0"
    fixed = plan.apply()
    assert seen == [4, 4] and [fixed[i].inputs for i in (0, 3)] == [coarse, coarse]  # levels
    if method == "gptq":
        return
    solve = learned(AdaRound, steps=60, lr=3e-2, decay=False, inputs=3e-2)
    moved = reconstruct(net, data, Grid(4, 0), solve, inputs=coarse, by="minmax").apply()
    assert all(moved[i].input_scale != fixed[i].input_scale for i in (0, 3))
    errors = [sum(float((m(x) - net(x)).detach().square().mean()) for x in data) for m in (moved, fixed)]
    assert errors[0] < 0.9 * errors[1]


def test_biases_are_learned_and_the_model_keeps_its_own():
    net, data = layered()
    before = [m.bias.detach().clone() for m in (net[0], net[3])]
    solve = learned(AdaRound, steps=30, lr=1e-2, decay=False, biases=1e-2)
    new = reconstruct(net, data, Grid(2, 0), solve).apply()
    plain = reconstruct(net, data, Grid(2, 0), solve, packed=False).apply()
    for i, bias in zip((0, 3), before, strict=True):
        assert torch.equal(net[i].bias, bias) and not torch.equal(new[i].bias, bias) and net[i].bias.requires_grad
        assert torch.equal(plain[i].bias, new[i].bias)
    torch.testing.assert_close(plain(data[0]), new(data[0]))


def test_each_layer_may_have_grids_of_its_own_and_what_was_kept_is_whole(tmp_path):
    net, data = layered()
    bits, solve = {"0": 3, "3": 8}, learned(AdaRound, steps=5, lr=1e-2, inputs=1e-2, biases=1e-2)
    given = {n: Grid(b, None, "asymmetric") for n, b in bits.items()}
    plan = reconstruct(net, data, given, solve, inputs=given, folder=tmp_path)
    new = plan.apply()
    assert {n: (new[int(n)].grid.bits, new[int(n)].inputs.bits) for n in bits} == {n: (b, b) for n, b in bits.items()}
    assert new[0].bias is not None and len(list(tmp_path.iterdir())) == 2

    def broken(part, there, held):
        raise AssertionError

    again = reconstruct(net, data, given, broken, inputs=given, folder=tmp_path).apply()
    assert all(torch.equal(a, b) for a, b in zip(new.state_dict().values(), again.state_dict().values(), strict=True))


def test_joined_blocks_are_reconstructed_as_one():
    start, data = model("gpt2"), [batch("gpt2")]
    pair = ["transformer.h.1", "transformer.h.2"]
    sizes = []

    def solve(part, there, held):
        sizes.append((part.name, len(there)))
        return METHODS["adaround"](part, there, held)

    plan = reconstruct(start, data, Grid(4, None, "asymmetric"), solve, joined=[pair])
    assert "with block transformer.h.1+transformer.h.2" in str(plan)
    new = plan.apply().eval()
    assert [n for _, n in sizes] == [4, 8, 4] and sizes[1][0] == "+".join(pair)
    assert output(new, batch("gpt2")).isfinite().all()


@pytest.mark.parametrize(("name", "alpha"), [("gpt2", 0.5), ("llama", 0.8), ("t5", 0.3)])
def test_smoothing_keeps_the_function_and_moves_ranges_into_weights(name, alpha):
    start, data = model(name), [batch(name)]
    plan = smooth(start, data, alpha=alpha)
    new = plan.apply().eval()
    exact = output(start, batch(name))
    assert (output(new, batch(name)) - exact).abs().max() < 1e-4 * exact.abs().max()
    row = plan.touched[0]
    names = row.why.removeprefix("scales go to ").split(", ")
    ranges = []
    for net in (start, new):
        with taps.read(net, [row.name]) as seen:
            output(net, batch(name))
        x = seen[row.name].abs().flatten(0, -2).amax(0)
        w = torch.stack([weight_of(net.get_submodule(n)).detach().abs().amax(0) for n in names]).amax(0)
        ranges.append((x, w))
    (x, w), (smaller, larger) = ranges
    scale = x**alpha / w ** (1 - alpha)
    torch.testing.assert_close(smaller, x / scale, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(larger, w * scale, rtol=1e-3, atol=1e-5)
    if alpha == 0.5:
        torch.testing.assert_close(smaller, larger, rtol=1e-3, atol=1e-5)


def test_norms_that_others_read_too_stay():
    plan = smooth(model("bert"), [batch("bert")])
    assert plan.skipped and all("others read" in r.why for r in plan.skipped)


def test_errors_and_what_lies_in_no_block():
    net, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.ones(3, 4)
    plan = reconstruct(net, x, Grid(4), gptq(), blocks="1", name="gptq")
    assert [r.name for r in plan.touched] == ["1"] and plan.skipped[0].why == "in no block, stays in float"
    twice = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    twice.append(twice[0])
    assert [r.name for r in reconstruct(twice, x, Grid(4), gptq()).touched] == ["1"]
    for call, says in (
        (lambda: reconstruct(net, [], Grid(4), gptq()), "no calibration data"),
        (lambda: reconstruct(net, [3], Grid(4), gptq()), "does not run on a batch of type int"),
        (
            lambda: reconstruct(net, x, Grid(4), gptq(), blocks="1", at="0", name="gptq"),
            "gptq: no layer that can be quantised lies",
        ),
        (lambda: reconstruct(net, x, Grid(4), gptq(), joined=[("1", "0")]), "cannot be joined"),
        (lambda: reconstruct(net, x, Grid(4), gptq(), inputs=Grid(4), packed=False), "cannot become plain floats"),
        (lambda: reconstruct(net, x, {"0": Grid(4)}, gptq()), "no grid for 1"),
        (lambda: smooth(net, x), "has no norm"),
        (lambda: smooth(net, x, alpha=2), "alpha=2"),
        (lambda: patches(nn.Conv3d(1, 1, 1), torch.ones(1, 1, 1, 1, 1)), "convolutions with 1 or 2 axes"),
    ):
        with pytest.raises(ValueError, match=says):
            call()
