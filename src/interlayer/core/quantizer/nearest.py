"""Whole models with quantised weights: the plan, the exchange of layers, and their way back from a saved file."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from interlayer.core.delivery import guard
from interlayer.core.kinds import Plan, Row
from interlayer.core.quantizer.around import Around, PackedEmbedding
from interlayer.core.quantizer.attention import OPERANDS, opened, opening, operands
from interlayer.core.quantizer.corrected import Corrected
from interlayer.core.quantizer.grid import By, Grid, LogScaled, Scaled
from interlayer.core.quantizer.layers import BitMap, Bound, Packed, Round, axis_of, biased, is_conv1d, weight_of
from interlayer.core.quantizer.observe import observe
from interlayer.core.quantizer.timed import Clock, Timed, TimedRound
from interlayer.core.record import QUANTIZE, record
from interlayer.core.select import At, exchange, select, ties
from interlayer.core.swap import bypassed

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def layers(model: nn.Module, at: At | None = None, grid: Grid | None = None) -> tuple[dict[str, nn.Module], list[Row]]:
    """The linear maps and convolutions of a model whose weights can be quantised, and all other weights with the reason.

    Args:
        model: Any module.
        at: Among which modules. Defaults to all.
        grid: The grid of the weights, whose groups must divide a channel.

    Raises:
        ValueError: There is no such layer.
    """
    if next(model.children(), None) is None:
        raise ValueError(
            f"quantizer: {type(model).__name__} is made of no layers that could be exchanged; expected a model around them. "
            "Put a single layer into nn.Sequential."
        )
    found = select(model, "**" if at is None else at)
    candidates = [n for n, m in found if isinstance(m, LAYERS) or is_conv1d(m)]
    shared = ties(model, candidates)
    unused = bypassed(model)
    chosen: dict[str, nn.Module] = {}
    own = [n for n, _ in model.named_parameters(recurse=False)]
    skipped = [
        *found.skipped,
        *(Row(n, "Parameter", "the model's own parameter, of no layer, stays in float") for n in own),
    ]
    for name, module in found:
        if name not in shared:
            if next(module.parameters(recurse=False), None) is not None:
                skipped.append(Row(name, type(module).__name__, "no linear map or convolution, stays in float"))
            continue
        if (why := unused.get(name, "")) or parametrize.is_parametrized(module):
            skipped.append(Row(name, type(module).__name__, why or "its weight is computed from others: bake first"))
        elif shared[name]:
            skipped.append(Row(name, type(module).__name__, f"its weight is also {shared[name]}, stays in float"))
        elif grid and grid.group and weight_of(module)[0].numel() % grid.group:
            across = weight_of(module)[0].numel()
            skipped.append(Row(name, type(module).__name__, f"{across} weights a channel, no multiple of {grid.group}"))
        else:
            chosen[name] = module
    if not chosen:
        whys = "; ".join(f"{r.name}: {r.why}" for r in skipped[:3])
        raise ValueError(f"quantizer: no layer of {type(model).__name__} can be quantised ({whys or 'it has none'}).")
    return chosen, skipped


def nearest(
    model: nn.Module,
    grid: Grid,
    *,
    inputs: Grid | None = None,
    dynamic: bool = False,
    attention: bool = False,
    data: Any = None,
    at: At | None = None,
    by: By = "minmax",
    packed: bool = True,
) -> Plan:
    """Plan to round the weights of a model to the nearest level of a grid: the baseline of every better way.

    Args:
        model: Any module. It is not changed.
        grid: The grid of the weights, outputs first.
        inputs: The grid of the inputs of the same layers, one scale for each layer; needs ``data``. With ``axis=-1`` one for
            each feature.
        dynamic: Find the scales of inputs in each call, one for each token, in place of ``data``.
        attention: Also round what the two products of attention multiply, on the grid ``inputs``, and probabilities on an
            unsigned one of as many bits. The plan lists the attentions that this reaches and those that stay in float.
        data: Batches as ``taps.feed`` takes them, run once.
        at: Among which modules. Defaults to all.
        by: How ranges are chosen; see ``Grid.fit``.
        packed: Keep the weights packed (``Packed``). False gives the same model with the rounded weights as floats, which
            any format can carry, Hugging Face's too.

    Raises:
        ValueError: No layer can be quantised, ``inputs`` without ``data`` or the reverse, ``inputs`` with ``packed=False``,
            ``dynamic`` with ``data``, or ``dynamic`` or ``attention`` without ``inputs``.

    Examples:
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))
        >>> plan = nearest(net, Grid(4, axis=0))
        >>> print(plan)
        quantize {'bits': 4}
          + 0  Linear  (64 weights, 4 bits symmetric)
          + 2  Linear  (16 weights, 4 bits symmetric)
          - 1  LayerNorm  (no linear map or convolution, stays in float)
        >>> plan.apply()[0]
        Packed([8, 8], 4 bits symmetric)
    """
    if (inputs is None) != (data is None and not dynamic) or (dynamic and data is not None):
        raise ValueError(
            f"nearest: inputs={inputs}, data {'given' if data is not None else 'missing'}; expected both or neither, or "
            "dynamic=True in place of data."
        )
    if inputs is not None and not packed:
        raise ValueError("nearest: rounded inputs cannot become plain floats; expected packed=True, or inputs=None.")
    if attention and inputs is None:
        raise ValueError("nearest: attention=True without inputs; expected the grid of what attention multiplies.")
    work, opens, rows = opening(model, at) if attention else (model, [], [])
    chosen, skipped = layers(work, at, grid)
    skipped += rows
    points = operands(opens, replace(inputs, axis=None), Grid(inputs.bits, kind="unsigned")) if inputs and opens else {}
    ranges: dict[str, Scaled | LogScaled] = {}
    if inputs is not None and not dynamic:
        wanted = {n: _features(inputs, m) for n, m in chosen.items()} | points
        ranges = observe(work, data, wanted, by=by)
        chosen, never = ran(chosen, ranges, "nearest")
        skipped += never
    touched, idle = operand_rows(opens, points if dynamic else ranges, inputs)
    also = f", inputs {inputs.bits} bits {inputs.kind}" if inputs else ""
    what = f"{grid.bits} bits {grid.kind}{also}{' by token' if dynamic else ''}"
    touched = [Row(n, type(m).__name__, f"{weight_of(m).numel()} weights, {what}") for n, m in chosen.items()] + touched

    def build() -> nn.Module:
        if not packed:
            return rounds(model, {n: grid.fit(weight_of(m), by).fake(weight_of(m).detach()) for n, m in chosen.items()})
        new: dict[str, nn.Module] = {}
        for n, m in chosen.items():
            scaled: Any = inputs if dynamic else ranges.get(n)
            new[n] = Packed(m, grid.fit(weight_of(m), by), inputs=scaled)
        for n, g in points.items():
            if dynamic or n in ranges:
                new[n] = Round(g if dynamic else ranges[n])  # type: ignore[arg-type]
        return packs(model, new, opens=opens)

    return Plan(QUANTIZE, {"bits": grid.bits}, touched, skipped + idle, build)


def ran(
    there: Mapping[str, nn.Module], seen: Collection[str], who: str, why: str = "never ran on the data"
) -> tuple[dict[str, nn.Module], list[Row]]:
    """The layers that ran, and rows of a plan for the others. Raises ValueError if none ran."""
    if not any(n in seen for n in there):
        raise ValueError(f"{who}: no layer that can be quantised ran on the data.")
    never = [Row(n, type(m).__name__, why) for n, m in there.items() if n not in seen]
    return {n: m for n, m in there.items() if n in seen}, never


def inner(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The names that lie inside lists of modules, such as the blocks of a Transformer; all where none does.

    >>> inner(nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2)]), "head": nn.Linear(2, 1)}), ["blocks.0", "head"])
    ['blocks.0']
    """
    names = list(names)
    lists = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    return [n for n in names if any(n.startswith(f"{outer}.") for outer in lists)] or names


