"""Terminator: a slow network writes the kernels of a fast one, and activations multiply these before use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core import aside
from interlayer.core.config import configured
from interlayer.core.data import DataShape
from interlayer.core.example import Example
from interlayer.core.fields import grid

SIDES = (3, 9, 5, 7)  # of the four local hyper-kernels


def pointwise(inputs: int, outputs: int, dims: int) -> nn.Module:
    """A linear map of the channels at every position."""
    return (nn.Conv1d if dims == 1 else nn.Conv2d)(inputs, outputs, 1)


def batch_standard(channels: int, dims: int, running: bool) -> nn.Module:
    """Each channel to mean 0 and standard deviation 1 over the batch and the positions; nothing is learned."""
    return (nn.BatchNorm1d if dims == 1 else nn.BatchNorm2d)(channels, affine=False, track_running_stats=running)


class Instance(nn.Module):
    """Each channel of each example to mean 0 and standard deviation 1 over the positions; nothing is learned."""

    def forward(self, x: Tensor) -> Tensor:
        """Standardise."""
        return F.layer_norm(x, x.shape[2:])


class GroupedStandard(nn.Module):
    """The paper's grouped instance-batch standardisation: groups of channels alternate between batch and instance.

    Args:
        channels: Channels C, a multiple of ``groups``.
        groups: An even number.
        dims: 1 for sequences, 2 for images.
        running: Whether evaluation uses running statistics.
    """

    def __init__(self, channels: int, groups: int, dims: int, running: bool) -> None:
        super().__init__()
        if groups % 2 or channels % groups:
            raise ValueError(
                f"hyperzzw: {channels} channels in {groups} groups; expected an even number that divides them."
            )
        self.groups = groups
        self.batch = batch_standard(channels // 2, dims, running)

    def forward(self, x: Tensor) -> Tensor:
        """Standardise."""
        pairs = x.unflatten(1, (self.groups // 2, 2, -1))
        by_batch, by_place = (pairs[:, :, i].flatten(1, 2) for i in (0, 1))
        both = [self.batch(by_batch), F.layer_norm(by_place, by_place.shape[2:])]
        return torch.stack([t.unflatten(1, (self.groups // 2, -1)) for t in both], 2).flatten(1, 3)


def renormalize(h: Tensor, keep: Tensor, scale: Tensor) -> Tensor:
    """``keep h + scale h / |h|`` with the norm over the positions; no gradient goes through the first term."""
    return keep * h.detach() + scale * F.normalize(h, dim=-2)


class SlowNet(nn.Module):
    """An implicit network that writes a kernel: from the coordinates of its positions to a number for each channel.

    ``h_0 = sin(F_0 c)``, ``h_i = sin(F_i c) * (W_i h_{i-1} + b_i) + p`` with a learned p for each position, and a linear map
    at the end; the frequencies F are Gamma-distributed at initialisation. With a context, every h_i is renormalised and
    multiplied by a linear function of the activations, pooled to the size of the kernel.

    Args:
        channels: Channels of the kernel.
        size: Its positions along each axis.
        hidden: Hidden features.
        layers: Products.
        omega: Frequency scale.
        context: Channels of the activations that it depends on; 0 for none.
    """

    def __init__(
        self, channels: int, size: Sequence[int], *, hidden: int, layers: int, omega: float, context: int = 0
    ) -> None:
        super().__init__()
        self.size, dims, places = tuple(size), len(size), math.prod(size)
        self.register_buffer("places", grid(*size), persistent=False)
        self.waves = nn.Linear(dims, (layers + 1) * hidden)  # F_0, F_1, ... side by side
        self.lines = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
        self.last = nn.Linear(hidden, channels)
        self.bias = nn.Parameter(torch.zeros(places, 1))
        lines = [*self.lines]
        if context:
            self.reduce = nn.Sequential(nn.Linear(context, hidden), nn.Linear(hidden, hidden), nn.GELU())
            self.modulate = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers))
            self.keep = nn.Parameter(torch.ones(layers, hidden))
            self.scale = nn.Parameter(torch.full((layers, hidden), 0.1))
            lines += self.modulate
        with torch.no_grad():
            for layer, weight in enumerate(self.waves.weight.split(hidden)):
                if not weight.is_meta:  # which has no Gamma variables
                    gamma = torch.distributions.Gamma(6.0 / (layer + 1), 1.0)
                    weight.mul_(2 * math.pi * omega * gamma.sample((hidden, dims)))
            self.waves.bias.zero_()
            for line in cast(list[nn.Linear], [*lines, self.last]):
                nn.init.kaiming_uniform_(line.weight, nonlinearity="linear")
                nn.init.ones_(line.bias)
            self.last.weight.div_(math.sqrt(places))
            self.last.bias.zero_()

    def forward(self, x: Tensor | None = None) -> Tensor:
        """The kernel [1, C, *size], or with a context [B, C, *size]."""
        h, *waves = torch.sin(self.waves(self.places)).chunk(len(self.lines) + 1, -1)
        context = None
        if x is not None:
            pool = F.adaptive_avg_pool1d if len(self.size) == 1 else F.adaptive_avg_pool2d
            context = self.reduce(pool(x, self.size).flatten(2).transpose(1, 2))  # type: ignore[arg-type]
        for layer, (wave, line) in enumerate(zip(waves, self.lines, strict=True)):
            h = wave * line(h) + self.bias
            if context is not None:
                h = renormalize(h, self.keep[layer], self.scale[layer]) * self.modulate[layer](context)
        return self.last(h).transpose(-1, -2).reshape(-1, self.last.out_features, *self.size)


def hyperzzw_global(kernel: Tensor, x: Tensor, z: Tensor) -> Tensor:
    """``(x * W) z`` with a kernel as large as the input: the matrix product of each channel of a square image; the circular
    convolution of sequences."""
    mixed = x * kernel
    if x.ndim == 4:
        return mixed @ z
    a, b = (torch.fft.rfft(t.to(torch.promote_types(t.dtype, torch.float32))) for t in (mixed, z))
    return torch.fft.irfft(a * b, n=x.shape[-1]).to(z.dtype)


def hyperzzw_local(kernel: Float[Tensor, "B C *K"], x: Float[Tensor, "B C *S"]) -> Tensor:
    """Each channel of each example convolved with its own kernel, which was made from activations."""
    batch, channels = x.shape[:2]
    if not batch:
        return x
    conv = F.conv1d if x.ndim == 3 else F.conv2d
    weight = kernel.flatten(0, 1).unsqueeze(1)
    out = conv(x.flatten(0, 1).unsqueeze(0), weight, padding=kernel.shape[-1] // 2, groups=batch * channels)
    return out.view(x.shape)


def hyperzzw_twice(kernel: Tensor, x: Tensor) -> Tensor:
    """``(x * W) * x``: both products element by element."""
    return x * kernel * x


class RGU(nn.Module):
    """Recursive gated unit: ``W_y (gelu(standardise(K * W_q V)) + p)`` with ``K = W_k x``, ``V = W_v x``."""

    def __init__(self, channels: int, size: Sequence[int]) -> None:
        super().__init__()
        self.k, self.v, self.q, self.y = (pointwise(channels, channels, len(size)) for _ in range(4))
        self.standard = Instance()
        self.bias = nn.Parameter(torch.zeros(1, 1, *size))

    def forward(self, x: Tensor) -> Tensor:
        """Gate."""
        return self.y(F.gelu(self.standard(self.k(x) * self.q(self.v(x)))) + self.bias)


class Local(nn.Module):
    """A local branch: kernels from ``source``, convolved with ``x``, channels mixed, standardised over the batch."""

    def __init__(self, channels: int, side: int, dims: int, *, running: bool, **options: Any) -> None:
        super().__init__()
        self.slow = SlowNet(channels, (side,) * dims, layers=2, context=channels, **options)
        self.mix = pointwise(channels, channels, dims)
        self.standard = batch_standard(channels, dims, running)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, source: Tensor, x: Tensor) -> Tensor:
        """Convolve."""
        return F.gelu(self.standard(self.mix(hyperzzw_local(self.slow(source), x)))) + self.bias


class Block(nn.Module):
    """Slow-fast neural encoding: six branches and one for each local kernel, compressed by a bottleneck and standardised.

    Args:
        channels: Input channels C.
        outputs: Output channels.
        size: Positions along each axis.
        hidden: Hidden features of the slow networks.
        layers: Products of the slow network of the global kernel.
        omega: Frequency scale.
        groups: Groups of the standardisation.
        sides: Sides of the local kernels.
        running: Whether evaluation uses running statistics.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        size: Sequence[int],
        *,
        hidden: int,
        layers: int,
        omega: float,
        groups: int,
        sides: Sequence[int],
        running: bool,
    ) -> None:
        super().__init__()
        dims, options = len(size), cast(dict[str, Any], {"hidden": hidden, "omega": omega})
        self.slow = SlowNet(channels, size, layers=layers, **options)
        self.channel, self.channel_out = (SlowNet(1, (channels,), layers=2, **options) for _ in range(2))
        self.spatial = SlowNet(1, size, layers=2, **options)
        self.fast, self.fast_slow = RGU(channels, size), RGU(channels, size)
        self.mix = pointwise(channels, channels, dims)
        self.standard = Instance()
        self.local = nn.ModuleList(Local(channels, side, dims, running=running, **options) for side in sides)
        self.bottleneck = pointwise((6 + len(sides)) * channels, outputs, dims)
        self.grouped = GroupedStandard(outputs, groups, dims, running)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Float[Tensor, "B C *S"]) -> Float[Tensor, "B D *S"]:
        """Encode."""
        axes = tuple(range(2, x.ndim))
        kernel = self.slow()
        fast = self.standard(self.fast_slow(x * kernel) + self.fast(x))
        mixed = self.standard(self.mix(x))
        means = x.mean(axes, keepdim=True)
        gate = hyperzzw_twice(self.channel().view(1, -1, *[1] * len(axes)), means)
        gated = self.standard(x * torch.sigmoid(gate))

        out, out_mixed, out_gated = (hyperzzw_global(kernel, x, z) for z in (fast, mixed, gated))
        means, places = out.mean(axes, keepdim=True), out.mean(1, keepdim=True)
        score = hyperzzw_twice(self.channel_out().view(1, -1, *[1] * len(axes)), means) * hyperzzw_twice(
            self.spatial(), places
        )
        pairs = ((x, gated), (gated, x), (mixed, x), (x, mixed))
        local = [branch(source, z) for branch, (source, z) in zip(self.local, pairs, strict=False)]
        branches = [out, out_mixed, out_gated, F.silu(out), fast, x * torch.sigmoid(score), *local]
        return F.gelu(self.grouped(self.bottleneck(torch.cat(branches, 1)))) + self.bias


