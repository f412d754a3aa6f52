import pytest
import torch
from torch import nn

from interlayer import models
from interlayer.core import recipe
from interlayer.probe.painters import VARIANTS, Painters, cost, execution, similarity

SIZES = {"hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 16}


def hugging_face(name):
    import transformers as t

    torch.manual_seed(0)
    wide = {"initializer_range": 0.3}  # random blocks must matter
    model = {
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_embd=16, n_layer=6, n_head=2, vocab_size=32, **wide)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(vocab_size=32, **SIZES, **wide)),
        "bert": lambda: t.BertModel(t.BertConfig(vocab_size=32, **SIZES, **wide)),
        "vit": lambda: t.ViTModel(t.ViTConfig(image_size=8, patch_size=4, num_channels=1, **SIZES, **wide)),
    }[name]()
    return model.eval()


def ours(**slots):
    torch.manual_seed(0)
    model = models.Transformer(vocab=32, length=32, depth=6, width=16, heads=2, **slots)
    for p in model.trunk.blocks.parameters():
        nn.init.normal_(p, std=0.3)
    return model.eval()


def inputs(name):
    return torch.randn(2, 1, 8, 8) if name == "vit" else torch.arange(8).view(2, 4)


def output(model, x):
    out = model(x)
    return out if isinstance(out, torch.Tensor) else out[0]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.linear(x).tanh()


def test_orders_by_hand():
    assert [execution(v, 8, 2, 6, loops=2) for v in VARIANTS if v != "random-order"] == [
        [0, 1, 6, 7],
        [0, 1, 4, 4, 4, 4, 6, 7],
        [0, 1, 5, 4, 3, 2, 6, 7],
        [0, 1, [2, 3, 4, 5], 6, 7],
        [0, 1, [2, 3, 4, 5], [2, 3, 4, 5], 6, 7],
    ]
    mixed = [execution("random-order", 8, 2, 6, seed=s) for s in range(30)]
    assert mixed[3] == execution("random-order", 8, 2, 6, seed=3) and len({tuple(m) for m in mixed}) > 10
    assert all(sorted(m) == list(range(8)) and m != list(range(8)) for m in mixed)
    assert cost([0, [1, 2], [1, 2], 3]) == {"depth": 4, "work": 6}


