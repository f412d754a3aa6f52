"""Subsampled self-attention against dense: memory and FLOPs of a step, loss after equal steps, and gain of the ensemble."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from interlayer.claims import Claim, Scale, effect, fits, lowest
from interlayer.claims.training import judge, task, train
from interlayer.core import cost
from interlayer.layers.mixing.ssa_pathways import SSA, ensemble, layers, resampled
from interlayer.models import Transformer


class Masked(SSA):
    """The control of the cost: the same sample as a mask over all S^2 scores."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Dense attention, masked."""
        length = q.shape[-2]
        token, asks = self.deal(length, q.device)
        seen = torch.zeros(length, length, dtype=torch.bool).scatter(1, token[asks // token.shape[1]], True)
        scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~seen.tril(), -torch.inf)
        return scores.softmax(-1) @ v


class Frozen(SSA):
    """The control of generalisation: the first sample is kept for the whole training."""

    def deal(self, length: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """What the first call gave."""
        if not hasattr(self, "kept"):
            self.kept = super().deal(length, device)
        return self.kept


class DenseFirst(SSA):
    """The control of opening at the end: it begins dense and is closed."""

    def progress(self, share: float) -> None:
        """The other way round."""
        super().progress(1 - share)


# Layer, sampling, sampler, and the part of the training that is done where its sampling begins to rise and where it is dense.
DENSE, RISE, NEVER = (0.0, 0.0), (0.7, 0.9), (1.0, 1.0)
ARMS: dict[str, tuple[Callable[..., SSA], float, str, tuple[float, float]]] = {
    "dense": (SSA, 1 / 4, "local", DENSE),  # the sampling is only that of its ensemble
    "local 1/2": (SSA, 1 / 2, "local", RISE),
    "local 1/4": (SSA, 1 / 4, "local", RISE),
    "local 1/8": (SSA, 1 / 8, "local", RISE),
    "unbiased 1/4": (SSA, 1 / 4, "unbiased", RISE),
    "local 1/4, not annealed": (SSA, 1 / 4, "local", NEVER),
    "masked 1/8": (Masked, 1 / 8, "local", RISE),
    "frozen 1/4": (Frozen, 1 / 4, "local", NEVER),
    "dense first, 1/4": (DenseFirst, 1 / 4, "local", RISE),
    "ensemble of dense": (SSA, 1 / 4, "local", DENSE),
}


@cache
def costs(
    kind: Callable[..., SSA], sampling: float, sampler: str, depth: int, width: int, length: int
) -> dict[str, float]:
    """A training step on one sequence: most bytes alive where scores are kept, bytes kept by the fused kernel, and FLOPs."""
    mixer = partial(kind, sampling=sampling, sampler=sampler)
    model = Transformer(depth=depth, width=width, heads=4, length=length, mixer=mixer)
    tokens = torch.randint(0, 256, (1, length))

    def forward() -> Tensor:
        return F.cross_entropy(model(tokens)[0, :-1], tokens[0, 1:])

    with sdpa_kernel(SDPBackend.MATH):
        peak = cost.peak_bytes(lambda: forward().backward(), model.parameters())
    kept = cost.bytes_kept(model, forward)
    with resampled(model):
        flops = cost.flops(model, tokens)
    return {"peak MB, scores kept": peak / 1e6, "kept MB, fused kernel": kept / 1e6, "GFLOP forward": flops / 1e9}


@torch.no_grad()
def together(model: Transformer, scale: Scale, sampling: float, members: int) -> float:
    """Validation loss of the mean prediction, on the batches of ``judge``."""
    total = count = 0.0
    for x, y in islice(task("stdlib-bytes").batches(0, scale.batch, "validation"), scale.judged):
        mean = ensemble(model, x, members=members, sampling=sampling)
        total += float(task("stdlib-bytes").loss(mean.log(), y)) * len(y)
        count += len(y)
    return total / count


def build(arm: str, scale: Scale) -> Transformer:
    """A language model of bytes."""
    kind, sampling, sampler, rise = ARMS[arm]
    mixer = partial(kind, sampling=sampling, sampler=sampler, rise=rise)
    return Transformer(depth=scale.depth, width=scale.width, heads=4, mixer=mixer)


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Costs of a step; after equal steps, validation loss of the dense network and what ensembles gain on it."""
    kind, sampling, sampler, rise = ARMS[arm]
    found = dict(costs(kind, 1.0 if rise == DENSE else sampling, sampler, scale.depth, scale.width, scale.long))
    if kind is Masked:
        return found
    torch.manual_seed(seed)
    model = build(arm, scale)
    train(model, "stdlib-bytes", seed=seed, steps=scale.steps, lr=2e-3, batch=8, warmup=scale.steps // 10)
    for layer in layers(model):
        layer.current = 1.0
    found["loss"] = judge(model, "stdlib-bytes", batch=scale.batch, most=scale.judged)["loss"]
    found["loss, one sample"] = together(model, scale, sampling, 1)
    found["ensemble gain"] = found["loss"] - together(model, scale, sampling, scale.members)
    found["ensemble gain, at 1/2"] = found["loss"] - together(model, scale, 1 / 2, scale.members)
    return found


CLAIM = Claim(
    says="Where scores are kept for the backward pass, a training step at sampling 1/8 takes less memory than at 1/4, 1/2 or "
    "dense; a Transformer trained at 1/4 with locally biased samples and opened at the end generalises better than one "
    "trained dense, and than one that is not opened; and its dense predictions are bettered by an ensemble of its own "
    "re-sampled pathways.",
    measure=measure,
    build=build,
    arms=("dense", "local 1/2", "local 1/4", "local 1/8", "unbiased 1/4", "local 1/4, not annealed"),
    statements=(
        effect(
            "",
            lowest("peak MB, scores kept", "local 1/8", than=("local 1/4", "local 1/2", "dense")),
            control="masked 1/8",
        ),
        effect("", lowest("loss", "local 1/4", than=("dense",)), control="frozen 1/4"),
        effect("", lowest("loss", "local 1/4", than=("local 1/4, not annealed",)), control="dense first, 1/4"),
        effect("", fits("ensemble gain", "local 1/4", low=0.0), control="ensemble of dense"),
    ),
    scales={
        "smoke": {"depth": 1, "width": 16, "long": 32, "steps": 1, "batch": 2, "judged": 1, "members": 2},
        "small": {"depth": 2, "width": 64, "long": 1024, "steps": 250, "batch": 64, "judged": 4, "members": 8},
        "full": {"depth": 12, "width": 512, "long": 4096, "steps": 50000, "batch": 64, "judged": 50, "members": 32},
    },
)
