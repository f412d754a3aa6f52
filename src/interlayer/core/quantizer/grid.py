"""Numbers on a uniform grid of few levels: which grid, which scale, and rounding that gradients pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float, Int8, Integer
from torch import Tensor

from interlayer.core.quantizer.packing import TERNARY

Kind = Literal["symmetric", "unsigned", "asymmetric", "midrise", "affine", "ternary"]
Rounding = Literal["nearest", "learned", "stochastic"]
By = Literal["minmax", "mse"] | float
Measure: TypeAlias = Callable[[Tensor], Tensor]
LEAST = 1e-12  # scale of a tensor of zeros
FEWEST = 16  # values in a group, where there are more
RATIOS = 100  # ranges that the search for the least squared error tries
SEARCHED = 2**18  # numbers that it holds at a time


@dataclass(frozen=True)
class Grid:
    """A uniform grid of ``2^bits`` levels: ``value = scale (code - zero)``.

    Args:
        bits: 1 to 8.
        axis: The axis whose entries have scales of their own, such as 0 for the output channels of a weight. None is one
            scale for the whole tensor.
        kind: ``"symmetric"``: codes ``-2^(bits-1)`` to ``2^(bits-1) - 1``, zero at 0. ``"unsigned"``: codes 0 to ``2^bits - 1``,
            zero at 0, for values that are never negative. ``"asymmetric"``: the same codes, zero at an integer.
            ``"midrise"``: the same codes, zero in the middle between two, so that the levels are symmetric and none is 0;
            with 1 bit they are ``-scale / 2`` and ``scale / 2``. ``"affine"``: the same codes, zero at any real number, so that
            a range far from 0 is covered without a level at 0; for activations. ``"ternary"``, with ``bits=2``: the codes -1, 0 and 1,
            zero at 0, of which five take a byte.
        group: With ``axis=0``: this many neighbours in an output channel have a scale of their own. None is all of them. With
            ``axis=-1``: so do this many neighbouring features of each token (``by_token``), or as many as divide them (``divided``).
        powers: Scales are powers of 2, the next above what covers the range: a change of scale is a shift, and 8 bits hold a scale.

    Raises:
        ValueError: ``bits`` or ``group`` out of range, an unknown kind, a symmetric grid of 1 bit, a ternary one of other than 2, or
            ``powers`` where the zero moves.

    Examples:
        >>> grid = Grid(2, kind="unsigned")
        >>> fake(torch.tensor([0.1, 0.6, 2.0]), grid, torch.tensor(1 / 3))
        tensor([0.0000, 0.6667, 1.0000])
    """

    bits: int
    axis: int | None = None
    kind: Kind = "symmetric"
    group: int | None = None
    powers: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.bits, int) and 1 <= self.bits <= 8):
            raise ValueError(f"Grid: bits {self.bits!r}; expected an integer from 1 to 8.")
        if self.kind not in get_args(Kind):
            raise ValueError(f"Grid: kind {self.kind!r}; expected one of {', '.join(get_args(Kind))}.")
        if self.kind == "symmetric" and self.bits == 1:
            raise ValueError("Grid: a symmetric grid of 1 bit has the levels -1 and 0; expected kind='midrise'.")
        if self.kind == "ternary" and self.bits != 2:
            raise ValueError(f"Grid: a ternary grid of {self.bits} bits; expected bits=2, for three levels.")
        if self.group is not None and (self.axis not in (0, -1) or self.group < 1):
            raise ValueError(
                f"Grid: group {self.group!r} with axis {self.axis!r}; expected 1 or more with axis=0, or axis=-1 for tokens."
            )
        if self.powers and self.moves:
            raise ValueError(f"Grid: powers=True with kind {self.kind!r}; expected a kind whose zero stays.")

    @property
    def low(self) -> int:
        """The lowest code."""
        if self.kind == "ternary":
            return -1
        return -(2 ** (self.bits - 1)) if self.kind == "symmetric" else 0

    @property
    def high(self) -> int:
        """The highest code."""
        return 1 if self.kind == "ternary" else self.low + 2**self.bits - 1

    @property
    def width(self) -> float:
        """The bits of a code, as ``pack`` takes them: 1.58 with three levels."""
        return TERNARY if self.kind == "ternary" else self.bits

    @property
    def middle(self) -> float:
        """Where zero lies, unless the grid is asymmetric."""
        return self.high / 2 if self.kind == "midrise" else 0.0

    @property
    def moves(self) -> bool:
        """Whether zero is found with the scale."""
        return self.kind in ("asymmetric", "affine")

    def options(self) -> dict[str, Any]:
        """The arguments that build this grid again."""
        return asdict(self)

    def by_token(self, x: Float[Tensor, "..."], axis: int = -1) -> Scaled:
        """The grid with a scale for each position of ``x``, or for each group of its features, by their range: dynamic quantisation.

        Args:
            x: Values.
            axis: The axis of the features; the last with groups.

        Examples:
            >>> Grid(8).by_token(torch.tensor([[1.27, 0.5], [-12.8, 0.0]])).scale
            tensor([[0.0100],
                    [0.1000]])
        """
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        grid = self if self.group is None else self.divided(x.shape[-1])
        if grid.group is not None:
            lowest, highest = grid.grouped(x).aminmax(dim=-1)
        else:
            lowest, highest = x.aminmax(dim=axis, keepdim=True)
        return Scaled(grid, *grid.cover(lowest, highest))

    def divided(self, across: int) -> Grid:
        """The grid with groups that divide this many values: of the largest divisor up to ``group``, and none where that is below 16
        or all of them.

        Examples:
            >>> [Grid(4, 0, group=64).divided(n).group for n in (64, 96, 128, 67)]
            [None, 48, 64, None]
        """
        if self.group is None:
            return self
        size = next(d for d in range(min(self.group, across), 0, -1) if across % d == 0)
        if size < across and size >= min(self.group, FEWEST):
            return replace(self, group=size)
        return replace(self, group=None, axis=None if self.axis == -1 else self.axis)

    def fit(self, x: Float[Tensor, "..."], by: By | Measure = "minmax", power: float = 2.0) -> Scaled:
        """The grid with scales that suit ``x``.

        Args:
            x: Values.
            by: ``"minmax"``: the whole range is covered. A number: this percentile of each side is, such as 99.9.
                ``"mse"``: the part of the range with the least squared error of rounding. A function: the part with the
                least of what it makes of the differences by rounding, [scales, values], for each scale.
            power: With ``"mse"``: the power of the error, 2 for the square; more for outliers.

        Raises:
            ValueError: Unknown ``by``, no values, values that are not finite, or a group that does not divide a channel.
        """
        rows = self.rows(x.detach())
        if not rows.numel() or not bool(rows.isfinite().all()):
            raise ValueError(
                f"Grid.fit: {'no values' if not rows.numel() else 'values that are not finite'}; expected finite ones."
            )
        if by in ("minmax", "mse") or callable(by):
            lowest, highest = rows.amin(1), rows.amax(1)
        elif isinstance(by, int | float) and 50 < by <= 100:
            few = rows.shape[1] + 1 - max(1, round(by / 100 * rows.shape[1]))  # at each end, with the percentile itself
            lowest = rows.topk(few, largest=False, sorted=False).values.amax(1)
            highest = rows.topk(few, sorted=False).values.amin(1)
        else:
            raise ValueError(f"Grid.fit: by={by!r}; expected 'minmax', 'mse' or a percentile above 50 and at most 100.")
        if by == "mse" or callable(by):
            best = torch.full_like(lowest, torch.inf)
            share = torch.ones_like(lowest)
            some = 1 if callable(by) else max(1, SEARCHED // rows.numel())  # ranges at a time
            for first in range(RATIOS, 0, -some):
                steps = torch.arange(first, max(first - some, 0), -1).to(rows)[:, None]
                scale, zero = self.cover(lowest * steps / RATIOS, highest * steps / RATIOS)
                codes = (rows / scale[..., None] + zero[..., None]).round().clamp(self.low, self.high)
                off = (codes - zero[..., None]) * scale[..., None] - rows
                error, at = (by(off[0])[None] if callable(by) else off.abs().pow(power).sum(-1)).min(0)
                share = torch.where(error < best, (first - at) / RATIOS, share)
                best = torch.minimum(error, best)
            lowest, highest = lowest * share, highest * share
        scale, zero = self.cover(lowest, highest)
        shape = self.shape(x)
        return Scaled(self, scale.view(shape), zero.view(shape))

    def cover(self, lowest: Tensor, highest: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero with which the codes reach from ``lowest`` to ``highest``."""
        if self.kind == "asymmetric":
            lowest, highest = lowest.clamp_max(0), highest.clamp_min(0)
            scale = ((highest - lowest) / self.high).clamp_min(LEAST)
            return scale, (-lowest / scale).round()
        if self.kind == "affine":
            scale = ((highest - lowest) / self.high).clamp_min(LEAST)
            return scale, -lowest / scale
        if self.kind == "midrise":
            scale = torch.maximum(lowest.abs(), highest.abs()) / self.middle
        elif self.low:
            scale = torch.maximum(lowest / self.low, highest / self.high)
        else:
            scale = highest / self.high
        scale = scale.clamp_min(LEAST)
        return next_power(scale) if self.powers else scale, torch.full_like(scale, self.middle)

    def shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of the scales of ``x``: [], [channels] or [channels, groups]; [..., groups] for tokens."""
        if self.axis is None:
            return ()
        if self.group is None:
            return (x.shape[self.axis],)
        if self.axis == -1:
            return (*x.shape[:-1], x.shape[-1] // self.group)
        across = x[0].numel()
        if across % self.group:
            raise ValueError(
                f"Grid: {across} values in a channel of {tuple(x.shape)}; expected a multiple of group={self.group}."
            )
        return (x.shape[0], across // self.group)

    def rows(self, x: Tensor) -> Tensor:
        """``x`` as [scales, values], in 32 bits at least."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.axis is None:
            return x.reshape(1, -1)
        return x.movedim(self.axis, 0).reshape(math.prod(self.shape(x)), -1)

    def spread(self, scale: Tensor, x: Tensor) -> Tensor:
        """Scales in a shape that broadcasts against ``x``, or against its groups (see ``grouped``)."""
        if self.axis is None:
            return scale
        if self.group is not None:
            return scale[..., None]
        return scale.view([-1 if i == self.axis % x.ndim else 1 for i in range(x.ndim)])

    def grouped(self, x: Tensor) -> Tensor:
        """``x`` as [channels, groups, values] if the grid has groups."""
        return x.reshape(*self.shape(x), -1) if self.group is not None else x


