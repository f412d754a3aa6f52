"""Reversible chains: values, gradients, random numbers, statistics and memory are those of the ordinary chain."""

import copy

import pytest
import torch
from torch import nn

from interlayer.core import aside
from interlayer.core.cost import bytes_kept, peak_bytes
from interlayer.core.pairing import Streams
from interlayer.core.reversible import Coupling, halves, inverse, ordinary, reversible
from interlayer.testing.ddp import two_processes


class Affine(Coupling):
    """A coupling that scales too (Dinh et al., arXiv:1605.08803), and hands halves on turned around."""

    def carry(self, x):
        return x.flip(-1)

    def back(self, y):
        return y.flip(-1)

    def join(self, x, branch):
        return x * branch.tanh().exp() + branch

    def part(self, y, branch):
        return (y - branch) * (-branch.tanh()).exp()


def branch(width=4, dropout=0.3):
    return nn.Sequential(
        nn.Conv1d(width, 2 * width, 3, padding=1),
        nn.BatchNorm1d(2 * width),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Conv1d(2 * width, width, 1),
    )


KINDS = {
    "one branch": lambda: Coupling(branch()),
    "two branches": lambda: Coupling(branch(), branch()),
    "affine": lambda: Affine(branch()),
}


def chain(kind, depth=3, dtype=torch.float64):
    torch.manual_seed(0)
    blocks = nn.ModuleList(KINDS[kind]() for _ in range(depth)).to(dtype)
    return blocks, torch.randn(5, 8, 6, dtype=dtype, requires_grad=True)


def outcome(run, blocks, x, seed=7):
    torch.manual_seed(seed)
    y = torch.cat(run(blocks, halves(x)), 1)
    after = torch.get_rng_state()
    weight = torch.linspace(-1, 1.3, y.numel(), dtype=y.dtype).view(y.shape)
    grads = torch.autograd.grad((y * weight).sum() + y.square().mean(), [x, *blocks.parameters()])
    assert torch.equal(torch.get_rng_state(), after)  # the backward pass draws nothing
    return y.detach(), grads, [b.clone() for b in blocks.buffers()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [1, 3])
