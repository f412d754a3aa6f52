"""Add parts to a frozen model, choose which act, take them off, or bake them into plain weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from interlayer.core import taps
from interlayer.core.attach.parts import Part
from interlayer.core.delivery import guard, release
from interlayer.core.order import between, undone
from interlayer.core.select import At, select
from interlayer.core.swap import bypassed, unfuse

M = TypeVar("M", bound=nn.Module)
_BEFORE = "_before_parts"  # what asked for gradients, and what guarded the model
WAY = (
    "Save the parts alone with interlayer.core.attach.save(model, directory), or save interlayer.core.attach.bake(model), which "
    "has them in plain weights."
)


class Attached(nn.ModuleDict):
    """The parts of one host by task, and the names of those that act."""

    def __init__(self, late: str, apart: bool) -> None:
        super().__init__()
        self.late, self.apart = late, apart  # the module whose output changes, and whether it is another one
        self.enters, self.spans, self.on = False, False, tuple[str, ...]()
        self.held: Tensor | None = None  # the host's input, until the late module has run


def attach(model: M, at: At | Mapping[str, str], make: Callable[[nn.Module], Part], *, task: str = "default") -> M:
    """Freeze a model and add a part to each selected module, in place. The parts of ``task`` alone act afterwards, and learn.

    Modules keep their classes, names and weights. Calls with the same task add to it. Costs what the parts cost: nothing is
    computed for tasks that don't act.

    Args:
        model: Any module.
        at: Modules as ``select.where`` reads them, or a mapping from the name of a module, whose input the part reads, to the
            name of one that runs after it, whose output the part changes (such as the dropout that follows).
        make: From the module, its part: a class such as ``Lora``, or ``partial(Lora, rank=4)``.
        task: Name of the task.

    Returns:
        The model.

    Raises:
        ValueError: Nothing is selected, a module has a part of this task already or is never called, or the name is unusable.
        TypeError: ``make`` gives something else than a part.

    Examples:
        >>> from interlayer.core.attach import Lora
        >>> model = attach(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear, Lora)
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.attached.default.lora_A.weight', '0.attached.default.lora_B.weight']
    """
    if not task or "." in task or hasattr(nn.ModuleDict, task) or task in ("late", "on", "held", "training"):
        raise ValueError(
            f"attach: task was {task!r}; expected a name without dots that is no attribute of a ModuleDict."
        )
    sites = dict(at) if isinstance(at, Mapping) else {name: name for name, _ in select(model, at) if own(name)}
    there, dead = dict(model.named_modules()), bypassed(model)
    parts: dict[str, Part] = {}
    for name, late in sites.items():
        if name not in there or late not in there:
            raise ValueError(f"attach: {type(model).__name__} has no module {name if name not in there else late!r}.")
        if name in dead:
            raise ValueError(
                f"attach: {dead[name]}, so a part at {name!r} would be without effect. Choose another module."
            )
        if not own(name) or task in getattr(there[name], "attached", ()):
            raise ValueError(
                f"attach: {name!r} has or is a part of the task {task!r} already. Use another task, or detach it first."
            )
        parts[name] = made = make(there[name])
        if not isinstance(made, Part):
            raise TypeError(f"attach: make gave a {type(made).__name__}; expected an interlayer.core.attach.Part.")
    if _BEFORE not in vars(model):
        setattr(model, _BEFORE, ({n: p.requires_grad for n, p in model.named_parameters()}, release(model)))
        guard(model, "attached parts", WAY)
        model.requires_grad_(False)
    for name, part in parts.items():
        host: Any = there[name]
        weight = next(host.parameters(), None)
        if weight is not None:  # half precision is too coarse for small steps
            part.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        if not hasattr(host, "attached"):
            (_span if part.spans else _hook)(model, host, name, sites[name])
        if host.attached.spans != part.spans:
            raise ValueError(f"attach: {name!r} has parts that span all blocks, or others. Detach them first.")
        if host.attached.late != sites[name]:
            raise ValueError(
                f"attach: parts at {name!r} act at {host.attached.late!r} already, not at {sites[name]!r}."
            )
        host.attached[task] = part.train(host.training)
        if type(part).enter is not Part.enter and not host.attached.enters:
            host.attached.enters = True
            host.register_forward_pre_hook(_before)
    unfuse(model, {id(there[name]) for name in sites})
    active(model, task)
    return model


def _hook(model: nn.Module, host: Any, name: str, late: str) -> None:
    host.attached = Attached(late, apart=late != name)
    host.register_forward_hook(_after, with_kwargs=True)
    if late != name:
        model.get_submodule(late).register_forward_hook(partial(_late, host))


def _span(model: nn.Module, host: Any, name: str, late: str) -> None:
    between(model, late, partial(_between, host))
    host.attached = Attached(late, apart=late != name)
    host.attached.spans = True


def _between(host: Any, number: int, x: Tensor) -> Tensor:
    new = x
    for task in host.attached.on:
        part: Part = host.attached[task]
        new = part.between(number, _given(part, new)).to(x.dtype)
    return new


def _given(part: Part, x: Tensor) -> Tensor:
    """The input in the precision of the part's own weights, where there is no autocast."""
    if torch.is_autocast_enabled(x.device.type) or not x.is_floating_point():
        return x
    return x.to(next(part.parameters()).dtype)


