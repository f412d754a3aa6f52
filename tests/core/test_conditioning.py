import math

import pytest
import torch
from torch import nn

from interlayer.core.conditioning import AdaLNBlock, AdaLNHead, ClassEmbedding, TimeEmbedding
from interlayer.core.position import AxialRotary, AxialSinusoidal


def test_time_is_embedded_by_its_waves():
    layer = TimeEmbedding(5, frequencies=8)
    t = torch.tensor([0, 3, 999])
    waves = [[f(float(i) * 10000 ** (-j / 4)) for f in (math.cos, math.sin) for j in range(4)] for i in t]
    wanted = layer.second(nn.functional.silu(layer.first(torch.tensor(waves))))
    torch.testing.assert_close(layer(t), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer(t.double().float()), layer(t))


def test_classes_are_dropped_in_training_alone():
    layer, y = ClassEmbedding(3, 4, dropout=0.25), torch.zeros(4000, dtype=torch.long)
    dropped = (layer(y) == layer.table.weight[3]).all(-1).float().mean()
    assert abs(dropped - 0.25) < 0.03
    assert (layer.eval()(y) == layer.table.weight[0]).all()


def test_block_and_head():
    """adaLN-Zero: scale, shift and gate of both branches come from the condition; zero at first."""
    mixer, mlp = nn.Linear(4, 4), nn.Linear(4, 4)
    block, x, c = AdaLNBlock(4, mixer, mlp), torch.randn(2, 3, 5, 4), torch.randn(2, 4)
    assert torch.equal(block(x, c), x)
    nn.init.normal_(block.modulation.linear.weight)
    shift, scale, gate, shift2, scale2, gate2 = (
        p.view(2, 1, 1, 4) for p in block.modulation.linear(nn.functional.silu(c)).chunk(6, -1)
    )
    h = x + gate * mixer(nn.functional.layer_norm(x, (4,), eps=1e-6) * (1 + scale) + shift)
    h = h + gate2 * mlp(nn.functional.layer_norm(h, (4,), eps=1e-6) * (1 + scale2) + shift2)
    torch.testing.assert_close(block(x, c), h)
    assert AdaLNHead(4, nn.Linear(4, 3))(x, c).shape == (2, 3, 5, 3)
    assert AdaLNHead(4, nn.Conv2d(4, 3, 3, padding=1))(x, c).shape == (2, 3, 3, 5)


def test_rotation_on_a_grid_is_relative():
    """A score depends on how far two positions are apart in rows and in columns, and on nothing else."""
    grid, position = (4, 5), AxialRotary((4, 5), 8)
    q, k = torch.randn(8), torch.randn(8)
    turned_q, turned_k = position.rotate(q.expand(1, 1, 20, 8), k.expand(1, 1, 20, 8))
    scores = (turned_q @ turned_k.mT)[0, 0].view(*grid, *grid)
    torch.testing.assert_close(scores[0, 1, 2, 0], scores[1, 4, 3, 3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores[3, 3, 3, 3], q @ k, rtol=1e-4, atol=1e-5)
    assert (scores[0, 0, 1, 0] - scores[0, 0, 0, 1]).abs() > 1e-3
    with pytest.raises(ValueError, match="head width 6; expected a multiple of 4"):
        AxialRotary(grid, 6)


def test_waves_on_a_grid():
    table = AxialSinusoidal(8, (2, 3)).table.view(2, 3, 8)
    for row in range(2):
        for column in range(3):
            wanted = [f(v * 10000 ** (-j / 2)) for v in (column, row) for f in (math.sin, math.cos) for j in range(2)]
            torch.testing.assert_close(table[row, column], torch.tensor(wanted))
    with pytest.raises(ValueError, match="width 6; expected a multiple of 4"):
        AxialSinusoidal(6, (2, 3))
