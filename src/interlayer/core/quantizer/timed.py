"""Rounded inputs whose scales depend on the time of a diffusion model's call: one grid for each group of times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from interlayer.core.quantizer.grid import Grid, Scaled, through
from interlayer.core.quantizer.layers import Packed, Round, axis_of, is_conv1d, weight_of


class Clock:
    """A forward pre-hook of a model that reads the times of each call, and picks scales by them for the layers inside.

    Examples of one call may be at different times.

    Args:
        edges: Rising times at which one group ends and the next begins; a time on an edge belongs to the later group.
        name: The model's argument that holds the times.
        place: Its position.

    Examples:
        >>> clock = Clock([10.0], "t", 0)
        >>> clock(nn.Identity(), (torch.tensor([3, 10]),), {})
        >>> clock.pick(torch.tensor([0.1, 0.5]), torch.zeros(2, 4, 8))
        tensor([[[0.1000]],
        <BLANKLINE>
                [[0.5000]]])
    """

    def __init__(self, edges: Sequence[float], name: str, place: int) -> None:
        self.edges, self.name, self.place = tuple(float(e) for e in edges), name, place
        self.now: Tensor | None = None

    @property
    def groups(self) -> int:
        """How many groups of times there are."""
        return len(self.edges) + 1

    def group(self, times: Any, device: torch.device | None = None) -> Tensor:
        """The group of each time."""
        found = torch.as_tensor(times, device=device).reshape(-1).to(torch.float32)
        return (found[:, None] >= found.new_tensor(self.edges)).sum(1)

    def __call__(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        """Read the times."""
        device = next((p.device for p in module.parameters()), None)
        self.now = self.group(kwargs[self.name] if self.name in kwargs else args[self.place], device)

    def pick(self, held: Float[Tensor, "groups ..."], x: Float[Tensor, "B ..."], axis: int | None = None) -> Tensor:
        """What each example of ``x`` takes of ``held``, in a shape that broadcasts against ``x``.

        Args:
            held: A number for each group, or one for each group and feature.
            x: Activations, examples first. Where there are more than times, such as heads or frames, each time's stand together.
            axis: The axis of the features, counted from the last, if ``held`` has any.

        Raises:
            ValueError: No call of the model has been seen, or examples and times do not match.
        """
        if self.now is None:
            raise ValueError(
                "Clock: no time; expected a call of the whole model, whose hook reads it. Call the model, not one of its layers."
            )
        now = self.now
        if now.shape[0] not in (1, x.shape[0]):
            if x.shape[0] % now.shape[0]:
                raise ValueError(
                    f"Clock: {x.shape[0]} examples in a layer, {now.shape[0]} times; expected as many, or a multiple. Give one time."
                )
            now = now.repeat_interleave(x.shape[0] // now.shape[0])
        sizes = [now.shape[0], *[1] * (x.ndim - 1)]
        if axis is not None:
            sizes[axis] = held.shape[1]
        return held[now].view(sizes)

    def structure(self) -> dict[str, Any]:
        """The arguments that build this clock again."""
        return {"edges": list(self.edges), "name": self.name, "place": self.place}


def split(
    who: str, calls: Sequence[Any], name: str, place: int, groups: int
) -> tuple[list[list[dict[str, Any]]], Clock]:
    """Calls of a diffusion model by groups of times, of about equally many different times each, and the clock of these groups.

    Args:
        who: Who asks, for the error.
        calls: Mappings of arguments, or tuples that begin with one. Those at several times are taken apart by example.
        name: The argument that holds the times.
        place: Its position.
        groups: How many groups, at most.

    Raises:
        ValueError: A call without times.

    Examples:
        >>> calls = [{"x": torch.zeros(2, 3), "t": torch.tensor([t, t])} for t in (900, 600, 300, 0)]
        >>> found, clock = split("me", calls, "t", 1, 2)
        >>> [len(each) for each in found], clock.edges
        ([2, 2], (450.0,))
    """
    given = [call[0] if isinstance(call, tuple | list) else call for call in calls]
    if odd := [call for call in given if not isinstance(call, Mapping) or name not in call]:
        what = f"arguments {', '.join(odd[0])}" if isinstance(odd[0], Mapping) else type(odd[0]).__name__
        raise ValueError(
            f"{who}: a call with {what}; expected mappings of arguments with {name!r}, the times, among them."
        )
    every = torch.cat([torch.as_tensor(call[name]).reshape(-1).to("cpu", torch.float32) for call in given]).unique()
    runs = every.tensor_split(min(groups, len(every)))
    clock = Clock([float(a[-1] + b[0]) / 2 for a, b in pairwise(runs)], name, place)
    found: list[list[dict[str, Any]]] = [[] for _ in runs]
    for call in given:
        which = clock.group(call[name])
        for g in which.unique().tolist():
            found[g].append(dict(call) if bool((which == g).all()) else _rows(call, which == g))
    return found, clock


def _rows(call: Mapping[str, Any], chosen: Tensor) -> dict[str, Any]:
    """Some examples of a call."""

    def pick(leaf: Any) -> Any:
        whole = isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == len(chosen)
        return leaf[chosen.to(leaf.device)] if whole else leaf

    return tree_map(pick, dict(call))


class Timed(Packed):
    """A packed layer whose inputs are rounded with the scales of the call's time.

    A linear map with one scale for each group multiplies 8-bit integers, as ``Packed`` does. Memory beside that of ``Packed``:
    a scale and a zero for each group, or for each group and feature.

    Args:
        layer: See ``Packed``.
        weights: See ``Packed``.
        codes: See ``Packed``.
        inputs: The grid of the inputs; its scales are [groups], or [groups, features] where it has an axis.
        clock: What tells the time.

    Shapes: those of ``layer``.

    Raises:
        ValueError: What ``Packed`` raises, or scales of another shape.

    Examples:
        >>> clock = Clock([0.5], "t", 0)
        >>> held = Scaled(Grid(4, kind="unsigned"), torch.tensor([0.1, 1.0]), torch.zeros(2))
        >>> layer = Timed(nn.Linear(2, 1, bias=False), Grid(8, 0), inputs=held, clock=clock)
        >>> clock(layer, (torch.tensor([0.2, 0.9]),), {})
        >>> layer.scaled_inputs(torch.ones(2, 2)).scale.flatten()
        tensor([0.1000, 1.0000])
    """

    def __init__(
        self,
        layer: nn.Module,
        weights: Grid | Scaled,
        *,
        codes: Tensor | None = None,
        inputs: Scaled,
        clock: Clock,
    ) -> None:
        super().__init__(layer, weights, codes=codes, inputs=replace(inputs.grid, axis=None))
        features = self.shape[1] * getattr(layer, "groups", 1)
        wanted = (clock.groups,) if inputs.grid.axis is None else (clock.groups, features)
        if tuple(inputs.scale.shape) != wanted or inputs.grid.axis not in (None, axis_of(self.shape)):
            raise ValueError(
                f"Timed: scales of inputs {tuple(inputs.scale.shape)} with axis={inputs.grid.axis}; expected {wanted}, and axis=None "
                f"or {axis_of(self.shape)}, the features."
            )
        self.inputs, self.clock = inputs.grid, clock
        held = inputs.to(weight_of(layer).detach())
        self.register_buffer("input_scale", held.scale.clone())
        self.register_buffer("input_zero", held.zero.clone())

    @property
    def floats(self) -> bool:
        """Whether rounded floats are multiplied: in a convolution, or with scales by feature."""
        return self.conv is not None or (self.inputs is not None and self.inputs.axis is not None)

    def scaled_inputs(self, x: Tensor) -> Scaled:
        """The grid with the scales of each example's time."""
        assert self.inputs is not None
        found: list[Any] = [
            self.clock.pick(self.get_buffer(n), x, self.inputs.axis) for n in ("input_scale", "input_zero")
        ]
        if not self.floats:
            found = [v.expand(*x.shape[:-1], 1) for v in found]
        return Scaled(replace(self.inputs, axis=None), *found)

    def structure(self) -> dict[str, Any]:
        """The grids, as ``restore`` needs them."""
        return {**super().structure(), "dynamic": False}

    def extra_repr(self) -> str:
        """The shape and the grids."""
        assert self.inputs is not None
        each = " by channel" if self.inputs.axis is not None else ""
        return (
            f"{list(self.shape)}, {self.grid.bits} bits {self.grid.kind}, inputs={self.inputs.bits} bits {self.inputs.kind}{each}, "
            f"{self.clock.groups} groups of times"
        )


