import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interlayer.core.extra import extra_loss
from interlayer.layers.mixing.sparse_shift import (
    FEBlock,
    FENet,
    IntegerShift,
    ShiftUnit,
    SparseShift,
    bilinear_shift,
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


def test_penalty_is_the_sum_of_all_displacements():
    net = nn.Sequential(SparseShift(2, penalty=0.5), nn.ReLU(), SparseShift(2, penalty=0.1))
    with torch.no_grad():
        net[0].displacement.copy_(torch.tensor([[1.0, -2.0], [0.0, 0.5]]))
        net[2].displacement.copy_(torch.tensor([[0.0, 0.0], [-1.0, 0.0]]))
    loss = extra_loss(net)
    assert loss.item() == pytest.approx(0.5 * 3.5 + 0.1)
    loss.backward()
    assert net[0].displacement.grad.tolist() == [[0.5, -0.5], [0.0, 0.5]]
    assert net[0].unshifted == 0.5 and net[2].unshifted == 0.5  # half a pixel rounds to none


def test_deployed_moves_only_what_moves():
    torch.manual_seed(0)
    net = FENet(1, 4, width=4).eval()
    x = torch.randn(2, 1, 16, 16)
    small = copy.deepcopy(net)
    for module in list(small.modules()):
        if isinstance(module, ShiftUnit):
            module.mix = module.mix.deployed()
            assert isinstance(module.mix, IntegerShift) and module.mix.by.dtype == torch.int64
            assert len(module.mix.moved) < module.mix.channels
    torch.testing.assert_close(small(x), net(x))
    assert len(list(small.parameters())) < len(list(net.parameters()))
    image = torch.randn(1, 2, 4, 4)
    assert SparseShift(2, spread=0.0).deployed()(image) is image


def test_fully_exploited_block_sees_growing_shares():
    block = FEBlock(8, 3)
    assert block.seen == [2, 4, 8]
    x = torch.randn(2, 8, 4, 4)
    seen = []
    for unit in block.units:
        unit.register_forward_hook(lambda m, args, out: seen.append(args[0].clone()))
    block.eval()(x)
    assert (
        torch.equal(seen[0], x[:, :2])
        and torch.equal(seen[1][:, 2:], x[:, 2:4])
        and torch.equal(seen[2][:, 4:], x[:, 4:])
    )


def test_unit_halves_and_keeps_its_shortcut_where_shapes_allow():
    x = torch.randn(2, 4, 6, 6)
    assert ShiftUnit(4, 8, stride=2)(x).shape == (2, 8, 3, 3)
    unit = ShiftUnit(4, 4)
    nn.init.zeros_(unit.down[1].weight)
    assert torch.equal(unit(x), x)


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="channels 0, penalty"):
        SparseShift(0)
    with pytest.raises(ValueError, match="6 channels for 3 units; wanted a multiple of 4"):
        FEBlock(6, 3)
    with pytest.raises(ValueError, match=r"FENet: input \(2, 3, 8, 8\); wanted \[batch, 1, height, width\]"):
        FENet(1, 2)(torch.zeros(2, 3, 8, 8))
