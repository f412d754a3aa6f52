"""Mixers of the Transformer variants: they keep the future out, equal their paper's equation, and grow as promised."""

import math
import zlib

import pytest
import torch
import torch.nn.functional as F

from interlayer import catalog
from interlayer.core import aside
from interlayer.core.cost import flops
from interlayer.core.mixer import Cache, Context
from interlayer.core.position import Rotary
from interlayer.core.slots import fill, parse_spec
from interlayer.core.trunk import build_trunk
from interlayer.layers.mixing.x_formers.compressed import Clustered, Compressed, Nystrom, pseudo_inverse
from interlayer.layers.mixing.x_formers.content import Routing
from interlayer.layers.mixing.x_formers.heads import AdaptiveSpan, TalkingHeads
from interlayer.layers.mixing.x_formers.linear import CHUNK, Delta, causal_product, naive
from interlayer.models import Encoder, Transformer

SMALL = {  # the defaults see the whole of a short input
    "sliding-window": "sliding-window(window=4)",
    "block-local": "block-local(block=4)",
    "dilated": "dilated(window=3, dilation=3)",
    "global-window": "global-window(window=4, tokens=2)",
    "big-bird": "big-bird(block=3, random=1)",
    "external-nodes": "external-nodes(window=4)",
    "segments": "segments(block=4)",
    "low-rank": "low-rank(rank=2, window=4)",
}
MIXERS = [SMALL.get(name, name) for name in catalog.builtins("mixer")]
ONLY_WHOLE = {"routing", "star", "external-nodes", "clustered", "linformer", "induced", "nystrom"}
ONLY_CAUSAL = {"delta"}
SPARSE = [*list(SMALL.values())[:5], "big-bird(block=3, random=2, beside=False, first=False)"]
TOKENS = torch.randint(0, 20, (2, 23), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab": 20, "length": 24, "depth": 3, "width": 16, "heads": 4}


def name_of(spec):
    return parse_spec(spec)[0]


def mixer(spec, causal, **more):
    torch.manual_seed(0)
    return fill("mixer", spec, **{"width": 8, "heads": 2, "length": 64, "grid": (64,), "causal": causal, **more})


def noisy(module):
    """No identity, zero or constant parameters."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))))
    return module


@pytest.mark.parametrize("name", [*(m for m in MIXERS if name_of(m) not in ONLY_WHOLE), SPARSE[-1]])
def test_causal_forms_keep_the_future_out(name):
    torch.manual_seed(0)
    model = Transformer(**SIZES, mixer=name).double().eval()
    whole = model(TOKENS)
    for cut in (1, 7, 16):
        changed = TOKENS.clone()
        changed[:, cut:] = (changed[:, cut:] + 5) % 20
        torch.testing.assert_close(model(changed)[:, :cut], whole[:, :cut], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(
            model(TOKENS[:, :cut]), whole[:, :cut], rtol=1e-9, atol=1e-9
        )  # nor does length count
    assert not torch.allclose(model(TOKENS.flip(1))[:, -1], whole[:, -1])


@pytest.mark.parametrize("name", [*MIXERS, SPARSE[-1]])
def test_decoding_with_a_cache_equals_the_whole_pass_or_is_refused(name):
    if name_of(name) in ONLY_WHOLE:
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
    model = Encoder(**SIZES, classes=3, mixer=name, position="sinusoidal").double().eval()
    mask = torch.arange(23).expand(2, -1) < torch.tensor([[23], [15]])
    other = torch.where(mask, TOKENS, (TOKENS + 3) % 20)
    try:
        first = model(TOKENS, mask=mask)
    except ValueError as error:
        assert "takes no padding mask" in str(error)
        return
    torch.testing.assert_close(model(other, mask=mask), first)
    assert not torch.allclose(model(other), model(TOKENS))


@pytest.mark.parametrize("name", [m for m in MIXERS if m not in ONLY_CAUSAL])
def test_no_mixer_is_blind_to_order_by_default(name):
    torch.manual_seed(0)
    model = noisy(Encoder(**SIZES, classes=3, mixer=name)).double().eval()
    turned = TOKENS[:, torch.randperm(23, generator=torch.Generator().manual_seed(0))]
    assert (model(turned) - model(TOKENS)).abs().max() > 1e-6


class Shifted(Rotary):
    """Rotary positions that begin at 5."""

    def rotate(self, q, k, offset=0):
        return super().rotate(q, k, offset + 5)


ROTATED = [m for m in MIXERS if "rotate" in (getattr(mixer(m, name_of(m) not in ONLY_WHOLE), "offers", None) or ())]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("name", [m for m in ROTATED if m != "performer"])  # which is so on average over its features
def test_rotary_positions_are_relative_in_every_mixer_that_takes_them(name, causal):
    if name_of(name) in (ONLY_WHOLE if causal else ONLY_CAUSAL):
        return
    layer = noisy(mixer(name, causal, length=24, grid=(24,))).double().eval()
    x = torch.randn(2, 17, 8, dtype=torch.float64)
    here, later = (layer(x, Context(position=turn(length=64, head_width=4).double())) for turn in (Rotary, Shifted))
    close = {"atol": 1e-5, "rtol": 1e-4} if name == "nystrom" else {}  # whose pseudo-inverse amplifies rounding
    torch.testing.assert_close(later, here, **close)
    assert name_of(name) == "hopfield" or not torch.allclose(layer(x, Context()), here)


@pytest.mark.parametrize("name", ["average-attention", "induced", "segments(block=4)", "local-prior", "compressed"])
def test_mixers_that_cannot_be_rotated_refuse_rotary_positions(name):
    with pytest.raises(ValueError, match="Rotary needs a mixer that offers"):
        build_trunk(
            depth=1, width=8, heads=2, length=24, causal=name_of(name) != "induced", mixer=name, position="rotary"
        )


@pytest.mark.parametrize(
    "spec", [*SPARSE[:4], "external-nodes(window=8)", "low-rank(rank=2, window=8)", "segments(block=8)", "top-k"]
)
def test_a_pattern_that_is_dense_at_the_models_length_is_refused(spec):
    causal = "external" not in spec
    length = {"dilated(window=3, dilation=3)": 1, SPARSE[3]: 6}.get(spec, 4 if spec in SPARSE else 8)
    with pytest.raises(ValueError, match=f"every token sees all others up to the model's length {length}, so nothing"):
        mixer(spec, causal, length=length)
    mixer(spec, causal, length=length + 1)


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
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_random_blocks_are_distinct_and_never_taken_ones(causal, first):
    layer = mixer(f"big-bird(block=2, random=3, first={first})", causal)
    for i, row in enumerate(layer.layout(20).tolist()):
        here = [j for j in row if 0 <= j <= (i if causal else 19)]
        near = {j for j in (i - 1, i, *([] if causal else [i + 1])) if 0 <= j < 20} | ({0} if first else set())
        free = (i + 1 if causal else 20) - len(near)
        assert len(here) == len(set(here)) == len(near) + min(3, free) and near <= set(here)
    assert not causal or torch.equal(layer.layout(9), layer.layout(20)[:9])


def seen_by(causal, length=11):
    whole = torch.ones(length, length, dtype=torch.bool)
    return whole.tril() if causal else whole


def softmax_weights(layer, q, k, bias=0.0):
    return (q @ k.mT / 2 + bias).masked_fill(~seen_by(layer.causal), -torch.inf).softmax(-1)


def linear_twin(layer, q, k, v):
    score = (layer.features(q) @ layer.features(k).mT) * seen_by(layer.causal)
    return score / score.sum(-1, keepdim=True) @ v


def local_twin(layer, q, k, v):
    """Yang et al., equations 4 to 9, one query at a time."""
    bias = torch.zeros(2, 2, 11, 11, dtype=q.dtype)
    for i in range(11):
        reach = i + 1 if layer.causal else 11
        hidden = torch.tanh(q[:, :, i] @ layer.hidden.weight.T)
        p, d = (reach * torch.sigmoid(hidden @ u.weight[0]) for u in (layer.centre, layer.window))
        for j in range(11):
            bias[:, :, i, j] = -((j - p) ** 2) / (2 * (d / 2) ** 2)
    return softmax_weights(layer, q, k, bias) @ v


def top_twin(layer, q, k, v):
    score = (q @ k.mT / 2).masked_fill(~seen_by(layer.causal), -torch.inf)
    rank = score.argsort(-1, descending=True).argsort(-1)
    return score.masked_fill(rank >= 3, -torch.inf).softmax(-1) @ v


def compressed_twin(layer, q, k, v):
    """One group at a time; a causal query has earlier groups whole, and its own token by token."""
    groups = [range(a, min(a + 3, 11)) for a in range(0, 11, 3)]
    small = [
        torch.stack([sum(t[:, :, p] @ w[p - g[0]] for p in g) for g in groups], 2)
        for t, w in ((k, layer.squeeze_k), (v, layer.squeeze_v))
    ]
    out = []
    for t in range(11):
        g = t // 3 if layer.causal else 4
        own = slice(3 * g, t + 1) if layer.causal else slice(0, 0)
        keys, values = (torch.cat((s[:, :, :g], x[:, :, own]), 2) for s, x in zip(small, (k, v), strict=True))
        out.append(((q[:, :, t : t + 1] @ keys.mT) / 2).softmax(-1) @ values)
    return torch.cat(out, 2)


def axial_twin(layer, q, k, v):
    i, j = torch.arange(11)[:, None], torch.arange(11)
    line = (i % 4 == j % 4) if layer.down else (i // 4 == j // 4)
    return (q @ k.mT / 2).masked_fill(~(line & seen_by(layer.causal)), -torch.inf).softmax(-1) @ v


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


def hashed_twin(layer, q, k, v):
    """Reformer, equations 2 to 6: a softmax over the union of the rounds' sets."""
    out = torch.zeros_like(q)
    for b in range(2):
        for h in range(2):
            meets = torch.zeros(11, 11, dtype=torch.bool)
            for r in layer.rotations:
                bucket = torch.cat((q[b, h] @ r, -q[b, h] @ r), -1).argmax(-1)
                rank = sorted(range(11), key=lambda i: (bucket[i].item(), i))
                chunk = torch.tensor([rank.index(i) // 6 for i in range(11)])  # 2 * 11 / 4 buckets
                back = chunk[:, None] - chunk
                near = seen_by(True) if layer.causal else (back >= 0) & (back <= 1)
                meets |= (bucket[:, None] == bucket) & near
            meets.fill_diagonal_(False)
            alone = ~meets.any(1)
            meets |= torch.diag(alone)
            out[b, h] = (q[b, h] @ k[b, h].T / 2).masked_fill(~meets, -torch.inf).softmax(-1) @ v[b, h]
    return out


def nystrom_twin(layer, q, k, v):
    segment = torch.arange(11) * 3 // 11
    small_q, small_k = (torch.stack([t[:, :, segment == s].mean(2) for s in range(3)], 2) for t in (q, k))
    left, core, right = ((a @ b.mT / 2).softmax(-1) for a, b in ((q, small_k), (small_q, small_k), (small_q, k)))
    return left @ torch.linalg.pinv(core) @ right @ v


def low_rank_twin(layer, q, k, v):
    far, near = ((q[..., s] @ k[..., s].mT) / n**0.5 for s, n in ((slice(4, 6), 2), (slice(4), 4)))
    index = torch.arange(11)
    band = (index[:, None] - index).abs() < 3
    seen = seen_by(layer.causal)
    far, near = (t.masked_fill(~m, -torch.inf).softmax(-1) for t, m in ((far, seen), (near, seen & band)))
    return far @ v + near @ v


def projected_twin(layer, q, k, v):
    k, v = (torch.einsum("rs,bhsk->bhrk", p[:, :11], t) for p, t in ((layer.project_k, k), (layer.project_v, v)))
    return (q @ k.mT / 2).softmax(-1) @ v


def induced_twin(layer, q, k, v):
    """Set Transformer: H = MAB(I, x), equations 6, 7 and 9; then multi-head attention to H."""

    def heads(x):
        return x.unflatten(-1, (2, 4)).transpose(-2, -3)

    read = (heads(layer.ask(layer.points)) @ k.mT / 2).softmax(-1) @ v
    a = layer.norm_read(layer.points + layer.back(read.transpose(1, 2).flatten(2)))
    h = layer.norm_forth(a + layer.forth(a).relu())
    return (q @ heads(layer.keys(h)).mT / 2).softmax(-1) @ heads(layer.values(h))


def synthesizer_twin(layer, q, k, v):
    return softmax_weights(layer, 0 * q, k, layer.scores[:, :11, :11]) @ v


def task_twin(layer, q, k, v):
    gamma, beta = layer.modulate(layer.tasks.weight[0]).chunk(2)
    blocks = ((1 + gamma) * layer.scores + beta).split(4)  # 16 blocks of 4 in 64 positions
    score = q @ k.mT / 2 + torch.block_diag(*blocks)[:11, :11]
    return score.masked_fill(~seen_by(layer.causal), -torch.inf).softmax(-1) @ v


def memory_twin(layer, q, k, v):
    score = (q @ k.mT / 2).masked_fill(~seen_by(layer.causal), -torch.inf)
    both = torch.cat((score, q @ layer.keys.mT / 2), -1).softmax(-1)
    return both[..., :11] @ v + both[..., 11:] @ layer.values


def talking_twin(layer, q, k, v):
    score = torch.einsum("gh,bhij->bgij", layer.before, q @ k.mT / 2).masked_fill(~seen_by(layer.causal), -torch.inf)
    return torch.einsum("gh,bhij,bgjk->bgik", layer.after, score.softmax(-1), v)


def routed_twin(layer, q, k, v):
    """Li et al., simple routing: three rounds for every token on its own."""
    heads = softmax_weights(layer, q, k) @ v
    out = torch.zeros_like(heads)
    for b in range(2):
        for i in range(11):
            vote = torch.stack([torch.stack([heads[b, h, i] @ layer.votes[h, n] for n in range(2)]) for h in range(2)])
            logit = torch.zeros(2, 2, dtype=q.dtype)
            for _ in range(3):
                share = logit.softmax(1)
                y = (share[..., None] * vote).sum(0) / share.sum(0)[:, None]
                logit = logit + (y * vote).sum(-1)
            out[b, :, i] = y
    return out


def span_twin(layer, q, k, v):
    far = (torch.arange(11.0)[:, None] - torch.arange(11.0)).abs()
    fade = ((4 + layer.span[:, None, None] - far) / 4).clamp(0, 1)
    weight = (q @ k.mT / 2).exp() * fade * seen_by(layer.causal)
    return weight / weight.sum(-1, keepdim=True) @ v


TWINS = {
    "linear-attention": linear_twin,
    "performer": linear_twin,
    "local-prior": local_twin,
    "top-k(keep=3)": top_twin,
    "compressed(ratio=3)": compressed_twin,
    "axial(row=4)": axial_twin,
    "axial(row=4, layer=2)": axial_twin,
    "clustered(clusters=3)": clustered_twin,
    "routing(clusters=3)": routing_twin,
    "hashed(buckets=4)": hashed_twin,
    "nystrom(landmarks=3, rounds=20)": nystrom_twin,
    "low-rank(rank=2, window=3)": low_rank_twin,
    "linformer(rank=3)": projected_twin,
    "induced(points=3)": induced_twin,
    "synthesizer": synthesizer_twin,
    "task-prior(blocks=16)": task_twin,
    "persistent-memory(slots=3)": memory_twin,
    "talking-heads": talking_twin,
    "routed-heads": routed_twin,
    "adaptive-span(span=2.0, ramp=4.0)": span_twin,
}


@pytest.mark.parametrize(
    ("spec", "causal"), [(s, c) for s in TWINS for c in (False, True) if not c or name_of(s) not in ONLY_WHOLE]
)
def test_mixers_equal_their_equation_written_out(spec, causal):
    layer = noisy(mixer(spec, causal)).double().eval()
    width = 6 if spec.startswith("low-rank") else 4
    q, k, v = (torch.randn(2, 2, 11, n, dtype=torch.float64, requires_grad=True) for n in (width, width, 4))
    keys = F.normalize(q, dim=-1) if spec.startswith("hashed") else k
    ours, twin = layer.mix(q, keys, v), TWINS[spec](layer, q, keys, v)
    torch.testing.assert_close(ours, twin, rtol=1e-5, atol=1e-6)
    probe = torch.randn_like(ours)
    got, wanted = (
        torch.autograd.grad((y * probe).sum() + 0 * (q.sum() + k.sum() + v.sum()), (q, k, v), retain_graph=True)
        for y in (ours, twin)
    )
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
    assert big[10].sum() == 10  # first block, three beside, one at random


@pytest.mark.parametrize("causal", [True, False])
def test_segments_are_those_of_transformer_xl(causal):
    """Segment after segment: [stop(h before), h] gives keys and values, and every pair its four terms."""
    layer = noisy(mixer("segments(block=4)", causal)).double()
    x = torch.randn(2, 10, 8, dtype=torch.float64, requires_grad=True)
    w_q, w_k, w_v = layer.qkv.weight.split(8)
    b_q, b_k, b_v = layer.qkv.bias.split(8)
    rate = 10000 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    out = []
    for a in range(0, 10, 4):
        h = x[:, a : a + 4]
        both = torch.cat((x[:, max(0, a - 4) : a].detach(), h), 1)
        past = both.shape[1] - h.shape[1]
        heads = []
        for n in range(2):
            part = slice(4 * n, 4 * n + 4)
            q, k, v = h @ w_q[part].T + b_q[part], both @ w_k[part].T + b_k[part], both @ w_v[part].T + b_v[part]
            score = torch.full((2, h.shape[1], both.shape[1]), -torch.inf, dtype=torch.float64)
            for i in range(h.shape[1]):
                for j in range(past + i + 1 if causal else both.shape[1]):
                    angle = (past + i - j) * rate
                    r = layer.relative.weight[part] @ torch.cat((angle.sin(), angle.cos()))
                    terms = ((q[:, i] + layer.u[n]) * k[:, j]).sum(-1) + (q[:, i] + layer.v[n]) @ r
                    score[:, i, j] = terms / 2
            heads.append(score.softmax(-1) @ v)
        out.append(layer.out(torch.cat(heads, -1)))
    wanted, got = torch.cat(out, 1), layer(x)
    torch.testing.assert_close(got, wanted)
    weights = [x, *layer.parameters()]
    ours, theirs = (torch.autograd.grad(y.square().sum(), weights) for y in (got, wanted))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    late = torch.autograd.grad(layer(x)[:, 4:8].sum(), (x, layer.qkv.weight))
    assert not late[0][:, :4].any() and late[0][:, 4:8].any() and late[1][8:16].any()


def test_a_star_is_a_ring_around_a_relay():
    first, second = (noisy(mixer("star", False, layer=n)).double() for n in (0, 2))
    x, y = torch.randn(2, 2, 7, 8, dtype=torch.float64)
    context = Context()
    got = [first(x, context), second(y, context)]
    relay, embedded = x.mean(1), x
    for layer, h, ours in zip((first, second), (x, y), got, strict=True):
        if layer is second:
            both = torch.cat((relay[:, None], h), 1)
            relay = layer.norm(naive_attention(layer.relay, relay[:, None], both).relu())[:, 0]
        for i in range(7):
            context_i = torch.stack((h[:, i - 1], h[:, i], h[:, (i + 1) % 7], embedded[:, i], relay), 1)
            torch.testing.assert_close(ours[:, i], naive_attention(layer, h[:, i : i + 1], context_i)[:, 0])


def naive_attention(layer, asks, source, seen=None):
    """Multi-head attention of one width from its fused weights."""
    (w_q, w_k, w_v), (b_q, b_k, b_v) = layer.qkv.weight.split(layer.sizes), layer.qkv.bias.split(layer.sizes)
    q, k, v = (
        (t @ w.T + b).unflatten(-1, (2, -1)).transpose(1, 2)
        for t, w, b in ((asks, w_q, b_q), (source, w_k, b_k), (source, w_v, b_v))
    )
    score = q @ k.mT * q.shape[-1] ** -0.5
    score = score if seen is None else score.masked_fill(~seen, -torch.inf)
    return layer.out((score.softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_external_nodes_read_everything_and_tokens_read_a_window_and_the_nodes():
    first, second = (
        noisy(mixer("external-nodes(window=3, nodes=2)", False, layer=n, depth=2)).double() for n in (0, 2)
    )
    x, y = torch.randn(2, 2, 7, 8, dtype=torch.float64)
    mask = torch.arange(7).expand(2, -1) < torch.tensor([[7], [5]])
    context = Context(mask=mask)
    got = first(x, context), second(y, context)
    index = torch.arange(7)
    near = ((index[:, None] - index).abs() < 3) & mask[:, None, None]
    near = F.pad(near | ~near.any(-1, keepdim=True), (2, 0), value=True)
    g = first.nodes.expand(2, -1, -1)
    real = mask[..., None]
    torch.testing.assert_close(got[0] * real, naive_attention(first, x, torch.cat((g, x), 1), near) * real)
    everything = F.pad(mask, (2, 0), value=True)[:, None, None]
    g = first.norm(g + naive_attention(first.update, g, torch.cat((g, x), 1), everything))
    torch.testing.assert_close(got[1] * real, naive_attention(second, y, torch.cat((g, y), 1), near) * real)
    assert second.update is None


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


@pytest.mark.parametrize("causal", [False, True])
def test_linear_attention_is_rotated_after_its_features(causal):
    """RoFormer, equation 19: the numerator is rotated, the denominator is not."""
    layer, turn = mixer("linear-attention", causal), Rotary(length=16, head_width=4)
    q, k, v = (torch.randn(2, 2, 11, 4) for _ in range(3))
    fq, fk = layer.features(q), layer.features(k)
    rq, rk = turn.rotate(fq, fk)
    seen = seen_by(causal)
    wanted = (rq @ rk.mT * seen) @ v / (fq @ fk.mT * seen).sum(-1, keepdim=True)
    torch.testing.assert_close(layer.mix(q, k, v, position=turn), wanted)


def test_persistent_memory_has_no_position():
    layer, turn = noisy(mixer("persistent-memory(slots=3)", True)), Rotary(length=16, head_width=4)
    q, k, v = (torch.randn(2, 2, 11, 4) for _ in range(3))
    rq, rk = turn.rotate(q, k)
    score = (rq @ rk.mT / 2).masked_fill(~seen_by(True), -torch.inf)
    both = torch.cat((score, q @ layer.keys.mT / 2), -1).softmax(-1)
    wanted = both[..., :11] @ v + both[..., 11:] @ layer.values
    torch.testing.assert_close(layer.mix(q, k, v, position=turn), wanted)


def test_low_rank_attention_has_projections_of_its_own():
    layer, x = noisy(mixer("low-rank(rank=2, window=3)", True, width=12, heads=3)), torch.randn(2, 11, 12)
    q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in layer.qkv(x).chunk(3, -1))
    low_q, low_k = (t.unflatten(-1, (3, 2)).transpose(1, 2) for t in layer.low(x).chunk(2, -1))
    read = low_rank_twin(layer, torch.cat((q, low_q), -1), torch.cat((k, low_k), -1), v)
    torch.testing.assert_close(layer(x), layer.out(read.transpose(1, 2).flatten(2)))


def test_lite_attends_with_positions_and_convolves():
    layer, turn = noisy(mixer("lite(kernel=3)", True, heads=4)), Rotary(length=16, head_width=2)
    x = torch.randn(2, 7, 8)
    q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in layer.qkv(x[..., :4]).chunk(3, -1))
    q, k = turn.rotate(q, k)
    score = (q @ k.mT * 2**-0.5).masked_fill(~seen_by(True, 7), -torch.inf)
    far = layer.out((score.softmax(-1) @ v).transpose(1, 2).flatten(2))
    a, b = layer.enter(x[..., 4:]).chunk(2, -1)
    gated = a * torch.sigmoid(b)
    near = torch.zeros_like(gated)
    for i in range(7):
        for t in range(max(0, i - 2), i + 1):
            near[:, i] += layer.conv.weight[:, 0, t - i + 2] * gated[:, t]
    near = layer.leave(near + layer.conv.bias)
    torch.testing.assert_close(layer(x, Context(position=turn)), torch.cat((far, near), -1))
    with pytest.raises(ValueError, match="heads 1 must be even"):
        mixer("lite", True, heads=1)


def test_features_learn_when_compiled():
    layer, x = mixer("delta", True), torch.randn(2, 9, 8)
    wanted = torch.autograd.grad(layer(x).square().sum(), layer.qkv.weight)[0]
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), layer.qkv.weight)[0], wanted)


