"""Training step of each stream as a multiple of the plain Transformer's."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.harness import compare, train_step
from interlayer.models import Transformer

GOALS = {"denseformer(dilation=4)": 1.10}


def main():
    """At the start every stream here but value-residual computes what the plain Transformer computes."""
    for shape, batch in (({"depth": 12, "width": 128, "heads": 4}, 8),):
        tokens = torch.randint(0, 256, (batch, 128))
        plain = Transformer(**shape)
        for spec in (
            "denseformer",
            "denseformer(dilation=2)",
            "denseformer(dilation=4)",
            "value-residual",
            "value-residual(mode='shared')",
        ):
            model = Transformer(**shape, stream=spec)

            def same(model=model, spec=spec, plain=plain, tokens=tokens):
                if not spec.startswith("denseformer"):
                    return True
                model.load_state_dict(plain.state_dict(), strict=False)
                return torch.allclose(model(tokens), plain(tokens), atol=1e-4)

            def step(model, tokens=tokens):
                return train_step(model, lambda: F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()))

            goal = {"plain": GOALS[spec]} if spec in GOALS else None
            compare(
                f"training step, {shape}", {spec: step(model), "plain": step(plain)}, agree=same, rounds=11, goal=goal
            )


if __name__ == "__main__":
    main()