@dataclass(frozen=True)
class Scaled:
    """A grid with its scales.

    Args:
        grid: The grid.
        scale: Positive; [], [channels] or [channels, groups], as the grid says.
        zero: The code that means zero, in the same shape.
    """

    grid: Grid
    scale: Tensor
    zero: Tensor

    def codes(self, x: Float[Tensor, "..."]) -> Integer[Tensor, "..."]:
        """The nearest codes: int8 on a symmetric or ternary grid, else uint8. Halves go to the even code."""
        grid, wide = self.grid, x.to(torch.promote_types(x.dtype, torch.float32))
        found = grid.grouped(wide) / grid.spread(self.scale, x) + grid.spread(self.zero, x)
        found = found.round().clamp(grid.low, grid.high).view(x.shape)
        return found.to(torch.int8 if grid.low else torch.uint8)

    def values(self, codes: Integer[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The values of codes, in the type of the scales."""
        grid, wide = self.grid, torch.promote_types(self.scale.dtype, torch.float32)
        found = grid.grouped(codes.to(wide)) - grid.spread(self.zero, codes)
        return (found * grid.spread(self.scale, codes)).view(codes.shape).to(self.scale.dtype)

    def fake(self, x: Float[Tensor, "..."], rounding: Rounding = "nearest") -> Float[Tensor, "..."]:
        """``x`` on the grid; see ``fake``."""
        return fake(x, self.grid, self.scale, self.zero, rounding=rounding)

    def to(self, where: Tensor | torch.device) -> Scaled:
        """The same on a device, or on a tensor's device in its type, in which no scale becomes zero."""
        scale = self.scale.to(where)
        return Scaled(self.grid, scale.clamp_min(torch.finfo(scale.dtype).tiny), self.zero.to(where))


def fake(
    x: Float[Tensor, "..."],
    grid: Grid,
    scale: Tensor,
    zero: Tensor | None = None,
    *,
    rounding: Rounding = "nearest",
) -> Float[Tensor, "..."]:
    """Round to the grid, and let gradients pass as if nothing had been rounded: zero outside the range, one inside.

    Args:
        x: Values.
        grid: The grid.
        scale: Its scales.
        zero: The codes that mean zero; needed for an asymmetric grid only.
        rounding: ``"nearest"``: halves go to the even code; the scale gets no gradient. ``"learned"``: the same, and the scale
            gets the gradient of learned step sizes (LSQ, Esser et al. 2020): ``code - x / scale`` inside the range,
            the lowest or highest code outside, over the square root of (values of a scale x highest code).
            ``"stochastic"``: up with a probability of the part after the point, so that the mean is exact inside the range.

    Raises:
        ValueError: Unknown rounding, or an asymmetric grid without ``zero``.

    Examples:
        >>> x = torch.tensor([0.4, 5.0], requires_grad=True)
        >>> y = fake(x, Grid(3), torch.tensor(1.0))
        >>> y.sum().backward()
        >>> y.tolist(), x.grad.tolist()
        ([0.0, 3.0], [1.0, 0.0])
    """
    if rounding not in get_args(Rounding):
        raise ValueError(f"fake: rounding {rounding!r}; expected one of {', '.join(get_args(Rounding))}.")
    if zero is None and grid.moves:
        raise ValueError(f"fake: an {grid.kind} grid needs zero=; pass what Grid.fit found.")
    held = scale.detach()
    if rounding == "learned":
        held = held + (scale - held) / (x.numel() / scale.numel() * grid.high) ** 0.5
    step = grid.spread(held, x)
    offset: Tensor | float = grid.middle if zero is None else grid.spread(zero.detach(), x)
    wide = grid.grouped(x.to(torch.promote_types(x.dtype, torch.float32)))
    exact = (wide / step + offset).clamp(grid.low, grid.high)
    if rounding == "stochastic":
        whole = straight(exact, (exact + torch.rand_like(exact)).floor().clamp(grid.low, grid.high))
    else:
        whole = straight(exact, exact.round())
    return ((whole - offset) * step).view(x.shape).to(x.dtype)


def straight(exact: Tensor, rounded: Tensor) -> Tensor:
    """``rounded``, to the last bit, with the gradient of ``exact``."""
    return rounded.detach() + (exact - exact.detach())


def next_power(scale: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The next power of 2 that is not below, exactly.

    >>> next_power(torch.tensor([0.3, 0.5, 3.0])).tolist()
    [0.5, 0.5, 4.0]
    """
    mantissa, _ = torch.frexp(scale)
    return torch.where(mantissa == 0.5, scale, scale / mantissa)


def exponents(scale: Float[Tensor, "*shape"]) -> Int8[Tensor, "*shape"]:
    """The exponents of powers of 2, -126 to 127."""
    return (torch.frexp(scale.float())[1] - 1).to(torch.int8)


def powers(exponents: Int8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``2^exponent``, exactly.

    >>> powers(exponents(torch.tensor([0.25, 8.0])))
    tensor([0.2500, 8.0000])
    """
    return ((exponents.to(torch.int32) + 127) << 23).view(torch.float32)


def through(x: Float[Tensor, "..."], grid: Grid, scale: Tensor, zero: Tensor) -> Float[Tensor, "..."]:
    """``x`` on a grid whose scale and zero are learned too.

    Gradients pass the rounding. Those of the scale are LSQ's (Esser et al., arXiv:1902.08153): ``code - x / scale`` inside the
    range, the lowest or highest code less the zero outside. The zero gets minus the scale outside.

    Args:
        x: Values.
        grid: The grid.
        scale: Positive.
        zero: The code that means zero.
    """
    step, zero = grid.spread(scale, x), grid.spread(zero, x)
    wide = grid.grouped(x.to(torch.promote_types(x.dtype, torch.float32)))
    exact = (wide / step + zero).clamp(grid.low, grid.high)
    whole = straight(exact, exact.round())
    return ((whole - zero) * step).view(x.shape).to(x.dtype)


def fake_naive(x: Tensor, scale: float, zero: float, low: int, high: int) -> Tensor:
    """One value after the other."""
    codes = [min(max(round(float(v) / scale + zero), low), high) for v in x.flatten()]
    return torch.tensor([(c - zero) * scale for c in codes]).view(x.shape)


@dataclass(frozen=True)
class LogGrid:
    """A grid for probabilities, whose levels fall by a constant factor: ``value = scale base^-code``; the last code is 0.

    Levels lie close together where most probabilities after a softmax are. With base 2 a level is a shift. With the root of 2 it
    is one too, by a change of base that is exact: ``scale (1 or sqrt(2)) 2^-ceil(code / 2)``, where the factor is ``sqrt(2)`` for
    odd codes.

    Args:
        bits: 2 to 8.
        base: ``"2"`` or ``"sqrt2"``.

    Raises:
        ValueError: ``bits`` out of range, or another base.

    Examples:
        >>> held = LogGrid(3, "sqrt2").fit(torch.tensor([1.0, 0.5]))
        >>> held.codes(torch.tensor([1.0, 0.7, 0.5, 0.01])).tolist(), held.fake(torch.tensor([0.7, 0.01])).tolist()
        ([0, 1, 2, 7], [0.7071067690849304, 0.0])
    """

    bits: int
    base: Literal["2", "sqrt2"] = "2"

    def __post_init__(self) -> None:
        if not (isinstance(self.bits, int) and 2 <= self.bits <= 8) or self.base not in ("2", "sqrt2"):
            raise ValueError(f"LogGrid: bits {self.bits!r}, base {self.base!r}; expected 2 to 8, and '2' or 'sqrt2'.")

    @property
    def kind(self) -> str:
        """The name of the grid, for people."""
        return f"log {self.base}"

    @property
    def high(self) -> int:
        """The last code, which means 0."""
        return 2**self.bits - 1

    def options(self) -> dict[str, Any]:
        """The arguments that build this grid again."""
        return asdict(self)

    def fit(self, x: Float[Tensor, "..."], by: By = "minmax") -> LogScaled:
        """The grid with the scale that suits ``x``; ``by`` is that of ``Grid.fit``."""
        top = Grid(self.bits, kind="unsigned").fit(x, "minmax" if by == "mse" else by).scale * (2**self.bits - 1)
        if by != "mse":
            return LogScaled(self, top)
        wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        tried = [LogScaled(self, top * step / RATIOS) for step in range(RATIOS, 0, -1)]
        return min(tried, key=lambda held: float((held.fake(wide) - wide).square().sum()))


@dataclass(frozen=True)
class LogScaled:
    """A logarithmic grid with its scale, the value of code 0.

    Args:
        grid: The grid.
        scale: Positive, [].
    """

    grid: LogGrid
    scale: Tensor

    def codes(self, x: Float[Tensor, "..."]) -> Integer[Tensor, "..."]:
        """The nearest codes by exponent, as uint8; ``-log(x / scale)`` is rounded."""
        each = 2 if self.grid.base == "sqrt2" else 1
        wide = x.to(torch.promote_types(x.dtype, torch.float32)) / self.scale
        return (-each * wide.clamp_min(2.0**-126).log2()).round().clamp(0, self.grid.high).to(torch.uint8)

    def values(self, codes: Integer[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The values of codes: the scale, by parity times the root of 2, shifted."""
        scale = self.scale.to(torch.promote_types(self.scale.dtype, torch.float32))
        if self.grid.base == "sqrt2":
            shift, scale = (codes.int() + 1) // 2, torch.where(codes % 2 == 1, math.sqrt(2) * scale, scale)
        else:
            shift = codes.int()
        found = scale * torch.ldexp(torch.ones_like(shift, dtype=scale.dtype), -shift)
        return torch.where(codes == self.grid.high, torch.zeros_like(found), found).to(self.scale.dtype)

    def fake(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """``x`` on the grid; gradients pass as if nothing had been rounded."""
        return straight(x, self.values(self.codes(x.detach())).to(x.dtype))

    def to(self, where: Tensor | torch.device) -> LogScaled:
        """The same on a device, or on a tensor's device in its type."""
        return LogScaled(self.grid, self.scale.to(where))


def log_naive(x: Tensor, bits: int, base: float, scale: float) -> Tensor:
    """One value after the other."""
    last = 2**bits - 1
    codes = [last if float(v) <= 0 else round(-math.log(float(v) / scale, base)) for v in x.flatten()]
    return torch.tensor([0.0 if c >= last else scale * base ** -max(c, 0) for c in codes]).view(x.shape)
