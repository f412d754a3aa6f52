"""A space of named choices, whose points are plain data."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Point = dict[str, Any]
"""An option for each choice, by name; nested where the space is. JSON and TOML hold it as it is."""
TRIES = 1000  # draws until an invalid space is reported


class Space:
    """Named choices, each among a few options; a choice may be a space itself.

    A point is a nested dict of options, so that it is stored as JSON or TOML and compared with ``==``.

    Args:
        choices: For each name a sequence of options (strings, numbers, or lists of them) or another space.
        valid: Whether a point is allowed, where not every combination is. Sampling draws until it is.

    Raises:
        ValueError: No choices, a choice without options, or one option twice.

    Examples:
        >>> space = Space({"depth": (1, 2, 3), "head": Space({"kind": ("mean", "max"), "width": (8, 16)})})
        >>> space.count
        12
        >>> point = space.sample(random.Random(0))
        >>> point
        {'depth': 2, 'head': {'kind': 'max', 'width': 8}}
        >>> space.mutate(point, random.Random(0))
        {'depth': 2, 'head': {'kind': 'mean', 'width': 8}}
    """

    def __init__(
        self, choices: Mapping[str, Sequence[Any] | Space], *, valid: Callable[[Point], bool] | None = None
    ) -> None:
        if not choices:
            raise ValueError("Space: no choices; expected at least one. Give {name: options}.")
        self.choices = {n: c if isinstance(c, Space) else list(c) for n, c in choices.items()}
        self.valid = valid
        for name, options in self.choices.items():
            if isinstance(options, list):
                if not options:
                    raise ValueError(f"Space: choice {name!r} has no options; expected at least one. Leave it out.")
                if twice := [o for i, o in enumerate(options) if o in options[:i]]:
                    raise ValueError(f"Space: choice {name!r} has the option {twice[0]!r} twice; give it once.")

    @property
    def leaves(self) -> dict[tuple[str, ...], list[Any]]:
        """The options of every choice, nested ones included, by path."""
        found: dict[tuple[str, ...], list[Any]] = {}
        for name, options in self.choices.items():
            if isinstance(options, Space):
                found |= {(name, *path): inner for path, inner in options.leaves.items()}
            else:
                found[name,] = options
        return found

    @property
    def count(self) -> int:
        """Number of points; where ``valid`` refuses some, these are counted too."""
        return math.prod(map(len, self.leaves.values()))

    def points(self) -> Iterator[Point]:
        """All valid points, one after the other."""
        paths = list(self.leaves)
        for options in itertools.product(*self.leaves.values()):
            point = _built(paths, options)
            if self._allowed(point):
                yield point

    def sample(self, draw: random.Random) -> Point:
        """A valid point, uniformly.

        Raises:
            ValueError: None of 1000 draws was valid.
        """
        leaves = self.leaves
        return self._first(lambda: _built(list(leaves), [draw.choice(options) for options in leaves.values()]))

    def mutate(self, point: Point, draw: random.Random, *, changes: int = 1) -> Point:
        """A valid point that differs in ``changes`` choices, which and how uniformly.

        Raises:
            ValueError: The point is not of this space, ``changes`` is below 1 or above the number of choices with an
                alternative, or none of 1000 draws was valid.
        """
        self.check(point)
        free = [path for path, options in self.leaves.items() if len(options) > 1]
        if not 1 <= changes <= len(free):
            raise ValueError(
                f"Space.mutate: changes={changes}; expected 1 to {len(free)}, the choices with an alternative."
            )

        def other() -> Point:
            new = copy.deepcopy(point)
            for path in draw.sample(free, changes):
                holder = _at(new, path[:-1])
                holder[path[-1]] = draw.choice([o for o in self.leaves[path] if o != holder[path[-1]]])
            return new

        return self._first(other)

    def check(self, point: Mapping[str, Any], where: str = "") -> None:
        """Raise ``ValueError`` unless the point is of this space and valid."""
        if not isinstance(point, Mapping) or point.keys() != self.choices.keys():
            given = sorted(point) if isinstance(point, Mapping) else point
            raise ValueError(f"Space: {where or 'the point'} has {given}; expected the choices {list(self.choices)}.")
        for name, options in self.choices.items():
            if isinstance(options, Space):
                options.check(point[name], f"{where}{name}.")
            elif point[name] not in options:
                raise ValueError(f"Space: {where}{name} is {point[name]!r}; expected one of {options}.")
        if self.valid and not self.valid(dict(point)):
            raise ValueError(f"Space: {where or 'the point'} {dict(point)} is refused by the space's `valid`.")

    def key(self, point: Point) -> str:
        """A hash of the point: equal for equal points, in every process.

        Examples:
            >>> space = Space({"a": (1, 2), "b": (1, 2)})
            >>> space.key({"a": 1, "b": 2}) == space.key({"b": 2, "a": 1}) != space.key({"a": 2, "b": 1})
            True
        """
        self.check(point)
        return hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:16]

    def _allowed(self, point: Point) -> bool:
        nested = all(s._allowed(point[n]) for n, s in self.choices.items() if isinstance(s, Space))
        return nested and (self.valid is None or self.valid(point))

    def _first(self, make: Callable[[], Point]) -> Point:
        for point in (make() for _ in range(TRIES)):
            if self._allowed(point):
                return point
        raise ValueError(f"Space: none of {TRIES} draws was valid. Leave out choices that `valid` always refuses.")


def _at(point: Point, path: Sequence[str]) -> Point:
    for name in path:
        point = point.setdefault(name, {})
    return point


def _built(paths: Sequence[tuple[str, ...]], options: Sequence[Any]) -> Point:
    point: Point = {}
    for path, option in zip(paths, options, strict=True):
        _at(point, path[:-1])[path[-1]] = copy.copy(option)
    return point
