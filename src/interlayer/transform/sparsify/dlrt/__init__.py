"""Dynamic low-rank training: networks that are of low rank from the first step on, and choose their ranks while they learn."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core import aside
from interlayer.core.data import answer, run
from interlayer.core.datasets import digit_batches
from interlayer.core.example import Example
from interlayer.core.factored import factored
from interlayer.core.kinds import Row, Rule
from interlayer.core.quantizer import layers
from interlayer.core.select import At, exchange
from interlayer.transform.sparsify.dlrt.subspace import LEAST, Subspace, exact

__all__ = ["DLRT", "Subspace"]

Loss = Callable[[Tensor, Tensor], Tensor]


def _basis(old: Float[Tensor, "n r"], moved: Float[Tensor, "n r"], grow: bool) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of what moved, and of the old one too where it may grow; and the old one in its coordinates."""
    both = torch.cat((old, moved), 1) if grow else moved
    q, r = torch.linalg.qr(both.to(exact(old)))
    return q.to(old.dtype), (r[:, : old.shape[1]] if grow else q.T @ old.to(q.dtype)).to(old.dtype)


def _set(optimizer: torch.optim.Optimizer, p: nn.Parameter, value: Tensor) -> nn.Parameter:
    """Give a parameter another value; one of another shape is a new parameter, which the optimizer holds in its place."""
    if p.shape == value.shape:
        p.data.copy_(value)
        return p
    new = nn.Parameter(value)
    for group in optimizer.param_groups:
        group["params"] = [new if held is p else held for held in group["params"]]
    if p in optimizer.state:
        optimizer.state[new] = optimizer.state.pop(p)
    return new


def _carry(optimizer: torch.optim.Optimizer, p: Tensor, left: Tensor | None, right: Tensor | None) -> None:
    """Express what an optimizer remembers of a factor in new bases; squares by the squares of the rotation."""
    for key, value in optimizer.state.get(p, {}).items():
        if isinstance(value, Tensor) and value.ndim == 2:
            a, b = ((None if t is None else t.square() if key == "exp_avg_sq" else t) for t in (left, right))
            value = value if a is None else a @ value
            optimizer.state[p][key] = value if b is None else value @ b


def _in_full(method: Callable[..., Any]) -> Callable[..., Any]:
    """Without gradients, and with the factors' own precision under autocast."""

    @functools.wraps(method)
    def inner(self: DLRT, name: Any, *args: Any) -> Any:
        with torch.no_grad(), torch.autocast(next(self.model.parameters()).device.type, enabled=False):
            return method(self, name, *args)

    return inner


