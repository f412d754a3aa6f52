"""Packed weights: bytes on disk, and time of 8-bit, 4-bit and `dorefa`'s bit-wise products beside float32 and torchao, and of
`paretoq`'s products of one row with weights of 1, 1.6 and 2 bits.

No speed is promised, and nothing is reported unless packed and simulated logits agree and the weights are as small as they must be.
The 8-bit product rounds its inputs to one calibrated grid for each layer; torchao's rounds them for each row while it runs. Ours and
torchao's are each the faster of eager and compiled.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_

import interlayer
from benchmarks.harness import compare, version
from interlayer.core import taps
from interlayer.core.quantizer import BitMap, Grid, Packed, Scaled, nearest, simulated


def size(model: nn.Module) -> int:
    """Bytes of the weights that ``interlayer.save`` writes."""
    with tempfile.TemporaryDirectory() as folder:
        interlayer.save(model, Path(folder) / "model")
        return (Path(folder) / "model" / "model.safetensors").stat().st_size


def mlp() -> nn.Sequential:
    """Three linear maps of width 1024."""
    return nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(1024, 1024), nn.ReLU())))


def close(a: nn.Module, b: nn.Module, x: torch.Tensor) -> bool:
    """Whether every layer of ``a`` gives what that of ``b`` gives on the same inputs.

    The last bit of a float may move a layer's input to another level, so whole models of rounded inputs agree to a level only.
    """
    with taps.read(a, at=nn.Module, side="input") as seen:
        a(x)
    pairs = [(a.get_submodule(n)(v), b.get_submodule(n)(v)) for n, v in seen.items()]
    return all(torch.allclose(p, q, atol=1e-4, rtol=1e-4) for p, q in pairs)


def small_and_close(packed: nn.Module, reference: nn.Module, x: torch.Tensor, bytes_8: int) -> bool:
    """Whether packed weights give the simulated logits in no more memory than a peer's 8 bits."""
    return memory(packed) <= 1.01 * bytes_8 and close(packed, reference, x)


def faster(name: str, eager: nn.Module, x: torch.Tensor) -> tuple[str, Callable[[], torch.Tensor]]:
    """The faster of eager and compiled, and its name."""
    compiled = torch.compile(copy.deepcopy(eager))
    found = compare(f"{name}, compiled", {"compiled": lambda: compiled(x), "eager": lambda: eager(x)})
    return (f"{name} compiled", lambda: compiled(x)) if found[0].median < 1 else (f"{name} eager", lambda: eager(x))


def memory(model: nn.Module) -> int:
    """Bytes of all weights in memory, those within torchao's tensors too."""
    found = 0
    for tensor in model.state_dict().values():
        names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else []
        parts = [getattr(tensor, n) for n in names] or [tensor]
        found += sum(p.numel() * p.element_size() for p in parts)
    return found


def tables(bits: str, grid: Grid) -> None:
    """One row times a matrix of 4096 x 1024 at few bits, as `paretoq` keeps it: on packed codes, unpacked, and in torchao's 8 bits."""
    wide, row = nn.Linear(1024, 4096, bias=False), torch.randn(1, 1024)
    packed, unpacked = Packed(wide, grid, table=True), Packed(wide, grid)
    peer = nn.Sequential(copy.deepcopy(wide))
    quantize_(peer, Int8WeightOnlyConfig())
    print(
        f"{bits}-bit weights: bytes in memory over those of 16 bits: {memory(packed) / (2 * wide.weight.numel()):.3f}"
    )
    compare(
        f"{bits}-bit weights, one row, by tables",
        dict(
            (
                ("tables", lambda: packed(row)),
                faster("unpacked", unpacked, row),
                ("float32", lambda: wide(row)),
                faster("torchao", peer, row),
            )
        ),
        agree=lambda: torch.allclose(packed(row), unpacked(row), atol=1e-4, rtol=1e-4),
    )


def main() -> None:
    """Width 1024, 64 rows; one convolution of 64 channels."""
    torch.manual_seed(0)
    model = mlp().eval()
    rows = torch.randn(64, 1024)
    print(version("torchao"))
    half = size(copy.deepcopy(model).half())
    for grid in (Grid(4, 0), Grid(4, 0, group=32)):
        share = size(nearest(copy.deepcopy(model).half(), grid).apply()) / half
        print(
            f"file at 4 bits, group {grid.group}, over 16-bit floats: {share:.3f}  goal 0.30: {'met' if share <= 0.3 else 'NOT met'}"
        )
    with torch.inference_mode():
        plans = {
            "8-bit product": (
                {"grid": Grid(8, 0), "inputs": Grid(8), "data": rows},
                Int8DynamicActivationInt8WeightConfig(),
            ),
            "8-bit weights": ({"grid": Grid(8, 0)}, Int8WeightOnlyConfig()),
            "4-bit product": (
                {"grid": Grid(4, 0), "inputs": Grid(8), "data": rows},
                Int8DynamicActivationInt8WeightConfig(),
            ),
            "4-bit weights": ({"grid": Grid(4, 0)}, Int8WeightOnlyConfig()),
        }
        for name, (options, config) in plans.items():
            packed = nearest(model, **options).apply().eval()
            reference = simulated(packed)
            peer = copy.deepcopy(model)
            quantize_(peer, config)
            theirs = memory(peer)
            print(f"{name}: bytes in memory over those of torchao's 8 bits: {memory(packed) / theirs:.3f}")
            runs = dict((faster(name, packed, rows), ("float32", lambda: model(rows)), faster("torchao", peer, rows)))
            compare(
                f"{name} ({type(config).__name__})",
                runs,
                agree=partial(small_and_close, packed, reference, rows, theirs),
            )
        for name, grid in (("1", Grid(1, 0, "midrise")), ("1.6", Grid(2, 0, "ternary")), ("2", Grid(2, 0, "midrise"))):
            tables(name, grid)
        layer = nn.Conv2d(64, 64, 3, padding=1, bias=False)
        x = torch.rand(8, 64, 16, 16)
        thirds = Scaled(Grid(2, kind="unsigned"), torch.tensor(1 / 3), torch.tensor(0.0))
        bits = BitMap(layer, Grid(1, 0, "midrise"), inputs=thirds)
        floats = Packed(layer, Grid(1, 0, "midrise"), inputs=thirds)
        compare(
            "convolution, 1-bit weights and 2-bit inputs",
            dict(
                (
                    faster("bits", bits, x),
                    ("float32", lambda: F.conv2d(x, layer.weight, padding=1)),
                    ("rounded", lambda: floats(x)),
                )
            ),
            agree=lambda: torch.allclose(bits(x), floats(x), atol=1e-4, rtol=1e-4),
        )


if __name__ == "__main__":
    main()
