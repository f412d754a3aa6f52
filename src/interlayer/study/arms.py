"""What an arm's text means, and the model, rule or transform that it builds."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from interlayer import catalog
from interlayer.core.data import DataShape
from interlayer.core.pairing import Plan
from interlayer.core.slots import parse_spec
from interlayer.models import BASES
from interlayer.study import bases
from interlayer.study.objects import Objects
from interlayer.study.spec import StudyError, split_top

TRAINING = ("lr", "weight_decay", "warmup", "schedule")


@dataclass(frozen=True)
class Arm:
    """An arm, read: which model is built, how it is trained, and what is done to it afterwards.

    Args:
        name: Name in the report.
        base: What ``build`` starts from; see ``bases.make``.
        options: Sizes and slots that the arm changes.
        training: Training settings of its own (``lr``, ``weight_decay``, ``warmup``, ``schedule``).
        rule: Learning rule and its options, in place of back-propagation with AdamW.
        transform: What is done to the trained model before it is judged.
        plan: How its draws are named, once it was built.
    """

    name: str
    base: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    rule: tuple[str, Mapping[str, Any]] | None = None
    transform: tuple[str, Mapping[str, Any]] | None = None
    plan: Plan | None = field(default=None, compare=False, repr=False)

    def build(self, shape: DataShape) -> nn.Module:
        """The arm's model for data of that shape."""
        return bases.make(self.base, shape, self.options)


def parse(name: str, use: str, base: str, given: Objects | None = None) -> Arm:
    """Read an arm's text.

    Args:
        name: Name in the report.
        use: Terms joined by ``+``: ``plain``, a slug with options, another base, ``key=value``, or ``package.module:function``.
        base: The study's base.
        given: Objects that stand behind texts; a mapping holds options.

    Raises:
        StudyError: A term that means nothing, or two that cannot be together.
    """
    options: dict[str, Any] = {}
    training: dict[str, Any] = {}
    rule = transform = None
    given = given or Objects()
    model = given.get_or_text(base)
    for term in split_top(use, "+"):
        key, equals, value = term.partition("=")
        thing = given.get_or_text(term)
        if isinstance(thing, Mapping):
            for option, what in thing.items():
                _put(training if option in TRAINING else options, option, what, name)
        elif thing is not term:
            model = thing
        elif equals and "(" not in key:
            target = training if key.strip() in TRAINING else options
            _put(target, key.strip(), _literal(value.strip()), name)
        elif bases.is_base(term):
            model = term
        elif term != "plain":
            slug, own = parse_spec(term)
            system = _system(slug, name)
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


def _system(slug: str, arm: str) -> catalog.System:
    systems = catalog.load()
    if slug not in systems:
        raise StudyError(
            f"arm {arm!r}: there is no system {slug!r}.{catalog.nearest(slug, ['plain', *BASES, *systems])} "
            "An arm is plain, a slug, key=value, package.module:function, or several joined by +."
        )
    return systems[slug]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
