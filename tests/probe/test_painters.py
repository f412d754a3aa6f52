import families
import pytest
import torch
from torch import nn

from interlayer import models
from interlayer.core import recipe, taps
from interlayer.probe.painters import VARIANTS, Painters, cost, execution, similarity
from interlayer.testing.common import picture, unchanged


def ours(**slots):
    torch.manual_seed(0)
    model = models.Transformer(vocab=32, length=32, depth=6, width=16, heads=2, **slots)
    for p in model.trunk.blocks.parameters():
        nn.init.normal_(p, std=0.3)
    return model.eval()


def inputs():
    return torch.arange(8).view(2, 4)


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
    plan = Painters(variant=variant, start=1, end=5, loops=2, seed=1).plan(model)
    h = model[0](x)
    for item in execution(variant, 6, 1, 5, loops=2, seed=1):
        if isinstance(item, list):
            h = sum(model[1][i](h) for i in item) / len(item)
        else:
            h = model[1][item](h)
    torch.testing.assert_close(plan.apply()(x), h)


# Families that it refuses, with the reason.
REFUSED = {
    **dict.fromkeys(("tied", "functional", "unnamed", "lstm", "mha"), "not known which its blocks are"),
    "resnet": r"layers.0.layer.0.convolution.weight is .* in block 0 of 'resnet.encoder.stages' and",
    "unet": "joins blocks on the way down with those on the way up",
}


TWICE = "blocks that run twice or side by side"
SOME = ("skip", "looped-parallel")
CHOSEN = {"gpt2": VARIANTS, "t5": SOME, "bart": SOME, "mamba": SOME, "dit": ("skip", "reverse"), "bert": ("reverse",)}


@pytest.mark.parametrize("name", families.NAMES)
def test_families(name, tmp_path):
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            Painters().plan(families.model(name))
        return
    before = families.output(families.model(name), families.batch(name))
    for n, variant in enumerate(CHOSEN.get(name, ("parallel",))):
        transform = Painters(variant=variant, start=1, end=3, loops=2)
        refuses = "" if variant in ("skip", "reverse", "random-order") else TWICE
        new = families.transformed(transform, name, tmp_path / str(n), refuses=refuses)
        assert name == "twice" or not torch.allclose(before, families.output(new, families.batch(name)), rtol=1e-3)
        assert sum(p.numel() for p in new.parameters()) <= sum(p.numel() for p in families.model(name).parameters())


@pytest.mark.parametrize(("name", "at"), [("t5", "encoder"), ("bart", "model.encoder.layers")])
def test_the_encoder_can_be_chosen(name, at, tmp_path):
    # transformers can't generate with fewer encoder than decoder blocks of T5: the configuration keeps the number
    refuses = {"looped-parallel": TWICE, "skip": "fewer blocks than its configuration counts" if name == "t5" else ""}
    for variant, why in refuses.items():
        transform = Painters(variant=variant, start=1, end=3, loops=2, at=at)
        new = families.transformed(transform, name, tmp_path / variant, refuses=why)
        decoder, encoder = (new.get_decoder(), new.get_encoder())
        counts = [len(part.block if name == "t5" else part.layers) for part in (decoder, encoder)]
        assert counts == [4, 2 if variant == "skip" else 4]
        assert not torch.allclose(*(families.output(m, families.batch(name)) for m in (families.model(name), new)))


def test_a_second_order_goes_on_from_the_first(tmp_path):
    model = families.model("gpt2")
    once = Painters(variant="reverse", start=0, end=4).plan(model).apply()  # 3 2 1 0
    twice = Painters(variant="skip", start=0, end=1).plan(once).apply()  # 2 1 0
    at_once = families.model("gpt2")
    at_once.transformer.h = nn.ModuleList([at_once.transformer.h[i] for i in (2, 1, 0)])
    data = families.batch("gpt2")
    expected = at_once(**data, use_cache=False).logits
    torch.testing.assert_close(twice(**data, use_cache=False).logits, expected)
    recipe.save(twice, tmp_path)
    torch.testing.assert_close(recipe.load(tmp_path)(**data, use_cache=False).logits, expected)


def test_a_part_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"has no part 'encodr.block'. Did you mean 'encoder.block'"):
        Painters(at="encodr.block").plan(families.model("t5"))


def test_first_block_with_shared_position_bias_stays_first():
    for options in (
        {"variant": "reverse", "start": 0},
        {"variant": "skip", "start": 0, "end": 1},
        {"start": 0, "end": 2},
    ):
        with pytest.raises(ValueError, match=r"holds layer.0.SelfAttention.relative_attention_bias.weight.*start to 1"):
            Painters(**options).plan(families.model("t5"))


