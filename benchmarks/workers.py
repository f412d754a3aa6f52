"""What the workers of a study spend their time on: training steps and judgements, and where the rest goes.

Runs of 10 s and more on two workers; the goal is a share of 0.9. Takes about four minutes on two quiet cores.
"""

from __future__ import annotations

import io
import tempfile
import time
from pathlib import Path

import optuna
from rich.console import Console

from interlayer.study import StudySpec, compare

WORKERS = 2


def main() -> None:
    """Six arms, one learning rate, runs of 12 seconds on four seeds, the fewest that a study has by default."""
    with tempfile.TemporaryDirectory() as folder:
        spec = StudySpec(
            task="stdlib-bytes", base="transformer(depth=3, width=64, heads=4)", seconds=12.0, seeds=4, lr=3e-3, workers=WORKERS,
            arms=["plain", "rezero", "denseformer", "value-residual", "norm=rmsnorm", "mlp=glu"], out=Path(folder),
        )  # fmt: skip
        begin = time.perf_counter()
        result = compare(spec, console=Console(file=io.StringIO()))
        wall = time.perf_counter() - begin
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        (name,) = optuna.get_all_study_names(spec.url)
        trials = optuna.load_study(study_name=name, storage=spec.url).get_trials()
        inside = sum(t.user_attrs["wall"] for t in trials)
    steps, judged = (sum(getattr(r.record, what) for r in result.runs) for what in ("seconds", "judged"))
    share = (steps + judged) / (WORKERS * wall)
    print(f"{len(result.runs)} runs of {steps / len(result.runs):.1f} s on {WORKERS} workers in {wall:.0f} s")
    print(f"steps and judgements: {share:.3f} of the workers' time  goal 0.9: {'met' if share >= 0.9 else 'NOT met'}")
    print(f"  steps {steps / WORKERS / wall:.3f}, judgements {judged / WORKERS / wall:.3f}")
    print(f"  building, batches and counting costs in the runs {(inside - steps - judged) / WORKERS / wall:.3f}")
    print(
        f"  start of the workers, checks before, report, records, waiting at the end {1 - inside / WORKERS / wall:.3f}"
    )


if __name__ == "__main__":
    main()
