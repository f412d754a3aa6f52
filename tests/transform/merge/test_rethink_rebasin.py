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
from interlayer.core.paths import estimate_statistics, interpolate
from interlayer.core.renormalise import moments
from interlayer.core.wiring import trace
from interlayer.transform.merge.rethink_rebasin import RethinkRebasin, collapse
from interlayer.transform.sparsify.lamp import Lamp


def mlp(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


class Vgg(nn.Module):
    """As the authors' networks: convolutions in ``features``, one linear map behind them."""

    def __init__(self, k: float) -> None:
        super().__init__()
        pool = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.features = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(), *pool
        )
        self.head, n = nn.Linear(5, 3), 0
        for p in self.parameters():  # from a formula, so that figures can be committed
            i = torch.arange(n, n + p.numel(), dtype=torch.float64)
            p.data = (torch.sin(i * k + i * i * 0.013) / math.sqrt(p[0].numel())).view(p.shape).float()
            n += p.numel()

    def forward(self, x):
        return self.head(self.features(x))


# What XingyuQu/rethink-re-basin gives with repair(variant=...) at 0.7 and 0.3: the first output, and the sum of squares. Its
# "repair" normalises by the biased variance while it takes statistics.
AUTHORS = {
    "both": ([1.040141, -0.156666, -0.766027], 40.92448, 1e-4),
    "rescale": ([1.048217, -0.199252, -0.794161], 42.774399, 1e-5),
    "reshift": ([1.042255, -0.159555, -0.76255], 40.84602, 1e-5),
}


@pytest.mark.parametrize("parts", AUTHORS)
def test_figures_of_the_authors_code(parts):
    i = torch.arange(2 * 24 * 2 * 6 * 6, dtype=torch.float64)
    data = list(torch.sin(i * 0.7 + i * i * 0.0031).view(2, 24, 2, 6, 6).float())
    first, squares, close = AUTHORS[parts]
    plan = RethinkRebasin(parts=parts, merge=0.3, method=None).plan(Vgg(0.9), data, others=(Vgg(1.7),))
    out = plan.apply()(data[0])
    torch.testing.assert_close(out[0], torch.tensor(first), rtol=close, atol=1e-5)
    assert float(out.detach().square().sum()) == pytest.approx(squares, rel=close)


@pytest.mark.parametrize("parts", ["both", "rescale", "reshift"])
def test_the_equation_by_hand(parts):
    a, b, x = mlp(4, 8, 3, seed=0), mlp(4, 8, 3, seed=1), torch.randn(100, 4)
    merged = RethinkRebasin(parts=parts, merge=0.25, method=None).plan(a, x, others=(b,)).apply()
    z, za, zb = (m[0](x).detach() for m in (interpolate(a, b, 0.25), a, b))
    mean, std = 0.75 * za.mean(0) + 0.25 * zb.mean(0), 0.75 * za.std(0) + 0.25 * zb.std(0)
    expected = {
        "both": std * (z - z.mean(0)) / z.std(0) + mean,
        "rescale": z * std / z.std(0),
        "reshift": z - z.mean(0) + mean,
    }
    torch.testing.assert_close(merged[0](x), expected[parts], rtol=1e-3, atol=1e-3)
    assert torch.equal(merged[2].weight, interpolate(a, b, 0.25)[2].weight)  # the last layer is left alone


@pytest.mark.parametrize("method", ["weights", "activations"])
def test_a_shuffled_copy_merges_without_a_change(method):
    model, x = mlp(6, 16, 12, 3), torch.randn(64, 6)
    wiring, other = trace(model, x), mlp(6, 16, 12, 3)
    other.load_state_dict(wiring.permute(model.state_dict(), wiring.random(3)))
    merged = RethinkRebasin(method=method).plan(model, x, others=(other,)).apply()
    torch.testing.assert_close(merged(x), model(x), rtol=1e-3, atol=1e-3)


def test_batch_norms_get_the_statistics_that_an_estimate_would_give():
    def conv(seed):
        torch.manual_seed(seed)
        body = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        model = nn.Sequential(*body, nn.Flatten(), nn.Linear(16, 3))
        for m in model:
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.weight, 0.5, 1.5)
        estimate_statistics(model, x)
        return model.eval()

    x = torch.randn(100, 2, 6, 6)
    a, b = conv(0), conv(1)
    plan = RethinkRebasin(method=None).plan(a, x, others=(b,))
    assert [r.name for r in plan.touched] == ["1", "4"]
    assert {r.name: r.why for r in plan.skipped}["0"] == "the batch norm 1 behind it"
    torch.testing.assert_close(plan.apply()(x), interpolate(a, b, 0.5, x)(x), rtol=1e-2, atol=1e-2)


