"""Spiking neurons: charge, fire, reset, with an explicit state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core import aside
from interlayer.core.spike.sequence import OverTime
from interlayer.core.spike.surrogate import Atan, Surrogate


class Neuron(nn.Module, ABC):
    """Neurons with a potential each, which charge with a current, fire, and reset, step after step.

    A subclass gives the three equations. They run one step after the other here, which is the reference; ``LIF`` runs them over a whole
    sequence at once. The state is explicit: ``start`` gives it, ``step`` and ``run`` take it and give the next. The share of neurons
    that fire is reported as the metric ``firing rate`` (``core.aside``).

    Args:
        steps: Time steps T that are folded into the batch: inputs are [B T, ...], step after step of one example, so that the neurons
            stand in any network in an activation's place (see ``Unrolled``). By default axis 1 is time.

    Shapes: [B, T, ...] to [B, T, ...], or with ``steps`` [B T, ...] to [B T, ...]; the state is [B, ...].

    Raises:
        ValueError: A sequence without steps, a batch that is no multiple of ``steps``, or a state of other neurons.
    """

    def __init__(self, *, steps: int | None = None) -> None:
        super().__init__()
        if steps is not None and steps < 1:
            raise ValueError(f"{type(self).__name__}: steps {steps}; expected at least 1.")
        self.steps = steps

    @abstractmethod
    def charge(self, current: Tensor, state: Tensor) -> Tensor:
        """The potential after a step's current."""

    @abstractmethod
    def fire(self, potential: Tensor) -> Tensor:
        """Spikes of 0 and 1, with a surrogate gradient."""

    @abstractmethod
    def discharge(self, potential: Tensor, spike: Tensor) -> Tensor:
        """The potential that is left."""

    def start(self, batch: int) -> Float[Tensor, " B"]:
        """The state at rest: one zero for each example, until the first step shows how many neurons there are."""
        return torch.zeros(batch)

    def step(self, x: Float[Tensor, "B ..."], state: Tensor) -> tuple[Float[Tensor, "B ..."], Tensor]:
        """Run one step: the spikes and the next state, which is at least float32."""
        potential = self.charge(x, self._fitting(state, x))
        spike = self.fire(potential)
        return spike.to(x.dtype), self.discharge(potential, spike)

    def run(self, x: Float[Tensor, "B T ..."], state: Tensor) -> tuple[Float[Tensor, "B T ..."], Tensor]:
        """Run a sequence from a state on: the spikes and the next state."""
        self._check(x)
        spikes = []
        for current in x.unbind(1):
            spike, state = self.step(current, state)
            spikes.append(spike)
        return torch.stack(spikes, 1), state

    def forward(self, x: Float[Tensor, "B T ..."]) -> Float[Tensor, "B T ..."]:
        """Run from rest."""
        if self.steps:
            if x.shape[0] % self.steps:
                raise ValueError(
                    f"{type(self).__name__}: input {tuple(x.shape)}; expected a batch that is a multiple of {self.steps} steps. "
                    "Give the steps of one example one after the other, or leave steps out and have time as axis 1."
                )
            x = x.unflatten(0, (-1, self.steps))
        self._check(x)
        spikes, _ = self.run(x, self.start(x.shape[0]))
        if aside.listening():
            aside.metric("firing rate", spikes.detach().float().mean())
        return spikes.flatten(0, 1) if self.steps else spikes

    def _check(self, x: Tensor) -> None:
        if x.ndim < 2 or not x.shape[1]:
            raise ValueError(f"{type(self).__name__}: input {tuple(x.shape)}; expected [batch, time, ...] with a step.")

    def _fitting(self, state: Tensor, x: Tensor) -> Tensor:
        """The state in the shape of a step's inputs, and in at least single precision."""
        if state.ndim == 1 and x.ndim > 1:
            state = state.view(-1, *[1] * (x.ndim - 1)).expand(x.shape)
        if state.shape != x.shape:
            raise ValueError(
                f"{type(self).__name__}: a state of {tuple(state.shape)} for inputs {tuple(x.shape)}; expected the state that this "
                "layer returned for the same batch, or start(batch)."
            )
        return state.to(x.device, torch.promote_types(x.dtype, torch.float32))


