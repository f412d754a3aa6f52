"""Paired noise: at the start by name, in training by step and module, and clipping that inert parameters don't touch."""

import math
import zlib

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from interlayer.core.pairing import Streams, clip_gradients, paired, shared
from interlayer.models import Transformer

SIZES = {"vocab": 17, "length": 12, "depth": 3, "width": 16, "heads": 2}
TOKENS = (torch.arange(24).view(2, 12) * 5) % 17


class Net(nn.Module):
    """Linear, dropout, linear; with parameters that change nothing, built at one of three places."""

    def __init__(self, extra="", *, scale=1.0, orthogonal=False, noisy=False):
        super().__init__()
        if extra == "first":
            self.extra = nn.Linear(3, 3)
        self.noisy = nn.Dropout(0.5) if noisy else nn.Identity()
        self.one = nn.Linear(6, 8)
        if extra == "middle":
            self.extra = nn.Linear(3, 3)
        self.drop = nn.Dropout(0.3)
        self.two = nn.Linear(8, 4)
        if extra == "last":
            self.extra = nn.Linear(3, 3)
        if orthogonal:
            nn.init.orthogonal_(self.two.weight)
        with torch.no_grad():
            self.one.weight.mul_(scale)

    def forward(self, x):
        y = self.two(self.drop(torch.tanh(self.one(x) + 0 * self.noisy(torch.ones(8)))))
        return y + 0 * self.extra(torch.ones(3)).sum() if hasattr(self, "extra") else y


def curve(build, steps=6):
    """Losses of a short training run with clipping and dropout."""
    model = paired(build, 3).model
    noise, optimiser = Streams(model, 3), torch.optim.AdamW(model.parameters(), lr=0.05)
    chance, losses = torch.Generator().manual_seed(0), []
    for step in range(steps):
        x = torch.randn(5, 6, generator=chance)
        with noise.step(step):
            loss = model(x).square().mean()
            optimiser.zero_grad()
            loss.backward()
        clip_gradients(model.parameters(), 0.05)
        optimiser.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("at", ["first", "middle", "last"])
def test_parameters_without_effect_give_the_plain_curve_to_the_last_bit(at):
    assert curve(lambda: Net(at)) == curve(Net)


def test_an_arm_with_its_own_dropout_leaves_the_other_masks_alone():
    assert curve(lambda: Net(noisy=True)) == curve(Net)


def test_seeds_differ_and_repeat_and_the_global_generator_stays():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two, other = paired(Net, 0), paired(Net, 0), paired(Net, 1)
    assert torch.equal(before, torch.get_rng_state())
    assert shared(one, two) == 1.0 and shared(one, other) == 0.0
    assert torch.equal(one.model.one.weight, two.model.one.weight)
    assert not torch.equal(one.model.one.weight, other.model.one.weight)
    with pytest.raises(RuntimeError, match="on purpose"):
        paired(lambda: (_ for _ in ()).throw(RuntimeError("on purpose")), 0)
    assert torch.equal(before, torch.get_rng_state())


def test_what_a_model_does_to_its_noise_stays_its_own():
    plain = paired(Net, 0).model
    doubled = paired(lambda: Net(scale=2.0), 0).model
    assert torch.equal(doubled.one.weight, 2 * plain.one.weight) and torch.equal(doubled.two.weight, plain.two.weight)
    turned = paired(lambda: Net(orthogonal=True), 0).model
    assert torch.allclose(turned.two.weight @ turned.two.weight.T, torch.eye(4), atol=1e-6)
    assert torch.equal(turned.one.weight, plain.one.weight)
    gates = paired(lambda: Transformer(**SIZES, stream="rezero"), 0).model.trunk.stream.gate
    assert torch.equal(gates, torch.zeros(3))


@pytest.mark.parametrize(
    "arm", ["denseformer", "muddformer", "lime", "value-residual(mode='learnable(weights=(0, 1))')"]
)
def test_streams_that_begin_as_plain_have_its_loss_at_step_0(arm):
    plain, other = (paired(lambda s=s: Transformer(**SIZES, stream=s), 0) for s in ("pre-norm", arm))
    names = {name for name, _ in plain.model.named_parameters()} & {name for name, _ in other.model.named_parameters()}
    theirs = dict(other.model.named_parameters())
    if arm != "lime":  # its first layer has fewer values
        assert len(names) > 10
    assert all(
        torch.equal(p, theirs[n])
        for n, p in plain.model.named_parameters()
        if n in names and p.shape == theirs[n].shape
    )
    ours, base = (nn.functional.cross_entropy(m.model(TOKENS).flatten(0, 1), TOKENS.flatten()) for m in (other, plain))
    assert ours.item() == pytest.approx(base.item(), abs=1e-6)


def _hugging(kind):
    import transformers as hf

    make = {
        "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32)),
        "llama": lambda: hf.LlamaForCausalLM(
            hf.LlamaConfig(
                hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32
            )
        ),
        "t5": lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=32, decoder_start_token_id=0)
        ),
    }
    return make[kind]


