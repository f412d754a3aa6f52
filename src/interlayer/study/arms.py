"""What an arm's text means, and the model, rule or transform that it builds."""

from __future__ import annotations

import ast
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch import nn

from interlayer import catalog, models
from interlayer.core.data import DataShape
from interlayer.core.slots import parse_spec
from interlayer.study.spec import StudyError, split_top

TRAINING = ("lr", "weight_decay", "warmup", "schedule")


@dataclass(frozen=True)
class Arm:
    """An arm, read: which model is built, how it is trained, and what is done to it afterwards.

    Args:
        name: Name in the report.
        base: What ``build`` starts from.
        options: Sizes and slots that the arm changes.
        training: Training settings of its own (``lr``, ``weight_decay``, ``warmup``, ``schedule``).
        rule: Learning rule and its options, in place of back-propagation with AdamW.
        transform: What is done to the trained model before it is judged.
    """

    name: str
    base: str
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    rule: tuple[str, Mapping[str, Any]] | None = None
    transform: tuple[str, Mapping[str, Any]] | None = None

    def build(self, shape: DataShape) -> nn.Module:
        """The arm's model for data of that shape."""
        if is_path(self.base):
            name, own = _call_parts(self.base)
            model = call(load_object(name), name, shape, {**own, **self.options})
            if not isinstance(model, nn.Module):
                raise TypeError(
                    f"arm {self.name!r}: {self.base} gave a {type(model).__name__}; wanted a torch.nn.Module."
                )
            return model
        return models.build(self.base, shape, **self.options)


def parse(name: str, use: str, base: str) -> Arm:
    """Read an arm's text.

    Args:
        name: Name in the report.
        use: Terms joined by ``+``: ``plain``, a slug with options, another base, ``key=value``, or ``package.module:function``.
        base: The study's base.

    Raises:
        StudyError: A term that means nothing, or two that cannot be together.
    """
    options: dict[str, Any] = {}
    training: dict[str, Any] = {}
    rule = transform = None
    model = base
    for term in split_top(use, "+"):
        key, equals, value = term.partition("=")
        if equals and "(" not in key:
            target = training if key.strip() in TRAINING else options
            _put(target, key.strip(), _literal(value.strip()), name)
        elif is_path(term) or parse_spec(term)[0] in models.BASES:
            model = term
        elif term != "plain":
            slug, own = parse_spec(term)
            system = _system(slug, name, model)
            if system.kind == "model" or (system.network and not system.slot):
                model = term
            elif system.kind == "layer":
                if not system.slot:
                    raise StudyError(
                        f"arm {name!r}: {slug!r} fills no slot of a backbone; use it in a model of your own."
                    )
                _put(options, system.slot, term, name)
            elif system.kind == "rule":
                if rule:
                    raise StudyError(f"arm {name!r}: {rule[0]!r} and {slug!r} are both learning rules; an arm has one.")
                rule = (slug, own)
            elif system.kind == "transform":
                if transform:
                    raise StudyError(
                        f"arm {name!r}: {transform[0]!r} and {slug!r} are both transforms; an arm has one."
                    )
                transform = (slug, own)
            else:
                raise StudyError(
                    f"arm {name!r}: {slug!r} is a probe; it looks into a model and has nothing to compare."
                )
    return Arm(name, model, options, training, rule, transform)


def _put(target: dict[str, Any], key: str, value: Any, arm: str) -> None:
    if key in target:
        raise StudyError(
            f"arm {arm!r}: {key!r} is set twice, to {target[key]!r} and to {value!r}; an arm has one of each."
        )
    target[key] = value


def _system(slug: str, arm: str, base: str) -> catalog.System:
    systems = catalog.load()
    if slug not in systems:
        raise StudyError(
            f"arm {arm!r}: there is no system {slug!r}.{catalog.nearest(slug, ['plain', *models.BASES, *systems])} "
            "An arm is plain, a slug, key=value, package.module:function, or several joined by +."
        )
    return systems[slug]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def is_path(text: str) -> bool:
    """Whether a text is of the form ``package.module:function``, perhaps with options in brackets."""
    module, colon, function = text.partition("(")[0].partition(":")
    return bool(colon) and all(p.isidentifier() for p in (*module.split("."), function.strip()))


def _call_parts(text: str) -> tuple[str, dict[str, Any]]:
    return parse_spec(text)


def load_object(path: str) -> Any:
    """Import ``package.module:name``; the current folder is looked in too.

    Raises:
        StudyError: No such module, or it has no such name.
    """
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        if error.name and not f"{module}.".startswith(f"{error.name}."):
            raise
        raise StudyError(f"{path}: there is no module {module!r} here ({os.getcwd()}) or installed.") from error
    if not hasattr(found, name):
        raise StudyError(f"{path}: module {module!r} has no {name!r}.{catalog.nearest(name, dir(found))}")
    return getattr(found, name)


def call(make: Callable[..., Any], path: str, shape: DataShape, options: Mapping[str, Any]) -> Any:
    """Call a user's model function with the data's shape and the arm's options."""
    names = inspect.signature(make).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in names.values()):
        for key in options:
            if key not in names:
                raise StudyError(
                    f"{path} takes no {key!r}; it takes {list(names)}. Add it as a keyword to offer that slot."
                )
    return make(shape, **options)
