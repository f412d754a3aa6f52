"""What an arm's model starts from: a backbone by name, your own class, function or module, a saved model, a Hugging Face name."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from interlayer import catalog, models
from interlayer.core import recipe
from interlayer.core.data import DataShape
from interlayer.core.extras import need
from interlayer.core.select import replace
from interlayer.core.slots import parse_spec
from interlayer.core.swap import SLOTS, Swap
from interlayer.core.task import Simulated
from interlayer.study.objects import is_path, load_object
from interlayer.study.spec import StudyError

SUCH = {"norm": "rmsnorm", "activation": "gelu", "linear": "linear"}
AUTO = {
    ("tokens", "tokens"): "AutoModelForCausalLM",
    ("tokens", "classes"): "AutoModelForSequenceClassification",
    ("image", "classes"): "AutoModelForImageClassification",
}


def make(base: Any, shape: DataShape, options: Mapping[str, Any]) -> nn.Module:
    """Build a model for a task.

    Args:
        base: A family of ``interlayer.models`` or a catalogue model (``"transformer(depth=6)"``), ``package.module:function``,
            a class or function, a module (it is copied, weights included), a folder that ``interlayer.save`` or
            ``save_pretrained`` wrote, or ``hf:NAME``. A class or function is called with the data's shape if it has a first
            argument without default or one called ``shape``, and without arguments otherwise.
        shape: What the task gives and wants.
        options: Keywords of what is called. ``norm``, ``activation`` and ``linear`` that it does not take replace the
            modules of that kind in the finished model.

    Raises:
        StudyError: There is no such base, or an option has nothing to act on.
    """
    if not isinstance(base, str):
        return _own(base, _name(base), shape, options)
    if base.startswith("hf:"):
        return _swapped(pretrained(base[3:], shape), base, options)
    if is_path(base):
        path, own = parse_spec(base)
        return _own(load_object(path), path, shape, {**own, **options})
    if Path(base).is_dir() and base not in (*models.BASES, *catalog.load()):
        saved = Path(base) / recipe.RECIPE
        return _swapped(recipe.load(base) if saved.exists() else pretrained(base, shape), base, options)
    system = catalog.load().get(parse_spec(base)[0])
    if system and system.kind == "simulator":
        slug, own = parse_spec(base)
        return Simulated(catalog.get(slug).resolve()(), {**own, **options})
    return models.build(base, shape, **options)


def is_base(text: str) -> bool:
    """Whether a text names a base by its form alone, without looking into the catalogue."""
    folder = "/" in text and Path(text).is_dir()
    return text.startswith("hf:") or is_path(text) or folder or parse_spec(text)[0] in models.BASES


def pretrained(name: str, shape: DataShape) -> nn.Module:
    """A Hugging Face model with its trained weights, and the head that the task needs (fresh, if it was trained with another).

    Args:
        name: A name on the hub, or a folder that ``save_pretrained`` wrote.
        shape: What the task gives and wants.

    Raises:
        StudyError: No kind of head fits the task.
    """
    hf = need("transformers", "hf", f"the model {name!r}")
    auto = AUTO.get((shape.kind, shape.outputs))
    if auto is None:
        raise StudyError(
            f"hf:{name}: no head of transformers takes {shape.kind} and gives {shape.outputs}; these fit: "
            f"{', '.join(f'{a} to {b}' for a, b in AUTO)}. Pass a function that builds the model instead."
        )
    head = {} if shape.outputs == "tokens" else {"num_labels": shape.classes, "ignore_mismatched_sizes": True}
    return getattr(hf, auto).from_pretrained(name, **head)


def _own(base: Any, name: str, shape: DataShape, options: Mapping[str, Any]) -> nn.Module:
    if isinstance(base, nn.Module):
        return _swapped(copy.deepcopy(base), name, options)
    if not callable(base):
        raise StudyError(
            f"{name}: expected a torch.nn.Module, a class or a function that makes one; got {type(base).__name__}."
        )
    arguments = list(inspect.signature(base).parameters.values())
    places = [a for a in arguments if a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD)]
    first = (
        bool(places)
        and places[0].name not in options
        and (places[0].default is inspect.Parameter.empty or places[0].name == "shape")
    )
    rest = [a for a in arguments if not (first and a is places[0])]
    keywords = [a.name for a in rest if a.kind in (a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY)]
    takes_all = any(a.kind is a.VAR_KEYWORD for a in arguments)
    later = {k: v for k, v in options.items() if k in SLOTS and k not in keywords and not takes_all}
    given = {k: v for k, v in options.items() if k not in later}
    if unknown := [k for k in given if k not in keywords and not takes_all]:
        raise StudyError(
            f"{name} takes no {unknown[0]!r}; it takes {keywords}. Add it as a keyword to offer that slot; "
            f"{', '.join(SLOTS)} act on any model that has such modules."
        )
    if needed := [a.name for a in rest if a.default is a.empty and a.name in keywords and a.name not in given]:
        raise StudyError(
            f"{name} needs {', '.join(needed)}; a model is built with the data's shape alone, or with nothing. "
            f"Give them as options ({name}({needed[0]}=...)), or wrap it in a function that does."
        )
    model = base(shape, **given) if first else base(**given)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name} gave a {type(model).__name__}; expected a torch.nn.Module.")
    return _swapped(model, name, later)


def _swapped(model: nn.Module, name: str, options: Mapping[str, Any]) -> nn.Module:
    """The model with its norms, activations or linear maps replaced."""
    for slot, what in options.items():
        if slot not in SLOTS:
            raise StudyError(f"{name} has no slot {slot!r}; {', '.join(SLOTS)} act on any model that has such modules.")
        if not isinstance(what, str) or Swap(what).slot != slot:
            raise StudyError(f"{name}: {slot}={what!r} names no {slot}; expected one such as {SUCH[slot]!r}.")
        model = replace(model, at="**", with_=what).apply()
    return model


def _name(base: Any) -> str:
    return getattr(base, "__name__", type(base).__name__)
