import copy

import families
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
)

from interlayer.core import aside, cost, recipe
from interlayer.core.skipping import Skip, SkipDecoder, SkipMixer
from interlayer.layers.depth.mindskip import MindSkip
from interlayer.models import Transformer
from interlayer.testing.transforms import carried

ENDS = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}
SIZES = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24,
    "initializer_range": 0.2, **ENDS,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(num_key_value_heads=1, **SIZES),
    "qwen2": Qwen2Config(num_key_value_heads=1, **SIZES),
    "gpt2": GPT2Config(vocab_size=32, n_embd=16, n_layer=4, n_head=2, initializer_range=0.2, **ENDS),
    "gpt-neox": GPTNeoXConfig(**SIZES),
    "opt": OPTConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=4, ffn_dim=24, num_attention_heads=2, word_embed_proj_dim=16,
        max_position_embeddings=64, init_std=0.2, **ENDS,
    ),
}  # fmt: skip


def model(family="llama"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[family]).eval()


def texts(count=4, rows=8, length=9):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 32, (rows, length), generator=generator) for _ in range(count)]


def skips(net):
    return [m for m in net.modules() if isinstance(m, Skip)]


def changed(before, after):
    """Names of weights of the plain model that are others now."""
    there = dict(before.named_parameters())
    return [
        n for n, p in after.named_parameters() if (k := n.replace(".module.", ".")) in there and not p.equal(there[k])
    ]


