"""SHERL: the authors' numbers, what is kept for the backward pass, Hugging Face models, files, several tasks, and the ladder."""

import copy
import math

import families
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from interlayer.core import attach as at
from interlayer.core.attach import active, attached
from interlayer.core.cost import bytes_kept, parameters
from interlayer.core.data import DataShape
from interlayer.models import Transformer
from interlayer.transform.adapt._ladder import Ladder, ladder
from interlayer.transform.adapt.sherl import Sherl, SherlBytes, adapt, consolidate, redundancy

HF = ("gpt2", "llama", "t5", "bart", "bert", "vit")


def wave(*shape, k=1):
    """Numbers that any machine makes again."""
    return (0.7 * k * torch.arange(math.prod(shape), dtype=torch.float64)).sin().reshape(shape)


def out(model, name):
    with torch.no_grad():
        return families.output(model.eval(), families.batch(name))


def language(depth=4, **options):
    torch.manual_seed(0)
    return Transformer(16, 8, depth, 16, 2, **options)


def part(model, task="default"):
    return next(iter(attached(model)[task].values()))


@pytest.mark.parametrize(
    ("norm", "wanted", "gate"),
    [
        (False, [4.633692803977, 5.177849510361, 2.136346908003, 0.177881216512, 1.100968635589], 37.612454560601),
        (True, [-0.284929459719, -0.574500588885, 1.083764365489, 0.010802767703, -0.394213293988], 37.612454560601),
    ],
)
def test_outputs_and_gradients_are_those_of_the_authors_code(norm, wanted, gate):
    """``MTSAdapter`` of Paranioar/SHERL's T5, and ``sherl_for_transformer`` of its BERT, in evaluation."""
    mine = Sherl(nn.Linear(8, 8), depth=4, reduction=2, norm=norm).double().eval()
    inner = [f"{n}.{w}" for n in ((0, 1) if norm else ("enter", "mix", "gate")) for w in ("weight", "bias")]
    outer = ["up.0.weight", "up.0.bias", "up.1.weight", "up.1.bias"] if norm else ["up.weight", "up.bias"]
    names = [*(f"down.{i}.{n}" for i in range(4) for n in inner), "score.weight", "score.bias", "gate", *outer]
    assert set(names) == set(dict(mine.named_parameters()))
    with torch.no_grad():
        for k, name in enumerate(names):
            p = mine.get_parameter(name)
            p.copy_(wave(*p.shape, k=2 + k))
        mine.gate.fill_(0.03)
    y = mine(wave(2, 3, 4, 8, k=7))
    assert [*y[0, 0, :3].tolist(), *y[1, 2, :2].tolist()] == pytest.approx(wanted, abs=1e-8)
    (y * wave(2, 3, 8, k=11)).sum().backward()
    assert mine.gate.grad.item() == pytest.approx(gate, rel=1e-9)
    if norm:
        score = [0.0, -0.9793662958622, -6.6764590996425, 4.7821200644408]
        assert mine.score.weight.grad[0].tolist() == pytest.approx(score, rel=1e-7)


def test_consolidation_is_its_equation_and_counts_a_repeated_state_once():
    torch.manual_seed(0)
    z, g, score = torch.randn(5, 4, 6), torch.randn(5, 6), nn.Linear(6, 1)
    for states, guide, found in zip(z, g, consolidate(z, g, score), strict=True):
        weights = []
        for n in range(4):
            cosines = F.cosine_similarity(states[n], states, dim=-1)
            weights.append(score(states[n] * guide).relu() / cosines.relu().sum())
        total = sum(weights)
        wanted = guide + sum(w / total * s for w, s in zip(weights, states, strict=True)) if total else guide
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    a, b = torch.eye(2)
    repeated = consolidate(torch.stack([a, a, 2 * a, b]), torch.zeros(2), lambda x: torch.ones(4, 1))
    torch.testing.assert_close(repeated, torch.tensor([(1 + 1 + 2) / 6, 0.5]))
    assert redundancy(torch.zeros(3, 2)).eq(1).all()
    assert torch.equal(consolidate(z, g, lambda x: -torch.ones(5, 4, 1)), g)  # nothing scores


