"""RepQuant part by part on a small vision Transformer and a small language model, beside RepQ-ViT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from interlayer.claims import Claim, Scale, check, effect, fits, lowest, mechanism
from interlayer.claims.harness import Statement
from interlayer.claims.training import calibration_texts, divergence, judge
from interlayer.claims.transform.quantize import fptq as text
from interlayer.claims.transform.quantize import repq_vit as image
from interlayer.core.kinds import Transform
from interlayer.core.quantizer import Grid, Packed, Scaled
from interlayer.core.quantizer.grid import By
from interlayer.transform.quantize import _repq
from interlayer.transform.quantize.repq_vit import RepQViT
from interlayer.transform.quantize.repquant import RepQuant

CASES = (("images", 4), ("texts", 4), ("texts", 3))
RANGES: tuple[By, ...] = (99.9, "mse")  # every arm takes the best for each seed
RATE = 0.05


class Misplaced(RepQuant):
    """The control: ranges of other features, and weights rebuilt for inputs in another order."""

    def clip(self, model: nn.Module, data: list[Any], found: Mapping[str, list[str]], held: _repq.Ranges) -> None:
        """The learned scales and zero points of each feature go to the next one."""
        super().clip(model, data, found, held)
        image.misplaced(model, data, found, held)

    def rebuilt(
        self, layer: nn.Module, packed: Packed, moment: Tensor, cross: Tensor, off: Tensor, near: Tensor
    ) -> Packed:
        """As if the features came in another order."""
        order = torch.arange(len(moment)).roll(1)
        return super().rebuilt(layer, packed, moment[order][:, order], cross[order][:, order], off[order], near[order])


WAYS: dict[str, Callable[..., Transform]] = {
    "repq-vit": RepQViT,
    "clipping": lambda **o: RepQuant(**o, reconstruct=False),
    "reconstruction": lambda **o: RepQuant(**o | {"steps": 0}),
    "both": RepQuant,
    "misplaced": Misplaced,
}
CLIPS = ("clipped", "sides exchanged", "one share")
BUILDS = ("rebuilt", "inputs misplaced", "sign reversed")


def build(arm: str, scale: Scale) -> nn.Module:
    """The vision Transformer."""
    return image.build(arm, scale)


@torch.no_grad()
def clipped(arm: str, seed: int) -> float:
    """Squared error of a map's outputs on rounded inputs, as a share of that with whole ranges; some values are far out, on one side."""
    torch.manual_seed(seed)
    x, layer = 3 + torch.randn(2, 2048, 16), nn.Linear(16, 24, bias=False)
    x = torch.where(torch.rand_like(x) < 0.001, 10 + x, x)  # far above the rest
    grid = Grid(3, -1, "affine")
    held = grid.fit(x[0])
    found = RepQuant(bits=8, steps=80, lr=0.3).clipped(x[0], layer.weight, held)
    low, high = (-found.zero * found.scale, (grid.high - found.zero) * found.scale)
    if arm == "sides exchanged":
        found = Scaled(grid, *grid.cover(-high, -low))
    elif arm == "one share":  # the same width about the middle of the range
        middle = (grid.high / 2 - held.zero) * held.scale
        found = Scaled(grid, *grid.cover(middle - (high - low) / 2, middle + (high - low) / 2))
    errors = [float(layer(each.fake(x[1]) - x[1]).square().mean()) for each in (found, held)]
    return errors[0] / errors[1]


@torch.no_grad()
def rebuilt(arm: str, seed: int) -> float:
    """Squared error of a packed map's outputs on new inputs, as a share of that of the weight itself; inputs have 2 bits."""
    torch.manual_seed(seed)
    x, layer = torch.randn(2, 1024, 8) @ torch.randn(8, 32) + 0.3 * torch.randn(2, 1024, 32), nn.Linear(32, 24)
    held, grid = Grid(2, kind="asymmetric").fit(x[0]), Grid(8, 0, "asymmetric")  # inputs alone lose much
    near = held.fake(x[0])
    start = Packed(layer, grid.fit(layer.weight), inputs=held)
    parts = [near.mT @ near, (x[0] - near).mT @ near, (x[0] - near).mean(0), near.mean(0)]
    if arm == "inputs misplaced":
        parts = [p.roll(1, -1) if p.ndim == 1 else p.roll((1, 1), (0, 1)) for p in parts]
    elif arm == "sign reversed":
        parts[1] = -parts[1]
    new = RepQuant(bits=8).rebuilt(layer, start, *parts)
    errors = [float((m(x[1]) - layer(x[1])).square().mean()) for m in (new, start)]
    return errors[0] / errors[1]


