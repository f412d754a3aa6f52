"""The contract of whole models: they learn."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from interlayer.core import datasets
from interlayer.core.example import Example
from interlayer.core.fit import fit
from interlayer.testing.common import make, require, tensors
from interlayer.testing.harness import pair


def training(example: Example) -> None:
    """A real training run beats the trivial predictor: ``train()``, or on digits if the inputs are such images."""
    if example.train is not None:
        score, trivial = make(example.train)
    else:
        module, inputs = pair(example)
        score, trivial = _digits(module, tensors(inputs)[0])
    require(score < trivial, f"after training the loss is {score:.4g}; the trivial predictor has {trivial:.4g}")


def _digits(module: nn.Module, like: Tensor) -> tuple[float, float]:
    """Held-out loss after 60 steps on the handwritten digits, and that of the constant predictor."""
    require(
        tuple(like.shape[1:]) in ((1, 8, 8), (64,)) and like.is_floating_point(),
        f"no train() is given, and inputs {tuple(like.shape)} are not digits, [batch, 1, 8, 8] or [batch, 64]",
    )
    images, y = datasets.digits()
    x = (images / 8 - 1).view(-1, *like.shape[1:])
    order = make(lambda: torch.randperm(len(x)), 7)
    train_on, held = order[:1400], order[1400:]
    rows = (train_on[torch.arange(at * 32, at * 32 + 32) % len(train_on)] for at in range(60))
    fit(module, rows, lambda net, at: nn.functional.cross_entropy(net(x[at]), y[at]), steps=60, lr=3e-3, clip=None)
    share = torch.bincount(y[train_on], minlength=10) / len(train_on)
    with torch.no_grad():
        score = nn.functional.cross_entropy(module.eval()(x[held]), y[held]).item()
    return score, -share.log()[y[held]].mean().item()
