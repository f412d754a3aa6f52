"""Every example in a docstring, the README and the docs runs."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch

import interlayer

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    m.name for m in pkgutil.walk_packages(interlayer.__path__, "interlayer.") if m.name != "interlayer.__main__"
)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module(name):
    torch.manual_seed(0)
    assert doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS).failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_examples_of_a_page(page, tmp_path, monkeypatch):
    """Python blocks of a page run one after the other, as a reader would type them."""
    monkeypatch.chdir(tmp_path)
    space = {"__name__": "page"}
    for block in page.read_text(encoding="utf-8").split("```python\n")[1:]:
        exec(compile(block.split("```")[0], str(page), "exec"), space)
