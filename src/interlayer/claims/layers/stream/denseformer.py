"""DenseFormer against the plain Transformer and a deeper one."""

from __future__ import annotations

from interlayer.claims import Claim, Scale, effect, lowest
from interlayer.claims.training import built, language
from interlayer.claims.twins import frozen
from interlayer.core.slots import parse_spec
from interlayer.core.stream import PreNorm
from interlayer.layers.stream.denseformer import DenseFormer
from interlayer.models import Transformer

FROZEN = frozen(DenseFormer, "alpha")  # the control: nothing of earlier blocks is ever read


def build(arm: str, scale: Scale) -> Transformer:
    """A language model of bytes."""
    deeper = arm == "deeper"
    stream = {"plain": PreNorm, "deeper": PreNorm, "frozen": FROZEN}.get(arm, arm)
    return Transformer(depth=scale.depth + 2 * deeper, width=scale.width, heads=4, stream=stream)


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Validation loss after equal steps on the bytes of Python's standard library, and what the stream keeps."""
    model = built(lambda: build(arm, scale), seed)
    loss = language(model, seed, scale)
    kept = 0 if not isinstance(model.trunk.stream, DenseFormer) else len(model.trunk.stream.last_reader)
    return {"loss": loss, "outputs kept": kept, "dilation": parse_spec(arm)[1].get("dilation", 0)}


CLAIM = Claim(
    says="At equal steps the depth-weighted average lowers the Transformer's validation loss, with dilation 1 and 4.",
    measure=measure,
    build=build,
    arms=("plain", "deeper", "denseformer", "denseformer(dilation=2)", "denseformer(dilation=4)"),
    statements=(
        effect("", lowest("loss", "denseformer", than=("plain",)), control="frozen"),
        effect("", lowest("loss", "denseformer(dilation=4)", than=("plain",)), control="frozen"),
    ),
    scales={
        "smoke": {"depth": 4, "width": 32, "length": 16, "steps": 2, "judged": 1},
        "small": {"depth": 8, "width": 64, "length": 64, "steps": 150, "judged": 8},
        "full": {"depth": 48, "width": 768, "length": 128, "steps": 20000, "judged": 200},
    },
)
