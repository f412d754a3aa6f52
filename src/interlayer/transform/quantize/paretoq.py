"""ParetoQ: one way to train networks with weights of 1, 1.58, 2, 3 or 4 bits."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from interlayer.core import aside
from interlayer.core.data import answer, run
from interlayer.core.example import Example
from interlayer.core.kinds import Row, Rule
from interlayer.core.quantizer import Grid, Packed, Rounder, Scaled, inner, layers, packs, rounds, straight
from interlayer.core.quantizer.layers import is_conv1d
from interlayer.core.quantizer.packing import TERNARY
from interlayer.core.quantizer.reconstruct import Rounded, wide
from interlayer.core.select import At
from interlayer.core.weights import own_class
from interlayer.models import Transformer

LEAST = 1e-5  # size of a row of zeros
EDGE = 0.99  # where stretched grids clip, as a share of the size
# The grid of each number of bits, and its step as a share of the size alpha of a row.
GRIDS: dict[float, tuple[Grid, float]] = {
    1: (Grid(1, 0, "midrise"), 2.0),
    TERNARY: (Grid(2, 0, "ternary"), 2 / 3),
    2: (Grid(2, 0, "midrise"), 1 / 2),
    3: (Grid(3, 0), 1.0),
    4: (Grid(4, 0), 1.0),
}


class Elastic(Rounder):
    r"""Rounding of one weight to a grid whose size :math:`\alpha` is learned, one for each output; the grid depends on the bits.

    With :math:`u = w / \alpha` and the gradient :math:`g` of the rounded weight:

    - 1 bit, elastic binarization: :math:`\alpha\, \mathrm{sign}(w)`; :math:`\alpha` gets the sum of :math:`\mathrm{sign}(w)\, g`.
    - 1.58 and 2 bits, stretched elastic quantisation of k = 3 and 4 levels: :math:`\hat u = \frac 2 k (\lfloor \frac k 2
      \mathrm{clip}(u, -.99, .99) - s \rceil + s)`, s = 0 and 1/2: levels in the middle of k equal parts of the range, so that each is as
      likely as its part is wide. The value is :math:`\alpha \hat u`.
    - 3 and 4 bits, learned step size (LSQ): :math:`\alpha\, \mathrm{clip}(\lfloor u \rceil, -2^{b-1}, 2^{b-1} - 1)`.

    Above 1 bit :math:`\alpha` gets the sum of :math:`(\hat u - u)\, g` inside the range and :math:`\hat u g` outside. All are
    divided by the root of (weights x the highest positive code, 1 up to 2 bits). The weight gets :math:`g` where u is inside: 1, .99, or
    the codes. At first :math:`\alpha` is the mean of :math:`|w|` at 1 bit, its maximum at 1.58 and 2, the maximum over
    :math:`2^{b-1} - 1` above.

    Args:
        weight: Outputs first.
        bits: 1, 1.58, 2, 3 or 4.

    Examples:
        >>> weight = torch.tensor([[0.1, -0.9, 0.4, 1.0]])
        >>> Elastic(weight, 2).value(weight).tolist()
        [[0.25, -0.75, 0.25, 0.75]]
    """

    def __init__(self, weight: Float[Tensor, "out ..."], bits: float) -> None:
        self.bits, (grid, self.step) = bits, GRIDS[bits]
        super().__init__(weight, grid.fit(weight))
        self.high = max(grid.high, 1) if bits > 2 else 1
        self.alpha = nn.Parameter(weight.new_empty(len(weight)))
        self.share, self.on = 0.0, True
        self.begin(weight)

    @torch.no_grad()
    def begin(self, weight: Float[Tensor, "out ..."]) -> None:
        """Set the sizes by the weight, and round from now on."""
        rows, self.on = weight.flatten(1).abs(), True
        self.alpha.copy_(rows.mean(1) if self.bits == 1 else rows.amax(1) / self.high)

    def progress(self, share: float) -> None:
        """Note the share of the training that is done."""
        self.share = share

    def scaled(self, alpha: Tensor) -> Scaled:
        """The grid of this size."""
        grid = self.held.grid
        return Scaled(grid, alpha * self.step, torch.full_like(alpha, grid.middle))

    def value(self, weight: Float[Tensor, "out ..."]) -> Float[Tensor, "out ..."]:
        """The rounded weight; to the last bit what the packed one is."""
        if not self.on:
            return weight
        grid, held = self.held.grid, self.alpha.detach().clamp_min(LEAST)
        value = self.scaled(held).fake(weight.detach())
        alpha = grid.spread(held + (self.alpha - self.alpha.detach()) / (weight.numel() * self.high) ** 0.5, weight)
        u = weight.detach() / grid.spread(held, weight)
        low, high = (grid.low, grid.high) if self.bits > 2 else (-1, 1) if self.bits == 1 else (-EDGE, EDGE)
        inside = ((u >= low) & (u <= high)).to(u)
        slope = value / grid.spread(held, weight) - (0 if self.bits == 1 else inside * u)
        return straight(slope * alpha + inside * weight, value)

    def found(self, weight: Float[Tensor, "out ..."]) -> tuple[Scaled, Tensor]:
        """The grid, and the codes."""
        held = self.scaled(self.alpha.detach().clamp_min(LEAST))
        return held, held.codes(weight)


class ParetoQ(Rule):
    """Train a model in full precision first, and then with weights of 1, 1.58, 2, 3 or 4 bits by one recipe.

    Liu et al., ParetoQ: Improving Scaling Laws in Extremely Low-bit LLM Quantization, NeurIPS 2025, arXiv:2502.02631; code
    facebookresearch/ParetoQ. See ``Elastic`` for the grids, their first sizes and all gradients. Adam without weight decay trains
    weights and sizes together. Weights alone are rounded; embeddings, norms and the head stay in float.

    All is as in the authors' code, but for two things. A weight of exactly zero counts as negative at 1 bit; in their code it stays zero,
    which one bit cannot hold. And at 1.58 bits, a weight outside the range adds its level, 2/3, to the gradient of the size; there it
    adds 1, which is the derivative of another function.

    Cost of training: rounding of every weight in each pass. ``result()`` keeps 1, 1.6 (five of three levels in a byte), 2, 4 (also with 3
    bits) or 4 bits a weight, and one scale for each output.

    Args:
        model: Any model with linear maps or convolutions. It is changed in place.
        bits: 1, 1.58, 2, 3 or 4.
        first: Share of the training in full precision. 0 is for a trained model; the authors found 0.9 the best where training starts
            from nothing. The loop's share counts (``core.schedule.progress``). When rounding begins, Adam starts anew.
        at: Which layers. Defaults to those inside lists of modules, such as the blocks of a Transformer, so that the head stays in
            float; to all where there is no such list.
        lr: Learning rate. The authors', from 2e-5 to zero along a cosine, suits large models.

    Attributes:
        layers: Names of the layers at few bits.
        skipped: All other weights, each with the reason why it stays in float.

    Shapes: a batch is (inputs, labels [B] or [B, S]), or (inputs, None) where the model gives its own loss.

    Raises:
        ValueError: Other bits, ``first`` out of range, no layer to quantise; from ``result``: still in full precision.

    Examples:
        >>> rule = ParetoQ(Transformer(16, 8, 2, 32, 2), bits=2)
        >>> tokens = torch.randint(16, (4, 8))
        >>> sorted(rule.step((tokens, tokens)))
        ['loss']
        >>> rule.result().trunk.blocks[0].mixer.qkv
        Packed([96, 32], 2 bits midrise)
    """

    slug: ClassVar[str] = "paretoq"

    def __init__(
        self, model: nn.Module, *, bits: float = 2, first: float = 0.0, at: At | None = None, lr: float = 1e-3
    ) -> None:
        if bits not in GRIDS or not 0 <= first < 1:
            raise ValueError(
                f"paretoq: bits {bits!r}, first {first!r}; expected 1, 1.58, 2, 3 or 4 bits, and a share of 0 or more below 1."
            )
        found, self.skipped = layers(model, at)
        self.layers = inner(model, found) if at is None else list(found)
        self.skipped += [
            Row(n, type(m).__name__, "in no list of blocks, stays in float")
            for n, m in found.items()
            if n not in self.layers
        ]
        self.model, self.bits, self.first = model, bits, first
        self.rounders: dict[str, Elastic] = {}
        for n in self.layers:
            layer = found[n]
            self.rounders[n] = Elastic(wide(layer), bits)
            self.rounders[n].on = not first
            parametrize.register_parametrization(
                layer, "weight", Rounded(self.rounders[n], is_conv1d(layer)), unsafe=True
            )
        self.optimizer = torch.optim.Adam(model.parameters(), lr)

    @property
    def on(self) -> bool:
        """Whether weights are rounded by now."""
        return all(r.on for r in self.rounders.values())

    def step(self, batch: tuple[Any, Any]) -> dict[str, float]:
        """One step of Adam on the cross-entropy, or on the model's own loss."""
        if not self.on and next(iter(self.rounders.values())).share >= self.first:
            for n, rounder in self.rounders.items():
                rounder.begin(self.weight(n))
            self.optimizer.state.clear()
        inputs, labels = batch
        with aside.collect() as told:
            out = run(self.model.train(), inputs)
            scores = None if labels is None else answer(out)
            loss = out.loss if scores is None else F.cross_entropy(scores.flatten(0, -2), labels.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        (loss if told.loss is None else loss + told.loss).backward()
        self.optimizer.step()
        return {"loss": float(loss.detach())}

    def weight(self, name: str) -> Float[Tensor, "out ..."]:
        """The full-precision weight of a layer that is trained, outputs first."""
        layer: Any = self.model.get_submodule(name)
        own = layer.parametrizations.weight
        return (own.original.T if own[0].transposed else own.original).detach().float()

    def result(self, *, packed: bool = True) -> nn.Module:
        """The model for use: ``interlayer.save`` and ``load`` keep it. Its linear maps multiply few rows without unpacking.

        Args:
            packed: False gives a plain model with floats on the grids, which ``save_pretrained`` carries.
        """
        if not self.on:
            raise ValueError(
                f"paretoq.result: still in full precision, which takes {self.first:g} of the training; expected more steps, "
                "in a loop that calls core.schedule.progress(model, share)."
            )
        plain = copy.deepcopy(self.model)
        for n in self.layers:
            layer = plain.get_submodule(n)
            own_class(layer)
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        made = {n: r.found(self.weight(n)) for n, r in self.rounders.items()}
        told = {"method": self.slug, "bits": self.bits}
        if not packed:
            return rounds(plain, {n: held.values(codes) for n, (held, codes) in made.items()}, told).eval()
        new = {}
        for n, (held, codes) in made.items():
            layer = plain.get_submodule(n)
            new[n] = Packed(layer, held, codes=codes, table=isinstance(layer, nn.Linear) or is_conv1d(layer))
        return packs(plain, new, told).eval()

    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimizer."""
        return (self.optimizer,)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, and whether rounding has begun."""
        return {"optimizer": self.optimizer.state_dict(), "on": int(self.on)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned."""
        self.optimizer.load_state_dict(state["optimizer"])
        for rounder in self.rounders.values():
            rounder.on = bool(state["on"])


def _batches() -> tuple[tuple[Tensor, Tensor], ...]:
    texts = torch.randint(8, (16, 8, 9)).cumsum(-1) % 16
    return tuple((each[:, :-1], each[:, 1:]) for each in texts)


EXAMPLE = Example(make=lambda: ParetoQ(Transformer(16, 8, 2, 32, 2), bits=2, lr=3e-3), inputs=_batches)
