"""i-RevNet: the equation, the inverse, the authors' numbers, memory."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interlayer.core.cost import bytes_kept, parameters
from interlayer.core.fit import fit
from interlayer.layers.reversible.i_revnet import IRevNet, squeeze, unsqueeze


def lived_in(net, seed=0):
    """Norms with weights and statistics of their own."""
    torch.manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net.eval()


def branch(unit, x):
    """F, written out."""
    layers = list(unit.branches[0])
    if isinstance(layers[0], nn.BatchNorm2d):
        x = layers[1](layers[0](x))
        layers = layers[2:]
    one, norm1, _, two, drop, norm2, _, three = layers
    x = F.conv2d(x, one.weight, stride=unit.stride, padding=1)
    x = F.conv2d(norm1(x).relu(), two.weight, padding=1)
    return F.conv2d(norm2(drop(x)).relu(), three.weight, padding=1)


@pytest.mark.parametrize("side", [1, 2, 4])
def test_down_sampling_moves_squares_into_channels_and_back(side):
    x = torch.randn(2, 3, 8, 12)
    y = squeeze(x, side)
    assert y.shape == (2, 3 * side**2, 8 // side, 12 // side)
    assert torch.equal(unsqueeze(y, side), x)
    assert torch.equal(y[1, :, 1, 2], x[1, :, side : 2 * side, 2 * side : 3 * side].permute(1, 2, 0).flatten())


@pytest.mark.parametrize("widths", [None, (8, 32)])
def test_features_are_equation_1(widths):
    net = lived_in(IRevNet(1, 5, blocks=(2, 2), strides=(1, 2), widths=widths, down=2, ratio=1)).double()
    image = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    pixels = squeeze(image, 2)
    x, tilde = F.pad(pixels, (0, 0, 0, 0, net.padding, 0)).chunk(2, 1)
    for unit in net.units:
        x, tilde = squeeze(tilde, unit.stride), squeeze(x, unit.stride) + branch(unit, tilde)
    features = torch.cat((x, tilde), 1)
    torch.testing.assert_close(net.features(image), features)
    torch.testing.assert_close(list(net.trajectory(image))[-1], features)
    logits = net.head(net.norm(features).relu().mean((2, 3)))
    torch.testing.assert_close(net(image), logits)


def test_numbers_of_the_authors_code_for_a_bijective_network():
    """jhjacobsen/pytorch-i-revnet at commit 61b4b49, nBlocks 2 2, nStrides 2 2, nChannels 24 96, init_ds 2, made from the same seed."""
    torch.manual_seed(3)
    net = IRevNet(3, 7, blocks=(2, 2), strides=(2, 2), widths=None, down=2, dropout=0.0)
    assert parameters(net) == 84883
    torch.manual_seed(4)
    x = torch.randn(4, 3, 16, 16)
    F.cross_entropy(net(x), torch.arange(4)).backward()
    norms = [p.grad.norm() for p in (net.units[0].branches[0][0].weight, net.head.weight)]
    torch.testing.assert_close(torch.stack(norms), torch.tensor([0.343929, 2.416976]), rtol=1e-4, atol=0)
    net.eval()  # with the statistics that this one pass left
    features = net.features(x)
    torch.testing.assert_close(net(x)[0, :3], torch.tensor([0.421982, -0.281645, -0.000470]), rtol=1e-4, atol=1e-5)
    wanted = torch.tensor([-1.190619, 0.841387, -0.156889])
    torch.testing.assert_close(features[1, [0, 50, 150], 1, 0], wanted, rtol=1e-4, atol=1e-5)


def test_numbers_of_the_authors_code_for_a_padded_image():
    """The same with nChannels 8 32, nStrides 1 2 and init_ds 0, given an image of 16 channels of which the first 13 are zero."""
    torch.manual_seed(0)
    net = lived_in(IRevNet(3, 10, blocks=(2, 2), strides=(1, 2), widths=(8, 32)))
    assert net.padding == 13
    torch.manual_seed(1)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(net(x)[0, :3], torch.tensor([-0.280671, -0.045925, 0.081807]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        net.features(x)[1, [0, 30, 60], 3, 2], torch.tensor([0.235758, 0.023117, -0.052523]), rtol=1e-4, atol=1e-5
    )


def test_sizes_of_the_authors_networks():
    with torch.device("meta"):
        assert parameters(IRevNet()) == 6_274_826
        net = IRevNet(3, 1000, blocks=(6, 16, 72, 6), strides=(2, 2, 2, 2), widths=None, down=2, dropout=0.0)
    assert parameters(net) == 125_120_356 and net.norm.momentum == 0.9
    assert (net.head.in_features, net.scale, net.padding) == (3 * 32 * 32, 32, 0)
    assert sum(len(list(unit.branches[0])) > 8 for unit in net.units) == 99  # all but the first begin with a norm


@pytest.mark.parametrize(
    "options",
    [
        {"widths": None, "down": 2, "strides": (1, 2, 2), "blocks": (4, 4, 4), "ratio": 0.5},
        {"widths": (8, 32, 128), "strides": (1, 2, 2), "blocks": (4, 4, 4)},
    ],
    ids=["bijective", "injective"],
)
def test_images_come_back_from_the_last_layer(options):
    net, x = lived_in(IRevNet(1, 10, **options)), torch.randn(3, 1, 16, 16)
    with torch.no_grad():
        assert (net.inverse(net.features(x)) - x).norm() < 1e-5 * x.norm()
        exact, wide = copy.deepcopy(net).double(), x.double()
        torch.testing.assert_close(exact.inverse(exact.features(wide)), wide, rtol=1e-11, atol=1e-11)
        z = torch.randn_like(net.features(x))  # not the features of an image that was given
        there_and_back = (net.features(net.inverse(z)) - z).norm() / z.norm()
    assert there_and_back < 1e-5 if options["widths"] is None else there_and_back > 0.1


def test_training_with_activations_made_again_follows_the_ordinary_one():
    torch.manual_seed(0)
    net = IRevNet(1, 10, blocks=(2, 2), strides=(1, 2), widths=(4, 16), down=2, ratio=2).double()
    twin = copy.deepcopy(net)
    twin.recompute = False
    x, y = torch.randn(3, 8, 1, 8, 8, dtype=torch.float64), torch.arange(24).view(3, 8) % 10
    losses = [
        fit(each, zip(x, y, strict=True), lambda m, b: F.cross_entropy(m(b[0]), b[1]), steps=3, lr=1e-2)
        for each in (net, twin)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    torch.testing.assert_close(dict(net.state_dict()), dict(twin.state_dict()), rtol=1e-6, atol=1e-8)


def test_kept_bytes_are_flat_in_depth():
    x = torch.randn(2, 1, 16, 16)

    def kept(depth, **options):
        net = IRevNet(1, 10, blocks=(depth, depth), strides=(1, 2), widths=(8, 32), **options)
        return bytes_kept(net, lambda: net(x))

    assert kept(6) == kept(2) and kept(6, recompute=False) > 2.5 * kept(2, recompute=False)


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match=r"IRevNet: 3 channels to split; expected an even number. Set down=2"):
        IRevNet(3, 10, widths=None)
    with pytest.raises(ValueError, match=r"stage 1 has width 32; expected 64, stride 2 squared times the 16 before it"):
        IRevNet(3, 10, widths=(16, 32, 256))
    with pytest.raises(ValueError, match=r"stage 0 has width 4; .* at least the 12 channels of the image"):
        IRevNet(3, 10, widths=(4, 16, 64), down=2)
    with pytest.raises(ValueError, match="expected as many of each, and at least one unit in a stage"):
        IRevNet(3, 10, blocks=(2, 2))
    net = IRevNet(3, 10, blocks=(1, 1), strides=(1, 2), widths=(4, 16))
    for shape in ((2, 1, 8, 8), (2, 3, 7, 8), (2, 3, 0, 8), (3, 8, 8)):
        with pytest.raises(ValueError, match=r"expected \[batch, 3, height, width\] with sides that 2 divides"):
            net(torch.zeros(shape))
    with pytest.raises(RuntimeError, match="training mode"):
        net.inverse(torch.zeros(2, 32, 4, 4))
    with pytest.raises(ValueError, match=r"features \(2, 16, 4, 4\); expected \[batch, 32, height, width\]"):
        net.eval().inverse(torch.zeros(2, 16, 4, 4))
