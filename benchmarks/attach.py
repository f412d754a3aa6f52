"""Parts on a frozen model beside PEFT's LoRA of the same rank, and AdapterBias: time of a training step, bytes of the file.

    python -m benchmarks.attach

One GPT-2 of transformers (6 layers, width 256) and one batch; LoRA of rank 8 on ``c_attn``. First the gate: with PEFT's weights
our LoRA gives its logits and gradients. Then steps in turn, forward and backward over the same batch. AdapterHub's ``adapters``
1.3.0 cannot be imported beside transformers 5 (it wants 4.57), so it is not compared with.
"""

from __future__ import annotations

import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.harness import compare, version
from interlayer.core import attach as at
from interlayer.core.attach import Lora, attach, files
from interlayer.core.cost import parameters
from interlayer.transform.adapt.adapterbias import adapt


def base() -> Any:
    """A GPT-2 with random weights."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=256, n_layer=6, n_head=8, vocab_size=1000, n_positions=128, bos_token_id=0, eos_token_id=0)
    ).eval()


def step(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Forward and backward; gives the logits."""
    model.zero_grad(set_to_none=True)
    out = model(input_ids=tokens, labels=tokens)
    out.loss.backward()
    return out.logits


def size(folder: Path) -> int:
    """Bytes of the weights' file."""
    return (folder / files.WEIGHTS).stat().st_size


def main() -> None:
    """Check, then time in turn."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tokens = torch.randint(1000, (4, 64), generator=torch.Generator().manual_seed(0))
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True)
    theirs: Any = peft.get_peft_model(base(), config)
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02)
    with tempfile.TemporaryDirectory() as place:
        folders = {name: Path(place) / name for name in ("peft", "lora", "adapterbias")}
        theirs.save_pretrained(folders["peft"])
        ours = at.load(base(), folders["peft"])
        torch.testing.assert_close(step(ours, tokens), step(theirs, tokens), atol=1e-5, rtol=1e-5)
        grads = {
            n.replace(".base_model.model", "").replace(".default", ""): p.grad for n, p in theirs.named_parameters()
        }
        for site, part in at.attached(ours)["default"].items():
            for key, p in part.named_parameters():
                torch.testing.assert_close(p.grad, grads[f"base_model.model.{site}.{key}"], atol=1e-6, rtol=1e-4)
        shifted = adapt(base())
        at.save(ours, folders["lora"])
        at.save(shifted, folders["adapterbias"])
        sizes = {name: size(folder) for name, folder in folders.items()}
    print("gate: logits and gradients of LoRA equal PEFT's")
    everywhere = attach(base(), list(at.feed_forwards(base())), partial(Lora, rank=8))
    for name, model in {"peft": theirs, "lora": ours, "adapterbias": shifted}.items():
        print(f"  {name}: {4 * parameters(model, trainable=True)} trained bytes, file of {sizes[name]} bytes")
    title, peer = "training step, 4 texts of 64 tokens", version("peft")
    compare(title, {"LoRA": lambda: step(ours, tokens), peer: lambda: step(theirs, tokens)}, goal={peer: 1.0})
    compare(
        f"{title}, parts at the feed-forwards",
        {"AdapterBias": lambda: step(shifted, tokens), "LoRA of rank 8": lambda: step(everywhere, tokens)},
    )


if __name__ == "__main__":
    main()
