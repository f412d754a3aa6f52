"""The three HyperZZW operators, the slow network, the standardisations and the local feedback, by hand or by a naive twin."""

import pytest
import torch
import torch.nn.functional as F

from interlayer.core import aside
from interlayer.core.data import DataShape
from interlayer.core.fields import grid
from interlayer.layers.hyper.hyperzzw import (
    SIDES,
    GroupedStandard,
    SlowNet,
    Terminator,
    hyperzzw_global,
    hyperzzw_local,
    hyperzzw_twice,
    renormalize,
)


def test_global_operator_on_images_is_a_product_of_matrices():
    x, z, w = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(hyperzzw_global(w, x, z), torch.einsum("bcij,cij,bcjk->bcik", x, w[0], z))


@pytest.mark.parametrize("length", [1, 4, 7])
def test_global_operator_on_sequences_is_a_circular_convolution(length):
    x, z, w = torch.randn(2, 3, length), torch.randn(2, 3, length), torch.randn(1, 3, length)
    wanted = torch.zeros_like(x)
    for place in range(length):
        for other in range(length):
            wanted[..., place] += x[..., other] * w[0, :, other] * z[..., (place - other) % length]
    torch.testing.assert_close(hyperzzw_global(w, x, z), wanted)


@pytest.mark.parametrize("shape", [(2, 3, 6), (2, 3, 5, 5)])
def test_local_operator_takes_each_example_its_own_kernel(shape):
    x, kernel = torch.randn(shape), torch.randn(2, 3, *[3] * (len(shape) - 2))
    conv = F.conv1d if len(shape) == 3 else F.conv2d
    wanted = torch.stack([conv(a, k.unsqueeze(1), padding=1, groups=3) for a, k in zip(x, kernel, strict=True)])
    torch.testing.assert_close(hyperzzw_local(kernel, x), wanted)


def test_twice_is_the_square_of_the_activation_times_the_kernel():
    assert hyperzzw_twice(torch.tensor([2.0, -1.0]), torch.tensor([3.0, 4.0])).tolist() == [18.0, -16.0]


def test_renormalization_by_hand_and_its_gradient():
    h = torch.tensor([[3.0], [4.0]], requires_grad=True)  # two places, one feature: norm 5
    y = renormalize(h, torch.tensor([2.0]), torch.tensor([10.0]))
    assert y.flatten().tolist() == pytest.approx([12.0, 16.0])
    y[0].sum().backward()
    # d(10 h0 / |h|) = 10 (1 / 5 - 9 / 125), 10 (-12 / 125); nothing through the first term
    assert h.grad.flatten().tolist() == pytest.approx([1.28, -0.96])