@configured
class Terminator(nn.Module):
    """A classifier with full context in every layer and no residual, whose kernels slow networks write.

    Paper: Zhang, "HyperZ.Z.W Operator Connects Slow-Fast Networks for Full Context Interaction", arXiv:2401.17948.

    Operator: ``(Z * W) . Z'``: a hyper-kernel W, which a coordinate-based network generates, is multiplied element by element
    by hidden activations Z. The result is multiplied by Z' as a matrix (global kernels, as large as the input), by a depthwise
    convolution (local ones of sides 3, 5, 7 and 9) or element by element (over channels and over positions). Ten branches are
    concatenated and compressed. Standardisation has nothing to learn: over positions, over the batch, or in alternating groups.

    Local feedback: training adds to the loss the mean squared difference between the global kernels of every two blocks, the shallow
    one repeated to the channels of the deep one, which trains the slow networks without the fast one.

    As in the authors' published code, with these differences: kernels of local branches depend on each example alone, not on
    the mean of its batch; the renormalisation's two scales are learned; sequences use a circular convolution as global product;
    dropout and the concatenation of earlier blocks are left out; all slow networks have the same hidden features and products
    (theirs 16 to 64, and three in the first block); channel maps begin as torch's (theirs as Kaiming's, with biases of zero).
    Their code standardises over the batch in evaluation too (``running=False``); by default running statistics are used there,
    so that an example's output is its own. The authors' frequency scale is not public: their code reads ``omega_0`` from a
    configuration that does not set it, and has since been withdrawn.

    Cost for N positions: C N sqrt(N) multiply-adds for each global product of an image, C N log N of a sequence, and 14 C^2 N for
    maps of channels in each block.

    Args:
        channels: Channels of the input.
        size: Positions along each axis: (length,) or (side, side).
        classes: Number of classes K.
        widths: Channels after each block, each a multiple of the one before and of ``groups``.
        hidden: Hidden features of the slow networks.
        layers: Products of the slow networks of global kernels.
        omega: Frequency scale of the slow networks.
        groups: Groups of the standardisation.
        feedback: Weight of the local feedback.
        sides: Odd sides of the local kernels of each block, at most four.
        running: Whether evaluation uses running statistics, not the batch's own.

    Shapes: [B, C, L] or [B, C, H, H] to [B, K].

    Raises:
        ValueError: An image that is not square, widths that do not divide each other, even or too many sides, an input of
            another shape.

    Examples:
        >>> net = Terminator(1, (8, 8), classes=10, widths=(12, 12), hidden=8)
        >>> net(torch.randn(2, 1, 8, 8)).shape, net.local_feedback().item() > 0
        (torch.Size([2, 10]), True)
    """

    def __init__(
        self,
        channels: int = 3,
        size: Sequence[int] = (32, 32),
        *,
        classes: int = 10,
        widths: Sequence[int] = (12, 36, 72, 144, 288),
        hidden: int = 32,
        layers: int = 2,
        omega: float = 1.0,
        groups: int = 12,
        feedback: float = 1.0,
        sides: Sequence[int] = SIDES,
        running: bool = True,
    ) -> None:
        super().__init__()
        self.shape, self.feedback = (channels, *size), feedback
        if len(size) not in (1, 2) or len({*size}) > 1:
            raise ValueError(
                f"Terminator: size {tuple(size)}; expected (length,) or a square, as matrices are multiplied."
            )
        if len(sides) > len(SIDES) or not all(side % 2 for side in sides):
            raise ValueError(f"Terminator: sides {tuple(sides)}; expected at most {len(SIDES)} odd numbers.")
        inputs = [channels, *widths[:-1]]
        if bad := [pair for pair in pairwise(inputs) if pair[1] % pair[0]]:
            raise ValueError(
                f"Terminator: {bad[0][1]} channels after {bad[0][0]}; expected a multiple, so that kernels repeat."
            )
        self.blocks = nn.ModuleList(
            Block(i, o, size, hidden=hidden, layers=layers, omega=omega, groups=groups, sides=sides, running=running)
            for i, o in zip(inputs, widths, strict=True)
        )
        self.head = nn.Linear(widths[-1], classes)
        nn.init.kaiming_normal_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def for_task(cls, shape: DataShape, **options: Any) -> Self:
        """For images and classes: three blocks, a frequency scale that fits the side."""
        shape.require("Terminator", "image", "classes")
        options = {"widths": (12, 24, 24), "hidden": 16, "omega": shape.height / 32, **options}
        return cls(shape.channels, (shape.height, shape.width), classes=shape.classes, **options)

    def kernels(self) -> list[Tensor]:
        """The global hyper-kernel of each block."""
        return [block.slow() for block in self.blocks]  # type: ignore[operator]

    def local_feedback(self) -> Tensor:
        """The local feedback to the slow networks."""
        kernels, total = self.kernels(), self.head.weight.new_zeros(())
        for deep, kernel in enumerate(kernels):
            for shallow in kernels[:deep]:
                times = kernel.shape[1] // shallow.shape[1]
                total = total + (shallow.repeat(1, times, *[1] * (shallow.ndim - 2)) - kernel).square().mean()
        return self.feedback * total

    def forward(self, x: Float[Tensor, "B C *S"]) -> Float[Tensor, "B K"]:
        """Logits of the classes."""
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(
                f"Terminator: input {tuple(x.shape)}; expected [batch, {', '.join(map(str, self.shape))}]."
            )
        if self.training and self.feedback:
            aside.loss(self.local_feedback())
        for block in self.blocks:
            x = block(x)
        return self.head(x.flatten(2).mean(2))


EXAMPLE = Example(
    make=lambda: Terminator(1, (8, 8), widths=(4,), hidden=6, layers=1, groups=4, omega=0.25, sides=(3,)),
    inputs=lambda: (torch.randn(3, 1, 8, 8),),
    wrong=lambda: (torch.randn(2, 1, 8, 9),),
    modes={
        "two blocks": lambda: Terminator(1, (8, 8), widths=(4, 8), hidden=6, groups=4, omega=0.25),
        "batch statistics": lambda: Terminator(1, (8, 8), widths=(4,), hidden=6, groups=4, sides=(3,), running=False),
    },
    exceptions={
        "gradient": "the renormalisation of the slow networks stops the gradient of one of its two terms",
        "trace": "every example is convolved with kernels of its own, and a trace keeps the number of groups",
    },
)
