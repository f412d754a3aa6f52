import families
import pytest
import torch
from torch import nn

from interlayer.core import taps
from interlayer.core.order import behind, between, undone
from interlayer.core.select import blocks
from interlayer.models import Transformer


def test_states_behind_the_blocks_of_a_hugging_face_model_are_their_outputs_in_the_graph():
    model, given = families.model("bert").eval(), families.batch("bert")
    at, found = blocks(model)
    with taps.read(model, [f"{at}.{i}" for i in range(len(found))]) as expected, behind(model, at) as seen:
        model(**given)
    assert [len(states) for states in seen] == [1] * len(found)
    for states, wanted in zip(seen, expected.values(), strict=True):
        assert torch.equal(states[0], wanted) and states[0].requires_grad


def test_states_behind_the_blocks_of_a_backbone_are_its_stream_and_nothing_stays():
    torch.manual_seed(0)
    model, ids = Transformer(16, 8, 3, 8, 2, stream="residual"), torch.randint(16, (2, 5))
    at, _ = blocks(model)
    order, plain = model.trunk.order, model(ids)
    with behind(model, at) as seen:
        out = model(ids)
        model(ids)
    assert torch.equal(out, plain) and model.trunk.order is order
    assert [len(states) for states in seen] == [2, 2, 2]
    last = model.trunk.stream.finish
    assert callable(last) and seen[-1][0].shape == (2, 5, 8) and torch.equal(seen[0][0], seen[0][1])
    assert not torch.equal(seen[0][0], seen[1][0])
    seen[0][0].sum().backward()
    assert model.trunk.blocks[0].mlp.up.weight.grad is not None and model.trunk.blocks[1].mlp.up.weight.grad is None


def test_an_order_of_its_own_is_refused():
    model = Transformer(16, 8, 3, 8, 2, order="looped")
    with pytest.raises(ValueError, match=r"Looped order; expected the plain one"), behind(model, blocks(model)[0]):
        pass
    with behind(nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.ReLU())), "1") as seen:
        pass
    assert seen == [[], []]


def test_a_change_between_the_blocks_of_a_hugging_face_model_and_of_a_backbone_acts_until_it_is_undone():
    torch.manual_seed(0)
    ids = torch.randint(16, (2, 5))
    for model, given in (
        (families.model("bert"), families.batch("bert")),
        (families.model("t5"), families.batch("t5")),
        (Transformer(16, 8, 3, 8, 2, stream="residual"), {"tokens": ids}),
    ):
        at, found = blocks(model.eval())
        plain, numbers = families.output(model, given), []
        with behind(model, at) as wanted:
            families.output(model, given)
        states = []
        between(
            model, at, lambda number, x, states=states, numbers=numbers: numbers.append(number) or states.append(x) or x
        )
        assert torch.equal(families.output(model, given), plain)
        assert numbers == list(range(len(found) + 1)) and all(
            torch.equal(a, b[0]) for a, b in zip(states[1:], wanted, strict=True)
        )
        undone(model, at)
        between(model, at, lambda number, x: x + number)
        assert not torch.allclose(families.output(model, given), plain, atol=1e-3)
        undone(model, at)
        assert torch.equal(families.output(model, given), plain)
        assert len(numbers) == len(found) + 1 and not any(
            m._forward_pre_hooks or m._forward_hooks for m in model.modules()
        )


def test_a_change_finds_a_state_that_is_given_by_name():
    class Block(nn.Module):
        def forward(self, *, x):
            return 2 * x

    net = nn.Module()
    net.blocks = nn.ModuleList([Block(), Block()])
    between(net, "blocks", lambda number, x: x + 1)
    assert net.blocks[1](x=net.blocks[0](x=torch.zeros(1))).item() == 7


def test_a_second_change_and_an_order_of_its_own_are_refused():
    model = Transformer(16, 8, 3, 8, 2)
    between(model, "trunk.blocks", lambda number, x: x)
    with pytest.raises(ValueError, match="Between order; expected the plain one"):
        between(model, "trunk.blocks", lambda number, x: x)
    with pytest.raises(ValueError, match="Looped order"):
        between(Transformer(16, 8, 3, 8, 2, order="looped"), "trunk.blocks", lambda number, x: x)
