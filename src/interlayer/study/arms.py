"""What an arm's text means, and the model, rule or transform that it builds."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from interlayer import catalog
from interlayer.core.data import DataShape
from interlayer.core.kinds import Rule, Transform
from interlayer.core.pairing import Plan
from interlayer.core.slots import parse_spec
from interlayer.models import BASES
from interlayer.study import bases
from interlayer.study.objects import Objects, is_path, load_object
from interlayer.study.spec import StudyError, split_top

TRAINED = "trained:"  # what a base begins with that is trained once for each seed, and shared by all arms
Use = tuple[str | type, Mapping[str, Any]]  # a system or a class of your own, and its options


@dataclass(frozen=True)
class Training:
    """How an arm is trained.

    Args:
        lr: Peak learning rate; searched for if there is none.
        weight_decay: AdamW's weight decay of matrices.
        warmup: Share of the budget in which the learning rate rises to its peak.
        schedule: Its course afterwards, ``cosine`` or ``constant``.
        clip: Largest norm of the gradient.
    """

    lr: float | None = None
    weight_decay: float = 0.01
    warmup: float = 0.1
    schedule: str = "cosine"
    clip: float = 1.0

    def rate(self, share: float, step: float) -> float:
        """The learning rate at a share of the budget, as a part of its peak: a linear rise, then half a cosine down to a tenth
        (or constant)."""
        if share < self.warmup:
            return max(share, step) / self.warmup
        if self.schedule == "constant":
            return 1.0
        return 0.55 + 0.45 * math.cos(math.pi * (share - self.warmup) / (1 - self.warmup))


TRAINING = ("lr", "weight_decay", "warmup", "schedule")  # what an arm can set for itself


@dataclass(frozen=True)
class Arm:
    """An arm, read: which model is built, how it is trained, and what is done to it afterwards.

    Args:
        name: Name in the report.
        base: What ``build`` starts from; see ``bases.make``.
        options: Sizes and slots that the arm changes.
        training: How it is trained.
        rule: Learning rule and its options, in place of back-propagation with AdamW.
        transforms: What is done to the trained model before it is judged, one after the other.
        trained: Whether the model is trained once for each seed, and shared with all other arms of which that is true.
        plan: How its draws are named, once it was built.
    """

    name: str
    base: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Training = Training()
    rule: Use | None = None
    transforms: tuple[Use, ...] = ()
    trained: bool = False
    plan: Plan | None = field(default=None, compare=False, repr=False)

    def build(self, shape: DataShape) -> nn.Module:
        """The arm's model for data of that shape."""
        return bases.make(self.base, shape, self.options)


def parse(name: str, use: str, base: str, given: Objects | None = None, training: Training = Training()) -> Arm:
    """Read an arm's text.

    Args:
        name: Name in the report.
        use: Terms joined by ``+``: ``plain``, a slug with options, another base, ``key=value``, or ``package.module:function``.
        base: The study's base.
        given: Objects that stand behind texts; a mapping holds options.
        training: The study's way to train.

    Raises:
        StudyError: A term that means nothing, or two that cannot be together.
    """
    options: dict[str, Any] = {}
    own_training: dict[str, Any] = {}
    rules: list[Use] = []
    transforms: list[Use] = []
    given = given or Objects()
    trained = base.startswith(TRAINED)
    start = model = given.get_or_text(base.removeprefix(TRAINED))
    for term in split_top(use, "+"):
        key, equals, value = term.partition("=")
        thing = given.get_or_text(term)
        if isinstance(thing, Mapping):
            for option, what in thing.items():
                _put(own_training if option in TRAINING else options, option, what, name)
        elif (made := _own_kind(thing)) is not None:
            kind, use_ = made
            (rules if kind is Rule else transforms).append(use_)
        elif thing is not term:
            model = thing
        elif equals and "(" not in key:
            target = own_training if key.strip() in TRAINING else options
            _put(target, key.strip(), _literal(value.strip()), name)
        elif bases.is_base(term):
            model = term
        elif term != "plain":
            slug, own = parse_spec(term)
            system = _system(slug, name)
            if system.kind in ("model", "simulator") or (system.network and not system.slot):
                model = term
            elif system.kind == "layer":
                if not system.slot:
                    raise StudyError(
                        f"arm {name!r}: {slug!r} fills no slot of a backbone; use it in a model of your own."
                    )
                _put(options, system.slot, term, name)
            elif system.kind in ("rule", "transform"):
                (rules if system.kind == "rule" else transforms).append((slug, own))
            else:
                raise StudyError(
                    f"arm {name!r}: {slug!r} is a {system.kind}; compare takes layers, models, rules, transforms and simulators."
                )
    if len(rules) > 1:
        shown = " and ".join(map(_shown, rules[:2]))
        raise StudyError(f"arm {name!r}: {shown} are both learning rules; an arm has one.")
    if trained and (options or own_training or rules or model is not start):
        raise StudyError(
            f"arm {name!r}: the base {base!r} is trained once for all arms, so an arm is plain or transforms joined by +; "
            f"got {use!r}. Leave {TRAINED!r} out to train each arm."
        )
    rule = rules[0] if rules else None
    return Arm(name, model, options, replace(training, **own_training), rule, tuple(transforms), trained)


def _own_kind(thing: Any) -> tuple[type, Use] | None:
    """A rule or a transform of the user's own: a class, or ``package.module:Class`` with options."""
    options: Mapping[str, Any] = {}
    if isinstance(thing, str) and is_path(thing):
        path, options = parse_spec(thing)
        thing = load_object(path)
    for kind in (Rule, Transform):
        if isinstance(thing, type) and issubclass(thing, kind):
            return kind, (thing, options)
    return None


def resolve(use: Use) -> Any:
    """The class of a use."""
    return catalog.get(use[0]).resolve() if isinstance(use[0], str) else use[0]


def _shown(use: Use) -> str:
    return repr(use[0] if isinstance(use[0], str) else use[0].__name__)


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
