"""What rules of adaptation are measured against: the source model, the statistics of the batch, and TENT."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from interlayer.core.online import Adapter, entropy


class Source(Adapter):
    """The trained model as it is.

    Examples:
        >>> import torch
        >>> from interlayer.core.online import Shift, adapt_online
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> stream = [Shift("noise", torch.randn(6, 1, 2, 2), torch.arange(6) % 2)]
        >>> len(adapt_online(Source(model), stream, batch=4).wrong["noise"])
        6
    """

    slug, statistics = "source", False

    def __init__(self, model: nn.Module, *, lr: float = 1e-3) -> None:
        super().__init__(model, rate=0.0, lr=lr)

    def respond(self, inputs: Any) -> Float[Tensor, "B K"]:
        """Answer."""
        return self.run(inputs)


class BatchStatistics(Source):
    """BatchNorm normalises by each test batch in place of its running statistics; nothing is learned.

    Paper: Nado et al., "Evaluating Prediction-Time Batch Normalization for Robustness under Covariate Shift", arXiv:2006.10963.

    Raises:
        ValueError: The model has no BatchNorm.
    """

    slug, statistics = "batch-statistics", True

    def __init__(self, model: nn.Module, *, lr: float = 1e-3) -> None:
        if not any(isinstance(m, _BatchNorm) for m in model.modules()):
            raise ValueError(
                f"BatchStatistics: {type(model).__name__} has no BatchNorm, so no statistics; expected at least one. Take Source or Tent."
            )
        super().__init__(model, lr=lr)


class Tent(Adapter):
    """The gains and biases of norms learn to lower the entropy of the predictions, on the statistics of each batch.

    Paper: Wang et al., "Tent: Fully Test-time Adaptation by Entropy Minimization", arXiv:2006.10726. The answer is that of the
    forward pass before the update, as in their code, whose Adam at 0.001 is the default. They take BatchNorm alone; LayerNorm and
    GroupNorm, which others added for transformers, are taken too.

    Args:
        model: A trained classifier with norms that have gains and biases.
        rate: Learning rate of Adam while adapting.
        lr: Learning rate of Adam for training the source in ``step``.

    Raises:
        ValueError: The model has no such norm, or a rate is below 0.
    """

    slug = "tent"

    def __init__(self, model: nn.Module, *, rate: float = 1e-3, lr: float = 1e-3) -> None:
        super().__init__(model, rate=rate, lr=lr)
        if not self.trained():
            raise ValueError(
                f"Tent: {type(model).__name__} has no norm with a gain and a bias; expected BatchNorm, LayerNorm or GroupNorm."
            )

    def trained(self) -> dict[str, Tensor]:
        """Gains and biases of norms."""
        norms = {n: m for n, m in self.model.named_modules() if isinstance(m, _BatchNorm | nn.LayerNorm | nn.GroupNorm)}
        return {f"{n}.{k}": p for n, m in norms.items() for k, p in m.named_parameters(recurse=False)}

    def respond(self, inputs: Any) -> Float[Tensor, "B K"]:
        """Answer, then lower the mean entropy."""
        logits = self.run(inputs)
        self.lower(entropy(logits).mean())
        return logits
