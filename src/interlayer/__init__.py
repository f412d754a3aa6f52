"""Interlayer: published ideas for what happens inside and between the layers of neural networks, under one interface."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from interlayer.version import __version__

if TYPE_CHECKING:
    from interlayer.core.recipe import load, save
    from interlayer.core.select import replace
    from interlayer.models import MLP, ConvNet, Encoder, Transformer, VisionTransformer, build
    from interlayer.study import StudySpec, compare

__all__ = [
    "MLP",
    "ConvNet",
    "Encoder",
    "StudySpec",
    "Transformer",
    "VisionTransformer",
    "__version__",
    "build",
    "compare",
    "load",
    "replace",
    "save",
]

# Where the names live that are imported when they are first used, so that `import interlayer` stays light.
_WHERE = {
    "core.recipe": ("load", "save"),
    "core.select": ("replace",),
    "models": ("MLP", "ConvNet", "Encoder", "Transformer", "VisionTransformer", "build"),
    "study": ("StudySpec", "compare"),
}


def __getattr__(name: str) -> Any:
    for module, names in _WHERE.items():
        if name in names:
            return getattr(import_module(f"interlayer.{module}"), name)
    raise AttributeError(f"module 'interlayer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
