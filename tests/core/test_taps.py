from collections import namedtuple

import pytest
import torch
from torch import nn

from interlayer.core import taps


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x, *, scale=1.0):
        return {"none": None, "pair": (self.inner(x) * scale, "note")}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Pair() for _ in range(2))
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x, scale=2.0)["pair"][0]
        return self.drop(self.norm(x))


def hooks(model):
    return sum(len(m._forward_hooks) for m in model.modules())


def test_read_inside_tuples_and_dicts():
    model, x = Net().eval(), torch.randn(4, 3)
    with taps.read(model, ["blocks.*"]) as seen, taps.read(model, "blocks.*", side="input", every=True) as inputs:
        model(x)
    assert list(seen) == ["blocks.0", "blocks.1"]
    torch.testing.assert_close(seen["blocks.0"], 2 * model.blocks[0].inner(x), rtol=0, atol=0)
    assert torch.equal(inputs["blocks.1"][0], seen["blocks.0"]) and not seen["blocks.0"].requires_grad
    assert hooks(model) == 0
    with taps.read(model, "blocks.1", detach=False) as seen:
        model(x)
    assert seen["blocks.1"].requires_grad


def test_patch_by_tensor_number_and_function_is_exact():
    model, x = Net().eval(), torch.randn(4, 3)
    given = torch.randn(4, 3)
    with taps.patch(model, {"blocks.1": given, "norm": lambda h: h * 3, "drop": 1.0}), taps.read(model, "norm") as seen:
        out = model(x)
    torch.testing.assert_close(seen["norm"], 3 * model.norm(given))
    assert torch.equal(out, torch.ones(4, 3)) and hooks(model) == 0
    with taps.patch(model, {"blocks.*": taps.clamp([0, 2], 5.0)}), taps.read(model, "blocks.*") as seen:
        model(x)
    assert torch.equal(seen["blocks.0"][:, [0, 2]], torch.full((4, 2), 5.0))
    torch.testing.assert_close(seen["blocks.0"][:, 1], 2 * model.blocks[0].inner(x)[:, 1])


def test_changes_of_one_module_act_in_their_order():
    model, x = nn.Sequential(nn.Linear(3, 3)), torch.randn(4, 3)
    plain = model(x)

    def triple(h):
        return 3 * h

    def more(h):
        return h + 1

    with taps.patch(model, {"0": triple, "*": more}):
        torch.testing.assert_close(model(x), 3 * plain + 1)
    with taps.patch(model, {"*": more, "0": triple}):
        torch.testing.assert_close(model(x), 3 * (plain + 1))
    with taps.patch(model, {"0": 7.0, "*": triple}):
        torch.testing.assert_close(model(x), torch.full((4, 3), 21.0))


def test_patched_output_keeps_the_container():
    Named = namedtuple("Named", "a b")
    old, new = Named(None, [torch.zeros(2), 3]), torch.ones(2)
    swapped = taps.swap(old, new)
    assert isinstance(swapped, Named) and torch.equal(swapped.b[0], new) and swapped.b[1] == 3
    assert torch.equal(old.b[0], torch.zeros(2))
    with pytest.raises(TypeError, match="no tensor"):
        taps.first({"a": None})


def test_hooks_go_even_when_it_fails():
    model = Net()

    def read_badly():
        with taps.read(model, "blocks.*"), taps.patch(model, {"norm": 0.0}):
            model(torch.randn(4, 7))

    with pytest.raises(RuntimeError):
        read_badly()
    assert hooks(model) == 0
    with pytest.raises(ValueError, match="named 'nowhere'"), taps.patch(model, {"norm": 0.0, "nowhere": 0.0}):
        pass
    assert hooks(model) == 0
    with pytest.raises(ValueError, match="expected 'input' or 'output'"), taps.read(model, "norm", side="left"):
        pass


def test_at_rest_puts_everything_back():
    torch.manual_seed(0)
    model, x = Net(), torch.randn(8, 3)
    model.blocks[1].eval()
    model.blocks[0].inner.bias.requires_grad_(False)
    model(x).sum().backward()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes, needs = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()

    def disturb():
        with taps.at_rest(model) as resting:
            assert not any(m.training for m in resting.modules())
            resting.train().requires_grad_(True)
            resting(x).sum().backward()
            raise KeyError

    with pytest.raises(KeyError):
        disturb()
    assert [m.training for m in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == needs
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for p, g in zip(model.parameters(), grads, strict=True):
        assert (p.grad is None) == (g is None) and (g is None or torch.equal(p.grad, g))
    assert torch.equal(torch.get_rng_state(), state)


def test_feed_takes_tensors_mappings_pairs_and_lists():
    model = nn.Linear(2, 1)
    x = torch.randn(3, 2)
    for data, times in (
        (x, 1),
        ((x, 0), 1),
        (({"input": x}, 0), 1),
        ({"input": x}, 1),
        ([x, x], 2),
        ([(x, 0)], 1),
        ([{"input": x}], 1),
    ):
        outs = list(taps.feed(model, data))
        assert len(outs) == times and torch.equal(outs[0], model(x))


def test_hugging_face_model_read_and_patched():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32)).eval()
    tokens = torch.arange(6)[None]
    plain = model(tokens).logits
    with taps.read(model, "**.mlp") as seen:
        assert torch.equal(model(tokens).logits, plain)
    assert list(seen) == ["transformer.h.0.mlp", "transformer.h.1.mlp"] and seen["transformer.h.0.mlp"].shape == (
        1,
        6,
        16,
    )
    with taps.patch(model, {"transformer.h.*.attn": 0.0}):
        swapped = model(tokens).logits
    assert not torch.allclose(swapped, plain) and torch.equal(model(tokens).logits, plain)
