"""Router-Tuning: attention that sequences may skip, in a frozen trained model whose routers alone are trained."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.core import delivery, recipe, taps
from interlayer.core.data import answer
from interlayer.core.example import Example
from interlayer.core.extras import need
from interlayer.core.fit import descend
from interlayer.core.kinds import Plan, Row, Transform
from interlayer.core.mixer import Attention
from interlayer.core.pairing import Streams
from interlayer.core.select import blocks, put
from interlayer.core.skipping import Per, Skip, SkipDecoder, SkipMixer, attention_of
from interlayer.core.stream import Stream
from interlayer.core.trunk import Trunk, build_trunk

Of = Literal["attention", "block"]
Learn = Literal["routers", "all"]


class MindSkip(Transform):
    """Let sequences skip the attention of deep layers of a trained model, by routers that alone are trained, on little data.

    He et al., Router-Tuning: A Simple and Effective Approach for Enabling Dynamic-Depth in Transformers, EMNLP 2025,
    arXiv:2410.13184. A layer computes ``x + g attention(norm(x))``, where ``g = 1`` if ``sigmoid(w' mean_s norm(x_s)) >= 0.5`` and
    otherwise 0, one decision for a sequence. The gradient of g is that of the sigmoid (straight-through). Training adds
    ``weight * relu(mean g - capacity)`` of each layer to the model's own loss; w begins at 0, so the model begins as it was.
    What skips is not computed: see ``core.skipping``, also for what the cache holds in decoding.

    Works on Hugging Face decoders whose blocks hold their attention as a part (Llama, Mistral, Qwen, GPT-2, GPT-NeoX, OPT, ...) and
    on Transformers of Interlayer. ``of="block"``, ``per="token"`` and ``learn="all"`` give what the paper compares with: a full
    training of a mixture of depths.

    Args:
        capacity: Share of the sequences (or tokens) that shall be kept, above 0 and at most 1.
        weight: Of the loss above.
        threshold: Least score that is kept. None keeps ``ceil(capacity B)`` sequences of each batch instead.
        layers: How many layers get a router: the last ones before the last of all. Defaults to half of them, as in the authors' script.
        of: What is skipped: ``"attention"``, or the whole ``"block"``.
        per: One decision for each ``"sequence"`` or each ``"token"`` (Hugging Face models only).
        learn: Train the ``"routers"`` alone, or ``"all"`` weights.
        lr: Highest learning rate: AdamW, warm-up over 3% of the steps, then a cosine to 0. A router needs one in proportion to 1 / width;
            the authors take 1e-5 at width 4096.
        epochs: Passes over the data.
        seed: Of draws in training, such as dropout.

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
        if len(found) < 2 or many > len(found) - 1:
            raise ValueError(
                f"mindskip: {at!r} has {len(found)} blocks, of which the last always runs; {many} were to get a router. Lower layers."
            )
        many = min(many, len(found) - 1)
        chosen = range(len(found) - 1 - many, len(found) - 1)
        places = [self._place(model, at, i) for i in chosen]
        batches = [data] if isinstance(data, Tensor | Mapping | tuple) else list(data or ())
        if not batches:
            raise ValueError("mindskip: no data; expected batches that the routers learn from. Pass plan(model, data).")
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
            self._train(self.restore(new, structure), batches)
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

    @torch.enable_grad()
    def _train(self, model: nn.Module, batches: Sequence[Any]) -> None:
        """Train the routers, or all weights, and leave modes and gradients as they were."""
        modes = [(m, m.training) for m in model.modules()]
        asked = [(p, p.requires_grad) for p in model.parameters()]
        skips = [m for m in model.modules() if isinstance(m, Skip)]
        model.train(self.learn == "all").requires_grad_(self.learn == "all")
        for skip in skips:
            skip.training = True  # the frozen model inside stays in eval mode
            skip.router.requires_grad_(True)
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=self.lr, weight_decay=0.0)
        steps, noise = self.epochs * len(batches), Streams(model, self.seed)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        for step in range(steps):
            batch = batches[step % len(batches)]
            with noise.step(step):
                found, _ = descend(model, optimizer, lambda batch=batch: _loss(model, batch), share=step / steps)
            if not math.isfinite(found):
                raise ValueError(
                    f"mindskip: the loss of step {step} is {found}; expected a number. Lower lr, or look at the data."
                )
            schedule.step()
        optimizer.zero_grad(set_to_none=True)
        for module, mode in modes:
            module.training = mode
        for p, asks in asked:
            p.requires_grad_(asks)


def _config(model: nn.Module) -> Any:
    found: Any = getattr(model, "config", None)
    return found.get_text_config() if hasattr(found, "get_text_config") else None


def _rate(step: int, steps: int) -> float:
    """Warm-up over 3% of the steps, then a cosine from 1 to 0."""
    warmup = math.ceil(0.03 * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def _loss(model: nn.Module, batch: Any) -> Tensor:
    """Cross-entropy of the targets, the labels, or else the next tokens."""
    args, named = taps.arguments(batch)
    out = model(*args, **named, **({"use_cache": False} if _config(model) is not None else {}))
    if getattr(out, "loss", None) is not None:
        return out.loss
    logits, targets = answer(out), batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    if targets is None:
        tokens, mask = named.get("input_ids", args[0] if args else None), named.get("attention_mask")
        if tokens is None or tokens.is_floating_point():
            raise ValueError(
                "mindskip: a batch without targets or tokens; expected tokens, pairs with targets, or labels."
            )
        targets = tokens[:, 1:] if mask is None else tokens[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        logits = logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


def _plain() -> tuple[nn.Module, Tensor]:
    trunk = build_trunk(depth=4, width=8, heads=2, length=6, causal=True)
    return nn.Sequential(nn.Embedding(9, 8), trunk, nn.Linear(8, 9)), torch.randint(9, (4, 6))


def _llama() -> tuple[nn.Module, Tensor]:
    hf: Any = need("transformers", "hf", "mindskip.EXAMPLE")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
    config = hf.LlamaConfig(vocab_size=32, use_cache=False, bos_token_id=0, eos_token_id=0, **sizes)
    return hf.LlamaForCausalLM(config), torch.randint(32, (4, 5))


EXAMPLE = Example(make=lambda: MindSkip(lr=1.0), inputs=_plain, hf=_llama)
