"""Rational activations: learnable quotients of polynomials, one for each layer or one shared by all."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.example import Example

CHUNK = 1 << 16  # numbers that a core's second-level cache holds several times
TARGETS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "relu": F.relu,
    "leaky-relu": F.leaky_relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
}


@cache
def fit(
    like: str | Callable[[Tensor], Tensor], degrees: tuple[int, int], bound: float = 3.0
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Coefficients a, b of the unit's least-squares fit to a function on [-bound, bound].

    The denominator has only even powers, with coefficients of at least 0, so that it is at least 1 without the absolute value.
    Functions that are odd or even up to a straight line, as most activations are, lose nothing by that.
    """
    from scipy.optimize import least_squares, lsq_linear

    m, n = degrees
    x = torch.linspace(-bound, bound, 2001, dtype=torch.float64, device="cpu")
    y, x_ = (TARGETS[like] if isinstance(like, str) else like)(x).numpy(), x.numpy()
    top, even = np.vander(x_, m + 1, increasing=True), np.arange(2, n + 1, 2)
    low = x_[:, None] ** even
    bounds = np.r_[np.full(m + 1, -np.inf), np.zeros(len(even))], np.inf
    weight = np.ones_like(y)
    for _ in range(20):  # P - y (Q - 1) = y is linear; dividing by the last Q makes its error that of P / Q
        rows = np.concatenate([top, -y[:, None] * low], 1) / weight[:, None]
        found = lsq_linear(rows, y / weight, bounds=bounds).x
        weight = 1 + low @ found[m + 1 :]
    error = lambda c: top @ c[: m + 1] / (1 + low @ c[m + 1 :]) - y  # noqa: E731
    found = least_squares(error, found, bounds=bounds, x_scale="jac").x
    b = np.zeros(n)
    b[even - 1] = found[m + 1 :]
    return found[: m + 1], b


