"""Linear maps and convolutions whose weights stay packed, in memory and on disk."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int8
from torch import Tensor, nn

from interlayer.core.quantizer.grid import Grid, LogGrid, LogScaled, Scaled, exponents, powers
from interlayer.core.quantizer.packing import bit_product, each, pack, planes, table_product, unpack

CONVOLUTIONS: dict[type[nn.Module], Any] = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
SETTINGS = ("stride", "padding", "dilation", "groups")
FEW = 4  # rows up to which a product by tables takes less time than unpacking the weight


def is_conv1d(layer: nn.Module) -> bool:
    """Whether this is the linear map of GPT-2 and its kin, whose weight is [in, out]."""
    return (type(layer).__module__, type(layer).__name__) == ("transformers.pytorch_utils", "Conv1D")


def weight_of(layer: nn.Module) -> Float[Tensor, "out inputs"]:
    """The weight of a linear map or convolution, outputs first.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return layer.weight
    if is_conv1d(layer):
        transposed: Any = layer.weight
        return transposed.T
    raise ValueError(f"quantizer: {type(layer).__name__}; expected a linear map or a convolution of torch.")


class Held(nn.Module):
    """Scales as buffers."""

    def _hold(self, which: str, held: Scaled | None) -> None:
        """Keep scales as a buffer, or the exponents of powers of 2, and zeros where the grid does not say what they are."""
        if held is None:
            return
        if held.grid.powers:
            self.register_buffer(f"{which}exponent", exponents(held.scale))
            self.register_buffer(
                f"{which}like", held.scale.new_empty(0), persistent=False
            )  # moves and is cast as scales are
        else:
            self.register_buffer(f"{which}scale", held.scale.clone())
        if held.grid.moves:
            self.register_buffer(f"{which}zero", held.zero.clone())

    def _held(self, which: str, grid: Grid) -> Scaled:
        found: Any = self._buffers
        scale = powers(found[f"{which}exponent"]).to(found[f"{which}like"]) if grid.powers else found[f"{which}scale"]
        zero = found.get(f"{which}zero")
        return Scaled(grid, scale, torch.full_like(scale, grid.middle) if zero is None else zero)


