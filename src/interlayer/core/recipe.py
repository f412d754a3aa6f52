"""Save and load a transformed model: weights as safetensors, and a JSON recipe that rebuilds its structure.

``load`` never imports or runs what a recipe names, except classes of ``interlayer.models``, ``transformers`` and
``diffusers``, and systems of the catalogue; and it never opens a connection.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from interlayer import catalog
from interlayer.core import factored, quantizer, select, weights
from interlayer.core.equal import named_tensors
from interlayer.core.extras import need
from interlayer.core.kinds import Transform
from interlayer.core.record import (
    BAKE,
    FACTOR,
    QUANTIZE,
    REPLACE,
    TAKE,
    note,
    notes_on,
    own_class,
    rebase,
    record,
    scrub,
    steps,
)
from interlayer.core.swap import Swap
from interlayer.core.wiring import shrink
from interlayer.version import __version__

__all__ = ["BAKE", "REPLACE", "load", "rebase", "record", "save", "steps"]

FORMAT = 1
WEIGHTS, RECIPE = "model.safetensors", "recipe.json"
COMMON = 2**24  # sizes up to this are built without asking whether the file can hold so much
Shapes = dict[str, tuple[int, ...]]


def save(model: nn.Module, directory: str | Path) -> None:
    """Write ``model.safetensors`` and ``recipe.json`` into ``directory``.

    Keeps all parameters and buffers bit for bit, those that ``state_dict`` leaves out too. Shared tensors are stored once.

    Raises:
        ValueError: The directory holds other files, or a module keeps extra state that is not a tensor.
        OSError: The files cannot be written; what was there before stays.
    """
    target = Path(directory)
    if target.exists() and not target.is_dir():
        raise ValueError(f"recipe.save: {target} is a file; expected a directory.")
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
    for name, tensor in named_tensors(model).items():
        if id(tensor) in first:
            shared[name] = first[id(tensor)]
        else:
            first[id(tensor)] = name
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    content = {"format": FORMAT, "interlayer": __version__, **notes_on(model), "shared": shared}
    fresh = {name: target / f"{name}.tmp" for name in (WEIGHTS, RECIPE)}
    try:
        target.mkdir(parents=True, exist_ok=True)
        fresh[RECIPE].write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        save_file(tensors, fresh[WEIGHTS])
        shutil.copymode(fresh[RECIPE], fresh[WEIGHTS])  # safetensors lets the owner alone read its files
        for name, path in fresh.items():
            os.replace(path, target / name)
    except (OSError, SafetensorError) as error:
        for path in fresh.values():
            path.unlink(missing_ok=True)
        raise OSError(f"recipe.save: {target} cannot be written: {error}.") from error


def load(directory: str | Path, base: nn.Module | Callable[[], nn.Module] | None = None) -> nn.Module:
    """Build the base model, restore each step on it and fill in the saved weights. The model is in eval mode.

    Args:
        directory: What ``save`` wrote.
        base: A module of the base's structure (it is copied) or a function that makes one. Needed where the base is
            neither one of ``interlayer.models``, the catalogue, ``transformers`` nor ``diffusers``.

    Raises:
        ValueError: A file is missing or broken, of another format, or does not fit the rebuilt model.
        ImportError: The base needs transformers or diffusers, and they are not installed.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     save(nn.Linear(2, 1), place)
        ...     load(place, base=lambda: nn.Linear(2, 1))
        Linear(in_features=2, out_features=1, bias=True)
    """
    source = Path(directory)
    content = _read(source)
    shapes = _shapes(source / WEIGHTS)
    with torch.random.fork_rng(devices=[]):  # building draws initial weights that nobody keeps
        if base is None:
            model = _build(content, shapes)
        else:
            model = copy.deepcopy(base) if isinstance(base, nn.Module) else base()
            if not isinstance(model, nn.Module):
                raise TypeError(f"recipe.load: base made {type(model).__name__}; expected a torch.nn.Module.")
        for step in content["steps"]:
            model = _restore(model, step)
    note(model, content["base"], content["steps"])
    _check(model, shapes, content["shared"], source)
    _fill(model, source / WEIGHTS, content["shared"])
    return model.eval()


def _read(source: Path) -> dict[str, Any]:
    """The recipe, with every key that is used below in its place."""
    path = source / RECIPE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"recipe.load: {path} cannot be read: {error}.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        got = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"recipe.load: {path} has format {repr(got)[:80]}; interlayer {__version__} reads {FORMAT}. "
            "Load it with the version of interlayer that it names."
        )
    base, shared = content.get("base"), content.get("shared")
    fits = {
        "base": isinstance(base, dict) and all(isinstance(base.get(k), str) for k in ("kind", "class")),
        "steps": isinstance(content.get("steps"), list) and all(map(_is_step, content["steps"])),
        "shared": isinstance(shared, dict) and all(isinstance(v, str) for v in shared.values()),
    }
    if wrong := [key for key, fit in fits.items() if not fit]:
        raise ValueError(
            f"recipe.load: {path} lacks {', '.join(wrong)} or has it in another form; expected base (kind, class, config), "
            "steps (a list of system, options, structure) and shared (names of tensors)."
        )
    return content


def _is_step(step: Any) -> bool:
    return (
        isinstance(step, dict) and isinstance(step.get("system"), str) and isinstance(step.get("structure"), dict)
    )  # fmt: skip


def _shapes(path: Path) -> Shapes:
    """Names and shapes from the header of the weights' file; nothing else of it is read."""
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"recipe.load: {path} cannot be read: {error}.") from error


