"""Wiring: which axes of which weights are tied, found by watching one forward pass.

A hidden unit of a network is an index that several weights share: rows of one, columns of the next, an entry of a bias.
``trace`` finds these shared indices for any module that runs, without hand-written specifications and without looking at
names. The result says how the units can be permuted without changing the function; removing or matching units is the
same knowledge.

How. Every axis of every parameter starts with one *index* for each of its positions. While the model runs, each tensor
carries, for each of its axes, the indices of the positions there; an operator that adds, multiplies or contracts two
axes makes their indices equal. Splitting an axis (heads) makes each of its indices a pair (head, position in the head),
and joining axes (flatten) makes pairs again. What reaches an input, an output, data-dependent indexing or an operator
without a rule gets marks that distinguish its positions, so it can't be permuted. Indices that nothing distinguishes form
a group. The groups are checked by running the permuted model once.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from interlayer.core import taps
from interlayer.core.wiring.bridge import Bridge, Maps
from interlayer.core.wiring.collect import collect
from interlayer.core.wiring.groups import Group, Member, Wiring, checked, run
from interlayer.core.wiring.labels import tensors
from interlayer.core.wiring.shrink import masked, normed, take
from interlayer.core.wiring.tracer import Tracer

__all__ = [
    "Bridge",
    "Group",
    "Maps",
    "Member",
    "Wiring",
    "counted",
    "in_order",
    "masked",
    "normed",
    "run",
    "take",
    "trace",
]


def trace(model: nn.Module, *inputs: Any, output: str | Callable[[Any], Any] | None = None, **kwargs: Any) -> Wiring:
    """Run ``model(*inputs, **kwargs)`` once in evaluation mode and return its wiring. The model is left as it was.

    Args:
        model: Any module that runs.
        inputs: Its positional arguments.
        output: What the model is for, where it returns more than that: the name of a field (``"logits"``) or a function
            of the output. Units may be reordered in the rest, such as an encoder's states that are returned beside the
            logits. By default everything that the model returns counts.
        kwargs: Its keyword arguments.

    Raises:
        ValueError: One pass does not show the whole function: a Python value was read off an activation, or a parameter
            was not used. What the other branch, or the unused parameter, shares with the rest can't be known.
        TypeError: The output that counts holds no tensor.

    Examples:
        >>> from torch import nn
        >>> import torch
        >>> from interlayer.core.wiring import trace
        >>> wiring = trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 4))
        >>> [(g.size, [(m.name, m.dim) for m in g.members]) for g in wiring.groups.values()]
        [(8, [('0.weight', 0), ('0.bias', 0), ('2.weight', 1)])]
    """
    with taps.at_rest(model), torch.no_grad(), _parts(model), _no_collection():
        tracer = Tracer(model, (inputs, kwargs))
        hooks = [
            module.register_forward_hook(partial(tracer.seen, name), with_kwargs=False)
            for name, module in model.named_modules()
            if name and not any(module._modules.values())
        ]
        try:
            with tracer:
                whole = model(*inputs, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        _whole(tracer, model)
        expected = counted(whole, output)
        for leaf in expected:
            tracer.fix_all(leaf, "reaches the output")
        return checked(
            collect(tracer), model, lambda state: counted(run(model, state, *inputs, **kwargs), output), expected
        )


def in_order(wiring: Wiring, model: nn.Module, *inputs: Any, **kwargs: Any) -> list[Group]:
    """The groups in the order in which the forward pass first shows their units in a module's output.

    Groups come before those inside their units, and those that show nowhere come last.
    """
    names = sorted({m.name for g in wiring.groups.values() for m in g.outputs})
    met: list[str] = []
    if names:
        with taps.read(model, names) as seen, taps.at_rest(model), torch.no_grad():
            model(*inputs, **kwargs)
        met = list(seen)
    first: dict[str, int] = {}
    for g in wiring.groups.values():  # parents come first
        own = min((met.index(m.name) for m in g.outputs), default=len(met))
        first[g.name] = max(own, first[g.parent[0]] if g.parent else 0)
    return sorted(wiring.groups.values(), key=lambda g: first[g.name])


def _whole(tracer: Tracer, model: nn.Module) -> None:
    """Raise unless the pass showed the whole function."""
    name = type(model).__name__
    if tracer.decisions:
        raise ValueError(
            f"trace: {name} reads a Python value or a size off its activations ({', '.join(sorted(tracer.decisions))}), so what it "
            "computes depends on the data; expected the same operators for every input. Make the choice with tensor "
            "operations (torch.where), or trace the part of the model that makes none."
        )
    unused = [n for n, p in model.named_parameters() if p.numel() and n not in tracer.used]
    if unused:
        raise ValueError(
            f"trace: {len(unused)} parameters of {name} are not used by this forward pass, such as {unused[0]!r}; expected "
            "all of them: what an unused parameter shares with the others cannot be known. Give inputs that use them, or delete them."
        )


def counted(whole: Any, output: str | Callable[[Any], Any] | None) -> list[Tensor]:
    """The tensors of a model's output that count; see ``trace``."""
    if isinstance(output, str):
        found = whole.get(output) if isinstance(whole, Mapping) else getattr(whole, output, None)
        if found is None:
            fields = f" with {', '.join(whole)}" if isinstance(whole, Mapping) else ""
            raise TypeError(
                f"trace: the model returns {type(whole).__name__}{fields}; expected one with {output!r}. "
                "Name a field of the output, or give a function of it."
            )
        whole = found
    elif output is not None:
        whole = output(whole)
    leaves = tensors(whole)
    if not leaves:
        raise TypeError(f"trace: no tensor in the output that counts ({type(whole).__name__}). Name another one.")
    return leaves


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from searching for garbage: a pass makes many small objects and no garbage, and the searches take most of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextmanager
def _parts(model: nn.Module) -> Iterator[None]:
    """Run layers as the operators that they consist of, which have rules, and not as one fused operator."""
    attention, recurrence = torch.backends.mha.get_fastpath_enabled(), torch.backends.mkldnn.enabled
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        # Otherwise its convolutions are the faster ones.
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            torch.backends.mkldnn.enabled = False  # type: ignore[assignment]
        math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
        with math, torch.backends.cudnn.flags(enabled=False):  # cuDNN runs a whole recurrence as one operator
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(attention)
        torch.backends.mkldnn.enabled = recurrence
