"""What a model is called with while it samples: calibration data for methods that have none."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map


def visited(model: nn.Module, run: Callable[[], Any]) -> list[dict[str, Any]]:
    """Keep the arguments of each call of a model, as ``taps.feed`` takes them again.

    Memory: the inputs alone, such as the latents of each step.

    Args:
        model: A module that ``run`` calls, at whatever depth.
        run: Whatever calls it, such as sampling.

    Returns:
        Arguments by name, one mapping for each call. Arguments that are None, and ``return_dict``, are left out.

    Examples:
        >>> import torch
        >>> from interlayer.core.process import Euler, Flow, sample
        >>> class Velocity(nn.Linear):
        ...     def forward(self, x, t):
        ...         return super().forward(x)
        >>> net = Velocity(2, 2)
        >>> seen = visited(net, lambda: sample(net, Flow(), Euler(), (3, 2), seed=0, steps=4))
        >>> len(seen), list(seen[0]), seen[0]["x"].shape
        (4, ['x', 't'], torch.Size([3, 2]))
    """
    seen, names = list[dict[str, Any]](), inspect.signature(model.forward)

    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = dict(names.bind(*args, **kwargs).arguments)
        kept = {k: v for k, v in given.items() if v is not None and k != "return_dict"}
        seen.append(tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, kept))

    handle = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return seen
