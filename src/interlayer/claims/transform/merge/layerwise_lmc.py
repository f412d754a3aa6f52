"""MLPs trained apart on digits and averaged layer by layer, and clients that average some of their layers in federated rounds."""

from __future__ import annotations

import copy
import statistics
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.claims import Claim, Scale, check, effect, fits, highest, mechanism
from interlayer.claims.training import accuracy, classify, digits, mlp
from interlayer.core.paths import blend, layers, mean_loss
from interlayer.core.wiring import trace
from interlayer.transform.merge.layerwise_lmc import LayerwiseLMC, federated

HALVES, RANDOM, EVERY, NEXT = (
    "random halves of the layers",
    "random directions twice",
    "all layers at once",
    "the next layer too",
)
FEDERATED = ("averaging all", "averaging all but the last", "averaging none")
LAST, EQUAL = "averaging the last only", "averaging all, every client alike"


def build(arm: str, scale: Scale) -> nn.Sequential:
    """A plain MLP for digits."""
    return mlp(scale.width, scale.depth)


@lru_cache(maxsize=4)
def _pair(width: int, depth: int, steps: int, seed: int) -> tuple[nn.Module, nn.Module]:
    nets = []
    for s in (2 * seed, 2 * seed + 1):
        torch.manual_seed(s)
        nets.append(classify(mlp(width, depth), digits(), seed=s, steps=steps, lr=1e-3, clip=None))
    return nets[0], nets[1]


