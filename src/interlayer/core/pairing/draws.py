"""Building a model so that each parameter and buffer draws from a stream of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from interlayer.core.pairing.seeds import kept, seed_all
from interlayer.core.pairing.trace import Trace

M = TypeVar("M", bound=nn.Module)
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """Which draw of a build is named how, as a first build showed it; it holds for every seed.

    Attributes:
        names: For each call that draws, the names of its draws; empty for a draw that ends nowhere.
        unpaired: Parameters and buffers whose numbers could not be paired.
        unread: No operation reads a drawn number, so draws that end nowhere can be left out.
    """

    names: list[list[str]]
    unpaired: frozenset[str]
    unread: bool


@dataclass(frozen=True)
class Paired(Generic[M]):
    """A model, and where its random numbers come from.

    Attributes:
        model: What ``build`` returned.
        drawn: Shapes of the parameters and buffers with paired numbers, by name.
        unpaired: Shapes of those with random numbers that could not be paired, by name.
        noise: The seeds of all draws that reach a parameter or buffer of ``drawn``. Equal seeds mean equal noise.
        plan: Spares the first of the two builds when the same model is built with another seed.
    """

    model: M
    drawn: Mapping[str, Shape]
    unpaired: Mapping[str, Shape]
    noise: Mapping[str, frozenset[int]]
    plan: Plan


def paired(
    build: Callable[[], M], seed: int, *, materialise: Callable[[M], object] | None = None, plan: Plan | None = None
) -> Paired[M]:
    """Build a model whose random numbers depend on the seed and on the parameter's name, not on what else is built.

    Models of one seed get the same noise in every parameter and buffer of equal name and shape. What a model does to its
    noise (a scale, an orthogonalisation, a gate of zero) remains its own.

    The model is built twice. The first build records which draws end in which parameters or buffers; a draw is named after
    the first one that it ends in. In the second build each draw is seeded by a hash of (seed, name, distribution, size,
    occurrence). Where every parameter and buffer is filled in place and nothing reads it, the draws are repeated on the first
    model instead, which gives the same numbers. A draw that ends nowhere, such as a default initialisation that is drawn again
    later, shifts nothing.
    ``torch.manual_seed`` inside ``build`` has no effect. The global generators of torch are left as they were.

    A function may draw until its numbers fit, as ``nn.init.trunc_normal_`` does: further draws in the same call are named
    after the last one that the first build saw there. Numbers that cannot be paired are left alone, and what they reach is
    reported in ``unpaired``: draws from an explicit ``torch.Generator`` or on a device other than the CPU and CUDA; values
    that differ between the two builds, such as NumPy's; and draws that end elsewhere in the second build than in the first.
    A number that leaves torch (``item()``, ``numpy()``) cannot be followed further.

    Args:
        build: Builds the model. It may run twice, so it should have no side effects.
        seed: The seed that models are paired by.
        materialise: Called with the model after each build, without gradients. Lazy modules get their shapes here:
            ``materialise=lambda model: model(example)``.
        plan: The ``plan`` of an earlier call with the same ``build``. If the build no longer follows it, it is ignored.

    Raises:
        ValueError: A parameter of a lazy module has no shape yet.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> base = paired(lambda: nn.ModuleDict({"head": nn.Linear(4, 2)}), seed=0)
        >>> arm = paired(lambda: nn.ModuleDict({"new": nn.Linear(4, 4), "head": nn.Linear(4, 2)}), seed=0)
        >>> torch.equal(arm.model["head"].weight, base.model["head"].weight)
        True
        >>> arm.drawn["head.weight"], f"{shared(arm, base):.2f}"  # 10 of 30 numbers
        ((2, 4), '0.33')
    """

    def run(trace: Trace) -> M:
        with trace:
            model = build()
            if materialise is not None:
                with torch.no_grad():
                    materialise(model)
        return model

    with kept():
        before: dict[str, Tensor] = {}
        calls, unread = (plan.names, plan.unread) if plan else ([], False)
        trace = None
        if plan is None:
            trace = Trace(seed, rough=True)
            seed_all(seed)
            model = run(trace)
            tensors = _tensors(model)
            ends = trace.ends(tensors)
            names = _names(ends)
            before = {name: tensor for name, tensor in tensors.items() if not ends[name]}
            calls = trace.plan(names)
            unread = trace.repeat(tensors)
            if not unread:
                trace = None
                del model, tensors
        if trace is None:
            trace = Trace(seed, calls, unread=unread)
            model = run(trace)
            tensors = _tensors(model)
            ends = trace.ends(tensors)
            names = _names(ends)
    odd = {n for n, draw in enumerate(trace.draws) if draw.seed is None or draw.name != names.get(n, "")}
    drawn, unpaired, noise = {}, {}, {}
    for name, tensor in tensors.items():
        other = name in plan.unpaired if plan else not ends[name] and not _equal(tensor, before.get(name))
        if ends[name] & odd or other:
            unpaired[name] = tuple(tensor.shape)
        elif ends[name]:
            drawn[name] = tuple(tensor.shape)
            noise[name] = frozenset(s for n in ends[name] if (s := trace.draws[n].seed) is not None)
    if plan is not None and (
        trace.counts() != [len(names) for names in plan.names]
        or unpaired.keys() != plan.unpaired
        or (plan.unread and trace.read)
    ):
        return paired(build, seed, materialise=materialise)  # another build than the one that was planned
    return Paired(model, drawn, unpaired, noise, Plan(calls, frozenset(unpaired), unread))


def shared(arm: Paired[Any], base: Paired[Any]) -> float:
    """The share of the arm's random numbers that have the noise of the base's parameter or buffer of the same name.

    Examples:
        >>> one = paired(lambda: nn.Linear(3, 2), seed=0)
        >>> shared(one, paired(lambda: nn.Linear(3, 2), seed=0)), shared(one, paired(lambda: nn.Linear(3, 2), seed=1))
        (1.0, 0.0)
    """
    same = sum(
        math.prod(shape)
        for name, shape in arm.drawn.items()
        if base.drawn.get(name) == shape and base.noise[name] == arm.noise[name]
    )
    total = sum(math.prod(shape) for shape in (*arm.drawn.values(), *arm.unpaired.values()))
    return same / total if total else 1.0


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, then buffers, by name; a tied one once.

    Raises:
        ValueError: One has no shape yet.
    """
    found: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():  # one walk: `named_parameters` and `named_buffers` take one each
        for into, held in ((found, module._parameters), (buffers, module._buffers)):
            for key, tensor in held.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    into[f"{path}.{key}" if path else key] = tensor
    found |= buffers
    if lazy := [name for name, tensor in found.items() if is_lazy(tensor)]:
        raise ValueError(
            f"paired: {lazy[0]!r} belongs to a lazy module and has no shape yet; expected a shape after the build. "
            "Pass materialise=lambda model: model(example)."
        )
    return found


def _names(ends: Mapping[str, frozenset[int]]) -> dict[int, str]:
    """The first parameter or buffer that each draw reaches."""
    return {number: name for name in reversed(list(ends)) for number in ends[name]}


def _equal(one: Tensor, two: Tensor | None) -> bool:
    """Whether two builds gave the same bytes."""
    if one is two:
        return True
    if two is None or one.shape != two.shape or one.dtype != two.dtype or one.layout != two.layout:
        return False
    if one.is_meta or one.layout is not torch.strided:
        return True
    first, second = (t.detach().contiguous().view(-1).view(torch.uint8) for t in (one, two))
    return torch.equal(first, second)
