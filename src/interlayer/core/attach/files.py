"""Save and load the parts of one task in PEFT's files: ``adapter_config.json`` and ``adapter_model.safetensors``.

LoRA and IA3, with modules that are trained whole beside them, are files that PEFT itself reads; folders that PEFT wrote for these,
with biases trained beside LoRA too, are read. Other kinds are written by the same convention under a ``peft_type`` of their own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from interlayer import catalog
from interlayer.core.attach.attaching import attach, attached, own
from interlayer.core.attach.parts import KINDS, Bias, Lora, Part, Scale, Whole

M = TypeVar("M", bound=nn.Module)
CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
UNKNOWN = (
    "use_dora",
    "use_qalora",
    "arrow_config",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
)


def save(model: nn.Module, directory: str | Path, *, task: str = "default") -> None:
    """Write the parts of one task, and nothing of the base.

    Args:
        model: A model with parts.
        directory: Is made; files of an earlier ``save`` are replaced.
        task: Which.

    Raises:
        ValueError: There is no such task, or its parts are of several kinds beside ``Whole``.
    """
    there = attached(model)
    if task not in there:
        raise ValueError(f"attach.save: {type(model).__name__} has no task {task!r}; it has {list(there)}.")
    parts = there[task]
    whole = [n for n, p in parts.items() if isinstance(p, Whole)]
    rest = {n: p for n, p in parts.items() if n not in whole}
    kinds = sorted({p.kind for p in rest.values()})
    if len(kinds) > 1:
        raise ValueError(
            f"attach.save: the task {task!r} has parts of the kinds {kinds}; a folder holds one beside Whole."
        )
    tensors, first, tied = dict[str, Tensor](), dict[int, str](), dict[str, str]()
    for name, part in parts.items():
        state = part.state()
        tensors |= {f"{PREFIX}{name}.{key}": t.detach().cpu().contiguous().clone() for key, t in state.items()}
        stored = {t.data_ptr() for t in state.values()}
        for key, p in part.named_parameters(remove_duplicate=False):
            if p.data_ptr() in stored and (owner := first.setdefault(id(p), f"{name}:{key}")) != f"{name}:{key}":
                tied[f"{name}:{key}"] = owner
    config: dict[str, Any] = {
        "peft_type": (kinds or ["lora"])[0].upper(),
        "task_type": None,
        "base_model_name_or_path": getattr(getattr(model, "config", None), "name_or_path", "") or None,
        "auto_mapping": {"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
        "inference_mode": True,
        "target_modules": list(rest),
        "modules_to_save": whole or None,
        **_settings(model, rest),
    }
    hosts: dict[str, Any] = {name: model.get_submodule(name) for name in parts}
    late = {n: h.attached.late for n, h in hosts.items()}
    notes = {"base": _digest(model, rest, late), "late": late, "tied": tied}
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_file(tensors, target / WEIGHTS, metadata={"format": "pt", "interlayer": json.dumps(notes)})


def _settings(model: nn.Module, parts: Mapping[str, Part]) -> dict[str, Any]:
    """The settings of all parts: those of the first, and what differs by the name of the module, as PEFT writes it."""
    each = {name: part.settings() for name, part in parts.items()}
    found = dict(next(iter(each.values()), {}))
    if all(isinstance(p, Lora) for p in parts.values()) and parts:
        for key, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
            found[pattern] = {n: s[key] for n, s in each.items() if s[key] != found[key]}
    elif all(isinstance(p, Scale) for p in parts.values()) and parts:
        found["feedforward_modules"] = [n for n, p in parts.items() if isinstance(p, Scale) and p.inputs]
    if parts and next(iter(parts.values())).kind in ("lora", "ia3"):
        found["fan_in_fan_out"] = any(type(model.get_submodule(n)).__name__ == "Conv1D" for n in parts)
        return found
    if odd := [name for name, settings in each.items() if settings != found]:
        raise ValueError(
            f"attach.save: the part at {odd[0]!r} has other settings than the first; a folder holds one kind."
        )
    return found


def load(model: M, directory: str | Path, *, task: str = "default", other_base: bool = False) -> M:
    """Attach what ``save`` or PEFT wrote, in place, as the parts of ``task``; they alone act afterwards.

    Args:
        model: A base like the one that the parts were trained on.
        directory: A folder with ``adapter_config.json`` and ``adapter_model.safetensors``.
        task: Its name here.
        other_base: Accept a base with other weights than the parts were trained on, if names and shapes fit.

    Returns:
        The model.

    Raises:
        ValueError: A file is missing or broken, of an unknown kind, or belongs to another base.
    """
    source = Path(directory)
    config, tensors, notes = _read(source)
    title = (config.get("auto_mapping") or {}).get("base_model_class") or "a model"
    if config.get("base_model_name_or_path"):
        title = f"{title} ({config['base_model_name_or_path']})"
    kind = str(config.get("peft_type")).lower()
    cls = _kind(kind, source)
    if used := [key for key in UNKNOWN if config.get(key)]:
        raise ValueError(f"attach.load: {source} uses {used[0]}, which interlayer does not know. Load it with PEFT.")
    names = {n: m for n, m in model.named_modules() if own(n)}
    sites: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, rest = key.removeprefix(PREFIX).rpartition(".")
        while name and name not in names:
            name, _, more = name.rpartition(".")
            rest = f"{more}.{rest}"
        sites.setdefault(name, {})[rest] = tensor
    whole = tuple(config.get("modules_to_save") or ())
    made: dict[str, Part] = {}
    for name, state in sites.items():
        host = names.get(name, model)
        mine = any(name == w or name.endswith(f".{w}") for w in whole)
        try:
            part = Whole(host) if mine else _restored(cls, host, state, _here(config, name))
            part.fill(state)
        except (KeyError, RuntimeError, ValueError) as error:
            shape = tuple(getattr(getattr(host, "weight", None), "shape", ()))
            raise ValueError(
                f"attach.load: {source} was made for {title} and does not fit {type(model).__name__}: "
                f"{PREFIX}{name}.{next(iter(state))} {tuple(next(iter(state.values())).shape)} has no place in "
                f"{name or 'the model'} ({type(host).__name__} {shape}). Load it on the base that it names."
            ) from error
        made[name] = part
    digest, late = notes.get("base"), notes.get("late", {})
    if (
        digest
        and not other_base
        and digest != _digest(model, {n: p for n, p in made.items() if not isinstance(p, Whole)}, late)
    ):
        raise ValueError(
            f"attach.load: {source} was trained on {title} with other weights than this {type(model).__name__} has. Load that "
            "base, or pass other_base=True to use the parts on this one."
        )
    for owned, owner in notes.get("tied", {}).items():
        (name, _, key), (whose, _, which) = owned.partition(":"), owner.partition(":")
        path, _, last = key.rpartition(".")
        made[name].get_submodule(path)._parameters[last] = made[whose].get_parameter(which)
    by_host = {id(names[name]): part for name, part in made.items()}
    return attach(model, {n: late.get(n, n) for n in made}, lambda host: by_host[id(host)], task=task)


def _restored(cls: type[Part], host: Any, state: dict[str, Tensor], settings: Mapping[str, Any]) -> Part:
    """A part for the tensors of one module. Biases that PEFT trained beside LoRA become LoRA's own, or parts where there is none."""
    if cls is Lora and set(state) == {"bias"}:
        return Bias(host)
    if cls is Lora and (bias := state.pop("base_layer.bias", None)) is not None:
        state["lora_B.bias"] = torch.zeros_like(bias)
        scale = Lora.restore(host, state, settings).scale
        state["lora_B.bias"] = (bias - host.bias.detach().to(bias)) / scale
    return cls.restore(host, state, settings)


