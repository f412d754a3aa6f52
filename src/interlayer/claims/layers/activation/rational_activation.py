"""Rational units: their closure under residuals, targets that change from task to task, and deep Q-learning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.claims import Claim, Scale, Statement, check, effect, fits, highest, lowest, mechanism
from interlayer.claims.training import built
from interlayer.claims.twins import frozen
from interlayer.core.rl import DQN, sizes
from interlayer.layers.activation.rational_activation import Rational, fit, joint, rational_naive
from interlayer.models import MLP

ENVIRONMENTS = ("CartPole-v1", "Acrobot-v1")
RELU, LONG, SILU, OURS, JOINT = "relu", "relu, twice the steps", "silu", "rational", "recurrent-rational"
FROZEN, OUTSIDE, UNMOVED = "frozen", "residual left out", "denominator not moved"
FIRST = 300  # first seed; see `pilots`
RATES = {RELU: 2e-2, LONG: 2e-2, SILU: 4e-2, OURS: 2e-2, JOINT: 2e-2, FROZEN: 2e-2}  # of the stream of tasks


class Outside(Rational):
    """A control: the residual connection is not taken into the unit."""

    def residual(self) -> Rational:
        """The unit alone."""
        return self


class Unmoved(Rational):
    """A mutant: ``a_k`` grows by ``b_k`` where it is ``a_{k+1}``."""

    @torch.no_grad()
    def residual(self) -> Rational:
        """One index of the closed form moved."""
        new = Rational(like=self.like, degrees=self.degrees).to(self.numerator)
        new.numerator.copy_(self.numerator)
        new.denominator.copy_(self.denominator)
        new.numerator[1] += 1
        new.numerator[1 : self.degrees[1] + 1] += self.denominator
        return new


ACTIVATIONS: dict[str, Callable[[], Any]] = {
    RELU: lambda: nn.ReLU,
    LONG: lambda: nn.ReLU,
    SILU: lambda: nn.SiLU,
    OURS: lambda: Rational,
    JOINT: joint,
    FROZEN: lambda: frozen(Rational),
}
EXACT: dict[str, type[Rational]] = {OURS: Rational, OUTSIDE: Outside, UNMOVED: Unmoved}


@torch.no_grad()
def moved(model: nn.Module) -> float:
    """By how much the functions differ from their start on [-3, 3], at most."""
    x = torch.linspace(-3, 3, 201)
    gaps = [0.0]
    for unit in model.modules():
        if isinstance(unit, Rational):
            a, b = (torch.tensor(c, dtype=x.dtype) for c in fit(unit.like, unit.degrees))
            gaps.append(float((unit(x) - rational_naive(x, a, b)).abs().max()))
    return max(gaps)


def build(arm: str, scale: Scale, environment: str = ENVIRONMENTS[-1]) -> MLP:
    """A network of action values."""
    features, actions = sizes(environment)
    return MLP(features, actions, depth=2, width=64, activation=ACTIVATIONS[arm]())


@torch.no_grad()
def closure(unit: type[Rational]) -> float:
    """Of random coefficients with an even denominator, how far the unit with its residual is from x + R(x), at most, in float64."""
    inner, x = unit(like="tanh").double(), torch.linspace(-3, 3, 101, dtype=torch.float64)
    inner.numerator.copy_(torch.randn(6))
    inner.denominator.copy_(torch.rand(4) * torch.tensor([0, 1, 0, 1]))
    y = x + inner(x)
    return float((inner.residual()(x) - y).abs().max() / y.abs().max())


def sines(draw: torch.Generator) -> Callable[[Tensor], Tensor]:
    """A sum of eight sines of random directions and phases, with variance 1."""
    way, phase = 3 * torch.randn(8, 2, generator=draw), 6.28 * torch.rand(8, generator=draw)
    return lambda x: 0.5 * torch.sin(x @ way.T + phase).sum(1, keepdim=True)


def tasks(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Regression onto one sum of sines after the other: squared error at the end of each, over the variance of its targets."""
    draw = torch.Generator().manual_seed(seed)
    model = built(lambda: MLP(2, 1, depth=2, width=16, activation=ACTIVATIONS[arm]()), seed)
    optimizer, errors = torch.optim.Adam(model.parameters(), RATES[arm]), []
    for _ in range(scale.tasks):
        target = sines(draw)
        for _ in range(scale.each * (2 if arm == LONG else 1)):
            x = 2 * torch.rand(64, 2, generator=draw) - 1
            optimizer.zero_grad()
            F.mse_loss(model(x), target(x)).backward()
            optimizer.step()
        x = 2 * torch.rand(1000, 2, generator=draw) - 1
        with torch.no_grad():
            errors.append(float((model(x) - target(x)).square().mean() / target(x).var()))
    mean = float(np.mean(errors))
    return {
        "error": mean,
        "log2 of the error": float(np.log2(mean)),
        "error of the last task": errors[-1],
        "moved": moved(model),
    }


