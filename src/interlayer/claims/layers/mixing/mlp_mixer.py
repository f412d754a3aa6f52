"""MLP-Mixer against a vision Transformer and a convolutional net of equal size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from interlayer import models
from interlayer.claims import Claim, Scale, effect, highest
from interlayer.claims.training import judge, task, train
from interlayer.core.cost import parameters
from interlayer.layers.mixing.mlp_mixer import MLPMixer, TokenMixing

# Sizes with about 50 000 parameters each.
SIZES = {
    "mlp-mixer": "mlp-mixer(depth=3, width=48, token_hidden=32, hidden=144)",
    "vit": "vit(depth=2, width=44, heads=4)",
    "convnet": "convnet(depth=14, width=10)",
    "mlp": "mlp(depth=3, width=110)",
}


class Shuffle(nn.Module):
    """The second control: every image's pixels in an order of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """Shuffle."""
        flat = x.flatten(2)
        return flat.gather(2, torch.rand_like(flat[:, :1]).argsort(-1).expand_as(flat)).view_as(x)


def build(arm: str, scale: Scale, name: str = "photos") -> nn.Module:
    """A classifier for the images of a task."""
    model = models.build(SIZES.get(arm, SIZES["mlp-mixer"]), task(name).shape)
    if arm == "no token mixing":
        assert isinstance(model, MLPMixer)
        for layer in model.layers:
            if isinstance(layer, TokenMixing):
                layer.mlp.down.requires_grad_(False).weight.zero_()  # type: ignore[operator]
    return nn.Sequential(Shuffle(), model) if arm == "shuffled pixels" else model


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Validation accuracy after equal steps on digits and on photograph patches, and the parameters."""
    found = {}
    for name in scale.tasks:
        torch.manual_seed(seed)
        model = build(arm, scale, name)
        train(model, name, seed=seed, steps=scale.steps, lr=2e-3, batch=64, warmup=10)
        found[f"accuracy on {name}"] = judge(model, name, most=scale.judged)["accuracy"]
        found[f"parameters for {name}"] = parameters(model)
    return found


CLAIM = Claim(
    says="At about equal parameters and equal steps an all-MLP Mixer is as accurate as a vision Transformer and better than a "
    "plain MLP, on digits and on patches of photographs.",
    measure=measure,
    build=build,
    arms=tuple(SIZES),
    statements=(
        effect("", highest("accuracy on digits", "mlp-mixer", than=("vit",), margin=-0.02), control="no token mixing"),
        effect("", highest("accuracy on photos", "mlp-mixer", than=("vit",), margin=-0.02), control="no token mixing"),
        effect("", highest("accuracy on photos", "mlp-mixer", than=("mlp",)), control="shuffled pixels"),
    ),
    scales={
        "smoke": {"tasks": ("digits",), "steps": 2, "judged": 1},
        "small": {"tasks": ("digits", "photos"), "steps": 150, "judged": 4},
        "full": {"tasks": ("digits", "photos"), "steps": 5000, "judged": 100},
    },
)
