import gc
import inspect
from itertools import pairwise

import families
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from interlayer.core.wiring import Wiring, run, trace


def shaken(model: nn.Module) -> nn.Module:
    """In float64, with every weight and statistic random, so that a wrong tie shows."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(0)
    for value in model.state_dict().values():
        if value.is_floating_point():
            noise = torch.rand(value.shape, generator=generator, dtype=torch.float64)
            value.copy_(noise + 0.1 if value.ndim == 1 else 0.6 * (noise - 0.5))
    return model


def assert_preserved(model: nn.Module, wiring: Wiring, *args, tolerance: float = 1e-9, **kwargs) -> None:
    """Every group alone, then all at once: weights change, outputs do not."""

    @torch.no_grad()
    def out(state):
        found = run(model, state, *args, **kwargs)
        for name in ("logits", "sample"):
            found = getattr(found, name, found)
        return found

    state = model.state_dict()
    expected = out(state)
    assert "changed the output" not in str(wiring)  # the rules were right; the last check had nothing to drop
    turns = [{name: torch.arange(g.size).roll(1)} for name, g in wiring.groups.items()]
    for perms in [*turns, wiring.random(1), wiring.random(2)]:
        moved = wiring.permute(state, perms)
        assert any(not torch.equal(moved[k], state[k]) for k in state)
        assert (out(moved) - expected).abs().max() <= tolerance * expected.abs().max()


def sizes(wiring: Wiring, inside: bool = False) -> list[int]:
    return [g.size for g in wiring.groups.values() if (g.parent is not None) == inside]


class Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int, pad: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.extra = (after - before) // 2 if pad else 0
        self.shortcut: nn.Module = nn.Identity()
        if before != after and not pad:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x):
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.extra:
            return F.relu(h + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra, self.extra)))
        return F.relu_(h + self.shortcut(x))


def resnet(pad: bool = False) -> nn.Module:
    stem = [nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()]
    blocks = [Block(4, 4, 1), Block(4, 4, 1), Block(4, 8, 2, pad), Block(8, 8, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_mlp_has_one_group_for_each_hidden_layer(depth):
    widths = [5, *range(6, 6 + depth)]
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())]
    model = shaken(nn.Sequential(*layers, nn.Linear(widths[-1], 3)))
    x = torch.randn(4, 5, dtype=torch.float64)
    wiring = trace(model, x)
    assert sizes(wiring) == widths[1:]
    for group in wiring.groups.values():
        assert [m.dim for m in group.members] == [0, 0, 1]
    assert wiring.fixed["0.weight", 1] == "meets an input or a constant"
    assert wiring.fixed[f"{2 * depth}.weight", 0] == "reaches the output"
    assert_preserved(model, wiring, x)


def test_resnet_stage_is_one_group_and_batch_statistics_move_along():
    model, x = shaken(resnet()), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    wiring = trace(model, x)
    assert sorted(sizes(wiring)) == [4, 4, 4, 8, 8, 8]
    stream = wiring.groups["0.weight:0"]
    touched = {(m.name, m.dim) for m in stream.members}
    assert {
        ("3.conv2.weight", 0),
        ("4.conv1.weight", 1),
        ("4.norm2.running_var", 0),
        ("5.shortcut.0.weight", 1),
    } <= touched
    assert_preserved(model, wiring, x)


def test_resnet_with_padded_shortcuts():
    model, x = shaken(resnet(pad=True)), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    wiring = trace(model, x)
    assert sorted(sizes(wiring)) == [4, 4, 4, 4, 8, 8]  # the new channels of a stage are their own group
    assert ("6.conv1.weight", 1) in {(m.name, m.dim) for m in wiring.groups["0.weight:0"].members}
    assert_preserved(model, wiring, x)


def test_vgg_flatten_moves_blocks_of_the_linear_layer():
    convs = [
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.BatchNorm2d(6),
    ]
    model = shaken(nn.Sequential(*convs, nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 7), nn.ReLU(), nn.Linear(7, 3)))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    wiring = trace(model, x)
    assert sizes(wiring) == [4, 6, 7]
    block = next(m for m in wiring.groups["3.weight:0"].members if m.name == "7.weight")
    assert block.dim == 1 and torch.equal(block.index, torch.arange(96).reshape(6, 16))
    assert_preserved(model, wiring, x)


def test_grouped_depthwise_and_transposed_convolutions_and_group_norm():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.SiLU(), nn.Conv2d(4, 8, 3, groups=4), nn.GroupNorm(4, 8),
        nn.ConvTranspose2d(8, 6, 2), nn.ReLU(), nn.ConvTranspose2d(6, 4, 2, groups=2), nn.Conv2d(4, 2, 1),
    )  # fmt: skip
    model, x = shaken(model), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    wiring = trace(model, x)
    assert sorted(sizes(wiring)) == [2, 2, 4] and sorted(sizes(wiring, inside=True)) == [2, 2, 2, 2, 3, 3]
    assert_preserved(model, wiring, x)


class Attention(nn.Module):
    def __init__(self, width=8, heads=4, kv_heads=2):
        super().__init__()
        self.width, self.heads, self.kv_heads = width, heads, kv_heads
        self.qkv = nn.Linear(width, width + 2 * kv_heads * width // heads)
        self.o = nn.Linear(width, width)

    def forward(self, x):
        d = self.width // self.heads
        parts = self.qkv(x).split([self.width, self.kv_heads * d, self.kv_heads * d], -1)
        q, k, v = (p.unflatten(-1, (-1, d)).transpose(1, 2) for p in parts)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return x + self.o(y.transpose(1, 2).flatten(2))


def test_fused_grouped_query_attention():
    model = shaken(nn.Sequential(nn.Linear(3, 8), Attention(), nn.LayerNorm(8), nn.Linear(8, 2)))
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    wiring = trace(model, x)
    assert sizes(wiring) == [8, 2]  # residual stream, groups of heads
    assert sizes(wiring, inside=True) == [2] * 6  # in both: q with k, v with o, the query heads
    assert_preserved(model, wiring, x)


def test_torch_encoder_layers():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    model, x = shaken(nn.Sequential(nn.Linear(3, 8), body, nn.Linear(8, 2))), torch.randn(2, 5, 3, dtype=torch.float64)
    wiring = trace(model, x)
    assert sorted(sizes(wiring)) == [2, 2, 8, 16, 16] and sizes(wiring, inside=True) == [4] * 8
    assert_preserved(model, wiring, x)


def test_gpt2():
    import transformers

    sized = {
        "n_embd": 12,
        "n_layer": 2,
        "n_head": 3,
        "vocab_size": 30,
        "n_positions": 12,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    model = shaken(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sized)))
    ids = torch.randint(0, 30, (2, 5))
    wiring = trace(model, input_ids=ids, use_cache=False)
    assert sorted(sizes(wiring)) == [3, 3, 12, 48, 48]
    assert sizes(wiring, inside=True) == [4] * 12  # in each head: q with k, v with the output
    assert wiring.aliases == {"lm_head.weight": "transformer.wte.weight"}
    heads = wiring.groups["transformer.h.0.attn.c_attn.weight:1"]
    assert [m.index.shape for m in heads.members] == [(3, 12), (3, 12), (3, 4)]
    assert_preserved(model, wiring, input_ids=ids, use_cache=False)


def test_llama():
    import transformers

    sized = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = transformers.LlamaConfig(**sized, vocab_size=30, max_position_embeddings=32, tie_word_embeddings=True)
    model = shaken(transformers.LlamaForCausalLM(config))
    ids = torch.randint(0, 30, (2, 5))
    wiring = trace(model, input_ids=ids, use_cache=False)
    assert sorted(sizes(wiring)) == [2, 2, 16, 24, 24]
    assert sorted(sizes(wiring, inside=True)) == [2] * 4 + [4] * 4  # query heads; v with o. Rotary fixes q and k
    assert_preserved(model, wiring, input_ids=ids, use_cache=False, tolerance=1e-6)  # its norms compute in float32


def test_vit():
    import transformers

    sized = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = shaken(transformers.ViTForImageClassification(transformers.ViTConfig(**sized, image_size=8, patch_size=4)))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    wiring = trace(model, x)
    assert sorted(sizes(wiring)) == [2, 2, 16, 24, 24] and sizes(wiring, inside=True) == [8] * 8
    assert_preserved(model, wiring, x)


# The sizes of the groups that lie in no other, and of those inside their units.
WIRED = {
    "twice": ([6, 6], []),
    "tied": ([6], []),
    "functional": ([8], []),
    "unnamed": ([7], []),
    "lstm": ([6, 6], []),
    "mha": ([2, 8], [4] * 4),
    "gpt2": ([2] * 4 + [16] + [64] * 4, [8] * 16),
    "llama": ([2] * 4 + [8] * 4 + [16] + [24] * 4, []),  # one head of keys and values; rotary fixes queries and keys
    "mixtral": ([2] * 4 + [8] * 4 + [16] + [24] * 4, []),  # experts are ranked, their hidden units are alike
    "mamba": ([4] * 4 + [16] + [32] * 4, []),
    "bert": ([2] * 4 + [16] * 2 + [24] * 4, [8] * 16),
    "vit": ([2] * 4 + [16] + [24] * 4, [8] * 16),
    "resnet": ([4] * 4 + [8] * 4, []),
    "t5": ([2] * 6 + [16] + [24] * 8, [8] * 48),  # its heads share one bias in each stack
    "bart": ([2] * 12 + [15] + [24] * 8, [8] * 48),  # Bart reads one unit of its embedding alone
    "unet": ([2] * 3 + [4] * 20 + [16] * 4 + [32] * 2 + [64] * 4, [2] * 18 + [4] * 92 + [6] * 2),
    "dit": ([2] * 4 + [16] * 8 + [64] * 4, [8] * 16),
}


@pytest.mark.parametrize("name", families.NAMES)
def test_families(name):
    model, batch = families.model(name), families.batch(name)
    if name != "mixtral":  # its grouped products have no float64
        shaken(model)
        double = {k: v.double() if v.is_floating_point() else v for k, v in as_keywords(model, batch).items()}
    else:
        double = batch
    before = {k: v.clone() for k, v in model.state_dict().items()}
    output = "logits" if hasattr(model, "generate") else None
    wiring = trace(model, output=output, **double)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    outer, inner = WIRED[name]
    assert sorted(sizes(wiring)) == outer and sorted(sizes(wiring, inside=True)) == inner
    assert_preserved(model, wiring, tolerance=1e-6 if name in ("llama", "t5", "mamba", "mixtral") else 1e-9, **double)


def as_keywords(model, batch):
    return batch if isinstance(batch, dict) else {next(iter(inspect.signature(model.forward).parameters)): batch}


class Odd(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.a, self.b, self.what = nn.Linear(4, 6), nn.Linear(6, 2), what

    def forward(self, x):
        return self.b(self.what(self.a(x)))


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (lambda h: h.sort(-1).values, "no rule"),
        (lambda h: h.cumsum(-1), "no rule"),
        (lambda h: h * h.topk(1).values, "ranked"),
        (lambda h: h * torch.arange(6), "constant"),
        (lambda h: h + h[:, torch.tensor([2, 0, 1, 5, 4, 3])], "indexed"),
    ],
)
def test_what_tells_units_apart_fixes_them_with_a_reason(what, why):
    model, x = shaken(Odd(what)), torch.randn(3, 4, dtype=torch.float64)
    wiring = trace(model, x)
    assert not wiring.groups and why in wiring.fixed["a.weight", 0]


@pytest.mark.parametrize(
    ("what", "found"),
    [
        (lambda h: h.flip(-1), [6]),  # same units in another order
        (lambda h: h + h.flip(-1), [3]),  # mirrored pairs move together
        (lambda h: torch.cat([h[:, 2:].relu(), h[:, :2]], -1), [2, 4]),  # slices are told apart
        (lambda h: torch.cat([h.relu(), (-h).relu()], -1)[:, 0:6], [6]),
        (lambda h: h / h.norm(dim=-1, keepdim=True), [6]),
        (lambda h: h.unflatten(-1, (3, 2)).softmax(-1).flatten(-2), [3]),  # blocks, and units inside
        (lambda h: torch.einsum("bi,bj->bj", h.exp(), h), [6]),
        (lambda h: torch.zeros_like(h) + h, [6]),
        (lambda h: h.roll(2, 0) + h, [6]),
        (lambda h: h.roll(2, -1), [6]),
        (lambda h: h.repeat(2, 1)[:3], [6]),
        (lambda h: F.glu(torch.cat([h, h.tanh()], -1)), [6]),
        (lambda h: F.prelu(h, torch.full((1,), 0.3, dtype=h.dtype)), [6]),
        (lambda h: h * h.unflatten(-1, (3, 2)).amax(1).topk(1).values, [3]),  # the units inside a block are ranked
        (lambda h: torch.stack([h, h.exp()]).sum(0), [6]),
        (lambda h: torch.stack([h[:, :3], h[:, 3:]], 1).flatten(1), [3, 3]),
    ],
)
def test_what_keeps_units_alike(what, found):
    model, x = shaken(Odd(what)), torch.randn(3, 4, dtype=torch.float64)
    wiring = trace(model, x)
    assert sorted(sizes(wiring)) == found
    assert_preserved(model, wiring, x)


class Wrapped(nn.Module):
    """A layer between two others, with its output reduced to [B, width] after flattening what lies behind it."""

    def __init__(self, before, layer, after, pick=lambda out: out):
        super().__init__()
        self.before, self.layer, self.after, self.pick = before, layer, after, pick

    def forward(self, x):
        return self.after(self.pick(self.layer(self.before(x))))


def conv(a, b):
    return nn.Conv2d(a, b, 1)


LAYERS = {
    "prelu": (lambda: Wrapped(nn.Linear(4, 6), nn.PReLU(6), nn.Linear(6, 2)), (3, 4), [6], []),
    "glu": (lambda: Wrapped(nn.Linear(4, 12), nn.GLU(), nn.Linear(6, 2)), (3, 4), [6], []),
    "gru cell": (lambda: Wrapped(nn.Linear(4, 5), nn.GRUCell(5, 6), nn.Linear(6, 2)), (3, 4), [5, 6], []),
    "lstm cell": (
        lambda: Wrapped(nn.Linear(4, 5), nn.LSTMCell(5, 6), nn.Linear(6, 2), lambda out: out[0]),
        (3, 4),
        [5, 6],
        [],
    ),
    "gru": (
        lambda: Wrapped(nn.Linear(4, 5), nn.GRU(5, 6, 2, bidirectional=True), nn.Linear(12, 2), lambda out: out[0]),
        (3, 2, 4),
        [5, 6, 6, 6, 6],
        [],
    ),
    "pixel shuffle": (lambda: nn.Sequential(conv(2, 12), nn.PixelShuffle(2), conv(3, 2)), (1, 2, 3, 3), [3], []),
    "pixel unshuffle": (lambda: nn.Sequential(conv(2, 3), nn.PixelUnshuffle(2), conv(12, 2)), (1, 2, 4, 4), [3], []),
    "channel shuffle": (lambda: nn.Sequential(conv(2, 6), nn.ChannelShuffle(3), conv(6, 2)), (1, 2, 3, 3), [6], []),
    "channel shuffle between groups": (
        lambda: nn.Sequential(conv(2, 6), nn.ChannelShuffle(3), nn.Conv2d(6, 6, 1, groups=2), conv(6, 2)),
        (1, 2, 3, 3),
        [2, 3],
        [3, 3],
    ),
    "instance norm": (
        lambda: nn.Sequential(conv(2, 5), nn.InstanceNorm2d(5, affine=True), nn.ReLU(), conv(5, 2)),
        (3, 2, 4, 4),
        [5],
        [],
    ),
    "weight norm": (
        lambda: nn.Sequential(weight_norm(nn.Linear(4, 6)), nn.ReLU(), weight_norm(nn.Linear(6, 2))),
        (3, 4),
        [6],
        [],
    ),
    "spectral norm": (
        lambda: nn.Sequential(spectral_norm(nn.Linear(4, 6)), nn.ReLU(), spectral_norm(nn.Linear(6, 2))),
        (3, 4),
        [6],
        [],
    ),
    "spectral norm of kernels": (
        lambda: nn.Sequential(spectral_norm(nn.Conv2d(2, 5, 3)), nn.ReLU(), spectral_norm(nn.Conv2d(5, 2, 3))),
        (1, 2, 6, 6),
        [5],
        [],
    ),
    "max pool 3d": (
        lambda: nn.Sequential(nn.Conv3d(2, 5, 1), nn.MaxPool3d(2), nn.Upsample(scale_factor=2), nn.Conv3d(5, 2, 1)),
        (1, 2, 4, 4, 4),
        [5],
        [],
    ),
    "upsampling in 1d": (
        lambda: nn.Sequential(nn.Conv1d(2, 5, 1), nn.MaxPool1d(2), nn.Upsample(scale_factor=2), nn.Conv1d(5, 2, 1)),
        (1, 2, 4),
        [5],
        [],
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    make, shape, outer, inner = LAYERS[name]
    model, x = shaken(make()), torch.randn(shape, dtype=torch.float64)
    wiring = trace(model, x)
    assert sorted(sizes(wiring)) == outer and sorted(sizes(wiring, inside=True)) == inner
    assert_preserved(model, wiring, x)


def test_weights_that_only_met_zeros_stay():
    """A cell's first step says nothing of how its recurrent columns are used in the second."""
    cell = shaken(nn.Sequential(nn.Linear(4, 5), nn.GRUCell(5, 6), nn.Linear(6, 2)))
    wiring = trace(cell, torch.randn(3, 4, dtype=torch.float64))
    assert wiring.fixed["1.weight_hh", 1] == "met only a constant"