class TimedRound(Round):
    """``Round`` with the scale of the call's time.

    Args:
        to: The grid; its scales are [groups], or [groups, features] where it has an axis.
        clock: What tells the time.

    Shapes: any to the same.
    """

    def __init__(self, to: Scaled, clock: Clock) -> None:
        super().__init__(to)
        self.clock = clock

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Round to the nearest level."""
        assert isinstance(self.grid, Grid)
        scale, zero = (self.clock.pick(self.get_buffer(n), x, self.grid.axis) for n in ("scale", "zero"))
        return Scaled(replace(self.grid, axis=None), scale, zero).fake(x)

    def structure(self) -> dict[str, Any]:
        """As ``restore`` needs it."""
        return {**super().structure(), "kind": "TimedRound"}


class Learning(nn.Module):
    """A grid for each group of times whose scales are learned as logarithms; the zeros stay.

    Args:
        held: The grid; its scales are [groups], or [groups, features] where it has an axis, counted from the last.
        clock: What tells the time.
    """

    def __init__(self, held: Scaled, clock: Clock) -> None:
        super().__init__()
        self.held, self.clock = held, clock
        self.log = nn.Parameter(torch.zeros_like(held.scale))

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Round. Gradients of scales are those of ``through``."""
        now = self.now()
        scale, zero = (self.clock.pick(v, x, now.grid.axis) for v in (now.scale, now.zero))
        return through(x, replace(now.grid, axis=None), scale, zero)

    def now(self) -> Scaled:
        """The grid so far."""
        return Scaled(self.held.grid, self.held.scale * self.log.exp(), self.held.zero)

    def found(self) -> Scaled:
        """The grid in the end."""
        now = self.now()
        return Scaled(now.grid, now.scale.detach(), now.zero)


