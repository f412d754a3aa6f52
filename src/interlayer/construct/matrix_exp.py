"""A three-layer network with a matrix-exponential activation, solved for two equations in closed form."""

from __future__ import annotations

import cmath
import math
from dataclasses import dataclass

import scipy.linalg
import torch
from jaxtyping import Complex, Num
from torch import Tensor, nn

from interlayer.core.example import Example
from interlayer.core.kinds import Construction

# What `alpha=None` tries: exp(t) for t on two circles, so that no candidate is near 1, where the equations become singular.
ALPHAS = tuple(cmath.exp(r * cmath.exp(0.25j * math.pi * k)) for r in (0.7, 1.5) for k in range(8))

Matrix = Num[Tensor, "d d"]


class MatrixExpNet(nn.Module):
    """``f(X) = W3 exp(W2 exp(W1 X))``, where exp is the exponential of a matrix and not of its elements.

    Args:
        w1: First weight.
        w2: Second weight.
        w3: Third weight.

    Shapes: [..., d, d] to [..., d, d], complex128.

    Raises:
        ValueError: An input of another size.
    """

    def __init__(self, w1: Tensor, w2: Tensor, w3: Tensor) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Parameter(w1), nn.Parameter(w2), nn.Parameter(w3)

    def forward(self, x: Num[Tensor, "*batch d d"]) -> Complex[Tensor, "*batch d d"]:
        """Apply the three layers."""
        if x.shape[-2:] != self.w1.shape:
            raise ValueError(f"MatrixExpNet: input {tuple(x.shape)}; expected [..., {len(self.w1)}, {len(self.w1)}].")
        inner = torch.linalg.matrix_exp(self.w1 @ x.to(self.w1.dtype))
        return self.w3 @ torch.linalg.matrix_exp(self.w2 @ inner)


@dataclass(frozen=True)
class Conditioning:
    """How hard a problem is, and how well its network meets it.

    Attributes:
        inputs: Condition number of X1 - X2 (2-norm).
        targets: The larger condition number of Y1 and Y2.
        inner: Condition number of exp(W1 X2), which the second weight inverts.
        logarithm: ``|exp(L) - Y1^-1 Y2| / |Y1^-1 Y2|`` of the computed logarithm L (Frobenius norms).
        error: The larger ``|f(Xi) - Yi| / |Yi|`` (Frobenius norms).
        alpha: The scalar by which the two inner layers differ.
    """

    inputs: float
    targets: float
    inner: float
    logarithm: float
    error: float
    alpha: complex


