"""LAMP at 90% sparsity, baked and saved: bytes on disk and time of a forward pass, over the model that went in."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

import interlayer
from benchmarks.harness import compare
from interlayer.transform.sparsify.lamp import Lamp


def size(model: torch.nn.Module) -> int:
    """Bytes of the files that ``interlayer.save`` writes."""
    with tempfile.TemporaryDirectory() as folder:
        interlayer.save(model, Path(folder) / "model")
        return sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())


def main() -> None:
    """A Transformer of 4 blocks, width 256."""
    torch.manual_seed(0)
    model = interlayer.Transformer(256, 128, depth=4, width=256, heads=4).eval()
    pruned = Lamp(sparsity=0.9).plan(model).apply().eval()
    text = torch.randint(256, (16, 128))
    zeros = sum(int((p == 0).sum()) for p in pruned.parameters())
    print(f"weights that are zero: {zeros / sum(p.numel() for p in pruned.parameters()):.1%}")
    print(f"bytes on disk, pruned over plain: {size(pruned) / size(model):.3f} (goal: at most 1)")
    with torch.inference_mode():
        compare("forward", {"pruned": lambda: pruned(text), "plain": lambda: model(text)}, goal={"plain": 1.05})


if __name__ == "__main__":
    main()
