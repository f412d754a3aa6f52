"""The DQN loop: memory, targets, time limits, and that it learns."""

import numpy as np
import pytest
import torch
from torch import nn

from interlayer.core import extras
from interlayer.models import MLP
from interlayer.study.rl import DQN, Replay, environments, evaluate, greedy, sizes


def test_replay_is_a_ring_and_keeps_what_belongs_together():
    memory = Replay(5, 2)
    for k in range(4):
        mark = np.array([2 * k, 2 * k + 1])
        memory.add(np.stack([mark, mark], 1), mark, mark, np.stack([mark + 1, mark], 1), mark % 2 == 0)
    assert len(memory) == 5
    assert sorted(memory.actions.tolist()) == [3, 4, 5, 6, 7]
    seen, actions, rewards, following, ended = memory.sample(64, torch.Generator().manual_seed(0))
    assert set(actions.tolist()) == {3, 4, 5, 6, 7}
    assert torch.equal(seen[:, 0], actions.float()) and torch.equal(rewards, actions.float())
    assert torch.equal(following[:, 0], actions + 1.0) and torch.equal(ended, (actions % 2 == 0).float())


class Table(nn.Module):
    """Values that do not depend on anything but a table."""

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Parameter(torch.tensor(rows))

    def forward(self, x):
        return self.rows[x[:, 0].long()]


def test_loss_by_hand_plain_and_double():
    q, target = Table([[1.0, 2.0], [5.0, 3.0]]), Table([[0.0, 0.0], [10.0, 20.0]])
    batch = (
        torch.zeros(2, 1),
        torch.tensor([0, 1]),
        torch.tensor([1.0, 2.5]),
        torch.ones(2, 1),
        torch.tensor([0.0, 1.0]),
    )
    # goals: 1 + 0.5 * 20 = 11 and 2.5 (the end); huber(10) = 9.5 and 0.5 * 0.25 = 0.125
    assert DQN(discount=0.5).loss(q, target, batch).item() == pytest.approx((9.5 + 0.125) / 2)
    # double: Q takes action 0 in the next state, which the target values 10; goal 6
    assert DQN(discount=0.5, double=True).loss(q, target, batch).item() == pytest.approx((4.5 + 0.125) / 2)


def test_exploration_falls_linearly_and_stays():
    plan = DQN(steps=100, decay=0.5, explore=(1.0, 0.1))
    assert [round(plan.exploration(s), 6) for s in (0, 25, 50, 99)] == [1.0, 0.55, 0.1, 0.1]


def trained(steps):
    torch.manual_seed(0)
    q = MLP(4, 2, depth=1, width=64)
    return q, DQN(steps=steps, updates=2, warm=200, decay=0.5).train(q, "CartPole-v1", seed=3)


def test_the_same_seed_gives_the_same_run():
    first, second = trained(320)[1], trained(320)[1]
    assert first == second and len(first.returns) >= 3
    assert first.at == sorted(first.at) and first.at[-1] <= 320


def test_learns():
    """Random play of CartPole earns about 22."""
    q, run = trained(5000)
    assert np.mean(run.returns[:10]) < 30
    assert np.mean(run.returns[-10:]) > 60
    assert q.training and all(p.requires_grad for p in q.parameters())
    assert min(evaluate(q, "CartPole-v1", episodes=5, seed=9)) >= 8


def test_a_time_limit_is_no_end():
    """MountainCar never ends by itself within 200 random steps: no transition is marked as ended."""
    kept = []

    class Watched(DQN):
        def loss(self, q, target, batch):
            kept.append(batch[4])
            return super().loss(q, target, batch)

    run = Watched(steps=600, copies=2, warm=500, explore=(1.0, 1.0)).train(
        MLP(2, 3, depth=1, width=8), "MountainCar-v0", seed=0
    )
    assert run.returns[:2] == [-200.0, -200.0]
    assert kept and not torch.stack(kept).any()


def test_watch_ends_the_run():
    steps = []
    DQN(steps=800, warm=80).train(
        MLP(4, 2, depth=1, width=8),
        "CartPole-v1",
        seed=0,
        watch=lambda at, loss: steps.append((at, loss)) or len(steps) == 3,
    )
    assert [at for at, _ in steps] == [88, 96, 104]
    assert all(loss > 0 for _, loss in steps)


def test_what_ends_begins_anew_and_its_last_sight_is_told():
    envs = environments("CartPole-v1", 2)
    envs.reset(seed=0)
    for _ in range(60):
        seen, _, ended, _, told = envs.step(np.array([1, 1]))
        if ended.any():
            break
    where = int(np.flatnonzero(ended)[0])
    assert abs(told["final_obs"][where][2]) > 0.2 > abs(seen[where][2])
    envs.close()


def test_greedy_flattens_and_takes_the_best():
    assert greedy(Table([[1.0, 2.0], [5.0, 3.0]]), np.array([[[0.0]], [[1.0]]])).tolist() == [1, 0]


def test_errors(monkeypatch):
    assert sizes("Acrobot-v1") == (6, 3)
    with pytest.raises(ValueError, match="discrete actions"):
        sizes("Pendulum-v1")

    def missing(name):
        raise ImportError

    monkeypatch.setattr(extras, "import_module", missing)
    with pytest.raises(ImportError, match=r'study.rl needs .gymnasium.: pip install "interlayer\[control\]"'):
        environments("CartPole-v1", 1)
