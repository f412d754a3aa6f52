"""RepQ-ViT: rounding of vision Transformers on fine grids that are folded into simple ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from interlayer.core.example import Example
from interlayer.core.extras import need
from interlayer.core.kinds import Plan, Transform
from interlayer.core.quantizer.grid import By
from interlayer.core.select import At
from interlayer.models import VisionTransformer
from interlayer.transform.quantize import _repq


class RepQViT(Transform):
    r"""Round weights, activations and the operands of attention of a trained Transformer, by ranges alone.

    Li et al., RepQ-ViT: Scale Reparameterization for Post-Training Quantization of Vision Transformers, ICCV 2023,
    arXiv:2212.08254, DOI 10.1109/ICCV51070.2023.01580. Two sorts of activations are hard to round: those after a LayerNorm, whose
    features differ in range, and probabilities, most of which are small. They get the grids that suit them, and a simpler model
    computes the same:

    - After a norm, each feature has a scale :math:`s` and a zero point :math:`z`. With :math:`\tilde s = \mathrm{mean}(s)`,
      :math:`\tilde z = \mathrm{mean}(z)`, :math:`r_1 = s / \tilde s` and :math:`r_2 = z - \tilde z`, the gain and bias of the norm
      become :math:`\gamma / r_1` and :math:`(\beta + s \odot r_2) / r_1`, and the weight and bias of each map that reads it
      :math:`r_1 \odot W` and :math:`b - W (s \odot r_2)`. One scale for all features then gives the same codes.
    - Probabilities have levels at powers of :math:`\sqrt 2`, which are shifts and one factor by parity:
      :math:`s \sqrt 2^{-q} = s\, 2^{-\lceil q / 2 \rceil} (1 + (\sqrt 2 - 1) [q\ \mathrm{odd}])`. The last code is 0 here, so that
      codes fit into ``bits``; the authors' code has that 0 beside the :math:`2^{bits}` levels.

    Weights are rounded by output channel after the fold. All other inputs, and queries, keys and values, have one scale; inputs of
    convolutions 8 bits, as in the authors' code. A norm without a bias, such as RMSNorm, takes symmetric grids, whose scales alone
    are folded; a map without a bias gets one. The averaged zero point stays unrounded, as theirs.

    Cost: one pass over the data with attention unfused, and the search of the ranges. Memory: a copy of the model, and a sample of
    each activation for each batch.

    Args:
        bits: Of weights and activations, 2 to 8.
        by: How ranges are chosen; see ``Grid.fit``. The authors take the best of the percentiles 99.9, 99.99 and 99.999 by the squared
            error.
        at: Which layers and attentions. Defaults to all that can be.

    Shapes: any.

    Raises:
        ValueError: ``bits`` or ``by`` out of range; from ``plan``: no calibration data, or no layer that runs on it.

    Examples:
        >>> net, x = VisionTransformer(1, 8, patch=4, classes=3, depth=1, width=8, heads=2), torch.rand(4, 1, 8, 8)
        >>> new = RepQViT(bits=6).plan(net, x).apply()
        >>> new.trunk.blocks[0].mixer.qkv
        Packed([24, 8], 6 bits asymmetric, inputs=6 bits affine)
        >>> new.trunk.blocks[0].mixer.attend.probabilities
        Round(6 bits log sqrt2)
    """

    slug: ClassVar[str] = "repq-vit"

    def __init__(self, *, bits: int = 4, by: By = 99.9, at: At | None = None) -> None:
        checked(self.slug, bits, by)
        self.bits, self.by, self.at = bits, by, at

    def plan(self, model: nn.Module, data: Any = None, *, others: Sequence[nn.Module] = ()) -> Plan:
        """List the layers and attentions with their grids; ``apply`` folds and packs."""
        self.take(others)
        options = {"bits": self.bits, "by": self.by}
        return _repq.plan(self.slug, model, data, bits=self.bits, by=self.by, at=self.at, options=options)


def checked(slug: str, bits: int, by: By) -> None:
    """Raise ValueError for options out of range."""
    if not (isinstance(bits, int) and 2 <= bits <= 8):
        raise ValueError(f"{slug}: bits {bits!r}; expected an integer from 2 to 8.")
    if by not in ("minmax", "mse") and not (isinstance(by, int | float) and 50 < by <= 100):
        raise ValueError(f"{slug}: by={by!r}; expected 'minmax', 'mse' or a percentile above 50 and at most 100.")


def _plain() -> tuple[nn.Module, Tensor]:
    return VisionTransformer(1, 8, patch=4, classes=3, depth=1, width=8, heads=2), torch.rand(2, 1, 8, 8)


def _vit() -> tuple[nn.Module, Any]:
    hf: Any = need("transformers", "hf", "repq-vit.EXAMPLE")
    config = hf.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4, num_channels=1
    )  # fmt: skip
    return hf.ViTForImageClassification(config), {"pixel_values": torch.rand(2, 1, 8, 8)}


EXAMPLE = Example(make=RepQViT, inputs=_plain, hf=_vit)
