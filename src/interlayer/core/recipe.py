"""Save and load a transformed model: the weights as safetensors, and a JSON recipe of how its structure came about.

``load`` never imports or runs what a recipe names, except classes of ``interlayer.models``, ``transformers`` and
``diffusers``, and systems of the catalogue.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import interlayer
from interlayer.core.extras import need
from interlayer.core.kinds import Transform

FORMAT = 1
WEIGHTS, RECIPE = "model.safetensors", "recipe.json"
BAKE, REPLACE = "bake", "replace"  # the steps that are no systems of the catalogue
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
        TypeError: Options or structure can't be written as JSON.
    """
    step = {"system": system, "options": dict(options), "structure": dict(structure)}
    try:
        step = json.loads(json.dumps(step))
    except TypeError as error:
        raise TypeError(f"recipe: options and structure of {system!r} must be JSON-able: {error}.") from error
    kept = getattr(model, _KEY, None) or {"base": _describe(model), "steps": []}
    setattr(model, _KEY, {"base": kept["base"], "steps": [*kept["steps"], step]})


def steps(model: nn.Module) -> list[dict[str, Any]]:
    """The steps noted on a model, oldest first, each with system, options and structure."""
    return copy.deepcopy(getattr(model, _KEY, {"steps": []})["steps"])


def rebase(model: nn.Module) -> None:
    """Note that code which no recipe can name changed the structure of ``model``: ``load`` will ask for a base."""
    setattr(model, _KEY, {"base": {"kind": "given", "class": _title(model)}, "steps": []})


def save(model: nn.Module, directory: str | Path) -> None:
    """Write ``model.safetensors`` and ``recipe.json`` into ``directory``.

    All parameters and buffers are kept bit for bit, those that ``state_dict`` leaves out too; shared ones once.

    Raises:
        ValueError: The directory holds other files, or a module keeps extra state that is not a tensor.
    """
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise ValueError(f"recipe.save: {target} is a file; wanted a directory.")
    others = sorted(p.name for p in target.iterdir() if p.name not in (WEIGHTS, RECIPE)) if target.exists() else []
    former = (target / RECIPE).exists() or not (target / WEIGHTS).exists()
    if others or not former:
        raise ValueError(
            f"recipe.save: {target} holds other files ({', '.join(others[:3] or [WEIGHTS])}). "
            "Choose an empty or new directory, or one saved before."
        )
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise ValueError(
                f"recipe.save: {name or 'the model'} ({type(module).__name__}) keeps extra state, which is not saved."
            )
    first: dict[int, str] = {}
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for name, tensor in _tensors(model):
        if id(tensor) in first:
            shared[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    kept = getattr(model, _KEY, None) or {"base": _describe(model), "steps": []}
    content = {"format": FORMAT, "interlayer": interlayer.__version__, **kept, "shared": shared}
    target.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target / f"{WEIGHTS}.tmp")
    (target / f"{RECIPE}.tmp").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for name in (WEIGHTS, RECIPE):
        os.replace(target / f"{name}.tmp", target / name)


def load(directory: str | Path, base: nn.Module | Callable[[], nn.Module] | None = None) -> nn.Module:
    """Build the base model, restore each step on it and fill in the saved weights. The model comes in eval mode.

    Args:
        directory: What ``save`` wrote.
        base: A module of the base's structure (it is copied) or a function that makes one. Needed where the base is
            neither one of ``interlayer.models``, ``transformers`` nor ``diffusers``.

    Raises:
        ValueError: A file is missing or broken, of another format, or does not fit the rebuilt model.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     save(nn.Linear(2, 1), place)
        ...     load(place, base=lambda: nn.Linear(2, 1))
        Linear(in_features=2, out_features=1, bias=True)
    """
    source = Path(directory)
    content = _read(source)
    try:
        # Copied into memory of torch's own alignment: kernels round otherwise where weights lie unaligned in the file.
        tensors = {name: t.clone() for name, t in load_file(source / WEIGHTS).items()}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"recipe.load: {source / WEIGHTS} can't be read: {error}.") from error
    with torch.random.fork_rng(devices=[]):  # building draws initial weights that nobody keeps
        model = _base(content["base"], base)
        for step in content["steps"]:
            model = _restore(model, step)
    setattr(model, _KEY, {"base": content["base"], "steps": content["steps"]})
    _fill(model, tensors, content["shared"], source)
    return model.eval()


