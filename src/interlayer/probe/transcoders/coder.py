"""Transcoders and sparse autoencoders: the layer, its loss, and its training."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

TINY = 1e-6


class Coder(nn.Module):
    """A wide sparse layer ``z = relu(W_enc (x - b_in) + b_enc)``, ``y = W_dec z + b_out``, whose decoder vectors have unit norm.

    Args:
        inputs: Features D of the input.
        outputs: Features O of the output.
        features: Sparse features F.
        tied: Whether ``b_out`` is ``b_in``, as in a sparse autoencoder.

    Shapes: [*, D] to [*, O]; ``encoder`` [F, D] and ``decoder`` [F, O] hold a feature in each row.

    Examples:
        >>> Coder(4, 6, 32)(torch.zeros(3, 4)).shape
        torch.Size([3, 6])
    """

    def __init__(self, inputs: int, outputs: int, features: int, *, tied: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Parameter(torch.empty(features, inputs))
        self.bias = nn.Parameter(torch.zeros(features))
        self.decoder = nn.Parameter(torch.empty(features, outputs))
        self.before = nn.Parameter(torch.zeros(inputs))
        self.after = self.before if tied else nn.Parameter(torch.zeros(outputs))
        nn.init.kaiming_uniform_(self.encoder, mode="fan_out")
        nn.init.normal_(self.decoder)
        self.normalise()

    @torch.no_grad()
    def normalise(self) -> None:
        """Scale the decoder vectors to unit norm."""
        self.decoder.div_(self.decoder.norm(dim=1, keepdim=True))

    def scores(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B F"]:
        """The features before the rectifier."""
        return F.linear(x - self.before, self.encoder, self.bias)

    def encode(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B F"]:
        """The activations of the features."""
        return self.scores(x).relu()

    def decode(self, z: Float[Tensor, "*B F"]) -> Float[Tensor, "*B O"]:
        """The output for given activations."""
        return z @ self.decoder + self.after

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B O"]:
        return self.decode(self.encode(x))


def relative(error: Float[Tensor, "B O"], size: Float[Tensor, "B O"]) -> Float[Tensor, "B O"]:
    """Squared error over the norm (not the squared norm) of the target, which counts as a hundredth of the mean at least."""
    norm = size.norm(dim=-1, keepdim=True)
    return error.square() / torch.maximum(norm, norm.mean() / 100 + TINY)


def loss(
    coder: Coder, x: Float[Tensor, "B D"], y: Float[Tensor, "B O"], l1: float, dead: Bool[Tensor, " F"] | None = None
) -> tuple[Tensor, Float[Tensor, "B F"]]:
    """``mean((y' - y)^2 / |y|) + l1 mean_batch(sum_i z_i)``, and the ghost gradients of dead features; and the activations.

    Ghost gradients: dead features alone, with ``exp`` for the rectifier and their output scaled to half the residual's norm,
    fit the residual ``y - y'``; that term is scaled to the size of the first. (The authors' code takes ``x - y'``, which is the
    same for an autoencoder; for a transcoder ``x`` is not what it reconstructs.)

    Args:
        coder: The transcoder or autoencoder.
        x: Inputs.
        y: Targets.
        l1: Coefficient of the sparsity penalty.
        dead: Which features are dead.
    """
    scores = coder.scores(x)
    z = scores.relu()
    out = coder.decode(z)
    error = relative(out - y, y)
    total = error.mean() + l1 * z.sum(-1).mean()
    if dead is not None and bool(dead.any()):
        residual = y - out
        ghost = scores[:, dead].exp() @ coder.decoder[dead]
        half = residual.norm(dim=-1, keepdim=True) / (TINY + 2 * ghost.norm(dim=-1, keepdim=True))
        fit = relative(ghost * half.detach() - residual.detach(), residual.detach())
        total = total + ((error / (fit + TINY)).detach() * fit).mean()
    return total, z


class Trainer:
    """Adam with unit decoder vectors: the gradient along each is removed, linear warm-up, ghost gradients for dead features.

    Args:
        coder: Trained in place.
        l1: Coefficient of the sparsity penalty.
        lr: Learning rate; the authors' 4e-4.
        warmup: Steps until it is reached.
        patience: Steps without firing after which a feature counts as dead.
    """

    def __init__(self, coder: Coder, l1: float, *, lr: float = 4e-4, warmup: int = 0, patience: int = 5000) -> None:
        self.coder, self.l1, self.lr, self.warmup, self.patience = coder, l1, lr, warmup, patience
        self.optimiser = torch.optim.Adam(coder.parameters(), lr=lr, fused=True)
        self.steps = 0
        self.idle = torch.zeros(len(coder.bias), dtype=torch.long, device=coder.bias.device)

    def step(self, x: Float[Tensor, "B D"], y: Float[Tensor, "B O"]) -> Tensor:
        """One step; returns the loss."""
        decoder = self.coder.decoder
        self.optimiser.param_groups[0]["lr"] = self.lr * min(1.0, (self.steps + 1) / (self.warmup + 1))
        dead = self.idle > self.patience if self.steps > self.patience else None
        total, z = loss(self.coder, x, y, self.l1, dead)
        self.optimiser.zero_grad(set_to_none=True)
        total.backward()
        with torch.no_grad():
            assert decoder.grad is not None
            along = (decoder.grad * decoder).sum(1, keepdim=True)
            decoder.grad.addcmul_(along, decoder, value=-1)
            self.idle = torch.where(z.amax(0) > 0, 0, self.idle + 1)
        self.optimiser.step()
        self.coder.normalise()
        self.steps += 1
        return total.detach()


def fit(
    x: Float[Tensor, "N D"],
    y: Float[Tensor, "N O"],
    features: int,
    l1: float,
    *,
    steps: int,
    batch: int = 1024,
    lr: float = 4e-4,
    tied: bool = False,
) -> Coder:
    """Train a coder from x to y on batches drawn from torch's global generator; biases begin at the means.

    Inputs and targets are scaled to a mean norm of ``sqrt(width)``, as a norm gives, and the scales are folded into the weights
    afterwards, so that the result does not depend on the scale of the activations.

    Args:
        x: Inputs.
        y: Targets; the same as ``x`` for an autoencoder.
        features: Sparse features.
        l1: Coefficient of the sparsity penalty.
        steps: Steps of Adam; the first twelfth warms up, as in the authors' run, and a feature that has not fired for a third is dead.
        batch: Samples of a step.
        lr: Learning rate.
        tied: Whether the biases of input and output are one.
    """
    sizes = [v.norm(dim=-1).mean().clamp(min=TINY) / v.shape[-1] ** 0.5 for v in (x, y)]
    x, y = x / sizes[0], y / sizes[1]
    with torch.enable_grad():
        coder = Coder(x.shape[-1], y.shape[-1], features, tied=tied).to(x.device)
        with torch.no_grad():
            coder.before.copy_(x.mean(0))
            coder.after.copy_(y.mean(0))
        trainer = Trainer(coder, l1, lr=lr, warmup=steps // 12, patience=steps // 3)
        for _ in range(steps):
            rows = torch.randint(len(x), (min(batch, len(x)),)).to(x.device)
            trainer.step(x[rows], y[rows])
    with torch.no_grad():
        coder.encoder.mul_(sizes[1] / sizes[0])
        coder.bias.mul_(sizes[1])
        coder.before.mul_(sizes[0])
        if not tied:
            coder.after.mul_(sizes[1])
    return coder.requires_grad_(False)
