import pytest
import torch
from torch import nn
from torch.nn.functional import layer_norm

from interlayer.core.mixer import Cache
from interlayer.layers.stream.peri_ln import PeriLN
from interlayer.models import MLP, ConvNet, Transformer, VisionTransformer


def walk(stream, x, sublayers):
    state = stream.start(x)
    for layer, f in enumerate(sublayers):
        state = stream.write(state, layer, f(stream.read(state, layer)))
    return state.x, stream.finish(state)


def test_values_and_gradients_equal_the_equation():
    torch.manual_seed(0)
    stream = PeriLN(3, 5, branches=2).double()
    with torch.no_grad():
        for p in stream.parameters():
            p.normal_()
    sublayers = [nn.Linear(5, 5).double() for _ in range(6)]
    x = torch.randn(4, 5, dtype=torch.double, requires_grad=True)

    def norm(x, at):
        return layer_norm(x, (5,), at.weight, at.bias)

    y = norm(x, stream.first)
    for f, before, after in zip(sublayers, stream.norms, stream.output_norms, strict=True):
        y = y + norm(f(norm(y, before)), after)
    y = norm(y, stream.last)
    out = walk(stream, x, sublayers)[1]
    torch.testing.assert_close(out, y)
    wanted = [x, *stream.parameters(), *(p for f in sublayers for p in f.parameters())]
    probe = torch.randn_like(y)
    for a, b in zip(*(torch.autograd.grad((o * probe).sum(), wanted) for o in (out, y)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("gain", [0.1, 1.0, 10.0])
def test_variance_grows_by_one_a_sublayer_whatever_the_weights(gain):
    torch.manual_seed(0)
    sublayers = [nn.Linear(512, 512, bias=False) for _ in range(16)]
    with torch.no_grad():
        for f in sublayers:
            f.weight.mul_(gain)
    x = 5 * torch.randn(64, 512)
    with torch.no_grad():
        for count in (4, 16):
            hidden, _ = walk(PeriLN(count, 512), x, sublayers[:count])
            assert hidden.var(-1).mean().item() == pytest.approx(1 + count, rel=0.03)


def test_decoding_with_a_cache_equals_the_full_pass():
    model = Transformer(vocab=20, length=16, depth=3, width=16, heads=2, stream="peri-ln", norm="rmsnorm").eval()
    tokens, cache = torch.randint(0, 20, (2, 9)), Cache()
    with torch.no_grad():
        steps = [model(tokens[:, i : i + 1], cache=cache) for i in range(9)]
        torch.testing.assert_close(torch.cat(steps, 1), model(tokens))


def test_it_works_in_every_backbone():
    image = torch.randn(2, 1, 8, 8)
    convnet = ConvNet(1, 10, depth=8, width=4, stream="peri-ln", norm="batchnorm")
    assert [n.num_features for n in convnet.stream.output_norms] == [4, 8, 16]
    for model in (convnet, VisionTransformer(1, 8, patch=2, depth=2, width=16, heads=2, stream="peri-ln")):
        model(image).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert MLP(64, 10, depth=3, width=16, stream="peri-ln")(image).isfinite().all()


def test_wrong_widths_are_refused():
    with pytest.raises(ValueError, match="3 widths for 2 sublayers"):
        PeriLN(2, [4, 4, 4])
