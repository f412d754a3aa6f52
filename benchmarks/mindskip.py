"""Router-Tuning's skipping at batch 16: wall-clock gain against FLOP gain, against computing and masking, and what a cache keeps.

Half of the sequences skip the attention, or the whole block, of every layer but the last. The routers are set by hand, since only the
number that skips matters to the clock. Then speed-up against loss, by capacity, on the claim's trained model.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import compare
from interlayer.claims.layers.depth.mindskip import trained
from interlayer.core import cost
from interlayer.core.skipping import Skip
from interlayer.layers.depth.mindskip import MindSkip

BATCH, LENGTH, NEW = 16, 256, 32


def models(of):
    """A Llama of 4 layers, width 512, and the same with routers that keep the first half of the sequences."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=512, intermediate_size=1408, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=8,
        bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    plain = LlamaForCausalLM(config).eval()
    skipping = MindSkip(of=of, layers=3).plan(plain, torch.randint(256, (2, 8))).apply().eval()
    for skip in (m for m in skipping.modules() if isinstance(m, Skip)):
        skip.decide = lambda x, real=None: [torch.arange(len(x)) < len(x) // 2] * 2
    masked = copy.deepcopy(skipping)
    for skip in (m for m in masked.modules() if isinstance(m, Skip)):
        skip.decide = lambda x, real=None: [(torch.arange(len(x)) < len(x) // 2).float()] * 2
        skip.training = True  # computes everything and multiplies by the gate
    return plain, skipping, masked


def curve():
    """Time, FLOPs and loss by the share of sequences that keep the attention of three of four layers."""
    plain, texts = trained(96, 4, 500, 1000)
    data = [texts.batch(32)[0] for _ in range(32)]
    x = texts.batch(512)[0]
    print("a trained Llama of 4 layers, width 96: half of its sequences need attention")
    for capacity in (1.0, 0.75, 0.5, 0.25):
        new = MindSkip(capacity=capacity, threshold=None, layers=3, lr=0.1).plan(plain, data).apply().eval()
        with torch.no_grad():
            loss = [F.cross_entropy(m(x[:, :-1]).logits.flatten(0, 1), x[:, 1:].flatten()).item() for m in (new, plain)]
            compare(
                f"  capacity {capacity}: loss {loss[0]:.3f}, plain {loss[1]:.3f}; FLOPs over plain "
                f"{cost.flops(new, x[:, :-1]) / cost.flops(plain, x[:, :-1]):.3f}",
                {"mindskip": lambda m=new: m(x[:, :-1]), "plain": lambda: plain(x[:, :-1])},
                rounds=7,
            )  # fmt: skip


def main():
    """All of it."""
    torch.set_num_threads(1)
    speed()
    curve()


@torch.no_grad()
def speed():
    """Forward passes, and decoding after a prompt."""
    tokens = torch.randint(256, (BATCH, LENGTH))
    for of in ("attention", "block"):
        plain, skipping, masked = models(of)

        def run(model):
            return lambda: model(tokens, use_cache=False).logits

        right = torch.allclose(run(skipping)(), run(masked)(), atol=1e-4)

        rows = compare(
            f"forward, batch {BATCH} of {LENGTH} tokens, half of the sequences skip {of} in 3 of 4 layers",
            {"mindskip": run(skipping), "plain": run(plain), "computed and masked": run(masked)},
            agree=lambda right=right: right,
            rounds=7,
        )
        time, flops = 1 / rows[0].median, cost.flops(plain, tokens) / cost.flops(skipping, tokens)
        saved = (1 - rows[0].median) / (1 - 1 / flops)
        print(
            f"  gain: {time:.2f} in time, {flops:.2f} in FLOPs; ratio {time / flops:.2f}, of what is saved {saved:.2f}  goal 0.8"
        )
        kept = {}
        for name, model in (("plain", plain), ("mindskip", skipping)):
            cache = model(tokens, use_cache=True).past_key_values
            layers = [getattr(layer, "inner", layer) for layer in cache.layers]
            kept[name] = cost.storage_bytes(t for layer in layers for t in (layer.keys, layer.values))
        print(f"  cache after the prompt, mindskip over plain: {kept['mindskip'] / kept['plain']:.3f}")

        def decode(model):
            return lambda: model.generate(tokens[:, :64], max_new_tokens=NEW, do_sample=False)

        compare(f"generate {NEW} tokens after 64", {"mindskip": decode(skipping), "plain": decode(plain)}, rounds=3)


if __name__ == "__main__":
    main()
