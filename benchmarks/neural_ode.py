"""Neural ODEs against torchdiffeq's adjoint at the same tolerance; memory by steps; evaluations and error by tolerance; points and spirals.

    python -m benchmarks.neural_ode [FOLDER]

FOLDER gets two pictures: the density that a continuous flow learned of two moons, and spirals that a latent ODE goes on with.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torchdiffeq

from benchmarks.harness import compare, version
from interlayer.claims import load
from interlayer.claims.layers.implicit.neural_ode import RATES, density, moments, moons, spirals, trajectory
from interlayer.claims.training import built
from interlayer.core.cost import bytes_kept, peak_bytes
from interlayer.core.fit import fit
from interlayer.core.solve import Solver, odeint
from interlayer.layers.implicit.neural_ode import CNF, ConvField, DenseField

CASES = {
    "features, 64 x 16": (partial(DenseField, 16), (64, 16)),
    "features, 256 x 64": (partial(DenseField, 64), (256, 64)),
    "images, 32 x 16 x 8 x 8": (partial(ConvField, 16), (32, 16, 8, 8)),
}


def ours(field, x, tolerance, **options):
    field.zero_grad()
    solver = Solver(tolerance=tolerance, **options) if tolerance else Solver(steps=8, **options)
    value = odeint(field, x, (0.0, 1.0), solver=solver).value[-1]
    value.square().mean().backward()
    return value


def theirs(field, x, tolerance, seminorm=False):
    """Its defaults, or with the error norm of the state alone, as ours has."""
    field.zero_grad()
    if tolerance:
        options = {"rtol": tolerance, "atol": tolerance}
        if seminorm:
            options["adjoint_options"] = {"norm": "seminorm"}
    else:
        options = {"method": "rk4", "options": {"step_size": 1 / 8}}
    value = torchdiffeq.odeint_adjoint(field, x, torch.tensor([0.0, 1.0]), **options)[-1]
    value.square().mean().backward()
    return value


def agree(field, x, tolerance):
    """Values and gradients."""
    found = []
    for run in (ours, theirs):
        value = run(field, x, tolerance)
        found.append(torch.cat([value.detach().flatten(), *(p.grad.flatten() for p in field.parameters())]))
    return (found[0] - found[1]).norm() < 0.01 * found[1].norm()


def times():
    """Forward and backward passes."""
    for title, (make, shape) in CASES.items():
        for tolerance in (1e-3, 1e-5, None):
            torch.manual_seed(0)
            field, x = make(), torch.randn(shape)
            name = f"torchdiffeq {'odeint_adjoint' if tolerance else 'rk4 adjoint'}"
            candidates = {
                "interlayer": partial(ours, field, x, tolerance),
                name: partial(theirs, field, x, tolerance),
            }
            if tolerance:
                candidates["its seminorm"] = partial(theirs, field, x, tolerance, True)
            compare(
                f"{title}, {f'tolerance {tolerance:g}' if tolerance else '8 steps of rk4'}, {version('torchdiffeq')}",
                candidates,
                agree=lambda f=field, x=x, t=tolerance: agree(f, x, t),
                goal={name: 1.1},
                inner=3,
            )


def memory():
    """What is kept, and the peak of a training step, by steps."""
    torch.manual_seed(0)
    field, x = DenseField(64), torch.randn(64, 64)
    for adjoint in (True, False):
        rows = []
        for steps in (4, 16, 64, 256):
            solver = Solver(steps=steps, adjoint=adjoint)

            def forward(solver=solver):
                return odeint(field, x, (0.0, 1.0), solver=solver).value[-1]

            field.zero_grad()
            rows.append((steps, bytes_kept(field, forward), peak_bytes(lambda: forward().sum().backward())))
        print(
            f"  {'adjoint' if adjoint else 'through the steps'}: "
            + ", ".join(f"{n} steps {k} kept, peak {p}" for n, k, p in rows)
        )


@torch.no_grad()
def evaluations():
    """Evaluations and error by tolerance."""
    torch.manual_seed(0)
    field, x = DenseField(8).double(), torch.randn(16, 8, dtype=torch.double)
    exact = odeint(field, x, (0.0, 10.0), solver=Solver(tolerance=1e-12)).value[-1]
    for tolerance in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8):
        found = odeint(field, x, (0.0, 10.0), solver=Solver(tolerance=tolerance))
        error = (found.value[-1] - exact).norm() / exact.norm()
        print(f"  tolerance {tolerance:g}: {found.evaluations} evaluations, error {error:.2g}")


def pictures(folder):
    """Trained as in the claim, but for three and five times as many steps; seed 0."""
    from matplotlib.figure import Figure

    scale = SimpleNamespace(**load("neural-ode").scales["small"])
    draw = torch.Generator().manual_seed(0)
    flow = built(lambda: density("neural-ode", scale), 0)
    fit(
        flow, (moons(128, draw) for _ in range(3 * scale.flow_train)), lambda m, x: -m(x).mean(),
        steps=3 * scale.flow_train, lr=RATES["nll"]["neural-ode"],
    )  # fmt: skip
    flow = CNF(2, field=flow.flow.field, times=flow.times, solver=Solver(tolerance=1e-5))
    side = torch.linspace(-3, 3, 80)
    with torch.no_grad():
        shades = flow(torch.cartesian_prod(side, side)).exp().view(80, 80)
    figure = Figure(figsize=(8, 4))
    left, right = figure.subplots(1, 2)
    left.scatter(*moons(2000, draw).T, s=2)
    right.imshow(shades.T, origin="lower", extent=(-3, 3, -3, 3))
    left.set(title="two moons", xlim=(-3, 3), ylim=(-3, 3))
    right.set(title="density of the flow")
    figure.savefig(folder / "moons.png")

    times, seen, _ = spirals(300, scale, draw)
    model = built(lambda: trajectory("neural-ode"), 0)
    steps = 5 * scale.series_train  # the authors' 2000
    picks = (torch.randint(300, (128,), generator=draw) for _ in range(steps))
    fit(
        model, picks, lambda m, some: -m.elbo(seen[some], times[some]).mean() / scale.seen,
        steps=steps, lr=RATES["ahead"]["neural-ode"],
    )  # fmt: skip
    model.solver = Solver(tolerance=1e-4)
    times, seen, whole = spirals(6, scale, draw)
    with torch.no_grad():
        path = model(seen, times, moments(scale).expand(6, -1))
    figure = Figure(figsize=(9, 6))
    for n, axes in enumerate(figure.subplots(2, 3).flat):
        axes.plot(*whole[n].T, label="truth")
        axes.plot(*path[n].T, label="latent ODE")
        axes.scatter(*seen[n].T, label="seen", color="k")
    axes.legend()
    figure.savefig(folder / "spirals.png")


def main(folder=None):
    torch.set_num_threads(1)
    times()
    print("memory of a block of 64 x 64, bytes")
    memory()
    print("dopri5 over 10 units of time, float64")
    evaluations()
    if folder:
        pictures(Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
