"""Proximal policy optimisation: play a while, then learn from it several times without moving far from the policy that played."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from interlayer.core.fit import descend
from interlayer.core.rl.play import Episodes, Hook, Play, Update, observed


class ActorCritic(nn.Module):
    """A policy and a value network side by side, which share nothing.

    Args:
        actor: Maps [B, features] to a logit for each action.
        critic: Maps [B, features] to one value.

    Shapes: [B, features] to [B, actions + 1], the value last.

    Examples:
        >>> ActorCritic(nn.Linear(4, 2), nn.Linear(4, 1))(torch.zeros(3, 4)).shape
        torch.Size([3, 3])
    """

    def __init__(self, actor: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.actor, self.critic = actor, critic

    def forward(self, x: Float[Tensor, "B F"]) -> Float[Tensor, "B K"]:
        """Logits and value."""
        return torch.cat((self.actor(x), self.critic(x)), 1)


def advantages(
    rewards: Float[Tensor, "T N"],
    values: Float[Tensor, "T N"],
    following: Float[Tensor, "T N"],
    ended: Float[Tensor, "T N"],
    over: Float[Tensor, "T N"],
    discount: float,
    smoothing: float,
) -> Float[Tensor, "T N"]:
    """Generalised advantage estimates (Schulman et al., arXiv:1506.02438, eq. 16), over T steps of N copies.

    ``A_t = d_t + discount smoothing (1 - over_t) A_{t+1}`` with ``d_t = r_t + discount (1 - ended_t) V(s'_t) - V(s_t)``, where s'_t
    is the state that follows, at a time limit too.

    Args:
        rewards: r_t.
        values: V(s_t).
        following: V(s'_t).
        ended: 1 where no reward can follow.
        over: 1 where the episode is over, by a time limit too.
        discount: Worth of the next reward.
        smoothing: 0 takes one step of rewards, 1 all of them.

    Examples:
        >>> one, no = torch.ones(3, 1), torch.zeros(3, 1)
        >>> advantages(one, no, no, no, no, discount=0.5, smoothing=1.0).flatten().tolist()
        [1.75, 1.5, 1.0]
    """
    errors = rewards + discount * (1 - ended) * following - values
    found = torch.zeros_like(errors)
    last = torch.zeros_like(errors[0])
    for t in reversed(range(len(errors))):
        last = errors[t] + discount * smoothing * (1 - over[t]) * last
        found[t] = last
    return found


@dataclass(frozen=True)
class PPO:
    """Proximal policy optimisation (Schulman et al., arXiv:1707.06347) with discrete actions.

    ``loss = -mean min(p A, clip(p, 1 - clip, 1 + clip) A) + value mean (V - G)^2 - entropy mean H`` (eq. 7 and 9), where p is the
    ratio of the new to the old probability of the action, A the advantage, normalised over the batch, and G = A + V_old.

    Args:
        steps: Environment steps in all, over all copies; whole rounds of copies * horizon are played.
        copies: Environments that are stepped together.
        horizon: Steps of each copy in a round.
        epochs: How often a round is learned from: the replay ratio, in transitions.
        batch: Transitions in a gradient step.
        lr: Learning rate of Adam.
        discount: Worth of the next reward.
        smoothing: That of the advantages.
        clip: How far a probability may move, as a share.
        value: Weight of the value's loss.
        entropy: Weight of the policy's entropy.
        clip_norm: Largest norm of the gradient.

    Raises:
        ValueError: A budget below one round, or a batch above it.

    Examples:
        >>> from interlayer.models import MLP
        >>> net = ActorCritic(MLP(4, 2, depth=1, width=16), MLP(4, 1, depth=1, width=16))
        >>> run = PPO(steps=512, horizon=32).train(net, "CartPole-v1", seed=0)
        >>> len(run.returns) > 8
        True
    """

    steps: int = 50_000
    copies: int = 8
    horizon: int = 128
    epochs: int = 4
    batch: int = 256
    lr: float = 1e-3
    discount: float = 0.99
    smoothing: float = 0.95
    clip: float = 0.2
    value: float = 0.5
    entropy: float = 0.01
    clip_norm: float = 0.5

    def __post_init__(self) -> None:
        least = min(self.copies, self.horizon, self.epochs, self.batch)
        if least < 1 or not self.batch <= self.copies * self.horizon <= self.steps:
            raise ValueError(
                f"PPO: steps={self.steps}, batch={self.batch}, epochs={self.epochs}, where a round has copies * horizon = "
                f"{self.copies} * {self.horizon} steps; expected batch <= round <= steps, and 1 at least. Take more steps, or a "
                "shorter horizon."
            )

    def train(self, network: nn.Module, name: str, *, seed: int, after: Hook | None = None) -> Episodes:
        """Train a network in place that maps [B, features] to a logit for each action and the value; see ``ActorCritic``.

        Args:
            network: The network.
            name: Gymnasium environment with discrete actions.
            seed: Of the environments, the actions and the batches.
            after: Called after each gradient step with an ``Update``; True ends the run.

        Returns:
            The episodes that ended in training.

        Raises:
            ValueError: The environment cannot be made or has no discrete actions, or the network's outputs do not fit it.
        """
        generator, looks = (torch.Generator().manual_seed(seed) for _ in range(2))
        optimiser = torch.optim.Adam(network.parameters(), self.lr)
        updates = 0
        with Play(name, self.copies, seed) as play:
            play.check(network, play.actions + 1, "a logit for each action, and the value")
            for start in range(0, self.steps - self.copies * self.horizon + 1, self.copies * self.horizon):
                data = self.round(network, play, generator)

                def observe(count: int, seen: Tensor = data[0]) -> Tensor:
                    return seen[torch.randint(len(seen), (count,), generator=looks).to(seen.device)]

                for _ in range(self.epochs):
                    order = torch.randperm(len(data[0]), generator=generator).to(data[0].device)
                    for at in order.split(self.batch):
                        batch = tuple(t[at] for t in data)
                        lost, share = partial(self.loss, network, *batch), start / self.steps
                        loss, _ = descend(network, optimiser, lost, share=share, clip=self.clip_norm)
                        updates += 1
                        if after and after(Update(network, optimiser, batch[0], loss, updates, play.steps, observe)):
                            return play.episodes
        return play.episodes

    @torch.no_grad()
    def round(self, network: nn.Module, play: Play, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Play one round: observations, actions, log-probabilities, advantages and returns, one for each step of each copy."""
        kept: list[tuple[Tensor, ...]] = []
        for _ in range(self.horizon):
            seen = observed(network, play.seen)
            logits = network(seen)[:, :-1].log_softmax(1)
            actions = torch.multinomial(logits.exp().cpu(), 1, generator=generator)[:, 0]
            last, *rest = play.step(actions.numpy())
            took = actions.to(seen.device)
            told = (torch.as_tensor(r, dtype=torch.float32, device=seen.device) for r in rest)
            kept.append((seen, observed(network, last), took, logits.gather(1, took[:, None])[:, 0], *told))
        seen, last, took, logs, rewards, ended, over = (torch.stack(column) for column in zip(*kept, strict=True))
        values, following = (network(x.flatten(0, 1))[:, -1].view_as(rewards) for x in (seen, last))
        gains = advantages(rewards, values, following, ended, over, self.discount, self.smoothing)
        return tuple(t.flatten(0, 1) for t in (seen, took, logs, gains, gains + values))

    def loss(
        self, network: nn.Module, seen: Tensor, actions: Tensor, logs: Tensor, gains: Tensor, returns: Tensor
    ) -> Tensor:
        """The clipped objective, the value's error and the entropy."""
        out = network(seen)
        new = out[:, :-1].log_softmax(1)
        share = (new.gather(1, actions[:, None])[:, 0] - logs).exp()
        gains = (gains - gains.mean()) / (gains.std(correction=0) + 1e-8)
        policy = torch.minimum(share * gains, share.clamp(1 - self.clip, 1 + self.clip) * gains).mean()
        entropy = -(new.exp() * new).sum(1).mean()
        return self.value * F.mse_loss(out[:, -1], returns) - policy - self.entropy * entropy
