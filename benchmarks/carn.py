"""Parameters and multiply-adds of CARN and CARN-M at the published sizes, and what their parts save."""

from __future__ import annotations

import torch

from interlayer.core import cost
from interlayer.domains.image.carn import CARN

PAPER = {"CARN": (1592, 222.8, 118.8, 90.9), "CARN-M": (412, 91.2, 46.1, 32.5)}
SCALES = (2, 3, 4)


def figures(net):
    """Thousands of parameters, of weights without biases, and billions of multiply-adds for 1280 x 720 pixels at each scale."""
    side = 12
    billions = []
    for s in SCALES:
        small = torch.empty(1, 3, side // s, side // s, device="meta")
        billions.append(cost.flops(net, small, scale=s) / 2 / side**2 * 1280 * 720 / 1e9)
    weights = sum(p.numel() for p in net.parameters() if p.ndim > 1)
    return cost.parameters(net) / 1e3, weights / 1e3, *billions


def main():
    """The table; what the paper publishes stands below each of its networks."""
    with torch.device("meta"):
        nets = {
            "CARN": CARN(),
            "CARN without local cascades": CARN(cascade="global"),
            "CARN without global cascade": CARN(cascade="local"),
            "CARN without cascades": CARN(cascade="none"),
            "CARN-M": CARN.mobile(),
            **{f"CARN-M, {g} groups": CARN.mobile(groups=g) for g in (1, 2, 8, 16, 64)},
            "CARN-M without recursion": CARN.mobile(recursive=False),
        }
    print(f"{'':30}{'1000 parameters':>16}{'1000 weights':>14}" + "".join(f"{f'10^9 MAC x{s}':>14}" for s in SCALES))
    for name, net in nets.items():
        all_of, weights, *billions = figures(net)
        print(f"{name:30}{all_of:16.0f}{weights:14.0f}" + "".join(f"{b:14.1f}" for b in billions))
        if name in PAPER:
            count, *wanted = PAPER[name]
            nearest = min((all_of, weights), key=lambda v: abs(v - count))
            met = abs(nearest - count) < 0.5 and all(abs(b - w) < 0.05 for b, w in zip(billions, wanted, strict=True))
            print(
                f"{'  published':30}{count:16}{'':14}"
                + "".join(f"{w:14.1f}" for w in wanted)
                + f"  {'met' if met else 'NOT met'}"
            )


if __name__ == "__main__":
    main()
