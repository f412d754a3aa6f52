import pytest
import torch

from interlayer import catalog
from interlayer.core.data import DataShape
from interlayer.core.mixer import Cache
from interlayer.core.order import Sequential
from interlayer.core.stream import Residual
from interlayer.models import MLP, ConvNet, Encoder, Transformer, VisionTransformer, build

STREAMS = ["pre-norm", "post-norm", "residual", *(s.slug for s in catalog.load().values() if s.slot == "stream")]
TOKENS = torch.randint(0, 50, (2, 19), generator=torch.Generator().manual_seed(0))
TINY = {"vocab": 50, "length": 32, "depth": 4, "width": 24, "heads": 3}


@pytest.mark.parametrize("stream", [*STREAMS, "value-residual(mode='shared')"])
@pytest.mark.parametrize("kv_heads", [3, 1])
def test_decoding_with_a_cache_equals_the_full_pass(stream, kv_heads):
    model = Transformer(**TINY, stream=stream, kv_heads=kv_heads).double().eval()
    with torch.no_grad():
        for parameter in model.trunk.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        full = model(TOKENS)
        cache = Cache()
        pieces = [model(TOKENS[:, a:b], cache=cache) for a, b in [(0, 5), (5, 6), (6, 13), (13, 19)]]
    torch.testing.assert_close(torch.cat(pieces, 1), full, atol=1e-9, rtol=1e-7)


def test_a_causal_model_does_not_look_ahead_and_an_encoder_does():
    causal, encoder = Transformer(**TINY), Encoder(**TINY)
    changed = TOKENS.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 50
    torch.testing.assert_close(causal(TOKENS)[:, :-1], causal(changed)[:, :-1])
    assert not torch.allclose(encoder(TOKENS)[:, :-1], encoder(changed)[:, :-1])


def test_padding_changes_nothing():
    model = Encoder(**TINY, classes=3).eval()
    mask = torch.ones(2, 19, dtype=torch.bool)
    mask[:, 12:] = False
    torch.testing.assert_close(model(TOKENS, mask=mask), model(TOKENS[:, :12]))


def test_padding_is_refused_by_a_mixer_that_knows_nothing_of_it():
    class Mean(torch.nn.Module):
        def forward(self, x):
            return x.mean(1, keepdim=True).expand_as(x)

    with pytest.raises(ValueError, match="Mean mixer takes no padding mask"):
        Encoder(**TINY, classes=3, mixer=Mean)(TOKENS, mask=torch.ones(2, 19, dtype=torch.bool))


def test_generation_repeats_itself_greedily():
    model = Transformer(**TINY)
    out = model.generate(TOKENS[:, :4], 8)
    assert out.shape == (2, 12)
    torch.testing.assert_close(out[:, 4:], model(out[:, :-1]).argmax(-1)[:, 3:])


@pytest.mark.parametrize(
    "options",
    [
        {"mlp": "glu"},
        {"position": "learned"},
        {"position": "sinusoidal"},
        {"position": "none"},
        {"activation": "silu"},
        {"order": "looped(times=2)"},
        {"norm": "none"},
    ],
)
def test_every_slot_takes_its_parts(options):
    model = Transformer(**TINY, **options)
    model(TOKENS).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_looped_stack_runs_twice_and_refuses_a_cache():
    once, twice = (Transformer(**TINY, order=f"looped(times={n})") for n in (1, 2))
    twice.load_state_dict(once.state_dict())
    assert not torch.allclose(once(TOKENS), twice(TOKENS))
    with pytest.raises(ValueError, match="Looped order cannot use a cache"):
        twice(TOKENS, cache=Cache())


def test_a_stream_is_told_of_heads_and_key_value_heads():
    told = {}

    def stream(depth, branches, heads, kv_heads):
        told.update(depth=depth, branches=branches, heads=heads, kv_heads=kv_heads)
        return Residual(depth, branches=branches)

    Transformer(vocab=5, length=8, depth=3, width=16, heads=4, kv_heads=2, stream=stream)
    assert told == {"depth": 3, "branches": 2, "heads": 4, "kv_heads": 2}


