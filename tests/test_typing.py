"""What a type checker sees of the public names. `make lint` checks this file with mypy: there the assertions hold or not."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import assert_type

from torch import nn

import interlayer
from interlayer.core.kinds import Plan
from interlayer.study import Result

ROOT = Path(__file__).parents[1]


def as_a_user_writes_it(folder: Path, run: bool = False) -> None:
    """Plain code of a user; an ``Any`` anywhere is an error of mypy."""
    model = interlayer.Transformer(vocab=16, length=8, depth=1, width=8, heads=2)
    assert_type(model, interlayer.Transformer)
    plan = interlayer.replace(model, at="**.norms.*", with_="rmsnorm")
    assert_type(plan, Plan)
    assert_type(plan.apply(), nn.Module)
    assert_type(interlayer.save(plan.apply(), folder), None)
    assert_type(interlayer.load(folder), nn.Module)
    assert_type(interlayer.MLP(4, 2, depth=1, width=4), interlayer.MLP)
    if run:
        assert_type(interlayer.compare(interlayer.StudySpec(task="digits", arms=["plain", "rezero"], steps=9)), Result)
    make: Callable[..., nn.Module] = interlayer.build
    assert callable(make)


def test_code_of_a_user_runs(tmp_path: Path) -> None:
    as_a_user_writes_it(tmp_path)


def test_public_names_are_all_there_and_known_to_type_checkers() -> None:
    source = (ROOT / "src" / "interlayer" / "__init__.py").read_text(encoding="utf-8")
    checked = source.partition("if TYPE_CHECKING:")[2].partition("__all__")[0]
    lazy = [name for names in interlayer._WHERE.values() for name in names]
    assert sorted([*lazy, "__version__"]) == sorted(interlayer.__all__)
    for module, names in interlayer._WHERE.items():
        (line,) = [row for row in checked.splitlines() if f"interlayer.{module} import" in row]
        assert set(line.partition("import ")[2].split(", ")) == set(names)
        assert all(getattr(interlayer, name).__module__.startswith("interlayer.") for name in names)


def test_the_marker_of_typed_packages_and_the_version_are_shipped() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["interlayer"]
    assert (ROOT / "src" / "interlayer" / "py.typed").exists()
    assert "Typing :: Typed" in project["project"]["classifiers"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "interlayer.version.__version__"}