@pytest.mark.parametrize("spec", ["dilated(window=3, dilation=3)", "external-nodes(window=4)"])
def test_mixers_are_exported_with_a_dynamic_batch(spec):
    layer, x = mixer(spec, name_of(spec) not in ONLY_WHOLE).eval(), torch.randn(3, 9, 8)
    program = torch.export.export(layer, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(program.module()(x), layer(x))


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
    """Schlag et al.: features divided by their sum, a rate from the input, one write after the other."""
    layer = noisy(mixer("delta", True))
    x = torch.randn(2, CHUNK + 5, 8)
    q, k, v = (t.unflatten(-1, (2, 4)) for t in layer.qkv(x).chunk(3, -1))
    q, k = ((F.elu(t) + 1) / (F.elu(t) + 1).sum(-1, keepdim=True) for t in (q, k))
    rate = torch.sigmoid(layer.rate(x))
    memory, out = torch.zeros(2, 2, 4, 4), []
    for t in range(CHUNK + 5):
        old = torch.einsum("bhvk,bhk->bhv", memory, k[:, t])
        memory = memory + torch.einsum("bhv,bhk->bhvk", rate[:, t, :, None] * (v[:, t] - old), k[:, t])
        out.append(torch.einsum("bhvk,bhk->bhv", memory, q[:, t]).flatten(1))
    torch.testing.assert_close(layer(x), layer.out(torch.stack(out, 1)), rtol=1e-4, atol=1e-5)
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
        Nystrom(8, 2, landmarks=12, rounds=20).double().mix(q.double(), k.double(), v.double()).float(),
        exact,
        rtol=1e-3,
        atol=1e-3,
    )
    torch.testing.assert_close(Routing(8, 2, clusters=1).mix(q, k, v), exact)


