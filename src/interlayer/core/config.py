"""Constructor arguments kept on a model, so that it can be saved as data and built again."""

from __future__ import annotations

import functools
import inspect
from typing import Any, TypeVar

from torch import nn

from interlayer.core.slots import SIZES, watching

M = TypeVar("M", bound=type[nn.Module])


def configured(cls: M) -> M:
    """Class decorator: ``model.config`` holds every argument that the constructor was called with.

    Raise ``ValueError`` for a slot or size that no part is built from: every argument must have an effect.
    """
    make = cls.__init__
    signature = inspect.signature(make)

    @functools.wraps(make)
    def init(self: nn.Module, *args: Any, **options: Any) -> None:
        given = dict(signature.bind(self, *args, **options).arguments)
        given.pop(next(iter(signature.parameters)))
        own = {n: v for n, v in given.items() if n not in SIZES}  # a size that a model names itself is its own
        for extra in [n for n, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD]:
            own |= given.get(extra, {})
            given |= given.pop(extra, {})
        with watching(cls.__name__, own):
            make(self, *args, **options)
        if type(self) is cls:
            self.config = given  # type: ignore[assignment]

    cls.__init__ = init  # type: ignore[method-assign]
    return cls
