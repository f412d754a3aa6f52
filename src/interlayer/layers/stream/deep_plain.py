"""Very deep plain convolutional nets: orthonormal filters and modulated backward errors instead of shortcuts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core import datasets
from interlayer.core.example import Example
from interlayer.core.kinds import Rule
from interlayer.core.stream import Norm, State, Stream, Width, layernorm, widths


class Plain(Stream):
    """The plain net of the paper as a stream: ``x_{l+1} = f_l(act(norm(x_l)))``, without shortcuts.

    In a ``ConvNet``, whose branch is conv, norm, act, conv, norm and activation thus follow every convolution.

    Args:
        depth: Number of units.
        width: Channels of a unit's input.
        outputs: Channels of a unit's output, where they differ.
        branches: Sublayers in a block.
        norm: Called with ``width=``.
        activation: Called without arguments.
    """

    def __init__(
        self,
        depth: int,
        width: Width,
        *,
        outputs: Width | None = None,
        branches: int = 1,
        norm: Norm | None = None,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__(depth, branches=branches)
        norm = norm or layernorm
        self.norms = nn.ModuleList(norm(width=w) for w in widths(width, self.layers))
        self.last = norm(width=widths(outputs or width, self.layers)[-1])
        self.act = activation()

    def read(self, state: State, layer: int) -> Tensor:
        return self.act(self.norms[layer](state.x))

    def write(self, state: State, layer: int, branch: Tensor) -> State:
        state.x = branch
        return state

    def finish(self, state: State) -> Tensor:
        return self.act(self.last(state.x))


def orthonormality(weights: list[Tensor]) -> Tensor:
    """``sum ||W' W - I||_F^2 / 2`` with the filters of a convolution as columns of W.

    At most as many filters as a filter has weights can be orthogonal; a convolution with more is split into several banks
    of filters, each orthonormal.

    Examples:
        >>> orthonormality([torch.eye(3)[:, :, None, None], 2 * torch.ones(1, 1, 1, 1)]).item()
        4.5
    """
    banks: dict[tuple[int, int], list[Tensor]] = {}
    for weight in weights:
        rows = weight.flatten(1)  # one filter in each row
        for bank in rows.split(rows.shape[1]):
            banks.setdefault(tuple(bank.shape), []).append(bank)
    total = weights[0].new_zeros(())
    for same in banks.values():  # one product for all banks of a size
        w = torch.stack(same)
        total = total + (w @ w.mT - torch.eye(w.shape[1], device=w.device, dtype=w.dtype)).square().sum() / 2
    return total


class DeepPlain(Rule):
    """SGD for deep Conv-BN-ReLU chains: orthonormal filters keep signals, and errors are rescaled on their way back.

    Paper: Xie et al., "All You Need is Beyond a Good Init: Exploring Better Solution for Training Extremely Deep
    Convolutional Neural Networks with Orthonormality and Modulation", arXiv:1703.01827.

    Regulariser: ``lambda / 2 sum_l ||W_l' W_l - I||_F^2`` over the filters of every bank, instead of weight decay
    (see ``orthonormality``). Modulation: with orthonormal filters an error should pass from one convolution to the one
    before with its norm unchanged (quasi-isometry); BN's scale breaks that by a factor in each layer, and the factors
    multiply. So the error at a convolution's output is multiplied by ``|e_{l+1}| / |e_l|``, the ratio to the already modulated
    error of the convolution after it, where it is off by more than a factor ``tolerance``. Filters are orthogonal at
    initialisation. When exactly the paper modulates, its constants, and whether it uses norms or mean squares, is not
    known: no code of the authors was found, by title or by the paper's number, and of its text only abstract, introduction and
    conclusion.

    Cost: one product of each weight with itself and one norm of each error.

    Args:
        model: A chain of convolutions (``ConvNet(stream=Plain)`` is one); in other nets the errors of parallel paths all get
            the same norm.
        strength: lambda; 0 leaves the regulariser out. The default is that of public code that cites the paper.
        modulate: Whether to rescale errors.
        tolerance: Factor by which an error may be off.
        orthogonal: Whether to initialise filters orthogonally, with norm one.
        lr: Learning rate of SGD.
        momentum: Momentum of SGD.

    Shapes: a batch is (images [B, C, H, W], labels [B]).

    Raises:
        ValueError: A model with fewer than two convolutions; a ``tolerance`` below 1.

    Examples:
        >>> import torch
        >>> from interlayer.models import ConvNet
        >>> rule = DeepPlain(ConvNet(1, 10, depth=20, width=8, stream=Plain))
        >>> batch = torch.randn(8, 1, 8, 8), torch.arange(8)
        >>> sorted(rule.step(batch))
        ['accuracy', 'loss', 'penalty']
        >>> len(rule.errors(batch))
        19
    """

    slug = "deep-plain"

    def __init__(
        self,
        model: nn.Module,
        *,
        strength: float = 1e-4,
        modulate: bool = True,
        tolerance: float = 1.0,
        orthogonal: bool = True,
        lr: float = 0.1,
        momentum: float = 0.9,
    ) -> None:
        self.convolutions = _convolutions(model)
        if len(self.convolutions) < 2:
            raise ValueError(
                f"DeepPlain: {type(model).__name__} has {len(self.convolutions)} convolutions; expected a chain of at least two."
            )
        if tolerance < 1:
            raise ValueError(f"DeepPlain: tolerance {tolerance} is below 1; expected a factor of at least 1.")
        self.model, self.strength, self.modulate, self.tolerance = model, strength, modulate, tolerance
        if orthogonal:
            for conv in self.convolutions.values():
                for bank in conv.weight.data.split(conv.weight[0].numel()):
                    nn.init.orthogonal_(bank)
        self.optimiser = torch.optim.SGD(model.parameters(), lr, momentum=momentum)

    def factor(self, above: Float[Tensor, ""], norm: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """By what an error of this norm is multiplied; ``above`` is the modulated norm at the convolution after it."""
        ratio = above / norm.clamp_min(torch.finfo(torch.float32).tiny)
        off = (ratio > self.tolerance) | (ratio < 1 / self.tolerance)
        off &= ratio.isfinite()  # an error of zero stays zero
        return torch.where(off, ratio, torch.ones_like(ratio))

    @contextmanager
    def _watching(self, model: nn.Module, norms: dict[str, Tensor]) -> Iterator[None]:
        """Modulate errors, if asked for, and collect their norms in ``norms``, last layer first; a context manager."""
        after: list[Tensor] = []

        def error(name: str, e: Tensor) -> Tensor | None:
            norm = torch.linalg.vector_norm(e.float())
            norms[name] = norm
            if not self.modulate:
                return None
            if not after:
                after.append(norm)
                return None
            ratio = self.factor(after[-1], norm)
            norms[name] = norm * ratio
            after.append(norms[name])
            return e * ratio.to(e.dtype)

        def see(name: str, module: nn.Module, args: Any, out: Tensor) -> None:
            if out.requires_grad:
                out.register_hook(partial(error, name))

        hooks = [conv.register_forward_hook(partial(see, name)) for name, conv in _convolutions(model).items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def step(self, batch: tuple[Tensor, Tensor]) -> dict[str, float]:
        """One step of SGD; ``loss`` is the task's, ``penalty`` the regulariser times its strength."""
        images, labels = batch
        self.optimiser.zero_grad(set_to_none=True)
        with self._watching(self.model, {}) if self.modulate else nullcontext():
            scores = self.model.train()(images)
            loss = F.cross_entropy(scores, labels)
            loss.backward()
        penalty = torch.zeros(())
        if self.strength:
            penalty = self.strength * orthonormality([c.weight for c in self.convolutions.values()])
            penalty.backward()
        self.optimiser.step()
        right = (scores.argmax(1) == labels).float().mean()
        return {"loss": float(loss.detach()), "accuracy": float(right), "penalty": float(penalty.detach())}

    def errors(self, batch: tuple[Float[Tensor, "B C H W"], Tensor]) -> dict[str, float]:
        """Norm of the error at each convolution's output, first layer first; the model is left unchanged."""
        norms: dict[str, Tensor] = {}
        model = copy.deepcopy(self.model).train()
        with self._watching(model, norms), torch.enable_grad():
            F.cross_entropy(model(batch[0]), batch[1]).backward()
        return {name: float(norms[name]) for name in self.convolutions if name in norms}

    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimiser."""
        return (self.optimiser,)

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state."""
        return {"optimiser": self.optimiser.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned."""
        self.optimiser.load_state_dict(state["optimiser"])


def _convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def _rule() -> DeepPlain:
    def triple(inputs: int, stride: int = 1) -> nn.Module:
        conv = nn.Conv2d(inputs, 8, 3, stride, padding=1, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU())

    chain = [triple(1), triple(8), triple(8, 2), triple(8)]
    return DeepPlain(nn.Sequential(*chain, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)))


EXAMPLE = Example(make=_rule, inputs=lambda: datasets.digit_batches(centred=True))
