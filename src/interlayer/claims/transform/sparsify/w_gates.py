"""Weight-dependent gates on handwritten digits: accuracy at equal multiply-adds, with the channels really removed."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.claims import Claim, Scale, check, effect, fits, highest, mechanism
from interlayer.claims.training import batches, built, judge, train
from interlayer.core.cost import flops, latency
from interlayer.core.fit import fit
from interlayer.core.wiring import Wiring, masked, run, take, trace
from interlayer.transform.sparsify.w_gates import Gate, Latency, Multiplications, WGates, ends, measured, removable

GATES, L1, SLIM, RANDOM, DENSE = "w-gates", "l1 norm", "network slimming", "random filters", "dense"
REMOVED, OTHERS, KEPT = "closed filters removed", "other filters removed", "biases of closed filters kept"
EXACT, SUM, WRITERS = "multiply-adds", "sum of the shares", "axis of the outputs alone"
OWN, FREE, PLACED = "gates of weights", "free gates", "gates of weights and positions"
TIMED, SHUFFLED, SIGN = "predicted latency", "predictor of shuffled times", "predictor of shares turned round"
PRUNED = (GATES, L1, SLIM, RANDOM)


def build(arm: str, scale: Scale) -> nn.Module:
    """A plain convolutional net for 8x8 digits."""

    def stage(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU()]

    w = scale.width
    return nn.Sequential(
        *stage(1, w), *stage(w, 2 * w), *stage(2 * w, 2 * w, 2), *stage(2 * w, 4 * w, 2), nn.Flatten(), nn.Linear(16 * w, 10)
    )  # fmt: skip


@lru_cache(maxsize=1)
def images(seed: int) -> Tensor:
    """A batch of digits."""
    return next(iter(batches("digits", seed, 64, 1)))[0]


def trained(scale: Scale, seed: int) -> nn.Module:
    """A trained net, the same for all arms of a seed."""
    return copy.deepcopy(_trained(scale.width, scale.dense, seed))


@lru_cache(maxsize=1)
def _trained(width: int, steps: int, seed: int) -> nn.Module:
    model = built(lambda: build(GATES, Scale(width=width)), seed)
    train(model, "digits", seed=seed, steps=steps, lr=3e-3)
    return model


@lru_cache(maxsize=1)
def _gated(width: int, dense: int, steps: int, seed: int, lr: float, gate_lr: float, weight: float, target: float) -> WGates:
    model = copy.deepcopy(_trained(width, dense, seed))
    rule = WGates(model, target=target, lr=lr, gate_lr=gate_lr, weight=weight)
    for batch in batches("digits", seed + 20, 64, steps):
        rule.step(batch)
    return rule


def gated(scale: Scale, seed: int) -> WGates:
    """The rule after its training."""
    rate, own = scale.rates[GATES], (scale.gate_lr, scale.weight, scale.target)
    return _gated(scale.width, scale.dense, scale.steps, seed, rate, *own)


def slimmed(model: nn.Module, scale: Scale, seed: int) -> nn.Module:
    """Train with an L1 penalty on the scales of batch normalisation (Liu et al., 2017)."""
    norms = [m.weight for m in model.modules() if isinstance(m, nn.BatchNorm2d)]

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(net(x), y) + scale.penalty * torch.stack([n.abs().sum() for n in norms]).sum()

    fit(model, batches("digits", seed + 20, 64, scale.steps), loss, steps=scale.steps, lr=scale.rates[SLIM], seed=seed)
    return model


def scores(arm: str, model: nn.Module, wiring: Wiring, names: list[str]) -> dict[str, Tensor]:
    """How much each filter is worth; only the order within a layer counts but for network slimming, which compares layers."""
    found = {}
    for name in names:
        group = wiring.groups[name]
        written = [m.rows(model.get_parameter(m.name)) for m in ends(model, group)[0]]
        norm = next(m.name for m in group.members if isinstance(model.get_submodule(m.name.rpartition(".")[0]), nn.BatchNorm2d))
        found[name] = {
            L1: lambda written=written: torch.cat(written, 1).abs().sum(1),
            SLIM: lambda norm=norm: model.get_parameter(norm.rpartition(".")[0] + ".weight").abs(),
            RANDOM: lambda group=group: torch.rand(group.size),
        }[arm]().detach()
    return found


def at_budget(arm: str, model: nn.Module, budget: float, x: Tensor) -> tuple[dict[str, list[int]], Wiring]:
    """The best filters, so many that the share of the multiply-adds is the budget or just above."""
    wiring = trace(model, x[:2])
    names = [n for n, g in wiring.groups.items() if removable(model, g)]
    cost, worth = Multiplications(model, wiring, names, x[:2]), scores(arm, model, wiring, names)
    if arm != SLIM:  # the same share of each layer
        worth = {n: 1 - s.argsort(descending=True).argsort() / len(s) for n, s in worth.items()}
    keep: dict[str, list[int]] = {}
    for least in torch.cat(list(worth.values())).sort(descending=True).values:
        keep = {n: s.ge(min(least, s.max())).nonzero()[:, 0].tolist() for n, s in worth.items()}
        if float(cost(torch.tensor([len(keep[n]) / len(worth[n]) for n in names]))) >= budget:
            break
    return keep, wiring


def pruned(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Train in the way of the arm, remove channels, train on, and judge."""
    rule, x = gated(scale, seed), images(seed)
    if arm == GATES:
        small = rule.result()
    else:
        model = trained(scale, seed)
        if arm == SLIM:
            slimmed(model, scale, seed)
        else:
            train(model, "digits", seed=seed + 20, steps=scale.steps, lr=scale.rates[arm])
        budget = flops(rule.result(), x[:2]) / flops(rule.model, x[:2])
        keep, wiring = at_budget(arm, model, budget, x)
        small = take(model, keep, wiring, x[:2])
    before = judge(small, "digits")["accuracy"]
    train(small, "digits", seed=seed + 50, steps=scale.tuned, lr=scale.rates[arm])
    return {
        "accuracy": judge(small, "digits")["accuracy"],
        "accuracy before fine-tuning": before,
        "share of multiply-adds": flops(small, x[:2]) / flops(rule.model, x[:2]),
        "latency in us": 1e6 * latency(small, images(seed).repeat(4, 1, 1, 1), calls=30),
    }


