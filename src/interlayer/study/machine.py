"""This process and this machine, as the records name them."""

from __future__ import annotations

import os
import platform
import socket
from pathlib import Path
from typing import Any

import optuna
import torch

from interlayer.version import __version__


def this_process() -> list[Any]:
    """Host, process number, and when the process started."""
    return [socket.gethostname(), os.getpid(), _born(os.getpid())]


def _born(pid: int) -> str:
    """When a process started, on systems that say: process numbers are used again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


def alive(process: list[Any]) -> bool:
    """Whether a process of this machine still runs."""
    try:
        os.kill(process[1], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _born(process[1]) == process[2]


def where() -> dict[str, Any]:
    """The machine and the versions, for the report."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass
    return {
        "interlayer": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "optuna": optuna.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": f"{cpu}, {os.cpu_count()} cores",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "threads": torch.get_num_threads(),
    }
