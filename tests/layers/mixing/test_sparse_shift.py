import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interlayer.core import aside
from interlayer.layers.mixing.sparse_shift import (
    SMALL,
    FEBlock,
    FENet,
    IntegerShift,
    ShiftUnit,
    SparseShift,
    bilinear_shift,
    pool,
    settle,
    shift,
)


def naive(x, by):
    out = torch.zeros_like(x)
    for c, (a, b) in enumerate(by.tolist()):
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                if 0 <= i + a < x.shape[2] and 0 <= j + b < x.shape[3]:
                    out[:, c, i, j] = x[:, c, i + a, j + b]
    return out


@pytest.mark.parametrize("size", [(5, 7), (1, 4), (3, 1)])
def test_shift_equals_the_equation_in_value_and_gradient(size):
    torch.manual_seed(0)
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    by = torch.tensor([[0, 0], [1, 0], [0, -2], [-1, 1], [9, 9], [-3, 2]])
    y = shift(x, by)
    assert torch.equal(y, naive(x.detach(), by))
    dy = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], naive(dy, -by))


def test_bilinear_shift_is_torchs_sampling_and_whole_at_whole_pixels():
    torch.manual_seed(0)
    x = torch.randn(1, 1, 6, 6, dtype=torch.float64)
    for a, b in ((0.3, -0.7), (1.5, 0.25), (-2.0, 1.0)):
        by = torch.tensor([[a, b]], dtype=torch.float64)
        grid = F.affine_grid(
            torch.tensor([[[1, 0, b / 3], [0, 1, a / 3]]], dtype=torch.float64), (1, 1, 6, 6), align_corners=False
        )
        wanted = F.grid_sample(x, grid, padding_mode="zeros", align_corners=False)
        torch.testing.assert_close(bilinear_shift(x, by), wanted)


def test_forward_takes_whole_pixels_and_the_gradient_is_the_interpolations():
    torch.manual_seed(0)
    layer = SparseShift(3, spread=2.0).double()
    x, dy = (
        torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(2, 3, 5, 5, dtype=torch.float64),
    )
    y = layer(x)
    torch.testing.assert_close(y, shift(x, layer.displacement.round().long()), rtol=0, atol=1e-15)
    dx, dd = torch.autograd.grad(y, (x, layer.displacement), dy)
    torch.testing.assert_close(dx, naive(dy, -layer.displacement.round().long()))
    real = layer.displacement.detach().clone().requires_grad_()
    torch.testing.assert_close(dd, torch.autograd.grad(bilinear_shift(x.detach(), real), real, dy)[0])
    assert torch.autograd.gradcheck(lambda d: bilinear_shift(x.detach(), d), (real,))


def test_loss_is_the_sum_of_all_displacements_and_of_half_their_squares():
    net = nn.Sequential(SparseShift(2, penalty=0.5), nn.ReLU(), SparseShift(2, penalty=0.1, decay=2.0))
    with torch.no_grad():
        net[0].displacement.copy_(torch.tensor([[1.0, -2.0], [0.0, 0.5]]))
        net[2].displacement.copy_(torch.tensor([[0.0, 0.0], [-3.0, 0.0]]))
    with aside.collect() as told:
        net(torch.zeros(1, 2, 3, 3))
    loss = told.loss
    assert loss.item() == pytest.approx(0.5 * 3.5 + 0.1 * 3 + 9)
    loss.backward()
    assert net[0].displacement.grad.tolist() == [[0.5, -0.5], [0.0, 0.5]]
    assert net[2].displacement.grad[1].tolist() == pytest.approx([-6.1, 0.0])
    assert net[0].unshifted == 0.5 and net[2].unshifted == 0.5  # half a pixel rounds to none


def test_decay_is_the_weight_decay_of_a_gradient_step():
    layers = [SparseShift(9, penalty=0.0, decay=d) for d in (4e-2, 0.0)]
    steps = [
        torch.optim.SGD(layer.parameters(), 0.5, weight_decay=w) for layer, w in zip(layers, (0.0, 4e-2), strict=True)
    ]
    for layer, step in zip(layers, steps, strict=True):
        layer.regulariser().backward()
        step.step()
    torch.testing.assert_close(*(layer.displacement for layer in layers))
    assert layers[0].displacement[0].tolist() == pytest.approx([-0.98, -0.98])


def test_nine_groups_at_initialisation_and_the_rest_stays():
    layer = SparseShift(20)
    groups = [[a, b] for a in (-1, 0, 1) for b in (-1, 0, 1)]
    assert layer.displacement.tolist() == [g for g in groups for _ in range(2)] + [[0, 0], [0, 0]]
    assert SparseShift(5).unshifted == 1.0


