"""Static memory below its safe voltage: how often it errs, what an access costs, and how many accesses a model makes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import nn

from interlayer.core import taps
from interlayer.core.quantizer.layers import is_conv1d
from interlayer.core.quantizer.nearest import LAYERS

# Share of faulty bits by voltage over the lowest one without errors: 32 arrays of 512 x 64 bits in 14 nm, measured by
# Chandramoorthy et al., HPCA 2019, doi:10.1109/HPCA.2019.00034; the numbers are those plotted by Stutz et al., MLSys 2021.
CURVE = (
    (18 / 24, 0.2056), (19 / 24, 0.05573), (20 / 24, 0.01115), (21 / 24, 0.00129), (22 / 24, 6.86646e-5), (23 / 24, 1.90735e-6),
)  # fmt: skip
VOLTAGES = np.array([v for v, _ in CURVE])
LOGARITHMS = np.log([rate for _, rate in CURVE])


def error_rate(volts: float) -> float:
    """The share of faulty bits at a supply voltage, between the measured points log-linear.

    Args:
        volts: Voltage over the lowest one without errors (Vmin), 0.75 or more. From 1 on there are no errors.

    Raises:
        ValueError: Below what was measured.

    Examples:
        >>> round(error_rate(20 / 24), 5), error_rate(1.0)
        (0.01115, 0.0)
    """
    if not volts >= VOLTAGES[0]:
        raise ValueError(
            f"error_rate: {volts!r} of the lowest voltage without errors; expected at least {VOLTAGES[0]}."
        )
    if volts >= 1:
        return 0.0
    # Above the last measured point the line of the last two goes on.
    slope = (LOGARITHMS[-1] - LOGARITHMS[-2]) / (VOLTAGES[-1] - VOLTAGES[-2])
    beyond = LOGARITHMS[-1] + slope * (volts - VOLTAGES[-1])
    return float(np.exp(np.interp(volts, VOLTAGES, LOGARITHMS) if volts <= VOLTAGES[-1] else beyond))


def voltage(rate: float) -> float:
    """The voltage over Vmin at which that share of bits is faulty; the inverse of ``error_rate``.

    Args:
        rate: 0, or 1.9e-6 to 0.2, as measured.

    Raises:
        ValueError: Outside of what was measured.

    Examples:
        >>> round(voltage(0.01), 4)
        0.8354
    """
    if rate == 0:
        return 1.0
    lowest, highest = CURVE[-1][1], CURVE[0][1]
    if not lowest <= rate <= highest:
        raise ValueError(f"voltage: rate {rate!r}; expected 0, or {lowest:g} to {highest:g}, as was measured.")
    return float(np.interp(math.log(rate), LOGARITHMS[::-1], VOLTAGES[::-1]))


def access_energy(volts: float) -> float:
    """Dynamic energy of an access over that at Vmin, at the same clock: the square of the voltage.

    >>> round(access_energy(20 / 24), 4)
    0.6944
    """
    return volts**2


def weight_reads(model: nn.Module, *inputs: Any, bits: int = 8, array: int = 32, word: int = 64) -> float:
    """How many words of weights a systolic array reads for one example, output-stationary.

    ``sum over layers: weights x ceil(positions / array) x bits / word``: an array of ``array`` rows holds as many output positions
    (pixels or tokens) at once, and every weight is read once for each such fold. A transposed convolution counts as the convolution
    of stride 1 whose output it reads. Products of weights in other modules, such as ``nn.MultiheadAttention``'s first, do not count.

    Args:
        model: Any module.
        *inputs: Positional arguments of the model.
        bits: Bits of a weight.
        array: Rows of the array.
        word: Bits of a word.

    Raises:
        ValueError: The model has no linear map or convolution.

    Examples:
        >>> weight_reads(nn.Sequential(nn.Conv2d(1, 8, 3, padding=1)), torch.zeros(1, 1, 8, 8))  # 72 weights, 64 pixels
        18.0
    """
    transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d

    def counts(name: str, layer: nn.Module) -> bool:
        return isinstance(layer, (*LAYERS, transposed)) or is_conv1d(layer)

    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    total = 0.0
    if not any(counts(*each) for each in model.named_modules()):
        raise ValueError(
            f"weight_reads: {type(model).__name__} has no linear map or convolution; expected one that runs."
        )
    with taps.at_rest(model), torch.no_grad(), taps.read(model, counts, every=True) as seen:
        model(*inputs)
    for name, outputs in seen.items():
        layer: Any = model.get_submodule(name)
        for out in outputs:
            if isinstance(layer, transposed):
                sides: Any = zip(out.shape[2:], layer.kernel_size, layer.padding, strict=True)
                places = math.prod(int(side + 2 * pad - kernel + 1) for side, kernel, pad in sides)
            elif isinstance(layer, kinds):
                places = math.prod(out.shape[2:])
            else:
                places = math.prod(out.shape[1:-1])
            total += layer.weight.numel() * math.ceil(places / array) * bits / word
    return total
