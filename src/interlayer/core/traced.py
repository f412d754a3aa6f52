"""Whether code runs for itself or is being transformed."""

from __future__ import annotations

import torch


def traced() -> bool:
    """Whether ``torch.compile`` or a transform of ``torch.func`` is at work.

    Then graphs are not autograd's own, and states of random generators cannot be read.

    Examples:
        >>> traced(), torch.func.grad(lambda x: x * traced())(torch.ones(())).item()
        (False, 1.0)
    """
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
