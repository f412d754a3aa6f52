"""CARN's cost at the published sizes, what the cascade and the mobile blocks do, and PSNR against bicubic, SRCNN and a small EDSR."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from interlayer.claims import Claim, Scale, check, effect, fits, highest, mechanism
from interlayer.claims.training import built
from interlayer.core import cost
from interlayer.core.datasets import photograph
from interlayer.core.degraded import Pairs, enlarge, luma, tensor
from interlayer.domains.image.carn import CARN, Cascade, Residual, fit
from interlayer.study.super_resolution import SuperResolution

OURS, PLAIN, MOBILE, BICUBIC, SRCNN_, EDSR_ = "CARN", "no cascade", "CARN-M", "bicubic", "SRCNN", "EDSR-small"
BLIND, UNPAIRED, CHAIN, LATE = "blind fusion", "unpaired targets", "chain of blocks", "fusion without the input"
UNSHARED, GROUPED = "not recursive", "grouped 1x1"
SCALES, MEAN = (2, 3, 4), 0.45
RATES = {OURS: 2e-3, PLAIN: 2e-3, EDSR_: 2e-3, SRCNN_: 2e-3}


class Blind(Cascade):
    """The null twin: every fusion has all its weights, but reads zeros in place of all features except the latest block's."""

    def fuse(self, step: int, seen: list[Tensor]) -> Tensor:
        """Fuse the latest block with zeros."""
        return super().fuse(step, [torch.zeros_like(t) for t in seen[:-1]] + seen[-1:])


class Late(Cascade):
    """The mutant: a fusion reads the blocks, but not what the cascade began with."""

    def __init__(self, blocks: list[nn.Module], width: int, steps: int) -> None:
        super().__init__(blocks, width, steps)
        self.fusions = nn.ModuleList(nn.Conv2d(width * (i + 1), width, 1) for i in range(steps))

    def fuse(self, step: int, seen: list[Tensor]) -> Tensor:
        """Fuse the blocks."""
        return super().fuse(step, seen[1:])


def recast(net: CARN, kind: type[Cascade]) -> CARN:
    """The network with all its cascades of another kind."""

    def made(cascade: nn.Module, blocks: list[nn.Module]) -> Cascade:
        return kind(blocks, net.entry.out_channels, cascade.steps)  # type: ignore[arg-type]

    net.body = made(net.body, [made(local, list(local.blocks)) for local in net.body.blocks])  # type: ignore[arg-type]
    return net


class SRCNN(nn.Module):
    """Three convolutions of 9, 1 and 5 on the bicubic image (Dong et al., arXiv:1501.00092, with 64 and 32 channels)."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__()
        line = (nn.Conv2d(1, first, 9, padding=4), nn.Conv2d(first, second, 1), nn.Conv2d(second, 1, 5, padding=2))
        self.body = nn.Sequential(line[0], nn.ReLU(), line[1], nn.ReLU(), line[2])

    def forward(self, image: Tensor, scale: int) -> Tensor:
        """Enlarge, then correct."""
        return self.body(enlarge(image, scale))


class EDSR(nn.Module):
    """EDSR's baseline for several scales (Lim et al., arXiv:1707.02921): residual blocks without norms, one long skip."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()

        def conv(outputs: int = width) -> nn.Conv2d:
            return nn.Conv2d(width, outputs, 3, padding=1)

        self.head, self.last, self.tail = nn.Conv2d(1, width, 3, padding=1), conv(), conv(1)
        self.blocks = nn.ModuleList(nn.Sequential(conv(), nn.ReLU(), conv()) for _ in range(blocks))
        stages = {2: (2,), 3: (3,), 4: (2, 2)}
        self.up = nn.ModuleDict()
        for scale, factors in stages.items():
            parts = [part for f in factors for part in (conv(f * f * width), nn.PixelShuffle(f))]
            self.up[str(scale)] = nn.Sequential(*parts)

    def forward(self, image: Tensor, scale: int) -> Tensor:
        """Residual blocks under one skip, then pixel shuffle."""
        x = begin = self.head(image)
        for block in self.blocks:
            x = x + block(x)
        return self.tail(self.up[str(scale)](begin + self.last(x)))


