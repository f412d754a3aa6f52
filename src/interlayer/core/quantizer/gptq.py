"""Rounding column by column, where what is still to be rounded makes up for the errors so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Tensor, nn

from interlayer.core import taps
from interlayer.core.blockwise import Part
from interlayer.core.quantizer.grid import Scaled
from interlayer.core.quantizer.reconstruct import Found, Solve, wide

WIDTH = 128  # columns whose errors reach the rest of the weight in one product


def gptq(*, damp: float = 0.01) -> Solve:
    """Choose codes by GPTQ: Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers,
    arXiv:2210.17323. The layers of a block are rounded one by one, each on inputs that the block gets.

    Memory: for each layer of a block a matrix of [inputs, inputs]. Time: cubic in the inputs of a layer.

    Args:
        damp: What is added to the diagonal of that matrix, as a share of its mean.
    """

    def solve(part: Part, there: Mapping[str, nn.Module], held: Mapping[str, Scaled]) -> Found:
        found: Found = {}
        for name, moment in moments(part, there).items():
            weight = wide(there[name])
            codes, _ = columns(weight.flatten(1), moment, held[name], damp=damp)
            found[name] = held[name], codes.view(weight.shape)
        return found

    return solve


def columns(
    weight: Float[Tensor, "out inputs"],
    moment: Float[Tensor, "groups inputs inputs"],
    held: Scaled,
    *,
    damp: float = 0.01,
) -> tuple[Integer[Tensor, "out inputs"], Float[Tensor, "out inputs"]]:
    """Codes of a weight: round a column, and spread its error over the columns to come. Also what each column was when its turn came.

    With U the upper Cholesky factor of the inverse of ``moment``, column q is rounded to the nearest code, and each column
    j > q moves by ``-(w_q - round(w_q)) U_qj / U_qq``, by blocks of columns.

    Args:
        weight: Outputs first.
        moment: ``X X^T`` of the inputs, for each group of outputs (1 but for grouped convolutions).
        held: The grid with its scales.
        damp: See ``gptq``.
    """
    grid, groups = held.grid, len(moment)
    scale = grid.spread(held.scale, weight).expand_as(grid.grouped(weight)).reshape(groups, -1, weight.shape[1])
    zero = grid.spread(held.zero, weight).expand_as(grid.grouped(weight)).reshape(groups, -1, weight.shape[1])
    rest = weight.clone().view(groups, -1, weight.shape[1])
    moment = moment.to(torch.float64).clone()
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    idle = diagonal == 0  # inputs that were never there
    diagonal += idle.to(diagonal) + damp * diagonal.mean(-1, keepdim=True)
    rest.masked_fill_(idle[:, None], 0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moment))
    factor = torch.linalg.cholesky(inverse, upper=True).to(weight)
    codes, moved = torch.empty_like(rest), torch.empty_like(rest)
    for start in range(0, weight.shape[1], WIDTH):
        end = min(start + WIDTH, weight.shape[1])
        errors = torch.empty_like(rest[..., start:end])
        for q in range(start, end):
            code = (rest[..., q] / scale[..., q] + zero[..., q]).round().clamp(grid.low, grid.high)
            codes[..., q], moved[..., q] = code, rest[..., q]
            left = (rest[..., q] - (code - zero[..., q]) * scale[..., q]) / factor[:, q, q, None]
            rest[..., q:end] -= left[..., None] * factor[:, None, q, q:end]
            errors[..., q - start] = left
        rest[..., end:] -= errors @ factor[:, start:end, end:]
    return codes.view(weight.shape).to(torch.int8 if grid.low else torch.uint8), moved.view(weight.shape)


def moments(
    part: Part,
    there: Mapping[str, nn.Module],
    *,
    watch: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> dict[str, Float[Tensor, "groups inputs inputs"]]:
    """The mean of ``x x^T`` over all inputs x of each layer of a block. The identity, for nearest codes, where nobody calls a layer.

    Args:
        part: The block.
        there: Its layers.
        watch: Makes the context in which each batch runs.

    Raises:
        ValueError: A convolution with other than 1 or 2 axes.
    """
    found: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()
    names = {id(m): n for n, m in there.items()}
    root = nn.ModuleList([part.block])  # a block may be a layer itself
    for index in range(len(part.inputs)):
        at = taps.read(root, lambda n, m: id(m) in names, side="input", every=True)
        with torch.no_grad(), at as seen, watch():
            part.run(index)
        for place, values in seen.items():
            layer = root.get_submodule(place)
            rows = torch.cat([patches(layer, v) for v in values], 1)
            name = names[id(layer)]
            found[name] = found.get(name, torch.zeros((), device=rows.device)) + rows.mT @ rows
            counts[name] += rows.shape[1]
    found = {n: total / counts[n] for n, total in found.items()}
    for name in there.keys() - found.keys():  # its weight is read, but it is not called: its columns are alike
        count = wide(there[name])[0].numel()
        found[name] = torch.eye(count, device=wide(there[name]).device)[None]
    return found


def patches(layer: nn.Module, x: Tensor) -> Float[Tensor, "groups rows inputs"]:
    """What each output of a layer is computed from, as rows."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if not isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return x.reshape(1, -1, x.shape[-1])
    if isinstance(layer, nn.Conv3d):
        raise ValueError(
            f"gptq: {layer}; expected linear maps and convolutions with 1 or 2 axes. Leave it out with at=."
        )
    around: Any = layer._reversed_padding_repeated_twice
    x = F.pad(x, around, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    flat = isinstance(layer, nn.Conv1d)
    sizes = [(1, *s) if flat else s for s in (layer.kernel_size, layer.dilation, layer.stride)]
    rows = F.unfold(x.unsqueeze(-2) if flat else x, sizes[0], dilation=sizes[1], stride=sizes[2])  # [B, C kh kw, L]
    return rows.unflatten(1, (layer.groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
