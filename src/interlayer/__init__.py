"""Interlayer: published ideas for what happens inside and between the layers of neural networks, under one interface."""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Public names and where they live; each is imported when it is first asked for, so `import interlayer` stays light.
_WHERE = {
    "Transformer": "models",
    "Encoder": "models",
    "VisionTransformer": "models",
    "MLP": "models",
    "ConvNet": "models",
    "build": "models",
    "save": "core.recipe",
    "load": "core.recipe",
    "replace": "core.select",
    "compare": "study",
    "StudySpec": "study",
}
__all__ = [  # noqa: PLE0604 (the names of _WHERE are strings)
    "__version__",
    *_WHERE,
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"interlayer.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'interlayer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
