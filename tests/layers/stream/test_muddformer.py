import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interlayer.core.mixer import Cache
from interlayer.core.parts import GLU
from interlayer.core.stream import QKV
from interlayer.layers.stream.muddformer import DynamicWeights, Mixture, MUDDFormer, mixture, widening
from interlayer.models import ConvNet, Encoder, Transformer, VisionTransformer

SIZES = {"vocab": 20, "length": 32, "depth": 5, "width": 16, "heads": 2}


def shaken(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return module


def naive(stream, x, attention, mlps):
    """The paper's equation source by source; everything is kept."""
    q = k = v = r = x
    outputs = [x]
    for i in range(1, stream.depth + 1):
        norm = stream.norms[2 * (i - 1)]
        own = [norm, *stream.kv_norms[str(2 * i - 2)]] if str(2 * i - 2) in stream.kv_norms else [norm] * 3
        h = r + attention[i - 1](own[0](q), own[1](k), own[2](v))
        x = h + mlps[i - 1](stream.norms[2 * i - 1](h))
        outputs.append(x)
        q = k = v = r = x
        if i in stream.sources:
            generator = stream.dynamic[str(i)]
            normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            weights = F.gelu(normed @ generator.up.weight.T) @ generator.down.weight.T
            read = [*stream.sources[i], i]
            ways = []
            for c in range(1 if i == stream.depth else 4):
                n = len(read)
                parts = [
                    (stream.alpha[str(i)][c, at] + weights[..., c * n + at, None]) * outputs[j]
                    for at, j in enumerate(read)
                ]
                ways.append(sum(parts))
            q, k, v, r = ways * 4 if len(ways) == 1 else ways
    return stream.last(r)


def walk(stream, x, attention, mlps):
    state, most = stream.start(x), 0
    for layer in range(stream.layers):
        inputs = stream.read(state, layer)
        if layer % 2:
            branch = mlps[layer // 2](inputs)
        else:
            branch = attention[layer // 2](*(inputs if isinstance(inputs, QKV) else [inputs] * 3))
        state = stream.write(state, layer, branch)
        most = max(most, state.bytes_kept)
    return stream.finish(state), most


class Mixed(nn.Module):
    """A stand-in for attention that treats q, k and v differently."""

    def __init__(self, width):
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, *inputs):
        q, k, v = (f(x) for f, x in zip(self.maps, inputs, strict=True))
        return torch.tanh(q) * k + v.cumsum(1)


@pytest.mark.parametrize(("dilation", "period"), [(1, 1), (2, 1), (1, 2), (3, 3), (2, 3)])
def test_values_and_gradients_equal_the_equation(dilation, period):
    torch.manual_seed(0)
    stream = shaken(MUDDFormer(6, 4, dilation=dilation, period=period)).double()
    attention = [Mixed(4).double() for _ in range(6)]
    mlps = [nn.Linear(4, 4).double() for _ in range(6)]
    x = torch.randn(2, 3, 4, dtype=torch.double, requires_grad=True)
    y, expected = walk(stream, x, attention, mlps)[0], naive(stream, x, attention, mlps)
    torch.testing.assert_close(y, expected)
    wanted = [x, *stream.parameters(), *attention[0].parameters()]
    probe = torch.randn_like(y)
    grads = [torch.autograd.grad((out * probe).sum(), wanted) for out in (y, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")  # of torch's forward mode
def test_averages_have_all_derivatives_and_keep_no_stack():
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, 4, 5), *(torch.randn(2, 3, 6) for _ in range(5))]
    inputs = tuple(x.double().requires_grad_() for x in inputs)
    torch.testing.assert_close(Mixture.apply(*inputs), mixture(*inputs))
    assert torch.autograd.gradcheck(Mixture.apply, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(Mixture.apply, inputs, fast_mode=True)
    line = torch.randn_like(inputs[0])
    got, wanted = (
        torch.func.jvp(lambda w, f=f: f(w, *inputs[1:]), inputs[:1], (line,)) for f in (Mixture.apply, mixture)
    )
    torch.testing.assert_close(got, wanted)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        Mixture.apply(*inputs)
    assert sum(t.numel() for t in kept.values()) == sum(x.numel() for x in inputs)


def test_initialisation_of_the_dynamic_weights():
    torch.manual_seed(0)
    part = DynamicWeights(64, ways=4, sources=8, hidden=128)
    assert part.up.weight.std().item() == pytest.approx(64**-0.5, rel=0.05) and not part.down.weight.any()


def test_it_is_the_plain_transformer_at_the_start():
    plain, mudd = Transformer(**SIZES), Transformer(**SIZES, stream="muddformer")
    missing, extra = mudd.load_state_dict(plain.state_dict(), strict=False)
    assert not extra
    assert all(".stream." in name for name in missing)
    tokens = torch.randint(0, 20, (2, 17))
    torch.testing.assert_close(mudd(tokens), plain(tokens))


def test_the_generators_begin_with_standard_deviation_width_to_the_minus_half_and_zeros():
    torch.manual_seed(0)
    model = Transformer(**SIZES | {"width": 64, "heads": 2, "depth": 8}, stream="muddformer")
    for generator in model.trunk.stream.dynamic.values():
        assert generator.up.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)  # 256 numbers and more
        assert not generator.down.weight.any()


def test_decoding_with_a_cache_equals_the_full_pass_and_stores_what_the_plain_one_stores():
    model = shaken(Transformer(**SIZES, kv_heads=1, stream="muddformer(dilation=2)")).eval()
    tokens = torch.randint(0, 20, (2, 13))
    cache = Cache()
    with torch.no_grad():
        whole = model(tokens)
        steps = [model(tokens[:, :6], cache=cache)]
        steps += [model(tokens[:, i : i + 1], cache=cache) for i in range(6, 13)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)
    assert cache.bytes == 2 * 5 * 13 * 2 * 8 * 4  # k and v of 5 layers: 13 tokens, 2 sequences, one head of 8 floats


@pytest.mark.parametrize(("dilation", "period", "kept"), [(1, 1, 12), (4, 1, 9), (4, 4, 3), (13, 1, 0)])
def test_bytes_kept_are_bounded_by_dilation_and_period(dilation, period, kept):
    stream = MUDDFormer(12, 4, dilation=dilation, period=period)
    blocks = [nn.Linear(4, 4) for _ in range(12)]
    attention = [lambda q, k, v, f=f: f(q) for f in blocks]
    _, most = walk(stream, torch.randn(1, 2, 4), attention, blocks)
    assert most == kept * 8 * 4


def test_every_way_is_its_own():
    torch.manual_seed(0)
    stream = MUDDFormer(3, 4)
    with torch.no_grad():
        stream.alpha["2"].copy_(torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]]))
    state = stream.start(torch.ones(1, 1, 4))
    for layer in range(4):
        stream.read(state, layer)
        state = stream.write(state, layer, torch.full((1, 1, 4), float(10**layer)))
    torch.testing.assert_close(state.x[0, 0, :, 0], torch.tensor([1.0, 12.0, 1112.0, 1125.0]))
    assert torch.equal(stream.matrix("k")[1], torch.tensor([0.0, 1, 0, 0]))
    assert torch.equal(stream.matrix("r")[2], torch.tensor([0.0, 0, 0, 1]))
    assert torch.equal(stream.matrix("q")[2], torch.zeros(4))
    assert stream.figure().axes[0].images[0].get_array()[1, 0] == 1.0


