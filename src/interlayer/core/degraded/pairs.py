"""Patches of degraded images with the clean ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from interlayer.core.degraded.degradations import checked, modcrop


class Pairs:
    """Patches at the same place of images and of what a degradation makes of them.

    Whole images are degraded, once, so that patches have no borders of their own. Train and validation must have pairs from
    different photographs. For noise that is fresh in every patch, degrade the clean patches instead.

    Args:
        images: Clean images, each a batch of one, of the same number of channels and any size.
        degrade: Applied to each image, cropped to multiples of ``scale``.
        scale: How many times smaller a degraded image is than the clean one.

    Raises:
        TypeError: An image is no tensor of float32 or float64.
        ValueError: No image, no batches of one, another number of channels, or a degraded image of a wrong size.

    Examples:
        >>> from interlayer.core.degraded import shrink
        >>> pairs = Pairs([torch.rand(1, 3, 20, 31), torch.rand(1, 3, 16, 16)], lambda x: shrink(x, 2), scale=2)
        >>> small, large = pairs.patches(5, 6, torch.Generator().manual_seed(0))
        >>> small.shape, large.shape
        (torch.Size([5, 3, 6, 6]), torch.Size([5, 3, 12, 12]))
    """

    def __init__(
        self, images: Sequence[Float[Tensor, "1 C _ _"]], degrade: Callable[[Tensor], Tensor], *, scale: int = 1
    ) -> None:
        self.scale = scale
        clean = [modcrop(checked("Pairs", image, inside=True), scale) for image in images]
        if len({tuple(image.shape[:2]) for image in clean}) != 1 or len(clean[0]) != 1:
            shapes = [tuple(image.shape) for image in clean]
            raise ValueError(f"Pairs: images {shapes}; expected some [1, channels, height, width] of equal channels.")
        degraded = [checked("Pairs", degrade(image)) for image in clean]
        for large, small in zip(clean, degraded, strict=True):
            if any(n * scale != m for n, m in zip(small.shape[2:], large.shape[2:], strict=True)):
                raise ValueError(
                    f"Pairs: {tuple(large.shape)} became {tuple(small.shape)}; expected a height and width {scale} times smaller."
                )
        self.sides = torch.tensor([image.shape[2:] for image in degraded])
        # All pixels in one row, so that a batch of patches is one gather.
        self._rows = [torch.cat([i[0].flatten(1) for i in images], 1) for images in (degraded, clean)]

    def patches(
        self, count: int, size: int, generator: torch.Generator, *, augment: bool = True
    ) -> tuple[Float[Tensor, "N C S S"], Float[Tensor, "N C T T"]]:
        """Random patches: degraded ones of side S = ``size`` and the clean ones of side T = scale S.

        Args:
            count: Patches N; each from a random image.
            size: Side of a degraded patch in pixels.
            generator: Decides everything.
            augment: Whether each is turned and flipped at random, into one of eight forms.

        Raises:
            ValueError: An image is smaller than a patch.
        """
        if not 1 <= size <= int(self.sides.min()):
            raise ValueError(
                f"Pairs: patches of {size} pixels; the smallest side of a degraded image is {int(self.sides.min())}."
            )
        chosen = torch.randint(len(self.sides), (count,), generator=generator)
        room = self.sides[chosen] - size + 1
        corner = (torch.rand(count, 2, generator=generator, dtype=torch.float64) * room).long()
        forms = torch.randint(2, (3, count, 1), generator=generator) * int(augment)
        return self._cut(0, 1, chosen, corner, size, forms), self._cut(1, self.scale, chosen, corner, size, forms)

    def _cut(self, which: int, scale: int, chosen: Tensor, corner: Tensor, size: int, forms: Tensor) -> Tensor:
        sides, side = self.sides * scale, size * scale
        begin = torch.cat([torch.zeros(1, dtype=torch.long), sides.prod(1).cumsum(0)])[chosen]
        along = torch.arange(side)
        down, across, turn = forms
        y = torch.where(down == 1, side - 1 - along, along)[:, :, None]
        x = torch.where(across == 1, side - 1 - along, along)[:, None, :]
        swapped = turn[..., None] == 1
        y, x = torch.where(swapped, y.mT, y), torch.where(swapped, x.mT, x)
        width = sides[chosen, 1].view(-1, 1, 1)
        at = (
            begin.view(-1, 1, 1)
            + (corner[:, 0].view(-1, 1, 1) * scale + y) * width
            + corner[:, 1].view(-1, 1, 1) * scale
            + x
        )
        return self._rows[which][:, at].transpose(0, 1)
