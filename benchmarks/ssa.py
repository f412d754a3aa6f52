"""Training step of subsampled self-attention as a multiple of dense attention's, the layer alone and in a Transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.harness import compare, train_step
from interlayer.core.mixer import Attention
from interlayer.layers.mixing.ssa_pathways import SAMPLERS, SSA
from interlayer.models import Transformer

LENGTH, WIDTH, HEADS, BATCH = 1024, 128, 4, 4
GOALS = {4: 0.6}


def main():
    """With all pathways open the outputs are those of dense attention."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    tokens = torch.randint(0, 256, (1, LENGTH))
    for causal in (False, True):
        dense = Attention(WIDTH, HEADS, causal=causal)
        for sampler in SAMPLERS:
            for groups in (2, 4, 8):
                layer = SSA(WIDTH, HEADS, sampling=1 / groups, sampler=sampler, causal=causal)
                layer.load_state_dict(dense.state_dict())

                def agree(layer=layer, dense=dense):
                    same = torch.allclose(layer.eval()(x), dense(x), atol=1e-5)
                    layer.train()
                    return same

                compare(
                    f"attention, {LENGTH} tokens, width {WIDTH}, {'causal' if causal else 'bidirectional'}",
                    {
                        f"{sampler} 1/{groups}": train_step(layer, lambda layer=layer: layer(x).square().mean()),
                        "dense": train_step(dense, lambda dense=dense: dense(x).square().mean()),
                    },
                    agree=agree,
                    rounds=9,
                    goal={"dense": GOALS[groups]} if groups in GOALS else None,
                )

    def step(model):
        return train_step(model, lambda: F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()))

    shape = {"depth": 4, "width": WIDTH, "heads": HEADS, "length": LENGTH}
    dense = Transformer(**shape)
    for groups in (2, 4, 8):
        model = Transformer(**shape, mixer=f"ssa-pathways(sampling={1 / groups})")
        compare(f"Transformer, {shape}", {f"local 1/{groups}": step(model), "dense": step(dense)}, rounds=7)


if __name__ == "__main__":
    main()
