"""A flow's model that takes whole steps of a Runge-Kutta method, for sampling loops of others."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from interlayer.core import taps
from interlayer.core.data import answer
from interlayer.core.solve.tableau import TABLEAUS, combine


class WholeStep:
    """A forward hook by which a model gives the velocity that takes Euler's step where the method's step ends.

    Args:
        times: Falling times of the schedule, as the model gets them.
        scale: The time of pure noise.
        method: Name in ``core.solve.tableau``.
        names: The model's arguments for the items and the time, and where they stand.
    """

    def __init__(self, times: Sequence[float], scale: float, method: str, names: Mapping[str, int]) -> None:
        self.times, self.scale, self.method, self.names = tuple(times), scale, method, dict(names)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Ask the model again inside of the step that begins at the nearest time of the schedule."""
        x, t = (kwargs[n] if n in kwargs else args[i] for n, i in self.names.items())
        first, tableau = answer(output), TABLEAUS[self.method]
        if first.shape != x.shape:
            raise ValueError(
                f"WholeStep: {type(module).__name__} gives {tuple(first.shape)} for {tuple(x.shape)}; expected a velocity of the "
                "same shape. Build the model without a learned variance."
            )
        t = torch.as_tensor(t, device=x.device)
        grid = torch.tensor(self.times, device=x.device)
        size = (torch.cat((grid[1:], grid[-1:])) - grid)[(t.reshape(-1, 1) - grid).abs().argmin(1)]
        change, slopes = (size / self.scale).view(-1, *[1] * (x.ndim - 1)).to(x), [first]
        for row, c in zip(tableau.a, tableau.c[1:], strict=True):
            inside = (x + change * combine(row, slopes), t + (c * size).view(t.shape))
            given, named = list(args), dict(kwargs)
            for (name, place), value in zip(self.names.items(), inside, strict=True):
                if name in kwargs:
                    named[name] = value
                else:
                    given[place] = value
            slopes.append(answer(module.forward(*given, **named)))
        return taps.swap(output, combine(tableau.b, slopes))


def arguments(model: nn.Module) -> dict[str, int]:
    """Which arguments of a model are the items and the time, with their positions: the first, and ``timestep`` or the second.

    Raises:
        ValueError: The model takes no time, or has no parameter.

    Examples:
        >>> class Velocity(nn.Linear):
        ...     def forward(self, x, t):
        ...         return super().forward(x)
        >>> arguments(Velocity(2, 2))
        {'x': 0, 't': 1}
    """
    names = [*inspect.signature(model.forward).parameters]
    if len(names) < 2 or next(model.parameters(), None) is None:
        raise ValueError(
            f"WholeStep: {type(model).__name__}, which takes ({', '.join(names)}); expected a trained model of items and times."
        )
    time = "timestep" if "timestep" in names else names[1]
    return {names[0]: 0, time: names.index(time)}


def whole(model: nn.Module) -> bool:
    """Whether a model takes whole steps."""
    return any(isinstance(hook, WholeStep) for hook in model._forward_hooks.values())