@pytest.mark.parametrize("landmarks", [8, 16, 32])
def test_the_pseudo_inverse_has_converged_by_default(landmarks):
    torch.manual_seed(0)
    rounds = Nystrom(8, 2).rounds
    for scale in (0.3, 1.0, 3.0):
        q, k = (torch.randn(20, landmarks, 16) for _ in range(2))
        a = (scale * q @ k.mT / 4).softmax(-1)
        for given, most in ((6, 0.05), (rounds, 0.004), (20, 4e-4)):
            z = pseudo_inverse(a, given)
            assert ((a @ z @ a - a).norm(dim=(1, 2)) / a.norm(dim=(1, 2))).max() < most
        exact = torch.linalg.pinv(a[0].double())
        torch.testing.assert_close(pseudo_inverse(a[0].double(), 30), exact, rtol=1e-6, atol=1e-6 * exact.abs().max())
    same = a.clone()
    same[:, 1] = same[:, 0]  # two equal landmarks
    assert pseudo_inverse(same, rounds).abs().max() < 1e4


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
    assert (layer.prior(7, 7) != 0)[0, 0].int().tolist()[4] == [0, 0, 0, 1, 1, 1, 0]  # 10 positions in blocks of 3
    with pytest.raises(ValueError, match="TaskPrior: 11 tokens, but it was built for length=10"):
        layer(torch.zeros(1, 11, 8))


