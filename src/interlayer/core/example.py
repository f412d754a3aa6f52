"""What a component keeps beside itself so that its contracts can be checked: how to make it, and what goes in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Example:
    """A small instance of a component and its inputs. A system's module names it ``EXAMPLE``.

    What the fields mean follows from the kind:

    ============  ==================================  ===============================================================
    kind          ``make()``                          ``inputs()``
    ============  ==================================  ===============================================================
    layer, model  the ``nn.Module`` (for a stream: a  its positional arguments, batch first; at least two examples
                  small backbone with it)
    transform     the ``Transform``                   ``(model,)`` or ``(model, data)``, a plain ``nn.Module``
    rule          the ``Rule``, bound to a new model  batches to learn from, one for each step
    probe         the ``Probe``                       ``(model, data)``
    ============  ==================================  ===============================================================

    Args:
        make: Builds the component, drawing from torch's global generator.
        inputs: Makes the inputs, drawing from the same.
        options: Keyword options for a transform's ``plan``.
        odd: Inputs of odd sizes, such as a prime length, where the layer allows several.
        wrong: Inputs of a wrong shape, which must raise ``ValueError`` or ``TypeError``; one feature more unless told.
        hf: The inputs of a transform with an unmodified Hugging Face model in place of the plain one.
        nothing: Inputs of a transform in which there is nothing to do; a model without parameters unless told.
        train: For a model: gives ``(score, trivial)``, two losses of which the first must be the lower, after a real
            training run.
        planted: For a probe: whether its finding has what the example planted.
        exceptions: Contracts that the component can't keep, each with the reason. They must really fail.
    """

    make: Callable[[], Any]
    inputs: Callable[[], tuple[Any, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    odd: Callable[[], tuple[Any, ...]] | None = None
    wrong: Callable[[], tuple[Any, ...]] | None = None
    hf: Callable[[], tuple[Any, ...]] | None = None
    nothing: Callable[[], tuple[Any, ...]] | None = None
    train: Callable[[], tuple[float, float]] | None = None
    planted: Callable[[Any], bool] | None = None
    exceptions: Mapping[str, str] = field(default_factory=dict)
