"""Weights in blocks of 8 and 4 bits: bytes and error beside bitsandbytes, and the time of a linear map on integers of 8 bits in blocks.

bitsandbytes rounds blocks of 64 to levels that are no integers (its dynamic type of 8 bits, NF4 at 4 bits), with a scale of 32 bits for
each; it rounds weights alone. Nothing is reported unless the product of the integers is that of the floats that they stand for.
"""

from __future__ import annotations

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import compare, version
from interlayer.core.quantizer import Grid, Packed, simulated
from interlayer.transform.quantize.bct import BCT

BLOCK = 64


def error(found: Tensor, weight: Tensor) -> float:
    """Root of the squared error, as a share of the weight's size."""
    return float((found - weight).norm() / weight.norm())


def main() -> None:
    """Normal weights of 1024 x 256, and the same with a hundredfold outlier in a thousand; 256 rows."""
    torch.manual_seed(0)
    print(version("bitsandbytes"))
    normal = torch.randn(1024, 256)
    far = torch.where(torch.rand_like(normal) < 0.001, 100 * normal, normal)
    for name, weight in (("normal", normal), ("with outliers", far)):
        layer = nn.Linear(256, 1024, bias=False)
        layer.weight = nn.Parameter(weight)
        for bits in (8, 4):
            net = BCT(bits=bits, block=BLOCK).plan(nn.Sequential(layer)).apply()
            packed = next(m for m in net.modules() if isinstance(m, Packed))
            ours = 8 * sum(t.numel() * t.element_size() for t in packed.state_dict().values()) / weight.numel()
            if bits == 8:
                codes, state = bnb.quantize_blockwise(weight, blocksize=BLOCK)
                theirs = bnb.dequantize_blockwise(codes, state)
            else:
                codes, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
                theirs = bnb.dequantize_4bit(codes, state)
            size = 8 * sum(t.numel() * t.element_size() for t in (codes, state.absmax)) / weight.numel()
            whole = Grid(bits).fit(weight, "mse").fake(weight)
            print(
                f"{name}, {bits} bits: bits of a weight {ours:.3f}, bitsandbytes {size:.3f}; error {error(packed.weight, weight):.4f}, "
                f"bitsandbytes {error(theirs.view_as(weight), weight):.4f}, one scale {error(whole, weight):.4f}"
            )
    x = torch.randn(256, 256)
    floats = simulated(net)
    with torch.inference_mode():
        compare(
            "256 rows of a linear map, 4-bit weights and 8-bit inputs in blocks of 64",
            {"integers": lambda: net(x), "rounded floats": lambda: floats(x), "float32": lambda: F.linear(x, far)},
            agree=lambda: torch.allclose(net(x), floats(x), atol=1e-2, rtol=1e-3),
        )


if __name__ == "__main__":
    main()
