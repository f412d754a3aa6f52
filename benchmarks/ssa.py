"""Training step of subsampled self-attention as a multiple of dense attention's, the layer alone and in a Transformer."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.harness import compare, train_step
from interlayer.core.mixer import Attention
from interlayer.layers.mixing.ssa_pathways import SAMPLERS, SSA
from interlayer.models import Transformer

LENGTH, GOALS = 1024, {4: 0.6}


def agree(layer: SSA, x: torch.Tensor) -> bool:
    """The layer's output is that of dense attention with the same sample as a mask."""
    torch.manual_seed(1)
    fast = layer(x)
    torch.manual_seed(1)
    token, asks = layer.deal(LENGTH, x.device)
    seen = torch.zeros(LENGTH, LENGTH, dtype=torch.bool).scatter(1, token[asks // token.shape[1]], True)
    slow = F.scaled_dot_product_attention(*layer.project(x), attn_mask=seen.tril() if layer.causal else seen)
    return torch.allclose(fast, layer.out(slow.transpose(1, 2).flatten(2)), atol=1e-5)


def layer_alone(width: int, heads: int, batch: int, causal: bool) -> None:
    """One attention layer, with its projections."""
    x = torch.randn(batch, LENGTH, width)
    dense = Attention(width, heads, causal=causal)
    for sampler in SAMPLERS:
        for groups in (2, 4, 8):
            layer = SSA(width, heads, sampling=1 / groups, sampler=sampler, causal=causal)
            compare(
                f"attention, {LENGTH} tokens, width {width}, {'causal' if causal else 'bidirectional'}",
                {
                    f"{sampler} 1/{groups}": train_step(layer, lambda layer=layer: layer(x).square().mean()),
                    "dense": train_step(dense, lambda: dense(x).square().mean()),
                },
                agree=lambda layer=layer: agree(layer, x),
                rounds=9,
                goal={"dense": GOALS[groups]} if groups in GOALS else None,
            )


def whole_model() -> None:
    """A causal Transformer; MLPs and the head cost what they cost."""
    tokens = torch.randint(0, 256, (1, LENGTH))

    def step(model):
        return train_step(model, lambda: F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()))

    shape = {"depth": 4, "width": 128, "heads": 4, "length": LENGTH}
    dense = Transformer(**shape)
    for groups in (2, 4, 8):
        model = Transformer(**shape, mixer=f"ssa-pathways(sampling={1 / groups})")
        compare(f"Transformer, {shape}", {f"local 1/{groups}": step(model), "dense": step(dense)}, rounds=7)


def main():
    """Layers first, then the model."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for width, heads, batch in ((128, 4, 4), (256, 4, 2)):
        for causal in (False, True):
            layer_alone(width, heads, batch, causal)
    whole_model()


if __name__ == "__main__":
    main()
