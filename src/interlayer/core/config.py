"""Constructor arguments kept on a model, so that it can be saved as data and built again."""

from __future__ import annotations

import functools
import inspect
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=type[nn.Module])


def configured(cls: M) -> M:
    """Class decorator: ``model.config`` holds every argument that the constructor was called with."""
    make = cls.__init__
    signature = inspect.signature(make)

    @functools.wraps(make)
    def init(self: nn.Module, *args: Any, **options: Any) -> None:
        make(self, *args, **options)
        if type(self) is cls:
            given = dict(signature.bind(self, *args, **options).arguments)
            given.pop(next(iter(signature.parameters)))
            for extra in [n for n, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD]:
                given |= given.pop(extra, {})
            self.config = given  # type: ignore[assignment]

    cls.__init__ = init  # type: ignore[method-assign]
    return cls
