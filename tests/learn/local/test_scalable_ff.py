import copy

import pytest
import torch
from torch import nn

from interlayer.core import datasets
from interlayer.learn.local.scalable_ff import ScalableFF
from interlayer.models import ConvNet
from interlayer.models.classic import MobileNetV3Small, ResNet18


def batch(size=32, seed=0):
    images, labels = datasets.digits()
    at = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:size]
    return images[at] / 8 - 1, labels[at]


def resnet():
    torch.manual_seed(0)
    return ResNet18(1, 10, width=8)


def test_the_loss_is_the_margin_over_all_other_classes():
    rule = ScalableFF(resnet(), classes=3, margin=0.5)
    g, y = torch.tensor([[1.0, 2.0, 4.0], [0.0, 3.0, 1.0]]), torch.tensor([2, 0])
    by_hand = [(1 + torch.tensor([-2.5, -1.5]).exp().sum()).log(), (1 + torch.tensor([3.5, 1.5]).exp().sum()).log()]
    torch.testing.assert_close(rule.loss(g, y), torch.stack(by_hand).mean())


@pytest.mark.parametrize("make", [resnet, lambda: MobileNetV3Small(1, 10, width=0.25)])
@pytest.mark.parametrize("unit", ["blocks", "layers"])
def test_no_gradient_crosses_a_unit(make, unit):
    """A unit's gradient is the same when all later units are other ones."""
    torch.manual_seed(0)
    one = make()
    other = copy.deepcopy(one)
    with torch.no_grad():
        for p in other.blocks[4:].parameters():
            p.copy_(torch.randn_like(p))
    rules = [ScalableFF(m, unit=unit, lr=0.0) for m in (one, other)]
    for rule in rules:
        torch.manual_seed(1)
        rule.step(batch())
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        early = name.startswith("stem") or (name.startswith("blocks.") and int(name.split(".")[1]) < 4)
        if early:
            assert a.grad is not None and a.grad.abs().sum() > 0
            torch.testing.assert_close(a.grad, b.grad)
        elif name.startswith("blocks."):
            assert a.grad is not None
        else:
            assert a.grad is None, "the head is not used"


def test_blocks_learn_jointly_inside_and_layers_alone():
    """The first convolution of a block hears of the block's loss only with unit='blocks'."""
    heard = {}
    for unit in ("blocks", "layers"):
        rule = ScalableFF(resnet(), unit=unit, lr=0.0)
        rule._prepare(batch()[0])
        seen = []
        with rule._cutting(lambda name, x, seen=seen: seen.append((name, x))), torch.enable_grad():
            rule.model(batch()[0])
        after = dict(seen)["blocks.1"]
        first = rule.model.blocks[0].branch[0][0].weight
        heard[unit] = torch.autograd.grad(after.sum(), first, allow_unused=True)[0] is not None
    assert heard == {"blocks": True, "layers": False}


def test_it_learns_leaves_no_trace_and_resumes_bit_exact():
    rule = ScalableFF(resnet())
    first = rule.step(batch())["loss"]
    for _ in range(10):
        rule.step(batch())
    saved_model, saved_rule = copy.deepcopy(rule.model.state_dict()), copy.deepcopy(rule.state_dict())
    last = rule.step(batch(seed=3))
    assert last["loss"] < first
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in rule.model.modules())
    again = ScalableFF(resnet())
    again.model.load_state_dict(saved_model)
    again.load_state_dict(saved_rule)
    assert again.step(batch(seed=3)) == last
    images = batch(seed=4)[0]
    assert torch.equal(again.predict(images), rule.predict(images))
    assert rule.model.training


def test_prediction_reads_all_blocks_or_the_last():
    rule = ScalableFF(resnet())
    rule.step(batch())
    images = batch(seed=1)[0]
    everything = rule.predict(images)
    rule.read = "last"
    assert everything.shape == (32, 10)
    assert not torch.equal(everything, rule.predict(images))


def test_clear_errors():
    with pytest.raises(ValueError, match="unit 'block'"):
        ScalableFF(resnet(), unit="block")
    with pytest.raises(ValueError, match="no module 'blcks'"):
        ScalableFF(resnet(), cuts=["blcks"])
    with pytest.raises(ValueError, match=r"classes=3"):
        ScalableFF(resnet(), classes=3).step(batch())
    with pytest.raises(ValueError, match="goes round the unit"):
        ScalableFF(ConvNet(1, 10, depth=8, width=8, stream="residual")).step(batch())
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))))
    assert ScalableFF(plain).step(batch())["loss"] > 0
