"""Router-Tuning: attention that sequences may skip, in a frozen trained model whose routers alone are trained."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from interlayer.core import delivery, recipe, taps
from interlayer.core.example import Example
from interlayer.core.extras import need
from interlayer.core.kinds import Plan, Row, Transform
from interlayer.core.mixer import Attention
from interlayer.core.select import blocks, put
from interlayer.core.skipping import Per, Skip, SkipDecoder, SkipMixer, attention_of
from interlayer.core.stream import Stream
from interlayer.core.trunk import Trunk, build_trunk
from interlayer.core.tune import tune

Of = Literal["attention", "block"]
Learn = Literal["routers", "all"]


class MindSkip(Transform):
    """Let sequences skip the attention of deep layers of a trained model, by routers that alone are trained, on little data.

    He et al., Router-Tuning: A Simple and Effective Approach for Enabling Dynamic-Depth in Transformers, EMNLP 2025,
    arXiv:2410.13184. A layer computes ``x + g attention(norm(x))``, where ``g = 1`` if ``sigmoid(w' mean_s norm(x_s)) >= 0.5`` and
    otherwise 0, one decision for a sequence. The gradient of g is that of the sigmoid (straight-through). Training adds
    ``weight * relu(mean g - capacity)`` of each layer to the model's own loss; w is initialised to 0, so the model is at first as it was.
    What skips is not computed: see ``core.skipping``, also for what the cache holds in decoding.

    Works on Hugging Face decoders whose blocks hold their attention as a part (Llama, Mistral, Qwen, GPT-2, GPT-NeoX, OPT, ...) and
    on Transformers of Interlayer. ``of="block"``, ``per="token"`` and ``learn="all"`` give what the paper compares with: a full
    training of a mixture of depths.

    Args:
        capacity: Share of the sequences (or tokens) to keep, above 0 and at most 1.
        weight: Weight of the loss above.
        threshold: Lowest score that is kept. None keeps ``ceil(capacity B)`` sequences of each batch instead.
        layers: How many layers get a router: the last ones before the last of all. Defaults to half of them, as in the authors' script.
        of: What can be skipped: ``"attention"``, or the whole ``"block"``.
        per: One decision for each ``"sequence"`` or each ``"token"`` (Hugging Face models only).
        learn: Train the ``"routers"`` alone, or ``"all"`` weights.
        lr: Peak learning rate of AdamW, with a warm-up over 3% of the steps and a cosine to 0. Routers are initialised to 0 and decide by
            the sign of w' x, so that it matters little (the authors take 1e-5 at width 4096). To train all weights, choose it anew.
        epochs: Passes over the data.
        seed: Seed of random draws in training, such as dropout.

    Shapes: as the model's.

    Raises:
        ValueError: An option out of range; from ``plan``: no data, too few blocks, or blocks without an attention that can be
            skipped.

    Examples:
        >>> from interlayer.core.trunk import build_trunk
        >>> net = nn.Sequential(nn.Embedding(9, 8), build_trunk(depth=4, width=8, heads=2, length=6, causal=True), nn.Linear(8, 9))
        >>> data = [torch.randint(9, (4, 6)) for _ in range(3)]
        >>> print(MindSkip().plan(net, data))
        mindskip {'capacity': 0.5, 'weight': 1.0, 'threshold': 0.5, 'layers': 2, 'of': 'attention', 'per': 'sequence', 'learn': 'routers'}
          + 1.blocks.1.mixer  Attention  (8 weights of a router are trained)
          + 1.blocks.2.mixer  Attention  (8 weights of a router are trained)
          - 1.blocks.0        Block  (outside of the 2 layers with a router)
          - 1.blocks.3        Block  (the last layer always runs)
    """

    slug: ClassVar[str] = "mindskip"

    def __init__(
        self,
        *,
        capacity: float = 0.5,
        weight: float = 1.0,
        threshold: float | None = 0.5,
        layers: int | None = None,
        of: Of = "attention",
        per: Per = "sequence",
        learn: Learn = "routers",
        lr: float = 1e-2,
        epochs: int = 1,
        seed: int = 0,
    ) -> None:
        for name, value, known in (("of", of, Of), ("learn", learn, Learn)):
            if value not in get_args(known):
                raise ValueError(f"mindskip: {name}={value!r} is not one of {', '.join(get_args(known))}.")
        if lr <= 0 or epochs < 1 or (layers is not None and layers < 1):
            raise ValueError(
                f"mindskip: lr={lr}, epochs={epochs}, layers={layers}; expected a rate above 0, and at least one epoch and layer."
            )
        self.settings: dict[str, Any] = {"per": per, "threshold": threshold, "capacity": capacity, "weight": weight}
        Skip(nn.Identity(), 1, **self.settings)  # says which option is out of range
        self.layers, self.of, self.learn, self.lr, self.epochs, self.seed = layers, of, learn, lr, epochs, seed

    def plan(self, model: nn.Module, data: Any = None, *, others: Sequence[nn.Module] = ()) -> Plan:
        """Choose the layers; ``apply`` trains their routers on the data, batch by batch.

        Args:
            model: The trained model.
            data: Batches to learn from: tokens, whose next ones are predicted; pairs of inputs and targets; or keyword arguments of
                a Hugging Face model.
            others: None.
        """
        self.take(others)
        at, found = blocks(model)
        many = (len(found) + 1) // 2 if self.layers is None else self.layers
        if many > len(found) - 1:
            raise ValueError(
                f"mindskip: {at!r} has {len(found)} blocks, of which the last always runs; {many} were to get a router. Lower `layers`."
            )
        chosen = range(len(found) - 1 - many, len(found) - 1)
        places = [self._place(model, at, i) for i in chosen]
        batches = taps.batches(
            data, self.slug, "no data; expected batches that the routers learn from. Pass plan(model, data)."
        )
        names = [name for name, _ in places]
        options = {
            "capacity": self.settings["capacity"], "weight": self.settings["weight"], "threshold": self.settings["threshold"],
            "layers": many, "of": self.of, "per": self.settings["per"], "learn": self.learn,
        }  # fmt: skip
        what = "of a router are trained" if self.learn == "routers" else "of a router are trained, and all others"
        touched = [Row(n, type(model.get_submodule(n)).__name__, f"{width} weights {what}") for n, width in places]
        left = [
            Row(
                f"{at}.{i}", type(found[i]).__name__,
                "the last layer always runs" if i == len(found) - 1 else f"outside of the {many} layers with a router",
            )
            for i in range(len(found)) if i not in chosen
        ]  # fmt: skip
        structure = {"places": names, "widths": [w for _, w in places], "of": self.of, **self.settings}

        def build() -> nn.Module:
            new = copy.deepcopy(model)
            recipe.record(new, self.slug, options, structure)
            skips = [m for m in self.restore(new, structure).modules() if isinstance(m, Skip)]
            weights = [p for s in skips for p in s.router.parameters()] if self.learn == "routers" else None
            tune(new, batches, weights=weights, modules=skips, lr=self.lr, epochs=self.epochs, seed=self.seed)
            return new

        return Plan(self.slug, options, touched, left, build)

    def restore(self, model: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
        """Put routers, which keep everything, in place."""
        options = {k: structure[k] for k in ("per", "threshold", "capacity", "weight")}
        for name, width in zip(structure["places"], structure["widths"], strict=True):
            old = model.get_submodule(name)
            like = next(old.parameters())
            wrap = SkipMixer if isinstance(old, Attention) else SkipDecoder
            options |= {} if isinstance(old, Attention) else {"passes": structure["of"] == "block"}
            put(model, name, wrap(old, width, **options).to(like.device).train(old.training))
        return delivery.guard(model, "routers by which sequences skip layers")

    def _place(self, model: nn.Module, at: str, number: int) -> tuple[str, int]:
        """The name and width of what a layer's router may skip."""
        name = f"{at}.{number}"
        block, parent, config = model.get_submodule(name), model.get_submodule(at.rpartition(".")[0]), _config(model)
        if isinstance(parent, Trunk):
            if not isinstance(block.mixer, Attention) or type(parent.stream).share is not Stream.share:
                part = block.mixer if not isinstance(block.mixer, Attention) else parent.stream
                raise ValueError(
                    f"mindskip: {type(part).__name__} in {name!r} needs all sequences in every layer; expected attention and a stream that "
                    "leaves keys and values alone."
                )
            if self.of == "block" or self.settings["per"] == "token":
                raise ValueError(
                    f"mindskip: of={self.of!r}, per={self.settings['per']!r}; in a Transformer of Interlayer sequences skip attention. "
                    "Leave them out, or take a Hugging Face decoder."
                )
            return f"{name}.mixer", parent.width
        part_name, width = attention_of(block), getattr(config, "hidden_size", 0)
        if not part_name or not width or getattr(config, "is_encoder_decoder", False):
            raise ValueError(
                f"mindskip: {name!r} ({type(block).__name__}) has no attention that may be skipped; expected the block of a decoder of "
                "Hugging Face, whose attention takes attention_mask and past_key_values, or one of Interlayer."
            )
        return name if self.of == "block" else f"{name}.{part_name}", width


def _config(model: nn.Module) -> Any:
    found: Any = getattr(model, "config", None)
    return found.get_text_config() if hasattr(found, "get_text_config") else None


def _plain() -> tuple[nn.Module, Tensor]:
    trunk = build_trunk(depth=4, width=8, heads=2, length=6, causal=True)
    return nn.Sequential(nn.Embedding(9, 8), trunk, nn.Linear(8, 9)), torch.randint(9, (4, 6))


def _llama() -> tuple[nn.Module, Tensor]:
    hf: Any = need("transformers", "hf", "mindskip.EXAMPLE")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = hf.LlamaConfig(vocab_size=32, use_cache=False, bos_token_id=0, eos_token_id=0, **sizes)
    return hf.LlamaForCausalLM(config), torch.randint(32, (4, 5))


EXAMPLE = Example(make=lambda: MindSkip(lr=1.0), inputs=_plain, hf=_llama)