def _barriers(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Of the training loss, as the authors measure it."""
    a, b = _pair(scale.width, scale.depth, scale.steps, seed)
    names = list(layers(a))
    groups, half = None, len(names) // 2
    if arm == HALVES:
        chance = torch.Generator().manual_seed(seed)
        chosen = (torch.randperm(len(names), generator=chance)[:half] for _ in names)
        groups = {str(n): [names[i] for i in some.tolist()] for n, some in enumerate(chosen)}
    if arm == RANDOM:  # another network as far away in every layer, in a random direction
        b = copy.deepcopy(b)
        with torch.no_grad():
            for own, far in zip(a.parameters(), b.parameters(), strict=True):
                step = torch.randn_like(own)
                far.copy_(own + step * (far - own).norm() / step.norm())
    found = LayerwiseLMC(groups=groups, draws=scale.draws)(a, digits(), others=(b,)).tables
    rows = {
        g: (u, v)
        for g, u, v in zip(*list(found["barriers"].values())[::2], found["barriers"]["into second"], strict=True)
    }
    full, single = rows["all"][0], [sum(rows[n]) / 2 for n in groups or names]
    out = {
        "barrier of all layers": full,
        "median share of one": statistics.median(single) / full,
        "largest share of one": max(single) / full,
        "accuracy alone": accuracy(a, *digits("validation")),
    }
    for side in ("first", "last") if groups is None else ():
        out[f"share of the {side} half"] = sum(rows[f"{side} {half}"]) / 2 / full
        out[f"share of the {side} one"] = sum(rows[f"{side} 1"]) / 2 / full
    for where in ("half", "whole"):
        other = "averaging" if where == "half" else "other"
        gaps = zip(found["robustness"][f"{where}, {other}"], found["robustness"][f"{where}, random"], strict=True)
        out[f"rise beyond random, {where}"] = statistics.mean(a - b for a, b in gaps)
    return out


def _chord(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """How far the loss of a deep linear network rises above its chord when layers go over to a copy with one layer's units shuffled."""
    torch.manual_seed(seed)
    a = classify(mlp(32, 3, nn.Identity), digits(), seed=seed, steps=scale.steps // 3, lr=1e-3, clip=None)
    wiring = trace(a, digits()[0][:2])
    middle = list(wiring.groups)[1]
    states = a.state_dict(), wiring.permute(a.state_dict(), {middle: wiring.random(seed)[middle]})
    single = list(layers(a).values())
    both = [[*one, *following] for one, following in pairwise(single)]
    groups = {EVERY: [[n for names in single for n in names]], NEXT: both}.get(arm, single)

    def loss(names: list[str], weight: float) -> float:
        return mean_loss(blend(a, states, (1 - weight, weight), names=names), digits(), F.cross_entropy)

    rises = [
        loss(names, w) - (1 - w) * loss(names, 0.0) - w * loss(names, 1.0)
        for names in groups
        for w in (0.25, 0.5, 0.75)
    ]
    return {"most above the chord": max(rises)}


def _rounds(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Accuracy of clients on validation digits of their own classes: data split evenly, and two or three classes each."""
    found = {}
    x, y = digits()
    held, labels = digits("validation")
    for split in ("even", "by class"):
        torch.manual_seed(seed)
        start = mlp(scale.width, 2)
        owner = torch.randint(4, (len(x),)) if split == "even" else y % 4
        single = list(layers(start))
        average = {"averaging all but the last": single[:-1], "averaging none": [], LAST: single[-1:]}.get(arm)

        def train(client: nn.Module, number: int, turn: int, owner: Tensor = owner) -> None:
            mine, draw = owner == number, 100 * seed + 10 * turn + number
            classify(client, (x[mine], y[mine]), seed=draw, steps=scale.local, lr=1e-3, clip=None)

        def judge(client: nn.Module, number: int, split: str = split) -> float:
            mine = torch.ones_like(labels, dtype=torch.bool) if split == "even" else labels % 4 == number
            return accuracy(client, held[mine], labels[mine])

        counts = [1.0 if arm == EQUAL else float((owner == n).sum()) for n in range(4)]
        _, seen = federated([start] * 4, train, rounds=scale.rounds, average=average, weights=counts, judge=judge)
        scores = seen.tables["rounds"]["score"]
        found[f"accuracy of clients, {split}"] = statistics.mean(scores[-4:])
    return found


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Barriers and robustness of two networks, the chord of a linear one, or clients."""
    if arm in ("one layer", EVERY, NEXT):
        return _chord(arm, seed, scale)
    return (_rounds if arm in (*FEDERATED, LAST, EQUAL) else _barriers)(arm, seed, scale)


CLAIM = Claim(
    says="Between MLPs trained apart on digits there is a barrier where all layers are averaged and nearly none where one is; one "
    "layer of a deep linear network is averaged without any; the loss rises more towards the other network than in random directions; "
    "and clients of federated rounds do not gain by averaging some of their layers instead of all, unless each sees classes of its own.",
    measure=measure,
    build=build,
    arms=("apart", "one layer", *FEDERATED),
    statements=(
        mechanism(
            "In a deep linear network the loss stays under its chord, up to 0.01 nat, when one layer goes over to another's",
            fits("most above the chord", "one layer", high=0.01),
            control=EVERY,
            mutant=NEXT,
        ),
        effect(
            "The barrier of a single layer, in the median, is at most 15% of that of all layers",
            fits("median share of one", "apart", high=0.15),
            control=HALVES,
        ),
        effect(
            "The largest barrier of a single layer is at most half of that of all layers",
            fits("largest share of one", "apart", high=0.5),
            control=HALVES,
        ),
        effect(
            "Halfway to the other network in one layer the loss rises more than in random directions, by 0.05 nat",
            fits("rise beyond random, half", "apart", low=0.05),
            control=RANDOM,
        ),
        effect(
            "Of data split evenly, averaging all layers loses at most 0.01 of accuracy against averaging all but the last",
            highest("accuracy of clients, even", "averaging all", than=("averaging all but the last",), margin=-0.01),
            control=LAST,
        ),
        effect(
            "Where each client has classes of its own, averaging all but the last layer is more accurate than averaging all, by 0.2",
            highest("accuracy of clients, by class", "averaging all but the last", than=("averaging all",), margin=0.2),
            control=EQUAL,
        ),
        effect(
            "There, averaging all but the last layer is more accurate than averaging none",
            highest("accuracy of clients, by class", "averaging all but the last", than=("averaging none",)),
            control=EQUAL,
        ),
    ),
    checks=(
        check("A network alone is right on 90%", fits("accuracy alone", "apart", low=0.9)),
        check("Averaging all layers costs at least 1 nat", fits("barrier of all layers", "apart", low=1.0)),
    ),
    pilots="Seeds 1000 to 1002, width 128, five hidden layers, 300 steps: barrier of all layers 2.07 2.01 1.97, median share of one layer "
    ".07 .12 .10, largest .24 .27 .38, random halves .65 .64 .63; halfway .16 .22 .24 above random directions, random twice .03 "
    ".01 -.04. A shuffled layer of the linear network 0 above the chord, two layers or all .40 .31 .27. Clients, 6 rounds of 20 "
    "steps, split evenly: all .958 .950 .958, all but the last .951 .947 .958, none .933 .930 .942, the last only .935 .935 .943; "
    "by class .51 .47 .47, .98 .99 .98, 1.0 .99 1.0, 1.0 1.0 1.0. Width 32 (seeds 1000, 1001): single layers a quarter to a half "
    "of the full barrier, first layers more; eight hidden layers: middle ones a twentieth; networks from one initialisation: no "
    "barrier of all layers (.08, .02).",
    scales={
        "smoke": {"width": 16, "depth": 3, "steps": 30, "draws": 1, "local": 2, "rounds": 1},
        "small": {"width": 128, "depth": 5, "steps": 300, "draws": 3, "local": 20, "rounds": 6},
        "full": {"width": 512, "depth": 8, "steps": 6000, "draws": 5, "local": 200, "rounds": 20},
    },
)
