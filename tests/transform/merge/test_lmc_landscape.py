import copy
import math
import sys

import families
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from typer.testing import CliRunner

from interlayer.cli import app
from interlayer.core.paths import barrier, estimate_statistics, layers, mean_loss
from interlayer.testing.common import picture, unchanged
from interlayer.transform.merge.layerwise_lmc import LayerwiseLMC
from interlayer.transform.merge.lmc_landscape import LMCLandscape, Pitchfork, correlation, end, forks, ridge, survey

NOTHING = torch.zeros(1, 1), torch.zeros(1)


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(1))
    return list(zip(x, (torch.arange(40) * 7 % 3).view(2, 20), strict=True))


def moved(model: nn.Module, seed: int, by: float = 0.3) -> nn.Module:
    chance, new = torch.Generator().manual_seed(seed), copy.deepcopy(model)
    with torch.no_grad():
        for p in new.parameters():
            p.add_(by * torch.randn(p.shape, generator=chance))
    return new


def toy(x: float, y: float) -> Pitchfork:
    return Pitchfork(torch.tensor([x, y], dtype=torch.float64))


@pytest.mark.parametrize("degree", range(6))
def test_the_ridge_is_exact_for_polynomials_up_to_degree_5(degree):
    """With exact derivatives; those of ``end`` are off by the square of its step."""
    middle = 0.5**degree - (1.0 if degree == 0 else 0.5)
    slopes = [degree * t ** (degree - 1) if degree else 0.0 for t in (0.0, 1.0)]
    curvatures = [degree * (degree - 1) * t ** (degree - 2) if degree > 1 else 0.0 for t in (0.0, 1.0)]
    ends = [type(end(float, 0.0))(0.0, s, c) for s, c in zip(slopes, curvatures, strict=True)]
    assert ridge(*ends) == pytest.approx(middle)
    found = [end(lambda t: t**degree, at) for at in (0.0, 1.0)]
    for one, exact in zip(found, ends, strict=True):
        assert (one.slope, one.curvature) == pytest.approx((exact.slope, exact.curvature), abs=0.06)


def test_the_toys_barrier_is_known_predicted_and_measured():
    loss = LMCLandscape(loss=lambda out, _: out.mean(), points=11)
    for x in (0.5, 1.0, 3.0):
        first, second = toy(x, math.sqrt(x)), toy(x, -math.sqrt(x))
        fork = loss(first, NOTHING, others=(second, toy(0, 0))).tables["fork"]
        assert first.barrier() == x * x / 4
        assert fork["measured"][0] == pytest.approx(x * x / 4) and fork["ridge"][0] == pytest.approx(
            x * x / 4, rel=0.03
        )
        assert fork["distance"][0] == pytest.approx(2 * math.sqrt(x))
        assert fork["angle"][0] == pytest.approx(2 * math.degrees(math.atan2(math.sqrt(x), x)))
    assert toy(-1, 0).barrier() == 0
    for start in ((2.0, 1.3), (-1.0, 0.4)):  # a valley behind the fork, and the mountainside before it
        model = toy(*start)
        for _ in range(400):
            (slope,) = torch.autograd.grad(model(NOTHING[0]).sum(), model.place)
            model.place.data[1] -= 0.1 * slope[1]
        assert float(model.place[1].detach()) == pytest.approx(math.sqrt(max(start[0], 0)), abs=1e-6)


def test_the_mountainside_is_the_height_at_the_share_of_the_way_down():
    base, batches = net(), data()
    first, second = moved(base, 1), moved(base, 2, 0.5)
    found = LMCLandscape()(first, batches, others=(second, base)).tables["fork"]
    a, b = (
        torch.cat([(p - q).flatten() for p, q in zip(m.parameters(), base.parameters(), strict=True)]).detach()
        for m in (first, second)
    )
    heights = []
    for mine, theirs in ((a, b), (b, a)):
        place, share = copy.deepcopy(base), 0.5 * (1 + float(mine @ theirs / mine.square().sum()))
        at = nn.utils.parameters_to_vector(base.parameters()).detach() + share * mine
        nn.utils.vector_to_parameters(at, place.parameters())
        heights.append(mean_loss(place, batches, F.cross_entropy))
    ends = [mean_loss(m, batches, F.cross_entropy) for m in (first, second)]
    assert found["mountainside"][0] == pytest.approx((sum(heights) - sum(ends)) / 2, abs=1e-5)
    assert found["descent"][0] == pytest.approx(mean_loss(base, batches, F.cross_entropy) - sum(ends) / 2)
    assert found["angle"][0] == pytest.approx(math.degrees(math.acos(F.cosine_similarity(a, b, dim=0))), abs=1e-3)
    assert found["distance"][0] == pytest.approx(float((a - b).norm()), rel=1e-6)