def _build(content: dict[str, Any], shapes: Shapes) -> nn.Module:
    """The base model with fresh weights, from its class and configuration."""
    base, given = content["base"], "Pass base= (a module like it, or a function that makes one)."
    kind, name, config = base["kind"], base["class"], base.get("config")
    if kind == "given":
        raise ValueError(f"recipe.load: the base model is {name}, which a recipe cannot build. {given}")
    if kind not in ("interlayer", "transformers", "diffusers") or not isinstance(config, dict):
        raise ValueError(
            f"recipe.load: a base of kind {kind!r} {'without' if config is None else 'with'} configuration; "
            "expected kind interlayer, transformers or diffusers with one, or given."
        )
    cls: Any = None
    if kind == "interlayer":
        cls = own_class(name)
    else:
        library = need(kind, "hf", "recipe.load")
        parent = library.PreTrainedModel if kind == "transformers" else library.ModelMixin
        found = getattr(library, name, None)
        cls = found if isinstance(found, type) and issubclass(found, parent) else None
    if cls is None:
        raise ValueError(f"recipe.load: {kind} has no model class {name!r}.")
    try:
        packed = any(step["system"] == QUANTIZE for step in content["steps"])
        room = max(sum(map(math.prod, shapes.values())) * (64 if packed else 1), COMMON)
        _sizes(config, room)
        with _offline(), _within(shapes, room, exact=not content["steps"]):
            if kind == "interlayer":
                return cls(**config)
            if kind == "diffusers":
                return cls.from_config(scrub(config))
            settings = cls.config_class.from_dict(json.loads(json.dumps(scrub(config)), object_hook=_float))
            if base.get("attention") == "eager":
                settings._attn_implementation = "eager"
            return cls(settings)
    except Exception as error:  # whatever a constructor makes of a configuration that anyone may have written
        raise ValueError(
            f"recipe.load: {kind}.{name} cannot be built from the saved configuration: {type(error).__name__}: {error}. {given}"
        ) from error


def _sizes(value: Any, room: int, key: str = "config") -> None:
    """Refuse sizes above ``room``, and backbones that a constructor would fetch."""
    if isinstance(value, dict):
        if isinstance(value.get("backbone"), str):
            raise ValueError(f"backbone={value['backbone'][:80]!r} names a model that would be fetched")
        for name, v in value.items():
            _sizes(v, room, name)
    elif isinstance(value, list):
        for v in value:
            _sizes(v, room, key)
    else:
        sizes = re.findall(r"\d{8,}", value) if isinstance(value, str) else [value] if isinstance(value, int) else []
        if any(len(str(n)) > 18 or abs(int(n)) > room for n in sizes):
            raise ValueError(f"{key}={str(value)[:80]} is more than the saved weights can fill")


def _float(value: dict[str, Any]) -> Any:
    """A number that JSON cannot write, from the way in which transformers writes it."""
    return float(value["__float__"]) if set(value) == {"__float__"} else value


