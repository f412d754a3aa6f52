"""GRUs with full, low-rank and low-rank-plus-diagonal transitions: permuted digits pixel by pixel, and the copy task."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.claims import Claim, Scale, effect, highest
from interlayer.claims.training import judge, train
from interlayer.core import cost
from interlayer.layers.stream.lowrank_passthrough import LowRankPassthrough, PassthroughNet

ARMS: dict[str, dict[str, Any]] = {
    "full": {"width": 64, "transition": "full"},
    "full, few weights": {"width": 24, "transition": "full"},
    "low-rank": {"width": 64, "transition": "low-rank", "rank": 4},
    "low-rank-diagonal": {"width": 64, "transition": "low-rank-diagonal", "rank": 4},
    "no passthrough": {"width": 64, "transition": "low-rank-diagonal", "rank": 4, "carry": -20.0},
}
KINDS = 8  # of symbols in the copy task; two more inputs say "wait" and "recall"


def build(arm: str, scale: Scale) -> PassthroughNet:
    """The network that reads digits."""
    return PassthroughNet(1, 10, **ARMS[arm])


def copies(count: int, symbols: int, wait: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Symbols, a wait that ends with "recall", and blanks, as one-hot [B, S, 10]; what was shown is due in the blanks."""
    shown = torch.randint(KINDS, (count, symbols), generator=generator)
    blank = torch.full((count, wait + symbols), KINDS)
    blank[:, wait - 1] = KINDS + 1
    return F.one_hot(torch.cat((shown, blank), 1), KINDS + 2).float(), shown


def copy_accuracy(scale: Scale, seed: int, **options: Any) -> float:
    """Share of symbols that are recalled, on new sequences, after training."""
    layer, head = LowRankPassthrough(KINDS + 2, **options), nn.Linear(options["width"], KINDS)
    weights = [*layer.parameters(), *head.parameters()]
    optimiser, generator = torch.optim.Adam(weights, lr=5e-3), torch.Generator().manual_seed(seed)
    for _ in range(scale.copy_steps):
        x, shown = copies(64, scale.symbols, scale.wait, generator)
        logits = head(layer(x)[0][:, -scale.symbols :])
        loss = F.cross_entropy(logits.flatten(0, 1), shown.flatten())
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
    with torch.no_grad():
        x, shown = copies(512, scale.symbols, scale.wait, generator)
        return float((head(layer(x)[0][:, -scale.symbols :]).argmax(-1) == shown).float().mean())


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Accuracy on both tasks, and the weights of the transitions."""
    torch.manual_seed(seed)
    model = build(arm, scale)
    train(model, "sequential-digits", seed=seed, steps=scale.steps, lr=5e-3, batch=64)
    return {
        "digits accuracy": judge(model, "sequential-digits")["accuracy"],
        "copy accuracy": copy_accuracy(scale, seed, **ARMS[arm]),
        "transition weights": cost.parameters(model.layer.transition),
        "parameters": cost.parameters(model),
    }


CLAIM = Claim(
    says="A GRU of 64 units with rank-4-plus-diagonal transitions is more accurate than one with full transitions and as many "
    "weights in them, on permuted sequential digits and on copying, and on digits within 0.05 of a full one of its size.",
    measure=measure,
    build=build,
    arms=tuple(a for a in ARMS if a != "no passthrough"),
    statements=(
        effect(
            "", highest("digits accuracy", "low-rank-diagonal", than=("full, few weights",)), control="no passthrough"
        ),
        effect(
            "", highest("copy accuracy", "low-rank-diagonal", than=("full, few weights",)), control="no passthrough"
        ),
        effect(
            "", highest("digits accuracy", "low-rank-diagonal", than=("full",), margin=-0.05), control="no passthrough"
        ),
    ),
    scales={
        "smoke": {"steps": 1, "copy_steps": 1, "symbols": 2, "wait": 2},
        "small": {"steps": 300, "copy_steps": 800, "symbols": 4, "wait": 8},
        "full": {"steps": 5000, "copy_steps": 20000, "symbols": 10, "wait": 100},
    },
)