def test_measured_barriers_are_those_of_the_straight_line_and_of_layers():
    base, batches = net(), data()
    first, second = moved(base, 1, 1.0), moved(base, 2, 1.0)
    for points in (3, 7):
        found = LMCLandscape(points=points)(first, batches, others=(second, base)).tables
        line = barrier(first, second, lambda m: mean_loss(m, batches, F.cross_entropy), points=points)
        ends = [mean_loss(m, batches, F.cross_entropy) for m in (first, second)]
        assert max(found["fork"]["measured"][0], max(ends) - sum(ends) / 2) == pytest.approx(line, abs=1e-6)
        known = LayerwiseLMC(points=points, draws=1)(first, batches, others=(second,)).tables
        for layer, measured, distance in zip(
            *(found["layers"][k] for k in ("layer", "measured", "distance")), strict=True
        ):
            row = known["barriers"]["group"].index(layer)
            both = known["barriers"]["into first"][row], known["barriers"]["into second"][row]
            assert measured == pytest.approx(sum(both) / 2, abs=1e-5)
            assert distance == pytest.approx(
                known["robustness"]["distance"][list(layers(first)).index(layer)], rel=1e-5
            )


def test_layers_are_predicted_well_where_they_move_little():
    base, batches = net(), data()
    found = LMCLandscape()(moved(base, 1, 0.1), batches, others=(moved(base, 2, 0.1), base)).tables["layers"]
    assert found["ridge"] == pytest.approx(found["measured"], abs=2e-4)
    assert max(map(abs, found["measured"])) > 1e-3 and found["weights"] == [30, 42, 21]


def test_runs_are_walked_point_by_point():
    base = toy(0, 0)
    places = (1.0, 1.0), (3.0, 1.0), (0.0, 2.0), (0.0, 6.0)  # first at one and two, second at one and two
    a1, a2, b1, b2 = (toy(*place) for place in places)
    found = LMCLandscape(loss=lambda out, _: out.mean())(a2, NOTHING, others=(b2, base, a1, b1))
    table = found.tables["runs"]
    assert table["run"] == ["first"] * 2 + ["second"] * 2 and table["point"] == [0, 1, 0, 1]
    assert table["norm"] == table["distance"] == pytest.approx([2**0.5, 10**0.5, 2, 6])
    assert table["speed"] == pytest.approx([2**0.5, 2, 2, 4])
    assert table["apart"] == pytest.approx([2**0.5, 34**0.5] * 2)
    assert table["angle"] == pytest.approx([45, math.degrees(math.atan2(3, 1))] * 2)
    assert table["loss"] == pytest.approx([float(m(NOTHING[0]).detach()) for m in (a1, a2, b1, b2)])
    assert found.headings("fork")[-2:] == ["angle [degree]", "descent [nat]"] and len(found.figure().axes) == 1


def test_forks_share_the_run_up_to_where_they_part():
    calls = []

    def train(model, begin, stop, branch):
        calls.append((begin, stop, branch))
        with torch.no_grad():
            model.weight.add_((stop - begin) * (1 + branch))

    start = nn.Linear(1, 1)
    before = start.weight.clone()
    found = list(forks(start, train, at=(5, 0, 2), length=10))
    expected = [(0, 10, 1), (0, 10, 2), (0, 2, 0), (2, 12, 1), (2, 12, 2), (2, 5, 0), (5, 15, 1), (5, 15, 2)]
    assert calls == expected and torch.equal(start.weight, before)
    for fork, step in zip(found, (0, 2, 5), strict=True):
        weights = [float((m.weight - before).detach()) for m in (fork.ancestor, fork.first, fork.second)]
        assert fork.step == step and weights == pytest.approx([step, step + 20, step + 30])


