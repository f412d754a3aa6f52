"""Implicit representations: grids, encodings, and the network as a pure function of its weights."""

import math

import pytest
import torch
from torch import nn

from interlayer.core.fields import Implicit, Layout, dequantize, encode, grid, quantize


def test_grid():
    x = grid(2, 3, dtype=torch.float64)
    assert x.dtype == torch.float64 and x.shape == (6, 2)
    assert x.view(2, 3, 2)[1, 0].tolist() == [1, -1]
    assert grid(1).tolist() == [[0.0]]


def test_encoding_by_hand():
    x = torch.tensor([[0.25, -0.5]])
    wanted = [0.25, -0.5, *(math.sin(a) for a in (math.pi / 4, -math.pi / 2, math.pi / 2, -math.pi)),
              *(math.cos(a) for a in (math.pi / 4, -math.pi / 2, math.pi / 2, -math.pi))]  # fmt: skip
    assert encode(x, 2)[0].tolist() == pytest.approx(wanted, abs=1e-6)
    assert encode(torch.zeros(5, 3, 2), 4).shape == (5, 3, 18)


@pytest.mark.parametrize(("activation", "act"), [("relu", torch.relu), ("sine", lambda h: torch.sin(7.0 * h))])
def test_the_network_is_the_one_that_modules_would_make(activation, act):
    layout = Layout(2, 3, width=5, depth=2, activation=activation, frequencies=1, omega=7.0)
    lines = [nn.Linear(i, o) for o, i in layout.shapes]
    flat = torch.cat([t.flatten() for line in lines for t in (line.weight, line.bias)])
    assert len(flat) == layout.count == (6 * 5 + 5) + (5 * 5 + 5) + (5 * 3 + 3)
    x = grid(4, 5)
    wanted = lines[2](act(lines[1](act(lines[0](encode(x, 1))))))
    torch.testing.assert_close(layout(x, layout.split(flat)), wanted)


def test_spread_is_that_of_he_and_of_siren():
    relu, sine = Layout(2, 1, width=50, depth=2), Layout(2, 1, width=50, depth=2, activation="sine", omega=30.0)
    assert [w for w, _ in relu.spread()] == pytest.approx([1.0, 0.2, 0.2])
    # uniform within 1 / inputs, then within sqrt(6 / inputs) / omega
    assert [w for w, _ in sine.spread()] == pytest.approx(
        [0.5 / math.sqrt(3), *[math.sqrt(6 / 50) / 30 / math.sqrt(3)] * 2]
    )
    torch.manual_seed(0)
    made = Implicit(2, 1, width=400, depth=2, activation="sine")
    for weight, bias, (w, b) in zip(made.weights, made.biases, made.layout.spread(), strict=True):
        assert weight.std().item() == pytest.approx(w, rel=0.1) and weight.abs().max() <= math.sqrt(3) * w
        assert bias.abs().max() <= math.sqrt(3) * b


def test_sines_keep_their_spread_over_depth():
    torch.manual_seed(0)
    net, h = Implicit(2, 1, width=256, depth=6, activation="sine"), 2 * torch.rand(500, 2) - 1
    spreads = []
    for weight, bias in list(zip(net.weights, net.biases, strict=True))[:-1]:
        h = torch.sin(30 * (h @ weight.T + bias))
        spreads.append(h.std().item())
    assert spreads == pytest.approx([math.sqrt(0.5)] * 6, rel=0.15)


@pytest.mark.parametrize("bits", [1, 3, 8])
def test_quantization_is_within_half_a_step_and_keeps_the_ends(bits):
    x = torch.randn(101)
    levels, low, step = quantize(x, bits)
    assert levels.min() == 0 and levels.max() == 2**bits - 1
    assert (dequantize(levels, low, step) - x).abs().max() <= step / 2 * 1.0001
    same = torch.full((3,), 2.5)
    assert torch.equal(dequantize(*quantize(same, bits)), same)


def test_errors():
    with pytest.raises(ValueError, match="activation 'tanh' is not one of"):
        Layout(2, 1, activation="tanh")
    with pytest.raises(ValueError, match="expected sizes of at least 1"):
        Layout(2, 1, width=0)
    with pytest.raises(ValueError, match=r"coordinates \(4, 3\); expected \[\.\.\., 2\]"):
        Implicit(2, 1)(torch.zeros(4, 3))
