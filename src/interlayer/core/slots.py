"""Slots: the named places of a backbone, filled by a class, a factory or a name from the catalogue."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

from torch import nn

from interlayer import catalog


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Read ``"name"`` or ``"name(option=literal, ...)"`` into the name and its options.

    >>> parse_spec("denseformer(dilation=4)")
    ('denseformer', {'dilation': 4})
    """
    name, paren, rest = spec.strip().partition("(")
    if not paren:
        return name, {}
    try:
        call = ast.parse(f"f({rest}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("only keyword options")
        return name.strip(), {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"slots: {spec!r} does not read as name(option=value, ...): {error}.") from error


def resolve(slot: str, name: str) -> Callable[..., Any]:
    """The class that a name stands for in a slot: a plain part first, then a system of the catalogue."""
    if slot not in catalog.slots():
        raise ValueError(
            f"slots: no slot {slot!r}.{catalog.nearest(slot, catalog.slots())} There are {catalog.slots()}."
        )
    plain = catalog.builtins(slot)
    if name in plain:
        module, _, attribute = plain[name].partition(":")
        return getattr(import_module(module if module.startswith("torch") else f"interlayer.{module}"), attribute)
    fits = {s.slug for s in catalog.load().values() if s.slot == slot}
    if name in fits:
        return catalog.get(name).resolve()
    known = catalog.load().get(name)
    why = f" {name!r} fills the slot {known.slot!r}." if known and known.slot else ""
    raise ValueError(
        f"slots: nothing called {name!r} fills the slot {slot!r}.{why}{catalog.nearest(name, {*plain, *fits})} "
        f"There are {sorted({*plain, *fits})}."
    )


def fill(slot: str, what: Any, **context: Any) -> Any:
    """Build what fills a slot.

    Args:
        slot: Name of the slot, for names and messages.
        what: A class or factory, or the name of one, or a spec such as ``"denseformer(dilation=4)"``.
        **context: What the backbone knows (``width=``, ``depth=``, ...). The constructor gets only what it names;
            options of the spec come first.

    Raises:
        ValueError: Unknown slot or name, or an option that the constructor does not have.
        TypeError: ``what`` is a finished module; a slot is filled once for each place, so it needs a class or factory.
    """
    if isinstance(what, nn.Module):
        raise TypeError(f"slots: {slot!r} got a finished {type(what).__name__}; give the class, a factory or a name.")
    options: dict[str, Any] = {}
    make = what
    if isinstance(what, str):
        name, options = parse_spec(what)
        make = resolve(slot, name)
    if isinstance(make, type) and make.__module__.startswith("torch.nn"):
        return _torch_part(make, options, context)
    names = inspect.signature(make).parameters
    if unknown := [o for o in options if o not in names]:
        raise ValueError(
            f"slots: {what!r} has no option {unknown[0]!r}.{catalog.nearest(unknown[0], names)} It has {list(names)}."
        )
    if any(p.kind is p.VAR_KEYWORD for p in names.values()) and not isinstance(make, partial | type):
        return make(**{**context, **options})
    return make(**{**{k: v for k, v in context.items() if k in names}, **options})


def _torch_part(make: type[nn.Module], options: dict[str, Any], context: dict[str, Any]) -> nn.Module:
    """torch's own modules name their sizes in their own way."""
    if issubclass(make, nn.Linear):
        return make(context["inputs"], context["outputs"], **{"bias": context.get("bias", True), **options})
    if "Norm" in make.__name__:
        return make(context["width"], **options)
    return make(**options)


def factory(slot: str, what: Any) -> Callable[..., Any]:
    """``fill`` with the slot and its filling fixed, for a part that is built later, once for each place."""
    return partial(fill, slot, what)
