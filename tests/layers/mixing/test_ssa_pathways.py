import math

import pytest
import torch
import torch.nn.functional as F

from interlayer.core.cost import flops
from interlayer.core.mixer import Attention, Cache, Context
from interlayer.core.schedule import progress
from interlayer.layers.mixing.ssa_pathways import SSA, ensemble, layers, resampled
from interlayer.models import Encoder, Transformer

SIZES = {"vocab": 20, "length": 32, "depth": 2, "width": 16, "heads": 4}


def pathways(layer, length):
    """The next sample as [S, S]: whether token i may read token j, the causal mask aside."""
    token, asks = layer.deal(length, "cpu")
    group = asks // token.shape[1]
    assert torch.equal(token.flatten()[asks], torch.arange(length))  # each token asks in one slot, its own
    seen = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        seen[i, token[group[i]]] = True
    return seen


def naive(layer, x, mask=None):
    """The same sample as a mask over dense attention, score by score."""
    length = x.shape[1]
    allowed = pathways(layer, length)
    if layer.causal:
        allowed = allowed.tril()
    if mask is not None:
        allowed = allowed & mask[:, None, None]
    q, k, v = layer.project(x)
    k, v = (t.repeat_interleave(layer.heads // layer.kv_heads, 1) for t in (k, v))
    scores = (q @ k.transpose(-1, -2) / math.sqrt(layer.head_width)).masked_fill(~allowed, -math.inf)
    return layer.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sampler", ["unbiased", "local"])
@pytest.mark.parametrize(("length", "sampling"), [(16, 1 / 4), (13, 1 / 4), (17, 1 / 2), (5, 1 / 3), (7, 1 / 8)])
def test_groups_equal_the_same_sample_as_a_mask_over_dense_attention(length, sampling, sampler, causal):
    torch.manual_seed(0)
    layer = SSA(8, 4, kv_heads=2, sampling=sampling, sampler=sampler, causal=causal).double()
    x = torch.randn(3, length, 8, dtype=torch.double, requires_grad=True)
    probe = torch.randn_like(x)
    results = []
    for way in (layer, lambda x: naive(layer, x)):
        torch.manual_seed(7)
        y = way(x)
        results.append((y, *torch.autograd.grad((y * probe).sum(), [x, *layer.parameters()])))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow)


@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_left_out_of_the_groups(causal):
    torch.manual_seed(0)
    layer = SSA(8, 2, sampling=1 / 4, sampler="unbiased", causal=causal).double()
    x = torch.randn(2, 13, 8, dtype=torch.double, requires_grad=True)
    mask = torch.arange(13) < torch.tensor([[13], [5]])  # some groups of the second are nothing but padding
    ways = []
    for way in (lambda: layer(x, Context(mask=mask)), lambda: naive(layer, x, mask)):
        torch.manual_seed(3)
        y = way()[mask]
        ways.append((y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])))
    for fast, slow in zip(*ways, strict=True):
        torch.testing.assert_close(fast, slow)
        assert fast.isfinite().all()


@pytest.mark.parametrize("length", [12, 14])
def test_unbiased_sampling_meets_every_other_token_equally_often(length):
    torch.manual_seed(0)
    layer, draws = SSA(8, 2, sampling=1 / 4, sampler="unbiased"), 2000
    size = math.ceil(length / 4)
    often = sum(pathways(layer, length).double() for _ in range(draws)) / draws
    assert torch.equal(often.diagonal(), torch.ones(length, dtype=torch.double))
    wanted = (size - 1) / (length - 1)
    others = often[~torch.eye(length, dtype=torch.bool)]
    assert (others - wanted).abs().max() < 5 * math.sqrt(wanted * (1 - wanted) / draws)
    assert others.mean() == pytest.approx(wanted)  # every token sees the same number, so that the mean is exact


def test_local_sampling_meets_near_tokens_more_often_and_far_ones_too():
    torch.manual_seed(0)
    layer = SSA(8, 2, sampling=1 / 4, spread=0.5)
    often = sum(pathways(layer, 32).double() for _ in range(1000)) / 1000
    by_distance = torch.stack([often.diagonal(d).mean() for d in (1, 4, 8, 12)])
    assert (by_distance.diff() < -0.05).all()
    assert by_distance[-1] > 0.01
    even = often.diagonal(1)
    assert even.max() - even.min() < 0.15  # no border between windows stays where it is


