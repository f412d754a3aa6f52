import pytest
import torch
import torch.nn.functional as F

from interlayer.core.cost import flops, parameters
from interlayer.layers.stream.sret import SlicedAttention, SlicedRecursive, SReT, conv_stem


def block(**options):
    torch.manual_seed(0)
    made = SlicedRecursive(8, 2, **options).double()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name.endswith(("keep", "add")):
                p.normal_(1, 0.3)
    return made


def masked(layer, x, groups, order):
    """Naive twin: attention over all tokens, with every pair of tokens of different groups masked."""
    count = x.shape[1]
    place = torch.arange(count) if order is None else order.argsort()  # where a token comes to stand
    group = place * groups // count
    q, k, v = layer.attention.project(x)
    same = group[:, None] == group[None]
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=same)
    return layer.attention.out(y.transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("count", "groups"), [(6, 1), (6, 2), (15, 3), (15, 5), (7, 7)])
@pytest.mark.parametrize("permuted", [False, True])
def test_slices_equal_masked_attention(count, groups, permuted):
    torch.manual_seed(1)
    layer = SlicedAttention(8, 2).double()
    x = torch.randn(2, count, 8, dtype=torch.double, requires_grad=True)
    order = torch.randperm(count) if permuted else None
    given, expected = layer(x, groups, order), masked(layer, x, groups, order)
    torch.testing.assert_close(given, expected)
    leaves = [x, *layer.parameters()]
    pairs = [torch.autograd.grad(y.square().sum(), leaves) for y in (given, expected)]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)


def naive(made, x, orders):
    """The equations, written out."""

    def mlp(f, x):
        return F.gelu(x @ f.up.weight.T + f.up.bias) @ f.down.weight.T + f.down.bias

    def norm(part, x):
        return F.layer_norm(x, (8,), part.norm.weight, part.norm.bias, 1e-6)

    for r, groups in enumerate(made.groups):
        a, m, p = made.attend, made.mix, made.projections[r % len(made.projections)]
        x = a.keep * x + a.add * masked(a.branch, norm(a, x), groups, orders[r])
        x = m.keep * x + m.add * mlp(m.branch, norm(m, x))
        x = p.keep * x + p.add * mlp(p.branch, norm(p, x))
    return x


@pytest.mark.parametrize("projections", ["shared", "own"])
def test_the_passes_equal_the_equations(projections):
    made = block(recursions=3, groups=(4, 2), projections=projections).eval()
    x = torch.randn(2, 12, 8, dtype=torch.double)
    dealt = torch.tensor([0, 2, 4, 6, 8, 10, 1, 3, 5, 7, 9, 11])  # every second token into the first group
    torch.testing.assert_close(made(x), naive(made, x, [None, dealt, dealt]))


def test_the_permutation_is_random_in_training_and_undone_for_every_token():
    made = block(recursions=2, groups=(4, 3))
    x = torch.randn(2, 12, 8, dtype=torch.double)
    torch.manual_seed(3)
    given = made.train()(x)
    torch.manual_seed(3)
    torch.testing.assert_close(given, naive(made, x, [None, torch.randperm(12)]))
    assert not torch.allclose(given, made(x))
    made.eval()
    assert torch.equal(made(x), made(x))


def test_tokens_of_different_first_slices_meet_in_a_later_pass():
    x = torch.randn(1, 8, 8, dtype=torch.double, requires_grad=True)

    def reach(recursions):
        made = block(recursions=recursions, groups=(4, 2)).eval()
        (grad,) = torch.autograd.grad(made(x)[0, 0].sum(), x)
        return int((grad.abs().sum(-1) > 0).sum())

    assert reach(1) == 2  # its own slice
    # even tokens are one group of the second pass: tokens 0, 2, 4, 6 with what each had read of its own slice
    assert reach(2) == 8


def test_parameters_do_not_depend_on_recursions():
    counts = {r: parameters(SlicedRecursive(8, 2, recursions=r)) for r in (1, 2, 7)}
    assert len(set(counts.values())) == 1
    # attention 4 D^2 + 4 D, MLP 8 D^2 + 5 D, projection 2 D^2 + 2 D, three norms of 2 D, six coefficients
    assert counts[1] == 14 * 64 + 17 * 8 + 6
    own = parameters(SlicedRecursive(8, 2, recursions=3, projections="own"))
    assert own == counts[1] + 2 * (2 * 64 + 4 * 8 + 2)


