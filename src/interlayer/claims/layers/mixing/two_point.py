"""Two-point neurons against point neurons: seeing and hearing a digit through noise, with few units and after damage."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.claims import Claim, Scale, effect, lowest
from interlayer.layers.mixing.two_point import MCC, TwoPoint, modulate
from interlayer.study.audiovisual import BINS, senses


def score(net: nn.Module, sight: Tensor, sound: Tensor, clean: Tensor, digit: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error of the image, and logits' cross-entropy."""
    out = net(sight, sound)
    return F.mse_loss(out[:, 10:], clean), F.cross_entropy(out[:, :10], digit)


class Damaged(MCC):
    """A network that lost a share of its units."""

    lost: Tensor

    def units(self, *senses: Tensor) -> list[Tensor]:
        """The last layer without the lost units."""
        seen = super().units(*senses)
        return [*seen[:-1], seen[-1] * ~self.lost]


class Strangers(MCC):
    """The control: each sense gets the context of another sample."""

    def forward(self, *senses: Tensor) -> Tensor:
        """Sounds of other samples beside the images."""
        return super().forward(senses[0], senses[1].roll(1, 0))


def _alone(drive: Tensor, context: Tensor) -> Tensor:
    """The second control: context reaches no unit."""
    return modulate(drive, 0 * context)


def build(arm: str, scale: Scale) -> MCC:
    """The network of two senses."""
    kind = Strangers if arm == "strangers" else MCC
    net = kind((64, BINS), units=scale.units, outputs=74, two_point=arm != "point neurons")
    if arm == "no context":
        for module in net.modules():
            if isinstance(module, TwoPoint):
                module.transfer = _alone
    return net


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Reconstruction and classification, share of active units, and the error after units are removed."""
    torch.manual_seed(seed)
    net = build(arm, scale)
    sight, sound, clean, digit = senses("train", seed, scale.noise)
    blind = arm == "sight alone"
    optimiser = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.0)
    order = torch.Generator().manual_seed(seed)
    for _ in range(scale.steps):
        rows = torch.randint(len(sight), (64,), generator=order)
        error, loss = score(net, sight[rows], sound[rows] * (not blind), clean[rows], digit[rows])
        optimiser.zero_grad()
        (error + 0.1 * loss).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
    sight, sound, clean, digit = senses("validation", seed, scale.noise)
    sound = sound * (not blind)
    with torch.no_grad():
        error, _ = score(net, sight, sound, clean, digit)
        found = {
            "reconstruction error": error.item(),
            "classification error": 1 - (net(sight, sound)[:, :10].argmax(1) == digit).float().mean().item(),
            "active units": torch.stack([u.gt(0).float().mean() for u in net.units(sight, sound)]).mean().item(),
            "mean activity": torch.stack([u.mean() for u in net.units(sight, sound)]).mean().item(),
        }
        net.__class__ = Damaged
        lost = torch.rand(20, 2 * scale.units, generator=torch.Generator().manual_seed(seed)) < scale.lost
        after = []
        for row in lost:
            net.lost = row
            shown = sound.roll(1, 0) if arm == "strangers" else sound
            after.append(score(net, sight, shown, clean, digit)[0].item())
        found["error added by removal"] = sum(after) / len(after) - found["reconstruction error"]
    return found


CLAIM = Claim(
    says="With the same connections, two-point neurons reconstruct a noisy image of a digit, heard with a noisy sound, better than "
    "point neurons, with fewer active units, and lose less when a quarter of the last layer's units is removed.",
    measure=measure,
    build=build,
    arms=("two-point neurons", "point neurons", "sight alone"),
    statements=(
        effect(
            "",
            lowest("reconstruction error", "two-point neurons", than=("point neurons", "sight alone")),
            control="strangers",
        ),
        effect("", lowest("active units", "two-point neurons", than=("point neurons",)), control="no context"),
        effect(
            "", lowest("error added by removal", "two-point neurons", than=("point neurons",)), control="no context"
        ),
    ),
    scales={
        "smoke": {"units": 16, "steps": 3, "noise": 1.0, "lost": 0.25},
        "small": {"units": 64, "steps": 1500, "noise": 1.0, "lost": 0.25},
        "full": {"units": 256, "steps": 20000, "noise": 1.0, "lost": 0.25},
    },
)
