"""Wiring: which axes of which weights are tied, found by watching one forward pass.

A hidden unit of a network is an index that several weights share: rows of one, columns of the next, an entry of a bias.
``trace`` finds these shared indices for any module that runs, without hand-written specifications and without looking at
names. The result says how the units can be permuted without changing the function; removing or matching units is the
same knowledge.

How. Every axis of every parameter starts with one *index* for each of its positions. While the model runs, each tensor
carries, for each of its axes, the indices of the positions there; an operator that adds, multiplies or contracts two
axes makes their indices equal. Splitting an axis (heads) makes each of its indices a pair (head, place in the head), and
joining axes (flatten) makes pairs again. What reaches an input, an output, data-dependent indexing or an operator without
a rule gets marks that tell its positions apart, so it can't be permuted. Indices that nothing tells apart are a group.
The groups are checked by running the permuted model once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from interlayer.core.wiring.groups import Group, Member, Wiring, checked, collect
from interlayer.core.wiring.labels import tensors
from interlayer.core.wiring.tracer import Tracer

__all__ = ["Group", "Member", "Wiring", "trace"]


def trace(model: nn.Module, *inputs: Any, **kwargs: Any) -> Wiring:
    """Run ``model(*inputs, **kwargs)`` once in evaluation mode and return its wiring. The model is left as it was.

    Examples:
        >>> from torch import nn
        >>> import torch
        >>> from interlayer.core.wiring import trace
        >>> wiring = trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 4))
        >>> [(g.size, [(m.name, m.dim) for m in g.members]) for g in wiring.groups.values()]
        [(8, [('0.weight', 0), ('0.bias', 0), ('2.weight', 1)])]
    """
    training = [(m, m.training) for m in model.modules()]
    fast = torch.backends.mha.get_fastpath_enabled()
    hooks: list[Any] = []
    try:
        model.eval()
        torch.backends.mha.set_fastpath_enabled(False)  # the fused encoder layer is one operator; its parts have rules
        tracer = Tracer(model)
        hooks = [
            module.register_forward_hook(partial(tracer.seen, name), with_kwargs=False)
            for name, module in model.named_modules()
            if name and not any(module.children())
        ]
        with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            with tracer:
                output = model(*inputs, **kwargs)
            while hooks:
                hooks.pop().remove()
            for leaf in tensors(output):
                tracer.fix_all(leaf, "reaches the output")
            wiring = collect(tracer)
            return checked(wiring, model, inputs, kwargs, output)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for hook in hooks:
            hook.remove()
        for module, mode in training:
            module.training = mode
