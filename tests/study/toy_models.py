"""Tiny models that the tests of the engine name as ``toy_models:function``."""

import os
import time
from pathlib import Path

import torch
from torch import nn

from interlayer.core import aside


def net(shape, *, width=16):
    return nn.Sequential(nn.Flatten(), nn.Linear(shape.flat, width), nn.Tanh(), nn.Linear(width, shape.classes))


class Watched(nn.Module):
    """Writes what it sees to the file ``$TOY_LOG``: its process and the sum of each training batch."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        if self.training and torch.is_grad_enabled():
            with Path(os.environ["TOY_LOG"]).open("a") as file:
                file.write(f"{os.getpid()} {float(x.sum()):.4f}\n")
        return self.inner(x)


def watched(shape, *, width=16):
    return Watched(net(shape, width=width))


class Slow(nn.Module):
    def __init__(self, inner, pause):
        super().__init__()
        self.inner, self.pause = inner, pause

    def forward(self, x):
        time.sleep(self.pause if self.training else 0)
        return self.inner(x)


def slow(shape, *, pause=0.02):
    return Slow(net(shape), pause)


class Breaks(nn.Module):
    """Raises in its 8th training step."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x):
        self.calls += self.training
        if self.calls == 8:
            raise RuntimeError("broken on purpose")
        return self.inner(x)


def breaks(shape):
    return Breaks(net(shape))


def unbuildable(shape):
    raise ValueError("cannot be built on purpose")


class Shrinking(nn.Module):
    """Asks for small weights by an auxiliary loss."""

    def __init__(self, inner, weight):
        super().__init__()
        self.inner, self.weight = inner, weight

    def forward(self, x):
        norm = sum(p.square().sum() for p in self.inner.parameters())
        aside.metric("squared norm", norm)
        aside.loss(self.weight * norm)
        return self.inner(x)


def shrinking(shape, *, weight):
    return Shrinking(net(shape), weight)


class Inert(nn.Module):
    """The net with parameters that get a gradient of zero, built before, between or after its own."""

    def __init__(self, shape, at):
        super().__init__()
        extra = {name: lambda name=name: setattr(self, name, nn.Linear(3, 3)) for name in ("first", "middle", "last")}
        make = {at: extra[at]}
        make.get("first", lambda: None)()
        self.one = nn.Linear(shape.flat, 16)
        make.get("middle", lambda: None)()
        self.two = nn.Linear(16, shape.classes)
        make.get("last", lambda: None)()
        self.extra = getattr(self, at)

    def forward(self, x):
        y = self.two(torch.tanh(nn.functional.dropout(self.one(x.flatten(1)), 0.1, self.training)))
        return y + 0 * self.extra(torch.ones(3, device=x.device)).sum()


def inert(shape, *, at="last"):
    return Inert(shape, at)


class Own(nn.Module):
    """The same net without the extra parameters."""

    def __init__(self, shape):
        super().__init__()
        self.one, self.two = nn.Linear(shape.flat, 16), nn.Linear(16, shape.classes)

    def forward(self, x):
        return self.two(torch.tanh(nn.functional.dropout(self.one(x.flatten(1)), 0.1, self.training)))


def own(shape):
    return Own(shape)
