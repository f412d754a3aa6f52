"""What makes two models different, each thing alone."""

import copy
import functools

import pytest
import torch
from torch import nn

from interlayer.core.equal import difference


class Options(nn.Module):
    """Holds options of every sort."""

    def __init__(self, **options):
        super().__init__()
        self.line = nn.Linear(2, 2)
        self.table = nn.ParameterList([nn.Parameter(torch.ones(2))])
        self.register_buffer("seen", torch.zeros(1))
        vars(self).update(
            {"rate": 0.1, "act": torch.relu, "sizes": (1, 2), "names": {"a": [1]}, "make": None} | options
        )


def scaled(by):
    return lambda x: by * x


def model(**options):
    torch.manual_seed(0)
    return Options(**options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rate": float("nan")},
        {"act": scaled(2)},
        {"make": functools.partial(nn.Linear, 2, bias=False)},
        {"names": {"a": [torch.ones(2)]}},
    ],
)
def test_a_model_equals_what_is_built_alike(options):
    other = model(**options) if "act" not in options else model(act=scaled(2))
    assert difference(model(**options), other) == "" == difference(copy.deepcopy(other), other)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rate": 0.2}, "'rate' is 0.1 in one and 0.2 in the other."),
        ({"act": torch.tanh}, "'act' is"),
        ({"sizes": (1, 3)}, "'sizes' is (1, 2) in one and (1, 3)"),
        ({"sizes": [1, 2]}, "'sizes' is (1, 2) in one and [1, 2]"),
        ({"names": {"a": [2]}}, "'names' is"),
        ({"more": 1}, "'more' is None in one and 1 in the other."),
        ({"make": functools.partial(nn.Linear, 2)}, "'make' is None"),
    ],
)
def test_each_option_counts(options, says):
    assert difference(model(), model(**options)).startswith(says)


def test_functions_differ_by_their_code_and_what_they_hold():
    assert difference(model(act=scaled(2)), model(act=scaled(3))).startswith("'act' is")
    assert difference(model(act=lambda x: x), model(act=lambda x: -x)).startswith("'act' is")
    assert difference(model(make=functools.partial(nn.Linear, 2)), model(make=functools.partial(nn.Linear, 3))) != ""


def test_numbers_modules_and_ties_count():
    a, b = model(), model()
    with torch.no_grad():
        b.line.weight[0, 0] += 1e-7
    assert difference(a, b) == "'line.weight' differs in its numbers, type or requires_grad."
    b = model()
    b.seen += 1
    assert difference(a, b) == "'seen' differs in its numbers, type or requires_grad."
    b = model()
    b.line.weight.requires_grad_(False)
    assert difference(a, b) == "'line.weight' differs in its numbers, type or requires_grad."
    b = model()
    b.extra = nn.ReLU()
    assert difference(a, b) == "only one has a module 'extra'."
    b = model()
    b.line = nn.Bilinear(2, 2, 2)
    assert difference(a, b) == "'line' is Linear in one and Bilinear in the other."
    a, b = (nn.ModuleList([nn.ReLU(), nn.ReLU()]) for _ in range(2))
    b[1] = b[0]
    assert difference(a, b) == "modules are shared in another way."
    a, b = (nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)]) for _ in range(2))
    for part in (a, b):
        part[1].load_state_dict(part[0].state_dict())
        part[0].load_state_dict(a[0].state_dict())
        part[1].load_state_dict(a[0].state_dict())
    b[1].weight = b[0].weight
    assert difference(a, b) == "parameters are tied in another way."
    assert difference(nn.Linear(2, 2), nn.Linear(2, 2, bias=False)) != ""


def test_training_mode_counts_and_grad_does_not():
    a, b = model(), model()
    b.line(torch.ones(1, 2)).sum().backward()
    assert difference(a, b) == ""
    assert difference(model().eval(), model()) == "'training' is False in one and True in the other."
