"""Dynamic low-rank training: a step at a quarter of the rank, and at ranks that adapt, beside a dense step at width 1024.

All are steps of SGD, which has no memory, on three layers of this width. ``factors`` is a step of back-propagation
on two factors of the same rank: what one pass costs, of which the rule takes two. The authors' code is in no package registry.

In multiply-adds, as PyTorch counts them, a step at the fixed rank is 1.05 of the dense one at batch 1024 and .97 at 4096. The six QR
decompositions, at about half of the products' rate, come on top: .18 and .05 of the dense step's CPU time. So the goal is out of
reach at batch 1024.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import compare
from interlayer.transform.sparsify.dlrt import DLRT

WIDTH, DEPTH = 1024, 3


def net() -> nn.Sequential:
    """Three square layers, and one for the classes."""
    layers: list[nn.Module] = []
    for _ in range(DEPTH):
        layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, 10))


def numbers(model: nn.Module) -> int:
    """Parameters of a model."""
    return sum(p.numel() for p in model.parameters())


def stepping(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Back-propagation with SGD on one batch."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def main() -> None:
    """One seed; the gate is that the rule's loss is that of the dense weights that its factors stand for."""
    torch.manual_seed(0)
    dense = net()
    for batch in (1024, 4096):
        x, y = torch.randn(batch, WIDTH), torch.randint(10, (batch,))
        for name, tolerance in (("fixed rank 1/4", None), ("adaptive from rank 1/4", 0.3)):
            rule = DLRT(copy.deepcopy(dense), rank=0.25, tolerance=tolerance, optimizer="sgd", lr=1e-2)
            low, whole = rule.result().train(), float(F.cross_entropy(rule.result(merged=True)(x), y).detach())
            first = rule.step((x, y))["loss"]
            steps = {
                name: lambda rule=rule, x=x, y=y: rule.step((x, y)),
                "dense": stepping(copy.deepcopy(dense), x, y),
                "factors": stepping(low, x, y),
            }
            title = f"step, batch {batch}, parameters over dense {numbers(low) / numbers(dense):.2f}"
            goal = {"dense": 1.0} if tolerance is None else None
            same = abs(first - whole) < 1e-4 * whole
            compare(title, steps, agree=lambda same=same: same, rounds=7, goal=goal)
            print("  ranks afterwards:", *rule.ranks().values())


if __name__ == "__main__":
    main()