class LIF(Neuron):
    """Leaky integrate-and-fire neurons.

    - charge: ``u_t = decay v_{t-1} + x_t``
    - fire: ``s_t = 1 if u_t > threshold else 0``, with the slope of ``surrogate`` at ``u_t - threshold`` as its gradient
    - reset: ``v_t = u_t - drop s_t`` (soft), or ``v_t = u_t (1 - s_t)`` (hard)

    A sequence of N neurons takes 3 T operations on B N numbers forward, as many backward beside the slopes, and keeps 2 B T N numbers for
    the backward pass.

    Args:
        decay: Share of the potential that is left after a step, 0 to 1; 1 for no leak.
        threshold: Potential above which a neuron fires.
        reset: ``soft`` or ``hard``.
        drop: What a soft reset subtracts. Defaults to ``threshold``.
        surrogate: The surrogate gradient.
        detach: Whether the reset lets no gradient through to the spike.
        steps: See ``Neuron``.

    Shapes: [B, T, ...] to [B, T, ...]; see ``Neuron``.

    Raises:
        ValueError: A decay outside of 0 to 1, an unknown reset, or a drop for a hard reset.

    Examples:
        >>> neurons, currents = LIF(decay=1.0), torch.full((1, 5, 1), 0.75)
        >>> neurons(currents).flatten()
        tensor([0., 1., 1., 0., 1.])
        >>> spikes, state = neurons.run(currents[:, :2], neurons.start(1))
        >>> neurons.step(currents[:, 2], state)
        (tensor([[1.]]), tensor([[0.2500]]))
    """

    def __init__(
        self,
        *,
        decay: float = 0.5,
        threshold: float = 1.0,
        reset: Literal["soft", "hard"] = "soft",
        drop: float | None = None,
        surrogate: Surrogate = Atan(),
        detach: bool = False,
        steps: int | None = None,
    ) -> None:
        super().__init__(steps=steps)
        name = type(self).__name__
        if not 0 <= decay <= 1:
            raise ValueError(f"{name}: decay {decay}; expected 0 to 1.")
        if reset not in ("soft", "hard"):
            raise ValueError(f"{name}: reset {reset!r}; expected 'soft' or 'hard'.")
        if reset == "hard" and drop is not None:
            raise ValueError(f"{name}: drop {drop} with a hard reset, which goes to zero. Leave drop out.")
        self.decay, self.threshold, self.hard, self.detach = decay, threshold, reset == "hard", detach
        self.drop, self.surrogate = threshold if drop is None else drop, surrogate

    def __init_subclass__(cls) -> None:
        if own := {"charge", "fire", "discharge"} & vars(cls).keys():
            raise TypeError(
                f"{cls.__name__}: {min(own)} of its own, which the fast form of LIF would not use. Derive from Neuron."
            )

    def charge(self, current: Tensor, state: Tensor) -> Tensor:
        """``decay v + x``."""
        return torch.add(current, state, alpha=self.decay)

    def fire(self, potential: Tensor) -> Tensor:
        """1 above the threshold."""
        return self.surrogate.spike(potential - self.threshold)

    def discharge(self, potential: Tensor, spike: Tensor) -> Tensor:
        """Subtract ``drop`` from those that fired, or set them to zero."""
        spike = spike.detach() if self.detach else spike
        if self.hard:
            return torch.addcmul(potential, potential, spike, value=-1)
        return torch.sub(potential, spike, alpha=self.drop)

    def run(self, x: Float[Tensor, "B T ..."], state: Tensor) -> tuple[Float[Tensor, "B T ..."], Tensor]:
        """Run a sequence from a state on: the spikes and the next state."""
        spikes, _, state = self.trace(x, state)
        return spikes, state

    def trace(
        self, x: Float[Tensor, "B T ..."], state: Tensor
    ) -> tuple[Float[Tensor, "B T ..."], Float[Tensor, "B T ..."], Tensor]:
        """As ``run``, with the potentials before the reset after the spikes."""
        self._check(x)
        state, kind = self._fitting(state, x[:, 0]), self.surrogate
        return OverTime.apply(
            x, state, self.decay, self.threshold, self.drop, self.hard, self.detach, kind.name, kind.sharpness
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The constants."""
        reset = "hard" if self.hard else f"soft by {self.drop:g}"
        return f"decay={self.decay:g}, threshold={self.threshold:g}, reset {reset}, {self.surrogate}"


class Unrolled(nn.Module):
    """Runs a network at each of T time steps, all of them in one batch, and averages what it gives.

    Its layers see [B T, ...], so matrix products, convolutions and batch normalisation take all steps at once, as they do for T times as
    many examples; only neurons with ``steps=T`` know of time. A static input is repeated at each step (direct encoding).

    Args:
        network: The network, with spiking neurons in place of activations.
        steps: Time steps T.
        static: Whether inputs are static, [B, ...], and repeated; else they bring their time steps, [B, T, ...].

    Shapes: [B, ...], or with ``static=False`` [B, T, ...], to [B, K].

    Raises:
        ValueError: Neurons with other ``steps``, a network without neurons, or inputs of another number of steps.

    Examples:
        >>> net = nn.Sequential(nn.Linear(8, 16), LIF(steps=4), nn.Linear(16, 3))
        >>> Unrolled(net, 4)(torch.randn(5, 8)).shape
        torch.Size([5, 3])
    """

    def __init__(self, network: nn.Module, steps: int, *, static: bool = True) -> None:
        super().__init__()
        found = {m.steps for m in network.modules() if isinstance(m, Neuron)}
        if found != {steps}:
            raise ValueError(
                f"Unrolled: neurons with steps {sorted(map(str, found)) or 'none'} in a network of {steps} steps. "
                f"Build each with steps={steps}."
            )
        self.network, self.steps, self.static = network, steps, static

    def forward(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B K"]:
        """The mean output over the steps."""
        if self.static:
            x = x.unsqueeze(1).expand(-1, self.steps, *x.shape[1:])
        elif x.ndim < 3 or x.shape[1] != self.steps:
            raise ValueError(f"Unrolled: input {tuple(x.shape)}; expected [batch, {self.steps} steps, ...].")
        return self.network(x.flatten(0, 1)).unflatten(0, (-1, self.steps)).mean(1)
