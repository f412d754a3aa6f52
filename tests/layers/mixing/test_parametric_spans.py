import pytest
import torch
import torch.nn.functional as F

from interlayer.layers.mixing.parametric_spans import (
    ParametricSpan,
    Span,
    SpanNet,
    attention,
    convolution,
    dense,
    graph,
    pooling,
)

PLANS = ("matrix", "targets", "sources", "edges")


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def same(ours, theirs, *leaves):
    """Values and the gradients of an uneven sum."""
    torch.testing.assert_close(ours, theirs)
    weights = torch.linspace(-1, 1.3, ours.numel(), dtype=ours.dtype).view_as(ours)
    for a, b in zip(*(torch.autograd.grad((y * weights).sum(), leaves) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("plan", PLANS)
def test_dense_is_a_linear_map(plan):
    x, w = draw(3, 1, 5), draw(4, 5)
    same(dense(5, 4).push(x, w.reshape(20, 1, 1), plan)[:, 0], F.linear(x[:, 0], w), x, w)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(
    "options",
    [{}, {"padding": 1}, {"stride": 2, "padding": 2}, {"dilation": 2}, {"stride": 3, "dilation": 2, "padding": 1}],
)
def test_convolution_strided_padded_and_dilated(plan, options):
    x, w = draw(2, 3, 7, 9), draw(4, 3, 3, 2)
    span = convolution((7, 9), (3, 2), **options)
    ours = span.push(x.flatten(2), w.flatten(2).permute(2, 0, 1), plan)
    same(ours, F.conv2d(x, w, **options).flatten(2), x, w)


@pytest.mark.parametrize("axes", [1, 3])
def test_convolution_over_other_numbers_of_axes(axes):
    x, w = draw(2, 2, *[5] * axes), draw(3, 2, *[3] * axes)
    ours = convolution([5] * axes, 3, padding=1).push(x.flatten(2), w.flatten(2).permute(2, 0, 1))
    same(ours, (F.conv1d, None, F.conv3d)[axes - 1](x, w, padding=1).flatten(2), x, w)


@pytest.mark.parametrize("plan", PLANS)
def test_locally_connected_has_a_kernel_for_each_output(plan):
    x, w = draw(2, 3, 6), draw(5, 3, 4, 3)  # outputs, inputs, sites, kernel
    patches = F.unfold(x[:, :, None], (1, 3), dilation=(1, 1), stride=(1, 1)).view(2, 3, 3, 4)
    ours = convolution((6,), 3, shared=False).push(x, w.permute(2, 3, 0, 1).reshape(12, 5, 3), plan)
    same(ours, torch.einsum("bcky,ocyk->boy", patches, w), x, w)


def test_pooling_is_a_measure_of_mass_one():
    x = draw(2, 3, 6, 6)
    ours = pooling((6, 6), 2, stride=1).push(x.flatten(2), torch.ones(1, dtype=torch.float64))
    same(ours, F.avg_pool2d(x, 2, stride=1).flatten(2), x)


@pytest.mark.parametrize("plan", PLANS)
def test_graph_convolution_with_its_norm_as_measure(plan):
    edges = torch.tensor([[0, 1, 1, 2, 3, 0, 1, 2, 3], [1, 0, 2, 1, 2, 0, 1, 2, 3]])  # loops included
    degree = torch.zeros(4, dtype=torch.float64).index_add(0, edges[1], torch.ones(9, dtype=torch.float64))
    mass = (degree[edges[0]] * degree[edges[1]]).rsqrt()
    adjacency = torch.zeros(4, 4, dtype=torch.float64).index_put((edges[1], edges[0]), mass)
    x, w = draw(2, 3, 4), draw(5, 3)
    same(graph(edges, 4, mass=mass).push(x, w[None], plan), torch.einsum("oc,bcx,yx->boy", w, x, adjacency), x, w)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_a_layer_whose_weights_come_from_the_data(causal):
    q, k, v = draw(2, 5, 4), draw(2, 5, 4), draw(2, 5, 4)
    allowed = torch.ones(5, 5, dtype=torch.bool).tril() if causal else torch.ones(5, 5, dtype=torch.bool)
    weights = (q @ k.transpose(1, 2) / 2).masked_fill(~allowed, -torch.inf).softmax(-1).flatten(1)
    ours = attention(5, 5, causal=causal).push(v.transpose(1, 2), weights).transpose(1, 2)
    same(ours, F.scaled_dot_product_attention(q, k, v, is_causal=causal), q, k, v)
    late = attention(2, 5, causal=True)
    assert late.edges == 9 and (late.source <= late.target + 3).all()


@pytest.mark.parametrize("plan", PLANS)
def test_derivatives_are_layers_of_the_same_span(plan):
    span = convolution((6, 5), 3, stride=2, padding=1)
    span = Span(span.source, span.target, span.weight, span.sizes, torch.rand(span.edges, dtype=torch.float64))
    x, w = draw(2, 3, 30), draw(9, 4, 3)
    y = span.push(x, w, plan)
    dy = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    torch.testing.assert_close(span.adjoint().push(dy, w.transpose(1, 2), plan), dx)
    torch.testing.assert_close(span.weight_gradient(x, dy), dw)


def test_numbers_as_weights_take_the_sparse_way_where_there_are_few_edges():
    edges = torch.tensor([[0, 5, 90], [99, 3, 3]])
    x, w = draw(2, 3, 100), draw(2, 1)
    y = graph(edges, 100).push(x, w)
    assert torch.equal(y.nonzero()[:, 2].unique(), torch.tensor([3, 99]))
    same(y[..., 3], w[:, :1] * (x[..., 5] + x[..., 90]), x, w)


def test_the_plan_follows_the_cost():
    assert dense(16, 16).plan(1, 1) == "matrix"
    assert convolution((32, 32), 3, padding=1).plan(16, 16) == "targets"
    assert convolution((32, 32), 3, stride=1).adjoint().plan(16, 16) in ("targets", "sources")
    assert graph(torch.randint(0, 1000, (2, 5000)), 1000).plan(16, 16) in ("sources", "targets")


def test_layer_equals_torchs_convolution_with_its_weights():
    layer = ParametricSpan(convolution((8, 8), 3, padding=1, stride=2), 2, 4).double()
    x = draw(3, 2, 8, 8)
    w = layer.weight.detach().permute(1, 2, 0).reshape(4, 2, 3, 3)
    torch.testing.assert_close(layer(x.flatten(2)), F.conv2d(x, w, layer.bias, stride=2, padding=1).flatten(2))
    assert list(layer.state_dict()) == ["weight", "bias"]


def test_mistakes_are_refused():
    i = torch.arange(3)
    with pytest.raises(ValueError, match=r"target is torch.int64 \(2,\); expected int64 \[3\]"):
        Span(i, i[:2], i, (3, 3, 3))
    with pytest.raises(ValueError, match="weight goes from 0 to 2; expected 0 to 1"):
        Span(i, i, i, (3, 3, 2))
    with pytest.raises(ValueError, match=r"mass \(2,\)"):
        Span(i, i, i, (3, 3, 3), torch.ones(2))
    with pytest.raises(ValueError, match="does not fit"):
        convolution((4,), 3, dilation=2)
    with pytest.raises(ValueError, match=r"weights \(4, 1, 2\) for input \(2, 1, 2\)"):
        dense(2, 2).push(torch.randn(2, 1, 2), torch.randn(4, 1, 2))
    with pytest.raises(ValueError, match=r"input \(2, 1, 4\); expected \[batch, channels, 5\]"):
        dense(5, 2).push(torch.randn(2, 1, 4), torch.randn(10, 1, 1))
    with pytest.raises(ValueError, match="plan 'fast' is not one of"):
        dense(2, 2).push(torch.randn(2, 1, 2), torch.randn(4, 1, 1), "fast")
    with pytest.raises(ValueError, match="at least 1"):
        ParametricSpan(dense(2, 2), 0)


@pytest.mark.parametrize("image", [(8, 8), (5, 7)])
def test_a_network_of_spans_equals_its_twin_of_torchs_operators(image):
    torch.manual_seed(0)
    net = SpanNet(2, image, 3, width=4, depth=4).double()
    twin = SpanNet(2, image, 3, width=4, depth=4, spans=False).double()
    twin.load_state_dict(net.state_dict())
    x = draw(3, 2, *image)
    y, z = net(x), twin(x)
    torch.testing.assert_close(y, z)
    wanted = torch.autograd.grad(z.square().sum(), (x, *twin.parameters()))
    for a, b in zip(torch.autograd.grad(y.square().sum(), (x, *net.parameters())), wanted, strict=True):
        torch.testing.assert_close(a, b)


def test_locally_connected_layers_share_no_weight():
    net, shared = SpanNet(1, (6, 6), 2, width=2, depth=2, shared=False), SpanNet(1, (6, 6), 2, width=2, depth=2)
    assert [layer.weight.shape[0] for layer in net.layers[::2]] == [36 * 9, 9 * 9]
    assert [layer.weight.shape[0] for layer in shared.layers[::2]] == [9, 9]
    with pytest.raises(ValueError, match="torch has no locally connected layer"):
        SpanNet(shared=False, spans=False)
    with pytest.raises(ValueError, match=r"image \(2, 1, 8, 8\); expected \[batch, 1, 6, 6\]"):
        net(torch.zeros(2, 1, 8, 8))