def test_displacements_settle():
    net = FENet(1, 4, width=4, blocks=SMALL, stem=1, head=8)
    settle(net, 0.5)
    net(torch.randn(2, 1, 8, 8)).sum().backward()
    shifts = [m.displacement for m in net.modules() if isinstance(m, SparseShift)]
    assert len(shifts) == 1 + 2 + 3 and all(d.grad is None and not d.requires_grad for d in shifts)
    settle(net, 0.5, until=0.75)
    assert all(d.requires_grad for d in shifts)
    with pytest.raises(ValueError, match="Linear has no SparseShift"):
        settle(nn.Linear(2, 2), 0.0)


def test_deployed_moves_only_what_moves():
    torch.manual_seed(0)
    net = FENet(1, 4, width=4, blocks=SMALL, stem=1, head=8).eval()
    x = torch.randn(2, 1, 16, 16)
    small = copy.deepcopy(net)
    for module in list(small.modules()):
        if isinstance(module, ShiftUnit) and isinstance(module.mix, SparseShift):
            module.mix = module.mix.deployed()
            assert isinstance(module.mix, IntegerShift) and module.mix.by.dtype == torch.int64
            assert len(module.mix.moved) < module.mix.channels
    torch.testing.assert_close(small(x), net(x))
    assert len(list(small.parameters())) < len(list(net.parameters()))
    image = torch.randn(1, 2, 4, 4)
    assert SparseShift(2, spread=0.0).deployed()(image) is image


def test_fully_exploited_block_sees_growing_shares_from_the_end():
    block = FEBlock(8, 12, 3).eval()
    assert block.seen == [2, 4]
    x, seen = torch.randn(2, 8, 4, 4), []
    for unit in (*block.units, block.last):
        unit.register_forward_hook(lambda m, args, out: seen.append((args[0], out)))
    y = block(x)
    assert torch.equal(seen[0][0], x[:, 6:])
    assert torch.equal(seen[1][0], torch.cat((x[:, 4:6], seen[0][1]), 1))
    assert torch.equal(seen[2][0], torch.cat((x[:, :4], seen[1][1]), 1))
    assert y is seen[2][1] and y.shape == (2, 12, 4, 4)
    assert FEBlock(8, 12, 3, halve=True)(x).shape == (2, 12, 2, 2)


def test_units_by_hand():
    unit = ShiftUnit(4, 4, shortcut=True).eval()
    nn.init.zeros_(unit.down[1].weight)
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(unit(x), x)
    halving = ShiftUnit(4, 8, expansion=5, mix=pool).eval()
    hidden = halving.up(x)
    assert hidden.shape == (2, 40, 6, 6) and (hidden >= 0).all()
    mean = hidden.unflatten(3, (3, 2)).unflatten(2, (3, 2)).mean((3, 5))
    torch.testing.assert_close(halving(x), halving.down(mean))


def test_the_papers_network_has_the_authors_sizes():
    """Output of each part and number of parameters as their code gives them for 224 pixels."""
    with torch.device("meta"):
        net = FENet().eval()
        x = torch.zeros(1, 3, 224, 224)
        sizes = [tuple((x := part(x)).shape[1:]) for part in (net.stem, *net.stages, net.wide)]
    assert sizes == [
        (16, 112, 112), (16, 112, 112), (32, 56, 56), (64, 28, 28), (128, 14, 14), (128, 14, 14), (256, 7, 7), (256, 7, 7),
        (1932, 7, 7),
    ]  # fmt: skip

    def unit(inputs, outputs, expansion=6, shift=True):  # convolutions, norms, displacements
        inner = expansion * outputs
        return inner * (inputs + outputs) + 2 * (inner + outputs) + 2 * inner * shift

    def block(inputs, outputs, units, halve):
        early = [inputs // 2**i for i in range(1, units)]
        return sum(unit(c, c) for c in early) + unit(inputs, outputs, shift=not halve)

    wanted = 3 * 9 * 16 + 2 * 16 + unit(16, 16, 4) + unit(16, 32, 5, shift=False)
    wanted += block(32, 64, 3, True) + block(64, 128, 4, True) + block(128, 128, 4, False)
    wanted += block(128, 256, 4, True) + block(256, 256, 3, False) + 256 * 1932 + 2 * 1932 + 1932 * 1000 + 1000
    assert sum(p.numel() for p in net.parameters()) == wanted == 4_623_408


def test_mistakes_are_reported():
    with pytest.raises(ValueError, match="channels 0, penalty"):
        SparseShift(0)
    with pytest.raises(ValueError, match="decay -1"):
        SparseShift(3, decay=-1)
    with pytest.raises(ValueError, match="6 channels for 3 units; expected a multiple of 4"):
        FEBlock(6, 6, 3)
    with pytest.raises(ValueError, match=r"FENet: input \(2, 3, 8, 8\); expected \[batch, 1, height, width\]"):
        FENet(1, 2)(torch.zeros(2, 3, 8, 8))
    with pytest.raises(ValueError, match=r"FENet: image \(2, 1, 8, 8\); expected at least 32 pixels a side"):
        FENet(1, 2)(torch.zeros(2, 1, 8, 8))