def _features(grid: Grid, layer: nn.Module) -> Grid:
    """The grid of a layer's inputs, with the axis of its features if it has one."""
    return grid if grid.axis is None else replace(grid, axis=axis_of(tuple(weight_of(layer).shape)))


def operand_rows(opens: Iterable[str], seen: Iterable[str], grid: Grid | None) -> tuple[list[Row], list[Row]]:
    """Rows of a plan: attentions whose operands are rounded, and those that never ran."""
    seen, touched, idle = set(seen), list[Row](), list[Row]()
    for name in opens:
        if f"{name}.attend.{OPERANDS[0]}" in seen and grid is not None:
            touched.append(Row(name, "attention", f"{', '.join(OPERANDS)}, {grid.bits} bits"))
        else:
            idle.append(Row(name, "attention", "its products never ran on the data, stay in float"))
    return touched, idle


def packs(
    model: nn.Module,
    new: Mapping[str, nn.Module],
    options: Mapping[str, Any] | None = None,
    *,
    opens: Iterable[str] = (),
    norms: Mapping[str, nn.Module] | None = None,
    clock: Clock | None = None,
) -> nn.Module:
    """A copy of a model with these layers in the places of others; ``save`` and ``load`` rebuild it.

    A Hugging Face model refuses ``save_pretrained``: its format has no place for them.

    Args:
        model: Any module. It is not changed.
        new: ``Packed``, ``PackedEmbedding``, ``BitMap``, ``Corrected``, ``Around``, ``Bound``, ``Round``, ``Timed`` and ``TimedRound``
            by name.
        options: Noted in the recipe.
        opens: Attentions that are opened first, so that ``new`` finds their operands; see ``attention.opened``.
        norms: Modules whose values the copy takes, by name, such as norms that scales were folded into.
        clock: That of ``Timed`` and ``TimedRound``; the copy tells it the times of each call.
    """
    result, opens = copy.deepcopy(model), list(opens)
    for name, module in (norms or {}).items():
        result.get_submodule(name).load_state_dict(module.state_dict())
    places = {name: m.structure() for name, m in new.items()}  # type: ignore[operator]
    structure = {"places": places, **({"opens": opens} if opens else {})}
    record(result, QUANTIZE, options or {}, structure | ({"clock": clock.structure()} if clock else {}))
    if clock is not None:
        result.register_forward_pre_hook(clock, with_kwargs=True)
    return _exchanged(opened(result, opens), new)