def test_slicing_saves_the_scores_of_other_groups():
    x = torch.zeros(1, 16, 8)
    naive, sliced = (flops(SlicedRecursive(8, 2, recursions=2, groups=g), x) for g in ((1,), (4, 2)))
    scores = 4 * 16 * 16 * 8  # q k' and p v of one pass
    assert naive - sliced == scores * (1 - 1 / 4) + scores * (1 - 1 / 2)
    assert naive == 2 * (2 * 16 * 14 * 64 + scores)


def test_the_network_has_the_authors_sizes():
    """Positions and features of each stage for 224 pixels, and the parameters of their smallest network, summed by hand."""
    with torch.device("meta"):
        net = SReT(ratio=3.6, projections="own").eval()
        x, sizes = torch.zeros(1, 3, 224, 224), []
        net.stem.register_forward_hook(lambda m, a, y: sizes.append(tuple(y.shape[1:])))
        for pool in net.pools:
            pool.register_forward_hook(lambda m, a, y: sizes.append(tuple(y.shape[1:])))
        assert net(x).shape == (1, 1000)
    assert sizes == [(64, 28, 28), (128, 14, 14), (256, 7, 7)]

    def one(d):  # a block with two projections: attention, MLP, norms, coefficients
        mlp = lambda h: 2 * d * h + h + d  # noqa: E731
        return 4 * d * d + 4 * d + mlp(int(3.6 * d)) + 4 * d + 4 + 2 * (mlp(d) + 2 * d + 2)

    wanted = 32 * (27 + 1 + 2) + 64 * (9 * 32 + 1 + 2) + 64 * (9 * 64 + 1 + 2) + 64 * 28 * 28
    wanted += 2 * one(64) + 5 * one(128) + 3 * one(256) + 10 * 128 + 10 * 256 + 2 * 256 + 257 * 1000
    assert sum(p.numel() for p in net.parameters()) == wanted


def test_the_network_by_hand():
    torch.manual_seed(0)
    net = (
        SReT(1, 8, classes=3, stem=2, widths=(8, 16), depths=(1, 2), heads=(2, 2), groups=((4, 2), (1,)))
        .double()
        .eval()
    )
    image = torch.randn(2, 1, 8, 8, dtype=torch.double)
    conv, norm, relu = net.stem
    assert conv.stride == (2, 2) and isinstance(relu, torch.nn.ReLU)
    x = norm(conv(image)).relu() + net.position
    x = net.stages[0][0](x.flatten(2).mT).mT.reshape(2, 8, 4, 4)
    weight, bias = net.pools[0].weight, net.pools[0].bias  # [16, 1, 3, 3]: two outputs for each channel
    x = torch.nn.functional.conv2d(x, weight, bias, stride=2, padding=1, groups=8)
    x = net.stages[1](x.flatten(2).mT)
    torch.testing.assert_close(net(image), net.head(net.norm(x.mean(1))))


def test_stems():
    assert [m.stride[0] for m in conv_stem(3, 16, 8) if isinstance(m, torch.nn.Conv2d)] == [2, 2, 2]
    assert [m.out_channels for m in conv_stem(3, 16, 8) if isinstance(m, torch.nn.Conv2d)] == [8, 16, 16]
    for stride in (1, 2, 4):
        assert conv_stem(1, 8, stride)(torch.zeros(2, 1, 16, 16)).shape == (2, 8, 16 // stride, 16 // stride)


def test_clear_errors():
    for wrong, message in (
        ({"depths": (1, 2)}, "one for each stage"),
        ({"stem": 3}, "stem 3 for an image"),
        ({"image": 12}, "multiples of it"),
        ({"image": 40}, "8 groups in stage 0 do not divide its 5 x 5 positions"),
    ):
        with pytest.raises(ValueError, match=message):
            SReT(**wrong)
    with pytest.raises(ValueError, match=r"SReT: image \(2, 1, 8, 9\)"):
        SReT(1, 8, stem=2, widths=(8,), depths=(1,), heads=(2,), groups=((1,),))(torch.zeros(2, 1, 8, 9))
    with pytest.raises(ValueError, match="7 tokens do not divide into 2 groups"):
        SlicedRecursive(8, 2, groups=(1, 2)).eval()(torch.zeros(1, 7, 8))
    with pytest.raises(ValueError, match="recursions 0"):
        SlicedRecursive(8, 2, recursions=0)
    with pytest.raises(ValueError, match="projections 'none'"):
        SlicedRecursive(8, 2, projections="none")
    with pytest.raises(ValueError, match=r"expected \[batch, sequence, 8\]"):
        SlicedRecursive(8, 2)(torch.zeros(1, 8, 9))
