"""Small temperature: DARTS whose mixture cools to one operation an edge, with noise that keeps its gradients alive."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from interlayer.core import datasets
from interlayer.core.example import Example
from interlayer.core.search import Supernet
from interlayer.learn.search._darts import DARTS, Mixture


def sparse_noisy_softmax(
    logits: Float[Tensor, "E O"], temperature: float | Tensor, noise: float | Tensor = 0.0
) -> Float[Tensor, "E O"]:
    """``softmax((a + noise) / T)``: nearly one-hot at a small T, and with Gumbel noise the operation o is on top with
    probability ``softmax(a)_o``.

    Args:
        logits: Logits a of each edge and operation.
        temperature: T > 0, in units of the logits.
        noise: Added to the logits, in the same units.

    Raises:
        ValueError: A temperature of 0 or below.

    Examples:
        >>> sparse_noisy_softmax(torch.tensor([[1.0, 2.0]]), 0.1)
        tensor([[4.5398e-05, 9.9995e-01]])
    """
    if not temperature > 0:
        raise ValueError(
            f"sparse_noisy_softmax: temperature {float(temperature)}; expected above 0. Approach 0 from above."
        )
    return ((logits + noise) / temperature).softmax(-1)


def exponential(share: float, start: float, end: float) -> float:
    """``start (end / start)^share``: the same factor in every equal part of the search.

    Examples:
        >>> [round(exponential(share, 1.0, 0.01), 3) for share in (0, 0.5, 1)]
        [1.0, 0.1, 0.01]
    """
    return start * (end / start) ** share


def entropy(weights: Sequence[Float[Tensor, "E O"]]) -> Tensor:
    """Entropy of an edge's operations over its largest, ``log O``, averaged over all edges: 1 if equal, 0 if one-hot.

    Examples:
        >>> entropy([torch.tensor([[0.5, 0.5], [1.0, 0.0]])])
        tensor(0.5000)
    """
    edges = [torch.special.entr(w).sum(-1) / math.log(w.shape[-1]) for w in weights]
    return torch.cat(edges).mean()


@torch.no_grad()
def temperature_of(target: float, logits: Sequence[Float[Tensor, "E O"]]) -> float | Tensor:
    """The temperature at which the edges' mean entropy is ``target``, found by halving an interval of ``log T`` 48 times.

    The entropy rises with T, so there is one; logits that are tied keep the entropy of their tie. The search ends at 1e-6
    and 1e6 times the largest distance of an edge's logits.

    Args:
        target: Wanted entropy, 0 to 1.
        logits: Logits of each kind of cell, with their noise.

    Examples:
        >>> logits = torch.tensor([[0.0, 0.003, 0.001]])
        >>> found = temperature_of(0.25, [logits])
        >>> round(entropy([sparse_noisy_softmax(logits, found)]).item(), 4)
        0.25
    """
    scale = torch.stack([(a.amax(-1) - a.amin(-1)).max() for a in logits]).max().clamp(min=1e-30).log()
    low, high = scale - math.log(1e6), scale + math.log(1e6)
    for _ in range(48):
        middle = (low + high) / 2
        cold = entropy([(a / middle.exp()).softmax(-1) for a in logits]) < target
        low, high = torch.where(cold, middle, low), torch.where(cold, high, middle)
    return ((low + high) / 2).exp()


class SmallTemp(DARTS):
    """DARTS that trains the supernet as it will be pruned: small temperatures make each edge's mixture nearly one-hot.

    Paper: Zhang and Ding, "Small Temperature is All You Need for Differentiable Architecture Search", arXiv:2306.06855.

    DARTS trains a dense mixture and prunes it at the end, so that the network it trained is not the one it keeps. Here the
    mixture is ``p = softmax((a + s g) / T)`` (``sparse_noisy_softmax``), g standard Gumbel noise that is drawn anew for
    every update. At a small T each draw has nearly one operation an edge. Without noise its gradient ``p (1 - p) / T``
    would vanish; with noise its mean is that of ``softmax(a / s)``, however small T is. The value
    ``v = start (end / start)^share`` falls exponentially over the search. In the adaptive scheme v is the entropy that the
    mixture shall have, from 1 (equal) to 0 (one-hot), and T is the temperature that gives it, whatever the scale of the
    logits and the noise; otherwise v is T itself. ``predict`` and ``genotype`` use no noise.

    No code of the authors could be found (searched by title, arXiv id and the method's names), and of the paper's text only
    the abstract and introduction were to be had. They name the three parts and say what for; the formulas, the Gumbel
    distribution, the entropy as what is scheduled, and the defaults are this reading of them. All else is DARTS.

    Args:
        model: The supernet.
        lr: Learning rate of the weights.
        arch_lr: Learning rate of the logits.
        unrolled: Whether logits look one step of the weights ahead (second order).
        start: Entropy (or temperature, in units of the logits) at the beginning.
        end: The same at the end.
        adaptive: Whether these are entropies, at most 1, or temperatures.
        noise: Scale s of the noise, in units of the logits; 0 for none.

    Shapes: a batch is (images [B, C, H, W], labels [B]), best of 8 examples or more.

    Raises:
        ValueError: The model is not a supernet, ``start`` or ``end`` is 0 or below, an entropy above 1, negative noise.

    Examples:
        >>> from interlayer.core.schedule import progress
        >>> net = Supernet(1, 10, width=4, layers=1, nodes=1, operations=["skip_connect", "sep_conv_3x3"])
        >>> rule = SmallTemp(net, end=0.02)
        >>> for step in range(10):
        ...     progress(net, step / 10)
        ...     metrics = rule.step((torch.randn(16, 1, 8, 8), torch.arange(16) % 10))
        >>> progress(net, 1.0)
        >>> bool(entropy(list(rule.mix().values())) < 0.03)
        True
        >>> rule.result()(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    slug = "small-temp"

    def __init__(
        self,
        model: Supernet,
        *,
        lr: float = 0.025,
        arch_lr: float = 3e-4,
        unrolled: bool = False,
        start: float = 1.0,
        end: float = 0.02,
        adaptive: bool = True,
        noise: float = 1.0,
    ) -> None:
        super().__init__(model, lr=lr, arch_lr=arch_lr, unrolled=unrolled)
        what, most = ("entropies", 1.0) if adaptive else ("temperatures", math.inf)
        if not (0 < start <= most and 0 < end <= most):
            raise ValueError(
                f"SmallTemp: start={start}, end={end}; expected {what} above 0"
                f"{' and at most 1. Temperatures need adaptive=False' if adaptive else ''}."
            )
        if noise < 0:
            raise ValueError(f"SmallTemp: noise={noise}; expected 0 or more.")
        self.first, self.last, self.adaptive, self.noise = start, end, adaptive, noise
        self.drawn = {kind: torch.zeros_like(a) for kind, a in model.architecture.items()}
        self.draw()

    @torch.no_grad()
    def draw(self) -> None:
        """Draw the noise of one update."""
        for kind, logits in self.model.architecture.items():
            self.drawn[kind] = -self.noise * torch.empty_like(logits).exponential_().log()

    def mix(self, noisy: bool = False) -> Mixture:
        """The sparse-noisy softmax of each kind of cell at the temperature of this share of the search."""
        logits = {kind: a + self.drawn[kind] if noisy else a for kind, a in self.model.architecture.items()}
        value = exponential(self.model.share, self.first, self.last)
        temperature = temperature_of(value, list(logits.values())) if self.adaptive else value
        return {kind: sparse_noisy_softmax(a, temperature) for kind, a in logits.items()}


def _rule() -> SmallTemp:
    net = Supernet(1, 10, width=4, layers=1, nodes=1, operations=["skip_connect", "sep_conv_3x3"])
    return SmallTemp(net, lr=0.1)


EXAMPLE = Example(make=_rule, inputs=lambda: datasets.drawn(datasets.split_digits().train, 32))
