"""Between trained models: their weighted mean, the straight line from one to another, and the barrier on it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from interlayer.core import taps

Loss = Callable[[Any, Any], Tensor]
"""``loss(output, target)``."""


def expect_alike(who: str, model: nn.Module, other: nn.Module) -> None:
    """Raise ValueError in the name of ``who`` unless two models have tensors of the same names and shapes."""
    ours, theirs = (
        {n: tuple(t.shape) for n, t in m.state_dict().items() if isinstance(t, Tensor)} for m in (model, other)
    )
    if ours != theirs:
        odd = next(n for n in [*ours, *theirs] if ours.get(n) != theirs.get(n))
        raise ValueError(
            f"{who}: the models differ at {odd!r}: {ours.get(odd, 'nothing')} here, {theirs.get(odd, 'nothing')} in the other. "
            "Both need the same structure."
        )


def layers(model: nn.Module) -> dict[str, list[str]]:
    """The floating-point tensors of each module, by their names in the ``state_dict``, in its order.

    Tensors that share memory count to the module that comes first.

    Examples:
        >>> layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
        {'0': ['0.weight', '0.bias'], '2': ['2.weight', '2.bias']}
    """
    found: dict[str, list[str]] = {}
    first: dict[int, str] = {}
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            owner = first.setdefault(value.data_ptr(), name.rpartition(".")[0])
            found.setdefault(owner, []).append(name)
    return found


def blend(
    model: nn.Module,
    states: Sequence[Mapping[str, Any]],
    weights: Sequence[float],
    data: Any = None,
    *,
    names: Collection[str] | None = None,
) -> nn.Module:
    """A copy of ``model`` with the weighted mean of several states of its shapes.

    Integers and other entries that are no floating-point tensor stay the model's own. Running statistics of batch norms are
    no mean of those of the states: with ``data`` they are estimated anew.

    Args:
        model: Gives the structure.
        states: State dictionaries with the model's names and shapes.
        weights: One for each state.
        data: Batches as ``taps.feed`` takes them, for the statistics of batch norms.
        names: Tensors that are mixed; all others stay the model's own. Defaults to all.

    Raises:
        ValueError: Not one weight for each state, or a name that the model has not.

    Examples:
        >>> a, b = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> middle = blend(a, (a.state_dict(), b.state_dict()), (0.5, 0.5))
        >>> torch.equal(middle.weight, (0.5 * a.weight + 0.5 * b.weight))
        True
    """
    if len(states) != len(weights) or not states:
        raise ValueError(f"blend: {len(states)} states and {len(weights)} weights; expected one weight for each state.")
    out = copy.deepcopy(model)
    own = out.state_dict()
    if unknown := [name for name in names or () if name not in own]:
        raise ValueError(
            f"blend: no tensor {unknown[0]!r} in {type(model).__name__}; expected names of its state_dict."
        )
    with torch.no_grad():
        for name, value in own.items():
            if (names is None or name in names) and isinstance(value, Tensor) and value.is_floating_point():
                value.copy_(sum(w * state[name] for w, state in zip(weights, states, strict=True)))
    if data is not None:
        estimate_statistics(out, data)
    return out


def interpolate(model: nn.Module, other: nn.Module, weight: float, data: Any = None) -> nn.Module:
    """A new model at ``(1 - weight) * model + weight * other``; see ``blend``."""
    return blend(model, (model.state_dict(), other.state_dict()), (1 - weight, weight), data)


def estimate_statistics(model: nn.Module, data: Any) -> None:
    """Estimate the statistics of all batch norms again, in place: the mean over the batches. All else is in eval mode meanwhile.

    Args:
        model: Any module.
        data: As ``taps.feed`` takes it, each batch of more than one value for a channel.

    Examples:
        >>> norm = nn.BatchNorm1d(1)
        >>> estimate_statistics(norm, torch.tensor([[1.0], [3.0]]))
        >>> norm.running_mean, norm.running_var
        (tensor([2.]), tensor([2.]))
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [m.momentum for m in norms]
    with taps.eval_mode(model), torch.no_grad():
        for m in norms:
            m.reset_running_stats()
            m.momentum = None  # a cumulative average
            m.train()
        for _ in taps.feed(model, data):
            pass
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum


def barrier(
    model: nn.Module, other: nn.Module, loss: Callable[[nn.Module], float], *, points: int = 11, data: Any = None
) -> float:
    """The loss barrier: ``max over w of L((1 - w) A + w B) - (L(A) + L(B)) / 2``.

    Args:
        model: A.
        other: B.
        loss: L, from a model to a number.
        points: Values of w between 0 and 1, both included.
        data: For estimating batch-norm statistics anew in between.
    """
    ends = (loss(model), loss(other))
    between = [loss(interpolate(model, other, w, data)) for w in torch.linspace(0, 1, points).tolist()[1:-1]]
    return max(*ends, *between) - sum(ends) / 2


@torch.no_grad()
def mean_loss(model: nn.Module, data: Any, loss: Loss) -> float:
    """The mean loss of a model, in evaluation mode, over the examples of batches.

    Args:
        model: Left as it was.
        data: One batch or an iterable of them: (inputs, targets), or a mapping with which the model returns a ``loss``.
        loss: ``loss(output, target)``.

    Raises:
        ValueError: No batches, or one without targets.
    """
    total, count = 0.0, 0
    with taps.at_rest(model):
        for batch in [data] if isinstance(data, Tensor | Mapping | tuple) else data:
            output = next(taps.feed(model, [batch]))
            if isinstance(batch, tuple | list) and len(batch) > 1:
                value: Any = loss(output, batch[1])
                size = len(batch[1])
            else:
                value, size = getattr(output, "loss", None), 1
                if value is None:
                    raise ValueError(
                        f"mean_loss: a batch of type {type(batch).__name__} without targets; expected (inputs, targets), or a "
                        "mapping with labels for which the model returns its loss."
                    )
            total, count = total + float(value) * size, count + size
    if not count:
        raise ValueError("mean_loss: no batches; expected at least one.")
    return total / count
