"""D'OH: generate all layers of an implicit representation from one latent code by fixed random projections."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from interlayer.core import datasets
from interlayer.core.config import configured
from interlayer.core.data import DataShape
from interlayer.core.example import Example
from interlayer.core.fields import Layout, dequantize, grid, quantize, stored_bytes


@configured
class DOH(nn.Module):
    """A signal as a latent code, from which a random, untrained decoder-only hypernetwork makes every layer.

    Paper: Gordon et al., "D'OH: Decoder-Only Random Hypernetworks for Implicit Neural Representations", arXiv:2403.19163.

    Equation: layer l of the implicit network has the weights ``W_l = s_l B_l z`` with one code z for all layers, learned for
    this signal alone, and a fixed random ``B_l`` that is drawn from ``seed`` and never stored. A stored signal is the code, the
    biases, which are learned directly, and the seed. Here B_l is Gaussian with variance 1 / latent, z is standard normal at
    initialisation, and ``s_l`` is the usual standard deviation of that layer's weights at initialisation, so that the generated
    network is initialised as an ordinary one (with sines, the last layer as a linear one, as the code cannot grow for one
    layer alone). The paper's distributions could not be verified: no code of the authors was found, by title,
    by method or by their names on GitHub, and of the paper only abstract and introduction could be read.

    The footprint is ``latent`` numbers and the biases for any network, so that the rate is chosen without a search over
    architectures. For a network of P weights, a forward pass costs P latent multiply-adds more than the network, and as much
    memory.

    Args:
        inputs: Coordinates D.
        outputs: Values C.
        latent: Numbers in the code.
        width: Features of each hidden layer of the network.
        depth: Hidden layers.
        activation: ``relu`` or ``sine``.
        frequencies: Number of frequencies of the positional encoding; 0 for none.
        omega: Frequency of the sines.
        seed: Seed of the projections.

    Shapes: coordinates [..., D] to values [..., C].

    Raises:
        ValueError: A size below 1, an unknown activation, coordinates of another dimension.

    Examples:
        >>> import tempfile
        >>> image = DOH(2, 1, latent=100, seed=7)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     stored = image.save(f"{folder}/image.safetensors", bits=8)
        ...     again = DOH.load(f"{folder}/image.safetensors")
        >>> torch.equal(again(grid(5, 5)), stored(grid(5, 5))), again.bits(8)  # the code and 97 biases
        (True, 1576)
    """

    def __init__(
        self,
        inputs: int = 2,
        outputs: int = 1,
        *,
        latent: int = 500,
        width: int = 32,
        depth: int = 3,
        activation: str = "relu",
        frequencies: int = 6,
        omega: float = 30.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if latent < 1:
            raise ValueError(f"DOH: latent {latent}; expected at least 1 number in the code.")
        self.layout = Layout(
            inputs, outputs, width=width, depth=depth, activation=activation, frequencies=frequencies, omega=omega
        )
        generator = torch.Generator().manual_seed(seed)
        spread, shapes = self.layout.spread(), self.layout.shapes
        if activation == "sine":
            spread[-1] = ((3 * width) ** -0.5, spread[-1][1])
        scale = torch.cat([torch.full((o * i,), w) for (o, i), (w, _) in zip(shapes, spread, strict=True)])
        projection = torch.randn(len(scale), latent, generator=generator, dtype=torch.float32)
        projection *= (scale / latent**0.5).unsqueeze(1)
        self.register_buffer("projection", projection, persistent=False)
        self.latent = nn.Parameter(torch.randn(latent))
        initial = [b * 3**0.5 * (2 * torch.rand(o) - 1) for (o, _), (_, b) in zip(shapes, spread, strict=True)]
        self.biases = nn.Parameter(torch.cat(initial))

    @classmethod
    def for_task(cls, shape: DataShape, **options: Any) -> Self:
        """A representation for a task with vectors of coordinates as inputs, with sines, in 1800 bytes (``size=``)."""
        if shape.kind != "vector":
            raise ValueError(f"DOH: takes vectors of coordinates, not {shape.kind}.")
        options = {"activation": "sine", "frequencies": 0, **options}
        if "latent" in options:
            return cls(shape.features, shape.classes, **options)
        return cls.within(options.pop("size", 1800), shape.features, shape.classes, **options)

    @classmethod
    def within(cls, size: int, inputs: int, outputs: int, *, width: int = 32, depth: int = 3, **options: Any) -> Self:
        """The network with a code that fills ``size`` bytes, its biases included; see ``core.fields.stored_bytes``."""
        latent = size - stored_bytes([0, width * depth + outputs])
        return cls(inputs, outputs, latent=latent, width=width, depth=depth, **options)

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """Weight, as generated from the code, and bias of each layer."""
        shapes = self.layout.shapes
        weights = (self.projection @ self.latent).split([o * i for o, i in shapes])  # type: ignore[operator]
        biases = self.biases.split([o for o, _ in shapes])
        return [(w.view(shape), b) for w, b, shape in zip(weights, biases, shapes, strict=True)]

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B C"]:
        """Values at coordinates."""
        return self.layout(x, self.layers())

    def bits(self, bits: int) -> int:
        """Size of code and biases in bits, at so many bits for each number."""
        return bits * sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def quantized(self, bits: int) -> Self:
        """A copy with code and biases rounded to a uniform grid of 2^bits values from the minimum to the maximum."""
        new = type(self)(**self.config).to(self.latent)  # type: ignore[arg-type]
        for mine, its in zip(self.parameters(), new.parameters(), strict=True):
            its.copy_(dequantize(*quantize(mine.detach().cpu().float(), bits)))
        return new

    def save(self, path: str | Path, bits: int = 8) -> Self:
        """Write the quantised numbers, with bits packed, and what is needed to build the network again.

        Returns:
            The model that ``load`` will give.

        Raises:
            ValueError: ``bits`` is not between 1 and 16.
        """
        if not 1 <= bits <= 16:
            raise ValueError(f"DOH: bits {bits}; expected 1 to 16.")
        packed: dict[str, Tensor] = {}
        grids: dict[str, list[float]] = {}
        for name, p in self.named_parameters():
            levels, *grids[name] = quantize(p.detach().cpu().float(), bits)
            packed[name] = torch.from_numpy(np.packbits((levels.numpy()[:, None] >> np.arange(bits)) & 1))
        header = json.dumps({"config": self.config, "bits": bits, "grids": grids})
        Path(path).write_bytes(save(packed, metadata={"doh": header}))
        return self.quantized(bits)

    @classmethod
    @torch.no_grad()
    def load(cls, path: str | Path) -> Self:
        """The model of a file that ``save`` wrote.

        Raises:
            ValueError: The file was not written by ``save``.
        """
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if "doh" not in metadata:
                raise ValueError(f"DOH: {path} is not a file that DOH.save() wrote.")
            header = json.loads(metadata["doh"])
            model, bits = cls(**header["config"]), header["bits"]
            for name, p in model.named_parameters():
                rows = np.unpackbits(file.get_tensor(name).numpy(), count=p.numel() * bits).reshape(-1, bits)
                levels = torch.from_numpy((rows.astype(np.int64) << np.arange(bits)).sum(1))
                p.copy_(dequantize(levels, *header["grids"][name]))
        return model


def _picture() -> tuple[float, float]:
    """Squared error on a 32 x 32 grey photograph after 150 steps, and that of its mean."""
    pixels = torch.from_numpy(datasets.photograph("china")[:416, :416].copy()).float().mean(-1) / 255
    y = torch.nn.functional.adaptive_avg_pool2d(pixels[None], 32).flatten()[:, None] - 0.5
    model, x = DOH(2, 1, latent=200, width=16, depth=2), grid(32, 32)
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        loss = (model(x) - y).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return float(loss.detach()), float(y.var(correction=0))


EXAMPLE = Example(
    make=lambda: DOH(2, 3, latent=20, width=8, depth=2, frequencies=3, seed=5),
    inputs=lambda: (2 * torch.rand(4, 7, 2) - 1,),
    odd=lambda: (2 * torch.rand(13, 2) - 1,),
    axis=1,
    modes={"sine": lambda: DOH(2, 3, latent=20, width=8, depth=2, activation="sine", frequencies=0)},
    train=_picture,
)
