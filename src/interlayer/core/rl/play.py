"""Play environments: copies stepped together, the returns of episodes, greedy actions, and what a hook sees of training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from interlayer.core.extras import need


def environments(name: str, count: int) -> Any:
    """``count`` copies of a Gymnasium environment, stepped together; one that ends begins anew within the same step.

    Raises:
        ValueError: Gymnasium cannot make it, or it has no array to observe or no discrete actions.
    """
    gymnasium = need("gymnasium", "control", "core.rl")
    settings = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    try:
        envs = gymnasium.make_vec(name, num_envs=count, vectorization_mode="sync", vector_kwargs=settings)
    except gymnasium.error.Error as error:
        raise ValueError(
            f"rl: environment {name!r}; Gymnasium cannot make it: {error} See gymnasium.pprint_registry() for the names."
        ) from error
    if not envs.single_observation_space.shape or getattr(envs.single_action_space, "n", None) is None:
        spaces = f"observations {envs.single_observation_space} and actions {envs.single_action_space}"
        envs.close()
        raise ValueError(
            f"rl: environment {name!r} has {spaces}; expected an array to observe and discrete actions. Wrap it, or take "
            "another one."
        )
    return envs


def sizes(name: str) -> tuple[int, int]:
    """Numbers in a (flattened) observation, and actions.

    Raises:
        ValueError: As ``environments``.

    Examples:
        >>> sizes("CartPole-v1")
        (4, 2)
    """
    one = environments(name, 1)
    found = int(np.prod(one.single_observation_space.shape)), int(one.single_action_space.n)
    one.close()
    return found


@dataclass
class Episodes:
    """Returns of the episodes that ended in training, and the environment steps after which they did."""

    returns: list[float] = field(default_factory=list)
    at: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Update:
    """What a hook sees after a gradient step.

    Attributes:
        network: The network that is trained.
        optimiser: Its optimiser.
        seen: The observations [B, features] of the step's batch.
        loss: The batch's loss before the step.
        count: Gradient steps so far; the first is 1.
        steps: Environment steps so far, over all copies.
        observe: Gives that many observations, drawn from what the algorithm learns from.
    """

    network: nn.Module
    optimiser: torch.optim.Optimizer
    seen: Tensor
    loss: float
    count: int
    steps: int
    observe: Callable[[int], Tensor]


Hook = Callable[[Update], Any]


class Play:
    """Copies of an environment in play. Use it in a ``with`` block, which closes them.

    Args:
        name: Gymnasium environment with discrete actions.
        copies: How many are stepped together.
        seed: Of the environments.

    Attributes:
        seen: The current observation of each copy.
        steps: Environment steps so far, over all copies.
        episodes: Those that ended.

    Examples:
        >>> with Play("CartPole-v1", 2, seed=0) as play:
        ...     for _ in range(30):
        ...         following, rewards, ended, over = play.step(np.array([0, 1]))
        >>> play.steps, len(play.episodes.returns) > 2
        (60, True)
    """

    def __init__(self, name: str, copies: int, seed: int) -> None:
        self.name, self.envs = name, environments(name, copies)
        self.features = int(np.prod(self.envs.single_observation_space.shape))
        self.actions = int(self.envs.single_action_space.n)
        self.seen, _ = self.envs.reset(seed=seed)
        self.steps, self.episodes, self.total = 0, Episodes(), np.zeros(copies)

    def __enter__(self) -> Play:
        return self

    def __exit__(self, *_: object) -> None:
        self.envs.close()

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any]:
        """Take an action in each copy.

        Returns:
            The observations that follow (of an episode that ends here its last, not the first of the next), the rewards,
            whether the episode ended so that no reward can follow, and whether it is over, by a time limit too.
        """
        following, rewards, ended, cut, info = self.envs.step(actions)
        over = ended | cut
        last = np.stack([info["final_obs"][i] if o else following[i] for i, o in enumerate(over)])
        self.total += rewards
        self.steps += len(rewards)
        for i in np.flatnonzero(over):
            self.episodes.at.append(self.steps)
            self.episodes.returns.append(float(self.total[i]))
        self.total[over], self.seen = 0, following
        return last, rewards, ended, over

    @torch.no_grad()
    def check(self, network: nn.Module, outputs: int, what: str) -> None:
        """Raise unless the network gives ``outputs`` numbers for each of the current observations.

        Raises:
            ValueError: It gives another shape.
        """
        given, mode = observed(network, self.seen), network.training
        found = tuple(network.eval()(given).shape)
        network.train(mode)
        if found != (len(given), outputs):
            raise ValueError(
                f"rl: the network gives {found} for {len(given)} observations of {self.name!r}; expected "
                f"({len(given)}, {outputs}): {what}. Build it with {outputs} outputs."
            )


def observed(network: nn.Module, seen: Any) -> Tensor:
    """Observations as the network takes them: flat, float32, on its device."""
    return torch.as_tensor(seen, dtype=torch.float32, device=next(network.parameters()).device).flatten(1)


@torch.no_grad()
def greedy(network: nn.Module, seen: Any, actions: int) -> Any:
    """The action of the highest output among the first ``actions``, for each observation."""
    return network(observed(network, seen))[:, :actions].argmax(1).cpu().numpy()


def evaluate(network: nn.Module, name: str, *, episodes: int, seed: int) -> list[float]:
    """Undiscounted returns of ``episodes`` greedy episodes, each from its own initial state."""
    mode, running = network.training, np.ones(episodes, dtype=bool)
    total = np.zeros(episodes)
    network.eval()
    with Play(name, episodes, seed) as play:
        while running.any():
            _, rewards, _, over = play.step(greedy(network, play.seen, play.actions))
            total += rewards * running
            running &= ~over
    network.train(mode)
    return total.tolist()
