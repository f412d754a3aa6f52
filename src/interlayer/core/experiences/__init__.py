"""Streams of experiences: how to make one, run a rule over it and measure what is kept, and learners to build rules on."""

from interlayer.core.data import Experience
from interlayer.core.experiences.learner import Learner
from interlayer.core.experiences.measure import Learned, run_stream
from interlayer.core.experiences.streams import by_classes, in_a_row, permuted, rotated
from interlayer.core.experiences.task import StreamTask

__all__ = [
    "Experience",
    "Learned",
    "Learner",
    "StreamTask",
    "by_classes",
    "in_a_row",
    "permuted",
    "rotated",
    "run_stream",
]
