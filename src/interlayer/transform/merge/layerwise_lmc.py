"""Layer-wise linear mode connectivity: what happens if only some layers of two networks are averaged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from interlayer.core import taps
from interlayer.core.chart import curves
from interlayer.core.example import Example
from interlayer.core.kinds import Comparison, Finding
from interlayer.core.paths import Loss, blend, expect_alike, layers, mean_loss

Groups = Mapping[str, Sequence[str]]
UNITS = {"into first": "nat", "into second": "nat", "half, averaging": "nat", "half, random": "nat", "whole, other": "nat",
         "whole, random": "nat", "weights": "1", "distance": "1"}  # fmt: skip


class LayerwiseLMC(Comparison):
    r"""Averages single layers, the first or the last ones, or any groups of layers of two networks, and measures the barriers.

    Adilova, Andriushchenko, Kamp, Fischer and Jaggi, Layer-wise Linear Mode Connectivity, ICLR 2024, arXiv:2307.06966. For a group S of
    layers, the network :math:`\theta_A^S(\alpha)` is A with :math:`(1 - \alpha) A_S + \alpha B_S` in the place of the
    layers of S, and likewise for B. Its barrier is

    .. math:: \max_\alpha L(\theta_A^S(\alpha)) - \tfrac12 (L(A) + L(B)), \qquad 0 < \alpha < 1,

    the definition of the authors' code at :math:`\alpha = 1/2`. For all layers, both are the barrier on the straight line.

    The tables: ``barriers`` of all layers, of each one, of the first n and of the last n, ``into first`` (the rest is A's) and ``into
    second``; and ``robustness``, how much the loss of A rises halfway to B in one layer, halfway in a random direction of the same
    length, and at the ends of both. Batch norms are estimated anew on the data wherever anything was averaged.

    ``probe(model, data, others=(other,))``: batches of (inputs, targets), or mappings that make the model return a ``loss``.

    Args:
        groups: Names of modules for each group, in place of layers and the first and last n. A name stands for everything inside.
        points: Values of alpha, both ends included; 3 is the middle alone.
        draws: Random directions for each layer, from torch's global generator.
        loss: ``loss(output, target)``. Defaults to cross-entropy.

    Raises:
        ValueError: An option out of range, a group that holds nothing, networks of different structure, or no data.

    Examples:
        >>> a, b = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2))
        >>> data = torch.randn(50, 4), torch.randint(3, (50,))
        >>> found = LayerwiseLMC(draws=1)(a, data, others=(b,))
        >>> found.tables["barriers"]["group"]
        ['all', '0', '2', 'first 1', 'last 1']
    """

    slug: ClassVar[str] = "layerwise-lmc"

    def __init__(
        self, *, groups: Groups | None = None, points: int = 3, draws: int = 5, loss: Loss = F.cross_entropy
    ) -> None:
        if points < 3 or draws < 1:
            raise ValueError(
                f"layerwise-lmc: points {points}, draws {draws}; expected 3 or more points and at least one draw."
            )
        self.groups, self.points, self.draws, self.loss = groups, points, draws, loss

    def __call__(self, model: nn.Module, data: Any, *, others: Sequence[nn.Module] = ()) -> Finding:
        """Average, measure and compare; all models are afterwards as they were before."""
        (other,) = self.take(others)
        expect_alike(self.slug, model, other)
        batches = taps.batches(data)
        with taps.at_rest(model), taps.at_rest(other), torch.no_grad():
            states = model.state_dict(), other.state_dict()
            single = layers(model)
            chosen = self._named(single) if self.groups is not None else _nested(single)
            ends = [mean_loss(m, batches, self.loss) for m in (model, other)]
            table: dict[str, list[Any]] = {"group": [], "weights": [], "into first": [], "into second": []}
            inner = torch.linspace(0, 1, self.points).tolist()[1:-1]
            every = {"all": [n for names in single.values() for n in names], **chosen}
            for group, names in tqdm(every.items(), desc="groups", disable=None, leave=False):
                table["group"].append(group)
                table["weights"].append(sum(states[0][n].numel() for n in names))
                for column, host in (("into first", model), ("into second", other)):
                    if column == "into second" and group == "all":
                        table[column].append(table["into first"][0])  # the same networks
                        continue
                    worst = max(self._loss(host, states, a, names, batches) for a in inner)
                    table[column].append(worst - sum(ends) / 2)
            alone = chosen if self.groups is not None else single
            robustness = self._robustness(model, states, alone, ends[0], batches)
        tables = {"barriers": table, "robustness": robustness}
        columns = {c for t in tables.values() for c in t}
        return Finding(tables, lambda: _draw(table, alone), {k: v for k, v in UNITS.items() if k in columns})

    def _loss(
        self,
        host: nn.Module,
        states: Sequence[Mapping[str, Tensor]],
        alpha: float,
        names: Collection[str],
        batches: Any,
    ) -> float:
        return mean_loss(blend(host, states, (1 - alpha, alpha), batches, names=names), batches, self.loss)

    def _named(self, single: Groups) -> dict[str, list[str]]:
        found = {}
        for group, modules in (self.groups or {}).items():
            found[group] = [
                n for owner, names in single.items() for n in names
                if any(owner == m or owner.startswith(f"{m}.") for m in modules)
            ]  # fmt: skip
            if not found[group]:
                raise ValueError(
                    f"{self.slug}: group {group!r} of {list(modules)} holds no weights; expected names of modules such as "
                    f"{', '.join(list(single)[:3])}."
                )
        if not found:
            raise ValueError(f"{self.slug}: no groups; expected at least one, or None for all layers.")
        return found

    def _robustness(
        self, model: nn.Module, states: Sequence[Mapping[str, Tensor]], groups: Groups, loss: float, batches: Any
    ) -> dict[str, list[Any]]:
        table: dict[str, list[Any]] = {
            k: [] for k in ("group", "distance", "half, averaging", "half, random", "whole, other", "whole, random")
        }
        for group, names in groups.items():
            steps = {n: states[1][n] - states[0][n] for n in names}
            length = _norm(steps)
            table["group"].append(group)
            table["distance"].append(length)
            table["half, averaging"].append(self._loss(model, states, 0.5, names, batches) - loss)
            table["whole, other"].append(self._loss(model, states, 1.0, names, batches) - loss)
            rises = []
            for _ in range(self.draws):
                noise = {n: torch.randn_like(step) for n, step in steps.items()}
                scale = length / max(_norm(noise), 1e-30)
                there = {**states[0], **{n: states[0][n] + scale * v for n, v in noise.items()}}
                rises.append([self._loss(model, (states[0], there), a, names, batches) - loss for a in (0.5, 1.0)])
            for column, values in zip(("half, random", "whole, random"), zip(*rises, strict=True), strict=True):
                table[column].append(sum(values) / len(values))
        return table


def federated(
    clients: Sequence[nn.Module],
    train: Callable[[nn.Module, int, int], Any],
    *,
    rounds: int,
    average: Collection[str] | None = None,
    weights: Sequence[float] | None = None,
    judge: Callable[[nn.Module, int], float] | None = None,
) -> tuple[list[nn.Module], Finding]:
    """Federated learning in which only some layers are averaged: each round all clients train, then these layers become their mean.

    Args:
        clients: One network for each client, all of the same structure; they are copied.
        train: ``train(client, number, round)`` trains one in place on its own data.
        rounds: How many.
        average: Names of layers (as ``paths.layers`` gives them) that are averaged; the others stay each client's own. Defaults to all,
            which is federated averaging; none is training alone.
        weights: Share of each client in the mean, such as its number of examples. Defaults to equal ones.
        judge: ``judge(client, number)`` gives a score after each averaging.

    Returns:
        The clients, and the scores by round and client.

    Raises:
        ValueError: No clients or rounds, clients of different structure, an unknown layer, or shares that do not fit.

    Examples:
        >>> nets = [nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)) for _ in range(2)]
        >>> (a, b), _ = federated(nets, lambda net, number, round: None, rounds=1, average=["0"])
        >>> torch.equal(a[0].weight, b[0].weight), torch.equal(a[1].weight, nets[0][1].weight)
        (True, True)
    """
    if not clients or rounds < 1:
        raise ValueError(f"federated: {len(clients)} clients, {rounds} rounds; expected at least one of each.")
    for client in clients[1:]:
        expect_alike("federated", clients[0], client)
    single = layers(clients[0])
    chosen = single if average is None else average
    if unknown := [layer for layer in chosen if layer not in single]:
        raise ValueError(f"federated: no layer {unknown[0]!r}; expected some of {', '.join(single)}.")
    shares = [1.0] * len(clients) if weights is None else list(weights)
    if len(shares) != len(clients) or min(shares) < 0 or sum(shares) <= 0:
        raise ValueError(f"federated: weights {shares} for {len(clients)} clients; expected one from 0 up for each.")
    shares = [s / sum(shares) for s in shares]
    names = [n for layer in chosen for n in single[layer]]
    now = [copy.deepcopy(client) for client in clients]
    table: dict[str, list[Any]] = {"round": [], "client": [], "score": []}
    for turn in tqdm(range(rounds), desc="rounds", disable=None, leave=False):
        for number, client in enumerate(now):
            train(client, number, turn)
        states = [client.state_dict() for client in now]
        mean = {n: sum(share * s[n] for share, s in zip(shares, states, strict=True)) for n in names}
        for number, client in enumerate(now):
            client.load_state_dict(mean, strict=False)
            table["round"].append(turn)
            table["client"].append(number)
            table["score"].append(float("nan") if judge is None else judge(client, number))
    return now, Finding({"rounds": table}, units={"score": "1"})


def _nested(single: Groups) -> dict[str, list[str]]:
    """Each layer, the first n and the last n."""
    each = list(single.values())
    sizes = range(1, len(each))
    heads = {f"first {n}": [name for names in each[:n] for name in names] for n in sizes}
    tails = {f"last {n}": [name for names in each[-n:] for name in names] for n in sizes}
    return {**{layer: list(names) for layer, names in single.items()}, **heads, **tails}


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return float(torch.stack([t.float().square().sum() for t in tensors.values()]).sum().sqrt())


def _draw(table: Mapping[str, Sequence[Any]], alone: Collection[str]) -> Any:
    """The barriers of the groups beside that of all layers."""
    rows = [table["group"].index(name) for name in alone]
    lines = {column: [table[column][r] for r in rows] for column in ("into first", "into second")}
    lines["all layers"] = [table["into first"][0]] * len(rows)
    for side in ("first", "last"):
        if f"{side} 1" in table["group"]:
            nested = [table["into first"][table["group"].index(f"{side} {n}")] for n in range(1, len(rows))]
            lines[f"{side} n"] = [*nested, table["into first"][0]]
    return curves("layer", "barrier of the loss", [table["group"][r] for r in rows], lines)


def _pair() -> tuple[nn.Module, Any]:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    x = torch.randn(30, 4)
    return model, (x, model(x).argmax(-1))


def _other(model: nn.Module) -> tuple[nn.Module]:
    """The first model but for one layer."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_submodule("2").weight.neg_()  # type: ignore[operator]
    return (other,)


def _found(finding: Finding) -> bool:
    """Only what holds the layer that differs has a distance, and averaging the others leaves each network as it is."""
    table = finding.tables["barriers"]
    first, second = (dict(zip(table["group"], table[c], strict=True)) for c in ("into first", "into second"))
    distance = finding.tables["robustness"]["distance"]
    even = all(abs(first[n] + second[n]) < 1e-5 for n in ("0", "4"))
    return distance[0] == distance[2] == 0 < distance[1] and even and first["2"] == first["all"] > first["0"]


EXAMPLE = Example(make=LayerwiseLMC, inputs=_pair, others=_other, planted=_found)
