"""DeepJSCC-WZ: images sent over a noisy channel without bits, to a receiver that has a similar image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.channel import Channel, checked_snr, normalised
from interlayer.core.data import DataShape, run
from interlayer.core.example import Example
from interlayer.core.fit import fit
from interlayer.domains.wireless._parts import AttentionBlock, Residual, Up
from interlayer.domains.wireless.tasks import photographs_sent

IMAGE, SIDE = 0.0, 1.0  # the flag by which the encoder tells them apart


class Modulation(nn.Module):
    """Weigh features by their means and by what is known of the channel: ``x * sigmoid(W2 leaky(W1 [mean x, c] + b1) + b2)``.

    The attention feature module of Xu et al. (arXiv:2012.00533).

    Args:
        width: Features.
        known: Numbers c that are known: the SNR in dB, and a flag.
    """

    def __init__(self, width: int, known: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width + known, width), nn.LeakyReLU(), nn.Linear(width, width), nn.Sigmoid()
        )

    def forward(self, x: Float[Tensor, "B N H W"], known: Float[Tensor, "B K"]) -> Float[Tensor, "B N H W"]:
        """Weigh."""
        return x * self.layers(torch.cat((x.mean((2, 3)), known), 1))[..., None, None]


class DeepJSCC(nn.Module):
    """Deep joint source-channel coding with side information at the decoder only (DeepJSCC-WZ).

    Paper: Yilmaz, Ozyilkan, Gündüz and Erkip, "Distributed Deep Joint Source-Channel Coding with Decoder-Only Side Information",
    ICMLCN 2024, arXiv:2310.04311; code ipc-lab/deepjscc-wz.

    The encoder f turns an image x into complex symbols of mean power 1, the channel adds noise, and the decoder g turns what arrives,
    and a correlated image s that only it has, into an estimate: ``g(channel(f(x, snr, 0)), f(s, snr, 1), snr)``. Side
    information goes through the *same* encoder, told apart by a flag beside the SNR that modulates the features; the decoder reads
    its features of all five resolutions, the image s itself among them. Four stages halve the sides. There are
    ``ratio`` = (complex symbols) / (numbers in the image), 1/16 or 1/32 in the paper.

    Blocks are those of learned image compression (residual, GDN, attention), as in the authors' code, built from compressai. Their
    module of modulation is not in their repository; it is that of Xu et al., as the same laboratory publishes it elsewhere (ipc-lab/
    kaira). They train on SNRs uniform from -5 to 5 dB with mean squared error and a thousandth of LPIPS; ``width`` is 256.

    Args:
        channels: Channels C of the images.
        width: Features N of the stages.
        ratio: Complex symbols for each number in the image; at 4 stages 1/ratio must divide ``256 C``.
        side: Whether the decoder has side information. Without, it is plain DeepJSCC.
        stages: Halvings of the sides; 4 in the paper.
        units: Bottlenecks in each branch of an attention block: 3 in the paper; with 0 a gate is left.
        channel: The channel. Defaults to AWGN.

    Shapes: image and side information [B, C, H, W] from 0 to 1, H and W multiples of ``2^stages``; SNR [B] in dB; to [B, C, H, W].

    Raises:
        ValueError: Sizes out of range, images of another shape, side information that is missing or of another size.

    Examples:
        >>> model = DeepJSCC(1, width=8)
        >>> image = torch.rand(2, 1, 32, 32)
        >>> model(image, torch.tensor([0.0, 5.0]), side=image).shape, model.symbols(image.shape)
        (torch.Size([2, 1, 32, 32]), 64)
    """

    def __init__(
        self,
        channels: int = 3,
        *,
        width: int = 256,
        ratio: float = 1 / 16,
        side: bool = True,
        stages: int = 4,
        units: int = 3,
        channel: Channel | None = None,
    ) -> None:
        super().__init__()
        last = 2 * channels * 4**stages * ratio
        if (
            min(channels, width, stages) < 1
            or units < 0
            or width % 2
            or last < 2
            or last != round(last)
            or round(last) % 2
        ):
            raise ValueError(
                f"DeepJSCC: channels {channels}, width {width}, units {units}, ratio {ratio}; expected units of 0 or more, an even "
                f"width, and a ratio that gives an even number of features (here {last:g})."
            )
        n, m = width, round(last)
        self.channels, self.side, self.ratio, self.stages = channels, side, ratio, stages
        self.channel = Channel() if channel is None else channel
        known, k = (2, 2) if side else (1, 1)
        self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList([AttentionBlock(k * m, units), Residual(k * m, n)])
        for i in range(1, stages):  # attention at every second resolution
            self.encoder += [Residual(channels if i == 1 else n, n, stride=2), Modulation(n, known)]
            self.encoder += [*([] if i % 2 else [AttentionBlock(n, units)]), Residual(n, n)]
            self.decoder += [Up(n, n), Modulation(k * n, 1)]
            self.decoder += [*([] if (stages - i) % 2 else [AttentionBlock(k * n, units)]), Residual(k * n, n)]
        self.encoder += [
            Residual(channels if stages == 1 else n, m, stride=2),
            Modulation(m, known),
            AttentionBlock(m, units),
        ]
        self.decoder += [Up(n, channels), Modulation(k * channels, 1), Residual(k * channels, channels)]

    @classmethod
    def for_task(cls, shape: DataShape, **options: Any) -> Self:
        """A narrow network for a task of images that are sent."""
        shape.require("DeepJSCC", "image", "image")
        return cls(shape.channels, **{"width": 16, **options})

    def symbols(self, shape: Sequence[int]) -> int:
        """Complex symbols that an image of this shape takes."""
        return round(self.channels * shape[-2] * shape[-1] * self.ratio)

    def forward(
        self,
        image: Float[Tensor, "B C H W"],
        snr: Float[Tensor, " B"],
        side: Float[Tensor, "B C H W"] | None = None,
        noise: Float[Tensor, "B M h w"] | None = None,
    ) -> Float[Tensor, "B C H W"]:
        """Send an image and receive it.

        Args:
            image: What is sent.
            snr: Of the channel, in dB; sender and receiver know it.
            side: What the receiver has; a model without side information passes it by.
            noise: Standard normal numbers for the channel, [B, M, H / 16, W / 16] with twice as many as symbols. Drawn if not given.
        """
        self._check(image, side)
        known = checked_snr("DeepJSCC", snr, image.shape[0]).to(image)[:, None]
        count, given, told = image.shape[0], image, self._told(known, IMAGE)
        if self.side and side is not None:  # both in one batch
            given, told = torch.cat((image, side)), torch.cat((told, self._told(known, SIDE)))
        features = self._features(given, told)
        x = self.channel(normalised(features[-1][:count]), snr.to(image), noise)
        return self._received(x, [f[count:] for f in features] if self.side else [], known)

    def _told(self, known: Tensor, flag: float) -> Tensor:
        return torch.cat((known, torch.full_like(known, flag)), 1) if self.side else known

    def _features(self, x: Tensor, known: Tensor) -> list[Tensor]:
        """What the encoder makes of an image: what goes into each halving, and the last."""
        found = []
        for layer in self.encoder:
            if isinstance(layer, Residual) and layer.stride > 1:
                found.append(x)
            x = layer(x, known) if isinstance(layer, Modulation) else layer(x)
        return [*found, x]

    def _received(self, x: Tensor, features: list[Tensor], known: Tensor) -> Tensor:
        for i, layer in enumerate(self.decoder):
            joins = i == 0 or isinstance(self.decoder[i - 1], Up)
            if joins and features:
                x = torch.cat((x, features.pop()), 1)
            x = layer(x, known) if isinstance(layer, Modulation) else layer(x)
        return x

    def _check(self, image: Tensor, side: Tensor | None) -> None:
        if (
            image.ndim != 4
            or image.shape[1] != self.channels
            or any(n % 2**self.stages or not n for n in image.shape[2:])
        ):
            raise ValueError(
                f"DeepJSCC: image {tuple(image.shape)}; expected [B, {self.channels}, H, W], height and width multiples of "
                f"{2**self.stages}. Pad or crop it."
            )
        if side is None and self.side:
            raise ValueError("DeepJSCC: side information is missing; expected side=, or a model with side=False.")
        if side is not None and side.shape != image.shape:
            raise ValueError(
                f"DeepJSCC: side information {tuple(side.shape)} for an image {tuple(image.shape)}; expected equal shapes."
            )


def _train() -> tuple[float, float]:
    """Squared errors after a short training of a narrow model: of what arrives at 5 dB, and of the mean image."""
    task = photographs_sent(photographs=("gravel", "grass"), shift=2)
    model = DeepJSCC.for_task(task.shape, width=4, stages=2, units=0)
    fit(model, task.batches(0, 4), lambda m, batch: task.loss(run(m, batch[0]), batch[1]), steps=60, lr=1e-2)
    inputs, image = next(task.batches(1, 32))
    with torch.no_grad():
        found = task.loss(model.eval()(**inputs | {"snr": torch.full((32,), 5.0)}), image)
    return float(found), float(image.var())


EXAMPLE = Example(
    make=lambda: DeepJSCC(1, width=4, ratio=1 / 4, stages=2, units=0),
    inputs=lambda: (
        torch.rand(2, 1, 8, 12),
        torch.tensor([0.0, 5.0]),
        torch.rand(2, 1, 8, 12),
        torch.randn(2, 8, 2, 3),
    ),
    wrong=lambda: (torch.rand(2, 1, 8, 10), torch.tensor([0.0, 5.0]), torch.rand(2, 1, 8, 10)),
    modes={
        "with bottlenecks": lambda: DeepJSCC(1, width=4, ratio=1 / 4, stages=2, units=1),
        "without side information": lambda: DeepJSCC(1, width=4, ratio=1 / 4, stages=2, units=0, side=False),
    },
    train=_train,
)
