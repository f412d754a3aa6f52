"""The contracts of each kind, and how to check a component against them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from interlayer.core.example import Example
from interlayer.core.kinds import Construction, Probe, Rule, Simulator, Transform

Contract = Callable[[Example], None]


class ContractError(AssertionError):
    """A component breaks a contract, or keeps one to which it declares an exception."""


def contracts(kind: str) -> Mapping[str, Contract]:
    """The contracts of a kind by name; each takes an ``Example`` and raises if the contract is broken.

    Raises:
        ValueError: Unknown kind.
    """
    from interlayer.testing import constructions, data_transforms, modules, probes, rules, simulators, transforms

    kinds = {
        "layer": modules.LAYER,
        "model": modules.MODEL,
        "transform": transforms.TRANSFORM,
        "rule": rules.RULE,
        "probe": probes.PROBE,
        "data-transform": data_transforms.DATA_TRANSFORM,
        "construction": constructions.CONSTRUCTION,
        "simulator": simulators.SIMULATOR,
    }
    if kind not in kinds:
        raise ValueError(f"testing: kind {kind!r} is not one of {list(kinds)}.")
    return kinds[kind]


def kind_of(component: type) -> str:
    """The kind of a class by its base: a module is a layer, and what has no base of ours a data-transform."""
    bases = {"transform": Transform, "rule": Rule, "probe": Probe, "construction": Construction, "simulator": Simulator}
    for kind, base in {**bases, "layer": nn.Module}.items():
        if issubclass(component, base):
            return kind
    return "data-transform"


def example_of(component: type) -> Example:
    """The ``EXAMPLE`` in the component's module, or in a package above it.

    Raises:
        LookupError: There is none.
    """
    name = component.__module__
    while name:
        found = getattr(sys.modules.get(name), "EXAMPLE", None)
        if isinstance(found, Example):
            return found
        name = name.rpartition(".")[0]
    raise LookupError(
        f"testing: {component.__module__} has no EXAMPLE. Put one beside {component.__name__}: "
        "EXAMPLE = Example(make=..., inputs=...), from interlayer.core.example."
    )


def hold(name: str, kind: str, example: Example) -> str:
    """Check one contract: ``"kept"``, or the reason of a declared exception that really fails.

    Raises:
        ContractError: The contract is broken, or kept although an exception is declared.
    """
    import torch

    contract, reason = contracts(kind)[name], example.exceptions.get(name)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # examples are small: a second thread would only wait
    try:
        contract(example)
    except Exception as error:
        if reason is not None:
            return reason
        raise ContractError(f"{name}: {type(error).__name__}: {error}") from error
    finally:
        torch.set_num_threads(threads)
    if reason is not None:
        raise ContractError(f"{name}: kept, although an exception is declared ({reason}). Remove the exception.")
    return "kept"


def check(component: type, example: Example | None = None, *, kind: str | None = None) -> dict[str, str]:
    """Check all contracts of a component's kind.

    Args:
        component: The class.
        example: How to build it, and its inputs. Defaults to the ``EXAMPLE`` beside the class.
        kind: One of the kinds of the catalogue. Defaults to what the base class says (a ``torch.nn.Module`` is a layer, a
            class without a base of Interlayer a data-transform).

    Returns:
        For each contract ``"kept"`` or the reason of its declared exception.

    Raises:
        ContractError: Names every contract that is broken.
        LookupError: No example is given, and there is none beside the class.
        ValueError: An exception is declared to an unknown contract.
    """
    kind = kind or kind_of(component)
    example = example or example_of(component)
    if unknown := [name for name in example.exceptions if name not in contracts(kind)]:
        raise ValueError(
            f"testing: {component.__name__} declares an exception to {unknown[0]!r}; there are {list(contracts(kind))}."
        )
    outcomes: dict[str, Any] = {}
    broken: list[ContractError] = []
    for name in contracts(kind):
        try:
            outcomes[name] = hold(name, kind, example)
        except ContractError as error:
            broken.append(error)
    if broken:
        lines = "\n".join(f"  {error}" for error in broken)
        raise ContractError(
            f"{component.__name__} breaks {len(broken)} of {len(contracts(kind))} contracts:\n{lines}"
        ) from broken[0]
    return outcomes
