"""Gated linear attention: the equation, the authors' numbers, long texts."""

import pytest
import torch
import torch.nn.functional as F

from interlayer.core.cost import peak_bytes
from interlayer.core.scan import gated
from interlayer.layers.sequence.gla import GLA
from interlayer.models import Transformer


def naive(layer, x):
    """The equations, one token and head at a time."""
    size, wide, out = layer.sizes[0] // layer.heads, layer.sizes[2] // layer.heads, []
    q, k, v, swish = (t.unflatten(-1, (layer.heads, -1)) for t in layer.inputs(x).split(layer.sizes, -1))
    gates = (torch.sigmoid(layer.gate(x)) ** (1 / layer.temperature)).unflatten(-1, (layer.heads, -1))
    for b in range(len(x)):
        states, rows = [x.new_zeros(size, wide)] * layer.heads, []
        for t in range(x.shape[1]):
            read = []
            for h in range(layer.heads):
                states[h] = gates[b, t, h, :, None] * states[h] + torch.outer(k[b, t, h], v[b, t, h])
                o = states[h].T @ q[b, t, h] / size**0.5
                normed = o / (o.square().mean() + 1e-5).sqrt() * layer.norm.weight
                read.append(normed * swish[b, t, h] * torch.sigmoid(swish[b, t, h]))
            rows.append(layer.out(torch.cat(read)))
        out.append(torch.stack(rows))
    return torch.stack(out)


@pytest.mark.parametrize("options", [{}, {"expand_k": 1.0, "expand_v": 2.0, "rank": 3, "temperature": 1.0}])
def test_values_and_gradients_of_the_equations(options):
    torch.manual_seed(0)
    layer, x = GLA(12, heads=2, **options).double(), torch.randn(2, 67, 12, dtype=torch.double, requires_grad=True)
    with torch.no_grad():
        layer.norm.weight.uniform_(0.5, 1.5)
    weight = torch.linspace(-1, 1.3, x.numel(), dtype=x.dtype).view(x.shape)
    outs = [layer(x), naive(layer, x)]
    torch.testing.assert_close(*outs)
    grads = [torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()]) for y in outs]
    torch.testing.assert_close(*grads)


def test_numbers_of_the_authors_naive_form():
    """flash-linear-attention, ops/gla/naive.py at commit 0315a70, on these inputs; it scales queries by K^-0.5."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 70, 2, n) for n in (4, 4, 3))
    log_a, state = F.logsigmoid(torch.randn(1, 70, 2, 4)) / 16, torch.randn(1, 2, 4, 3)
    q, k, v, log_a = (t.transpose(1, 2) for t in (q, k, v, log_a))
    for form in ("step", "parallel", "chunked"):
        y, last = gated(q / 2, k, v, log_a, state, form=form)
        wanted = [0.64736, 0.72459, -1.06032, 12.2173, 2.63891, -3.2359, -5.01981, -1.42282, -2.88784]
        torch.testing.assert_close(y[0, 1, [0, 33, 69]].flatten(), torch.tensor(wanted), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last[0, 1, 2], torch.tensor([1.7398, 2.00037, -2.2416]), rtol=1e-4, atol=1e-4)


def test_numbers_of_a_layer_around_the_authors_naive_form():
    """The same with the projections, norm and gate of their layers/gla.py."""
    torch.manual_seed(1)
    layer, x = GLA(16, heads=2), torch.randn(1, 70, 16)
    wanted = [-0.06474, -0.18871, 0.22821, 0.14535, 0.27462, -0.12519, 0.14383, 0.05553, -0.10149]
    torch.testing.assert_close(layer(x)[0, [0, 40, 69], :3].flatten(), torch.tensor(wanted), rtol=1e-4, atol=2e-5)


def test_defaults_of_the_authors():
    layer = GLA(64)
    assert layer.start(1).shape == (1, 4, 8, 16) and layer.gate[0].weight.shape == (16, 64)
    assert layer.temperature == 16 and layer.norm.eps == 1e-5 and layer.gate[1].bias is not None
    blocks = Transformer(vocab=9, length=8, depth=1, width=64, heads=4, mixer="gla").trunk.blocks
    gates = blocks[0].mixer.log_gates(torch.zeros(1, 1, 64))
    torch.testing.assert_close(gates.exp(), torch.full_like(gates, 0.5 ** (1 / 16)))


def test_a_low_precision_layer_keeps_its_memory_in_single_precision():
    layer = GLA(16, heads=2).to(torch.bfloat16)
    assert layer.start(1).dtype == torch.float32
    x = torch.randn(1, 300, 16, dtype=torch.bfloat16)
    y, state = layer.run(x, layer.start(1))
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    wide = layer.float()(x.float())
    assert (y.float() - wide).norm() < 0.02 * wide.norm()


def test_peak_memory_is_linear_in_the_length():
    layer = GLA(32, heads=2)
    with torch.no_grad():
        peaks = [peak_bytes(lambda n=n: layer(torch.zeros(1, n, 32))) for n in (4096, 16384)]
    assert peaks[1] < 4.2 * peaks[0]


def test_clear_errors():
    with pytest.raises(ValueError, match=r"keys of 5 and values of 10 features for 2 heads"):
        GLA(10, heads=2)
    for options in ({"rank": 0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=r"rank .* and temperature .*; expected both above 0"):
            GLA(16, **options)
    with pytest.raises(ValueError, match="needs a causal model"):
        GLA(16, causal=False)
    with pytest.raises(ValueError, match=r"input \(2, 3\); expected \[batch, sequence, 16\]"):
        GLA(16)(torch.zeros(2, 3))
