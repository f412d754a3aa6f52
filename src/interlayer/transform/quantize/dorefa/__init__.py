"""DoReFa-Net: convolutional nets trained with weights, activations and gradients of a few bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.core import aside
from interlayer.core.data import answer, run
from interlayer.core.datasets import digit_batches
from interlayer.core.example import Example
from interlayer.core.kinds import Row, Rule
from interlayer.core.quantizer import BitMap, Bound, Packed, layers, packs
from interlayer.core.select import At, exchange
from interlayer.core.swap import known
from interlayer.transform.quantize.dorefa.low import (
    WHOLE,
    LowConv2d,
    LowGradient,
    LowLinear,
    checked,
    inputs,
    low_weight,
    lowered,
    on_levels,
)

__all__ = ["DoReFa", "LowConv2d", "LowGradient", "LowLinear", "inputs", "low_weight", "net"]


class DoReFa(Rule):
    """Adam on a net whose weights, activations and gradients have few bits, in training and in use.

    Paper: Zhou et al., "DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth Gradients",
    arXiv:1606.06160. See ``low_weight``, ``inputs`` and ``LowGradient`` for the three equations.

    The layers of the model become ``LowConv2d`` and ``LowLinear`` in place, with the same parameters under the same names; their
    activations become ``Bound``. The first and the last layer stay in float, as do norms. Activations are rounded where a
    layer reads them, which gives the same numbers as rounding before a max-pooling. The rule suits nets whose layers read
    activations: what a layer reads is brought into 0 to 1.

    Cost of training: that of the float net, and rounding of every weight and activation. ``result()`` computes by ``and`` and bit
    counts, ``bits(W) x bits(A)`` of them for 64 multiplications.

    Args:
        model: A classifier made of convolutions and linear maps. It is changed in place.
        weights: Bits of the weights, 1 to 8, or 32 for floats.
        activations: Bits of the activations.
        gradients: Bits of the gradients.
        fold: Bound activations by ``min(|x|, 1)``, as the authors' net for house numbers does, instead of clipping them to 0 to 1.
        at: Which convolutions and linear maps. Defaults to all but the first and the last.
        lr: Learning rate of Adam.

    Attributes:
        layers: Names of the layers at few bits.
        bounds: Names of the activations that are brought into 0 to 1.
        skipped: All other weights, each with the reason why it stays in float.

    Shapes: a batch is (inputs [B, ...], labels [B] or [B, S]).

    Raises:
        ValueError: Bits out of range, no layer to quantise, or ``fold`` where no activation is bounded.

    Examples:
        >>> from interlayer.models import ConvNet
        >>> rule = DoReFa(ConvNet(1, 10, depth=8, width=4))
        >>> sorted(rule.step((torch.rand(8, 1, 8, 8), torch.arange(8))))
        ['accuracy', 'loss']
        >>> rule.result()(torch.rand(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    slug: ClassVar[str] = "dorefa"

    def __init__(
        self,
        model: nn.Module,
        *,
        weights: int = 1,
        activations: int = 2,
        gradients: int = 6,
        fold: bool = False,
        at: At | None = None,
        lr: float = 1e-3,
    ) -> None:
        self.bits = checked((weights, activations, gradients))
        fit, self.skipped = layers(model, at)
        found = [n for n, m in fit.items() if isinstance(m, nn.Linear | nn.Conv2d)]
        self.layers = found if at is not None else found[1:-1]
        self.skipped += [
            Row(n, type(fit[n]).__name__, "first or last layer, stays in float") for n in found if n not in self.layers
        ]
        self.skipped += [
            Row(n, type(m).__name__, "no 2-d convolution, stays in float") for n, m in fit.items() if n not in found
        ]
        if not self.layers:
            raise ValueError(
                f"DoReFa: {type(model).__name__} has {len(found)} linear maps and 2-d convolutions to quantise, and the first "
                "and the last stay in float; expected at least one more. Pass at= to choose layers."
            )
        bounded = activations < WHOLE
        self.bounds = [n for n, m in model.named_modules() if known(m) == "activation"] if bounded else []
        if fold and not self.bounds:
            raise ValueError(
                "DoReFa: fold=True, but no activation module is bounded; expected activations below 32 bits."
            )
        exchange(model, self.layers, lambda old: lowered(old, self.bits))
        if self.bounds:
            exchange(model, self.bounds, lambda old: Bound(fold=fold).train(old.training))
        self.model = model
        self.optimizer = torch.optim.Adam(model.parameters(), lr, eps=1e-5)

    def step(self, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
        """One step of Adam on the cross-entropy."""
        x, labels = batch
        with aside.collect() as told:
            scores = answer(run(self.model.train(), x))
            loss = F.cross_entropy(scores.flatten(0, -2), labels.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        (loss if told.loss is None else loss + told.loss).backward()
        self.optimizer.step()
        right = (scores.argmax(-1) == labels).float().mean()
        return {"loss": float(loss.detach()), "accuracy": float(right)}

    def result(self) -> nn.Module:
        """The net for use, without float weights in its quantised layers: ``interlayer.save`` and ``load`` keep it.

        Layers compute by bits (``BitMap``) where weights and activations have few; with float activations, or a padding
        other than zeros, their packed weights are multiplied as floats (``Packed``).

        Raises:
            ValueError: The weights are floats.
        """
        bits, activations, _ = self.bits
        if bits == WHOLE:
            raise ValueError("DoReFa.result: the weights have 32 bits, so nothing can be packed. Use the model itself.")
        given = inputs(activations) if activations < WHOLE else None
        new: dict[str, Packed | BitMap | Bound] = {}
        for name in self.layers:
            layer: Any = self.model.get_submodule(name)
            held, exact = on_levels(layer.weight.detach(), bits)
            codes = held.codes(exact)
            if given is not None and getattr(layer, "padding_mode", "zeros") == "zeros":
                new[name] = BitMap(layer, held, codes=codes, inputs=given)
            else:
                new[name] = Packed(layer, held, codes=codes, inputs=given)
        for name in self.bounds:
            bound = self.model.get_submodule(name)
            assert isinstance(bound, Bound)
            new[name] = Bound(fold=bound.fold)
        return packs(self.model, new).eval()

    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimizer."""
        return (self.optimizer,)

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state."""
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned."""
        self.optimizer.load_state_dict(state["optimizer"])


def net(width: int = 8) -> nn.Sequential:
    """The shape of the authors' nets, for small images: convolution, norm, pooling, activation; float ends."""
    w = width
    return nn.Sequential(
        nn.Conv2d(1, w, 3, padding=1), nn.ReLU(),
        nn.Conv2d(w, 2 * w, 3, padding=1, bias=False), nn.BatchNorm2d(2 * w), nn.MaxPool2d(2), nn.ReLU(),
        nn.Conv2d(2 * w, 4 * w, 3, padding=1, bias=False), nn.BatchNorm2d(4 * w), nn.MaxPool2d(2), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * w, 4 * w, bias=False), nn.BatchNorm1d(4 * w), nn.ReLU(), nn.Linear(4 * w, 10),
    )  # fmt: skip


EXAMPLE = Example(make=lambda: DoReFa(net(4)), inputs=digit_batches)
