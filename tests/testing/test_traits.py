"""Toys of each trait keep their contracts, and their broken twins don't."""

import pytest
import torch
from torch import nn

from interlayer.core.example import Example
from interlayer.core.solve import fixed_point
from interlayer.testing import ContractError, check, hold


class Linear(nn.Module):
    """The weights of all toys, and their check of the input."""

    def __init__(self, width=4):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width) / 4)

    def forward(self, x):
        if x.shape[-1] != len(self.weight):
            raise ValueError(f"{type(self).__name__}: input {tuple(x.shape)}; expected [..., {len(self.weight)}].")
        return self.run(x)


class Spike(torch.autograd.Function):
    """A step at 0 with the gradient of ``atan``: 1 / (1 + (pi v)^2)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v):
        return (v > 0).to(v.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, grad):
        return grad / (1 + (torch.pi * ctx.saved_tensors[0]).square())


class WrongSpike(Spike):
    """Half of the stated slope."""

    @staticmethod
    def backward(ctx, grad):
        return grad / (1 + (torch.pi * ctx.saved_tensors[0]).square()) / 2


def atan(v):
    return torch.atan(torch.pi * v) / torch.pi + 0.5


class Spiking(Linear):
    """Charge, fire, soft reset over [B, T, F]; the gradient through a spike is that of the arc tangent."""

    spike = Spike.apply

    def start(self, batch):
        return self.weight.new_zeros(batch, len(self.weight))

    def step(self, x, v, fire=None):
        v = 0.5 * v + x @ self.weight
        s = (fire or type(self).spike)(v - 0.3)
        return s, v - 0.3 * s.detach()

    def run(self, x, fire=None):
        if not x.shape[1]:
            raise ValueError(f"Spiking: input {tuple(x.shape)}; expected at least one step.")
        v, out = self.start(x.shape[0]), []
        for each in x.unbind(1):
            s, v = self.step(each, v, fire)
            out.append(s)
        return torch.stack(out, 1)


class WrongSlope(Spiking):
    spike = WrongSpike.apply


class ForgetsItsState(Spiking):
    def step(self, x, v, fire=None):
        return super().step(x, v if fire else torch.zeros_like(v), fire)

    def run(self, x, fire=None):
        return super().run(x, fire or self.spike)


def surrogate(layer):
    """The layer with spikes of the right value and, by autograd, the stated slope."""

    def fire(v):
        smooth = atan(v)
        return (v > 0).to(v.dtype) + smooth - smooth.detach()

    return lambda x: layer.run(x, fire)


class Rounded(Linear):
    """Weights on a grid of quarters, trained straight through."""

    def run(self, x):
        w = self.weight
        return torch.tanh(x @ (w + ((w * 4).round() / 4 - w).detach()))


class RoundedTwice(Rounded):
    """The input is rounded too, and lets no gradient through."""

    def run(self, x):
        return super().run((x * 4).round() / 4)


def straight(layer):
    """By autograd: the same with the grid's weights as if they were the parameters."""
    grid = (layer.weight * 4).round().detach() / 4 - layer.weight.detach()
    return lambda x: torch.tanh(x @ (layer.weight + grid))


class Equilibrium(Linear):
    """z = tanh(z W + x), with the gradient of the implicit function theorem."""

    def run(self, x):
        def f(z, x, w):
            return torch.tanh(z @ w + x)

        return fixed_point(f, torch.zeros_like(x), x, self.weight, tolerance=torch.finfo(x.dtype).eps ** 0.75).value


class OneStepGradient(Equilibrium):
    """Leaves out the Jacobian of the iteration."""

    def run(self, x):
        return torch.tanh(super().run(x).detach() @ self.weight + x)


def unrolled(layer):
    def run(x):
        z = torch.zeros_like(x)
        for _ in range(100):
            z = torch.tanh(z @ layer.weight + x)
        return z

    return run


class Sketch(torch.autograd.Function):
    """A product whose backward pass sees a random half of the features of the gradient, doubled."""

    @staticmethod
    def forward(ctx, x, w, factor):
        ctx.save_for_backward(x, w)
        ctx.factor = factor
        return x @ w

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        grad = grad * (torch.rand_like(grad) < 0.5) * ctx.factor
        return grad @ w.t(), x.flatten(0, -2).t() @ grad.flatten(0, -2), None


class Sketched(Linear):
    factor = 2.0

    def run(self, x):
        return Sketch.apply(x, self.weight, self.factor)


class Biased(Sketched):
    factor = 1.8


