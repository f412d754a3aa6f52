"""The protocols of the kinds that are not layers: transform, rule, probe, construction and simulator.

A layer or a model is an ordinary ``torch.nn.Module`` and needs no base class. A data-transform follows the convention of its
ecosystem, such as PyTorch Geometric's ``BaseTransform``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from interlayer.core.data import Experience


@dataclass(frozen=True)
class Row:
    """One line of a plan: a place in the model and what happens or does not happen to it."""

    name: str
    what: str
    why: str = ""


@dataclass
class Plan:
    """What a transform will do to a model, before it does it.

    ``touched`` and ``skipped`` are for reading; ``apply()`` returns a new model and leaves the planned one as it is.
    """

    system: str
    options: dict[str, Any]
    touched: list[Row]
    skipped: list[Row] = field(default_factory=list)
    build: Callable[[], nn.Module] = field(repr=False, default=nn.Identity)

    def apply(self) -> nn.Module:
        """Carry the plan out on a copy and return it."""
        return self.build()

    def __str__(self) -> str:
        lines = [f"{self.system} {self.options or ''}".rstrip()]
        width = max((len(r.name) for r in self.touched + self.skipped), default=0)
        for mark, rows in (("+", self.touched), ("-", self.skipped)):
            for r in rows:
                lines.append(f"  {mark} {r.name:<{width}}  {r.what}" + (f"  ({r.why})" if r.why else ""))
        return "\n".join(lines)


class Takes:
    """Base of what takes other models beside the first; it says how many."""

    slug: ClassVar[str]
    merges: ClassVar[int] = 0
    """How many other models it takes."""
    more: ClassVar[bool] = False
    """Whether it takes any number above that too."""

    def take(self, others: Sequence[nn.Module]) -> Sequence[nn.Module]:
        """The other models, which must be as many as it takes.

        Raises:
            ValueError: There are more or fewer.
        """
        if len(others) < self.merges or (len(others) > self.merges and not self.more):
            raise ValueError(
                f"{self.slug}: {len(others)} other models; expected {self.merges or 'none'}{' or more' if self.more else ''}. "
                + (
                    "Pass them as others=(model, ...), or with --other on the command line."
                    if self.merges
                    else "Leave out others."
                )
            )
        return others


class Transform(Takes, ABC):
    """Something done to a trained model: options in the constructor, ``plan(model, data)``, then ``apply()``.

    A subclass names its catalogue ``slug``, takes its options as keywords that all have defaults, and gives ``plan``,
    which decides. One whose result has another structure also gives ``restore``. It puts the structure of a saved result (the
    JSON-able dict that ``plan(...).apply()`` recorded with ``recipe.record``) onto a fresh base model, in place and without data, so
    that the saved weights fit.
    """

    @abstractmethod
    def plan(self, model: nn.Module, data: Any = None, *, others: Sequence[nn.Module] = ()) -> Plan:
        """Say what will be touched and what will not, and why. Never changes ``model``. Nothing to do is an error.

        Args:
            model: The trained model.
            data: Batches as ``taps.feed`` takes them, where the method needs any.
            others: Further trained models, where the method takes any (merging).
        """

    def restore(self, model: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
        """Rebuild on ``model`` (a base with fresh weights) the structure that ``apply`` recorded; return the model.

        By default the result has the structure of the base.
        """
        return model


class NotBegun(LookupError):
    """A rule has no parts for an experience, because the experience was never begun."""


class Rule(ABC):
    """A way of learning weights. Bound to one model, as a torch optimiser is; any loop can call ``step``.

    A rule that learns a stream of experiences is called in the order ``begin(experience)``, ``step(batch)`` many times,
    ``end(experience)``, for one experience after another. ``predict`` answers for the experience that was begun last.
    Whoever knows that an input belongs to another one calls ``at(experience)`` first (task-incremental learning); where
    nobody knows (class-incremental learning), nobody calls it. All three do nothing unless a rule needs them.
    """

    slug: ClassVar[str]
    model: nn.Module

    @abstractmethod
    def step(self, batch: Any) -> dict[str, float]:
        """Learn from one batch and return metrics, ``loss`` among them."""

    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimizers that ``step`` uses, so that a loop can set their learning rates and clip their gradients."""
        return ()

    def begin(self, experience: Experience) -> None:  # noqa: B027
        """Get ready to learn an experience, such as by adding its parts."""

    def end(self, experience: Experience) -> None:  # noqa: B027
        """Take note that an experience is over, such as by measuring which weights mattered to it."""

    def at(self, experience: Experience) -> None:  # noqa: B027
        """Predict for this experience from now on.

        Raises:
            NotBegun: The rule needs parts of this experience and has none.
        """

    def predict(self, inputs: Tensor) -> Tensor:
        """The model's output in evaluation mode, as this rule wants it read (some rules do not read the last layer)."""
        modes = [(m, m.training) for m in self.model.modules()]
        try:
            with torch.no_grad():
                return self.model.eval()(inputs)
        finally:
            for module, mode in modes:
                module.training = mode

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything beside the model's own weights that a bit-exact resumption needs; tensors, numbers and strings."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what ``state_dict`` gave."""