@torch.no_grad()
def greedy(net, ids, count):
    """Decoding without a cache, where everything is computed and multiplied by what the prompt's pass decided."""
    net = copy.deepcopy(net)
    seen = []
    for skip in skips(net):
        decide = skip.decide
        skip.decide = lambda x, real=None, decide=decide: seen.append(decide(x, real)[0]) or decide(x, real)
    net(ids, use_cache=False)
    for skip, keep in zip(skips(net), seen, strict=True):
        skip.training, skip.decide = True, lambda x, real=None, keep=keep: (keep, keep.float())
    for _ in range(count):
        ids = torch.cat((ids, net(ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    return ids, seen


@pytest.mark.parametrize("family", CONFIGS)
def test_six_families_train_their_routers_alone_and_decode_with_a_cache(family, tmp_path):
    plain, data = model(family), texts()
    new = MindSkip(lr=0.3, weight=0.01, epochs=2).plan(plain, data).apply()
    assert not changed(plain, new) and [type(s) for s in skips(new)] == [SkipDecoder] * 2
    assert all(s.router.weight.any() for s in skips(new)) and not any(p.grad is not None for p in new.parameters())
    assert cost.parameters(new) - cost.parameters(plain) == 2 * 16
    for number, skip in enumerate(skips(new)):  # so that some skip
        skip.router.weight.data = torch.randn(1, 16, generator=torch.Generator().manual_seed(5 + number))
        x = torch.randn(99, 3, 16, generator=torch.Generator().manual_seed(number))
        assert 0 < skip.decide(x)[0].sum() < 99
    ids = data[0]
    with torch.no_grad():
        expected, keeps = greedy(new, ids, 4)
    assert torch.equal(new.generate(ids, max_new_tokens=4, do_sample=False), expected)
    cache = new.generate(ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True).past_key_values
    for layer, keep in zip(cache.layers[1:3], keeps, strict=True):
        assert torch.equal(layer.keep, keep)
        assert (0 if layer.inner.keys is None else len(layer.inner.keys)) == keep.sum()
    recipe.save(new, tmp_path)
    assert torch.equal(recipe.load(tmp_path)(ids).logits, new(ids).logits)
    assert "routers by which sequences skip layers" in carried(new, ids)


@pytest.mark.parametrize("name", ["gpt2", "llama", "mixtral"])
def test_tokens_that_skip_blocks_give_the_same_tokens_with_and_without_a_cache(name, tmp_path):
    transform = MindSkip(of="block", per="token", learn="all", lr=0.01)
    new = families.transformed(transform, name, tmp_path, refuses="routers by which sequences skip layers")
    assert [s.passes for s in skips(new)] == [True] * 2


@pytest.mark.parametrize("name", sorted(set(families.NAMES) - {"gpt2", "llama", "mixtral"}))
def test_models_without_a_fitting_attention_are_refused(name):
    with pytest.raises(ValueError, match=r"no attention that may be skipped|blocks, of which|select.blocks"):
        MindSkip().plan(families.model(name), families.batch(name))


# What the authors' `_compute_routing_state` (utils/model/model_patch.py) gives for these inputs, with capacity 0.25 and weight 2: the
# masks, the share that is kept, the loss of the capacity, and the router's gradient of that loss and sum((h + u mask) t).
AUTHORS = {
    "sequence": ([1.0] * 4, 1.0, 1.5, 5.161612, [0.202896, -0.48548, -0.242597, 0.664908, 0.663475]),
    "token": (
        [1.0] * 7 + [0.0] * 4 + [1.0], 0.666667, 0.833333, 5.566386, [-0.78127, -1.282262, -0.659063, -0.286989, -0.023669]
    ),
}  # fmt: skip


@pytest.mark.parametrize("per", AUTHORS)
def test_numbers_of_the_authors_code(per):
    chance = torch.Generator().manual_seed(0)
    h = torch.randn(4, 3, 5, generator=chance)
    w, u, t = (torch.randn(*shape, generator=chance) for shape in ((1, 5), (4, 3, 5), (4, 3, 5)))
    layer = Skip(nn.Identity(), 5, per=per, capacity=0.25, weight=2.0)
    layer.router.weight.data.copy_(w)
    mask, share, capacity_loss, value, gradient = AUTHORS[per]
    with aside.collect() as told:
        keep, gate = layer.decide(h)
    assert keep.flatten().float().tolist() == mask
    loss = ((h + layer.gated(u, h, gate)) * t).sum()
    found = [told.metrics["skip kept"][0].item(), told.loss.item(), loss.item()]
    assert found == pytest.approx([share, capacity_loss, value], abs=1e-5)
    (loss + told.loss).backward()
    assert layer.router.weight.grad[0].tolist() == pytest.approx(gradient, abs=1e-5)


def test_routers_begin_by_keeping_the_model_as_it_was():
    plain, ids = model(), texts()[0]
    new = MindSkip(lr=1e-9).restore(
        copy.deepcopy(plain),
        {
            "places": ["model.layers.1.self_attn"],
            "widths": [16],
            "of": "attention",
            "per": "sequence",
            "threshold": 0.5,
            "capacity": 0.5,
            "weight": 1,
        },
    )
    assert torch.equal(new(ids).logits, plain(ids).logits) and not skips(new)[0].router.weight.any()


def test_layers_are_the_last_ones_before_the_last():
    def names(**options):
        return [r.name for r in MindSkip(**options).plan(model(), texts()).touched]

    assert names() == ["model.layers.1.self_attn", "model.layers.2.self_attn"]
    assert names(layers=1, of="block") == ["model.layers.2"] and len(names(layers=3)) == 3
    rows = {r.name: r.why for r in MindSkip().plan(model(), texts()).skipped}
    assert rows["model.layers.3"] == "the last layer always runs" and "outside" in rows["model.layers.0"]


def test_all_weights_learn_where_asked_and_modes_and_gradients_stay():
    plain, data = model(), texts()
    plain.model.layers[0].requires_grad_(False)
    new = MindSkip(learn="all", lr=1e-2).plan(plain, data).apply()
    assert len(changed(plain, new)) == len(list(plain.parameters()))
    asks = [p.requires_grad for n, p in new.named_parameters() if n.startswith("model.layers.0")]
    assert not any(asks) and not any(m.training for m in new.modules())


def test_the_capacity_brings_the_share_down_as_a_loss_or_as_a_limit():
    def shares(**options):
        net = MindSkip(capacity=0.25, lr=0.1, **options).plan(plain, data).apply()
        with aside.collect() as told:
            net(torch.cat(data))
        return torch.stack(told.metrics["skip kept"])

    plain, data = model(), texts(12)
    free, held = shares(weight=0.0), shares(weight=30.0)
    assert held.max() <= 0.25 and held.mean() < 0.7 * free.mean()
    assert shares(threshold=None).tolist() == [0.25, 0.25]


def test_data_as_tokens_pairs_labels_and_masks():
    def routers(data):
        return torch.cat([s.router.weight for s in skips(MindSkip(lr=0.1).plan(plain, data).apply())])

    plain, ids = model(), texts(1)[0]
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    tokens = routers([ids])
    for same in ({"input_ids": ids}, {"input_ids": ids, "labels": ids}, (ids, None)):
        torch.testing.assert_close(routers(same), tokens)
    pairs = routers((ids[:, :-1], ids[:, 1:]))
    torch.testing.assert_close(routers([({"input_ids": ids[:, :-1]}, ids[:, 1:])]), pairs)
    assert not torch.equal(routers({"input_ids": ids, "attention_mask": mask}), tokens)


def test_a_transformer_of_interlayer():
    torch.manual_seed(0)
    plain, data = Transformer(32, 32, 4, 16, 2), [(t[:, :-1], t[:, 1:]) for t in texts()]
    new = MindSkip(lr=0.1).plan(plain, data).apply()
    assert not changed(plain, new) and all(isinstance(s, SkipMixer) for s in skips(new))
    assert new.generate(texts()[0], 3).shape == (8, 12)
    for options in ({"of": "block"}, {"per": "token"}):
        with pytest.raises(ValueError, match="in a Transformer of Interlayer sequences skip attention"):
            MindSkip(**options).plan(plain, data)
    with pytest.raises(ValueError, match=r"GLA in 'trunk\.blocks\.1' needs all sequences in every layer"):
        MindSkip().plan(Transformer(32, 32, 4, 16, 2, mixer="gla"), data)


@pytest.mark.parametrize(
    ("options", "data", "says"),
    [
        ({"of": "mlp"}, None, "of='mlp' is not one of attention, block"),
        ({"learn": "none"}, None, "is not one of routers, all"),
        ({"lr": 0.0}, None, "expected a rate above 0"),
        ({"capacity": 0.0}, None, "expected a share above 0"),
        ({"layers": 4}, None, "has 4 blocks, of which the last always runs; 4 were to get a router"),
        ({}, None, "no data; expected batches"),
    ],
)
def test_clear_errors(options, data, says):
    with pytest.raises(ValueError, match=says):
        MindSkip(**options).plan(model(), data)
