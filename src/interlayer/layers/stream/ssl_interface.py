"""Interfaces between an upstream encoder and a downstream head: ways to combine the states of all layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core import select, taps
from interlayer.core.config import configured
from interlayer.core.data import DataShape
from interlayer.core.example import Example
from interlayer.core.select import At

KERNEL, STRIDE = 5, 3


class WeightedSum(nn.Module):
    """``sum_l softmax(w)_l h_l``."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.outputs = width
        self.weight = nn.Parameter(torch.zeros(layers))

    def forward(self, x_BLSD: Tensor) -> Tensor:
        """[B, L, S, D] to [B, S, D]."""
        return torch.einsum("blsd,l->bsd", x_BLSD, self.weight.softmax(0).to(x_BLSD.dtype))


class OneLayer(nn.Module):
    """No interface: the states of one layer, by default the last."""

    def __init__(self, width: int, layers: int, *, index: int = -1) -> None:
        super().__init__()
        if not -layers <= index < layers:
            raise ValueError(f"SSLInterface: index {index} for {layers} layers; give {-layers} to {layers - 1}.")
        self.index, self.outputs = index, width

    def forward(self, x_BLSD: Tensor) -> Tensor:
        """[B, L, S, D] to [B, S, D]."""
        return x_BLSD[:, self.index]


