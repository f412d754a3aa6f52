import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)

from interlayer.core import aside, cost
from interlayer.core.mixer import Attention, Cache, Context
from interlayer.core.select import blocks
from interlayer.core.skipping import Skip, SkipDecoder, SkipMixer, attention_of
from interlayer.core.skipping.skip import scatter
from interlayer.models import Transformer

ENDS = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
SIZES = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
    "initializer_range": 0.2, **ENDS,
}  # fmt: skip
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, **SIZES)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(num_key_value_heads=1, sliding_window=6, **SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(num_key_value_heads=1, **SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_embd=16, n_layer=3, n_head=2, initializer_range=0.2, **ENDS)
    ),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=32, hidden_size=16, num_hidden_layers=3, ffn_dim=24, num_attention_heads=2, word_embed_proj_dim=16,
            max_position_embeddings=64, init_std=0.2, **ENDS,
        )
    ),
}  # fmt: skip
LENGTH, MORE = 9, 3


def decoder(family="llama", of="attention", per="sequence", seed=0, attention="sdpa"):
    """A tiny decoder whose first two layers skip, and its skips."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval()
    model.set_attn_implementation(attention)
    found, skips = blocks(model)[1], []
    for i in range(2):
        name = attention_of(found[i])
        skip = SkipDecoder(found[i] if of == "block" else getattr(found[i], name), 16, per=per, passes=of == "block")
        skip.router.weight.data.normal_()
        skips.append(skip.eval())
        if of == "block":
            found[i] = skip
        else:
            setattr(found[i], name, skip)
    return model, skips


def text(rows=5, length=LENGTH + MORE, seed=1):
    return torch.randint(1, 32, (rows, length), generator=torch.Generator().manual_seed(seed))


def held(skip, keep):
    """The skip computes everything and multiplies by what ``keep`` says."""
    skip.training = True
    if keep is not None:
        skip.decide = lambda x, real=None: (keep, keep.float())


CASES = (
    ("attention", "sequence", "sdpa"),
    ("block", "sequence", "sdpa"),
    ("attention", "token", "eager"),
    ("block", "token", "sdpa"),
)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_skipping_is_computing_and_masking_also_with_padding_and_a_cache(family):
    ids, mask = text(), torch.ones(5, LENGTH + MORE, dtype=torch.int64)
    mask[0, :3] = mask[3, :5] = 0
    for (of, per, attention), pads in itertools.product(CASES, (False, True)):
        model, skips = decoder(family, of, per, seed=2 if family == "opt" else 0, attention=attention)

        def given(a, b, pads=pads):
            """The arguments for some of the tokens, with padding on the left."""
            places = (mask.cumsum(1) - 1).clamp(min=0)[:, a:b]
            pad = {"attention_mask": mask[:, :b], "position_ids": places} if pads else {}
            return {"input_ids": ids[:, a:b], **pad}

        real = mask[:, :LENGTH] > 0 if pads else torch.ones(5, LENGTH, dtype=torch.bool)
        plain = model(**given(0, LENGTH), use_cache=False).logits
        out = model(**given(0, LENGTH), use_cache=True)
        torch.testing.assert_close(out.logits[real], plain[real])
        cache = out.past_key_values
        rest = [model(**given(t, t + 1), past_key_values=cache).logits for t in range(LENGTH, LENGTH + MORE)]
        keeps = [cache.layers[i].keep for i in range(2)]
        assert per == "token" or not torch.stack(keeps).all()  # something is skipped
        for skip, keep in zip(skips, keeps, strict=True):
            held(skip, keep)
        whole = model(**given(0, LENGTH + MORE), use_cache=False).logits
        torch.testing.assert_close(whole[:, :LENGTH][real], plain[real], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.cat(rest, 1), whole[:, LENGTH:], atol=1e-4, rtol=1e-4)


def test_what_skips_costs_nothing_and_has_no_keys():
    model, skips = decoder()
    ids, found, calls = text(8), {}, []
    for skip in skips:
        skip.module.register_forward_hook(lambda m, a, k, out: calls.append(len(out[0])), with_kwargs=True)
    for kept in (0, 3, 8):
        for skip in skips:
            skip.decide = lambda x, real=None, kept=kept: (torch.arange(len(x)) < kept, None)
        calls.clear()
        cache = model(input_ids=ids, past_key_values=DynamicCache()).past_key_values
        assert calls == [kept] * 2 * (kept > 0)
        assert [0 if x.inner.keys is None else len(x.inner.keys) for x in cache.layers[:2]] == [kept, kept]
        assert cache.get_seq_length() == ids.shape[1] and len(cache.layers[2].keys) == 8
        found[kept] = cost.flops(model, ids, use_cache=False)
    assert (found[3] - found[0]) * 8 == (found[8] - found[0]) * 3  # the FLOPs of attention go with the share


@torch.no_grad()
def test_tokens_that_skip_have_no_keys_in_a_batch_of_one():
    model, skips = decoder(per="token")
    ids = text(1)
    kept = []
    decide = skips[0].decide
    skips[0].decide = lambda x, real=None: kept.append(decide(x, real)[0]) or decide(x, real)
    cache = model(input_ids=ids[:, :LENGTH]).past_key_values
    for t in range(LENGTH, LENGTH + MORE):
        model(input_ids=ids[:, t : t + 1], past_key_values=cache)
    keep = torch.cat(kept, 1)[0]
    assert 0 < keep.sum() < len(keep)
    assert cache.layers[0].spots[0].tolist() == keep.nonzero().flatten().tolist()
    assert cache.layers[0].inner.keys.shape[2] == keep.sum() and cache.get_seq_length() == len(keep)


@pytest.mark.parametrize("per", ["sequence", "token"])
@torch.no_grad()
def test_a_cache_follows_beams_and_cropping(per):
    model, _ = decoder(per=per)
    ids, order = text(4), torch.tensor([2, 0, 0, 3, 1])

    def after(change, rows):
        cache = model(input_ids=ids[:, :LENGTH]).past_key_values
        change(cache)
        return model(input_ids=ids[rows, LENGTH : LENGTH + 1], past_key_values=cache).logits

    plain = after(lambda cache: None, slice(None))
    for change, rows in (
        (lambda c: c.reorder_cache(order), order),
        (lambda c: c.batch_select_indices(order[:2]), order[:2]),
        (lambda c: c.batch_repeat_interleave(2), torch.arange(4).repeat_interleave(2)),
    ):
        torch.testing.assert_close(after(change, rows), plain[rows], atol=1e-5, rtol=1e-4)

    cache = model(input_ids=ids[:, :LENGTH]).past_key_values
    model(input_ids=ids[:, LENGTH : LENGTH + 2], past_key_values=cache)
    cache.crop(-2)
    assert cache.get_seq_length() == LENGTH
    again = model(input_ids=ids[:, LENGTH : LENGTH + 1], past_key_values=cache).logits
    torch.testing.assert_close(again, plain, atol=1e-5, rtol=1e-4)
    cache.crop(-cache.get_seq_length())
    assert cache.layers[0].keep is None and cache.layers[0].spots is None  # the next prompt decides anew
    beams = model.generate(ids, max_new_tokens=3, num_beams=3, do_sample=False)
    assert beams.shape == (4, ids.shape[1] + 3)


@torch.no_grad()
def test_padding_changes_neither_the_decision_nor_the_others():
    model, _ = decoder()
    ids = text(3, 8)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    batch = model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    alone = model(input_ids=ids[1:2, 4:])
    torch.testing.assert_close(batch.logits[1:2, 4:], alone.logits, atol=1e-5, rtol=1e-4)
    assert [bool(x.keep[1]) for x in batch.past_key_values.layers[:2]] == [
        bool(x.keep) for x in alone.past_key_values.layers[:2]
    ]


@torch.no_grad()
def test_a_strange_cache_is_an_error():
    model, _ = decoder()
    other, _ = decoder(per="token")
    plain, ids = FAMILIES["llama"]().eval(), text(2)

    def go(net, cache, rows=2):
        net(input_ids=ids[:rows, :1], past_key_values=cache)

    with pytest.raises(
        ValueError, match=r"layer 0 of the cache holds 12 tokens, but not which of them skipped; .*another model"
    ):
        go(model, plain(input_ids=ids).past_key_values)
    with pytest.raises(ValueError, match=r"belongs to a model with skipping, but a layer without it writes to it"):
        go(plain, model(input_ids=ids).past_key_values)
    with pytest.raises(ValueError, match=r"2 sequences of a model where sequences skip, for a batch of 1"):
        go(model, model(input_ids=ids).past_key_values, rows=1)
    with pytest.raises(ValueError, match=r"model where tokens skip"):
        go(model, other(input_ids=ids).past_key_values)
    with pytest.raises(ValueError, match=r"StaticLayer; expected one that grows"):
        go(model, StaticCache(config=model.config, max_cache_len=8))
    offloaded = DynamicCache(config=model.config)
    offloaded.offloading = True  # asked for in the constructor, it wants a device to offload from
    with pytest.raises(ValueError, match=r"offloaded cache"):
        go(model, offloaded)
    wide, _ = decoder("qwen2")
    cache = wide(input_ids=ids).past_key_values
    cache.layers[0].keep = torch.ones(2, dtype=torch.bool)
    cache.layers[0].inner.keys = torch.zeros(2, 5, 12, 8)
    with pytest.raises(ValueError, match=r"keys \(2, 5, 12, 8\) are stored, \(2, 1, 1, 8\) come"):
        go(wide, cache)
    with pytest.raises(ValueError, match="'encoder_hidden_states', which skipping does not support"):
        decoder("gpt2", of="block")[1][0](torch.zeros(1, 2, 16), encoder_hidden_states=torch.zeros(1, 2, 16))
    with pytest.raises(ValueError, match=r"mask \(2, 12\); expected \[batch, 1, new, all\]"):
        decoder(per="token")[1][0](torch.zeros(2, 12, 16), attention_mask=torch.ones(2, 12))
    with pytest.raises(ValueError, match="Linear has no layer_idx"):
        SkipDecoder(nn.Linear(2, 2), 2)


@torch.no_grad()
def test_scores_of_what_skips_are_refused():
    ids = text(2)
    model, _ = decoder("gpt2", attention="eager")
    assert len(model(ids, output_hidden_states=True).hidden_states) == 4
    with pytest.raises(ValueError, match="output_attentions was asked for"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match="output_hidden_states was asked for"):
        decoder("gpt2", of="block")[0](ids, output_hidden_states=True)


def own(seed=0):
    torch.manual_seed(seed)
    model = Transformer(32, 32, 3, 16, 2).eval()
    for p in model.parameters():
        p.data.mul_(4)
    for block in model.trunk.blocks[:2]:
        block.mixer = SkipMixer(block.mixer, 16).eval()
        block.mixer.router.weight.data.normal_()
    return model, [b.mixer for b in model.trunk.blocks[:2]]


@torch.no_grad()
def test_attention_of_interlayer_skips_with_a_cache_and_padding():
    ids = text()
    for mask in (None, torch.arange(LENGTH + MORE) >= torch.tensor([[0], [3], [0], [5], [0]])):
        model, skips = own()
        cache, outs, shown = Cache(), [], slice(None) if mask is None else mask
        for a, b in [(0, LENGTH), *((t, t + 1) for t in range(LENGTH, LENGTH + MORE))]:
            outs.append(model(ids[:, a:b], cache=cache, mask=None if mask is None else mask[:, :b]))
        keeps = [cache.states[2 * i].keep for i in range(2)]
        assert not torch.stack(keeps).all()
        stored = sum(int(k.sum()) for k in keeps) + 5
        assert cache.bytes == stored * 2 * (LENGTH + MORE) * 16 * 4
        for skip, keep in zip(skips, keeps, strict=True):
            held(skip, keep)
        torch.testing.assert_close(torch.cat(outs, 1)[shown], model(ids, mask=mask)[shown], atol=1e-4, rtol=1e-4)
    model, _ = own()
    assert model.generate(ids, 3).shape == (5, LENGTH + MORE + 3)


def test_strange_caches_and_inputs_of_interlayer_are_errors():
    model, skips = own()
    ids, cache = text(2, 3), Cache()
    Transformer(32, 32, 3, 16, 2)(ids, cache=cache)
    with pytest.raises(ValueError, match="the cache has 3 tokens and nothing of sublayer 0, for a batch of 2"):
        model(ids, cache=cache)
    cache = Cache()
    model(ids, cache=cache)
    with pytest.raises(ValueError, match="3 tokens and 2 sequences, for a batch of 1"):
        model(ids[:1], cache=cache)
    with pytest.raises(ValueError, match="no k of sublayer 0"):
        Transformer(32, 32, 3, 16, 2)(ids, cache=cache)
    with pytest.raises(ValueError, match="the stream gives tuple; expected one input"):
        skips[0]((1, 2, 3))
    with pytest.raises(ValueError, match="skips whole sequences"):
        SkipMixer(Attention(8, 2), 8, per="token")


def test_the_gate_trains_by_the_straight_through_formula():
    torch.manual_seed(0)
    layer = SkipMixer(Attention(8, 2, causal=True), 8, weight=3.0, capacity=0.2)
    layer.router.weight.data.normal_()
    x, up = torch.randn(6, 5, 8), torch.randn(6, 5, 8)
    with aside.collect() as told:
        loss = (layer(x, Context()) * up).sum()
    (loss + told.loss).backward()
    score = (x.mean(1) @ layer.router.weight[0]).sigmoid()
    keep = score >= 0.5
    assert 0 < keep.sum() < 6 and torch.isclose(told.loss, 3 * (keep.float().mean() - 0.2))
    with torch.no_grad():  # d loss / d gate, and d gate / d weight = score (1 - score) mean(x)
        slope = (layer.module(x) * up).sum((1, 2)) + 3 / 6
        expected = (slope * score * (1 - score)) @ x.mean(1)
    torch.testing.assert_close(layer.router.weight.grad[0], expected, atol=1e-5, rtol=1e-4)
    assert torch.isclose(told.metrics["skip kept"][0], keep.float().mean())


def test_capacity_keeps_the_highest_scores_and_counts_what_finds_no_room():
    layer = Skip(nn.Identity(), 1, threshold=None, capacity=0.4).eval()
    layer.router.weight.data.fill_(1.0)
    x = torch.tensor([3.0, -1.0, 2.0, 1.0, 4.0])[:, None, None]
    with aside.collect() as told:
        keep = layer.decide(x)[0]
    assert keep.tolist() == [True, False, False, False, True]  # ceil(0.4 * 5)
    assert torch.isclose(told.metrics["skip dropped"][0], torch.tensor(0.4))
    assert layer.decide(x[:1])[0].tolist() == [True]  # one at least


def test_it_begins_as_the_module_was_and_reads_as_it():
    model, skips = decoder()
    plain = copy.deepcopy(model)
    for net in (model, plain):
        for i, block in enumerate(net.model.layers[:2]):
            if net is plain:
                block.self_attn = block.self_attn.module
            else:
                nn.init.zeros_(block.self_attn.router.weight)
                assert block.self_attn.layer_idx == i
    ids = text(3)
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert not hasattr(skips[0], "nonsense")


@torch.no_grad()
def test_autocast_and_compilation():
    model, _ = decoder()
    ids = text(4)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(ids).logits.isfinite().all()
    x = torch.randn(5, 4, 16)
    x[:2] = -x[2:4]
    for layer in (decoder("gpt2")[1][0], own()[1][0]):
        assert 0 < layer.decide(x)[0].sum() < 5
        found, plain = torch.compile(layer, backend="eager")(x), layer(x)
        torch.testing.assert_close(found, plain)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"capacity": 0.0}, "capacity=0.0; expected a share above 0"),
        ({"capacity": 1.5}, "at most 1"),
        ({"threshold": 1.0}, "expected a score between 0 and 1"),
        ({"per": "layer"}, "is not one of sequence, token"),
        ({"per": "token", "threshold": None}, "later tokens decide about earlier"),
        ({"weight": -1.0}, "expected at least 0"),
    ],
)
def test_clear_errors(options, says):
    with pytest.raises(ValueError, match=says):
        Skip(nn.Identity(), 2, **options)


def test_scatter():
    y, rows = torch.randn(2, 3), torch.tensor([3, 1])
    naive = torch.zeros(4, 3)
    for value, row in zip(y, rows, strict=True):
        naive[row] = value
    assert torch.equal(scatter(y, rows, 4), naive)
