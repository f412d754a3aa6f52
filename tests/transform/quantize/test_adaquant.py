import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner

from interlayer import load
from interlayer.cli import app
from interlayer.core.paths import estimate_statistics
from interlayer.core.quantizer import Grid, Packed, nearest, straight, through
from interlayer.core.quantizer.after import divergence, logits, tune
from interlayer.transform.quantize.adaquant import AdaQuant, Calibrated
from tests.families import batch, model, output, transformed

GRIDS = [Grid(3, None, "asymmetric"), Grid(4, 0, "asymmetric"), Grid(4), Grid(2, 0)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("shape", [(4, 5), (3, 4, 2, 3)])
def test_it_starts_at_the_nearest_level_and_what_is_kept_is_what_was_trained(grid, shape):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    made = Calibrated(weight, held := grid.fit(weight, "mse"))
    torch.testing.assert_close(made.value(weight).detach(), held.fake(weight), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.2 * torch.randn_like(p))
    scaled, codes = made.found(weight)
    torch.testing.assert_close(scaled.values(codes), made.value(weight).detach(), atol=1e-5, rtol=1e-5)
    assert not torch.equal(scaled.scale, held.scale) and codes.dtype == held.codes(weight).dtype


def test_the_weight_moves_through_the_rounding_and_by_more_than_a_step():
    torch.manual_seed(0)
    weight, e = torch.randn(4, 6), torch.randn(4, 6)
    held = Grid(3, 0, "asymmetric").fit(weight)
    made = Calibrated(weight, held)
    made.value(weight).backward(e)
    exact = weight / held.scale[:, None] + held.zero[:, None]
    inside = (exact >= 0) & (exact <= 7)  # the zero is rounded, so an end of the range may lie outside
    assert 0.7 < inside.float().mean() < 1
    torch.testing.assert_close(made.by.grad, weight.std(correction=0) * e * inside)
    moved = Calibrated(weight, held)
    with torch.no_grad():
        moved.by.add_(2)
        _, codes = moved.found(weight)
    assert (codes.float() - held.codes(weight).float()).abs().max() > 1


# What the authors' quantiser gave at 4 bits with range 2.5 and lowest value -1.1, and the gradients for the error below.
X = [-1.4, -1.0, -0.31, 0.0, 0.44, 0.93, 1.37, 2.2]
ERROR = [0.5, -1.0, 2.0, 1.5, -0.7, 0.3, 1.1, -2.0]
THEIRS = (
    [-1.166667, -1.0, -0.333333, 0.0, 0.5, 1.0, 1.333333, 1.333333],
    [0.0, -1.0, 2.0, 1.5, -0.7, 0.3, 0.0, 0.0],
    -0.9164,
    -0.4,
)


def test_values_and_gradients_are_the_authors():
    x = torch.tensor(X, requires_grad=True)
    span, lowest = (torch.tensor(v, requires_grad=True) for v in (2.5, -1.1))
    scale = span / 15
    zero = -lowest / scale
    found = through(x, Grid(4, None, "asymmetric"), scale, straight(zero, zero.round()))
    (found * torch.tensor(ERROR)).sum().backward()
    values, by_x, by_span, by_lowest = THEIRS
    torch.testing.assert_close(found.detach(), torch.tensor(values), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.grad, torch.tensor(by_x), atol=1e-5, rtol=0)
    torch.testing.assert_close(span.grad, torch.tensor(by_span), atol=1e-5, rtol=0)
    torch.testing.assert_close(lowest.grad, torch.tensor(by_lowest), atol=1e-5, rtol=0)


class Small(nn.Sequential):
    """Two convolutions with biases and norms, and a head."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Flatten(), nn.Linear(16, 5),
        )  # fmt: skip
        self.train()
        for _ in range(5):
            self(torch.randn(32, 1, 8, 8))
        self.eval()


@pytest.fixture(scope="module")
def small():
    return Small(), [torch.randn(32, 1, 8, 8) for _ in range(2)]


def apart(new, net, data):
    pairs = zip(logits(new.eval(), data), logits(net, data), strict=True)
    return sum(float((a - b).square().mean()) for a, b in pairs)


def test_layers_end_closer_than_with_ranges_alone_and_the_prefix_is_the_modes(small):
    net, data = small
    before = copy.deepcopy(net.state_dict())
    ranges = nearest(net, Grid(3, 0, "asymmetric"), inputs=Grid(3, None, "asymmetric"), data=data, by="mse").apply()
    found = {mode: AdaQuant(bits=3, mode=mode, steps=40).plan(net, data).apply() for mode in ("sequential", "parallel")}
    errors = {mode: apart(new, net, data) for mode, new in found.items()}
    assert max(errors.values()) < apart(ranges, net, data)
    for i in (0, 3, 7):
        layer = found["sequential"][i]
        assert isinstance(layer, Packed) and (layer.grid.bits, layer.inputs.bits) == (3, 3)
        assert not torch.equal(layer.bias, net[i].bias) and layer.input_scale != ranges[i].input_scale
    same = [torch.equal(found["sequential"][i].codes, found["parallel"][i].codes) for i in (0, 7)]
    assert same == [True, False]  # nothing comes before the first
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_the_integer_programme_is_the_best_choice_of_bits_within_the_budget(small):
    net, data = small
    plan = AdaQuant(bits=(2, 4, 8), average=3.6, steps=5).plan(net, data)
    assert "36 weights, 2 bits or 4 bits or 8 bits asymmetric" in plan.touched[0].why
    new = plan.apply()
    sizes = {i: net[i].weight.numel() for i in (0, 3, 7)}
    chosen = {i: new[i].grid.bits for i in sizes}
    assert sum(sizes[i] * b for i, b in chosen.items()) <= 3.6 * sum(sizes.values()) and len(set(chosen.values())) > 1
    # By hand: one layer at a time at fewer bits, all choices tried.
    exact = logits(net, data)
    solved = {b: AdaQuant(bits=b, steps=5, mode="parallel").plan(net, data).apply().eval() for b in (2, 4, 8)}

    def lost(bits):
        mixed = copy.deepcopy(solved[8])
        for i, b in bits.items():
            mixed[i] = solved[b][i]
        return sum(float(divergence(a, b)) for a, b in zip(logits(mixed, data), exact, strict=True)) / len(data)

    least = lost({})
    losses = {(i, b): max(lost({i: b}) - least, 0) if b < 8 else 0.0 for i in sizes for b in (2, 4, 8)}
    every = [dict(zip(sizes, c, strict=True)) for c in itertools.product((2, 4, 8), repeat=3)]

    def size(bits):
        return sum(sizes[i] * b for i, b in bits.items())

    def total(bits):
        return sum(losses[i, b] for i, b in bits.items())

    fits = [c for c in every if size(c) <= 3.6 * sum(sizes.values())]
    assert chosen == min(fits, key=total)
    accurate = AdaQuant(bits=(2, 4, 8), loss=total(chosen), steps=5).plan(net, data).apply()
    bits = {i: accurate[i].grid.bits for i in sizes}
    assert total(bits) <= total(chosen) * (1 + 1e-6) and size(bits) == min(
        size(c) for c in every if total(c) <= total(chosen) * (1 + 1e-6)
    )


def test_norms_have_the_statistics_of_the_quantised_model(small):
    net, data = small
    plan = AdaQuant(bits=3, steps=3, norms=True).plan(net, data[:1])
    assert [r.name for r in plan.touched if "statistics" in r.why] == ["1", "4"]
    assert not any(r.name in ("1", "4") for r in plan.skipped)
    new, kept = plan.apply(), AdaQuant(bits=3, steps=3).plan(net, data[:1]).apply()
    seen = new[0](data[0])
    torch.testing.assert_close(new[1].running_mean, seen.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(new[1].running_var, seen.transpose(0, 1).flatten(1).var(1), atol=1e-5, rtol=1e-4)
    assert torch.equal(kept[1].running_mean, net[1].running_mean) and new[1].momentum == 0.1
    with pytest.raises(ValueError, match="Expected more than 1 value"):
        estimate_statistics(nn.BatchNorm1d(2), torch.ones(1, 2))


def test_biases_are_tuned_together_and_nothing_else(small):
    net, data = small
    plain, tuned = (AdaQuant(bits=2, steps=3, tuned=n).plan(net, data).apply().eval() for n in (0, 40))
    pairs = [zip(logits(m, data), logits(net, data), strict=True) for m in (plain, tuned)]
    before, after = (sum(float(divergence(a, b)) for a, b in each) for each in pairs)
    assert after < 0.8 * before
    moved = [k for k, v in tuned.state_dict().items() if not torch.equal(v, plain.state_dict()[k])]
    assert moved == [f"{i}.bias" for i in (0, 1, 3, 4, 7)] and all(p.requires_grad for p in net.parameters())
    with pytest.raises(ValueError, match="has no bias"):
        tune(nn.Sequential(nn.Linear(2, 2, bias=False)), net, data, steps=1, lr=1.0)


def test_options_act(small):
    net, data = small
    base, seen = {"steps": 4, "bits": 3}, {}
    for name, options in {
        "base": {}, "inputs": {"inputs": 5}, "float": {"inputs": "float"}, "parallel": {"mode": "parallel"}, "by": {"by": "minmax"},
        "steps": {"steps": 5}, "lr": {"lr": 0.05}, "norms": {"norms": True}, "tuned": {"tuned": 3}, "rate": {"tuned": 3, "rate": 0.1},
        "seed": {"seed": 1}, "at": {"at": "0"}, "bits": {"bits": 4},
    }.items():  # fmt: skip
        seen[name] = AdaQuant(**{**base, **options}).plan(net, data).apply().eval()(data[0]).detach()
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(seen.values(), 2))
    plain = AdaQuant(inputs="float", packed=False, **base).plan(net, data).apply().eval()
    torch.testing.assert_close(plain(data[0]), seen["float"])
    assert type(plain[0]) is nn.Conv2d and len(plain[0].weight[0].unique()) <= 8


def test_an_interrupted_run_goes_on_and_gives_the_same(small, tmp_path):
    net, data = small
    whole = AdaQuant(steps=3, folder=tmp_path).plan(net, data).apply()
    kept = sorted(tmp_path.iterdir())
    assert len(kept) == 3
    kept[2].unlink()
    again = AdaQuant(steps=3, folder=tmp_path).plan(net, data).apply()
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["gpt2", "resnet", "mha"])
def test_every_family_is_rounded_packed_saved_and_generates(name, tmp_path):
    transformed(AdaQuant(steps=2, bits=8), name, tmp_path / "there", refuses="packed weights")


def test_several_widths_and_floats_on_the_grid_for_a_language_model(tmp_path):
    config = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=16, n_positions=8)
    start, text = GPT2LMHeadModel(config).eval(), torch.randint(16, (4, 8))
    plain = AdaQuant(bits=(2, 8), average=5, inputs="float", packed=False, steps=2).plan(start, text).apply().eval()
    levels = {len(row.unique()) for row in plain.transformer.h[0].mlp.c_fc.weight.T}
    assert max(levels) <= 16
    plain.save_pretrained(tmp_path / "plain")
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "plain").eval()
    assert torch.equal(again(text).logits, plain(text).logits)


def calibration():
    return [{"input_ids": torch.randint(32, (2, 6))} for _ in range(2)]


def test_the_command_rounds_a_hugging_face_folder(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(__file__.rpartition("/")[0])
    model("gpt2").save_pretrained(tmp_path / "start")
    source = f"hf:{tmp_path / 'start'}"
    arguments = ["apply", "adaquant", "--model", source, "--data", "test_adaquant:calibration", "-o", "steps=1"]
    out = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "there")])
    assert out.exit_code == 0 and "inputs 4 bits asymmetric" in out.output, out.output
    new = load(tmp_path / "there")
    assert isinstance(new.transformer.h[0].attn.c_attn, Packed) and output(new, batch("gpt2")).isfinite().all()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: AdaQuant(bits=1), "bits 1; expected integers from 2 to 8"),
        (lambda: AdaQuant(bits=()), "expected integers from 2 to 8"),
        (lambda: AdaQuant(inputs="none"), "inputs 'none'; expected 'same', 'float' or an integer"),
        (lambda: AdaQuant(inputs=9), "inputs 9"),
        (lambda: AdaQuant(mode="both"), "mode 'both'"),
        (lambda: AdaQuant(bits=(2, 4)), "expected one of average and loss"),
        (lambda: AdaQuant(bits=(2, 4), average=3, loss=1.0), "expected one of average and loss"),
        (lambda: AdaQuant(average=3), "neither with one"),
        (lambda: AdaQuant(bits=(3, 4), average=2), "average 2; expected at least 3"),
        (lambda: AdaQuant(bits=(3, 4), loss=-1.0), r"loss -1\.0"),
        (lambda: AdaQuant(steps=0), "steps 0"),
        (lambda: AdaQuant(tuned=-1), "tuned -1"),
        (lambda: AdaQuant(lr=0.0), r"lr 0\.0"),
        (lambda: AdaQuant(packed=False), "cannot become plain floats"),
        (lambda: AdaQuant().plan(nn.Sequential(nn.Linear(2, 2))), "no calibration data"),
        (
            lambda: AdaQuant().plan(nn.Sequential(nn.ReLU()), torch.ones(3, 5)),
            "no layer of Sequential can be quantised",
        ),
    ],
)
def test_bad_input_is_one_clear_error(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_divergence_is_the_sum_over_classes():
    a, b = torch.randn(3, 2, 5), torch.randn(3, 2, 5)
    p, q = F.softmax(b, -1), F.softmax(a, -1)
    torch.testing.assert_close(divergence(a, b), (p * (p / q).log()).sum(-1).mean())