def test_global_pooling_of_channels_last():
    model = nn.Sequential(conv(2, 5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 2))
    model, x = shaken(model), torch.randn(3, 2, 4, 4, dtype=torch.float64).to(memory_format=torch.channels_last)
    wiring = trace(model, x)
    assert sizes(wiring) == [5]
    assert_preserved(model, wiring, x)


def test_embedding_bag():
    model = shaken(nn.Sequential(nn.EmbeddingBag(9, 6), nn.Linear(6, 2)))
    ids = torch.randint(9, (2, 4))
    wiring = trace(model, ids)
    assert sizes(wiring) == [6] and wiring.fixed["0.weight", 0] == "is indexed by data"
    assert_preserved(model, wiring, ids)


class Branch(nn.Module):
    """Two ways from the first layer to the last, chosen by the data."""

    def __init__(self, chooses=lambda x, h: h.sum() > 0):
        super().__init__()
        self.enter, self.a, self.b, self.chooses = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2), chooses

    def forward(self, x):
        h = self.enter(x)
        return (self.a if self.chooses(x, h) else self.b)(h)


@pytest.mark.parametrize(
    ("operator", "chooses"),
    [
        ("_local_scalar_dense", lambda x, h: h.sum() > 0),
        ("_local_scalar_dense", lambda x, h: x.max().item() > 0.5),
        ("equal", lambda x, h: torch.equal(h, h.relu())),
        ("nonzero", lambda x, h: len(h.relu().nonzero()) > 2),
        ("index", lambda x, h: h[h > 0].numel() > 2),
        ("masked_select", lambda x, h: len(h.masked_select(h > 0)) > 2),
    ],
)
def test_a_choice_by_data_is_refused(operator, chooses):
    with pytest.raises(ValueError, match=rf"reads a Python value or a size off its activations \(aten.{operator}\."):
        trace(Branch(chooses), torch.randn(3, 4))


