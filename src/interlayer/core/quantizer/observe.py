"""The ranges of activations, of all layers in one pass over the data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from interlayer.core import taps
from interlayer.core.quantizer.grid import By, Grid, Scaled
from interlayer.core.select import At, select

KEPT = 2**16  # values of one activation and batch that percentiles and squared errors are computed from


def observe(
    model: nn.Module, data: Any, grid: Grid, *, at: At, by: By = "minmax", side: str = "input"
) -> dict[str, Scaled]:
    """Run the model over the data once, and fit the grid to what each selected module gets or gives.

    Memory: the smallest and largest value of every module, and a sample of evenly spaced values, at most 65,536 for each
    batch, where ``by`` needs more than these two.

    Args:
        model: Any module. It is in eval mode while it runs, and unchanged afterwards.
        data: Batches as ``taps.feed`` takes them.
        grid: With one scale for the whole tensor.
        at: Which modules.
        by: How the range is chosen; see ``Grid.fit``.
        side: ``"input"`` or ``"output"``.

    Returns:
        The scaled grid by the name of the module; modules that did not run are missing.

    Raises:
        ValueError: A grid with an axis, no data, or a module that got no numbers.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> found = observe(net, torch.ones(4, 2), Grid(8, kind="asymmetric"), at=nn.Linear)
        >>> list(found), round(found["0"].scale.item() * 255, 3)
        (['0', '2'], 1.0)
    """
    if grid.axis is not None:
        raise ValueError(f"observe: a grid with axis={grid.axis}; expected axis=None, one scale for all examples.")
    seen: dict[str, list[Tensor]] = {}
    ran = False
    names = list(select(model, at).chosen)
    with taps.at_rest(model), torch.no_grad(), taps.read(model, at, side=side, every=True) as last:
        for _ in taps.feed(model, data):
            ran = True
            for name, values in last.items():
                seen.setdefault(name, []).extend(_some(v, by) for v in values)
            last.clear()
    if not ran:
        raise ValueError(
            "observe: the data holds no batch. Pass a tensor, a mapping, a tuple, or an iterable of these."
        )
    return {name: grid.fit(torch.cat(seen[name]), by) for name in names if name in seen}


def _some(value: Tensor, by: By) -> Tensor:
    if not value.is_floating_point():
        raise ValueError(f"observe: an activation of type {value.dtype}; expected floating-point numbers.")
    flat = value.detach().float().flatten()
    ends = torch.stack((flat.min(), flat.max()))
    if by == "minmax":
        return ends
    return flat if flat.numel() <= KEPT else torch.cat((ends, flat[:: -(-flat.numel() // KEPT)]))
