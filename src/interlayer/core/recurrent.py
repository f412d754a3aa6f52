"""Recurrences as token mixers: one protocol for the whole pass, for one position, and for decoding with a cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, TypeAlias

from jaxtyping import Bool, Float
from torch import Tensor, nn

from interlayer.core.mixer import Context

Carried: TypeAlias = "Tensor | tuple[Tensor, ...]"


class Recurrent(nn.Module, ABC):
    """A causal mixer whose memory of the past has a fixed size.

    A subclass gives ``start`` and ``run``, and ``step`` where one position is best done in another way. The cache of a Transformer
    holds the state of such a sublayer beside the keys and values of others, so both may stand in one model.

    Shapes: [B, S, D] to [B, S, D].

    Raises:
        ValueError: A cache that holds tokens but no fitting state of this sublayer.

    Examples:
        >>> import torch
        >>> class Sum(Recurrent):
        ...     def start(self, batch):
        ...         return torch.zeros(batch, 1)
        ...     def run(self, x, state, real=None):
        ...         y = x.cumsum(1) + state[:, None]
        ...         return y, y[:, -1]
        >>> Sum()(torch.ones(1, 3, 1)).flatten()
        tensor([1., 2., 3.])
        >>> Sum().step(torch.ones(1, 1), torch.tensor([[5.0]]))
        (tensor([[6.]]), tensor([[6.]]))
    """

    offers: ClassVar[frozenset[str]] = frozenset({"cache", "order"})  # it needs no position encoding

    @abstractmethod
    def start(self, batch: int) -> Carried:
        """The state before the first position: a tensor, or several, each [B, ...]."""

    @abstractmethod
    def run(
        self, x: Float[Tensor, "B S D"], state: Carried, real: Bool[Tensor, "B S"] | None = None
    ) -> tuple[Float[Tensor, "B S D"], Carried]:
        """Run over all positions of ``x`` from ``state`` on.

        Args:
            x: Inputs.
            state: The state before them; it is not changed.
            real: False at padding, which must leave the state as it is.

        Returns:
            The outputs and the next state.
        """

    def step(self, x: Float[Tensor, "B D"], state: Carried) -> tuple[Float[Tensor, "B D"], Carried]:
        """Run one position."""
        y, state = self.run(x.unsqueeze(1), state)
        return y.squeeze(1), state

    def forward(self, x: Float[Tensor, "B S D"], context: Context | None = None) -> Float[Tensor, "B S D"]:
        """Run the sequence, or with a cache what follows the tokens that it has seen."""
        context = context or Context()
        real = None if context.mask is None else context.mask[:, -x.shape[1] :]
        if context.cache is None:
            return self.run(x, self.start(x.shape[0]), real)[0]
        state = context.cache.state(context.layer, self.start(x.shape[0]))
        y, context.cache.states[context.layer] = self.run(x, state, real)
        return y
