"""Tasks, arms, budgets, runs, statistics and the report.

from interlayer.study import StudySpec, compare

result = compare(StudySpec(task="digits", arms=["plain", "rezero", "norm=rmsnorm"], seeds=3, steps=200))
"""

from interlayer.core.task import Task, TensorTask, TextTask
from interlayer.study.loaders import LoaderTask
from interlayer.study.result import Result, Run
from interlayer.study.run import compare, report
from interlayer.study.spec import ArmSpec, StudyError, StudySpec

__all__ = [
    "ArmSpec",
    "LoaderTask",
    "Result",
    "Run",
    "StudyError",
    "StudySpec",
    "Task",
    "TensorTask",
    "TextTask",
    "compare",
    "report",
]
