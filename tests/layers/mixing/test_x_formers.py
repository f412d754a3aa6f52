"""Every leaf of the tree: builds, learns, keeps the future out, equals its naive twin, and grows as promised."""

import copy
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
    assert all(p.grad is not None for p in model.parameters())
    assert losses[-1] < losses[0] and all(math.isfinite(x.item()) for x in losses)


@pytest.mark.parametrize("name", [*(m for m in MIXERS if m not in ONLY_WHOLE), *SPARSE])
def test_causal_forms_keep_the_future_out(name):
    torch.manual_seed(0)
    model = Transformer(**SIZES, mixer=name).double().eval()
    whole = model(TOKENS)
    for cut in (1, 7, 16):
        changed = TOKENS.clone()
        changed[:, cut:] = (changed[:, cut:] + 5) % 20
        torch.testing.assert_close(model(changed)[:, :cut], whole[:, :cut], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model(TOKENS[:, :cut]), whole[:, :cut], rtol=1e-9, atol=1e-9)  # nor does length tell
    assert not torch.allclose(model(TOKENS.flip(1))[:, -1], whole[:, -1])


@pytest.mark.parametrize("name", [*MIXERS, *SPARSE])
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
    for new in range(1, length):
        assert torch.equal(layer.pattern(new, length), layer.pattern(length, length)[-new:])
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


def seen_by(causal, length=11):
    whole = torch.ones(length, length, dtype=torch.bool)
    return whole.tril() if causal else whole


def softmax_weights(layer, q, k, bias=0.0):
    return (q @ k.mT / 2 + bias).masked_fill(~seen_by(layer.causal), -torch.inf).softmax(-1)


def linear_twin(layer, q, k, v):
    score = (layer.features(q) @ layer.features(k).mT) * seen_by(layer.causal)
    return score / score.sum(-1, keepdim=True) @ v


def local_twin(layer, q, k, v):
    far = torch.arange(11.0)[:, None] - torch.arange(11.0)
    return softmax_weights(layer, q, k, -far.square() / (2 * layer.log_spread.exp()[:, None, None] ** 2)) @ v


def top_twin(layer, q, k, v):
    score = (q @ k.mT / 2).masked_fill(~seen_by(layer.causal), -torch.inf)
    rank = score.argsort(-1, descending=True).argsort(-1)
    return score.masked_fill(rank >= 3, -torch.inf).softmax(-1) @ v


def compressed_twin(layer, q, k, v):
    """One group at a time; a causal query has earlier groups whole, and its own token by token."""
    groups = [range(a, min(a + 3, 11)) for a in range(0, 11, 3)]
    small = [
        torch.stack([sum(t[:, :, p] * w[p - g[0]] for p in g) for g in groups], 2)
        for t, w in ((k, layer.squeeze_k), (v, layer.squeeze_v))
    ]
    out = []
    for t in range(11):
        g = t // 3 if layer.causal else 4
        own = slice(3 * g, t + 1) if layer.causal else slice(0, 0)
        keys, values = (torch.cat((s[:, :, :g], x[:, :, own]), 2) for s, x in zip(small, (k, v), strict=True))
        out.append(((q[:, :, t : t + 1] @ keys.mT) / 2).softmax(-1) @ values)
    return torch.cat(out, 2)


def hierarchical_twin(layer, q, k, v):
    block = torch.arange(11) // 3
    low = (q @ k.mT / 2).masked_fill(~seen_by(layer.causal) | (block[:, None] != block), -torch.inf).softmax(-1) @ v
    mean_k, mean_v = (torch.stack([t[:, :, block == b].mean(2) for b in range(4)], 2) for t in (k, v))
    later = torch.arange(4) >= block[:, None] if layer.causal else torch.zeros(11, 4, dtype=torch.bool)
    return low + (q @ mean_k.mT / 2).masked_fill(later, -torch.inf).softmax(-1).nan_to_num(0) @ mean_v


def clustered_twin(layer, q, k, v):
    group = layer.groups(q)
    mean = torch.stack(
        [
            torch.stack([x[g == g[i]].mean(0) for i in range(11)])
            for x, g in zip(q.flatten(0, 1), group.flatten(0, 1), strict=True)
        ]
    )
    return softmax_weights(layer, mean.view_as(q), k) @ v


def routing_twin(layer, q, k, v):
    out, count = torch.zeros_like(q), torch.zeros_like(q[..., :1])
    for b in range(len(q)):
        for h in range(2):
            for c in layer.centroids[h]:
                at_q, at_k = ((F.normalize(t[b, h], dim=-1) @ c).topk(4).indices for t in (q, k))
                out[b, h, at_q] += (q[b, h, at_q] @ k[b, h, at_k].T / 2).softmax(-1) @ v[b, h, at_k]
                count[b, h, at_q] += 1
    return out / count.clamp(min=1)


def nystrom_twin(layer, q, k, v):
    segment = torch.arange(11) * 3 // 11
    small_q, small_k = (torch.stack([t[:, :, segment == s].mean(2) for s in range(3)], 2) for t in (q, k))
    left, core, right = ((a @ b.mT / 2).softmax(-1) for a, b in ((q, small_k), (small_q, small_k), (small_q, k)))
    return left @ torch.linalg.pinv(core) @ right @ v


def projected_twin(layer, q, k, v):
    k, v = (torch.einsum("rs,bhsk->bhrk", p[:, :11], t) for p, t in ((layer.project_k, k), (layer.project_v, v)))
    return (q @ k.mT / 2).softmax(-1) @ v


