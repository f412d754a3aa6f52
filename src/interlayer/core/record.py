"""Notes on a model of how its structure came about: the base model, and the steps that changed it since.

``recipe`` saves these notes beside the weights and builds the model again from them.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch import nn

from interlayer import catalog

BAKE, REPLACE, QUANTIZE, TAKE, FACTOR = (
    "bake",
    "replace",
    "quantize",
    "take",
    "factor",
)  # the steps that are not systems of the catalogue
_KEY = "_interlayer_recipe"
# Keys of a Hugging Face configuration that could make a constructor fetch something; the weights come from the file.
_FETCHING = ("implementation", "auto_map", "trust_remote_code", "quantization_config", "custom_pipelines")


def record(model: nn.Module, system: str, options: Mapping[str, Any], structure: Mapping[str, Any]) -> None:
    """Note on ``model`` that the transform ``system`` (a catalogue slug) was applied to it.

    Call it on the fresh copy before anything of ``model.config`` is changed: the first step also notes the base model.

    Args:
        model: The result of the transform.
        system: Slug in the catalogue.
        options: What the user chose; for people to read.
        structure: What ``restore`` needs to put the structure onto a fresh base; JSON-able.

    Raises:
        TypeError: Options or structure cannot be written as JSON.
    """
    step = {"system": system, "options": dict(options), "structure": dict(structure)}
    try:
        step = json.loads(json.dumps(step))
    except TypeError as error:
        raise TypeError(f"recipe: options and structure of {system!r} must be JSON-able: {error}.") from error
    notes = notes_on(model)
    note(model, notes["base"], [*notes["steps"], step])


def steps(model: nn.Module) -> list[dict[str, Any]]:
    """The steps noted on a model, oldest first, each with system, options and structure."""
    return copy.deepcopy(getattr(model, _KEY, {"steps": []})["steps"])


def rebase(model: nn.Module) -> None:
    """Note that code which no recipe can name changed the structure of ``model``: ``load`` will ask for a base."""
    note(model, {"kind": "given", "class": _title(model)}, [])


def notes_on(model: nn.Module) -> dict[str, Any]:
    """The base of a model as data, and its steps."""
    return getattr(model, _KEY, None) or {"base": _describe(model), "steps": []}


def note(model: nn.Module, base: Mapping[str, Any], steps: list[dict[str, Any]]) -> None:
    """Set the base and the steps of a model."""
    setattr(model, _KEY, {"base": base, "steps": steps})


def own_class(name: str) -> type[nn.Module] | None:
    """The class of ``interlayer.models``, or of a system of the catalogue, that has this name."""
    models = import_module("interlayer.models")
    found = getattr(models, name) if name in models.__all__ else None
    if not isinstance(found, type):
        system = next((s for s in catalog.load().values() if name and name in (s.code, s.network)), None)
        if system is None or system.state == "planned":
            return None
        found = system.resolve() if name == system.code else system.resolve_network()
    return found if issubclass(found, nn.Module) else None


def scrub(value: Any) -> Any:
    """Drop from a configuration what could fetch code or weights."""
    if isinstance(value, dict):
        kept = {k: scrub(v) for k, v in value.items() if not any(word in k for word in _FETCHING)}
        return {k: False if k == "use_pretrained_backbone" else v for k, v in kept.items()}
    return [scrub(v) for v in value] if isinstance(value, list) else value


def _title(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _describe(model: nn.Module) -> dict[str, Any]:
    """What is needed to build a model like this one with fresh weights."""
    name, home = type(model).__name__, type(model).__module__.split(".")[0]
    config: Any = getattr(model, "config", None)
    if home in ("transformers", "diffusers") and getattr(import_module(home), name, None) is type(model):
        found = json.loads(config.to_json_string(use_diff=False)) if home == "transformers" else dict(config)
        if isinstance(found.get("backbone"), str):
            return {"kind": "given", "class": _title(model)}  # its constructor fetches the backbone by name
        base = {"kind": home, "class": name, "config": scrub(json.loads(json.dumps(found, default=list)))}
        if home == "transformers" and config._attn_implementation in ("eager", "sdpa"):
            base["attention"] = config._attn_implementation
        return base
    if home == "interlayer" and isinstance(config, dict) and own_class(name) is type(model):
        try:
            return {"kind": "interlayer", "class": name, "config": json.loads(json.dumps(config))}
        except TypeError:  # built with classes or factories in its slots: no recipe can name those
            pass
    return {"kind": "given", "class": _title(model)}
