"""RMSNorm against the equation, torch's own, and the invariances that the paper names."""

import pytest
import torch
from torch import nn

from interlayer.layers.norm.rmsnorm import RMS, RMSNorm, rms_norm_naive
from interlayer.models import Transformer


def fast(x, w):
    return RMS.apply(x, w, 1e-6)[0]


def naive(x, w):
    return rms_norm_naive(x, w, x.shape[-1], 1e-6)


def pair(shape, dtype=torch.float64):
    """Value and gradients by the fast path and by the naive twin."""
    x0 = torch.randn(shape, dtype=dtype)
    w0, dy = torch.randn(shape[-1], dtype=dtype), torch.randn(shape, dtype=dtype)
    got = []
    for f in (fast, naive):
        x, w = x0.clone().requires_grad_(), w0.clone().requires_grad_()
        y = f(x, w)
        y.backward(dy)
        got.append((y.detach(), x.grad, w.grad))
    return got


@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (3, 5, 2, 17), (0, 8), (11,), (2051, 64)])
def test_fast_path_equals_the_equation_with_every_gradient(shape):
    torch.manual_seed(0)
    for got, wanted in zip(*pair(shape), strict=True):
        torch.testing.assert_close(got, wanted)


def test_partial_norm_takes_the_first_features_alone():
    torch.manual_seed(0)
    x = torch.randn(4, 10, dtype=torch.float64)
    y = RMSNorm(10, partial=0.3, eps=0.0).double()(x)
    torch.testing.assert_close(y, x / x[:, :3].square().mean(1, keepdim=True).sqrt())


def test_strided_inputs_and_float32():
    x = torch.randn(6, 10, 4).transpose(0, 2)  # [4, 10, 6], last dimension not contiguous
    norm = RMSNorm(6)
    torch.testing.assert_close(norm(x), rms_norm_naive(x, norm.weight, 6, 1e-6))


def test_equals_torch():
    torch.manual_seed(0)
    x = torch.randn(5, 9, 16)
    for eps in (None, 1e-6, 1e-2):
        torch.testing.assert_close(RMSNorm(16, eps=eps)(x), nn.RMSNorm(16, eps=eps)(x))


def test_first_and_second_derivatives():
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fast, (x, w))
    assert torch.autograd.gradgradcheck(fast, (x, w))


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # of torch's forward mode
def test_function_transforms():
    torch.manual_seed(0)
    norm = RMSNorm(6).double()
    x = torch.randn(4, 3, 6, dtype=torch.float64)
    torch.testing.assert_close(torch.func.vmap(norm)(x), norm(x))
    wanted = torch.func.jacrev(lambda x: naive(x, norm.weight))(x[0])
    torch.testing.assert_close(torch.func.jacrev(norm)(x[0]), wanted)
    weights = torch.randn(4, 6, dtype=torch.float64)
    each = [  # a gradient for each example, as in differential privacy
        torch.func.vmap(torch.func.grad(lambda w, x, f=f: f(x, w).sin().sum(), argnums=(0, 1)))(weights, x)
        for f in (fast, naive)
    ]
    torch.testing.assert_close(*each)
    directions = torch.randn_like(x), torch.randn_like(weights)
    for given, lines in (
        ((x[0], weights[0]), tuple(d[0] for d in directions)),
        ((x, weights[0]), (directions[0], weights[1])),
    ):
        got, wanted = (torch.func.jvp(f, given, lines) for f in (fast, naive))
        torch.testing.assert_close(got, wanted)
    got, wanted = (torch.func.jvp(lambda x, f=f: f(x, weights[0]), (x,), directions[:1]) for f in (fast, naive))
    torch.testing.assert_close(got, wanted)
    hessians = [torch.func.hessian(lambda x, f=f: f(x, weights[0]).sin().sum())(x[0]) for f in (fast, naive)]
    torch.testing.assert_close(*hessians)
    many = torch.func.vmap(fast)(x, weights)
    torch.testing.assert_close(many[2], fast(x[2], weights[2]))


@pytest.mark.parametrize("partial", [1.0, 0.25])
def test_rescaling_of_inputs_and_weights_changes_nothing_but_a_shift_does(partial):
    torch.manual_seed(0)
    norm = RMSNorm(32, partial=partial, eps=0.0).double()
    linear = nn.Linear(8, 32, bias=False).double()
    x = torch.randn(5, 8, dtype=torch.float64)
    y = norm(linear(x))
    torch.testing.assert_close(norm(linear(37 * x)), y)
    with torch.no_grad():
        linear.weight.mul_(0.01)
    torch.testing.assert_close(norm(linear(x)), y)
    assert (norm(linear(x) + 1) - y).abs().max() > 0.1  # LayerNorm would not notice
    torch.testing.assert_close(nn.LayerNorm(32, eps=0.0).double()(y + 1), nn.LayerNorm(32, eps=0.0).double()(y))


def test_a_vector_as_small_as_eps_comes_out_shorter():
    x = torch.full((4,), 1e-3)
    torch.testing.assert_close(RMSNorm(4)(x), torch.full((4,), 0.5**0.5))
    assert torch.equal(RMSNorm(4)(torch.zeros(4)), torch.zeros(4))


def test_gradient_shrinks_as_the_weights_grow():
    """Section 4: the gradient with respect to the weights is inversely proportional to their scale."""
    torch.manual_seed(0)
    x, target = torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    norm = RMSNorm(6, eps=0.0).double()
    grads = []
    for scale in (1.0, 10.0):
        w = (scale * torch.ones(6, 8, dtype=torch.float64).tril()).requires_grad_()
        (norm(x @ w.T) * target).sum().backward()
        grads.append(w.grad)
    torch.testing.assert_close(grads[0], 10 * grads[1])


def test_partial_statistic_sees_only_the_first_part():
    norm = RMSNorm(10, partial=0.25, eps=0.0)
    assert norm.first == 3  # ceil(2.5)
    assert RMSNorm(100, partial=0.07).first == 7
    x = torch.cat((torch.full((3,), 2.0), torch.arange(7.0)))
    torch.testing.assert_close(norm(x), x / 2)


def test_low_precision_is_computed_in_float32():
    x = torch.full((2, 4096), 300.0, dtype=torch.float16)  # the square overflows float16
    y = RMSNorm(4096)(x)
    assert y.dtype == torch.float16 and torch.equal(y, torch.ones_like(y))
    half = RMSNorm(64).bfloat16()
    x = torch.randn(8, 64).bfloat16()
    torch.testing.assert_close(half(x), RMSNorm(64)(x.float()).bfloat16())


def test_bias_and_mistakes():
    norm = RMSNorm(4, bias=True)
    with torch.no_grad():
        norm.bias.fill_(3.0)
    assert torch.equal(norm(torch.zeros(2, 4)), torch.full((2, 4), 3.0))
    assert "partial=1.0" in repr(norm) and RMSNorm(4).bias is None
    with pytest.raises(ValueError, match="RMSNorm"):
        norm(torch.zeros(2, 5))
    for wrong in (0.0, 1.5):
        with pytest.raises(ValueError, match="partial"):
            RMSNorm(4, partial=wrong)


def test_fills_the_norm_slot():
    model = Transformer(vocab=11, length=8, depth=1, width=16, heads=2, norm="rmsnorm(partial=0.5)")
    norms = [m for m in model.modules() if isinstance(m, RMSNorm)]
    assert len(norms) == 3 and norms[0].first == 8
    model(torch.zeros(2, 5, dtype=torch.long)).sum().backward()
    assert all(n.weight.grad is not None for n in norms)