def test_late_layers_read_what_the_adapter_makes_of_the_states_ahead_of_them():
    for late in (0, 1, 2):
        model, ids = adapt(language(), late=late, reduction=4), torch.randint(16, (2, 5))
        sherl = part(model)
        nn.init.constant_(sherl.gate, 0.2)
        states, seen = [], sherl.route
        sherl.route = lambda given, states=states, seen=seen: states.append(given) or seen(given)
        model(ids)
        assert len(states) == 1 and len(states[0]) == 5 - late and not sherl.seen
        trunk = language().trunk
        state = trunk.stream.start(trunk.position.embed(language().embed(ids), 0))
        torch.testing.assert_close(states[0][0], state.x)
        nn.init.zeros_(sherl.up.weight), nn.init.zeros_(sherl.up.bias)
        nn.init.constant_(sherl.gate, 10.0)  # tanh(100): the skip alone
        torch.testing.assert_close(model(ids), language()(ids))
        nn.init.zeros_(sherl.gate)
        assert not torch.allclose(model(ids), language()(ids), atol=1e-2)


def test_nothing_is_kept_of_the_early_layers_but_their_states():
    model, ids = adapt(language(), reduction=4), torch.randint(16, (2, 5))
    seen, between = [], part(model).between
    part(model).between = lambda number, x: seen.append((number, x.requires_grad)) or between(number, x)
    model(ids).sum().backward()
    assert seen == [(0, False), (1, False), (2, False), (3, False), (4, True)]
    assert all(p.grad is None for n, p in model.named_parameters() if "attached" not in n)
    assert all(p.grad is not None for p in part(model).parameters())

    def kept(depth, make):
        net = make(language(depth))
        return bytes_kept(net, lambda: net(ids).sum())

    def lora(net):
        return at.attach(net, "**.qkv", at.Lora)

    state, hidden = 2 * 5 * 16 * 4, 4
    growth = kept(5, lambda net: adapt(net, reduction=4)) - kept(4, lambda net: adapt(net, reduction=4))
    assert state < growth < state * (1 + 12 * hidden / 16) < (kept(5, lora) - kept(4, lora)) / 3


def test_an_image_gets_no_gradient():
    model = adapt(families.model("vit"), reduction=4)
    image = families.batch("vit")["pixel_values"].requires_grad_()
    model(pixel_values=image).logits.sum().backward()
    assert image.grad is None or not image.grad.any()


@pytest.mark.parametrize("name", HF)
def test_tasks_of_a_hugging_face_model(name, tmp_path):
    torch.manual_seed(0)
    model, norm = families.model(name), name == "bert"
    first = out(model, name)
    adapt(adapt(model, task="a", reduction=4, norm=norm), task="b", reduction=4, norm=norm, late=2)
    assert list(attached(model)["a"]) == list(attached(model)["b"]) and len(attached(model)["a"]) == 1
    mine, other = out(active(model, "a"), name), out(active(model, "b"), name)
    assert (mine - first).abs().max() > 1e-2 and (mine - other).abs().max() > 1e-3
    assert torch.equal(out(copy.deepcopy(active(model, "a")), name), mine)
    at.save(model, tmp_path, task="a")
    again = at.load(families.model(name), tmp_path)
    torch.testing.assert_close(out(again, name), mine)
    with pytest.raises(ValueError, match=r"trained on .* with other weights"):
        other = families.model(name)
        list_of = next(n for n in attached(model)["a"]).rpartition(".")[0]
        nn.init.normal_(next(other.get_submodule(list_of).parameters()))  # of the first block, not of the host
        at.load(other, tmp_path)
    assert torch.equal(out(active(model), name), first)
    assert torch.equal(out(at.detach(model), name), first)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_generate_with_cache(name):
    torch.manual_seed(0)
    model = adapt(families.model(name), reduction=4)
    ids = families.batch(name)["input_ids"]
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, use_cache=True, **how), model.generate(ids, use_cache=False, **how))