class MatrixExp(Construction):
    r"""Weights, without training, of the network $f(X) = W_3 \exp(W_2 \exp(W_1 X))$ with $f(X_1) = Y_1$ and $f(X_2) = Y_2$.

    From `Analytical Solution of a Three-layer Network with a Matrix Exponential Activation Function
    <https://arxiv.org/abs/2407.02540>`_, for any complex matrices with $X_1 - X_2$, $Y_1$ and $Y_2$ invertible. With a
    scalar $\alpha$ other than 0 and 1,

    $$W_1 = \log(\alpha) (X_1 - X_2)^{-1}, \qquad
      W_2 = \frac{1}{1 - \alpha} \log(Y_1^{-1} Y_2) \exp(W_1 X_2)^{-1}, \qquad
      W_3 = Y_2 \exp(-W_2 \exp(W_1 X_2)).$$

    It works because $W_1 X_1 = W_1 X_2 + \log(\alpha) I$, so $\exp(W_1 X_1) = \alpha \exp(W_1 X_2)$: the two arguments
    of the outer exponential commute. The paper takes $\alpha > 0$; complex ones work as well and are often better
    conditioned. One linear layer $W X$ has $d^2$ unknowns for $2 d^2$ equations and meets both only if
    $Y_1 X_1^{-1} = Y_2 X_2^{-1}$. (With a matrix as its bias, it would also meet both.)

    All is computed in complex128. For Gaussian matrices the relative error is about 1e-15 at d = 2 and 1e-11 at d = 32.
    ``alpha=None`` tries 16 values and keeps the most accurate.

    Args:
        alpha: The scalar $\alpha$. Defaults to the best of ``ALPHAS`` for each problem.
        tolerance: The largest relative error (Frobenius) that ``build`` accepts.

    Shapes: X1, X2, Y1 and Y2 are [d, d], real or complex.

    Raises:
        ValueError: ``alpha`` is 0, 1 or not finite; the matrices differ in shape, are not square or not finite; X1 - X2, Y1
            or Y2 is singular, in which case the inverse or the matrix logarithm doesn't exist; an exponential overflows; or
            the network misses its equations by more than ``tolerance``.

    Examples:
        >>> import torch
        >>> x1, x2, y1, y2 = torch.randn(4, 3, 3, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
        >>> construction = MatrixExp()
        >>> model = construction.build(x1, x2, y1, y2)
        >>> bool((model(x1) - y1).abs().max() < 1e-10), bool((model(x2) - y2).abs().max() < 1e-10)
        (True, True)
        >>> construction.conditioning(x1, x2, y1, y2).error < 1e-10
        True
    """

    slug = "matrix-exp"

    def __init__(self, *, alpha: complex | None = None, tolerance: float = 1e-6) -> None:
        if alpha is not None and (alpha in (0, 1) or not cmath.isfinite(alpha)):
            raise ValueError(f"MatrixExp: alpha={alpha}; expected a finite number other than 0 and 1.")
        self.alpha, self.tolerance = alpha, tolerance

    def build(self, x1: Matrix, x2: Matrix, y1: Matrix, y2: Matrix) -> MatrixExpNet:
        """The network with ``f(x1) = y1`` and ``f(x2) = y2``."""
        model, found = self._solve(x1, x2, y1, y2)
        if not math.isfinite(found.error):
            raise ValueError(
                f"MatrixExp: exp(W1 X) overflows: X1 - X2 has condition number {found.inputs:.1e}. "
                "Choose an alpha closer to 1, or inputs that are farther apart."
            )
        if found.error > self.tolerance:
            raise ValueError(
                f"MatrixExp: relative error {found.error:.1e}; expected at most tolerance={self.tolerance:.1e}. Condition "
                f"numbers: X1 - X2 {found.inputs:.1e}, Y {found.targets:.1e}, exp(W1 X2) {found.inner:.1e}. Raise tolerance, "
                "choose another alpha, or give inputs that are farther apart."
            )
        return model

    def conditioning(self, x1: Matrix, x2: Matrix, y1: Matrix, y2: Matrix) -> Conditioning:
        """Condition numbers and the error that is reached, also where ``build`` would refuse the error."""
        return self._solve(x1, x2, y1, y2)[1]

    def reference(self, x1: Matrix, x2: Matrix, y1: Matrix, y2: Matrix) -> tuple[Tensor, Tensor]:
        """The targets themselves."""
        return y1.to(torch.complex128), y2.to(torch.complex128)

    def _solve(self, *problem: Matrix) -> tuple[MatrixExpNet, Conditioning]:
        x1, x2, y1, y2 = (
            _checked(name, m, problem[0]) for name, m in zip(("X1", "X2", "Y1", "Y2"), problem, strict=True)
        )
        inputs = _condition("X1 - X2", x1 - x2, "the first weight is its inverse")
        targets = max(_condition(n, m, "Y1^-1 Y2 has no matrix logarithm") for n, m in (("Y1", y1), ("Y2", y2)))
        ratio = torch.linalg.solve(y1, y2)
        log = torch.as_tensor(scipy.linalg.logm(ratio.numpy(force=True))).to(ratio)
        off = float((torch.linalg.matrix_exp(log) - ratio).norm() / ratio.norm())
        best: tuple[MatrixExpNet, Conditioning] | None = None
        for alpha in ALPHAS if self.alpha is None else (complex(self.alpha),):
            w1 = cmath.log(alpha) * torch.linalg.inv(x1 - x2)
            inner, outer = torch.linalg.matrix_exp(w1 @ x2), log / (1 - alpha)
            condition = float(torch.linalg.cond(inner)) if inner.isfinite().all() else math.inf
            error, model = math.inf, MatrixExpNet(w1, log, y2)
            if math.isfinite(condition):
                w2 = torch.linalg.solve_ex(inner, outer, left=False).result
                model = MatrixExpNet(w1, w2, y2 @ torch.linalg.matrix_exp(-outer))
                error = relative_error(model, x1, x2, y1, y2)
            found = Conditioning(inputs, targets, condition, off, error, alpha)
            if best is None or error < best[1].error:
                best = model, found
        assert best is not None
        return best


def relative_error(model: nn.Module, x1: Matrix, x2: Matrix, y1: Matrix, y2: Matrix) -> float:
    """The larger ``|f(Xi) - Yi| / |Yi|``; infinite where an output is not finite."""
    with torch.no_grad():
        errors = [float((model(x) - y).norm() / y.norm()) for x, y in ((x1, y1), (x2, y2))]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def _checked(name: str, matrix: Tensor, like: Tensor) -> Tensor:
    square = matrix.ndim == 2 and matrix.shape[0] == matrix.shape[1] > 0
    if not square or matrix.shape != like.shape:
        raise ValueError(
            f"MatrixExp: {name} has shape {tuple(matrix.shape)}; expected four square matrices of one size."
        )
    if not matrix.isfinite().all():
        raise ValueError(f"MatrixExp: {name} has elements that are not finite; expected numbers.")
    return matrix.detach().to(torch.complex128)


def _condition(name: str, matrix: Tensor, why: str) -> float:
    condition = float(torch.linalg.cond(matrix))
    if not condition < 1 / torch.finfo(torch.float64).eps:
        raise ValueError(
            f"MatrixExp: {name} is singular (condition number {condition:.1e}); expected an invertible matrix: {why}."
        )
    return condition


EXAMPLE = Example(
    make=MatrixExp,
    inputs=lambda: tuple(torch.randn(4, 5, 5, dtype=torch.complex128)),
    wrong=lambda: (*torch.randn(3, 5, 5, dtype=torch.complex128), torch.randn(4, 4)),
    outputs=lambda model, x1, x2, y1, y2: (model(x1), model(x2)),
    precision=1e-11,
)
