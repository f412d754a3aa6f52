"""What can be added to a module of a frozen model, each with the formula of its output."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


def matrix(host: nn.Module) -> Float[Tensor, "O I"]:
    """The weight of a linear map as [outputs, inputs], a view that can be written to; transformers' ``Conv1D`` keeps the transpose.

    Raises:
        ValueError: The module is no linear map with a plain weight.

    Examples:
        >>> matrix(nn.Linear(3, 2)).shape
        torch.Size([2, 3])
    """
    weight: Any = getattr(host, "weight", None)
    if isinstance(host, nn.Linear) and weight.ndim == 2 and weight.is_floating_point():
        return weight
    if type(host).__name__ == "Conv1D" and type(host).__module__ == "transformers.pytorch_utils":
        return weight.T
    raise ValueError(
        f"attach: {type(host).__name__}; expected a linear map (torch.nn.Linear or transformers' Conv1D) with a plain weight. "
        "Choose such modules with at=."
    )


class Part(nn.Module):
    """Something small that is added to one module, its host: from the host's input and output it gives the new output.

    A subclass takes the host as its first argument and gives ``forward(x, y)``, which is y itself at the start. Its file is
    built from ``state`` and ``settings`` and read by ``restore``; ``merge`` is for parts whose effect plain weights can have.
    """

    kind: ClassVar[str] = ""
    """``peft_type`` in the file, in small letters: a kind of PEFT's, of this module, or the slug of a system."""
    spans: ClassVar[bool] = False
    """Whether it acts between all blocks of a list, by ``between``: its host, in the last block, is mapped to the list's name."""

    def between(self, number: int, x: Tensor) -> Tensor:
        """What goes on to the next block when ``number`` blocks have run; for parts that span blocks."""
        return x

    def enter(self, x: Tensor) -> Tensor:
        """What the host reads instead of x."""
        return x

    def merge(self, host: nn.Module) -> None:
        """Change the host's weights, in place, so that its output is what the part makes of it.

        Raises:
            ValueError: No weights of the host have that effect.
        """
        raise ValueError(f"{type(self).__name__} has no equal among the weights of a {type(host).__name__}")

    def state(self) -> dict[str, Tensor]:
        """Tensors for the file, by the names that they have there."""
        return dict(self.state_dict())

    def settings(self) -> dict[str, Any]:
        """Plain data for the file's configuration."""
        return {}

    @classmethod
    def restore(cls, host: nn.Module, state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Part:
        """A part for ``host`` of the shapes that were saved. The caller loads the tensors."""
        return cls(host)

    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Take saved tensors up."""
        self.load_state_dict(dict(state))


class Lora(Part):
    """``y + (alpha / rank) B A x``, with a bias of B if wanted (Hu et al., arXiv:2106.09685); baked by adding to the weight.

    Args:
        host: A linear map.
        rank: Rank of the update.
        alpha: Numerator of its scale. Defaults to twice the rank.
        bias: Whether B has a bias.
        dropout: Probability with which features of x are dropped in training, for the update alone.

    Raises:
        ValueError: The host is no linear map, or the rank is below 1.
    """

    kind = "lora"

    def __init__(
        self, host: nn.Module, *, rank: int = 8, alpha: float | None = None, bias: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        outputs, inputs = matrix(host).shape
        if rank < 1:
            raise ValueError(f"Lora: rank was {rank}; expected at least 1.")
        self.alpha, self.dropout = 2.0 * rank if alpha is None else alpha, dropout
        self.lora_A, self.lora_B = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)
        if bias:
            nn.init.zeros_(self.lora_B.bias)

    @property
    def rank(self) -> int:
        """Rank of the update."""
        return self.lora_A.out_features

    @property
    def scale(self) -> float:
        """What the update is multiplied by."""
        return self.alpha / self.rank

    def forward(self, x: Float[Tensor, "*B I"], y: Float[Tensor, "*B O"]) -> Float[Tensor, "*B O"]:
        """Add the update."""
        return y + self.scale * self.lora_B(self.lora_A(F.dropout(x, self.dropout, self.training)))

    @torch.no_grad()
    def merge(self, host: nn.Module) -> None:
        """Add ``(alpha / rank) B A`` to the weight."""
        if self.lora_B.bias is not None:
            add_bias(host, self.scale * self.lora_B.bias)
        matrix(host).add_(self.scale * self.lora_B.weight @ self.lora_A.weight)

    def settings(self) -> dict[str, Any]:
        """The numbers of PEFT's configuration."""
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "lora_bias": self.lora_B.bias is not None,
        }

    @classmethod
    def restore(cls, host: nn.Module, state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Lora:
        """Rank and bias come from the tensors."""
        rank, alpha = len(state["lora_A.weight"]), settings["lora_alpha"]
        if settings.get("use_rslora"):
            alpha *= math.sqrt(rank)
        bias, dropout = "lora_B.bias" in state, settings.get("lora_dropout", 0.0)
        return cls(host, rank=rank, alpha=alpha, bias=bias, dropout=dropout)


class Scale(Part):
    """``y * l``, or the host's output for ``x * l`` (IA3, Liu et al., arXiv:2205.05638); baked by scaling the weight.

    Args:
        host: A linear map.
        inputs: Whether to scale what the host reads, as IA3 does before the last map of a feed-forward.
    """

    kind = "ia3"

    def __init__(self, host: nn.Module, *, inputs: bool = False) -> None:
        super().__init__()
        outputs, size = matrix(host).shape
        self.inputs, self.ia3_l = inputs, nn.Parameter(torch.ones((1, size) if inputs else (outputs, 1)))

    def enter(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B I"]:
        """Scale the input, if it is this that is scaled."""
        return x * self.ia3_l.flatten() if self.inputs else x

    def forward(self, x: Float[Tensor, "*B I"], y: Float[Tensor, "*B O"]) -> Float[Tensor, "*B O"]:
        """Scale the output, if it is this that is scaled."""
        return y if self.inputs else y * self.ia3_l.flatten()

    @torch.no_grad()
    def merge(self, host: nn.Module) -> None:
        """Scale columns of the weight, or rows and the bias."""
        matrix(host).mul_(self.ia3_l)
        bias: Any = getattr(host, "bias", None)
        if bias is not None and not self.inputs:
            bias.mul_(self.ia3_l.flatten())

    @classmethod
    def restore(cls, host: nn.Module, state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Scale:
        """What is scaled comes from the shape."""
        return cls(host, inputs=state["ia3_l"].shape[0] == 1 and matrix(host).shape[1] == state["ia3_l"].shape[1])


class Bias(Part):
    """A bias of the task's own in place of the host's (BitFit, Zaken et al., arXiv:2106.10199); baked by taking its place.

    Args:
        host: A module that adds its ``bias`` to its output.

    Raises:
        ValueError: The host has no bias.
    """

    kind = "bitfit"
    base: Tensor

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        bias: Any = getattr(host, "bias", None)
        if not isinstance(bias, Tensor):
            raise ValueError(f"Bias: {type(host).__name__} without a bias; expected a module with one. See `biased`.")
        self.bias = nn.Parameter(bias.detach().clone())
        self.register_buffer("base", bias.detach().clone(), persistent=False)

    def forward(self, x: Float[Tensor, "*B I"], y: Float[Tensor, "*B O"]) -> Float[Tensor, "*B O"]:
        """Exchange the bias."""
        return y + (self.bias - self.base)

    @torch.no_grad()
    def merge(self, host: nn.Module) -> None:
        """Set the host's bias, which another part may have changed already."""
        add_bias(host, self.bias - self.base)


class Bottleneck(Part):
    """``y + U act(D y + d) + u``: an adapter behind a sublayer (Houlsby et al., arXiv:1902.00751). Nothing linear equals it.

    Args:
        host: The last map of a sublayer; its outputs decide the width.
        hidden: Features of the bottleneck.
    """

    kind = "bottleneck"

    def __init__(self, host: nn.Module, *, hidden: int = 8) -> None:
        super().__init__()
        width = len(matrix(host))
        self.down, self.up = nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Float[Tensor, "*B I"], y: Float[Tensor, "*B O"]) -> Float[Tensor, "*B O"]:
        """Add what the bottleneck lets through; the activation is GELU."""
        return y + self.up(F.gelu(self.down(y)))

    @classmethod
    def restore(cls, host: nn.Module, state: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Bottleneck:
        """The bottleneck's size comes from the tensors."""
        return cls(host, hidden=len(state["down.weight"]))


class Whole(Part):
    """A copy of the host that is trained in its place: for heads and norms. Baked by taking the host's place.

    The host still runs, and its output is dropped, so take it for small modules.

    Args:
        host: Any module of one input and one output.
    """

    kind = "whole"

    def __init__(self, host: nn.Module) -> None:
        super().__init__()
        self.copy = _plain(host).requires_grad_(True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """What the copy gives."""
        return self.copy(x)

    @torch.no_grad()
    def merge(self, host: nn.Module) -> None:
        """Give the host the copy's weights."""
        for name, p in self.copy.named_parameters():
            host.get_parameter(name).copy_(p)

    def state(self) -> dict[str, Tensor]:
        """The copy's weights, by the host's names."""
        return dict(self.copy.state_dict())

    def fill(self, state: Mapping[str, Tensor]) -> None:
        """Take saved tensors up."""
        self.copy.load_state_dict(dict(state))


KINDS = {cls.kind: cls for cls in (Lora, Scale, Bias, Bottleneck, Whole)}


def _plain(host: nn.Module) -> nn.Module:
    """A copy of a module without the parts that it has for other tasks."""
    new = copy.deepcopy(host)
    new._modules.pop("attached", None)
    for kind in ("_forward_pre_hooks", "_forward_hooks"):
        hooks = getattr(new, kind)
        for key, hook in list(hooks.items()):
            if getattr(hook, "func", hook).__module__ == "interlayer.core.attach.attaching":
                del hooks[key]
                getattr(new, f"{kind}_with_kwargs").pop(key, None)
    return new


@torch.no_grad()
def add_bias(host: nn.Module, more: Tensor) -> None:
    """Add to a module's bias, in place.

    Raises:
        ValueError: It has none, and plain weights of its class cannot have one more.
    """
    bias: Any = getattr(host, "bias", None)
    if not isinstance(bias, Tensor):
        raise ValueError(f"{type(host).__name__} has no bias to which a constant could be added")
    bias.add_(more)
