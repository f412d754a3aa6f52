"""Every training loop says how far it is."""

import io

import pytest
from rich.console import Console
from torch import nn

from interlayer import compare
from interlayer.claims.training import train
from interlayer.core.schedule import progress


class Following(nn.Module):
    """Notes the shares that it hears of."""

    def __init__(self, shape=None):
        super().__init__()
        self.line, self.shares = nn.Linear(64, 10), []

    def forward(self, x):
        return self.line(x.flatten(1))

    def progress(self, share):
        self.shares.append(share)


def test_modules_without_it_are_passed_over_and_shares_are_checked():
    net = nn.Sequential(nn.Linear(2, 2), Following())
    progress(net, 0.25)
    assert net[1].shares == [0.25]
    with pytest.raises(ValueError, match=r"share was -0\.1"):
        progress(net, -0.1)


def test_the_loops_of_claims_and_studies_call_it(tmp_path):
    model = Following()
    train(model, "digits", seed=0, steps=4, lr=1e-3, batch=8)
    assert model.shares == [0, 0.25, 0.5, 0.75]
    seen = []

    class Shared(Following):
        def progress(self, share):
            seen.append(share)

    compare(
        model=Shared,
        task="digits",
        arms=["plain"],
        steps=4,
        seeds=1,
        lr=1e-3,
        out=tmp_path,
        console=Console(file=io.StringIO()),
    )
    assert seen[:4] == [0, 0.25, 0.5, 0.75]
