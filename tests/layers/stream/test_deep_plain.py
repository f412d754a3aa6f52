import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interlayer.layers.stream.deep_plain import DeepPlain, Plain, orthonormality
from interlayer.models import ConvNet, Transformer


def batch(size=16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(size, 1, 8, 8, generator=draw), torch.randint(10, (size,), generator=draw)


def net(depth=20):
    torch.manual_seed(0)
    return ConvNet(1, 10, depth=depth, width=4, stream=Plain)


def test_orthonormality_is_the_sum_over_the_banks_of_every_convolution():
    torch.manual_seed(0)
    weights = [torch.randn(5, 2, 3, 3), torch.randn(7, 3, 1, 1), torch.randn(5, 2, 3, 3)]
    expected = 0.0
    for weight in weights:
        columns = weight.flatten(1).T  # a filter in each column
        for at in range(0, columns.shape[1], columns.shape[0]):
            bank = columns[:, at : at + columns.shape[0]]
            expected += (bank.T @ bank - torch.eye(bank.shape[1])).pow(2).sum() / 2
    torch.testing.assert_close(orthonormality(weights), expected)


def test_the_start_is_orthonormal_bank_by_bank():
    conv = nn.Conv2d(2, 6, 1)  # filters of two weights: three banks of two
    DeepPlain(nn.Sequential(conv, nn.Conv2d(6, 3, 1)))
    rows = conv.weight.flatten(1)
    for bank in rows.split(2):
        torch.testing.assert_close(bank @ bank.T, torch.eye(2))
    kept = net()
    before = copy.deepcopy(kept.state_dict())
    DeepPlain(kept, orthogonal=False)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), kept.state_dict().values(), strict=True))


def test_orthonormal_filters_pass_an_error_with_its_norm():
    """The quasi-isometry that the rule assumes, where it is exact: one orthogonal 1x1 convolution."""
    conv = nn.Conv2d(6, 6, 1, bias=False)
    DeepPlain(nn.Sequential(conv, nn.Conv2d(6, 2, 1)))
    x, e = torch.randn(2, 6, 3, 3, requires_grad=True), torch.randn(2, 6, 3, 3)
    (back,) = torch.autograd.grad(conv(x), x, e)
    torch.testing.assert_close(back.norm(), e.norm())


def naive_errors(model, images, labels, tolerance):
    """Errors at the convolutions' outputs, computed part by part from the end, rescaled as the paper's idea says."""
    parts, steps = list(model), []
    x = images
    for part in parts:
        x = x.detach().requires_grad_()
        y = part(x)
        steps.append((part, x, y))
        x = y
    (error,) = torch.autograd.grad(F.cross_entropy(y, labels), y)
    found, above, grads = [], None, {}
    for part, x, y in reversed(steps):
        if isinstance(part, nn.Conv2d):
            if above is not None and not 1 / tolerance <= above / error.norm() <= tolerance:
                error = error * (above / error.norm())
            above = error.norm()
            found.append(above)
            grads[part] = torch.autograd.grad(y, part.weight, error, retain_graph=True)[0]
        (error,) = torch.autograd.grad(y, x, error, allow_unused=True)
    return found[::-1], grads


@pytest.mark.parametrize("tolerance", [1.0, 1.5, 100.0])
def test_errors_and_gradients_equal_those_computed_part_by_part(tolerance):
    torch.manual_seed(0)
    triples = [
        m for i in range(6) for m in (nn.Conv2d(1 if i == 0 else 4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    ]
    model = nn.Sequential(*triples, nn.Flatten(), nn.Linear(256, 10)).double()
    images, labels = batch()
    images = images.double()
    rule = DeepPlain(model, tolerance=tolerance, lr=0.0, strength=0.0, orthogonal=False)
    expected, grads = naive_errors(copy.deepcopy(model), images, labels, tolerance)
    found = rule.errors((images, labels))
    assert list(found) == [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    torch.testing.assert_close(torch.tensor(list(found.values())), torch.stack(expected).float())
    rule.step((images, labels))
    for conv, grad in zip(rule.convolutions.values(), list(grads.values())[::-1], strict=True):
        torch.testing.assert_close(conv.weight.grad, grad, rtol=1e-5, atol=1e-9)


def test_all_errors_have_one_norm_with_modulation_and_grow_without():
    found = {m: list(DeepPlain(net(44), modulate=m, orthogonal=False).errors(batch()).values()) for m in (True, False)}
    assert len(found[True]) == 43
    assert max(found[True]) / min(found[True]) < 1.001
    assert found[False][0] > 20 * found[False][-1]


@pytest.mark.parametrize("tolerance", [1.0, 2.0])
def test_the_factor_is_the_ratio_of_norms_beyond_the_tolerance(tolerance):
    rule = DeepPlain(net(8), tolerance=tolerance)
    above, norms = torch.tensor(3.0), (1.0, 2.0, 3.0, 5.0, 9.0)
    expected = [3 / n if 3 / n > tolerance or 3 / n < 1 / tolerance else 1.0 for n in norms]
    assert [float(rule.factor(above, torch.tensor(n))) for n in norms] == pytest.approx(expected)
    assert rule.factor(torch.tensor(5.0), torch.tensor(0.0)) == 1  # 0 times infinity would not be a number


def test_looking_changes_nothing():
    rule = DeepPlain(net())
    before = copy.deepcopy(rule.model.state_dict())
    rule.errors(batch())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), rule.model.state_dict().values(), strict=True))
    assert all(p.grad is None for p in rule.model.parameters())
    assert not any(m._forward_hooks for m in rule.model.modules())


def test_the_penalty_alone_makes_filters_orthonormal():
    rule = DeepPlain(net(8), strength=1.0, lr=0.02, orthogonal=False, momentum=0.0)
    rule.step(batch())
    start = rule.step(batch())["penalty"]
    for _ in range(60):
        end = rule.step(batch())["penalty"]
    assert end < 0.05 * start


def test_every_convolution_of_the_plain_stream_is_followed_by_norm_and_activation():
    model, order = net(8), []
    for m in model.modules():
        if isinstance(m, nn.Conv2d | nn.BatchNorm2d | nn.ReLU):
            m.register_forward_hook(lambda m, args, out: order.append(type(m)))
    model(batch()[0])
    assert order == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * 7
    assert (
        Transformer(vocab=9, length=4, depth=2, width=8, heads=2, stream=Plain)(torch.zeros(1, 4, dtype=torch.long))
        .isfinite()
        .all()
    )


def test_clear_errors():
    with pytest.raises(ValueError, match="has 1 convolutions"):
        DeepPlain(nn.Sequential(nn.Conv2d(1, 1, 1)))
    with pytest.raises(ValueError, match=r"tolerance 0\.5"):
        DeepPlain(net(), tolerance=0.5)
