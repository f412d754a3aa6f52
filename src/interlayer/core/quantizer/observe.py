"""The ranges of activations, of all layers in one pass over the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, overload

import torch
from torch import Tensor, nn

from interlayer.core import taps
from interlayer.core.quantizer.grid import By, Grid, LogGrid, LogScaled, Scaled
from interlayer.core.select import At, select

KEPT = 2**16  # values of one activation and batch that percentiles and squared errors are computed from


@overload
def observe(model: nn.Module, data: Any, grid: Grid, *, at: At, by: By = ..., side: str = ...) -> dict[str, Scaled]: ...
@overload
def observe(
    model: nn.Module, data: Any, grid: Mapping[str, Grid | LogGrid], *, by: By = ..., side: str = ...
) -> dict[str, Scaled | LogScaled]: ...
def observe(
    model: nn.Module,
    data: Any,
    grid: Grid | Mapping[str, Grid | LogGrid],
    *,
    at: At | None = None,
    by: By = "minmax",
    side: str = "input",
) -> Any:
    """Run the model over the data once, and fit the grid to what each selected module gets or gives.

    Memory: the smallest and largest value of every module, and a sample of evenly spaced values, at most 65,536 for each
    batch, where ``by`` needs more than these two.

    Args:
        model: Any module. It is in eval mode while it runs, and unchanged afterwards.
        data: Batches as ``taps.feed`` takes them.
        grid: With one scale for the whole tensor, or with one for each entry of an axis counted from the last, such as
            ``axis=-1`` for features. A mapping gives each module, by name, a grid of its own.
        at: Which modules, unless ``grid`` is a mapping.
        by: How the range is chosen; see ``Grid.fit``.
        side: ``"input"`` or ``"output"``.

    Returns:
        The scaled grid by the name of the module; modules that did not run are missing.

    Raises:
        ValueError: A grid with an axis counted from the first (examples are its first), no data, or a module that got no numbers.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> found = observe(net, torch.ones(4, 2), Grid(8, kind="asymmetric"), at=nn.Linear)
        >>> list(found), round(found["0"].scale.item() * 255, 3)
        (['0', '2'], 1.0)
    """
    at = (lambda n, m: n in grid) if isinstance(grid, Mapping) else "**" if at is None else at
    names = list(select(model, at).chosen)
    grids = dict(grid) if isinstance(grid, Mapping) else dict.fromkeys(names, grid)
    axes = {n: g.axis if isinstance(g, Grid) else None for n, g in grids.items()}
    if any(axis is not None and axis >= 0 for axis in axes.values()):
        axis = next(a for a in axes.values() if a is not None and a >= 0)
        raise ValueError(
            f"observe: a grid with axis={axis}; expected axis=None, one scale for all examples, or one below 0."
        )
    seen: dict[str, list[Tensor]] = {}
    ran = False
    with taps.at_rest(model), torch.no_grad(), taps.read(model, at, side=side, every=True) as last:
        for _ in taps.feed(model, data):
            ran = True
            for name, values in last.items():
                seen.setdefault(name, []).extend(_some(v, by, axes[name]) for v in values)
            last.clear()
    if not ran:
        raise ValueError(
            "observe: the data holds no batch. Pass a tensor, a mapping, a tuple, or an iterable of these."
        )
    return {n: grids[n].fit(torch.cat(seen[n], -1).movedim(0, axes[n] or 0), by) for n in names if n in seen}


def _some(value: Tensor, by: By, axis: int | None) -> Tensor:
    """Values [n], or [entries of the axis, n]: the ends, and evenly spaced ones between where the range depends on them."""
    if not value.is_floating_point():
        raise ValueError(f"observe: an activation of type {value.dtype}; expected floating-point numbers.")
    if axis is None:
        flat, (low, high) = value.detach().flatten(), torch.aminmax(value.detach())
    else:
        rows = value.detach().movedim(axis, -1).flatten(0, -2)
        flat, low, high = rows.T, rows.amin(0), rows.amax(0)
    ends = torch.stack((low, high), -1).float()
    if by == "minmax":
        return ends
    step = -(-flat.numel() // KEPT)
    return flat.float() if step == 1 else torch.cat((ends, flat[..., ::step].float()), -1)
