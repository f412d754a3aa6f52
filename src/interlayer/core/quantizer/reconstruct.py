"""Rounding of weights that is chosen block by block, so that each block still gives its outputs on calibration data."""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from interlayer.core import taps
from interlayer.core.blockwise import Part, Prefix, blockwise, fit, runs, sequence
from interlayer.core.kinds import Plan, Row
from interlayer.core.quantizer.grid import By, Grid, Scaled, straight, through
from interlayer.core.quantizer.layers import Packed, is_conv1d, weight_of
from interlayer.core.quantizer.nearest import layers, packs, rounds
from interlayer.core.quantizer.observe import observe
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


class Learned(nn.Module):
    """A grid whose scale is learned as a logarithm, and its zero, if it is asymmetric, as a share of the range.

    >>> held = Grid(4, kind="asymmetric").fit(torch.randn(64))
    >>> torch.equal(Learned(held)(torch.ones(3)), held.fake(torch.ones(3)))
    True
    """

    def __init__(self, held: Scaled) -> None:
        super().__init__()
        self.held = held
        self.log = nn.Parameter(torch.zeros_like(held.scale))
        self.shift = nn.Parameter(torch.zeros_like(held.scale)) if held.grid.kind == "asymmetric" else None

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Round."""
        now = self.now()
        return through(x, now.grid, now.scale, now.zero)

    def now(self) -> Scaled:
        """The grid so far. Gradients pass the rounding of the zero to an integer among the codes."""
        grid, zero = self.held.grid, self.held.zero
        if self.shift is not None:
            exact = (zero + grid.high * self.shift).clamp(grid.low, grid.high)
            zero = straight(exact, exact.round())
        return Scaled(grid, self.held.scale * self.log.exp(), zero)

    def found(self) -> Scaled:
        """The grid in the end."""
        now = self.now()
        return Scaled(now.grid, now.scale.detach(), now.zero.detach())


class Rounded(nn.Module):
    """A rounder as the parametrisation of a layer's weight, in the layer's own orientation and type.

    Its steps are computed again in the backward pass, so that no tensors of the weight's size are kept for it.
    """

    def __init__(self, rounder: Rounder, transposed: bool) -> None:
        super().__init__()
        self.rounder, self.transposed = rounder, transposed

    def forward(self, weight: Tensor) -> Tensor:
        return checkpoint(self.value, weight, use_reentrant=False, preserve_rng_state=False)

    def value(self, weight: Tensor) -> Tensor:
        """The weight as it would be rounded."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        value = self.rounder.value(wide.T if self.transposed else wide)
        return (value.T if self.transposed else value).to(weight.dtype)


