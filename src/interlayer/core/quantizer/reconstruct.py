"""Rounding of weights that is chosen block by block, so that each block still gives its outputs on calibration data."""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from interlayer.core.blockwise import Part, Prefix, blockwise, fit, listed, sequence
from interlayer.core.kinds import Plan, Row
from interlayer.core.quantizer.grid import By, Grid, Scaled
from interlayer.core.quantizer.layers import Packed, is_conv1d, weight_of
from interlayer.core.quantizer.nearest import layers, packs, rounds
from interlayer.core.record import QUANTIZE
from interlayer.core.select import At, exchange

Found: TypeAlias = dict[str, tuple[Scaled, Tensor]]
"""The scaled grid and the codes of each layer of a block."""
Solve: TypeAlias = Callable[[Part, Mapping[str, nn.Module], Mapping[str, Scaled]], Found]
"""Chooses codes for the layers of a block, from grids that suit their weights."""


class Rounder(nn.Module, ABC):
    """A way to round one weight that is learned. Gets the weight, outputs first in 32 bits, and a grid that suits it."""

    def __init__(self, weight: Float[Tensor, "out ..."], held: Scaled) -> None:
        super().__init__()
        self.held = held

    @abstractmethod
    def value(self, weight: Float[Tensor, "out ..."]) -> Float[Tensor, "out ..."]:
        """The rounded weight, through which gradients reach the parameters."""

    @abstractmethod
    def found(self, weight: Float[Tensor, "out ..."]) -> tuple[Scaled, Tensor]:
        """The grid and the codes in the end."""

    def penalty(self, share: float) -> Tensor | None:
        """What is added to the error when this share of the steps is done."""
        return None


class AdaRound(Rounder):
    r"""Learn for each weight whether it is rounded up or down.

    Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, arXiv:2004.10568:
    ``W' = s clip(floor(W / s) + h(V), low, high)`` with the rectified sigmoid ``h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)``, which starts
    at the part of ``W / s`` after the point, and the penalty ``0.01 sum 1 - |2 h(V) - 1|^beta``. No penalty in the first fifth
    of the steps; then beta falls from 20 to 2 along a cosine, which drives each h to 0 or 1. Train it at a constant learning
    rate (``decay=False``), since rounding is decided late.
    """

    LOW, HIGH, WEIGHT, WARM = -0.1, 1.1, 0.01, 0.2

    def __init__(self, weight: Float[Tensor, "out ..."], held: Scaled) -> None:
        super().__init__(weight, held)
        grid = held.grid
        exact = grid.grouped(weight) / grid.spread(held.scale, weight)
        self.below = exact.floor()
        rest = (exact - self.below - self.LOW) / (self.HIGH - self.LOW)
        self.up = nn.Parameter(torch.logit(rest))

    def share(self) -> Tensor:
        """h(V)."""
        return (self.up.sigmoid() * (self.HIGH - self.LOW) + self.LOW).clamp(0, 1)

    def value(self, weight: Float[Tensor, "out ..."]) -> Float[Tensor, "out ..."]:
        """The weight between its two neighbours on the grid."""
        return self._at(self.share(), weight)

    def _at(self, up: Tensor, weight: Tensor) -> Tensor:
        grid, zero = self.held.grid, self.held.grid.spread(self.held.zero, weight)
        whole = (self.below + up + zero).clamp(grid.low, grid.high)
        return ((whole - zero) * grid.spread(self.held.scale, weight)).view(weight.shape)

    def found(self, weight: Float[Tensor, "out ..."]) -> tuple[Scaled, Tensor]:
        """Up where h is at least a half."""
        return self.held, self.held.codes(self._at((self.share() >= 0.5).to(weight), weight))

    def penalty(self, share: float) -> Tensor | None:
        """Small where each h is 0 or 1."""
        if share < self.WARM:
            return None
        beta = annealed((share - self.WARM) / (1 - self.WARM))
        return self.WEIGHT * (1 - (2 * self.share() - 1).abs().pow(beta)).sum()


def annealed(share: float, first: float = 20.0, last: float = 2.0) -> float:
    """From ``first`` to ``last`` along a cosine.

    >>> [round(annealed(s), 1) for s in (0, 0.5, 1)]
    [20.0, 11.0, 2.0]
    """
    return last + 0.5 * (first - last) * (1 + float(torch.tensor(share * torch.pi).cos()))


class _As(nn.Module):
    """A rounder as the parametrisation of a layer's weight, in its own orientation and type."""

    def __init__(self, rounder: Rounder, transposed: bool) -> None:
        super().__init__()
        self.rounder, self.transposed = rounder, transposed

    def forward(self, weight: Tensor) -> Tensor:
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        value = self.rounder.value(wide.T if self.transposed else wide)
        return (value.T if self.transposed else value).to(weight.dtype)


def learned(
    make: Callable[[Float[Tensor, "out ..."], Scaled], Rounder],
    *,
    steps: int,
    lr: float,
    decay: bool = True,
    seed: int = 0,
) -> Solve:
    """Choose codes by training the rounders of all layers of a block together; see ``blockwise.fit``.

    Memory: for each weight of the block, its rounder's parameters, their gradients and Adam's two moments.
    """

    def solve(part: Part, there: Mapping[str, nn.Module], held: Mapping[str, Scaled]) -> Found:
        made = {n: make(wide(m), held[n]) for n, m in there.items()}
        flags = [(p, p.requires_grad) for p in part.block.parameters()]
        for p, _ in flags:
            p.requires_grad_(False)
        for n, m in there.items():
            parametrize.register_parametrization(m, "weight", _As(made[n], is_conv1d(m)), unsafe=True)

        def penalty(share: float) -> Tensor:
            found = [p for r in made.values() if (p := r.penalty(share)) is not None]
            return torch.stack(found).sum() if found else torch.zeros(())

        rates = [p for r in made.values() for p in r.parameters()]
        fit(part, rates, steps=steps, lr=lr, decay=decay, seed=seed, penalty=penalty)
        for m in there.values():
            parametrize.remove_parametrizations(m, "weight", leave_parametrized=False)
        for p, flag in flags:
            p.requires_grad_(flag)
        with torch.no_grad():
            return {n: made[n].found(wide(m)) for n, m in there.items()}

    return solve