def removal(arm: str, seed: int, scale: Scale) -> float:
    """How far the outputs of the smaller network are from those through the gates."""
    rule, x = gated(scale, seed), images(seed)
    rule.model.eval()
    keep = rule.keep()
    assert rule.wiring is not None
    with torch.no_grad():
        expected = rule.predict(x)
        if arm == OTHERS:
            keep = {n: [(i + 1) % rule.wiring.groups[n].size for i in units] for n, units in keep.items()}
        if arm == KEPT:  # only the filters' weights are zero: what batch normalisation adds goes on
            state, zeros = dict(rule.model.state_dict()), masked(rule.model, keep, rule.wiring)
            state.update({n: zeros[n] for g in rule.found.values() for n in [m.name for m in ends(rule.model, g)[0]]})
            state.update({n: rule.model.state_dict()[n] for g in rule.found.values() for n in [m.name for m in ends(rule.model, g)[1]]})
            found = run(rule.model, state, x)
        else:
            found = take(rule.model, keep, rule.wiring, x[:2])(x)
    return float((found - expected).abs().max() / expected.abs().max())


def counting(arm: str, seed: int, scale: Scale) -> float:
    """Largest relative error of the share of multiply-adds, over random shrunk networks."""
    model, x = built(lambda: build(GATES, scale), seed).eval(), images(seed)[:2]
    wiring = trace(model, x)
    names, full, worst = list(wiring.groups), flops(model, x), 0.0
    cost = Multiplications(model, wiring, names, x)
    for _ in range(scale.models):
        keep = {n: range(int(torch.randint(1, wiring.groups[n].size + 1, ()))) for n in names}
        shares = torch.tensor([len(keep[n]) / wiring.groups[n].size for n in names])
        said = cost(shares)
        if arm == SUM:
            said = shares.mean()
        if arm == WRITERS:
            rows = cost.axes.clone()
            rows[1:] = torch.cat((rows[1:-1] * torch.eye(len(names))[1:], 0 * rows[-1:]))
            said = (cost.counts * (1 - rows * (1 - shares)).prod(-1)).sum()
        real = flops(take(model, keep, wiring, x), x) / full
        worst = max(worst, abs(float(said) / real - 1))
    return worst


def followed(arm: str, seed: int) -> float:
    """Share of the filters whose gates follow when a layer's filters are put in another order."""
    filters, order = torch.randn(64, 27), torch.randperm(64)
    gate, own = Gate(27), torch.randn(64)
    nn.init.normal_(gate.score.weight)
    nn.init.zeros_(gate.score.bias)
    judges: dict[str, Callable[[Tensor], Tensor]] = {
        OWN: gate,
        FREE: lambda w: (own >= 0).float(),
        PLACED: lambda w: ((gate.score(w).squeeze(1) + 10 * own) >= 0).float(),
    }
    return float((judges[arm](filters[order]) == judges[arm](filters)[order]).float().mean())


def predicting(arm: str, seed: int, scale: Scale) -> float:
    """Correlation of predicted and measured latency, over shrunk networks that the predictor was not fitted to."""
    model, x = built(lambda: build(GATES, Scale(width=scale.wide)), seed).eval(), images(seed)
    wiring = trace(model, x[:2])
    names = list(wiring.groups)
    shares, times = measured(model, wiring, names, x, samples=scale.timed)
    half = len(times) // 2
    seen = shares[:half]
    if arm == SIGN:
        seen = 1 - seen
    wanted = times[:half][torch.randperm(half)] if arm == SHUFFLED else times[:half]
    said = Latency(len(names)).learn(seen, wanted, steps=scale.fitted)(shares[half:]).detach()
    found = float(torch.corrcoef(torch.stack((said, times[half:])))[0, 1])
    return found if math.isfinite(found) else 0.0


def measure(arm: str, seed: int, scale: Scale) -> Mapping[str, float]:
    """What an arm is judged by."""
    if arm in PRUNED:
        return pruned(arm, seed, scale)
    if arm in (REMOVED, OTHERS, KEPT):
        return {"change of outputs": removal(arm, seed, scale)}
    if arm in (EXACT, SUM, WRITERS):
        return {"error of multiply-adds": counting(arm, seed, scale)}
    if arm in (OWN, FREE, PLACED):
        return {"gates that follow": followed(arm, seed)}
    if arm in (TIMED, SHUFFLED, SIGN):
        return {"correlation with measured latency": predicting(arm, seed, scale)}
    model = trained(scale, seed)
    return {"accuracy": judge(model, "digits")["accuracy"], "latency in us": 1e6 * latency(model, images(seed).repeat(4, 1, 1, 1), calls=30)}
