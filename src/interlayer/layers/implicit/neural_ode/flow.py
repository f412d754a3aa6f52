"""Continuous normalising flows: densities carried along an ODE."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import vjp, vmap

from interlayer.core.solve import Solver, odeint


class PlanarField(nn.Module):
    """Planar units whose weights a small network writes for every time, as in the authors' example.

    ``dz/dt = 1/M sum_m u_m(t) sigmoid(g_m(t)) tanh(w_m(t)' z + b_m(t))``; ``w, u, g`` and ``b`` come from an MLP of the time.

    Args:
        width: Features D.
        units: Planar units M.
        hidden: Hidden features of the MLP.

    Shapes: time [] and state [B, D] to [B, D].
    """

    def __init__(self, width: int, *, units: int = 64, hidden: int = 32) -> None:
        super().__init__()
        self.width, self.units = width, units
        self.write = nn.Sequential(
            nn.Linear(1, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, units * (3 * width + 1))
        )  # fmt: skip

    def forward(self, t: Tensor, z: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
        """The slope at a time."""
        written = self.write(t.view(1))
        w, u, g, b = written.split([self.units * self.width] * 3 + [self.units])
        w, u, g = (x.view(self.units, self.width) for x in (w, u, g))
        return torch.tanh(z @ w.t() + b) @ (u * torch.sigmoid(g)) / self.units


class CNF(nn.Module):
    """A continuous normalising flow: an ODE carries a normal distribution to the data's, and the density with it.

    Paper: Chen et al., "Neural Ordinary Differential Equations", arXiv:1806.07366.

    Equation: along ``dz/dt = f(z, t)`` the density changes by ``d log p(z(t)) / dt = -tr(df/dz)``; so ``log p(x) = log N(z(t_0)) -
    int_{t_0}^{t_1} tr(df/dz) dt`` with ``z(t_1) = x``. The trace is exact (D vector-Jacobian products), or estimated without bias from one
    product with a random sign vector v, ``v' (df/dz) v`` (Hutchinson), the same v along a whole solution; the estimate is of FFJORD
    (Grathwohl et al., arXiv:1810.01367). ``torch.compile`` makes one graph of fixed steps without the adjoint; ``torch.export``
    does not take the Jacobian.

    Args:
        width: Features D.
        field: Slope, called with time and state [B, D], whose items don't influence each other. Defaults to ``PlanarField(width)``.
        trace: ``exact`` or ``hutchinson``.
        times: Of the normal distribution and of the data.
        solver: Defaults to adaptive steps at 1e-5, as the authors'.

    Shapes: points [B, D] to their log densities [B].

    Raises:
        ValueError: Points of another shape, or an unknown trace.

    Examples:
        >>> flow = CNF(2, solver=Solver(steps=4))
        >>> flow(torch.randn(5, 2)).shape, flow.sample(3).shape
        (torch.Size([5]), torch.Size([3, 2]))
    """

    def __init__(
        self,
        width: int,
        *,
        field: nn.Module | None = None,
        trace: Literal["exact", "hutchinson"] = "exact",
        times: tuple[float, float] = (0.0, 1.0),
        solver: Solver = Solver(tolerance=1e-5),
    ) -> None:
        super().__init__()
        if trace not in ("exact", "hutchinson"):
            raise ValueError(f"CNF: trace {trace!r}; expected 'exact' or 'hutchinson'.")
        self.width, self.trace, self.times, self.solver = width, trace, times, solver
        self.flow = _Densities(PlanarField(width) if field is None else field)

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, " B"]:
        """The log density of each point."""
        z, change = self.to_normal(x)
        return -0.5 * (z.square().sum(1) + self.width * math.log(2 * math.pi)) - change

    def to_normal(self, x: Float[Tensor, "B D"]) -> tuple[Float[Tensor, "B D"], Float[Tensor, " B"]]:
        """Where the flow took each point from, and the integral of the trace on the way."""
        if x.ndim != 2 or x.shape[1] != self.width:
            raise ValueError(f"CNF: points {tuple(x.shape)}; expected [batch, {self.width}].")
        if self.trace == "exact":
            probes = torch.eye(self.width, dtype=x.dtype, device=x.device).unsqueeze(1).expand(-1, len(x), -1)
        else:
            probes = (torch.randint_like(x, 2) * 2 - 1).unsqueeze(0)
        state = torch.cat((x, torch.zeros_like(x[:, :1])), 1)
        found = odeint(self.flow, state, self.times[::-1], probes, solver=self.solver).value[-1]
        return found[:, :-1], found[:, -1]

    @torch.no_grad()
    def sample(self, count: int) -> Float[Tensor, "N D"]:
        """Draw points from the flow's distribution."""
        like = next(self.parameters())
        z = torch.randn(count, self.width, dtype=like.dtype, device=like.device)
        return odeint(self.flow.field, z, self.times, solver=self.solver).value[-1]


class _Densities(nn.Module):
    """The slope of points and of their log densities, [B, D + 1]."""

    def __init__(self, field: nn.Module) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: Tensor, state: Tensor, probes: Tensor) -> Tensor:
        """The field, and minus the trace of its Jacobian: of ``v' J v`` summed over the probes v, [P, B, D]."""
        slope, pull = vjp(lambda z: self.field(t, z), state[:, :-1])
        probes = probes.to(slope.dtype)
        trace = (vmap(pull)(probes)[0] * probes).sum((0, 2))
        return torch.cat((slope, -trace.unsqueeze(1)), 1)
