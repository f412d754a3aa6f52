import pytest
import torch
from torch import nn

from interlayer.layers.mixing.mlp_mixer import TokenMixing
from interlayer.layers.mixing.pk_mixer import (
    ORDERS,
    PermutedKronecker,
    PKMixer,
    commutation,
    density,
    effective_width,
)


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_commutation_swaps_kronecker_factors():
    a, b, x = draw(2, 3), draw(4, 5), draw(3, 5)
    assert torch.equal(x.flatten()[commutation(3, 5)], x.T.flatten())
    left = torch.kron(a, b)[commutation(2, 4)][:, commutation(3, 5)]
    torch.testing.assert_close(left, torch.kron(b, a))


def test_channel_and_token_mixing_are_the_family():
    torch.manual_seed(0)
    x, w = draw(2, 5, 3), draw(4, 3)
    layer = PermutedKronecker(5, 3, 4, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(w)
    torch.testing.assert_close(layer(x.flatten(1)).view(2, 5, 4), x @ w.T)
    mixing = TokenMixing(5, 7).double()
    pair = [PermutedKronecker(3, 5, 7, order="tokens").double(), PermutedKronecker(3, 7, 5, order="tokens").double()]
    for ours, theirs in zip(pair, (mixing.mlp.up, mixing.mlp.down), strict=True):
        ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(pair[1](nn.functional.gelu(pair[0](x.flatten(1)))).view(2, 5, 3), mixing(x))


@pytest.mark.parametrize("order", ORDERS)
def test_dense_matrix_is_the_layer_in_value_gradient_and_sparsity(order):
    torch.manual_seed(0)
    layer, x, dy = PermutedKronecker(4, 3, 5, order=order, bias=False).double(), draw(6, 12), draw(6, 20)
    wide = layer.dense()
    torch.testing.assert_close(x @ wide.T, layer(x))
    a, b = (torch.autograd.grad(y, layer.weight, dy, retain_graph=True)[0] for y in (layer(x), x @ wide.T))
    torch.testing.assert_close(a, b)
    assert wide.shape == (20, 12) and (wide != 0).sum() == wide.numel() / 4  # a share 1 / n is not zero
    assert (wide != 0).sum(0).eq(5).all() and (wide != 0).sum(1).eq(3).all()


@pytest.mark.parametrize("random", [False, True])
def test_simple_mixer_is_a_wide_mlp(random):
    torch.manual_seed(0)
    net = PKMixer(1, 4, patch=2, classes=3, tokens=6, width=5, depth=2, variant="simple", random=random).double()
    for branch in net.branches:
        nn.init.normal_(branch[0].bias)
    wide, x = net.wide(), draw(3, effective_width(6, 5))
    torch.testing.assert_close(wide(x), net.mix(x))
    matrices = [m.weight for m in wide if isinstance(m, nn.Linear)]
    assert [tuple(w.shape) for w in matrices] == [(30, 30)] * 4
    assert sum((w != 0).sum().item() for w in matrices) == pytest.approx(density(6, 5) * 4 * 900)
    assert sum(p.numel() for b in net.branches for p in (b[0].weight,)) == 2 * (36 + 25)


def test_normal_mixer_by_hand():
    torch.manual_seed(0)
    net = PKMixer(1, 4, patch=2, classes=3, width=6, depth=1).double()
    image = draw(2, 1, 4, 4)
    x = net.patches(image)
    (t1, t2), (c1, c2) = net.branches
    h = nn.functional.gelu(t1.weight @ net.norms[0](x) + t1.bias[:, None])
    x = x + t2.weight @ h + t2.bias[:, None]
    x = x + nn.functional.gelu(net.norms[1](x) @ c1.weight.T + c1.bias) @ c2.weight.T + c2.bias
    torch.testing.assert_close(net(image), net.head(net.norms[2](x).mean(1)))


def test_random_groups_are_kept_with_the_weights():
    a, b = (PKMixer(1, 4, patch=2, classes=3, width=5, depth=1, random=True) for _ in range(2))
    image = torch.randn(2, 1, 4, 4)
    assert not torch.allclose(a(image), b(image))
    b.load_state_dict(a.state_dict())
    torch.testing.assert_close(a(image), b(image))


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="order 'rows', copies 2"):
        PermutedKronecker(2, 3, 4, order="rows")
    with pytest.raises(ValueError, match=r"input \(2, 5\); expected \[..., 6\]"):
        PermutedKronecker(2, 3, 4)(torch.zeros(2, 5))
    with pytest.raises(ValueError, match="variant 'plain' is not one of"):
        PKMixer(variant="plain")
    with pytest.raises(ValueError, match="only variant='simple' is a plain wide MLP"):
        PKMixer(1, 8).wide()
    with pytest.raises(ValueError, match=r"hidden=4\.0 has no effect on variant 'simple'"):
        PKMixer(1, 8, patch=2, width=4, depth=1, variant="simple", hidden=4.0)
