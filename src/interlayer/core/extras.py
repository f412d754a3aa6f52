"""Optional dependencies, asked for where they are used."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType


def need(module: str, extra: str, caller: str) -> ModuleType:
    """Import an optional dependency, or say who needs it and how to install it.

    Raises:
        ImportError: It is not installed.

    Examples:
        >>> need("json", "hf", "demo").__name__
        'json'
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f'{caller} needs {module!r}: pip install "interlayer[{extra}]".') from error
