"""Reinforcement learning on Gymnasium environments with discrete actions: one way to play, and the algorithms DQN and PPO.

An algorithm is a frozen dataclass of its settings; ``train(network, name, seed=)`` trains the network in place. After each
gradient step it calls a hook with the network, the optimiser and the observations (``Update``), so that a rule can look at them or
change them.
"""

from interlayer.core.rl.dqn import DQN, Replay
from interlayer.core.rl.play import Episodes, Play, Update, environments, evaluate, greedy, sizes
from interlayer.core.rl.ppo import PPO, ActorCritic, advantages

__all__ = [
    "DQN",
    "PPO",
    "ActorCritic",
    "Episodes",
    "Play",
    "Replay",
    "Update",
    "advantages",
    "environments",
    "evaluate",
    "greedy",
    "sizes",
]
