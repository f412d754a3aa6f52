"""Dynamic layer tying: while a network trains, an agent decides which of its layers share their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.core import cost
from interlayer.core.example import Example
from interlayer.core.kinds import Rule
from interlayer.core.select import blocks as find_blocks

STARTS = ("tied", "free")


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Mean over all positions; classes are the last axis of the output."""
    return F.cross_entropy(output.flatten(0, -2), target.flatten())


class LayerTying(Rule):
    """Every few steps, a Q-learning agent decides whether a layer trains its own weights or copies an earlier layer.

    Paper: Hay and Wolf, "Dynamic Layer Tying for Parameter-Efficient Transformers", arXiv:2401.12819.

    The agent's state is the vector s with ``s_i = i`` where layer i has its own weights and ``s_i = j < i`` where it copies
    layer j. Layers other than the first are visited in turn. After ``every`` training steps the reward is the negative
    perplexity on a batch, clipped, and a network Q with one hidden layer and i + 1 actions for layer i moves towards
    ``r + discount * max_a Q_i(s', a)``. The agent explores with a probability that is multiplied by ``decay`` after each
    round over the layers. The defaults are those of the authors' code. There, only the layer
    that owns shared weights contributes to their gradient; here tied layers are the same parameter, with gradients from all of
    them, and a layer stays tied to the one it copies when that one is tied to another.

    A tied layer has no weights, gradients or moments of its own. A layer that is untied continues with a copy of the shared
    weights and of the optimiser's moments. Cost: one more forward pass every ``every`` steps.

    Args:
        model: Has repeated blocks of one structure; all other weights train as usual.
        loss: Called with the output and the target.
        every: Training steps between decisions.
        lr: Learning rate of AdamW for the model.
        weight_decay: Weight decay of the same.
        start: Initial state: ``tied``, where all layers copy the first, or ``free``.
        q_lr: Learning rate of AdamW for the agent.
        discount: Discount of future rewards.
        explore: Probability of a random action in the first round.
        decay: Factor by which each round multiplies it.
        least: Its minimum.
        clip: Bound of a reward's absolute value. At the authors' 10, all perplexities above 10 are the same to the agent.
        hidden: Hidden features of the agent's network.
        clip_norm: Largest norm of the model's gradient.
        seed: Seed of the agent.

    Shapes: a batch is (inputs, targets), as ``model`` and ``loss`` take them.

    Raises:
        ValueError: Unknown ``start``; blocks with different weights.

    Examples:
        >>> import torch
        >>> from interlayer.models import Transformer
        >>> rule = LayerTying(Transformer(vocab=20, length=8, depth=4, width=16, heads=2))
        >>> tokens = torch.zeros(2, 8, dtype=torch.long)
        >>> sorted(rule.step((tokens, tokens)))
        ['layers', 'loss', 'trainable']
        >>> rule.state[0]
        0
    """

    slug = "layer-tying"

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: Callable[[Any, Any], Tensor] = cross_entropy,
        every: int = 4,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        start: str = "tied",
        q_lr: float = 1e-3,
        discount: float = 0.99,
        explore: float = 1.0,
        decay: float = 0.95,
        least: float = 0.01,
        clip: float = 10.0,
        hidden: int = 128,
        clip_norm: float = 1.0,
        seed: int = 0,
    ) -> None:
        if start not in STARTS:
            raise ValueError(f"LayerTying: start {start!r} is not one of {STARTS}.")
        name, found = find_blocks(model)
        self.model, self.loss, self.every, self.clip_norm = model, loss, every, clip_norm
        self.blocks = list(found)
        kinds = [{n: p.shape for n, p in block.named_parameters()} for block in self.blocks]
        if other := [i for i, kind in enumerate(kinds) if kind != kinds[0]]:
            raise ValueError(
                f"LayerTying: the weights of block {other[0]} of {name or 'the model'} differ from those of block 0 in name "
                "or shape; only blocks of one structure can be tied."
            )
        self.discount, self.explore, self.decay, self.least, self.clip = discount, explore, decay, least, clip
        depth = len(self.blocks)
        self.draw = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.agent = nn.Sequential(nn.Linear(depth, hidden), nn.ReLU(), nn.Linear(hidden, depth * (depth + 1) // 2))
        self.agent_optimiser = torch.optim.AdamW(self.agent.parameters(), q_lr, weight_decay=0.01)
        inside = {id(p) for block in self.blocks for p in block.parameters()}
        rest = [p for p in model.parameters() if id(p) not in inside and p.requires_grad]
        groups = [{"params": list(block.parameters())} for block in self.blocks]
        self.optimiser = torch.optim.AdamW([*groups, {"params": rest}], lr, weight_decay=weight_decay)
        self.state = list(range(depth))
        self.steps = self.visited = 0
        self.acted: tuple[int, int, list[int]] | None = None
        if start == "tied":
            for layer in range(1, depth):
                self.act(layer, 0)

    def owner(self, layer: int) -> int:
        """The layer whose weights this one uses."""
        while self.state[layer] != layer:
            layer = self.state[layer]
        return layer

    def act(self, layer: int, action: int) -> None:
        """Let ``layer`` copy layer ``action``, or train its own weights if they are the same."""
        if not 0 <= action <= layer < len(self.blocks):
            raise ValueError(
                f"LayerTying: action {action} for layer {layer}; expected 0 to {layer}, itself or an earlier layer."
            )
        before = [self.owner(i) for i in range(len(self.blocks))]
        self.state[layer] = action
        for i in range(layer, len(self.blocks)):
            if (new := self.owner(i)) != before[i]:
                self._give(i, new, before[i])

    def _give(self, layer: int, owner: int, before: int) -> None:
        """Put the owner's parameters into a layer's block, or copies of its last ones if it owns them itself."""
        optimiser, group = self.optimiser, self.optimiser.param_groups[layer]
        if before == layer:
            for p in group["params"]:
                optimiser.state.pop(p, None)
            group["params"] = []
        fresh: list[nn.Parameter] = []
        for name, old in list(self.blocks[layer].named_parameters()):
            path, _, last = name.rpartition(".")
            new = self.blocks[owner].get_parameter(name)
            if owner == layer:
                new = nn.Parameter(old.detach().clone(), old.requires_grad)
                fresh.append(new)
                if old in optimiser.state:
                    optimiser.state[new] = {k: v.clone() for k, v in optimiser.state[old].items()}
            setattr(self.blocks[layer].get_submodule(path), last, new)
        if owner == layer:
            group["params"] = fresh

    def values(self, state: list[int], layer: int) -> Tensor:
        """The agent's values [layer + 1] of copying layer 0, 1, ... and, last, of own weights."""
        first = layer * (layer + 1) // 2
        return self.agent(torch.tensor(state, dtype=torch.float32))[first : first + layer + 1]

    def _learn(self, reward: float) -> None:
        """One step of Q-learning on the last action."""
        assert self.acted is not None
        layer, action, state = self.acted
        with torch.no_grad():
            target = max(-self.clip, min(self.clip, reward)) + self.discount * self.values(self.state, layer).max()
        error = F.mse_loss(self.values(state, layer)[action], target)
        self.agent_optimiser.zero_grad(set_to_none=True)
        error.backward()
        self.agent_optimiser.step()

    @torch.no_grad()
    def _decide(self, batch: Any) -> None:
        """Reward the last decision and take the next one."""
        if self.acted is not None:
            training = self.model.training
            loss = self.loss(self.model.eval()(batch[0]), batch[1])
            self.model.train(training)
            with torch.enable_grad():
                self._learn(-float(loss.exp()))
        rounds, place = divmod(self.visited, len(self.blocks) - 1)
        layer, state = place + 1, list(self.state)
        if torch.rand((), generator=self.draw) < max(self.least, self.explore * self.decay**rounds):
            action = int(torch.randint(layer + 1, (), generator=self.draw))
        else:
            action = int(self.values(state, layer).argmax())
        self.act(layer, action)
        self.acted, self.visited = (layer, action, state), self.visited + 1

    def step(self, batch: Any) -> dict[str, float]:
        """Train on one batch, after a decision of the agent where one is due. ``trainable`` counts parameters, ``layers`` untied ones."""
        if self.steps % self.every == 0:
            self._decide(batch)
        self.steps += 1
        loss = self.loss(self.model.train()(batch[0]), batch[1])
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.optimiser.step()
        own = sum(i == s for i, s in enumerate(self.state))
        return {"loss": float(loss.detach()), "trainable": cost.parameters(self.model, trainable=True), "layers": own}

    def optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        """The optimiser of the model; the agent's keeps its own learning rate."""
        return (self.optimiser,)

    def state_dict(self) -> dict[str, Any]:
        """Ties, agent, optimisers and the weights of the blocks.

        The weights are included because a new model may be tied differently, where one layer would overwrite another."""
        return {
            "ties": list(self.state),
            "weights": {str(i): b.state_dict() for i, b in enumerate(self.blocks) if self.state[i] == i},
            "steps": self.steps,
            "visited": self.visited,
            "acted": self.acted,
            "agent": self.agent.state_dict(),
            "agent_optimiser": self.agent_optimiser.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "draw": self.draw.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what ``state_dict`` returned; the caller loads the model's other weights."""
        if len(state["ties"]) != len(self.blocks):
            raise ValueError(
                f"LayerTying: the saved ties are of {len(state['ties'])} layers; the model has {len(self.blocks)}."
            )
        for layer, action in enumerate(state["ties"]):
            self.act(layer, action)
        for layer, weights in state["weights"].items():
            self.blocks[int(layer)].load_state_dict(weights)
        self.steps, self.visited = state["steps"], state["visited"]
        self.acted = state["acted"] and (state["acted"][0], state["acted"][1], list(state["acted"][2]))
        self.agent.load_state_dict(state["agent"])
        self.agent_optimiser.load_state_dict(state["agent_optimiser"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.draw.set_state(state["draw"])


def _rule() -> LayerTying:
    blocks = [nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU()) for _ in range(4)]
    return LayerTying(nn.Sequential(nn.Embedding(7, 16), nn.Sequential(*blocks), nn.Linear(16, 7)), every=2, lr=1e-2)


EXAMPLE = Example(make=_rule, inputs=lambda: tuple((x, (3 * x + 1) % 7) for x in torch.randint(7, (24, 8, 5))))
