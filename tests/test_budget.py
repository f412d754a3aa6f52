"""The budget of the suite (``conftest.py``) holds each test and each system, in one process and in workers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import os, subprocess, sys, time
import pytest

def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

def test_light(): burn(0.01)
def test_asleep(): time.sleep(0.5)
def test_heavy(): burn(0.25)
def test_heavy_child(): subprocess.run([sys.executable, "-c", "import time\\nwhile time.process_time() < 0.25: pass"])

@pytest.mark.parametrize("slug", ["rezero", "rmsnorm", "no-system"])
@pytest.mark.parametrize("part", range(3))
def test_of_systems(slug, part): burn(0.01 if slug == "rmsnorm" else 0.12)
"""


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("held", [False, True])
def test_budget(tmp_path, workers, held):
    conftest = Path(__file__).with_name("conftest.py").read_text(encoding="utf-8")
    lines = conftest.replace("TEST, SYSTEM = 4.0, 9.0", "TEST, SYSTEM = 0.2, 0.3").split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("@pytest.fixture"))
    end = next(i for i, line in enumerate(lines) if line.startswith("def pytest_addoption"))
    (tmp_path / "conftest.py").write_text("\n".join(lines[:start] + lines[end:]), encoding="utf-8")  # needs no data
    (tmp_path / "test_it.py").write_text(TESTS, encoding="utf-8")
    run = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "xdist",
        "-p",
        "no:cacheprovider",
        "-n",
        str(workers),
        str(tmp_path),
    ]
    env = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(run + ["--budget"] * held, capture_output=True, text=True, cwd=tmp_path, env=env, check=False)
    assert done.returncode == held, done.stdout + done.stderr
    assert "13 passed" in done.stdout
    over = done.stdout.partition("over the budget of 0.2 CPU-seconds for a test, 0.3 for a system")[2]
    listed = re.findall(r"^ +[\d.]+  (?:all tests of |.*::)(\S+)$", over, re.MULTILINE)
    assert {"test_heavy", "test_heavy_child", "rezero"} <= set(listed)
    assert not {"test_light", "test_asleep", "rmsnorm"} & set(listed)
