import math

import pytest
import torch
from torch import nn

from interlayer.core import aside
from interlayer.core.routing import balance, combine, dispatch, exchange, grouped, route, share, z_loss
from interlayer.testing.ddp import processes

DOUBLE = {"dtype": torch.float64}


def naive(x, logits, up, down, k, capacity, by, normalise=False):
    """One-hot tensors of groups x tokens x experts; a loop over the tokens for capacities."""
    probs = logits.softmax(-1)
    groups, length, experts = probs.shape
    if by == "expert":
        size = min(length, max(1, k * length // experts))
        mask = torch.zeros_like(probs).scatter(1, probs.topk(size, 1).indices, 1.0)
        weights = probs * mask
    else:
        gates, chosen = probs.topk(k)
        if normalise:
            gates = gates / gates.sum(-1, keepdim=True)
        mask = torch.zeros_like(probs)
        for r in range(k):
            for g in range(groups):
                for t in range(length):
                    if capacity is None or mask[g, :, chosen[g, t, r]].sum() < capacity:
                        mask[g, t, chosen[g, t, r]] = 1
        weights = torch.zeros_like(probs).scatter(2, chosen, gates) * mask
    every = torch.einsum("gtd,edh->gteh", x, up).tanh()
    return torch.einsum("gte,gteh,ehd->gtd", weights, every, down), mask


CASES = [
    (1, None, "token", False),
    (1, 2, "token", False),
    (2, 3, "token", True),
    (3, None, "token", False),
    (2, None, "expert", False),
]


@pytest.mark.parametrize(("k", "capacity", "by", "normalise"), CASES)
@pytest.mark.parametrize("weighted", [True, False])
def test_values_and_every_gradient_against_one_hot(k, capacity, by, normalise, weighted):
    torch.manual_seed(0)
    x, logits = torch.randn(3, 7, 5, **DOUBLE), torch.randn(3, 7, 3, **DOUBLE)
    up, down = torch.randn(3, 5, 4, **DOUBLE), torch.randn(3, 4, 6, **DOUBLE)
    leaves = [t.requires_grad_() for t in (x, logits, up, down)]
    routed = route(logits, k, capacity, by, normalise=normalise)
    flat = x.flatten(0, 1)
    if weighted:
        ours = combine(dispatch(flat, routed, up).tanh(), routed, down)
    else:
        hidden = grouped(dispatch(flat, routed), up, routed.counts).tanh()
        ours = combine(grouped(hidden, down, routed.counts), routed)
    theirs, mask = naive(x, logits, up, down, k, capacity, by, normalise)
    torch.testing.assert_close(ours.view_as(theirs), theirs)
    assert routed.counts.tolist() == mask.sum((0, 1)).tolist()
    missing = 21 * k - mask.sum() if by == "token" else (mask.sum(-1) == 0).sum()
    assert int(routed.dropped) == int(missing)
    found = torch.autograd.grad(ours.square().sum(), leaves)
    wanted = torch.autograd.grad(theirs.square().sum(), leaves)
    torch.testing.assert_close(found, wanted)


def test_second_derivatives():
    torch.manual_seed(0)

    def f(x, logits, up, down):
        routed = route(logits, 2, 3)
        return combine(dispatch(x, routed, up).tanh(), routed, down)

    shapes = ((5, 2), (1, 5, 3), (3, 2, 3), (3, 3, 2))
    leaves = [torch.randn(s, **DOUBLE) for s in shapes]
    assert torch.autograd.gradgradcheck(f, [t.requires_grad_() for t in leaves], fast_mode=True)


def test_a_gate_of_zero_gives_finite_gradients():
    logits = torch.tensor([[0.0, -1e4], [0.0, 1.0]], requires_grad=True)
    x, up, down = torch.randn(2, 3), torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)
    routed = route(logits, 2)
    assert (routed.gates == 0).any()
    combine(dispatch(x, routed, up), routed, down).square().sum().backward()
    assert all(t.grad.isfinite().all() for t in (logits, up, down)) and not logits.grad[0].any()


def test_an_expert_without_tokens_gets_zero_gradients():
    logits = torch.tensor([[0.0, 9.0, 0.0]] * 4, requires_grad=True)
    up, x = torch.randn(3, 2, 5, requires_grad=True), torch.randn(4, 2)
    routed = route(logits)
    assert routed.counts.tolist() == [0, 4, 0]
    dispatch(x, routed, up).sum().backward()
    assert not up.grad[0].any() and not up.grad[2].any() and up.grad[1].all()


def test_drops_are_counted_and_reported():
    logits = torch.zeros(2, 6, 4)
    logits[..., 1] = 1  # everyone wants expert 1, which has room for two of each group
    with aside.collect() as told:
        routed = route(logits, capacity=2)
    assert int(routed.dropped) == 8 and routed.tokens.tolist() == [0, 1, 6, 7]
    assert told.means() == pytest.approx({"routing dropped": 8 / 12, "routing busiest": 4.0})
    out = combine(dispatch(torch.ones(12, 3), routed), routed)
    assert [bool(row.any()) for row in out] == [n in (0, 1, 6, 7) for n in range(12)]


def test_first_choices_come_before_second_ones():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0]])
    routed = route(logits, 2, 1)  # expert 1 is token 0's second and token 1's first choice
    assert list(zip(routed.tokens.tolist(), [0, 1, 2], strict=True)) == [(0, 0), (1, 1), (1, 2)]