def test_a_plain_stack_learns_and_its_base_stays():
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)))
    base = copy.deepcopy(net)
    adapt(net, reduction=2)
    x, y = torch.randn(32, 6), torch.randn(32, 6).sign() * 0.5
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 0.03)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    torch.testing.assert_close(at.detach(net)(x), base(x))
    with pytest.raises(ValueError, match="cannot become plain weights"):
        at.bake(adapt(net, reduction=2))


def test_the_adapted_model_exports_and_follows_autocast():
    model, ids = adapt(language(), reduction=4).eval(), torch.randint(16, (2, 5))
    wanted = model(ids)
    free = torch.export.export(model, (ids,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    torch.testing.assert_close(free(ids.repeat(3, 1)), wanted.repeat(3, 1, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert 0 < (model(ids) - wanted).abs().max() < 0.05
    half = adapt(language().bfloat16(), reduction=4)
    assert half(ids).dtype == torch.bfloat16 and part(half).gate.dtype == torch.float32


def test_the_ladder_replaces_the_last_state_and_keeps_nothing_of_the_backbone():
    model, ids = ladder(language(), length=8, reduction=4), torch.randint(16, (2, 5))
    side = part(model)
    assert isinstance(side, Ladder) and len(side.side) == 4 and side.side[0].width == 4
    model(ids).sum().backward()
    assert all(p.grad is None for n, p in model.named_parameters() if "attached" not in n) and side.rung is None
    assert all(p.grad is not None for p in side.parameters() if p.requires_grad and p is not side.gates)
    assert side.gates.grad[0] == 0 and side.gates.grad[1:].all()
    plain = at.detach(model)
    torch.testing.assert_close(plain(ids), language()(ids))


def test_the_network_is_an_arm():
    shape = DataShape("tokens", "classes", classes=2, vocab=256, length=64)
    x, counts = torch.randint(256, (4, 12)), {}
    for kind in ("sherl", "ladder"):
        model = SherlBytes.for_task(shape, kind=kind, depth=3, width=16, steps=1, reduction=4)
        assert model(x).shape == (4, 2)
        counts[kind] = parameters(model, trainable=True)
    hidden = 4
    down = (16 + 1) * hidden + 2 * (hidden + 1) * hidden
    assert counts["sherl"] == 3 * down + hidden + 1 + 1 + (hidden + 1) * 16 + 2 * 17
    assert counts["ladder"] != counts["sherl"]


def test_what_cannot_be_adapted_says_why():
    convolutions = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)))
    cases = [
        (lambda: adapt(language(), late=4), "fewer late layers than blocks"),
        (lambda: adapt(language(), reduction=32), "at least one feature"),
        (lambda: adapt(language(order="looped")), "Looped order; expected the plain one"),
        (lambda: adapt(convolutions), "no linear map that tells the features"),
        (lambda: adapt(convolutions, width=4, reduction=2)(torch.zeros(1, 4, 5, 5)), "features last"),
        (lambda: adapt(adapt(language(), reduction=4), reduction=4), "part of the task 'default' already"),
        (lambda: part(adapt(language(), reduction=4)).between(2, torch.zeros(1, 5, 16)), "runs after 0 others; expected all blocks once"),
        (lambda: part(adapt(language(), reduction=4))(torch.zeros(2, 3, 16)), r"expected \[..., 4, 16\]"),
        (lambda: at.attach(adapt(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))), reduction=2), "2", at.Lora, task="b"), "span"),
    ]  # fmt: skip
    for make, says in cases:
        with pytest.raises(ValueError, match=says):
            make()