class _Moved(nn.Module):
    """A bias that is learned, in units of its own size, or the weight's if that is larger."""

    def __init__(self, bias: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.unit = float(
            torch.maximum(bias.detach().norm() / bias.numel() ** 0.5, weight.norm() / weight.numel() ** 0.5)
        )
        self.by = nn.Parameter(torch.zeros_like(bias, dtype=weight.dtype))

    def forward(self, bias: Tensor) -> Tensor:
        return (bias + self.unit * self.by).to(bias.dtype)


def learned(
    make: Callable[[Float[Tensor, "out ..."], Scaled], Rounder],
    *,
    steps: int,
    lr: float,
    decay: bool = True,
    inputs: float = 0.0,
    biases: float = 0.0,
    seed: int = 0,
) -> Solve:
    """Choose codes by training the rounders of all layers of a block together; see ``blockwise.fit``.

    Memory: for each weight of the block, its rounder's parameters, their gradients and Adam's two moments.

    Args:
        make: The rounder of a weight.
        steps: For each block.
        lr: Of the rounders.
        decay: Let it fall to zero along a cosine.
        inputs: Learning rate of the grids of inputs, where ``reconstruct`` rounds them, relative to their range (``Learned``). It
            falls along a cosine. 0 keeps them.
        biases: Learning rate of the layers' biases, relative to their size, with the ``decay`` of ``lr``. 0 keeps them.
        seed: Of the order of the batches.
    """

    def solve(part: Part, there: Mapping[str, nn.Module], held: Mapping[str, Scaled]) -> Found:
        made = {n: make(wide(m), held[n]) for n, m in there.items()}
        moved = {n: _Moved(m.bias, wide(m)) for n, m in there.items() if biases and isinstance(m.bias, Tensor)}
        flags = [(p, p.requires_grad) for p in part.block.parameters()]
        for p, _ in flags:
            p.requires_grad_(False)
        for n, m in there.items():
            parametrize.register_parametrization(m, "weight", Rounded(made[n], is_conv1d(m)), unsafe=True)
        for n, by in moved.items():
            parametrize.register_parametrization(there[n], "bias", by, unsafe=True)

        def penalty(share: float) -> Tensor:
            found = [p for r in made.values() if (p := r.penalty(share)) is not None]
            return torch.stack(found).sum() if found else torch.zeros(())

        before = part.before.values() if inputs else ()
        groups: list[dict[str, Any]] = [
            {"params": [p for r in made.values() for p in r.parameters()]},
            {"params": [p for m in moved.values() for p in m.parameters()], "lr": biases},
            {"params": [p for m in before for p in m.parameters()], "lr": inputs, "decay": True},
        ]
        fit(part, [g for g in groups if g["params"]], steps=steps, lr=lr, decay=decay, seed=seed, penalty=penalty)
        for m in there.values():
            parametrize.remove_parametrizations(m, "weight", leave_parametrized=False)
        for n, by in moved.items():
            layer: Any = there[n]
            parametrize.remove_parametrizations(layer, "bias", leave_parametrized=False)
            layer.bias = nn.Parameter(by(layer.bias).detach())  # a new one: the old is the model's own
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
    grid: Grid | Mapping[str, Grid],
    solve: Solve,
    *,
    inputs: Grid | Mapping[str, Grid] | None = None,
    blocks: At | None = None,
    joined: Sequence[Sequence[str]] = (),
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
        grid: The grid of the weights, outputs first; or one for each layer, by name.
        solve: The method: ``learned(AdaRound, ...)``, ``gptq()``, or one of your own.
        inputs: The grid of the inputs of the same layers, or one for each. They are rounded while a block is reconstructed. Ranges come
            from a pass of the float model over the data, and ``solve`` may learn them (``Part.before``).
        blocks: The blocks; see ``blockwise.sequence``.
        joined: Runs of neighbouring blocks that are reconstructed as one; see ``blockwise``.
        at: Which layers are rounded. Defaults to all that can be.
        by: How ranges are chosen; see ``Grid.fit``.
        power: Power of the error of weights where ``by="mse"``.
        packed: Keep the weights packed (``Packed``), or return plain floats.
        prefix: See ``blockwise``.
        folder: Where the result of each block is stored, so that an interrupted run goes on there.
        name: The method's name, in the plan.
        options: The method's options; part of what stored results are found by.

    Raises:
        ValueError: No data, no layer that can be quantised, ``inputs`` with ``packed=False``, or what ``blockwise`` refuses.

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
    if inputs is not None and not packed:
        raise ValueError(f"{name}: rounded inputs cannot become plain floats; expected packed=True, or no inputs.")
    batches = taps.batches(data, name)
    there, skipped = layers(model, at, grid if isinstance(grid, Grid) else None)
    names, out = sequence(model, batches, blocks)
    owner = {n: b for n in there for b in names if n == b or n.startswith(f"{b}.") or not b}
    lost = {n: m for n, m in there.items() if n not in owner}
    reason = {row.name: row.why for row in out}
    skipped += [Row(n, type(m).__name__, _why(n, reason) or "in no block, stays in float") for n, m in lost.items()]
    weights = _each(grid, owner)
    ranges: dict[str, Any] = {} if inputs is None else observe(model, batches, _each(inputs, owner), by=by)
    for n in [n for n in owner if inputs is not None and n not in ranges]:
        skipped.append(Row(n, type(there[n]).__name__, "never ran on the data"))
        del owner[n]
    if not owner:
        raise ValueError(
            f"{name}: no layer that can be quantised lies in a block ({', '.join(names[:3])}). Pass other blocks."
        )
    label = {b: "+".join(run) for run in joined for b in run}
    used = [b for b in names if b in owner.values() or b in label]
    runs(model, batches, used, joined)

    def what(n: str) -> str:
        also = f", inputs {ranges[n].grid.bits} bits {ranges[n].grid.kind}" if n in ranges else ""
        block = label.get(owner[n], owner[n]) or "model"
        return (
            f"{weight_of(there[n]).numel()} weights, {weights[n].bits} bits {weights[n].kind}{also}, with block {block}"
        )

    touched = [Row(n, type(there[n]).__name__, what(n)) for n in owner]
    given = dict(options or {})
    grids = [[n, weights[n].options(), ranges[n].grid.options() if n in ranges else None] for n in sorted(owner)]
    key = json.dumps([name, given, grids, str(by), power, prefix], sort_keys=True)

    def build() -> nn.Module:
        new: dict[str, Packed] = {}
        own = [*model.parameters(), *model.buffers()]
        scratch = copy.deepcopy(model, {id(t): t for t in own})  # its weights are the model's until they are rounded
        for part in blockwise(
            model, batches, list(used), into=scratch, joined=joined, prefix=prefix, folder=folder, key=key
        ):
            mine = {n: scratch.get_submodule(n) for n, b in owner.items() if label.get(b, b) == part.name}
            before = {n: Learned(ranges[n]) for n in mine if n in ranges}
            part.before = dict(before)
            if part.kept:
                found = {n: _loaded(part.kept, n, m, weights[n], ranges.get(n)) for n, m in mine.items()}
            else:
                held = {n: weights[n].fit(wide(m), by, power) for n, m in mine.items()}
                chosen, learnt = _with(part, mine, held, solve), {n: m.found() for n, m in before.items()}
                found = {n: (s, c, learnt.get(n)) for n, (s, c) in chosen.items()}
                part.keep({f"{n} {k}": t for n, m in mine.items() for k, t in _named(m, *found[n])})
            rounded = {n: Packed(mine[n], s, codes=c, inputs=i) for n, (s, c, i) in found.items()}
            exchange(scratch, list(rounded), {mine[n]: p for n, p in rounded.items()}.__getitem__)
            new |= rounded
        del scratch, part, mine
        told = {
            "method": name,
            "bits": grid.bits if isinstance(grid, Grid) else {n: g.bits for n, g in weights.items()},
            **given,
        }
        if packed:
            return packs(model, new, told)
        result = rounds(model, {}, told)
        with torch.no_grad():
            for n, each in new.items():
                layer: Any = result.get_submodule(n)
                weight_of(layer).copy_(each.weight)
                if each.bias is not None:
                    layer.bias.copy_(each.bias)
        return result

    return Plan(name or QUANTIZE, given, touched, skipped, build)


def _each(grid: Grid | Mapping[str, Grid], names: dict[str, str]) -> dict[str, Grid]:
    """The grid of each layer."""
    if isinstance(grid, Grid):
        return dict.fromkeys(names, grid)
    if lacking := [n for n in names if n not in grid]:
        raise ValueError(f"reconstruct: no grid for {lacking[0]}; expected one for each layer that is rounded.")
    return {n: grid[n] for n in names}


def _with(part: Part, there: Mapping[str, nn.Module], held: Mapping[str, Scaled], solve: Solve) -> Found:
    """What a method finds while the inputs of layers are rounded."""

    def enter(grid: nn.Module) -> Callable[..., Any]:
        return lambda module, args, kwargs: taps.swap((args, kwargs), grid(taps.first((args, kwargs))))

    with ExitStack() as hooks:
        for n, grid in part.before.items():
            hooks.callback(there[n].register_forward_pre_hook(enter(grid), with_kwargs=True).remove)
        return solve(part, there, held)


def _named(layer: nn.Module, scaled: Scaled, codes: Tensor, inputs: Scaled | None) -> list[tuple[str, Tensor]]:
    found = [("scale", scaled.scale), ("zero", scaled.zero), ("codes", codes)]
    if inputs is not None:
        found += [("input_scale", inputs.scale), ("input_zero", inputs.zero)]
    return [*found, ("bias", layer.bias.detach())] if isinstance(layer.bias, Tensor) else found


def _loaded(
    kept: Mapping[str, Tensor], name: str, layer: nn.Module, grid: Grid, inputs: Scaled | None
) -> tuple[Scaled, Tensor, Scaled | None]:
    """What was stored of a layer, which gets its bias back."""
    held = {
        k.removeprefix(f"{name} "): t.to(weight_of(layer).device) for k, t in kept.items() if k.startswith(f"{name} ")
    }
    if "bias" in held:
        layer.bias = nn.Parameter(held["bias"])
    if inputs is not None:
        inputs = Scaled(inputs.grid, held["input_scale"], held["input_zero"])
    return Scaled(grid, held["scale"], held["zero"]), held["codes"], inputs


def _why(name: str, reasons: Mapping[str, str]) -> str:
    return next((why for block, why in reasons.items() if name == block or name.startswith(f"{block}.")), "")
