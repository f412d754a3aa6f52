"""Parametric spans: one definition of a linear layer with dense, convolution, pooling, graph and attention layers as instances."""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.config import configured
from interlayer.core.data import DataShape
from interlayer.core.example import Example
from interlayer.layers.mixing.parametric_spans.spans import Span, attention, convolution, dense, graph, pooling

__all__ = ["ParametricSpan", "Span", "SpanNet", "attention", "convolution", "dense", "graph", "pooling"]


class ParametricSpan(nn.Module):
    """The linear layer of a span: pull inputs back to edges, multiply them by weights, and sum at the targets.

    Paper: Bergomi and Vertechi, "Neural network layers as parametric spans", arXiv:2208.00809.

    Equation: for ``X <-s- E -t-> Y`` and ``p: E -> W``, ``y = t_!(s^* x . p^* w)``, that is
    ``y[j] = sum over e with t(e) = j of m(e) w[p(e)] x[s(e)]``, where m is the measure. The derivatives have the same
    form with the maps exchanged: ``dx = s_!(t^* dy . p^* w')`` and ``dw = p_!(t^* dy . s^* x)``. Channels are a dense factor: each
    weight is a matrix over them. Of the paper the abstract could be read, and the beginning of the authors'
    slides (bilinearity and duality from Frobenius integration theories); no code of theirs was found by title or by their names on
    GitHub. Notation and discrete form are this project's.

    Cost: that of the cheapest of four orders (``Span.plan``); a convolution is as many products as torch's, on gathered
    inputs.

    Args:
        span: Which inputs meet which weights and where they go: ``dense``, ``convolution``, ``pooling``, ``graph`` or your own.
        inputs: Input channels C.
        outputs: Output channels O.
        bias: Whether to add a learned offset to each output channel.

    Shapes: [B, C, X] to [B, O, Y].

    Raises:
        ValueError: An input with another number of channels or sites.

    Examples:
        >>> import torch
        >>> layer = ParametricSpan(convolution((8, 8), 3, padding=1, stride=2), 1, 4)
        >>> layer(torch.randn(2, 1, 64)).shape
        torch.Size([2, 4, 16])
    """

    def __init__(self, span: Span, inputs: int = 1, outputs: int = 1, *, bias: bool = True) -> None:
        super().__init__()
        if inputs < 1 or outputs < 1:
            raise ValueError(f"ParametricSpan: inputs {inputs} and outputs {outputs} must be at least 1.")
        self.span = span
        fan_in = inputs * span.edges / span.sizes[1]  # what an output sums over, on average
        bound = fan_in**-0.5
        self.weight = nn.Parameter(torch.empty(span.sizes[2], outputs, inputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound)) if bias else None
        self.order = span.plan(outputs, inputs)

    def forward(self, x: Float[Tensor, "B C X"]) -> Float[Tensor, "B O Y"]:
        """Pull back, multiply, push forward."""
        y = self.span.push(x, self.weight, self.order)
        return y if self.bias is None else y + self.bias[:, None]


class TorchConvolution(ParametricSpan):
    """A convolution's span, computed by torch's own operator on the same weights."""

    def __init__(self, image: tuple[int, int], inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__(convolution(image, 3, stride=stride, padding=1), inputs, outputs)
        self.image, self.stride = image, stride

    def forward(self, x: Float[Tensor, "B C X"]) -> Float[Tensor, "B O Y"]:
        """``torch.nn.functional.conv2d``."""
        kernel = self.weight.permute(1, 2, 0).unflatten(2, (3, 3))
        return F.conv2d(x.unflatten(2, self.image), kernel, self.bias, self.stride, 1).flatten(2)


class TorchDense(ParametricSpan):
    """The span from all sites to one, computed by torch's linear map on the same weights."""

    def forward(self, x: Float[Tensor, "B C X"]) -> Float[Tensor, "B O 1"]:
        """``torch.nn.functional.linear``."""
        return F.linear(x.flatten(1), self.weight.permute(1, 2, 0).flatten(1), self.bias).unsqueeze(2)


@configured
class SpanNet(nn.Module):
    """A convolutional network whose every linear map is a span: ``depth`` convolutions of kernel 3, then a dense span to the
    classes.

    Every second convolution halves the image and doubles the channels. The network ``spans=False`` is its twin with the same
    weights, made of torch's own operators: the two differ by rounding, and in speed.

    Args:
        channels: Channels C of the image.
        image: Height and width in pixels.
        classes: Classes K.
        width: Channels after the first layer.
        depth: Number of convolutions.
        shared: Whether the outputs of a layer share weights; otherwise the layers are locally connected.
        spans: Whether to compute with spans, or with torch's operators.

    Shapes: [B, C, H, W] to [B, K].

    Raises:
        ValueError: Locally connected layers without spans, which torch does not have; an image of another shape.

    Examples:
        >>> net, twin = SpanNet(1, (8, 8), 10), SpanNet(1, (8, 8), 10, spans=False)
        >>> done, x = twin.load_state_dict(net.state_dict()), torch.randn(4, 1, 8, 8)
        >>> torch.allclose(net(x), twin(x), atol=1e-5)
        True
    """

    def __init__(
        self,
        channels: int = 1,
        image: tuple[int, int] = (8, 8),
        classes: int = 10,
        *,
        width: int = 16,
        depth: int = 3,
        shared: bool = True,
        spans: bool = True,
    ) -> None:
        super().__init__()
        if not (shared or spans):
            raise ValueError(
                "SpanNet: shared=False and spans=False; torch has no locally connected layer. Take spans=True."
            )
        self.shape = (channels, *image)
        layers: list[nn.Module] = []
        inputs, (height, breadth) = channels, image
        for layer in range(depth):
            stride, outputs = 1 + layer % 2, width * 2 ** ((layer + 1) // 2)
            if spans:
                span = convolution((height, breadth), 3, stride=stride, padding=1, shared=shared)
                layers.append(ParametricSpan(span, inputs, outputs))
            else:
                layers.append(TorchConvolution((height, breadth), inputs, outputs, stride=stride))
            layers.append(nn.ReLU())
            inputs, height, breadth = outputs, -(-height // stride), -(-breadth // stride)
        self.layers = nn.Sequential(*layers)
        self.head = (ParametricSpan if spans else TorchDense)(dense(height * breadth, 1), inputs, classes)

    @classmethod
    def for_task(cls, shape: DataShape, **options: Any) -> Self:
        """A network for a task of images and classes."""
        shape.require("SpanNet", "image", "classes")
        return cls(shape.channels, (shape.height, shape.width), shape.classes, **options)

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Logits of the classes."""
        if tuple(image.shape[1:]) != self.shape:
            raise ValueError(
                f"SpanNet: image {tuple(image.shape)}; expected [batch, {', '.join(map(str, self.shape))}]."
            )
        return self.head(self.layers(image.flatten(2))).squeeze(2)


def _wrong() -> tuple[Any, ...]:
    return (torch.randn(2, 3, 13),)


EXAMPLE = Example(
    make=lambda: ParametricSpan(convolution((12,), 3, padding=1, dilation=2), 3, 2),
    inputs=lambda: (torch.randn(2, 3, 12),),
    odd=lambda: (torch.randn(5, 3, 12),),
    wrong=_wrong,
    modes={
        "dense": lambda: ParametricSpan(dense(12, 5), 3, 2),
        "pooling": lambda: ParametricSpan(pooling((12,), 3), 3, 2, bias=False),
    },
)
