import copy
import itertools
import math
import sys

import families
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from interlayer.cli import app
from interlayer.core import recipe
from interlayer.core.paths import estimate_statistics
from interlayer.core.transport import transport_naive
from interlayer.core.wiring import trace
from interlayer.transform.merge.ot_fusion import METHODS, OTFusion


def mlp(*widths: int, seed: int = 0, bias: bool = True) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b, bias=bias), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def convnet(a: int, b: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    body = [nn.Conv2d(2, a, 3, bias=False), nn.ReLU(), nn.Conv2d(a, b, 3, bias=False), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(4 * b, 3, bias=False))


def shuffled(model: nn.Module, *inputs: torch.Tensor) -> nn.Module:
    wiring, other = trace(model, *inputs), copy.deepcopy(model)
    other.load_state_dict(wiring.permute(model.state_dict(), wiring.random(3)))
    return other


def filled(net: nn.Module, k: float) -> nn.Module:
    """Weights from a formula, so that figures can be committed."""
    n = 0
    for p in net.parameters():
        i = torch.arange(n, n + p.numel(), dtype=torch.float64)
        p.data = (torch.sin(i * k + i * i * 0.013) / math.sqrt(p[0].numel())).view(p.shape).float()
        n += p.numel()
    return net


# What sidak/otfusion gives with exact or Sinkhorn (metric divided by its mean), correction, past-correction, not-squared,
# skip-last-layer: the sum of squares of each fused weight, and its fifth entry.
AUTHORS = {
    "weights": ({}, (5, 7, 6, 3), (5, 7, 6, 3), [2.11589, 1.953551, 1.159624], [0.016475, -0.068308, -0.035693]),
    "activations": (
        {"method": "activations"}, (5, 7, 6, 3), (5, 7, 6, 3),
        [1.966036, 1.153823, 0.533905], [-0.113678, 0.194802, -0.033368],
    ),
    "weights by Sinkhorn": (
        {"reg": 0.1}, (5, 7, 6, 3), (5, 7, 6, 3), [1.439807, 0.792458, 0.457823], [-0.062268, -0.008703, -0.109439]
    ),
    "activations by Sinkhorn": (
        {"method": "activations", "reg": 0.1}, (5, 7, 6, 3), (5, 7, 6, 3),
        [1.587675, 0.67333, 0.579423], [-0.116632, -0.000613, -0.099668],
    ),
    "twice as wide": (
        {"method": "activations"}, (5, 6, 4, 3), (5, 12, 8, 3),
        [1.50788, 0.61607, 0.314391], [0.300213, -0.183067, -0.172219],
    ),
    "kernels and a flattened map": ({}, (4, 5), (4, 5), [1.061931, 1.493973, 0.877685], [0.133424, -0.036098, -0.014825]),
}  # fmt: skip


@pytest.mark.parametrize("case", AUTHORS)
def test_numbers_of_the_authors_code(case):
    options, widths, others, squares, entries = AUTHORS[case]
    if len(widths) == 2:
        make, x = convnet, torch.sin(torch.arange(144.0)).view(2, 2, 6, 6)
        rates = 0.7, 1.9
    else:
        make, x = (lambda *w: mlp(*w, bias=False)), torch.sin(torch.arange(40.0) * 1.3).view(8, 5)
        rates = (1.9, 0.7) if widths != others else (0.7, 1.9)
    a, b = filled(make(*widths), rates[0]), filled(make(*others), rates[1])
    fused = OTFusion(**options).plan(a, x, others=(b,)).apply()
    for p, square, entry in zip(fused.parameters(), squares, entries, strict=True):
        assert p.detach().double().square().sum().item() == pytest.approx(square, abs=5e-6)
        assert p.detach().flatten()[4].item() == pytest.approx(entry, abs=5e-6)


@pytest.mark.parametrize("reg", [0.0, 0.1])
@pytest.mark.parametrize("method", METHODS)
def test_fusion_agrees_with_the_equation_unit_by_unit(method, reg):
    a, others, x = mlp(4, 6, 5, 3), [mlp(4, 8, 7, 3, seed=1), mlp(4, 3, 5, 3, seed=2)], torch.randn(10, 4)
    sums = [p.detach().double() * 0.4 for p in a.parameters()]
    for other in others:
        before, mine, yours = torch.eye(4).double(), x, x
        for n in (0, 2, 4):
            w, bias = other[n].weight.detach().double(), other[n].bias.detach().double()
            came = w @ before
            mine, yours = a[n](mine).detach(), other[n](yours).detach()
            if n == 4:
                here = torch.eye(3).double()
            else:
                cost = torch.zeros(len(w), a[n].out_features).double()
                for i in range(len(w)):
                    for j in range(a[n].out_features):
                        if method == "weights":
                            one, two = (
                                torch.cat((came[i], bias[i, None])),
                                torch.cat((a[n].weight[j], a[n].bias[j, None])),
                            )
                        else:
                            one, two = yours[:, i], mine[:, j]
                        cost[i, j] = (one.double() - two.detach().double()).norm()
                plan = transport_naive(cost, reg=reg)
                here = plan @ torch.diag(1 / plan.sum(0))
            for at, new in ((n, here.T @ came), (n + 1, here.T @ bias)):
                sums[at] += 0.3 * new
            before, mine, yours = here, mine.relu(), yours.relu()
    fused = OTFusion(method=method, reg=reg, weight=0.4).plan(a, x, others=others).apply()
    for p, want in zip(fused.parameters(), sums, strict=True):
        assert torch.allclose(p.double(), want, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_shuffled_copies_change_nothing(method):
    a, x = mlp(6, 20, 12, 3), torch.randn(64, 6)
    copies = shuffled(a, x), shuffled(a, x)
    plan = OTFusion(method=method).plan(a, [(x, None)], others=copies)
    assert [r.what for r in plan.touched] == ["move 20, 20 units to 20, 3 axes", "move 12, 12 units to 12, 3 axes"]
    assert any("reaches the output" in r.why for r in plan.skipped)
    assert torch.allclose(plan.apply()(x), a(x), atol=1e-6)


def test_a_wide_network_of_doubled_units_is_carried_onto_the_narrow_one():
    narrow, x = mlp(6, 8, 5, 3), torch.randn(40, 6)
    wide = mlp(6, 16, 10, 3)
    with torch.no_grad():
        for n in (0, 2, 4):
            w, b = narrow[n].weight, narrow[n].bias
            w, b = (torch.cat((t, t)) if n < 4 else t for t in (w, b))
            wide[n].weight.copy_(torch.cat((w, w), 1) if n else w)
            wide[n].bias.copy_(b)
    for m in (wide, shuffled(wide, x)):
        carried = OTFusion(weight=0.0).plan(narrow, x, others=(m,)).apply()
        assert all(
            torch.allclose(p, q, atol=1e-6) for p, q in zip(carried.parameters(), narrow.parameters(), strict=True)
        )


def test_batch_norms_follow_and_their_statistics_are_estimated_anew():
    def net(width, seed):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(2, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(16 * width, 3)
        )

    a, b = net(4, 0), net(7, 1)
    with torch.no_grad():
        b[1].weight.uniform_(0.5, 2)
    data = [torch.randn(16, 2, 6, 6) for _ in range(3)]
    fused = OTFusion(method="activations").plan(a, data, others=(b,)).apply()
    maps = [fused[0](x) for x in data]
    mean = torch.stack([m.mean((0, 2, 3)) for m in maps]).mean(0)
    assert torch.allclose(fused[1].running_mean, mean, atol=1e-5) and fused.training
    aligned = OTFusion(weight=0.0).plan(a, data, others=(b,)).apply()
    assert b[1].weight.min() <= aligned[1].weight.min() and aligned[1].weight.max() <= b[1].weight.max()


UNSEEN = ("unnamed",)  # families whose units no module gives out
DEAR = ("unet", "t5", "bart", "mamba")  # the groups of these are permuted by Git Re-Basin's test


@pytest.mark.parametrize(
    ("method", "name"),
    [
        *(("weights", n) for n in families.NAMES if n not in DEAR),
        *(("activations", n) for n in (*families.PLAIN, "gpt2")),
    ],
)
def test_families(method, name, tmp_path):
    """With exact transport between equal widths, the aligned other is the same function, batch statistics aside."""
    other, given = families.other(name), families.batch(name)
    transform = OTFusion(method=method, weight=0.0, output="logits" if hasattr(other, "generate") else None)
    if method == "activations" and name in UNSEEN:
        with pytest.raises(ValueError, match=r"nothing to compare by activations\. Use the other method"):
            transform.plan(families.model(name), given, others=(other,))
        return
    aligned = families.transformed(transform, name, tmp_path, other)
    estimate_statistics(other, given)
    expected = families.output(other, given)
    torch.testing.assert_close(families.output(aligned, given), expected, rtol=1e-3, atol=1e-4 * expected.abs().max())


def test_transformers_of_other_widths_are_fused_and_saved(tmp_path):
    import transformers

    sized = {"n_embd": 12, "n_layer": 1, "n_head": 3, "vocab_size": 30, "n_positions": 12, "bos_token_id": 0}
    torch.manual_seed(0)
    a, b = (
        transformers.GPT2LMHeadModel(
            transformers.GPT2Config(**sized, n_inner=n, eos_token_id=0, use_cache=False)
        ).eval()
        for n in (20, 40)
    )
    batch = {"input_ids": torch.randint(0, 30, (2, 6))}
    for method in METHODS:
        fused = OTFusion(method=method, reg=0.05, output="logits").plan(a, batch, others=(b,)).apply()
        assert fused.transformer.h[0].mlp.c_fc.weight.shape == (12, 20)
        recipe.save(fused, tmp_path / method)
        assert torch.equal(recipe.load(tmp_path / method)(**batch).logits, fused(**batch).logits)


def test_from_the_command_with_several_others(tmp_path, monkeypatch):
    text = """
import torch
from torch import nn

def net(width):
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 2))

def small(): return net(5)
def wide(): return net(9)
def other(): return net(7)
def data(): return [torch.randn(8, 4)]
"""
    (tmp_path / "fusion_models.py").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    given = ["apply", "ot-fusion", "--model", "fusion_models:small", "--data", "fusion_models:data", "-o", "reg=0.1"]
    try:
        two = ["--other", "fusion_models:wide", "--other", "fusion_models:other", "--out", "fused"]
        done = CliRunner().invoke(app, [*given, *two])
        assert done.exit_code == 0 and "move 9, 7 units to 5, 3 axes" in done.stdout, done.stderr
        module = sys.modules["fusion_models"]
        merged = recipe.load("fused", base=module.small)
        assert merged[0].weight.shape == (5, 4) and not torch.equal(merged[0].weight, module.small()[0].weight)
        alone = CliRunner().invoke(app, [*given, "--plan"])
        assert alone.exit_code == 2 and "ot-fusion: 0 other models; expected 1 or more." in alone.stderr
    finally:
        sys.modules.pop("fusion_models", None)


def test_clear_errors(monkeypatch):
    a, x = mlp(4, 6, 3), torch.randn(2, 4)
    with pytest.raises(ValueError, match="method was 'magic'; expected one of weights, activations"):
        OTFusion(method="magic")
    for options, says in (({"reg": -1.0}, "reg was -1.0"), ({"weight": 1.0}, "weight was 1.0; expected at least 0")):
        with pytest.raises(ValueError, match=says):
            OTFusion(**options)
    with pytest.raises(ValueError, match="at least one batch"):
        OTFusion().plan(a, others=(a,))
    with pytest.raises(ValueError, match="no units to move in Linear"):
        OTFusion().plan(nn.Linear(4, 3), x, others=(nn.Linear(4, 3),))
    with pytest.raises(ValueError, match=r"differ at '2.weight': \(3, 6\) here, \(2, 6\)"):
        OTFusion().plan(a, x, others=(mlp(4, 6, 2),))
    with pytest.raises(ValueError, match=r"differ at '4.weight': nothing here"):
        OTFusion().plan(a, x, others=(mlp(4, 6, 3, 3),))
    monkeypatch.setitem(sys.modules, "ot", None)
    with pytest.raises(ImportError, match=r'ot-fusion needs .ot.: pip install "interlayer\[merge\]"'):
        OTFusion().plan(a, x, others=(a,))
