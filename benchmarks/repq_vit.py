"""`repq-vit`: time of calibration in forward passes of the model over the same data, and size of its matrices beside 16 bits.

Nothing is reported unless the products of integers are those of floats on the same grids. The goal for methods that need ranges
only is 1.2 forward passes. The authors' code wants timm and a GPU, is no package, and is not timed here.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from interlayer.core import taps
from interlayer.core.quantizer import Grid, Packed, nearest, opening
from interlayer.models import VisionTransformer
from interlayer.transform.quantize.repq_vit import RepQViT

IMAGES, ROUNDS = 128, 5


def took(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result."""
    started = time.perf_counter()
    found = run()
    return time.perf_counter() - started, found


@torch.no_grad()
def main() -> None:
    """Print the ratios for a model of 6 layers and 256 features."""
    torch.manual_seed(0)
    net = VisionTransformer(3, 64, patch=4, classes=10, depth=6, width=256, heads=4).eval()
    data = list(torch.rand(IMAGES, 3, 64, 64).split(32))
    methods: dict[str, Callable[[], Any]] = {
        f"repq-vit by {by}": lambda by=by: RepQViT(bits=4, by=by).plan(net, data) for by in ("minmax", 99.9, "mse")
    }
    methods["uniform by minmax"] = lambda: nearest(
        net, Grid(4, 0, "asymmetric"), inputs=Grid(4, kind="asymmetric"), attention=True, data=data
    )
    work = opening(net)[0]
    opened = [took(lambda m=m: list(taps.feed(m, data)))[0] for _ in range(ROUNDS) for m in (net, work)]
    print(
        f"attention opened, nothing rounded: {statistics.median(opened[1::2]) / statistics.median(opened[::2]):.2f} forward passes"
    )
    print(f"{IMAGES} images, 256 tokens each, 6 layers, 256 features; medians of {ROUNDS} rounds")
    for name, plan in methods.items():
        ratios, whole = [], []
        for _ in range(ROUNDS):
            once, _ = took(lambda: list(taps.feed(net, data)))
            planned, made = took(plan)
            applied, new = took(made.apply)
            ratios.append(planned / once)
            whole.append((planned + applied) / once)
        for layer in (m for m in new.modules() if isinstance(m, Packed) and m.conv is None):
            x = torch.randn(8, layer.shape[1])
            held = layer.scaled_inputs(x)
            assert held is not None
            torch.testing.assert_close(layer(x), layer.call(held.fake(x), layer.weight), atol=1e-3, rtol=1e-3)
        print(
            f"{name:20} plan {statistics.median(ratios):.2f} forward passes, with apply {statistics.median(whole):.2f}"
        )
    matrices = [m for m in new.modules() if isinstance(m, Packed)]
    held = sum(b.numel() * min(b.element_size(), 2) for m in matrices for b in m.buffers())  # scales in 16 bits
    print(f"matrices at 4 bits: {held / sum(2 * torch.Size(m.shape).numel() for m in matrices):.3f} of 16 bits")


if __name__ == "__main__":
    main()
