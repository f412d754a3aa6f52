"""NHL: the rule against a loop over positions and SoftHebb's code, its rest, the modulator, foreign models, and mistakes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from interlayer.core import datasets, nano
from interlayer.core.online import adapt_online, batch_statistics, corruptions, entropy
from interlayer.learn.test_time import BatchStatistics, Source, Tent
from interlayer.learn.test_time.nhl import NHL, competition, soft_hebbian
from interlayer.models import ConvNet


def net():
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, 5),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.4)
    return model


def batches(count=3):
    generator = torch.Generator().manual_seed(6)
    return [torch.randn(8, 1, 6, 6, generator=generator) for _ in range(count)]


def vit(channels=1):
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(image_size=8, patch_size=4, num_channels=channels, num_labels=10, **sizes)
    return ViTForImageClassification(config)


def resnet():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    config = ResNetConfig(num_channels=1, layer_type="basic", num_labels=10, **sizes)
    return ResNetForImageClassification(config)


@pytest.mark.parametrize(("stride", "padding", "mode"), [(1, 0, "zeros"), (2, 1, "zeros"), (1, 2, "circular")])
def test_the_rule_equals_a_loop_over_images_and_positions(stride, padding, mode):
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 3, 3, stride, padding, padding_mode=mode)
    x = torch.randn(2, 2, 7, 5)
    padded = F.pad(x, [padding] * 4, "constant" if mode == "zeros" else mode)
    total, count = torch.zeros_like(conv.weight), 0
    for image in padded:
        for top in range(0, image.shape[1] - 2, stride):
            for left in range(0, image.shape[2] - 2, stride):
                patch = image[:, top : top + 3, left : left + 3]
                u = torch.stack([(w * patch).sum() for w in conv.weight])
                y = torch.exp(u / 0.5) / torch.exp(u / 0.5).sum()
                total += torch.stack([y[k] * (patch - u[k] * conv.weight[k]) for k in range(3)])
                count += 1
    torch.testing.assert_close(soft_hebbian(conv, x, 0.5), (total / count).detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(competition(conv(x), 0.5).sum(1), torch.ones(conv(x).shape)[:, 0])


@pytest.mark.parametrize(
    ("stride", "padding", "temperature", "change", "total"),
    [
        (1, 0, 0.5, [-0.02147, 0.11947, -0.02634, 0.58793, -0.05188, 0.18516, -0.39636, -0.25653], -5.12681),
        (2, 1, 0.25, [-0.05242, 0.20893, 0.35034, 0.41169, -0.17241, 0.06123, -0.37861, -0.4878], -5.20333),
    ],
)
def test_the_rule_is_that_of_softhebbs_code(stride, padding, temperature, change, total):
    """HebbSoftConv2d of NeuromorphicComputing/SoftHebb at f425230, whose change is divided by its largest entry."""
    generator = torch.Generator().manual_seed(3)
    conv = nn.Conv2d(2, 4, 3, stride, padding, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.randn(4, 2, 3, 3, generator=generator) * 0.4)
    found = soft_hebbian(conv, torch.randn(5, 2, 6, 6, generator=generator), temperature)
    found = found / found.abs().max()
    assert found.flatten()[::9].tolist() == pytest.approx(change, abs=2e-5)
    assert float(found.sum()) == pytest.approx(total, abs=1e-4)


def test_tent_is_that_of_its_code():
    """Three batches of Tent in DequanWang/tent at e9e926a, with Adam at 0.01."""
    rule = Tent(net(), rate=1e-2)
    for x in batches():
        logits = rule.adapt(x)
    assert logits[0].tolist() == pytest.approx([0.81951, -0.10626, -0.39929, -1.26823, -0.20859], abs=1e-4)
    assert float(logits.abs().sum()) == pytest.approx(22.9227, abs=1e-3)
    affine = [-1.21468, -0.03353, -0.02273, -0.34105, -0.29341, 0.14498, -0.65134, -0.69197, -0.07221, 0.82803, 0.54821,
              -0.37319, -0.04869, -0.23216]  # fmt: skip
    found = torch.cat(list(rule.trained().values())).tolist()
    del found[5], affine[5]  # the next BatchNorm removes this shift, so its slope is rounding
    assert found == pytest.approx(affine, abs=1e-4)


def test_source_and_batch_statistics_learn_nothing():
    x, model = batches(1)[0], net()
    before = copy.deepcopy(model.state_dict())
    assert torch.equal(Source(model).adapt(x), model.eval()(x))
    norm = BatchStatistics(model)
    with batch_statistics(model):
        assert torch.equal(norm.adapt(x), model(x))
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())


def test_one_batch_step_by_step():
    """Kernels first, then the modulator by the entropy of what they give, then the answer."""
    x, naive = batches(1)[0], net()
    rule = NHL(net(), plasticity=0.1, temperature=0.5, rate=0.05)
    logits = rule.adapt(x)
    with torch.no_grad():
        naive[0].weight += 0.1 * soft_hebbian(naive[0], x, 0.5)
    gain, bias = torch.ones(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    with batch_statistics(naive):
        response = naive[1](naive[0](x))

        def top(g, b):
            return naive[2:](response * g[:, None, None] + b[:, None, None])

        slopes = torch.autograd.grad(entropy(top(gain, bias)).mean(), (gain, bias))
        gain, bias = (t.detach() - 0.05 * s / (s.abs() + 1e-8) for t, s in zip((gain, bias), slopes, strict=True))
        torch.testing.assert_close(logits, top(gain, bias).detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rule.gain, gain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rule.bias, bias, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rule.conv.weight, naive[0].weight, rtol=1e-4, atol=1e-6)
    same = [k for k, t in rule.model.state_dict().items() if torch.equal(t, net().state_dict()[k])]
    assert set(net().state_dict()) - set(same) == {"0.weight"}  # the classifier and all else stay


def test_without_rates_it_is_batch_statistics():
    x = batches(1)[0]
    torch.testing.assert_close(NHL(net(), plasticity=0, rate=0).adapt(x), BatchStatistics(net()).adapt(x))


def test_a_certain_prediction_moves_no_modulator():
    """The feedback of entropy vanishes where the top is certain."""
    found = []
    for sharp in (1.0, 1e6):
        rule, x = NHL(net(), plasticity=0), batches(1)[0]
        with torch.no_grad():
            rule.model[-1].weight.mul_(sharp)
        with rule._in_use(), torch.enable_grad():
            rule.gain.requires_grad_(True)
            found.append(torch.autograd.grad(entropy(rule.run(x)).mean(), rule.gain)[0].abs().max())
    assert found[0] > 1e-3 and found[1] < 1e-6


def test_the_modulator_sits_behind_the_norm_that_would_undo_it():
    assert NHL(net()).site == "1"
    bare = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3))
    assert NHL(bare).site == "0"
    assert NHL(net(), first="3").site == "4"
    torch.manual_seed(0)
    conv = ConvNet(1, 10, depth=8, width=4)
    assert (NHL(conv).first, NHL(conv).site) == ("embed", "embed")
    found = NHL(resnet())
    assert found.site == found.first.replace("convolution", "normalization") != found.first
    assert NHL(vit()).site == NHL(vit()).first == "vit.embeddings.patch_embeddings.projection"


@pytest.mark.parametrize("make", [net, resnet, vit], ids=["plain", "resnet", "vit"])
def test_plain_and_hugging_face_models_adapt_reset_and_leave_as_plain_models(make):
    torch.manual_seed(0)
    model = make()
    side = 6 if make is net else 8
    rule, xs = NHL(model, rate=0.05, plasticity=0.05), torch.randn(3, 8, 1, side, side)
    before = copy.deepcopy(model.state_dict())
    for x in xs:
        rule.adapt(x)
    plain = rule.result()
    assert type(plain) is type(model) and plain.state_dict().keys() == before.keys()
    with batch_statistics(plain), torch.no_grad():
        given = plain(xs[0])
    torch.testing.assert_close(getattr(given, "logits", given), rule.answer(xs[0]), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(rule.answer(xs[0]), NHL(make(), first=rule.first).answer(xs[0]))
    rule.reset()
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert rule.gain.tolist() == [1.0] * len(rule.gain) and not rule.bias.any()


def test_a_norm_without_parameters_and_a_convolution_without_bias_take_the_modulator_up():
    for layers in ([nn.BatchNorm2d(2, affine=False)], []):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), *layers, nn.Flatten(), nn.Linear(32, 3))
        rule, x = NHL(model, rate=0.05), torch.randn(4, 1, 6, 6)
        rule.adapt(x)
        plain = rule.result()
        with batch_statistics(plain), torch.no_grad():
            torch.testing.assert_close(plain(x), rule.answer(x), rtol=1e-4, atol=1e-5)


def test_adapting_goes_on_where_a_saved_rule_stopped(tmp_path):
    rule, xs = NHL(net(), rate=0.05, plasticity=0.1), batches(4)
    for x in xs[:2]:
        rule.adapt(x)
    nano.keep(tmp_path / "model.safetensors", rule.model.state_dict())
    torch.save(rule.state_dict(), tmp_path / "rule.pt")
    other = NHL(net(), rate=0.05, plasticity=0.1)
    other.model.load_state_dict(nano.load_file(tmp_path / "model.safetensors"))
    other.load_state_dict(torch.load(tmp_path / "rule.pt", weights_only=True))
    for x in xs[2:]:
        assert torch.equal(rule.adapt(x), other.adapt(x))


def test_a_compiled_model_adapts_uncompiled_and_shares_its_weights():
    plain, x = net(), batches(1)[0]
    rule = NHL(torch.compile(plain, backend="eager"), rate=0.05, plasticity=0.1)
    torch.testing.assert_close(rule.adapt(x), NHL(net(), rate=0.05, plasticity=0.1).adapt(x))
    assert rule.first == "0" and rule.conv is plain[0] and not torch.equal(plain[0].weight, net()[0].weight)


def test_it_runs_under_bfloat16_autocast():
    rule = NHL(net(), rate=0.05, plasticity=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        logits = rule.adapt(batches(1)[0])
    assert logits.isfinite().all() and rule.conv.weight.dtype == rule.gain.dtype == torch.float32


def test_online_error_falls_on_brightened_digits():
    """A net that was trained on clean digits: half as many mistakes as the source, at least."""

    def train(model):
        x, y = datasets.split_digits().train
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
        for rows in torch.randperm(len(y))[:1408].view(11, 128).repeat(4, 1):
            optimiser.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimiser.step()

    def build():
        layers = [nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)]
        return nn.Sequential(
            *layers, nn.Conv2d(6, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(48, 10)
        )

    model = nano.nano(build, train, task="digits", kind="convnet", steps=44)
    images, labels = datasets.digits()
    clean, held = images / 16, torch.arange(len(labels)) % 5 == 4
    stream = corruptions(
        clean[held], labels[held], ["brightness", "contrast"], level=4, then=lambda x: (x - clean.mean()) / clean.std()
    )
    errors = [adapt_online(make(copy.deepcopy(model)), stream, reset="shift").error for make in (Source, NHL)]
    assert errors[1] < errors[0] / 2


def test_mistakes_are_told():
    with pytest.raises(ValueError, match=r"NHL: no nn.Conv2d '' in Linear; expected one of none, there is none"):
        NHL(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"NHL: no nn.Conv2d '1' in Sequential; expected one of \['0', '3'\].*first="):
        NHL(net(), first="1")
    for options in ({"plasticity": -1.0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match=r"NHL: plasticity .*, temperature .*; expected at least 0, and above 0"):
            NHL(net(), **options)
    with pytest.raises(ValueError, match="BatchStatistics: ViTForImageClassification has no BatchNorm"):
        BatchStatistics(vit())
    with pytest.raises(ValueError, match="Tent: Linear has no norm with a gain and a bias"):
        Tent(nn.Linear(2, 2))
    assert len(Tent(vit()).trained()) == 6
