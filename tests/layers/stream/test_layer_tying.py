import copy
import math

import pytest
import torch
from torch import nn

from interlayer.core.cost import parameters
from interlayer.layers.stream.layer_tying import LayerTying
from interlayer.models import Transformer


def net(depth=4):
    torch.manual_seed(0)
    return Transformer(vocab=11, length=8, depth=depth, width=8, heads=2)


def batch(seed=0):
    x = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(seed))
    return x, (3 * x + 1) % 11


BLOCK = parameters(net().trunk.blocks[0])


def owners(rule):
    return [rule.owner(i) for i in range(len(rule.blocks))]


def check(rule):
    """Parameters, groups and moments are those of the layers that have weights of their own, and of nothing else."""
    for i, block in enumerate(rule.blocks):
        for p, q in zip(block.parameters(), rule.blocks[rule.owner(i)].parameters(), strict=True):
            assert p is q
    grouped = [p for group in rule.optimiser.param_groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in rule.model.parameters()} and len(grouped) == len(set(grouped))
    assert {id(p) for p in rule.optimiser.state} <= {id(p) for p in grouped}


def test_it_starts_tied_or_free():
    free = parameters(net())
    tied, loose = LayerTying(net()), LayerTying(net(), start="free")
    assert tied.state == [0, 0, 0, 0] and parameters(tied.model) == free - 3 * BLOCK
    assert loose.state == [0, 1, 2, 3] and parameters(loose.model) == free
    check(tied), check(loose)


def test_ties_follow_the_copied_layer_and_untied_layers_take_weights_and_moments_along():
    rule = LayerTying(net(), start="free", every=100)
    rule.steps = 1
    rule.step(batch())
    first = rule.blocks[1].get_parameter("mlp.up.weight")
    rule.act(2, 1)
    rule.act(3, 2)
    assert owners(rule) == [0, 1, 1, 1]
    check(rule)
    rule.act(1, 0)  # what they copy is tied in turn
    assert owners(rule) == [0, 0, 0, 0]
    check(rule)
    assert first not in rule.optimiser.state
    old = rule.blocks[0].get_parameter("mlp.up.weight")
    rule.act(2, 2)
    assert owners(rule) == [0, 0, 2, 2] and rule.state == [0, 0, 2, 2]
    check(rule)
    new = rule.blocks[2].get_parameter("mlp.up.weight")
    assert new is not old and torch.equal(new, old)
    moments, before = rule.optimiser.state[new], rule.optimiser.state[old]
    assert torch.equal(moments["exp_avg"], before["exp_avg"]) and moments["exp_avg"] is not before["exp_avg"]
    rule.step(batch(1))
    assert not torch.equal(new, old) and rule.optimiser.state[new]["step"] == 2
    rule.act(2, 2)  # nothing to do: the weights stay the same parameters
    assert rule.blocks[2].get_parameter("mlp.up.weight") is new


def test_a_tied_layers_gradient_is_the_sum_over_its_places():
    """Two places of one weight get the gradients that two free layers with equal weights get, added up."""
    rule, twin = LayerTying(net(2), every=100, clip_norm=math.inf), LayerTying(net(2), start="free", every=100)
    rule.steps = 1
    twin.blocks[1].load_state_dict(twin.blocks[0].state_dict())
    rule.model.load_state_dict(twin.model.state_dict())
    rule.step(batch())
    x, y = batch()
    twin.loss(twin.model(x), y).backward()
    for name, p in rule.blocks[0].named_parameters():
        both = [b.get_parameter(name).grad for b in twin.blocks]
        torch.testing.assert_close(p.grad, both[0] + both[1])


def test_one_step_of_q_learning_by_hand():
    rule = LayerTying(net(3), hidden=4, discount=0.5, clip=2.0)
    with torch.no_grad():
        for p in rule.agent.parameters():
            p.zero_()
        rule.agent[2].bias.copy_(torch.tensor([9.0, 1, 2, 3, 5, 4]))  # layers 0, then 1, then 2
    assert rule.values([0, 0, 0], 0).tolist() == [9]
    assert rule.values([0, 0, 0], 1).tolist() == [1, 2]
    assert rule.values([0, 0, 0], 2).tolist() == [3, 5, 4]
    rule.acted = (2, 0, [0, 0, 0])
    rule._learn(-7.0)
    # target: the clipped -2, and half of the best value 5; the old value was 3, so the error's slope is 2 (3 - 0.5)
    assert rule.agent[2].bias.grad.tolist() == [0, 0, 0, 5, 0, 0]


def test_layers_are_visited_in_turn_and_chance_fades():
    rule = LayerTying(net(), every=2, explore=1.0, decay=0.0, least=0.0, seed=3)
    seen = []
    act = rule.act
    rule.act = lambda layer, action: (seen.append((layer, action)), act(layer, action))
    for i in range(12):
        rule.step(batch(i))
    assert [layer for layer, _ in seen] == [1, 2, 3, 1, 2, 3]
    # after the first round nothing is drawn any more: it is the action of the highest value
    state = list(rule.state)
    layer, action, before = rule.acted
    assert action == int(rule.values(before, layer).argmax()) and state[layer] == action


def test_a_constantly_better_action_is_learned():
    """Reward 1 for own weights and -1 for copies: after some rounds the greedy agent lets every layer have its own."""
    rule = LayerTying(net(), q_lr=3e-2, decay=0.9)
    for visit in range(300):
        layer = visit % 3 + 1
        action = int(torch.randint(layer + 1, (), generator=rule.draw))
        state = list(rule.state)
        rule.act(layer, action)
        rule.acted = (layer, action, state)
        rule._learn(1.0 if action == layer else -1.0)
    assert all(int(rule.values(rule.state, layer).argmax()) == layer for layer in (1, 2, 3))


def test_a_resumed_run_is_the_same_run_even_from_a_model_that_was_tied_otherwise():
    rule = LayerTying(net(), every=2)
    for i in range(9):
        rule.step(batch(i))
    weights, state = copy.deepcopy(rule.model.state_dict()), copy.deepcopy(rule.state_dict())
    other = LayerTying(net(), every=2, seed=5)
    for i in range(4):
        other.step(batch(i))
    other.model.load_state_dict(weights)
    other.load_state_dict(state)
    check(other)
    for i in range(9, 21):
        assert rule.step(batch(i)) == other.step(batch(i))
    assert rule.state == other.state
    check(rule)


def test_metrics_and_the_loss_fall():
    rule = LayerTying(net(), every=3, lr=1e-2)
    found = [rule.step(batch(i)) for i in range(60)]
    assert found[-1]["loss"] < 0.5 * found[0]["loss"]
    assert found[-1]["layers"] == sum(i == o for i, o in enumerate(owners(rule)))
    assert found[-1]["trainable"] == parameters(net()) - (4 - found[-1]["layers"]) * BLOCK


def test_clear_errors():
    with pytest.raises(ValueError, match="start 'all'"):
        LayerTying(net(), start="all")
    with pytest.raises(ValueError, match="action 2 for layer 1"):
        LayerTying(net()).act(1, 2)
    with pytest.raises(ValueError, match=r"weights of block 1 of the model differ from those of block 0"):
        LayerTying(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False)))
    with pytest.raises(ValueError, match="ties are of 4 layers; the model has 3"):
        LayerTying(net(3)).load_state_dict(LayerTying(net()).state_dict())
