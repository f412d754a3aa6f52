"""Switch Transformers: a feed-forward layer of many experts, of which each token meets one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core import aside
from interlayer.core.example import Example
from interlayer.core.routing import Routed, balance, combine, dispatch, exchange, grouped, route, share


class Switch(nn.Module):
    """Send each token to one of E feed-forward experts: E times the parameters at the cost of one expert.

    Paper: Fedus, Zoph and Shazeer, "Switch Transformers: Scaling to Trillion Parameter Models with Simple and Efficient Sparsity",
    arXiv:2101.03961.

    Equation: ``p(x) = softmax(W_r x)`` (1) and ``y = p_i(x) E_i(x)`` with ``i = argmax p(x)`` (2). An expert takes at most ``T / E``
    times the capacity factor of a sequence's T tokens (3), the earlier ones first; a later one gets zeros, and the residual connection
    carries it on. The loss ``balance E sum_i f_i P_i`` (4) is reported through ``core.aside``, with the share of dropped tokens.

    As published: the router computes in float32 under autocast too (selective precision), and in training its input is multiplied
    by uniform noise; weights are drawn from a truncated normal with variance ``scale / inputs``; experts have ReLU and no bias;
    dropout inside of experts is for fine-tuning, with 0.4. From the authors' code (tensorflow/mesh, ``transformer/moe.py``): noise
    of 1 +- 0.01, and capacities of at least 4 tokens, counted in groups of tokens. Groups here are sequences, so that the items of a
    batch do not change each other.

    Decoding token by token drops nothing, so it equals the whole pass where that drops nothing.

    Args:
        width: Features D.
        hidden: Hidden features H of an expert. Defaults to 4 D.
        experts: Number of experts E.
        k: Experts of a token. 1 is the paper's layer; with more, gates are divided by their sum, as in its baseline (top-2 routing).
        capacity: Capacity factor in training, for each of the k choices.
        capacity_eval: The same in evaluation.
        least: Smallest capacity, in tokens.
        jitter: Half the range of the noise on the router's input in training.
        balance: Weight of the balance loss.
        dropout: Probability of dropping a hidden feature of an expert.
        scale: Scale s of the initialisation.
        activation: Called without arguments.

    Shapes: [..., T, D] to [..., T, D]; T are the tokens of a sequence.

    Raises:
        ValueError: An input with another number of features or without an axis of tokens; a number that is out of range.

    Examples:
        >>> layer = Switch(8, experts=4)
        >>> with aside.collect() as told:
        ...     layer(torch.randn(2, 16, 8)).shape
        torch.Size([2, 16, 8])
        >>> sorted(told.metrics), len(told.losses)
        (['routing busiest', 'routing dropped'], 1)
    """

    def __init__(
        self,
        width: int,
        *,
        hidden: int | None = None,
        experts: int = 8,
        k: int = 1,
        capacity: float = 1.25,
        capacity_eval: float = 2.0,
        least: int = 4,
        jitter: float = 0.01,
        balance: float = 0.01,
        dropout: float = 0.0,
        scale: float = 0.1,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        if experts < 1 or not 1 <= k <= experts:
            raise ValueError(f"Switch: experts={experts}, k={k}; expected at least 1 expert, and k from 1 to experts.")
        if min(capacity, capacity_eval) <= 0 or least < 1:
            raise ValueError(
                f"Switch: capacity={capacity}, capacity_eval={capacity_eval}, least={least}; expected factors above 0 and at "
                "least 1 token. Take 1.0 or more, since tokens over capacity are dropped."
            )
        if not 0 <= jitter < 1:
            raise ValueError(f"Switch: jitter={jitter}; expected 0 to below 1.")
        hidden = hidden or 4 * width
        self.width, self.experts, self.k, self.least = width, experts, k, least
        self.factors = {True: capacity, False: capacity_eval}
        self.jitter, self.balance = jitter, balance
        self.router = nn.Parameter(torch.empty(experts, width))
        self.up = nn.Parameter(torch.empty(experts, width, hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, width))
        self.act, self.dropout = activation(), nn.Dropout(dropout)
        self.group: dist.ProcessGroup | None = None
        self.divided = False
        for weight, inputs in ((self.router, width), (self.up, width), (self.down, hidden)):
            std = (scale / inputs) ** 0.5
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)

    def logits(self, x: Float[Tensor, "*B T D"]) -> Float[Tensor, "*B T E"]:
        """The router's logits, in float32 at least."""
        kind = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(kind)
            if self.training and self.jitter:
                x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
            return F.linear(x, self.router.to(kind))

    def room(self, length: int) -> int:
        """Most tokens of a sequence for one expert."""
        return max(self.least, int(self.factors[self.training] * self.k * length / self.experts))

    def routed(self, x: Float[Tensor, "*B T D"]) -> Routed:
        """Which expert sees which token; reports the balance loss."""
        routed = route(self.logits(x), self.k, self.room(x.shape[-2]), normalise=self.k > 1)
        if self.balance:
            aside.loss(self.balance * balance(routed))
        return routed

    def forward(self, x: Float[Tensor, "*B T D"]) -> Float[Tensor, "*B T D"]:
        """Route the tokens of each sequence, and run the experts."""
        if x.ndim < 2 or x.shape[-1] != self.width:
            raise ValueError(f"Switch: input {tuple(x.shape)}; expected [..., tokens, {self.width}].")
        routed, flat = self.routed(x), x.flatten(0, -2)
        if self.divided:
            rows, counts, home = exchange(dispatch(flat, routed), routed, self.group)
            hidden = self.dropout(self.act(grouped(rows, self.up, counts)))
            out = combine(home(grouped(hidden, self.down, counts)), routed)
        else:
            out = combine(self.dropout(self.act(dispatch(flat, routed, self.up))), routed, self.down)
        return out.view(x.shape)

    def divide(self, group: dist.ProcessGroup | None = None) -> Switch:
        """Keep only this process's experts, and send tokens to those of the other processes (expert parallelism).

        The gradients of the experts are then sums over the tokens of all processes. Those of the router are this process's own and
        have to be summed, as in data parallelism. Leave the experts out of DistributedDataParallel, which would average them.

        Args:
            group: The processes. Defaults to all.

        Returns:
            The layer itself, changed.

        Raises:
            ValueError: The processes do not divide the experts, or the experts are divided already.
        """
        if self.divided:
            raise ValueError("Switch: the experts are divided already; divide a layer once.")
        own = share(self.experts, group)
        for name in ("up", "down"):
            setattr(self, name, nn.Parameter(getattr(self, name).detach()[own].clone()))
        self.group, self.divided = group, True
        return self


EXAMPLE = Example(
    make=lambda: Switch(6, hidden=5, experts=3, least=1, capacity_eval=1.0, scale=2.0),
    inputs=lambda: (torch.randn(2, 8, 6),),
    odd=lambda: (torch.randn(3, 7, 6),),
    axis=1,
    causal=True,
    control="data",
    modes={"top-2": lambda: Switch(6, hidden=5, experts=3, k=2, least=1, capacity_eval=1.0, scale=2.0)},
)