def rounds(model: nn.Module, new: Mapping[str, Tensor], options: Mapping[str, Any] | None = None) -> nn.Module:
    """A copy of a model with these values as weights (outputs first); a plain model in every other way."""
    result = copy.deepcopy(model)
    record(result, QUANTIZE, options or {}, {"places": {}})
    with torch.no_grad():
        for name, value in new.items():
            weight_of(result.get_submodule(name)).copy_(value)
    return result


def simulated(model: nn.Module) -> nn.Module:
    """A copy of a model in which packed weights are floats again; rounded inputs stay rounded, in floats.

    Examples:
        >>> net, x = nn.Sequential(nn.Linear(8, 2)), torch.ones(1, 8)
        >>> packed = nearest(net, Grid(4, axis=0)).apply()
        >>> torch.equal(simulated(packed)(x), packed(x))
        True
    """
    result = copy.deepcopy(model)
    return exchange(result, [n for n, m in result.named_modules() if isinstance(m, Packed | BitMap)], _Float)


class _Float(nn.Module):
    """What a packed layer stands for, in floats."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        assert isinstance(layer, Packed | BitMap)
        self.layer, self.weight = layer, nn.Parameter(layer.weight)

    @property
    def bias(self) -> nn.Parameter | None:
        """The layer's own, for models that read it past the layer."""
        assert isinstance(self.layer, Packed | BitMap)
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.layer, Packed | BitMap)
        x = self.layer.before(x)
        inputs = self.layer.scaled_inputs(x)
        return self.layer.call(x if inputs is None else inputs.fake(x), self.weight)


