"""Linear assignment, solved by SciPy, and optimal transport between two sets of points, by POT (https://pythonot.github.io)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from interlayer.core.extras import need

ITERATIONS = 10_000  # of Sinkhorn; at the usual strengths it needs hundreds
TINY = 500.0  # exp(-TINY) is far above the smallest float64, exp(-745)
LEFT = 1e-2  # largest share of a mass that may be left misplaced


def assign(similarity: Float[Tensor, "n n"]) -> Int[Tensor, " n"]:
    """The permutation p that maximises the sum of ``similarity[i, p[i]]``.

    A constant added to a row or a column does not change p but makes the solver search longer, so both are subtracted first.

    Examples:
        >>> assign(torch.tensor([[0.0, 2.0], [1.0, 2.0]]))
        tensor([1, 0])
    """
    cost = -similarity.detach().double().cpu()
    cost = cost - cost.amin(1, keepdim=True)
    cost = cost - cost.amin(0)
    return torch.from_numpy(linear_sum_assignment(cost.numpy())[1])


def transport(cost: Float[Tensor, "n m"], *, reg: float = 0.0) -> Float[Tensor, "n m"]:
    r"""The cheapest way to move a uniform mass on n points onto a uniform mass on m points.

    .. math:: \min_T \langle T, C \rangle - \varepsilon H(T), \qquad T 1 = 1/n, \quad T^\top 1 = 1/m, \quad T \ge 0

    ``T[i, j]`` is how much of point i goes to point j. Without entropy, T has at most n + m - 1 nonzero entries, and with
    n = m it is a permutation divided by n.

    The exact solver is ``assign`` where n = m, else POT's network simplex; the time of both grows between n^2 and n^3 here.
    Sinkhorn takes n m multiply-adds twice in each iteration; the smaller ``reg``, the more iterations.

    Args:
        cost: C, finite and not negative.
        reg: Weight of the entropy, as a share of the mean cost, so that the unit of the costs plays no role. 0 solves exactly.

    Returns:
        T, in float64 on the CPU.

    Raises:
        ValueError: Costs that are not a matrix, not finite or negative; ``reg`` below zero; or no convergence.
        ImportError: POT is not installed.

    Examples:
        >>> transport(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]], dtype=torch.float64)
    """
    ot = need("ot", "merge", "transport")
    c = _checked(cost, reg)
    n, m = c.shape
    if reg == 0 and n == m:
        return torch.eye(n, dtype=c.dtype)[assign(-c)] / n
    a, b = torch.full((n,), 1 / n, dtype=c.dtype).numpy(), torch.full((m,), 1 / m, dtype=c.dtype).numpy()
    if reg == 0:
        plan, log = ot.emd(a, b, c.numpy(), numItermax=10_000_000, log=True)
        if log["warning"]:
            raise ValueError(
                f"transport: the exact solver gave up on {n} x {m} costs: {log['warning']}. Set reg above 0."
            )
        return torch.from_numpy(plan)
    c = c / c.mean().clamp_min(1e-300)
    method = (
        "sinkhorn" if float(c.max()) / reg < TINY else "sinkhorn_log"
    )  # products of exponentials, or their logarithms
    plan = torch.from_numpy(ot.sinkhorn(a, b, c.numpy(), reg, method=method, numItermax=ITERATIONS, warn=False))
    left = max(float((plan.sum(1) * n - 1).abs().max()), float((plan.sum(0) * m - 1).abs().max()))
    if not left < LEFT:  # NaN is no convergence either
        raise ValueError(
            f"transport: after {ITERATIONS} iterations of Sinkhorn {left:.0%} of a mass is misplaced; expected below "
            f"{LEFT:.0%}. Raise reg, {reg:g} now, or solve exactly with reg=0."
        )
    return plan


def transport_naive(cost: Float[Tensor, "n m"], *, reg: float = 0.0) -> Float[Tensor, "n m"]:
    """The same from the definition: the linear programme over all n m variables, or Sinkhorn's scalings, entry by entry."""
    from scipy.optimize import linprog

    c = _checked(cost, reg)
    n, m = c.shape
    if reg == 0:
        sums = [[float(k // m == i) for k in range(n * m)] for i in range(n)]
        sums += [[float(k % m == j) for k in range(n * m)] for j in range(m)]
        found = linprog(c.flatten().numpy(), A_eq=sums, b_eq=[1 / n] * n + [1 / m] * m)
        return torch.from_numpy(found.x).view(n, m)
    kernel = (-c / (reg * c.mean())).exp()
    u, v = [1.0] * n, [1.0] * m
    for _ in range(ITERATIONS):
        v = [1 / m / sum(float(kernel[i, j]) * u[i] for i in range(n)) for j in range(m)]
        u = [1 / n / sum(float(kernel[i, j]) * v[j] for j in range(m)) for i in range(n)]
        moved = [sum(u[i] * float(kernel[i, j]) * v[j] for i in range(n)) for j in range(m)]
        if max(abs(s - 1 / m) for s in moved) < 1e-12:
            break
    return torch.tensor([[u[i] * float(kernel[i, j]) * v[j] for j in range(m)] for i in range(n)], dtype=c.dtype)


def _checked(cost: Tensor, reg: float) -> Tensor:
    if cost.ndim != 2 or not cost.numel():
        raise ValueError(f"transport: costs of shape {tuple(cost.shape)}; expected a matrix [n, m].")
    c = cost.detach().double().cpu()
    if not bool(c.isfinite().all()) or float(c.min()) < 0:
        raise ValueError(
            "transport: costs that are negative or not finite; expected distances, such as torch.cdist gives."
        )
    if not 0 <= reg < float("inf"):
        raise ValueError(f"transport: reg was {reg}; expected 0 (exact) or more.")
    return c
