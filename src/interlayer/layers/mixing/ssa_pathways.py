"""Stochastically subsampled self-attention: every step trains a random set of pathways through dense attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.example import Example
from interlayer.core.mixer import Attention, Context, attend
from interlayer.core.parts import Linear, plain_linear
from interlayer.core.stream import QKV
from interlayer.core.taps import eval_mode

SAMPLERS = ("unbiased", "local")


class SSA(Attention):
    """Self-attention that, in training, lets each token see a random subset of the others, drawn again in each pass and layer.

    Paper: Hussain, Zaki and Subramanian, "The Information Pathways Hypothesis: Transformers are Dynamic Self-Ensembles",
    arXiv:2306.01705.

    Equation: ``y_i = softmax(q_i K_g' / sqrt(K)) V_g``, where g is the group of token i. With ``n = round(1 / sampling)`` the
    tokens are put in a random order, which is cut into groups of ``m = ceil(S / n)``; if m does not divide S, keys of the
    group before complete the last one. The order is

    - ``unbiased``: a uniform permutation, so that i sees itself and each other token with probability (m - 1) / (S - 1);
    - ``local``: by ``i + spread m N(0, 1) + u`` on a ring of length S with one random shift u: windows with moving borders
      whose tokens are shuffled with near ones, so that near tokens meet more often than far ones.

    Groups keep the order of time, so that causal attention is causal attention within each group: no mask over S^2
    exists in either form, and no token is without a key. A step costs S^2 / n scores instead of S^2, three gathers of S
    rows, and one back. All heads and sequences of a batch share one draw from torch's global generator.

    In evaluation it is dense attention, unless ``resample`` is set. Towards the end of training the sampling rises to dense,
    geometrically (1/8, 1/4, 1/2, 1 take equally long); training loops say how far they are (``core.schedule``). ``ensemble``
    averages predictions over fresh samples. Pathways cannot be drawn token by token, so decoding with a cache is dense.

    No reference implementation is public: the authors' repository shamim-hussain/ssa holds a page with figures, which names
    locally biased sampling and a short fine-tuning step after sparse training. The samplers, their noise and the gradual rise are
    this project's. Here queries are grouped together with keys, which gives the causal form without a mask.

    Args:
        width: Features D.
        heads: Query heads.
        sampling: Share of the tokens that each one sees in training, rounded to the nearest 1 / integer.
        sampler: ``"unbiased"`` or ``"local"``.
        spread: Standard deviation of a token's position in ``local``, in groups. Defaults to
            1/2; 0 gives shifted windows.
        rise: Shares of the training at which the sampling begins to rise and at which it is dense. ``(1, 1)``: never.
        kv_heads: Key-value heads, if fewer.
        causal: Whether a token sees only itself and earlier ones.
        values: Whether this sublayer projects values of its own.
        linear: Called with ``inputs=, outputs=``.

    Shapes: [B, S, D] to [B, S, D].

    Raises:
        ValueError: ``sampling`` outside (0, 1], an unknown sampler, a negative spread, a ``rise`` out of order; an input or
            mask of another shape; a cache while pathways are sampled.

    Examples:
        >>> layer = SSA(width=16, heads=2, sampling=1 / 4, causal=True)
        >>> layer(torch.randn(3, 11, 16)).shape  # groups of 3
        torch.Size([3, 11, 16])
        >>> layer.deal(11, "cpu")[0].shape
        torch.Size([4, 3])
    """

    offers: ClassVar[frozenset[str]] = Attention.offers - {"bias"}

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        sampling: float = 0.25,
        sampler: str = "local",
        spread: float | None = None,
        rise: tuple[float, float] = (0.7, 0.9),
        kv_heads: int | None = None,
        causal: bool = False,
        values: bool = True,
        linear: Linear = plain_linear,
    ) -> None:
        super().__init__(width, heads, kv_heads=kv_heads, causal=causal, values=values, linear=linear)
        _part(sampling)
        if sampler not in SAMPLERS or (spread is not None and spread < 0):
            raise ValueError(f"SSA: sampler {sampler!r}, spread {spread}; expected one of {SAMPLERS} and at least 0.")
        if spread is not None and sampler != "local":
            raise ValueError(
                f"SSA: spread {spread} has no effect on sampler {sampler!r}; leave it out, or take 'local'."
            )
        if not 0 <= rise[0] <= rise[1] <= 1:
            raise ValueError(f"SSA: rise {rise}; expected 0 <= begin <= dense <= 1.")
        self.sampling = self.current = sampling  # as built, and as risen so far
        self.rise = tuple(rise)
        self.sampler, self.spread, self.resample = sampler, 0.5 if spread is None else spread, False

    def progress(self, share: float) -> None:
        """Set the sampling for this point of the training."""
        begin, dense = self.rise
        risen = float(begin < 1) if share >= dense else max(0.0, share - begin) / max(dense - begin, 1e-9)
        self.current = self.sampling ** (1 - risen)

    def deal(self, length: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Tokens of each group in the order of time, [groups, m], and the index of each token's query among them, [length]."""
        size = -(-length // round(1 / self.current))
        if self.sampler == "unbiased":
            order = torch.randperm(length, device=device)
        else:
            noise = torch.randn(length, device=device, dtype=torch.float)
            shift = length * torch.rand((), device=device, dtype=torch.float)
            order = ((torch.arange(length, device=device) + self.spread * size * noise + shift) % length).argsort()
        own = torch.arange(0, length, size, device=device)[:, None]
        rank = own.clamp(max=length - size) + torch.arange(size, device=device)
        token, at = order[rank].sort(-1)
        # The last group repeats tokens of the one before; there they are keys only.
        asks = torch.where((rank >= own).gather(1, at), token, length)
        return token, asks.flatten().argsort()[:length]

    @property
    def sampled(self) -> bool:
        """Whether the next pass samples pathways."""
        return (self.training or self.resample) and round(1 / self.current) > 1

    def forward(self, x: Float[Tensor, "B S D"] | QKV, context: Context | None = None) -> Float[Tensor, "B S D"]:
        """Let every token read from the others, or from those of its group."""
        for part in x if isinstance(x, QKV) else (x,):
            if part.ndim != 3 or part.shape[-1] != self.heads * self.head_width:
                raise ValueError(
                    f"SSA: input {tuple(part.shape)}; expected [batch, sequence, {self.heads * self.head_width}]."
                )
        if self.sampled and context is not None and context.cache is not None:
            raise ValueError(
                "SSA: a cache while pathways are sampled over whole sequences. Decode after model.eval() and with resample off."
            )
        return super().forward(x, context)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """Dense, or within the groups of a fresh sample."""
        if not (self.sampled and q.shape[-2]):
            return super().mix(q, k, v, mask)
        batch, length = q.shape[0], q.shape[-2]
        if mask is not None and (mask.shape != (batch, length) or mask.dtype != torch.bool):
            raise ValueError(f"SSA: mask {tuple(mask.shape)} {mask.dtype}; expected bool {(batch, length)}.")
        token, asks = self.deal(length, q.device)

        def groups(x_BHSK: Tensor) -> Tensor:
            x_BSHK = x_BHSK.transpose(1, 2).index_select(1, token.flatten())
            return x_BSHK.unflatten(1, token.shape).flatten(0, 1).transpose(1, 2)

        mask = None if mask is None else mask[:, token].flatten(0, 1)
        y = attend(groups(q), groups(k), groups(v), causal=self.causal, mask=mask).transpose(1, 2)
        return y.unflatten(0, (-1, len(token))).flatten(1, 2).index_select(1, asks).transpose(1, 2)


def _part(sampling: float) -> None:
    if not 0 < sampling <= 1:
        raise ValueError(f"SSA: sampling {sampling}; expected a share above 0 and at most 1.")


def layers(model: nn.Module) -> list[SSA]:
    """The model's subsampled attention layers.

    Raises:
        ValueError: It has none.
    """
    found = [m for m in model.modules() if isinstance(m, SSA)]
    if not found:
        raise ValueError(f"ssa-pathways: {type(model).__name__} has no SSA layer; build it with mixer='ssa-pathways'.")
    return found


@contextmanager
def resampled(model: nn.Module, sampling: float | None = None) -> Iterator[None]:
    """Evaluate a model with pathways sampled again in each pass; a context manager.

    Args:
        model: Has SSA layers.
        sampling: Replaces each layer's own.

    Raises:
        ValueError: No SSA layer, or a sampling outside (0, 1].
    """
    if sampling is not None:
        _part(sampling)
    before = [(layer, layer.current, layer.resample) for layer in layers(model)]
    try:
        for layer, _, _ in before:
            layer.current, layer.resample = layer.sampling if sampling is None else sampling, True
        with eval_mode(model):
            yield
    finally:
        for layer, current, resample in before:
            layer.current, layer.resample = current, resample


@torch.no_grad()
def ensemble(
    model: nn.Module,
    *inputs: Tensor,
    members: int = 8,
    sampling: float | None = None,
    predict: Callable[[Tensor], Tensor] = lambda out: out.softmax(-1),
) -> Tensor:
    """Mean prediction over ``members`` samples of pathways: one model, that many passes.

    Args:
        model: Has SSA layers.
        *inputs: What the model takes.
        members: Number of passes.
        sampling: Replaces each layer's own.
        predict: Maps the model's output to what is averaged. Defaults to probabilities.

    Raises:
        ValueError: No SSA layer, no member, or a sampling outside (0, 1].

    Examples:
        >>> layer = SSA(width=8, heads=2)
        >>> ensemble(layer, torch.randn(2, 9, 8), members=4).sum(-1).allclose(torch.ones(2, 9))
        True
    """
    if members < 1:
        raise ValueError(f"ensemble: members {members}; expected at least 1.")
    with resampled(model, sampling):
        total = predict(model(*inputs))
        for _ in range(members - 1):
            total = total + predict(model(*inputs))
    return total / members


def _resampled() -> SSA:
    layer = SSA(8, 2)
    layer.resample = True
    return layer


EXAMPLE = Example(
    make=lambda: SSA(8, 2, causal=True),
    inputs=lambda: (torch.randn(2, 6, 8),),
    odd=lambda: (torch.randn(3, 7, 8),),
    axis=1,
    causal=True,
    modes={
        "unbiased": lambda: SSA(8, 2, sampler="unbiased", kv_heads=1),
        "resampled in evaluation": _resampled,
    },
)