class Tuned(nn.Module):
    """A layer whose rounded weight is trained: gradients pass the rounding, to the weight as it was before and to the inputs' scales.

    Args:
        layer: A linear map or convolution. Its parameters are trained in place.
        weights: The grid of its weight, outputs first, which stays.
        inputs: What inputs pass first.
    """

    def __init__(self, layer: nn.Module, weights: Scaled, inputs: Learning) -> None:
        super().__init__()
        self.layer, self.weights, self.inputs = layer, weights, inputs
        self._rounded: Tensor | None = None

    def rounded(self) -> Float[Tensor, "out ..."]:
        """The rounded weight, outputs first; kept while the weight is not trained."""
        weight = weight_of(self.layer)
        if weight.requires_grad:
            self._rounded = None
            return self.weights.fake(weight)
        if self._rounded is None:
            self._rounded = self.weights.fake(weight)
        return self._rounded

    @property
    def weight(self) -> nn.Parameter:
        """The layer's own, for models that read it past the layer."""
        return self.layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> nn.Parameter | None:
        """The layer's own."""
        return self.layer.bias  # type: ignore[return-value]

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The layer on rounded numbers."""
        weight = self.rounded()
        given = {"weight": weight.T if is_conv1d(self.layer) else weight}
        return torch.func.functional_call(self.layer, given, (self.inputs(x),))

    def found(self) -> Timed:
        """The packed layer."""
        return Timed(
            self.layer,
            self.weights,
            codes=self.weights.codes(weight_of(self.layer).detach()),
            inputs=self.inputs.found(),
            clock=self.inputs.clock,
        )
