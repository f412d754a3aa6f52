"""Where the blocks of a model are, whether they can change places, and what else of the model counts them."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

from torch import nn

from interlayer import catalog
from interlayer.core import order as orders
from interlayer.core.select import blocks
from interlayer.probe.painters.orders import Order, Parallel


def find(model: nn.Module, at: str | None) -> tuple[str, nn.ModuleList | nn.Sequential]:
    """The selected list of blocks, and its name."""
    if any(isinstance(m, Parallel) for m in model.modules()):
        raise ValueError(
            f"painters: blocks of {type(model).__name__} run side by side already; expected blocks that run one after another. "
            "Start from the model before."
        )
    if at is None:
        if hasattr(model, "down_blocks") and hasattr(model, "up_blocks"):
            raise ValueError(
                f"painters: {type(model).__name__} joins blocks on the way down with those on the way up, which ties them "
                "to their order. Name a list of alike blocks inside one of them with at."
            )
        return blocks(model)
    try:
        part = model.get_submodule(at)
    except AttributeError:
        held = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 1]
        raise ValueError(
            f"painters: {type(model).__name__} has no part {at!r}.{catalog.nearest(at, held)} "
            f"Lists of blocks there: {', '.join(held[:6])}."
        ) from None
    if isinstance(part, nn.ModuleList | nn.Sequential):
        return at, part
    inner, found = blocks(part)
    return f"{at}.{inner}", found


def check_shapes(found: Any, at: str, start: int, end: int, order: Order) -> None:
    """Raise unless the middle blocks fit in each other's places, as far as their parameters show."""
    shapes = [{n: tuple(p.shape) for n, p in block.named_parameters()} for block in found]
    middle = list(range(start, end)) if end - start > 1 else [start, start + 1 if end < len(found) else start - 1]
    for i, j in pairwise(middle):
        odd = [n for n in shapes[i] if shapes[j].get(n, shapes[i][n]) != shapes[i][n]]
        if odd:
            raise ValueError(
                f"painters: {odd[0]} is {shapes[i][odd[0]]} in block {i} of {at!r} and {shapes[j][odd[0]]} in block {j}, so "
                "they don't fit in each other's places. Take a range of alike blocks, or another list with at."
            )
    own = sorted(set(shapes[0]) - set().union(*shapes[1:]))
    if own and order[0] != 0:
        raise ValueError(
            f"painters: the first block of {at!r} holds {own[0]}, which the others depend on; expected it to stay the first. "
            "Set start to 1 or more."
        )


def backbone(model: nn.Module, at: str) -> Any:
    """The backbone with a slot for the order of its blocks, if ``at`` belongs to one."""
    parent = model.get_submodule(at.rpartition(".")[0])
    return parent if isinstance(getattr(parent, "order", None), orders.Sequential) else None


def check_order(model: nn.Module, at: str, order: Order) -> None:
    """Raise if the blocks run in an order of their own already, or differ in their attention masks."""
    own = backbone(model, at)
    if own is not None and type(own.order) is not orders.Sequential:
        raise ValueError(
            f"painters: the blocks of {at!r} run in {type(own.order).__name__} order already; expected the plain one, "
            "order='sequential'."
        )
    for config, _ in _counters(model, at):
        kinds = getattr(config, "layer_types", None) or []
        mixed = len(set(kinds)) > 1
        if mixed and (_computed(config) or any(isinstance(o, list) and len({kinds[b] for b in o}) > 1 for o in order)):
            raise ValueError(
                f"painters: the blocks of {at!r} use different attention masks ({', '.join(sorted(set(kinds)))}), so they "
                "can't run in parallel. Take a range of one kind, or another variant."
            )


def _counters(model: nn.Module, at: str) -> list[tuple[Any, str]]:
    """The configurations that count the blocks at ``at``, each with the name under which it does."""
    path = at.split(".")
    count = len(model.get_submodule(at))  # type: ignore[arg-type]
    side = "decoder" if "decoder" in path else "encoder"
    whole = getattr(model, "config", None)
    found: dict[tuple[int, str], tuple[Any, str]] = {}
    for end in range(len(path)):
        config = getattr(model.get_submodule(".".join(path[:end])), "config", None)
        both = getattr(config, "is_encoder_decoder", False)
        names = [n for n in (f"{side}_layers", f"num_{side}_layers") if both and hasattr(config, n)]
        if not names or config is not whole:  # T5's decoder has a configuration of its own
            names += [n for n in ("num_hidden_layers", "num_layers") if hasattr(config, n)][:1]
        found |= {(id(config), n): (config, n) for n in names if getattr(config, n) == count}
    return list(found.values())


def configure(model: nn.Module, at: str, run: list[int]) -> bool:
    """Set the number of block runs in the configurations, which caches are made by. Whether they count them rightly."""
    counters = _counters(model, at)
    for config, name in counters:
        if isinstance(config, dict):  # of diffusers, which is frozen
            model.register_to_config(**{name: len(run)})  # type: ignore[operator]
            continue
        kinds = getattr(config, "layer_types", None)
        setattr(config, name, len(run))
        if kinds and not _computed(config):
            config.layer_types = [kinds[block] for block in run]
    whole: Any = getattr(model, "config", None)
    if not (counters and getattr(whole, "is_encoder_decoder", False)):
        return bool(counters)
    runs = getattr(whole, "num_decoder_layers", None) or getattr(whole, "decoder_layers", 0)
    enough = whole.get_text_config(decoder=True).num_hidden_layers >= runs
    if not enough:  # generate makes the cache of T5's decoder by the number of encoder blocks
        whole.num_hidden_layers = runs
    return enough


def _computed(config: Any) -> bool:
    """Whether the kinds of the blocks follow from their number, and can't be set."""
    return isinstance(getattr(type(config), "layer_types", None), property)


def twin(block: nn.Module) -> nn.Module:
    """A second block on the same parameters and buffers, which can have a number of its own in a cache."""
    return copy.deepcopy(block, {id(t): t for t in (*block.parameters(), *block.buffers())})


def numbered(block: nn.Module, number: int) -> nn.Module:
    """The block, which keeps its keys and values under that number of a cache."""
    for module in block.modules():
        if isinstance(getattr(module, "layer_idx", None), int):
            module.layer_idx = number  # type: ignore[assignment]
    return block
