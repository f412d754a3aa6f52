"""Forward and backward of Switch on 4096 tokens, as a multiple of a dense layer with the same active FLOPs and of other mixtures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from st_moe_pytorch import MoE
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from benchmarks.harness import compare, version
from interlayer.layers.routing.switch import Switch

WIDTH, HIDDEN, BATCH, LENGTH = 256, 512, 8, 512
GATED = 344  # three matrices of 344 features for two of 512, in multiples of 8 as the grouped kernel wants them


class Loop(Switch):
    """The same layer as a loop over experts, which unbinds the weights once and visits only an expert's own tokens."""

    def forward(self, x: Tensor) -> Tensor:
        """Route, and add each expert's output to its tokens."""
        routed = self.routed(x)
        flat, sizes = x.flatten(0, -2), routed.counts.tolist()
        out = torch.zeros_like(flat)
        runs = zip(
            routed.tokens.split(sizes), routed.gates.split(sizes), self.up.unbind(), self.down.unbind(), strict=True
        )
        for tokens, gates, up, down in runs:
            out = out.index_add(0, tokens, gates[:, None] * ((flat[tokens] @ up).relu() @ down))
        return out.view(x.shape)


def dense(k: int) -> nn.Module:
    """A feed-forward layer with the multiply-adds of k experts."""
    return nn.Sequential(nn.Linear(WIDTH, k * HIDDEN, bias=False), nn.ReLU(), nn.Linear(k * HIDDEN, WIDTH, bias=False))


def mixtral(experts: int, k: int, form: str) -> nn.Module:
    """Mixtral's block with its three matrices at the same active FLOPs."""
    config = MixtralConfig(hidden_size=WIDTH, intermediate_size=GATED, num_local_experts=experts, num_experts_per_tok=k)
    config._experts_implementation = form
    block = MixtralSparseMoeBlock(config)
    for p in block.parameters():
        nn.init.normal_(p, std=0.02)
    return block


def step(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Forward and backward, gradients of the input included."""
    seed = torch.randn_like(x)

    def run() -> None:
        model.zero_grad(set_to_none=True)
        out = model(x.detach().requires_grad_())
        (out[0] if isinstance(out, tuple) else out).backward(seed)

    return run


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, beside parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(x.detach().requires_grad_())
    del out
    return sum(found.values())


def main() -> None:
    """Times of the layer, beside its peers.

    Without noise on the router's input, which the others lack, and with room for all tokens, so that all do the same work; only
    st-moe-pytorch has no other form than with capacities.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    x = torch.randn(BATCH, LENGTH, WIDTH)
    for experts, k in ((8, 1), (8, 2), (64, 1)):
        ours = Switch(WIDTH, hidden=HIDDEN, experts=experts, k=k, least=LENGTH, jitter=0.0)
        loop = Loop(WIDTH, hidden=HIDDEN, experts=experts, k=k, least=LENGTH, jitter=0.0)
        loop.load_state_dict(ours.state_dict())
        plain = dense(k)

        def agree(ours: nn.Module = ours, loop: nn.Module = loop) -> bool:
            with torch.no_grad():
                return torch.allclose(ours(x), loop(x), rtol=1e-4, atol=1e-6)

        candidates = {"switch": step(ours, x), "dense": step(plain, x), "loop over experts": step(loop, x)}
        goal = {"dense": 1.3 if experts == 8 else 2.2}
        if experts == 8:
            for form in ("eager", "grouped_mm"):
                name = f"Mixtral's block, {form}"
                candidates[name], goal[name] = step(mixtral(experts, k, form), x), 1.0
        if k == 2:
            moe = MoE(
                WIDTH, num_experts=experts, expert_hidden_mult=HIDDEN / WIDTH, gating_top_n=k, is_distributed=False
            )
            candidates["st-moe-pytorch"], goal["st-moe-pytorch"] = step(moe, x), 0.5
        compare(
            f"{BATCH * LENGTH} tokens, {experts} experts, top-{k} ({version('transformers')}, {version('st-moe-pytorch')})",
            candidates,
            agree=agree,
            rounds=11,
            goal=goal,
        )
        ratio = kept(ours, x) / kept(plain, x)
        print(
            f"  kept for the backward pass, switch / dense: {ratio:.2f}  goal 1.5: {'met' if ratio <= 1.5 else 'NOT met'}"
        )


if __name__ == "__main__":
    main()
