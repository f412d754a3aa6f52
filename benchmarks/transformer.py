"""Training step of the causal Transformer against x-transformers and Hugging Face GPT-2 of the same shape."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F

from benchmarks.harness import compare, train_step, version
from interlayer.models import Transformer
from interlayer.models.transformer import SIZES


def gpt2(length, depth, width, heads):
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256, n_positions=length, n_embd=width, n_layer=depth, n_head=heads,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, activation_function="gelu", attn_implementation="sdpa",
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def x_transformers(length, depth, width, heads):
    from x_transformers import Decoder, TransformerWrapper

    layers = Decoder(dim=width, depth=depth, heads=heads, attn_dim_head=width // heads, attn_flash=True)
    return TransformerWrapper(num_tokens=256, max_seq_len=length, attn_layers=layers, tie_embedding=True)


def same_function(mine, theirs, tokens):
    """Load GPT-2's weights into ours and compare the logits."""
    state = {"embed.weight": theirs.transformer.wte.weight, "trunk.position.table": theirs.transformer.wpe.weight}
    state["head.weight"] = theirs.transformer.wte.weight
    for i, block in enumerate(theirs.transformer.h):
        for name, module in {
            f"trunk.blocks.{i}.mixer.qkv": block.attn.c_attn,
            f"trunk.blocks.{i}.mixer.out": block.attn.c_proj,
            f"trunk.blocks.{i}.mlp.up": block.mlp.c_fc,
            f"trunk.blocks.{i}.mlp.down": block.mlp.c_proj,
        }.items():
            state |= {f"{name}.weight": module.weight.T, f"{name}.bias": module.bias}
        for j, norm in enumerate((block.ln_1, block.ln_2)):
            state |= {f"trunk.stream.norms.{2 * i + j}.{k}": v for k, v in norm.state_dict().items()}
    state |= {f"trunk.stream.last.{k}": v for k, v in theirs.transformer.ln_f.state_dict().items()}
    mine.load_state_dict(state)
    with torch.no_grad():
        return torch.allclose(mine(tokens), theirs(tokens).logits, atol=1e-4)


def main(sizes=("nano", "small"), length=128):
    """Equal shape, equal tokens; GPT-2's function is compared with ours, x-transformers' parameters are counted."""
    for size in sizes:
        shape = SIZES[size]
        tokens = torch.randint(0, 256, (16 if size == "nano" else 4, length))
        models = {
            "interlayer": Transformer(length=length, position="learned", **shape),
            version("transformers"): gpt2(length, **shape),
            version("x-transformers"): x_transformers(length, **shape),
        }
        mine, theirs, x = models.values()

        def steps(model, tokens=tokens):
            def loss():
                out = model(tokens)
                logits = getattr(out, "logits", out)
                return F.cross_entropy(logits.view(-1, 256), tokens.view(-1))

            return train_step(model, loss)

        counts = [sum(p.numel() for p in m.parameters()) for m in (mine, x)]
        compare(
            f"training step, {size} {shape}, {tuple(tokens.shape)} tokens",
            {name: steps(model) for name, model in models.items()},
            agree=lambda mine=mine, theirs=theirs, counts=counts, tokens=tokens: (
                same_function(mine, theirs, tokens) and abs(counts[0] / counts[1] - 1) < 0.02
            ),
            rounds=15 if size == "nano" else 5,
            goal=dict.fromkeys(list(models)[1:], 1.0),
        )


if __name__ == "__main__":
    main(*([sys.argv[1:]] if sys.argv[1:] else []))
