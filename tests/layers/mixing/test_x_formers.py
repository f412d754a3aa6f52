"""Every leaf of the tree: builds, learns, keeps the future out, equals its naive twin, and grows as promised."""

import math

import pytest
import torch
import torch.nn.functional as F

from interlayer import catalog
from interlayer.core.cost import flops
from interlayer.core.mixer import Cache, Context
from interlayer.core.slots import fill
from interlayer.core.stream import State
from interlayer.layers.mixing.x_formers import XFormer, find
from interlayer.layers.mixing.x_formers.compressed import Clustered, Compressed, Nystrom, pseudo_inverse
from interlayer.layers.mixing.x_formers.linear import CHUNK, Delta, causal_product, naive
from interlayer.layers.mixing.x_formers.parts import AdaptiveDepth, ProductKeys, RelativeBias, ScaleNorm
from interlayer.layers.mixing.x_formers.prior import AdaptiveSpan, Average, TalkingHeads
from interlayer.layers.mixing.x_formers.sparse import Routing
from interlayer.models import Encoder, Transformer

LEAVES = list(catalog.taxonomy())
MIXERS = list(catalog.builtins("mixer"))
ONLY_WHOLE = {"routing", "clustered", "linformer", "induced", "nystrom"}
ONLY_CAUSAL = {"delta"}
SPARSE = [
    "sliding-window(window=4)",
    "block-local(block=4)",
    "dilated(window=3, dilation=3)",
    "global-window(window=4, tokens=2)",
    "big-bird(block=3, random=1)",
    "big-bird(block=3, random=2, beside=False, first=False)",
    "segments(block=4)",
]
TOKENS = torch.randint(0, 20, (2, 23), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab": 20, "length": 24, "depth": 2, "width": 16, "heads": 2}


def mixer(spec, causal, **more):
    torch.manual_seed(0)
    return fill("mixer", spec, **{"width": 8, "heads": 2, "length": 64, "causal": causal, **more})


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_leaf_is_ready_builds_and_learns(leaf):
    assert catalog.taxonomy()[leaf].state == "ready"
    torch.manual_seed(0)
    name = str(catalog.taxonomy()[leaf].use.get("mixer", "")).partition("(")[0]
    classes = 3 if name in ONLY_WHOLE else 0
    model = XFormer(leaf, classes=classes, **SIZES)
    targets = torch.tensor([0, 2]) if classes else TOKENS.roll(-1, 1)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(4):
        out = model(TOKENS)
        losses.append(F.cross_entropy(out.flatten(0, -2), targets.flatten()))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < losses[0] and all(math.isfinite(x.item()) for x in losses)


@pytest.mark.parametrize("name", [m for m in MIXERS if m not in ONLY_WHOLE])
def test_causal_forms_keep_the_future_out(name):
    torch.manual_seed(0)
    model = Transformer(**SIZES, mixer=name).double().eval()
    whole = model(TOKENS)
    for cut in (1, 7, 16):
        changed = TOKENS.clone()
        changed[:, cut:] = (changed[:, cut:] + 5) % 20
        torch.testing.assert_close(model(changed)[:, :cut], whole[:, :cut], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(model(TOKENS.flip(1))[:, -1], whole[:, -1])


@pytest.mark.parametrize("name", MIXERS)
def test_decoding_with_a_cache_equals_the_whole_pass_or_is_refused(name):
    if name in ONLY_WHOLE:
        with pytest.raises(ValueError, match="no causal form"):
            Transformer(**SIZES, mixer=name)
        return
    torch.manual_seed(0)
    model = Transformer(**SIZES, mixer=name).double().eval()
    if "cache" not in (model.trunk.offers or ()):
        with pytest.raises(ValueError, match="cannot use a cache"):
            model(TOKENS, cache=Cache())
        return
    cache = Cache()
    with torch.no_grad():
        steps = [model(TOKENS[:, a:b], cache=cache) for a, b in ((0, 5), (5, 6), (6, 15), (15, 23))]
        torch.testing.assert_close(torch.cat(steps, 1), model(TOKENS))


@pytest.mark.parametrize("name", [m for m in MIXERS if m not in ONLY_CAUSAL])
def test_padding_is_left_out_or_refused(name):
    torch.manual_seed(0)
    model = Encoder(**SIZES, classes=3, mixer=name).double().eval()
    mask = torch.arange(23).expand(2, -1) < torch.tensor([[23], [15]])
    other = torch.where(mask, TOKENS, (TOKENS + 3) % 20)
    try:
        first = model(TOKENS, mask=mask)
    except ValueError as error:
        assert "takes no padding mask" in str(error)
        return
    torch.testing.assert_close(model(other, mask=mask), first)
    assert not torch.allclose(model(other), model(TOKENS))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("spec", SPARSE)
@pytest.mark.parametrize("length", [1, 4, 12, 23])
def test_block_sparse_attention_equals_its_pattern(spec, causal, length):
    layer = mixer(spec, causal).double()
    q, k, v = (torch.randn(3, 2, length, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = torch.rand(3, length) < 0.8
    mask[:, 0] = True
    for padding in (None, mask):
        seen = layer.pattern(length, length)[None, None]
        seen = seen if padding is None else seen & padding[:, None, None]
        sees = seen.any(-1, keepdim=True)
        score = (q @ k.transpose(-1, -2) / 2).masked_fill(~(seen | ~sees), -torch.inf)
        wanted, got = score.softmax(-1) @ v, layer.blocks(q, k, v, padding)
        torch.testing.assert_close(got * sees, wanted * sees)
        probe = torch.randn_like(got) * sees
        ours, theirs = (torch.autograd.grad((y * probe).sum(), (q, v), retain_graph=True) for y in (got, wanted))
        torch.testing.assert_close(ours[0], theirs[0])
        if "segments" not in spec:  # which stops the gradient of keys and values of the segment before
            torch.testing.assert_close(ours[1], theirs[1])


def test_patterns_by_hand():
    rows = mixer("sliding-window(window=2)", True).pattern(4, 4).int().tolist()
    assert rows == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    rows = mixer("dilated(window=2, dilation=2)", False).pattern(5, 5).int().tolist()
    assert rows[2] == [1, 0, 1, 0, 1] and rows[0] == [1, 0, 1, 0, 0]
    rows = mixer("global-window(window=1, tokens=1)", False).pattern(3, 3).int().tolist()
    assert rows == [[1, 1, 1], [1, 1, 0], [1, 0, 1]]
    assert mixer("segments(block=2)", True).pattern(6, 6).int().tolist()[4] == [0, 0, 1, 1, 1, 0]
    big = mixer("big-bird(block=2, random=1)", False).pattern(20, 20)
    assert big[:2].all() and big[:, :2].all() and big[10, 8:14].all()
    assert big[10].sum() in (8, 10)  # first block, three beside, one at random that may be one of them


def test_segments_learn_nothing_through_the_segment_before():
    layer = mixer("segments(block=4)", True)
    k = torch.randn(1, 2, 8, 4, requires_grad=True)
    layer.blocks(torch.randn(1, 2, 8, 4), k, torch.randn(1, 2, 8, 4))[:, :, 4:].sum().backward()
    assert not k.grad[:, :, :4].any() and k.grad[:, :, 4:].any()


@pytest.mark.parametrize("length", [1, 5, CHUNK, 2 * CHUNK + 3])
def test_linear_attention_in_chunks_equals_all_scores(length):
    torch.manual_seed(0)
    fq, fk = (torch.rand(2, 3, length, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    v = torch.randn(2, 3, length, 4, dtype=torch.float64, requires_grad=True)
    a, b = causal_product(fq, fk, v), naive(fq, fk, v)
    torch.testing.assert_close(a, b)
    probe = torch.randn_like(a)
    for x, y in zip(*(torch.autograd.grad((t * probe).sum(), (fq, fk, v)) for t in (a, b)), strict=True):
        torch.testing.assert_close(x, y)


def test_performer_approaches_softmax_attention_with_more_features():
    errors = []
    for count in (8, 64, 1024):
        layer = mixer(f"performer(count={count})", False, width=16)
        torch.manual_seed(1)
        q, k, v = (0.5 * torch.randn(2, 2, 30, 8) for _ in range(3))
        errors.append((layer.mix(q, k, v) - F.scaled_dot_product_attention(q, k, v)).square().mean().item())
    assert errors[0] > 4 * errors[1] > 16 * errors[2]
    w = mixer("performer(count=4)", False, width=16).directions
    assert torch.allclose(F.normalize(w) @ F.normalize(w).T, torch.eye(4), atol=1e-5)


def test_delta_rule_token_by_token():
    layer = mixer("delta", True)
    length = CHUNK + 5
    q, k, v = (torch.randn(1, 2, length, 4) for _ in range(3))
    keys, asks = (F.normalize(F.elu(t) + 1, p=1.0, dim=-1) for t in (k, q))
    keys, rate = F.normalize(keys, dim=-1), torch.sigmoid(layer.rate(k))
    memory, out = torch.zeros(1, 2, 4, 4), []
    for t in range(length):
        key = keys[:, :, t, :, None]
        old = (memory * key).sum(-2)
        memory = memory + key * (rate[:, :, t] * (v[:, :, t] - old))[:, :, None]
        out.append((memory * asks[:, :, t, :, None]).sum(-2))
    torch.testing.assert_close(layer.mix(q, k, v), torch.stack(out, 2), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="needs a causal model"):
        Delta(8, 2)


def test_compressed_attention_by_hand():
    layer = Compressed(8, 2, ratio=3, causal=True).double()
    q, k, v = (torch.randn(1, 2, 8, 4, dtype=torch.float64) for _ in range(3))
    got, t = layer.mix(q, k, v), 7  # groups 0 1 2 | 3 4 5 | 6 7
    keys = torch.cat((k[:, :, :3].mean(2, keepdim=True), k[:, :, 3:6].mean(2, keepdim=True), k[:, :, 6:8]), 2)
    values = torch.cat((v[:, :, :3].mean(2, keepdim=True), v[:, :, 3:6].mean(2, keepdim=True), v[:, :, 6:8]), 2)
    torch.testing.assert_close(got[:, :, t:], F.scaled_dot_product_attention(q[:, :, t:], keys, values))


def test_clusters_nystrom_and_routing_are_exact_in_their_limits():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 12, 4) for _ in range(3))
    exact = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(Clustered(8, 2, clusters=12).mix(q, k, v), exact)
    torch.testing.assert_close(
        Nystrom(8, 2, landmarks=12, rounds=40).double().mix(q.double(), k.double(), v.double()).float(),
        exact,
        rtol=1e-3,
        atol=1e-3,
    )
    torch.testing.assert_close(Routing(8, 2, clusters=1).mix(q, k, v), exact)
    a = torch.randn(2, 5, 5, dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(
        pseudo_inverse(a, 40) @ a, torch.eye(5, dtype=torch.float64).expand(2, -1, -1), rtol=1e-4, atol=1e-4
    )


def test_routing_moves_its_centroids_in_training_only():
    layer, x = Routing(8, 2, clusters=3, decay=0.5), torch.randn(2, 9, 8)
    before = layer.centroids.clone()
    layer.eval()(x)
    assert torch.equal(layer.centroids, before)
    layer.train()(x)
    assert not torch.equal(layer.centroids, before)


def test_priors_by_hand():
    q, k, v = (torch.randn(1, 2, 4, 4) for _ in range(3))
    y = Average(8, 2, causal=True).mix(q, k, v)
    torch.testing.assert_close(y[:, :, 2], torch.sigmoid(q[:, :, 2]) * v[:, :, :3].mean(2))
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(TalkingHeads(8, 2, causal=True).mix(q, k, v), plain)
    torch.testing.assert_close(AdaptiveSpan(8, 2, span=100.0, causal=True).mix(q, k, v), plain)
    short = AdaptiveSpan(8, 2, span=-5.0, ramp=1.0, causal=True)
    torch.testing.assert_close(short.mix(q, k, v), v)  # nothing but itself
    assert short.extra_loss().item() == 0.0


def test_residual_scores_reach_the_next_layer():
    lower, upper = (mixer("residual-scores", False) for _ in range(2))
    x, context = torch.randn(1, 5, 8), Context()
    lower(x, context)
    alone = upper(x, Context())
    scores = context.memory["scores"].clone()
    both = upper(x, context)
    assert not torch.allclose(both, alone)
    q, k, v = upper.project(x)
    weight = (q @ k.transpose(-1, -2) / 2 + scores).softmax(-1)
    torch.testing.assert_close(both, upper.out((weight @ v).transpose(1, 2).flatten(2)))


def test_relative_bias_is_t5s():
    from transformers.models.t5.modeling_t5 import T5Attention

    position = RelativeBias(2, buckets=32, farthest=128)
    distance = torch.arange(-200, 201)
    assert torch.equal(position.bucket(distance), T5Attention._relative_position_bucket(distance))
    bias = position.bias(3, 5)
    assert bias.shape == (2, 3, 5)
    assert torch.equal(bias[:, 1, 3], position.table[0]) and torch.equal(bias[:, 0, 4], position.table[16 + 2])
    with pytest.raises(ValueError, match=r"position RelativeBias needs a mixer that offers \['bias'\]"):
        Transformer(**SIZES, position="relative-bias", mixer="performer")


def test_scale_norm_and_product_keys_by_hand():
    x = torch.randn(3, 4)
    torch.testing.assert_close(ScaleNorm(4)(x), 2 * x / x.norm(dim=1, keepdim=True))
    memory = ProductKeys(4, keys=3, top=2, heads_read=1)
    x = torch.randn(1, 1, 4)
    q = memory.query(x)[0, 0]
    score = (memory.keys[0, 0] @ q[:2])[:, None] + memory.keys[0, 1] @ q[2:]
    best = score.flatten().topk(2)
    torch.testing.assert_close(memory(x)[0, 0], best.values.softmax(0) @ memory.values[best.indices])


def test_adaptive_depth_spends_one_and_halts():
    torch.manual_seed(0)
    order = AdaptiveDepth(3, width=2, penalty=1.0)
    torch.nn.init.zeros_(order.halt.weight)
    torch.nn.init.constant_(order.halt.bias, 0.0)  # every block halts with one half
    seen = []

    def step(state, block):
        seen.append(block)
        state.x = state.x + 1
        return state

    y = order(State(torch.zeros(1, 1, 2)), step).x
    assert y.flatten().tolist() == [1.5, 1.5] and seen == [0, 1, 2]  # half of 1 and half of 2; the third adds nothing
    assert order.extra_loss().item() == pytest.approx(2.5)  # two blocks, and the remainder
    order.eval()(State(torch.zeros(1, 1, 2)), step)
    assert order.extra_loss().item() == 0.0


@pytest.mark.parametrize("spec", ["linear-attention", "performer", "delta", "sliding-window(window=32)", "big-bird(block=32)",
                                  "linformer(rank=16)", "nystrom", "induced", "average-attention", "clustered"])  # fmt: skip
def test_long_sequence_leaves_grow_linearly(spec):
    causal = spec.partition("(")[0] not in ONLY_WHOLE
    counts = []
    for length in (512, 4096):
        layer = mixer(spec, causal, width=16, length=8192).eval()
        counts.append(flops(layer, torch.zeros(1, length, 16)))
    assert math.log(counts[1] / counts[0]) / math.log(8) < 1.1


def test_names_of_leaves():
    assert find("low rank").method == "Nystroemformer"
    with pytest.raises(ValueError, match=r"none is\. Did you mean 'module/attention/low rank'"):
        find("module/attention/low-rank")
    with pytest.raises(ValueError, match="wanted text, or images and classes"):
        XFormer("low rank", classes=2)
