import copy

import families
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interlayer import load, save
from interlayer.core import datasets
from interlayer.core.data import answer
from interlayer.transform.sparsify.dlrt import DLRT, Subspace


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def half(y, target):
    """Half the squared distance, whose gradient in the weight is ``W - A`` where the inputs are the identity."""
    return 0.5 * (y - target).square().sum()


def orthonormal(n, r):
    return torch.linalg.qr(torch.randn(n, r, dtype=torch.float64))[0]


def matrix(n, m, singular):
    return orthonormal(n, len(singular)) * torch.tensor(singular, dtype=torch.float64) @ orthonormal(m, len(singular)).T


def flow(n, m, **options):
    """The rule on one matrix alone, and the batch that pulls it towards ``target``."""
    net = nn.Sequential(nn.Linear(m, n, bias=False)).double()
    return DLRT(net, at="0", loss=half, optimizer="sgd", **options)


def pull(rule, target):
    return rule.step((torch.eye(target.shape[1], dtype=target.dtype), target.T))


def gradient(rule, target):
    return (rule.model[0].weight - target).detach()


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (4, 3, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 5, 3, padding="same", bias=False), (4, 3, 7)),
    "conv2d": (lambda: nn.Conv2d(3, 7, (3, 2), stride=2, padding=1, dilation=(1, 2)), (4, 3, 6, 7)),
    "reflected": (lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="reflect"), (4, 3, 5, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_one_pass_gives_the_gradients_of_the_equation_in_k_and_l_and_the_inputs(name):
    make, shape = LAYERS[name]
    layer, x = make().double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    low = Subspace(layer, 3)
    weight = low.weight.requires_grad_()
    twin = copy.deepcopy(layer)
    del twin.weight
    twin.weight = weight
    expected, pushed = twin(x), None
    pushed = torch.randn_like(expected)
    whole, back = torch.autograd.grad(expected, (weight, x), pushed)
    g = whole.flatten(1)
    torch.testing.assert_close(low(x), expected)  # the S-step's pass, and that in use
    s, there = torch.autograd.grad(low(x), (low.S, x), pushed)
    torch.testing.assert_close(s, low.U.T @ g @ low.V)
    torch.testing.assert_close(there, back)
    k, lt = (low.U @ low.S).detach().requires_grad_(), (low.V @ low.S.T).detach().requires_grad_()
    low.open = [k, lt]
    torch.testing.assert_close(low(x), expected)
    found = torch.autograd.grad(low(x), (k, lt, x), pushed)
    for value, wanted in zip(found, (g @ low.V, g.T @ low.U, back), strict=True):
        torch.testing.assert_close(value, wanted)


def value(n, m, s):
    i, j = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(m, dtype=torch.float64)[None]
    return torch.sin(1.7 * i * (j + 1) + s + 0.3 * j)


# Rows of the weight, and the bias, that the authors' optimizer gave with SGD at a rate of 0.1: two steps at a fixed rank of 2,
# and one adaptive step before its truncation.
FIXED = [
    ([0.04678053, 0.00771307, -0.02625275, -0.02620905], [-0.29507286, -0.16625783, 0.30625546, 0.12228264], 0.00798191),
    ([0.05521232, 0.00136011, -0.01972815, -0.03524572], [-0.29963669, -0.16038938, 0.29389243, 0.13436709], 0.01564476),
]  # fmt: skip
GROWN = [
    ([0.04784888, 0.01384642, -0.02164994, -0.02693393], [-0.2937688, -0.16498903, 0.30760569, 0.12387507], 0.00797116)
]


@pytest.mark.parametrize(("tolerance", "steps"), [(None, FIXED), (0.0, GROWN)])
def test_steps_are_those_of_the_authors(tolerance, steps, monkeypatch):
    rule = DLRT(
        nn.Sequential(nn.Linear(4, 5)).double(), rank=0.5, tolerance=tolerance, optimizer="sgd", lr=0.1, at="0", loss=F.mse_loss
    )  # fmt: skip
    layer = rule.model[0]
    layer.U, layer.V = torch.linalg.qr(value(5, 2, 0.1))[0], torch.linalg.qr(value(4, 2, 0.9))[0]
    layer.S.data, layer.bias.data = torch.tensor([0.8, 0.05], dtype=torch.float64).diag(), 0 * layer.bias.data
    if tolerance is not None:
        monkeypatch.setattr(rule, "_truncate", lambda *_: None)
    for first, fourth, bias in steps:
        rule.step((value(6, 4, 0.5), value(6, 5, 0.2)))
        expected = torch.tensor([first, fourth], dtype=torch.float64)
        torch.testing.assert_close(layer.weight[[0, 3]], expected, atol=1e-7, rtol=0)
        assert abs(layer.bias[0].item() - bias) < 1e-7


@pytest.mark.parametrize("tolerance", [None, 1e-12])
@pytest.mark.parametrize("smallest", [1e-1, 1e-4, 1e-9])
def test_a_target_of_the_rank_is_reached_exactly_in_one_step_however_small_its_singular_values(tolerance, smallest):
    target = matrix(12, 10, [1.0, smallest**0.5, smallest])
    rule = flow(12, 10, rank=0.3, tolerance=tolerance, lr=1.0)
    pull(rule, target)
    assert float((rule.model[0].weight - target).norm()) < 1e-13
    assert rule.ranks() == {"0": 3}


def test_the_known_flow_is_followed_with_an_error_that_falls_with_the_step_and_not_with_the_singular_values():
    """``W' = A - W`` has the solution ``A + exp(-t) (W0 - A)``; here of rank 4, with singular values down to 1e-8."""

    def error(steps, smallest):
        torch.manual_seed(1)
        rule = flow(10, 10, rank=0.4, tolerance=None, lr=1.0 / steps)
        u, v = orthonormal(10, 4), orthonormal(10, 4)
        layer, target = (
            rule.model[0],
            u @ torch.tensor([2.0, 1.0, smallest, smallest / 10], dtype=torch.float64).diag() @ v.T,
        )
        turn = torch.linalg.matrix_exp(torch.tensor([[0, 1.0, 0, 0], [-1, 0, 0, 0], [0] * 4, [0] * 4]).double())
        layer.U, layer.V, layer.S.data = (
            u @ turn,
            v,
            torch.tensor([1.0, 0.5, smallest, smallest], dtype=torch.float64).diag(),
        )
        start = layer.weight
        for _ in range(steps):
            pull(rule, target)
        return float((layer.weight - target - torch.exp(torch.tensor(-1.0)) * (start - target)).norm())

    for smallest in (1e-1, 1e-7):
        coarse, fine = error(10, smallest), error(40, smallest)
        assert coarse < 0.15 and 3 < coarse / fine < 5.5  # of first order in the step


def test_each_adaptive_step_descends_at_least_as_far_as_its_bases_promise():
    """f(W1) <= f(W0) - lr (1 - lr / 2) |U1^T grad V1|^2 + what truncation takes."""
    target = matrix(14, 12, [2.0, 1.0, 0.5, 0.3, 0.2, 0.1])
    rule = flow(14, 12, rank=0.25, tolerance=0.01, lr=0.4)
    for _ in range(10):
        before, g = float(gradient(rule, target).square().sum() / 2), gradient(rule, target)
        layer = rule.model[0]
        s = layer.S.detach()
        k, lt = layer.U @ s - 0.4 * g @ layer.V, layer.V @ s.T - 0.4 * g.T @ layer.U
        u, v = torch.linalg.qr(torch.cat((layer.U, k), 1))[0], torch.linalg.qr(torch.cat((layer.V, lt), 1))[0]
        promised = 0.4 * 0.8 * float((u.T @ g @ v).square().sum())
        pull(rule, target)
        after = float(gradient(rule, target).square().sum() / 2)
        cut = 0.01 * float(s.norm() + 1) * 3
        assert promised > 0 and after <= before - promised + cut
    assert after < 1e-3


@pytest.mark.parametrize("rank", [0.1, 0.5])
def test_the_rank_of_the_target_is_found_from_below_and_from_above(rank):
    target = matrix(24, 20, [3.0, 2.0, 2.0, 1.5, 1.0]) + 1e-3 * torch.randn(24, 20, dtype=torch.float64)
    rule = flow(24, 20, rank=rank, tolerance=0.05, lr=0.3)
    seen = [pull(rule, target)["rank"] for _ in range(30)]
    assert (seen[0] < 5 or rank > 0.2) and rule.ranks() == {"0": 5}
    u, s, v = torch.linalg.svd(target)
    best = (u[:, :5] * s[:5]) @ v[:5]
    assert float((rule.model[0].weight - best).norm() / best.norm()) < 2e-3


def test_truncation_leaves_the_best_approximation_within_the_tolerance_and_orthonormal_bases():
    rule = flow(9, 8, rank=1.0, tolerance=0.3, lr=1e-12)
    layer = rule.model[0]
    layer.S.data = torch.tensor([4.0, 2.0, 1.5, 0.9, 0.3, 0.2, 0.1, 0.05], dtype=torch.float64).diag()
    before = layer.weight
    pull(rule, before)
    u, s, v = torch.linalg.svd(before)
    tails = [float(s[r:].norm() / s.norm()) for r in range(8)]
    rank = next(r for r in range(8) if tails[r] <= 0.3)
    assert rule.ranks() == {"0": rank} == {"0": 3}
    torch.testing.assert_close(layer.weight, (u[:, :3] * s[:3]) @ v[:3], atol=1e-9, rtol=0)
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(layer.U.T @ layer.U, eye)
    torch.testing.assert_close(layer.V.T @ layer.V, eye)


def batch(n=32):
    x, y = datasets.split_digits().train
    return x[:n], y[:n]


def net():
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=2, padding=1),
        nn.Flatten(), nn.Linear(128, 24), nn.ReLU(), nn.Linear(24, 10),
    )  # fmt: skip


