import math

import pytest
import torch
from torch import nn
from transformers import get_cosine_schedule_with_warmup

from interlayer.core.tune import loss_of, rate, tune


def test_the_learning_rate_is_a_cosine_with_warm_up():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    theirs = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=3, num_training_steps=100)
    expected = [theirs.lr_lambdas[0](step) for step in range(3, 100)]
    assert [rate(step, 100) for step in range(3, 100)] == pytest.approx(expected)
    assert [rate(step, 100) for step in range(3)] == [0.25, 0.5, 0.75] and rate(0, 1) > 0


def test_only_what_is_given_learns_and_the_rest_is_as_before():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 3)).train()
    net[0].weight.requires_grad_(False)
    net[2].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    seen = []
    net.register_forward_pre_hook(lambda m, a: seen.append([part.training for part in m]))
    with torch.no_grad():
        losses = tune(net, [(x, y)] * 2, weights=net[3].parameters(), modules=[net[1]], lr=0.1, epochs=3)
    assert seen == [[False, True, False, False]] * 6 and len(losses) == 6
    assert {k for k, v in net.state_dict().items() if not v.equal(before[k])} == {"3.weight", "3.bias"}
    assert [m.training for m in net] == [True, True, False, True]
    assert [p.requires_grad for p in net.parameters()] == [False, *[True] * 5] and net[3].weight.grad is None
    tune(net, [(x, y)], lr=0.1)
    assert not net[0].weight.equal(before["0.weight"]) and not net[0].weight.requires_grad


def test_errors():
    net = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no batches"):
        tune(net, [], lr=0.1)
    with pytest.raises(ValueError, match="a batch without targets or tokens"):
        loss_of(net, torch.zeros(2, 3, 2))
    with pytest.raises(ValueError, match="the loss of step 0 is nan"):
        tune(net, [(torch.full((2, 2), math.inf), torch.zeros(2, dtype=torch.long))], lr=0.1)
