import copy

import pytest
import torch
from torch import nn

from interlayer.core import cost
from interlayer.layers.mixing.repghost import PAPER, SMALL, Bottleneck, Ghost, RepGhost, RepGhostNet, SqueezeExcite


def lived_in(module, x):
    """Norms with statistics and weights of their own."""
    torch.manual_seed(0)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias)
    for _ in range(5):
        module.train()(x * 2 + 1)
    return module.eval()


def test_module_is_its_equation():
    torch.manual_seed(0)
    layer, x = RepGhost(3, 4), torch.randn(2, 3, 5, 5)
    x1 = layer.primary[1](layer.primary[0](x)).relu()
    y = layer.cheap[1](nn.functional.conv2d(x1, layer.cheap[0].weight, padding=1, groups=4))
    torch.testing.assert_close(layer(x), (y + layer.branch(x1)).relu())
    linear = RepGhost(3, 4, activation=False)
    assert (linear(x) < 0).any()


@pytest.mark.parametrize("options", [{}, {"kernel": 5}, {"activation": False}, {"branch": False}])
def test_fused_module_has_two_convolutions_and_the_same_outputs(options):
    x = torch.randn(4, 3, 6, 7)
    layer = lived_in(RepGhost(3, 5, **options), x)
    before = copy.deepcopy(layer.state_dict())
    fused = layer.fused()
    assert [type(m) for m in fused if not isinstance(m, nn.ReLU | nn.Identity)] == [nn.Conv2d, nn.Conv2d]
    torch.testing.assert_close(fused(x), layer(x), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), layer.state_dict().values(), strict=True))


def test_branch_goes_to_the_middle_of_the_kernel():
    layer = RepGhost(2, 3).eval()
    nn.init.zeros_(layer.cheap[0].weight)
    layer.branch.running_var.fill_(4.0)
    layer.branch.running_mean.fill_(1.0)
    fused = layer.fused()[2]
    assert torch.allclose(fused.weight[:, 0, 1, 1], torch.full((3,), 0.5), atol=1e-4)
    assert fused.weight.count_nonzero() == 3 and torch.allclose(fused.bias, torch.full((3,), -0.5), atol=1e-4)


@pytest.mark.parametrize("concatenate", [False, True])
def test_fused_network_equals_the_trained_one_without_any_norm(concatenate):
    x = torch.randn(4, 1, 16, 16)
    net = lived_in(RepGhostNet(1, 5, units=SMALL, stem=1, head=32, concatenate=concatenate), x)
    fused = net.fused()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    torch.testing.assert_close(fused(x), net(x), rtol=1e-4, atol=1e-4)


def test_concatenation_twin_costs_as_much():
    x = torch.zeros(1, 24, 14, 14)
    ours, theirs = (cost.flops(Bottleneck(24, 36, 24, concatenate=c), x) for c in (False, True))
    assert theirs <= ours < 1.07 * theirs  # a depthwise kernel over the outputs is the difference


def test_ghost_module_makes_half_from_half():
    layer, x = Ghost(3, 6).eval(), torch.randn(2, 3, 4, 4)
    half = layer.primary(x).relu()
    torch.testing.assert_close(layer(x), torch.cat((half, layer.cheap(half).relu()), 1))
    torch.testing.assert_close(layer.fused()(x), layer(x), rtol=1e-5, atol=1e-5)


def test_squeeze_and_excitation_gates_channels():
    gate, x = SqueezeExcite(8, 0.25), torch.randn(2, 8, 3, 3)
    nn.init.zeros_(gate.up.weight)
    nn.init.zeros_(gate.up.bias)
    torch.testing.assert_close(gate(x), 0.5 * x)
    # A multiple of 4, and no more than a tenth below what was asked for: 9 would be 8.
    assert [SqueezeExcite(c, 0.25).down.out_channels for c in (8, 36, 44, 336)] == [4, 12, 12, 84]


@pytest.mark.parametrize(
    ("width", "millions", "multiply_adds"),
    [(0.5, 2.3, 43), (0.58, 2.5, 60), (0.8, 3.3, 96), (1.11, 4.5, 170), (2.0, 9.8, 516)],
)
def test_papers_network_has_the_authors_sizes(width, millions, multiply_adds):
    with torch.device("meta"):
        net = RepGhostNet(width=width)
        image = torch.zeros(1, 3, 224, 224)
    assert len(PAPER) == 16
    assert cost.parameters(net) / 1e6 == pytest.approx(millions, abs=0.06)  # the authors' table
    assert round(cost.flops(net, image) / 2e6) == multiply_adds


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="kernel 4 is even"):
        RepGhost(2, 3, kernel=4)
    with pytest.raises(ValueError, match="outputs 5 is odd"):
        Ghost(2, 5)
    with pytest.raises(ValueError, match=r"RepGhostNet: input \(2, 3, 8, 8\); expected \[batch, 1, height, width\]"):
        RepGhostNet(1, 2, units=SMALL)(torch.zeros(2, 3, 8, 8))