@pytest.mark.parametrize(("optimizer", "tolerance"), [("sgd", None), ("adam", 0.2)])
def test_dense_and_convolution_layers_learn_and_leave_as_plain_pairs(optimizer, tolerance, tmp_path):
    rule = DLRT(net(), tolerance=tolerance, optimizer=optimizer, lr=0.2 if optimizer == "sgd" else 1e-2)
    assert rule.layers == ["0", "6"] and {r.name for r in rule.skipped} == {"1", "4", "8"}
    told = [rule.step(batch()) for _ in range(16)]
    assert told[-1]["loss"] < 0.8 * told[0]["loss"] and told[-1]["weights"] < 1
    x = batch()[0]
    small, whole = rule.result(), rule.result(merged=True)
    left = sum(p.numel() for p in small.parameters())
    assert left < sum(p.numel() for p in whole.parameters()) and not any(
        isinstance(m, Subspace) for m in small.modules()
    )
    torch.testing.assert_close(small(x), rule.predict(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole(x), rule.predict(x), rtol=1e-4, atol=1e-5)
    assert rule.model.training and type(whole[0]) is nn.Conv2d
    save(small, tmp_path / "there")
    assert torch.equal(load(tmp_path / "there", base=net)(x), small(x))


def test_what_adam_remembers_turns_with_the_bases():
    """In another basis of the same weight, the next step is the same, but for the squares that no rotation keeps."""
    rule = DLRT(net(), tolerance=None, lr=1e-2)
    for _ in range(3):
        rule.step(batch())
    layer, (k, lt) = rule.model[6], rule.factors["6"]
    gone = {name: rule.bases.state[p]["exp_avg"] for name, p in (("k", k), ("l", lt))}
    ambient = gone["k"] @ layer.V.T  # the memory of the gradient in the whole weight, on the old subspace
    old, moved = layer.V.clone(), torch.linalg.qr(layer.V + 0.1 * torch.randn_like(layer.V))[0]
    layer.V = moved
    rule._truncate(layer, k, lt, torch.eye(layer.rank), moved.T @ old)
    torch.testing.assert_close(rule.bases.state[k]["exp_avg"], ambient @ moved)
    assert (rule.bases.state[k]["exp_avg_sq"] >= 0).all()


@pytest.mark.parametrize("family", ["bert", "vit", "gpt2"])
def test_hugging_face_models_train_or_say_why_not(family):
    model, given = families.model(family), families.batch(family)
    if family == "gpt2":  # its maps are of a class of their own
        with pytest.raises(ValueError, match="no layer to factorise"):
            DLRT(model)
        return
    targets = torch.randint(2, answer(model(**given)).shape[:1])
    rule = DLRT(model, rank=0.5, tolerance=0.5, lr=1e-2)
    told = [rule.step((given, targets))["loss"] for _ in range(6)]
    assert told[-1] < told[0] and len(rule.layers) >= 20
    torch.testing.assert_close(
        families.output(rule.result(), given), families.output(model.eval(), given), rtol=1e-3, atol=1e-4
    )


def test_a_model_in_bfloat16_autocast_steps():
    rule = DLRT(nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)), lr=5e-3)
    with torch.autocast("cpu", torch.bfloat16):
        told = [rule.step(batch())["loss"] for _ in range(6)]
    assert told[-1] < told[0] and rule.model[1].U.dtype is torch.float32


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: DLRT(net(), rank=0.0), r"DLRT: rank=0.0, tolerance=0.1"),
        (lambda: DLRT(net(), tolerance=1.0), "tolerance=1.0"),
        (lambda: DLRT(net(), optimizer="lion"), "optimizer was 'lion'; expected 'sgd' or 'adam'"),
        (lambda: DLRT(nn.Sequential(nn.Linear(4, 4))), "no layer to factorise .*the last layer"),
        (lambda: DLRT(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4))), "of rank 2 or less"),
        (lambda: Subspace(nn.Linear(4, 3), 2)(torch.zeros(2, 5)), r"input \(2, 5\); expected 4 features"),
        (lambda: Subspace(nn.Linear(4, 3), 2)(torch.zeros(4)), r"input \(4,\)"),
        (lambda: Subspace(nn.Conv2d(4, 3, 1), 2)(torch.zeros(4, 5, 5)), "expected 4 features, in batches"),
    ],
)
def test_clear_errors(call, says):
    with pytest.raises(ValueError, match=says):
        call()