class GroupedWeightedSum(nn.Module):
    """A weighted sum of each of ``groups`` runs of neighbouring layers; the sums are concatenated and projected to D."""

    def __init__(self, width: int, layers: int, *, groups: int = 2) -> None:
        super().__init__()
        if not 1 <= groups <= layers:
            raise ValueError(f"SSLInterface: {groups} groups for {layers} layers; give 1 to {layers}.")
        self.outputs = width
        self.sizes = [layers // groups + (g < layers % groups) for g in range(groups)]
        self.sums = nn.ModuleList(WeightedSum(width, size) for size in self.sizes)
        self.project = nn.Linear(groups * width, width)

    def forward(self, x_BLSD: Tensor) -> Tensor:
        """[B, L, S, D] to [B, S, D]."""
        groups = zip(self.sums, x_BLSD.split(self.sizes, 1), strict=True)
        return self.project(torch.cat([total(x) for total, x in groups], -1))


class Concat(nn.Module):
    """All layers concatenated and projected to D."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.outputs = width
        self.project = nn.Linear(layers * width, width)

    def forward(self, x_BLSD: Tensor) -> Tensor:
        """[B, L, S, D] to [B, S, D]."""
        return self.project(x_BLSD.transpose(1, 2).flatten(2))


class HierarchicalConv(nn.Module):
    """``floor(log_3 L)`` convolutions of kernel 5 and stride 3 along the layers, each with a ReLU.

    The M positions that are left of the layers are concatenated, with ``floor(D / M)`` channels each: D features, or a few
    less where M does not divide D (1023 for 25 layers of 1024). As in the authors' code, except that two layers, which
    would pass no convolution at all, pass one.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        lengths = [layers]
        while len(lengths) == 1 or STRIDE ** len(lengths) <= layers:
            lengths.append((lengths[-1] - 1) // STRIDE + 1)
        last = width // lengths[-1]
        if not last:
            raise ValueError(
                f"SSLInterface: width {width} for the {lengths[-1]} positions that are left of {layers} layers; give at "
                "least one feature for each, or another kind."
            )
        self.outputs = last * lengths[-1]
        channels = [width] * (len(lengths) - 1) + [last]
        self.convs = nn.ModuleList(nn.Conv1d(i, o, KERNEL, STRIDE, padding=KERNEL // 2) for i, o in pairwise(channels))

    def forward(self, x_BLSD: Tensor) -> Tensor:
        """[B, L, S, D] to [B, S, outputs]."""
        batch, _, length, _ = x_BLSD.shape
        x = x_BLSD.permute(0, 2, 3, 1).flatten(0, 1)  # [B S, D, L]
        for conv in self.convs:
            x = F.relu(conv(x))
        return x.flatten(1).unflatten(0, (batch, length))


class CLSPooling(nn.Module):
    """At every position, a Transformer layer over a learned token and the L states; its output at the token is the result."""

    def __init__(self, width: int, layers: int, *, heads: int = 4) -> None:
        super().__init__()
        self.outputs = width
        self.cls = nn.Parameter(torch.randn(width) * 0.02)
        self.layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)

    def forward(self, x_BLSD: Tensor) -> Tensor:
        """[B, L, S, D] to [B, S, D]."""
        batch, _, length, _ = x_BLSD.shape
        x = F.pad(x_BLSD.transpose(1, 2).flatten(0, 1), (0, 0, 1, 0)).clone()
        x[:, 0] = self.cls.to(x.dtype)
        return self.layer(x)[:, 0].unflatten(0, (batch, length))


class PCAConcat(nn.Module):
    """The first ``ceil(D / L)`` principal components of each layer, concatenated; fitted once and not trained."""

    mean: Tensor
    axes: Tensor
    fitted: Tensor

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        kept = -(-width // layers)
        self.outputs = kept * layers
        self.register_buffer("mean", torch.zeros(layers, width))
        self.register_buffer("axes", torch.zeros(layers, width, kept))
        self.register_buffer("fitted", torch.tensor(False))

    @torch.no_grad()
    def fit(self, x_BLSD: Tensor) -> None:
        """Compute the components from these states."""
        x = x_BLSD.transpose(0, 1).flatten(1, 2)
        self.mean.copy_(x.mean(1))
        _, axes = torch.linalg.eigh(torch.einsum("lnd,lne->lde", x - x.mean(1, True), x - x.mean(1, True)))
        self.axes.copy_(axes.flip(-1)[..., : self.axes.shape[-1]])
        self.fitted.fill_(True)

    def forward(self, x_BLSD: Tensor) -> Tensor:
        """[B, L, S, D] to [B, S, outputs]."""
        if not torch.compiler.is_compiling() and not self.fitted:
            raise ValueError("SSLInterface: the principal components are not fitted; call fit(states) once.")
        mean, axes = self.mean.to(x_BLSD.dtype), self.axes.to(x_BLSD.dtype)
        return torch.einsum("blsd,ldk->bslk", x_BLSD - mean[:, None], axes).flatten(2)


INTERFACES: dict[str, Callable[..., nn.Module]] = {
    "weighted-sum": WeightedSum,
    "grouped": GroupedWeightedSum,
    "concat": Concat,
    "hconv": HierarchicalConv,
    "cls": CLSPooling,
    "pca": PCAConcat,
    "one": OneLayer,
}


class SSLInterface(nn.Module):
    """Combine the states of all upstream layers at each position, by an interface that is chosen by name.

    Paper: Shih and Harwath, "Interface Design for Self-Supervised Speech Models", arXiv:2406.12209.

    Interfaces (section 2; L upstream states of D features): ``weighted-sum`` is the usual softmax-weighted sum (L
    weights); ``grouped`` has one sum for each group of neighbouring layers and a projection; ``concat`` projects all of
    them (L D^2 weights); ``hconv``, the paper's proposal, convolves along the layers, floor(log_3 L) times with kernel 5
    and stride 3 (5 D^2 weights each); ``cls`` is a Transformer layer along the layers with a pooling token; ``pca``
    concatenates principal components. ``hconv`` and the weighted sum agree with the authors' code (atosystem/SSL_Interface), which
    has no other interface; the others follow a summary of section 2. Heads and feed-forward width of ``cls``, and whether it encodes
    the layer's position, were not found there, in the authors' other repositories or by name elsewhere; it does not here.

    Args:
        width: Features D of an upstream state.
        layers: Number of upstream states L, including the embedding's if given.
        kind: ``weighted-sum``, ``grouped``, ``concat``, ``hconv``, ``cls``, ``pca``, or ``one``, a single layer without an
            interface.
        normalize: Whether to layer-normalise each state first, without gain.
        **options: ``groups`` of ``grouped``, ``heads`` of ``cls``, ``index`` of ``one``.

    Attributes:
        outputs: Features of the result: D, or near it for ``hconv`` and ``pca`` where D does not divide.

    Shapes: states [B, L, S, D], or a sequence of L states [B, S, D] as Hugging Face models return them, to [B, S, outputs].

    Raises:
        ValueError: Unknown kind; states of another shape; ``pca`` before ``fit``.

    Examples:
        >>> import torch
        >>> from interlayer.models import Encoder
        >>> upstream = Encoder(vocab=50, length=16, depth=4, width=32, heads=2)
        >>> states = hidden_states(upstream, torch.zeros(2, 9, dtype=torch.long), at=["trunk.blocks.*.mixer"], side="input")
        >>> SSLInterface(32, 4)(states).shape
        torch.Size([2, 9, 32])
    """

    def __init__(
        self, width: int, layers: int, *, kind: str = "hconv", normalize: bool = False, **options: Any
    ) -> None:
        super().__init__()
        if kind not in INTERFACES:
            raise ValueError(f"SSLInterface: kind {kind!r} is not one of {list(INTERFACES)}.")
        self.width, self.layers, self.normalize = width, layers, normalize
        self.pool = INTERFACES[kind](width, layers, **options)
        self.outputs: int = self.pool.outputs  # type: ignore[assignment]

    def fit(self, states: Tensor | Sequence[Tensor]) -> SSLInterface:
        """Fit the principal components of ``pca``; other interfaces are left unchanged."""
        if isinstance(self.pool, PCAConcat):
            self.pool.fit(self._stacked(states))
        return self

    def forward(self, states: Float[Tensor, "B L S D"] | Sequence[Tensor]) -> Float[Tensor, "B S O"]:
        """Join the layers."""
        return self.pool(self._stacked(states))

    def _stacked(self, states: Tensor | Sequence[Tensor]) -> Tensor:
        x = states if isinstance(states, Tensor) else torch.stack(tuple(states), 1)
        if x.ndim != 4 or x.shape[1] != self.layers or x.shape[-1] != self.width:
            raise ValueError(
                f"SSLInterface: states {tuple(x.shape)}; expected [batch, {self.layers}, sequence, {self.width}], or "
                f"{self.layers} states [batch, sequence, {self.width}]."
            )
        return F.layer_norm(x, x.shape[-1:]) if self.normalize else x


@configured
class InterfacedHead(nn.Module):
    """An interface over the states of a frozen upstream, and a linear head at each position or on their mean.

    Args:
        width: Features D of an upstream state.
        layers: Number of upstream states L.
        classes: Classes K.
        pooled: Whether to average over positions and answer once for the whole sequence.
        kind: See ``SSLInterface``; not ``pca``, which is fitted before it is used.
        **options: Further options of ``SSLInterface``.

    Shapes: [B, L, S, D] to [B, S, K], or to [B, K] if pooled.

    Raises:
        ValueError: The kind ``pca``.

    Examples:
        >>> InterfacedHead(32, 4, 8, kind="weighted-sum")(torch.randn(2, 4, 9, 32)).shape
        torch.Size([2, 9, 8])
    """

    def __init__(
        self, width: int, layers: int, classes: int, *, pooled: bool = False, kind: str = "hconv", **options: Any
    ) -> None:
        super().__init__()
        if kind == "pca":
            raise ValueError(
                "InterfacedHead: kind 'pca' is not trained. Fit an SSLInterface of that kind and add a head."
            )
        self.interface = SSLInterface(width, layers, kind=kind, **options)
        self.head, self.pooled = nn.Linear(self.interface.outputs, classes), pooled

    @classmethod
    def for_task(cls, shape: DataShape, **options: Any) -> Self:
        """A head for a task with the states of a frozen model's layers as inputs, which are normalised."""
        if shape.kind != "states" or shape.outputs not in ("tokens", "classes"):
            raise ValueError(
                f"InterfacedHead: takes the states of a model's layers and gives classes, not {shape.kind} and {shape.outputs}. "
                "Take a task such as 'token-kinds'."
            )
        pooled = shape.outputs == "classes"
        options = {"normalize": True, **options}
        return cls(shape.features, shape.layers, shape.classes if pooled else shape.vocab, pooled=pooled, **options)

    def forward(self, states: Float[Tensor, "B L S D"]) -> Tensor:
        """Logits."""
        x = self.interface(states)
        return self.head(x.mean(1) if self.pooled else x)


def hidden_states(
    model: nn.Module, *inputs: Any, at: At | None = None, side: str = "output", detach: bool = True, **named: Any
) -> Float[Tensor, "B L S D"]:
    """The states of all layers of a model for some inputs, stacked.

    Args:
        model: A Hugging Face model, whose hidden states are requested, or any other.
        *inputs: Positional arguments of the model.
        at: The modules whose activations are the states; needed where the model returns no hidden states.
        side: ``output`` or ``input`` of these modules.
        detach: Whether to freeze the upstream.
        **named: Keyword arguments of the model.

    Raises:
        ValueError: No ``at`` and no hidden states; states of several shapes.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        >>> hidden_states(net, torch.zeros(2, 5, 3), at="*").shape
        torch.Size([2, 3, 5, 4])
    """
    with torch.set_grad_enabled(not detach and torch.is_grad_enabled()):
        if at is not None:
            with taps.read(model, at, side=side, detach=detach) as seen:
                model(*inputs, **named)
            states = [seen[name] for name, _ in select.select(model, at)]
        else:
            asked = {"output_hidden_states": True} if hasattr(getattr(model, "config", None), "model_type") else {}
            found = model(*inputs, **named, **asked)
            hidden = getattr(found, "hidden_states", None) or getattr(found, "encoder_hidden_states", None)
            if hidden is None:
                raise ValueError(
                    f"SSLInterface: {type(model).__name__} returns no hidden states. Name the modules whose outputs they are with at=."
                )
            states = list(hidden)
    if len({s.shape for s in states}) > 1:
        raise ValueError(
            f"SSLInterface: states of several shapes, {sorted({tuple(s.shape) for s in states})}; choose layers of one width."
        )
    return torch.stack(states, 1)


EXAMPLE = Example(
    make=lambda: SSLInterface(4, 9),
    modes={kind: partial(SSLInterface, 4, 9, kind=kind) for kind in INTERFACES if kind != "pca"},
    inputs=lambda: (torch.randn(2, 9, 5, 4),),
    odd=lambda: (torch.randn(3, 9, 7, 4),),
    axis=2,
)
