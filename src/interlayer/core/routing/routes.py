"""Which expert sees which token: token choice and expert choice, with capacities; and the losses of a router."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interlayer.core import aside


@dataclass(frozen=True)
class Routed:
    """Pairs of a token and an expert, sorted by expert.

    Attributes:
        tokens: The token of each pair, an index into the N = G T tokens of all groups.
        gates: The weight of each pair.
        counts: Pairs of each expert; they sum to P.
        asked: Tokens of each group that chose each expert, kept or not.
        probs: The router's probabilities.
        dropped: Token choice: pairs that found their expert full. Expert choice: tokens that no expert chose.
    """

    tokens: Int[Tensor, " P"]
    gates: Float[Tensor, " P"]
    counts: Int[Tensor, " E"]
    asked: Int[Tensor, "G E"]
    probs: Float[Tensor, "G T E"]
    dropped: Int[Tensor, ""]

    @property
    def size(self) -> int:
        """Number of tokens N."""
        return self.probs.shape[0] * self.probs.shape[1]


@torch.compiler.disable
def route(
    logits: Float[Tensor, "*G T E"],
    k: int = 1,
    capacity: int | None = None,
    by: Literal["token", "expert"] = "token",
    *,
    normalise: bool = False,
) -> Routed:
    """Choose experts for tokens by the softmax of the router's logits.

    ``token``: each token takes its k likeliest experts (Shazeer et al., arXiv:1701.06538). An expert takes at most ``capacity`` tokens
    of a group: all first choices before all second ones, in the order of the tokens (Lepikhin et al., arXiv:2006.16668). So with k = 1 a
    later token never changes an earlier one.

    ``expert``: each expert takes the k T / E tokens of a group that like it most (Zhou et al., arXiv:2202.09368). A choice depends
    on later tokens, so this is not causal.

    Reports the metrics ``routing dropped`` (share of the pairs, or of the tokens where experts choose) and ``routing busiest``
    (tokens of the most wanted expert as a multiple of the mean) through ``core.aside``.

    Args:
        logits: Of the router. Each group of T tokens has capacities of its own.
        k: Experts of a token; for expert choice on average.
        capacity: Most tokens of a group for one expert. Defaults to no limit.
        by: Who chooses.
        normalise: Divide the gates of a token by their sum over its k choices, before capacities. Token choice only.

    Raises:
        ValueError: k that is not in 1..E, a capacity below 1, logits that are NaN or infinite, fewer than two dimensions, or an
            option that has no effect.

    Examples:
        >>> routed = route(torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), capacity=1)
        >>> routed.tokens.tolist(), routed.counts.tolist(), int(routed.dropped)
        ([0, 2], [1, 1], 1)
    """
    if logits.ndim < 2 or not logits.shape[-1]:
        raise ValueError(f"route: logits {tuple(logits.shape)}; expected [..., tokens, experts], at least one expert.")
    experts = logits.shape[-1]
    if not 1 <= k <= experts:
        raise ValueError(f"route: k={k}; expected 1 to {experts}, the number of experts.")
    if capacity is not None and capacity < 1:
        raise ValueError(
            f"route: capacity={capacity}; expected at least 1 token for each expert, or None for no limit."
        )
    if by not in ("token", "expert"):
        raise ValueError(f"route: by={by!r} is not one of 'token', 'expert'.")
    if by == "expert" and (capacity is not None or normalise):
        raise ValueError("route: by='expert' takes k T / E tokens for each expert; leave out capacity and normalise.")
    probs = logits.softmax(-1)[None].flatten(0, -3)
    if bad := int(probs.isnan().any(-1).sum()):
        raise ValueError(
            f"route: the logits of {bad} of {probs.shape[0] * probs.shape[1]} tokens are NaN or infinite; expected numbers. Check "
            "the router's input; lower the learning rate, or compute the router in float32."
        )
    routed = _by_expert(probs, k) if by == "expert" else _by_token(probs, k, capacity, normalise)
    pairs = routed.size * (k if by == "token" else 1)
    aside.metric("routing dropped", routed.dropped / max(pairs, 1))
    load = routed.asked.sum(0).to(probs.dtype)
    aside.metric("routing busiest", load.max() / load.mean().clamp(min=1e-9))
    return routed


def _by_token(probs: Tensor, k: int, capacity: int | None, normalise: bool) -> Routed:
    groups, length, experts = probs.shape
    gates, chosen = probs.max(-1, keepdim=True) if k == 1 else probs.topk(k)
    if normalise:
        gates = gates / gates.sum(-1, keepdim=True)
    group = torch.arange(groups, device=probs.device)[:, None, None]
    keys = (chosen * groups + group).permute(2, 0, 1).flatten()  # first choices first
    keys, order = keys.sort(stable=True)
    asked = keys.bincount(minlength=experts * groups)
    counts = asked
    if capacity is not None:
        rank = torch.arange(len(keys), device=keys.device) - (asked.cumsum(0) - asked)[keys]
        order, counts = order[rank < capacity], asked.clamp(max=capacity)
    return Routed(
        order % max(groups * length, 1),
        gates.permute(2, 0, 1).flatten()[order],
        counts.view(experts, groups).sum(1),
        asked.view(experts, groups).T,
        probs,
        asked.sum() - counts.sum(),
    )


def _by_expert(probs: Tensor, k: int) -> Routed:
    groups, length, experts = probs.shape
    size = min(length, max(1, k * length // experts))
    gates, chosen = probs.permute(2, 0, 1).topk(size)  # [E, G, size]
    tokens = (chosen + length * torch.arange(groups, device=probs.device)[:, None]).flatten()
    seen = torch.zeros(groups * length, dtype=torch.bool, device=probs.device).index_fill(0, tokens, True)
    counts = tokens.new_full((experts,), groups * size)
    return Routed(tokens, gates.flatten(), counts, tokens.new_full((groups, experts), size), probs, (~seen).sum())


def balance(routed: Routed) -> Float[Tensor, ""]:
    """The loss that balances experts: ``E sum_i f_i P_i``, the mean over groups (equation 4 of Fedus et al., arXiv:2101.03961).

    ``f_i`` is the share of choices that fall on expert i, before capacities, and ``P_i`` its mean probability. It is 1 where both are
    uniform. Weight it and report it: ``aside.loss(0.01 * balance(routed))``.

    Examples:
        >>> routed = route(torch.tensor([[9.0, 0.0], [0.0, 9.0]]))
        >>> round(balance(routed).item(), 4)
        1.0
    """
    shares = routed.asked / routed.asked.sum(-1, keepdim=True).clamp(min=1)
    groups, length, experts = routed.probs.shape
    means = routed.probs.sum(1) / max(length, 1)
    return experts * (shares.to(means.dtype) * means).sum() / max(groups, 1)


def z_loss(logits: Float[Tensor, "*B E"]) -> Float[Tensor, ""]:
    """The loss that keeps logits small: the mean of ``logsumexp(logits)^2`` (equation 5 of Zoph et al., arXiv:2202.08906).

    Examples:
        >>> round(z_loss(torch.zeros(4, 1)).item(), 4)
        0.0
    """
    return logits.logsumexp(-1).square().sum() / max(logits[..., 0].numel(), 1)
