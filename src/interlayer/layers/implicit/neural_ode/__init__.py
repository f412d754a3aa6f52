"""Neural ODEs: layers whose output is the solution of a differential equation, flows of densities, latent trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.data import DataShape
from interlayer.core.example import Example
from interlayer.core.solve import Solver, odeint
from interlayer.layers.implicit.neural_ode.flow import CNF
from interlayer.layers.implicit.neural_ode.latent import LatentODE

__all__ = ["CNF", "EXAMPLE", "ConvField", "DenseField", "LatentODE", "NeuralODE", "ODENet"]


class NeuralODE(nn.Module):
    """A block of continuous depth: its output is where an ODE, whose slope is a network, carries the input.

    Paper: Chen, Rubanova, Bettencourt and Duvenaud, "Neural Ordinary Differential Equations", arXiv:1806.07366.

    Equations: ``dh/dt = f(h(t), t)`` (2) from ``h(t_0) = x``; the output is ``h(t_1)``. Gradients by the adjoint method, with
    ``a = dL/dh``: ``da/dt = -a' df/dh`` and ``dL/dw = -int_{t_1}^{t_0} a' df/dw dt``, solved backwards together with h. Memory
    does not grow with the number of steps. Depth is what the solver needs for ``tolerance``; it may be lower in use than in
    training.

    Steps, tolerance and evaluations are those of ``core.solve``; ``evaluations`` and ``residual`` are reported through
    ``core.aside``. Beside this block stand ``CNF``, flows of densities, and ``LatentODE``, for irregular series. Authors' code:
    rtqichen/torchdiffeq. The number of (2) was checked, those of the others could not be.

    Args:
        field: The slope, called with a scalar time and the state: ``DenseField``, ``ConvField``, or any module.
        times: From t_0 to t_1.
        solver: Defaults to adaptive steps at a tolerance of 1e-3, which need ``pip install "interlayer[ode]"``; fixed steps
            need nothing, compile to one graph and export.

    Shapes: any that ``field`` keeps.

    Raises:
        ValueError: Times that are not two different ones, or a field that changes the shape.
        SolverError: The tolerance was not met (see ``core.solve.odeint``).

    Examples:
        >>> block = NeuralODE(DenseField(4), solver=Solver(steps=8))
        >>> block(torch.randn(3, 4)).shape
        torch.Size([3, 4])
    """

    def __init__(
        self, field: nn.Module, *, times: tuple[float, float] = (0.0, 1.0), solver: Solver = Solver(tolerance=1e-3)
    ) -> None:
        super().__init__()
        if len(times) != 2 or times[0] == times[1]:
            raise ValueError(f"NeuralODE: times {times}; expected two different ones.")
        self.field, self.times, self.solver = field, times, solver

    def forward(self, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        """The state at the last time."""
        return odeint(self.field, x, self.times, solver=self.solver).value[-1]


class DenseField(nn.Module):
    """A slope for features: ``W_2 tanh(W_1 [h, t] + b_1) + b_2``.

    Args:
        width: Features D.
        hidden: Hidden features. Defaults to 4 D.

    Shapes: time [] and state [..., D] to [..., D].
    """

    def __init__(self, width: int, *, hidden: int | None = None) -> None:
        super().__init__()
        self.width = width
        self.first, self.second = nn.Linear(width + 1, hidden or 4 * width), nn.Linear(hidden or 4 * width, width)

    def forward(self, t: Tensor, h: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """The slope at a time."""
        if h.shape[-1] != self.width:
            raise ValueError(f"DenseField: state {tuple(h.shape)}; expected [..., {self.width}].")
        return self.second(torch.tanh(self.first(torch.cat((h, t.expand(*h.shape[:-1], 1)), -1))))


class ConvField(nn.Module):
    """The authors' slope for images: norm, ReLU, convolution, norm, ReLU, convolution, norm; time is a channel of the convolutions.

    Args:
        channels: Channels C; norms have groups of one channel up to 32 groups.
        groups: Groups of the norms, which divide C. Defaults to at most 32.

    Shapes: time [] and state [B, C, H, W] to [B, C, H, W].
    """

    def __init__(self, channels: int, *, groups: int | None = None) -> None:
        super().__init__()
        self.channels = channels
        groups = min(32, channels) if groups is None else groups
        self.norms = nn.ModuleList(nn.GroupNorm(groups, channels) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(channels + 1, channels, 3, padding=1) for _ in range(2))

    def forward(self, t: Tensor, h: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """The slope at a time."""
        if h.ndim != 4 or h.shape[1] != self.channels:
            raise ValueError(f"ConvField: state {tuple(h.shape)}; expected [batch, {self.channels}, height, width].")
        time = t.expand(len(h), 1, *h.shape[2:])
        for norm, conv in zip(self.norms, self.convs, strict=False):
            h = conv(torch.cat((time, F.relu(norm(h))), 1))
        return self.norms[2](h)


class ODENet(nn.Module):
    """The authors' classifier of images: convolutions that halve the image, one ``NeuralODE`` in place of residual blocks, a head.

    Args:
        channels: Channels of the image.
        classes: Number of classes K.
        width: Channels of the ODE's state.
        halvings: How often the image is halved first.
        solver: Of the block.
        block: What stands between stem and head. Defaults to ``NeuralODE(ConvField(width))``.

    Shapes: [B, C, H, W] to [B, K].

    Raises:
        ValueError: Images of other channels, or of fewer pixels a side than ``2^halvings``.

    Examples:
        >>> ODENet(1, 10, width=8, halvings=1, solver=Solver(steps=2))(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: int = 1,
        classes: int = 10,
        *,
        width: int = 64,
        halvings: int = 2,
        solver: Solver = Solver(tolerance=1e-3),
        block: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.channels, self.least = channels, 2**halvings

        def norm() -> list[nn.Module]:
            return [nn.GroupNorm(min(32, width), width), nn.ReLU()]

        down = [m for _ in range(halvings) for m in (*norm(), nn.Conv2d(width, width, 4, 2, 1))]
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), *down)
        self.block = NeuralODE(ConvField(width), solver=solver) if block is None else block
        self.head = nn.Sequential(*norm(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))

    @classmethod
    def for_task(
        cls, shape: DataShape, *, steps: int | None = None, tolerance: float | None = None, adjoint: bool = True, **options: Any
    ) -> Self:  # fmt: skip
        """A small net for a task of images and classes; ``steps`` or ``tolerance`` as in ``Solver`` (1e-3 by default)."""
        shape.require("ODENet", "image", "classes")
        halvings = 1 if min(shape.height, shape.width) < 16 else 2
        solver = Solver(steps=steps, tolerance=tolerance, adjoint=adjoint)
        return cls(shape.channels, shape.classes, **{"width": 16, "halvings": halvings, "solver": solver, **options})

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Logits of the classes."""
        if image.ndim != 4 or image.shape[1] != self.channels or min(image.shape[2:]) < self.least:
            raise ValueError(
                f"ODENet: image {tuple(image.shape)}; expected [batch, {self.channels}, height, width] of at least "
                f"{self.least} pixels a side."
            )
        return self.head(self.block(self.stem(image)))


def unrolled(layer: NeuralODE) -> Any:
    """The same with gradients through the solver's steps."""
    solver = Solver(steps=layer.solver.steps, method=layer.solver.method, adjoint=False)
    return lambda x: odeint(layer.field, x, layer.times, solver=solver).value[-1]


def _example(field: nn.Module, times: Sequence[float] = (0.0, 1.0), **options: Any) -> NeuralODE:
    return NeuralODE(field, times=(times[0], times[1]), solver=Solver(**options))


EXAMPLE = Example(
    make=lambda: _example(DenseField(4, hidden=6), (0.0, 0.125), steps=1),
    inputs=lambda: (torch.randn(3, 4),),
    odd=lambda: (torch.randn(5, 3, 4),),
    gradient="implicit",
    twin=unrolled,
    modes={
        "through the steps": lambda: _example(DenseField(4), steps=2, method="midpoint", adjoint=False),
        "adaptive steps": lambda: _example(DenseField(4), tolerance=1e-3),
        "adaptive steps, back in time, through the steps": lambda: _example(
            DenseField(4), (1.0, 0.0), tolerance=1e-2, method="bosh3", adjoint=False
        ),
    },
)
