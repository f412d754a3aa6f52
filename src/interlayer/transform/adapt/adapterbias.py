"""AdapterBias: a vector, weighed for every token, that is added behind each feed-forward of a frozen Transformer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core import aside, taps
from interlayer.core.attach import Lora, Part, Whole, attach, attached, feed_forwards, matrix
from interlayer.core.attach.parts import add_bias
from interlayer.core.config import configured
from interlayer.core.example import Example
from interlayer.core.select import At
from interlayer.transform.adapt._tuned import STEPS, Tuned

__all__ = ["AdaptedBytes", "AdapterBias", "adapt", "as_lora", "shifts"]
M = TypeVar("M", bound=nn.Module)


class AdapterBias(Part):
    """Add one learned vector to every token, times a weight that a linear map of the token decides.

    Paper: "AdapterBias: Parameter-efficient Token-dependent Representation Shift for Adapters in NLP Tasks" (Fu, Chen, Lee and
    Lee, Findings of NAACL 2022), arXiv:2205.00305.

    ``y_t = W x_t + b + (w . x_t + c) v``, where x is what the last map W of the feed-forward reads: its hidden features, not the
    layer's output. v starts at zero, w and c as ``nn.Linear`` starts. In training the shift comes after the dropout behind W and
    before residual and norm, as in the authors' code; ``adapt`` finds these places. Because x enters linearly, the shift is a
    matrix of rank one in W and a change of b: ``bake`` and ``as_lora`` use that.

    Args:
        host: The last linear map of a feed-forward, [O, I].
        gate: A linear map from I features to one, shared with other layers. Defaults to one of its own.

    Shapes: x [..., I] and y [..., O] to [..., O].

    Raises:
        ValueError: The host is no linear map, the gate has other sizes, or x or y have other widths than the host.

    Examples:
        >>> part = AdapterBias(nn.Linear(16, 4))
        >>> x, y = torch.randn(2, 5, 16), torch.randn(2, 5, 4)
        >>> torch.equal(part(x, y), y)  # the vector is zero at the start
        True
    """

    kind = "adapterbias"

    def __init__(self, host: nn.Module, *, gate: nn.Linear | None = None) -> None:
        super().__init__()
        outputs, inputs = matrix(host).shape
        self.gate = nn.Linear(inputs, 1) if gate is None else gate
        if tuple(self.gate.weight.shape) != (1, inputs):
            raise ValueError(
                f"AdapterBias: a gate [{self.gate.out_features}, {self.gate.in_features}] for a host that reads {inputs} features; "
                f"expected [1, {inputs}]. Share a gate among layers of one size."
            )
        self.vector = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Float[Tensor, "*B I"], y: Float[Tensor, "*B O"]) -> Float[Tensor, "*B O"]:
        """Add the shift; report its mean length as a metric of ``core.aside``."""
        if x.shape[-1] != self.gate.in_features or y.shape[-1] != len(self.vector):
            raise ValueError(
                f"AdapterBias: x {tuple(x.shape)} and y {tuple(y.shape)}; expected [..., {self.gate.in_features}] and "
                f"[..., {len(self.vector)}], the input and output of the host."
            )
        weight = self.gate(x)
        if aside.listening():
            aside.metric("shift", weight.abs().mean() * self.vector.norm())
        return y + weight * self.vector

    @torch.no_grad()
    def merge(self, host: nn.Module) -> None:
        """Add ``v w'`` to the weight and ``c v`` to the bias; a host without bias refuses unless c is zero."""
        bias = self.gate.bias * self.vector
        if bias.any() or getattr(host, "bias", None) is not None:
            add_bias(host, bias)
        matrix(host).add_(torch.outer(self.vector, self.gate.weight[0]))


def adapt(
    model: M,
    *,
    at: At | Mapping[str, str] | None = None,
    share: bool = False,
    norms: bool = False,
    task: str = "default",
) -> M:
    """Freeze a model and attach ``AdapterBias`` behind its feed-forwards, in place, as ``core.attach.attach`` does.

    Args:
        model: A Transformer of transformers, torch or ``interlayer.models``, or any other with ``at``.
        at: The last linear map of each feed-forward, or a mapping from it to the module behind whose output the shift is added.
            Defaults to ``core.attach.feed_forwards(model)``.
        share: Share one gate among all layers, as the authors' ``share_alpha`` does.
        norms: Train a copy of each norm that is not an attention's too, as the authors' code does for BERT, where the names of
            norms say which these are. Needs modules whose names hold ``LayerNorm``.
        task: Name of the task.

    Returns:
        The model.

    Raises:
        ValueError: No feed-forward is known by its name, or ``norms`` finds none.

    Examples:
        >>> from interlayer.models import Transformer
        >>> model = adapt(Transformer(vocab=16, length=8, depth=2, width=8, heads=2))
        >>> sum(p.numel() for p in model.parameters() if p.requires_grad)  # 8 + 32 + 1 for each layer
        82
    """
    sites = feed_forwards(model) if at is None else at
    if norms:
        found = [n for n, m in model.named_modules() if "LayerNorm" in n.rpartition(".")[2] and "attention" not in n]
        if not found:
            raise ValueError(
                f"AdapterBias: {type(model).__name__} has no module called LayerNorm outside its attentions. Leave norms out, or "
                "attach Whole to the norms that are to learn."
            )
    make: Any = AdapterBias
    if share:
        gates: dict[int, nn.Linear] = {}

        def make(host: nn.Module) -> AdapterBias:
            inputs = matrix(host).shape[1]
            return AdapterBias(host, gate=gates.setdefault(inputs, nn.Linear(inputs, 1)))

    attach(model, sites, make, task=task)
    return attach(model, {n: n for n in found}, Whole, task=task) if norms else model