class Centred(nn.Module):
    """A network that sees images around zero, as CARN does by itself."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor, scale: int) -> Tensor:
        """Subtract the mean and add it again."""
        return self.net(image - MEAN, scale) + MEAN


def build(arm: str, scale: Scale) -> nn.Module:
    """The network of an arm, for images of one channel."""
    if arm == SRCNN_:
        return Centred(SRCNN(*scale.srcnn))
    if arm == EDSR_:
        return Centred(EDSR(scale.width, scale.blocks))
    net = CARN(width=scale.width, mean=(MEAN,), cascade="none" if arm in (PLAIN, CHAIN) else "both")
    return recast(net, {BLIND: Blind, LATE: Late}[arm]) if arm in (BLIND, LATE) else net


@cache
def task(patch: int) -> SuperResolution:
    """Luma of a photograph of gravel to learn from, and of one of grass to be judged on."""
    train, held = ([luma(tensor(photograph(name)))] for name in ("gravel", "grass"))
    return SuperResolution("luma", train, held, scales=SCALES, patch=patch, crops=8)


class Unpaired:
    """The null twin of training: each patch is trained towards the next one's target."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs

    def patches(self, *given: Any) -> tuple[Tensor, Tensor]:
        """Patches whose targets belong to others."""
        small, large = self.pairs.patches(*given)
        return small, large.roll(1, 0)


def quality(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """PSNR on the held-out photographs, and multiply-adds for a pixel of the output."""
    data = task(scale.patch)
    if arm == BICUBIC:
        return data.trivial()
    net = built(lambda: build(arm, scale), seed)
    pairs: Mapping[int, Any] = data.pairs
    if arm == UNPAIRED:
        pairs = {s: Unpaired(p) for s, p in pairs.items()}
    fit(
        net, pairs, steps=scale.steps, batch=scale.batch, patch=scale.patch, halve=scale.halve, seed=seed,
        lr=RATES.get(arm, RATES[OURS]),
    )  # fmt: skip
    with torch.no_grad():
        found = data.evaluate(lambda inputs: net.eval()(**inputs), 0)
    side = 12
    for s in SCALES:
        small = torch.zeros(1, 1, side // s, side // s)
        found[f"multiply-adds x{s}"] = cost.flops(net, small, scale=s) / 2 / side**2
    return found


def published(arm: str) -> nn.Module:
    """The network of a mechanism statement's arm at the published size, without memory."""
    with torch.device("meta"):
        if arm in (MOBILE, UNSHARED, GROUPED):
            net = CARN.mobile(recursive=arm != UNSHARED)
            for block in net.modules() if arm == GROUPED else ():
                if isinstance(block, Residual):
                    block.body[4] = nn.Conv2d(64, 64, 1, groups=4)
            return net
        net = CARN(cascade="none" if arm in (PLAIN, CHAIN) else "both")
        return recast(net, Late) if arm == LATE else net


def counted(arm: str) -> dict[str, float]:
    """Weights (as the paper counts them for CARN-M, without biases), multiply-adds for 1280 x 720 pixels, and share of sharing."""
    net = published(arm)
    found = {
        "thousands of parameters": cost.parameters(net) / 1e3,
        "thousands of weights": sum(p.numel() for p in net.parameters() if p.ndim > 1) / 1e3,
    }
    for s in SCALES:
        small = torch.empty(1, 3, 12 // s, 12 // s, device="meta")
        found[f"billions of multiply-adds x{s}"] = cost.flops(net, small, scale=s) / 2 / 144 * 1280 * 720 / 1e9
    return found


def past_silence(arm: str, seed: int, scale: Scale) -> float:
    """How much the input moves the features behind the body while its second cascade gives zeros, against undisturbed."""
    net: Any = built(lambda: build(arm, scale), seed)
    x = torch.rand(2, 1, 8, 8)

    def moved() -> float:
        with torch.no_grad():
            return float((net.body(net.entry(x)) - net.body(net.entry(x.flip(3)))).norm())

    before = moved()
    hook = net.body.blocks[1].register_forward_hook(lambda module, inputs, output: torch.zeros_like(output))
    after = moved()
    hook.remove()
    return after / before


def measure(arm: str, seed: int, scale: Scale) -> Mapping[str, float]:
    """What concerns the arm."""
    found: dict[str, float] = {}
    if arm in (OURS, PLAIN, BICUBIC, SRCNN_, EDSR_, BLIND, UNPAIRED):
        found |= quality(arm, seed, scale)
    if arm in (OURS, MOBILE, CHAIN, LATE, UNSHARED, GROUPED):
        found |= counted(arm)
    if arm in (OURS, CHAIN, LATE, BLIND):
        found["signal past a silent block"] = past_silence(arm, seed, scale)
    return found
