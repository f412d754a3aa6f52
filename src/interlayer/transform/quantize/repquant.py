"""RepQuant: RepQ-ViT with clipping that is learned for each feature, and weights that make up for what rounding changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core import taps
from interlayer.core.example import Example, tiny_gpt2
from interlayer.core.kinds import Plan, Transform
from interlayer.core.quantizer import Grid, Packed, Scaled, columns, through, weight_of
from interlayer.core.quantizer.grid import By
from interlayer.core.quantizer.layers import axis_of
from interlayer.core.select import At
from interlayer.models import VisionTransformer
from interlayer.transform.quantize import _repq
from interlayer.transform.quantize.repq_vit import checked

KEPT = 2048  # rows of a norm's output that clipping is learned from
SHARE = 0.01  # of the mean of the diagonal, added to it before a matrix is inverted


class RepQuant(Transform):
    r"""Round a trained Transformer as RepQ-ViT does, with learned clipping and reconstructed weights.

    Li et al., RepQuant: Towards Accurate Post-Training Quantization of Large Transformer Models via Scale Reparameterization,
    arXiv:2402.05628. Beside RepQ-ViT's change of scales, exact here as there:

    - Dual clipping. After a norm, feature j of what the maps read has the range :math:`[\sigma(a_j) l_j, \sigma(b_j) u_j]`, where
      :math:`l_j` and :math:`u_j` are its smallest and largest value about its mean, and :math:`a`, :math:`b` are learned, so that
      the maps give their outputs with both rounded: :math:`\min \|W X - \hat W Q(X)\|^2`. Scales and zero points then follow, and
      fold. A norm without a bias has one share for both sides.
    - Reconstruction. With :math:`H = \hat X \hat X^\top` of the rounded inputs, the weight becomes
      :math:`W + W (X - \hat X) \hat X^\top (H + \lambda I)^{-1}`, which is rounded column by column (GPTQ) on the same :math:`H`; the
      bias takes up the mean that is left.

    The abstract names both parts; its equations could not be found, and the authors published no code for them. The forms above are
    derived from it: the sigmoid of the clipping, and reconstruction in closed form.

    Cost: RepQ-ViT's pass, ``steps`` steps of Adam on a sample of each norm's outputs, and one more pass. Memory: for each layer two
    matrices of [inputs, inputs], and a copy of the model.

    Args:
        bits: Of weights and activations, 2 to 8.
        by: How the ranges are chosen that are then learned; see ``Grid.fit``.
        steps: Of learning the clipping of each norm. 0 leaves it out.
        lr: Its rate.
        reconstruct: Whether weights are reconstructed.
        at: Which layers and attentions. Defaults to all that can be.

    Shapes: any.

    Raises:
        ValueError: An option out of range; from ``plan``: no calibration data, or no layer that runs on it.

    Examples:
        >>> net, x = VisionTransformer(1, 8, patch=4, classes=3, depth=1, width=8, heads=2), torch.rand(4, 1, 8, 8)
        >>> RepQuant(steps=2).plan(net, x).apply().trunk.blocks[0].mixer.qkv
        Packed([24, 8], 4 bits asymmetric, inputs=4 bits affine)
    """

    slug: ClassVar[str] = "repquant"

    def __init__(
        self,
        *,
        bits: int = 4,
        by: By = "mse",
        steps: int = 100,
        lr: float = 0.05,
        reconstruct: bool = True,
        at: At | None = None,
    ) -> None:
        checked(self.slug, bits, by)
        if not (isinstance(steps, int) and steps >= 0 and lr > 0):
            raise ValueError(f"repquant: steps {steps!r}, lr {lr}; expected an integer from 0 and a rate above 0.")
        self.bits, self.by, self.steps, self.lr, self.reconstruct, self.at = bits, by, steps, lr, reconstruct, at

    def plan(self, model: nn.Module, data: Any = None, *, others: Sequence[nn.Module] = ()) -> Plan:
        """List the layers and attentions with their grids; ``apply`` learns, folds, reconstructs and packs."""
        self.take(others)
        options = {k: getattr(self, k) for k in ("bits", "by", "steps", "lr", "reconstruct")}
        return _repq.plan(
            self.slug, model, data, bits=self.bits, by=self.by, at=self.at, options=options,
            refine=self.clip if self.steps else None, choose=self.rebuild if self.reconstruct else None,
        )  # fmt: skip

    def clip(self, model: nn.Module, data: list[Any], found: Mapping[str, list[str]], held: _repq.Ranges) -> None:
        """Learn the ranges of the features of each norm, in place."""
        if not found:
            return
        seen: dict[str, list[Tensor]] = {}

        def keep(name: str, x: Tensor) -> None:
            rows = x.flatten(0, -2)
            seen.setdefault(name, []).append(rows[:: -(-len(rows) * len(data) // KEPT)].clone())

        with taps.at_rest(model), torch.no_grad(), taps.watch(model, lambda n, m: n in found, keep):
            for _ in taps.feed(model, data):
                pass
        for norm, names in found.items():
            names = [n for n in names if n in held]
            if names and norm in seen:
                maps = torch.cat([weight_of(model.get_submodule(n)).detach() for n in names])
                held |= dict.fromkeys(names, self.clipped(torch.cat(seen[norm]), maps, held[names[0]]))  # type: ignore[arg-type]

    def clipped(self, x: Float[Tensor, "rows features"], maps: Float[Tensor, "out features"], held: Scaled) -> Scaled:
        """The best ranges of features on the way, for maps that read them."""
        x, maps = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (x, maps))
        grid, shape = held.grid, held.scale.shape
        low, high = (grid.low - held.zero) * held.scale, (grid.high - held.zero) * held.scale
        middle = x.mean(0).clamp(low, high) if grid.moves else torch.zeros_like(low)
        shares = torch.full((2, *shape), 4.0, device=x.device).requires_grad_()  # a sigmoid of 0.98
        rows, wanted = Grid(self.bits, 0, "asymmetric"), x @ maps.mT
        optimizer = torch.optim.Adam([shares], self.lr)
        best, chosen = torch.inf, held
        with torch.enable_grad():
            for step in range(self.steps + 1):
                part = shares.sigmoid() / torch.sigmoid(torch.tensor(4.0))  # 1 at first
                ends = middle + part[0] * (low - middle), middle + part[1] * (high - middle)
                scale, zero = grid.cover(*ends) if grid.moves else (held.scale * part.mean(0), held.zero)
                now = Scaled(grid, scale, zero)
                folded = maps * (ratio := now.scale / now.scale.mean())
                rounded = through(folded, rows, *rows.cover(folded.amin(1), folded.amax(1))) / ratio
                loss = (through(x, grid, now.scale, now.zero) @ rounded.mT - wanted).square().mean()
                if float(loss.detach()) < best:
                    best, chosen = float(loss.detach()), Scaled(grid, now.scale.detach(), now.zero.detach())
                if step < self.steps:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        return chosen

    def rebuild(
        self, model: nn.Module, folded: nn.Module, data: list[Any], packed: Mapping[str, Packed]
    ) -> dict[str, Packed]:
        """Codes and biases with which linear maps give their outputs on rounded inputs."""
        names = {n for n, m in packed.items() if axis_of(m.shape) == -1}  # a convolution keeps its nearest codes
        if not names:
            return dict(packed)
        sums: dict[str, list[Tensor]] = {}

        def add(name: str, x: Tensor) -> None:
            x = x.flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32))
            near = packed[name].scaled_inputs(x).fake(x)  # type: ignore[union-attr]
            new = [near.mT @ near, (x - near).mT @ near, (x - near).sum(0), near.sum(0), torch.tensor(float(len(x)))]
            old = sums.get(name)
            sums[name] = new if old is None else [a.add_(b) for a, b in zip(old, new, strict=True)]

        with taps.at_rest(folded), torch.no_grad(), taps.watch(folded, lambda n, m: n in names, add, side="input"):
            for _ in taps.feed(folded, data):
                pass
        found = dict(packed)
        for name, (moment, cross, off, near, count) in sums.items():
            layer = folded.get_submodule(name)
            found[name] = self.rebuilt(layer, packed[name], moment, cross, off / count, near / count)
        return found

    @torch.no_grad()
    def rebuilt(
        self, layer: nn.Module, packed: Packed, moment: Tensor, cross: Tensor, off: Tensor, near: Tensor
    ) -> Packed:
        """One linear map, from the sums over its rounded inputs and what rounding took away."""
        weight = weight_of(layer).detach().to(moment.dtype)
        damped = moment + SHARE * moment.diagonal().mean() * torch.eye(len(moment), device=moment.device)
        moved = weight + torch.linalg.solve(damped.double(), (weight @ cross).double().mT).mT.to(weight)
        held = packed.grid.fit(moved, self.by)
        codes, _ = columns(moved, moment[None], held, damp=SHARE)
        new = Packed(layer, held, codes=codes, inputs=packed._held("input_", packed.inputs))  # type: ignore[arg-type]
        if new.bias is not None:
            new.bias.add_((weight @ (off + near) - new.weight.to(weight) @ near).to(new.bias))
        return new


def _plain() -> tuple[nn.Module, Tensor]:
    return VisionTransformer(1, 8, patch=4, classes=3, depth=1, width=8, heads=2), torch.rand(2, 1, 8, 8)


EXAMPLE = Example(
    make=lambda: RepQuant(steps=2),
    inputs=_plain,
    hf=lambda: tiny_gpt2(
        1, length=4, named=True, n_embd=8, vocab_size=8, n_positions=8, bos_token_id=0, eos_token_id=0, pad_token_id=0
    ),
)