class DLRT(Rule):
    """Train a network whose weights are ``U S V^T`` of low rank by steps on the factors that no small singular value disturbs.

    Paper: Schotthöfer, Zangrando, Kusch, Ceruti and Tudisco, "Low-rank lottery tickets: finding efficient low-rank neural networks
    via matrix differential equations", NeurIPS 2022, arXiv:2205.13571 (Algorithm 1).

    With the loss f of the weight ``W = U S V^T``, each step is one step of the optimizer on each of
    ``K = U S`` along ``-grad_K f(K V^T)`` and ``L = V S^T`` along ``-grad_L f(U L^T)``, from one pass, then, in a second pass, on S
    along ``-grad_S f(U1 S V1^T)`` from ``S = M S N^T``. Here U1 and V1 are orthonormal bases of K and L, ``M = U1^T U`` and
    ``N = V1^T V``. With a tolerance, U1 and V1 also span U and V, so that the rank can double, and after the
    step all singular values go whose norm together is at most ``tolerance`` times that of all, down to rank 2.
    Biases and other parameters take their step with S.

    Cost: two forward and backward passes with the factors, at rank r for K and L, and at rank r (fixed) or 2 r (adaptive) for S, and
    a QR decomposition of each factor. Layers with batch statistics see both passes. Adam's memory of a factor is
    rotated with the basis (its squares by the squared rotation), which is this implementation's choice; the authors keep it as it is.

    Their code multiplies V by the untransposed right singular vectors when it truncates; here they are transposed, as in the paper.

    Args:
        model: The network, trained or not. Its layers are replaced in place by their best approximation of the first rank.
        rank: The rank at the start as a share of a weight's smaller side, above 0 and at most 1.
        tolerance: Share of the singular values' norm that truncation may take, at least 0 and below 1; ``None`` fixes the ranks.
        optimizer: ``sgd``, the explicit Euler step of the paper, or ``adam``.
        lr: Learning rate.
        at: Which linear maps and convolutions. Defaults to all but the last, whose outputs are the classes.
        loss: Called with the model's outputs and the targets. Defaults to the cross-entropy.

    Attributes:
        layers: Names of the layers of low rank.
        skipped: All other weights, each with the reason.

    Shapes: a batch is (inputs [B, ...], targets), by default labels [B] or [B, S].

    Raises:
        ValueError: An option out of range, or no layer to factorise.

    Examples:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> rule = DLRT(net, rank=0.5, tolerance=0.3)
        >>> for _ in range(4):
        ...     told = rule.step((torch.randn(32, 8), torch.arange(32) % 4))
        >>> sorted(rule.ranks()), type(rule.result()[2]).__name__
        (['0', '2'], 'Pair')
    """

    slug = "dlrt"

    def __init__(
        self,
        model: nn.Module,
        *,
        rank: float = 0.5,
        tolerance: float | None = 0.1,
        optimizer: Literal["sgd", "adam"] = "adam",
        lr: float = 1e-3,
        at: At | None = None,
        loss: Loss | None = None,
    ) -> None:
        if not 0 < rank <= 1 or not (tolerance is None or 0 <= tolerance < 1):
            raise ValueError(
                f"DLRT: rank={rank}, tolerance={tolerance}; expected a rank above 0 and at most 1, a share of the smaller side, and a "
                "tolerance from 0 to below 1 or None."
            )
        if optimizer not in get_args(Literal["sgd", "adam"]):
            raise ValueError(f"DLRT: optimizer was {optimizer!r}; expected 'sgd' or 'adam'.")
        fit, self.skipped = layers(model, at)
        found = [n for n, m in fit.items() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
        whys = {n: "no linear map or convolution of torch, stays as it is" for n in fit if n not in found}
        if at is None:
            whys |= dict.fromkeys(found[-1:], "the last layer, stays as it is")
        for name in found:
            layer: Any = fit[name]
            if getattr(layer, "groups", 1) > 1:
                whys[name] = "a convolution in groups, stays as it is"
            elif min(layer.weight.flatten(1).shape) <= LEAST:
                whys.setdefault(name, f"of rank {LEAST} or less, stays as it is")
        self.skipped += [Row(n, type(fit[n]).__name__, why) for n, why in whys.items()]
        self.layers = [n for n in found if n not in whys]
        if not self.layers:
            reasons = "; ".join(f"{r.name}: {r.why}" for r in self.skipped[:3])
            raise ValueError(
                f"DLRT: {type(model).__name__} has no layer to factorise ({reasons}); expected linear maps or convolutions. "
                "Pass at= to choose layers."
            )
        self.model, self.tolerance, self.loss = model, tolerance, loss
        self.before = sum(p.numel() for p in model.parameters())

        def lower(old: nn.Module) -> nn.Module:
            weight: Any = old.weight
            most = min(weight.flatten(1).shape)
            return Subspace(old, min(most, max(LEAST, round(rank * most)))).train(old.training)

        self.old = {n: copy.deepcopy(fit[n]).to("meta") for n in self.layers}
        exchange(model, self.layers, lower)
        self.factors = {n: [nn.Parameter(m.U.new_empty(0)) for _ in "KL"] for n, m in self._each()}
        make = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
        self.bases = make([p for pair in self.factors.values() for p in pair], lr)
        self.rest = make([p for p in model.parameters() if p.requires_grad], lr)

    def _each(self) -> Iterator[tuple[str, Subspace]]:
        for name in self.layers:
            layer = self.model.get_submodule(name)
            assert isinstance(layer, Subspace)
            yield name, layer

    def ranks(self) -> dict[str, int]:
        """The rank of each layer now."""
        return {name: layer.rank for name, layer in self._each()}

    def step(self, batch: tuple[Any, Tensor]) -> dict[str, float]:
        """One K-, L- and S-step on a batch, and the truncation where ranks are adaptive.

        The loss is that of the first pass, ``rank`` the mean rank and ``weights`` the share of the parameters that is left.
        """
        self.model.train()
        if not any(group["lr"] for optimizer in self.optimizers() for group in optimizer.param_groups):
            with torch.no_grad():  # nothing may move, not even a basis
                return self._told(float(self._loss(batch)))
        for name, layer in self._each():
            self._open(name, layer)
        try:
            value = self._gradients(batch, self.bases)
        finally:
            for _, layer in self._each():
                layer.open = []
        self.bases.step()
        turned = {name: self._turn(layer, *self.factors[name]) for name, layer in self._each()}
        self._gradients(batch, self.rest)
        self.rest.step()
        self.rest.zero_grad()
        for name, layer in self._each():
            self._truncate(layer, *self.factors[name], *turned[name])
        return self._told(value)

    @_in_full
    def _open(self, name: str, layer: Subspace) -> None:
        """Let a layer learn K and L."""
        values = layer.U @ layer.S, layer.V @ layer.S.T
        pair = [_set(self.bases, p, value) for p, value in zip(self.factors[name], values, strict=True)]
        self.factors[name] = layer.open = pair

    def _told(self, loss: float) -> dict[str, float]:
        ranks = self.ranks()
        left = sum(p.numel() for p in self.model.parameters()) + sum(m.U.numel() + m.V.numel() for _, m in self._each())
        return {"loss": loss, "rank": sum(ranks.values()) / len(ranks), "weights": left / self.before}

    def _loss(self, batch: tuple[Any, Tensor]) -> Tensor:
        x, targets = batch
        with aside.collect() as told:
            outputs = answer(run(self.model, x))
            if self.loss is not None:
                value = self.loss(outputs, targets)
            else:
                value = F.cross_entropy(outputs.flatten(0, -2), targets.flatten())
        return value if told.loss is None else value + told.loss

    def _gradients(self, batch: tuple[Any, Tensor], optimizer: torch.optim.Optimizer) -> float:
        """The gradients of the loss in what an optimizer holds, and no others."""
        optimizer.zero_grad()
        value = self._loss(batch)
        value.backward(inputs=[p for group in optimizer.param_groups for p in group["params"]])
        return float(value.detach())

    @_in_full
    def _turn(self, layer: Subspace, k: Tensor, lt: Tensor) -> tuple[Tensor, Tensor]:
        """Take the bases of K and L, with S and what is remembered of it in their coordinates."""
        grow = self.tolerance is not None
        layer.U, m = _basis(layer.U, k, grow)
        layer.V, n = _basis(layer.V, lt, grow)
        layer.S = _set(self.rest, layer.S, m @ layer.S @ n.T)
        _carry(self.rest, layer.S, m, n.T)
        return m, n

    @_in_full
    def _truncate(self, layer: Subspace, k: Tensor, lt: Tensor, m: Tensor, n: Tensor) -> None:
        """Drop the smallest singular values within the tolerance, and carry what is remembered of K and L along."""
        if self.tolerance is not None:
            p, s, qt = torch.linalg.svd(layer.S.to(exact(layer.S)), full_matrices=False)
            tails = s.square().flip(0).cumsum(0).flip(0).sqrt()  # tails[r]: the norm of what rank r leaves out
            rank = min(max(int((tails > self.tolerance * tails[0]).sum()), LEAST), layer.most, len(s))
            p, q = p[:, :rank].to(layer.U.dtype), qt[:rank].T.to(layer.U.dtype)
            layer.U, layer.V = layer.U @ p, layer.V @ q
            layer.S = _set(self.rest, layer.S, s[:rank].diag().to(layer.U.dtype))
            _carry(self.rest, layer.S, p.T, q)
            m, n = p.T @ m, q.T @ n
        _carry(self.bases, k, None, n.T)
        _carry(self.bases, lt, None, m.T)

    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimizer of K and L, and that of S and all other parameters."""
        return self.bases, self.rest

    def result(self, *, merged: bool = False) -> nn.Module:
        """A plain copy in which each layer of low rank is a pair of smaller ones; ``interlayer.save`` and ``load`` keep it.

        Args:
            merged: Give the layers of before instead, with their whole weights: no smaller, but any format can carry them.
        """

        def dense(old: nn.Module) -> nn.Module:
            assert isinstance(old, Subspace)
            new: Any = copy.deepcopy(self.old[names[id(old)]]).to_empty(device=old.U.device)
            new.weight.data.copy_(old.weight)
            if new.bias is not None:
                new.bias.data.copy_(old.bias)
            return new

        plain = copy.deepcopy(self.model)
        names = {id(plain.get_submodule(n)): n for n in self.layers}
        exchange(plain, self.layers, dense)
        if not merged:
            plain = factored(plain, {n: (m.U, m.S.detach() @ m.V.T) for n, m in self._each()})
        return plain.eval()

    def state_dict(self) -> dict[str, Any]:
        """The optimizers' states."""
        return {"bases": self.bases.state_dict(), "rest": self.rest.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned; load the model's weights first."""
        self.bases.load_state_dict(state["bases"])
        self.rest.load_state_dict(state["rest"])


def _net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10)
    )  # fmt: skip


EXAMPLE = Example(make=lambda: DLRT(_net(), tolerance=0.3), inputs=digit_batches)
