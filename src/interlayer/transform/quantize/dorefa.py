"""DoReFa-Net: convolutional nets trained with weights, activations and gradients of a few bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core import datasets
from interlayer.core.example import Example
from interlayer.core.kinds import Rule
from interlayer.core.quantizer import BitMap, Bound, Grid, Packed, Scaled, fake, layers, packs, straight
from interlayer.core.select import At, exchange
from interlayer.core.swap import known

LEAST = 1e-12  # size of a weight of zeros
WHOLE = 32  # the number of bits that means floats


def levels(bits: int) -> Scaled:
    """The ``2^bits`` weights: from -1 to 1 in equal steps."""
    n = 2**bits - 1
    return Scaled(Grid(bits, None, "midrise"), torch.tensor(2 / n), torch.tensor(n / 2))


def on_levels(weight: Tensor, bits: int) -> tuple[Scaled, Tensor]:
    """The grid of a weight, and the numbers that are rounded to it: ``tanh(w) / max |tanh(w)|``, or w itself at 1 bit."""
    if bits == 1:
        held = levels(1).to(weight.detach())
        return Scaled(held.grid, held.scale * weight.detach().abs().mean().clamp_min(LEAST), held.zero), weight
    squeezed = weight.tanh()
    return levels(bits).to(weight.detach()), squeezed / squeezed.abs().max().clamp_min(LEAST)


def low_weight(weight: Float[Tensor, "*shape"], bits: int) -> Float[Tensor, "*shape"]:
    """Weights of ``bits`` bits: ``2 round_k(tanh(w) / (2 max |tanh(w)|) + 1/2) - 1``, or ``mean |w| sign(w)`` at 1 bit.

    ``round_k`` rounds to multiples of ``1 / (2^k - 1)``. Gradients pass the rounding unchanged.

    >>> low_weight(torch.tensor([0.1, -0.2, 0.3]), 1).tolist(), low_weight(torch.tensor([0.1, -0.2, 0.3]), 2).mul(3).tolist()
    ([0.20000000298023224, -0.20000000298023224, 0.20000000298023224], [1.0, -3.0, 3.0])
    """
    held, exact = on_levels(weight, bits)
    return straight(exact, held.fake(exact.detach()))


def inputs(bits: int) -> Scaled:
    """The ``2^bits`` activations: from 0 to 1 in equal steps."""
    return Scaled(Grid(bits, None, "unsigned"), torch.tensor(1 / (2**bits - 1)), torch.tensor(0.0))


class LowGradient(torch.autograd.Function):
    """The identity, whose gradient is rounded: ``2 m (round_k(g / (2 m) + 1/2 + noise) - 1/2)``, m the largest ``|g|`` of an example.

    The noise is uniform, half a step to each side, so that the mean over the noise is the gradient.
    """

    @staticmethod
    def forward(x: Tensor, bits: int) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.bits = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        largest = grad.detach().flatten(1).abs().amax(1).float()
        scale = (2 * largest / (2**ctx.bits - 1)).clamp_min(torch.finfo(torch.float32).tiny)
        return fake(grad, Grid(ctx.bits, 0, "midrise"), scale, rounding="stochastic"), None


def _low(layer: LowConv2d | LowLinear, x: Tensor) -> Tensor:
    weights, activations, gradients = layer.bits
    if activations < WHOLE:
        x = inputs(activations).to(x.detach()).fake(x)
    weight = low_weight(layer.weight, weights) if weights < WHOLE else layer.weight
    if isinstance(layer, nn.Linear):
        out = F.linear(x, weight, layer.bias)
    else:
        out = layer._conv_forward(x, weight, layer.bias)
    return LowGradient.apply(out, gradients) if gradients < WHOLE else out


class LowConv2d(nn.Conv2d):
    """A convolution with weights, inputs and gradients of few bits; its parameters are floats.

    Args:
        *args: Those of ``nn.Conv2d``.
        bits: Of the weights, the inputs (which are brought into 0 to 1) and the gradients of the outputs; 32 is floats.
        **kwargs: Those of ``nn.Conv2d``.

    Examples:
        >>> LowConv2d(3, 8, 3, bits=(1, 2, 6))(torch.rand(2, 3, 5, 5)).shape
        torch.Size([2, 8, 3, 3])
    """

    def __init__(self, *args: Any, bits: tuple[int, int, int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bits = check(bits)

    def forward(self, input: Float[Tensor, "*B C H W"]) -> Float[Tensor, "*B O h w"]:
        """Convolve."""
        return _low(self, input)


class LowLinear(nn.Linear):
    """A linear map in the same way: the arguments of ``nn.Linear``, and ``bits``.

    >>> LowLinear(3, 8, bits=(1, 2, 6))(torch.rand(2, 3)).shape
    torch.Size([2, 8])
    """

    def __init__(self, *args: Any, bits: tuple[int, int, int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bits = check(bits)

    def forward(self, input: Float[Tensor, "B *S I"]) -> Float[Tensor, "B *S O"]:
        """Multiply."""
        return _low(self, input)


def check(bits: tuple[int, int, int]) -> tuple[int, int, int]:
    """Three numbers of bits, each 1 to 8 or 32, not all 32.

    Raises:
        ValueError: They are not.
    """
    if any(b not in (*range(1, 9), WHOLE) for b in bits) or all(b == WHOLE for b in bits):
        raise ValueError(
            f"DoReFa: bits {tuple(bits)} of weights, activations and gradients; expected 1 to 8 each, or 32 for floats, and "
            "not 32 thrice."
        )
    return bits


def _lowered(old: nn.Module, bits: tuple[int, int, int]) -> nn.Module:
    """The layer with its own parameters, at few bits."""
    if isinstance(old, nn.Linear):
        new: Any = LowLinear(old.in_features, old.out_features, old.bias is not None, device="meta", bits=bits)
    else:
        assert isinstance(old, nn.Conv2d)
        new = LowConv2d(
            old.in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, old.dilation, old.groups,
            old.bias is not None, old.padding_mode, device="meta", bits=bits,
        )  # fmt: skip
    new.weight, new.bias = old.weight, old.bias
    return new.train(old.training)


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
        self.bits = check((weights, activations, gradients))
        found = {n: m for n, m in layers(model, at)[0].items() if isinstance(m, nn.Linear | nn.Conv2d)}
        self.layers = list(found) if at is not None else list(found)[1:-1]
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
        exchange(model, self.layers, lambda old: _lowered(old, self.bits))
        if self.bounds:
            exchange(model, self.bounds, lambda old: Bound(fold=fold).train(old.training))
        self.model = model
        self.optimizer = torch.optim.Adam(model.parameters(), lr, eps=1e-5)

    def step(self, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
        """One step of Adam on the cross-entropy."""
        x, labels = batch
        scores = self.model.train()(x)
        loss = F.cross_entropy(scores.flatten(0, -2), labels.flatten())
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        right = (scores.argmax(-1) == labels).float().mean()
        return {"loss": float(loss.detach()), "accuracy": float(right)}

    def predict(self, inputs: Tensor) -> Tensor:
        """Scores in evaluation mode; the mode is restored."""
        training = self.model.training
        self.model.eval()
        found = super().predict(inputs)
        self.model.train(training)
        return found

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


def _digits() -> tuple[tuple[Tensor, Tensor], ...]:
    images, labels = datasets.digits()
    order = torch.randperm(len(labels))[:1280].view(20, 64)
    return tuple((images[batch] / 16, labels[batch]) for batch in order)


EXAMPLE = Example(make=lambda: DoReFa(net()), inputs=_digits)
