import pytest
import torch

from interlayer.core.mixer import Cache
from interlayer.core.stream import State
from interlayer.layers.stream.lime import LIMe
from interlayer.models import MLP, Encoder, Transformer

SIZES = {"vocab": 20, "length": 32, "depth": 4, "width": 16, "heads": 4}


def shaken(model):
    with torch.no_grad():
        for router in model.trunk.stream.router:
            router.add_(torch.randn_like(router) * 0.5)
    return model


def naive(routers, ks, vs, block):
    """The equation head by head: every earlier head of every layer so far, weighted."""
    if block == 0:
        return ks[0], vs[0]
    heads = ks[0].shape[1]
    mixed = []
    for parts in (ks, vs):
        out = []
        for h in range(heads):
            terms = [
                routers[block - 1][h, j * heads + g] * parts[j][:, g] for j in range(block + 1) for g in range(heads)
            ]
            out.append(sum(terms))
        mixed.append(torch.stack(out, 1))
    return mixed


def test_values_and_gradients_equal_the_equation():
    torch.manual_seed(0)
    stream = LIMe(4, 6, 3).double()
    with torch.no_grad():
        for router in stream.router:
            router.normal_()
    ks, vs = ([torch.randn(2, 3, 5, 2, dtype=torch.double, requires_grad=True) for _ in range(4)] for _ in range(2))
    state = State(torch.zeros(1))
    wanted = [*ks, *vs, *stream.router]
    fast = [stream.share(state, 2 * b, k, v) for b, (k, v) in enumerate(zip(ks, vs, strict=True))]
    slow = [naive(stream.router, ks, vs, b) for b in range(4)]
    for a, b in zip(fast, slow, strict=True):
        torch.testing.assert_close(a, tuple(b))
    probe = torch.randn(2, 3, 5, 2, dtype=torch.double)
    sums = [sum((k * probe + v.sin()).sum() for k, v in ways) for ways in (fast, slow)]
    for a, b in zip(*(torch.autograd.grad(s, wanted) for s in sums), strict=True):
        torch.testing.assert_close(a, b)


def test_random_initialisation_is_the_authors():
    torch.manual_seed(0)
    stream = LIMe(5, 64, 16, init="random")
    for block, router in enumerate(stream.router, start=1):
        bound = (3 / ((block + 1) * 16)) ** 0.5
        assert router.shape == (16, (block + 1) * 16) and torch.equal(router[:, -16:], torch.eye(16))
        earlier = router[:, :-16]
        assert 0.95 * bound < earlier.abs().max() <= bound and earlier.std().item() == pytest.approx(
            bound / 3**0.5, rel=0.1
        )
    for wrong in ({"init": "zeros"}, {"rate": 0.0}):
        with pytest.raises(ValueError, match="LIMe: init"):
            LIMe(2, 8, 2, **wrong)


def test_rate_is_the_routers_learning_rate_under_adam():
    torch.manual_seed(0)
    k, v = torch.randn(2, 1, 2, 3, 4)
    routers = []
    for rate, lr in ((10.0, 1e-3), (1.0, 1e-2)):
        stream = LIMe(2, 8, 2, rate=rate)
        optimiser = torch.optim.Adam(stream.router.parameters(), lr)
        for _ in range(3):
            state = State(k)
            stream.share(state, 0, k, v)
            mixed = stream.share(state, 2, v, k)
            optimiser.zero_grad()
            (mixed[0].sin().sum() + mixed[1].square().sum()).backward()
            optimiser.step()
        routers.append(rate * stream.router[0].detach())
    torch.testing.assert_close(*routers)
    assert (routers[0] - torch.cat((torch.zeros(2, 2), torch.eye(2)), 1)).abs().max() > 0.01


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_it_is_the_plain_transformer_at_the_start(kv_heads):
    plain, lime = (Transformer(**SIZES, kv_heads=kv_heads, stream=s) for s in ("pre-norm", "lime"))
    missing, extra = lime.load_state_dict(plain.state_dict(), strict=False)
    assert not extra
    assert all("router" in name for name in missing)
    tokens = torch.randint(0, 20, (2, 11))
    torch.testing.assert_close(lime(tokens), plain(tokens))


@pytest.mark.parametrize(("kv_heads", "position"), [(None, "rotary"), (1, "rotary"), (2, "learned")])
def test_decoding_with_a_cache_equals_the_full_pass_and_adds_nothing_to_it(kv_heads, position):
    torch.manual_seed(0)
    model = shaken(Transformer(**SIZES, kv_heads=kv_heads, position=position, stream="lime")).eval()
    tokens = torch.randint(0, 20, (2, 13))
    cache = Cache()
    with torch.no_grad():
        whole = model(tokens)
        steps = [model(tokens[:, :5], cache=cache)]
        steps += [model(tokens[:, i : i + 1], cache=cache) for i in range(5, 13)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)
    assert (
        cache.bytes == 2 * 4 * 13 * 2 * (kv_heads or 4) * 4 * 4
    )  # k, v; layers; tokens; batch; heads; features; bytes


def test_the_last_layer_reads_the_first_ones_values_through_the_router_alone():
    torch.manual_seed(0)
    model = Transformer(**SIZES, stream="lime")
    first = model.trunk.blocks[0].mixer
    with torch.no_grad():
        first.out.weight.zero_()  # the first layer's attention writes nothing
    tokens = torch.randint(0, 20, (2, 8))
    before = model(tokens)
    with torch.no_grad():
        first.qkv.weight[-16:] += 1.0
    torch.testing.assert_close(model(tokens), before)
    with torch.no_grad():
        model.trunk.stream.router[-1][0, 0] = 1.0
    assert not torch.allclose(model(tokens), before)


def test_padding_changes_nothing_in_an_encoder():
    encoder = shaken(Encoder(20, 3, 16, depth=3, width=16, heads=2, stream="lime"))
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    tokens = torch.randint(0, 20, (2, 9))
    torch.testing.assert_close(encoder(tokens, mask=mask)[1:], encoder(tokens[1:, :5]))


def test_what_cannot_work_is_refused():
    k = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match="LIMe: heads 0; it needs attention"):
        MLP(4, 2, stream="lime")
    with pytest.raises(ValueError, match=r"LIMe: keys \(1, 2, 3, 4\).*expected.*\[batch, 3"):
        LIMe(2, 8, 3).share(State(k), 0, k, k)
    with pytest.raises(ValueError, match="LIMe: block 2 runs before block 0"):
        LIMe(3, 8, 2).share(State(k), 4, k, k)
