"""Fine-tuning a bridged translation model against training it anew, on number words with an exact translation."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from interlayer.claims import Claim, Scale, check, effect, fits, lowest, mechanism
from interlayer.core.extras import need
from interlayer.layers.stream.enc_dec_bridge import EncDecBridge
from interlayer.study.translation import END, PAD, START, VOCAB, sentences

TUNED, MIRRORED, ONES = "fine-tune", "fine-tune: granularity", "fine-tune: ones"
ANEW, LEARNED, ANEW_MIRRORED = "anew", "anew: original", "anew: granularity"
FINE = (TUNED, MIRRORED, ONES)
FIXED, STRAIGHT, FIRST = "anew: original, fixed", "granularity in the same order", "original of the first layer"
# Learning rate of each arm; see `pilots`.
RATES = {TUNED: 6e-3, MIRRORED: 1e-2, ONES: 1e-2, ANEW: 6e-3, LEARNED: 1e-2, ANEW_MIRRORED: 1e-2, FIXED: 6e-3}


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


def fit(model: Any, seed: int, scale: Scale, steps: int, lr: float) -> float:
    """Adam with a short warm-up and a linear decay; the mean loss of all steps, each of which has new sentences."""
    losses = []
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for step, (source, target) in enumerate(sentences(seed, steps, scale.batch)):
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 30) * (1 - step / steps)
        loss = model(input_ids=source, labels=target).loss
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
    return sum(losses) / max(len(losses), 1)


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
def trained(seed: int, steps: int, batch: int, depth: int, width: int) -> tuple[dict[str, Tensor], float]:
    """Weights of a plain model that translates, the same for all arms of a seed, and the mean loss of its training."""
    torch.manual_seed(seed)
    model = marian(depth, width)
    along = fit(model, seed, Scale(batch=batch), steps, RATES[ANEW])
    return {name: weight.detach().clone() for name, weight in model.state_dict().items()}, along


def build(arm: str, scale: Scale) -> Any:
    """The translation model with the arm's connections."""
    return bridged(marian(scale.depth, scale.width), arm)


def bridged(model: Any, arm: str) -> Any:
    """Attach the arm's connections, if it has any."""
    if how := arm.partition(": ")[2].partition(",")[0]:
        bridge = EncDecBridge.attach(model, start=how)
        if arm == FIXED:
            bridge.requires_grad_(False)
    return model