def test_without_spread_local_groups_are_windows_at_a_random_border():
    torch.manual_seed(0)
    layer = SSA(8, 2, sampling=1 / 4, spread=0.0)
    starts = set()
    for _ in range(50):
        token, _ = layer.deal(16, "cpu")
        for group in token:
            gaps = [*group.diff().tolist(), int(group[0] + 16 - group[-1])]
            assert sorted(gaps) == [1, 1, 1, 13]  # neighbours on the ring
        starts.add(int(token[0, 0]))
    assert len(starts) > 5


@pytest.mark.parametrize("sampler", ["unbiased", "local"])
def test_the_causal_form_does_not_leak_the_future(sampler):
    torch.manual_seed(0)
    layer = SSA(8, 2, sampling=1 / 2, sampler=sampler, causal=True)
    for draw in range(20):
        x = torch.randn(1, 11, 8, requires_grad=True)
        torch.manual_seed(draw)
        (reach,) = torch.autograd.grad(layer(x)[0, 6].sum(), x)
        assert (reach[0, 7:] == 0).all()
        assert (reach[0, 6] != 0).any()


def test_layers_and_steps_draw_anew_and_a_seed_repeats_them():
    torch.manual_seed(0)
    model = Transformer(**SIZES, mixer="ssa-pathways")
    tokens = torch.randint(0, 20, (2, 19))
    a, b = model(tokens), model(tokens)
    assert not torch.allclose(a, b)
    torch.manual_seed(1)
    first, second = (layer.deal(19, "cpu")[0] for layer in layers(model))
    assert not torch.equal(first, second)
    outs = []
    for _ in range(2):
        torch.manual_seed(2)
        outs.append(model(tokens))
    assert torch.equal(*outs)