class Rational(nn.Module):
    """A learned activation: a polynomial divided by one without roots, initialised to a well-known function.

    Paper: Delfosse et al., "Adaptive Rational Activations to Boost Deep Reinforcement Learning", arXiv:2102.09407.

    Equation: ``R(x) = sum_{j=0..m} a_j x^j / (1 + |sum_{k=1..n} b_k x^k|)``. The denominator is at least 1, so that there
    is no pole. Degrees and initial function are the defaults of the authors' library, whose version B this is; the initial
    coefficients are computed (see ``fit``) where the library has a table. Outside the range of the fit R grows like a power
    of x, usually the first at the defaults (``a_m x / b_n``); float32 overflows where x^m does.

    For m > n a residual connection around a unit gives a rational unit of the same degrees: ``residual`` builds it. One unit
    for all layers is the paper's joint (recurrent) rational: ``joint``.

    Cost: m + n multiply-adds and a division for each number, about twice that in the backward pass.

    Args:
        like: Function to which the initial coefficients are fitted on [-3, 3]: ``identity``, ``relu``, ``leaky-relu``,
            ``tanh``, ``sigmoid``, ``silu``, ``gelu``, or a function of a float64 tensor.
        degrees: Degrees (m, n) of numerator and denominator.

    Shapes: any shape, to the same, in the type of the input. bfloat16 and float16 are computed in float32.

    Raises:
        ValueError: Unknown function, or a degree below 1.
        TypeError: An input that is not real floating point.

    Examples:
        >>> import torch
        >>> from interlayer.models import MLP
        >>> x = torch.linspace(-3, 3, 7)
        >>> (Rational(like="tanh")(x) - x.tanh()).abs().max().item() < 1e-4
        True
        >>> net = MLP(64, 10, depth=3, activation=joint(like="silu"))
        >>> net.blocks[0][1] is net.blocks[2][1]
        True
    """

    def __init__(
        self, *, like: str | Callable[[Tensor], Tensor] = "leaky-relu", degrees: tuple[int, int] = (5, 4)
    ) -> None:
        super().__init__()
        degrees = (degrees[0], degrees[1])
        if isinstance(like, str) and like not in TARGETS:
            raise ValueError(f"Rational: like={like!r} is not one of {list(TARGETS)}; give one of them or a function.")
        if min(degrees) < 1:
            raise ValueError(f"Rational: degrees {degrees}; expected two degrees of at least 1.")
        self.like, self.degrees = like, degrees
        a, b = fit(like, degrees)
        self.numerator = nn.Parameter(torch.tensor(a, dtype=torch.get_default_dtype()))
        self.denominator = nn.Parameter(torch.tensor(b, dtype=torch.get_default_dtype()))

    def forward(self, x: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
        """Apply R to every number."""
        if not x.is_floating_point():
            raise TypeError(f"Rational: input of {x.dtype} and shape {tuple(x.shape)}; expected floating point.")
        wide = torch.promote_types(x.dtype, self.numerator.dtype)
        x_, a, b = x.to(wide), self.numerator.to(wide), self.denominator.to(wide)
        fast = x.device.type == "cpu" and not torch.compiler.is_compiling()  # a compiler fuses the equation itself
        return (Quotient.apply(x_, a, b) if fast else rational_naive(x_, a, b)).to(x.dtype)

    @torch.no_grad()
    def residual(self) -> Rational:
        """The unit that computes ``x + R(x)``: ``a_1`` grows by 1 and ``a_{k+1}`` by ``b_k`` (or ``-b_k``).

        Raises:
            ValueError: The numerator's degree is not above the denominator's, or the polynomial under the absolute value
                changes sign, so that x times it is not a polynomial.
        """
        m, n = self.degrees
        if m <= n:
            raise ValueError(f"Rational: degrees {self.degrees} are not closed under a residual; expected m > n.")
        b = np.r_[0.0, self.denominator.double().cpu().numpy()]
        used = np.trim_zeros(b, "b")
        turns = np.roots(np.polynomial.polynomial.polyder(used)[::-1]).real if len(used) > 2 else np.zeros(1)
        seen = np.polynomial.polynomial.polyval(np.r_[turns, 100.0, -100.0] * (1 + np.abs(turns).max()), b)
        seen = np.r_[seen, np.polynomial.polynomial.polyval(turns, b)]
        if seen.min() < 0 < seen.max():
            raise ValueError(
                "Rational: the polynomial under the absolute value changes sign, so that x + R(x) is not of this form."
            )
        new = Rational(like=self.like, degrees=self.degrees).to(self.numerator)
        new.denominator.copy_(self.denominator)
        new.numerator.copy_(self.numerator)
        new.numerator[1] += 1
        new.numerator[2 : n + 2] += self.denominator * (1 if seen.max() > 0 else -1)
        return new

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        return f"like={self.like!r}, degrees={self.degrees}"


def rational_naive(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The equation, by Horner's rule."""
    top, low = a[-1] * x, b[-1] * x
    for each in a[1:-1].flip(0).unbind():
        top = (top + each) * x
    for each in b[:-1].flip(0).unbind():
        low = (low + each) * x
    return (top + a[0]) / (1 + low.abs())


def gradients_naive(x: Tensor, a: Tensor, b: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``rational_naive`` for x, a and b, term by term."""
    j, k = torch.arange(len(a), device=x.device), torch.arange(1, len(b) + 1, device=x.device)
    over, under = x.unsqueeze(-1) ** j, x.unsqueeze(-1) ** k
    low = under @ b
    g, ratio = dy / (1 + low.abs()), over @ a / (1 + low.abs()) * low.sign()
    dx = g * (over[..., :-1] @ (a * j)[1:] - ratio * ((x.unsqueeze(-1) ** (k - 1)) @ (b * k)))
    da, db = g.unsqueeze(-1) * over, -(g * ratio).unsqueeze(-1) * under
    return dx, da.reshape(-1, len(a)).sum(0), db.reshape(-1, len(b)).sum(0)


class Quotient(torch.autograd.Function):
    """``rational_naive`` on a CPU in eager mode: in place, over pieces that are still in the cache; only ``x`` is kept.

    With A the polynomial under the absolute value and ``g = dy / Q``: ``dx = g (P' - R sgn(A) A')``,
    ``da_j = sum g x^j`` and ``db_k = -sum g R sgn(A) x^k``.
    """

    @staticmethod
    def forward(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        flat = x.reshape(-1)
        out = torch.empty_like(flat)
        for piece, y in zip(flat.split(CHUNK), out.split(CHUNK), strict=True):
            torch.mul(piece, a[-1], out=y)
            for each in a[1:-1].flip(0).unbind():
                y.add_(each).mul_(piece)
            low = piece * b[-1]
            for each in b[:-1].flip(0).unbind():
                low.add_(each).mul_(piece)
            y.add_(a[0]).div_(low.abs_().add_(1))
        return out.view(x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, da: Tensor, db: Tensor) -> Tensor:
        return torch.func.jvp(rational_naive, ctx.saved_tensors, (dx, da, db))[1]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, a, b = ctx.saved_tensors
        if torch.is_grad_enabled():  # for second derivatives: the same with differentiable operations
            return gradients_naive(x, a, b, dy)
        m, n = len(a) - 1, len(b)
        top = max(m, n) + 1
        maps = x.new_zeros(4, top)  # powers of x to P, A, P', A'
        maps[0, : m + 1], maps[1, 1 : n + 1] = a, b
        maps[2:, :-1] = maps[:2, 1:] * torch.arange(1, top, device=x.device)
        flat, dy_ = x.reshape(-1), dy.reshape(-1)
        dx, da, db = torch.empty_like(flat), torch.zeros_like(a), torch.zeros_like(b)
        size = min(CHUNK, max(1, len(flat)))
        powers, values = x.new_ones(top, size), x.new_empty(4, size)
        for piece, d, out in zip(flat.split(size), dy_.split(size), dx.split(size), strict=True):
            if len(piece) < size:
                powers, values = powers[:, : len(piece)], values[:, : len(piece)]
            powers[1].copy_(piece)
            for k in range(2, top):
                torch.mul(powers[(k + 1) // 2], powers[k // 2], out=powers[k])
            p, low, dp, dlow = torch.mm(maps, powers, out=values)
            sign = low.sign()
            low.abs_().add_(1)
            p.div_(low).mul_(sign)
            torch.sub(dp, dlow.mul_(p), out=out)
            torch.div(d, low, out=low)
            out.mul_(low)
            da += powers[: m + 1] @ low
            db -= powers[1 : n + 1] @ p.mul_(low)
        return dx.view(x.shape), da, db

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, int | None]:
        """Elements are independent; with batched coefficients, use the equation."""
        if in_dims[1] is None and in_dims[2] is None:
            return Quotient.apply(x, a, b), in_dims[0]
        return torch.vmap(rational_naive, in_dims)(x, a, b), 0


def joint(**options: Any) -> Callable[..., Rational]:
    """A factory for the slot, or for ``replace(model, at=..., with_=...)``, that puts the same unit everywhere.

    A deep copy of the model still has a single unit. Use each joint factory for one model only.
    """
    unit = Rational(**options)
    return lambda *_: unit


def figure(model: nn.Module, bound: float = 5.0) -> Any:
    """Draw every rational of a model now (line) and at initialisation (dots), with the range of the fit shaded."""
    from matplotlib.figure import Figure

    units = {name: m for name, m in model.named_modules() if isinstance(m, Rational)}
    if not units:
        raise ValueError(f"rational-activation: {type(model).__name__} has no rational unit to draw.")
    drawn = Figure(figsize=(2.6 * len(units), 2.6), layout="constrained")
    x = torch.linspace(-bound, bound, 401, dtype=torch.float64)
    for axes, (name, unit) in zip(drawn.subplots(1, len(units), squeeze=False)[0], units.items(), strict=True):
        now = [t.detach().cpu().double() for t in (unit.numerator, unit.denominator)]
        initial = [torch.tensor(c) for c in fit(unit.like, unit.degrees)]
        axes.axvspan(-3, 3, color="0.95")
        axes.plot(x, rational_naive(x, *now), label="learned")
        axes.plot(x, rational_naive(x, *initial), ":", color="0.4", label="initial")
        axes.set_title(name or "unit", fontsize="small")
    axes.legend(fontsize="small")
    return drawn


EXAMPLE = Example(
    make=Rational,
    inputs=lambda: (torch.randn(3, 5, 12),),
    odd=lambda: (torch.randn(2, 7, 1, 13),),
    axis=1,
    modes={"a residual": lambda: Rational(like="tanh", degrees=(4, 2)).residual()},
    causal=True,
    wrong=lambda: (torch.ones(2, 3, dtype=torch.long),),
)
