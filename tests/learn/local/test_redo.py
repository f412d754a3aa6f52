"""ReDo: scores, what is recycled and what is not, the authors' figures, and the loops that use it."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interlayer.core.rl import DQN, PPO, ActorCritic
from interlayer.learn.local.redo import Recycler, ReDo, dormant, recycle, scores
from interlayer.models import MLP, ConvNet, Transformer


class Authors(nn.Module):
    """Two convolutions and three dense layers, flattened with the channels last, with the weights of a seeded generator."""

    def __init__(self):
        super().__init__()
        self.conv = nn.ModuleList([nn.Conv2d(1, 6, 3), nn.Conv2d(6, 5, 2)])
        self.dense = nn.ModuleList([nn.Linear(20, 8), nn.Linear(8, 7), nn.Linear(7, 3)])
        rng = np.random.default_rng(0)
        for layer in (*self.conv, *self.dense):
            o, i, *kernel = layer.weight.shape
            weight = rng.standard_normal((*kernel, i, o)).astype(np.float32) * 0.5
            layer.weight.data = torch.tensor(weight).movedim((-1, -2), (0, 1)).contiguous()
            layer.bias.data = torch.tensor(rng.standard_normal(o).astype(np.float32) * 0.5)
        self.x = torch.tensor(rng.standard_normal((16, 5, 5, 1)).astype(np.float32)).movedim(-1, 1)

    def forward(self, x):
        for layer in self.conv:
            x = layer(x).relu()
        x = x.movedim(1, -1).flatten(1)
        for layer in self.dense[:-1]:
            x = layer(x).relu()
        return self.dense[-1](x)


def test_scores_and_recycling_are_those_of_the_authors():
    """Figures of dopamine/labs/redo/weight_recyclers.py at commit 5873f54, run on these weights with a threshold of 0.7 and with
    moments of ones."""
    net = Authors()
    published = {
        "conv.0": [0.8647, 1.1139, 1.1717, 1.5803, 0.5058, 0.7636],
        "conv.1": [0.1253, 0.7737, 2.0808, 0.0136, 2.0065],
        "dense.0": [0.0, 0.0, 5.2884, 1.2329, 0.0, 0.0, 1.4366, 0.0422],
        "dense.1": [0.0, 0.3879, 1.7219, 1.0651, 0.0, 1.4394, 2.3858],
    }
    for name, found in scores(net, net.x).items():
        torch.testing.assert_close(found, torch.tensor(published.pop(name)), atol=1e-4, rtol=0)
    assert not published
    before = copy.deepcopy(net)
    optimiser = torch.optim.Adam(net.parameters())
    for p in net.parameters():
        optimiser.state[p] = {
            "step": torch.tensor(9.0),
            "exp_avg": torch.ones_like(p),
            "exp_avg_sq": torch.ones_like(p),
        }
    found = recycle(net, net.x, optimiser, threshold=0.7)
    assert [v.tolist() for v in found.values()] == [[4], [0, 3], [0, 1, 4, 5, 7], [0, 1, 4]]
    # weights that are zero, and weights that changed
    published = {"conv.0": (0, 9), "conv.1": (20, 60), "dense.0": (64, 124), "dense.1": (35, 44), "dense.2": (9, 9)}
    for name, (zeros, changed) in published.items():
        new, old = net.get_submodule(name), before.get_submodule(name)
        assert (int((new.weight == 0).sum()), int((new.weight != old.weight).sum())) == (zeros, changed), name
        assert (new.bias == 0).nonzero()[:, 0].tolist() == (found[name].tolist() if name in found else [])
        state = optimiser.state[new.weight]
        assert state["step"] == 9
        for moment in (state["exp_avg"], state["exp_avg_sq"]):
            assert torch.equal(moment == 0, new.weight != old.weight)
        limit = (6 / sum(nn.init._calculate_fan_in_and_fan_out(new.weight))) ** 0.5
        drawn = new.weight[(new.weight != old.weight) & (new.weight != 0)]
        assert name == "dense.2" or limit / 2 < drawn.abs().max() <= limit
    # where the authors' code repeats the mask in another order: here the four positions of channels 0 and 3, channels last
    assert (net.dense[0].weight == 0).all(0).nonzero()[:, 0].tolist() == [0, 3, 5, 8, 10, 13, 15, 18]


def naive_scores(h):
    """Equation 1, neuron by neuron; the neurons are the last axis."""
    sizes = [sum(abs(float(v)) for v in h[..., i].flatten()) / h[..., i].numel() for i in range(h.shape[-1])]
    return [s / (sum(sizes) / len(sizes) + 1e-9) for s in sizes]


def test_scores_by_the_equation_of_a_conv_net_with_norms_and_pooling():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(27, 5), nn.GELU(),
        nn.Dropout(0.5), nn.Linear(5, 2),
    )  # fmt: skip
    x, found = torch.randn(6, 2, 6, 6), None
    found = scores(net, x)
    net.eval()
    for name, end, axis in (("0", 3, 1), ("3", 5, 1), ("6", 8, 1)):
        naive = naive_scores(net[:end](x).detach().movedim(axis, -1))
        torch.testing.assert_close(found.pop(name), torch.tensor(naive), atol=1e-5, rtol=1e-5)
    assert not found


def test_neurons_of_backbones():
    """Hidden units behind an activation, and nothing else: no residual stream, no heads, no linear layer, no outputs."""
    tokens = torch.randint(50, (2, 6))
    cases = [
        (MLP(4, 2, depth=2, width=8), torch.randn(3, 4), {"blocks.0.0": 8, "blocks.1.0": 8}),
        (
            ConvNet(1, 10, depth=8, width=8),
            torch.randn(2, 1, 8, 8),
            {"blocks.0.0": 8, "blocks.1.0": 16, "blocks.2.0": 32},
        ),
        (Transformer(50, 8, 1, 16, 2), tokens, {"trunk.blocks.0.mlp.up": 64}),
        (ActorCritic(MLP(4, 2, depth=1, width=8), MLP(4, 1, depth=1, width=6)), torch.randn(3, 4), None),
    ]
    for model, inputs, expected in cases:
        found = {name: len(s) for name, s in scores(model, inputs).items()}
        assert found == (expected or {"actor.blocks.0.0": 8, "critic.blocks.0.0": 6})


def test_neurons_of_an_unmodified_hugging_face_model():
    hf = pytest.importorskip("transformers")
    config = hf.GPT2Config(vocab_size=50, n_positions=8, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    model, batch = hf.GPT2LMHeadModel(config).eval(), {"input_ids": torch.randint(50, (2, 6))}
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[:, 7] = model.transformer.h[0].mlp.c_proj.weight[7] = 0
    assert {name: len(s) for name, s in scores(model, batch).items()} == {"transformer.h.0.mlp.c_fc": 64}
    before = model(**batch).logits
    assert recycle(model, batch, threshold=0.0)["transformer.h.0.mlp.c_fc"].tolist() == [7]
    assert torch.equal(model(**batch).logits, before) and model.transformer.h[0].mlp.c_fc.weight[:, 7].all()


def silenced(model, layer, units):
    """The model with some units of a layer made exactly silent behind a ReLU."""
    with torch.no_grad():
        layer.weight[units] = 0
        layer.bias[units] = -1
    return model


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_outputs_stay_to_the_bit_when_silent_neurons_are_recycled_and_they_learn_again(kind):
    torch.manual_seed(0)
    if kind == "mlp":
        net, x = MLP(4, 3, depth=2, width=16), torch.randn(64, 4)
        layer, reader = net.blocks[0][0], net.blocks[1][0]
    else:
        net = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 3))
        x, layer, reader = torch.randn(64, 1, 6, 6), net[0], net[3]
    silenced(net, layer, [1, 4])
    before, silent = net(x).detach(), net[0] if kind == "conv" else net.blocks[0]
    found = recycle(net, x, threshold=0.0)
    name = next(iter(found))
    assert {1, 4} <= set(found[name].tolist())
    torch.testing.assert_close(net(x), before, atol=1e-6, rtol=1e-6)
    assert (silent(x if kind == "conv" else net.embed(x))[:, [1, 4]].relu().flatten(1).max(1).values > 0).any()
    F.cross_entropy(net(x), torch.arange(64) % 3).backward()
    columns = reader.weight.grad.view(reader.weight.shape[0], layer.weight.shape[0], -1)[:, [1, 4]]
    assert columns.abs().sum() > 0, "the outgoing weights hear of the loss at once"


def test_the_change_of_outputs_is_what_the_neurons_gave():
    """Above a threshold of 0 outputs change by no more than the recycled neurons of the last hidden layer gave."""
    torch.manual_seed(0)
    net, x = MLP(4, 3, depth=1, width=32), torch.randn(64, 4)
    h, weight = net.blocks[0](net.embed(x)).detach(), net.head.weight.detach().clone()
    before = net(x).detach()
    found = recycle(net, x, threshold=0.7)["blocks.0.0"]
    assert 3 < len(found) < 32
    torch.testing.assert_close(before - net(x), h[:, found] @ weight[:, found].T)


class Gated(nn.Module):
    """A gated layer: its neurons are products of two maps, fused into one weight or not."""

    def __init__(self, fused):
        super().__init__()
        self.up = nn.ModuleList([nn.Linear(3, 10)] if fused else [nn.Linear(3, 5), nn.Linear(3, 5)])
        self.down = nn.Linear(5, 2)

    def forward(self, x):
        return self.down(F.glu(torch.cat([up(x) for up in self.up], -1)))


@pytest.mark.parametrize("fused", [True, False])
def test_the_two_maps_of_a_gated_neuron_move_together(fused):
    torch.manual_seed(0)
    net, x = Gated(fused), torch.randn(8, 3)
    with torch.no_grad():
        net.up[0].weight[3] = net.up[0].bias[3] = 0
    old = torch.cat([up.weight for up in net.up]).detach()
    assert recycle(net, x, threshold=0.0)["up.0"].tolist() == [3]
    new = torch.cat([up.weight for up in net.up])
    assert (new != old).any(1).nonzero()[:, 0].tolist() == [3, 8] and not net.down.weight[:, 3].any()


def test_a_norm_starts_again_with_its_neuron():
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)),
        torch.randn(8, 1, 6, 6),
    )
    net(x)
    with torch.no_grad():
        net[1].bias[2] = -9.0
        net[1].weight[2] = 0.1
    assert recycle(net, x, threshold=0.0)["0"].tolist() == [2]
    norm = net[1]
    assert [t[2].item() for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var)] == [1, 0, 0, 1]
    assert norm.running_var[0] != 1


def test_the_rule_recycles_when_due_and_draws_as_it_is_asked_to():
    torch.manual_seed(0)
    net = silenced(MLP(4, 3, depth=1, width=16), nn.Linear(1, 1), [0])
    silenced(net, net.blocks[0][0], [2, 5])
    rule = ReDo(net, period=3, threshold=0.0, lr=0.0, draw=lambda w: nn.init.constant_(w, 0.5))
    batch = torch.randn(32, 4), torch.arange(32) % 3
    counts = [rule.step(batch)["recycled"] for _ in range(6)]
    assert counts[:2] == [0, 0] and counts[2] >= 2 and counts[3:5] == [0, 0]
    assert (net.blocks[0][0].weight[[2, 5]] == 0.5).all() and not net.head.weight[:, [2, 5]].any()


@pytest.mark.parametrize("plan", [DQN(steps=400, warm=80, ratio=0.5), PPO(steps=512, horizon=64, batch=64)])
def test_a_hook_of_both_algorithms(plan):
    """The loop's network and optimiser change when it is due: there are fewer dormant neurons, and moments of zero."""
    torch.manual_seed(0)
    net = MLP(4, 2 + isinstance(plan, PPO), depth=1, width=32)
    silenced(net, net.blocks[0][0], list(range(8)))
    shares = []

    def after(update):
        if update.count == 20:
            shares.append(dormant(net, update.observe(64), threshold=0.0))
        Recycler(threshold=0.0, period=20, draw=nn.init.kaiming_normal_)(update)
        if update.count == 20:
            shares.append(dormant(net, update.observe(64), threshold=0.0))
            state = update.optimiser.state[net.head.weight]["exp_avg"]
            assert not state[:, :8].any() and state.any()

    plan.train(net, "CartPole-v1", seed=0, after=after)
    assert shares[0] >= 0.25 > shares[1]


def test_errors():
    x = torch.randn(4, 4)
    with pytest.raises(ValueError, match=r"no neurons to recycle: 0.weight:0 has no activation function"):
        scores(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)), x)
    with pytest.raises(ValueError, match="no neurons to recycle: no units can be permuted"):
        scores(nn.Sequential(nn.Linear(4, 5)), x)
    with pytest.raises(ValueError, match="no linear or convolutional layer"):
        scores(nn.ReLU(), x)
    with pytest.raises(ValueError, match="not written by one layer and read by another"):
        scores(MLP(4, 2, stream="pre-norm"), x)
    with pytest.raises(ValueError, match="'embed' gives numbers that are not finite"):
        scores(MLP(4, 2, depth=1), x * torch.nan)
    for wrong in ({"threshold": -0.1}, {"period": 0}, {"batch": 0}):
        with pytest.raises(ValueError, match=r"ReDo: threshold=.*expected 0, 1 and 1 at least"):
            Recycler(**wrong)
