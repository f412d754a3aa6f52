"""How far training is, passed on to the parts that change on the way: annealing, stages, growing penalties."""

from __future__ import annotations

from torch import nn


def stepped(share: float, parts: int = 3, factor: float = 0.1) -> float:
    """The learning rate at a share of the training, as a part of its peak, if it falls by a factor after each of equal parts.

    Examples:
        >>> [round(stepped(share), 3) for share in (0, 0.4, 0.7)]
        [1.0, 0.1, 0.01]
    """
    return factor ** min(int(parts * share), parts - 1)


def progress(model: nn.Module, share: float) -> None:
    """Call ``progress(share)`` on the modules of a model that have this method.

    A training loop calls it before each step; ``compare``, the claims and the RL loop do. What a module does must follow
    from the share alone, so that a resumed run goes on as before.

    Args:
        model: The model that is trained.
        share: Share of the training that is done, 0 to 1.

    Raises:
        ValueError: The share is outside of [0, 1].

    Examples:
        >>> class Cooling(nn.Module):
        ...     def progress(self, share):
        ...         self.temperature = 1 - 0.9 * share
        >>> net = nn.Sequential(nn.Linear(2, 2), Cooling())
        >>> progress(net, 0.5)
        >>> net[1].temperature
        0.55
    """
    if not 0 <= share <= 1:
        raise ValueError(f"progress: share was {share}; expected a number from 0 to 1.")
    for module in model.modules():
        if callable(follow := getattr(module, "progress", None)):
            follow(share)
