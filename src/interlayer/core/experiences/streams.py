"""Streams of image experiences from data sets: by classes, with permuted pixels, rotated, one data set after another."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from interlayer.core.data import Experience
from interlayer.core.datasets import Split


def by_classes(
    data: Split, groups: Sequence[Sequence[int]], *, known: bool = True, name: str = "classes"
) -> list[Experience]:
    """One experience for each group of classes.

    Args:
        data: Inputs and targets for training, and those held out.
        groups: The classes of each experience.
        known: Whether the experience is known at test (task-incremental): each numbers its classes from 0. Otherwise
            (class-incremental) classes keep their numbers, and all experiences have as many outputs as the data has classes.
        name: What the experiences are called, followed by their classes.

    Raises:
        ValueError: A class is in no sample, or in two groups.

    Examples:
        >>> from interlayer.core.datasets import split_digits
        >>> [(e.name, e.classes, len(e.train[1])) for e in by_classes(split_digits(), [[3, 5], [0, 1, 2]])]
        [('classes 3 5', 2, 285), ('classes 0 1 2', 3, 455)]
        >>> by_classes(split_digits(), [[3, 5]], known=False)[0].classes
        10
    """
    chosen = [c for group in groups for c in group]
    there = set(data.train[1].tolist()) & set(data.held[1].tolist())
    if wrong := [c for c in chosen if c not in there or chosen.count(c) > 1]:
        raise ValueError(
            f"experiences.by_classes: class {wrong[0]} {'is in two groups' if wrong[0] in there else 'has no samples'}; "
            f"expected each of {sorted(there)} at most once."
        )

    def part(split: tuple[Tensor, Tensor], group: Sequence[int]) -> tuple[Tensor, Tensor]:
        x, y = split
        rows = torch.isin(y, torch.tensor(group))
        numbers = torch.empty(max(group) + 1, dtype=torch.long)
        numbers[list(group)] = torch.arange(len(group))
        return x[rows], numbers[y[rows]] if known else y[rows]

    return [
        Experience(
            f"{name} {' '.join(map(str, group))}",
            part(data.train, group),
            part(data.held, group),
            len(group) if known else max(there) + 1,
        )
        for group in groups
    ]


def permuted(data: Split, count: int, *, seed: int = 0, name: str = "permuted") -> list[Experience]:
    """The same task with the pixels in a fixed random order for each experience; the first keeps their order.

    The classes stay the same, so a rule may use one head for all (domain-incremental).

    Args:
        data: Inputs [N, ...] and targets.
        count: How many experiences.
        seed: Of the permutations.
        name: What the experiences are called, followed by their number.
    """
    draw = torch.Generator().manual_seed(seed)
    pixels = data.train[0][0].numel()
    orders = [torch.arange(pixels), *(torch.randperm(pixels, generator=draw) for _ in range(count - 1))]

    def moved(x: Tensor, order: Tensor) -> Tensor:
        return x.flatten(1)[:, order].view(x.shape)

    return [_same(f"{name} {i}", data, lambda x, order=order: moved(x, order)) for i, order in enumerate(orders)]


def rotated(data: Split, angles: Sequence[float], *, name: str = "rotated") -> list[Experience]:
    """The same task with the images turned by a fixed angle for each experience; pixels are interpolated.

    Args:
        data: Images [N, C, H, W] and targets.
        angles: In degrees, counter-clockwise.
        name: What the experiences are called, followed by their angle.
    """

    def turned(x: Tensor, angle: float) -> Tensor:
        c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        matrix = torch.tensor([[c, -s, 0.0], [s, c, 0.0]]).expand(len(x), 2, 3)
        grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False)

    return [_same(f"{name} {a:g}", data, lambda x, angle=a: turned(x, angle) if angle else x) for a in angles]


def in_a_row(parts: Mapping[str, Split], *, side: int) -> list[Experience]:
    """Different sets of images one after another, brought to one size and to one number of channels.

    Args:
        parts: Images [N, C, H, W] and targets, by the name of the experience.
        side: Height and width that all get, in pixels (bilinear, with anti-aliasing).

    Raises:
        ValueError: The inputs of a part are not images.
    """
    if wrong := [name for name, part in parts.items() if part.train[0].ndim != 4]:
        raise ValueError(
            f"experiences.in_a_row: inputs {tuple(parts[wrong[0]].train[0].shape)} of {wrong[0]!r}; "
            "expected images [samples, channels, height, width]."
        )
    channels = max(part.train[0].shape[1] for part in parts.values())

    def sized(x: Tensor) -> Tensor:
        if x.shape[-2:] != (side, side):
            x = F.interpolate(x, size=(side, side), mode="bilinear", antialias=True)
        return x if x.shape[1] == channels else x.expand(-1, channels, -1, -1)

    return [_same(name, part, sized) for name, part in parts.items()]


def _same(name: str, data: Split, change: object) -> Experience:
    """The task of ``data`` with changed inputs."""
    assert callable(change)
    (x, y), (v, w) = data
    return Experience(name, (change(x), y), (change(v), w), int(max(y.max(), w.max())) + 1)