@pytest.mark.parametrize("causal", [False, True])
def test_average_attention_gates_a_token_against_the_mean(causal):
    layer, x = noisy(mixer("average-attention", causal)), torch.randn(2, 4, 8)
    out = []
    for i in range(4):
        g = layer.ffn.down(layer.ffn.up((x[:, : i + 1] if causal else x).mean(1)).relu())
        a, b = torch.sigmoid(layer.gate(torch.cat((x[:, i], g), -1))).chunk(2, -1)
        out.append(a * x[:, i] + b * g)
    torch.testing.assert_close(layer(x), torch.stack(out, 1))


def test_priors_by_hand():
    q, k, v = (torch.randn(1, 2, 4, 4) for _ in range(3))
    plain = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(TalkingHeads(8, 2, causal=True).mix(q, k, v), plain)
    torch.testing.assert_close(AdaptiveSpan(8, 2, span=100.0, causal=True).mix(q, k, v), plain)
    short = AdaptiveSpan(8, 2, span=-5.0, ramp=1.0, causal=True)
    with aside.collect() as told:
        torch.testing.assert_close(short.mix(q, k, v), v)  # nothing but itself
        AdaptiveSpan(8, 2, span=100.0, penalty=0.1).mix(q, k, v)
        AdaptiveSpan(8, 2, span=100.0, penalty=0.1).eval().mix(q, k, v)
    assert [value.item() for value in told.losses] == [0.0, pytest.approx(10.0)]


def test_residual_scores_reach_the_next_layer():
    lower, upper = (mixer("residual-scores", False) for _ in range(2))
    x, context = torch.randn(1, 5, 8), Context()
    lower(x, context)
    alone = upper(x, Context())
    scores = context.kept["scores"].clone()
    both = upper(x, context)
    assert not torch.allclose(both, alone)
    q, k, v = upper.project(x)
    weight = (q @ k.transpose(-1, -2) / 2 + scores).softmax(-1)
    torch.testing.assert_close(both, upper.out((weight @ v).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("spec", ["linear-attention", "performer", "delta", "sliding-window(window=32)", "big-bird(block=32)",
                                  "axial", "linformer(rank=16)", "nystrom", "induced", "average-attention", "clustered", "star",
                                  "external-nodes(window=32)", "segments(block=32)"])  # fmt: skip
def test_long_sequence_leaves_grow_linearly(spec):
    causal = name_of(spec) not in ONLY_WHOLE
    counts = []
    for length in (512, 4096):
        layer = mixer(spec, causal, width=16, length=8192, grid=(512,), depth=2).eval()
        counts.append(flops(layer, torch.zeros(1, length, 16)))
    assert math.log(counts[1] / counts[0]) / math.log(8) < 1.1
