"""Training step of each stream as a multiple of the plain Transformer's: time and memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.harness import compare, train_step
from interlayer.core import cost
from interlayer.models import Transformer
from interlayer.models.transformer import SIZES

GOALS = {"denseformer(dilation=4)": 1.10, "muddformer": 1.25, "lime": 1.15}
DEEP = {"depth": 12, "width": 128, "heads": 4}
DENSE = ("denseformer", "denseformer(dilation=2)", "denseformer(dilation=4)")
SHARED = ("value-residual", "value-residual(mode='shared')")
# Streams, shape, sequences of 128 tokens, rounds.
CASES = (
    ((*DENSE, *SHARED), DEEP, 8, 11),
    (("muddformer", "lime"), SIZES["nano"], 16, 11),
    (("muddformer", "lime"), SIZES["small"], 4, 5),
)


def kept(model, tokens):
    """Bytes that autograd keeps."""
    return cost.bytes_kept(model, lambda: F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()))


@torch.no_grad()
def peak(model, tokens):
    """Most bytes that are alive without gradients."""
    return cost.peak_bytes(lambda: model(tokens), [*model.parameters(), tokens])


def main():
    """At the start every stream here but value-residual computes what the plain Transformer computes."""
    torch.manual_seed(0)
    for specs, shape, batch, rounds in CASES:
        tokens = torch.randint(0, 256, (batch, 128))
        plain = Transformer(**shape)
        for spec in specs:
            model = Transformer(**shape, stream=spec)

            def same(model=model, spec=spec, plain=plain, tokens=tokens):
                if spec in SHARED:
                    return True
                model.load_state_dict(plain.state_dict(), strict=False)
                return torch.allclose(model(tokens), plain(tokens), atol=1e-4)

            def step(model, tokens=tokens):
                return train_step(model, lambda: F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()))

            compare(
                f"training step, {shape}",
                {spec: step(model), "plain": step(plain)},
                agree=same,
                rounds=rounds,
                goal={"plain": GOALS[spec]} if spec in GOALS else None,
            )
            for what, measure in (("kept for the backward pass", kept), ("at the fullest of a forward pass", peak)):
                ours, theirs = (measure(m, tokens) for m in (model, plain))
                print(f"  {spec} / plain, bytes {what}: {ours / theirs:.3f}")


if __name__ == "__main__":
    main()