def _before(host: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    parts = host.attached
    x = args[0]
    for task in parts.on:
        x = parts[task].enter(x)
    return (x.to(args[0].dtype), *args[1:])


def _after(host: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    parts = host.attached
    if not parts.on:
        return output
    x = args[0] if args else taps.first(kwargs)
    if parts.apart:
        parts.held = x
        return output
    return _changed(parts, x, output)


def _late(host: Any, module: nn.Module, args: Any, output: Any) -> Any:
    parts = host.attached
    x, parts.held = parts.held, None
    return output if x is None else _changed(parts, x, output)


def _changed(parts: Any, x: Tensor, output: Any) -> Any:
    """The output after all parts that act. Without autocast they compute in the precision of their own weights."""
    y = output if isinstance(output, Tensor) else taps.first(output)
    new = y
    for task in parts.on:
        part: Part = parts[task]
        new = part(_given(part, x), new)
    new = new.to(y.dtype)
    return new if isinstance(output, Tensor) else taps.swap(output, new)


def own(name: str) -> bool:
    """Whether a module of this name is the base's own and not inside a part."""
    return ".attached." not in f".{name}."


def attached(model: nn.Module) -> dict[str, dict[str, Part]]:
    """The parts of a model: by task, by the name of their host.

    Examples:
        >>> from interlayer.core.attach import Bias
        >>> list(attached(attach(nn.Sequential(nn.Linear(2, 2)), "0", Bias, task="a")))
        ['a']
    """
    found: dict[str, dict[str, Part]] = {}
    for name, host in model.named_modules():
        parts: Any = getattr(host, "attached", None)
        if isinstance(parts, Attached):
            for task in parts:
                found.setdefault(task, {})[name] = cast(Part, parts[task])
    return found


def _named(model: nn.Module, tasks: tuple[str, ...]) -> dict[str, dict[str, Part]]:
    there = attached(model)
    if unknown := [t for t in tasks if t not in there]:
        raise ValueError(f"attach: {type(model).__name__} has no task {unknown[0]!r}; it has {list(there)}.")
    return there


def active(model: M, *tasks: str) -> M:
    """Let the parts of these tasks act, one after the other, and of no others; without a task, the base alone. In place.

    Only parts that act ask for gradients.

    Raises:
        ValueError: There is no such task.
    """
    there = _named(model, tasks)
    for host in model.modules():
        parts: Any = getattr(host, "attached", None)
        if isinstance(parts, Attached):
            parts.on = tuple(t for t in tasks if t in parts)
    for acts in (False, True):  # what two tasks share learns if one of them acts
        for task, parts in there.items():
            for part in parts.values() if (task in tasks) == acts else ():
                part.requires_grad_(acts)
    return model


def detach(model: M, *tasks: str) -> M:
    """Take the parts of these tasks off, or of all; without parts the model is as before ``attach``. In place.

    Raises:
        ValueError: There is no such task.
    """
    gone = tasks or tuple(attached(model))
    for task, parts in _named(model, gone).items():
        for name in parts if task in gone else ():
            host: Any = model.get_submodule(name)
            host.attached.on = tuple(t for t in host.attached.on if t != task)
            del host.attached[task]
            if not len(host.attached) and host.attached.spans:
                undone(model, host.attached.late)
                del host.attached
            elif not len(host.attached):
                _unhook(model, host)
    if not attached(model) and _BEFORE in vars(model):
        release(model)
        flags, guards = vars(model).pop(_BEFORE)
        vars(model).update(guards)
        for name, p in model.named_parameters():
            p.requires_grad_(flags[name])
    return model


def _unhook(model: nn.Module, host: Any) -> None:
    def ours(hook: Any) -> bool:
        return hook in (_before, _after) or (isinstance(hook, partial) and hook.func is _late and hook.args[0] is host)

    places = {id(m): m for m in (host, model.get_submodule(host.attached.late))}
    del host.attached
    for module in places.values():
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            for key, hook in list(getattr(module, kind).items()):
                if ours(hook) and (module is host or isinstance(hook, partial)):
                    del getattr(module, kind)[key]
                    getattr(module, f"{kind}_with_kwargs").pop(key, None)


def bake(model: M) -> M:
    """A plain copy of the model in whose weights the parts that act are merged; nothing is attached to it.

    Outputs in evaluation mode equal those with parts up to rounding.

    Raises:
        ValueError: No part acts, a part has no equal among plain weights, or a host shares its weight with another module.

    Examples:
        >>> from interlayer.core.attach import Lora
        >>> model, x = attach(nn.Sequential(nn.Linear(4, 4)), "0", Lora), torch.randn(3, 4)
        >>> _ = nn.init.normal_(model[0].attached["default"].lora_B.weight)
        >>> plain = bake(model)
        >>> print(plain), torch.testing.assert_close(plain(x), model(x))
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
        )
        (None, None)
    """
    new = copy.deepcopy(model)
    owners: dict[int, set[str]] = {}
    for name, module in new.named_modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), set()).add(name)
    merged = 0
    for name, host in list(new.named_modules()):
        parts: Any = getattr(host, "attached", None)
        for task in parts.on if isinstance(parts, Attached) else ():
            sharing = {n for p in host.parameters(recurse=False) for n in owners[id(p)]}
            try:
                if len(sharing) > 1:
                    raise ValueError(f"its weight is shared by {' and '.join(sorted(sharing))}")
                parts[task].merge(host)
            except ValueError as error:
                raise ValueError(
                    f"attach.bake: the part {task!r} at {name!r} cannot become plain weights: {error}. "
                    "Keep it as a part: interlayer.core.attach.save(model, directory)."
                ) from error
            merged += 1
    if not merged:
        raise ValueError("attach.bake: no part acts; expected at least one. Choose tasks with active(model, task).")
    return detach(new)
