"""Parametric spans: every classical layer as one construction, its derivatives too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interlayer.claims import Claim, Scale, effect, fits
from interlayer.layers.mixing.parametric_spans import Span, attention, convolution, dense, graph, pooling

Case = tuple[Span, Tensor, Tensor, Tensor]  # span, inputs, weights as the span takes them, torch's own output


def _linear(n: int) -> Case:
    x, w = _draw(3, 1, n), _draw(n * (n - 1), 1, 1)
    return dense(n, n - 1), x, w, F.linear(x, w.view(n - 1, n))


def _conv(n: int, **options: Any) -> Case:
    x, w = _draw(2, 3, n * (n + 1)), _draw(9, 4, 3)
    theirs = F.conv2d(x.view(2, 3, n, n + 1), w.permute(1, 2, 0).view(4, 3, 3, 3), **options)
    return convolution((n, n + 1), 3, **options), x, w, theirs.flatten(2)


def _local(n: int) -> Case:
    x, w = _draw(2, 3, n), _draw((n - 2) * 3, 4, 3)
    theirs = torch.einsum("bcyk,ykoc->boy", x.unfold(2, 3, 1), w.view(n - 2, 3, 4, 3))
    return convolution((n,), 3, shared=False), x, w, theirs


def _pool(n: int) -> Case:
    x, w = _draw(2, 3, n * n), torch.eye(3, dtype=torch.float64)[None]
    return pooling((n, n), 2), x, w, F.avg_pool2d(x.view(2, 3, n, n), 2).flatten(2)


def _graph(n: int) -> Case:
    adjacency = (torch.rand(n, n) < 0.3).double() * torch.rand(n, n, dtype=torch.float64)
    adjacency[0, 0] = 1.0
    to, source = adjacency.nonzero(as_tuple=True)
    x, w = _draw(2, 3, n), _draw(1, 4, 3)
    span = graph(torch.stack((source, to)), n, mass=adjacency[to, source])
    return span, x, w, torch.einsum("oc,bcx,yx->boy", w[0], x, adjacency)


def _attention(n: int) -> Case:
    q, k, x = torch.randn(n, 4, dtype=torch.float64), torch.randn(n, 4, dtype=torch.float64), _draw(1, 3, n)
    w = (q @ k.T / 2).softmax(-1).reshape(-1, 1, 1) * torch.eye(3, dtype=torch.float64)
    return attention(n, n), x, w, F.scaled_dot_product_attention(q[None], k[None], x.transpose(1, 2)).transpose(1, 2)


CASES: dict[str, Callable[[int], Case]] = {
    "dense": _linear,
    "convolution": _conv,
    "strided": lambda n: _conv(n, stride=2, padding=1),
    "dilated": lambda n: _conv(n, dilation=2),
    "locally connected": _local,
    "pooling": _pool,
    "graph": _graph,
    "attention": _attention,
}


def _draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Largest relative error against torch's own operator: of the output, and of both derivatives made by the construction."""
    torch.manual_seed(seed)
    span, x, w, theirs = CASES.get(arm, _conv)(scale.sites)
    if arm == "source map moved by one":
        span = Span(span.source.roll(1), span.target, span.weight, span.sizes, span.mass)
    dy = torch.randn_like(theirs)
    leaves = [t for t in (x, w) if t.requires_grad]  # pooling and attention have no learned weight
    slopes = [span.adjoint().push(dy, w.transpose(1, 2)), span.weight_gradient(x, dy)]
    pairs = [(span.push(x, w), theirs), *zip(slopes, torch.autograd.grad(theirs, leaves, dy), strict=False)]
    return {
        "error": max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs),
        "products for each of the layer's outputs": span.edges / span.sizes[1],
    }


CLAIM = Claim(
    says="Dense, convolution (strided, dilated), locally connected, pooling, graph and attention-weighted layers are the same "
    "span construction: values and derivatives equal torch's to 1e-12.",
    measure=measure,
    arms=tuple(CASES),
    statements=tuple(effect("", fits("error", arm, high=1e-12), control="source map moved by one") for arm in CASES),
    scales={"smoke": {"sites": 8}, "small": {"sites": 24}, "full": {"sites": 96}},
)
