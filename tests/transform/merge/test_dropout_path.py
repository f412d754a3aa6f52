import families
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interlayer.core import taps
from interlayer.core.paths import blend, estimate_statistics, mean_loss
from interlayer.testing.common import picture, unchanged
from interlayer.transform.merge.dropout_path import Chain, DropoutPath, Halves, join


def mlp(*widths: int, seed: int = 0, gain: float = 3.0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers, before = [], 4
    for width in widths:
        layers += [nn.Linear(before, width), nn.Tanh()]
        before = width
    model = nn.Sequential(*layers, nn.Linear(before, 3))
    for p in model.parameters():
        p.data.mul_(gain)
    return model


def convnet(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    body = (
        nn.Conv2d(1, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
    )
    model = nn.Sequential(*body, nn.Flatten(), nn.Linear(24, 7), nn.ReLU(), nn.Linear(7, 3))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.uniform_(m.bias, -0.5, 0.5)
    estimate_statistics(model, torch.randn(30, 1, 6, 6))
    return model


def pairs(*shape: int):
    torch.manual_seed(7)
    return torch.randn(40, *shape), torch.randint(3, (40,))


CHAINS = {
    "one hidden layer": (mlp(9), mlp(9, seed=1), (4,)),
    "two": (mlp(9, 8), mlp(9, 8, seed=1), (4,)),
    "four": (mlp(6, 7, 2, 5), mlp(6, 7, 2, 5, seed=1), (4,)),
    "convolutions with batch norm": (convnet(), convnet(1), (1, 6, 6)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_loss_on_the_path_meets_its_bound(name):
    a, b, shape = CHAINS[name]
    data = pairs(*shape)
    before = [picture(m) for m in (a, b)]
    torch.manual_seed(0)
    found = DropoutPath(points=5)(a, data, others=(b,)).tables
    for seen, model in zip(before, (a, b), strict=True):
        unchanged(seen, model, "dropout-path")
    path, halves, bound = found["path"], found["halves"], found["bound"]
    hidden = len(halves["loss"]) // 2 - 1
    assert path["at"][-1] == 2 * (2 * hidden - 1) + 3 and len(path["at"]) == 4 * path["at"][-1] + 1
    assert path["loss"][0] == pytest.approx(mean_loss(a, data, F.cross_entropy), rel=1e-5)
    assert path["loss"][-1] == pytest.approx(mean_loss(b, data, F.cross_entropy), rel=1e-5)
    # the corners are the halved networks, so the bound is not only met but touched
    assert bound["worst on the path"] == pytest.approx(bound["bound"], rel=1e-4)
    corners = path["loss"][::4]
    for loss in halves["loss"]:
        assert min(abs(loss - corner) for corner in corners) < 1e-4 * max(corners)
    for n in range(int(path["at"][-1])):
        start, *inside, end = path["loss"][4 * n : 4 * n + 5]
        if path["moves"][4 * n + 1] == "unread units":
            assert [*inside, end] == pytest.approx([start] * 4, rel=1e-4)
        else:  # convex
            chords = [start + share * (end - start) for share in (0.25, 0.5, 0.75)]
            assert all(loss <= chord + 1e-4 for loss, chord in zip(inside, chords, strict=True))


def test_halves_are_networks_with_dropout():
    model, data = mlp(9, 8), pairs(4)
    chain = Chain(model, data)
    assert [g.size for g in chain.groups] == [9, 8] and chain.last == ["4.weight", "4.bias"]
    half = Halves(chain, chain.split())
    assert [(len(kept), len(free)) for kept, free in half.parts] == [(4, 4), (4, 4)]
    for first in (0, 1):
        dropped = blend(model, (half.dropped(dict(model.state_dict()), range(first, 2)),), (1.0,))
        masks = {}
        for n in range(first, 2):
            mask = torch.zeros(chain.groups[n].size)
            mask[half.parts[n][0]] = chain.groups[n].size / 4
            masks[str(2 * n + 1)] = lambda h, mask=mask: h * mask
        with taps.patch(model, masks):
            expected = model(data[0])
        torch.testing.assert_close(dropped(data[0]), expected)


def test_a_network_of_pairs_of_units_is_dropout_stable():
    """Every unit is there twice: the half that keeps one of each pair is the same network, and the path is flat."""
    model, data = mlp(8, 8), pairs(4)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight[4:], layer.bias[4:] = layer.weight[:4], layer.bias[:4]
        for layer in (model[2], model[4]):
            layer.weight[:, 4:] = layer.weight[:, :4]
    chain, order = Chain(model, data), torch.arange(8)
    mine = Halves(chain, [(order[:4], order[4:])] * 2)
    state = dict(model.state_dict())
    for corner in join(mine, mine.swapped(-1), state, state):
        torch.testing.assert_close(blend(model, (corner,), (1.0,))(data[0]), model(data[0]), rtol=1e-4, atol=1e-4)


def test_scaled_as_in_the_theory_the_gap_falls_as_one_over_the_root_of_the_width():
    """Two layers, ``1/N sum_i a_i tanh(w_i x)`` of independent units, squared error."""
    data, gaps = (pairs(4)[0], torch.randn(40, 3)), []
    for width in (64, 4096):
        found = []
        for seed in range(4):
            a = mlp(width, seed=seed)
            nn.init.normal_(a[2].weight).data.div_(width)
            torch.manual_seed(seed)
            found += DropoutPath(points=2, loss=F.mse_loss)(a, data, others=(a,)).tables["halves"]["gap"]
        gaps.append(sum(found) / len(found))
    assert 3 < gaps[0] / gaps[1] < 20  # 8


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.inner, self.leave = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.enter(x).relu()
        return self.leave(h + self.inner(h).relu())


def sequence(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), *layers, nn.Linear(6, 3))


REFUSED = {
    "residual": (Residual(), "written by 2 weights and read by 2|units of two layers on one axis"),
    "norm over units": (sequence(nn.LayerNorm(6)), "units that no weight reads still change the output"),
    "softmax at the end": (
        nn.Sequential(*sequence(nn.ReLU()), nn.Softmax(-1)), "something that is not linear follows 2.weight",
    ),
    "nothing hidden": (nn.Linear(4, 3), "no units of it can be permuted"),
    "scaled inputs": (nn.Sequential(nn.BatchNorm1d(4), *sequence(nn.ReLU())), "0.weight belongs to no hidden unit"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_chain_is_refused(name):
    model, why = REFUSED[name]
    with pytest.raises(ValueError, match=f"dropout-path: .* is no chain of hidden layers: .*({why})"):
        DropoutPath()(model, pairs(4), others=(model,))


@pytest.mark.parametrize("name", ["gpt2", "resnet", "lstm", "functional", "unnamed", "tied"])
def test_families_are_refused(name):
    model, batch = families.model(name), families.batch(name)
    given = batch if isinstance(batch, dict) else (batch, torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="is no chain of hidden layers"):
        DropoutPath()(model, given, others=(families.other(name),))


def test_clear_errors():
    a = mlp(5)
    with pytest.raises(ValueError, match="points was 1; expected at least both ends"):
        DropoutPath(points=1)
    with pytest.raises(ValueError, match="no data; expected batches of inputs and targets"):
        DropoutPath()(a, [], others=(a,))
    with pytest.raises(ValueError, match=r"differ at '0.weight'"):
        DropoutPath()(a, pairs(4), others=(mlp(6),))
    with pytest.raises(ValueError, match="without targets"):
        DropoutPath()(a, pairs(4)[0], others=(a,))