def test_experts_choose_equally_many_tokens():
    torch.manual_seed(0)
    logits = torch.randn(2, 12, 4)
    routed = route(logits, 2, by="expert")
    assert routed.counts.tolist() == [12] * 4
    best = logits.softmax(-1)[1, :, 3].topk(6).indices + 12
    assert set(routed.tokens[-6:].tolist()) == set(best.tolist())


def test_balance_in_closed_form():
    even = torch.eye(4).repeat(3, 1) * 50
    assert balance(route(even)).item() == pytest.approx(1)
    assert balance(route(torch.tensor([[50.0, 0, 0, 0]] * 8))).item() == pytest.approx(4)  # all on one of four
    torch.manual_seed(0)
    logits = torch.randn(2, 9, 4, **DOUBLE)
    p = logits.softmax(-1)
    f = nn.functional.one_hot(p.argmax(-1), 4).double().mean(1)
    torch.testing.assert_close(balance(route(logits)), (4 * (f * p.mean(1)).sum(-1)).mean())


def test_z_loss_in_closed_form():
    assert z_loss(torch.zeros(3, 5, 8)).item() == pytest.approx(math.log(8) ** 2)


def test_no_tensor_of_tokens_times_experts_times_capacity():
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    n, e, d = 256, 16, 4
    with Watch():
        routed = route(torch.randn(n, e), 2, 40)
        out = combine(dispatch(torch.randn(n, d), routed, torch.randn(e, d, d)), routed, torch.randn(e, d, d))
    assert out.shape == (n, d) and max(seen) <= n * e


def test_grouped_kernel_of_torch_gives_the_same(monkeypatch):
    torch.manual_seed(0)
    x, w = torch.randn(20, 8).bfloat16(), torch.randn(3, 8, 16).bfloat16()
    counts = torch.tensor([5, 0, 15])
    runs = []
    for fused in (False, True):
        monkeypatch.setattr("interlayer.core.routing.products._fused", lambda x, w, fused=fused: fused)
        leaves = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        y = grouped(*leaves, counts)
        runs.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for ours, theirs in zip(*runs, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: route(torch.zeros(3, 2), 3), "k=3; expected 1 to 2"),
        (lambda: route(torch.zeros(3, 2), 1, 0), "capacity=0; expected at least 1"),
        (lambda: route(torch.tensor([[0.0, torch.nan]])), "logits of 1 of 1 tokens are NaN or infinite"),
        (lambda: route(torch.tensor([[0.0, 1.0], [0.0, torch.inf]])), "logits of 1 of 2 tokens are NaN or infinite"),
        (lambda: route(torch.zeros(3)), r"logits \(3,\); expected"),
        (lambda: route(torch.zeros(3, 2), by="group"), "by='group' is not one of"),
        (lambda: route(torch.zeros(3, 2), 1, 2, "expert"), "leave out capacity"),
        (lambda: dispatch(torch.zeros(4, 5), route(torch.zeros(3, 2))), r"rows \(4, 5\); expected \[3, features\]"),
        (lambda: dispatch(torch.zeros(3, 5), route(torch.zeros(3, 2)), torch.zeros(2, 4, 4)), "weight"),
        (lambda: combine(torch.zeros(4, 5), route(torch.zeros(3, 2))), "expected \\[3, features\\]"),
        (lambda: grouped(torch.zeros(4, 5), torch.zeros(2, 5, 5), torch.tensor([1, 2])), "expected \\[3"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_no_tokens():
    for shape in ((0, 3), (2, 0, 3), (0, 4, 3)):
        routed = route(torch.zeros(shape), 1, 2)
        assert combine(dispatch(torch.zeros(0, 2), routed, torch.ones(3, 2, 2)), routed).shape == (0, 2)
        assert balance(routed).item() == 0 == z_loss(torch.zeros(shape)).item()


def loss_and_gradients(leaves, k, share=None):
    """The squared sum of a layer of experts; with a share of them, over all processes."""
    x, router, up, down = leaves
    routed = route(x @ router, k, 3)
    flat = x.flatten(0, 1)
    if share is None:
        out = combine(dispatch(flat, routed, up).tanh(), routed, down)
    else:
        rows, counts, home = exchange(dispatch(flat, routed), routed)
        hidden = grouped(rows, up[share], counts).tanh()
        out = combine(home(grouped(hidden, down[share], counts)), routed)
    return out, torch.autograd.grad(out.square().sum(), leaves)


@pytest.mark.parametrize(("world", "k"), [(2, 1), (4, 2)])
def test_experts_on_several_processes_equal_one(world, k):
    torch.manual_seed(0)
    shapes = ((4, 7, 5), (5, 8), (8, 5, 3), (8, 3, 5))
    whole = [torch.randn(s, **DOUBLE).requires_grad_() for s in shapes]

    def run(rank):
        x = whole[0].detach().chunk(world)[rank].requires_grad_()
        out, grads = loss_and_gradients([x, *whole[1:]], k, share(8))
        return dict(zip(("out", "x", "router", "up", "down"), (out, *grads), strict=True))

    parts = processes(world, run)
    out, grads = loss_and_gradients(whole, k)
    for name, wanted in (("out", out.detach()), ("x", grads[0])):
        torch.testing.assert_close(torch.cat([p[name] for p in parts]), wanted)
    for name, wanted in zip(("router", "up", "down"), grads[1:], strict=True):
        torch.testing.assert_close(sum(p[name] for p in parts), wanted)  # an expert's gradient is whole where it lives


def test_processes_that_do_not_divide_the_experts():
    with pytest.raises(AssertionError, match=r"ValueError: exchange: 3 experts on 2 processes; expected a number"):
        processes(2, lambda rank: exchange(torch.zeros(4, 2), route(torch.zeros(4, 3))) and {})