@torch.no_grad()
def exact(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """How far attaching original connections moves the outputs, and granularity-consistent ones from the mirrored layers."""
    torch.manual_seed(seed)
    model = marian(scale.depth, scale.width).eval()
    source, target = next(sentences(seed, 1, 4))
    before = model(input_ids=source, labels=target).logits
    bridge = EncDecBridge.attach(model, start="ones" if arm == ONES else "original")
    if arm == FIRST:
        bridge.weight.copy_(bridge.weight.roll(scale.width, 2))
    moved = float((model(input_ids=source, labels=target).logits - before).abs().max())
    other = EncDecBridge(scale.width, scale.depth, start="original" if arm == FIXED else "granularity")
    if arm == STRAIGHT:
        other.weight.copy_(other.weight.flip(0))
    states = torch.randn(2, scale.depth, 5, scale.width)
    return {"outputs moved": moved, "from the mirrored layer": float((other(states) - states.flip(1)).abs().max())}


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """What is exact, and loss and exact translations after training."""
    found = exact(arm, seed, scale)
    if arm in (STRAIGHT, FIRST):
        return found
    steps = scale.before if arm in FINE else scale.anew
    plain, along = trained(seed, steps, scale.batch, scale.depth, scale.width) if arm in (ANEW, *FINE) else ({}, 0.0)
    torch.manual_seed(seed)
    model = marian(scale.depth, scale.width)
    model.load_state_dict({**model.state_dict(), **plain})
    if arm == TUNED:
        found["exact before"] = judge(model, scale)[1]
    bridged(model, arm)
    if arm in FINE:
        along = fit(model, seed + 1, scale, scale.steps, RATES[arm])
    elif arm != ANEW:
        along = fit(model, seed, scale, scale.anew, RATES[arm])
    found["loss along training"] = along
    return found | dict(zip(("loss", "exact"), judge(model, scale), strict=True))


CLAIM = Claim(
    says="Original connections change no output and granularity-consistent ones read the mirrored layers; fine-tuning a trained "
    "translation model with the latter ends worse than fine-tuning it unchanged, and trained anew the model with them learns faster "
    "than the plain one and than with original connections that learn, and ends better than the plain one.",
    measure=measure,
    build=build,
    arms=(TUNED, MIRRORED, ANEW, LEARNED, ANEW_MIRRORED),
    statements=(
        mechanism(
            "Attaching original connections moves no output",
            fits("outputs moved", TUNED, high=1e-6),
            control=ONES,
            mutant=FIRST,
        ),
        mechanism(
            "With granularity-consistent connections, each decoder layer reads the encoder layer that mirrors it",
            fits("from the mirrored layer", ANEW_MIRRORED, high=1e-6),
            control=FIXED,
            mutant=STRAIGHT,
        ),
        effect(
            "Fine-tuned unchanged, the loss is lower than with granularity-consistent connections",
            lowest("loss", TUNED, than=(MIRRORED,)),
            control=ONES,
        ),
        effect(
            "Trained anew, it learns faster with granularity-consistent connections: the mean loss of all steps is lower",
            lowest("loss along training", ANEW_MIRRORED, than=(ANEW,)),
            control=FIXED,
        ),
        effect(
            "Trained anew, the final loss with granularity-consistent connections is lower than the plain model's",
            lowest("loss", ANEW_MIRRORED, than=(ANEW,)),
            control=FIXED,
        ),
        effect(
            "Trained anew, it learns faster than with original connections that learn",
            lowest("loss along training", ANEW_MIRRORED, than=(LEARNED,)),
            control=FIXED,
        ),
    ),
    checks=(
        check(
            "The model translates 80% of sentences exactly before it is fine-tuned",
            fits("exact before", TUNED, low=0.8),
        ),
        check("Trained anew, the plain model ends below 0.5 nats; guessing has 3.7", fits("loss", ANEW, high=0.5)),
    ),
    first_seed=200,
    pilots="Two runs, on seeds 0 to 11 and 100 to 111, were void: models to be fine-tuned had 320 steps, after which one and three of "
    "twelve had learnt little yet, so that 85% [59, 112] and 77% [46, 109] of sentences were exact where 80% and 50% were asked "
    "for. Now such models have 640 steps, 80% is asked for, and models and sentences are of seeds that nobody had looked at. "
    "After 320 and 420 steps, seeds 1000 to 1005 all gave 100%. Seeds 1000, 1001, two layers of 32, 320 steps of 16, linear "
    "decay; mean loss of all steps, final loss. Plain 1.04 .0148 and .92 .0096 at 6e-3 (4e-3: 1.04 .025); seed 1000 at 1e-2: "
    "granularity .70 .0041, original that learns .87 .0056. In 220 steps, seed 1000: plain 1.69 (6e-3) and 1.72 (1e-2), "
    "granularity 1.10 and .97, original 1.26 at 6e-3. Fine-tuned for 30 steps, seed 1000: unchanged .0110 (1e-3) .0068 (3e-3), "
    "granularity .0165 (3e-3) .0113 (6e-3); seed 1001: .0025 (6e-3) .0036 (1e-2), and .0069 .0059. Three layers without decay: "
    "plain is still at 1.3 after 120 steps of 24, where granularity is at .08; after 300 both translate everything.",
    scales={
        "smoke": {"depth": 2, "width": 16, "batch": 4, "steps": 1, "before": 1, "anew": 1, "judged": 4},
        "small": {"depth": 2, "width": 32, "batch": 16, "steps": 30, "before": 640, "anew": 320, "judged": 100},
        "full": {"depth": 6, "width": 256, "batch": 128, "steps": 2000, "before": 7000, "anew": 7000, "judged": 2000},
    },
)
