"""Latent ODEs: irregular series as trajectories from one hidden initial state."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from interlayer.core.solve import Solver, odeint


class LatentField(nn.Module):
    """The authors' slope of latent states, the same at all times: three linear maps with ELU between them.

    Args:
        width: Features of the latent state.
        hidden: Hidden features.
    """

    def __init__(self, width: int, *, hidden: int = 20) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(width, hidden), nn.ELU(), nn.Linear(hidden, hidden), nn.ELU(), nn.Linear(hidden, width)
        )

    def forward(self, t: Tensor, z: Float[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        """The slope."""
        return self.net(z)


class LatentODE(nn.Module):
    """A variational autoencoder of time series: an RNN infers where a latent trajectory begins, an ODE runs it to any time.

    Paper: Chen et al., "Neural Ordinary Differential Equations", arXiv:1806.07366.

    Equations: ``z_0 ~ q(z_0 | x, t) = N(mean, variance)`` from an RNN that reads the observations from the last to the first, each with
    the gap to the next; ``z(t)`` solves ``dz/dt = f(z)`` from z_0 at time 0; ``x_i ~ N(decode(z(t_i)), noise^2)``. Training maximises
    ``E log p(x | z_0) - KL(q || N(0, I))``. Series may differ in times and lengths; the ODE is solved once, for all times of a batch.

    Sizes are those of the authors' example; its RNN sees regular series and no gaps.

    Args:
        features: Observed features F.
        latent: Latent features L.
        hidden: Hidden features of slope and decoder.
        memory: Hidden features of the RNN.
        noise: Standard deviation of the observations.
        field: Slope of the latent state. Defaults to ``LatentField``.
        solver: Defaults to adaptive steps at 1e-4 with gradients through them: with the adjoint, every time of a batch would be a
            solution of its own. Fixed steps go from each time of the batch to the next, however far that is.

    Shapes: series [B, N, F] with times [B, N], both padded at the end where ``lengths`` [B] says so, and times asked for [B, M]
    to predictions [B, M, F].

    Raises:
        ValueError: Shapes that do not fit, or times below 0.

    Examples:
        >>> model = LatentODE(2, solver=Solver(steps=1, adjoint=False))
        >>> x, t = torch.randn(3, 7, 2), torch.rand(3, 7).sort(1).values
        >>> model(x, t, 2 * torch.rand(3, 4)).shape, model.elbo(x, t).shape
        (torch.Size([3, 4, 2]), torch.Size([3]))
    """

    def __init__(
        self,
        features: int,
        *,
        latent: int = 4,
        hidden: int = 20,
        memory: int = 25,
        noise: float = 0.3,
        field: nn.Module | None = None,
        solver: Solver = Solver(tolerance=1e-4, adjoint=False),
    ) -> None:
        super().__init__()
        self.features, self.latent, self.noise, self.solver = features, latent, noise, solver
        self.reader = nn.RNN(features + 1, memory, batch_first=True)
        self.infer = nn.Linear(memory, 2 * latent)
        self.field = LatentField(latent, hidden=hidden) if field is None else field
        self.decode = nn.Sequential(nn.Linear(latent, hidden), nn.ReLU(), nn.Linear(hidden, features))

    def encode(
        self, x: Float[Tensor, "B N F"], times: Float[Tensor, "B N"], lengths: Int[Tensor, " B"] | None = None
    ) -> tuple[Float[Tensor, "B L"], Float[Tensor, "B L"]]:
        """Mean and log variance of the initial state."""
        if x.ndim != 3 or x.shape[2] != self.features or times.shape != x.shape[:2]:
            raise ValueError(
                f"LatentODE: series {tuple(x.shape)} at times {tuple(times.shape)}; expected [batch, count, {self.features}] at "
                "[batch, count]."
            )
        gaps = torch.cat((times[:, :1], times.diff(dim=1)), 1)
        steps = torch.cat((x, gaps.unsqueeze(2)), 2)
        if lengths is None:
            last = self.reader(steps.flip(1))[1][0]
        else:
            back = (lengths[:, None] - 1 - torch.arange(x.shape[1], device=x.device)).clamp_min(0)
            steps = steps.gather(1, back.unsqueeze(2).expand_as(steps))
            packed = pack_padded_sequence(steps, lengths.cpu(), batch_first=True, enforce_sorted=False)
            last = self.reader(packed)[1][0]
        mean, log_variance = self.infer(last).chunk(2, 1)
        return mean, log_variance

    def trajectory(self, z: Float[Tensor, "B L"], times: Float[Tensor, "B M"]) -> Float[Tensor, "B M F"]:
        """Decoded states at the times of each item, from ``z`` at time 0."""
        if bool((times < 0).any()):
            raise ValueError(f"LatentODE: time {float(times.min()):g}; expected times from 0 on. Shift them.")
        grid, index = torch.cat((times.new_zeros(1), times.flatten())).unique(return_inverse=True)
        if len(grid) == 1:
            return self.decode(z).unsqueeze(1).expand(-1, times.shape[1], -1)
        states = odeint(self.field, z, grid, solver=self.solver).value
        rows = torch.arange(len(z), device=z.device).unsqueeze(1)
        return self.decode(states[index[1:].view(times.shape), rows])

    def forward(
        self,
        x: Float[Tensor, "B N F"],
        times: Float[Tensor, "B N"],
        wanted: Float[Tensor, "B M"],
        lengths: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B M F"]:
        """Predict the series at other times, from the mean of the initial state."""
        return self.trajectory(self.encode(x, times, lengths)[0], wanted)

    def elbo(
        self, x: Float[Tensor, "B N F"], times: Float[Tensor, "B N"], lengths: Int[Tensor, " B"] | None = None
    ) -> Float[Tensor, " B"]:
        """A lower bound of each series' log likelihood, with one drawn initial state."""
        mean, log_variance = self.encode(x, times, lengths)
        z = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        off = (x - self.trajectory(z, times)) / self.noise
        each = -0.5 * off.square() - math.log(self.noise) - 0.5 * math.log(2 * math.pi)
        if lengths is not None:
            each = each * (torch.arange(x.shape[1], device=x.device) < lengths[:, None]).unsqueeze(2)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
        return each.sum((1, 2)) - divergence
