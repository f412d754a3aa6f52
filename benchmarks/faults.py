"""Drawing bit errors beside one uniform number for every bit, and what a training step of `neuralfuse` costs beside the paper's loop.

    python -m benchmarks.faults

Gates: the number of faulty bits lies within 5 standard deviations of its mean, and both ways of training give one gradient. The authors'
repository is no package, and none of the index does either, so their two ways are written here: their fault maps compare a uniform
number for every bit with the rate, and their training passes generator and clean classifier once for every map.
"""

from __future__ import annotations

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from benchmarks.harness import compare
from interlayer.core.faults import Memory, draw, expected
from interlayer.core.pairing.seeds import seed_of
from interlayer.core.quantizer import Grid
from interlayer.domains.hardware.neuralfuse import MOST, Generator, NeuralFuse
from interlayer.models import ResNet18

MAPS = 10


def by_uniform(codes: Tensor, bits: int, rate: float, generator: torch.Generator) -> Tensor:
    """A uniform number for every bit."""
    wrong = torch.rand(*codes.shape, bits, generator=generator) < rate
    return (wrong << torch.arange(bits)).sum(-1, dtype=torch.uint8)


def ones(mask: Tensor) -> int:
    """Bits that are set."""
    return sum(int((mask >> bit & 1).sum()) for bit in range(8))


def main() -> None:
    """A million codes of 8 bits; a step of ConvS before ResNet-18 of width 16 on 25 images of 32x32 pixels, 10 maps."""
    codes, rate = torch.randint(-128, 128, (10**6,)).to(torch.int8), 0.01
    seeds = iter(range(10**6))

    def counts() -> bool:
        mean = expected(8 * 10**6, rate)
        drawn = [ones(way(codes, 8, rate, torch.Generator().manual_seed(next(seeds)))) for way in (draw, by_uniform)]
        return all(abs(n - mean) < 5 * math.sqrt(mean) for n in drawn)

    for share in (0.001, 0.01, 0.1):
        compare(
            f"bit errors of a million codes, rate {share:g}",
            {
                "gaps": lambda share=share: draw(codes, 8, share, torch.Generator().manual_seed(0)),
                "a uniform number for every bit": lambda share=share: by_uniform(
                    codes, 8, share, torch.Generator().manual_seed(0)
                ),
            },
            agree=counts,
            goal={"a uniform number for every bit": 1.0},
        )

    torch.manual_seed(0)
    model, start = ResNet18(3, 10, width=16).eval().requires_grad_(False), Generator("ConvS", 3)
    x, labels = torch.rand(25, 3, 32, 32) * 2 - 1, torch.randint(10, (25,))
    memory, transform = Memory(model, Grid(8)), NeuralFuse(steps=1, maps=MAPS)

    def ours() -> Generator:
        generator = copy.deepcopy(start)
        transform.train(generator, [memory], [(x, labels)])
        return generator

    def theirs() -> Generator:
        generator = copy.deepcopy(start).train()
        total = [torch.zeros_like(p) for p in generator.parameters()]
        for number in range(MAPS):
            generator.zero_grad()
            fused = generator.training_pass(x)
            loss = F.cross_entropy(functional_call(model, memory.weights(), (fused,)), labels)
            faulty = memory.weights(0.01, seed_of(0, 0, number + 1) % MOST)
            loss = loss + 5.0 * F.cross_entropy(functional_call(model, faulty, (fused,)), labels)
            loss.backward()
            for held, p in zip(total, generator.parameters(), strict=True):
                held.add_(p.grad / MAPS if p.grad is not None else 0)
        for held, p in zip(total, generator.parameters(), strict=True):
            p.grad = held
        torch.optim.Adam(generator.parameters(), 1e-3).step()
        return generator

    def same() -> bool:
        a, b = (
            torch.cat([p.grad.flatten() for p in way().parameters() if p.grad is not None]) for way in (ours, theirs)
        )
        return float((a - b).norm() / b.norm()) < 1e-4

    compare(
        f"a training step, {MAPS} maps",
        {"one pass of the generator": ours, "one pass for every map": theirs},
        agree=same,
        rounds=5,
        goal={"one pass for every map": 1.0},
    )


if __name__ == "__main__":
    main()
