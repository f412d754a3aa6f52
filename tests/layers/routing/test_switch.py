import pytest
import torch
from torch import nn
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers import modeling_switch_transformers as hugging

from interlayer.core import aside
from interlayer.core.fit import descend
from interlayer.layers.routing.switch import Switch
from interlayer.models import Transformer
from interlayer.testing.ddp import processes


def test_with_room_for_all_it_is_each_tokens_own_expert():
    torch.manual_seed(0)
    layer, x = Switch(5, hidden=7, experts=3, least=9, scale=2.0).double().eval(), torch.randn(2, 9, 5).double()
    p = (x @ layer.router.T).softmax(-1)
    gate, chosen = p.max(-1)
    wanted = torch.stack(
        [
            gate[b, t] * ((x[b, t] @ layer.up[chosen[b, t]]).relu() @ layer.down[chosen[b, t]])
            for b in range(2)
            for t in range(9)
        ]
    ).view_as(x)
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("length", [6, 13])
def test_against_hugging_face(length):
    torch.manual_seed(0)
    width, hidden, experts = 8, 12, 4
    layer = Switch(width, hidden=hidden, experts=experts, capacity=1.0, least=2, jitter=0.0, scale=3.0)
    config = SwitchTransformersConfig(
        d_model=width, d_ff=hidden, num_experts=experts, expert_capacity=layer.room(length), router_jitter_noise=0.0,
        dropout_rate=0.0,
    )  # fmt: skip
    peer = hugging.SwitchTransformersSparseMLP(config).train()
    with torch.no_grad():
        peer.router.classifier.weight.copy_(layer.router)
        for e, expert in enumerate(peer.experts.values()):
            expert.wi.weight.copy_(layer.up[e].T)
            expert.wo.weight.copy_(layer.down[e].T)
    x = torch.randn(3, length, width)
    with aside.collect() as told:
        ours, theirs = layer(x), peer(x)
    torch.testing.assert_close(ours, theirs)
    kept, _, logits = peer.router(x)
    dropped = 1 - kept.sum().item() / (3 * length)
    assert dropped > 0 and told.means()["routing dropped"] == pytest.approx(dropped)
    loss = hugging.load_balancing_loss_func(logits.softmax(-1), logits.argmax(-1))
    torch.testing.assert_close(told.loss, 0.01 * loss)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(layer.router.grad, peer.router.classifier.weight.grad)
    for e, expert in enumerate(peer.experts.values()):
        torch.testing.assert_close(layer.up.grad[e], expert.wi.weight.grad.T)
        torch.testing.assert_close(layer.down.grad[e], expert.wo.weight.grad.T)


def test_capacities_and_initialisation_as_published():
    torch.manual_seed(0)
    layer = Switch(64, hidden=256, experts=8)
    assert layer.train().room(512) == 80 and layer.eval().room(512) == 128 and layer.room(1) == 4
    for weight, inputs in ((layer.router, 64), (layer.up, 64), (layer.down, 256)):
        std = (0.1 / inputs) ** 0.5
        assert weight.abs().max() <= 2 * std
        assert weight.std().item() == pytest.approx(0.88 * std, rel=0.1)  # of a normal cut at two deviations


def test_a_dropped_token_gets_zeros():
    layer = Switch(4, experts=2, capacity_eval=1.0, least=1).eval()
    nn.init.zeros_(layer.router)  # all tie, so that all want expert 0
    out = layer(torch.randn(1, 6, 4))[0]
    assert out[:3].any(-1).all() and not out[3:].any()


def test_router_is_in_float32_under_autocast():
    torch.manual_seed(0)
    layer, x = Switch(16, experts=4).eval(), torch.randn(2, 10, 16)
    wanted = x @ layer.router.T
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.logits(x), wanted)
        assert layer(x.bfloat16()).dtype == layer(x).dtype == torch.bfloat16


def test_noise_is_on_the_routers_input_in_training_only():
    torch.manual_seed(0)
    layer, x = Switch(16, experts=4), torch.ones(1, 5, 16)
    with torch.no_grad():
        layer.router.copy_(torch.eye(4, 16))
    noisy = layer.train().logits(x)
    assert 0 < (noisy - 1)[..., :4].abs().max() <= 0.0101
    assert torch.equal(layer.eval().logits(x), x @ layer.router.T)
    assert Switch(16, jitter=0.0).train().logits(x).unique(dim=1).shape[1] == 1


def test_dropout_is_inside_the_experts():
    torch.manual_seed(0)
    layer = Switch(8, experts=2, dropout=0.5).train()
    x = torch.randn(1, 8, 8)
    assert not torch.equal(layer(x), layer(x)) and torch.equal(layer.eval()(x), layer(x))


def test_balance_loss_evens_the_experts_out():
    torch.manual_seed(0)
    layer, x = Switch(8, experts=4, balance=1.0, jitter=0.0), torch.randn(4, 32, 8) + 1
    optimizer = torch.optim.Adam(layer.parameters(), 0.02)
    loads = []
    for _ in range(60):
        _, told = descend(layer, optimizer, lambda: layer(x).sum() * 0)
        loads.append(told.means()["routing busiest"])
    assert loads[0] > 1.5 and loads[-1] < 1.25


def test_it_fills_the_mlp_slot_and_decodes():
    torch.manual_seed(0)
    model = Transformer(20, 16, 2, 16, 2, mlp="switch(experts=4, capacity_eval=4.0)", hidden=24).eval()
    assert model.trunk.blocks[0].mlp.up.shape == (4, 16, 24)
    tokens = torch.randint(20, (2, 5))
    more = model.generate(tokens, 6)
    assert torch.equal(more[:, 5:], model(more).argmax(-1)[:, 4:-1])


def test_experts_divided_among_two_processes():
    torch.manual_seed(0)
    layer, x = Switch(6, hidden=5, experts=4, least=1, jitter=0.0, scale=2.0).double(), torch.randn(2, 9, 6).double()

    def run(rank):
        own = layer.divide()
        out = own(x[rank : rank + 1])
        out.square().sum().backward()
        return {"out": out, **{n: p.grad for n, p in own.named_parameters()}}

    parts = processes(2, run)
    out = layer(x)
    out.square().sum().backward()
    torch.testing.assert_close(torch.cat([p["out"] for p in parts]), out.detach())
    torch.testing.assert_close(parts[0]["router"] + parts[1]["router"], layer.router.grad)
    for name in ("up", "down"):
        torch.testing.assert_close(torch.cat([p[name] for p in parts]), getattr(layer, name).grad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 2, "k": 3}, "experts=2, k=3; expected"),
        ({"capacity": 0}, "capacity=0"),
        ({"least": 0}, "least=0"),
        ({"jitter": 1.0}, "jitter=1.0; expected 0 to below 1"),
    ],
)
def test_numbers_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        Switch(4, **options)


def test_wrong_inputs():
    for x in (torch.zeros(2, 3, 5), torch.zeros(4)):
        with pytest.raises(ValueError, match=r"Switch: input .*; expected \[..., tokens, 4\]"):
            Switch(4)(x)
    with pytest.raises(ValueError, match="logits of 3 of 3 tokens are NaN"):
        Switch(4)(torch.full((1, 3, 4), torch.nan))