def induced_twin(layer, q, k, v):
    return (q @ layer.points.mT / 2).softmax(-1) @ (layer.points @ k.mT / 2).softmax(-1) @ v


def synthesizer_twin(layer, q, k, v):
    return softmax_weights(layer, 0 * q, k, layer.scores[:, :11, :11]) @ v


def task_twin(layer, q, k, v):
    gamma, beta = layer.modulate(layer.tasks.weight[0]).chunk(2)
    blocks = ((1 + gamma) * layer.scores + beta).split(4)  # 16 blocks of 4 in 64 places
    score = q @ k.mT / 2 + torch.block_diag(*blocks)[:11, :11]
    return score.masked_fill(~seen_by(layer.causal), -torch.inf).softmax(-1) @ v


def memory_twin(layer, q, k, v):
    score = (q @ k.mT / 2).masked_fill(~seen_by(layer.causal), -torch.inf)
    both = torch.cat((score, q @ layer.keys.mT / 2), -1).softmax(-1)
    return both[..., :11] @ v + both[..., 11:] @ layer.values


def talking_twin(layer, q, k, v):
    score = torch.einsum("gh,bhij->bgij", layer.before, q @ k.mT / 2).masked_fill(~seen_by(layer.causal), -torch.inf)
    return torch.einsum("gh,bhij,bgjk->bgik", layer.after, score.softmax(-1), v)


TWINS = {
    "linear-attention": linear_twin,
    "performer": linear_twin,
    "local-prior(spread=2.0)": local_twin,
    "top-k(keep=3)": top_twin,
    "compressed(ratio=3)": compressed_twin,
    "hierarchical(block=3)": hierarchical_twin,
    "clustered(clusters=3)": clustered_twin,
    "routing(clusters=3)": routing_twin,
    "nystrom(landmarks=3, rounds=40)": nystrom_twin,
    "linformer(rank=3)": projected_twin,
    "induced(points=3)": induced_twin,
    "synthesizer": synthesizer_twin,
    "task-prior(blocks=16)": task_twin,
    "persistent-memory(slots=3)": memory_twin,
    "talking-heads": talking_twin,
}


@pytest.mark.parametrize(
    ("spec", "causal"), [(s, c) for s in TWINS for c in (False, True) if not c or s.partition("(")[0] not in ONLY_WHOLE]
)
def test_mixers_equal_their_equation_written_out(spec, causal):
    layer = mixer(spec, causal).double().eval()
    with torch.no_grad():
        for p in layer.parameters():  # no identity or constant start
            p.add_(0.1 * torch.randn_like(p))
    q, k, v = (torch.randn(2, 2, 11, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    ours, twin = layer.mix(q, k, v), TWINS[spec](layer, q, k, v)
    torch.testing.assert_close(ours, twin, rtol=1e-5, atol=1e-6)
    probe = torch.randn_like(ours)
    got, wanted = (torch.autograd.grad((y * probe).sum() + 0 * (q + k + v).sum(), (q, k, v)) for y in (ours, twin))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


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


def test_linear_attention_learns_when_compiled():
    layer, x = mixer("linear-attention", False), torch.randn(2, 9, 8)
    wanted = torch.autograd.grad(layer(x).square().sum(), layer.qkv.weight)[0]
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), layer.qkv.weight)[0], wanted)


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


def test_performer_keeps_tokens_apart_in_single_precision():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 40, 32) for _ in range(3))
    layer = mixer("performer", False, width=32, heads=1)
    long = q.clone()
    long[:, :, ::2] *= 8  # what a query reads does not depend on how long another one is
    torch.testing.assert_close(layer.mix(long, k, v)[:, :, 1::2], layer.mix(q, k, v)[:, :, 1::2])
    assert (layer.mix(long, k, v).abs().amax(-1) > 1e-6).all()
    layer = mixer("performer", True, width=32, heads=1)
    k, late = 3.5 * k, 3.5 * k
    late[:, :, -1] = layer.directions[0] * 32**0.25  # the strongest key there is comes last
    torch.testing.assert_close(layer.mix(q, late, v)[:, :, :-1], layer.mix(q, k, v)[:, :, :-1])


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


def test_a_task_prior_is_another_for_another_task():
    layer, x = mixer("task-prior(blocks=4, tasks=3)", False, length=10), torch.randn(3, 7, 8)
    outs = []
    for task in range(3):
        layer.task = task
        outs.append(layer(x))
    assert not torch.allclose(outs[0], outs[1]) and not torch.allclose(outs[1], outs[2])
    layer.task = torch.tensor([2, 0, 1])  # one for each item
    torch.testing.assert_close(layer(x), torch.stack((outs[2][0], outs[0][1], outs[1][2])))
    assert layer.prior(2, 7).shape == (3, 1, 2, 7)
    torch.testing.assert_close(layer.prior(2, 7), layer.prior(7, 7)[:, :, 5:])
    assert (layer.prior(7, 7) != 0)[0, 0].int().tolist()[4] == [0, 0, 0, 1, 1, 1, 0]  # 10 places in blocks of 3
    with pytest.raises(ValueError, match="TaskPrior: 11 tokens, but it was built for length=10"):
        layer(torch.zeros(1, 11, 8))


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
    assert copy.deepcopy(order).extra_loss().item() == 0.0  # a copy does not take the last pass along
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
