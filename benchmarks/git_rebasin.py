"""Weight matching of a ResNet-20: interlayer against direct transcriptions of the paper's algorithm 1.

    python benchmarks/git_rebasin.py [--widths 16 64] [--runs 3]

``units``: Python loops over permutations, axes and units. ``from scratch``: loops over permutations and axes, dense
linear algebra inside, every weight permuted anew from the original for every step. Runs alternate; printed are the median
ratio of times with its smallest and largest value, and the objectives, which must be no lower than the transcription's.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

from interlayer.core.wiring import Wiring, trace
from interlayer.transform.merge.git_rebasin import agreement, match_weights, match_weights_naive
from interlayer.transform.merge.git_rebasin.matching import ROUNDING, assign


class Block(nn.Module):
    def __init__(self, before: int, after: int, stride: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.norm2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x):
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + self.shortcut(x))


def resnet20(width: int) -> nn.Module:
    blocks, before = [], width
    for stage in range(3):
        for n in range(3):
            after = width * 2**stage
            blocks.append(Block(before, after, 2 if stage and not n else 1))
            before = after
    stem = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10))


def from_scratch(wiring: Wiring, target, moving, *, names, seed=0):
    counted, generator = set(names), torch.Generator().manual_seed(seed)
    groups = list(wiring.groups.values())
    perms = {g.name: torch.arange(g.size) for g in groups}
    axes = {(m.name, m.dim): (g, m) for g in groups for m in g.members}

    def permuted(name, skip=None):
        weight = moving[name]
        for dim in range(weight.ndim):
            if dim != skip and (name, dim) in axes:
                group, member = axes[name, dim]
                order = torch.arange(weight.shape[dim])
                order[member.index] = member.index[perms[group.name]]
                weight = weight.index_select(dim, order)
        return weight

    progress = True
    while progress:
        progress = False
        for n in torch.randperm(len(groups), generator=generator).tolist():
            group = groups[n]
            similarity, size = torch.zeros(group.size, group.size), 0.0
            for m in group.members:
                if m.name in counted:
                    a, b = m.rows(target[m.name]), m.rows(permuted(m.name, m.dim))
                    similarity, size = similarity + a @ b.T, size + float(a.norm() * b.norm())
            perm, place = assign(similarity), torch.arange(group.size)
            gain = similarity[place, perm].sum() - similarity[place, perms[group.name]].sum()
            if gain > ROUNDING * size:
                perms[group.name], progress = perm, True
    return {name: permuted(name) for name in moving}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for width in args.widths:
        torch.manual_seed(0)
        a, b = resnet20(width), resnet20(width)
        start = time.perf_counter()
        wiring = trace(a, torch.randn(1, 3, 32, 32))
        print(f"width {width}: {len(wiring.groups)} groups, traced in {time.perf_counter() - start:.2f} s")
        names = [n for n, _ in a.named_parameters()]
        ways = {"interlayer": match_weights, "from scratch": from_scratch, "units": match_weights_naive}
        times: dict[str, list[float]] = {way: [] for way in ways}
        found: dict[str, list[float]] = {way: [] for way in ways}
        for run in range(args.runs):
            for way, match in ways.items():
                start = time.perf_counter()
                state = match(wiring, a.state_dict(), b.state_dict(), names=names, seed=run)
                times[way].append(time.perf_counter() - start)
                found[way].append(agreement(a.state_dict(), state, names))
        for way in ways:
            ratios = [t / own for t, own in zip(times[way], times["interlayer"], strict=True)]
            worse = max(f - own for f, own in zip(found[way], found["interlayer"], strict=True))
            print(
                f"  {way:<12} median {statistics.median(times[way]):8.3f} s   {statistics.median(ratios):6.1f}x"
                f" [{min(ratios):.1f}, {max(ratios):.1f}]   objective {statistics.mean(found[way]):.3f}"
                f" (at most {worse:+.2g} above interlayer's)"
            )


if __name__ == "__main__":
    main()
