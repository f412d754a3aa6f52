"""Python objects in studies: named in text as ``package.module:name``, or given directly and kept under a name of their own."""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from interlayer import catalog
from interlayer.study.spec import GIVEN, StudyError, shown

__all__ = ["Objects", "is_path", "load_object", "shown"]


def is_path(text: str) -> bool:
    """Whether a text is of the form ``package.module:function``, perhaps with options in brackets."""
    module, colon, function = text.partition("(")[0].partition(":")
    return (
        bool(colon)
        and not text.startswith(GIVEN)
        and all(p.isidentifier() for p in (*module.split("."), function.strip()))
    )


def load_object(path: str) -> Any:
    """Import ``package.module:name``; the current folder is searched too.

    Raises:
        StudyError: There is no such module, or it has no such name.
    """
    module, _, name = path.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        if error.name and not f"{module}.".startswith(f"{error.name}."):
            raise
        raise StudyError(f"{path}: there is no module {module!r} here ({os.getcwd()}) or installed.") from error
    if not hasattr(found, name):
        raise StudyError(f"{path}: module {module!r} has no {name!r}.{catalog.nearest(name, dir(found))}")
    return getattr(found, name)


class Objects(dict[str, Any]):
    """Objects by the text that a study's records have for them, ``python:NAME-DIGEST``.

    The digest is of the object's content (weights, data, source code), so that a study of a changed object is another
    study, and one of the same object goes on with the runs there are.

    Examples:
        >>> given = Objects()
        >>> text = given.text(nn.ReLU())
        >>> text.startswith("python:ReLU-"), given.get_or_text(text), given.get_or_text("mlp")
        (True, ReLU(), 'mlp')
    """

    def text(self, thing: Any, name: str = "") -> str:
        """Keep an object and return the text that stands for it; a text stands for itself."""
        if isinstance(thing, str):
            return thing
        name = name or getattr(thing, "name", "") or getattr(thing, "__name__", type(thing).__name__)
        name = re.sub(r"\W+", "-", name).strip("-")
        hashed = hashlib.blake2b(digest_size=4)
        for part in _content(thing, {}):
            hashed.update(part)
        text = f"{GIVEN}{name}-{hashed.hexdigest()}"
        self[text] = thing
        return text

    def get_or_text(self, text: str) -> Any:
        """The object that a text stands for, or the text.

        Raises:
            StudyError: The text stands for an object that was given to another process.
        """
        if text.startswith(GIVEN) and text not in self:
            raise StudyError(f"{shown(text)!r} was given as an object of Python; run the study from Python again.")
        return self.get(text, text)


def _content(thing: Any, seen: dict[int, Any]) -> Iterator[bytes]:
    """Bytes that differ if the content of an object does."""
    if id(thing) in seen:
        return
    if isinstance(thing, Tensor):
        yield f"{thing.dtype}{tuple(thing.shape)}".encode()
        yield thing.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if thing.numel() else b""
    elif isinstance(thing, np.ndarray):
        yield f"{thing.dtype}{thing.shape}".encode()
        yield np.ascontiguousarray(thing).tobytes()
    elif isinstance(thing, str | bytes | int | float | complex | type(None) | torch.dtype | torch.device | torch.Size):
        yield repr(thing).encode()
    elif isinstance(thing, Mapping):
        seen[id(thing)] = thing
        yield from (part for pair in thing.items() for part in _content(list(pair), seen))
    elif isinstance(thing, list | tuple | set | frozenset):
        seen[id(thing)] = thing
        yield str(len(thing)).encode()
        yield from (part for item in thing for part in _content(item, seen))
    elif isinstance(thing, functools.partial):
        yield from _content([thing.func, list(thing.args), dict(thing.keywords)], seen)
    elif isinstance(thing, CodeType):
        yield thing.co_code + repr(thing.co_names).encode()
        yield from _content(list(thing.co_consts), seen)
    elif inspect.isroutine(thing) or isinstance(thing, type):
        seen[id(thing)] = thing
        yield from _source(thing, seen)
    elif isinstance(thing, nn.Module):
        yield from _content(
            [type(thing), repr(thing), dict(thing.named_parameters()), dict(thing.named_buffers())], seen
        )
    elif isinstance(thing, torch.Generator):
        yield b"generator"
    else:
        seen[id(thing)] = thing
        yield type(thing).__qualname__.encode()
        yield from _content(getattr(thing, "__dict__", repr(type(thing))), seen)


def _source(thing: Any, seen: dict[int, Any]) -> Iterator[bytes]:
    """The source of a class, or the code of its methods where the source is not kept; the code of a function."""
    yield getattr(thing, "__qualname__", repr(type(thing))).encode()
    if not isinstance(thing, type):
        code = getattr(thing, "__code__", None)
        values = [c.cell_contents for c in getattr(thing, "__closure__", None) or ()]
        yield from _content([code, values, getattr(thing, "__defaults__", None)], seen)
        return
    try:
        yield inspect.getsource(thing).encode()
    except (OSError, TypeError):
        yield from _content({k: v for k, v in vars(thing).items() if inspect.isroutine(v)}, seen)