def test_values_gradients_and_statistics_are_the_ordinary_ones(kind, training, depth):
    blocks, x = chain(kind, depth)
    twin = copy.deepcopy(blocks)
    y, grads, buffers = outcome(reversible, blocks.train(training), x)
    wanted = outcome(ordinary, twin.train(training), x)
    assert torch.equal(y, wanted[0])
    torch.testing.assert_close(grads, wanted[1], rtol=1e-9, atol=1e-11)
    assert all(map(torch.equal, buffers, wanted[2]))  # running statistics are updated once
    assert training == any((a != 0).any() for n, a in blocks.named_buffers() if n.endswith("num_batches_tracked"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_inverse_gives_the_inputs(kind):
    blocks, x = chain(kind, 5)
    blocks.eval()
    found = torch.cat(inverse(blocks, ordinary(blocks, halves(x))), 1)
    torch.testing.assert_close(found, x, rtol=1e-10, atol=1e-10)
    single = blocks.float()
    found = torch.cat(inverse(single, ordinary(single, halves(x.float()))), 1)
    assert (found - x).norm() < 1e-5 * x.norm()


def test_a_coupling_is_its_equation():
    blocks, x = chain("two branches", 1)
    x1, x2 = halves(x)
    f, g = blocks.eval()[0].branches
    y1 = x1 + f(x2)
    y2 = x2 + g(y1)
    torch.testing.assert_close(blocks[0](x1, x2), (y1, y2))
    torch.testing.assert_close(Coupling(f)(x1, x2), (x2, y1))


def test_kept_bytes_are_flat_in_depth_and_ordinary_ones_are_not():
    kept, peaks = {}, {}
    for run in (reversible, ordinary):
        for depth in (2, 16):
            blocks, x = chain("one branch", depth, torch.float32)
            x = x.detach().repeat(8, 1, 40)

            def step(run=run, blocks=blocks, x=x):
                y = torch.cat(run(blocks, halves(x)), 1)
                return y.square().mean()

            kept[run, depth] = bytes_kept(blocks, step)
            peaks[run, depth] = peak_bytes(lambda step=step: step().backward())
    assert kept[reversible, 16] == kept[reversible, 2]
    assert kept[ordinary, 16] > 6 * kept[ordinary, 2]
    assert peaks[reversible, 16] < 1.3 * peaks[reversible, 2] and peaks[ordinary, 16] > 5 * peaks[ordinary, 2]


def test_buffers_that_decide_the_output_are_those_of_the_first_time():
    """The power iteration of a spectral norm moves its vectors in every training pass; so does a counter that is replaced."""

    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            self.count = self.count + 1
            return x * self.count

    torch.manual_seed(0)
    make = nn.utils.parametrizations.spectral_norm
    blocks = nn.ModuleList(Coupling(nn.Sequential(make(nn.Linear(3, 3)), Counter())) for _ in range(2)).double()
    twin, x = copy.deepcopy(blocks), torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    found, wanted = outcome(reversible, blocks, x), outcome(ordinary, twin, x)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    assert [block.branches[0][1].count.item() for block in blocks] == [1, 1]


def test_autocast_is_that_of_the_forward_pass():
    blocks, x = chain("two branches", 3, torch.float32)
    twin = copy.deepcopy(blocks)
    results = []
    for run, net in ((reversible, blocks), (ordinary, twin)):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            y = torch.cat(run(net, halves(x)), 1)
        assert y.dtype == torch.float32  # the halves stay in single precision
        results.append(torch.autograd.grad(y.square().sum(), [x, *net.parameters()]))
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() <= 2e-2 * b.norm() + 1e-5


def test_a_weight_used_again_under_autocast_keeps_its_gradient():
    """The cast that a chain makes without a graph must not be the one that later uses take from the cache."""
    shared = nn.Linear(3, 3, bias=False)
    x = torch.randn(2, 6, requires_grad=True)
    grads = []
    for run in (reversible, ordinary):
        with torch.autocast("cpu", torch.bfloat16):
            y = shared(run([Coupling(shared)], halves(x))[1])
        grads.append(torch.autograd.grad(y.float().sum(), shared.weight)[0])
    torch.testing.assert_close(*grads, rtol=3e-2, atol=1e-2)


def test_streams_of_random_numbers_repeat():
    """Under paired noise each module draws from its own stream, in the backward pass as in the first."""
    blocks, x = chain("one branch", 3)
    twin = copy.deepcopy(blocks)
    found = []
    for run, net in ((reversible, blocks), (ordinary, twin)):
        noise = Streams(net, 0)
        for number in range(2):
            with noise.step(number):
                y = torch.cat(run(net, halves(x)), 1)
                found.append([y, *torch.autograd.grad(y.square().sum(), [x, *net.parameters()])])
    torch.testing.assert_close(found[:2], found[2:], rtol=1e-9, atol=1e-9)


def test_frozen_shared_and_repeated_use():
    blocks, x = chain("one branch", 2)
    twice = blocks[1].branches[0][4]
    tied = Coupling(nn.Sequential(nn.Conv1d(4, 8, 1), twice, nn.ReLU(), nn.Conv1d(4, 8, 1), twice)).double()
    blocks = nn.ModuleList([*blocks, tied, blocks[0]]).eval()  # a layer used again within a branch, and a block
    blocks[1].branches[0][0].weight.requires_grad_(False)
    leaves = [p for p in blocks.parameters() if p.requires_grad]
    found = []
    for run in (reversible, ordinary):
        y = torch.cat(run(blocks, halves(x.detach())), 1).square().sum()
        grads = [torch.autograd.grad(y, leaves, retain_graph=True) for _ in range(2)]
        torch.testing.assert_close(*grads)
        found.append(grads[0])
    torch.testing.assert_close(*found)
    frozen = blocks.requires_grad_(False)
    (grad,) = torch.autograd.grad(reversible(frozen, halves(x))[0].sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(ordinary(frozen, halves(x))[0].sum(), x)[0])
    assert not reversible(frozen, halves(x.detach()))[0].requires_grad


def test_data_parallel_training_with_dropout_and_statistics():
    """Two processes get the mean of what each part of the batch gives alone."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = chain("two branches", 2)[0]

        def forward(self, x):
            return torch.cat(reversible(self.blocks, halves(x)), 1)

    net = Net()
    torch.manual_seed(1)
    parts = torch.randn(2, 3, 8, 6, dtype=torch.float64)

    def step(module, rank):
        torch.manual_seed(rank)
        module(parts[rank]).square().sum().backward()

    wanted = {}
    for rank in range(2):
        alone = copy.deepcopy(net)
        step(alone, rank)
        for name, p in alone.named_parameters():
            wanted[name] = wanted.get(name, 0) + p.grad / 2
    got = two_processes(copy.deepcopy(net), step)
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


def test_compiled_chains_are_checkpointed():
    """Values, gradients and statistics as ordinary, and less is kept."""
    torch.manual_seed(0)
    parts = ((nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 4, 3, padding=1)) for _ in range(2))
    blocks = nn.ModuleList(Coupling(nn.Sequential(*each)) for each in parts)
    x = torch.randn(5, 8, 6, requires_grad=True)
    twin = copy.deepcopy(blocks)
    wanted = outcome(ordinary, twin, x)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: torch.cat(reversible(blocks, halves(x)), 1), backend="aot_eager", fullgraph=True)
    found = outcome(lambda *_: compiled(x).chunk(2, 1), blocks, x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert bytes_kept(blocks, lambda: compiled(x)) < 0.6 * bytes_kept(twin, lambda: ordinary(twin, halves(x)))


def test_dropout_of_a_compiled_chain_repeats():
    torch._dynamo.reset()
    drops = torch.compile(lambda *pair: reversible([Coupling(nn.Dropout(0.5))], pair), backend="aot_eager")
    x1, x2 = torch.randn(2, 50), torch.randn(2, 50, requires_grad=True)
    y2 = drops(x1, x2)[1]
    (grad,) = torch.autograd.grad(y2.sum(), x2)
    torch.testing.assert_close(grad, ((y2 - x1) / x2).detach())
    assert 0 < (grad == 0).sum() < 100


def test_metrics_of_branches_are_passed_on():
    class Told(nn.Linear):
        def forward(self, x):
            aside.metric("mean", x.mean())
            return super().forward(x)

    block = Coupling(Told(2, 2))
    with aside.collect() as told:
        y1, y2 = reversible([block], (torch.zeros(1, 2), torch.ones(1, 2)))
        (y1 + y2).sum().backward()
    assert told.means() == {"mean": 1.0} and len(told.metrics["mean"]) == 1


def test_clear_errors():
    with pytest.raises(ValueError, match=r"halves: 3 channels \(axis 1 of \(2, 3, 4\)\); expected an even number"):
        halves(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"Coupling: a branch gives \(2, 3\); expected \(2, 2\)"):
        reversible([Coupling(nn.Linear(2, 3))], (torch.zeros(2, 2), torch.zeros(2, 2)))

    class Scaled(Coupling):
        def __init__(self, f):
            super().__init__(f)
            self.scale = nn.Parameter(torch.ones(()))

    with pytest.raises(ValueError, match="parameter 'scale' of Scaled is outside of its branches"):
        reversible([Scaled(nn.Linear(2, 2))], (torch.zeros(2, 2), torch.zeros(2, 2)))

    class Penalised(nn.Linear):
        def forward(self, x):
            aside.loss(self.weight.square().sum())
            return super().forward(x)

    with pytest.raises(ValueError, match="auxiliary loss, which would have no gradient"):
        reversible([Coupling(Penalised(2, 2))], (torch.zeros(2, 2), torch.zeros(2, 2)))
    block = Coupling(nn.Linear(2, 2))
    y = reversible([block], (torch.zeros(2, 2), torch.zeros(2, 2)))[1]
    block.eval()
    with pytest.raises(RuntimeError, match=r"train\(\) or eval\(\) was called between"):
        y.sum().backward(retain_graph=True)
    block.train()
    with pytest.raises(RuntimeError, match=r"second derivatives .* use `ordinary`"):
        torch.autograd.grad(y.sum(), block.branches[0].weight, create_graph=True)