def test_unused_parameters_are_refused():
    with pytest.raises(ValueError, match="2 parameters of Branch are not used by this forward pass"):
        trace(Branch(lambda x, h: len(x) > 2), torch.randn(3, 4))


def test_values_read_off_masks_and_weights_are_no_choice_by_data():
    class Masked(Odd):
        def forward(self, x, mask):
            h = super().forward(x)
            return h if mask.all() and self.b.bias.sum().item() < 1e9 else h * mask[:, None]

    wiring = trace(Masked(F.relu), torch.randn(3, 4), torch.ones(3, dtype=torch.bool))
    assert sizes(wiring) == [6]


def test_the_output_that_counts():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            return {"hidden": (h := self.a(x).relu()), "scores": self.b(h)}

    model, x = shaken(Two()), torch.randn(3, 4, dtype=torch.float64)
    assert not trace(model, x).groups
    for output in ("scores", lambda out: out["scores"]):
        assert sizes(trace(model, x, output=output)) == [6]
    with pytest.raises(TypeError, match="with hidden, scores; expected one with 'logits'"):
        trace(model, x, output="logits")
    with pytest.raises(TypeError, match="no tensor in the output that counts"):
        trace(model, x, output=lambda out: "nothing")


class Unseen(nn.Module):
    """Reads one activation where no operator sees it: the check at the end finds that units are not alike."""

    def __init__(self):
        super().__init__()
        self.a, self.heads, self.b = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x):
        h = self.a(x)
        inner = self.heads(x).unflatten(-1, (3, 2)).softmax(-1)
        return self.b(
            (h + float(h.detach().numpy()[0, 0])) * (inner * float(inner.detach().numpy()[0, 0, 0])).flatten(-2)
        )


