"""The data that comes with the dependencies, as it is: read from installed packages, never downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from interlayer.core.extras import need

PHOTOGRAPHS = (
    *("astronaut", "brick", "camera", "cat", "cell", "coffee", "coins", "clock", "grass", "gravel"),
    *("hubble_deep_field", "immunohistochemistry", "moon", "rocket"),
)


@cache
def photographs() -> Mapping[str, np.ndarray[Any, np.dtype[np.uint8]]]:
    """Photographs by name, [H, W] or [H, W, 3], 8 bits: fourteen of scikit-image, then china and flower of scikit-learn.

    Raises:
        ImportError: scikit-image is not installed.

    Examples:
        >>> photographs()["cat"].shape
        (300, 451, 3)
    """
    bundled = need("skimage.data", "images", "photographs")
    from sklearn.datasets import load_sample_images

    found = {name: getattr(bundled, name)() for name in PHOTOGRAPHS}
    return found | dict(zip(("china", "flower"), load_sample_images().images, strict=True))
