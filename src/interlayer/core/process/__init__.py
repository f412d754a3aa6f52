"""Diffusion and flow: processes between data and noise, solvers that sample from a model, and distances of samples."""

from interlayer.core.process.adapter import ScheduledDiffusion, ScheduledFlow, View, adapt, scheduled
from interlayer.core.process.distances import Distance, distance, frechet, kid, mmd, sliced_wasserstein
from interlayer.core.process.paths import Diffusion, Flow, Prediction, Process
from interlayer.core.process.sampling import (
    DDIM,
    Adaptive,
    Ancestral,
    Euler,
    Guided,
    Heun,
    RungeKutta,
    Solver,
    Step,
    integrate,
    sample,
)
from interlayer.core.process.visited import drawn, times_of, visited

__all__ = [
    "DDIM",
    "Adaptive",
    "Ancestral",
    "Diffusion",
    "Distance",
    "Euler",
    "Flow",
    "Guided",
    "Heun",
    "Prediction",
    "Process",
    "RungeKutta",
    "ScheduledDiffusion",
    "ScheduledFlow",
    "Solver",
    "Step",
    "View",
    "adapt",
    "distance",
    "drawn",
    "frechet",
    "integrate",
    "kid",
    "mmd",
    "sample",
    "scheduled",
    "sliced_wasserstein",
    "times_of",
    "visited",
]