def test_groups_that_change_the_output_are_dropped_with_those_inside():
    model, x = shaken(Unseen()), torch.randn(3, 4, dtype=torch.float64)
    wiring = trace(model, x)
    assert not wiring.groups and wiring.fixed["a.weight", 0] == "permuting it changed the output"
    assert wiring.fixed["heads.weight", 0] == "permuting it changed the output"


def test_the_sound_groups_stay_when_another_is_dropped():
    model = shaken(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Odd(lambda h: h + float(h.detach().numpy()[0, 0]))))
    model[2].a = nn.Linear(5, 6).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    wiring = trace(model, x)
    assert sizes(wiring) == [5] and wiring.fixed["2.a.weight", 0] == "permuting it changed the output"
    moved = wiring.permute(model.state_dict(), wiring.random(1))
    assert torch.allclose(run(model, moved, x), model(x), rtol=1e-9)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.gain * x


@pytest.mark.parametrize("make", [nn.ReLU, Scaled])
def test_models_without_axes_of_weights_have_no_groups(make):
    wiring = trace(make(), torch.randn(2, 3))
    assert not wiring.groups and not wiring.fixed


def test_garbage_is_collected_again_afterwards():
    trace(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)), torch.randn(1, 2))
    assert gc.isenabled()


def test_training_mode_and_weights_are_left_alone():
    model = resnet().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    trace(model, torch.randn(2, 3, 8, 8))
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_weights_that_are_permuted_in_several_parts(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 2))
    wiring = trace(model, torch.randn(2, 4))
    perms = wiring.random(3)
    whole = wiring.permute(model.state_dict(), perms)
    first, second = perms.values()
    assert torch.equal(whole["2.weight"], model[2].weight[second][:, first])
    monkeypatch.setattr("interlayer.core.wiring.groups.PART", 20)  # rows of 7: parts of 2, and a last one of 1
    parts = wiring.permute(model.state_dict(), perms)
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


def test_wrong_permutations_are_refused_and_the_wiring_prints():
    wiring = trace(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(1, 2))
    with pytest.raises(ValueError, match="no group named 'x'"):
        wiring.permute({}, {"x": [0]})
    with pytest.raises(ValueError, match="permutation of 3 units"):
        wiring.permute({}, {"0.weight:0": [0, 0, 1]})
    assert "0.weight:0: 3 units" in str(wiring) and "2.weight axis 0: reaches the output" in str(wiring)
