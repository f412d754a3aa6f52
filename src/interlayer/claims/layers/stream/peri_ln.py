"""Peri-LN beside pre-norm and post-norm: variance and gradients by depth, and how many learning rates fail."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from interlayer.claims import Claim, Scale, fits, highest, lowest
from interlayer.claims.training import batches, task, train
from interlayer.core.position import Rotary
from interlayer.core.stream import PostNorm, State
from interlayer.layers.stream.peri_ln import PeriLN
from interlayer.models import Transformer


class NoOutputNorm(PeriLN):
    """A control: the norms at the outputs are left out."""

    def write(self, state: State, layer: int, branch: Tensor) -> State:
        """Add the branch as it is."""
        state.x = state.x + branch
        return state


class NormedSum(PeriLN):
    """A control: the norm of a sublayer's output is taken after the sum."""

    def write(self, state: State, layer: int, branch: Tensor) -> State:
        """Norm the residual with the branch."""
        state.x = self.output_norms[layer](state.x + branch)
        return state


Seen = tuple[list[float], list[float]]


class UnitInput(Rotary):
    """Rotary, and the embedding (std 0.02) multiplied to variance 1, so that no placement starts from a tiny state."""

    def embed(self, x_BSD: Tensor, offset: int = 0) -> Tensor:
        """Scale, as the original Transformer does."""
        return 50 * x_BSD


STREAMS = {"post-norm": PostNorm, "no output norm": NoOutputNorm, "sum normed": NormedSum}


def build(arm: str, seed: int, scale: Scale) -> Transformer:
    """A deep narrow Transformer; weights have std sqrt(2 / (5 D)), which is the customary 0.02 at 1000 features."""
    torch.manual_seed(seed)
    sizes = {"length": 128, "depth": scale.depth, "width": scale.width, "heads": 4}
    model = Transformer(**sizes, stream=STREAMS.get(arm, arm), position=UnitInput)
    for module in model.trunk.blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=math.sqrt(0.4 / scale.width))
    return model


def look(model: Transformer, x: Tensor, y: Tensor) -> Seen:
    """Variance of the hidden state after each block, and norm of the gradient of each block's weights."""
    stream, variances = model.trunk.stream, []
    write = stream.write

    def see(state: State, layer: int, branch: Tensor) -> State:
        state = write(state, layer, branch)
        if stream.ends_block(layer):
            variances.append(float(state.x.detach().var(-1).mean()))
        return state

    stream.write = see
    model.zero_grad()
    task("stdlib-bytes").loss(model(x), y).backward()
    del stream.write
    blocks = [[p.grad for p in block.parameters() if p.grad is not None] for block in model.trunk.blocks]
    gradients = [float(torch.stack([g.norm() for g in block]).norm()) for block in blocks]
    model.zero_grad()
    return variances, gradients


def unigram_loss() -> float:
    """What a predictor has that knows only how frequent the bytes are."""
    counts = torch.bincount(next(batches("stdlib-bytes", 0, 2048, 1))[0].flatten(), minlength=256).double()
    return float(torch.distributions.Categorical(counts).entropy())


def exponent(variances: list[float]) -> float:
    """p in ``variance ~ depth^p``, from a straight line through the logarithms."""
    depth = torch.arange(1, len(variances) + 1).double().log()
    height = torch.tensor(variances).double().log()
    return float(((depth - depth.mean()) * (height - height.mean())).sum() / (depth - depth.mean()).square().sum())


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Variance and gradient norm by depth before, during and after training; learning rates that end above unigrams."""
    found: dict[str, float] = {}
    (x, y) = next(batches("stdlib-bytes", 99, 16, 1))
    x, y = x[:, : scale.length], y[:, : scale.length]
    failed, trivial = 0, unigram_loss()
    for lr in scale.rates:
        model = build(arm, seed, scale)
        seen = {0: look(model, x, y)}

        def watch(step: int, loss: float, model: Transformer = model, seen: dict[int, Seen] = seen) -> bool:
            if step + 1 in (scale.steps // 2, scale.steps):
                seen[step + 1] = look(model, x, y)
            return False

        watched = watch if lr == scale.watched else None
        losses = train(
            model, "stdlib-bytes", seed=seed, steps=scale.steps, lr=lr, batch=8, cut=scale.length, watch=watched
        )
        last = losses[-5:]
        loss = sum(last) / len(last)
        found[f"loss at {lr:g}"] = loss
        failed += not loss < trivial
        if watched:
            for step, (variances, gradients) in seen.items():
                for i in sorted({1, scale.depth // 3, 2 * scale.depth // 3, scale.depth}):
                    found[f"variance of block {i} at step {step}"] = variances[i - 1]
                    found[f"gradient of block {i} at step {step}"] = gradients[i - 1]
            start, end = seen[0], list(seen.values())[-1]
            found["gradient first/last at start"] = start[1][0] / start[1][-1]
            found["variance last/first at end"] = end[0][-1] / end[0][0]
            found["growth exponent at end"] = exponent(end[0])
    return {**found, "failed rates": failed}


CLAIM = Claim(
    says="In a Transformer of 12 blocks Peri-LN's hidden variance grows about linearly with depth after training, with an "
    "exponent of 0.7 to 1.3, and less than pre-norm's; its first block's gradient at the start is a larger share of the "
    "last block's than post-norm's; and it fails at fewer learning rates than both.",
    measure=measure,
    arms=("pre-norm", "post-norm", "peri-ln"),
    expect=(
        fits("growth exponent at end", "peri-ln", 0.7, 1.3),
        lowest("variance last/first at end", "peri-ln", than=("pre-norm",)),
        highest("gradient first/last at start", "peri-ln", than=("post-norm",)),
        lowest("failed rates", "peri-ln", than=("pre-norm", "post-norm")),
    ),
    control=("no output norm", "no output norm", "sum normed", "no output norm"),
    scales={
        "smoke": {"depth": 3, "width": 32, "length": 16, "steps": 2, "rates": (1e-3,), "watched": 1e-3},
        "small": {
            **{"depth": 12, "width": 64, "length": 64, "steps": 40, "watched": 1e-3},
            "rates": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        },
        "full": {
            **{"depth": 24, "width": 1024, "length": 128, "steps": 5000, "watched": 1e-3},
            "rates": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
        },
    },
)