def test_a_survey_ranks_the_barriers():
    def train(model, begin, stop, branch):
        model.place.data[0] += 0.1 * (stop - begin)
        if branch and begin < 6:
            model.place.data[1] = (3 - 2 * branch) * float(model.place.data[0].clamp_min(0)) ** 0.5

    made = list(forks(toy(-0.5, 0.01), train, at=(0, 4, 5, 8), length=20))
    probe = LMCLandscape(loss=lambda out, _: out.mean())
    found = survey(made, NOTHING, probe)
    table, said = found.tables["forks"], found.tables["correlation"]
    known = [0.25 * (0.1 * (20 + step) - 0.5) ** 2 if step < 6 else 0.0 for step in table["step"]]
    assert table["step"] == [0, 4, 5, 8] and table["measured"] == pytest.approx(known, abs=1e-6)
    assert said["prediction"] == ["ridge", "mountainside", "distance"] and said["over forks"][0] == 1
    assert said["over forks"][1] == pytest.approx(correlation(table["mountainside"], table["measured"]))
    assert math.isnan(said["over layers"][1]) and len(found.figure().axes) == 1
    assert found.tables["layers"]["fork"] == [0, 1, 2, 3] and found.tables["layers"]["layer"] == ["(root)"] * 4
    with pytest.raises(ValueError, match=r"survey: 2 forks; expected at least 3"):
        survey(made[:2], NOTHING, probe)


def test_batch_norms_are_estimated_anew_off_the_networks():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval()
    batch = torch.randn(64, 4), torch.randint(3, (64,))
    first, second = moved(base, 1), moved(base, 2)
    for model in (base, first, second):
        estimate_statistics(model, batch)
    found = LMCLandscape()(first, batch, others=(second, base)).tables["fork"]
    line = barrier(first, second, lambda m: mean_loss(m, batch, F.cross_entropy), points=3, data=batch)
    ends = [mean_loss(m, batch, F.cross_entropy) for m in (first, second)]
    assert max(found["measured"][0], max(ends) - sum(ends) / 2) == pytest.approx(line, abs=1e-5)


@pytest.mark.parametrize("name", ["twice", "tied", "lstm", "gpt2"])
def test_families(name):
    a, batch = families.model(name), families.batch(name)
    others = (families.other(name), moved(a, 3, 0.01))
    if isinstance(batch, dict):
        targets = {"labels": batch["input_ids"] if "input_ids" in batch else torch.tensor([0, 1])}
        given, loss = {**batch, **targets}, F.cross_entropy
    else:
        shape = families.output(a, batch).shape[:-1]
        given = batch, torch.ones(shape, dtype=torch.long)

        def loss(out, y):
            return F.cross_entropy(out.mT if out.ndim > 2 else out, y)

    before = [picture(m) for m in (a, *others)]
    found = LMCLandscape(loss=loss)(a, given, others=others)
    for seen, model in zip(before, (a, *others), strict=True):
        unchanged(seen, model, "lmc-landscape")
    for column in ("ridge", "mountainside", "measured", "angle"):
        assert math.isfinite(found.tables["fork"][column][0])
    assert all(math.isfinite(v) for v in found.tables["layers"]["ridge"])


def first() -> nn.Module:
    return moved(net(), 1)


def second() -> nn.Module:
    return moved(net(), 2)


def test_the_command_writes_a_page(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "runs", sys.modules[__name__])
    args = ["probe", "lmc-landscape", "--model", "runs:first", "--other", "runs:second", "--other", "runs:net"]
    result = CliRunner().invoke(app, [*args, "--data", "runs:data", "--out", str(tmp_path / "page")])
    assert result.exit_code == 0, result.output
    assert "mountainside" in result.output and any((tmp_path / "page").iterdir())


def test_clear_errors():
    a, b, base = first(), second(), net()
    with pytest.raises(ValueError, match=r"points 2; expected 3 or more, both ends included"):
        LMCLandscape(points=2)
    with pytest.raises(ValueError, match=r"1 other models; expected 2 or more"):
        LMCLandscape()(a, data(), others=(b,))
    with pytest.raises(ValueError, match=r"1 earlier models; expected one of each run, first and second in turn"):
        LMCLandscape()(a, data(), others=(b, base, a))
    with pytest.raises(
        ValueError, match=r"a model equals the ancestor; expected models that were trained since the fork"
    ):
        LMCLandscape()(a, data(), others=(b, a))
    with pytest.raises(ValueError, match=r"differ at '0.weight'"):
        LMCLandscape()(a, data(), others=(b, nn.Sequential(nn.Linear(3, 2))))
    with pytest.raises(ValueError, match=r"forks: at \[\], length 5; expected steps from 0 up"):
        next(forks(a, lambda *_: None, at=(), length=5))