def returns(arm: str, seed: int, scale: Scale, name: str, steps: int) -> dict[str, float]:
    """Mean return of the episodes that ended in the last quarter of training, if any; log2 of the steps to an end in the last half.

    On CartPole an episode earns 1 for each step until the pole falls.
    """
    torch.manual_seed(seed)
    q = build(arm, scale, name)
    run = DQN(steps=steps, ratio=2 / scale.copies, copies=scale.copies, warm=scale.warm).train(q, name, seed=seed)
    late = [r for r, at in zip(run.returns, run.at, strict=True) if at > 0.75 * steps]
    ends = sum(at > steps / 2 for at in run.at)
    return {
        name: float(np.mean(late)) if late else float("nan"),
        f"{name}: log2 of steps to an end": float(np.log2(steps / 2 / (ends + 1))),
        f"moved on {name}": moved(q),
    }


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Closure under a residual; errors on a stream of tasks; returns of deep Q-learning, of some arms on the first seeds only."""
    torch.manual_seed(seed)
    found = {"error of the residual": closure(EXACT[arm])} if arm in EXACT else {}
    if arm in (OUTSIDE, UNMOVED):
        return found
    found |= tasks(arm, seed, scale)
    for name, (steps, seeds) in scale.environments.items():
        judged = name == "CartPole-v1" and arm in (RELU, OURS, FROZEN)
        if judged or (seed < FIRST + seeds and arm not in (LONG, FROZEN)):
            found |= returns(arm, seed, scale, name, steps)
    return found


def _lower(arm: str, than: str, says: str, margin: float = 0.0) -> Statement:
    return effect(says, lowest("log2 of the error", arm, than=(than,), margin=margin), control=FROZEN)


CLAIM = Claim(
    says="A rational unit with a residual connection is a rational unit; on a stream of regression tasks networks of learned rational "
    "units, one for each layer or one for all, have less than half the error of ReLU networks and less error than SiLU networks, "
    "each at its own rate; and in deep Q-learning on CartPole they balance the pole for longer than ReLU networks.",
    measure=measure,
    build=build,
    arms=(RELU, LONG, SILU, OURS, JOINT),
    statements=(
        mechanism(
            "The unit that takes in a residual connection gives x + R(x), to 1e-12",
            fits("error of the residual", OURS, high=1e-12),
            control=OUTSIDE,
            mutant=UNMOVED,
        ),
        _lower(OURS, RELU, "Rational units have less than half the error of ReLU on four tasks in turn", 1.0),
        _lower(OURS, SILU, "Rational units have less error than SiLU on four tasks in turn"),
        _lower(JOINT, RELU, "One rational unit for all layers has less than half the error of ReLU", 1.0),
        _lower(JOINT, SILU, "One rational unit for all layers has less error than SiLU"),
        effect(
            "In deep Q-learning on CartPole rational units balance the pole for longer than ReLU",
            highest("CartPole-v1: log2 of steps to an end", OURS, than=(RELU,)),
            control=FROZEN,
        ),
    ),
    checks=(
        check("The error of ReLU is at most 0.3 of the variance", fits("error", RELU, high=0.3)),
        check("Twice the steps leave less error", lowest("log2 of the error", LONG, than=(RELU,))),
        check(
            "ReLU balances the pole for longer than random actions, which do for 22 steps",
            fits("CartPole-v1: log2 of steps to an end", RELU, low=4.46),
        ),
    ),
    first_seed=FIRST,
    pilots="Two runs, on seeds 100 to 111 and 200 to 211, were void. In the first two checks stayed undecided: networks four times as "
    "wide had less error by .020 [-.014, .055], and ReLU balanced the pole for 53.8 [27.5, 80.2] steps where 40 were asked for; "
    "in the second, with twice the steps as head room, 57.9 [20.0, 95.8] where 25 were. Such times have long tails, so now "
    "their log2 is compared: in the second run it was 5.4 [4.5, 6.3] for ReLU, where random actions have 4.46, 1.03 [.46, 1.60] "
    "more for rational units and .75 more for frozen ones. Seeds are new, 300 and up. Seeds 1000 to 1003, four tasks of 100 "
    "steps, rates .003 .01 .02 .04, mean error: ReLU .21 .13 .12 .17, SiLU .23 .11 .07 .07, rational .15 .06 .04 .05, one for "
    "all .15 .05 .05 .05, frozen .22 .10 .09 .10; chosen: .02, and .04 for SiLU. So frozen units, which are a smooth leaky "
    "ReLU, have less error than ReLU too, by less than half. Deep Q-learning on CartPole, seeds 1000 and 1001, returns in the "
    "last quarter of 6000 steps at .001 and .003: ReLU 229 185, SiLU 214 145, rational 180 158; of 5000 steps at .001 and .002: "
    "ReLU 197 164, rational 156 (and one run without an end) 162, frozen 234 133; of 3000 steps at .001: ReLU 30, rational 12, "
    "frozen 57, too few to learn; so 5000 steps at .001 for all, and steps to an end, which a run without one has too. Frozen "
    "units earned as much as learned ones. An earlier form, on seeds 0 to 11, was of deep Q-learning alone, 20,000 steps at "
    ".001, 1226 CPU seconds: on CartPole rational units earned less than SiLU (-48 [-81, -15]) and no more than ReLU (-13 [-34, "
    "7]), one for all +9 [-20, 38] against ReLU and -25 [-62, 11] against SiLU; on Acrobot -76 [-182, 30] and -53 [-150, 44], "
    "one for all -113 [-207, -19] and -90 [-173, -6]. Its SiLU and its unit for all layers are now measured on the first four "
    "seeds, and Acrobot on the first two, without a statement.",
    scales={  # steps of deep Q-learning, and on how many seeds arms without a statement are measured
        "smoke": {
            **{"tasks": 1, "each": 2, "copies": 1, "warm": 505},
            "environments": {"CartPole-v1": (510, 1), "Acrobot-v1": (510, 1)},
        },
        "small": {
            **{"tasks": 4, "each": 100, "copies": 8, "warm": 500},
            "environments": {"CartPole-v1": (5000, 4), "Acrobot-v1": (4200, 2)},
        },
        "full": {
            **{"tasks": 20, "each": 1000, "copies": 8, "warm": 5000},
            "environments": {"CartPole-v1": (200_000, 12), "Acrobot-v1": (500_000, 12)},
        },
    },
)
