"""Mixers as wide sparse MLPs: accuracy against effective width at equal parameters, and against unstructured sparsity."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from interlayer.claims import Claim, Scale, highest, ordered
from interlayer.claims.training import judge, task, train
from interlayer.layers.mixing.pk_mixer import PermutedKronecker, PKMixer, density, effective_width


class Mask(nn.Module):
    """Keeps a fixed random share of a matrix's entries, each row the same number."""

    kept: Tensor

    def __init__(self, like: Tensor, share: float) -> None:
        super().__init__()
        few = max(1, round(share * like.shape[1]))
        chosen = torch.rand_like(like).argsort(1)[:, :few]
        self.register_buffer("kept", torch.zeros_like(like).scatter(1, chosen, 1.0))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, zero where it is not kept."""
        return weight * self.kept


class SparseMLP(PKMixer):
    """A simple Mixer whose wide matrices have as many entries in random places, each learned on its own."""

    def __init__(self, *args: int, tokens: int, width: int, **options: object) -> None:
        super().__init__(*args, tokens=tokens, width=width, **options)  # type: ignore[arg-type]
        m, share = effective_width(tokens, width), density(tokens, width)
        lines = [nn.Linear(m, m) for _ in self.branches]
        for line in lines:
            nn.init.normal_(line.weight, std=(share * m) ** -0.5)
            nn.init.zeros_(line.bias)
            register_parametrization(line, "weight", Mask(line.weight, share))
        self.branches = nn.ModuleList()
        self.lines = nn.Sequential(*(part for line in lines for part in (line, nn.GELU())))

    def mix(self, x: Tensor) -> Tensor:
        """The sparse layers."""
        return self.lines(x)


def _sizes(arm: str, budget: int) -> tuple[int, int]:
    """Tokens and channels with S^2 + C^2 near the budget, S a given share of C."""
    ratio = {"narrow": 1 / 8, "middling": 1 / 3}.get(arm, 1.0)
    channels = round((budget / (1 + ratio**2)) ** 0.5)
    return max(2, round(ratio * channels)), channels


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Validation accuracy after equal steps, and the sizes."""
    torch.manual_seed(seed)
    tokens, width = _sizes(arm, scale.budget)
    kind = SparseMLP if arm == "sparse MLP" else PKMixer
    net = kind.for_task(
        task("digits").shape, tokens=tokens, width=width, depth=2, variant="simple", random=arm == "wide, random"
    )
    if arm == "wide, unpermuted":
        for branch in net.branches:
            for layer in branch.children():
                assert isinstance(layer, PermutedKronecker)
                layer.order = "channels"  # S = C, so that the shapes fit: groups never meet
    train(net, "digits", seed=seed, steps=scale.steps, lr=2e-3, batch=64, warmup=10)
    return {
        "accuracy": judge(net, "digits", most=scale.judged)["accuracy"],
        "effective width": float(effective_width(tokens, width)),
        "density": density(tokens, width),
        "parameters of a block": float(tokens**2 + width**2),
    }


CLAIM = Claim(
    says="At equal parameters a simple Mixer is the more accurate the wider it effectively is; at the largest width it is no more than "
    "two points behind an MLP of that width with unstructured sparse weights, and so are random groups behind ordered ones.",
    measure=measure,
    arms=("narrow", "middling", "wide", "wide, random", "sparse MLP"),
    expect=(
        ordered("accuracy", "narrow", "middling", "wide"),
        highest("accuracy", "wide", than=("sparse MLP",), margin=-0.02),
        highest("accuracy", "wide, random", than=("wide",), margin=-0.02),
    ),
    control="wide, unpermuted",
    scales={
        "smoke": {"budget": 128, "steps": 2, "judged": 1},
        "small": {"budget": 800, "steps": 200, "judged": None},
        "full": {"budget": 8000, "steps": 10000, "judged": None},
    },
)
