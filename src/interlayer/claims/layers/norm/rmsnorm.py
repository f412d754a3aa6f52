"""RMSNorm against LayerNorm and no norm, in a recurrent network and in a Transformer."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interlayer.claims import Claim, Scale, effect, lowest
from interlayer.claims.training import judge, train
from interlayer.core.parts import Same
from interlayer.layers.norm.rmsnorm import RMSNorm
from interlayer.models import Transformer

MARGIN = 0.05  # nats a byte: what counts as comparable; chosen before the first run


class Undivided(nn.Module):
    """The control: RMSNorm's gain without the division by the root mean square."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Partial(RMSNorm):
    """The statistic from the first 6.25%, the share of the paper's experiments."""

    def __init__(self, width: int) -> None:
        super().__init__(width, partial=0.0625)


NORMS: dict[str, type[nn.Module]] = {
    "none": Same,
    "layernorm": nn.LayerNorm,
    "rmsnorm": RMSNorm,
    "partial": Partial,
    "undivided": Undivided,
}


class Recurrent(nn.Module):
    """Byte-level language model of the paper's recurrent kind: ``h = tanh(norm(W e_t + U h) + b)``.

    Args:
        width: Features of embedding and state.
        norm: Class that is called with the width.
    """

    def __init__(self, width: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.inputs = nn.Linear(width, width, bias=False)
        self.recur = nn.Linear(width, width, bias=False)
        self.norm = norm(width)
        self.bias = nn.Parameter(torch.zeros(width))
        self.head = nn.Linear(width, 256)

    def forward(self, tokens: Int[Tensor, "B S"]) -> Float[Tensor, "B S V"]:
        """Logits of the next byte."""
        drive = self.inputs(self.embed(tokens)).unbind(1)
        states = [torch.zeros_like(drive[0])]
        for each in drive:
            states.append(torch.tanh(self.norm(each + self.recur(states[-1])) + self.bias))
        return self.head(torch.stack(states[1:], 1))


def build(arm: str, scale: Scale) -> Transformer:
    """The Transformer."""
    return Transformer(depth=scale.depth, width=scale.width, heads=4, length=scale.length, norm=NORMS[arm])


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Validation loss on the bytes of Python's standard library after equal steps, for both networks."""
    found = {}
    for name, lr in (("recurrent", 2e-3), ("transformer", 2e-3)):
        torch.manual_seed(seed)
        model = Recurrent(scale.width, NORMS[arm]) if name == "recurrent" else build(arm, scale)
        train(model, "stdlib-bytes", seed=seed, steps=scale.steps, lr=lr, batch=16, cut=scale.length)
        found[name] = judge(model, "stdlib-bytes", batch=64, most=scale.judged, cut=scale.length)["loss"]
    return found


CLAIM = Claim(
    says=(
        f"RMSNorm's validation loss is within {MARGIN} nats a byte of LayerNorm's, or below it, and below that without "
        f"a norm, in a recurrent network and in a Transformer; the partial norm (6.25%) is within {MARGIN} of RMSNorm."
    ),
    measure=measure,
    build=build,
    arms=("none", "layernorm", "rmsnorm", "partial"),
    statements=tuple(
        effect("", lowest(model, arm, than=(than,), margin=margin), control="undivided")
        for arm, than, margin in (
            ("rmsnorm", "layernorm", -MARGIN),
            ("rmsnorm", "none", 0.0),
            ("partial", "rmsnorm", -MARGIN),
        )
        for model in ("recurrent", "transformer")
    ),
    scales={
        "smoke": {"depth": 1, "width": 32, "length": 16, "steps": 2, "judged": 1},
        "small": {"depth": 3, "width": 64, "length": 64, "steps": 150, "judged": 6},
        "full": {"depth": 12, "width": 768, "length": 128, "steps": 10000, "judged": 200},
    },
)
