"""Reinforcement learning: memory, targets, advantages, time limits, budgets, hooks, and that both algorithms learn."""

import numpy as np
import pytest
import torch
from torch import nn

from interlayer.core import aside, extras
from interlayer.core.rl import DQN, PPO, ActorCritic, Play, Replay, advantages, environments, evaluate, greedy, sizes
from interlayer.models import MLP


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


def test_what_layers_report_counts_once_in_a_loss():
    """Not for the target network, nor for the choice of the next action."""

    class Reports(nn.Linear):
        def forward(self, x):
            aside.loss(self.weight.square().sum())
            return super().forward(x)

    q, seen = Reports(3, 2), torch.zeros(4, 3)
    batch = seen, torch.zeros(4, dtype=torch.long), torch.zeros(4), seen, torch.zeros(4)
    with aside.collect() as told:
        DQN(double=True).loss(q, Reports(3, 2), batch)
    assert len(told.losses) == 1 and torch.equal(told.loss, q.weight.square().sum())


def test_exploration_falls_linearly_and_stays():
    plan = DQN(steps=100, warm=0, decay=0.5, explore=(1.0, 0.1))
    assert [round(plan.exploration(s), 6) for s in (0, 25, 50, 99)] == [1.0, 0.55, 0.1, 0.1]


def trained(steps):
    torch.manual_seed(0)
    q = MLP(4, 2, depth=1, width=64)
    return q, DQN(steps=steps, ratio=0.25, warm=200, decay=0.5).train(q, "CartPole-v1", seed=3)


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


@pytest.mark.parametrize("ratio", [0.05, 0.25, 2.0])
def test_the_replay_ratio_is_kept_and_a_hook_sees_each_gradient_step(ratio):
    seen = []
    q = MLP(4, 2, depth=1, width=8)
    DQN(steps=400, warm=81, ratio=ratio).train(q, "CartPole-v1", seed=0, after=seen.append)
    first = 88  # the first step of all copies after the warm-up
    assert [u.count for u in seen] == list(range(1, int(ratio * (400 - first)) + 1))
    for u in seen:
        assert u.network is q and u.seen.shape == (64, 4) and u.observe(7).shape == (7, 4)
        assert u.count <= ratio * (u.steps - first) + 1e-6 < u.count + ratio * 8 + 1
    assert isinstance(seen[0].optimiser, torch.optim.Adam) and seen[0].optimiser is seen[-1].optimiser


def test_a_hook_ends_the_run_and_what_it_observes_changes_nothing():
    runs = []
    for looking in (False, True):
        torch.manual_seed(0)
        q, count = MLP(4, 2, depth=1, width=8), []

        def after(update, looking=looking, count=count):
            count.append(update.observe(5) if looking else None)
            return update.count == 30

        DQN(steps=800, warm=80).train(q, "CartPole-v1", seed=0, after=after)
        assert len(count) == 30
        runs.append(q.head.weight)
    assert torch.equal(*runs)


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


def test_greedy_flattens_and_takes_the_best_of_the_actions():
    assert greedy(Table([[1.0, 2.0, 9.0], [5.0, 3.0, 9.0]]), np.array([[[0.0]], [[1.0]]]), 2).tolist() == [1, 0]


def test_advantages_equal_the_sum_over_later_errors():
    """Eq. 16 of GAE written out, over two copies whose episodes end and are cut at different steps."""
    torch.manual_seed(0)
    rewards, values, following = torch.randn(3, 6, 2)
    ended, cut = torch.zeros(2, 6, 2)
    ended[2, 0] = cut[3, 1] = 1
    over, discount, smoothing = ended + cut, 0.9, 0.8
    found = advantages(rewards, values, following, ended, over, discount, smoothing)
    for n in range(2):
        for t in range(6):
            total, weight = 0.0, 1.0
            for k in range(t, 6):
                total += weight * (rewards[k, n] + discount * (1 - ended[k, n]) * following[k, n] - values[k, n])
                if over[k, n]:
                    break
                weight *= discount * smoothing
            torch.testing.assert_close(found[t, n], torch.as_tensor(total))


