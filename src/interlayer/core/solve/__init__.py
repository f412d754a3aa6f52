"""Solvers: fixed points and ordinary differential equations, with gradients that need no record of the solver's steps.

- ``fixed_point`` solves ``z = f(z)``, by Anderson's or Broyden's method; gradients by the implicit function theorem.
- ``odeint`` solves ``dy/dt = f(t, y)``, in fixed or adaptive steps; gradients by the adjoint equation, or through the steps.

Both report what they needed through ``core.aside``: ``evaluations`` of f, and the ``residual`` that is left.
"""

from __future__ import annotations

from interlayer.core.solve.common import Solved, SolverError
from interlayer.core.solve.fixed import fixed_point, iterate
from interlayer.core.solve.ode import Solver, odeint
from interlayer.core.solve.tableau import TABLEAUS, Tableau, combine

__all__ = ["TABLEAUS", "Solved", "Solver", "SolverError", "Tableau", "combine", "fixed_point", "iterate", "odeint"]
