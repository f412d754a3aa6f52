"""Reinforcement learning on Gymnasium environments: a small DQN loop that systems share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interlayer.core import aside
from interlayer.core.extras import need
from interlayer.core.schedule import progress

Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def environments(name: str, count: int) -> Any:
    """``count`` copies of a Gymnasium environment, stepped together; one that ends begins anew within the same step."""
    gymnasium = need("gymnasium", "control", "study.rl")
    mode = gymnasium.vector.AutoresetMode.SAME_STEP
    return gymnasium.make_vec(name, num_envs=count, vectorization_mode="sync", vector_kwargs={"autoreset_mode": mode})


def sizes(name: str) -> tuple[int, int]:
    """Numbers in a (flattened) observation, and actions.

    Raises:
        ValueError: The environment has no discrete actions.
    """
    one = need("gymnasium", "control", "study.rl").make(name)
    observed, actions = one.observation_space.shape, getattr(one.action_space, "n", None)
    one.close()
    if actions is None or not observed:
        raise ValueError(
            f"rl: {name!r} has actions {one.action_space}; DQN needs an array to see and discrete actions."
        )
    return int(np.prod(observed)), int(actions)


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
    """Deep Q-learning (Mnih et al., doi:10.1038/nature14236): replay, a target network, actions at random less and less often.

    ``loss = huber(Q(s, a) - (r + discount (1 - ended) max_a' Q_target(s', a')))``; with ``double`` the action is chosen by
    Q and valued by Q_target (van Hasselt et al., arXiv:1509.06461).

    Args:
        steps: Environment steps in all, over all copies.
        copies: Environments that are stepped together.
        batch: Transitions in a gradient step.
        updates: Gradient steps for each step of all copies.
        lr: Learning rate of Adam.
        discount: Worth of the next reward.
        memory: Transitions that are kept.
        warm: Steps at random before learning begins.
        refresh: Gradient steps between copies of Q to the target network.
        explore: Share of random actions at the start and at the end.
        decay: Part of the run over which it falls, linearly.
        double: Whether to learn by double DQN.

    Examples:
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
    updates: int = 1
    lr: float = 1e-3
    discount: float = 0.99
    memory: int = 20_000
    warm: int = 1000
    refresh: int = 100
    explore: tuple[float, float] = (1.0, 0.05)
    decay: float = 0.4
    double: bool = False

    def train(
        self, q: nn.Module, name: str, *, seed: int, watch: Callable[[int, float], bool] | None = None
    ) -> Episodes:
        """Train a network in place that maps [B, features] to a value for each action.

        Args:
            q: The network.
            name: Gymnasium environment with discrete actions.
            seed: Of the environments, the exploration and the batches.
            watch: Called after each gradient step with (environment steps, loss); True ends the run.

        Returns:
            The episodes that ended in training.
        """
        device = next(q.parameters()).device
        envs, generator = environments(name, self.copies), torch.Generator().manual_seed(seed)
        chance = np.random.default_rng(seed)
        target = _copy(q)
        optimiser = torch.optim.Adam(q.parameters(), self.lr)
        seen, _ = envs.reset(seed=seed)
        memory = Replay(self.memory, int(np.prod(envs.single_observation_space.shape)))
        run, total, updates = Episodes(), np.zeros(self.copies), 0
        for step in range(0, self.steps, self.copies):
            random = chance.random(self.copies) < self.exploration(step)
            actions = np.where(random, chance.integers(envs.single_action_space.n, size=self.copies), greedy(q, seen))
            following, rewards, ended, cut, info = envs.step(actions)
            total += rewards
            over = ended | cut
            last = np.stack([info["final_obs"][i] if o else following[i] for i, o in enumerate(over)])
            memory.add(seen, actions, rewards, last, ended)
            for i in np.flatnonzero(over):
                run.at.append(step + self.copies)
                run.returns.append(float(total[i]))
            total[over], seen = 0, following
            if step < self.warm:
                continue
            progress(q, step / self.steps)
            for _ in range(self.updates):
                loss = self.loss(q, target, tuple(t.to(device) for t in memory.sample(self.batch, generator)))  # type: ignore[arg-type]
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(q.parameters(), 10.0)
                optimiser.step()
                updates += 1
                if updates % self.refresh == 0:
                    target = _copy(q)
                if watch and watch(step + self.copies, float(loss.detach())):
                    envs.close()
                    return run
        envs.close()
        return run

    def exploration(self, step: int) -> float:
        """Share of random actions at a step."""
        first, last = self.explore
        return max(last, first + (last - first) * step / max(1, self.decay * self.steps))

    def loss(self, q: nn.Module, target: nn.Module, batch: Batch) -> Tensor:
        """Huber loss of the temporal difference, and what layers ask for themselves."""
        seen, actions, rewards, following, ended = batch
        with torch.no_grad():
            values = target(following)
            best = (q(following) if self.double else values).argmax(1, keepdim=True)
            goal = rewards + self.discount * (1 - ended) * values.gather(1, best)[:, 0]
        with aside.collect() as told:
            loss = F.smooth_l1_loss(q(seen).gather(1, actions[:, None])[:, 0], goal)
        return loss if told.loss is None else loss + told.loss


@dataclass
class Episodes:
    """Returns of the episodes that ended in training, and the environment steps after which they did."""

    returns: list[float] = field(default_factory=list)
    at: list[int] = field(default_factory=list)


@torch.no_grad()
def greedy(q: nn.Module, seen: Any) -> Any:
    """The action of the highest value for each observation."""
    device = next(q.parameters()).device
    x = torch.as_tensor(seen, dtype=torch.float32, device=device).flatten(1)
    return q(x).argmax(1).cpu().numpy()


def evaluate(q: nn.Module, name: str, *, episodes: int, seed: int) -> list[float]:
    """Undiscounted returns of ``episodes`` greedy episodes, each from its own start."""
    envs, mode = environments(name, episodes), q.training
    q.eval()
    seen, _ = envs.reset(seed=seed)
    total, running = np.zeros(episodes), np.ones(episodes, dtype=bool)
    while running.any():
        seen, rewards, ended, cut, _ = envs.step(greedy(q, seen))
        total += rewards * running
        running &= ~(ended | cut)
    envs.close()
    q.train(mode)
    return total.tolist()


def _copy(q: nn.Module) -> nn.Module:
    return copy.deepcopy(q).requires_grad_(False)
