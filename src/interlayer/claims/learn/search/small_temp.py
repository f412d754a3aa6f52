"""Small temperature against DARTS: what pruning costs, how many skips are chosen, and the network trained from scratch."""

from __future__ import annotations

import functools
import math
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.claims import Claim, Scale, check, effect, fits, highest, lowest, mechanism
from interlayer.core import datasets
from interlayer.core.schedule import progress
from interlayer.core.search import Supernet
from interlayer.core.search.space import Point
from interlayer.core.tune import rate
from interlayer.learn.search import DARTS
from interlayer.learn.search.small_temp import (
    SmallTemp,
    entropy,
    exponential,
    sparse_noisy_softmax,
    temperature_of,
)

OPERATIONS = ("skip_connect", "sep_conv_3x3", "dil_conv_3x3")
LR, ARCH_LR = 0.1, {"darts": 0.03, "small-temp": 0.03, "uncooled": 0.03}
EQUATIONS = ("equations", "quiet", "noise outside", "warm", "multiplied", "constant", "linear", "scheduled", "nats")


def supernet(scale: Scale) -> Supernet:
    """The smallest in which a cell has edges to choose among."""
    return Supernet(1, 10, width=scale.width, layers=scale.layers, nodes=2, operations=OPERATIONS)


def equations(arm: str) -> dict[str, float]:
    """The parts of the method on their own; a control or mutant changes one of them."""
    temperature, ahead = 0.01, torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    noise = -torch.empty(200_000, 2, dtype=torch.float64).exponential_().log()
    pair = torch.stack((ahead, torch.zeros_like(ahead)))
    if arm == "noise outside":
        mixed = (pair / temperature + noise).softmax(-1)
    else:
        mixed = sparse_noisy_softmax(pair, temperature, 0.0 if arm == "quiet" else noise)
    slope = torch.autograd.grad(mixed[..., 0].mean(), ahead)[0]
    wanted = ahead.detach().sigmoid() * (1 - ahead.detach().sigmoid())
    logits = torch.randn(200, 8) - torch.empty(200, 8).exponential_().log()
    cold = {"warm": 1.0, "multiplied": 1 / temperature}.get(arm, temperature)
    start, end = 1.0, 0.02
    half = {"constant": start, "linear": (start + end) / 2}.get(arm, exponential(0.5, start, end))
    errors = []
    for target in (0.9, 0.5, 0.1, 0.02):
        for size in (1e-3, 1.0, 1e2):
            each = [size * logits]
            found: float | Tensor = target
            if arm != "scheduled":
                found = temperature_of(target / math.log(8) if arm == "nats" else target, each)
            errors.append(abs(float(entropy([sparse_noisy_softmax(a, found) for a in each])) - target))
    return {
        "slope": float(slope / wanted),
        "rest": float(1 - sparse_noisy_softmax(logits, cold).amax(-1).mean()),
        "halfway": half / math.sqrt(start * end),
        "entropy error": max(errors),
    }


def data(seed: int, scale: Scale) -> tuple[Tensor, Tensor]:
    """The seed's part of the training digits."""
    x, y = datasets.split_digits().train
    rows = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[: scale.examples]
    return x[rows], y[rows]


def accuracy(model: nn.Module, weights: dict[str, Tensor] | None = None) -> float:
    """On the held-out digits, all of them one batch whose statistics the norms take: a mixture has none of its own yet."""
    x, y = datasets.split_digits().held
    with torch.no_grad():
        out = model.train()(x) if weights is None else model.train()(x, weights)
    return float((out.argmax(1) == y).float().mean())


@functools.lru_cache(maxsize=2)
def search(arm: str, seed: int, width: int, layers: int, steps: int, examples: int, batch: int) -> DARTS:
    """A finished search; the shuffled control reads that of small-temp again."""
    scale = Scale(width=width, layers=layers, examples=examples)
    torch.manual_seed(seed)
    net, given = supernet(scale), {"lr": LR, "arch_lr": ARCH_LR[arm]}
    if arm == "darts":
        rule = DARTS(net, **given)
    elif arm == "small-temp":
        rule = SmallTemp(net, **given)
    else:
        rule = SmallTemp(net, **given, adaptive=False, start=1.0, end=1.0, noise=0.0)
    x, y = data(seed, scale)
    order = torch.Generator().manual_seed(seed)
    for step in range(steps):
        progress(net, step / steps)
        rule.descent.param_groups[0]["lr"] = LR * rate(step, steps, 0.0)
        rows = torch.randint(len(y), (batch,), generator=order)
        rule.step((x[rows], y[rows]))
    progress(net, 1.0)
    return rule


def scratch(model: nn.Module, seed: int, scale: Scale) -> float:
    """Held-out accuracy of a plain network after training, the same for every arm."""
    x, y = data(seed, scale)
    order = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), LR, momentum=0.9, weight_decay=3e-4)
    model.train()
    for step in range(scale.retrain):
        optimizer.param_groups[0]["lr"] = LR * rate(step, scale.retrain, 0.0)
        rows = torch.randint(len(y), (scale.batch,), generator=order)
        loss = F.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return accuracy(model)


def shuffled_logits(net: Supernet, seed: int) -> Point:
    """The genotype of a supernet whose logits were put in random order."""
    order = torch.Generator().manual_seed(seed)
    before = {kind: a.detach().clone() for kind, a in net.architecture.items()}
    with torch.no_grad():
        for a in net.architecture.values():
            a.copy_(a.flatten()[torch.randperm(a.numel(), generator=order)].view_as(a))
        found = net.derive()
        for kind, a in net.architecture.items():
            a.copy_(before[kind])
    return found


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Accuracy of the supernet, of the same weights once pruned, and of the network trained from scratch; skips chosen."""
    if arm in EQUATIONS:
        return equations(arm)
    if arm == "random":
        net = supernet(scale)
        torch.manual_seed(seed)
        return {"final": scratch(net.plain(net.space.sample(random.Random(seed))), seed, scale)}
    searched = "small-temp" if arm == "shuffled" else arm
    rule = search(searched, seed, scale.width, scale.layers, scale.steps, scale.examples, scale.batch)
    genotype = shuffled_logits(rule.model, seed) if arm == "shuffled" else rule.genotype()
    torch.manual_seed(seed)
    found = {"final": scratch(rule.model.plain(genotype), seed, scale)}
    if arm == "shuffled":
        return found
    chosen = [op for cell in genotype.values() for node in cell.values() for k, op in node.items() if k[:2] == "op"]
    with torch.no_grad():
        mixture = rule.mix()
    found["supernet"], pruned = accuracy(rule.model, mixture), accuracy(rule.model, rule.model.pruned(genotype))
    found["gap"] = found["supernet"] - pruned
    found["skips"] = chosen.count("skip_connect") / len(chosen)
    found["entropy"] = float(entropy(list(mixture.values())))
    return found
