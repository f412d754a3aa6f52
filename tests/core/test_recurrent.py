"""Recurrences as mixers: one cache for states, keys and values; mixtures of mixers in one model."""

import pytest
import torch

from interlayer.core import recipe
from interlayer.core.mixer import Cache
from interlayer.core.position import Position, Rotary
from interlayer.core.recurrent import Recurrent
from interlayer.models import Transformer

SIZES = {"vocab": 20, "length": 40, "depth": 3, "width": 16, "heads": 2}
TOKENS = torch.randint(0, 20, (2, 19), generator=torch.Generator().manual_seed(0))


class Mean(Recurrent):
    """The running mean of all tokens, with two tensors as its state."""

    def __init__(self, width):
        super().__init__()
        self.width, self.out = width, torch.nn.Linear(width, width)

    def start(self, batch):
        weight = self.out.weight
        return weight.new_zeros(batch, self.width), weight.new_zeros(batch, 1)

    def run(self, x, state, real=None):
        real = torch.ones_like(x[..., :1]) if real is None else real.unsqueeze(-1).to(x.dtype)
        total = state[0].unsqueeze(1) + (x * real).cumsum(1)
        count = state[1].unsqueeze(1) + real.cumsum(1)
        return self.out(total / count.clamp(min=1)), (total[:, -1], count[:, -1])


def model(mixer):
    torch.manual_seed(0)
    net = Transformer(**SIZES, mixer=mixer).double().eval()
    with torch.no_grad():
        for parameter in net.trunk.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


@pytest.mark.parametrize("mixer", [Mean, "gla", ["gla", "attention"], ["attention", Mean, "gla"]], ids=str)
def test_decoding_equals_the_whole_pass(mixer):
    net, cache = model(mixer), Cache()
    with torch.no_grad():
        whole = net(TOKENS)
        pieces = [net(TOKENS[:, a:b], cache=cache) for a, b in [(0, 5), (5, 6), (6, 7), (7, 13), (13, 19)]]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-9, rtol=1e-7)
        out = net.generate(TOKENS[:, :4], 8)
        assert torch.equal(out[:, 4:], net(out[:, :-1]).argmax(-1)[:, 3:])


@pytest.mark.parametrize("mixer", [Mean, "gla", ["gla", "attention"]], ids=str)
def test_padding_leaves_the_state_as_it_is(mixer):
    net, mask = model(mixer), torch.ones(2, 19, dtype=torch.bool)
    mask[:, 12:] = False
    torch.testing.assert_close(net(TOKENS, mask=mask)[:, :12], net(TOKENS[:, :12]))
    if mixer != ["gla", "attention"]:  # rotary positions count padding on the left
        mask = mask.flip(1)
        torch.testing.assert_close(net(TOKENS, mask=mask)[:, 7:], net(TOKENS[:, 7:]))
        cache = Cache()
        net(TOKENS[:, :10], cache=cache, mask=mask[:, :10])
        torch.testing.assert_close(net(TOKENS[:, 10:], cache=cache, mask=mask), net(TOKENS[:, 7:])[:, 3:])


def test_the_cache_of_a_recurrence_does_not_grow():
    sizes = []
    for mixer in ("gla", ["gla", "attention"]):
        for length in (3, 19):
            cache = Cache()
            model(mixer)(TOKENS[:, :length], cache=cache)
            sizes.append(cache.bytes)
    state = 3 * 2 * 2 * 4 * 8 * 8  # layers, batch, heads, K, V, bytes of a double
    assert sizes[0] == sizes[1] == state
    assert [s - state * 2 // 3 for s in sizes[2:]] == [2 * 2 * 16 * 8 * length for length in (3, 19)]


def test_a_cache_of_another_model_or_batch_is_refused():
    def used(mixer, batch=2):
        cache = Cache()
        model(mixer)(TOKENS[:batch], cache=cache)
        return cache

    for mixer, other, batch, why in (
        ("gla", "attention", 2, "no state of sublayer 0"),
        ("attention", "gla", 2, "no k of sublayer 0"),
        ("gla", Mean, 2, r"a state of sublayer 0 of shapes \[\(2, 16\), \(2, 1\)\] for \[\(2, 2, 4, 8\)\]"),
        ("gla", "gla", 1, "a state of sublayer 0 of shapes"),
        ("attention", "attention", 1, "k of sublayer 0"),
    ):
        with pytest.raises(ValueError, match=f"Cache: 19 tokens are stored, but {why}.*new Cache"):
            model(mixer)(TOKENS[:, :1], cache=used(other, batch))


def test_a_mixture_has_the_positions_of_its_attention():
    assert isinstance(model(["gla", "attention"]).trunk.position, Rotary)
    assert type(model("gla").trunk.position) is Position
    with pytest.raises(ValueError, match=r"position Rotary needs a mixer that offers .*GLA does not"):
        Transformer(**SIZES, mixer="gla", position="rotary")
    with pytest.raises(ValueError, match=r"stream ValueResidual needs a mixer that offers .*GLA does not"):
        Transformer(**SIZES, mixer=["attention", "gla"], stream="value-residual")
    with pytest.raises(ValueError, match="4 mixers for 3 blocks; expected one to 3"):
        Transformer(**SIZES, mixer=["gla"] * 4)


def test_a_mixture_is_saved_and_loaded(tmp_path):
    net = Transformer(**SIZES, mixer=["gla", "attention"]).eval()
    recipe.save(net, tmp_path)
    torch.testing.assert_close(recipe.load(tmp_path).eval()(TOKENS), net(TOKENS))
