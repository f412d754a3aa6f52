"""Memory and time of a training step of SHERL, ladder side tuning, LoRA and all weights on one Transformer.

    python -m benchmarks.sherl

A language model of this package (width 256), 4 texts of 64 tokens, 6 and 12 blocks, reduction 8, LoRA of rank 8 on queries, keys and
values. First the gate: with SHERL attached nothing of the frozen model gets a gradient, and taken off it leaves the model as it was.
Peak memory is that of the tensors alive in a forward and backward pass, weights and gradients included. The authors publish no
package; PEFT has neither method.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.harness import compare
from interlayer.core.attach import Lora, attach, detach
from interlayer.core.cost import bytes_kept, peak_bytes
from interlayer.models import Transformer
from interlayer.transform.adapt._ladder import ladder
from interlayer.transform.adapt.sherl import adapt

WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "sherl": adapt,
    "ladder": ladder,
    "lora": lambda model: attach(model, "**.qkv", partial(Lora, rank=8)),
    "all weights": lambda model: model,
}


def base(depth: int) -> nn.Module:
    """A language model with random weights."""
    torch.manual_seed(0)
    return Transformer(vocab=256, length=64, depth=depth, width=256, heads=4)


def step(model: nn.Module, tokens: Tensor) -> None:
    """Forward and backward."""
    model.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()


def main() -> None:
    """Check, measure memory, then time in turn."""
    torch.set_num_threads(1)
    tokens = torch.randint(256, (4, 64), generator=torch.Generator().manual_seed(0))
    plain, tuned = base(6), adapt(base(6))
    step(tuned, tokens)
    assert all(p.grad is None for n, p in tuned.named_parameters() if ".attached." not in n)
    torch.testing.assert_close(detach(tuned)(tokens), plain(tokens), atol=0, rtol=0)
    print("gate: the frozen model gets no gradient and is as before afterwards")
    for depth in (6, 12):
        for name, way in WAYS.items():
            model = way(base(depth))
            kept = bytes_kept(model, lambda model=model: model(tokens).sum()) / 1e6
            model.zero_grad(set_to_none=True)
            peak = peak_bytes(lambda model=model: step(model, tokens), model.parameters()) / 1e6
            print(f"  {depth} blocks, {name}: {kept:.1f} MB kept for backward, {peak:.1f} MB at the peak of a step")
    models = {name: way(base(12)) for name, way in WAYS.items()}
    runs: dict[str, Callable[[], object]] = {name: partial(step, model, tokens) for name, model in models.items()}
    compare("training step, 12 blocks, 4 texts of 64 tokens", runs, rounds=7)


if __name__ == "__main__":
    main()
