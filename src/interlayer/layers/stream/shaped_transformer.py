"""The shaped Transformer: attention near the identity, nearly linear ReLU, weighted residuals, and the SDE of its covariance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.example import Backbone, Example
from interlayer.core.mixer import Attention, attend
from interlayer.core.parts import FeedForward, Linear, plain_linear
from interlayer.core.stream import State, Stream


class ShapedTransformer(Stream):
    """Weight residual and branch so that the squares sum to one, and the covariance of deep, wide stacks has a limit.

    Paper: Noci et al., "The Shaped Transformer: Attention Models in the Infinite Depth-and-Width Limit",
    arXiv:2306.17759.

    Equation: ``x_{l+1} = lambda x_l + gamma f_l(x_l)`` with ``lambda^2 + gamma^2 = 1``, no norm, ``ShapedAttention``
    in the slot ``mixer`` and ``ShapedReLU`` in the slot ``activation``. With weights N(0, 1 / fan-in) the covariance of the
    tokens at depth d and width n tends to a stochastic differential equation in d / n, which ``CovarianceSDE`` simulates.

    Args:
        depth: Number of blocks.
        branches: Sublayers in a block.
        gamma: Weight of every branch. The default is this project's.

    Shapes: any; the state keeps the shape of the input.

    Raises:
        ValueError: ``gamma`` outside 0 to 1.

    Examples:
        >>> from functools import partial
        >>> from interlayer.models import Transformer
        >>> relu = partial(ShapedReLU, 128)
        >>> model = Transformer(depth=4, stream="shaped-transformer", mixer=ShapedAttention, activation=relu, hidden=128)
        >>> model(torch.zeros(1, 7, dtype=torch.long)).shape
        torch.Size([1, 7, 256])
    """

    def __init__(self, depth: int, *, branches: int = 1, gamma: float = math.sqrt(1 / 8)) -> None:
        super().__init__(depth, branches=branches)
        if not 0 < gamma < 1:
            raise ValueError(f"ShapedTransformer: gamma {gamma} must lie between 0 and 1.")
        self.gamma, self.keep = gamma, math.sqrt(1 - gamma**2)

    def write(self, state: State, layer: int, branch: Tensor) -> State:
        state.x = self.keep * state.x + self.gamma * branch
        return state


class ShapedAttention(Attention):
    """Attention whose matrix is centred at the identity and whose temperature grows with the width; for the slot ``mixer``.

    Equation: ``A = I + softmax(Q K' / (tau_0 sqrt(n K))) - 1 1' / m`` with n features, K of them in a head, and m visible
    tokens; the output is ``A V`` instead of ``softmax(...) V``. Softmax at zero logits is the mean over the
    visible tokens, so that A is near the identity at initialisation; in a causal model the mean is over the tokens so far.

    Args:
        width: Features n.
        heads: Query heads.
        temperature: tau_0.
        kv_heads: Key-value heads, if fewer.
        causal: Whether a token sees only itself and earlier ones.
        values: Whether this sublayer projects values of its own.
        linear: Called with ``inputs=, outputs=``.

    Shapes: [B, S, n] to [B, S, n].

    Raises:
        ValueError: ``temperature`` that is not above 0.
    """

    offers: ClassVar[frozenset[str]] = Attention.offers - {"bias"}

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        temperature: float = 1.0,
        kv_heads: int | None = None,
        causal: bool = False,
        values: bool = True,
        linear: Linear = plain_linear,
    ) -> None:
        super().__init__(width, heads, kv_heads=kv_heads, causal=causal, values=values, linear=linear)
        if temperature <= 0:
            raise ValueError(f"ShapedAttention: temperature {temperature} must be above 0.")
        self.scale = 1 / (temperature * math.sqrt(width * self.head_width))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        new, all_ = q.shape[-2], k.shape[-2]
        y = attend(q, k, v, causal=self.causal, mask=mask, scale=self.scale)
        seen = v.new_ones(1, 1, all_, 1) if mask is None else mask[:, None, :, None].to(v.dtype)
        if self.causal:
            mean = ((v * seen).cumsum(-2) / seen.cumsum(-2).clamp_min(1))[..., -new:, :]
        else:
            mean = (v * seen).sum(-2, keepdim=True) / seen.sum(-2, keepdim=True)
        centre = v[..., all_ - new :, :] - mean
        return y + centre.repeat_interleave(self.heads // self.kv_heads, 1)


class ShapedReLU(nn.Module):
    """ReLU whose two slopes tend to one with the width, scaled to preserve the mean square; for the slot ``activation``.

    Equation: ``(s_+ max(x, 0) + s_- min(x, 0)) / sqrt((s_+^2 + s_-^2) / 2)`` with ``s_+- = 1 + c_+- / sqrt(n)``.

    Args:
        width: n, the features of the layer's input.
        plus: c_+.
        minus: c_-.

    Shapes: any.

    Raises:
        ValueError: ``width`` below 1.
    """

    def __init__(self, width: int, *, plus: float = 0.0, minus: float = -1.0) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"ShapedReLU: width {width} must be at least 1.")
        above, below = 1 + plus / math.sqrt(width), 1 + minus / math.sqrt(width)
        norm = math.sqrt((above**2 + below**2) / 2)
        self.even, self.odd = (above - below) / (2 * norm), (above + below) / (2 * norm)

    def forward(self, x: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Apply it to each element."""
        return torch.add(self.odd * x, x.abs(), alpha=self.even)


@dataclass(frozen=True)
class CovarianceSDE:
    """Simulator of the neural covariance SDE of the shaped Transformer, ``dV = b(V) dt + Sigma(V)^(1/2) dB``, t = depth / width.

    V [m, m] is the tokens' covariance ``X X' / n``; one block is an attention with one head and no output map (or the
    identity), and an MLP of two maps with n hidden features. With ``C = I - 1 1' / m`` and correlations rho:

    * attention drift ``gamma^2 / tau_0^2 (V tr(C V C V) / m^2 + (S V + V S') / 2)``,
      ``S_ij = V_ii ((C V C)_jj - tr(C V C) / m) / m``;
    * MLP drift ``gamma^2 (c_+ - c_-)^2 / (2 pi) (sqrt(1 - rho^2) - rho arccos rho) sqrt(V_ii V_jj)``;
    * noise of the maps, with covariance ``(gamma^2 (2 - gamma^2) + 2 gamma^2) (V_ik V_jl + V_il V_jk)``, and of the
      logits, ``gamma^2 / tau_0 (h V + V h')`` with ``cov(h_ij, h_kl) = V_ik (C V C)_jl / m^2``.

    The coefficients were derived by expanding one block to order 1 / n; they could not be compared with the paper's
    theorems. Both noises are drawn through a Cholesky factor of V, so that no m^2 x m^2 matrix is formed: O(m^3) for each step.

    Args:
        gamma: Weight of the branches.
        temperature: tau_0.
        plus: c_+ of the ReLU.
        minus: c_-.
    """

    gamma: float = math.sqrt(1 / 8)
    temperature: float = 1.0
    plus: float = 0.0
    minus: float = -1.0

    def drift(self, v_BMM: Tensor) -> Tensor:
        """``b(V)``."""
        m = v_BMM.shape[-1]
        centred, diagonal = centre(v_BMM), v_BMM.diagonal(dim1=-2, dim2=-1)
        spread = centred.diagonal(dim1=-2, dim2=-1)
        second = diagonal.unsqueeze(-1) * (spread - spread.mean(-1, keepdim=True)).unsqueeze(-2) / m
        turned = second @ v_BMM
        trace = (centred @ v_BMM).diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        attention = v_BMM * trace / m**2 + (turned + turned.mT) / 2
        size = (diagonal.unsqueeze(-1) * diagonal.unsqueeze(-2)).sqrt()
        rho = (v_BMM / size).clamp(-1, 1)
        relu = (self.plus - self.minus) ** 2 / (2 * math.pi) * ((1 - rho**2).sqrt() - rho * rho.arccos()) * size
        return self.gamma**2 * (attention / self.temperature**2 + relu)

    def noise(self, root_BMM: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """N with ``Sigma(V)^(1/2) dB = L N L'`` over a unit of time, for a root ``V = L L'``."""
        shape, m = root_BMM.shape, root_BMM.shape[-1]
        first, second = torch.randn(2, *shape, dtype=root_BMM.dtype, device=root_BMM.device, generator=generator)
        g2 = self.gamma**2
        maps = math.sqrt((g2 * (2 - g2) + 2 * g2) / 2) * (first + first.mT)
        logits = g2 / (self.temperature * m) * second @ (root_BMM - root_BMM.mean(-2, keepdim=True)).mT @ root_BMM
        return maps + logits + logits.mT

    def simulate(
        self,
        start: Float[Tensor, "m m"],
        time: float,
        *,
        paths: int,
        steps: int = 200,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "paths m m"]:
        """Covariances at ``time`` on independent paths, by Euler and Maruyama with ``V' = L (I + E) L'`` for increments E.

        ``I + E`` is taken as the square of ``I + E / 2 - E^2 / 8``, which is equal up to third order and keeps V positive.
        The attention's drift grows with the cube of V, so that solutions are local: a path that explodes is nan.

        Args:
            start: Covariance at time 0, positive definite.
            time: Depth divided by width.
            paths: Number of paths.
            steps: Number of equal steps.
            generator: Source of the noise.

        Raises:
            ValueError: ``start`` that is not a square matrix.

        Examples:
            >>> start = 0.8 * torch.eye(3, dtype=torch.float64) + 0.2
            >>> CovarianceSDE().simulate(start, 0.1, paths=5).shape
            torch.Size([5, 3, 3])
        """
        if start.ndim != 2 or start.shape[0] != start.shape[1]:
            raise ValueError(f"CovarianceSDE: start {tuple(start.shape)}; expected a square matrix [tokens, tokens].")
        v, step = start.expand(paths, -1, -1), time / steps
        eye = torch.eye(len(start), dtype=start.dtype, device=start.device)
        for _ in range(steps):
            root, failed = torch.linalg.cholesky_ex(v)
            root = torch.where((failed > 0)[:, None, None], math.nan, root)
            half = torch.linalg.solve_triangular(root, self.drift(v), upper=False)
            drift = torch.linalg.solve_triangular(root, half.mT, upper=False)
            e = step * drift + math.sqrt(step) * self.noise(root, generator)
            half = root @ (eye + e / 2 - e @ e / 8)
            v = half @ half.mT
        return v


def centre(v_BMM: Tensor) -> Tensor:
    """``C V C``: rows and columns without their means."""
    v_BMM = v_BMM - v_BMM.mean(-1, keepdim=True)
    return v_BMM - v_BMM.mean(-2, keepdim=True)


def correlations(v_BMM: Float[Tensor, "*B m m"]) -> Float[Tensor, "*B m m"]:
    """Correlations of a covariance."""
    scale = v_BMM.diagonal(dim1=-2, dim2=-1).rsqrt()
    return v_BMM * scale.unsqueeze(-1) * scale.unsqueeze(-2)


def _shaped_backbone() -> Backbone:
    """The example's backbone with all three parts shaped."""
    net = Backbone(ShapedTransformer)
    for layer in (0, 2):
        net.sublayers[layer] = ShapedAttention(8, 2, causal=True)
        net.sublayers[layer + 1] = FeedForward(8, hidden=8, activation=lambda: ShapedReLU(8))
    return net


EXAMPLE = Example(
    make=_shaped_backbone,
    inputs=lambda: (torch.randn(2, 6, 8),),
    odd=lambda: (torch.randn(3, 7, 8),),
    axis=1,
    causal=True,
)
