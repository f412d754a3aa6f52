"""How far samples are from data: distances of two sets, each with its estimator, and the value that real data reach."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Measure = Callable[[Tensor, Tensor], Tensor]


def _checked(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    x, y = x.flatten(1).double(), y.flatten(1).double()
    if x.shape[1] != y.shape[1] or min(len(x), len(y)) < 2:
        raise ValueError(
            f"distances: {tuple(x.shape)} and {tuple(y.shape)}; expected two sets of at least 2 items with as many features."
        )
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("distances: items that are not finite; did sampling diverge? Leave them out and say how many.")
    return x, y


def mmd(x: Tensor, y: Tensor, kernel: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
    """Squared maximum mean discrepancy (Gretton et al., 2012, equation 3): the unbiased U-statistic, which may be negative.

    Args:
        x: [N, ...], flattened to features.
        y: [M, ...], the reference.
        kernel: ``(a, b) -> [len(a), len(b)]``. Defaults to a Gaussian whose bandwidth is the median distance within ``y``.

    Examples:
        >>> x = torch.arange(6.0).view(-1, 1)
        >>> bool(mmd(x, x + 0.5) < mmd(x, x + 5))
        True
    """
    x, y = _checked(x, y)
    if kernel is None:
        width = 2 * torch.pdist(y).median() ** 2

        def kernel(a: Tensor, b: Tensor) -> Tensor:
            return (-(torch.cdist(a, b) ** 2) / width).exp()

    def within(a: Tensor) -> Tensor:
        k = kernel(a, a)
        return (k.sum() - k.diagonal().sum()) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * kernel(x, y).mean()


def kid(x: Tensor, y: Tensor) -> Tensor:
    """Kernel distance (Binkowski et al., arXiv:1801.01401): ``mmd`` with the kernel ``(a b / d + 1)^3``, unbiased at any size."""
    return mmd(x, y, lambda a, b: (a @ b.T / a.shape[1] + 1) ** 3)


def frechet(x: Tensor, y: Tensor) -> Tensor:
    """Fréchet distance of two Gaussians with the sets' means and covariances (Heusel et al., arXiv:1706.08500, equation 6).

    ``|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))``. It is biased upwards at a finite number of items, the more the more features
    there are, so compare it only at equal numbers, and with the value that real data reach.

    Examples:
        >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
        >>> round(float(frechet(x, x + 2)), 6)
        12.0
    """
    x, y = _checked(x, y)
    roots = [torch.linalg.qr((z - z.mean(0)) / (len(z) - 1) ** 0.5, mode="r").R for z in (x, y)]
    # C = R'R, and the trace of (C C')^(1/2) is the sum of the singular values of R R''.
    cross = torch.linalg.matrix_norm(roots[0] @ roots[1].T, "nuc")
    return (x.mean(0) - y.mean(0)).square().sum() + sum(r.square().sum() for r in roots) - 2 * cross


def sliced_wasserstein(x: Tensor, y: Tensor, *, projections: int = 128, seed: int = 0) -> Tensor:
    """Sliced 2-Wasserstein distance (Bonneel et al., 2015): the root mean square over random directions of the distance on a line.

    Sets of unequal size are compared at as many quantiles as the larger has items. Biased upwards like ``frechet``.

    Args:
        x: [N, ...], flattened to features.
        y: [M, ...].
        projections: Number of directions.
        seed: Of the directions.
    """
    x, y = _checked(x, y)
    generator = torch.Generator().manual_seed(seed)
    lines = torch.nn.functional.normalize(torch.randn(x.shape[1], projections, generator=generator).to(x), dim=0)
    count = max(len(x), len(y))
    at = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    a, b = ((z @ lines).sort(0).values[(at * len(z)).long()] for z in (x, y))
    return (a - b).square().mean().sqrt()


@dataclass(frozen=True)
class Distance:
    """A distance of samples from data, and what real data reach.

    Attributes:
        value: The distance.
        floor: Mean distance of as many real items from the remaining ones.
        deviation: Standard deviation of that over the splits.
        count: Samples.
    """

    value: float
    floor: float
    deviation: float
    count: int


def distance(measure: Measure, samples: Tensor, real: Tensor, *, splits: int = 10, seed: int = 0) -> Distance:
    """Measure samples against real data, at the size of set at which the floor is measured.

    Each split takes as many real items out as there are samples; those and the samples are compared with the rest, so that
    both numbers have the same bias.

    Args:
        measure: ``mmd``, ``kid``, ``frechet`` or ``sliced_wasserstein``, or your own.
        samples: [N, ...], features or pixels.
        real: [M, ...] with at least N + 2 items.
        splits: How often.
        seed: Of the splits.

    Examples:
        >>> real = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
        >>> found = distance(mmd, real[:20] + 3, real)
        >>> found.value > found.floor + 5 * found.deviation
        True
    """
    count = len(samples)
    if len(real) < count + 2:
        raise ValueError(
            f"distance: {count} samples and {len(real)} real items; expected more real ones. Take fewer samples."
        )
    generator = torch.Generator().manual_seed(seed)
    values, floors = [], []
    for _ in range(splits):
        order = torch.randperm(len(real), generator=generator).to(real.device)
        rest = real[order[count:]]
        values.append(float(measure(samples, rest)))
        floors.append(float(measure(real[order[:count]], rest)))
    return Distance(statistics.fmean(values), statistics.fmean(floors), statistics.pstdev(floors), count)
