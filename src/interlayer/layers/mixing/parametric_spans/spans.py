"""Spans of finite index spaces: the one construction, and the spans of the classical layers."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from jaxtyping import Int
from torch import Tensor, nn


class Span(nn.Module):
    """Three maps out of one index space: ``source: E -> X``, ``target: E -> Y`` and ``weight: E -> W``, and a measure on E.

    For each edge e, the input at ``source[e]`` times the weight at ``weight[e]`` is added to the output at ``target[e]``.
    ``push`` is the layer; ``adjoint`` and ``weight_gradient`` are its derivatives, by the same construction with the three
    maps exchanged.

    Args:
        source: [E], indices of input sites.
        target: [E], indices of output sites.
        weight: [E], indices of weights.
        sizes: Number of input sites X, output sites Y and weights W.
        mass: [E], the measure of integration. Defaults to 1 for each edge.

    Raises:
        ValueError: Maps of different lengths, or an index out of range.
    """

    source: Tensor
    target: Tensor
    weight: Tensor
    mass: Tensor | None

    def __init__(
        self, source: Tensor, target: Tensor, weight: Tensor, sizes: tuple[int, int, int], mass: Tensor | None = None
    ) -> None:
        super().__init__()
        self.sizes = sizes
        for name, index, size in zip(("source", "target", "weight"), (source, target, weight), sizes, strict=True):
            if index.shape != source.shape or index.ndim != 1 or index.dtype != torch.int64 or not len(index):
                raise ValueError(
                    f"Span: {name} is {index.dtype} {tuple(index.shape)}; expected int64 [{len(source)}], one for each edge."
                )
            if int(index.min()) < 0 or int(index.max()) >= size:
                raise ValueError(
                    f"Span: {name} goes from {int(index.min())} to {int(index.max())}; expected 0 to {size - 1}."
                )
            self.register_buffer(name, index, persistent=False)
        if mass is not None and mass.shape != source.shape:
            raise ValueError(f"Span: mass {tuple(mass.shape)}; expected {tuple(source.shape)}, one for each edge.")
        self.register_buffer("mass", mass, persistent=False)

    @property
    def edges(self) -> int:
        """Number of edges."""
        return len(self.source)

    def adjoint(self) -> Span:
        """The reversed span: its layer, with transposed weights, maps output gradients to input gradients."""
        x, y, w = self.sizes
        return Span(self.target, self.source, self.weight, (y, x, w), self.mass)

    def plan(self, outputs: int, inputs: int) -> str:
        """Where to multiply most cheaply; all four give the same result by the projection formula.

        ``matrix``: the span's dense matrix, W x E written and X Y multiplied; ``targets``: after pushing to (target,
        weight) pairs; ``sources``: before pulling back; ``edges``: in between, as the definition says.
        """
        x, y, w = self.sizes
        each = outputs * inputs
        # An edge costs a gather and a scatter besides its products, which are slower than a matrix product's.
        costs = {
            "matrix": x * y * each,
            "targets": 4 * self.edges * inputs + w * y * each,
            "sources": 4 * self.edges * outputs + w * x * each,
            "edges": 4 * self.edges * each,
        }
        return min(costs, key=lambda name: costs[name])

    def push(self, x_BCX: Tensor, w: Tensor, plan: str | None = None) -> Tensor:
        """``y = t_!(s^* x . p^* w)``: pull back along the source, multiply, integrate along the target.

        Args:
            x_BCX: Inputs.
            w: [W, O, C], a matrix over channels for each weight; or [W] or [B, W], scalars for all channels.
            plan: See ``plan``. Defaults to the cheapest.

        Returns:
            [B, O, Y].
        """
        sites, outs, weights = self.sizes
        if x_BCX.ndim != 3 or x_BCX.shape[-1] != sites:
            raise ValueError(f"Span: input {tuple(x_BCX.shape)}; expected [batch, channels, {sites}].")
        numbers = w.ndim < 3
        if w.shape[-1 if numbers else 0] != weights or (not numbers and w.shape[2] != x_BCX.shape[1]):
            raise ValueError(
                f"Span: weights {tuple(w.shape)} for input {tuple(x_BCX.shape)}; expected [{weights}, outputs, "
                f"{x_BCX.shape[1]}], [{weights}] or [batch, {weights}]."
            )
        if numbers:
            return self._numbers(x_BCX, w)
        count, c = w.shape[1:]
        plan = plan or self.plan(count, c)
        mass = self._mass(x_BCX)
        if plan == "matrix":
            edges_EOC = w[self.weight] if mass is None else w[self.weight] * mass[:, None, None]
            flat = w.new_zeros(outs * sites, count, c).index_add(0, self.target * sites + self.source, edges_EOC)
            matrix = flat.view(outs, sites, count, c).permute(2, 0, 3, 1).reshape(count * outs, c * sites)
            return (x_BCX.flatten(1) @ matrix.T).unflatten(1, (count, outs))
        if plan == "sources":
            z = torch.einsum("bcx,woc->bowx", x_BCX, w).flatten(2)[..., self.weight * sites + self.source]
            return _integrate(z, mass, self.target, outs)
        if plan == "targets":
            pairs = _integrate(x_BCX[..., self.source], mass, self.target * weights + self.weight, outs * weights)
            return torch.einsum("bcyw,woc->boy", pairs.unflatten(-1, (outs, weights)), w)
        if plan == "edges":
            z = torch.einsum("bce,eoc->boe", x_BCX[..., self.source], w[self.weight])
            return _integrate(z, mass, self.target, outs)
        raise ValueError(f"Span: plan {plan!r} is not one of 'matrix', 'targets', 'sources' and 'edges'.")

    def _numbers(self, x_BCX: Tensor, w: Tensor) -> Tensor:
        sites, outs, _ = self.sizes
        at_edges, mass = w[..., self.weight], self._mass(w)
        if sites * outs <= 8 * self.edges:  # dense enough for a matrix, one for each example if the weights are
            place = self.target * sites + self.source
            matrix = _integrate(at_edges, mass, place, outs * sites).unflatten(-1, (outs, sites))
            return x_BCX @ matrix.transpose(-1, -2)
        z = x_BCX[..., self.source] * (at_edges if w.ndim == 1 else at_edges[:, None])
        return _integrate(z, mass, self.target, outs)

    def weight_gradient(self, x_BCX: Tensor, dy_BOY: Tensor) -> Tensor:
        """``p_!(t^* dy . s^* x)``: the gradient [W, O, C] of the weights, integrated along the third map."""
        each = torch.einsum("boe,bce->oce", dy_BOY[..., self.target], x_BCX[..., self.source])
        return _integrate(each, self._mass(x_BCX), self.weight, self.sizes[2]).permute(2, 0, 1)

    def _mass(self, like: Tensor) -> Tensor | None:
        return None if self.mass is None else self.mass.to(like.dtype)


def _integrate(values: Tensor, mass: Tensor | None, along: Tensor, size: int) -> Tensor:
    """Sum the last axis [..., E] over the fibres of a map: [..., size]."""
    values = values if mass is None else values * mass
    return values.new_zeros(*values.shape[:-1], size).index_add(-1, along, values)


def dense(inputs: int, outputs: int) -> Span:
    """Every input with every output, one weight for each pair: ``torch.nn.Linear``."""
    edge = torch.arange(inputs * outputs)
    return Span(edge % inputs, edge // inputs, edge, (inputs, outputs, inputs * outputs))


def convolution(
    shape: Sequence[int],
    kernel: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    shared: bool = True,
) -> Span:
    """Sites of a grid with their neighbours: ``torch.nn.Conv1d`` and higher, any number of axes.

    Args:
        shape: Sizes of the grid.
        kernel: Sizes of the kernel.
        stride: Steps between outputs, in sites.
        padding: Zeros on each side; edges from them are left out.
        dilation: Steps between the kernel's sites.
        shared: Whether outputs share weights; otherwise the layer is locally connected.

    Raises:
        ValueError: The kernel does not fit into the padded grid.
    """
    axes = len(shape)
    kernels, strides, pads, gaps = (
        [v] * axes if isinstance(v, int) else list(v) for v in (kernel, stride, padding, dilation)
    )
    outs = [
        (n + 2 * p - g * (k - 1) - 1) // s + 1
        for n, k, s, p, g in zip(shape, kernels, strides, pads, gaps, strict=True)
    ]
    if min(outs) < 1:
        raise ValueError(
            f"Span: kernel {kernels} with dilation {gaps} does not fit into {list(shape)} with padding {pads}."
        )
    # [outputs, kernel sites, axes]: what each output reads
    y = torch.cartesian_prod(*map(torch.arange, outs)).view(prod(outs), 1, axes)
    k = torch.cartesian_prod(*map(torch.arange, kernels)).view(1, prod(kernels), axes)
    at = y * torch.tensor(strides) - torch.tensor(pads) + k * torch.tensor(gaps)
    inside = ((at >= 0) & (at < torch.tensor(shape))).all(-1)
    steps = torch.tensor([prod(shape[i + 1 :]) for i in range(axes)])
    target, place = inside.nonzero(as_tuple=True)
    weight = place if shared else target * prod(kernels) + place
    weights = prod(kernels) * (1 if shared else prod(outs))
    return Span((at * steps).sum(-1)[inside], target, weight, (prod(shape), prod(outs), weights))


def pooling(shape: Sequence[int], kernel: int | Sequence[int], *, stride: int | Sequence[int] | None = None) -> Span:
    """Averages over windows: one weight, and a measure that gives every window mass 1 (``avg_pool``)."""
    grid = convolution(shape, kernel, stride=kernel if stride is None else stride)
    share = torch.full((grid.edges,), 1.0 / grid.sizes[2], dtype=torch.float64)
    return Span(grid.source, grid.target, torch.zeros_like(grid.weight), (*grid.sizes[:2], 1), share)


def graph(edges: Int[Tensor, "2 E"], nodes: int, *, mass: Tensor | None = None) -> Span:
    """Messages along the edges (from, to) of a graph, all with the same weight: graph convolution, with ``mass`` its norm."""
    return Span(edges[0], edges[1], torch.zeros_like(edges[0]), (nodes, nodes, 1), mass)


def attention(queries: int, keys: int, *, causal: bool = False) -> Span:
    """Every query with every key (causal: only with earlier ones, where the last query sees all keys); the weights come from the data."""
    pair = torch.arange(queries * keys)
    if causal:
        pair = pair[pair % keys <= pair // keys + keys - queries]
    return Span(pair % keys, pair // keys, pair, (keys, queries, queries * keys))
