"""Processes that train together.

They are forked, which takes milliseconds and pickles nothing. Where torch sees a GPU its autograd engine does not survive a fork: there
each is a new Python, which gets what it runs through cloudpickle.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import cloudpickle
import torch
import torch._dynamo  # DistributedDataParallel wants it; import it once here instead of in every child
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

SECONDS = 30


def two_processes(module: nn.Module, step: Callable[[nn.Module, int], object]) -> dict[str, Tensor]:
    """Run ``step(wrapped module, rank)`` under DistributedDataParallel in two processes; return the gradients of the first.

    Raises:
        AssertionError: As for ``processes``.
    """

    def run(rank: int) -> dict[str, Tensor]:
        step(nn.parallel.DistributedDataParallel(module), rank)
        return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}

    return processes(2, run)[0]


def processes(
    count: int, run: Callable[[int], Mapping[str, Tensor]], *, fork: bool | None = None
) -> list[dict[str, Tensor]]:
    """Run ``run(rank)`` in ``count`` gloo processes, and return what each gives.

    Args:
        count: How many.
        run: What each runs.
        fork: Fork them. By default where torch sees no GPU.

    Raises:
        AssertionError: A process failed (with its traceback) or took longer than ``SECONDS``.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = _fork if (not torch.cuda.is_available() if fork is None else fork) else _spawn
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # of fork beside threads: the children use one thread only
            children = [start(run, rank, count, folder) for rank in range(count)]
        end = time.monotonic() + SECONDS
        done = [folder / f"done{rank}" for rank in range(count)]
        while time.monotonic() < end and not all(d.exists() for d in done) and not list(folder.glob("error*")):
            time.sleep(0.005)
        # The group is not destroyed in order: that sometimes hangs on a peer that has already exited.
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        if errors := sorted(folder.glob("error*")):
            raise AssertionError(f"{count} processes failed: {errors[0].read_text()}")
        if not all(d.exists() for d in done):
            raise AssertionError(f"{count} processes did not finish within {SECONDS} s")
        return [load_file(folder / f"result{rank}.safetensors") for rank in range(count)]


def _fork(run: Callable[[int], Mapping[str, Tensor]], rank: int, count: int, folder: Path) -> int:
    return os.fork() or _work(run, rank, count, folder)


def _spawn(run: Callable[[int], Mapping[str, Tensor]], rank: int, count: int, folder: Path) -> int:
    path = folder / f"run{rank}"
    path.write_bytes(cloudpickle.dumps((run, rank, count, folder)))
    code = "import sys, cloudpickle; from interlayer.testing.ddp import _work; _work(*cloudpickle.load(open(sys.argv[1], 'rb')))"
    paths = os.pathsep.join(filter(None, sys.path))
    arguments = [sys.executable, "-c", code, str(path)]
    return os.spawnve(os.P_NOWAIT, sys.executable, arguments, os.environ | {"PYTHONPATH": paths})


def _work(run: Callable[[int], Mapping[str, Tensor]], rank: int, count: int, folder: Path) -> NoReturn:
    """Run, store the result or the error, and wait to be killed."""
    try:  # leave this block only by _exit: after a fork, the stack above belongs to the parent
        _child(run, rank, count, folder)
        (folder / f"done{rank}").touch()
        time.sleep(2 * SECONDS)
    except BaseException:
        (folder / f"writing{rank}").write_text(traceback.format_exc(limit=-3))
        (folder / f"writing{rank}").replace(folder / f"error{rank}")
    finally:
        os._exit(1)


def _child(run: Callable[[int], Mapping[str, Tensor]], rank: int, count: int, folder: Path) -> None:
    torch.set_num_threads(1)
    if Path("/sys/class/net/lo").exists():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(folder / "store"), count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    result = {name: t.detach().clone().contiguous() for name, t in run(rank).items()}
    save_file(result, folder / f"result{rank}.safetensors")
