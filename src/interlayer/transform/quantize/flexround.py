"""FlexRound: rounding of trained weights by a learned division, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.blockwise import Prefix
from interlayer.core.example import Example, tiny_convnet, tiny_gpt2
from interlayer.core.kinds import Plan, Transform
from interlayer.core.quantizer import Grid, Rounder, Scaled, learned, reconstruct, straight
from interlayer.core.quantizer.grid import By
from interlayer.core.select import At


class Division(Rounder):
    r"""Rounding of one weight by a learned divisor for each of its entries.

    :math:`\hat W = s_1 (\mathrm{clip}(\lfloor W / S \rceil + z, low, high) - z)` with :math:`S = s_1 \odot S_2 \odot s_3` for linear maps,
    times :math:`s_4` for convolutions. The common grid :math:`s_1` starts where it suits the weight; :math:`S_2` (one for each
    entry), :math:`s_3` (each output channel) and :math:`s_4` (each input channel) start at 1, so it starts at
    round-to-nearest. All are learned as logarithms and stay positive. The zero point stays.

    By the reciprocal rule, :math:`\partial L / \partial S = -\, s_1 W / S^2 \; \partial L / \partial \hat W` inside the range, so
    large weights move more easily to other codes.

    Args:
        weight: Outputs first.
        held: The grid, whose scale becomes :math:`s_1`.

    Examples:
        >>> weight = torch.randn(4, 3)
        >>> held = Grid(4, kind="asymmetric").fit(weight, "mse")
        >>> torch.allclose(Division(weight, held).value(weight), held.fake(weight), atol=1e-5)
        True
    """

    def __init__(self, weight: Float[Tensor, "out ..."], held: Scaled) -> None:
        super().__init__(weight, held)
        out, ones = weight.shape[0], (1,) * (weight.ndim - 2)
        self.s1 = nn.Parameter(held.scale.log())
        self.s2 = nn.Parameter(torch.zeros_like(weight))
        self.s3 = nn.Parameter(weight.new_zeros(out, 1, *ones))
        self.s4 = nn.Parameter(weight.new_zeros(1, weight.shape[1], *ones)) if ones else None

    def divisor(self) -> Float[Tensor, "out ..."]:
        """S."""
        log = self.held.grid.spread(self.s1, self.s2) + self.s2 + self.s3
        return (log if self.s4 is None else log + self.s4).exp()

    def value(self, weight: Float[Tensor, "out ..."]) -> Float[Tensor, "out ..."]:
        """The rounded weight; gradients pass the rounding inside the range."""
        grid = self.held.grid
        zero = grid.spread(self.held.zero, weight)
        exact = weight / self.divisor() + zero
        whole = straight(exact, exact.round()).clamp(grid.low, grid.high)
        return (whole - zero) * grid.spread(self.s1, weight).exp()

    def found(self, weight: Float[Tensor, "out ..."]) -> tuple[Scaled, Tensor]:
        """The learned grid, and the codes."""
        grid = self.held.grid
        codes = (weight / self.divisor() + grid.spread(self.held.zero, weight)).round().clamp(grid.low, grid.high)
        scaled = Scaled(grid, self.s1.detach().exp(), self.held.zero)
        return scaled, codes.to(torch.int8 if grid.low else torch.uint8)


class FlexRound(Transform):
    """Round weights by learned division, so that each block gives its outputs on a few calibration examples.

    Lee et al., FlexRound: Learnable Rounding based on Element-wise Division for Post-Training Quantization, ICML 2023,
    arXiv:2306.00317. See ``Division`` for the equation and its gradient. Blocks are reconstructed one after the other, on
    inputs that the blocks before give as rounded so far (``core.blockwise``), by Adam with a learning rate that falls to zero along
    a cosine. The result has an ordinary uniform grid: the divisors are gone, and it runs as any other quantised model.

    Cost: ``steps`` forward and backward passes of each block over one batch. Memory: a copy of the model, the inputs and outputs of
    one block for all batches, and four times the weights of one block.

    Args:
        bits: Of the weights, 2 to 8.
        per: One scale for each ``"tensor"``, as in most of the paper, or for each output ``"channel"``, as the authors do with
            Llama.
        kind: ``"asymmetric"``, or ``"symmetric"`` with zero at code 0.
        by: How the range is chosen at first; see ``Grid.fit``. ``"mse"`` takes the best of 100 by the error to the power of 2.4, as
            the authors do; they search zero points separately too, and take ``"minmax"`` for Llama.
        steps: For each block. The authors take 5000.
        lr: First learning rate. The authors' for Llama.
        blocks: What is reconstructed together. Defaults to the blocks of a Transformer, the stages of a ResNet, and single layers
            outside of these; see ``blockwise.sequence``.
        at: Which linear maps and convolutions are rounded. Defaults to all whose weight is their own; the authors leave the head of
            a language model in float, ``at=where(nn.Linear) - "lm_head"``.
        prefix: ``"changed"``, or ``"original"`` for inputs from the float model.
        packed: Keep the weights packed (``interlayer.save``). False gives floats on the grid: a plain model, which
            ``save_pretrained`` carries.
        folder: Where each finished block is kept, so that an interrupted run goes on there.
        seed: Of the order of the batches.

    Shapes: any.

    Raises:
        ValueError: An option out of range; from ``plan``: no calibration data, data that the model does not run on, or no
            layer to round.

    Examples:
        >>> net, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(64, 16)
        >>> new = FlexRound(bits=3, steps=100).plan(net, x).apply()
        >>> new[0]
        Packed([16, 16], 3 bits asymmetric)
    """

    slug: ClassVar[str] = "flexround"

    def __init__(
        self,
        *,
        bits: int = 4,
        per: Literal["tensor", "channel"] = "tensor",
        kind: Literal["asymmetric", "symmetric"] = "asymmetric",
        by: By = "mse",
        steps: int = 500,
        lr: float = 3e-3,
        blocks: At | None = None,
        at: At | None = None,
        prefix: Prefix = "changed",
        packed: bool = True,
        folder: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        for name, given, wanted in (
            ("per", per, ("tensor", "channel")),
            ("kind", kind, ("asymmetric", "symmetric")),
            ("prefix", prefix, ("changed", "original")),
        ):
            if given not in wanted:
                raise ValueError(f"flexround: {name} {given!r}; expected {' or '.join(map(repr, wanted))}.")
        if not (isinstance(bits, int) and 2 <= bits <= 8):
            raise ValueError(f"flexround: bits {bits!r}; expected an integer from 2 to 8.")
        if steps < 1 or not lr > 0:
            raise ValueError(f"flexround: steps {steps}, lr {lr}; expected at least 1, and above 0.")
        self.grid = Grid(bits, 0 if per == "channel" else None, kind)
        self.by, self.blocks, self.at, self.prefix = by, blocks, at, prefix
        self.packed, self.folder = packed, folder
        self.options: dict[str, Any] = {"bits": bits, "per": per, "steps": steps, "lr": lr, "seed": seed}

    def plan(self, model: nn.Module, data: Any = None, *, others: Sequence[nn.Module] = ()) -> Plan:
        """List the layers, each with its block; ``apply`` rounds them."""
        self.take(others)
        solve = learned(Division, **{k: self.options[k] for k in ("steps", "lr", "seed")})
        return reconstruct(
            model, data, self.grid, solve, blocks=self.blocks, at=self.at, by=self.by, packed=self.packed,
            prefix=self.prefix, folder=self.folder, name=self.slug, options=self.options,
        )  # fmt: skip


EXAMPLE = Example(make=lambda: FlexRound(steps=3), inputs=tiny_convnet, hf=tiny_gpt2)
