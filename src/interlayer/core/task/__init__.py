"""What is learned or run, and how subjects are judged: tasks on data, and scenarios of simulators."""

from interlayer.core.task.base import Budget, Subject, Task
from interlayer.core.task.data import TensorTask, TextTask, shape_of
from interlayer.core.task.scenario import ScenarioTask, Simulated

__all__ = ["Budget", "ScenarioTask", "Simulated", "Subject", "Task", "TensorTask", "TextTask", "shape_of"]
