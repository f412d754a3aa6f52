"""U-DiT: a quarter of the attention's pairs with every token kept, and lower loss than isotropic DiT at equal FLOPs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from interlayer.claims import Claim, Scale, check, effect, fits, lowest, mechanism
from interlayer.claims.training import built
from interlayer.core.conditioning import AdaLNBlock
from interlayer.core.config import configured
from interlayer.core.cost import flops
from interlayer.core.fit import fit
from interlayer.core.mixer import Attention, Context
from interlayer.core.process import DDIM, Diffusion, sample
from interlayer.generate.tasks import digit_images, digits_diffusion
from interlayer.generate.u_dit import UDiT
from interlayer.generate.u_dit.parts import DownSampledAttention, RepFeedForward, conv
from interlayer.models import DiT

U_DIT, ISOTROPIC, PLAIN = "u-dit", "isotropic dit", "plain u-net"
LONGER, NO_SKIPS, ALL = "isotropic dit, twice as long", "without skips", "attention over all pixels"
POOLED, SWAPPED = "pooled tokens", "tiles put back transposed"
IN_PLACE, NO_IDENTITY = "folded in place", "folded without the identity"
OPEN, OUTSIDE = "gates open at first", "gate around the sum"

LEARNED = (U_DIT, ISOTROPIC, LONGER, PLAIN, NO_SKIPS)


class Pooled(DownSampledAttention):
    """Attention over the means of tiles, given back to all pixels of the tile: fewer tokens, where U-DiT has more groups."""

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:  # type: ignore[override]
        """Let every tile read from the others."""
        if self.sampler is not None:
            x = x + conv(self.sampler, x)
        means = F.avg_pool2d(x.movedim(-1, 1), self.down).movedim(1, -1)
        mixed = Attention.forward(self, means.flatten(1, 2), Context(position=self.position)).view_as(means)
        return mixed.repeat_interleave(self.down, 1).repeat_interleave(self.down, 2)


class Swapped(DownSampledAttention):
    """``merge`` with rows and columns of a tile exchanged."""

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:  # type: ignore[override]
        """Mix, and put tokens back in the wrong places."""
        tiles = super().forward(x).unflatten(2, (-1, self.down)).unflatten(1, (-1, self.down))
        return tiles.transpose(2, 4).flatten(3, 4).flatten(1, 2)


class InPlace(RepFeedForward):
    """Evaluation mode folds the small kernels into the weights of the large one, as in the authors' code."""

    def train(self, mode: bool = True) -> InPlace:
        """Fold on the way to evaluation."""
        if not mode:
            with torch.no_grad():
                self.conv5.weight.copy_(self.kernel()[0])
        return super().train(mode)


class NoIdentity(RepFeedForward):
    """Without the shortcut around the three kernels when it folds."""

    def folded(self) -> nn.Module:  # type: ignore[override]
        """The layer with finished weights, one term short."""
        plain = super().folded()
        with torch.no_grad():
            plain.conv.weight[:, :, 2, 2] -= 1
        return plain


class Outside(AdaLNBlock):
    """``gate (x + f)`` for ``x + gate f``."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Run the mixer alone; that is enough to see the difference."""
        shift, scale, gate, *_ = self.modulation(c, x.ndim - 2)
        return gate * (x + self.mixer(self.norm(x) * (1 + scale) + shift))


@configured
class NoSkips(UDiT):
    """All information passes through the lowest resolution."""

    def join(self, x: Tensor, skipped: Tensor) -> Tensor:
        """Leave the skipped features out."""
        return super().join(x, torch.zeros_like(skipped))


def build(arm: str, scale: Scale, **options: Any) -> nn.Module:
    """The network of an arm; those that are compared have equal FLOPs."""
    given = {"classes": 10, **options}
    if arm in (ISOTROPIC, LONGER):
        return DiT(scale.channels, scale.side, **scale.isotropic, **given)
    plain = {"down": 1, "ffn": "plain", "cosine": False, "rotary": False}
    parts: dict[str, dict[str, Any]] = {
        PLAIN: plain,
        IN_PLACE: {"ffn": InPlace},
        NO_IDENTITY: {"ffn": NoIdentity},
    }
    return (NoSkips if arm == NO_SKIPS else UDiT)(
        scale.channels, scale.side, **scale.sizes, **parts.get(arm, {}), **given
    )


