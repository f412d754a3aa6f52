"""`fptq`, `repq-vit` and `ditas`: CPU time to find ranges, in forward passes over the same data, and size of matrices at 4 bits.

Nothing is reported unless the products of integers are those of floats on the same grids. The goal is 1.2 forward passes. FPTQ's authors
published no code, and SmoothQuant's and DiTAS's are no packages; torchao has none of these methods.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from interlayer.core import taps
from interlayer.core.extras import need
from interlayer.core.quantizer import Grid, Packed, nearest, opening, smooth
from interlayer.models import Transformer, VisionTransformer
from interlayer.transform.quantize.ditas import DiTAS
from interlayer.transform.quantize.fptq import FPTQ
from interlayer.transform.quantize.repq_vit import RepQViT

ROUNDS = 3


def took(run: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds and result."""
    started = time.process_time()
    found = run()
    return time.process_time() - started, found


def right(new: nn.Module) -> float:
    """The matrices' size beside 16 bits, after checking each product of integers."""
    packed = [m for m in new.modules() if isinstance(m, Packed)]
    for layer in (m for m in packed if m.conv is None):
        x = layer.before(torch.randn(8, layer.shape[1]))
        held = layer.scaled_inputs(x)
        assert held is not None
        torch.testing.assert_close(layer.product(x, held), layer.call(held.fake(x), layer.weight), atol=1e-3, rtol=1e-3)
    tensors = [t for m in packed for n, t in [*m.named_buffers(), *m.named_parameters()] if n != "bias"]
    held_bytes = sum(
        t.numel() * min(t.element_size(), 2) for t in tensors
    )  # scales and products of low rank in 16 bits
    return held_bytes / sum(2 * torch.Size(m.shape).numel() for m in packed)


@torch.no_grad()
def main() -> None:
    """Print the ratios for models of 6 layers and 256 features."""
    torch.manual_seed(0)
    text = Transformer(256, 256, 6, 256, 4).eval()
    for module in text.modules():
        if isinstance(module, nn.LayerNorm):
            module.weight[:4] = 20  # in the middle range, so that norms are folded
    image = VisionTransformer(3, 64, patch=4, classes=10, depth=6, width=256, heads=4).eval()
    texts = list(torch.randint(256, (128, 256)).split(32))
    images = list(torch.rand(128, 3, 64, 64).split(32))
    coarse = {"grid": Grid(4, 0, "asymmetric"), "inputs": Grid(4, kind="asymmetric"), "attention": True, "data": images}
    methods: dict[str, tuple[nn.Module, Any, Callable[[], Any]]] = {
        "fptq": (text, texts, lambda: FPTQ().plan(text, texts)),
        "nearest levels, one scale for inputs": (
            text,
            texts,
            lambda: nearest(text, Grid(4, 0), inputs=Grid(8), data=texts),
        ),
        "smoothquant": (text, texts, lambda: smooth(text, texts)),
        "repq-vit by minmax": (image, images, lambda: RepQViT(bits=4, by="minmax").plan(image, images)),
        "repq-vit by 99.9": (image, images, lambda: RepQViT(bits=4).plan(image, images)),
        "nearest levels, attention too": (image, images, lambda: nearest(image, **coarse)),  # type: ignore[arg-type]
    }
    dit = need("diffusers", "hf", "the benchmark of calibration").DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=64, in_channels=4, out_channels=8, num_layers=6, sample_size=32,
        num_embeds_ada_norm=10, norm_num_groups=1,
    ).eval()  # fmt: skip
    calls = DiTAS(steps=20, examples=2).drawn(dit)
    methods["ditas, ranges"] = (dit, calls, lambda: DiTAS(alphas=1).plan(dit, calls))
    methods["ditas, 21 alphas searched"] = (dit, calls[:2], lambda: DiTAS().plan(dit, calls[:2]))
    opened = opening(image)[0]
    methods["attention opened, nothing found"] = (image, images, lambda: list(taps.feed(opened, images)))
    print(f"128 examples (ditas: 20 calls of 4), 256 tokens each, 6 layers, 256 features; medians of {ROUNDS} rounds")
    for name, (net, data, plan) in methods.items():
        ratios = []
        for _ in range(ROUNDS):
            once, _ = took(lambda net=net, data=data: list(taps.feed(net, data)))
            found, made = took(plan)
            ratios.append(found / once)
        size = f", matrices {right(made.apply()):.3f} of 16 bits" if name.startswith(("fptq", "repq", "ditas")) else ""
        print(f"{name:38} {statistics.median(ratios):.2f} forward passes{size}", flush=True)


if __name__ == "__main__":
    main()