def restore(model: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
    """Put the layers that ``packs`` recorded onto a base model, in place; their numbers come from the file.

    Raises:
        ValueError: The structure names no such layers.
    """
    places = structure.get("places")
    if not isinstance(places, dict):
        raise ValueError(f"quantizer.restore: {str(structure)[:80]!r}; expected places.")
    like = next((t for t in model.parameters() if t.is_floating_point()), torch.zeros(()))
    opened(model, structure.get("opens", ()))
    clock = None
    if "clock" in structure:
        clock = Clock(**structure["clock"])
        model.register_forward_pre_hook(clock, with_kwargs=True)
    return _exchanged(model, {n: _hollow(model.get_submodule(n), given, like, clock) for n, given in places.items()})


def _hollow(layer: nn.Module, given: Mapping[str, Any], near: Tensor, clock: Clock | None) -> nn.Module:
    kind = given.get("kind")
    if str(kind).startswith("Timed") and clock is None:
        raise ValueError(f"quantizer.restore: layers of kind {kind}, and no clock; expected one in the structure.")
    if kind == "TimedRound":
        assert clock is not None
        ones = near.detach().new_ones(given["shape"])
        return TimedRound(Scaled(Grid(**given["grid"]), ones, torch.zeros_like(ones)), clock)
    if kind == "Bound":
        return Bound(fold=given["fold"])
    if kind == "Round":
        return Round.hollow(given, near.detach())
    grid = Grid(**given["grid"])
    if kind == "Around":
        return Around(_hollow(layer, given["inner"], near, clock) if given["inner"] else layer, grid)
    if kind == "PackedEmbedding":
        return PackedEmbedding(layer, grid)
    shape = grid.shape(weight_of(layer))
    like = weight_of(layer).detach()
    weights = Scaled(grid, like.new_ones(shape), like.new_zeros(shape))
    inputs: Any = given["inputs"] and Grid(**given["inputs"])
    if inputs and not given.get("dynamic"):
        wide: tuple[int, ...] = () if inputs.axis is None else (like.shape[1] * getattr(layer, "groups", 1),)
        if kind == "Timed" and clock is not None:
            wide = (clock.groups, *wide)
        inputs = Scaled(inputs, like.new_ones(wide), like.new_zeros(wide))
    if kind not in ("Packed", "BitMap", "Corrected", "Timed"):
        raise ValueError(
            f"quantizer.restore: layers of kind {kind!r}; expected Packed, PackedEmbedding, BitMap, Corrected, Around, Bound, Round, "
            "Timed or TimedRound."
        )
    layer = biased(layer) if given.get("bias") else layer
    codes = torch.zeros_like(like, dtype=torch.uint8) + max(grid.low, 0)
    if kind == "BitMap":
        return BitMap(layer, weights, codes=codes, inputs=inputs)
    if kind == "Corrected":
        rank, (out, wide_) = given["rank"], like.shape
        factors = (like.new_zeros(out, rank), like.new_zeros(rank, wide_)) if rank else None
        divisor = like.new_ones(wide_) if given["divided"] else None
        return Corrected(layer, weights, codes=codes, inputs=inputs, factors=factors, divisor=divisor)
    if kind == "Timed":
        assert clock is not None
        return Timed(layer, weights, codes=codes, inputs=inputs, clock=clock)
    return Packed(layer, weights, codes=codes, inputs=inputs, table=given.get("table", False))


def _exchanged(model: nn.Module, new: Mapping[str, nn.Module]) -> nn.Module:
    olds = {model.get_submodule(name): module for name, module in new.items()}

    def swap(old: nn.Module) -> nn.Module:
        return olds[old].train(old.training)

    exchange(model, list(new), swap)
    return guard(model, "packed weights") if new else model