def inputs(scale: Scale, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images, times and classes at random."""
    shape = (count, scale.channels, scale.side, scale.side)
    return torch.randn(shape), torch.randint(1000, (count,)), torch.randint(10, (count,))


@torch.no_grad()
def tokens(arm: str) -> dict[str, float]:
    """What an attention layer costs and keeps.

    ``pairs``: pairs of pixels that are scored, as a share of all: the layer's FLOPs without its linear maps and convolution, over
    those of all pairs. ``round trip``: how far the layer's output is from its input where attention gives each token's value
    back, and all linear maps are the identity.
    """
    side, width = 8, 16
    make = {POOLED: Pooled, SWAPPED: Swapped}.get(arm, DownSampledAttention)
    layer = make(width, 2, (side, side), down=1 if arm == ALL else 2)
    x = torch.randn(1, side, side, width)
    kept = side**2 if arm != POOLED else side**2 // 4
    linear = 2 * kept * 4 * width**2 + (0 if layer.sampler is None else 2 * side**2 * width * 25)
    pairs = (flops(layer, x) - linear) / (4 * width * side**4)
    weights = dict(layer.named_parameters())
    for p in weights.values():
        p.zero_()
    weights["qkv.weight"][2 * width :] = weights["out.weight"][:] = torch.eye(width)
    layer.mix = lambda q, k, v, mask=None: v  # type: ignore[method-assign]
    return {"pairs": pairs, "round trip": float((layer(x) - x).abs().max())}


@torch.no_grad()
def folding(arm: str, scale: Scale) -> dict[str, float]:
    """``fold``: how far a folded model is from the model, after two calls of ``eval()``; a share of its largest output."""
    model = build(arm, scale, dropout=0.0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    given = inputs(scale, 4)
    before = model(*given)
    model.eval().train().eval()
    assert isinstance(model, UDiT)
    return {"fold": float((model.folded()(*given) - before).abs().max() / before.abs().max())}


@torch.no_grad()
def start(arm: str) -> dict[str, float]:
    """``change``: how far a block's output is from its input at initialisation, as a share of it."""
    width = 16
    mixer, mlp = DownSampledAttention(width, 2, (8, 8)), RepFeedForward(width, 32)
    block = (Outside if arm == OUTSIDE else AdaLNBlock)(width, mixer, mlp)
    if arm == OPEN:
        block.modulation.linear.bias.view(6, width)[2::3] = 1
    x = torch.randn(2, 8, 8, width)
    return {"change": float((block(x, torch.randn(2, width)) - x).norm() / x.norm())}


def learned(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """Train on digits by the authors' recipe (hybrid loss, AdamW without decay, constant rate, running mean of the weights) and judge.

    Digits must not be flipped, which the authors do to photographs.

    ``loss``: squared error of the noise in held-out digits. ``distance``: of samples from held-out digits
    (``generate.tasks``). ``FLOPs``: of one forward pass for an image, folded, in millions.
    """
    enlarged = scale.side // 8
    process, (images, classes) = Diffusion(variance="learned", levels=17), digit_images(enlarged)["train"]
    model = built(partial(build, arm, scale), seed)
    generator = torch.Generator().manual_seed(seed)

    def batches() -> Iterator[Tensor]:
        while True:
            yield torch.randint(len(images), (scale.batch,), generator=generator)

    def loss(model: nn.Module, index: Tensor) -> Tensor:
        return process.loss(model, images[index], classes[index], generator=generator)

    mean = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(scale.decay))

    def watch(step: int, loss: float) -> bool:
        mean.update_parameters(model)
        return False

    steps = scale.steps * (2 if arm == LONGER else 1)
    fit(model, batches(), loss, steps=steps, lr=scale.rates[arm], seed=seed, watch=watch)
    model = mean.module.eval()
    task, asked = digits_diffusion(enlarged), torch.arange(scale.samples) % 10
    shape = (scale.samples, 1, scale.side, scale.side)
    drawn = sample(model, process, DDIM(), shape, asked, seed=seed, steps=scale.sampling, clip=1.0)
    one = tuple(t[:1] for t in inputs(scale, 2))
    return {
        "loss": task.error(lambda given: model(**given)[:, :1]),
        **task.quality(drawn, asked),
        "FLOPs": flops(model.folded() if isinstance(model, UDiT) else model, *one) / 1e6,
    }


def measure(arm: str, seed: int, scale: Scale) -> Mapping[str, float]:
    """What the arm has a part in."""
    found: dict[str, float] = {}
    if arm in (U_DIT, ALL, POOLED, SWAPPED):
        found |= tokens(arm)
    if arm in (U_DIT, IN_PLACE, NO_IDENTITY):
        found |= folding(arm, scale)
    if arm in (U_DIT, OPEN, OUTSIDE):
        found |= start(arm)
    if arm in scale.rates:
        found |= learned(arm, seed, scale)
    return found


CLAIM = Claim(
    says="Down-sampling queries, keys and values leaves a quarter of the pairs and loses no token, and a U-shaped diffusion transformer "
    "with it has lower loss and better samples than an isotropic one at equal FLOPs, and than a plain U-shaped one.",
    measure=measure,
    build=build,
    arms=(U_DIT, ISOTROPIC, PLAIN, LONGER),
    statements=(
        mechanism(
            "Attention scores a quarter of the pairs of pixels that plain attention scores.",
            fits("pairs", U_DIT, low=0.2499, high=0.2501),
            control=ALL,
            mutant=POOLED,
        ),
        mechanism(
            "Every token keeps its place: splitting into groups and putting these back is the identity.",
            fits("round trip", U_DIT, high=1e-5),
            control=POOLED,
            mutant=SWAPPED,
        ),
        mechanism(
            "The folded model equals the model, also where evaluation mode was set twice before.",
            fits("fold", U_DIT, high=1e-4),
            control=IN_PLACE,
            mutant=NO_IDENTITY,
        ),
        mechanism(
            "Each block is the identity at initialisation.",
            fits("change", U_DIT, high=1e-6),
            control=OPEN,
            mutant=OUTSIDE,
        ),
        effect(
            "At equal FLOPs the loss is lower than that of an isotropic DiT.",
            lowest("loss", U_DIT, than=(ISOTROPIC,)),
            control=NO_SKIPS,
        ),
        effect(
            "At equal FLOPs samples are closer to real digits than those of an isotropic DiT.",
            lowest("distance", U_DIT, than=(ISOTROPIC,)),
            control=NO_SKIPS,
        ),
        effect(
            "At equal FLOPs the loss is lower than that of a plain U-shaped DiT.",
            lowest("loss", U_DIT, than=(PLAIN,)),
            control=NO_SKIPS,
        ),
    ),
    checks=(
        check("The isotropic DiT has learned most of the noise.", fits("loss", ISOTROPIC, high=0.2)),
        check("There is room: the isotropic DiT gets better in twice the steps.", lowest("loss", LONGER, than=(ISOTROPIC,))),
        check("U-DiT has 7.68 million FLOPs an image.", fits("FLOPs", U_DIT, low=7.68, high=7.69)),
        check("The isotropic DiT has as many within 1%, and not fewer.", fits("FLOPs", ISOTROPIC, low=7.69, high=7.76)),
        check("The plain U-shaped DiT has as many within 3%, and not fewer.", fits("FLOPs", PLAIN, low=7.69, high=7.91)),
    ),
    pilots="Seeds 1000 and 1001; rates 1e-3 (seed 1000), 3e-3 and 1e-2, running means of 0.95 and 0.98. "
    "With 3e-3 and 0.95 U-DiT had its lowest loss "
    "(.119, .120) and so had the plain U-shaped DiT (.117, .119); the isotropic DiT was within .001 of its lowest, at 1e-2 (.141, .141 "
    "against .140, .141), and had its best samples (.050, .045 from real digits; U-DiT .030, .028, the plain one .031, .026), so all "
    "take these. Classes are hardly obeyed after so few steps. The third effect is expected to stay undecided or come out contrary. "
    "An earlier version of this claim without the running mean, which the authors use, was measured on seeds 0 to 11: the loss of U-DiT "
    "was lower than that of the isotropic DiT by .013 [.001, .026] and higher than that of the plain U-shaped one by .003 [-.004, .009], "
    "distances differed by .001 [-.026, .029]; weights at a constant rate are too noisy to be judged. Without the mean, at 3e-3: U-DiT "
    ".136 and .136, with full attention .138 and .148, with pooled tokens .127 and .130; the plain U-shaped DiT .125 and .129, with "
    "down-sampled tokens .128 and .128: down-sampling costs nothing, and keeping every token brings nothing yet. With a block in every "
    "stage, batches of 32 and 300 steps, three times the cost, U-DiT (.103, .111) was level with the plain one (.104, .107), the "
    "isotropic one far behind (.135, .136).",
    scales={
        "smoke": {"channels": 1, "side": 8, "sizes": {"size": "nano", "width": 8, "depth": (1, 0, 0, 0, 0)},
                  "isotropic": {"depth": 1, "width": 8, "heads": 2}, "batch": 4, "steps": 1, "decay": 0.95, "samples": 10, "sampling": 1,
                  "rates": dict.fromkeys(LEARNED, 3e-3)},
        "small": {"channels": 1, "side": 8, "sizes": {"size": "nano", "depth": (1, 0, 1, 0, 1)},
                  "isotropic": {"depth": 4, "width": 68, "heads": 4},
                  "batch": 16, "steps": 200, "decay": 0.95, "samples": 100, "sampling": 10,
                  "rates": dict.fromkeys(LEARNED, 3e-3)},
        "full": {"channels": 1, "side": 32, "sizes": {"size": "S"}, "isotropic": {"depth": 12, "width": 384, "heads": 6},
                 "batch": 256, "steps": 20000, "decay": 0.9999, "samples": 300, "sampling": 50,
                 "rates": dict.fromkeys(LEARNED, 1e-4)},
    },
)  # fmt: skip
