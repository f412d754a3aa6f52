"""Soft reset and membrane-potential rectifier: spiking neurons that lose less of what they were told."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.config import configured
from interlayer.core.data import DataShape
from interlayer.core.example import Example
from interlayer.core.spike import LIF, Clamp, Neuron, Surrogate, Unrolled


def rectify(u: Float[Tensor, "..."], sharpness: float = 3.0) -> Float[Tensor, "..."]:
    """Move potentials closer to the spikes that they become, 0 or 1, without moving any across the threshold of 1/2."""
    within = torch.tanh(sharpness * (u - 0.5)) / (2 * math.tanh(sharpness / 2)) + 0.5
    above, below = u.clamp(min=1) ** (1 / 3), 1 - (1 - u.clamp(max=0)) ** (1 / 3)
    return torch.where(u > 1, above, torch.where(u < 0, below, within))


class Rectified(Surrogate):
    """The gradient of a spike as that of the rectified potential, clamped to 0 and 1.

    Args:
        sharpness: Slope of the hyperbolic tangent; 3 in the authors' code.
    """

    def rise(self, v: Tensor) -> Tensor:
        """``clamp(rectify(v + 1/2), 0, 1)``."""
        return rectify(v + 0.5, self.sharpness).clamp(0, 1)

    def slope(self, v: Tensor) -> Tensor:
        """``n / (2 tanh(n / 2)) (1 - tanh(n v)^2)`` for a potential within 0 and 1, with n the sharpness; else 0."""
        half = self.sharpness / 2
        steep = (v * self.sharpness).tanh_().square_().neg_().add_(1).mul_(half / math.tanh(half))
        return steep.mul_(v.abs() <= 0.5)


@configured
class SoftResetMPR(LIF):
    """Neurons whose reset keeps what exceeds a spike, and whose gradient is that of potentials drawn towards their spikes.

    Paper: Guo et al., "Reducing Information Loss for Spiking Neural Networks" (InfLoR-SNN), arXiv:2307.04356.

    Equations, with ``u_t = decay v_{t-1} + x_t``:

    - spike: ``s_t = 1 if phi(u_t) > 1/2 else 0``
    - soft reset: ``v_t = u_t - s_t``; a hard reset, ``v_t = u_t (1 - s_t)``, forgets by how much a potential exceeded the threshold
    - rectifier: ``phi(u) = tanh(3 (u - 1/2)) / (2 tanh(3/2)) + 1/2`` for u in [0, 1], ``u^(1/3)`` above, ``1 - (1 - u)^(1/3)`` below
    - gradient of a spike: that of ``clamp(phi(u), 0, 1)``

    The rectifier grows with u and leaves 1/2 where it is, so it changes no spike: it acts by the gradient, and costs nothing
    after training. Constants and the gradient are those of the authors' code (yfguo91/Re-Loss, ``models/spike_layer.py``), whose
    gradient at potentials of exactly 0 and 1 is 1 instead. The authors name that code as this paper's, whose own text could not be
    read.

    Args:
        reset: ``soft``, or ``hard`` for comparison.
        rectify: Whether the gradient is that of the rectified potential, or of ``clamp(u, 0, 1)``.
        decay: Share of the potential that is left after a step; the authors' neurons do not leak.
        steps: Time steps that are folded into the batch; see ``core.spike.Neuron``. By default axis 1 is time.

    Shapes: [B, T, ...] to [B, T, ...], or with ``steps`` [B T, ...] to [B T, ...].

    Raises:
        ValueError: Those of ``core.spike.LIF``.

    Examples:
        >>> x = torch.full((1, 4, 1), 0.75)
        >>> SoftResetMPR()(x).flatten(), SoftResetMPR(reset="hard")(x).flatten()
        (tensor([1., 0., 1., 1.]), tensor([1., 1., 1., 1.]))
    """

    def __init__(
        self,
        *,
        reset: Literal["soft", "hard"] = "soft",
        rectify: bool = True,
        decay: float = 1.0,
        steps: int | None = None,
    ) -> None:
        super().__init__(
            decay=decay, threshold=0.5, reset=reset, drop=1.0 if reset == "soft" else None,
            surrogate=Rectified(3.0) if rectify else Clamp(), steps=steps,
        )  # fmt: skip

    @torch.no_grad()
    def lost(self, x: Float[Tensor, "B T ..."]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Quantisation error of the spikes for these currents: mean of ``(u - s)^2`` before, and of ``(phi(u) - s)^2`` after."""
        spikes, potentials, _ = self.trace(x, self.start(x.shape[0]))
        return (potentials - spikes).square().mean(), (rectify(potentials) - spikes).square().mean()