@dataclass
class Finding:
    """What a probe saw or a simulator measured.

    Attributes:
        tables: Columns of equal length, by table.
        figure: Makes the matplotlib figure, if there is one.
        units: The unit of each column that has one: ``{"rate": "1/s"}``; ``"1"`` for a plain number.

    Examples:
        >>> found = Finding({"link": {"distance": [1.0, 10.0], "success": [0.95, 0.63]}}, units={"distance": "km", "success": "1"})
        >>> found.headings("link")
        ['distance [km]', 'success']
    """

    tables: dict[str, dict[str, list[Any]]]
    figure: Callable[[], Any] | None = field(default=None, repr=False)
    units: dict[str, str] = field(default_factory=dict)

    def headings(self, table: str) -> list[str]:
        """Column names with their units."""
        found = self.units
        return [f"{c} [{found[c]}]" if found.get(c, "1") != "1" else c for c in self.tables[table]]


class Probe(ABC):
    """A way to look into a model: ``probe(model, data) -> Finding``. The model is afterwards as it was before."""

    slug: ClassVar[str]

    @abstractmethod
    def __call__(self, model: nn.Module, data: Any) -> Finding:
        """Look, and leave no trace."""


class Comparison(Takes, Probe):
    """A probe of several models of one structure: ``probe(model, data, others=(other,)) -> Finding``."""

    merges: ClassVar[int] = 1

    @abstractmethod
    def __call__(self, model: nn.Module, data: Any, *, others: Sequence[nn.Module] = ()) -> Finding:
        """Look at all of them, and leave no trace in any."""


class Construction(ABC):
    """Weights written by hand: options in the constructor, ``build(...)`` gives a model that needs no training."""

    slug: ClassVar[str]

    @abstractmethod
    def build(self, *problem: Any) -> nn.Module:
        """The model that solves the problem, up to the precision that the class states."""

    @abstractmethod
    def reference(self, *problem: Any) -> Any:
        """The outputs that the model must give for ``problem``, computed without it."""


class Simulator(ABC):
    """A program for what a network, channel or device would do: ``run(scenario, seed) -> Finding``.

    A scenario is plain data, as a TOML file holds it; ``None`` runs the default one. Every column of the finding that holds
    numbers has a unit.
    """

    slug: ClassVar[str]

    @abstractmethod
    def run(self, scenario: Mapping[str, Any] | None = None, seed: int = 0) -> Finding:
        """Simulate. The same scenario and seed give the same finding.

        Raises:
            ValueError: The scenario has an unknown key, or a value out of range.
        """

    @abstractmethod
    def known(self, seed: int = 0) -> Mapping[str, tuple[float, float, float]]:
        """Quantities with a closed form: (simulated, exact, how far apart they may be), by name."""
