"""Follow labels through every operator that a forward pass runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from interlayer.core.wiring.indices import Labels
from interlayer.core.wiring.labels import Labelling, Unknown, operands, tensors, view_key
from interlayer.core.wiring.rules import FROM_NOTHING, rule_of


class Tracer(Labelling, TorchDispatchMode):
    """Carries labels through every operator that the forward pass runs.

    Args:
        model: What will run.
        inputs: What goes in, in any nesting. Tensors computed from it are followed: a Python value that is read off one
            of them is a decision by data.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__(model)
        # Tensors that depend on the inputs, by id: True once real numbers are involved. Masks and shapes of token ids
        # are read in Python by many models, to no effect on the function; activations are not.
        self.data = {id(t): t.is_floating_point() for t in tensors(inputs)}
        self.decisions: set[str] = set()

    def seen(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook: record the indices of a module's output."""
        for t in tensors(output)[:1]:
            for dim, label in enumerate(self.get(t)):
                if isinstance(label, np.ndarray):
                    self.outputs[name, dim] = label.ravel() if label.size == label.shape[dim] else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = operands(*args, *kwargs.values())
        for t in given:
            if (name := self.source(t)) is not None:
                self.used.add(name)
        rule, mutable, tells = _known(func)
        if (tells or _counts(func, args)) and any(self.data.get(id(t)) for t in given):
            self.decisions.add(str(func))
        labelled = [self.get(t) for t in given]
        busy = any(lab is not None for labels in labelled for lab in labels)
        before = list(zip(given, labelled, strict=True)) if mutable else []
        out = func(*args, **kwargs)
        outs = operands(out)
        made: Any = None
        if rule is not None and outs and (busy or rule in FROM_NOTHING):
            try:
                made = rule(self, out, *args, **kwargs)
            except Unknown:
                made = None
        if made is None:
            for t in given:
                self.fix_all(t, f"goes through {func}, which has no rule")
            made = [[None] * t.ndim for t in outs]
        elif isinstance(out, Tensor):
            made = [made]
        for t, labels in zip(outs, made, strict=False):
            self.put(t, labels)
        for t in outs[len(made) :]:
            self.put(t, [None] * t.ndim)
        if sources := [self.data[id(t)] for t in given if id(t) in self.data]:
            for t in outs if not before else [*outs, before[0][0]]:
                self.data[id(t)] = self.data.get(id(t), False) or any(sources) or t.is_floating_point()
        if before and outs:
            self._written(outs[0], before)
        return out

    def _written(self, t: Tensor, before: list[tuple[Tensor, Labels]]) -> None:
        """After an in-place write, tensors that share the memory are no longer constant where it was not.

        Units written where they cannot be followed are pinned to their positions.
        """
        old = next((labels for u, labels in before if u is t), [])
        ended = [
            n for o, n in zip(old, self.labels[id(t)], strict=False) if isinstance(o, str) and not isinstance(n, str)
        ]
        memory, same = t.untyped_storage().data_ptr(), view_key(t)
        sharing = [u for u in self.alive if ended and u is not t and u.untyped_storage().data_ptr() == memory]
        others = [u for u in sharing if view_key(u) != same]
        if others and any(isinstance(n, np.ndarray) for n in ended):
            self.fix_all(t, "is written in place into a constant")
            self.labels[id(t)] = [None] * t.ndim
        for u in sharing:
            if view_key(u) == same:
                self.labels[id(u)] = list(self.labels[id(t)])
        for u in others:
            self.labels[id(u)] = [None if isinstance(label, str) else label for label in self.labels[id(u)]]


class Known(NamedTuple):
    """What is known of an operator."""

    rule: Callable[..., Any] | None
    mutable: bool
    tells: bool  # Python sees numbers in what comes out: as a value, or as a size


@cache
def _known(func: Any) -> Known:
    shown = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
    return Known(rule_of(func), func._schema.is_mutable, bool(shown) and func is not torch.ops.aten.index.Tensor)


def _counts(func: Any, args: Any) -> bool:
    """Whether an index is a mask; of integers it takes as many as it is given."""
    return func is torch.ops.aten.index.Tensor and any(
        t.dtype in (torch.bool, torch.uint8) for t in operands(*args[1:])
    )
