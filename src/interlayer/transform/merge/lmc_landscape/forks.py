"""Networks that part from one training run, how well barriers are ranked, and a toy landscape whose barrier is known."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn


class Fork(NamedTuple):
    """Two networks whose training parted at a step, and the network at that step."""

    step: int
    ancestor: nn.Module
    first: nn.Module
    second: nn.Module


def forks(
    model: nn.Module, train: Callable[[nn.Module, int, int, int], Any], *, at: Iterable[int], length: int
) -> Iterator[Fork]:
    """Networks that part from one training run at several steps, and are trained for ``length`` steps from there.

    Args:
        model: Where the run begins; it is copied.
        train: ``train(network, begin, end, branch)`` trains in place from one step to another; branch 0 is the run, 1 and 2 part from it
            and must see other noise, such as other batches.
        at: The steps.
        length: Steps of training after the fork.

    Raises:
        ValueError: No steps, steps below 0, or a length below 1.

    Examples:
        >>> def train(net, begin, end, branch):
        ...     net.weight.data += end - begin + branch
        >>> [fork.step for fork in forks(nn.Linear(1, 1), train, at=(4, 0), length=2)]
        [0, 4]
    """
    chosen = sorted(set(at))
    if not chosen or chosen[0] < 0 or length < 1:
        raise ValueError(
            f"forks: at {chosen}, length {length}; expected steps from 0 up and at least one step after them."
        )
    run, before = copy.deepcopy(model), 0
    for step in chosen:
        if step > before:
            train(run, before, step, 0)
        before = step
        ancestor, first, second = (copy.deepcopy(run) for _ in range(3))
        for branch, net in ((1, first), (2, second)):
            train(net, step, step + length, branch)
        yield Fork(step, ancestor, first, second)


def correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; NaN where one of the two is constant.

    Examples:
        >>> correlation([1.0, 2.0, 3.0], [0.1, 0.2, 9.0]), correlation([1.0, 1.0, 1.0], [0.1, 0.2, 9.0])
        (1.0, nan)
    """
    from scipy.stats import spearmanr

    return float(spearmanr(a, b)[0]) if len(set(a)) > 1 < len(set(b)) else float("nan")


class Pitchfork(nn.Module):
    r"""A toy landscape with one ridge: the loss at a place (x, y) is :math:`e^{-x} + (y^2 - x)^2 / 4`.

    The way down leads along x. Up to x = 0 there is one valley, at y = 0; beyond, it is a ridge between two valleys at
    :math:`y = \pm \sqrt x`. Runs that part before may take different ones, which a barrier of :math:`x^2 / 4` divides; behind, they stay
    in one.

    Args:
        place: Where it is, the only parameter.

    Shapes: [B, ...] to [B], the loss for each row, whatever it holds.

    Examples:
        >>> import torch
        >>> Pitchfork(torch.tensor([1.0, 1.0]))(torch.zeros(2, 1))
        tensor([0.3679, 0.3679], grad_fn=<ExpandBackward0>)
    """

    def __init__(self, place: Float[Tensor, "2"]) -> None:
        super().__init__()
        self.place = nn.Parameter(place.clone())

    def forward(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, " B"]:
        """The loss, for each row."""
        along, across = self.place
        return ((-along).exp() + (across.square() - along).square() / 4).expand(len(x))

    def barrier(self) -> float:
        """Between the two valleys, at this x."""
        return max(float(self.place[0].detach()), 0.0) ** 2 / 4