class _Map(Held):
    """What stays of a linear map or convolution without its weight: sizes, settings, bias, and the grids."""

    def __init__(self, layer: nn.Module, grid: Grid, inputs: Scaled | Grid | None) -> None:
        super().__init__()
        weight = weight_of(layer)
        self.shape, self.grid, self.dynamic = tuple(weight.shape), grid, isinstance(inputs, Grid)
        self.inputs = inputs.grid if isinstance(inputs, Scaled) else inputs
        bias: Any = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
        self._hold("input_", inputs.to(weight.detach()) if isinstance(inputs, Scaled) else None)
        self.conv = next((call for cls, call in CONVOLUTIONS.items() if isinstance(layer, cls)), None)
        if self.conv is not None:
            self.settings = {key: getattr(layer, key) for key in SETTINGS}
            self.mode = str(layer.padding_mode)
            self.around: Any = layer._reversed_padding_repeated_twice
            if self.mode != "zeros":
                self.settings["padding"] = 0

    @property
    def packed_weights(self) -> int:
        """Weights that are codes, and no parameters."""
        return math.prod(self.shape)

    @property
    def weights(self) -> Scaled:
        """The grid of the weight, with its scales."""
        return self._held("", self.grid)

    def scaled_inputs(self, x: Tensor) -> Scaled | None:
        """The grid of the inputs with its scale, or the scales of ``x`` where they are found in the call."""
        if self.inputs is None:
            return None
        return self.inputs.by_token(x, axis_of(self.shape)) if self.dynamic else self._held("input_", self.inputs)

    def before(self, x: Tensor) -> Tensor:
        """What inputs pass before they are rounded; nothing here."""
        return x

    def call(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer with float weights."""
        if self.conv is None:
            return F.linear(x, weight, self.bias)
        if self.mode != "zeros":
            x = F.pad(x, self.around, mode=self.mode)
        return self.conv(x, weight, self.bias, **self.settings)

    def expect(self, x: Tensor) -> None:
        """Raise ValueError where the inputs have another number of features."""
        axis = axis_of(self.shape)
        wanted = self.shape[1] * (1 if self.conv is None else self.settings["groups"])
        if x.ndim < -axis or x.shape[axis] != wanted:
            raise ValueError(
                f"{type(self).__name__}: input {tuple(x.shape)}; expected {wanted} features on axis {axis}."
            )

    def structure(self) -> dict[str, Any]:
        """The grids, as ``restore`` needs them."""
        inputs = None if self.inputs is None else self.inputs.options()
        found = {"kind": type(self).__name__, "grid": self.grid.options(), "inputs": inputs}
        return {**found, "dynamic": self.dynamic, "bias": self.bias is not None}

    def extra_repr(self) -> str:
        """The shape and the grids."""
        inputs = "" if self.inputs is None else f", inputs={self.inputs.bits} bits {self.inputs.kind}"
        inputs += " by token" if self.dynamic else " by channel" if self.inputs and self.inputs.axis is not None else ""
        return f"{list(self.shape)}, {self.grid.bits} bits {self.grid.kind}{inputs}"


class Packed(_Map):
    """A linear map or convolution with packed weights.

    Without a grid for inputs, the weights are unpacked to floats in every call. With one, inputs are rounded to it; a linear
    map whose inputs have no scales by channel then multiplies 8-bit integers, one product for each group of weights, and all
    others multiply the rounded floats.

    Memory: ``bits`` of 1, 1.6 (a ternary grid), 2, 4 or 8 a weight (3 take 4, 5 to 7 take 8), and one scale and one zero in the type
    of the weights for each channel or group; while it runs, the unpacked weight of this one layer too.

    Args:
        layer: ``nn.Linear``, ``nn.Conv1d`` to ``nn.Conv3d``, or transformers' ``Conv1D``. It is not changed.
        weights: The grid of its weight (outputs first) with scales. A ``Grid`` is fitted to the weight by its range.
        codes: The codes of its weight, if they are not the nearest ones.
        inputs: The grid of the inputs with its scale, one for the whole tensor or one for each feature, if they are rounded. A
            ``Grid`` alone rounds them by token: the scale of each position is found in the call; with ``axis=-1`` and groups, that of
            each group of its features.
        table: Multiply up to 4 rows by ``table_product``, as when a text is generated; more are multiplied with the unpacked weight, and
            all are where the model is compiled or exported. The last bits of the outputs differ.

    Shapes: those of ``layer``.

    Raises:
        ValueError: Another layer, grids with other axes, inputs of another width, or ``table`` with a convolution, groups, 8 bits
            or rounded inputs.

    Examples:
        >>> layer = nn.Linear(64, 16)
        >>> small = Packed(layer, Grid(4, axis=0))
        >>> small.codes.numel(), torch.equal(small(torch.ones(2, 64)), F.linear(torch.ones(2, 64), small.weight, layer.bias))
        (512, True)
    """

    codes: Tensor

    def __init__(
        self,
        layer: nn.Module,
        weights: Grid | Scaled,
        *,
        codes: Tensor | None = None,
        inputs: Scaled | Grid | None = None,
        table: bool = False,
    ) -> None:
        grid = weights.grid if isinstance(weights, Scaled) else weights
        super().__init__(layer, grid, inputs)
        if table and (self.conv or grid.group or inputs is not None or each(grid.width) == 1):
            raise ValueError(
                f"Packed: table=True with {type(layer).__name__}, {grid}, inputs {inputs}; expected a linear map of at most 4 "
                "bits, without groups and rounded inputs. Leave out table."
            )
        self.table = table
        weight = weight_of(layer).detach()
        _check(type(self).__name__, grid, inputs, axis_of(self.shape))
        held = (weights if isinstance(weights, Scaled) else weights.fit(weight)).to(weight)
        codes = held.codes(weight) if codes is None else codes
        self.register_buffer("codes", pack(codes.flatten(1).short() - grid.low, grid.width))
        self._hold("", held)

    def integers(self) -> Int8[Tensor, "..."]:
        """The codes of the weight less ``shift(grid)``, which fit into 8 signed bits."""
        found = unpack(self.codes, self.grid.width, math.prod(self.shape[1:])).view(self.shape)
        return (found.short() + (self.grid.low - shift(self.grid))).to(torch.int8)

    @property
    def weight(self) -> Float[Tensor, "out ..."]:
        """The weight as floats."""
        codes = self.integers().short() + shift(self.grid)
        return self.weights.values(codes)

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Multiply."""
        self.expect(x)
        x = self.before(x)
        inputs = self.scaled_inputs(x)
        if inputs is None:
            few = self.table and not torch.compiler.is_compiling() and x[..., 0].numel() <= FEW
            return self.by_table(x) if few else self.call(x, self.weight)
        if self.floats or x.requires_grad:
            return self.call(inputs.fake(x), self.weight)
        return self.product(x, inputs)

    @property
    def floats(self) -> bool:
        """Whether rounded floats are multiplied, as in a convolution or with scales by channel, and no integers."""
        return self.conv is not None or (self.inputs is not None and self.inputs.axis is not None and not self.dynamic)

    def by_table(self, x: Float[Tensor, "*rows inputs"]) -> Float[Tensor, "*rows out"]:
        """``s_w (sum x (c - low) + (low - z) sum x)``, on packed codes."""
        held, rows = self.weights, x.reshape(-1, x.shape[-1]).float()
        found = table_product(rows, self.codes, self.grid.width)
        back = self.grid.low - held.zero.float()
        found = (found + back * rows.sum(1, keepdim=True)) * held.scale.float()
        found = found if self.bias is None else found + self.bias
        return found.view(*x.shape[:-1], self.shape[0]).to(x.dtype)

    def structure(self) -> dict[str, Any]:
        """The grids, as ``restore`` needs them."""
        return {**super().structure(), "table": self.table}

    def product(self, x: Float[Tensor, "*rows inputs"], inputs: Scaled) -> Float[Tensor, "*rows out"]:
        """``s_x sum_g s_w,g sum (c_x - z_x)(c_w - z_w,g)``: a product of 8-bit integers for each group, and sums for the zeros."""
        weight, weights = self.integers(), self.weights
        wide = torch.promote_types(weights.scale.dtype, torch.float32)
        codes = (inputs.codes(x).short() - shift(inputs.grid)).to(torch.int8).reshape(-1, x.shape[-1])
        # [rows or outputs, groups, members]; a value is its scale times (integer + back), and back is 0 on a symmetric grid.
        size = self.grid.group or inputs.grid.group or x.shape[-1]
        codes, weight = codes.unflatten(1, (-1, size)), weight.unflatten(1, (-1, size))
        groups = weight.shape[1]
        scale_w = weights.scale.to(wide).reshape(-1, groups if self.grid.group else 1).expand(-1, groups)
        back_w = shift(self.grid) - weights.zero.to(wide).reshape(-1, groups if self.grid.group else 1).expand(
            -1, groups
        )
        scale_x, back_x = inputs.scale.to(wide), shift(inputs.grid) - inputs.zero.to(wide)
        if self.dynamic:
            scale_x, back_x = (t.reshape(-1, t.shape[-1]).expand(-1, groups) for t in (scale_x, back_x))
        found: Tensor | float = 0.0
        for k in range(groups):
            s, back = (t[:, k, None] if self.dynamic else t for t in (scale_x, back_x))
            part = integer_product(codes[:, k], weight[:, k]).to(wide)
            if inputs.grid.kind != "symmetric":
                part = part + back * weight[:, k].sum(1, dtype=torch.int32)
            if self.grid.kind != "symmetric":
                part = part + back_w[:, k] * (codes[:, k].sum(1, dtype=torch.int32)[:, None] + back * size)
            found = found + part * (s * scale_w[:, k])
        assert isinstance(found, Tensor)
        if self.bias is not None:
            found = found + self.bias
        return found.view(*x.shape[:-1], self.shape[0]).to(x.dtype)


class BitMap(_Map):
    """A linear map or 2-d convolution by ``and`` and bit counts, for weights and inputs of few bits.

    The outputs are those of the float convolution of the integers, exactly (bits are counted, nothing is rounded), times the
    two scales. Cost: ``bits(weights) x bits(inputs) x ceil(channels / 64)`` words for every output and kernel position.

    Args:
        layer: ``nn.Linear`` or ``nn.Conv2d`` with zero padding. It is not changed.
        weights: The grid of its weight with scales, without groups.
        codes: The codes of its weight, if they are not the nearest ones.
        inputs: The grid of the inputs with its scale, ``"unsigned"``, so that the padding is a code.

    Shapes: those of ``layer``.

    Raises:
        ValueError: Another layer or another grid.

    Examples:
        >>> layer, eighths = nn.Conv2d(3, 4, 3, padding=1), Scaled(Grid(2, kind="unsigned"), torch.tensor(0.25), torch.tensor(0.0))
        >>> by_bits = BitMap(layer, Grid(1, 0, "midrise"), inputs=eighths)
        >>> x = torch.rand(2, 3, 5, 5)
        >>> torch.allclose(by_bits(x), Packed(layer, Grid(1, 0, "midrise"), inputs=eighths)(x), atol=1e-5)
        True
    """

    words: Tensor

    def __init__(
        self, layer: nn.Module, weights: Grid | Scaled, *, inputs: Scaled, codes: Tensor | None = None
    ) -> None:
        grid = weights.grid if isinstance(weights, Scaled) else weights
        super().__init__(layer, grid, inputs)
        _check("BitMap", grid, inputs)
        if not isinstance(layer, nn.Linear | nn.Conv2d) or (self.conv is not None and self.mode != "zeros"):
            raise ValueError(
                f"BitMap: {layer}; expected nn.Linear or nn.Conv2d with zero padding. Use Packed for other layers."
            )
        if grid.group is not None or grid.low or inputs.grid.kind != "unsigned" or inputs.grid.axis is not None:
            raise ValueError(
                f"BitMap: weights {grid}, inputs {inputs.grid}; expected weights without groups on a grid other than "
                "symmetric, and inputs on an unsigned one. Use Packed for other grids."
            )
        weight = weight_of(layer).detach()
        held = (weights if isinstance(weights, Scaled) else weights.fit(weight)).to(weight)
        codes = held.codes(weight) if codes is None else codes
        last = codes.movedim(1, -1)  # [O, C] or [O, kh, kw, C]: words hold neighbouring channels
        self.register_buffer("words", planes(last, grid.bits))
        self._hold("", held)

    @property
    def weight(self) -> Float[Tensor, "out ..."]:
        """The weight as floats."""
        bits = (self.words[..., None] >> torch.arange(64, device=self.words.device)) & 1
        places = torch.arange(self.grid.bits, device=self.words.device)[:, None]
        codes = (bits.flatten(-2) << places).sum(-2)[..., : self.shape[1]].movedim(-1, 1)
        return self.weights.values(codes)

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Round the inputs, count bits and scale. Inputs get no gradient."""
        self.expect(x)
        inputs = self.scaled_inputs(x)
        assert inputs is not None
        codes = inputs.codes(x.detach())
        counted = self.count(codes)
        scale = (inputs.scale * self.weights.scale).float()
        found = counted * (scale if self.conv is None else scale[..., None, None])
        if self.bias is not None:
            found = found + (self.bias if self.conv is None else self.bias[:, None, None])
        return found.to(x.dtype)

    def count(self, codes: Tensor) -> Float[Tensor, "..."]:
        """``sum c_x (c_w - z_w)`` over the codes of the inputs, exact as long as the sum has fewer than 24 bits."""
        assert self.inputs is not None
        bits, zero = self.inputs.bits, self.weights.zero.float()
        if self.conv is None:
            return (
                bit_product(planes(codes, bits)[..., None, :, :], self.words)
                - zero * codes.sum(-1, dtype=torch.int64)[..., None]
            )
        codes = F.pad(codes, self.around)
        groups, (sh, sw), (dh, dw) = self.settings["groups"], self.settings["stride"], self.settings["dilation"]
        kh, kw = self.shape[2:]
        height = (codes.shape[-2] - dh * (kh - 1) - 1) // sh + 1
        width = (codes.shape[-1] - dw * (kw - 1) - 1) // sw + 1
        by_group = codes.unflatten(-3, (groups, -1)).movedim(-3, -1)  # [B, G, H, W, C]
        words = planes(by_group, bits)[:, :, :, :, None]
        sums = by_group.sum(-1, dtype=torch.int64)
        weight = self.words.unflatten(0, (groups, -1))
        found: Tensor | int = 0
        inside: Tensor | int = 0
        for i in range(kh):
            for j in range(kw):
                rows = slice(i * dh, i * dh + sh * (height - 1) + 1, sh)
                columns = slice(j * dw, j * dw + sw * (width - 1) + 1, sw)
                at = weight[:, :, i, j][:, None, None]  # [G, 1, 1, O, bits, words]
                found = found + bit_product(words[:, :, rows, columns], at)
                inside = inside + sums[:, :, rows, columns, None]
        zero = zero if not zero.ndim else zero.view(groups, 1, 1, -1)
        return (found - zero * inside).movedim(-1, 2).flatten(1, 2)


class Round(nn.Module):
    """Round activations, where no layer with a weight does: the operands of attention, for one.

    Args:
        to: A grid with its scale, or a ``Grid`` whose scale is found in the call for each position of the last axis but one.

    Shapes: any to the same.

    Examples:
        >>> Round(LogGrid(4, "sqrt2").fit(torch.ones(1)))(torch.tensor([1.0, 0.7, 0.001]))
        tensor([1.0000, 0.7071, 0.0000])
    """

    def __init__(self, to: Scaled | LogScaled | Grid) -> None:
        super().__init__()
        self.dynamic = isinstance(to, Grid)
        self.grid: Grid | LogGrid = to if isinstance(to, Grid) else to.grid
        if not isinstance(to, Grid):
            self.register_buffer("scale", to.scale.clone())
        if isinstance(to, Scaled):
            self.register_buffer("zero", to.zero.clone())

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Round to the nearest level."""
        grid, found = self.grid, self._buffers
        if isinstance(grid, LogGrid):
            return LogScaled(grid, found["scale"]).fake(x)  # type: ignore[arg-type]
        return (grid.by_token(x) if self.dynamic else Scaled(grid, found["scale"], found["zero"])).fake(x)  # type: ignore[arg-type]

    def structure(self) -> dict[str, Any]:
        """As ``restore`` needs it."""
        shape = [] if self.dynamic else list(self._buffers["scale"].shape)  # type: ignore[union-attr]
        return {"kind": "Round", "grid": self.grid.options(), "dynamic": self.dynamic, "shape": shape}

    @classmethod
    def hollow(cls, given: Mapping[str, Any], like: Tensor) -> Round:
        """One whose numbers come from a file."""
        options, shape = given["grid"], given["shape"]
        if "base" in options:
            return cls(LogScaled(LogGrid(**options), like.new_ones(shape)))
        grid = Grid(**options)
        return cls(grid if given["dynamic"] else Scaled(grid, like.new_ones(shape), like.new_zeros(shape)))

    def extra_repr(self) -> str:
        """The grid."""
        return f"{self.grid.bits} bits {self.grid.kind}{' by token' if self.dynamic else ''}"


class Bound(nn.Module):
    """Bring activations into 0 to 1, the range of an unsigned grid: ``min(max(x, 0), 1)``, or ``min(|x|, 1)`` folded.

    >>> Bound()(torch.tensor([-0.5, 3.0])), Bound(fold=True)(torch.tensor([-0.5, 3.0]))
    (tensor([0., 1.]), tensor([0.5000, 1.0000]))
    """

    def __init__(self, *, fold: bool = False) -> None:
        super().__init__()
        self.fold = fold

    def forward(self, x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Clip."""
        return x.abs().clamp_max(1) if self.fold else x.clamp(0, 1)

    def structure(self) -> dict[str, Any]:
        """As ``restore`` needs it."""
        return {"kind": "Bound", "fold": self.fold}


def axis_of(shape: tuple[int, ...]) -> int:
    """The axis of the inputs that holds the features of a layer whose weight has this shape."""
    return -1 if len(shape) == 2 else 1 - len(shape)


def biased(layer: nn.Module) -> nn.Module:
    """The layer, or a copy with a bias of zeros that shares its weight if it has none."""
    if layer.bias is not None:
        return layer
    weight = weight_of(layer)
    new = copy.copy(layer)
    new._parameters = dict(layer._parameters) | {"bias": nn.Parameter(weight.new_zeros(len(weight)))}
    return new


def shift(grid: Grid) -> int:
    """What makes the codes of a grid fit into signed integers of 8 bits."""
    return 128 if grid.high > 127 else 0


def integer_product(a: Int8[Tensor, "m k"], b: Int8[Tensor, "n k"]) -> Tensor:
    """``a @ b.T`` in 32-bit integers, exactly. CUDA's kernel wants multiples of 8, and more than 16 rows."""
    if a.device.type != "cuda":
        return torch._int_mm(a, b.T)
    m, n, k = a.shape[0], b.shape[0], -a.shape[1] % 8
    a, b = F.pad(a, (0, k, 0, max(0, 17 - m))), F.pad(b, (0, k, 0, -n % 8))
    return torch._int_mm(a, b.T)[:m, :n]


def _check(name: str, grid: Grid, inputs: Scaled | Grid | None, features: int | None = None) -> None:
    if grid.axis not in (None, 0) or grid.kind == "affine":
        raise ValueError(
            f"{name}: weights with axis={grid.axis}, kind={grid.kind!r}; expected None or 0, the output channels, and zero at a code."
        )
    axis = None if inputs is None else inputs.axis if isinstance(inputs, Grid) else inputs.grid.axis
    if isinstance(inputs, Grid) and inputs.group is not None and features == -1:
        if grid.group not in (None, inputs.group):
            raise ValueError(
                f"{name}: groups of {grid.group} weights and of {inputs.group} inputs; expected as many, or one of them None."
            )
        return
    if axis is not None and (isinstance(inputs, Grid) or axis != features):
        wanted = "None, one scale for all" + ("" if features is None else f", or {features}, the features")
        raise ValueError(f"{name}: inputs with axis={axis}; expected {wanted}.")
