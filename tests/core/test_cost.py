"""Costs against numbers counted by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interlayer.core import cost


def test_shared_parameters_count_once():
    embed = nn.Embedding(10, 4)
    head = nn.Linear(4, 10, bias=False)
    head.weight = embed.weight
    model = nn.Sequential(embed, head)
    assert cost.parameters(model) == 40
    embed.weight.requires_grad_(False)
    assert cost.parameters(model, trainable=True) == 0


def test_flops_of_linear_and_convolution():
    assert cost.flops(nn.Linear(7, 5), torch.zeros(3, 7)) == 2 * 3 * 7 * 5
    conv = nn.Conv2d(2, 4, 3, padding=1)
    assert cost.flops(conv, torch.zeros(1, 2, 8, 8)) == 2 * 8 * 8 * 4 * 2 * 9


class Attend(nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


def test_flops_of_attention_are_two_products():
    q, k = torch.randn(2, 3, 16, 8), torch.randn(2, 3, 24, 8)
    assert cost.flops(Attend(), q, k, k) == 2 * (2 * 2 * 3 * 16 * 24 * 8)


def test_flops_leaves_the_mode_alone():
    model = nn.Linear(2, 2)
    model.train()
    cost.flops(model, torch.zeros(1, 2))
    assert model.training


def test_kept_bytes_leave_out_weights():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(5, 8)
    # input 5x8 for the first weight; ReLU's output 5x16, shared with the second layer's input
    assert cost.bytes_kept(model, lambda: model(x).sum()) == (5 * 8 + 5 * 16) * 4


def test_peak_counts_what_is_alive_at_once():
    def work():
        a = torch.empty(1000)
        b = a + 1
        del a
        c = b + 1
        del b
        return c.sum()

    assert cost.peak_bytes(work) == pytest.approx(8000, abs=64)
    weights = torch.zeros(500)
    assert cost.peak_bytes(work, alive=[weights, weights[:10]]) == pytest.approx(10000, abs=64)


def test_median_time_leaves_out_the_first_steps():
    assert cost.median_time([100, 50, 1, 3, 2]) == 2
    assert cost.median_time([4.0]) == 4
    assert math.isnan(cost.median_time([]))


def test_a_parameter_as_the_input_of_a_part_is_counted():
    class Queries(nn.Module):
        def __init__(self):
            super().__init__()
            self.queries, self.map = nn.Parameter(torch.randn(3, 4)), nn.Linear(4, 2)

        def forward(self, x):
            return self.map(self.queries.expand(len(x), -1, -1))

    assert cost.flops(Queries(), torch.zeros(5, 1)) == 2 * 5 * 3 * 4 * 2


def test_packed_weights_and_their_integer_products_count():
    from interlayer.core.quantizer import Grid, nearest

    net, x = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(32, 16)
    packed = nearest(net, Grid(4, 0), inputs=Grid(8, kind="asymmetric"), data=x).apply()
    assert cost.parameters(packed) == cost.parameters(net)
    assert cost.flops(packed, x) == cost.flops(net, x)