def test_slow_network_is_the_recurrence_over_coordinates():
    slow = SlowNet(3, (4, 4), hidden=5, layers=2, omega=0.3)
    torch.nn.init.normal_(slow.bias)
    for row, place in enumerate(grid(4, 4)):
        filters = list(zip(slow.waves.weight.split(5), slow.waves.bias.split(5), strict=True))
        h = torch.sin(F.linear(place, *filters[0]))
        for i in (0, 1):
            h = torch.sin(F.linear(place, *filters[i + 1])) * slow.lines[i](h) + slow.bias[row]
        torch.testing.assert_close(slow()[0, :, row // 4, row % 4], slow.last(h))


def test_slow_network_with_context_differs_by_example_and_not_by_batch():
    slow, x = SlowNet(3, (5, 5), hidden=4, layers=2, omega=0.3, context=2), torch.randn(3, 2, 8, 8)
    kernels = slow(x)
    assert kernels.shape == (3, 3, 5, 5)
    assert (kernels[0] - kernels[1]).abs().max() > 1e-4
    torch.testing.assert_close(slow(x[1:2]), kernels[1:2])


def test_grouped_standardisation_goes_by_turns_over_batch_and_places():
    norm, x = GroupedStandard(8, 4, 2, True), 3 + 2 * torch.randn(6, 8, 5, 5)
    y = norm(x)
    batch, instance = [0, 1, 4, 5], [2, 3, 6, 7]
    assert y[:, batch].mean((0, 2, 3)).abs().max() < 1e-5
    assert y[:, batch].mean((2, 3)).abs().max() > 0.05
    assert y[:, instance].mean((2, 3)).abs().max() < 1e-5
    wanted = (x[:, batch] - x[:, batch].mean((0, 2, 3), keepdim=True)) / x[:, batch].std(
        (0, 2, 3), correction=0, keepdim=True
    )
    torch.testing.assert_close(y[:, batch], wanted, rtol=1e-3, atol=1e-3)
    assert not list(norm.parameters())
    with pytest.raises(ValueError, match="9 channels in 4 groups"):
        GroupedStandard(9, 4, 2, True)


def test_local_feedback_by_hand_and_it_teaches_slow_networks_alone():
    net = Terminator(1, (4, 4), widths=(2, 4), hidden=3, groups=2, feedback=0.5)
    shallow, deep = net.kernels()
    assert shallow.shape == (1, 1, 4, 4) and deep.shape == (1, 2, 4, 4)
    wanted = 0.5 * sum((deep[0, c] - shallow[0, 0]).square().sum() for c in (0, 1)) / 32
    with aside.collect() as told:
        net(torch.randn(2, 1, 4, 4))
        net.eval()(torch.randn(2, 1, 4, 4))
    (loss,) = told.losses
    torch.testing.assert_close(loss, wanted)
    loss.backward()
    touched = {name for name, p in net.named_parameters() if p.grad is not None and p.grad.any()}
    assert touched and all(".slow." in name and "local" not in name for name in touched)


def test_a_block_compresses_ten_branches():
    """The hidden representation written out: each branch by its own operator, side by side, through the bottleneck."""
    torch.manual_seed(0)
    block = Terminator(2, (4, 4), widths=(4,), hidden=3, groups=2, running=False).blocks[0]
    x, w = torch.randn(3, 2, 4, 4), block.slow()

    def by_place(t):
        return (t - t.mean((2, 3), keepdim=True)) / (t.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()

    def by_channel(kernel, t):
        return t.mean((2, 3), keepdim=True) ** 2 * kernel.reshape(1, 2, 1, 1)

    fast = by_place(block.fast_slow(x * w) + block.fast(x))
    mixed, gated = by_place(block.mix(x)), by_place(x * torch.sigmoid(by_channel(block.channel(), x)))
    whole, whole_mixed, whole_gated = (x * w @ z for z in (fast, mixed, gated))
    score = by_channel(block.channel_out(), whole) * whole.mean(1, keepdim=True) ** 2 * block.spatial()
    branches = [whole, whole_mixed, whole_gated, F.silu(whole), fast, x * torch.sigmoid(score)]
    for branch, (source, z) in zip(block.local, ((x, gated), (gated, x), (mixed, x), (x, mixed)), strict=True):
        filtered = hyperzzw_local(branch.slow(source), z)
        branches.append(F.gelu(branch.standard(branch.mix(filtered))) + branch.bias)
    assert len(branches) == 10
    flat = torch.einsum("oc,bcij->boij", block.bottleneck.weight[..., 0, 0], torch.cat(branches, 1))
    wanted = F.gelu(block.grouped(flat + block.bottleneck.bias.view(1, -1, 1, 1))) + block.bias
    torch.testing.assert_close(block(x), wanted)


@pytest.mark.parametrize("size", [(4, 4), (4,)])
def test_nothing_goes_past_a_block(size):
    """There is no residual: where the bottleneck passes nothing, no image reaches the next block."""
    net = Terminator(2, size, widths=(2, 4), hidden=3, groups=2)
    torch.nn.init.zeros_(net.blocks[0].bottleneck.weight)
    x = torch.randn(3, 2, *size, requires_grad=True)
    net(x).sum().backward()
    assert not x.grad.any()
    found = net.blocks[0](x)
    torch.testing.assert_close(found, torch.full_like(found, float(found.detach().mean())), rtol=0, atol=1e-4)


def test_every_place_sees_the_whole_image_in_one_block():
    torch.manual_seed(0)
    net = Terminator(2, (8, 8), widths=(4,), hidden=4, groups=2).eval()
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    net.blocks[0](x)[0, :, 0, 0].sum().backward()
    assert (x.grad[0].abs().sum(0) > 0).all()


def test_one_dimension_and_task_shapes():
    net = Terminator(1, (9,), widths=(4, 4), hidden=4, groups=2)
    net(torch.randn(3, 1, 9)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    made = Terminator.for_task(DataShape("image", "classes", classes=3, channels=1, height=8, width=8), hidden=4)
    assert made(torch.randn(2, 1, 8, 8)).shape == (2, 3)
    assert [branch.slow.size for branch in made.blocks[0].local] == [(k, k) for k in SIDES]


def test_evaluation_standardises_by_running_statistics_or_as_the_authors_by_the_batch():
    torch.manual_seed(0)
    x = 2 + torch.randn(6, 1, 8, 8)
    for running in (True, False):
        net = Terminator(1, (8, 8), widths=(4,), hidden=4, groups=2, running=running)
        trained = net(x)
        net.eval()
        alone = torch.cat([net(part) for part in x.split(1)])
        assert torch.allclose(net(x), alone, atol=1e-5) == running
        assert torch.allclose(net(x), trained, atol=1e-5) != running
        assert any("running" in n for n in net.state_dict()) == running


def test_fewer_local_kernels_are_fewer_branches():
    net = Terminator(1, (8, 8), widths=(4, 8), hidden=4, groups=2, sides=(5, 3))
    assert [branch.slow.size for branch in net.blocks[1].local] == [(5, 5), (3, 3)]
    assert net.blocks[1].bottleneck.in_channels == 8 * 4
    assert net(torch.randn(2, 1, 8, 8)).shape == (2, 10)


def test_errors():
    for wrong in ((4,), (3, 3, 3, 3, 3)):
        with pytest.raises(ValueError, match="expected at most 4 odd numbers"):
            Terminator(1, (8, 8), sides=wrong)
    with pytest.raises(ValueError, match=r"size \(8, 6\); expected"):
        Terminator(1, (8, 6))
    with pytest.raises(ValueError, match="36 channels after 24; expected a multiple"):
        Terminator(1, (8, 8), widths=(24, 36, 72))
    with pytest.raises(ValueError, match="not tokens and tokens"):
        Terminator.for_task(DataShape("tokens", "tokens", vocab=3, length=4))
    with pytest.raises(ValueError, match=r"input \(2, 1, 8\); expected \[batch, 1, 8, 8\]"):
        Terminator(1, (8, 8), widths=(12,), hidden=4)(torch.zeros(2, 1, 8))
