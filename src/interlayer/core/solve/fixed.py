"""Fixed points: Anderson's and Broyden's methods, with gradients by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import vjp

from interlayer.core import aside
from interlayer.core.solve.common import Explicit, Solved, SolverError

Method = Literal["anderson", "broyden", "iteration"]
MEMORY = 5  # iterates that Anderson's method combines


def fixed_point(
    f: Callable[..., Tensor],
    z: Float[Tensor, "B ..."],
    *inputs: Tensor,
    method: Method = "anderson",
    tolerance: float = 1e-4,
    limit: int = 100,
) -> Solved:
    """Solve ``z = f(z, *inputs)`` for each item of a batch.

    An item whose relative residual ``|f(z) - z| / |f(z)|`` is at most ``tolerance`` stays as it is, so its solution does not depend
    on the rest of its batch. The gradient is that of the implicit function theorem: with the Jacobian J of f at the solution,
    ``u = gradient + J' u`` is solved in the same way, and goes on through one evaluation of f. It reaches ``inputs`` and the
    parameters of ``f`` if it is a module; a function that captures others is refused.

    Cost: one evaluation of f an iteration, and with N numbers an item 5 N (``anderson``) or 2 k N (``broyden``, at iteration k)
    multiply-adds and numbers kept; the backward pass as many, each with a vector-Jacobian product. No evaluation is recorded.

    Args:
        f: A function whose items do not influence each other.
        z: First guess.
        *inputs: Further arguments of f.
        method: ``anderson`` combines the last 5 iterates; ``broyden`` builds up an inverse Jacobian, and also finds points that
            iterating f moves away from; ``iteration`` repeats f.
        tolerance: Largest relative residual of an item, in the backward pass too.
        limit: Most evaluations.

    Raises:
        ValueError: An unknown method, a tolerance or limit that is not positive or too small for the dtype, f of another shape
            than z, or a function that captures tensors with gradients.
        SolverError: The tolerance was not met; says with which residual.

    Examples:
        >>> found = fixed_point(torch.cos, torch.ones(1, 1), tolerance=1e-6)
        >>> round(found.value.item(), 4), found.evaluations < 10
        (0.7391, True)
    """
    if method not in METHODS:
        raise ValueError(f"fixed_point: method {method!r}; expected one of {list(METHODS)}.")
    if not tolerance > 0 or limit < 1:
        raise ValueError(f"fixed_point: tolerance {tolerance} and limit {limit}; expected positive numbers.")
    if tolerance < (least := torch.finfo(z.dtype).eps):
        raise ValueError(
            f"fixed_point: tolerance {tolerance:g} cannot be met in {z.dtype}, whose rounding error is {least:.2g}. Raise it, or "
            "use a wider dtype."
        )
    explicit, options = Explicit(f, inputs, z), {"method": method, "tolerance": tolerance, "limit": limit}
    start = z.detach().to(explicit.exact)
    explicit.closed(start)
    with torch.no_grad():
        value, count, residual = iterate(lambda z: explicit(None, z), start, **options)
    aside.metric("evaluations", torch.tensor(float(count)))
    aside.metric("residual", torch.tensor(residual))
    if explicit.wants():
        value = torch.compiler.disable(_Implicit.apply)(explicit, options, value, *explicit.tensors)
    return Solved(value.to(z.dtype), count, residual)


class _Implicit(torch.autograd.Function):
    """The identity at a fixed point, with the gradient of the implicit function theorem."""

    @staticmethod
    def forward(explicit: Explicit, options: dict[str, Any], value: Tensor, *tensors: Tensor) -> Tensor:
        """The solution, as one that depends on the tensors."""
        return value.view_as(value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keep the solution."""
        ctx.explicit, ctx.options, value, *tensors = inputs
        ctx.save_for_backward(value, *tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Solve for the gradient, and send it through one evaluation."""
        value, *tensors = ctx.saved_tensors
        _, pull = vjp(lambda z, *w: ctx.explicit(w, z), value, *tensors)
        found, _, _ = iterate(lambda u: grad + pull(u)[0], grad, **ctx.options, what="the gradient")
        return None, None, None, *pull(found)[1:]


@torch.compiler.disable
def iterate(
    f: Callable[[Tensor], Tensor], z: Tensor, *, method: Method, tolerance: float, limit: int, what: str = "z"
) -> tuple[Tensor, int, float]:
    """Solve ``z = f(z)`` without gradients: the solution, the number of evaluations and the largest residual."""
    if not z.numel():
        return z, 0, 0.0
    shape, step = z.shape, METHODS[method]()
    flat = z.flatten(1) if z.ndim > 1 else z.unsqueeze(1)
    residual = torch.full_like(flat[:, 0], torch.inf)
    for count in range(1, limit + 1):
        image = f(flat.view(shape))
        if image.shape != shape:
            raise ValueError(f"fixed_point: f gives {tuple(image.shape)} for {tuple(shape)}; expected the same shape.")
        image = image.reshape(flat.shape)
        open_ = residual > tolerance
        gap = (image - flat).norm(dim=1) / image.norm(dim=1).clamp_min(torch.finfo(image.dtype).tiny)
        residual = torch.where(open_, gap, residual)
        worst = float(residual.max())
        if worst <= tolerance:
            return flat.view(shape), count, worst
        if worst != worst:  # noqa: PLR0124
            break
        flat = torch.where((residual > tolerance)[:, None], step(flat, image), flat)
    raise SolverError(
        f"fixed_point: {count} evaluations by {method} left {what} with a relative residual of {worst:.3g}; expected {tolerance:g} in "
        f"{z.dtype}. Raise limit= or tolerance=, or make f contract: with smaller weights, a norm or damping. Under "
        "autocast f rounds to about 0.01."
    )


class Iteration:
    """Take ``f(z)``: the plain method, and the reference for the others."""

    def __call__(self, z: Tensor, image: Tensor) -> Tensor:
        """The next point."""
        return image


class Anderson:
    """The combination of the last iterates' images whose residuals, with weights of sum 1, cancel best.

    Anderson, 1965, doi:10.1145/321296.321305. The weights solve ``(G + e I) w = 1`` up to a factor, G the Gram matrix of the residuals; e
    is small beside its diagonal.
    """

    def __init__(self) -> None:
        self.images: list[Tensor] = []
        self.residuals: list[Tensor] = []

    def __call__(self, z: Tensor, image: Tensor) -> Tensor:
        """The next point."""
        self.images, self.residuals = [*self.images[1 - MEMORY :], image], [*self.residuals[1 - MEMORY :], image - z]
        images, residuals = torch.stack(self.images, 1), torch.stack(self.residuals, 1)
        scale = residuals[:, -1:].norm(dim=2, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)
        gram = (residuals / scale) @ (residuals / scale).transpose(1, 2)
        small = 100 * torch.finfo(z.dtype).eps * gram.diagonal(dim1=1, dim2=2).amax(1) + torch.finfo(z.dtype).tiny
        gram = gram + small[:, None, None] * torch.eye(gram.shape[1], dtype=z.dtype, device=z.device)
        weights = torch.linalg.solve(gram, torch.ones_like(gram[:, :, 0]))
        weights = weights / weights.sum(1, keepdim=True)
        return (weights.unsqueeze(1) @ images).squeeze(1)


class Broyden:
    """Newton's step with an inverse Jacobian of ``f(z) - z`` that starts at -1 and gets a rank more each iteration.

    Broyden's first method: ``H += (s - H y) s'H / s'H y`` for the step s and the change y of the residual.
    """

    def __init__(self) -> None:
        self.last: tuple[Tensor, Tensor] | None = None
        self.left: list[Tensor] = []
        self.right: list[Tensor] = []

    def apply(self, x: Tensor, left: list[Tensor], right: list[Tensor]) -> Tensor:
        """``H x``, or with left and right exchanged ``H' x``."""
        if not left:
            return -x
        return (torch.stack(left, 2) @ (torch.stack(right, 1) @ x.unsqueeze(2))).squeeze(2) - x

    def __call__(self, z: Tensor, image: Tensor) -> Tensor:
        """The next point."""
        residual = image - z
        if self.last is not None:
            step, change = z - self.last[0], residual - self.last[1]
            moved, row = self.apply(change, self.left, self.right), self.apply(step, self.right, self.left)
            scale = (step * moved).sum(1, keepdim=True)
            safe = torch.where(scale == 0, torch.ones_like(scale), scale)  # an item that is done does not move
            self.left.append((step - moved) / safe)
            self.right.append(row)
        self.last = z, residual
        return z - self.apply(residual, self.left, self.right)


METHODS: dict[str, Callable[[], Callable[[Tensor, Tensor], Tensor]]] = {
    "anderson": Anderson,
    "broyden": Broyden,
    "iteration": Iteration,
}
