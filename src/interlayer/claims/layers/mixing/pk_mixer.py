"""Mixers as wide sparse MLPs: accuracy against effective width at equal parameters, and against unstructured sparsity."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from interlayer.claims import Claim, Scale, effect, highest, ordered
from interlayer.claims.training import judge, task, train
from interlayer.layers.mixing.pk_mixer import PermutedKronecker, PKMixer, density, effective_width

DEPTH = 2


class Mask(nn.Module):
    """Keeps a fixed random set of a matrix's entries, wherever they lie."""

    kept: Tensor

    def __init__(self, like: Tensor, count: int) -> None:
        super().__init__()
        chosen = torch.rand_like(like).flatten().argsort()[:count]
        self.register_buffer("kept", torch.zeros_like(like).flatten().index_fill(0, chosen, 1.0).view_as(like))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, zero where it is not kept."""
        return weight * self.kept


class SparseMLP(PKMixer):
    """A simple Mixer whose wide matrices have ``count`` entries each in random places, every one learned on its own."""

    def __init__(self, *args: int, tokens: int, width: int, count: int, **options: object) -> None:
        super().__init__(*args, tokens=tokens, width=width, **options)  # type: ignore[arg-type]
        m = effective_width(tokens, width)
        lines = [nn.Linear(m, m) for _ in self.branches]
        for line in lines:
            nn.init.normal_(line.weight, std=(count / m) ** -0.5)
            nn.init.zeros_(line.bias)
            register_parametrization(line, "weight", Mask(line.weight, count))
        self.branches = nn.ModuleList()
        self.lines = nn.Sequential(*(part for line in lines for part in (line, nn.GELU())))

    def mix(self, x: Tensor) -> Tensor:
        """The sparse layers."""
        return self.lines(x)


def _sizes(arm: str, budget: int) -> tuple[int, int]:
    """Tokens and channels with S^2 + C^2 near the budget, S a given share of C."""
    ratio = {"narrow": 1 / 8, "middling": 1 / 3}.get(arm.removeprefix("sparse MLP, "), 1.0)
    channels = round((budget / (1 + ratio**2)) ** 0.5)
    return max(2, round(ratio * channels)), channels


def _counts(net: PKMixer) -> tuple[float, float]:
    """Learned weights and connections in a block, biases aside: a Mixer uses each weight in many places."""
    masks = [m.kept.sum().item() for m in net.modules() if isinstance(m, Mask)]
    layers = [m for b in net.branches for m in b.children() if isinstance(m, PermutedKronecker)]
    weights = sum(masks) + sum(m.weight.numel() for m in layers)
    connections = sum(masks) + sum(m.copies * m.weight.numel() for m in layers)
    return weights / DEPTH, connections / DEPTH


def build(arm: str, scale: Scale) -> PKMixer:
    """A classifier for digits with the arm's weights in the wide layers."""
    tokens, width = _sizes(arm, scale.budget)
    options: dict[str, object] = {"tokens": tokens, "width": width, "depth": DEPTH, "variant": "simple"}
    shape = task("digits").shape
    if arm == "sparse MLP, as many connections":
        count = round(density(tokens, width) * effective_width(tokens, width) ** 2)
        return SparseMLP.for_task(shape, **options, count=count)
    if arm.startswith("sparse MLP"):
        return SparseMLP.for_task(shape, **options, count=(tokens**2 + width**2) // 2)
    net = PKMixer.for_task(shape, **options, random=arm == "wide, random")
    if arm == "wide, unpermuted":
        for branch in net.branches:
            for layer in branch.children():
                assert isinstance(layer, PermutedKronecker)
                layer.order = "channels"  # S = C, so that the shapes fit: groups never meet
    return net


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Validation accuracy after equal steps, and the sizes."""
    torch.manual_seed(seed)
    net, m = build(arm, scale), effective_width(*_sizes(arm, scale.budget))
    train(net, "digits", seed=seed, steps=scale.steps, lr=2e-3, batch=64, warmup=10)
    weights, connections = _counts(net)
    return {
        "accuracy": judge(net, "digits", most=scale.judged)["accuracy"],
        "effective width": float(m),
        "density": connections / (2 * m**2),
        "weights of a block": weights,
        "connections of a block": connections,
    }


CLAIM = Claim(
    says="At equal parameters a simple Mixer is the more accurate the wider it effectively is; at the largest width it is no more than "
    "two points behind MLPs of that width with unstructured sparse weights, be they as many as its own or as many as its "
    "connections, and so are random groups behind ordered ones.",
    measure=measure,
    build=build,
    arms=(
        *("narrow", "middling", "wide", "wide, random"),
        *("sparse MLP, narrow", "sparse MLP, middling", "sparse MLP, wide", "sparse MLP, as many connections"),
    ),
    statements=(
        effect("", ordered("accuracy", "narrow", "middling", "wide"), control="wide, unpermuted"),
        effect(
            "",
            highest("accuracy", "wide", than=("sparse MLP, wide", "sparse MLP, as many connections"), margin=-0.02),
            control="wide, unpermuted",
        ),
        effect("", highest("accuracy", "wide, random", than=("wide",), margin=-0.02), control="wide, unpermuted"),
    ),
    scales={
        "smoke": {"budget": 128, "steps": 2, "judged": 1},
        "small": {"budget": 800, "steps": 200, "judged": None},
        "full": {"budget": 8000, "steps": 10000, "judged": None},
    },
)
