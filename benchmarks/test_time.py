"""One batch of adaptation at test time: NHL, TENT and batch statistics beside the source model, and TENT beside a plain loop.

    python -m benchmarks.test_time

A ResNet-18 of 16 channels and 64 images of 32x32. First the gates: ``Tent`` gives the logits of a plain loop over torch, and NHL
without rates those of batch statistics. No peer is installed: TENT's and SoftHebb's code is in no package, and ttadapters 1.0.0,
the one package found, has an empty file for TENT and cannot be imported without another package.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from benchmarks.harness import compare
from interlayer.core.online import Adapter, entropy
from interlayer.learn.test_time import BatchStatistics, Source, Tent
from interlayer.learn.test_time.nhl import NHL
from interlayer.models.classic import ResNet18


class Loop:
    """TENT as a loop of one's own: gains and biases of BatchNorm, entropy, Adam."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model.train().requires_grad_(False)
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.requires_grad_(True)
            norm.running_mean = norm.running_var = None
        self.optimiser = torch.optim.Adam([p for m in norms for p in m.parameters()], 1e-3)

    def adapt(self, images: Tensor) -> Tensor:
        """One batch."""
        logits = self.model(images)
        self.optimiser.zero_grad()
        entropy(logits).mean().backward()
        self.optimiser.step()
        return logits.detach()


def main() -> None:
    """Check, then time in turn."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, images = ResNet18(3, 10, width=16).eval(), torch.randn(64, 3, 32, 32)

    def fresh(make: type[Adapter] | type[Loop], **options: float) -> Adapter | Loop:
        return make(copy.deepcopy(model), **options)

    ours, loop = fresh(Tent), fresh(Loop)
    for _ in range(3):
        torch.testing.assert_close(ours.adapt(images), loop.adapt(images), rtol=1e-3, atol=1e-4)
    still = fresh(NHL, rate=0.0, plasticity=0.0)
    torch.testing.assert_close(still.adapt(images), fresh(BatchStatistics).adapt(images), rtol=1e-4, atol=1e-4)
    print("gates: Tent equals a plain loop; NHL without rates equals batch statistics")
    rules = {"Tent": Tent, "a plain loop": Loop, "NHL": NHL, "batch statistics": BatchStatistics, "source": Source}
    runs = {name: lambda rule=fresh(make): rule.adapt(images) for name, make in rules.items()}  # type: ignore[arg-type]
    compare("one batch of TENT", {n: runs[n] for n in ("Tent", "a plain loop")}, goal={"a plain loop": 1.1}, rounds=7)
    compare("one batch of NHL", {n: runs[n] for n in ("NHL", "Tent", "batch statistics", "source")}, rounds=7)


if __name__ == "__main__":
    main()
