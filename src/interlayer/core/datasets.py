"""The data that comes with the dependencies, as it is: read from installed packages, never downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np

from interlayer.core.extras import need

PHOTOGRAPHS = (
    *("astronaut", "brick", "camera", "cat", "cell", "coffee", "coins", "clock", "grass", "gravel"),
    *("hubble_deep_field", "immunohistochemistry", "moon", "rocket", "china", "flower"),
)


@cache
def photograph(name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A photograph of scikit-image, or china or flower of scikit-learn, [H, W] or [H, W, 3], 8 bits.

    Args:
        name: One of ``PHOTOGRAPHS``.

    Raises:
        ImportError: scikit-image is not installed.
        ValueError: Unknown name.

    Examples:
        >>> photograph("cat").shape
        (300, 451, 3)
    """
    if name not in PHOTOGRAPHS:
        raise ValueError(f"photograph: {name!r} is not one of {', '.join(PHOTOGRAPHS)}.")
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        return load_sample_image(f"{name}.jpg")
    return getattr(need("skimage.data", "images", "photograph"), name)()


def photographs() -> Mapping[str, np.ndarray[Any, np.dtype[np.uint8]]]:
    """All photographs by name."""
    return {name: photograph(name) for name in PHOTOGRAPHS}
