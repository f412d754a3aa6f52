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
from interlayer.core.paths import barrier, blend, estimate_statistics, layers, mean_loss
from interlayer.testing.common import picture, unchanged
from interlayer.transform.merge.layerwise_lmc import LayerwiseLMC, federated


def net(k: float = 0.9) -> nn.Sequential:
    """Weights from a formula, so that figures can be committed."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    n = 0
    for p in model.parameters():
        i = torch.arange(n, n + p.numel(), dtype=torch.float64)
        p.data = (2 * torch.sin(i * k + i * i * 0.013) / math.sqrt(p[0].numel())).view(p.shape).float()
        n += p.numel()
    return model


def second() -> nn.Sequential:
    return net(1.7)


def data() -> list[tuple[torch.Tensor, torch.Tensor]]:
    i = torch.arange(2 * 20 * 4, dtype=torch.float64)
    x, y = torch.sin(i * 0.7 + i * i * 0.0031).view(2, 20, 4).float(), (torch.arange(40) * 7 % 3).view(2, 20)
    return list(zip(x, y, strict=True))


# What link-er/layer-wise-lmc gives: the loss with a group averaged, the rest of the first or of the second network, minus the mean
# of both losses; and of each layer, the loss with it replaced minus that of the first network.
AUTHORS = {
    "all": (-0.147004, -0.147004),
    "0": (0.474532, -0.310726),
    "2": (0.623124, -0.517125),
    "4": (-0.45679, 0.452224),
    "first 2": (0.947236, -0.558907),
    "last 2": (-0.434816, 0.105513),
}
REPLACED = [0.147704, 0.922761, 0.124829]


def test_figures_of_the_authors_code():
    found = LayerwiseLMC(draws=1)(net(), data(), others=(second(),)).tables
    table = found["barriers"]
    assert table["group"] == ["all", "0", "2", "4", "first 1", "first 2", "last 1", "last 2"]
    assert table["weights"] == [93, 30, 42, 21, 30, 72, 21, 63]
    for group, expected in AUTHORS.items():
        row = table["group"].index(group)
        assert (table["into first"][row], table["into second"][row]) == pytest.approx(expected, abs=1e-5)
    assert found["robustness"]["whole, other"] == pytest.approx(REPLACED, abs=1e-5)


def test_the_highest_of_several_points_counts_and_all_layers_are_the_straight_line():
    a, b, batches = net(), second(), data()
    found = LayerwiseLMC(groups={"two": ["0", "2"]}, points=6, draws=1)(a, batches, others=(b,)).tables["barriers"]
    names = ["0.weight", "0.bias", "2.weight", "2.bias"]
    states, ends = (a.state_dict(), b.state_dict()), [mean_loss(m, batches, F.cross_entropy) for m in (a, b)]
    for column, host in (("into first", a), ("into second", b)):
        losses = [
            mean_loss(blend(host, states, (1 - w, w), names=names), batches, F.cross_entropy)
            for w in (0.2, 0.4, 0.6, 0.8)
        ]
        assert found[column][1] == pytest.approx(max(losses) - sum(ends) / 2)
    straight = barrier(a, b, lambda m: mean_loss(m, batches, F.cross_entropy), points=6)
    assert max(found["into first"][0], max(ends) - sum(ends) / 2) == pytest.approx(straight)
    assert found["group"] == ["all", "two"]


def test_random_directions_are_as_long_as_the_way_to_the_other_network():
    a, b, batches = net(), second(), data()
    torch.manual_seed(3)
    table = LayerwiseLMC(groups={"middle": ["2"]}, draws=2)(a, batches, others=(b,)).tables["robustness"]
    names = ["2.weight", "2.bias"]
    way = torch.cat([(b.state_dict()[n] - a.state_dict()[n]).flatten() for n in names])
    torch.manual_seed(3)
    rises = []
    for _ in range(2):
        moved, noise = copy.deepcopy(a), [torch.randn_like(a.state_dict()[n]) for n in names]
        length = torch.cat([v.flatten() for v in noise]).norm()
        with torch.no_grad():
            for n, v in zip(names, noise, strict=True):
                moved.state_dict()[n].add_(0.5 * v * way.norm() / length)
        rises.append(mean_loss(moved, batches, F.cross_entropy) - mean_loss(a, batches, F.cross_entropy))
    assert table["distance"] == pytest.approx([float(way.norm())])
    assert table["half, random"] == pytest.approx([sum(rises) / 2], rel=1e-4)


def test_batch_norms_are_estimated_anew_where_layers_are_averaged():
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).eval() for _ in range(2)]
    batch = torch.randn(64, 4), torch.randint(3, (64,))
    for model in nets:
        estimate_statistics(model, batch)
    found = LayerwiseLMC(groups={"first": ["0"]}, draws=1)(nets[0], batch, others=(nets[1],)).tables["barriers"]
    states = nets[0].state_dict(), nets[1].state_dict()
    mixed = blend(nets[0], states, (0.5, 0.5), batch, names=["0.weight", "0.bias"])
    ends = sum(mean_loss(m, batch, F.cross_entropy) for m in nets) / 2
    assert found["into first"][1] == pytest.approx(mean_loss(mixed, batch, F.cross_entropy) - ends)
    assert not torch.allclose(mixed[1].running_var, nets[0][1].running_var)


@pytest.mark.parametrize("name", ["twice", "tied", "lstm", "resnet", "gpt2"])
def test_families(name):
    a, b, batch = families.model(name), families.other(name), families.batch(name)
    if isinstance(batch, dict):
        targets = {"labels": batch["input_ids"] if "input_ids" in batch else torch.tensor([0, 1])}
        given, loss = {**batch, **targets}, F.cross_entropy
    else:
        shape = families.output(a, batch).shape[:-1]
        given, loss = (
            (batch, torch.ones(shape, dtype=torch.long)),
            lambda out, y: F.cross_entropy(out.mT if out.ndim > 2 else out, y),
        )
    before = [picture(m) for m in (a, b)]
    found = LayerwiseLMC(draws=1, loss=loss, groups={"some": list(layers(a))[:2]})(a, given, others=(b,))
    for seen, model in zip(before, (a, b), strict=True):
        unchanged(seen, model, "layerwise-lmc")
    assert all(math.isfinite(v) for v in found.tables["barriers"]["into second"])
    owned = [n for names in layers(a).values() for n in names]
    assert len(owned) == len(set(owned)) and set(owned) <= set(a.state_dict())
    if name == "tied":
        assert layers(a)["embed"] == ["embed.weight", "head.weight"]


def test_federated_rounds_average_some_layers_by_share():
    start = [nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)) for _ in range(3)]
    before, turns = [picture(m) for m in start], []

    def train(client, number, turn):
        turns.append((turn, number))
        with torch.no_grad():
            for p in client.parameters():
                p.fill_(float(10**number) + turn)

    clients, found = federated(
        start, train, rounds=2, average=["0"], weights=[1, 1, 2], judge=lambda client, number: client[1].weight.item()
    )
    mean = (2 + 11 + 2 * 101) / 4
    assert [c[0].weight.item() for c in clients] == [mean] * 3 and [c[1].bias.item() for c in clients] == [2, 11, 101]
    assert turns == [(r, n) for r in range(2) for n in range(3)]
    assert found.tables["rounds"] == {
        "round": [0, 0, 0, 1, 1, 1],
        "client": [0, 1, 2] * 2,
        "score": [1, 10, 100, 2, 11, 101],
    }
    for seen, client in zip(before, start, strict=True):
        unchanged(seen, client, "federated")
    alone, _ = federated(start, train, rounds=1, average=[])
    assert [c[0].weight.item() for c in alone] == [1, 10, 100]
    every, _ = federated(start, train, rounds=1)
    assert [c[n].bias.item() for c in every for n in (0, 1)] == pytest.approx([37.0] * 6)


def test_the_command_compares_two_models(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pair_of_nets", sys.modules[__name__])
    args = ["probe", "layerwise-lmc", "--model", "pair_of_nets:net", "--data", "pair_of_nets:data"]
    done = CliRunner().invoke(
        app, [*args, "--other", "pair_of_nets:second", "-o", "draws=1", "--out", str(tmp_path / "page")]
    )
    assert done.exit_code == 0 and "last 2" in done.output, done.output
    assert any("0.947" in p.read_text() for p in (tmp_path / "page").glob("*.csv"))
    alone = CliRunner().invoke(app, args)
    assert alone.exit_code == 2 and "layerwise-lmc: 0 other models; expected 1" in alone.stderr
    odd = CliRunner().invoke(app, ["probe", "transcoders", *args[2:], "--other", "pair_of_nets:second"])
    assert odd.exit_code == 2 and "'transcoders' looks at one model. Leave out --other." in odd.stderr


def test_clear_errors():
    a, b = net(), second()
    with pytest.raises(ValueError, match="points 2, draws 5; expected 3 or more points"):
        LayerwiseLMC(points=2)
    with pytest.raises(
        ValueError, match=r"group 'x' of \['7'\] holds no weights; expected names of modules such as 0, 2, 4"
    ):
        LayerwiseLMC(groups={"x": ["7"]})(a, data(), others=(b,))
    with pytest.raises(ValueError, match="no groups; expected at least one"):
        LayerwiseLMC(groups={})(a, data(), others=(b,))
    with pytest.raises(ValueError, match="mean_loss: no batches"):
        LayerwiseLMC()(a, [], others=(b,))
    with pytest.raises(ValueError, match=r"differ at '0.weight'"):
        LayerwiseLMC()(a, data(), others=(nn.Sequential(nn.Linear(4, 5)),))
    with pytest.raises(ValueError, match=r"no layer '9'; expected some of 0, 2, 4"):
        federated([a, b], lambda *_: None, rounds=1, average=["9"])
    with pytest.raises(ValueError, match="0 clients, 1 rounds"):
        federated([], lambda *_: None, rounds=1)
    with pytest.raises(ValueError, match=r"weights \[1.0\] for 2 clients"):
        federated([a, b], lambda *_: None, rounds=1, weights=[1.0])