def test_a_pruned_network_gets_the_statistics_of_the_dense_one():
    dense, x = mlp(8, 32, 32, 3), torch.randn(200, 8)
    pruned = Lamp(sparsity=0.5).plan(dense).apply()
    plan = RethinkRebasin(merge=None).plan(pruned, x, others=(dense,))
    repaired = plan.apply()
    assert "rescaled and reshifted" in str(plan) and "its output is the model's" in str(plan)
    assert recipe.steps(repaired)[0]["system"] == "lamp"
    for name in ("0", "2"):
        assert torch.equal(repaired.get_submodule(name).weight == 0, pruned.get_submodule(name).weight == 0)
        was, now, goal = (moments(m, [name], x)[name] for m in (pruned, repaired, dense))
        torch.testing.assert_close(now.std, goal.std, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(now.mean, goal.mean, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(was.std, goal.std, rtol=1e-2)


def test_collapse_is_found_where_it_is():
    model, x = mlp(4, 16, 16, 3), torch.randn(100, 4)
    weak = copy.deepcopy(model)
    for p in weak[2].parameters():
        p.data.mul_(0.5)
    found = collapse(weak, (model, model), x)
    table = found.tables["layers"]
    assert table["layer"] == ["0", "2"] and found.headings("layers") == ["layer", "activations", "activity", "weights"]
    for column in ("activations", "activity", "weights"):
        assert table[column] == pytest.approx([1.0, 0.5], rel=1e-5)
    assert len(found.figure().axes) == 1
    with pytest.raises(ValueError, match=r"collapse: 0 ends and 1 batches"):
        collapse(model, (), x)


REFUSED = {"unnamed": "neither a linear map", "lstm": "its output is the model's"}


@pytest.mark.parametrize("name", families.NAMES)
def test_families(name, tmp_path):
    other = families.other(name)
    method = None if name in ("unet", "t5", "bart") else "weights"  # how they are matched is tested with git-rebasin
    transform = RethinkRebasin(method=method, output="logits" if hasattr(other, "generate") else None)
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            transform.plan(families.model(name), families.batch(name), others=(other,))
        return
    merged = families.transformed(transform, name, tmp_path, other)
    plan = transform.plan(families.model(name), families.batch(name), others=(other,))
    layer = plan.touched[-1].name + ".weight"
    assert not torch.equal(merged.state_dict()[layer], families.model(name).state_dict()[layer])


def first() -> nn.Module:
    return mlp(4, 8, 3, seed=0)


def second() -> nn.Module:
    return mlp(4, 8, 3, seed=1)


def batches() -> list[torch.Tensor]:
    return list(torch.linspace(-1, 1, 320).view(2, 40, 4))


def test_the_command_merges(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pair", sys.modules[__name__])
    args = ["apply", "rethink-rebasin", "--model", "pair:first", "--other", "pair:second", "--data", "pair:batches"]
    result = CliRunner().invoke(app, [*args, "-o", "parts=rescale", "--out", str(tmp_path / "new")])
    assert result.exit_code == 0, result.output
    expected = RethinkRebasin(parts="rescale").plan(first(), batches(), others=(second(),)).apply()
    loaded, x = recipe.load(tmp_path / "new", base=first), batches()[0]
    assert torch.equal(loaded(x), expected(x))


def test_clear_errors():
    a, x = mlp(4, 6, 3), torch.randn(9, 4)
    with pytest.raises(ValueError, match="parts was 'none'; expected one of both, rescale, reshift"):
        RethinkRebasin(parts="none")
    with pytest.raises(ValueError, match="method was 'magic'; expected None or one of weights"):
        RethinkRebasin(method="magic")
    with pytest.raises(ValueError, match=r"merge was 1.0; expected a weight above 0 and below 1, or None"):
        RethinkRebasin(merge=1.0)
    with pytest.raises(ValueError, match="no data; expected batches"):
        RethinkRebasin().plan(a, others=(a,))
    with pytest.raises(ValueError, match=r"differ at '0.weight'.*\(6, 4\).*\(7, 4\)"):
        RethinkRebasin(merge=None).plan(a, x, others=(mlp(4, 7, 3),))
    bare = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3))
    with pytest.raises(ValueError, match="0 has no bias to absorb a shift"):
        RethinkRebasin(parts="reshift").plan(bare, x, others=(bare,))
    assert "has no bias to absorb a shift" in str(RethinkRebasin().plan(bare, x, others=(bare,)))