def measure(arm: str, seed: int, scale: Scale) -> Mapping[str, float]:
    """Divergence of held-out predictions from the float model's, by model and bits, at the best of three ranges."""
    if arm in CLIPS:
        return {"clipping": clipped(arm, seed)}
    if arm in BUILDS:
        return {"reconstruction": rebuilt(arm, seed)}
    words = Scale(
        depth=scale.depth, width=max(16, scale.width), length=scale.length, steps=scale.steps, calibration=4, judged=4
    )
    if arm == "float":
        whole = judge(image.base(seed, scale), image.TASK, batch=64, most=scale.judged)["accuracy"]
        return {
            "accuracy, float": whole,
            "loss, float": text.scores(text.base("as trained", seed, words), "as trained", seed, words)[0],
        }
    found = dict[str, float]()
    for what, bits in CASES:
        learned = {} if arm == "repq-vit" else {"steps": scale.learning, "lr": RATE}
        ways = [WAYS[arm](bits=bits, by=by, **learned) for by in RANGES[-1 if arm == "misplaced" else 0 :]]
        if what == "images":
            net, data = image.base(seed, scale), image.calibration(seed)
            made = [w.plan(net, data).apply() for w in ways]
            apart = [divergence(m, net, image.TASK, most=scale.judged) for m in made]
        else:
            net, texts = text.base("as trained", seed, words), calibration_texts(seed, words)
            apart = [text.scores(w.plan(net, texts).apply(), "as trained", seed, words)[1] for w in ways]
        found[f"{what}, {bits} bits"] = min(apart)
    return found


def gain(arm: str, what: str, bits: int) -> Statement:
    """A lower divergence than RepQ-ViT's."""
    part = {"both": "both parts", "clipping": "clipping alone", "reconstruction": "reconstruction alone"}[arm]
    model = {"images": "the vision Transformer", "texts": "the language model"}[what]
    return effect(
        f"At {bits} bits, with {part}, {model} diverges less from the float one than with RepQ-ViT.",
        lowest(f"{what}, {bits} bits", arm, than=("repq-vit",)),
        control="misplaced",
    )


CLAIM = Claim(
    says="Clipping that is learned for both sides of each feature, and weights rebuilt for rounded inputs, bring the outputs of maps "
    "nearer to what they were. At 4 bits for weights, inputs and attention, a small vision Transformer and a small language model "
    "diverge less from the float ones with RepQuant than with RepQ-ViT, and the language model at 3 bits too; so does each part alone.",
    measure=measure,
    build=build,
    arms=("float", "repq-vit", "clipping", "reconstruction", "both", "clipped", "rebuilt"),
    statements=(
        mechanism(
            "On features with a few values far out on one side, learned clipping leaves at most 0.7 of the error of whole ranges.",
            fits("clipping", "clipped", high=0.7),
            control="sides exchanged",
            mutant="one share",
        ),
        mechanism(
            "On new inputs rounded to 2 bits, a rebuilt weight leaves at most 0.7 of the error of the weight itself.",
            fits("reconstruction", "rebuilt", high=0.7),
            control="inputs misplaced",
            mutant="sign reversed",
        ),
        *(gain("both", what, bits) for what, bits in CASES),
        *(gain("clipping", what, bits) for what, bits in CASES),
        *(gain("reconstruction", what, bits) for what, bits in CASES),
    ),
    checks=(
        check("The vision Transformer has learned; chance is 0.1.", fits("accuracy, float", "float", low=0.7)),
        check("The language model has learned; chance is 5.5.", fits("loss, float", "float", high=2.6)),
        check("RepQ-ViT leaves room at 4 bits.", fits("images, 4 bits", "repq-vit", low=0.01)),
    ),
    pilots="Divergence in 1e-3 nats. Vision Transformer as in RepQ-ViT's claim, 400 steps, seeds 1000 to 1002, ranges by mse: 4 bits, "
    "RepQ-ViT 32.7, 28.6, 38.1; reconstruction 29.5, 34.7, 30.7. Clipping whose loss left the rounding of the folded weight out: 42.1, "
    "50.0, 36.1 after 100 steps at 0.1; with it, at 0.03, 31.5, 30.1, 37.3, at 0.1, 37.3, 33.7, 43.7. At 3 bits RepQ-ViT 416, "
    "421, 297; reconstruction 191, 211, 329; both at 0.03 184, 230, 336; left out of the claim, for accuracy is lost there. Language "
    "model of FPTQ's claim, 300 steps, seeds 1000 and 1001, best of three ranges, at 4 and 3 bits: RepQ-ViT 14.5, 16.7 and 77, 87; "
    "clipping (100 steps, 0.03) 14.1, 16.8 and 77, 73; reconstruction 11.3, 12.3 and 45, 55; both 12.0, 12.9 and 46, 53. A "
    "diagonal of 0.1 or 1 of the mean in place of 0.01 was no better in all. The claim takes 40 steps at 0.05 and two ranges, for "
    "time: seed 1002, images 29.1, clipping 29.8, reconstruction 26.6, both 20.6; texts 17.6, 18.4, 16.0, 15.7 and 95.5, 90.9, "
    "48.9, 52.2. Little is expected of clipping, as trained features have no outliers here.",
    scales={
        "smoke": {"depth": 1, "width": 8, "training": 2, "judged": 1, "learning": 2, "length": 8, "steps": 2},
        "small": {"depth": 2, "width": 32, "training": 300, "judged": 8, "learning": 40, "length": 32, "steps": 300},
        "full": {"depth": 12, "width": 384, "training": 50000, "judged": 64, "learning": 1000, "length": 1024, "steps": 100000},
    },
)  # fmt: skip
