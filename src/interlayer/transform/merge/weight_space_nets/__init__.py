"""Deep weight-space networks: they read and write the weights of MLPs, and the order of the neurons does not matter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from math import sqrt
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.config import configured
from interlayer.core.data import DataShape
from interlayer.core.example import Example
from interlayer.core.fit import fit
from interlayer.transform.merge.weight_space_nets.data import FIELDS
from interlayer.transform.merge.weight_space_nets.space import WeightSpace

POOLS = ("max", "mean")


class Equivariant(nn.Module):
    r"""Every affine map from weights to weights that commutes with permutations of hidden neurons, by pooling, dense and broadcasting.

    Weight matrices and biases are tensors with axes: $W_m$ has the neurons of layers m and m - 1, $b_m$ those of layer m. Neurons
    of hidden layers are sets, those of the first and last layer are features. The maps from a tensor A to a tensor B are those of the
    paper's tables 5 to 8 (all pairs of positions), and all are one rule: for every set of hidden layers K that A and B share,

    $$y_B \mathrel{+}= \mathrm{broadcast}(L^K_{AB}\, \mathrm{pool}_{A \setminus K}(x_A))$$

    with a dense $L^K_{AB}$ on the features. So there is one matrix for each K: no layer, one, or two neighbours. Only that of no layer
    has a bias. As in the authors' code, sums are divided by the number of tensors, and each $L$ is initialised for itself.

    Args:
        space: Whose weights.
        inputs: Features C of every weight.
        outputs: Features E of every weight.
        pool: ``mean``, by which the map is affine, or ``max``, the authors' default.
        scale: Factor of the initial weights.

    Shapes: tensors of ``space.split``, of C features, to the same of E features.
    """

    def __init__(self, space: WeightSpace, inputs: int, outputs: int, *, pool: str = "max", scale: float = 1.0) -> None:
        super().__init__()
        self.space, self.pool = space, pool
        self.maps = nn.ModuleList()
        for kept, among in space.kept.items():
            fans = [(space.features[a] * inputs, space.features[a] * outputs) for a in among]
            dense = nn.Linear(sum(i for i, _ in fans), sum(o for _, o in fans), bias=not kept)
            blocks = [
                [
                    torch.randn(o, i) * scale * 2 * sqrt(i / (o * (i + o))) / (4 if a == b and len(space.sets[a]) == 2 else 1)
                    for a, (i, _) in zip(among, fans, strict=True)
                ]
                for b, (_, o) in zip(among, fans, strict=True)
            ]  # fmt: skip
            dense.weight = nn.Parameter(torch.cat([torch.cat(row, 1) for row in blocks]))
            if not kept:
                nn.init.uniform_(dense.bias, -1e-4, 1e-4)
            self.maps.append(dense)
        self.sizes = [f * outputs for f in space.features]

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        """Map all weights."""
        out: list[Any] = [0.0] * len(x)
        for (kept, among), dense in zip(self.space.kept.items(), self.maps, strict=True):
            y = dense(torch.cat([self.space.pooled(x[a], a, kept, self.pool) for a in among], -1))
            for b, part in zip(among, y.split([self.sizes[b] for b in among], -1), strict=True):
                out[b] = out[b] + self.space.broadcast(part, b, kept)
        return [y / len(x) for y in out]


class Invariant(nn.Module):
    """Every affine map from weights to numbers that permutations of hidden neurons do not change: pooling and a dense layer.

    Args:
        space: Whose weights.
        inputs: Features C of every weight.
        outputs: Numbers K.
        pool: ``max`` or ``mean``.

    Shapes: tensors of ``space.split``, of C features, to [B, K].
    """

    def __init__(self, space: WeightSpace, inputs: int, outputs: int, *, pool: str = "max") -> None:
        super().__init__()
        self.space, self.pool = space, pool
        self.dense = nn.Linear(sum(space.features) * inputs, outputs)

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        """Pool all weights and read them."""
        return self.dense(torch.cat([self.space.pooled(t, a, (), self.pool) for a, t in enumerate(x)], -1))


class Normalise(nn.Module):
    """Batch normalisation of each feature of each matrix and bias, over weights and networks.

    Args:
        space: Whose weights.
        features: Features C of every weight.
    """

    def __init__(self, space: WeightSpace, features: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(features) for _ in space.sets)
        self.features = features

    def forward(self, x: Sequence[Tensor]) -> list[Tensor]:
        """Normalise."""
        return [n(t.reshape(-1, self.features)).reshape(t.shape) for n, t in zip(self.norms, x, strict=True)]


@configured
class DWSNet(nn.Module):
    """A network whose inputs are the weights of MLPs: layers that commute with permutations of their hidden neurons, and ReLU.

    Paper: Navon, Shamsian, Achituve, Fetaya, Chechik and Maron, "Equivariant Architectures for Learning in Deep Weight Spaces",
    arXiv:2301.12780; code AvivNavon/DWSNets.

    Equation: see ``Equivariant`` and ``Invariant``. ``outputs=K`` gives K numbers of a network (its class, its accuracy), the same
    for every order of its neurons; without it the result is a change of each weight, in the order of the input's neurons.

    The layers have exactly as many free parameters as there are maps. (The authors' code has a bias in every block, so that several
    add up, and where the last layer has several neurons it leaves out the maps from the last but one matrix that tell
    them apart. Its default replaces pooling by self-attention in some blocks, which is not affine and is left out here.)
    The authors classify with batch normalisation, which is the default here, AdamW at 5e-3 with weight decay 5e-4, and weights
    standardised over the training set; ``space.statistics`` does not tell neurons of a layer apart.

    Cost for widths d and C features: C^2 multiply-adds for each weight and layer; parameters grow with the square of the
    first and last width.

    Args:
        widths: Neurons of each layer of the networks that are read, first and last included; at least one hidden layer.
        outputs: Numbers K; None for a change of the weights.
        channels: Features C of every weight between the layers.
        depth: Equivariant layers.
        inputs: Features of every weight in the input.
        pool: ``max`` or ``mean``.
        norm: Whether to normalise between the layers.
        scale: Factor of the initial weights of equivariant layers. Defaults to 1, and to 1e-4 for a change of the weights, as
            in the authors' code.

    Shapes: flat weights [B, P] (of each layer the matrix, row by row, then the bias; as ``parameters_to_vector`` gives them),
        or [B, P, inputs], to [B, K] or [B, P].

    Raises:
        ValueError: Fewer than three widths, a size below 1, an unknown pool, or weights of another network.

    Examples:
        >>> import torch
        >>> mlps = [torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)) for _ in range(5)]
        >>> space, weights = WeightSpace.of(*mlps)
        >>> weights.shape, DWSNet(space.widths, 10)(weights).shape, DWSNet(space.widths)(weights).shape
        (torch.Size([5, 51]), torch.Size([5, 10]), torch.Size([5, 51]))
    """

    config: dict[str, Any]
    spaces: ClassVar[type[WeightSpace]] = WeightSpace

    def __init__(
        self,
        widths: Sequence[int],
        outputs: int | None = None,
        *,
        channels: int = 32,
        depth: int = 3,
        inputs: int = 1,
        pool: str = "max",
        norm: bool = True,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"DWSNet: pool {pool!r}; expected one of {POOLS}.")
        if min(channels, depth, inputs, 1 if outputs is None else outputs) < 1:
            raise ValueError(
                f"DWSNet: channels {channels}, depth {depth}, inputs {inputs}, outputs {outputs}; expected at least 1."
            )
        self.space, self.inputs = self.spaces(widths), inputs
        scale = (1e-4 if outputs is None else 1.0) if scale is None else scale
        sizes = [inputs, *[channels] * (depth - 1), channels if outputs else 1]
        make = partial(Equivariant, self.space, pool=pool, scale=scale)
        self.layers = nn.ModuleList(make(i, o) for i, o in pairwise(sizes))
        self.norms = nn.ModuleList(Normalise(self.space, n) if norm else nn.Identity() for n in sizes[1:-1])
        self.head = Invariant(self.space, channels, outputs, pool=pool) if outputs else None

    @classmethod
    def for_task(cls, shape: DataShape, **options: Any) -> Self:
        """A network for a task whose inputs are flat weights; by default those of ``digit-fields``."""
        shape.require("DWSNet", "vector", shape.outputs if shape.outputs == "values" else "classes")
        widths = options.pop("widths", FIELDS)
        if (count := WeightSpace(widths).count) != shape.features:
            raise ValueError(
                f"DWSNet: widths {tuple(widths)} have {count} weights and the task gives {shape.features}. Pass the widths of the "
                "networks whose weights they are."
            )
        return cls(widths, shape.classes, **options)

    def forward(self, weights: Float[Tensor, "B P *C"]) -> Float[Tensor, "B K"]:
        """Read weights."""
        if (
            weights.ndim not in (2, 3)
            or weights.shape[1] != self.space.count
            or weights.shape[2:].numel() != self.inputs
        ):
            raise ValueError(
                f"DWSNet: weights {tuple(weights.shape)}; expected [batch, {self.space.count}]"
                + (f" with {self.inputs} features each" if self.inputs > 1 else "")
                + f", those of networks of widths {self.space.widths}."
            )  # fmt: skip
        x = self.layers[0](self.space.split(weights))
        for norm, layer in zip(self.norms, self.layers[1:], strict=True):
            x = layer([t.relu() for t in norm(x)])
        if self.head is None:
            return self.space.join(x)
        return self.head([t.relu() for t in x])


def _train() -> tuple[float, float]:
    """Squared error of a quantity of held-out networks after 60 steps, and that of the constant predictor."""
    space = WeightSpace((2, 4, 3))
    x = torch.randn(256, space.count)
    y = space.split(x)[0].amax(1).mean(1, keepdim=True)  # the largest incoming weight
    y = (y - y.mean()) / y.std()
    model = DWSNet(space.widths, 1, channels=8, depth=2)
    batches = (slice(32 * (n % 6), 32 * (n % 6) + 32) for n in range(60))
    fit(model, batches, lambda m, at: (m(x[at]) - y[at]).square().mean(), steps=60, lr=1e-2)
    with torch.no_grad():
        return float((model.eval()(x[192:]) - y[192:]).square().mean()), float(y[192:].var())


def _small(outputs: int | None = 3, **options: Any) -> DWSNet:
    return DWSNet((2, 3, 4, 2), outputs, channels=4, depth=2, scale=1.0, **options)


EXAMPLE = Example(
    make=_small,
    inputs=lambda: (torch.randn(3, 35),),
    train=_train,
    modes={"weights to weights": partial(_small, None), "affine": partial(_small, pool="mean", norm=False)},
)
