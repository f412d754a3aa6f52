"""Mixed precision by the curvature of each layer and between layers, and a bisection for the smallest model within a tolerance."""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core import taps
from interlayer.core.curvature import Curvature, Loss, curvature, outputs
from interlayer.core.example import Example, tiny_convnet, tiny_gpt2
from interlayer.core.kinds import Plan, Row, Transform
from interlayer.core.quantizer import Grid, Packed, Scaled, layers, packs, rounds, stored, weight_of
from interlayer.core.quantizer.grid import By
from interlayer.core.quantizer.nearest import ran
from interlayer.core.quantizer.reconstruct import wide
from interlayer.core.select import At

Levels: TypeAlias = tuple[int, ...]
"""The index of each layer's bits among the widths, from the largest down."""


@dataclass(frozen=True)
class Work:
    """What a layer does for one example.

    Attributes:
        weights: Number of weights.
        products: Multiplications.
    """

    weights: int
    products: float


Cost: TypeAlias = Callable[[Work, int], float]


def size(work: Work, bits: int) -> float:
    """Bytes of the packed weights of a layer.

    >>> size(Work(100, 0), 3)
    50.0
    """
    return work.weights * stored(bits) / 8


@dataclass(frozen=True)
class Roofline:
    """Seconds that a layer takes for one example: to read its weights, or to multiply, whichever takes longer.

    Args:
        bandwidth: Bytes of weights a second.
        rate: Multiplications a second at 8 bits; twice as many at half the bits.

    Examples:
        >>> Roofline(bandwidth=1e9, rate=1e9)(Work(1000, 1000), 4)
        5e-07
    """

    bandwidth: float = 1e11
    rate: float = 1e12

    def __call__(self, work: Work, bits: int) -> float:
        """The time of a layer whose weights have these bits."""
        return max(size(work, bits) / self.bandwidth, work.products * stored(bits) / 8 / self.rate)


COSTS: dict[str, Cost] = {"size": size, "latency": Roofline()}


def path(curve: Curvature, costs: Float[Tensor, "L K"]) -> list[Levels]:
    """Lower one layer after the other from the largest widths, where the loss rises least for what is saved.

    >>> curve = Curvature(torch.diag(torch.tensor([0.0, 4.0, 0.0, 1.0])).view(2, 2, 2, 2))
    >>> path(curve, torch.tensor([[8.0, 4.0], [8.0, 4.0]]))
    [(0, 0), (0, 1), (1, 1)]
    """
    found = [(0,) * len(costs)]
    while True:
        now, rows = found[-1], torch.arange(len(costs))
        saved = costs[rows, list(now)][:, None] - costs
        saved[torch.arange(costs.shape[1]) <= torch.tensor(now)[:, None]] = 0
        if not bool((saved > 0).any()):
            return found
        price = torch.where(saved > 0, curve.rises(now) / saved, torch.inf)
        i, k = divmod(int(price.argmin()), costs.shape[1])
        found.append((*now[:i], k, *now[i + 1 :]))


