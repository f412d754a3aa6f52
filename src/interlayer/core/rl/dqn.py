"""Deep Q-learning: a memory of transitions, a target network, and random actions less and less often."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.core import aside
from interlayer.core.fit import descend
from interlayer.core.rl.play import Episodes, Hook, Play, Update, greedy

Batch = tuple[Tensor, ...]  # observations, actions, rewards, following observations, whether it ended


class Replay:
    """The last ``size`` transitions, in a ring.

    Args:
        size: How many are kept.
        features: Numbers in an observation.

    Examples:
        >>> memory = Replay(4, 2)
        >>> for reward in (1.0, 2.0, 3.0):
        ...     memory.add(np.zeros((2, 2)), np.zeros(2), np.full(2, reward), np.ones((2, 2)), np.zeros(2, bool))
        >>> len(memory), sorted(set(memory.rewards.tolist()))
        (4, [2.0, 3.0])
    """

    def __init__(self, size: int, features: int) -> None:
        self.seen, self.next = torch.empty(size, features), torch.empty(size, features)
        self.actions = torch.empty(size, dtype=torch.long)
        self.rewards, self.ended = torch.empty(size), torch.empty(size)
        self.count = 0

    def __len__(self) -> int:
        return min(self.count, len(self.rewards))

    def add(self, seen: Any, actions: Any, rewards: Any, following: Any, ended: Any) -> None:
        """Keep a transition of each environment; ``ended`` only where no reward can follow, not at a time limit."""
        at = torch.arange(self.count, self.count + len(rewards)) % len(self.rewards)
        given = (seen, actions, rewards, following, ended)
        for kept, new in zip((self.seen, self.actions, self.rewards, self.next, self.ended), given, strict=True):
            kept[at] = torch.as_tensor(new).reshape(len(at), *kept.shape[1:]).to(kept.dtype)
        self.count += len(rewards)

    def sample(self, count: int, generator: torch.Generator) -> Batch:
        """``count`` transitions, with replacement."""
        at = torch.randint(len(self), (count,), generator=generator)
        return self.seen[at], self.actions[at], self.rewards[at], self.next[at], self.ended[at]


@dataclass(frozen=True)
class DQN:
    """Deep Q-learning (Mnih et al., doi:10.1038/nature14236).

    ``loss = huber(Q(s, a) - (r + discount (1 - ended) max_a' Q_target(s', a')))``; with ``double`` the action is chosen by
    Q and valued by Q_target (van Hasselt et al., arXiv:1509.06461).

    Args:
        steps: Environment steps in all, over all copies.
        copies: Environments that are stepped together.
        batch: Transitions in a gradient step.
        ratio: Replay ratio: gradient steps for each environment step once learning began; 0.25 is one for every four.
        lr: Learning rate of Adam.
        discount: Worth of the next reward.
        memory: Transitions that are kept.
        warm: Steps at random before learning begins.
        refresh: Gradient steps between copies of Q to the target network.
        explore: Share of random actions at the beginning and at the end.
        decay: Part of the run over which it falls, linearly.
        double: Whether to learn by double DQN.

    Raises:
        ValueError: A budget that leaves nothing to learn.

    Examples:
        >>> from interlayer.core.rl import evaluate, sizes
        >>> from interlayer.models import MLP
        >>> features, actions = sizes("CartPole-v1")
        >>> q = MLP(features, actions, depth=1, width=16)
        >>> run = DQN(steps=400, warm=100).train(q, "CartPole-v1", seed=0)
        >>> len(run.returns) == len(run.at) >= 3
        True
        >>> len(evaluate(q, "CartPole-v1", episodes=3, seed=1))
        3
    """

    steps: int = 20_000
    copies: int = 8
    batch: int = 64
    ratio: float = 0.125
    lr: float = 1e-3
    discount: float = 0.99
    memory: int = 20_000
    warm: int = 1000
    refresh: int = 100
    explore: tuple[float, float] = (1.0, 0.05)
    decay: float = 0.4
    double: bool = False

    def __post_init__(self) -> None:
        if min(self.copies, self.batch, self.memory, self.refresh) < 1 or self.warm < 0:
            raise ValueError(
                f"DQN: copies={self.copies}, batch={self.batch}, memory={self.memory}, refresh={self.refresh}, "
                f"warm={self.warm}; expected 1 at least, and warm 0 at least."
            )
        if self.ratio * (self.steps - self.warm) < 1:
            raise ValueError(
                f"DQN: steps={self.steps}, warm={self.warm}, ratio={self.ratio} leave no gradient step; expected "
                "ratio * (steps - warm) of 1 at least. Take more steps, or a shorter warm."
            )

    def train(self, q: nn.Module, name: str, *, seed: int, after: Hook | None = None) -> Episodes:
        """Train a network in place that maps [B, features] to a value for each action.

        Args:
            q: The network.
            name: Gymnasium environment with discrete actions.
            seed: Of the environments, the exploration and the batches.
            after: Called after each gradient step with an ``Update``; True ends the run.

        Returns:
            The episodes that ended in training.

        Raises:
            ValueError: The environment cannot be made or has no discrete actions, or the network's outputs do not fit it.
        """
        device = next(q.parameters()).device
        generator, chance = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        looks = torch.Generator().manual_seed(seed)  # what a hook observes changes no batch
        target, updates = _copy(q), 0
        optimiser = torch.optim.Adam(q.parameters(), self.lr)
        with Play(name, self.copies, seed) as play:
            play.check(q, play.actions, "a value for each action")
            memory = Replay(self.memory, play.features)

            def observe(count: int) -> Tensor:
                return memory.sample(count, looks)[0].to(device)

            for step in range(0, self.steps, self.copies):
                seen, random = play.seen, chance.random(self.copies) < self.exploration(step)
                actions = chance.integers(play.actions, size=self.copies)
                actions = np.where(random, actions, greedy(q, seen, play.actions))
                following, rewards, ended, _ = play.step(actions)
                memory.add(seen, actions, rewards, following, ended)
                if step < self.warm:
                    continue
                while updates < self.owed(play.steps):
                    batch = tuple(t.to(device) for t in memory.sample(self.batch, generator))
                    lost = partial(self.loss, q, target, batch)
                    loss, _ = descend(q, optimiser, lost, share=step / self.steps, clip=10.0)
                    updates += 1
                    if updates % self.refresh == 0:
                        target = _copy(q)
                    if after and after(Update(q, optimiser, batch[0], loss, updates, play.steps, observe)):
                        return play.episodes
        return play.episodes

    def owed(self, steps: int) -> int:
        """Gradient steps that should have been taken after that many environment steps."""
        learning = steps - -(-self.warm // self.copies) * self.copies
        return int(self.ratio * learning + 1e-6)

    def exploration(self, step: int) -> float:
        """Share of random actions at a step."""
        first, last = self.explore
        return max(last, first + (last - first) * step / max(1, self.decay * self.steps))

    def loss(self, q: nn.Module, target: nn.Module, batch: Batch) -> Tensor:
        """Huber loss of the temporal difference."""
        seen, actions, rewards, following, ended = batch
        with torch.no_grad(), aside.collect():  # what layers report counts once, on the observations
            values = target(following)
            best = (q(following) if self.double else values).argmax(1, keepdim=True)
            goal = rewards + self.discount * (1 - ended) * values.gather(1, best)[:, 0]
        return F.smooth_l1_loss(q(seen).gather(1, actions[:, None])[:, 0], goal)


def _copy(q: nn.Module) -> nn.Module:
    return copy.deepcopy(q).requires_grad_(False)
