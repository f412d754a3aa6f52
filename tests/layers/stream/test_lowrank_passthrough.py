import pytest
import torch
from torch import nn

from interlayer.core.data import DataShape
from interlayer.layers.stream.lowrank_passthrough import GROUPS, TRANSITIONS, LowRankPassthrough, PassthroughNet


def matrices(layer):
    """U of every gate, built as the equation writes it."""
    t, n = layer.transition, layer.width
    out = []
    for g in range(t.gates):
        u = t.left[g * n : (g + 1) * n]
        if t.right is not None:
            first = 0 if t.tied else g * t.rank
            u = u @ t.right[first : first + t.rank]
        if t.diagonal is not None:
            u = u + torch.diag(t.diagonal[g])
        out.append(u)
    return out


def naive(layer, x):
    """The cells of the paper and of the author's code, step by step with whole matrices."""
    n, us = layer.width, matrices(layer)
    ws = [layer.input[g * n : (g + 1) * n] for g in range(len(us))]
    h, c = layer.start[0].expand(len(x), -1), layer.start[-1].expand(len(x), -1)
    outputs = []
    for x_t in x.unbind(1):

        def gate(g, h, x_t=x_t):
            return x_t @ ws[g].T + h @ us[g].T + layer.bias[g]

        if layer.cell == "lstm":
            forget, write, out = (gate(g, h).sigmoid() for g in range(3))
            c = forget * c + write * gate(3, h).tanh()
            h = out * c.tanh()
        else:
            carry = gate(0, h).sigmoid()
            reset = gate(1, h).sigmoid() if layer.cell == "gru" else 1.0
            new = gate(len(us) - 1, reset * h).tanh()
            h = (1 - carry) * new + carry * h
        outputs.append(h)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("cell", GROUPS)
@pytest.mark.parametrize("transition", TRANSITIONS)
@pytest.mark.parametrize(("tied", "weight_norm"), [(False, False), (True, True)])
def test_values_and_gradients_equal_the_equation(cell, transition, tied, weight_norm):
    torch.manual_seed(0)
    options = {} if transition == "full" else {"rank": 2, "tied": tied}
    layer = LowRankPassthrough(3, 5, cell=cell, transition=transition, weight_norm=weight_norm, **options).double()
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    x = torch.randn(2, 7, 3, dtype=torch.double, requires_grad=True)
    y, wanted = layer(x)[0], naive(layer, x)
    torch.testing.assert_close(y, wanted)
    probe, leaves = torch.randn_like(y), [x, *layer.parameters()]
    for a, b in zip(*(torch.autograd.grad((o * probe).sum(), leaves) for o in (y, wanted)), strict=True):
        torch.testing.assert_close(a, b)


def test_full_transitions_are_torchs_lstm():
    torch.manual_seed(0)
    ours, theirs = LowRankPassthrough(3, 5, cell="lstm", transition="full"), nn.LSTM(3, 5, batch_first=True)
    order = [1, 0, 3, 2]  # torch has i, f, g, o; here f, i, o, g
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(ours.input.unflatten(0, (4, 5))[order].flatten(0, 1))
        theirs.weight_hh_l0.copy_(ours.transition.left.unflatten(0, (4, 5))[order].flatten(0, 1))
        theirs.bias_ih_l0.copy_(ours.bias[order].flatten())
        theirs.bias_hh_l0.zero_()
    x = torch.randn(2, 9, 3)
    y, (h, c) = ours(x)
    wanted, (h_t, c_t) = theirs(x)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close((h, c), (h_t[0], c_t[0]))


@pytest.mark.parametrize("cell", GROUPS)
def test_a_sequence_in_pieces_is_the_whole(cell):
    layer = LowRankPassthrough(3, 6, cell=cell, rank=2)
    x = torch.randn(2, 9, 3)
    whole, last = layer(x)
    first, state = layer(x[:, :4])
    second, end = layer(x[:, 4:], state)
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    torch.testing.assert_close(end, last)


@pytest.mark.parametrize(
    ("transition", "tied", "count"),
    [
        ("full", False, 3 * 16 * 16),
        ("low-rank", False, 2 * 3 * 16 * 2),
        ("low-rank", True, (3 + 1) * 16 * 2),
        ("low-rank-diagonal", False, 2 * 3 * 16 * 2 + 3 * 16),
    ],
)
def test_weights_are_counted(transition, tied, count):
    options = {} if transition == "full" else {"rank": 2, "tied": tied}
    layer = LowRankPassthrough(4, 16, transition=transition, **options)
    assert sum(p.numel() for p in layer.transition.parameters()) == count
    assert all(u.shape == (16, 16) for u in matrices(layer))
    if transition == "low-rank":
        assert torch.linalg.matrix_rank(matrices(layer)[0]) == 2


def test_an_open_carry_keeps_the_state():
    layer = LowRankPassthrough(2, 4, rank=1, carry=40.0)
    state = (torch.randn(3, 4),)
    torch.testing.assert_close(layer(torch.randn(3, 20, 2), state)[1], state)


def test_weight_norm_makes_lengths_free_of_directions():
    layer = LowRankPassthrough(2, 4, rank=2, weight_norm=True)
    before = layer.transition.left.clone()
    with torch.no_grad():
        layer.transition.parametrizations.left.original1.mul_(7.0)  # the directions
        torch.testing.assert_close(layer.transition.left, before)
        layer.transition.parametrizations.left.original0.mul_(2.0)  # the lengths
        torch.testing.assert_close(layer.transition.left, 2 * before)


def test_wrong_options_and_shapes_are_refused():
    with pytest.raises(ValueError, match="cell 'rnn'"):
        LowRankPassthrough(2, 4, cell="rnn")
    with pytest.raises(ValueError, match="transition 'diagonal'"):
        LowRankPassthrough(2, 4, transition="diagonal")
    with pytest.raises(ValueError, match="rank 5 must lie between 1 and the state size 4"):
        LowRankPassthrough(2, 4, rank=5)
    for without_effect in ({"rank": 2}, {"tied": True}):
        with pytest.raises(ValueError, match="no effect on a full transition"):
            LowRankPassthrough(2, 4, transition="full", **without_effect)
    layer = LowRankPassthrough(2, 4, cell="lstm", rank=1)
    with pytest.raises(ValueError, match=r"input \(3, 2\); expected \[batch, sequence, 2\]"):
        layer(torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"states \[\(3, 4\)\]; expected 2 of \(3, 4\)"):
        layer(torch.zeros(3, 1, 2), (torch.zeros(3, 4),))


def test_the_network_answers_after_the_last_step():
    net = PassthroughNet.for_task(DataShape("series", "values", classes=4, length=5, features=3), width=6, rank=2)
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(net(x), net.head(net.layer(x)[1][0]))
    with pytest.raises(ValueError, match=r"takes series, not image\. Take a task such as 'sequential-digits'"):
        PassthroughNet.for_task(DataShape("image", "classes", classes=2))
