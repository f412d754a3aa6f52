"""The landscape between forks of a training run: how high the ridge between two networks is, told from their ends and their fork."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from interlayer.core import taps
from interlayer.core.chart import curves
from interlayer.core.example import Example
from interlayer.core.kinds import Comparison, Finding
from interlayer.core.paths import Loss, blend, expect_alike, layers, mean_loss
from interlayer.transform.merge.lmc_landscape.forks import Fork, Pitchfork, correlation, forks

__all__ = ["Ends", "Fork", "LMCLandscape", "Pitchfork", "correlation", "end", "forks", "ridge", "survey"]

STEP = 0.05  # share of the way to the other network, for the derivatives of the loss at an end
PREDICTIONS = ("ridge", "mountainside", "distance")
UNITS = {"ridge": "nat", "mountainside": "nat", "measured": "nat", "loss": "nat", "descent": "nat", "angle": "degree"}
Line = Callable[[float], float]
"""The loss at a share of the way to the other network."""


class Ends(NamedTuple):
    """The loss on a line at one end, with its first and second derivative."""

    value: float
    slope: float
    curvature: float


def end(line: Line, at: float) -> Ends:
    """The loss at ``at`` (0 or 1) and its derivatives, by central differences: three losses."""
    low, value, high = (line(at + d) for d in (-STEP, 0.0, STEP))
    return Ends(value, (high - low) / (2 * STEP), (high - 2 * value + low) / STEP**2)


def ridge(near: Ends, far: Ends) -> float:
    r"""The height halfway over the mean of both ends, of the polynomial of degree 5 that has their losses and derivatives.

    Examples:
        >>> well = lambda t: 16 * t**2 * (t - 1) ** 2  # the highest point, between two minima, is 1
        >>> round(ridge(end(well, 0.0), end(well, 1.0)), 1)
        1.0
    """
    return 5 / 32 * (near.slope - far.slope) + (near.curvature + far.curvature) / 64


class LMCLandscape(Comparison):
    r"""Tells the loss barrier between two networks that parted at a common ancestor, from the geometry of their training runs.

    Singh, Adilova, Kamp, Fischer, Schoelkopf and Hofmann, Landscaping Linear Mode Connectivity, arXiv:2406.16300, see training as a
    descent on a mountainside, on which ridges rise between runs that part early. Of the paper only the abstract could be read: the
    two predictions are derived here, and are not its formulas. With :math:`f(t) = L(\theta_A + t (\theta_B - \theta_A))`,

    .. math:: \text{ridge} = \tfrac{5}{32} (f'(0) - f'(1)) + \tfrac{1}{64} (f''(0) + f''(1))

    is the height of :math:`f(1/2)` over the mean of the ends, exactly so if f is a polynomial up to degree 5. It grows with the curvature
    at the ends and the squared distance. The mountainside needs no derivative: with :math:`a = \theta_A - \theta_0` and :math:`b` the
    moves since the ancestor, the middle :math:`(a + b) / 2` is only a share :math:`c_A = (1 + \langle a, b \rangle / |a|^2) / 2` as far
    down as A, so that

    .. math:: \text{mountainside} = \tfrac12 \big( L(\theta_0 + c_A a) + L(\theta_0 + c_B b) \big) - \tfrac12 (L(A) + L(B)).

    Runs that go the same way are all the way down; orthogonal ones are halfway back up. The measured barrier is the highest loss at
    ``points`` between the ends, over their mean. The same for one layer alone, which goes over to the other network's: its
    prediction is of second order, from the one end that is a trained network.

    ``probe(model, data, others=(other, ancestor))``, with earlier models of both runs behind, the first and the second in turn, if there
    are any. The tables: ``fork``, the predictions and what was measured; ``runs``, the norm, the distance from the ancestor, the
    speed (distance from the point before), the loss, how far the runs are apart, and the angle between them at the ancestor; and
    ``layers``. ``forks`` makes networks that part at several steps, ``survey`` compares the predictions over them. Batch norms are
    estimated anew on the data wherever weights were changed. It takes 9 + points passes over the data, 2 (points + 1) for each layer, and
    one for each earlier model.

    Args:
        points: On the way from one network to the other, both ends included; 3 is the middle alone.
        loss: ``loss(output, target)``. Defaults to cross-entropy.

    Raises:
        ValueError: An option out of range, networks of different structure, one that equals the ancestor, or no data.

    Examples:
        >>> place = torch.tensor([1.0, 1.0])
        >>> ancestor, a, b = Pitchfork(torch.zeros(2)), Pitchfork(place), Pitchfork(place * torch.tensor([1.0, -1.0]))
        >>> data = torch.zeros(1, 1), torch.zeros(1)
        >>> found = LMCLandscape(loss=lambda out, _: out.mean())(a, data, others=(b, ancestor)).tables["fork"]
        >>> round(found["ridge"][0], 2), found["measured"], a.barrier(), round(found["angle"][0])
        (0.24, [0.25], 0.25, 90)
    """

    slug: ClassVar[str] = "lmc-landscape"
    merges: ClassVar[int] = 2
    more: ClassVar[bool] = True

    def __init__(self, *, points: int = 3, loss: Loss = F.cross_entropy) -> None:
        if points < 3:
            raise ValueError(f"lmc-landscape: points {points}; expected 3 or more, both ends included.")
        self.points, self.loss = points, loss

    def __call__(self, model: nn.Module, data: Any, *, others: Sequence[nn.Module] = ()) -> Finding:
        """Predict and measure; all models are afterwards as they were before."""
        other, ancestor, *earlier = self.take(others)
        if len(earlier) % 2:
            raise ValueError(
                f"{self.slug}: {len(earlier)} earlier models; expected one of each run, first and second in turn."
            )
        for each in others:
            expect_alike(self.slug, model, each)
        batches = taps.batches(data)
        runs = [[*earlier[::2], model], [*earlier[1::2], other]]
        steps = [[_vector(m, ancestor) for m in run] for run in runs]
        if not all(bool(step.any()) for run in steps for step in run):
            raise ValueError(
                f"{self.slug}: a model equals the ancestor; expected models that were trained since the fork."
            )
        with torch.no_grad():
            fork = self._fork(model, other, ancestor, (steps[0][-1], steps[1][-1]), batches)
            walked = self._runs(runs, steps, batches)
            table = self._layers(model, other, batches)
        columns = {c for t in (fork, walked, table) for c in t}
        lines = {column: table[column] for column in ("ridge", "measured")}
        return Finding(
            {"fork": {k: [v] for k, v in fork.items()}, "runs": walked, "layers": table},
            lambda: curves("layer", "barrier of the loss", table["layer"], lines),
            {k: v for k, v in UNITS.items() if k in columns},
        )

    def line(
        self, host: nn.Module, ends: Sequence[Mapping[str, Any]], batches: Any, names: Collection[str] | None = None
    ) -> Line:
        """The loss of ``host`` with its weights, or some of them, between two states."""
        return lambda t: mean_loss(blend(host, ends, (1 - t, t), batches, names=names), batches, self.loss)

    @property
    def _inner(self) -> list[float]:
        return torch.linspace(0, 1, self.points).tolist()[1:-1]

    def _fork(
        self, model: nn.Module, other: nn.Module, ancestor: nn.Module, steps: tuple[Tensor, Tensor], batches: Any
    ) -> dict[str, float]:
        line = self.line(model, (model.state_dict(), other.state_dict()), batches)
        near, far = end(line, 0.0), end(line, 1.0)
        mean, middle = (near.value + far.value) / 2, (steps[0] + steps[1]) / 2
        heights = [
            self.line(ancestor, (ancestor.state_dict(), m.state_dict()), batches)(float(step @ middle / (step @ step)))
            for m, step in zip((model, other), steps, strict=True)
        ]
        return {
            "ridge": ridge(near, far),
            "mountainside": sum(heights) / 2 - mean,
            "measured": max(map(line, self._inner)) - mean,
            "distance": float((steps[0] - steps[1]).norm()),
            "angle": _angle(*steps),
            "descent": mean_loss(ancestor, batches, self.loss) - mean,
        }

    def _runs(
        self, runs: Sequence[Sequence[nn.Module]], steps: Sequence[Sequence[Tensor]], batches: Any
    ) -> dict[str, list[Any]]:
        rows = []
        for n, name in enumerate(("first", "second")):
            for k, (m, step) in enumerate(zip(runs[n], steps[n], strict=True)):
                before = steps[n][k - 1] if k else torch.zeros_like(step)
                rows.append(
                    {
                        "run": name,
                        "point": k,
                        "norm": float(_vector(m).norm()),
                        "distance": float(step.norm()),
                        "speed": float((step - before).norm()),
                        "loss": mean_loss(m, batches, self.loss),
                        "apart": float((step - steps[1 - n][k]).norm()),
                        "angle": _angle(step, steps[1 - n][k]),
                    }
                )
        return {k: [row[k] for row in rows] for k in rows[0]}

    def _layers(self, model: nn.Module, other: nn.Module, batches: Any) -> dict[str, list[Any]]:
        states = model.state_dict(), other.state_dict()
        mean = sum(mean_loss(m, batches, self.loss) for m in (model, other)) / 2
        table: dict[str, list[Any]] = {k: [] for k in ("layer", "weights", "distance", "ridge", "measured")}
        for layer, names in tqdm(layers(model).items(), desc="layers", disable=None, leave=False):
            predicted, measured = 0.0, 0.0
            for host, way in ((model, states), (other, states[::-1])):
                line = self.line(host, way, batches, names)
                here = end(line, 0.0)
                predicted += (here.value + here.slope / 2 + here.curvature / 8 - mean) / 2
                measured += (max(map(line, self._inner)) - mean) / 2
            apart = [(states[0][n] - states[1][n]).double().square().sum() for n in names]
            row = (
                layer or "(root)",
                sum(states[0][n].numel() for n in names),
                float(sum(apart)) ** 0.5,
                predicted,
                measured,
            )
            for column, value in zip(table.values(), row, strict=True):
                column.append(value)
        return table


def survey(found: Iterable[Fork], data: Any, probe: LMCLandscape | None = None) -> Finding:
    """Predicted and measured barriers of forks, and the rank correlation (Spearman's) of each prediction with the measured ones.

    Args:
        found: At least three forks, of one run or of several.
        data: Batches as the probe takes them.
        probe: Its options. Defaults to ``LMCLandscape()``.

    Raises:
        ValueError: Fewer than three forks.

    Examples:
        >>> def train(net, begin, end, branch):
        ...     net.place.data += torch.tensor([0.1 * (end - begin), (0, 0.3, -0.3)[branch] + 0.02 * (begin == 5)])
        >>> data = torch.zeros(1, 1), torch.zeros(1)
        >>> seen = forks(Pitchfork(torch.zeros(2)), train, at=(0, 5, 9), length=4)
        >>> survey(seen, data, LMCLandscape(loss=lambda out, _: out.mean())).tables["forks"]["step"]
        [0, 5, 9]
    """
    probe, rows = probe or LMCLandscape(), list[dict[str, Any]]()
    layered: dict[str, list[Any]] = {"fork": []}
    for fork in found:
        tables = probe(fork.first, data, others=(fork.second, fork.ancestor)).tables
        rows.append({"step": fork.step, **{k: v[0] for k, v in tables["fork"].items()}})
        layered["fork"] += [len(rows) - 1] * len(tables["layers"]["layer"])
        for column, values in tables["layers"].items():
            layered.setdefault(column, []).extend(values)
    if len(rows) < 3:
        raise ValueError(f"survey: {len(rows)} forks; expected at least 3, whose barriers can be ranked.")
    table = {k: [row[k] for row in rows] for k in rows[0]}
    said: dict[str, list[Any]] = {"prediction": list(PREDICTIONS)}
    for name, of in (("over forks", table), ("over layers", layered)):
        said[name] = [correlation(of[k], of["measured"]) if k in of else float("nan") for k in PREDICTIONS]
    order = sorted(range(len(rows)), key=lambda i: table["step"][i])
    lines = {k: [table[k][i] for i in order] for k in ("ridge", "mountainside", "measured")}
    ticks = [str(table["step"][i]) for i in order]
    units = {k: v for k, v in UNITS.items() if k in table} | {"over forks": "1", "over layers": "1"}
    return Finding(
        {"forks": table, "layers": layered, "correlation": said},
        lambda: curves("step of the fork", "barrier of the loss", ticks, lines),
        units,
    )


def _vector(model: nn.Module, start: nn.Module | None = None) -> Tensor:
    """All parameters, or their move from those of another model, in 64 bits."""
    ours = torch.cat([p.detach().flatten().double() for p in model.parameters()])
    return ours if start is None else ours - _vector(start)


def _angle(a: Tensor, b: Tensor) -> float:
    return float(torch.rad2deg(torch.acos((a @ b / (a.norm() * b.norm())).clamp(-1, 1))))


def _ends() -> tuple[nn.Module, Any]:
    return Pitchfork(torch.tensor([2.0, 2.0**0.5])), (torch.zeros(1, 1), torch.zeros(1))


def _others(model: nn.Module) -> tuple[nn.Module, ...]:
    """The other valley, the summit, and both runs on the way."""
    places = ((2.0, -(2.0**0.5)), (0.0, 0.0), (1.0, 1.0), (1.0, -1.0))
    return tuple(Pitchfork(torch.tensor(place)) for place in places)


def _found(finding: Finding) -> bool:
    """The barrier between the valleys is 1 at x = 2, and the runs part more than at a right angle."""
    fork, runs = finding.tables["fork"], finding.tables["runs"]
    known = abs(fork["ridge"][0] - 1) < 0.03 and abs(fork["measured"][0] - 1) < 1e-5
    return known and runs["point"] == [0, 1, 0, 1] and abs(runs["angle"][0] - 90) < 1e-3


EXAMPLE = Example(
    make=lambda: LMCLandscape(loss=lambda out, _: out.mean()), inputs=_ends, others=_others, planted=_found
)
