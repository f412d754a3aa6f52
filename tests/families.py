"""Model families that every transform and probe is tested on: tiny, random, built once for each process.

``model(name)`` gives a fresh copy, ``batch(name)`` its inputs as ``taps.feed`` takes them, ``output(model, batch)`` the
tensor that counts. Weights are drawn large enough for every block to matter.
"""

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import (
    BartForConditionalGeneration,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MambaForCausalLM,
    MixtralForCausalLM,
    ResNetForImageClassification,
    T5ForConditionalGeneration,
    ViTForImageClassification,
)

from interlayer.core import recipe
from interlayer.core.kinds import Transform
from interlayer.testing.common import picture, same, unchanged
from interlayer.testing.transforms import carried

WIDE = {"initializer_range": 0.2}
SIZES = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 24, **WIDE}
ENDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


class Twice(nn.Module):
    """One layer registered, and used, at two places."""

    def __init__(self) -> None:
        super().__init__()
        layer, middle = nn.Linear(6, 6), nn.Linear(6, 6)
        self.enter, self.layers, self.leave = nn.Linear(5, 6), nn.ModuleList([layer, middle, layer]), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x).relu()
        return self.leave(x)


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(12, 6), nn.Linear(6, 6), nn.Linear(6, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        return self.head(h + self.mix(h).tanh())


class Functional(nn.Module):
    """Activations and a norm that are function calls, not modules."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.dropout(F.layer_norm(F.gelu(self.up(x)), (8,)), 0.1, self.training))


class Unnamed(nn.Module):
    """Matrices that are parameters of the model itself, under names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel, self.readout = nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(7, 3))
        self.gain = nn.Parameter(torch.ones(7))

    def forward(self, x: Tensor) -> Tensor:
        return ((x @ self.kernel).relu() * self.gain) @ self.readout


class Recurrent(nn.Module):
    """An LSTM and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 6, num_layers=2, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


class Attending(nn.Module):
    """``nn.MultiheadAttention`` between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.attention = nn.Linear(5, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.leave = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x)
        return self.leave(h + self.attention(h, h, h, need_weights=False)[0])


def hf(cls: type, **config: Any) -> Callable[[], nn.Module]:
    """A transformers model with its own configuration class."""
    return lambda: cls(cls.config_class(**config))


BUILD: dict[str, Callable[[], nn.Module]] = {
    "twice": Twice,
    "tied": Tied,
    "functional": Functional,
    "unnamed": Unnamed,
    "lstm": Recurrent,
    "mha": Attending,
    "gpt2": hf(GPT2LMHeadModel, n_embd=16, n_layer=4, n_head=2, vocab_size=32, n_positions=32, **ENDS, **WIDE),
    "llama": hf(LlamaForCausalLM, vocab_size=32, num_key_value_heads=1, **SIZES, **ENDS),
    "mixtral": hf(MixtralForCausalLM, vocab_size=32, num_key_value_heads=1, num_local_experts=4, **SIZES, **ENDS),
    "mamba": hf(
        MambaForCausalLM, vocab_size=32, hidden_size=16, num_hidden_layers=4, state_size=4, use_mambapy=False, **ENDS, **WIDE
    ),
    "bert": hf(BertForSequenceClassification, vocab_size=32, max_position_embeddings=32, **SIZES),
    "vit": hf(ViTForImageClassification, image_size=8, patch_size=4, num_channels=1, **SIZES),
    "resnet": hf(
        ResNetForImageClassification, num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[3, 3], layer_type="basic"
    ),
    "t5": hf(
        T5ForConditionalGeneration, vocab_size=32, d_model=16, d_kv=8, d_ff=24, num_layers=4, num_heads=2, initializer_factor=2.0,
        decoder_start_token_id=0, eos_token_id=0, pad_token_id=0,
    ),
    "bart": hf(
        BartForConditionalGeneration, vocab_size=32, d_model=16, encoder_layers=4, decoder_layers=4, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32, init_std=0.2, **ENDS,
        decoder_start_token_id=0, forced_eos_token_id=None,
    ),
    "unet": functools.partial(
        UNet2DConditionModel, sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=8, attention_head_dim=4,
    ),
    "dit": functools.partial(
        DiTTransformer2DModel, num_attention_heads=2, attention_head_dim=8, in_channels=2, num_layers=4, sample_size=4,
        patch_size=2, num_embeds_ada_norm=10, norm_num_groups=1,
    ),
}  # fmt: skip
PLAIN = ("twice", "tied", "functional", "unnamed", "lstm", "mha")
NAMES = tuple(BUILD)


@functools.cache
def _built(name: str, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BUILD[name]().eval()


def model(name: str) -> nn.Module:
    """A copy of the family's model, in eval mode."""
    return copy.deepcopy(_built(name, 0))


def other(name: str) -> nn.Module:
    """A second model of the same structure with other weights."""
    return copy.deepcopy(_built(name, 1))


def batch(name: str) -> Any:
    """Two examples: a tensor for a plain model, else keyword arguments."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int = 5, kinds: int = 32) -> Tensor:
        return torch.randint(1, kinds, (2, length), generator=generator)

    def noise(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator)

    if name in ("lstm", "mha"):
        return noise(4, 5)
    if name in ("twice", "functional", "unnamed"):
        return noise(5)
    if name == "tied":
        return ids(kinds=12)
    if name in ("vit", "resnet"):
        return {"pixel_values": noise(1, 8, 8)}
    if name in ("t5", "bart"):
        return {"input_ids": ids(6), "decoder_input_ids": ids(4)}
    if name == "unet":
        return {"sample": noise(1, 8, 8), "timestep": torch.tensor([3, 7]), "encoder_hidden_states": noise(3, 8)}
    if name == "dit":
        return {"hidden_states": noise(2, 4, 4), "timestep": torch.tensor([3, 7]), "class_labels": torch.tensor([1, 2])}
    return {"input_ids": ids()}


@torch.no_grad()
def output(net: nn.Module, given: Any) -> Tensor:
    """The tensor that counts: logits, a sample, or what a plain model returns."""
    out = net(**given) if isinstance(given, dict) else net(given)
    for name in ("logits", "sample", "last_hidden_state"):
        out = getattr(out, name, out)
    return out


def transformed(transform: Transform, name: str, folder: Path, *others: nn.Module, refuses: str = "") -> nn.Module:
    """What a transform makes of a family, after checking what must hold for each.

    The model and the others stay as they were; the result comes back from ``recipe.load`` with the same numbers, and from
    ``from_pretrained`` too, unless ``save_pretrained`` refuses for the reason ``refuses``; where it generates, the cache
    changes no token.
    """
    net, given = model(name), batch(name)
    before = [picture(m) for m in (net, *others)]
    new = transform.plan(net, given, others=others).apply()
    for seen, m in zip(before, (net, *others), strict=True):
        unchanged(seen, m, f"{transform.slug} on {name}")
    out = output(new.eval(), given)
    assert out.isfinite().all()
    recipe.save(new, folder)
    same(
        output(recipe.load(folder, base=functools.partial(model, name) if name in PLAIN else None), given), out, "load"
    )
    if name not in PLAIN:
        refusal = carried(new, given)
        assert refuses in refusal and bool(refusal) == bool(refuses)
    if hasattr(new, "generate") and new.can_generate():
        ids = given["input_ids"]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        tokens = [new.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=c) for c in (True, False)]
        assert torch.equal(*tokens)
    return new