MADE = {
    "lstm": lambda: nn.LSTM(5, 7, 2, bidirectional=True),
    "attention": lambda: nn.MultiheadAttention(8, 2),
    "performer": lambda: Transformer(**SIZES, mixer="performer"),
    **{kind: _hugging(kind) for kind in ("gpt2", "llama", "t5")},
}


@pytest.mark.parametrize("kind", MADE)
def test_a_module_more_in_front_shifts_nothing(kind):
    def arm():
        holder = nn.Module()
        holder.front = nn.Linear(11, 3)
        nn.init.trunc_normal_(holder.front.weight, std=0.5, a=-0.6, b=0.6)
        holder.inner = MADE[kind]()
        return holder

    def base():
        holder = nn.Module()
        holder.inner = MADE[kind]()
        return holder

    one, two = paired(base, 4), paired(arm, 4)
    assert one.drawn and not one.unpaired and not two.unpaired
    mine, theirs = one.model.inner.state_dict(), two.model.inner.state_dict()
    assert all(torch.equal(t, theirs[name]) for name, t in mine.items())
    assert {n: s for n, s in two.drawn.items() if n.startswith("inner")} == dict(one.drawn)
    assert shared(two, one) == pytest.approx(1 - (33 + 3) / sum(math.prod(s) for s in two.drawn.values()))


def test_redraws_partial_writes_ties_and_lazy_modules():
    class Odd(nn.Module):
        def __init__(self, redraw):
            super().__init__()
            self.a = nn.Parameter(torch.randn(4))
            if redraw:
                nn.init.normal_(self.a)
            self.b = nn.Parameter(torch.zeros(6))
            with torch.no_grad():
                self.b[:2] = torch.rand(2)
                self.b[4:].uniform_()
            self.c = self.a
            self.d = nn.LazyLinear(3)

        def forward(self, x):
            return self.d(x)

    built = [paired(lambda r=r: Odd(r), 0, materialise=lambda m: m(torch.ones(1, 5))) for r in (False, True)]
    for found in built:
        assert set(found.drawn) == {"a", "b", "d.weight", "d.bias"} and found.model.c is found.model.a
        assert torch.equal(found.model.b[2:4], torch.zeros(2)) and (found.model.b[:2] != 0).all()
    for name in ("a", "b", "d.weight"):
        assert torch.equal(built[0].model.get_parameter(name), built[1].model.get_parameter(name)), name
    with pytest.raises(ValueError, match=r"'d\.weight' belongs to a lazy module.*materialise"):
        paired(lambda: Odd(False), 0)


def test_generators_of_ones_own_are_left_alone_and_reported():
    def make():
        net = nn.Linear(3, 2)
        nn.init.normal_(net.bias, generator=torch.Generator().manual_seed(1))
        return net

    found = paired(make, 0)
    assert set(found.drawn) == {"weight"} and set(found.unpaired) == {"bias"}
    assert torch.equal(found.model.bias, torch.randn(2, generator=torch.Generator().manual_seed(1)))
    assert shared(found, paired(make, 0)) == pytest.approx(6 / 8)


def test_a_dropout_used_twice_has_two_masks_and_a_checkpoint_repeats_its_own():
    class Twice(nn.Module):
        def __init__(self, recompute):
            super().__init__()
            self.w, self.drop, self.recompute = nn.Linear(20, 20), nn.Dropout(0.5), recompute
            self.masks = []

        def part(self, x):
            y = self.drop(self.w(x))
            self.masks.append(y == 0)
            return y

        def forward(self, x):
            for _ in range(2):
                x = checkpoint(self.part, x, use_reentrant=False) if self.recompute else self.part(x)
            return x

    gradients = []
    for recompute in (False, True):
        model = paired(lambda r=recompute: Twice(r), 0).model
        noise = Streams(model, 0)
        for step in range(2):
            model.zero_grad()
            with noise.step(step):
                model(torch.ones(2, 20)).square().sum().backward()
        assert not torch.equal(model.masks[-1], model.masks[-2])
        gradients.append(model.w.weight.grad)
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert torch.equal(*gradients)


def test_hooks_go_when_a_step_raises():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1))
    noise = Streams(model, 0)
    with pytest.raises(RuntimeError), noise.step(0):
        model(torch.ones(2, 4))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_clipping_is_torchs_but_for_gradients_of_zero():
    chance = torch.Generator().manual_seed(zlib.crc32(b"clip"))
    weights = [nn.Parameter(torch.zeros(n)) for n in (5, 300, 7)]
    for w in weights:
        w.grad = torch.randn(w.shape, generator=chance)
    before = [w.grad.clone() for w in weights]
    norm = clip_gradients(weights, 2.0)
    assert norm == pytest.approx(math.sqrt(sum(g.double().square().sum() for g in before)), rel=1e-6)
    assert all(torch.allclose(w.grad, g * (2.0 / norm)) for w, g in zip(weights, before, strict=True))
    weights[0].grad.fill_(math.nan)
    kept = weights[1].grad.clone()
    assert math.isnan(clip_gradients(weights, 0.1)) and torch.equal(weights[1].grad, kept)
    with pytest.raises(ValueError, match="most 0"):
        clip_gradients(weights, 0)


