"""HeLU: units that never fire, and what that costs, on digits and on text."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from interlayer.claims import Claim, Scale, effect, highest, lowest
from interlayer.claims.training import batches, judge, task, train
from interlayer.core.parts import FeedForward
from interlayer.models import MLP, Transformer

ARMS = ("helu", "relu", "leaky-relu", "gelu", "silu")
WITHOUT = "helu(alpha=0.0)"


@torch.no_grad()
def dead(model: nn.Module, at: list[nn.Module], inputs: Tensor) -> float:
    """Share of the units that get no number above 0 for any input."""
    ever: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        ever.append((args[0] > 0).flatten(0, -2).any(0))

    hooks = [module.register_forward_pre_hook(see) for module in at]
    model.eval()(inputs)
    for hook in hooks:
        hook.remove()
    return 1 - torch.cat(ever).float().mean().item()


def build(arm: str, scale: Scale) -> MLP:
    """A deep, narrow net for digits."""
    return MLP(64, 10, depth=scale.depth, width=32, activation=arm)


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """A deep narrow MLP at a high learning rate on digits, and a Transformer on text."""
    torch.manual_seed(seed)
    net = build(arm, scale)
    train(net, "digits", seed=seed, steps=scale.steps, lr=1e-2)
    images = task("digits").data["validation"][0]  # type: ignore[attr-defined]
    torch.manual_seed(seed)
    text = Transformer(depth=2, width=64, heads=4, activation=arm)
    train(text, "stdlib-bytes", seed=seed, steps=scale.text, lr=4e-3, batch=16, warmup=scale.text // 10, cut=64)
    tokens = next(batches("stdlib-bytes", 99, 16, 1))[0][:, :64]
    inner = [m.act for m in text.modules() if isinstance(m, FeedForward)]
    return {
        "accuracy on digits": judge(net, "digits")["accuracy"],
        "dead units on digits": dead(net, [block[-1] for block in net.blocks], images),  # type: ignore[index]
        "loss on text": judge(text, "stdlib-bytes", batch=64, most=scale.judged, cut=64)["loss"],
        "dead units on text": dead(text, inner, tokens),
    }


CLAIM = Claim(
    says="HeLU leaves fewer dead units than ReLU, on digits and on text, is more accurate than ReLU on digits and has a lower loss on "
    "text, and on both is no worse than GELU by more than a point or 0.01 nats.",
    measure=measure,
    build=build,
    arms=ARMS,
    statements=(
        effect("", lowest("dead units on digits", "helu", than=("relu",)), control=WITHOUT),
        effect("", lowest("dead units on text", "helu", than=("relu",)), control=WITHOUT),
        effect("", highest("accuracy on digits", "helu", than=("relu",)), control=WITHOUT),
        effect("", lowest("loss on text", "helu", than=("relu",)), control=WITHOUT),
        effect("", highest("accuracy on digits", "helu", than=("gelu",), margin=-0.01), control=WITHOUT),
        effect("", lowest("loss on text", "helu", than=("gelu",), margin=-0.01), control=WITHOUT),
    ),
    scales={
        "smoke": {"depth": 3, "steps": 2, "text": 1, "judged": 1},
        "small": {"depth": 8, "steps": 200, "text": 120, "judged": 8},
        "full": {"depth": 8, "steps": 5000, "text": 10000, "judged": 200},
    },
)
