"""What noise does to data over time, and what a model learns from it: DDPM's diffusion and rectified flow.

Every process here is a path ``x_t = alpha_t x_0 + sigma_t noise``. Times are what the model gets: from ``start`` (noise) down
to ``end`` (data). A model is called as ``model(x, t, *conditions)``, as those of diffusers want it, and may return a tensor or
an object with ``sample``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from interlayer.core.data import answer

Model = Callable[..., Any]


class Prediction(NamedTuple):
    """What a model's output says of a noised item.

    Attributes:
        x0: The clean item.
        noise: The noise in it; ``x = alpha x0 + sigma noise``.
        range: Where the variance lies between its bounds, from -1 to 1, if the model learns it.
    """

    x0: Tensor
    noise: Tensor
    range: Tensor | None = None


class Process(ABC):
    """A path between data and noise. A process of your own gives the methods that are abstract here.

    Attributes:
        start: Time of pure noise.
        end: Time of clean data.
        straight: Whether ``alpha = 1 - sigma``, so that items move with the velocity ``noise - x0``.
    """

    start: float
    end: float
    straight: ClassVar[bool] = False

    @abstractmethod
    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``alpha_t`` and ``sigma_t``, in the shape of ``t``."""

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Random times to train at."""

    @abstractmethod
    def times(self, steps: int) -> Tensor:
        """The ``steps + 1`` falling times at which a sampler stops, ``end`` the last."""

    @abstractmethod
    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model's output should be."""

    @abstractmethod
    def read(self, x: Tensor, output: Tensor, t: Tensor) -> Prediction:
        """The clean item and the noise that a model's output stands for."""

    def noised(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """``alpha_t x0 + sigma_t noise``, with one time for each item."""
        alpha, sigma = self.broadcast(t, x0)
        return alpha * x0 + sigma * noise

    def loss(self, model: Model, x0: Tensor, *conditions: Any, generator: torch.Generator | None = None) -> Tensor:
        """Training loss of a batch at random times, with noise from ``generator`` (on the CPU)."""
        t = self.draw(len(x0), generator).to(x0.device)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        x = self.noised(x0, t, noise)
        return self.score(answer(model(x, t, *conditions)), x, x0, noise, t)

    def score(self, output: Tensor, x: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Mean squared error of a model's output for the noised ``x``."""
        self._expect(output, x, 1)
        return (output - self.target(x0, noise, t)).square().mean()

    def _expect(self, output: Tensor, x: Tensor, times: int) -> None:
        wanted = (x.shape[0], times * x.shape[1], *x.shape[2:])
        if output.shape != wanted:
            raise ValueError(
                f"{type(self).__name__}: the model gives {tuple(output.shape)}; expected {wanted}. Build it with as many output "
                "channels as the data has, or twice as many for variance='learned'."
            )

    def broadcast(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """``scales`` shaped so that they multiply ``x``."""
        alpha, sigma = self.scales(t)
        return _like(alpha, x), _like(sigma, x)

    def posterior(self, x: Tensor, x0: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variance of ``x_s`` given ``x_t`` and ``x_0``, and the variance that the step from s to t adds.

        With ``r = alpha_t / alpha_s`` the added variance is ``b = sigma_t^2 - r^2 sigma_s^2`` (DDPM's beta), the variance is
        ``b sigma_s^2 / sigma_t^2`` and the mean ``(r sigma_s^2 x + alpha_s b x0) / sigma_t^2`` (DDPM's equations 6 and 7).
        """
        (alpha_t, sigma_t), (alpha_s, sigma_s) = self.scales(t), self.scales(s)
        ratio = alpha_t / alpha_s
        added = sigma_t**2 - ratio**2 * sigma_s**2
        old, clean = ratio * sigma_s**2 / sigma_t**2, alpha_s * added / sigma_t**2
        mean = _like(old, x) * x + _like(clean, x) * x0
        return mean, _like(added * sigma_s**2 / sigma_t**2, x), _like(added, x)


def _like(scale: Tensor, x: Tensor) -> Tensor:
    """One number for each item, or for all, shaped so that it multiplies ``x``."""
    return scale.reshape(-1, *[1] * (x.ndim - 1) if scale.ndim else ()).to(x)


class Diffusion(Process):
    r"""DDPM's diffusion with linearly rising noise (Ho et al., arXiv:2006.11239); the model predicts the noise.

    $x_t = \sqrt{\bar\alpha_t} x_0 + \sqrt{1 - \bar\alpha_t} \epsilon$ with $\bar\alpha_t = \prod_{i \le t} (1 - \beta_i)$ at the times
    t = 0 to ``steps`` - 1; -1 stands for clean data.

    ``variance="learned"`` is the hybrid objective of Nichol and Dhariwal (arXiv:2102.09672, equations 15 and 16), as ADM and DiT train:
    the model gives as many channels again, v, and the variance of a step is $\exp(v' \log \beta_t + (1 - v') \log \tilde\beta_t)$ with
    $v' = (v + 1) / 2$. To the squared error comes 0.001 of the variational bound, of which only the variance gets a gradient:
    ``steps`` times the divergence at the drawn time in bits per number, and at t = 0 the likelihood of the data's ``levels``.

    Args:
        steps: Number of times T.
        low: First beta.
        high: Last beta.
        variance: Of a sampler's step: ``small`` (the posterior's), ``large`` (beta) or ``learned``.
        levels: Distinct values of the data between -1 and 1, for the bound at t = 0.

    Raises:
        ValueError: Another ``variance``, or betas outside of (0, 1).

    Examples:
        >>> process = Diffusion()
        >>> alpha, sigma = process.scales(torch.tensor([-1, 999]))
        >>> alpha.tolist()[0], round(float(sigma[1]), 4)
        (1.0, 1.0)
    """

    def __init__(
        self,
        steps: int = 1000,
        *,
        low: float = 1e-4,
        high: float = 0.02,
        variance: str = "small",
        levels: int = 256,
    ) -> None:
        if variance not in ("small", "large", "learned"):
            raise ValueError(f"Diffusion: variance {variance!r}; expected 'small', 'large' or 'learned'.")
        if not 0 < low <= high < 1:
            raise ValueError(f"Diffusion: betas from {low} to {high}; expected 0 < low <= high < 1.")
        self.steps, self.variance, self.levels = steps, variance, levels
        self.start, self.end = steps - 1, -1
        kept = torch.cumprod(1 - torch.linspace(low, high, steps, dtype=torch.float64), 0)
        self.kept = torch.cat(
            (torch.ones(1, dtype=torch.float64), kept)
        )  # the share of the data's variance, from t = -1

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.kept.to(t.device)[t.long() + 1]
        return kept.sqrt(), (1 - kept).sqrt()

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.randint(self.steps, (count,), generator=generator)

    def times(self, steps: int) -> Tensor:
        if not 0 < steps <= self.steps:
            raise ValueError(f"Diffusion: {steps} sampling steps; expected 1 to {self.steps}.")
        return torch.cat((torch.linspace(self.steps - 1, 0, steps).round().long(), torch.tensor([-1])))

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise

    def read(self, x: Tensor, output: Tensor, t: Tensor) -> Prediction:
        noise, *rest = output.split(x.shape[1], 1)
        alpha, sigma = self.broadcast(t, x)
        return Prediction((x - sigma * noise) / alpha, noise, rest[0] if rest else None)

    def score(self, output: Tensor, x: Tensor, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if self.variance != "learned":
            return super().score(output, x, x0, noise, t)
        self._expect(output, x, 2)
        mean, spread = output.chunk(2, 1)
        simple = super().score(mean, x, x0, noise, t)
        bound = self.bound(torch.cat((mean.detach(), spread), 1), x, x0, t)
        return simple + 0.001 * self.steps * bound.mean()

    def step_variance(self, predicted: Prediction, small: Tensor, added: Tensor) -> Tensor:
        """Variance of a step from t to s, from ``posterior``'s two bounds."""
        if self.variance != "learned":
            return small if self.variance == "small" else added
        if predicted.range is None:
            raise ValueError(
                "Diffusion: variance='learned', but the model gives no variance. Give it twice the channels."
            )
        share = (predicted.range + 1) / 2
        return (share * added.log() + (1 - share) * small.clamp_min(1e-20).log()).exp()

    def bound(self, output: Tensor, x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """The variational bound's term at each item's time t, in bits per number."""
        predicted = self.read(x, output, t)
        mean, small, added = self.posterior(x, x0, t, t - 1)
        guess, _, _ = self.posterior(x, predicted.x0, t, t - 1)
        first = _like(t == 0, x).bool()
        second = torch.ones_like(t)  # at t = 0 the posterior has no variance: that of t = 1 takes its place
        low = torch.where(first, self.posterior(x, x0, second, second - 1)[1], small)
        log_true, log_model = low.log(), self.step_variance(predicted, low, added).log()
        divergence = 0.5 * (
            log_model - log_true - 1 + (log_true - log_model).exp() + (mean - guess).square() / log_model.exp()
        )
        likelihood = -_log_likelihood(x0, guess, (0.5 * log_model).exp(), self.levels)
        bits = torch.where(first, likelihood, divergence) / math.log(2)
        return bits.flatten(1).mean(1)


def _log_likelihood(x: Tensor, mean: Tensor, deviation: Tensor, levels: int) -> Tensor:
    """Log-probability of values on a grid of ``levels`` from -1 to 1 under a Gaussian that is rounded to it."""
    half = 1 / (levels - 1)
    above = torch.special.ndtr((x + half - mean) / deviation)
    below = torch.special.ndtr((x - half - mean) / deviation)
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp_min(1e-12).log()


class Flow(Process):
    r"""Rectified flow (Liu et al., arXiv:2209.03003): data and noise joined by a straight line; the model predicts the velocity.

    $x_t = (1 - \sigma) x_0 + \sigma \epsilon$ with $\sigma = t / T$, and the velocity is $\epsilon - x_0$: the paper's equation 1 with time
    running from data to noise. Times are drawn uniformly from [0, T).

    Args:
        scale: Largest time T, as the model gets it.

    Examples:
        >>> Flow().times(4).tolist()
        [1000.0, 750.0, 500.0, 250.0, 0.0]
    """

    straight: ClassVar[bool] = True

    def __init__(self, scale: float = 1000.0) -> None:
        if not scale > 0:
            raise ValueError(f"Flow: scale {scale}; expected a number above 0.")
        self.scale = self.start = scale
        self.end = 0.0

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = t / self.scale
        return 1 - sigma, sigma

    def draw(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        return torch.rand(count, generator=generator) * self.scale

    def times(self, steps: int) -> Tensor:
        if steps < 1:
            raise ValueError(f"Flow: {steps} sampling steps; expected at least 1.")
        return torch.linspace(self.scale, 0.0, steps + 1)

    def target(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - x0

    def read(self, x: Tensor, output: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = self.broadcast(t, x)
        return Prediction(x - sigma * output, x + alpha * output)
