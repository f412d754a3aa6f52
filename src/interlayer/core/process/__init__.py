"""Diffusion and flow: processes between data and noise, solvers that sample from a model, and distances of samples."""

from interlayer.core.process.distances import Distance, distance, frechet, kid, mmd, sliced_wasserstein
from interlayer.core.process.paths import Diffusion, Flow, Prediction, Process
from interlayer.core.process.sampling import DDIM, Ancestral, Euler, Guided, Heun, Solver, Step, integrate, sample

__all__ = [
    "DDIM",
    "Ancestral",
    "Diffusion",
    "Distance",
    "Euler",
    "Flow",
    "Guided",
    "Heun",
    "Prediction",
    "Process",
    "Solver",
    "Step",
    "distance",
    "frechet",
    "integrate",
    "kid",
    "mmd",
    "sample",
    "sliced_wasserstein",
]
