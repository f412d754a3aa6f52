"""Time of ``interlayer list`` as a multiple of importing the parser of its options, which every command pays."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.harness import compare
from interlayer import catalog


def run(*arguments: str) -> str:
    """A new interpreter, as on the command line."""
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True).stdout


def main():
    """Without options, and with one: then typer loads its converter of options."""
    typer = lambda: run("-c", "import typer.main")  # noqa: E731
    for options, goal in (([], {"import typer.main": 3.0}), (["--state", "ready"], None)):
        ours = lambda options=options: run("-m", "interlayer", "list", *options)  # noqa: E731
        lines = sum(not options or s.state == "ready" for s in catalog.load().values())
        compare(
            f"interlayer {' '.join(['list', *options])}",
            {"interlayer": ours, "import typer.main": typer},
            agree=lambda ours=ours, lines=lines: len(ours().splitlines()) == lines,
            goal=goal,
        )


if __name__ == "__main__":
    main()