def _constant(model: M) -> M:
    """AdapterBias whose weights are one for every token: a bias."""
    for part in attached(adapt(model))["default"].values():
        assert isinstance(part, AdapterBias)
        nn.init.zeros_(part.gate.weight)
        nn.init.ones_(part.gate.bias)
        part.gate.requires_grad_(False)
    return model


@torch.no_grad()
def as_lora(model: M, *, task: str = "default", new: str = "lora") -> M:
    """Attach LoRA parts of rank one, with a bias, that equal the shifts of a task in evaluation, in place: PEFT reads their files.

    Parts of the kind ``Whole`` are copied as they are.

    Args:
        model: A model with AdapterBias.
        task: Its task.
        new: The task of the LoRA parts, the only active task afterwards.

    Returns:
        The model.

    Raises:
        ValueError: The task has no AdapterBias.
    """
    parts = attached(model).get(task, {})
    if not any(isinstance(p, AdapterBias) for p in parts.values()):
        raise ValueError(f"as_lora: the task {task!r} has no AdapterBias; there are {list(attached(model))}.")
    for name, part in parts.items():
        host: Any = model.get_submodule(name)
        if isinstance(part, AdapterBias):
            attach(
                model,
                {name: host.attached.late},
                partial(Lora, rank=1, alpha=1.0, bias=True),
                task=new,
            )
            made: Any = attached(model)[new][name]
            made.lora_A.weight.copy_(part.gate.weight)
            made.lora_B.weight.copy_(part.vector.unsqueeze(1))
            made.lora_B.bias.copy_(part.gate.bias * part.vector)
        else:
            attach(model, {name: name}, Whole, task=new)
            attached(model)[new][name].fill(part.state())
    return model


@torch.no_grad()
def shifts(model: nn.Module, *inputs: Any, task: str = "default", **named: Any) -> Float[Tensor, "B L S"]:
    """Where the shift lands: its length for every token and layer, in one pass.

    Args:
        model: A model with AdapterBias, whose parts of this task act.
        *inputs: Positional arguments of the model.
        task: The task.
        **named: Keyword arguments of the model.

    Returns:
        Lengths, layers in the order in which the model holds them.

    Raises:
        ValueError: The task has no AdapterBias, or layers see sequences of several lengths (as encoder and decoder do).
    """
    parts = {n: p for n, p in attached(model).get(task, {}).items() if isinstance(p, AdapterBias)}
    if not parts:
        raise ValueError(f"shifts: the task {task!r} has no AdapterBias; there are {list(attached(model))}.")
    with taps.read(model, [f"{n}.attached.{task}.gate" for n in parts]) as seen:
        model(*inputs, **named)
    lengths = [(seen[f"{n}.attached.{task}.gate"].squeeze(-1) * p.vector.norm()).abs() for n, p in parts.items()]
    if len({x.shape for x in lengths}) > 1:
        raise ValueError(
            f"shifts: layers see {sorted({tuple(x.shape) for x in lengths})}; expected sequences of one length."
        )
    return torch.stack(lengths, 1)


@configured
class AdaptedBytes(Tuned):
    """A small language model of bytes, frozen, with AdapterBias or another way to adapt it, and a linear head on its mean state.

    Args:
        classes: Classes K.
        kind: ``adapterbias``, ``shared`` (one gate for all layers), ``constant`` (gates frozen at one, so that a bias remains),
            ``bitfit``, ``lora``, ``adapters``, ``head`` (the head alone) or ``full`` (all weights).
        depth: Blocks of the language model.
        width: Its features D.
        steps: Steps in which it is trained first, once; then it is kept in the user's cache.
        **options: Of the way: ``rank`` of ``lora``, ``hidden`` of ``adapters``.

    Shapes: bytes [B, S] of int64 to logits [B, K].

    Raises:
        ValueError: Unknown kind.

    Examples:
        >>> AdaptedBytes(2, depth=1, width=16, steps=1)(torch.zeros(3, 9, dtype=torch.long)).shape
        torch.Size([3, 2])
    """

    ways: ClassVar[Mapping[str, Callable[..., Any]]] = {
        **Tuned.ways,
        "adapterbias": adapt,
        "shared": partial(adapt, share=True),
        "constant": _constant,
    }

    def __init__(
        self,
        classes: int,
        *,
        kind: str = "adapterbias",
        depth: int = 2,
        width: int = 64,
        steps: int = STEPS,
        **options: Any,
    ) -> None:
        super().__init__(classes, kind=kind, depth=depth, width=width, steps=steps, **options)


def _example(**options: Any) -> AdapterBias:
    part = AdapterBias(nn.Linear(16, 4), **options)
    nn.init.normal_(part.vector)
    return part


EXAMPLE = Example(
    make=_example,
    inputs=lambda: (torch.randn(2, 6, 16), torch.randn(2, 6, 4)),
    axis=1,
    causal=True,
    modes={"shared": lambda: _example(gate=nn.Linear(16, 1))},
)