def test_it_works_in_encoders_and_on_images():
    encoder = shaken(Encoder(20, 3, 16, depth=3, width=16, heads=2, stream="muddformer"))
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    tokens = torch.randint(0, 20, (2, 9))
    assert torch.allclose(encoder(tokens, mask=mask)[1:], encoder(tokens[1:, :5]), atol=1e-4)
    vision = VisionTransformer(1, 8, patch=2, depth=3, width=16, heads=2, stream="muddformer")
    assert vision(torch.randn(2, 1, 8, 8)).isfinite().all()


def test_widening_follows_the_rule_and_keeps_the_parameters():
    inner = [widening(128, 6, layer).up.out_features for layer in range(0, 12, 2)]
    assert inner == [256, 384, 512, 512, 640, 768]  # of the authors' code for 512 features and 6 layers
    assert widening(8, 1, 0).up.out_features == 32
    assert [widening(16, 3, i, mlp=GLU, hidden=40, multiple=8).gate.out_features for i in (0, 2, 4)] == [16, 40, 64]
    with pytest.raises(ValueError, match="multiple 0"):
        widening(8, 2, 0, multiple=0)


def test_what_cannot_work_is_refused():
    with pytest.raises(ValueError, match="needs attention"):
        ConvNet(1, 10, depth=8, width=8, stream="muddformer")
    looped = Transformer(**SIZES, stream="muddformer", order="looped")
    with pytest.raises(ValueError, match=r"MUDDFormer: block 1 reads the output of block 0.*sequential"):
        looped(torch.zeros(1, 3, dtype=torch.long))