def test_the_order_of_blocks_is_told_whether_the_model_is_causal():
    told = []

    def order(depth, causal):
        told.append((depth, causal))
        return Sequential(depth)

    Transformer(vocab=5, length=8, depth=2, width=16, heads=4, order=order)
    VisionTransformer(1, 8, patch=2, depth=3, width=16, heads=2, order=order)
    assert told == [(2, True), (3, False)]


def test_config_builds_the_same_model_again():
    torch.manual_seed(0)
    model = Transformer(50, depth=2, width=24, heads=3, stream="rezero")
    assert model.config == {"vocab": 50, "depth": 2, "width": 24, "heads": 3, "stream": "rezero"}
    again = Transformer(**model.config)
    again.load_state_dict(model.state_dict())


@pytest.mark.parametrize("depth", [8, 20])
def test_convnet_stages(depth):
    model = ConvNet(1, 10, depth=depth, width=8)
    assert len(model.blocks) == (depth - 2) // 2
    assert model(torch.randn(2, 1, 9, 7)).shape == (2, 10)
    weighted = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(weighted) == depth


@pytest.mark.parametrize(
    ("base", "shape"),
    [
        ("transformer(depth=2)", DataShape("tokens", "tokens", vocab=50, length=32)),
        ("transformer(depth=2, length=64)", DataShape("tokens", "tokens", vocab=50, length=32)),
        ("resnet18(width=8)", DataShape("image", "classes", channels=1, height=8, width=8, classes=10)),
        ("mobilenetv3", DataShape("image", "classes", channels=1, height=8, width=8, classes=10)),
        ("encoder", DataShape("tokens", "classes", vocab=50, length=32, classes=3)),
        ("vit", DataShape("image", "classes", channels=1, height=8, width=8, classes=10)),
        ("mlp", DataShape("image", "classes", channels=1, height=8, width=8, classes=10)),
        ("convnet(depth=8)", DataShape("image", "classes", channels=1, height=8, width=8, classes=10)),
        ("mlp-mixer", DataShape("image", "classes", channels=1, height=8, width=8, classes=10)),
        ("mlp", DataShape("series", "values", length=12, features=2, classes=3)),
    ],
)
def test_build_fits_the_task(base, shape):
    model = build(base, shape)
    x = {
        "tokens": torch.zeros(2, 32, dtype=torch.long),
        "image": torch.zeros(2, 1, 8, 8),
        "series": torch.zeros(2, 12, 2),
    }[shape.kind]
    assert model(x).shape == ((2, 32, 50) if shape.outputs == "tokens" else (2, shape.classes))


def test_clear_errors():
    with pytest.raises(ValueError, match=r"no base 'transfomer'. Did you mean 'transformer'"):
        build("transfomer", DataShape("tokens", "tokens", vocab=5, length=5))
    with pytest.raises(ValueError, match="'convnet' cannot take tokens"):
        build("convnet", DataShape("tokens", "tokens", vocab=5, length=5))
    with pytest.raises(ValueError, match=r"no slot or size 'strem'. Did you mean 'stream'"):
        Transformer(strem="rezero")
    with pytest.raises(ValueError, match="40 tokens, but the model was built for length=32"):
        Transformer(**TINY)(torch.zeros(1, 40, dtype=torch.long))
    with pytest.raises(TypeError, match="expected int64"):
        Transformer(**TINY)(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="needs attention"):
        MLP(4, 2, stream="value-residual")
    with pytest.raises(ValueError, match=r"6 n"):
        ConvNet(depth=21)
    with pytest.raises(ValueError, match="does not divide"):
        VisionTransformer(1, 9, patch=2)
    with pytest.raises(ValueError, match="expected 64"):
        MLP(64, 10)(torch.zeros(2, 63))
