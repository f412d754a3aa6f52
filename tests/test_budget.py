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
def test_budget(tmp_path, workers):
    conftest = Path(__file__).with_name("conftest.py").read_text(encoding="utf-8").replace("os.getloadavg()[0]", "1.0")
    lines = conftest.replace("TEST, SYSTEM = 4.0, 9.0", "TEST, SYSTEM = 0.2, 0.3").split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("@pytest.fixture"))
    end = next(i for i, line in enumerate(lines) if line.startswith("def pytest_configure"))
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
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, env=env, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 failed, 11 passed" in done.stdout
    for name in ("test_heavy", "test_heavy_child"):
        assert re.search(rf"test_it.py::{name} takes 0\.[2-9] CPU-seconds; a test may take 0\.2", done.stdout)
    assert re.findall(r"FAILED (\S+): its tests take .* in all; a system may take 0\.3", done.stdout) == ["rezero"]
