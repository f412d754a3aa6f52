"""HyperFormer: one small network makes the adapters of all tasks and layers of a frozen Transformer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from interlayer.core.attach import Part, Whole, active, attach, attached, attention_outputs, feed_forwards, matrix
from interlayer.core.attach.attaching import own
from interlayer.core.config import configured
from interlayer.core.example import Example
from interlayer.core.swap import bypassed, known
from interlayer.transform.adapt._tuned import STEPS, Tuned
from interlayer.transform.adapt.hyperformer.network import Hypernetwork, shapes

__all__ = ["HyperBytes", "HyperFormer", "Hypernetwork", "adapt", "extend", "settle"]
M = TypeVar("M", bound=nn.Module)


class HyperFormer(Part):
    """An adapter behind a sublayer whose weights come from a hypernetwork that all tasks, layers and places share.

    Paper: Karimi Mahabadi, Ruder, Dehghani and Henderson, "Parameter-efficient Multi-task Fine-tuning for Transformers via Shared
    Hypernetworks" (ACL 2021), arXiv:2106.04489; code rabeehk/hyperformer.

    ``y + LN(U gelu(D y + d) + u)``, where D, d, U, u and the scale and shift of LN are those of ``Hypernetwork`` for the part's task,
    layer and place. In T5 it comes before the dropout behind a self-attention or feed-forward, as in the authors' code; their
    encoder and decoder have a hypernetwork each, and share the embeddings of tasks. At the start LN's scale is near zero, so
    that the model is nearly the base. Sizes are those of the code's HyperFormer++ for T5-base; equations are the code's too.
    Formulas of the paper that count parameters were searched for and could not be opened: counts here are exact.

    Use ``adapt`` to attach it, ``active(model, task)`` to choose the task, ``extend`` for a new one. A file of ``core.attach.save`` holds
    the weights made for one task: it loads as an adapter without a hypernetwork, the form for inference, which ``settle`` gives too.

    Args:
        host: The last linear map of a sublayer, with D outputs.
        net: The hypernetwork; without one the part has weights of its own, of ``hidden`` features.
        task: Its task.
        layer: Its layer.
        place: 0 behind a feed-forward, 1 behind an attention.
        hidden: Features of the bottleneck where there is no hypernetwork.

    Shapes: x [..., I] and y [..., D] to [..., D].

    Raises:
        ValueError: x or y have other widths than the host, or the hypernetwork is for another width or does not know the task.

    Examples:
        >>> net = Hypernetwork(8, layers=1, reduction=4)
        >>> net.add("a")
        >>> part = HyperFormer(nn.Linear(32, 8), net=net, task="a")
        >>> part(torch.randn(2, 5, 32), torch.randn(2, 5, 8)).shape
        torch.Size([2, 5, 8])
    """

    kind = "hyperformer"

    def __init__(
        self,
        host: nn.Module,
        *,
        net: Hypernetwork | None = None,
        task: str = "default",
        layer: int = 0,
        place: int = 0,
        hidden: int = 2,
    ) -> None:
        super().__init__()
        self.width, self.inputs = matrix(host).shape
        self.task, self.layer, self.place = task, layer, place
        self.net = net
        if net is not None and (net.shapes["up_bias"].numel() != self.width or task not in net.tasks):
            raise ValueError(
                f"HyperFormer: a hypernetwork for {net.shapes['up_bias'].numel()} features and the tasks {list(net.tasks)}; expected "
                f"{self.width}, the host's outputs, and {task!r}. Build it for this width, and add the task."
            )
        self.weights = nn.ParameterDict()
        if net is None:
            made = {k: torch.zeros(s) for k, s in shapes(self.width, hidden).items()}
            nn.init.normal_(made["down_weight"], std=1e-2)
            self._hold({**made, "up_weight": 1e-2 * torch.randn_like(made["up_weight"])})

    def _hold(self, weights: Mapping[str, Tensor]) -> None:
        self.weights = nn.ParameterDict({k: nn.Parameter(t.detach().clone()) for k, t in weights.items()})

    def made(self) -> Mapping[str, Tensor]:
        """The adapter's weights."""
        if self.net is None:
            return {k: self.weights[k] for k in shapes(1, 1)}
        return self.net(self.task, layer=self.layer, place=self.place)

    def forward(self, x: Float[Tensor, "*B I"], y: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Add what the adapter gives."""
        if x.shape[-1] != self.inputs or y.shape[-1] != self.width:
            raise ValueError(
                f"HyperFormer: x {tuple(x.shape)} and y {tuple(y.shape)}; expected [..., {self.inputs}] and [..., {self.width}], the "
                "input and output of the host."
            )
        w = self.made()
        inner = F.gelu(F.linear(y, w["down_weight"], w["down_bias"]), approximate="tanh")
        out = F.linear(inner, w["up_weight"], w["up_bias"])
        return y + F.layer_norm(out, (self.width,), w["norm_weight"], w["norm_bias"])

    def settle(self) -> None:
        """Keep the weights as they are now, without the hypernetwork."""
        self._hold(self.made())
        self.net = None

    def state(self) -> dict[str, Tensor]:
        """The weights of the adapter."""
        return {k: t.detach() for k, t in self.made().items()}

    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Take saved weights up."""
        if {k: t.shape for k, t in state.items()} != shapes(self.width, len(state.get("down_bias", ()))):
            raise ValueError(f"HyperFormer: tensors {sorted(state)} do not fit {self.width} features")
        self._hold(state)

    @classmethod
    def restore(cls, host: nn.Module, state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> HyperFormer:
        """Without a hypernetwork; the bottleneck's size comes from the tensors."""
        return cls(host, hidden=len(state["down_bias"]))


def adapt(
    model: M,
    tasks: Sequence[str],
    *,
    shared: bool = True,
    embedding: int = 64,
    hidden: int = 128,
    projected: int = 64,
    reduction: int = 32,
    norms: bool = True,
) -> M:
    """Freeze a model and attach ``HyperFormer`` behind its self-attentions and feed-forwards, for several tasks, in place.

    The first task is active. Train by batches of one task each, after ``active(model, task)``.

    Args:
        model: A Transformer of transformers, torch or ``interlayer.models``.
        tasks: Names of the tasks.
        shared: HyperFormer++ or, if false, HyperFormer; see ``Hypernetwork``, also for the sizes.
        embedding: Features of embeddings.
        hidden: Hidden features of the projection.
        projected: Features that generate the weights.
        reduction: By how much bottlenecks are narrower than the model.
        norms: Train one copy of the model's own norms for all tasks, as the authors do.

    Returns:
        The model.

    Raises:
        ValueError: No tasks, one twice, or no sublayers under names that are known.

    Examples:
        >>> from interlayer.core.attach import active
        >>> from interlayer.models import Transformer
        >>> model = adapt(Transformer(vocab=16, length=8, depth=2, width=32, heads=2), ["a", "b"])
        >>> first = model(torch.zeros(1, 4, dtype=torch.long))
        >>> torch.equal(first, active(model, "b")(torch.zeros(1, 4, dtype=torch.long)))
        False
    """
    if not tasks or len(set(tasks)) < len(tasks):
        raise ValueError(f"hyperformer.adapt: tasks {list(tasks)}; expected at least one, each once.")
    groups, nets = _sites(model), dict[tuple[bool, int], Hypernetwork]()
    for (decoder, width), sites in groups.items():
        layers = 1 + max(layer for layer, _ in sites.values())
        net = Hypernetwork(
            width, layers, shared=shared, embedding=embedding, hidden=hidden, projected=projected, reduction=reduction
        )
        net.tasks = next(iter(nets.values()), net).tasks  # encoder and decoder share the embeddings
        nets[decoder, width] = net
    copies: dict[int, Whole] = {}
    at = {n: n for n, m in model.named_modules() if own(n) and known(m) == "norm"} if norms else {}
    for task in tasks:
        next(iter(nets.values())).add(task)
        _attach(model, groups, nets, task)
        if at:
            attach(model, at, lambda host: copies.setdefault(id(host), Whole(host)), task=task)
    return active(model, tasks[0])


def extend(model: M, task: str, *, like: str | None = None) -> M:
    """Add a task to a model that ``adapt`` changed, in place, and make it the only active one: the hypernetwork makes its adapters.

    Args:
        model: The model.
        task: Its name.
        like: A task with whose embedding it begins. Defaults to a random one.

    Returns:
        The model.

    Raises:
        ValueError: There is no hypernetwork or no task ``like``, or the task is there already.

    Examples:
        >>> from interlayer.models import Transformer
        >>> model = adapt(Transformer(vocab=16, length=8, depth=2, width=32, heads=2), ["a"])
        >>> list(attached(extend(model, "b", like="a")))
        ['a', 'b']
    """
    there = attached(model)
    made = {t: {n: p for n, p in parts.items() if isinstance(p, HyperFormer) and p.net} for t, parts in there.items()}
    first = like if like is not None else next((t for t, parts in made.items() if parts), "")
    if task in there or not made.get(first):
        raise ValueError(
            f"hyperformer.extend: tasks {list(there)}, new {task!r}, like {like!r}; expected a new name "
            "and a hypernetwork. Call adapt first."
        )
    groups = _sites(model)
    nets: dict[tuple[bool, int], Any] = {key: made[first][next(iter(sites))].net for key, sites in groups.items()}
    next(iter(nets.values())).add(task, like)
    _attach(model, groups, nets, task)
    copies = {n: p for n, p in there[first].items() if isinstance(p, Whole)}
    if copies:
        by_host = {id(model.get_submodule(n)): p for n, p in copies.items()}
        attach(model, {n: n for n in copies}, lambda host: by_host[id(host)], task=task)
    return active(model, task)


def settle(model: M, task: str) -> M:
    """Keep a task's adapters as they are now, without the hypernetwork, in place: the form for inference.

    Raises:
        ValueError: The task has no HyperFormer.
    """
    parts = [p for p in attached(model).get(task, {}).values() if isinstance(p, HyperFormer)]
    if not parts:
        raise ValueError(
            f"hyperformer.settle: the task {task!r} has no HyperFormer; there are {list(attached(model))}."
        )
    for part in parts:
        part.settle()
    return model


def _sites(model: nn.Module) -> dict[tuple[bool, int], dict[str, tuple[int, int]]]:
    """Where adapters go: layer and place by the name of the host, for each stack (decoder or not) and width."""
    dead, found = bypassed(model), dict[tuple[bool, int], dict[str, tuple[int, int]]]()
    attentions = [
        n for n in attention_outputs(model) if "EncDec" not in n and "crossattention" not in n and n not in dead
    ]
    for place, names in enumerate((feed_forwards(model), attentions)):
        for name in names:
            key = "decoder" in name.split("."), len(matrix(model.get_submodule(name)))
            sites = found.setdefault(key, {})
            sites[name] = sum(p == place for _, p in sites.values()), place
    return found


def _attach(
    model: nn.Module, groups: Mapping[Any, Mapping[str, tuple[int, int]]], nets: Mapping[Any, Any], task: str
) -> None:
    for key, sites in groups.items():
        where = {id(model.get_submodule(name)): found for name, found in sites.items()}

        def make(host: nn.Module, where: Any = where, net: Any = nets[key]) -> HyperFormer:
            layer, place = where[id(host)]
            return HyperFormer(host, net=net, task=task, layer=layer, place=place)

        attach(model, {name: name for name in sites}, make, task=task)


@configured
class HyperBytes(Tuned):
    """A small language model of bytes, frozen, with HyperFormer for one task or another way to adapt it, and a linear head.

    Args:
        classes: Classes K.
        kind: ``hyperformer``, ``per layer`` (hypernetworks of each layer's own), ``bitfit``, ``lora``, ``adapters``, ``head`` or ``full``.
        depth: Blocks of the language model.
        width: Its features D.
        steps: Steps in which it is trained first, once; then it is kept in the user's cache.
        **options: Of the way: those of ``adapt``, ``rank`` of ``lora``, ``hidden`` of ``adapters``.

    Shapes: bytes [B, S] of int64 to logits [B, K].

    Raises:
        ValueError: Unknown kind.

    Examples:
        >>> HyperBytes(2, depth=1, width=16, steps=1)(torch.zeros(3, 9, dtype=torch.long)).shape
        torch.Size([3, 2])
    """

    ways: ClassVar[Mapping[str, Callable[..., Any]]] = {
        **Tuned.ways,
        "hyperformer": lambda model, **options: adapt(model, ["default"], **options),
        "per layer": lambda model, **options: adapt(model, ["default"], shared=False, **options),
    }

    def __init__(
        self,
        classes: int,
        *,
        kind: str = "hyperformer",
        depth: int = 2,
        width: int = 64,
        steps: int = STEPS,
        **options: Any,
    ) -> None:
        super().__init__(classes, kind=kind, depth=depth, width=width, steps=steps, **options)


def _example(made: bool = True) -> HyperFormer:
    if not made:
        part = HyperFormer(nn.Linear(16, 4))
        nn.init.normal_(part.weights["norm_weight"])
        return part
    net = Hypernetwork(4, 2, embedding=4, hidden=8, projected=4, reduction=2)
    net.add("a")
    for p in net.makers.parameters():
        nn.init.normal_(p)
    return HyperFormer(nn.Linear(16, 4), net=net, task="a", layer=1, place=1)


EXAMPLE = Example(
    make=_example,
    inputs=lambda: (torch.randn(2, 6, 16), torch.randn(2, 6, 4)),
    axis=1,
    causal=True,
    modes={"settled": lambda: _example(False)},
)
