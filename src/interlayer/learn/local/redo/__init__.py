"""ReDo: neurons that fell silent get new incoming weights, and outgoing weights of zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.core import aside, datasets
from interlayer.core.data import answer, run
from interlayer.core.example import Example
from interlayer.core.kinds import Rule
from interlayer.learn.local.redo.neurons import Hidden, hidden
from interlayer.learn.local.redo.recycling import Draw, Recycler, dormant, recycle, scores

__all__ = ["Hidden", "ReDo", "Recycler", "dormant", "hidden", "recycle", "scores"]


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Mean over all positions; classes are the last axis of the output."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


class ReDo(Rule):
    """Back-propagation with Adam that recycles dormant neurons every ``period`` steps.

    Paper: Sokar, Agarwal, Castro and Evci, "The Dormant Neuron Phenomenon in Deep Reinforcement Learning", arXiv:2302.12902.

    The score of neuron i among the H of layer l is ``s_i = mean |h_i(x)| / (1/H sum_k mean |h_k(x)|)`` (eq. 1), the means over a
    batch, and over positions where there are any. A neuron with ``s_i <= threshold`` is dormant. Recycling (algorithm 1) draws
    its incoming weights anew and sets its outgoing weights to zero; as in the authors' code its bias becomes zero too, Adam's moments
    of what changed are cleared while the step count stays, and the output layer is never recycled. A layer's scores are taken before
    anything changes, and a weight between two recycled neurons is zero.

    The outputs change by just what the recycled neurons gave. So on inputs where they are silent (``threshold=0`` on the batch of
    the scores) outputs stay as they were, and else ``|change of output| <= sum_i |W_out,i| |h_i|`` for a layer whose readers are the
    outputs. A norm over the neurons, between the layer and its readers, sees the new weights: there this does not hold.

    The paper's threshold is 0.1, and 0.025 at DQN's default replay ratio of 0.25 (confirmed by the authors in google/dopamine, issue
    226). The period of 1000 gradient steps and the 64 observations for scores, of its table 1, are taken from what others report of
    it: the table itself was not at hand. The defaults of the authors' classes, 0, 200 000 and 256, are not overridden by their
    configurations. Their code draws incoming weights from Xavier's uniform distribution, which also initialises most of their
    networks; give ``draw`` where yours differ. Two differences to it: the moments of biases are cleared too; and behind a flattened
    convolution the outgoing weights of the channel itself are zeroed, where their code repeats the mask for channels first on features
    with the channels last.

    What is a hidden layer is read off the wiring of the model; see ``hidden``. In a loop of reinforcement learning use
    ``Recycler``, and ``recycle`` in any other.

    Args:
        model: Any module that ``core.wiring.trace`` can follow.
        loss: Called with the output and the target.
        lr: Learning rate of AdamW.
        weight_decay: Weight decay of the same.
        threshold: The score at and below which a neuron is dormant.
        period: Steps from one recycling to the next.
        draw: Fills a weight as at initialisation, from torch's global generator.

    Shapes: a batch is (inputs, targets), as ``model`` and ``loss`` take them.

    Raises:
        ValueError: A threshold below 0 or a period below 1; when recycling is due, a model without hidden layers.

    Examples:
        >>> rule = ReDo(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), period=2)
        >>> [sorted(rule.step((torch.randn(16, 4), torch.arange(16) % 3))) for _ in range(2)]
        [['loss', 'recycled'], ['loss', 'recycled']]
    """

    slug = "redo"

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Callable[[Any, Any], Tensor] = cross_entropy,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        threshold: float = 0.1,
        period: int = 1000,
        draw: Draw = nn.init.xavier_uniform_,
    ) -> None:
        self.model, self.loss, self.steps = model, loss, 0
        self.recycler = Recycler(threshold, period, draw=draw)
        self.optimiser = torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay)

    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimiser."""
        return (self.optimiser,)

    def step(self, batch: tuple[Any, Tensor]) -> dict[str, float]:
        """Train on one batch, then recycle where it is due; ``recycled`` counts neurons."""
        inputs, target = batch
        with aside.collect() as told:
            loss = self.loss(answer(run(self.model.train(), inputs)), target)
        self.optimiser.zero_grad(set_to_none=True)
        (loss if told.loss is None else loss + told.loss).backward()
        self.optimiser.step()
        self.steps += 1
        due = self.steps % self.recycler.period == 0
        count = self.recycler.recycle(self.model, (inputs, target), self.optimiser) if due else 0
        return {"loss": float(loss.detach()), "recycled": count}

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state, and the steps that were taken."""
        return {"optimiser": self.optimiser.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned; the caller loads the model's weights."""
        self.optimiser.load_state_dict(state["optimiser"])
        self.steps = state["steps"]


def _rule() -> ReDo:
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 32), nn.ReLU(), nn.Linear(32, 10))
    return ReDo(net, period=4, threshold=0.3, lr=3e-3)


EXAMPLE = Example(make=_rule, inputs=lambda: datasets.digit_batches(32, centred=True))
