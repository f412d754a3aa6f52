"""A trained network made smaller and faster: CREPE, which hears pitch, by single transforms and by their chains.

    python -m benchmarks.shrink_a_model                   # the tiny network, 0.5 M weights
    python -m benchmarks.shrink_a_model full runs/crepe   # the full one, 22 M: half an hour; a kept folder is not made again

Each row is made as a user would: ``interlayer apply`` writes a folder, the next transform takes that folder. Each result is measured in
a process of its own, which loads the folder and knows nothing of how it was made: pitch accuracy on 300 tones of known pitch, bytes on
disk, milliseconds for 16 frames on one thread. Calibration sees 64 other tones, and no pitch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import interlayer
from interlayer.core.cost import latency
from interlayer.core.wiring import take, trace
from interlayer.models.crepe import Crepe, accuracy, pitch, tones

HERE = "benchmarks.shrink_a_model"
LAMP = ("lamp", "sparsity=0.5")
ROUND = ("flexround", "bits=4", "per=channel", "steps=50")
LAYERS = ("adaquant", "bits=4", "inputs=float", "steps=50")
CHAINS: dict[str, tuple[tuple[str, ...], ...]] = {
    "plain": (),
    "lamp 50%": (LAMP,),
    "adaquant 4 bits": (LAYERS,),
    "flexround 4 bits": (ROUND,),
    "half the channels": (("half",),),
    "lamp, flexround": (LAMP, ROUND),
    "half, flexround": (("half",), ROUND),
    "half, lamp, flexround": (("half",), LAMP, ROUND),
}


def tiny() -> Crepe:
    """The model of the command line."""
    return Crepe.trained("tiny")


def full() -> Crepe:
    """The large one."""
    return Crepe.trained("full")


def frames() -> list[Tensor]:
    """Calibration data: tones without their pitches."""
    return list(tones(64, seed=1)[0].split(16))


def half(model: Crepe, steps: int = 300) -> Crepe:
    """Half of the channels of every layer, those with the larger weights, and some steps that teach it what the model says."""
    x = frames()[0]
    wiring = trace(model, x[:2])
    state = model.state_dict()
    keep = {}
    for group in wiring.groups.values():
        first = group.members[0]
        size = first.rows(state[first.name]).norm(dim=1) * state[f"{first.name.split('.')[0]}_BN.weight"].abs()
        keep[group.name] = sorted(size.topk(group.size // 2).indices.tolist())
    small = take(model, keep, wiring, x[:2])
    optimizer = torch.optim.Adam(small.parameters(), 1e-3)
    small.train()
    for step in range(steps):
        x, _ = tones(16, seed=10 + step)
        with torch.no_grad():
            wanted = model(x).sigmoid()
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        optimizer.zero_grad()
        F.binary_cross_entropy_with_logits(small(x), wanted).backward()
        optimizer.step()
    return small.eval()


def make(size: str, chain: tuple[tuple[str, ...], ...], folder: Path) -> Path:
    """The folder that a chain of transforms leaves."""
    made = folder / size
    if not made.exists():
        interlayer.save(Crepe.trained(size), made)  # type: ignore[arg-type]
    for slug, *options in chain:
        following = made.parent / f"{made.name}-{slug}"
        if following.exists():  # a chain that begins as this one has made it
            made = following
            continue
        if slug == "half":
            interlayer.save(half(interlayer.load(made)), following)
        else:
            command = ["apply", slug, "--model", str(made), "--out", str(following)]
            command += [] if slug == "lamp" else ["--data", f"{HERE}:frames"]
            command += [part for option in options for part in ("-o", option)]
            subprocess.run([sys.executable, "-m", "interlayer", *command], check=True, stdout=subprocess.DEVNULL)
        made = following
    return made


def measure(folder: str) -> None:
    """Print what a saved model does; run in a process of its own."""
    torch.set_num_threads(1)
    model = interlayer.load(folder).eval()
    x, true = tones(300, seed=2)
    with torch.no_grad():
        found = torch.cat([pitch(model(part)) for part in x.split(50)])
    cents = (1200 * (found / true).log2()).abs().median().item()
    size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
    took = 1e3 * latency(model, x[:16], calls=9)
    print(json.dumps({"accuracy": accuracy(found, true), "cents": cents, "bytes": size, "ms": took}))


def main(size: str = "tiny", folder: str | None = None) -> None:
    print(f"{size:<24}{'accuracy':>10}{'cents off':>11}{'MB':>9}{'of plain':>10}{'ms':>9}{'of plain':>10}")
    plain = None
    with tempfile.TemporaryDirectory() as name:
        for title, chain in CHAINS.items():
            made = make(size, chain, Path(folder or name))
            done = subprocess.run([sys.executable, "-m", HERE, "measure", str(made)], check=True, capture_output=True)
            row = json.loads(done.stdout)
            plain = plain or row
            print(
                f"{title:<24}{row['accuracy']:>10.3f}{row['cents']:>11.1f}{row['bytes'] / 1e6:>9.2f}"
                f"{row['bytes'] / plain['bytes']:>10.2f}{row['ms']:>9.1f}{row['ms'] / plain['ms']:>10.2f}",
                flush=True,
            )


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(sys.argv[2])
    else:
        main(*sys.argv[1:])
