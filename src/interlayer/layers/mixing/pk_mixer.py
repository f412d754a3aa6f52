"""Mixing layers as wide, sparse matrices: the permuted-Kronecker family, and Mixers built from it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.config import configured
from interlayer.core.data import DataShape
from interlayer.core.example import Example
from interlayer.core.parts import Patches

ORDERS = ("channels", "tokens", "random")
VARIANTS = ("normal", "simple")


def commutation(rows: int, columns: int) -> Tensor:
    """The permutation J that takes a flattened [rows, columns] to its flattened transpose: ``x.T.flatten() = x.flatten()[J]``."""
    return torch.arange(rows * columns).view(rows, columns).T.flatten()


class PermutedKronecker(nn.Module):
    """Apply one small matrix to every group of a permuted vector: ``y = J_2' (I_n (x) W) J_1 x``.

    Paper: Hayase and Karakida, "Understanding MLP-Mixer as a Wide and Sparse MLP", arXiv:2306.01470.

    Equation: for features X [S, C] in one vector of m = S C, channel mixing ``X W'`` is ``I_S (x) W`` and token mixing ``V X`` is
    ``J' (I_C (x) V) J`` with the commutation J. Both are the same layer with other permutations; ``random`` draws J_1 and
    J_2 once. As a matrix (``dense``) it has n outputs x n inputs entries, of which a share ``1 / n`` is not zero.

    Cost: n inputs outputs multiply-adds; a dense layer takes n times as many.

    Args:
        copies: Number of groups n.
        inputs: Columns of W.
        outputs: Rows of W.
        order: Which entries form a group: ``channels`` (neighbours), ``tokens`` (every n-th) or ``random``.
        bias: Whether to add a learned offset, shared by the groups.

    Shapes: [..., n inputs] to [..., n outputs].

    Raises:
        ValueError: Unknown order, sizes below 1, or an input with another number of features.

    Examples:
        >>> import torch
        >>> x, layer = torch.randn(2, 5 * 3), PermutedKronecker(3, 5, 4, order="tokens", bias=False)
        >>> y = (layer.weight @ x.view(2, 5, 3)).flatten(1)  # token mixing of 5 tokens with 3 channels
        >>> torch.allclose(layer(x), y, atol=1e-6)
        True
    """

    before: Tensor | None
    after: Tensor | None

    def __init__(self, copies: int, inputs: int, outputs: int, *, order: str = "channels", bias: bool = True) -> None:
        super().__init__()
        if order not in ORDERS or min(copies, inputs, outputs) < 1:
            raise ValueError(
                f"PermutedKronecker: order {order!r}, copies {copies}, inputs {inputs}, outputs {outputs}; "
                f"expected one of {ORDERS} and sizes of at least 1."
            )
        self.copies, self.inputs, self.outputs, self.order = copies, inputs, outputs, order
        bound = inputs**-0.5
        self.weight = nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound) * 3**0.5)
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        chance = order == "random"
        self.register_buffer("before", torch.randperm(copies * inputs) if chance else None)
        self.register_buffer("after", torch.randperm(copies * outputs) if chance else None)

    def forward(self, x: Float[Tensor, "*B M"]) -> Float[Tensor, "*B N"]:
        """Permute, apply the matrix to every group, permute back."""
        if x.shape[-1] != self.copies * self.inputs:
            raise ValueError(f"PermutedKronecker: input {tuple(x.shape)}; expected [..., {self.copies * self.inputs}].")
        if self.order == "tokens":
            groups = x.unflatten(-1, (self.inputs, self.copies)).transpose(-1, -2)
        else:
            groups = (x if self.before is None else x[..., self.before]).unflatten(-1, (self.copies, self.inputs))
        y = nn.functional.linear(groups, self.weight, self.bias)
        if self.order == "tokens":
            return y.transpose(-1, -2).flatten(-2)
        return y.flatten(-2) if self.after is None else y.flatten(-2)[..., self.after]

    def dense(self) -> Float[Tensor, "N M"]:
        """The layer as one matrix, without its bias: ``J_2' (I (x) W) J_1`` written out."""
        matrix = torch.kron(torch.eye(self.copies, device=self.weight.device, dtype=self.weight.dtype), self.weight)
        if self.order == "channels":
            return matrix
        if self.order == "random":
            before, after = self.before, self.after
        else:
            before, after = commutation(self.inputs, self.copies), commutation(self.copies, self.outputs)
        assert before is not None and after is not None
        return matrix[after][:, before.argsort()]


def effective_width(tokens: int, channels: int) -> int:
    """Units of the wide MLP that a mixing layer is: m = S C."""
    return tokens * channels


def density(tokens: int, channels: int) -> float:
    """Share of that MLP's weights that are not zero, token and channel mixing on average: ``(1 / S + 1 / C) / 2``."""
    return (1 / tokens + 1 / channels) / 2


