"""NHL: the first convolution follows the test data by soft Hebbian learning, and a modulator of its responses by entropy."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from interlayer.core import datasets, taps
from interlayer.core.example import Example
from interlayer.core.online import Adapter, entropy


def competition(u: Float[Tensor, "B O H W"], temperature: float = 1.0) -> Float[Tensor, "B O H W"]:
    """How much each channel wins at each position: ``y = softmax(u / temperature)`` over channels, which sums to one."""
    return (u / temperature).softmax(1)


def soft_hebbian(conv: nn.Conv2d, x: Float[Tensor, "B I H W"], temperature: float = 1.0) -> Float[Tensor, "O J h w"]:
    """The change of a convolution's kernels by soft Hebbian learning: ``E[y (x - u w)]`` over batch and positions.

    ``u`` is the response without the bias. Cost: that of the convolution and of its weights' gradient.

    Examples:
        >>> conv = nn.Conv2d(1, 1, 1, bias=False)
        >>> _ = nn.init.constant_(conv.weight, 0.5)
        >>> soft_hebbian(conv, torch.full((1, 1, 2, 2), 2.0)).item()  # y = 1, x = 2, u = 1
        1.5
    """
    weight = conv.weight.detach().requires_grad_()
    with torch.enable_grad():
        u = conv._conv_forward(x.detach(), weight, None)
        response = u.detach()
        y = competition(response, temperature)
        positions = y.numel() // y.shape[1]
        (yx,) = torch.autograd.grad((y * u).sum() / positions, weight)  # u is linear in w: its gradient is the patch x
    yu = (y * response).transpose(0, 1).flatten(1).sum(1) / positions
    return yx - yu[:, None, None, None] * weight.detach()


class NHL(Adapter):
    """The first convolution learns each test batch without feedback, by competition, and its modulator by feedback of entropy.

    Paper: Tang et al., "Neuro-Modulated Hebbian Learning for Fully Test-Time Adaptation", arXiv:2303.00914 (CVPR 2023).

    For each unlabelled batch, in this order. As the batch passes the first convolution, its kernels move by soft Hebbian learning,
    ``w_k += plasticity E[y_k (x - u_k w_k)]`` with ``u_k = w_k x`` and ``y = softmax(u / temperature)`` over the channels that
    compete at a position; at rest ``w_k = c_k / |c_k|``, ``c_k = E[y_k x]``, the direction of the patches that channel k wins. Then
    a layer of neuro-modulation, ``g_k r_k + b_k`` for each channel of the response r, takes one step of Adam down the mean entropy
    of the predictions, fed back through the network above. A second pass answers. Everything else is frozen, and BatchNorm takes
    the statistics of the batch. The modulator begins as the identity. It sits behind the BatchNorm that follows the convolution, if
    one does, since a BatchNorm after it would undo it.

    The paper's equations could not be verified. The authors' code was looked for by their account, by title, by the paper's number
    and by method on GitHub, and lists of papers give none; of the text only abstract, beginning and the caption of figure 2 were
    found. From these: soft Hebbian learning of the first convolution, then
    the modulator by entropy, then the prediction, with a fixed classifier. The rule is that of SoftHebb (Moraitis et al.,
    arXiv:2107.05747), with one author in common, checked with its public code, which also divides each change by its largest entry
    and adds an anti-Hebbian variant; neither is done here. The modulator's form, BatchNorm's statistics, Adam and all rates are
    this implementation's.

    Args:
        model: A trained classifier with an ``nn.Conv2d``; its outputs, or their ``logits``, are [B, K].
        plasticity: Step of the Hebbian rule; 0 leaves the kernels alone.
        temperature: Of the competition, in units of the response u.
        rate: Learning rate of Adam for the modulator.
        lr: Learning rate of Adam for training the source in ``step``.
        first: Name of the convolution that learns. Defaults to the first.

    Shapes: images [B, C, H, W] to logits [B, K].

    Raises:
        ValueError: No convolution of this name, a rate or plasticity below 0, or a temperature of 0 or below.

    Examples:
        >>> from interlayer.core.online import adapt_online, corruptions
        >>> from interlayer.models.classic import ResNet18
        >>> images, labels = datasets.digits()
        >>> stream = corruptions(images[:64] / 16, labels[:64], ["contrast", "brightness"], level=4)
        >>> rule = NHL(ResNet18(1, 10, width=4))
        >>> rule.first, rule.site
        ('stem.0', 'stem.1')
        >>> len(adapt_online(rule, stream, batch=32, reset="shift").errors)
        2
    """

    slug = "nhl"

    def __init__(
        self,
        model: nn.Module,
        *,
        plasticity: float = 1e-2,
        temperature: float = 1.0,
        rate: float = 3e-2,
        lr: float = 1e-3,
        first: str | None = None,
    ) -> None:
        super().__init__(model, rate=rate, lr=lr)
        model = self.model
        if plasticity < 0 or temperature <= 0:
            raise ValueError(
                f"NHL: plasticity {plasticity}, temperature {temperature}; expected at least 0, and above 0."
            )
        convolutions = {n: m for n, m in model.named_modules() if n and isinstance(m, nn.Conv2d)}
        name = next(iter(convolutions), "") if first is None else first
        if name not in convolutions:
            raise ValueError(
                f"NHL: no nn.Conv2d {name!r} in {type(model).__name__}; expected one of {list(convolutions) or 'none, there is none'}. "
                "Name the convolution that learns with first=."
            )
        self.plasticity, self.temperature, self.first, self.conv = plasticity, temperature, name, convolutions[name]
        self.site = _site(model, name)
        width, like = self.conv.out_channels, self.conv.weight
        self.gain = torch.ones(width, device=like.device, dtype=like.dtype)
        self.bias = torch.zeros(width, device=like.device, dtype=like.dtype)

    def trained(self) -> dict[str, Tensor]:
        """The modulator's gains and biases."""
        return {"modulator.gain": self.gain, "modulator.bias": self.bias}

    def moves(self) -> dict[str, Tensor]:
        """The kernels of the first convolution, and the modulator."""
        return {f"{self.first}.weight": self.conv.weight, **self.trained()}

    def modulate(self, response: Float[Tensor, "B O H W"]) -> Float[Tensor, "B O H W"]:
        """``g_k r_k + b_k`` for each channel."""
        return response * self.gain.to(response)[:, None, None] + self.bias.to(response)[:, None, None]

    def run(self, inputs: Any) -> Float[Tensor, "B K"]:
        """The logits with the modulator as it stands."""
        with taps.patch(self.model, {self.site: self.modulate}):
            return super().run(inputs)

    def change(self, x: Float[Tensor, "B I H W"]) -> Float[Tensor, "O J h w"]:
        """How the kernels move for what enters their convolution, before ``plasticity``."""
        return soft_hebbian(self.conv, x, self.temperature)

    @contextmanager
    def _plastic(self) -> Iterator[None]:
        """While this is open, what enters the first convolution moves its kernels before it passes."""

        def follow(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            change = self.change(args[0])
            with torch.no_grad():
                self.conv.weight.add_(change, alpha=self.plasticity)

        hook = self.conv.register_forward_pre_hook(follow)
        try:
            yield
        finally:
            hook.remove()

    def respond(self, inputs: Any) -> Float[Tensor, "B K"]:
        """Move the kernels, lower the entropy by the modulator, answer."""
        with self._plastic():
            logits = self.run(inputs)
        self.lower(entropy(logits).mean())
        with torch.no_grad():
            return self.run(inputs)

    @torch.no_grad()
    def result(self) -> nn.Module:
        """A plain copy of the model as adapted, with the modulator folded into the layer before it.

        Under the statistics of the batch (``core.online.batch_statistics``) it gives the answers of ``answer``.
        """
        model = copy.deepcopy(self.model).eval()
        at: Any = model.get_submodule(self.site)
        shape = [-1] + [1] * (at.weight.ndim - 1) if at.weight is not None else [-1]
        if at.weight is None:
            at.weight, at.affine = nn.Parameter(torch.ones_like(self.gain)), True
        if at.bias is None:
            at.bias = nn.Parameter(torch.zeros_like(self.bias))
        at.weight.mul_(self.gain.view(shape))
        at.bias.mul_(self.gain).add_(self.bias)
        return model


def _site(model: nn.Module, name: str) -> str:
    """Where the modulator acts: the BatchNorm that stands behind a convolution in the same module, or the convolution itself."""
    parent, _, last = name.rpartition(".")
    beside = list(model.get_submodule(parent).named_children())
    at = [n for n, _ in beside].index(last) + 1
    if at < len(beside) and isinstance(beside[at][1], _BatchNorm):
        return f"{parent}.{beside[at][0]}" if parent else beside[at][0]
    return name


def _rule() -> NHL:
    layers = [nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return NHL(nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10)))


EXAMPLE = Example(make=_rule, inputs=lambda: datasets.drawn(datasets.split_digits().train, 20, 16))