@contextmanager
def _offline() -> Iterator[None]:
    """The Hugging Face hub is not asked for anything."""
    constants: Any = sys.modules.get("huggingface_hub.constants")
    if constants is None:
        yield
        return
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def _within(shapes: Shapes, room: int, exact: bool) -> Iterator[None]:
    """Stop a constructor at the first parameter that the file cannot fill, before memory is spent on it.

    Args:
        shapes: What the file holds.
        room: The most numbers of one parameter.
        exact: Whether each parameter has its saved shape already; steps still to be restored may change shapes.
    """
    saved, most, count, here = set(shapes.values()), 16 * len(shapes) + 1000, 0, threading.get_ident()

    def check(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal count
        if parameter is None or threading.get_ident() != here:
            return
        count += 1
        shape = tuple(parameter.shape)
        if (exact and shape not in saved) or parameter.numel() > room:
            raise ValueError(f"no saved tensor has the shape {shape} of {type(module).__name__}.{name}")
        if count > most:
            raise ValueError(f"it wants more than {most} parameters, {len(shapes)} tensors were saved")

    handle = register_module_parameter_registration_hook(check)
    try:
        yield
    finally:
        handle.remove()


def _restore(model: nn.Module, step: dict[str, Any]) -> nn.Module:
    slug, structure = step["system"], step["structure"]
    if slug == BAKE:
        return weights.strip(model)
    if slug == REPLACE:
        return _replaced(model, structure)
    if slug == QUANTIZE:
        return _fits(slug, model, lambda: quantizer.restore(model, structure))
    if slug == TAKE:
        return _fits(slug, model, lambda: shrink.restore(model, structure))
    if slug == FACTOR:
        return _fits(slug, model, lambda: factored.restore(model, structure))
    system = catalog.load().get(slug)
    cls = system.resolve() if system and system.kind == "transform" and system.state != "planned" else None
    if not (isinstance(cls, type) and issubclass(cls, Transform)):
        raise ValueError(
            f"recipe.load: the catalogue has no transform {slug!r}. `interlayer list --kind transform` shows them."
        )
    return _fits(slug, model, lambda: cls().restore(model, structure))


def _fits(slug: str, model: nn.Module, restore: Callable[[], nn.Module]) -> nn.Module:
    try:
        return restore()
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"recipe.load: the step {slug!r} does not fit {type(model).__name__}: {type(error).__name__}: {error}."
        ) from error


def _replaced(model: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
    spec, names = structure.get("with"), structure.get("places")
    there = dict(model.named_modules(remove_duplicate=False))
    if isinstance(spec, str) and isinstance(names, list) and all(isinstance(n, str) and n in there for n in names):
        swap = Swap(spec)
        if not any(swap.refuses(there[n], named=True) for n in names):
            return select.exchange(model, names, swap)
    raise ValueError(f"recipe.load: {str(structure)[:80]!r} does not say what was replaced in {type(model).__name__}.")


def _check(model: nn.Module, shapes: Shapes, shared: dict[str, str], source: Path) -> None:
    """Every tensor of the model is in the file, with its shape, and every tensor of the file in the model."""
    there = named_tensors(model)
    missing = sorted(there.keys() - shapes.keys() - shared.keys())
    unknown = sorted((shapes.keys() | shared.keys()) - there.keys())
    dangling = sorted(a for a, b in shared.items() if b not in shapes)
    for what, names in (
        ("lacks", missing),
        ("has more than the model:", unknown),
        ("shares with tensors that it lacks:", dangling),
    ):
        if names:
            raise ValueError(
                f"recipe.load: {source} {what} {len(names)} tensors, such as {', '.join(names[:3])}. "
                "Is the base the right one?"
            )
    for name, shape in shapes.items():
        if there[name].shape != shape:
            raise ValueError(
                f"recipe.load: {name} is {shape} in {source}, but {tuple(there[name].shape)} in the rebuilt model."
            )


def _fill(model: nn.Module, path: Path, shared: dict[str, str]) -> None:
    there = named_tensors(model)
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"recipe.load: {path} cannot be read: {error}.") from error
    for name, value in saved.items():
        # Copied into memory of torch's own alignment: kernels round otherwise where weights lie unaligned in the file.
        there[name].data = value.clone().to(there[name].device)
    for name, other in shared.items():
        parent, _, last = name.rpartition(".")
        owner = model.get_submodule(parent)
        place: dict[str, Any] = owner._parameters if last in owner._parameters else owner._buffers
        place[last] = there[other]