@configured
class PKMixer(nn.Module):
    """A Mixer whose layers are permuted-Kronecker: the usual blocks or the simplest ones, with ordered or random groups.

    ``normal``: pre-normed residual branches of two layers each, across tokens and across channels, as in the MLP-Mixer.
    ``simple``: ``x <- act(mix x)``, alternating between tokens and channels, and nothing else; this is a wide MLP with sparse
    weights, whose dense twin is ``wide()``. With ``random`` groups (RP-Mixer) the layers ignore tokens and channels.

    Args:
        channels: Channels of the image.
        image: Height and width in pixels, or one number.
        patch: Side of a patch in pixels.
        classes: Number of classes K.
        tokens: Tokens S to which patches are mapped. Defaults to the number of patches.
        width: Channels C of a token.
        depth: Blocks, each with one mixing across tokens and one across channels.
        hidden: Hidden features of ``normal``, as a multiple of S and of C. Defaults to 2; ``simple`` has none.
        variant: ``normal`` or ``simple``.
        random: Whether groups are random.

    Shapes: [B, C, H, W] to [B, K].

    Raises:
        ValueError: Unknown variant; a patch that does not divide the image.

    Examples:
        >>> import torch
        >>> net = PKMixer(1, 8, patch=2, classes=10, width=12, depth=2, variant="simple", random=True)
        >>> net(torch.zeros(3, 1, 8, 8)).shape, effective_width(16, 12)
        (torch.Size([3, 10]), 192)
    """

    def __init__(
        self,
        channels: int = 3,
        image: int | tuple[int, int] = 32,
        *,
        patch: int = 4,
        classes: int = 10,
        tokens: int | None = None,
        width: int = 32,
        depth: int = 4,
        hidden: float | None = None,
        variant: str = "normal",
        random: bool = False,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"PKMixer: variant {variant!r} is not one of {VARIANTS}.")
        if variant == "simple" and hidden is not None:
            raise ValueError(f"PKMixer: hidden={hidden} has no effect on variant 'simple'; leave it out.")
        hidden = 2.0 if hidden is None else hidden
        self.patches = Patches(channels, image, patch, width)
        count = self.patches.count
        s, c = tokens or count, width
        self.variant, self.tokens, self.width = variant, s, width
        across, along = ("random", "random") if random else ("tokens", "channels")
        self.arrange = PermutedKronecker(c, count, s, order="tokens", bias=False) if s != count else None
        hidden_sizes = {"tokens": [s], "channels": [c]}
        if variant == "normal":
            hidden_sizes = {"tokens": [s, round(hidden * s), s], "channels": [c, round(hidden * c), c]}
        else:
            hidden_sizes = {"tokens": [s, s], "channels": [c, c]}
        self.branches = nn.ModuleList()
        for _ in range(depth):
            for order, sizes, copies in ((across, hidden_sizes["tokens"], c), (along, hidden_sizes["channels"], s)):
                layers = [PermutedKronecker(copies, a, b, order=order) for a, b in pairwise(sizes)]
                self.branches.append(nn.ModuleList(layers))
        norms = depth * 2 + 1 if variant == "normal" else 0
        self.norms = nn.ModuleList(nn.LayerNorm(c) for _ in range(norms))
        self.head = nn.Linear(c, classes)

    @classmethod
    def for_task(cls, shape: DataShape, **options: Any) -> Self:
        """A Mixer for a task of images and classes."""
        shape.require("PKMixer", "image", "classes")
        options = {"patch": 2 if shape.height <= 16 else 4, **options}
        return cls(shape.channels, (shape.height, shape.width), classes=shape.classes, **options)

    def forward(self, image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Logits of the classes."""
        x = self.patches(image).flatten(1)
        x = x if self.arrange is None else self.arrange(x)
        x_BSC = self.mix(x).unflatten(1, (self.tokens, self.width))
        return self.head((self.norms[-1](x_BSC) if self.norms else x_BSC).mean(1))

    def mix(self, x: Float[Tensor, "B M"]) -> Float[Tensor, "B M"]:
        """All mixing layers on the one wide vector."""
        for number, branch in enumerate(self.branches):
            y = x
            if self.norms:
                y = self.norms[number](x.unflatten(1, (self.tokens, self.width))).flatten(1)
            layers = list(branch.children())
            y = layers[0](y)
            if self.variant == "simple":
                x = nn.functional.gelu(y)
                continue
            x = x + layers[1](nn.functional.gelu(y))
        return x

    def wide(self) -> nn.Sequential:
        """The mixing layers of a ``simple`` net as an ordinary MLP of dense matrices; the same function as ``mix``."""
        if self.variant != "simple":
            raise ValueError(
                "PKMixer: only variant='simple' is a plain wide MLP; 'normal' has norms and residuals between."
            )
        parts: list[nn.Module] = []
        for branch in self.branches:
            layer = next(branch.children())
            assert isinstance(layer, PermutedKronecker) and layer.bias is not None
            line = nn.Linear(layer.copies * layer.inputs, layer.copies * layer.outputs).to(layer.weight)
            with torch.no_grad():
                line.weight.copy_(layer.dense())
                line.bias.copy_(layer(torch.zeros_like(line.weight[0])))
            parts += [line, nn.GELU()]
        return nn.Sequential(*parts)


EXAMPLE = Example(
    make=lambda: PermutedKronecker(3, 5, 4, order="random"),
    inputs=lambda: (torch.randn(2, 15),),
    odd=lambda: (torch.randn(3, 1, 15),),
    modes={order: lambda order=order: PermutedKronecker(3, 5, 4, order=order) for order in ORDERS},
)