def test_in_evaluation_it_is_dense_attention_and_full_sampling_too():
    torch.manual_seed(0)
    layer, dense = SSA(8, 2, causal=True), Attention(8, 2, causal=True)
    dense.load_state_dict(layer.state_dict())
    x = torch.randn(2, 9, 8)
    torch.testing.assert_close(layer.eval()(x), dense(x))
    layer.train().current = 1.0
    torch.testing.assert_close(layer(x), dense(x))


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_decoding_with_a_cache_equals_the_full_pass(kv_heads):
    torch.manual_seed(0)
    model = Transformer(**SIZES, kv_heads=kv_heads, mixer="ssa-pathways(sampling=0.25)").eval()
    tokens = torch.randint(0, 20, (2, 13))
    cache = Cache()
    with torch.no_grad():
        steps = [model(tokens[:, :4], cache=cache)]
        steps += [model(tokens[:, i : i + 1], cache=cache) for i in range(4, 13)]
        torch.testing.assert_close(torch.cat(steps, 1), model(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stream", ["lime", "muddformer", "value-residual(mode='shared')"])
def test_streams_that_hand_over_queries_keys_or_values_go_with_it(stream):
    torch.manual_seed(0)
    ours, plain = (Transformer(**SIZES, stream=stream, mixer=mixer) for mixer in ("ssa-pathways", "attention"))
    plain.load_state_dict(ours.state_dict())
    tokens = torch.randint(0, 20, (2, 13))
    assert not torch.allclose(ours(tokens), plain(tokens))
    torch.testing.assert_close(ours.eval()(tokens), plain.eval()(tokens))


@pytest.mark.parametrize(("sampling", "groups"), [(1 / 2, 2), (1 / 4, 4), (1 / 8, 8), (0.3, 3)])
def test_attention_flops_fall_as_one_over_the_groups(sampling, groups):
    layer = SSA(8, 2, sampling=sampling)
    x = torch.randn(1, 48, 8)
    maps = 2 * 48 * 8 * 8 * 4
    dense = flops(layer, x) - maps
    assert dense == 4 * 48 * 48 * 8
    with resampled(layer):
        assert (flops(layer, x) - maps) * groups == dense


def test_annealing_rises_geometrically_to_dense():
    def seen(model, *shares):
        found = []
        for share in shares:
            progress(model, share)
            found.append(layers(model)[1].current)
        return found

    model = Transformer(**SIZES, mixer="ssa-pathways(sampling=0.0625, rise=(0.5, 0.9))")
    assert seen(model, 0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 0.5) == pytest.approx(
        [1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 1, 1 / 16]
    )
    assert {layer.sampling for layer in layers(model)} == {1 / 16}
    step = Transformer(**SIZES, mixer="ssa-pathways(sampling=0.0625, rise=(0.7, 0.7))")
    assert seen(step, 0.69, 0.7) == [1 / 16, 1]
    never = Transformer(**SIZES, mixer="ssa-pathways(sampling=0.0625, rise=(1, 1))")
    assert seen(never, 0.0, 1.0) == [1 / 16, 1 / 16]
    default = Transformer(**SIZES, mixer="ssa-pathways")
    assert seen(default, 0.0, 0.7, 0.9) == pytest.approx([1 / 4, 1 / 4, 1])


def test_an_ensemble_is_the_mean_over_samples_and_leaves_the_model_as_it_was():
    torch.manual_seed(0)
    model = Encoder(20, 3, 32, depth=2, width=16, heads=2, mixer="ssa-pathways(sampler='unbiased')")
    layers(model)[0].eval()  # mixed modes come back
    tokens = torch.randint(0, 20, (3, 12))
    modes = [m.training for m in model.modules()]
    torch.manual_seed(5)
    mean = ensemble(model, tokens, members=3, sampling=1 / 2)
    assert [m.training for m in model.modules()] == modes
    assert not any(layer.resample for layer in layers(model))
    assert {layer.current for layer in layers(model)} == {1 / 4}
    torch.manual_seed(5)
    with torch.no_grad(), resampled(model, 1 / 2):
        outs = [F.softmax(model(tokens), -1) for _ in range(3)]
    torch.testing.assert_close(mean, sum(outs) / 3)
    assert not torch.allclose(outs[0], outs[1])
    dense = ensemble(model, tokens, members=2, sampling=1.0, predict=lambda out: out)
    torch.testing.assert_close(dense, model.eval()(tokens))


def test_what_cannot_work_is_refused():
    for wrong in (0, 1.5):
        with pytest.raises(ValueError, match=r"SSA: sampling .* above 0 and at most 1"):
            SSA(8, 2, sampling=wrong)
    with pytest.raises(ValueError, match=r"SSA: sampler 'near'.*expected one of"):
        SSA(8, 2, sampler="near")
    with pytest.raises(ValueError, match="spread -1"):
        SSA(8, 2, spread=-1)
    with pytest.raises(ValueError, match="spread 1 has no effect on sampler 'unbiased'"):
        SSA(8, 2, sampler="unbiased", spread=1)
    with pytest.raises(ValueError, match=r"SSA: input \(1, 5, 9\); expected \[batch, sequence, 8\]"):
        SSA(8, 2)(torch.zeros(1, 5, 9))
    model, cache = Transformer(**SIZES, mixer="ssa-pathways"), Cache()
    tokens = torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(ValueError, match=r"SSA: a cache.*Decode after model.eval\(\) and with resample off"):
        model(tokens, cache=cache)
    with pytest.raises(ValueError, match=r"SSA: mask \(1, 6\).*expected bool \(1, 5\)"):
        SSA(8, 2)(torch.zeros(1, 5, 8), Context(mask=torch.ones(1, 6, dtype=torch.bool)))
    with pytest.raises(ValueError, match="Linear has no SSA layer; build it with mixer='ssa-pathways'"):
        layers(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"share was 1.5"):
        progress(model, 1.5)
    with pytest.raises(ValueError, match=r"rise \(0.9, 0.8\)"):
        SSA(8, 2, rise=(0.9, 0.8))
    with pytest.raises(ValueError, match="ensemble: members 0"):
        ensemble(model, tokens, members=0)
    with pytest.raises(ValueError, match="SSA: sampling 2"), resampled(model, 2):
        pass


def test_a_positions_bias_is_refused():
    with pytest.raises(ValueError, match="RelativeBias needs a mixer that offers"):
        Transformer(vocab=5, length=8, depth=1, width=8, heads=2, mixer="ssa-pathways", position="relative-bias")