@configured
class SpikingNet(Unrolled):
    """Convolutions for images or linear layers for vectors, each with batch normalisation over examples and steps, and neurons.

    The first layer receives the input itself at each step (direct encoding), or the events of a series; logits are averaged over
    the steps. Layers are those of the authors' networks without shortcuts; every convolution but the first halves the image.

    Args:
        inputs: Channels, height and width of an image, or the features of a vector or of a step.
        outputs: Classes, or predicted values, K.
        steps: Time steps T.
        static: Whether inputs have no time axis and are repeated.
        width: Channels of the first convolution, doubled by each further one; or features of each linear layer.
        depth: Layers of neurons.
        **neuron: Options of ``SoftResetMPR``.

    Shapes: [B, C, H, W] or [B, F], or with ``static=False`` [B, T, F], to [B, K].

    Raises:
        ValueError: Inputs of another shape, or no layers.

    Examples:
        >>> SpikingNet((1, 8, 8), 10, width=4)(torch.randn(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: int,
        *,
        steps: int = 4,
        static: bool = True,
        width: int = 32,
        depth: int = 2,
        **neuron: Any,
    ) -> None:
        if depth < 1 or len(inputs) not in (1, 3):
            raise ValueError(
                f"SpikingNet: inputs {inputs}, depth {depth}; expected (features,) or (channels, height, width), and a layer."
            )
        layers: list[nn.Module] = []
        size = inputs[0]
        for i in range(depth):
            if len(inputs) == 3:
                wide = width << i
                layers.append(nn.Conv2d(size, wide, 3, stride=2 if i else 1, padding=1, bias=False))
                layers.append(nn.BatchNorm2d(wide))
            else:
                wide = width
                layers += [nn.Linear(size, wide, bias=False), nn.BatchNorm1d(wide)]
            layers.append(SoftResetMPR(steps=steps, **neuron))
            size = wide
        pool = [nn.AdaptiveAvgPool2d(1)] if len(inputs) == 3 else []
        super().__init__(nn.Sequential(*layers, *pool, nn.Flatten(), nn.Linear(size, outputs)), steps, static=static)
        self.inputs = tuple(inputs)

    @classmethod
    def for_task(cls, shape: DataShape, **options: Any) -> Self:
        """A network for images, vectors, or series of events, whose steps are then the network's."""
        if shape.kind == "image":
            return cls((shape.channels, shape.height, shape.width), shape.classes, **options)
        if shape.kind == "series":
            return cls((shape.features,), shape.classes, steps=shape.length, static=False, **options)
        if shape.kind != "vector":
            raise ValueError(
                f"SpikingNet: takes images, vectors or series, not {shape.kind}. Take a task such as 'digits'."
            )
        return cls((shape.features,), shape.classes, **options)

    def forward(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B K"]:
        """The mean logits over the steps."""
        wanted = self.inputs if self.static else (self.steps, *self.inputs)
        if tuple(x.shape[1:]) != wanted:
            raise ValueError(f"SpikingNet: input {tuple(x.shape)}; expected [batch, {', '.join(map(str, wanted))}].")
        return super().forward(x)


def naive(layer: Neuron) -> Callable[[Tensor], Tensor]:
    """Step after step, differentiated by autograd."""
    return lambda x: Neuron.run(layer, x, layer.start(len(x)))[0]


EXAMPLE = Example(
    make=SoftResetMPR,
    inputs=lambda: (torch.randn(2, 6, 5),),
    odd=lambda: (torch.randn(3, 7, 2, 3),),
    wrong=lambda: (torch.randn(3),),
    axis=1,
    causal=True,
    gradient="surrogate",
    twin=naive,
    streams=True,
    modes={
        "hard": lambda: SoftResetMPR(reset="hard"),
        "not rectified, with a leak": lambda: SoftResetMPR(rectify=False, decay=0.5),
    },
)
