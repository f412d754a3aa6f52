"""Which sequences lose their attention, and what that costs, in a small Llama that has learned two kinds of sequences."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.claims import Claim, Scale, check, effect, fits, lowest, mechanism
from interlayer.claims.twins import shuffled
from interlayer.core import cost
from interlayer.core.extras import need
from interlayer.core.fit import fit
from interlayer.core.select import put
from interlayer.core.skipping import Skip
from interlayer.layers.depth.mindskip import MindSkip

KINDS, LENGTH, JUDGED = 32, 24, 512
ARMS: dict[str, dict[str, Any]] = {
    "dense": {},
    "no attention": {},
    "mindskip": {},
    "block": {"of": "block", "threshold": None},
    "all weights": {"learn": "all", "lr": 1e-3},
    "mixture of depths": {"of": "block", "per": "token", "weight": 10.0, "learn": "all", "lr": 3e-3},
}
RANDOM, MASKED, POOLED = "as many at random", "computed and masked", "mean over the batch"


def build(arm: str, scale: Scale) -> nn.Module:
    """A Llama."""
    hf = need("transformers", "hf", "the claim of mindskip")
    w = scale.width
    sizes = {
        "hidden_size": w,
        "intermediate_size": 3 * w,
        "num_hidden_layers": scale.depth,
        "num_attention_heads": w // 16,
    }
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(vocab_size=KINDS, use_cache=False, bos_token_id=0, eos_token_id=0, **sizes)
    )


class Texts:
    """Half of the sequences repeat a few random tokens, which only attention can foretell; in the others, of other tokens, each
    token follows from the one before by a table, four times in five."""

    def __init__(self, seed: int) -> None:
        self.chance = torch.Generator().manual_seed(seed)
        self.table = torch.randperm(KINDS // 2, generator=self.chance)

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Tokens [size, LENGTH + 1], and which sequences repeat."""

        def draw(*shape: int, low: int = 0, high: int = KINDS // 2) -> Tensor:
            return torch.randint(low, high, shape, generator=self.chance)

        repeats = draw(size, high=2) == 1
        again = draw(size, 8, low=KINDS // 2, high=KINDS).gather(
            1, torch.arange(LENGTH + 1) % draw(size, 1, low=5, high=9)
        )
        chain = [draw(size)]
        for _ in range(LENGTH):
            chain.append(torch.where(draw(size, high=5) > 0, self.table[chain[-1]], draw(size)))
        return torch.where(repeats[:, None], again, torch.stack(chain, 1)), repeats


@lru_cache(maxsize=2)
def trained(width: int, depth: int, steps: int, seed: int) -> tuple[nn.Module, Texts]:
    """The dense model, the same for all arms of a seed, and where its texts came from."""
    texts = Texts(seed)
    torch.manual_seed(seed)
    model = build("dense", Scale(width=width, depth=depth))

    def loss(net: nn.Module, x: Tensor) -> Tensor:
        return F.cross_entropy(net(x[:, :-1]).logits.flatten(0, 1), x[:, 1:].flatten())

    fit(model, (texts.batch(32)[0] for _ in range(steps)), loss, steps=steps, lr=4e-3, warmup=steps // 10)
    return model.eval(), texts


class MeanOverTheBatch(MindSkip):
    """The router's input averaged over the wrong axis."""

    def restore(self, model: nn.Module, structure: Mapping[str, Any]) -> nn.Module:
        """With routers that see the same mean for each sequence."""
        model = super().restore(model, structure)
        for skip in _skips(model):
            decide = skip.decide
            skip.decide = lambda x, real=None, decide=decide: decide(x.mean(0, keepdim=True).expand_as(x), real)  # type: ignore[method-assign]
        return model


class Computed(nn.Module):
    """Skipping in the authors' later code: everything is computed, then multiplied by 1 or 0."""

    def __init__(self, skip: Skip) -> None:
        super().__init__()
        self.skip = skip

    def forward(self, *args: Any, **named: Any) -> Any:
        """As in training."""
        self.skip.training = True
        return self.skip(*args, **named)


def _skips(model: nn.Module) -> list[Skip]:
    return [m for m in model.modules() if isinstance(m, Skip)]


def _turn(skip: Skip, turn: Callable[[Tensor], Tensor]) -> None:
    """Change what a trained router decides."""
    decide = skip.decide

    def turned(x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        keep = turn(decide(x, real)[0])
        return keep, keep.float()

    skip.decide = turned  # type: ignore[method-assign]


def change(arm: str, model: nn.Module, data: list[Tensor], scale: Scale) -> nn.Module:
    """What the arm makes of the dense model."""
    options = {"capacity": 0.5, "weight": 0.3, "lr": 0.1, "layers": scale.depth - 1, **ARMS.get(arm, {})}
    if arm == "dense":
        return copy.deepcopy(model)
    new = (MeanOverTheBatch if arm == POOLED else MindSkip)(**options).plan(model, data).apply().eval()
    for skip in _skips(new):
        if arm == RANDOM:
            _turn(skip, shuffled)
        if arm == "no attention":
            _turn(skip, torch.zeros_like)
    for name in [n for n, m in new.named_modules() if isinstance(m, Skip)] if arm == MASKED else ():
        put(new, name, Computed(new.get_submodule(name)))  # type: ignore[arg-type]
    return new


def measure(arm: str, seed: int, scale: Scale) -> Mapping[str, float]:
    """Loss on fresh texts, accuracy where the repeated tokens are known, shares kept, and FLOPs."""
    model, texts = trained(scale.width, scale.depth, scale.steps, seed)
    data = Texts(seed)
    data.table, data.chance = texts.table, torch.Generator().manual_seed(seed + 10_000)
    batches = [data.batch(32)[0] for _ in range(scale.batches)]
    new = change(arm, model, batches, scale)
    x, repeats = data.batch(JUDGED)
    kept: list[Tensor] = []
    for skip in _skips(new):
        _turn(skip, lambda keep: kept.append(keep.float().view(JUDGED, -1).mean(1)) or keep)  # type: ignore[func-returns-value]
    with torch.no_grad():
        logits = new(x[:, :-1]).logits
    right = (logits.argmax(-1) == x[:, 1:])[:, 9:].float().mean(1)
    share = torch.stack(kept).mean(0) if kept else torch.ones(JUDGED)
    learned = (
        cost.parameters(new) if "learn" in ARMS.get(arm, {}) else sum(s.router.weight.numel() for s in _skips(new))
    )
    return {
        "loss": float(F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten())),
        "accuracy of repeats": float(right[repeats].mean()),
        "accuracy of chains": float(right[~repeats].mean()),
        "kept": float(share.mean()),
        "kept of repeats above chains": float(share[repeats].mean() - share[~repeats].mean()),
        "FLOPs": cost.flops(new, x[:, :-1]) / cost.flops(model, x[:, :-1]),
        "trained parameters": learned,
    }


CLAIM = Claim(
    says="In a small Llama that has learned sequences that need attention and others that do not, routers of one weight a feature, "
    "trained on 1024 sequences, let the latter skip the attention of a layer; that costs less than 0.05 of loss, and less than a "
    "mixture of depths whose weights are all trained on the same data.",
    measure=measure,
    build=build,
    arms=ARMS,
    statements=(
        mechanism(
            "Sequences that need attention keep it more often than the others, by at least half of all.",
            fits("kept of repeats above chains", "mindskip", low=0.5),
            control=RANDOM,
            mutant=POOLED,
        ),
        effect(
            "The loss rises by less than 0.05.",
            lowest("loss", "mindskip", than=("dense",), margin=-0.05),
            control=RANDOM,
        ),
        effect(
            "FLOPs fall by at least 7%; the layer's attention takes 17%.",
            fits("FLOPs", "mindskip", high=0.93),
            control=MASKED,
        ),
        effect(
            "The loss is less than 0.05 above that of training all weights with the routers, on the same data.",
            lowest("loss", "mindskip", than=("all weights",), margin=-0.05),
            control=RANDOM,
        ),
        effect(
            "The loss is below that of a mixture of depths (tokens skip the block, all weights are trained), and of routers around "
            "the block, on the same data.",
            lowest("loss", "mindskip", than=("mixture of depths", "block")),
            control=RANDOM,
        ),
    ),
    pilots="Seeds 1000 to 1003, 32 batches of 32 for the routers. Both kinds from one vocabulary: the mean of a sequence says nothing, "
    "routers keep both alike (loss 1.18 to 1.8), so each kind got tokens of its own. mindskip: rates 0.001 to 0.3 and weights 0.3 "
    "to 3; the rate hardly matters (0.01 somewhat worse), weight 0.3 beats 1; taken 0.1 and 0.3: loss as dense to 0.002, 48 to 49%"
    " kept. all weights: rates 0.0003, 0.001, 0.004; taken 0.001. mixture of depths: weights 1 (keeps 94 to 100%, so it skips "
    "nothing), 3 and 10, rates 0.0003 to 0.004; taken 10 and 0.003: loss 1.5 to 1.7, 41 to 53% kept; 10 epochs on the same data "
    "reach 1.38 at 33%. block with a threshold keeps 99%, so it skips by capacity. FLOPs at 0.911; 0.9 was the first bound.",
    checks=(
        check(
            "The dense model foretells at least half of the repeated tokens.",
            fits("accuracy of repeats", "dense", low=0.5),
        ),
        check(
            "Without the layer's attention the loss is higher by at least 0.2.",
            lowest("loss", "dense", than=("no attention",), margin=0.2),
        ),
    ),
    scales={
        "smoke": {"width": 16, "depth": 2, "steps": 4, "batches": 2},
        "small": {"width": 48, "depth": 2, "steps": 500, "batches": 32},
        "full": {"width": 256, "depth": 8, "steps": 10_000, "batches": 32},
    },
)