class InterlayerHessian(Transform):
    r"""Give each layer the fewest bits that the accuracy bears, lowered in the order of a Hessian that knows pairs of layers.

    Schaefer et al., Augmenting Hessians with Inter-Layer Dependencies for Mixed-Precision Post-Training Quantization,
    arXiv:2306.04879.

    1. Rounding changes the loss by :math:`\frac{1}{2} \sum_{ij} \Delta W_i^\top H_{ij} \Delta W_j`. For i = j these are traces of blocks of
       the Hessian, :math:`tr(H_{ii} \Delta W_i \Delta W_i^\top)`; for others, what layers do together. Errors that pull the
       outputs the same way cost more than each alone (``core.curvature``).
    2. From the largest width everywhere, the layer goes down next whose loss, given all that went down before, rises least for
       what it saves of the size or the latency (``path``).
    3. Bisection finds the last model on that path whose score stays within the tolerance; this one was measured.

    Only the abstract and public summaries were at hand, no code: the form of the terms, the loss and the price of a step are derived
    here, without the constants of the paper. Weights are rounded, inputs are not.

    Cost: ``2 L K`` passes over the data for L layers and K widths, and ``log2(L K)`` more for the bisection. Memory: two copies of
    the model in 32 bits, and the outputs of one batch, for each layer and width.

    Args:
        bits: Widths that a layer may have, 2 to 8; at least two. 3 take the room of 4 when packed, and 5 to 7 that of 8.
        tolerance: Most of the float model's score that may be lost, as a share of it.
        score: Takes a model and gives a number, the larger the better, such as its accuracy on your validation data. Defaults to the
            share of the float model's predictions that it shares on the calibration data; with ``loss="square"``, to 1 less the relative
            squared error.
        cost: What is saved: ``"size"`` (packed bytes), ``"latency"`` (``Roofline``), or a function of a layer's ``Work`` and bits.
        loss: Whose Hessian it is: ``"divergence"`` of the softmax over the last axis of the first output, or ``"square"``.
        by: How ranges are chosen; see ``Grid.fit``.
        at: Which linear maps and convolutions are rounded. Defaults to all whose weight is their own.
        packed: Keep the weights packed. False gives a plain model of floats on the grid.

    Shapes: any; the first tensor of the output has examples first.

    Raises:
        ValueError: An option out of range; from ``plan``: no data, data that the model does not run on, outputs that are a loss, or
            no layer to round; from ``apply``: not even the largest width is within the tolerance.

    Examples:
        >>> net, x = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)), torch.randn(256, 16)
        >>> new = InterlayerHessian(tolerance=0.1).plan(net, x).apply()
        >>> float((new(x).argmax(-1) == net(x).argmax(-1)).float().mean()) >= 0.9
        True
    """

    slug: ClassVar[str] = "interlayer-hessian"

    def __init__(
        self,
        *,
        bits: Sequence[int] = (2, 4, 8),
        tolerance: float = 0.01,
        score: Callable[[nn.Module], float] | None = None,
        cost: Literal["size", "latency"] | Cost = "size",
        loss: Loss = "divergence",
        by: By = "mse",
        at: At | None = None,
        packed: bool = True,
    ) -> None:
        widths = sorted(set(bits if isinstance(bits, Sequence) else ()), reverse=True)
        if len(widths) < 2 or not all(isinstance(b, int) and 2 <= b <= 8 for b in widths):
            raise ValueError(f"interlayer-hessian: bits {bits!r}; expected at least two integers from 2 to 8.")
        if not 0 <= tolerance < 1:
            raise ValueError(f"interlayer-hessian: tolerance {tolerance!r}; expected a share from 0 to below 1.")
        if not callable(cost) and cost not in COSTS:
            raise ValueError(f"interlayer-hessian: cost {cost!r}; expected 'size', 'latency' or a function.")
        if loss not in get_args(Loss):
            raise ValueError(f"interlayer-hessian: loss {loss!r}; expected 'divergence' or 'square'.")
        self.widths, self.tolerance, self.score, self.loss = widths, tolerance, score, loss
        self.cost: Cost = cost if callable(cost) else COSTS[cost]
        self.by, self.at, self.packed = by, at, packed
        self.options: dict[str, Any] = {"bits": widths, "tolerance": tolerance}

    def plan(self, model: nn.Module, data: Any = None, *, others: Sequence[nn.Module] = ()) -> Plan:
        """List the layers; ``apply`` measures and chooses their bits."""
        self.take(others)
        batches = taps.batches(data, self.slug)
        there, skipped = layers(model, self.at)
        work = works(model, batches[0], there)
        there, never = ran(there, work, self.slug)
        skipped += never
        several = " or ".join(str(b) for b in self.widths)
        touched = [Row(n, type(there[n]).__name__, f"{w.weights} weights, {several} bits") for n, w in work.items()]

        def build() -> nn.Module:
            held = {n: [Grid(b, 0, "asymmetric").fit(wide(there[n]), self.by) for b in self.widths] for n in work}
            levels = self.search(model, batches, held, self.path(model, batches, held, work))
            chosen = {n: held[n][k] for n, k in zip(work, levels, strict=True)}
            told = {**self.options, "chosen": {n: g.grid.bits for n, g in chosen.items()}}
            if self.packed:
                return packs(model, {n: Packed(there[n], g) for n, g in chosen.items()}, told)
            return rounds(model, {n: g.fake(wide(there[n])) for n, g in chosen.items()}, told)

        return Plan(self.slug, self.options, touched, skipped, build)

    def path(
        self, model: nn.Module, batches: Sequence[Any], held: Mapping[str, Sequence[Scaled]], work: Mapping[str, Work]
    ) -> list[Levels]:
        """The models among which the bisection searches."""
        costs = torch.tensor([[self.cost(w, b) for b in self.widths] for w in work.values()], dtype=torch.float64)
        return path(self.curvature(model, batches, held), costs)

    def curvature(self, model: nn.Module, batches: Sequence[Any], held: Mapping[str, Sequence[Scaled]]) -> Curvature:
        """What rounding does to the loss."""
        moves = {n: (lambda w, each=each: [g.fake(w) - w for g in each]) for n, each in held.items()}
        return curvature(model, batches, moves, self.loss)

    @torch.no_grad()
    def search(
        self, model: nn.Module, batches: Sequence[Any], held: Mapping[str, Sequence[Scaled]], models: Sequence[Levels]
    ) -> Levels:
        """The last of the models within the tolerance, if scores only fall on the way; in any case one that is within it."""
        work = copy.deepcopy(model).eval()
        score = self.score or agreement(work, batches, self.loss)
        whole = score(work)
        least = whole - self.tolerance * abs(whole)

        def beyond(levels: Levels) -> bool:
            for (name, grids), k in zip(held.items(), levels, strict=True):
                weight_of(work.get_submodule(name)).copy_(grids[k].fake(wide(model.get_submodule(name))))
            return score(work) < least

        found = bisect_left(models, True, key=beyond)
        if not found:
            raise ValueError(
                f"interlayer-hessian: with {self.widths[0]} bits everywhere the score is below {least:.4g}; expected at least that. "
                "Raise tolerance, or pass more bits."
            )
        return models[found - 1]


