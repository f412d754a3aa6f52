"""HyperFormer: the authors' numbers, places in Hugging Face models, what is shared, counts, files, and a new task."""

import math

import families
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from interlayer.core import attach as at
from interlayer.core.attach import active, attached
from interlayer.core.cost import parameters
from interlayer.core.data import DataShape
from interlayer.models import Transformer
from interlayer.transform.adapt.hyperformer import HyperBytes, HyperFormer, Hypernetwork, adapt, extend, settle

HF = ("gpt2", "llama", "t5", "bart", "bert", "vit")
SMALL = {"embedding": 4, "hidden": 8, "projected": 4, "reduction": 4}


def wave(*shape, k=1):
    """Numbers that any machine makes again."""
    return (0.7 * k * torch.arange(math.prod(shape), dtype=torch.float64)).sin().reshape(shape)


def stirred(model, task="a"):
    """Adapters that do something: larger maps from the projected embedding."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for net in nets(model, task):
            for p in [*net.makers.parameters(), *net.project.parameters()]:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def nets(model, task="a"):
    found = {id(p.net): p.net for p in attached(model)[task].values() if isinstance(p, HyperFormer)}
    return list(found.values())


def out(model, name):
    with torch.no_grad():
        return families.output(model, families.batch(name))


def authors(shared):
    """A hypernetwork with the weights that theirs had."""
    net = Hypernetwork(6, 2, shared=shared, embedding=4, hidden=5, projected=3, reduction=2).double()
    net.add("a")
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(wave(*p.shape, k=2 + p.ndim))
        net.tasks["a"].copy_(wave(4, k=5))
    return net


def test_outputs_and_gradients_are_those_of_the_authors_code():
    """HyperFormer++ (their ``AdapterLayersOneHyperNetController``) and, last, HyperFormer (their ``MetaAdapterController``)."""
    host, y = nn.Linear(6, 6), wave(2, 3, 6, k=7)
    net = authors(True)
    below, beside = (HyperFormer(host, net=net, task="a", layer=1, place=place) for place in (0, 1))
    wanted = [0.28784457537108293, -0.3460831021513102, -0.17150559697250334, 1.0841365443628235, 1.295255278161222]
    assert below(y, y)[0, 0, :5].tolist() == pytest.approx(wanted, rel=1e-9)
    wanted = [0.9256241557814073, 1.5659939930484055, -0.051411196787073205, -0.7153231508482383, 0.5619496769820908]
    assert beside(y, y)[1, 2, :5].tolist() == pytest.approx(wanted, rel=1e-9)
    (beside(y, y) * wave(2, 3, 6, k=11)).sum().backward()
    wanted = [0.0, -0.0025252996906000155, 0.004729667565351527, -0.006332957949871618]
    assert net.project[0].weight.grad[0, :4].tolist() == pytest.approx(wanted, rel=1e-8)
    wanted = [-0.01774563068714533, 0.015722326465136473, -0.011882223798330142, 0.00666906697408644]
    assert net.layers.weight.grad[1].tolist() == pytest.approx(wanted, rel=1e-8)
    assert not net.layers.weight.grad[0].any()
    part = HyperFormer(host, net=authors(False), task="a", layer=1, place=0)
    wanted = [2.9741605156634963, -1.308360036528296, -0.6028563520776049, 3.1871060770956223, 0.5801269789952463]
    assert part(y, y)[0, 0, :5].tolist() == pytest.approx(wanted, rel=1e-9)


def test_the_adapter_is_its_equation_token_by_token():
    torch.manual_seed(0)
    net = Hypernetwork(6, 3, **{**SMALL, "reduction": 2})
    net.add("a")
    part, y = HyperFormer(nn.Linear(5, 6), net=net, task="a", layer=2, place=1), torch.randn(2, 4, 6)
    for p in net.makers.parameters():
        nn.init.normal_(p)
    v = net.project(torch.cat([net.tasks["a"], net.layers.weight[2], net.places.weight[1]]))
    w = {k: (m.weight @ v + m.bias).view(net.shapes[k]) for k, m in net.makers[0].items()}
    for row, given in zip(part(torch.zeros(2, 4, 5), y).flatten(0, 1), y.flatten(0, 1), strict=True):
        inner = F.gelu(w["down_weight"] @ given + w["down_bias"], approximate="tanh")
        z = w["up_weight"] @ inner + w["up_bias"]
        z = (z - z.mean()) / (z.var(correction=0) + 1e-5).sqrt() * w["norm_weight"] + w["norm_bias"]
        torch.testing.assert_close(row, given + z, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_counts_in_closed_form(shared):
    model = adapt(Transformer(16, 8, 3, 32, 2), ["a", "b"], shared=shared, **SMALL, norms=False)
    d, r, e, h, p, layers = 32, 8, 4, 8, 4, 3
    makers = (p + 1) * (2 * d * r + r + 3 * d)
    if shared:
        total = 2 * e + (layers + 2) * e + (3 * e + 1) * h + (h + 1) * p + 2 * p + makers
    else:
        total = 2 * e + (e + 1) * h + (h + 1) * p + 2 * layers * makers
    assert parameters(model, trainable=True) == total


def test_eight_tasks_on_t5_base_cost_what_the_abstract_says():
    """0.29% of T5-base for each task: two hypernetworks, embeddings and the norms of T5."""
    with torch.device("meta"):
        encoder, decoder = (Hypernetwork(768, 12) for _ in range(2))
    nets = sum(p.numel() for net in (encoder, decoder) for p in net.parameters())
    norms = (2 * 12 + 1 + 3 * 12 + 1) * 768
    share = (nets + 8 * 64 + norms) / 8 / 222_903_552
    assert round(100 * share, 2) == 0.29


@pytest.mark.parametrize("name", HF)
def test_tasks_of_a_hugging_face_model(name, tmp_path):
    torch.manual_seed(0)
    model = families.model(name)
    first = out(model, name)
    adapt(model, ["a", "b"], **SMALL)
    hosts = [n for n, p in attached(model)["a"].items() if isinstance(p, HyperFormer)]
    assert len(hosts) == (16 if name in ("t5", "bart") else 8) and not any("EncDec" in n for n in hosts)
    assert len(nets(model)) == (2 if name in ("t5", "bart") else 1) and nets(model)[0].tasks is nets(model)[-1].tasks
    assert {(p.layer, p.place) for p in attached(model)["a"].values() if isinstance(p, HyperFormer)} == {
        (layer, place) for layer in range(4) for place in (0, 1)
    }
    stirred(model)
    mine, other = out(model, name), out(active(model, "b"), name)
    assert (mine - first).abs().max() > 1e-3 and (mine - other).abs().max() > 1e-4
    at.save(active(model, "a"), tmp_path, task="a")
    again = at.load(families.model(name), tmp_path)
    torch.testing.assert_close(out(again, name), mine)
    assert nets(again, "default") == [None]
    torch.testing.assert_close(out(settle(model, "a"), name), mine)
    assert torch.equal(out(active(model), name), first)
    assert torch.equal(out(at.detach(model), name), first)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_generate_with_cache(name):
    torch.manual_seed(0)
    model = stirred(adapt(families.model(name), ["a"], **SMALL))
    ids = families.batch(name)["input_ids"]
    how = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, use_cache=True, **how), model.generate(ids, use_cache=False, **how))


def language():
    torch.manual_seed(0)
    return Transformer(vocab=16, length=8, depth=2, width=16, heads=2)


def test_a_task_learns_through_what_all_share_and_the_base_stays():
    model, tokens = adapt(language(), ["a", "b"], **SMALL), torch.randint(16, (4, 6))
    base = {n: p.clone() for n, p in model.named_parameters() if "attached" not in n}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 1.0)
    embeddings = {t: p.detach().clone() for t, p in nets(model)[0].tasks.items()}
    before = active(model, "b")(tokens).detach()
    active(model, "a")
    for _ in range(3):
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)
    assert not torch.equal(nets(model)[0].tasks["a"], embeddings["a"])
    assert torch.equal(nets(model)[0].tasks["b"], embeddings["b"])
    assert not torch.equal(active(model, "b")(tokens), before)  # through the hypernetwork and the norms
    norms = [p for p in attached(model)["a"].items() if isinstance(p[1], at.Whole)]
    assert norms and all(attached(model)["b"][n] is p for n, p in norms)


def test_a_new_task_begins_like_another_and_shares_its_network():
    model, tokens = stirred(adapt(language(), ["a", "b"], **SMALL)), torch.randint(16, (4, 6))
    wanted = active(model, "b")(tokens)
    new = extend(model, "c", like="b")
    assert torch.equal(new(tokens), wanted) and nets(model, "c") == nets(model, "a")
    assert set(attached(model)["c"]) == set(attached(model)["a"])
    extend(model, "d")
    assert not torch.equal(model(tokens), wanted)


def test_the_network_is_an_arm():
    sizes = {"depth": 1, "width": 16, "steps": 1}
    shape = DataShape("tokens", "classes", classes=2, vocab=256, length=64)
    x = torch.randint(256, (4, 12))
    counts = {}
    for kind in ("hyperformer", "per layer"):
        model = HyperBytes.for_task(shape, kind=kind, **sizes, **SMALL)
        assert model(x).shape == (4, 2)
        counts[kind] = parameters(model, trainable=True)
    assert counts["hyperformer"] != counts["per layer"]


def test_what_cannot_be_adapted_says_why():
    net = Hypernetwork(4, 1)
    net.add("a")
    cases = [
        (lambda: adapt(language(), []), "at least one, each once"),
        (lambda: adapt(language(), ["a", "a"]), "at least one, each once"),
        (lambda: adapt(nn.Sequential(nn.Linear(3, 3)), ["a"]), "no such module under a name that is known"),
        (lambda: Hypernetwork(4, 0), "layers=0"),
        (lambda: HyperFormer(nn.Linear(4, 5), net=net, task="a"), "for 4 features"),
        (lambda: HyperFormer(nn.Linear(5, 4), net=net, task="b"), "and the tasks"),
        (lambda: extend(language(), "a"), "Call adapt first"),
        (lambda: extend(adapt(language(), ["a"], **SMALL), "a"), "a new name"),
        (lambda: extend(adapt(language(), ["a"], **SMALL), "b", like="z"), "like 'z'"),
        (lambda: settle(language(), "a"), "has no HyperFormer"),
        (lambda: HyperFormer(nn.Linear(5, 4)).fill({"down_bias": torch.zeros(3)}), "do not fit"),
        (lambda: HyperBytes(2, kind="prompt"), "'prompt' is not one of"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
