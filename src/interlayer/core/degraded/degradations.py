"""What makes an image worse: bicubic resampling, Gaussian noise and blur, JPEG."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def checked(who: str, image: Any, *, inside: bool = False) -> Tensor:
    """The image, if it is a batch of images without NaN.

    Args:
        who: Begins the error.
        image: What came.
        inside: Whether every number has to lie between 0 and 1.

    Raises:
        TypeError: It is no tensor of float32 or float64.
        ValueError: Another shape, no pixel, a number that is NaN, infinite or out of range.
    """
    if not isinstance(image, Tensor) or image.dtype not in (torch.float32, torch.float64):
        got = image.dtype if isinstance(image, Tensor) else type(image).__name__
        raise TypeError(
            f"{who}: image of {got}; expected a tensor of torch.float32 or float64. `to_tensor` converts photographs of 8 bits."
        )
    if image.ndim != 4 or 0 in image.shape[1:]:
        raise ValueError(f"{who}: image {tuple(image.shape)}; expected [batch, channels, height, width].")
    if not torch.isfinite(image).all():
        raise ValueError(f"{who}: the image has NaN or infinite numbers. Leave that image out.")
    if inside and image.numel() and (image.min() < 0 or image.max() > 1):
        raise ValueError(
            f"{who}: numbers from {image.min():.4g} to {image.max():.4g}; expected 0 (black) to 1 (white). Divide 8-bit "
            "images by 255, or pass `eight_bit(image)`."
        )
    return image


def to_tensor(photograph: np.ndarray[Any, Any]) -> Float[Tensor, "1 3 H W"]:
    """A photograph of 8 bits, [H, W] or [H, W, C] with at least 3 channels, as a batch of one in RGB.

    Grey photographs get three equal channels; channels after the third (opacity) are dropped.

    Raises:
        TypeError: Another type of numbers.
        ValueError: Another shape.

    Examples:
        >>> to_tensor(np.full((2, 3), 255, dtype=np.uint8)).shape
        torch.Size([1, 3, 2, 3])
    """
    if getattr(photograph, "dtype", None) != np.uint8:
        got = getattr(photograph, "dtype", type(photograph).__name__)
        raise TypeError(f"to_tensor: photograph of {got}; expected an array of uint8.")
    colour = photograph[..., None].repeat(3, -1) if photograph.ndim == 2 else photograph[..., :3]
    if colour.ndim != 3 or colour.shape[-1] != 3:
        raise ValueError(f"to_tensor: photograph {photograph.shape}; expected [height, width] or [height, width, 3].")
    return torch.tensor(colour).permute(2, 0, 1).unsqueeze(0).float() / 255


def eight_bit(image: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """The image as a file of 8 bits would hold it: clamped to 0 and 1, rounded to multiples of 1/255.

    Raises:
        TypeError: No tensor of float32 or float64.
        ValueError: Another shape, NaN or infinite numbers.

    Examples:
        >>> eight_bit(torch.tensor([[[[-1.0, 0.501, 2.0]]]])).mul(255)
        tensor([[[[  0., 128., 255.]]]])
    """
    return (checked("eight_bit", image).clamp(0, 1) * 255).round() / 255


def modcrop(image: Float[Tensor, "B C H W"], scale: int) -> Float[Tensor, "B C h w"]:
    """The image without the last rows and columns, so that ``scale`` divides both sides.

    Raises:
        TypeError: No tensor of float32 or float64.
        ValueError: Another shape, NaN or infinite numbers, an image smaller than the scale.

    Examples:
        >>> modcrop(torch.zeros(1, 3, 10, 13), 4).shape
        torch.Size([1, 3, 8, 12])
    """
    height, width = (n - n % scale for n in checked("modcrop", image).shape[2:])
    if not height or not width:
        raise ValueError(f"modcrop: image {tuple(image.shape)} is smaller than scale {scale}. Use a larger image.")
    return image[..., :height, :width]


def shrink(image: Float[Tensor, "B C H W"], scale: int) -> Float[Tensor, "B C h w"]:
    """Bicubic down-scaling with anti-aliasing as MATLAB's ``imresize(image, 1/scale)``, by which super-resolution is measured.

    Keys' cubic (a = -1/2), stretched by the scale. Borders are mirrored, as MATLAB does; PIL and torch (``antialias=True``)
    renormalise the kernel there, which moves the outer pixels by up to 0.015, and are equal elsewhere. On 8-bit images PIL rounds
    after each of its two passes, and differs by up to 4/255 (56 dB). MATLAB itself was not run: the reference is a public port
    of ``imresize`` to NumPy, which this equals to 1e-15 in float64. The result may leave 0 to 1; the field's low-resolution images
    are ``eight_bit(shrink(image, scale))``.

    Args:
        image: Images.
        scale: Factor from 2 up; it divides height and width.

    Raises:
        TypeError: No tensor of float32 or float64.
        ValueError: A scale below 2, or one that does not divide the image; another shape, NaN or infinite numbers.

    Examples:
        >>> shrink(torch.full((1, 3, 8, 12), 0.25), 4)[0, 0]
        tensor([[0.2500, 0.2500, 0.2500],
                [0.2500, 0.2500, 0.2500]])
    """
    height, width = checked("shrink", image).shape[2:]
    _check_scale("shrink", scale)
    if height % scale or width % scale:
        raise ValueError(
            f"shrink: image {tuple(image.shape)}; expected a height and width that {scale} divides. `modcrop` crops it."
        )
    size = (height // scale + 4, width // scale + 4)  # two low-resolution pixels more at each side, for the kernel
    small = F.interpolate(mirrored(image, 2 * scale), size, mode="bicubic", antialias=True, align_corners=False)
    return small[..., 2:-2, 2:-2]


def enlarge(image: Float[Tensor, "B C h w"], scale: int) -> Float[Tensor, "B C H W"]:
    """Bicubic up-scaling as MATLAB's ``imresize(image, scale)``: the field's baseline.

    Args:
        image: Images.
        scale: Factor from 2 up.

    Raises:
        TypeError: No tensor of float32 or float64.
        ValueError: A scale below 2; another shape, NaN or infinite numbers.

    Examples:
        >>> enlarge(torch.zeros(1, 3, 4, 5), 3).shape
        torch.Size([1, 3, 12, 15])
    """
    height, width = checked("enlarge", image).shape[2:]
    _check_scale("enlarge", scale)
    size = ((height + 4) * scale, (width + 4) * scale)
    large = F.interpolate(mirrored(image, 2), size, mode="bicubic", antialias=True, align_corners=False)
    return large[..., 2 * scale : -2 * scale, 2 * scale : -2 * scale]


def _check_scale(who: str, scale: int) -> None:
    if not isinstance(scale, int) or scale < 2:
        raise ValueError(f"{who}: scale {scale!r}; expected a whole number from 2 up.")


def mirrored(image: Float[Tensor, "B C H W"], pad: int) -> Float[Tensor, "B C _ _"]:
    """Pad by mirroring, the edge pixel included (``c b a | a b c``), however far."""
    for axis in (2, 3):
        n = image.shape[axis]
        at = torch.arange(-pad, n + pad, device=image.device) % (2 * n)
        image = image.index_select(axis, torch.where(at < n, at, 2 * n - 1 - at))
    return image


def noisy(image: Float[Tensor, "B C H W"], sigma: float, seed: int) -> Float[Tensor, "B C H W"]:
    """The image with white Gaussian noise; not clamped, as denoisers are measured.

    Args:
        image: Images.
        sigma: Standard deviation, where white is 1; the field's "noise of 25" is 25 / 255.
        seed: Decides the noise, together with the shape.

    Raises:
        TypeError: No tensor of float32 or float64.
        ValueError: A negative sigma; another shape, NaN or infinite numbers.

    Examples:
        >>> noise = noisy(torch.zeros(1, 3, 50, 50), 0.1, seed=0)
        >>> 0.09 < noise.std() < 0.11, torch.equal(noise, noisy(torch.zeros(1, 3, 50, 50), 0.1, seed=0))
        (tensor(True), True)
    """
    if not sigma >= 0:
        raise ValueError(f"noisy: sigma {sigma}; expected 0 or more, where white is 1.")
    noise = torch.randn(checked("noisy", image).shape, generator=torch.Generator().manual_seed(seed), dtype=image.dtype)
    return image + sigma * noise.to(image.device)


def blurred(image: Float[Tensor, "B C H W"], sigma: float) -> Float[Tensor, "B C H W"]:
    """The image under a Gaussian blur, cut at four standard deviations, borders mirrored: SciPy's ``gaussian_filter``.

    Args:
        image: Images.
        sigma: Standard deviation of the kernel in pixels.

    Raises:
        TypeError: No tensor of float32 or float64.
        ValueError: A sigma that is not above 0; another shape, NaN or infinite numbers.

    Examples:
        >>> blurred(torch.ones(1, 1, 5, 5), 2.0).std() < 1e-6
        tensor(True)
    """
    if not 0 < sigma < math.inf:
        raise ValueError(f"blurred: sigma {sigma}; expected pixels above 0.")
    radius = int(4 * sigma + 0.5)
    return window(mirrored(checked("blurred", image), radius), sigma, radius)


def window(image: Float[Tensor, "B C H W"], sigma: float, radius: int) -> Float[Tensor, "B C _ _"]:
    """Gaussian means over every window of side 2 radius + 1 that lies inside of the image."""
    kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, dtype=torch.float64) / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(image)
    channels = image.shape[1]
    across = F.conv2d(image, kernel.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)
    return F.conv2d(across, kernel.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)


def encode(image: Float[Tensor, "1 C H W"], quality: int) -> bytes:
    """One image as a JPEG file, written by PIL (colour at half resolution, PIL's default).

    Args:
        image: One image, of 1 or 3 channels, from 0 to 1.
        quality: From 1 to 95.

    Raises:
        TypeError: No tensor of float32 or float64.
        ValueError: Several images, other channels, numbers outside of 0 to 1, a quality outside of 1 to 95.

    Examples:
        >>> image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> data = encode(image, quality=10)
        >>> data[:2].hex(), decode(data).shape
        ('ffd8', torch.Size([1, 3, 16, 16]))
    """
    from PIL import Image

    if checked("encode", image, inside=True).shape[0] != 1 or image.shape[1] not in (1, 3):
        raise ValueError(f"encode: image {tuple(image.shape)}; expected one image, [1, 1 or 3, height, width].")
    if not 1 <= quality <= 95:
        raise ValueError(f"encode: quality {quality}; expected 1 (smallest file) to 95.")
    pixels = (image[0] * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "JPEG", quality=int(quality))
    return file.getvalue()


def decode(data: bytes) -> Float[Tensor, "1 C H W"]:
    """The image in a file that PIL reads, grey or in RGB.

    Raises:
        ValueError: PIL does not read it.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data)) as file:
            pixels = np.array(file if file.mode in ("L", "RGB") else file.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"decode: {len(data)} bytes that are no image: {error}.") from error
    whole = pixels[..., None] if pixels.ndim == 2 else pixels
    return torch.from_numpy(whole).permute(2, 0, 1).unsqueeze(0).float() / 255
