"""Nothing that a backbone is asked for may be without effect: every pair of slots is walked.

A pair is refused with a reason, or gives a model that computes something else than with either of the two alone.
"""

import inspect
import re
import zlib
from functools import cache
from itertools import permutations

import pytest
import torch

from interlayer import catalog
from interlayer.core.data import run
from interlayer.core.slots import parse_spec, resolve
from interlayer.core.trunk import Trunk
from interlayer.models import MLP, ConvNet, Encoder, EncoderDecoder, Transformer, VisionTransformer

TINY = {"depth": 2, "width": 16, "heads": 2}
TRUNK = ("stream", "norm", "mixer", "mlp", "activation", "position", "order", "kv_heads", "hidden")
TOKENS = torch.arange(80).view(2, 40) * 7 % 11
BACKBONES = {
    "Transformer": (lambda **o: Transformer(vocab=11, length=40, **TINY, **o), lambda: TOKENS, TRUNK),
    "Encoder": (lambda **o: Encoder(vocab=11, length=40, **TINY, **o), lambda: TOKENS, TRUNK),
    "VisionTransformer": (
        lambda **o: VisionTransformer(1, 12, patch=2, **TINY, **o),
        lambda: torch.linspace(-1, 1, 288).view(2, 1, 12, 12),
        TRUNK,
    ),
    "MLP": (
        lambda **o: MLP(6, 3, depth=2, width=8, **o),
        lambda: torch.linspace(-1, 1, 12).view(2, 6),
        ("stream", "norm", "activation"),
    ),
    "ConvNet": (
        lambda **o: ConvNet(1, 3, depth=8, width=4, **o),
        lambda: torch.linspace(-1, 1, 128).view(2, 1, 8, 8),
        ("stream", "norm", "activation"),
    ),
    "EncoderDecoder": (
        lambda **o: EncoderDecoder(vocab=11, source=40, length=40, **TINY, **o),
        lambda: (TOKENS, TOKENS.flip(1)),
        ("bridge", "norm", "mlp", "activation"),
    ),
}
# One or two fillings of each slot that differ from every backbone's default.
SOME = {
    "stream": ("rezero", "denseformer"),
    "norm": ("rmsnorm",),
    "mixer": ("linear-attention", "hopfield"),
    "mlp": ("glu",),
    "activation": ("smelu",),
    "position": ("sinusoidal", "none"),
    "order": ("looped",),
    "bridge": ("enc-dec-bridge(start='random')",),
    "kv_heads": (1,),
    "hidden": (24,),
}


@cache
def names(slot):
    """Every filling of a slot that the catalogue knows."""
    if slot in ("kv_heads", "hidden"):
        return SOME[slot]
    short = {  # the defaults see the whole of so short an input
        "big-bird": "big-bird(block=4)",
        "sliding-window": "sliding-window(window=8)",
        "block-local": "block-local(block=8)",
        "dilated": "dilated(window=4)",
        "global-window": "global-window(window=8)",
        "external-nodes": "external-nodes(window=8)",
        "segments": "segments(block=8)",
    }
    systems = [s.slug for s in catalog.load().values() if s.slot == slot and s.state == "ready"]
    return tuple(short.get(name, name) for name in (*catalog.builtins(slot), *systems))


def name_of(spec):
    return parse_spec(str(spec))[0]


@cache
def output(backbone, fillings):
    """Outputs and gradients of a model whose parameters depend on their names and shapes alone; or why it is refused."""
    make, inputs, _ = BACKBONES[backbone]
    torch.manual_seed(0)
    try:
        model = make(**dict(fillings))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                parameter.normal_(generator=noise).mul_(0.3)
        torch.manual_seed(1)
        found = run(model, inputs())
        found.square().mean().backward()
        norms = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
        return torch.nan_to_num(torch.cat([found.detach().flatten(), norms]), 0.5)
    except ValueError as error:
        return str(error)


def is_default(backbone, slot, what, beside):
    """Whether a filling is what the backbone, or the part beside it, takes anyway."""
    made = {"MLP": MLP, "ConvNet": ConvNet, "EncoderDecoder": EncoderDecoder}.get(backbone, Trunk)
    default = inspect.signature(made).parameters[slot].default
    default = {"position": "learned" if backbone == "VisionTransformer" else "rotary"}.get(slot, default)
    if slot == "activation" and default is None:
        default = "silu" if beside == "glu" else "gelu"
    if slot == "position" and name_of(beside) in map(name_of, names("mixer")):
        offers = getattr(resolve("mixer", name_of(beside)), "offers", ())
        default = default if "rotate" in offers else "none" if "order" in offers else "learned"
    return what == default


@pytest.mark.parametrize(
    ("backbone", "one", "two"),
    [(b, *pair) for b, (_, _, slots) in BACKBONES.items() for pair in permutations(slots, 2)],
)
def test_a_pair_of_slots_is_refused_or_both_have_an_effect(backbone, one, two):
    every = SOME[one] if backbone in ("Encoder", "VisionTransformer") else names(one)  # one trunk: walked whole once
    for first in every:
        for second in SOME[two]:
            pair = ((one, first), (two, second))
            both = output(backbone, pair)
            if isinstance(both, str):
                said = re.sub(r"[^a-z]", "", both.lower())
                words = (re.sub(r"[^a-z]", "", name_of(word)) for word in (first, second, one, two))
                assert any(word and word in said for word in words), both
                continue
            for (slot, what), (beside, alone) in (pair, pair[::-1]):
                single = output(backbone, ((beside, alone),))
                if not isinstance(single, str) and not is_default(backbone, slot, what, alone):
                    assert not torch.equal(both, single), f"{slot}={what!r} has no effect beside {beside}={alone!r}"


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (MLP, {"features": 4, "classes": 2, "norm": "rmsnorm"}, "norm='rmsnorm' has no effect"),
        (Transformer, {"mlp": "bilinear", "activation": "helu"}, "activation='helu' has no effect"),
        (Transformer, {"mixer": "hopfield", "kv_heads": 2}, "kv_heads=2 has no effect"),
        (Transformer, {"grid": (8, 16)}, "has no effect"),
        (Transformer, {"scale": 1.0}, "scale=1.0 has no effect"),
        (Transformer, {"mixer": "synthesizer", "position": "rotary"}, "Rotary needs a mixer that offers"),
        (ConvNet, {"depth": 8, "norm": "layernorm"}, "normalises features"),
        (Transformer, {"norm": "batchnorm"}, "normalises channels"),
    ],
)
def test_the_refusal_names_what_has_no_effect(make, options, words):
    with pytest.raises(ValueError, match=words):
        make(**options)
