"""Channels removed from a ResNet, and the time to find tied axes (for `w-gates`) beside Torch-Pruning's dependency graph.

    python -m benchmarks.shrink

Both find which axes belong together from one pass. Torch-Pruning builds a graph of layers; the positions of a group are worked out
when it is asked for (``get_all_groups``, timed too). Tracing here works out every position, finds attention heads, and runs the permuted
model as a check. Needs ``make bench`` for the peer; without it the peer's columns stay empty.
Then a Llama block is traced at several widths, to see how the time grows beside that of a forward pass.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from interlayer.core.cost import flops, latency, parameters
from interlayer.core.wiring import masked, run, take, trace
from interlayer.models import ResNet18

ENCODER = {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 512}


class Dense(nn.Module):
    """A layer of a DenseNet: its input and what it adds, side by side."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))), 1)


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    before = 3
    for width in (32, 32, 64, 64, 128, 128):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if before == width else []
        before = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, 256), nn.ReLU(), nn.Linear(256, 10))


def densenet(growth: int = 12) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 2 * growth, 3, padding=1, bias=False)]
    channels = 2 * growth
    for _ in range(2):
        for _ in range(4):
            layers.append(Dense(channels, growth))
            channels += growth
        layers += [
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels // 2, 1, bias=False),
            nn.AvgPool2d(2),
        ]
        channels //= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def models() -> dict[str, tuple[nn.Module, Tensor]]:
    """Networks of usual shapes, small enough for a CPU."""
    image, ids = torch.randn(1, 3, 32, 32), torch.randint(1000, (1, 16))
    return {
        "ResNet18": (ResNet18(3, 10, width=64), image),
        "VGG": (vgg(), image),
        "DenseNet": (densenet(), image),
        "MobileNetV2": (MobileNetV2ForImageClassification(MobileNetV2Config()), image),
        "ViT": (ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, **ENCODER)), image),
        "BERT": (BertForSequenceClassification(BertConfig(vocab_size=1000, **ENCODER)), ids),
        "Llama": (LlamaForCausalLM(LlamaConfig(vocab_size=1000, num_key_value_heads=2, **ENCODER)), ids),
    }


def seconds(work: Callable[[], Any], times: int = 3) -> float:
    """Median wall time."""
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def peer(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Seconds until Torch-Pruning has its graph, and until it has also listed its groups; NaN where it fails or is not installed."""
    try:
        import torch_pruning as tp

        def build(listed: bool) -> None:
            graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
            if listed:
                list(graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]))

        return seconds(lambda: build(False)), seconds(lambda: build(True))
    except (ImportError, AttributeError, RuntimeError, ValueError) as error:
        print(f"    torch-pruning: {type(error).__name__}: {error}")
        return float("nan"), float("nan")


def halved() -> None:
    """Half of the channels of a ResNet removed, in every group."""
    torch.manual_seed(0)
    net, x = ResNet18(3, 10, width=64).eval(), torch.randn(8, 3, 32, 32)
    wiring = trace(net, x[:1])
    keep = {g.name: range(0, g.size, 2) for g in wiring.groups.values()}
    begin = time.perf_counter()
    small = take(net, keep, wiring, x[:1])
    took = time.perf_counter() - begin
    with torch.no_grad():
        error = (small(x) - run(net, masked(net, keep, wiring), x)).abs().max()
    assert error < 1e-4, f"the smaller network differs from masks by {error}"
    slow, fast = latency(net, x, calls=9), latency(small, x, calls=9)
    print(
        f"ResNet18, half of the channels: {slow / fast:.2f} x faster ({1e3 * slow:.1f} to {1e3 * fast:.1f} ms), "
        f"{flops(net, x) / flops(small, x):.2f} x fewer FLOPs, "
        f"{parameters(net) / parameters(small):.2f} x fewer parameters; take {took:.2f} s"
    )


def growth() -> None:
    """Time of a trace beside that of a forward pass as a Llama block grows, and the exponents of both in the width."""
    widths, times, ids = (512, 1024, 2048, 4096), [], torch.randint(100, (1, 16))
    print(f"{'Llama block':<14}" + "".join(f"{h:>15}" for h in ("parameters", "trace [ms]", "forward [ms]", "ratio")))
    for width in widths:
        heads = {"num_attention_heads": width // 64, "num_key_value_heads": width // 128}
        config = LlamaConfig(
            vocab_size=100, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, **heads
        )
        net = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            forward = seconds(lambda net=net: net(ids))
        times.append((seconds(lambda net=net: trace(net, ids)), forward))
        cells = (parameters(net), *(f"{1e3 * t:.0f}" for t in times[-1]), f"{times[-1][0] / times[-1][1]:.1f}")
        print(f"{width:<14}" + "".join(f"{c:>15}" for c in cells))
    exponents = [math.log(b / a) / math.log(widths[-1] / widths[0]) for a, b in zip(times[0], times[-1], strict=True)]
    print("exponent of the width: trace {:.2f}, forward {:.2f}".format(*exponents))


def main() -> None:
    torch.set_num_threads(1)
    halved()
    heads = ("parameters", "ours [ms]", "graph [ms]", "groups [ms]", "ours / graph", "ours / groups")
    print(f"{'tied axes of':<14}" + "".join(f"{h:>15}" for h in heads))
    for name, (model, x) in models().items():
        model.eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mine = seconds(lambda model=model, x=x: trace(model, x))
            graph, groups = peer(model, x)
        cells = (
            f"{1e3 * mine:.0f}",
            f"{1e3 * graph:.0f}",
            f"{1e3 * groups:.0f}",
            f"{mine / graph:.1f}",
            f"{mine / groups:.1f}",
        )
        print(f"{name:<14}" + "".join(f"{c:>15}" for c in (parameters(model), *cells)))
    growth()


if __name__ == "__main__":
    main()
