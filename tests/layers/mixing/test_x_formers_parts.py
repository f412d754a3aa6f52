"""Leaves that are no mixers: positions, norms, MLPs, and what changes how blocks follow each other."""

import math

import pytest
import torch

from interlayer.core import aside
from interlayer.core.mixer import Cache, Context
from interlayer.core.order import Sequential
from interlayer.core.stream import State
from interlayer.layers.mixing.x_formers.compressed import Nystrom
from interlayer.layers.mixing.x_formers.depth import EarlyExit, Feedback, Transparent, Universal
from interlayer.layers.mixing.x_formers.lengths import Funnel, Sentences
from interlayer.layers.mixing.x_formers.parts import ProductKeys, ScaleNorm
from interlayer.layers.mixing.x_formers.positions import Alibi, Conditional, RelativeBias
from interlayer.models import Encoder, Transformer, VisionTransformer

TOKENS = torch.randint(0, 20, (2, 11), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab": 20, "length": 12, "depth": 4, "width": 16, "heads": 2}


@pytest.mark.parametrize("causal", [False, True])
def test_relative_bias_is_t5s(causal):
    from transformers.models.t5.modeling_t5 import T5Attention

    position = RelativeBias(2, causal=causal)
    distance = torch.arange(-200, 201)
    wanted = T5Attention._relative_position_bucket(distance, bidirectional=not causal)
    assert torch.equal(position.bucket(distance), wanted)
    assert set(position.bucket(distance[:201]).tolist()) == set(range(32 if causal else 16))
    bias = position.bias(3, 5)
    assert bias.shape == (2, 3, 5)
    assert torch.equal(bias[:, 1, 3], position.table[0]) and torch.equal(bias[:, 2, 2], position.table[2])
    built = (
        Transformer(**SIZES, position="relative-bias").trunk.position,
        Encoder(**SIZES, position="relative-bias").trunk.position,
    )
    assert built[0].causal and not built[1].causal
    with pytest.raises(ValueError, match=r"position RelativeBias needs a mixer that offers \['bias'\]"):
        Transformer(**SIZES, position="relative-bias", mixer="performer")


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12])
def test_alibi_is_blooms(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    theirs = build_alibi_tensor(torch.ones(1, 9), heads, torch.float32)[:, 0]  # up to a number for each query
    ours = Alibi(heads).bias(9, 9)
    torch.testing.assert_close(ours[:, -1], theirs - theirs[:, -1:])
    torch.testing.assert_close(ours[:, 4, 2], -2 * Alibi(heads).slopes)
    torch.testing.assert_close(Alibi(heads).bias(3, 9), ours[:, 6:])


@pytest.mark.parametrize("rounds", [6, 10])
def test_nystroem_landmarks_are_those_of_public_code(rounds):
    from transformers import NystromformerConfig
    from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

    config = NystromformerConfig(hidden_size=8, num_attention_heads=2, num_landmarks=4, segment_means_seq_len=12)
    theirs = NystromformerSelfAttention(config).eval()
    theirs.init_option = "exact"  # each matrix by its own norm
    theirs.conv_kernel_size = None  # without the convolution that is added to the attention
    ours = Nystrom(8, 2, landmarks=4, rounds=rounds).eval()
    theirs.iterative_inv = lambda a, n_iter=rounds: NystromformerSelfAttention.iterative_inv(theirs, a, n_iter)
    with torch.no_grad():
        for i, part in enumerate((theirs.query, theirs.key, theirs.value)):
            part.weight.copy_(ours.qkv.weight[8 * i : 8 * i + 8])
            part.bias.copy_(ours.qkv.bias[8 * i : 8 * i + 8])
        x = torch.randn(3, 12, 8)
        read = ours.mix(*ours.project(x)).transpose(1, 2).flatten(2)
        torch.testing.assert_close(theirs(x)[0], read, rtol=1e-3, atol=1e-4)


def test_conditional_positions_are_a_zero_padded_convolution():
    grid = Conditional(2, grid=(3, 4))
    x = torch.randn(2, 12, 2)
    wanted = x.clone()
    for i in range(3):
        for j in range(4):
            wanted[:, 4 * i + j] += grid.conv.bias
            for a in (-1, 0, 1):
                for b in (-1, 0, 1):
                    if 0 <= i + a < 3 and 0 <= j + b < 4:
                        wanted[:, 4 * i + j] += grid.conv.weight[:, 0, a + 1, b + 1] * x[:, 4 * (i + a) + j + b]
    torch.testing.assert_close(grid.embed(x), wanted)
    line = Conditional(2, grid=(12,), causal=True)
    changed = x.clone()
    changed[:, 6] += 1
    assert torch.equal(line.embed(changed)[:, :6], line.embed(x)[:, :6])
    assert not torch.equal(line.embed(changed)[:, 8], line.embed(x)[:, 8])
    model = VisionTransformer(1, (4, 6), patch=2, depth=1, width=8, heads=2, position="conditional")
    assert model.trunk.position.grid == (2, 3) and model(torch.randn(2, 1, 4, 6)).shape == (2, 10)
    with pytest.raises(ValueError, match="Conditional position cannot use a cache"):
        Transformer(**SIZES, position="conditional")(TOKENS, cache=Cache())
    with pytest.raises(ValueError, match="Conditional position takes no padding mask"):
        Encoder(**SIZES, position="conditional")(TOKENS, mask=torch.ones(2, 11, dtype=torch.bool))


def test_scale_norm_and_product_keys_by_hand():
    x = torch.randn(3, 4)
    torch.testing.assert_close(ScaleNorm(4)(x), 2 * x / x.norm(dim=1, keepdim=True))
    memory = ProductKeys(4, keys=3, top=2, heads_read=1)
    x = torch.randn(1, 1, 4)
    q = memory.query(x)[0, 0]
    score = (memory.keys[0, 0] @ q[:2])[:, None] + memory.keys[0, 1] @ q[2:]
    best = score.flatten().topk(2)
    torch.testing.assert_close(memory(x)[0, 0], best.values.softmax(0) @ memory.values[best.indices])


def grow(state, block, source=None):
    """A block that any test can follow: one more, and a little of what is read."""
    state.x = state.x + 1 if source is None else state.x + 10 * source.mean(1, keepdim=True)
    return state


def test_universal_depth_is_the_papers_loop():
    """Dehghani et al., appendix: halting probabilities, remainders and weights of every position on its own."""
    torch.manual_seed(0)
    order = Universal(2, width=4, steps=5, penalty=1.0).double()
    torch.nn.init.normal_(order.halt.weight)
    x = torch.randn(3, 6, 4, dtype=torch.float64)
    with aside.collect() as told:
        got = order(State(x), lambda state, block: State(torch.tanh(1.5 * state.x + block))).x
        order.eval()(State(x), grow)  # reports nothing
    wanted, ponder = torch.zeros_like(x), []
    for b in range(3):
        for i in range(6):
            state, halting, rest, steps = x[b, i], 0.0, 0.0, 0
            for t in range(1, 6):
                if halting >= 1:
                    break
                moment = torch.tensor([f(i * r) + f(t * r) for r in (1.0, 0.01) for f in (math.sin, math.cos)])
                p = torch.sigmoid(order.halt(state + moment)).item()
                if halting + p > 0.99:
                    weight = rest = 1 - halting
                    halting = 1.0
                else:
                    weight, halting = p, halting + p
                state = torch.tanh(1.5 * torch.tanh(1.5 * (state + moment)) + 1)
                wanted[b, i] = weight * state + (1 - weight) * wanted[b, i]
                steps += 1
            ponder.append(steps + rest)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    assert len(set(ponder)) > 2 and told.loss.item() == pytest.approx(order.penalty * sum(ponder) / 18)


def test_universal_depth_stops_when_all_have_halted():
    order, seen = Universal(1, width=2, steps=50), []
    torch.nn.init.constant_(order.halt.bias, 3.0)  # halts in the second step
    order(State(torch.zeros(2, 3, 2)), lambda state, block: (seen.append(block), state)[1])
    assert len(seen) == 2


def test_early_exit_waits_for_answers_that_agree():
    """PABEE: block after block for every example, with the model's head as every classifier's last part."""
    torch.manual_seed(1)
    model = Encoder(**{**SIZES, "depth": 6}, classes=2, order="early-exit(patience=2)").eval()
    order, trunk = model.trunk.order, model.trunk
    torch.nn.init.normal_(model.embed.weight)
    for exit_ in order.exits:
        torch.nn.init.normal_(exit_.weight, std=0.5)
    tokens = torch.randint(0, 20, (12, 11))
    states = []

    class Record(Sequential):
        def forward(self, state, step):
            for block in range(self.depth):
                state = step(state, block)
                states.append(state.x)
            return state

    trunk.order = Record(6)
    model(tokens)
    trunk.order = order
    logits = [model.head(trunk.stream.finish(State(order.leave(x, n))).mean(1)) for n, x in enumerate(states)]
    wanted, left = [], []
    for b in range(12):
        labels, agreed = [one[b].argmax().item() for one in logits], 0
        for n in range(6):
            agreed = agreed + 1 if n and labels[n] == labels[n - 1] else 0
            if agreed == 2 or n == 5:
                wanted.append(logits[n][b])
                left.append(n)
                break
    torch.testing.assert_close(model(tokens), torch.stack(wanted))
    assert len(set(left)) > 1
    first, ran = left.index(min(left)), []
    for block in trunk.blocks:
        block.mlp.register_forward_hook(lambda *_: ran.append(1))
    torch.testing.assert_close(model(tokens[[first]]), wanted[first][None])
    assert len(ran) == left[first] + 1 < 6
    with pytest.raises(ValueError, match="never exits early"):
        EarlyExit(3, width=4, patience=2)
    with pytest.raises(ValueError, match="no answer for the whole input"):
        Encoder(**SIZES, order="early-exit")(TOKENS)
    with pytest.raises(ValueError, match="use it in a classifier"):
        Transformer(**SIZES, order="early-exit")


def test_early_exit_trains_every_block_as_often_as_the_paper_weighs_its_loss():
    torch.manual_seed(0)
    order = EarlyExit(4, width=1)
    for exit_ in order.exits:
        torch.nn.init.ones_(exit_.weight)
        torch.nn.init.zeros_(exit_.bias)
    state = State(torch.zeros(20000, 1, 1), answer=lambda at: at.x)
    share = torch.bincount(order(state, grow).x.flatten().long())[1:] / 20000
    torch.testing.assert_close(share, torch.tensor([0.1, 0.2, 0.3, 0.4]), rtol=0, atol=0.02)


def test_a_funnel_pools_queries_and_comes_back():
    """Dai et al.: h' = pool(h), Q = h', KV = h; then every state repeated, plus the first stage's."""
    order = Funnel(4, stages=2, decode=1)
    x = torch.randn(2, 5, 3)
    first = x + 1 + 1  # two blocks at full length
    pooled = torch.stack((first[:, :2].mean(1), first[:, 2:4].mean(1), first[:, 4]), 1)
    pooled = pooled + 10 * first.mean(1, keepdim=True)
    wanted = first + pooled.repeat_interleave(2, 1)[:, :5] + 1
    torch.testing.assert_close(order(State(x), grow).x, wanted)
    assert Funnel(9, stages=3, decode=0).firsts == [0, 3, 6]
    assert type(Encoder(**SIZES, order="funnel").trunk.position).__name__ == "Learned"
    model = Encoder(**SIZES, position="sinusoidal", order="funnel(stages=3, decode=1)")
    lengths = []
    for block in model.trunk.blocks:
        block.mlp.register_forward_hook(lambda m, i, o: lengths.append(o.shape[1]))
    assert model(TOKENS).shape == (2, 11, 20) and lengths == [11, 6, 3, 11]
    for options, words in (
        ({"position": "rotary"}, "order Funnel changes the length between blocks"),
        ({"position": "sinusoidal", "mixer": "linear-attention"}, "order Funnel needs a mixer that offers"),
        ({"position": "sinusoidal", "depth": 1}, "stages 2 for 1 blocks"),
    ):
        with pytest.raises(ValueError, match=words):
            Encoder(**{**SIZES, **options}, order="funnel")
    with pytest.raises(ValueError, match="the stream keeps states of the full length"):
        Encoder(**SIZES, position="sinusoidal", order="funnel", stream="denseformer")(TOKENS)
    with pytest.raises(ValueError, match="pooled states mix a token with the next"):
        Transformer(**SIZES, position="sinusoidal", order="funnel")
    with pytest.raises(ValueError, match="Funnel order takes no padding mask"):
        model(TOKENS, mask=torch.ones(2, 11, dtype=torch.bool))


@pytest.mark.parametrize("length", [3, 4, 8, 11])
def test_sentences_are_read_word_by_word_and_then_one_by_one(length):
    """HIBERT: words within sentences, then sentences, each by its last word; one sentence of one example at a time."""
    torch.manual_seed(0)
    model = Encoder(**SIZES, order="sentences(block=4)").double().eval()
    trunk, x = model.trunk, model.embed(TOKENS[:, :length])

    def run(x, blocks):
        for n in blocks:
            mixer, mlp, norms = trunk.blocks[n].mixer, trunk.blocks[n].mlp, trunk.stream.norms[2 * n : 2 * n + 2]
            x = x + mixer(norms[0](x), Context(position=trunk.position))
            x = x + mlp(norms[1](x))
        return x

    words = [[run(one[a : a + 4][None], (0, 1)) for a in range(0, length, 4)] for one in x]
    sentences = [run(torch.cat([w[:, -1:] for w in one], 1), (2, 3)) for one in words]
    wanted = [torch.cat([w + d[:, i] for i, w in enumerate(one)], 1) for one, d in zip(words, sentences, strict=True)]
    torch.testing.assert_close(model(TOKENS[:, :length]), model.head(trunk.stream.last(torch.cat(wanted))))


def test_orders_that_change_the_length_refuse_what_keeps_it():
    for order in ("sentences(block=4)", "funnel"):
        with pytest.raises(ValueError, match="ResidualScores keeps things for later blocks"):
            Encoder(**SIZES, position="sinusoidal", order=order, mixer="residual-scores")(TOKENS)
    with pytest.raises(ValueError, match="the stream keeps states"):
        Encoder(**SIZES, order="sentences(block=4)", stream="transparent")(TOKENS)
    with pytest.raises(ValueError, match="a sentence is read as a whole"):
        Transformer(**SIZES, order="sentences(block=4)")
    with pytest.raises(ValueError, match="at least 2 blocks and 2 sentences"):
        Sentences(4, block=4, length=4)
    model = Transformer(**SIZES, order="feedback", mixer="residual-scores")  # every token begins anew
    assert model(TOKENS).shape == (2, 11, 20)


def test_feedback_reads_the_memory_of_all_levels():
    """Fan et al.: every block of token t attends to m_1 .. m_{t-1}, each a weighted sum over all levels."""
    torch.manual_seed(0)
    model = Transformer(**{**SIZES, "depth": 2}, order="feedback", position="none").double()
    trunk = model.trunk
    torch.nn.init.normal_(trunk.order.level)
    x = model.embed(TOKENS[:, :5])
    memory, out = [], []
    for t in range(5):
        h, levels = x[:, t], [x[:, t]]
        for n, block in enumerate(trunk.blocks):
            norms = trunk.stream.norms[2 * n : 2 * n + 2]
            keys = norms[0](torch.stack(memory or [h], 1))
            w = block.mixer.qkv.weight.split(16)
            q, k, v = (y @ m.T for y, m in zip((norms[0](h)[:, None], keys, keys), w, strict=True))
            q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in (q, k, v))
            read = ((q @ k.mT * 8**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)[:, 0]
            h = h + block.mixer.out(read)
            h = h + block.mlp(norms[1](h))
            levels.append(h)
        memory.append(sum(w * one for w, one in zip(trunk.order.level.softmax(0), levels, strict=True)))
        out.append(h)
    torch.testing.assert_close(model(TOKENS[:, :5]), model.head(trunk.stream.last(torch.stack(out, 1))))
    changed = TOKENS.clone()
    changed[:, 6:] = 0
    torch.testing.assert_close(model(changed)[:, :6], model(TOKENS)[:, :6])
    with pytest.raises(ValueError, match="use it in a causal model"):
        Feedback(2, causal=False)
    with pytest.raises(ValueError, match="the stream keeps states"):
        Transformer(**SIZES, order="feedback", stream="transparent")(TOKENS)


def test_transparent_attention_is_a_mean_of_all_levels():
    stream = Transparent(2, 4, branches=2)
    torch.nn.init.normal_(stream.level)
    x = torch.randn(3, 4)
    state = stream.start(x)
    levels = [x]
    for layer in range(4):
        state = stream.write(state, layer, torch.full_like(x, layer + 1.0))
        if layer % 2:
            levels.append(levels[-1] + 2 * layer + 1)
    weight = stream.level.softmax(0)
    wanted = stream.last(sum(w * one for w, one in zip(weight, levels, strict=True)))
    torch.testing.assert_close(stream.finish(state), wanted)


@pytest.mark.parametrize("position", ["relative-bias", "alibi", "implicit"])
def test_positions_decode_with_a_cache(position):
    torch.manual_seed(0)
    model, cache = Transformer(**SIZES, position=position).double().eval(), Cache()
    with torch.no_grad():
        steps = [model(TOKENS[:, a:b], cache=cache) for a, b in ((0, 4), (4, 5), (5, 11))]
        torch.testing.assert_close(torch.cat(steps, 1), model(TOKENS))