def test_the_loss_of_ppo_by_hand():
    """Two actions, both probabilities moved: one past the clip in its favour, one past it to its harm."""
    plan = PPO(entropy=0.1, value=0.5, clip=0.2)
    net = Table([[0.0, 0.0, 3.0]])  # both actions at 1/2, value 3
    old = torch.tensor([0.25, 0.9]).log()
    loss = plan.loss(
        net, torch.zeros(2, 1), torch.tensor([0, 1]), old, torch.tensor([2.0, 0.0]), torch.tensor([3.0, 5.0])
    )
    # advantages are +1 and -1 once normalised; shares 2 (clipped to 1.2) and 0.5556 (clipped to 0.8, which is the worse)
    objective = (1.2 * 1 + 0.8 * -1) / 2
    assert loss.item() == pytest.approx(0.5 * (0 + 4) / 2 - objective - 0.1 * np.log(2), abs=1e-5)


def test_ppo_keeps_what_belongs_together():
    """Of a round: log-probabilities are those of the actions taken, returns are advantages and values, and time limits are no end."""
    torch.manual_seed(0)
    net, plan = MLP(2, 4, depth=1, width=8), PPO(steps=1700, copies=2, horizon=210, batch=64)
    with Play("MountainCar-v0", 2, seed=0) as play:
        seen, actions, logs, gains, returns = plan.round(net, play, torch.Generator().manual_seed(0))
        assert play.steps == 420 == len(seen) and play.episodes.returns == [-200.0, -200.0]
    out = net(seen).detach()
    torch.testing.assert_close(logs, out[:, :3].log_softmax(1).gather(1, actions[:, None])[:, 0])
    torch.testing.assert_close(returns, gains + out[:, 3])
    # the reward is -1 at every step and the value of a good critic at most 0, so an end would show as a jump at step 200
    assert (gains.view(210, 2)[199] - gains.view(210, 2)[198]).abs().max() < 10


def played(steps, after=None):
    torch.manual_seed(0)
    net = ActorCritic(MLP(4, 2, depth=1, width=32), MLP(4, 1, depth=1, width=32))
    return PPO(steps=steps, horizon=64, lr=3e-3, batch=128).train(net, "CartPole-v1", seed=1, after=after)


def test_ppo_repeats_and_its_hook_sees_each_gradient_step():
    updates = []
    assert played(1100) == played(1100, updates.append)
    assert [u.count for u in updates] == list(range(1, 2 * 4 * 4 + 1))  # rounds, epochs, batches
    assert [u.steps for u in updates] == [512] * 16 + [1024] * 16
    assert updates[0].observe(9).shape == (9, 4)


def test_ppo_learns():
    means = np.convolve(played(12_000).returns, np.ones(20) / 20, "valid")  # of 20 episodes in a row
    assert means[0] < 60 and means.max() > 120


def test_errors(monkeypatch):
    assert sizes("Acrobot-v1") == (6, 3)
    with pytest.raises(ValueError, match=r"environment 'Pendulum-v1' has .* expected an array to observe and discrete"):
        sizes("Pendulum-v1")
    with pytest.raises(ValueError, match=r"environment 'CartPol-v1'; Gymnasium cannot make it.*pprint_registry"):
        DQN().train(MLP(4, 2), "CartPol-v1", seed=0)
    with pytest.raises(ValueError, match=r"gives \(8, 3\) for 8 .*expected \(8, 2\): a value for each action"):
        DQN().train(MLP(4, 3), "CartPole-v1", seed=0)
    with pytest.raises(ValueError, match=r"expected \(8, 3\): a logit for each action, and the value"):
        PPO().train(MLP(4, 2), "CartPole-v1", seed=0)
    with pytest.raises(ValueError, match=r"steps=400, warm=505, .* leave no gradient step"):
        DQN(steps=400, warm=505)
    with pytest.raises(ValueError, match=r"copies=0"):
        DQN(copies=0)
    with pytest.raises(ValueError, match=r"expected batch <= round <= steps"):
        PPO(steps=1000)

    def missing(name):
        raise ImportError

    monkeypatch.setattr(extras, "import_module", missing)
    with pytest.raises(ImportError, match=r'core.rl needs .gymnasium.: pip install "interlayer\[control\]"'):
        environments("CartPole-v1", 1)