def wide(layer: nn.Module) -> Float[Tensor, "out ..."]:
    """The weight of a layer, outputs first, in 32 bits at least."""
    weight = weight_of(layer).detach()
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def reconstruct(
    model: nn.Module,
    data: Any,
    grid: Grid,
    solve: Solve,
    *,
    blocks: At | None = None,
    at: At | None = None,
    by: By = "mse",
    power: float = 2.4,
    packed: bool = True,
    prefix: Prefix = "changed",
    folder: str | Path | None = None,
    name: str = "reconstruct",
    options: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan to round the weights of a model block by block, so that each block gives its outputs on calibration data.

    Args:
        model: Any module. It is not changed.
        data: Calibration data as ``taps.feed`` takes them; every method that gets the same is compared fairly.
        grid: The grid of the weights, outputs first.
        solve: The method: ``learned(AdaRound, ...)``, ``gptq()``, or one of your own.
        blocks: The blocks; see ``blockwise.sequence``.
        at: Which layers are rounded. Defaults to all that can be.
        by: How ranges are chosen; see ``Grid.fit``.
        power: Power of the error where ``by="mse"``.
        packed: Keep the weights packed (``Packed``), or return plain floats.
        prefix: See ``blockwise``.
        folder: Where the result of each block is stored, so that an interrupted run goes on there.
        name: The method's name, in the plan.
        options: The method's options; part of what stored results are found by.

    Raises:
        ValueError: No data, no layer that can be quantised, or what ``blockwise`` refuses.

    Examples:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> plan = reconstruct(net, torch.randn(32, 8), Grid(4), learned(AdaRound, steps=10, lr=1e-2), name="adaround")
        >>> print(plan)
        adaround
          + 0  Linear  (64 weights, 4 bits symmetric, with block 0)
          + 2  Linear  (16 weights, 4 bits symmetric, with block 2)
        >>> plan.apply()[0]
        Packed([8, 8], 4 bits symmetric)
    """
    batches = listed(data)
    there, skipped = layers(model, at, grid)
    names, out = sequence(model, batches, blocks)
    owner = {n: b for n in there for b in names if n == b or n.startswith(f"{b}.") or not b}
    lost = {n: m for n, m in there.items() if n not in owner}
    reason = {row.name: row.why for row in out}
    skipped += [Row(n, type(m).__name__, _why(n, reason) or "in no block, stays in float") for n, m in lost.items()]
    if not owner:
        raise ValueError(
            f"{name}: no layer that can be quantised lies in a block ({', '.join(names[:3])}). Pass other blocks."
        )
    used = [b for b in names if b in owner.values()]
    what = f"{grid.bits} bits {grid.kind}"
    touched = [
        Row(n, type(there[n]).__name__, f"{weight_of(there[n]).numel()} weights, {what}, with block {b or 'model'}")
        for n, b in owner.items()
    ]
    given = dict(options or {})
    key = json.dumps([name, given, grid.options(), str(by), power, prefix, sorted(owner)], sort_keys=True)

    def build() -> nn.Module:
        new: dict[str, Packed] = {}
        own = [*model.parameters(), *model.buffers()]
        scratch = copy.deepcopy(model, {id(t): t for t in own})  # its weights are the model's until they are rounded
        for part in blockwise(model, batches, list(used), into=scratch, prefix=prefix, folder=folder, key=key):
            mine = {n: scratch.get_submodule(n) for n, b in owner.items() if b == part.name}
            if part.kept:
                found = _loaded(part.kept, grid, mine)
            else:
                found = solve(part, mine, {n: grid.fit(wide(m), by, power) for n, m in mine.items()})
                part.keep({f"{n} {k}": t for n, (s, c) in found.items() for k, t in _named(s, c)})
            rounded = {n: Packed(mine[n], s, codes=c) for n, (s, c) in found.items()}
            exchange(scratch, list(rounded), {mine[n]: p for n, p in rounded.items()}.__getitem__)
            new |= rounded
        del scratch, part, mine
        told = {"method": name, "bits": grid.bits, **given}
        if packed:
            return packs(model, new, told)
        result = rounds(model, {}, told)
        with torch.no_grad():
            for n, each in new.items():
                weight_of(result.get_submodule(n)).copy_(each.weight)
        return result

    return Plan(name or QUANTIZE, given, touched, skipped, build)


def _named(scaled: Scaled, codes: Tensor) -> list[tuple[str, Tensor]]:
    return [("scale", scaled.scale), ("zero", scaled.zero), ("codes", codes)]


def _loaded(kept: Mapping[str, Tensor], grid: Grid, there: Mapping[str, nn.Module]) -> Found:
    found: Found = {}
    for n, m in there.items():
        scale, zero, codes = (kept[f"{n} {k}"].to(weight_of(m).device) for k in ("scale", "zero", "codes"))
        found[n] = (Scaled(grid, scale, zero), codes)
    return found


def _why(name: str, reasons: Mapping[str, str]) -> str:
    return next((why for block, why in reasons.items() if name == block or name.startswith(f"{block}.")), "")
