"""Read, patch and clamp activations of named modules inside any model, and leave no trace.

A module's activation is the first tensor of its output (many modules return tuples or dictionaries). ``at`` selects
modules as ``select.where`` does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from interlayer.core.select import At, select

Change = Tensor | float | Callable[[Tensor], Tensor]


def first(value: Any) -> Tensor:
    """The first tensor in a module's output, inside tuples, lists and dictionaries too.

    Raises:
        TypeError: There is none.
    """
    found = next(_leaves(value), None)
    if found is None:
        raise TypeError(f"taps: no tensor in a value of type {type(value).__name__}.")
    return found


def _leaves(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _leaves(item)


def swap(value: Any, new: Tensor) -> Any:
    """The same output with its first tensor replaced; ``value`` itself is unchanged."""
    if isinstance(value, Tensor):
        return new
    if isinstance(value, Mapping):
        key = next(k for k, item in value.items() if next(_leaves(item), None) is not None)
        changed: Any = copy.copy(value)
        changed[key] = swap(value[key], new)
        return changed
    place = next(i for i, item in enumerate(value) if next(_leaves(item), None) is not None)
    items = [*value[:place], swap(value[place], new), *value[place + 1 :]]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


@contextmanager
def read(
    model: nn.Module, at: At, *, side: str = "output", every: bool = False, detach: bool = True
) -> Iterator[dict[str, Any]]:
    """Keep the activations of the selected modules while the context is open; the dictionary stays readable afterwards.

    Args:
        model: Any module.
        at: Which modules.
        side: ``"output"``, or ``"input"`` for the first tensor among the module's arguments.
        every: Keep a list with one activation for each call. By default the last call's.
        detach: Detach the activations from the graph.

    Raises:
        ValueError: No module is selected, or ``side`` is unknown.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with read(net, ["*"]) as seen:
        ...     _ = net(torch.zeros(5, 2))
        >>> {name: tuple(x.shape) for name, x in seen.items()}
        {'0': (5, 3), '1': (5, 3)}
    """
    seen: dict[str, Any] = {}

    def keep(name: str, value: Tensor) -> None:
        if every:
            seen.setdefault(name, []).append(value)
        else:
            seen[name] = value

    with watch(model, at, keep, side=side, detach=detach):
        yield seen


@contextmanager
def watch(
    model: nn.Module, at: At, see: Callable[[str, Tensor], None], *, side: str = "output", detach: bool = True
) -> Iterator[None]:
    """Hand each activation of the selected modules to a function as soon as it is there, so that none has to be kept.

    Args:
        model: Any module.
        at: Which modules.
        see: Called with the module's name and the activation.
        side: ``"output"``, or ``"input"`` for the first tensor among the module's arguments.
        detach: Detach the activations from the graph.

    Raises:
        ValueError: No module is selected, or ``side`` is unknown.

    Examples:
        >>> net, largest = nn.Sequential(nn.Linear(2, 3), nn.ReLU()), {}
        >>> with watch(net, ["*"], lambda name, x: largest.update({name: float(x.max())})):
        ...     _ = net(torch.zeros(5, 2))
        >>> list(largest)
        ['0', '1']
    """
    if side not in ("input", "output"):
        raise ValueError(f"taps.read: side was {side!r}; expected 'input' or 'output'.")

    def hook(name: str) -> Callable[..., None]:
        def told(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            value = first(output if side == "output" else (args, kwargs))
            see(name, value.detach() if detach else value)

        return told

    with _hooks(select(model, at), hook):
        yield


@contextmanager
def patch(model: nn.Module, changes: Mapping[str, Change]) -> Iterator[None]:
    """Change the activations of the selected modules while the context is open.

    Args:
        model: Any module.
        changes: Name or glob to a tensor or number that replaces the activation (it is broadcast), or to a function of
            the activation. Where two select the same module, they act in the order of the mapping.

    Raises:
        ValueError: A name selects no module.

    Examples:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with patch(net, {"1": 7.0}):
        ...     net(torch.zeros(1, 2))
        tensor([[7., 7., 7.]])
    """
    wanted: dict[str, list[Change]] = {}
    modules: dict[str, nn.Module] = {}
    for at, change in changes.items():
        for name, module in select(model, at):
            modules[name] = module
            wanted.setdefault(name, []).append(change)

    def hook(name: str) -> Callable[..., Any]:
        def alter(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            value = first(output)
            for change in wanted[name]:
                if isinstance(change, Tensor):
                    value = change.to(value).expand_as(value)
                else:
                    value = change(value) if callable(change) else torch.full_like(value, change)
            return swap(output, value)

        return alter

    with _hooks(modules.items(), hook):
        yield


def clamp(units: Any, value: Tensor | float) -> Callable[[Tensor], Tensor]:
    """A change for ``patch`` that holds some units (an index into the last axis) at a value.

    >>> clamp([0], 5.0)(torch.zeros(2))
    tensor([5., 0.])
    """

    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[..., units] = value if not isinstance(value, Tensor) else value.to(x)
        return x

    return change


@contextmanager
def _hooks(places: Iterable[tuple[str, nn.Module]], hook: Callable[[str], Callable[..., Any]]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in places]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[nn.Module]:
    """Put a model in eval mode, and restore the mode of each of its modules afterwards."""
    modes = [(m, m.training) for m in model.modules()]
    try:
        yield model.eval()
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def at_rest(model: nn.Module) -> Iterator[nn.Module]:
    """Hold a model in eval mode and restore everything afterwards: modes, gradients, buffers, the random state.

    >>> net = nn.BatchNorm1d(2)
    >>> with at_rest(net):
    ...     net.training
    False
    >>> net.training
    True
    """
    grads = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    held = [None if g is None else g.clone() for _, _, g in grads]
    buffers = [(b, b.clone()) for b in model.buffers()]
    with torch.random.fork_rng(), eval_mode(model):
        try:
            yield model
        finally:
            for (p, needs, grad), value in zip(grads, held, strict=True):
                p.requires_grad_(needs)
                if grad is not None and value is not None:
                    grad.detach().copy_(value)
                p.grad = grad
            with torch.no_grad():
                for buffer, old in buffers:
                    buffer.copy_(old)


def feed(model: nn.Module, data: Any) -> Iterator[Any]:
    """Run a model over data and yield each output.

    Args:
        model: Any module.
        data: One batch or an iterable of batches. A batch is a tensor, a mapping of keyword arguments (Hugging Face),
            or a tuple whose first item is one of these (the rest are targets).
    """
    if isinstance(data, Tensor | Mapping | tuple):
        data = (data,)
    for batch in data:
        args, kwargs = arguments(batch)
        yield model(*args, **kwargs)


def batches(
    data: Any, who: str = "", why: str = "no calibration data; expected batches that the model takes, without targets."
) -> list[Any]:
    """Data as a list of batches; one batch is a list of one.

    Args:
        data: As ``feed`` takes it, or None.
        who: Raise in this name if there are none.
        why: What the error says.

    Raises:
        ValueError: There are none, and ``who`` is given.

    Examples:
        >>> len(batches({"input_ids": torch.zeros(2, 3)})), len(batches(torch.zeros(2) for _ in range(4))), batches(None)
        (1, 4, [])
    """
    found = [data] if isinstance(data, Tensor | Mapping | tuple) else list(() if data is None else data)
    if who and not found:
        raise ValueError(f"{who}: {why}")
    return found


def arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How a model is called on a batch: its positional and its keyword arguments; targets are left out.

    >>> arguments({"input_ids": 1}), arguments(("inputs", "targets"))
    (((), {'input_ids': 1}), (('inputs',), {}))
    """
    inputs = batch[0] if isinstance(batch, tuple | list) else batch
    return ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})
