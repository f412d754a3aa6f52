"""PGD beside torchattacks' on a small ResNet: the same steps from the same start, in both norms that it has."""

from __future__ import annotations

import sys
import types

import torch

from benchmarks.harness import compare, version
from interlayer.core.attack import attack
from interlayer.models.classic import ResNet18

for name in ("torchvision", "torchvision.transforms"):  # torchattacks imports them for attacks that are not used here
    sys.modules.setdefault(name, types.ModuleType(name))

from torchattacks.attacks.pgd import PGD  # noqa: E402
from torchattacks.attacks.pgdl2 import PGDL2  # noqa: E402


def main() -> None:
    """Ten steps on 32 images, from the images themselves, so that the results can be compared."""
    torch.manual_seed(0)
    model = ResNet18(3, 10, width=16).eval()
    x, y = torch.rand(32, 3, 32, 32), torch.arange(32) % 10
    peers = {
        "inf": (PGD(model, eps=8 / 255, alpha=2 / 255, steps=10, random_start=False), 8 / 255, 2 / 255),
        "2": (PGDL2(model, eps=1.0, alpha=0.2, steps=10, random_start=False), 1.0, 0.2),
    }
    for norm, (theirs, radius, size) in peers.items():

        def ours(norm=norm, radius=radius, size=size):
            return attack(model, x, y, norm, radius, steps=10, size=size, random=False)

        def peer(theirs=theirs):
            return theirs(x, y)

        def agree(ours=ours, peer=peer, radius=radius):  # a sign of a gradient near zero may differ
            return bool(((ours() - peer()).abs() < 1e-4 * radius).float().mean() > 0.99)

        candidates = {"interlayer": ours, f"torchattacks {version('torchattacks')}": peer}
        compare(f"PGD, norm {norm}", candidates, agree=agree, rounds=8, goal={list(candidates)[1]: 1.0})


if __name__ == "__main__":
    main()
