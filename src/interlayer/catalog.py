"""The catalogue: every system, where it lives and which state it is in. Never imports torch."""

from __future__ import annotations

import ast
import difflib
import functools
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent
CHECKOUT = PACKAGE.parents[1]
KINDS = ("layer", "model", "transform", "rule", "probe", "data-transform", "construction", "simulator")
STATES = ("ready", "partial", "planned")


@dataclass(frozen=True)
class System:
    """One row of the catalogue. Everything else follows from the files that exist.

    Attributes:
        slug: Name of the system; its files carry it with underscores.
        title: Title of the paper.
        room: Where it lives, dotted, below ``interlayer``.
        kind: One of ``KINDS``; decides the protocol and the contracts.
        works: What counts as working.
        paper: Verified ``arXiv:ID`` or ``doi:ID``; empty until verified.
        slot: The slot of a backbone that it fills, if it is a layer that fills one.
        code: Name of the class in the system's module; empty until written.
        network: Name of a network with ``for_task`` in the same module, if a layer comes with one.
        task: The built-in task on which the idea means something, where digits, photos and bytes do not fit.
    """

    slug: str
    title: str
    room: str
    kind: str
    works: str
    paper: str = ""
    slot: str = ""
    code: str = ""
    network: str = ""
    task: str = ""

    @property
    def stem(self) -> str:
        """The slug as a file name."""
        return self.slug.replace("-", "_")

    @property
    def module(self) -> str:
        """Dotted name of the module that holds the system."""
        return f"interlayer.{self.room}.{self.stem}"

    @property
    def source(self) -> Path:
        """The system's file, or the ``__init__.py`` of its folder."""
        base = PACKAGE.joinpath(*self.room.split("."), self.stem)
        return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")

    @property
    def claim(self) -> Path:
        """The file of the system's claim."""
        return PACKAGE.joinpath("claims", *self.room.split("."), self.stem).with_suffix(".py")

    @property
    def result(self) -> Path:
        """The claim's last measured result."""
        return PACKAGE / "claims" / "results" / f"{self.slug}.json"

    @property
    def test(self) -> Path:
        """The system's test file; only a checkout has it."""
        return CHECKOUT.joinpath("tests", *self.room.split("."), f"test_{self.stem}").with_suffix(".py")

    @functools.cached_property
    def missing(self) -> list[str]:
        """Which of paper, code, docs, claim, result and, in a checkout, test the system still lacks."""
        has = {
            "paper": bool(self.paper),
            "code": bool(self.code) and self.source.exists(),
            "docs": bool(self.code) and self.source.exists() and bool(self.idea),
            "claim": self.claim.exists(),
            "result": self.result.exists(),
        }
        if (CHECKOUT / "tests").is_dir():
            has["test"] = self.test.exists()
        return [what for what, there in has.items() if not there]

    @property
    def state(self) -> str:
        """``planned`` without code, ``ready`` with everything, ``partial`` between."""
        if not self.code or "code" in self.missing:
            return "planned"
        return "partial" if self.missing else "ready"

    @functools.cached_property
    def _class(self) -> ast.ClassDef | None:
        if not self.code or not self.source.exists():
            return None
        tree = ast.parse(self.source.read_text(encoding="utf-8"))
        return next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == self.code), None)

    @property
    def idea(self) -> str:
        """First paragraph of the class's docstring, found by a search: parsing 212 files takes too long for ``list``."""
        if not self.code or not self.source.exists():
            return ""
        head = rf'^class {self.code}(?:\([^)]*\))?:\n    r?"""(.+?)(?:\n\n|""")'
        found = re.search(head, self.source.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
        return " ".join(found[1].split()) if found else ""

    @property
    def options(self) -> dict[str, str]:
        """Keyword options of the constructor with their defaults, read from the source."""
        node = self._class
        for f in node.body if node else ():
            if isinstance(f, ast.FunctionDef) and f.name == "__init__":
                pairs = zip(f.args.kwonlyargs, f.args.kw_defaults, strict=True)
                return {a.arg: ast.unparse(d) if d else "required" for a, d in pairs}
        return {}

    def measured(self) -> dict[str, Any] | None:
        """The last measured claim as stored, if there is one."""
        return json.loads(self.result.read_text(encoding="utf-8")) if self.result.exists() else None

    def resolve(self) -> Any:
        """Import the system's class (this may import torch)."""
        if "code" in self.missing:
            raise LookupError(
                f"catalogue: {self.slug!r} is planned, there is no code yet. See `interlayer list --state ready`."
            )
        return getattr(import_module(self.module), self.code)

    @property
    def has_network(self) -> bool:
        """Whether the system is a network or comes with one."""
        return bool(self.code) and (self.kind == "model" or bool(self.network))

    def resolve_network(self) -> Any:
        """Import the system's network (this may import torch)."""
        found = self.resolve()
        return getattr(import_module(self.module), self.network) if self.network else found


@functools.cache
def _tables() -> dict[str, Any]:
    return tomllib.loads((PACKAGE / "catalog.toml").read_text(encoding="utf-8"))


@functools.cache
def load() -> Mapping[str, System]:
    """All systems by slug, in the order of the catalogue."""
    return {slug: System(slug=slug, **row) for slug, row in _tables()["system"].items()}


def rooms() -> Mapping[str, str]:
    """Every room with a line on what it holds."""
    return _tables()["room"]


def tasks() -> Mapping[str, str]:
    """The tasks that need no network: name to ``module:function``."""
    return _tables()["task"]


def builtins(slot: str) -> Mapping[str, str]:
    """The plain parts that fill a slot without being a system of their own: name to ``module:Class``."""
    return _tables()["slot"].get(slot, {})


@dataclass(frozen=True)
class Leaf:
    """A leaf of a tree of variants that a system brings, and what stands for it here.

    Attributes:
        at: Where it is in the tree, from the root.
        method: What stands for it.
        use: Which slots of a backbone it fills (or which size it sets), and with what.
        paper: Verified ``arXiv:ID`` or ``doi:ID``; empty where it was not checked.
    """

    at: tuple[str, ...]
    method: str
    use: Mapping[str, Any]
    paper: str = ""

    @property
    def name(self) -> str:
        """The path as one string."""
        return "/".join(self.at)

    @property
    def state(self) -> str:
        """``ready`` if every name that it uses stands for something that works."""
        for slot, spec in self.use.items():
            name = str(spec).partition("(")[0]
            system = load().get(name)
            if slot in slots() and name not in builtins(slot) and not (system and system.state == "ready"):
                return "planned"
        return "ready"


@functools.cache
def taxonomy() -> Mapping[str, Leaf]:
    """The leaves of every system that has a tree of variants, ``taxonomy.toml`` in its folder, by name and in the tree's order."""
    files = (s.source.parent / "taxonomy.toml" for s in load().values() if s.code and s.source.name == "__init__.py")
    rows = [row for f in files if f.exists() for row in tomllib.loads(f.read_text(encoding="utf-8"))["leaf"]]
    leaves = [Leaf(at=tuple(row.pop("at")), **row) for row in rows]
    return {leaf.name: leaf for leaf in leaves}


def slots() -> list[str]:
    """Names of all slots of the backbones."""
    return list(_tables()["slot"])


def nearest(name: str, names: Any) -> str:
    """A phrase that suggests the known name closest to a mistyped one, or an empty string."""
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""


def get(slug: str) -> System:
    """The system of that slug; an unknown one raises ``LookupError`` with the nearest names."""
    systems = load()
    if slug not in systems:
        raise LookupError(f"catalogue: no system {slug!r}.{nearest(slug, systems)} `interlayer list` shows all.")
    return systems[slug]
