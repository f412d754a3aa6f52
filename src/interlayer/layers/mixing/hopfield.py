"""Modern Hopfield networks with continuous states, as functions, as layers and as a mixer of Transformers."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from interlayer.core.example import Example
from interlayer.core.mixer import Context, attend
from interlayer.core.parts import Linear, plain_linear


def energy(state: Float[Tensor, "*B S D"], stored: Float[Tensor, "*B N D"], beta: float) -> Float[Tensor, "*B S"]:
    """Energy of each state pattern (equation 2 of the paper): an update never raises it.

    ``E = -lse(beta, X xi) + xi'xi / 2 + log(N) / beta + M^2 / 2``, with ``lse(b, z) = log(sum exp(b z)) / b`` and M the
    norm of the longest stored pattern.
    """
    lse = (beta * state @ stored.transpose(-1, -2)).logsumexp(-1) / beta
    longest = stored.square().sum(-1).amax(-1, keepdim=True)
    return -lse + state.square().sum(-1) / 2 + math.log(stored.shape[-2]) / beta + longest / 2


def update(state: Float[Tensor, "*B S D"], stored: Float[Tensor, "*B N D"], beta: float) -> Float[Tensor, "*B S D"]:
    """One update (equation 3): ``xi_new = X' softmax(beta X xi)``. It costs S N D multiply-adds, as attention does."""
    return (beta * state @ stored.transpose(-1, -2)).softmax(-1) @ stored


def retrieve(
    state: Float[Tensor, "*B S D"],
    stored: Float[Tensor, "*B N D"],
    beta: float,
    *,
    steps: int = 100,
    tolerance: float = 1e-6,
) -> Float[Tensor, "*B S D"]:
    """Update until no pattern moves by more than ``tolerance``, or ``steps`` times.

    Examples:
        >>> stored = torch.eye(3)
        >>> retrieve(torch.tensor([[0.9, 0.2, 0.1]]), stored, beta=50.0).round()
        tensor([[1., 0., 0.]])
    """
    for _ in range(steps):
        new = update(state, stored, beta)
        moved = (new - state).abs().max()
        state = new
        if moved <= tolerance:
            break
    return state