class Routed(Linear):
    """Two experts; each token goes to one of them, and only its tokens are computed."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ParameterList([torch.randn(4, 4) / 4 for _ in range(2)])

    def run(self, x):
        logits = x @ self.weight[:, :2]
        chosen, gate = logits.argmax(-1), logits.softmax(-1)
        out = 0 * self.weight.sum() * x
        for i, expert in enumerate(self.experts):
            if (mine := chosen == i).any():
                out = out.index_put((mine,), (x[mine] @ expert) * gate[mine][:, i : i + 1])
            else:
                out = out + 0 * expert.sum()
        return out


class DenseAllTheSame(Routed):
    """Computes every expert for every token."""

    def run(self, x):
        logits = x @ self.weight[:, :2]
        pick = nn.functional.one_hot(logits.argmax(-1), 2).to(x.dtype) * logits.softmax(-1)
        return sum((x @ expert) * pick[..., i : i + 1] for i, expert in enumerate(self.experts))


class Coupled(Linear):
    """Centred over the batch."""

    def run(self, x):
        return torch.tanh((x - x.mean(0)) @ self.weight)


class OrderMatters(Coupled):
    """Each item sees the one before it in the batch."""

    def run(self, x):
        return torch.tanh((x - x.roll(1, 0)) @ self.weight)


def toy(cls, **more):
    return Example(
        make=cls, inputs=lambda: (torch.randn(3, 6, 4),), odd=lambda: (torch.randn(2, 7, 4),), **{"axis": 1, **more}
    )


SPIKING = {"gradient": "surrogate", "twin": surrogate, "streams": True, "causal": True}
TOYS = {
    "spiking": (Spiking, SPIKING),
    "straight-through": (Rounded, {"gradient": "surrogate", "twin": straight, "causal": True}),
    "equilibrium": (Equilibrium, {"gradient": "implicit", "twin": unrolled, "control": "data"}),
    "random backward": (Sketched, {"gradient": "unbiased", "twin": lambda layer: lambda x: x @ layer.weight}),
    "routed": (Routed, {"control": "data", "causal": True}),
    "coupled": (Coupled, {"batch": "coupled"}),
}


@pytest.mark.parametrize("name", TOYS)
def test_a_toy_of_each_trait_keeps_its_contracts(name):
    cls, traits = TOYS[name]
    for contract in ("shapes", "gradient", "odd", "causal", "state_dict", "compile", "export", "trace", "per_example", "deepcopy",
                     "seed", "batch", "state", "steps", "ddp", "wrong", "lengths", "empty"):  # fmt: skip
        assert hold(contract, "layer", toy(cls, **traits)) == "kept"


@pytest.mark.parametrize(
    ("contract", "cls", "traits", "message"),
    [
        ("gradient", WrongSlope, SPIKING, "surrogate gradients, against the twin's: the numbers differ"),
        ("steps", ForgetsItsState, SPIKING, "the outputs step by step: the numbers differ"),
        ("gradient", RoundedTwice, TOYS["straight-through"][1], "surrogate gradients"),
        ("gradient", OneStepGradient, TOYS["equilibrium"][1], "implicit gradients"),
        (
            "gradient",
            Rounded,
            {"gradient": "implicit", "twin": lambda m: lambda x: torch.tanh(x @ m.weight)},
            "the output",
        ),
        ("gradient", Biased, TOYS["random backward"][1], "standard errors from the twin's"),
        ("gradient", Coupled, {"gradient": "unbiased", "twin": lambda m: m.run}, "of different seeds are equal"),
        ("gradient", Rounded, {"gradient": "surrogate"}, "needs a twin"),
        ("export", DenseAllTheSame, {"control": "data"}, "run the same operations"),
        ("batch", OrderMatters, {"batch": "coupled"}, "the batch in another order"),
        ("batch", Rounded, {"batch": "coupled"}, "on its own gives the same output"),
    ],
)
def test_a_broken_twin_is_caught(contract, cls, traits, message):
    with pytest.raises(ContractError, match=message):
        hold(contract, "layer", toy(cls, **traits))


def test_the_exact_contract_does_not_hold_for_what_is_declared_otherwise():
    for name in ("spiking", "straight-through", "random backward"):
        with pytest.raises(ContractError, match="gradient"):
            hold("gradient", "layer", toy(TOYS[name][0]))


def test_all_contracts_of_a_toy_that_needs_no_exception():
    assert set(check(Rounded, toy(Rounded, **TOYS["straight-through"][1])).values()) == {"kept"}
