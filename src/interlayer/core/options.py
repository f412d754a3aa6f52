"""Options given as data (on the command line, in a study) checked against the constructor that takes them."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from interlayer import catalog


def checked(make: Callable[..., Any], given: Mapping[str, Any], who: str) -> dict[str, Any]:
    """The options, if the constructor takes each name and its type.

    An annotation that can't be evaluated outside type checkers (an alias of names that are defined later) is not checked.

    Args:
        make: A class or function.
        given: Options by name.
        who: Begins the error.

    Raises:
        ValueError: There is no such option, or it has another type; the message names the nearest option.

    Examples:
        >>> def scale(*, factor: float = 1.0, mode: typing.Literal["a", "b"] = "a"): ...
        >>> checked(scale, {"factor": 2}, "demo")
        {'factor': 2}
        >>> checked(scale, {"facter": 2}, "demo")
        Traceback (most recent call last):
        ValueError: demo: no option 'facter'. Did you mean 'factor'? It takes factor, mode.
        >>> checked(scale, {"mode": "c"}, "demo")
        Traceback (most recent call last):
        ValueError: demo: mode was 'c'; expected 'a' or 'b'.
    """
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    known = inspect.signature(make).parameters
    for name, value in given.items():
        if name not in known:
            takes = f"It takes {', '.join(known)}." if known else "It takes none."
            raise ValueError(f"{who}: no option {name!r}.{catalog.nearest(name, known)} {takes}")
        try:
            hint = _hint(make, name)
        except (NameError, TypeError):
            continue
        try:
            TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value, strict=True)
        except ValidationError as error:
            wanted = dict.fromkeys(
                e["msg"].removeprefix("Input should be ").removesuffix(" type") for e in error.errors()
            )
            raise ValueError(f"{who}: {name} was {value!r}; expected {' or '.join(wanted)}.") from None
    return dict(given)


def _hint(make: Callable[..., Any], name: str) -> Any:
    """The type of one argument, evaluated where the constructor was written."""
    plain: Any = make.__init__ if isinstance(make, type) else make
    only = type("only", (), {"__annotations__": {name: plain.__annotations__.get(name, Any)}})
    return typing.get_type_hints(only, globalns=plain.__globals__)[name]