@pytest.mark.parametrize("variant", VARIANTS)
def test_plain_module_equals_the_order_written_out(variant):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Sequential(*(Block() for _ in range(6)))), torch.randn(3, 4)
    plan = Painters().plan(model, variant=variant, start=1, end=5, loops=2, seed=1)
    h = model[0](x)
    for item in execution(variant, 6, 1, 5, loops=2, seed=1):
        if isinstance(item, list):
            h = sum(model[1][i](h) for i in item) / len(item)
        else:
            h = model[1][item](h)
    torch.testing.assert_close(plan.apply()(x), h)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_hugging_face_round_trip_and_model_untouched(name, variant, tmp_path):
    model, x = hugging_face(name), inputs(name)
    before = output(model, x)
    new = Painters().plan(model, variant=variant, start=1, end=5, loops=2).apply()
    out = output(new, x)
    assert not torch.allclose(out, before) and torch.equal(output(model, x), before)
    assert model.config.num_hidden_layers == 6
    recipe.save(new, tmp_path)
    back = recipe.load(tmp_path)
    assert torch.equal(output(back, x), out) and recipe.steps(back) == recipe.steps(new)
    shared = sum(p.numel() for p in new.parameters())
    assert shared == sum(p.numel() for p in back.parameters()) <= sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_key_value_cache_is_exact(name, variant):
    new = Painters().plan(hugging_face(name), variant=variant, start=1, end=5, loops=2).apply()
    tokens = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(0))
    whole = new(tokens, use_cache=False).logits
    cache, parts = None, []
    for step in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:]):
        out = new(step, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    runs = cost(recipe.steps(new)[0]["structure"]["order"])["work"]
    assert len(cache.layers) == runs and cache.get_seq_length() == 9


@pytest.mark.parametrize("variant", VARIANTS)
def test_own_model_matches_blocks_written_out_and_round_trips(variant, tmp_path):
    model, x = ours(), inputs("gpt2")
    before = model(x)
    new = Painters().plan(model, variant=variant, start=1, end=5, loops=2).apply()
    trunk, h = model.trunk, model.embed(x)
    from interlayer.core.mixer import Context

    def run(i, h):
        context = Context(2 * i, trunk.position, None, None, lambda at, k, v: (k, v), 2 * i)
        h = h + trunk.blocks[i].mixer(trunk.stream.norms[2 * i](h), context)
        return h + trunk.blocks[i].mlp(trunk.stream.norms[2 * i + 1](h))

    for item in execution(variant, 6, 1, 5, loops=2):
        h = sum(run(i, h) for i in item) / len(item) if isinstance(item, list) else run(item, h)
    torch.testing.assert_close(new(x), model.head(trunk.stream.last(h)))
    assert torch.equal(model(x), before)
    recipe.save(new, tmp_path)
    assert torch.equal(recipe.load(tmp_path)(x), new(x))


def test_own_model_caches_unless_blocks_repeat():
    x = inputs("gpt2")
    for variant in ("skip", "reverse", "parallel"):
        new = Painters().plan(ours(), variant=variant, start=1, end=5).apply()
        made = new.generate(x, 5)
        assert torch.equal(made[:, -1], new(made[:, :-1])[:, -1].argmax(-1))
    with pytest.raises(ValueError, match="Route order cannot use a cache"):
        Painters().plan(ours(), variant="middle-repeat").apply().generate(x, 2)


def test_stream_with_memory_is_refused():
    new = Painters().plan(ours(stream="denseformer"), variant="reverse").apply()
    with pytest.raises(ValueError, match="keeps earlier outputs"):
        new(inputs("gpt2"))


def test_mixed_attention_kinds_are_permuted_or_refused():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    kinds = ["full_attention", "sliding_attention"] * 3
    config = Qwen2Config(
        vocab_size=32, **SIZES, num_key_value_heads=2, layer_types=kinds, use_sliding_window=True, sliding_window=3
    )
    model = Qwen2ForCausalLM(config).eval()
    with pytest.raises(ValueError, match="different attention masks"):
        Painters().plan(model, variant="parallel", start=1, end=5)
    new = Painters().plan(model, variant="reverse", start=1, end=5).apply()
    assert new.config.layer_types == [kinds[i] for i in (0, 4, 3, 2, 1, 5)]
    assert new(inputs("gpt2")).logits.isfinite().all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"variant": "shuffle"}, "wanted one of skip"),
        ({"start": 3, "end": 3}, "start 3, end 3"),
        ({"end": 9}, "<= 6"),
        ({"variant": "looped-parallel", "loops": 0}, "at least one loop"),
        ({"variant": "reverse", "start": 2, "end": 3}, "leaves the order as it is"),
        ({"variant": "skip", "start": 0, "end": 6}, "or nothing"),
    ],
)
def test_clear_errors(options, says):
    with pytest.raises(ValueError, match=says):
        Painters().plan(ours(), **options)
    with pytest.raises(ValueError, match="not known which its blocks are"):
        Painters().plan(nn.Linear(2, 2))
    again = Painters().plan(ours(), variant="skip").apply()
    with pytest.raises(ValueError, match="Route order already"):
        Painters().plan(again, variant="skip")


@pytest.mark.parametrize("name", ["gpt2", "vit", "ours"])
def test_similarity_finds_idle_blocks_and_leaves_no_trace(name):
    model = ours() if name == "ours" else hugging_face(name)
    idle = model.trunk.blocks[3] if name == "ours" else (model.transformer.h if name == "gpt2" else model.layers)[3]
    for n, p in idle.named_parameters():  # block 3 adds nothing: the states after 2 and 3 are the same
        if not n.startswith(("ln", "layernorm", "norm")):
            nn.init.zeros_(p)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    x = inputs(name)
    found = similarity(model, [x, x])
    table = found.tables["similarity"]
    assert table["layer"] == list(range(6)) and len(table) == 7
    assert table["3"][2] == pytest.approx(1.0) and table["3"][3] == pytest.approx(1.0) and table["0"][5] < 0.99
    assert table["1"][4] == pytest.approx(table["4"][1])
    assert model.training and not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert similarity(model, [x, x]).tables == found.tables
    assert found.figure().axes[0].get_xlabel() == "after block"