@pytest.mark.parametrize("slots", [{}, {"stream": "muddformer"}, {"stream": "value-residual", "norm": "rmsnorm"}])
def test_a_plan_spares_a_build_and_changes_no_number(slots):
    built = []

    def build():
        built.append(1)
        return Transformer(vocab=20, length=8, depth=2, width=8, heads=2, **slots)

    first = paired(build, 0)
    once = 1 if first.plan.unread else 2
    assert len(built) == once == (2 if slots else 1)
    for seed in (0, 1):
        quick, slow = paired(build, seed, plan=first.plan), paired(build, seed)
        assert (quick.drawn, quick.unpaired, quick.noise) == (slow.drawn, slow.unpaired, slow.noise)
        assert all(map(torch.equal, quick.model.parameters(), slow.model.parameters()))
    assert len(built) == once + 2 * (1 + once)


def _drawn_again(reads):
    """Layers drawn twice or filled with constants; what reads a drawn number says why one build is not enough."""
    net = nn.Sequential(nn.Linear(4, 40), nn.BatchNorm1d(40), nn.Embedding(5, 4), nn.Conv1d(4, 2, 3, bias=False))
    for weight in (net[0].weight, net[2].weight):
        nn.init.normal_(weight, std=0.1)
    if reads == "copy":
        net.start = net[0].weight.detach().clone()
    elif reads == "scale":
        nn.init.orthogonal_(net[0].weight)
    elif reads == "value":
        net.largest = net[0].weight.max().item()
    elif reads == "attribute":
        net.start = torch.empty(3).normal_()
    elif reads == "numpy":
        nn.init.constant_(net[0].bias, np.random.default_rng().random())
    elif reads == "part":
        net.part = nn.Parameter(net[0].weight.detach().view(-1)[:160].view(40, 4))
        net[0].weight = nn.Parameter(torch.empty(80, 4).normal_()[:40])
    elif reads == "table":
        net.register_buffer("turns", torch.cos(torch.arange(6) / 10000 ** (torch.arange(6) / 6)))
    elif reads == "order":
        net[0].weight = nn.Parameter(torch.empty(4, 40).t().normal_())
    return net


@pytest.mark.parametrize("reads", ["", "table", "copy", "scale", "value", "attribute", "numpy", "part", "order"])
def test_one_build_where_nothing_reads_a_draw_gives_what_two_builds_give(reads):
    built = []

    def build(second=False):
        built.append(1)
        net = _drawn_again(reads)
        if second:
            net.register_buffer("more", torch.full((1,), 0.5))
        return net

    one = paired(build, 3)
    single = reads in ("", "table")
    assert len(built) == (1 if single else 2)
    two = paired(lambda: build(second=True), 3)
    assert len(built) == (3 if single else 4)
    same = set(one.model.state_dict()) - ({"0.bias"} if reads == "numpy" else set())
    assert all(torch.equal(one.model.state_dict()[name], two.model.state_dict()[name]) for name in same)
    assert (one.drawn, one.noise, one.unpaired) == (two.drawn, two.noise, two.unpaired)
    assert set(one.unpaired) == ({"0.bias"} if reads == "numpy" else set())
    assert one.plan.names == two.plan.names and one.plan.unread == single
    again, fresh = paired(build, 4, plan=one.plan), paired(build, 4)
    assert all(torch.equal(again.model.state_dict()[name], fresh.model.state_dict()[name]) for name in same)
    assert (again.drawn, again.noise, again.unpaired) == (fresh.drawn, fresh.noise, fresh.unpaired)
    if reads == "copy":
        assert torch.equal(one.model.start, one.model[0].weight)
    if reads == "value":
        assert one.model.largest == one.model[0].weight.max()


def test_a_plan_of_another_build_is_ignored():
    def build(more):
        return nn.Sequential(nn.Linear(4, 4), *[nn.Linear(4, 4)] * more, nn.Linear(4, 2))

    plan = paired(lambda: build(0), 0).plan
    for other in (lambda: build(1), lambda: nn.Sequential(nn.Linear(4, 4)), lambda: nn.Bilinear(3, 3, 2)):
        quick, slow = paired(other, 3, plan=plan), paired(other, 3)
        assert all(map(torch.equal, quick.model.parameters(), slow.model.parameters())) and quick.drawn == slow.drawn


def test_a_plan_remembers_what_could_not_be_paired():
    def build():
        model = nn.Linear(2, 2)
        model.register_buffer("odd", torch.from_numpy(np.random.default_rng().random(3)))
        return model

    first = paired(build, 0)
    assert set(first.unpaired) == {"odd"} == set(paired(build, 1, plan=first.plan).unpaired)


def test_sparse_tensors_are_passed_over():
    def build():
        model = nn.Linear(2, 2)
        model.register_buffer("graph", torch.eye(3).to_sparse().zero_())
        return model

    assert paired(build, 0).drawn == {"weight": (2, 2), "bias": (2,)}
