"""D'OH: what one code moves, what a file gives back, and photographs at equal bytes against layers that are stored themselves."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.claims import Claim, Scale, check, effect, fits, highest, mechanism
from interlayer.core import datasets
from interlayer.core.config import configured
from interlayer.core.fields import BITS, Implicit, dequantize, grid, quantize
from interlayer.layers.hyper.doh import DOH

SINE: dict[str, Any] = {"activation": "sine", "frequencies": 0}
RELU: dict[str, Any] = {"activation": "relu", "frequencies": 5}
WIDTH, DEPTH = 32, 3  # of what D'OH makes at every rate
CROP, LEAST = 128, 0.1  # pixels of a photograph, averaged to `scale.side`, and their smallest standard deviation


def basis(model: DOH) -> Tensor:
    """The projections of all layers, one below the other."""
    return cast(Tensor, model.projection)


def change(model: DOH, projection: Tensor) -> None:
    """Make the layers by other projections."""
    model.register_buffer("projection", projection, persistent=False)


@configured
class Apart(DOH):
    """A twin: each layer has a part of the code to itself, as long as its share of the weights; the bytes are the same."""

    def __init__(self, inputs: int, outputs: int, **options: Any) -> None:
        super().__init__(inputs, outputs, **options)
        sizes, total = [o * i for o, i in self.layout.shapes], len(self.latent)
        parts = [max(1, round(total * size / sum(sizes))) for size in sizes]
        parts[1] += total - sum(parts)
        masks = [torch.full((size, part), (total / part) ** 0.5) for size, part in zip(sizes, parts, strict=True)]
        change(self, basis(self) * torch.block_diag(*masks))


@configured
class Hidden(DOH):
    """A mutant: the code makes the hidden layers alone."""

    def __init__(self, inputs: int, outputs: int, **options: Any) -> None:
        super().__init__(inputs, outputs, **options)
        first, *_, last = (o * i for o, i in self.layout.shapes)
        change(self, F.pad(basis(self)[first:-last], (0, 0, first, last)))


@configured
class Drawn(DOH):
    """A control: the projections are drawn without the seed."""

    def __init__(self, inputs: int, outputs: int, **options: Any) -> None:
        super().__init__(inputs, outputs, **options)
        change(self, torch.randn_like(basis(self)) * basis(self).std(1, keepdim=True))


@configured
class Unscaled(DOH):
    """A mutant: ``W_l = B_l z``, without the scale of the layer."""

    def __init__(self, inputs: int, outputs: int, **options: Any) -> None:
        super().__init__(inputs, outputs, **options)
        change(self, basis(self) / basis(self).std(1, keepdim=True) / len(self.latent) ** 0.5)


OURS, OURS_RELU, COIN, MLP, APART = "doh", "doh, ReLU", "coin", "mlp", "a code for each layer"
AGAIN, AGAIN_RELU = "a code for each layer, other projections", "a code for each layer, ReLU"
DRAWN, HIDDEN, UNSCALED = "seed not kept", "hidden layers alone", "no scale"
# Class, options and learning rate; see `pilots`.
ARMS: dict[str, tuple[type[nn.Module], dict[str, Any], float]] = {
    OURS: (DOH, SINE, 4e-2),
    OURS_RELU: (DOH, RELU, 4e-2),
    COIN: (Implicit, SINE, 5e-3),
    MLP: (Implicit, RELU, 4e-2),
    APART: (Apart, SINE, 4e-2),
}
TWINS: dict[str, tuple[type[nn.Module], dict[str, Any], float]] = {
    AGAIN: (Apart, SINE, 4e-2),
    AGAIN_RELU: (Apart, RELU, 4e-2),
    DRAWN: (Drawn, SINE, 0.0),
    HIDDEN: (Hidden, SINE, 0.0),
    UNSCALED: (Unscaled, SINE, 0.0),
}


def photograph(seed: int, side: int) -> tuple[Tensor, Tensor]:
    """Coordinates and grey values of a part of one of 16 photographs, the first of those drawn that is not almost flat."""
    draw = torch.Generator().manual_seed(seed)
    spread = 0.0
    while spread < LEAST:
        name = datasets.PHOTOGRAPHS[int(torch.randint(len(datasets.PHOTOGRAPHS), (1,), generator=draw))]
        picture = torch.from_numpy(datasets.photograph(name).copy()).float() / 255
        grey = picture if picture.ndim == 2 else picture.mean(-1)
        top, left = (int(torch.randint(n - CROP + 1, (1,), generator=draw)) for n in grey.shape)
        part = F.adaptive_avg_pool2d(grey[None, None, top : top + CROP, left : left + CROP], side)
        spread = float(part.std())
    return grid(side, side), part.flatten().unsqueeze(1)


def net(arm: str, size: int, seed: int = 0) -> Any:
    """The network of an arm that fits ``size`` bytes, with projections of the seed."""
    make: Any
    make, options, _ = (ARMS | TWINS)[arm]
    if make is Implicit:
        return Implicit.within(size, 2, 1, depth=2, **options)
    other = 1000 * (arm == AGAIN)
    return make.within(size, 2, 1, width=WIDTH, depth=DEPTH, seed=seed + other, **options)


def build(arm: str, scale: Scale) -> nn.Module:
    """The network of the higher rate."""
    return net(arm, scale.high)


@torch.no_grad()
def moved(model: DOH) -> float:
    """Share of the layers that a number of the code moves: the smallest of all numbers."""
    rows = basis(model).abs().split([o * i for o, i in model.layout.shapes])
    return float(torch.stack([part.amax(0) > 0 for part in rows]).float().mean(0).min())


@torch.no_grad()
def file_error(model: DOH, seed: int) -> float:
    """How far a file's values are from the equation's, ``W_l = s_l B_l z``, with B_l drawn anew from the seed."""
    with tempfile.TemporaryDirectory() as folder:
        code = model.save(path := Path(folder) / "code", BITS)
        given = type(model).load(path)(x := grid(9, 9))
    draw = torch.Generator().manual_seed(seed)
    shapes = model.layout.shapes
    basis = torch.randn(sum(o * i for o, i in shapes), len(code.latent), generator=draw) / len(code.latent) ** 0.5
    omega = model.layout.omega
    scales = [3**-0.5 / 2, *[(2 / i) ** 0.5 / omega for _, i in shapes[1:-1]], (3 * WIDTH) ** -0.5]
    h = x
    for i, (b, scale, shape) in enumerate(zip(basis.split([o * i for o, i in shapes]), scales, shapes, strict=True)):
        bias = code.biases[WIDTH * i : WIDTH * i + shape[0]]
        h = h @ (scale * (b @ code.latent)).view(shape).T + bias
        h = torch.sin(omega * h) if i < DEPTH else h
    return float((given - h).abs().max() / h.abs().max())


def learned(arm: str, seed: int, size: int, scale: Scale) -> float:
    """Peak signal-to-noise ratio of the photograph after training and quantisation."""
    x, y = photograph(seed, scale.side)
    torch.manual_seed(seed)
    model, lr = net(arm, size, seed), (ARMS | TWINS)[arm][2]
    optimiser = torch.optim.Adam(model.parameters(), lr)
    for step in range(scale.steps):
        optimiser.param_groups[0]["lr"] = lr * (1 - step / scale.steps)
        loss = F.mse_loss(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.no_grad():
        if isinstance(model, DOH):
            model = model.quantized(BITS)
        else:
            for p in model.parameters():
                p.copy_(dequantize(*quantize(p, BITS)))
        return -10 * math.log10(float(F.mse_loss(model(x).clamp(0, 1), y)))


def measure(arm: str, seed: int, scale: Scale) -> dict[str, float]:
    """What a number of the code moves, what a file gives back, and quality at two rates, with its gain from the lower."""
    torch.manual_seed(seed)
    found: dict[str, float] = {}
    make, options, lr = (ARMS | TWINS)[arm]
    if make is not Implicit and options["activation"] == "sine":
        model = net(arm, scale.high, seed)
        found = {"layers moved": moved(model), "error of a file": file_error(model, seed + 1000 * (arm == AGAIN))}
    if lr:
        found["PSNR"] = learned(arm, seed, scale.high, scale)
    if arm in ARMS:
        found["PSNR at the lower rate"] = learned(arm, seed, scale.low, scale)
        found["gain of bytes"] = found["PSNR"] - found["PSNR at the lower rate"]
    return found


CLAIM = Claim(
    says="Every number of D'OH's code moves every layer, and a file gives back the network of the equation from its code and its seed; at "
    "800 bytes, with one network at every rate, photographs have a higher PSNR than with a network of equal bytes that stores its "
    "layers (COIN's with sines, a ReLU network with positional encoding), and than with a code for each layer.",
    measure=measure,
    build=build,
    arms=ARMS,
    statements=(
        mechanism(
            "The number of the code that moves the fewest layers moves all of them",
            fits("layers moved", OURS, low=0.999),
            control=AGAIN,
            mutant=HIDDEN,
        ),
        mechanism(
            "A stored file gives the values of the equation, with the projections drawn from its seed",
            fits("error of a file", OURS, high=1e-4),
            control=DRAWN,
            mutant=UNSCALED,
        ),
        effect(
            "With sines the PSNR at 800 bytes is higher than that of COIN's network",
            highest("PSNR", OURS, than=(COIN,)),
            control=AGAIN,
        ),
        effect(
            "With ReLUs the PSNR at 800 bytes is higher than that of a ReLU network with positional encoding",
            highest("PSNR", OURS_RELU, than=(MLP,)),
            control=AGAIN_RELU,
        ),
        effect(
            "One code for all layers gives a higher PSNR at 800 bytes than a code for each layer",
            highest("PSNR", OURS, than=(APART,)),
            control=AGAIN,
        ),
    ),
    checks=(
        *(check(f"{arm}: 800 bytes give a higher PSNR than 150", fits("gain of bytes", arm, low=0.0)) for arm in ARMS),
        check("COIN's network reaches 22 dB at 800 bytes", fits("PSNR", COIN, low=22.0)),
    ),
    first_seed=100,
    pilots="Seeds 1000 to 1003, rates with 300 full-batch steps of Adam and a linear decay, mean PSNR at 700 bytes: D'OH 23.5, 23.9, 24.5 "
    "and 24.7 at .01, .02, .04 and .08, code for each layer 24.5, 25.3 and 24.8 at .02, .04 and .08, COIN 30.8 and 29.5 at .005 and "
    ".01, D'OH with ReLUs 20.5, 20.9 and 20.7 at .02, .04 and .08, ReLU network 23.0 and 23.4 at .02 and .04. D'OH with ReLUs hardly "
    "rose from 300 to 700 bytes (0.2), hence 450 steps; 600 and 900 steps at .02, .04 and .01 gave 21.5, 22.0 and 21.6. With 450 "
    "steps, mean at 200 and 800 bytes: D'OH 24.2 and 25.7, code for each layer 24.3 and 25.9, COIN 25.2 and 31.7, D'OH with ReLUs "
    "21.0 and 21.7, ReLU network 21.2 and 24.1. A first run on seeds 0 to 11 with these, on any part of a photograph, was void: with "
    "a code for each layer the gain of bytes stayed undecided (1.2 [-0.8, 3.3]), as two almost flat parts had 32 to 39 dB. There D'OH "
    "was 7.1 below COIN, with ReLUs 5.3 below the ReLU network, and 1.1 [0.03, 2.2] below a code for each layer after 4 seeds, 0.2 "
    "over all 12. Now almost flat parts are drawn again, the lower rate is 150 bytes, and photographs, projections and initial values "
    "are of new seeds, 100 and up. Seeds 1000 to 1007 of these, at 200 and 800 bytes: D'OH 24.6 and 25.9, code for each layer 24.5 "
    "and 26.2, D'OH with ReLUs 20.1 and 20.9, and at half its rate 18.7 at 150 and 20.3 at 800. Earlier figures, of 48 x 48 pixels of "
    "three photographs and of a solid, had no pilots.",
    scales={
        "smoke": {"side": 12, "low": 150, "high": 800, "steps": 2},
        "small": {"side": 32, "low": 150, "high": 800, "steps": 450},
        "full": {"side": 256, "low": 10_000, "high": 40_000, "steps": 20_000},
    },
)