def _read(source: Path) -> dict[str, Any]:
    try:
        content = json.loads((source / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"recipe.load: {source / RECIPE} can't be read: {error}.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        got = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"recipe.load: {source / RECIPE} has format {got!r}; interlayer {interlayer.__version__} reads {FORMAT}. "
            "Load it with the version of interlayer that is named in it."
        )
    shapes = {"base": dict, "steps": list, "shared": dict}
    wrong = [key for key, kind in shapes.items() if not isinstance(content.get(key), kind)]
    if wrong:
        raise ValueError(f"recipe.load: {source / RECIPE} lacks {', '.join(wrong)} or has it in another shape.")
    return content


def _title(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"


def _describe(model: nn.Module) -> dict[str, Any]:
    """What is needed to build a model like this one with fresh weights."""
    name, home = type(model).__name__, type(model).__module__.split(".")[0]
    config: Any = getattr(model, "config", None)
    if home in ("transformers", "diffusers") and getattr(import_module(home), name, None) is type(model):
        found = json.loads(config.to_json_string(use_diff=False)) if home == "transformers" else dict(config)
        told = {"kind": home, "class": name, "config": _scrub(json.loads(json.dumps(found, default=list)))}
        if home == "transformers" and config._attn_implementation in ("eager", "sdpa"):
            told["attention"] = config._attn_implementation
        return told
    if home == "interlayer" and isinstance(config, dict) and _ours(name) is type(model):
        try:
            return {"kind": "interlayer", "class": name, "config": json.loads(json.dumps(config))}
        except TypeError:  # built with classes or factories in its slots: no recipe can name those
            pass
    return {"kind": "given", "class": _title(model)}


def _ours(name: str) -> Any:
    found = getattr(import_module("interlayer.models"), name, None)
    fits = isinstance(found, type) and issubclass(found, nn.Module) and found.__module__.startswith("interlayer.models")
    return found if fits else None


def _scrub(value: Any) -> Any:
    """Drop from a configuration what could fetch code or weights."""
    if isinstance(value, dict):
        kept = {k: _scrub(v) for k, v in value.items() if not any(word in k for word in _FETCHING)}
        return {k: False if k == "use_pretrained_backbone" else v for k, v in kept.items()}
    return [_scrub(v) for v in value] if isinstance(value, list) else value


def _base(told: dict[str, Any], given: nn.Module | Callable[[], nn.Module] | None) -> nn.Module:
    kind, name, config = told.get("kind"), str(told.get("class")), told.get("config")
    if given is not None:
        model = copy.deepcopy(given) if isinstance(given, nn.Module) else given()
        if not isinstance(model, nn.Module):
            raise TypeError(f"recipe.load: base made {type(model).__name__}; wanted a torch.nn.Module.")
        return model
    if kind == "given":
        raise ValueError(
            f"recipe.load: the base model is {name}, which a recipe can't build. "
            "Pass base= (a module like it, or a function that makes one)."
        )
    if kind not in ("interlayer", "transformers", "diffusers") or not isinstance(config, dict):
        raise ValueError(
            f"recipe.load: unknown kind of base {kind!r}; wanted interlayer, transformers, diffusers or given."
        )
    cls: Any = None
    if kind == "interlayer":
        cls = _ours(name)
    else:
        library = need(kind, "hf", "recipe.load")
        parent = library.PreTrainedModel if kind == "transformers" else library.ModelMixin
        found = getattr(library, name, None)
        cls = found if isinstance(found, type) and issubclass(found, parent) else None
    if cls is None:
        raise ValueError(f"recipe.load: {kind} has no model class {name!r}.")
    try:
        if kind == "interlayer":
            return cls(**config)
        if kind == "diffusers":
            return cls.from_config(_scrub(config))
        settings = cls.config_class.from_dict(_scrub(config))
        settings._attn_implementation = (
            "eager" if told.get("attention") == "eager" else "sdpa" if cls._supports_sdpa else "eager"
        )
        return cls(settings)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"recipe.load: {kind}.{name} can't be built from the saved configuration: {error}.") from error


def _restore(model: nn.Module, step: Any) -> nn.Module:
    from interlayer import catalog
    from interlayer.core import weights

    if (
        not isinstance(step, dict)
        or not isinstance(step.get("system"), str)
        or not isinstance(step.get("structure"), dict)
    ):
        raise ValueError(f"recipe.load: {str(step)[:80]!r} is no step; wanted system, options and structure.")
    slug = step["system"]
    if slug == BAKE:
        return weights.strip(model)
    if slug == REPLACE:
        return _replaced(model, step["structure"])
    system = catalog.load().get(slug)
    cls = system.resolve() if system and system.kind == "transform" and system.state != "planned" else None
    if not (isinstance(cls, type) and issubclass(cls, Transform)):
        raise ValueError(
            f"recipe.load: the catalogue has no transform {slug!r}. `interlayer list --kind transform` shows them."
        )
    return cls().restore(model, step["structure"])


def _replaced(model: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
    from interlayer.core import select, slots

    spec, places = structure.get("with"), structure.get("places")
    there = dict(model.named_modules())
    if not isinstance(spec, str) or not isinstance(places, list) or [p for p in places if p not in there]:
        raise ValueError(
            f"recipe.load: {str(structure)[:80]!r} does not say what was replaced in {type(model).__name__}."
        )
    return select.exchange(model, places, slots.Swap(spec))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _fill(model: nn.Module, tensors: dict[str, Tensor], shared: dict[str, str], source: Path) -> None:
    there = dict(_tensors(model))
    missing = sorted(there.keys() - tensors.keys() - shared.keys())
    unknown = sorted((tensors.keys() | shared.keys()) - there.keys())
    dangling = sorted(a for a, b in shared.items() if b not in tensors)
    for what, names in (("lacks", missing), ("has beyond the model", unknown), ("shares what is not there:", dangling)):
        if names:
            raise ValueError(
                f"recipe.load: {source} {what} {len(names)} tensors, such as {', '.join(names[:3])}. "
                "Is the base the right one?"
            )
    for name, value in tensors.items():
        if there[name].shape != value.shape:
            raise ValueError(
                f"recipe.load: {name} is {tuple(value.shape)} in {source}, "
                f"but {tuple(there[name].shape)} in the rebuilt model."
            )
        there[name].data = value.to(there[name].device)
    for name, other in shared.items():
        parent, _, last = name.rpartition(".")
        owner = model.get_submodule(parent)
        place: dict[str, Any] = owner._parameters if last in owner._parameters else owner._buffers
        place[last] = there[other]
