"""The ranges of activations, of all layers in one pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core import taps
from interlayer.core.quantizer.attention import Observed, apart
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
        ValueError: A grid with an axis counted from the first (examples are its first), no data, or a module that got no numbers or
            ones that are not finite.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> found = observe(net, torch.ones(4, 2), Grid(8, kind="asymmetric"), at=nn.Linear)
        >>> list(found), round(found["0"].scale.item() * 255, 3)
        (['0', '2'], 1.0)
    """
    at = (lambda n, m: n in grid) if isinstance(grid, Mapping) else "**" if at is None else at
    modules = select(model, at).chosen
    names = list(modules)
    grids = dict(grid) if isinstance(grid, Mapping) else dict.fromkeys(names, grid)
    axes = {n: g.axis if isinstance(g, Grid) else None for n, g in grids.items()}
    if any(axis is not None and axis >= 0 for axis in axes.values()):
        axis = next(a for a in axes.values() if a is not None and a >= 0)
        raise ValueError(
            f"observe: a grid with axis={axis}; expected axis=None, one scale for all examples, or one below 0."
        )
    if by == "minmax":
        seen = extremes(model, data, {n: axes[n] for n in names}, side=side)
    else:
        kept, ends = dict[str, list[Tensor]](), dict[str, list[Tensor]]()

        def see(name: str, value: Tensor) -> None:
            module = modules[name]
            before, whole = (isinstance(module, Observed) and module.part) or (0, value.numel())
            step = -(-whole // KEPT)
            kept.setdefault(name, []).append(_some(value, axes[name], before, step))
            if step > 1:
                found, new = ends.setdefault(name, []), _ends(value, axes[name])
                found.append(_wider(found.pop(), new) if before else new)

        _run(model, data, names, see, side)
        seen = {n: torch.cat([*each, *ends.get(n, [])], -1) for n, each in kept.items()}
    return {n: _fitted(grids[n], seen[n], by) for n in names if n in seen}


def _fitted(grid: Grid | LogGrid, seen: Tensor, by: By) -> Scaled | LogScaled:
    """The grid with scales that suit values [n], or [entries of its axis, n]."""
    if isinstance(grid, LogGrid) or grid.axis is None:
        return grid.fit(seen, by)
    held = replace(grid, axis=0).fit(seen, by)
    return Scaled(grid, held.scale, held.zero)


def extremes(
    model: nn.Module, data: Any, axes: Mapping[str, int | None], *, side: str = "input"
) -> dict[str, Float[Tensor, "_ 2"]]:
    """Run the model over the data once, and find the smallest and the largest value that each module gets or gives.

    Cost: each activation is read where it is made, once for all modules that get the same one; none is kept.

    Args:
        model: Any module. It is in eval mode while it runs, and unchanged afterwards.
        data: Batches as ``taps.feed`` takes them.
        axes: By the name of a module: None for the two of the whole tensor, or the axis, counted from the last, whose entries
            have two each.
        side: ``"input"`` or ``"output"``.

    Returns:
        [entries, 2], or [2] for a whole tensor, by name; modules that did not run are missing.

    Raises:
        ValueError: No data, or a module that got no numbers or ones that are not finite.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 3))
        >>> extremes(net, torch.tensor([[1.0, 2.0], [0.0, 5.0]]), {"0": -1})
        {'0': tensor([[0., 1.],
                [2., 5.]])}
    """
    found: dict[str, Tensor] = {}
    before: tuple[Tensor, int | None, int, Tensor] | None = None

    def see(name: str, value: Tensor) -> None:
        nonlocal before
        axis = axes[name]
        if before and _same(before[0], value) and before[1:3] == (axis, value._version):
            ends = before[3]
        else:
            ends = _ends(value, axis)
            before = (value, axis, value._version, ends)
        found[name] = _wider(found.get(name, ends), ends)

    _run(model, data, list(axes), see, side)
    if bad := [n for n, ends in found.items() if not bool(ends.isfinite().all())]:
        raise ValueError(f"observe: {side}s of {bad[0]} are not finite; expected finite activations. Check the data.")
    return found


def _run(model: nn.Module, data: Any, names: list[str], see: Callable[[str, Tensor], None], side: str) -> None:
    """One pass over the data; ``see`` gets each activation."""
    ran, wanted = False, set(names)

    def told(name: str, value: Tensor) -> None:
        if not value.is_floating_point():
            raise ValueError(f"observe: an activation of type {value.dtype}; expected floating-point numbers.")
        see(name, value)

    with (
        taps.at_rest(model),
        torch.no_grad(),
        apart(model),
        taps.watch(model, lambda n, m: n in wanted, told, side=side),
    ):
        for _ in taps.feed(model, data):
            ran = True
    if not ran:
        raise ValueError(
            "observe: the data holds no batch. Pass a tensor, a mapping, a tuple, or an iterable of these."
        )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _ends(value: Tensor, axis: int | None) -> Float[Tensor, "... 2"]:
    """The smallest and the largest value, of all or of each entry of an axis."""
    if axis is None:
        return torch.stack(torch.aminmax(value)).float()
    rows = value.movedim(axis, -1).flatten(0, -2)
    return torch.stack((rows.amin(0), rows.amax(0)), -1).float()


def _wider(a: Float[Tensor, "... 2"], b: Float[Tensor, "... 2"]) -> Float[Tensor, "... 2"]:
    """The smallest and the largest value of two such pairs."""
    return torch.stack((torch.minimum(a[..., 0], b[..., 0]), torch.maximum(a[..., 1], b[..., 1])), -1)


def _some(value: Tensor, axis: int | None, before: int, step: int) -> Tensor:
    """Every so many of the values [n], or [entries of the axis, n], of an activation of which some came before."""
    flat = value.flatten() if axis is None else value.movedim(axis, -1).flatten(0, -2).T
    first = -(before // (1 if axis is None else len(flat))) % step
    # A copy: what comes later in the model may change the activation in place.
    return flat[..., first::step].to(torch.float32, copy=True)