class Association(nn.Module):
    """State patterns retrieve stored patterns in a learned space; the base of all Hopfield layers.

    Args:
        width: Features D of the patterns.
        heads: Associative spaces H of width D / H; divides ``width``.
        steps: Number of updates; the last one reads the value patterns.
        beta: Inverse temperature. Defaults to 1 / sqrt(D / H).
        learn_beta: Whether each head learns its own.
        normalise: Whether state patterns and stored patterns are layer-normalised first.
        linear: Called with ``inputs=, outputs=``.
    """

    def __init__(
        self,
        width: int,
        heads: int = 1,
        *,
        steps: int = 1,
        beta: float | None = None,
        learn_beta: bool = False,
        normalise: bool = True,
        linear: Linear = plain_linear,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if heads < 1 or width % heads:
            raise ValueError(f"{name}: width {width} is not a multiple of heads {heads}, or heads is below 1.")
        if steps < 1 or (beta is not None and beta <= 0):
            raise ValueError(f"{name}: steps {steps} must be at least 1 and beta {beta} above 0.")
        self.heads, self.steps, self.width = heads, steps, width
        initial = torch.full((heads, 1, 1), beta or (width // heads) ** -0.5)
        self.beta = nn.Parameter(initial, requires_grad=learn_beta)
        self.state_norm = nn.LayerNorm(width) if normalise else nn.Identity()
        self.stored_norm = nn.LayerNorm(width) if normalise else nn.Identity()
        self.state_map = linear(inputs=width, outputs=width)
        self.stored_map = linear(inputs=width, outputs=2 * width)
        self.out = linear(inputs=width, outputs=width)

    def split(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B H S K"]:
        """Split the features into the heads' spaces."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def project(self, state: Tensor, stored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """State patterns, stored patterns and what is read from them, in the heads' spaces."""
        for given in (state, stored):
            if given.ndim != 3 or given.shape[-1] != self.width:
                raise ValueError(
                    f"{type(self).__name__}: patterns {tuple(given.shape)}; expected [batch, count, {self.width}]."
                )
        k, v = self.stored_map(self.stored_norm(stored)).chunk(2, -1)
        return self.split(self.state_map(self.state_norm(state))), self.split(k), self.split(v)

    def settle(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None) -> Tensor:
        """Run all updates and join the heads' spaces."""
        beta = self.beta.to(q.dtype)
        for _ in range(self.steps - 1):
            q = attend(beta * q, k, k, causal=causal, mask=mask, scale=1.0)
        y = attend(beta * q, k, v, causal=causal, mask=mask, scale=1.0)
        return self.out(y.transpose(1, 2).flatten(2))

    def associate(
        self, state: Float[Tensor, "B S D"], stored: Float[Tensor, "B N D"], mask: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B S D"]:
        """What each state pattern retrieves; ``mask`` is True at real stored patterns."""
        return self.settle(*self.project(state, stored), mask=mask)


class Hopfield(Association):
    """Attention read as the update of a Hopfield network: each token is a state pattern that settles among all tokens.

    Paper: Ramsauer et al., "Hopfield Networks is All You Need", arXiv:2008.02217.

    Equation (10): ``Z = softmax(beta R W_Q (Y W_K)') Y W_V``, with state patterns R and stored patterns Y layer-normalised;
    with more than one step, the state is first updated ``steps - 1`` times by ``xi <- softmax(beta xi K') K``. One step
    with the default beta and without normalisation is scaled dot-product attention. Cost: ``steps`` times attention's.

    Args:
        width: Features D.
        heads: Associative spaces H.
        causal: Whether a token associates only with itself and earlier ones.
        steps: Number of updates.
        beta: Inverse temperature. Defaults to 1 / sqrt(D / H).
        learn_beta: Whether each head learns its own.
        normalise: Whether patterns are layer-normalised first.
        linear: Called with ``inputs=, outputs=``.

    Shapes: [B, S, D] to [B, S, D]; ``associate`` takes state [B, S, D] and stored [B, N, D].

    Raises:
        ValueError: Heads that do not divide the width, steps below 1, beta not above 0, patterns of another shape.

    Examples:
        >>> layer = Hopfield(width=16, heads=2, steps=3)
        >>> layer(torch.randn(4, 5, 16)).shape
        torch.Size([4, 5, 16])
        >>> layer.associate(torch.randn(4, 5, 16), torch.randn(4, 9, 16)).shape
        torch.Size([4, 5, 16])
    """

    offers: ClassVar[frozenset[str]] = frozenset({"cache", "rotate"})

    def __init__(
        self,
        width: int,
        heads: int = 1,
        *,
        causal: bool = False,
        steps: int = 1,
        beta: float | None = None,
        learn_beta: bool = False,
        normalise: bool = True,
        linear: Linear = plain_linear,
    ) -> None:
        super().__init__(
            width, heads, steps=steps, beta=beta, learn_beta=learn_beta, normalise=normalise, linear=linear
        )
        self.causal = causal

    def associate(
        self, state: Float[Tensor, "B S D"], stored: Float[Tensor, "B N D"], mask: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B S D"]:
        """What each state pattern retrieves from other stored patterns; ``mask`` is True at real ones."""
        if self.causal:
            raise ValueError(
                "Hopfield: causal=True has no effect on separate stored patterns, which have no order; build another layer "
                "without it."
            )
        return super().associate(state, stored, mask)

    def forward(self, x: Float[Tensor, "B S D"], context: Context | None = None) -> Float[Tensor, "B S D"]:
        """Update every token's state among all tokens."""
        context = context or Context()
        cache = context.cache
        q, k, v = self.project(x, x)
        if context.position is not None:
            q, k = context.position.rotate(q, k, cache.length if cache is not None else 0)
        if cache is not None:
            k, v = cache.extend("k", context.layer, k), cache.extend("v", context.layer, v)
        return self.settle(q, k, v, causal=self.causal, mask=context.mask)


class HopfieldPooling(Association):
    """A bag of patterns read by learned state patterns: [B, N, D] to [B, Q, D].

    Args:
        width: Features D.
        heads: Associative spaces.
        queries: Learned state patterns Q.
        **options: ``steps``, ``beta``, ``learn_beta``, ``normalise``, ``linear``: see ``Association``.

    Examples:
        >>> HopfieldPooling(width=8)(torch.randn(3, 100, 8)).shape
        torch.Size([3, 1, 8])
    """

    def __init__(self, width: int, heads: int = 1, *, queries: int = 1, **options: Any) -> None:
        super().__init__(width, heads, **options)
        if queries < 1:
            raise ValueError(f"HopfieldPooling: queries {queries} must be at least 1.")
        self.queries = nn.Parameter(torch.randn(1, queries, width) * 0.02)

    def forward(self, bag: Float[Tensor, "B N D"], mask: Bool[Tensor, "B N"] | None = None) -> Float[Tensor, "B Q D"]:
        """What the learned state patterns retrieve from each bag."""
        return self.associate(self.queries.expand(bag.shape[0], -1, -1), bag, mask)


class HopfieldLayer(Association):
    """Inputs look up a memory of learned prototypes: [B, S, D] to [B, S, D].

    Args:
        width: Features D.
        heads: Associative spaces.
        prototypes: Learned stored patterns N.
        **options: ``steps``, ``beta``, ``learn_beta``, ``normalise``, ``linear``: see ``Association``.

    Examples:
        >>> HopfieldLayer(width=8, prototypes=20)(torch.randn(3, 5, 8)).shape
        torch.Size([3, 5, 8])
    """

    def __init__(self, width: int, heads: int = 1, *, prototypes: int = 64, **options: Any) -> None:
        super().__init__(width, heads, **options)
        if prototypes < 1:
            raise ValueError(f"HopfieldLayer: prototypes {prototypes} must be at least 1.")
        self.prototypes = nn.Parameter(torch.randn(1, prototypes, width))

    def forward(self, x: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        """What each input retrieves from the prototypes."""
        return self.associate(x, self.prototypes.expand(x.shape[0], -1, -1))


EXAMPLE = Example(
    make=lambda: Hopfield(8, heads=2, steps=2, causal=True),
    inputs=lambda: (torch.randn(2, 6, 8),),
    odd=lambda: (torch.randn(3, 7, 8),),
    axis=1,
    causal=True,
    modes={
        "one step, learned beta": lambda: Hopfield(8, heads=2, learn_beta=True, normalise=False),
        "pooling": lambda: HopfieldPooling(8, 2, queries=3),
        "prototypes": lambda: HopfieldLayer(8, 2, prototypes=5),
    },
)