def test_blocks_of_other_shapes_are_refused_before_anything_runs():
    model = families.model("unet")
    with pytest.raises(
        ValueError, match=r"norm1.weight is .* in block 0 of 'up_blocks.0.resnets'.*fit in each other's"
    ):
        Painters(at="up_blocks.0.resnets").plan(model)
    assert (
        Painters(at="resnet.encoder.stages.0.layers", variant="reverse", start=1).plan(families.model("resnet")).touched
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_key_value_cache_is_exact(name, variant):
    new = Painters(variant=variant, start=1, end=3, loops=2).plan(families.model(name)).apply()
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
    model, x = ours(), inputs()
    before = model(x)
    new = Painters(variant=variant, start=1, end=5, loops=2).plan(model).apply()
    trunk, h = model.trunk, model.embed(x)
    from interlayer.core.mixer import Context

    def run(i, h):
        context = Context(2 * i, trunk.position, None, None, lambda at, k, v: (k, v))
        h = h + trunk.blocks[i].mixer(trunk.stream.norms[2 * i](h), context)
        return h + trunk.blocks[i].mlp(trunk.stream.norms[2 * i + 1](h))

    for item in execution(variant, 6, 1, 5, loops=2):
        h = sum(run(i, h) for i in item) / len(item) if isinstance(item, list) else run(item, h)
    torch.testing.assert_close(new(x), model.head(trunk.stream.last(h)))
    assert torch.equal(model(x), before)
    recipe.save(new, tmp_path)
    assert torch.equal(recipe.load(tmp_path)(x), new(x))


def test_own_model_caches_unless_blocks_repeat():
    x = inputs()
    for variant in ("skip", "reverse", "parallel"):
        new = Painters(variant=variant, start=1, end=5).plan(ours()).apply()
        made = new.generate(x, 5)
        assert torch.equal(made[:, -1], new(made[:, :-1])[:, -1].argmax(-1))
    with pytest.raises(ValueError, match="Route order cannot use a cache"):
        Painters(variant="middle-repeat").plan(ours()).apply().generate(x, 2)


def test_stream_with_memory_is_refused():
    new = Painters(variant="reverse").plan(ours(stream="denseformer")).apply()
    with pytest.raises(ValueError, match="keeps earlier outputs"):
        new(inputs())


def test_mixed_attention_kinds_are_permuted_or_refused():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    kinds = ["full_attention", "sliding_attention"] * 3
    sizes = {"hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 16}
    config = Qwen2Config(
        vocab_size=32, **sizes, num_key_value_heads=2, layer_types=kinds, use_sliding_window=True, sliding_window=3
    )
    model = Qwen2ForCausalLM(config).eval()
    with pytest.raises(ValueError, match="different attention masks"):
        Painters(variant="parallel", start=1, end=5).plan(model)
    new = Painters(variant="reverse", start=1, end=5).plan(model).apply()
    assert new.config.layer_types == [kinds[i] for i in (0, 4, 3, 2, 1, 5)]
    assert new(inputs()).logits.isfinite().all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"variant": "shuffle"}, "expected one of skip"),
        ({"start": 3, "end": 3}, "start 3, end 3"),
        ({"end": 9}, "<= 6"),
        ({"variant": "looped-parallel", "loops": 0}, "at least one loop"),
        ({"variant": "reverse", "start": 2, "end": 3}, "leaves the order as it is"),
        ({"variant": "skip", "start": 0, "end": 6}, "or nothing"),
    ],
)
def test_clear_errors(options, says):
    with pytest.raises(ValueError, match=says):
        Painters(**options).plan(ours())
    with pytest.raises(ValueError, match="not known which its blocks are"):
        Painters().plan(nn.Linear(2, 2))
    beside = Painters().plan(families.model("gpt2")).apply()
    with pytest.raises(ValueError, match="run side by side already"):
        Painters(variant="skip").plan(beside)
    again = Painters(variant="skip").plan(ours()).apply()
    with pytest.raises(ValueError, match="Route order already"):
        Painters(variant="skip").plan(again)


IDLE = {"gpt2": "transformer.h.2", "vit": "vit.layers.2", "t5": "decoder.block.2", "dit": "transformer_blocks.2"}


@pytest.mark.parametrize("name", [*IDLE, "ours"])
def test_similarity_finds_idle_blocks_and_leaves_no_trace(name):
    model = ours() if name == "ours" else families.model(name)
    data = inputs() if name == "ours" else families.batch(name)
    idle = model.trunk.blocks[2] if name == "ours" else model.get_submodule(IDLE[name])
    for n, p in idle.named_parameters():  # block 2 adds nothing: the states after 1 and 2 are the same
        if not n.startswith(("ln", "layernorm", "norm.")):
            nn.init.zeros_(p)
    model.train()
    before = picture(model)
    found = similarity(model, [data, data])
    unchanged(before, model, "similarity")
    table, count = found.tables["similarity"], 6 if name == "ours" else 4
    assert table["layer"] == list(range(count)) and len(table) == count + 1
    assert table["2"][1] == pytest.approx(1.0) and table["2"][2] == pytest.approx(1.0) and table["0"][3] < 0.99
    assert table["1"][3] == pytest.approx(table["3"][1])
    assert similarity(model, [data, data]).tables == found.tables
    assert found.figure().axes[0].get_xlabel() == "after block"


def test_similarity_of_a_resnet_compares_channels_within_the_heaviest_stage():
    model, data = families.model("resnet"), families.batch("resnet")
    found = similarity(model, data)
    assert found.figure().axes[0].get_title() == "ResNetForImageClassification: resnet.encoder.stages.1.layers"
    with torch.no_grad(), taps.read(model, "resnet.encoder.stages.1.layers.*") as seen:
        model(**data)
    a, b = (seen[f"resnet.encoder.stages.1.layers.{i}"].double() for i in (0, 2))
    expected = torch.nn.functional.cosine_similarity(a, b, dim=1).mean()
    assert found.tables["similarity"]["0"][2] == pytest.approx(expected.item())
    chosen = similarity(model, data, at="resnet.encoder.stages.0")
    assert chosen.tables["similarity"].keys() == found.tables["similarity"].keys() and chosen.tables != found.tables
    with pytest.raises(ValueError, match="has no part 'nowhere'"):
        similarity(model, data, at="nowhere")