def _kind(kind: str, source: Path) -> type[Part]:
    """The class of a kind: of this package, or a system of the catalogue."""
    if kind in KINDS:
        return KINDS[kind]
    system = catalog.load().get(kind)
    found = system.resolve() if system and system.state != "planned" else None
    if isinstance(found, type) and issubclass(found, Part):
        return found
    raise ValueError(
        f"attach.load: {source} holds parts of the kind {kind!r}; expected {', '.join(KINDS)} or a system that is attached. "
        "Load it with PEFT."
    )


def _here(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The configuration with what it says of one module alone; PEFT's patterns match the end of a name."""
    alphas = config.get("alpha_pattern") or {}
    own = [alpha for pattern, alpha in alphas.items() if name == pattern or name.endswith(f".{pattern}")]
    return {**config, "lora_alpha": own[0]} if own else dict(config)


def _digest(model: nn.Module, parts: Mapping[str, Part], late: Mapping[str, str]) -> str:
    """A hash of the base's weights to which parts are added."""
    digest = hashlib.sha256()
    for name in sorted(parts):
        host = model.get_submodule(name)
        weights = [getattr(host, "weight", None)]
        if parts[name].spans:
            weights = [p for n, p in model.get_submodule(late[name]).named_parameters() if own(n)]
        for weight in (w for w in weights if isinstance(w, Tensor)):
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def _read(source: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    try:
        config = json.loads((source / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(source / WEIGHTS)
        with safe_open(source / WEIGHTS, "pt") as file:
            own = json.loads((file.metadata() or {}).get("interlayer", "{}"))
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"attach.load: {source} cannot be read: {error}. Expected a folder with {CONFIG} and {WEIGHTS}."
        ) from error
    if not isinstance(config, dict) or not tensors:
        raise ValueError(f"attach.load: {source} holds no configuration or no tensors; expected those of one adapter.")
    return config, tensors, own