def works(model: nn.Module, batch: Any, there: Mapping[str, nn.Module]) -> dict[str, Work]:
    """What each layer does for one example, without those that do not run.

    >>> works(nn.Sequential(nn.Conv2d(1, 2, 3)), torch.zeros(5, 1, 4, 4), {"0": nn.Conv2d(1, 2, 3)})
    {'0': Work(weights=18, products=72.0)}
    """
    with taps.at_rest(model), torch.no_grad(), taps.read(model, list(there), every=True) as seen:
        examples = len(outputs(model, batch))
    found = dict[str, Work]()
    for n, m in there.items():
        weight = weight_of(m)
        if made := sum(out.numel() for out in seen.get(n, [])):
            found[n] = Work(weight.numel(), made / weight.shape[0] * weight.numel() / examples)
    return found


@torch.no_grad()
def agreement(model: nn.Module, batches: Sequence[Any], loss: Loss) -> Callable[[nn.Module], float]:
    """How near a model's outputs are to those that this one gives now, 1 at best."""
    whole = [outputs(model, b) for b in batches]

    @torch.no_grad()
    def score(new: nn.Module) -> float:
        pairs = [(outputs(new, b), old) for b, old in zip(batches, whole, strict=True)]
        if loss == "square":
            off = sum(float((a - b).square().sum()) for a, b in pairs)
            return 1 - off / max(sum(float(b.square().sum()) for _, b in pairs), 1e-12)
        same = torch.cat([(a.argmax(-1) == b.argmax(-1)).flatten() for a, b in pairs])
        return float(same.float().mean())

    return score


EXAMPLE = Example(
    make=lambda: InterlayerHessian(tolerance=0.5), inputs=lambda: tiny_convnet(16), hf=lambda: tiny_gpt2(1)
)
