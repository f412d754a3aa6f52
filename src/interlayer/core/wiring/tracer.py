"""Follow labels through every operator that a forward pass runs."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from interlayer.core.wiring.indices import Labels
from interlayer.core.wiring.labels import Labelling, Unknown, tensors, view_key
from interlayer.core.wiring.rules import FROM_NOTHING, rule_of


class Tracer(Labelling, TorchDispatchMode):
    """Carries labels through every operator that the forward pass runs."""

    def seen(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        """Hook: note the indices of a module's output."""
        for t in tensors(output)[:1]:
            for dim, label in enumerate(self.get(t)):
                if isinstance(label, np.ndarray):
                    self.outputs[name, dim] = label.ravel() if label.size == label.shape[dim] else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = tensors((args, kwargs))
        for t in given:
            name = self.sources.get(view_key(t)) if t.numel() else None
            if name is not None:
                self.used.add(name)
        rule = rule_of(func)
        busy = any(lab is not None for t in given for lab in self.get(t))
        before = [(t, self.get(t)) for t in given] if func._schema.is_mutable else []
        out = func(*args, **kwargs)
        outs = tensors(out)
        made: Any = None
        if rule is not None and (busy or rule in FROM_NOTHING):
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
        if before and outs:
            self._written(outs[0], before)
        return out

    def _written(self, t: Tensor, before: list[tuple[Tensor, Labels]]) -> None:
        """An in-place write ends what was said to be constant in tensors that share the memory."""
        old = next((labels for u, labels in before if u is t), [])
        if any(isinstance(o, str) and not isinstance(n, str) for o, n in zip(old, self.labels[id(t)], strict=False)):
            self.fix_all(t, "is written in place into a constant")
            memory = t.untyped_storage().data_ptr()
            for other in self.alive:
                if other.untyped_storage().data_ptr() == memory:
                    self.labels[id(other)] = [None] * other.ndim
