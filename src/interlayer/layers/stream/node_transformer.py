"""A Transformer read as an ODE over depth: parallel sublayers are its right-hand side, and a solver runs the blocks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from interlayer.core.example import Backbone, Example
from interlayer.core.order import Sequential, Step
from interlayer.core.solve import TABLEAUS, Tableau, combine
from interlayer.core.stream import PreNorm, State

Slope = Callable[[Tensor], Tensor]


class NODETransformer(PreNorm):
    """Attention and MLP of a block read the same state and add to it together, as one right-hand side of an ODE.

    Paper: Zhong et al., "A Neural ODE Interpretation of Transformer Layers", arXiv:2212.06011.

    Equation: ``dx/dt = f_l(x) = attention_l(norm(x)) + MLP_l(norm(x))`` for t from l to l + 1. With one Euler step this is
    ``x_{l+1} = x_l + attention_l(norm(x_l)) + MLP_l(norm(x_l))``, the parallel Transformer block; ``Integrate`` in the slot
    ``order`` has better solvers. What a block adds is
    the stream's, how often blocks run is the order's, and each is useful without the other.

    Each sublayer has its own norm, as in the sequential block; whether the authors share one is not known: no code of theirs was
    found, by title or by name on GitHub. By a summary of the paper its ODE is a stack of layers that share their weights; here each
    block has its own and is integrated over one unit of time.

    Args:
        depth: Number of blocks.
        width: Features D, one number or one for each sublayer.
        outputs: Features of a sublayer's output, where they differ.
        branches: Sublayers in a block, all of them parallel.
        norm: Called with ``width=``.

    Shapes: any that the norm takes; the state keeps the shape of the input.

    Raises:
        ValueError: Widths that differ in number from the sublayers.

    Examples:
        >>> import torch
        >>> from functools import partial
        >>> from interlayer.models import VisionTransformer
        >>> solver = partial(Integrate, solver="rk4")
        >>> model = VisionTransformer(1, 8, patch=2, depth=2, width=32, heads=2, stream="node-transformer", order=solver)
        >>> model(torch.zeros(3, 1, 8, 8)).shape, model.trunk.order.evaluations
        (torch.Size([3, 10]), 8)
    """

    def write(self, state: State, layer: int, branch: Tensor) -> State:
        slope = state.kept.pop("slope", None)
        slope = branch if slope is None else slope + branch
        if self.ends_block(layer):
            state.x = state.x + slope
        else:
            state.kept["slope"] = slope
        return state


class Integrate(Sequential):
    """Integrate each block's right-hand side, what it adds to the state, over one unit of depth; for the slot ``order``.

    Equation: ``x_{l+1} = x_l + int_0^1 f_l(x(t)) dt`` with ``f_l(x) = block_l(x) - x``. One Euler step is the ordinary stack.

    A fixed-step solver of s stages costs ``s * steps`` evaluations of each block, and a key-value cache, which has one
    entry for a block, serves only a single evaluation. With a ``tolerance``, an embedded pair chooses the steps for each
    item of the batch; as they depend on all of its tokens, a causal model must not use it. Gradients are those of the steps
    taken (discretise, then optimise).

    Args:
        depth: Number of blocks.
        solver: One of ``core.solve.TABLEAUS``, or a ``Tableau``.
        steps: Equal steps in a block; the first guess with a tolerance.
        tolerance: Relative and absolute error of a step. Defaults to fixed steps.
        limit: Largest number of steps tried in a block, with a tolerance. Defaults to 100.
        causal: Whether the model is causal; set by the backbone.

    Raises:
        ValueError: Unknown solver; ``steps`` below 1; a tolerance for a causal model or for a solver without an error
            estimate; a stream that carries more than the state from block to block.
        RuntimeError: More than ``limit`` steps.
    """

    def __init__(
        self,
        depth: int,
        *,
        solver: str | Tableau = "euler",
        steps: int = 1,
        tolerance: float | None = None,
        limit: int | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__(depth)
        if isinstance(solver, str) and solver not in TABLEAUS:
            raise ValueError(f"Integrate: solver {solver!r} is not one of {list(TABLEAUS)}.")
        if steps < 1:
            raise ValueError(f"Integrate: steps {steps} must be at least 1.")
        self.tableau = TABLEAUS[solver] if isinstance(solver, str) else solver
        if tolerance is None and limit is not None:
            raise ValueError(
                f"Integrate: limit={limit} has no effect on fixed steps; give a tolerance, or leave it out."
            )
        if tolerance is not None and causal:
            raise ValueError("Integrate: adapted steps see the whole sequence; a causal model needs fixed steps.")
        if tolerance is not None and not self.tableau.low:
            pairs = [name for name, t in TABLEAUS.items() if t.low]
            raise ValueError(
                f"Integrate: {solver!r} does not estimate its error; with a tolerance take one of {pairs}."
            )
        self.steps, self.tolerance, self.limit = steps, tolerance, 100 if limit is None else limit
        self.evaluations = 0 if tolerance is not None else depth * steps * len(self.tableau.b)
        self.caches = self.evaluations == depth

    def forward(self, state: State, step: Step) -> State:
        """Integrate block after block."""
        if self.tolerance is not None:
            self.evaluations = 0  # counted in each pass
        for block in range(self.depth):

            def slope(x: Tensor, block: int = block) -> Tensor:
                after = step(State(x), block)
                if after.kept:
                    raise ValueError(
                        f"Integrate: the stream carries {list(after.kept)} besides the state, which an ODE does not have. "
                        "Take a stream such as 'node-transformer' or 'pre-norm'."
                    )
                return after.x - x

            state.x = self.fixed(slope, state.x) if self.tolerance is None else self.adapted(slope, state.x)
        return state

    def stages(self, slope: Slope, x: Tensor, first: Tensor, size: float | Tensor) -> list[Tensor]:
        """The slopes of all stages, given the first."""
        slopes = [first]
        for row in self.tableau.a:
            slopes.append(slope(x + size * combine(row, slopes)))
        return slopes

    def fixed(self, slope: Slope, x: Tensor) -> Tensor:
        """Take equal steps."""
        size = 1 / self.steps
        for _ in range(self.steps):
            x = x + size * combine(self.tableau.b, self.stages(slope, x, slope(x), size))
        return x

    def adapted(self, slope: Slope, x: Tensor) -> Tensor:
        """Take steps as long as the tolerance allows, for each item of the batch; the last slope is reused (FSAL)."""
        assert self.tolerance is not None
        if not x.numel():
            return x  # no item, or none of its positions: nothing to integrate
        flat = (x.shape[0], *[1] * (x.ndim - 1))
        time, size = x.new_zeros(flat), x.new_full(flat, 1 / self.steps)
        gap = tuple(b - low for b, low in zip(self.tableau.b, self.tableau.low, strict=True))
        first = slope(x)
        self.evaluations += 1
        for _ in range(self.limit):
            slopes = self.stages(slope, x, first, size)
            self.evaluations += len(self.tableau.a)
            new = x + size * combine(self.tableau.b, slopes)
            with torch.no_grad():
                scale = self.tolerance * (1 + torch.maximum(x.abs(), new.abs()))
                error = (size * combine(gap, slopes) / scale).square().flatten(1).mean(1).sqrt().view(flat)
                taken = (error <= 1) & (time < 1)
                time = torch.where(taken, time + size, time)
                grown = 0.9 * error.clamp_min(1e-10) ** (-1 / self.tableau.order)
                size = torch.minimum(size * grown.clamp(0.2, 10), 1 - time)
                time = torch.where(1 - time < 1e-6, torch.ones_like(time), time)  # rounding may leave a remainder
            x, first = torch.where(taken, new, x), torch.where(taken, slopes[-1], first)
            if bool((time >= 1).all()):
                return x
        raise RuntimeError(
            f"Integrate: {self.limit} steps did not reach the end of a block at tolerance {self.tolerance:g}. Raise "
            "limit= or the tolerance."
        )


EXAMPLE = Example(
    make=lambda: Backbone(NODETransformer, order=partial(Integrate, solver="midpoint")),
    inputs=lambda: (torch.randn(2, 6, 8),),
    odd=lambda: (torch.randn(3, 7, 8),),
    axis=1,
    causal=True,
    modes={
        "two steps of rk4": lambda: Backbone(NODETransformer, order=partial(Integrate, solver="rk4", steps=2)),
        "adapted steps": lambda: Backbone(
            NODETransformer, order=partial(Integrate, solver="dormand-prince", tolerance=1e-2)
        ),
    },
)
