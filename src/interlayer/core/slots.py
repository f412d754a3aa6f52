"""Slots: the named places of a backbone, filled by a class, a factory or a name from the catalogue."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from importlib import import_module
from typing import Any

from torch import nn

from interlayer import catalog

SIZES = ("kv_heads", "hidden", "grid", "scale")  # sizes that only some fillings use
WHO = {
    "norm": "a stream that normalises, such as stream='pre-norm'",
    "activation": "an MLP with an activation, such as mlp='mlp'",
    "linear": "parts made of linear maps, such as mixer='attention'",
    "kv_heads": "mixer='attention'",
    "hidden": "mlp='mlp'",
    "grid": "position='conditional'",
    "scale": "position='sinusoidal'",
}
_used: ContextVar[set[str] | None] = ContextVar("used", default=None)


@contextmanager
def watching(model: str, given: Mapping[str, Any]) -> Iterator[None]:
    """Check that every slot and size that a model was given is used by some part that is built inside.

    Args:
        model: Name of the model, for the message.
        given: The arguments that the caller named.

    Raises:
        ValueError: One of them has no effect: nothing was built from it.
    """
    used: set[str] = set()
    outer = _used.get()
    token = _used.set(used)
    try:
        yield
    finally:
        _used.reset(token)
        if outer is not None:
            outer |= used
    for name, what in given.items() if used else ():  # a model that fills no slot has none: its names are its own
        if what is not None and name not in used and (name in SIZES or name in catalog.slots()):
            others = ", ".join(f"{k}={v!r}" for k, v in given.items() if k in catalog.slots() and k != name)
            raise ValueError(
                f"{model}: {name}={what!r} has no effect: no part {f'with {others} ' if others else ''}is built from it. "
                f"Take {WHO.get(name, 'a part that uses it')}, or leave {name} out."
            )


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
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
            raise ValueError("only keyword options")
        if any(k.arg is None for k in call.keywords):
            raise ValueError("only keyword options")
        return name.strip(), {str(k.arg): ast.literal_eval(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(
            f"slots: {spec[:80]!r} does not read as name(option=value, ...): {str(error) or 'nested too deeply'}."
        ) from error


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
        _note(slot, ())
        return _torch_part(make, options, context)
    names, open_ = parameters(make)
    if unknown := [o for o in options if o not in names]:
        raise ValueError(
            f"slots: {what!r} has no option {unknown[0]!r}.{catalog.nearest(unknown[0], names)} It has {names}."
        )
    _note(slot, names)
    if open_ and not isinstance(make, partial | type):
        return make(**{**context, **options})
    return make(**{**{k: v for k, v in context.items() if k in names}, **options})


def choose(name: str, what: Any, table: Mapping[str, Callable[..., Any]], **context: Any) -> Any:
    """Build a part from a system's own table of classes.

    Args:
        name: What is built, for messages, such as ``"IdentityMappings: shortcut"``.
        what: A name in the table, a spec such as ``"dropout(rate=0.2)"``, or a class or factory.
        table: Classes by name.
        **context: Keyword arguments; the constructor gets those that it names, and the options of the spec.

    Raises:
        ValueError: A name that is not in the table, or an option that the constructor does not have.
    """
    make: Callable[..., Any] = what
    options: dict[str, Any] = {}
    if isinstance(what, str):
        key, options = parse_spec(what)
        if key not in table:
            raise ValueError(f"{name} {key!r} is not one of {list(table)}.{catalog.nearest(key, table)}")
        make = table[key]
    names = parameters(make)[0]
    own = [n for n in names if n not in context]
    if unknown := [o for o in options if o not in own]:
        raise ValueError(f"{name} {what!r} has no option {unknown[0]!r}; it has {own}.")
    return make(**{n: v for n, v in context.items() if n in names}, **options)


def _note(slot: str, names: Sequence[str]) -> None:
    """A slot is filled by a part that takes these arguments."""
    used = _used.get()
    if used is not None:
        used |= {slot, *(name for name in SIZES if name in names)}


def parameters(make: Callable[..., Any]) -> tuple[list[str], bool]:
    """Names that a constructor takes, with those that it hands on to its base by ``**options``; and whether it takes any."""
    if not isinstance(make, type):
        parameters = list(inspect.signature(make).parameters.values())
        return [p.name for p in parameters if p.kind is not p.VAR_KEYWORD], any(
            p.kind is p.VAR_KEYWORD for p in parameters
        )
    names: dict[str, None] = {}
    for cls in make.__mro__:
        if "__init__" in cls.__dict__:
            parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
            names |= dict.fromkeys(p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                return list(names), False
    return list(names), True


def _torch_part(make: type[nn.Module], options: dict[str, Any], context: dict[str, Any]) -> nn.Module:
    """torch's own modules name their sizes in their own way."""
    if issubclass(make, nn.Linear):
        return make(context["inputs"], context["outputs"], **{"bias": context.get("bias", True), **options})
    if "Norm" in make.__name__:
        return make(context["width"], **{k: v for k, v in context.items() if k == "eps"}, **options)
    return make(**options)


def factory(slot: str, what: Any) -> Callable[..., Any]:
    """``fill`` with the slot and its filling fixed, for a part that is built later, once for each place."""
    return partial(fill, slot, what)


def normed_axis(spec: Any) -> str:
    """What the norm of a name takes its statistics over: ``features`` of the last axis or ``channels`` of images.

    Empty for no norm, and for a class or factory, which only its author knows.
    """
    name = parse_spec(spec)[0] if isinstance(spec, str) else "none"
    return {"none": "", "batchnorm": "channels"}.get(name, "features")


def norms(model: str, spec: Any, axis: str) -> Callable[..., nn.Module]:
    """The factory of a model's norms.

    Args:
        model: Name of the model, for the message.
        spec: What fills the slot.
        axis: ``features`` or ``channels``: what the model's norms are for.

    Raises:
        ValueError: A norm over the other axis.
    """
    if normed_axis(spec) not in ("", axis):
        raise ValueError(
            f"{model}: norm={spec!r} normalises {normed_axis(spec)}; this model needs a norm over {axis}, such as "
            f"{'batchnorm' if axis == 'channels' else 'layernorm'!r}."
        )
    return factory("norm", spec)
