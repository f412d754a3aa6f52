import copy
import itertools

import pytest
import torch
from torch import nn

from interlayer.core.wiring import Bridge, in_order, trace


def chain(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [m for a, b in itertools.pairwise(widths[:-1]) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(*widths[-2:])).double()


def convnet(a: int, b: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    body = [nn.Conv2d(2, a, 3), nn.BatchNorm2d(a), nn.ReLU(), nn.Conv2d(a, b, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(4 * b, 3)).double().eval()


class Dense(nn.Module):
    """A network that concatenates: two groups of units on one axis."""

    def __init__(self, a: int, b: int):
        super().__init__()
        self.first, self.second = nn.Linear(3, a), nn.Linear(a + 3, b)
        self.last = nn.Linear(a + b + 3, 2)

    def forward(self, x):
        h = torch.cat((x, self.first(x).relu()), -1)
        return self.last(torch.cat((h, self.second(h).relu()), -1))


def bridge(model, other, x):
    return Bridge(model, other, trace(model, x), trace(other, x))


def mixes(b: Bridge, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, group in b.ours.groups.items():
        made[name] = torch.rand(b.theirs[name].size, group.size, generator=generator, dtype=torch.float64)
    return made


def test_carrying_mixes_every_axis_as_the_equation_says():
    a, b = chain(3, 5, 4, 2), chain(3, 7, 6, 2, seed=1)
    bri = bridge(a, b, torch.randn(2, 3).double())
    p, q = mixes(bri).values()
    out = bri.carry(b.state_dict(), mixes(bri))
    for name, want in {
        "0.weight": p.T @ b[0].weight, "0.bias": p.T @ b[0].bias, "2.weight": q.T @ b[2].weight @ p,
        "2.bias": q.T @ b[2].bias, "4.weight": b[4].weight @ q, "4.bias": b[4].bias,
    }.items():  # fmt: skip
        assert torch.allclose(out[name], want)
    copy.deepcopy(a).load_state_dict(out)  # every shape is that of the first model


def test_kernels_and_flattened_maps_follow_their_channel():
    a, b = convnet(3, 2), convnet(5, 6, seed=1)
    bri = bridge(a, b, torch.randn(2, 2, 6, 6).double())
    p, q = mixes(bri).values()
    out = bri.carry(b.state_dict(), mixes(bri))
    assert torch.allclose(out["3.weight"], torch.einsum("oihw,oj,ik->jkhw", b[3].weight, q, p))
    assert torch.allclose(out["1.running_var"], p.T @ b[1].running_var)
    flat = torch.einsum("cos,oj->cjs", b[6].weight.view(3, 6, 4), q).reshape(3, 8)
    assert torch.allclose(out["6.weight"], flat)


def test_groups_that_share_an_axis_keep_apart_and_what_is_fixed_stays():
    a, b = Dense(4, 3).double(), Dense(6, 5).double()
    bri = bridge(a, b, torch.randn(2, 3).double())
    maps = mixes(bri)
    out = bri.carry(b.state_dict(), maps)
    p, q = (next(m for n, m in maps.items() if n.startswith(k)) for k in ("first", "second"))
    w = b.last.weight
    assert torch.allclose(out["last.weight"], torch.cat((w[:, :3], w[:, 3:9] @ p, w[:, 9:] @ q), 1))


@pytest.mark.parametrize("family", [lambda s: chain(3, 6, 5, 2, seed=s), lambda s: convnet(4, 3, seed=s)])
def test_permutations_keep_the_function_of_the_second_model(family):
    a, b = family(0), family(1)
    x = torch.randn(4, *(3,) if isinstance(a[0], nn.Linear) else (2, 6, 6)).double()
    bri = bridge(a, b, x)
    maps = {n: torch.eye(g.size)[torch.randperm(g.size)] for n, g in bri.ours.groups.items()}
    moved = copy.deepcopy(b)
    moved.load_state_dict(bri.carry(b.state_dict(), maps))
    assert torch.allclose(moved(x), b(x)) and not torch.equal(moved[0].weight, b[0].weight)


def test_heads_and_what_is_inside_them():
    import transformers

    sized = {"n_embd": 12, "n_layer": 1, "n_head": 3, "vocab_size": 30, "n_positions": 12, "bos_token_id": 0}
    torch.manual_seed(0)
    a, b, c, d = (
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sized, **o}, eos_token_id=0, use_cache=False)).eval()
        for o in ({}, {}, {"n_head": 2}, {"n_inner": 20})
    )
    ids = torch.randint(0, 30, (2, 6))
    bri = bridge(a, b, ids)
    assert any(g.parent for g in bri.ours.groups.values())
    maps = {n: torch.eye(g.size)[torch.randperm(g.size)] for n, g in bri.ours.groups.items()}
    moved = copy.deepcopy(b)
    moved.load_state_dict(bri.carry(b.state_dict(), maps))
    assert torch.allclose(moved(ids).logits, b(ids).logits, atol=1e-5)
    with pytest.raises(ValueError, match="same number"):
        bridge(a, c, ids)
    inner = bridge(a, d, ids).theirs["transformer.h.0.mlp.c_fc.weight:1"]
    assert inner.size == 20


def test_groups_that_cross_each_other():
    """Query heads that share values: heads and features lie across each other on the axis of the output projection."""
    import families

    a, b, given = families.model("llama"), families.other("llama"), families.batch("llama")
    wirings = [trace(m, output="logits", **given) for m in (a, b)]
    bri = Bridge(a, b, *wirings)
    assert bri.inner and not any(g.parent for g in bri.ours.groups.values())
    maps = {n: torch.eye(g.size)[torch.randperm(g.size)] for n, g in bri.ours.groups.items()}
    moved = copy.deepcopy(b)
    moved.load_state_dict(bri.carry(b.state_dict(), maps))
    torch.testing.assert_close(families.output(moved, given), families.output(b, given), rtol=1e-3, atol=1e-3)


def test_groups_come_in_the_order_of_the_pass():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.middle, self.first = nn.Linear(4, 2), nn.Linear(5, 4), nn.Linear(3, 5)

        def forward(self, x):
            return self.last(self.middle(self.first(x).relu()).relu())

    model, x = Backwards(), torch.randn(2, 3)
    wiring = trace(model, x)
    assert [g.size for g in wiring.groups.values()] == [4, 5]
    assert [g.size for g in in_order(wiring, model, x)] == [5, 4]


def test_clear_errors():
    a, x = chain(3, 5, 2), torch.randn(2, 3).double()
    with pytest.raises(
        ValueError, match=r"differ at '2.weight': \(2, 5\) here, \(4, 5\) in the other, and axis 0 reaches"
    ):
        bridge(a, chain(3, 5, 4), x)
    with pytest.raises(ValueError, match=r"differ at '4\.weight': nothing here"):
        bridge(a, chain(3, 5, 5, 2), x)
