"""Fine-tuning a bridged translation model against training it anew, on number words with an exact translation."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from interlayer.claims import Claim, Scale, effect, lowest
from interlayer.core.extras import need
from interlayer.layers.stream.enc_dec_bridge import EncDecBridge
from interlayer.study.translation import END, PAD, START, VOCAB, sentences


def marian(depth: int, width: int) -> Any:
    """A small Marian model, the family that the study changed, with random weights."""
    hf = need("transformers", "hf", "the claim of enc-dec-bridge")
    sizes = {f"{end}_{what}": n for end in ("encoder", "decoder")
             for what, n in (("layers", depth), ("attention_heads", 4), ("ffn_dim", 2 * width))}  # fmt: skip
    config = hf.MarianConfig(
        vocab_size=VOCAB, d_model=width, max_position_embeddings=32, scale_embedding=True, dropout=0.0, init_std=0.1,
        pad_token_id=PAD, eos_token_id=END, decoder_start_token_id=START, forced_eos_token_id=None, **sizes,
    )  # fmt: skip
    return hf.MarianMTModel(config)


def fit(model: Any, seed: int, scale: Scale, steps: int, lr: float) -> None:
    """Adam with a short warm-up."""
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for step, (source, target) in enumerate(sentences(seed, steps, scale.batch)):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 30)
        loss = model(input_ids=source, labels=target).loss
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()


@torch.no_grad()
def judge(model: Any, scale: Scale) -> tuple[float, float]:
    """Loss on new sentences, and the share that is translated without a mistake by greedy decoding."""
    source, target = next(sentences(10_000, 1, scale.judged))
    model.eval()
    loss = float(model(input_ids=source, labels=target).loss)
    output = model.generate(source, max_length=target.shape[1] + 1, do_sample=False)[:, 1:]
    output = nn.functional.pad(output, (0, target.shape[1] - output.shape[1]), value=PAD)
    return loss, float((output == target).all(1).float().mean())


@cache
def pretrained(seed: int, before: int, batch: int, depth: int, width: int) -> dict[str, Tensor]:
    """Weights of a model that translates, the same for all arms of a seed."""
    torch.manual_seed(seed)
    model = marian(depth, width)
    fit(model, seed, Scale(batch=batch), before, 3e-3)
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}


def build(arm: str, scale: Scale) -> Any:
    """The translation model with the arm's connections."""
    return bridged(marian(scale.depth, scale.width), arm)


def bridged(model: Any, arm: str) -> Any:
    """Attach the arm's connections, if it has any."""
    if how := arm.partition(": ")[2]:
        EncDecBridge.attach(model, start="original" if how == "model of ones" else how)
    return model


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Loss and exact translations before and after training."""
    old = arm.startswith("fine-tune")
    start = pretrained(seed, scale.before, scale.batch, scale.depth, scale.width) if old else {}
    torch.manual_seed(seed)
    model = marian(scale.depth, scale.width)
    model.load_state_dict({**model.state_dict(), **start})
    bridged(model, arm)
    if arm.endswith("model of ones"):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if not name.startswith("bridge"):
                    weight.fill_(1.0)
    found = dict(zip(("loss at the start", "exact at the start"), judge(model, scale), strict=True))
    fit(model, seed + 1, scale, scale.steps if old else scale.anew, 1e-3 if old else 3e-3)
    return found | dict(zip(("loss", "exact"), judge(model, scale), strict=True))


CLAIM = Claim(
    says="Fine-tuning a trained translation model with granularity-consistent connections ends worse than fine-tuning it "
    "unchanged; trained anew, the model with these connections ends better than the plain one.",
    measure=measure,
    build=build,
    arms=(
        "fine-tune",
        "fine-tune: original",
        "fine-tune: granularity",
        "anew",
        "anew: original",
        "anew: granularity",
        "anew: model of ones",
    ),
    statements=(
        effect("", lowest("loss", "fine-tune", than=("fine-tune: granularity",)), control="fine-tune: ones"),
        effect("", lowest("loss", "anew: granularity", than=("anew",)), control="anew: ones"),
    ),
    scales={
        "smoke": {"depth": 2, "width": 16, "batch": 4, "before": 1, "steps": 1, "anew": 1, "judged": 4},
        "small": {"depth": 3, "width": 48, "batch": 32, "before": 240, "steps": 60, "anew": 240, "judged": 200},
        "full": {"depth": 6, "width": 256, "batch": 128, "before": 5000, "steps": 2000, "anew": 7000, "judged": 2000},
    },
)
