"""CARN: the authors' figures and sizes, cascades against a naive twin, training, and the task of super-resolution."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interlayer.claims import load
from interlayer.core import cost
from interlayer.core.data import DataShape
from interlayer.core.datasets import photograph
from interlayer.core.degraded import Pairs, shrink, to_tensor
from interlayer.domains.image.carn import CARN, Cascade, Residual, fit, published
from interlayer.domains.image.carn.super_resolution import SuperResolution

# The authors' code (carn.py, carn_m.py with 4 groups) with the weights and the image of `figures`: the mean, three pixels and the
# standard deviation for each scale.
THEIRS = {
    ("carn", 2): (0.4413056, 0.5044437, 0.3860392, 0.4348838, 0.0493403),
    ("carn", 3): (0.4414524, 0.5007283, 0.3779967, 0.4408849, 0.0498665),
    ("carn", 4): (0.4415105, 0.4949621, 0.3517712, 0.4452014, 0.0563623),
    ("carn_m", 2): (0.4134229, 0.4296949, 0.4091254, 0.3594072, 0.0558373),
    ("carn_m", 3): (0.4143983, 0.4768159, 0.3979341, 0.3598969, 0.0568567),
    ("carn_m", 4): (0.4144057, 0.4635361, 0.4181439, 0.3582721, 0.0485959),
}


@pytest.mark.parametrize("kind", ["carn", "carn_m"])
def test_numbers_are_those_of_the_authors_code(kind):
    net = (CARN() if kind == "carn" else CARN.mobile()).double()
    for i, p in enumerate(net.parameters()):
        scale = (2 / p[0].numel()) ** 0.5 if p.dim() > 1 else 0.2 * (2 / 25) ** 0.5
        p.data = (torch.sin(torch.arange(p.numel(), dtype=torch.double) * (1.7 + 0.1 * i) + i) * scale).view_as(p)
    image = torch.sin(torch.arange(2 * 3 * 5 * 6, dtype=torch.double)).view(2, 3, 5, 6) / 2 + 0.5
    for s in (2, 3, 4):
        with torch.no_grad():
            y = net(image, s)
        found = (y.mean(), y[0, 0, 0, 0], y[1, 1, 2 * s + 1, 3 * s - 1], y[1, 2, -1, -1], y.std())
        assert [v.item() for v in found] == pytest.approx(THEIRS[kind, s], abs=1e-7)


def test_costs_are_the_published_ones():
    """Multiply-adds for 1280 x 720 pixels; the paper's 412K of CARN-M leave biases out, its 1,592K do not."""
    with torch.device("meta"):
        nets = CARN(), CARN.mobile()
    for net, billions in zip(nets, ((222.8, 118.8, 90.9), (91.2, 46.1, 32.5)), strict=True):
        for s, wanted in zip((2, 3, 4), billions, strict=True):
            small = torch.empty(1, 3, 12 // s, 12 // s, device="meta")
            assert cost.flops(net, small, scale=s) / 2 / 144 * 1280 * 720 / 1e9 == pytest.approx(wanted, abs=0.05)
    assert round(cost.parameters(nets[0]) / 1e3) == 1592
    assert round(sum(p.numel() for p in nets[1].parameters() if p.dim() > 1) / 1e3) == 412


def test_shares_of_group_convolutions_recursion_and_scales():
    x = torch.empty(1, 64, 3, 3, device="meta")
    with torch.device("meta"):
        plain = cost.flops(Residual(64), x)
        for groups in (1, 2, 4, 16, 64):
            assert cost.flops(Residual(64, groups), x) / plain == pytest.approx(1 / groups + 1 / 18)
        block = cost.parameters(Residual(64, 4))
        once, thrice = (cost.parameters(CARN.mobile(recursive=r)) for r in (True, False))
        assert thrice - once == 3 * 2 * block
        shared = cost.parameters(CARN())
        assert shared / sum(cost.parameters(CARN(scales=(s,))) for s in (2, 3, 4)) < 0.5
        fusions = [3 * (9 * 64 * 64 + 3 * 64), 9 * 64 * 64 + 3 * 64]  # local, global
        for cascade, left in (("local", fusions[1]), ("global", fusions[0]), ("none", sum(fusions))):
            assert shared - cost.parameters(CARN(cascade=cascade)) == left


def test_a_cascade_is_its_equation():
    cascade, x = Cascade([nn.Conv2d(2, 2, 3, padding=1) for _ in range(3)], 2, 3), torch.randn(2, 2, 4, 5)
    b, w = cascade.blocks, cascade.fusions
    b1 = b[0](x)
    o1 = F.relu(w[0](torch.cat([x, b1], 1)))
    b2 = b[1](o1)
    o2 = F.relu(w[1](torch.cat([x, b1, b2], 1)))
    torch.testing.assert_close(cascade(x), F.relu(w[2](torch.cat([x, b1, b2, b[2](o2)], 1))))
    one = Cascade([b[0]], 2, 3, fuse=False)
    torch.testing.assert_close(one(x), b[0](b[0](b[0](x))))


def test_the_authors_checkpoint_names_all_weights():
    for net, last in ((CARN(), (0, 2)), (CARN.mobile(), (0, 2, 4))):
        steps = range(1, 1 + len(net.body.blocks[0].blocks))
        names = [f"b{i}.b{j}.body.{k}" for i in (1, 2, 3) for j in steps for k in last]
        names += [f"b{i}.c{j}.body.0" for i in (1, 2, 3) for j in (1, 2, 3)] + [f"c{j}.body.0" for j in (1, 2, 3)]
        names += ["upsample.up2.body.0", "upsample.up3.body.0", "upsample.up4.body.0", "upsample.up4.body.3"]
        names += ["entry", "exit", "sub_mean.shifter", "add_mean.shifter"]
        theirs = {f"{n}.{w}": torch.zeros(1) for n in names for w in ("weight", "bias")}
        assert published(theirs).keys() == net.state_dict().keys()


def test_any_batch_and_size_after_export_and_in_bfloat16():
    net, dynamic = CARN(width=4, scales=(2,)).eval(), torch.export.Dim.DYNAMIC
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        shapes = ({0: dynamic, 2: dynamic, 3: dynamic},)
        program = torch.export.export(net, (torch.rand(2, 3, 6, 7),), dynamic_shapes=shapes).module()
        for size in ((1, 3, 5, 9), (3, 3, 17, 4)):
            image = torch.rand(size)
            torch.testing.assert_close(program(image), net(image))
        wanted = net(image)
        low = net.bfloat16()(image.bfloat16())
    assert low.dtype == torch.bfloat16 and (low.float() - wanted).abs().max() < 0.05


def test_a_step_trains_one_scale_and_the_body():
    photo = torch.rand(1, 3, 48, 48)
    pairs = {s: Pairs([photo], lambda x, s=s: shrink(x, s).clamp(0, 1), scale=s) for s in (2, 3)}
    net = CARN(width=4, scales=(2, 3))
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    fit(net, pairs, steps=1, batch=2, patch=6)
    moved = {
        re.sub(r"(?<=upsample\.\d).*|\..*", "", n) for n, p in net.named_parameters() if not torch.equal(p, before[n])
    }
    assert {"entry", "body", "exit"} < moved and len(moved) == 4


def test_the_learning_rate_is_halved_and_gradients_are_clipped():
    """Adam's first steps are the learning rate's length, whatever the gradient."""
    net = CARN(width=4, scales=(2,))
    weight, seen = net.exit.bias, []
    image = torch.rand(1, 3, 24, 24)
    pairs = Pairs([image], lambda x: shrink(x, 2).clamp(0, 1), scale=2)
    net.register_forward_pre_hook(lambda *_: seen.append(weight.detach().clone()))
    fit(net, {2: pairs}, steps=4, batch=1, patch=12, lr=1e-3, halve=2)
    steps = [(b - a).abs().max().item() for a, b in zip(seen, [*seen[1:], weight.detach()], strict=True)]
    assert steps[0] == pytest.approx(1e-3, rel=0.01) and steps[3] < 0.8 * steps[0]


@pytest.fixture(scope="module")
def small_task():
    gravel, cat = (to_tensor(photograph(name)[:120, :132]) for name in ("gravel", "cat"))
    return SuperResolution("small", [gravel], [cat], side=60, crops=3)


def test_super_resolution_is_a_task(small_task):
    task = small_task
    trivial = task.trivial()
    assert trivial["psnr x2"] > trivial["psnr x3"] > trivial["psnr x4"] > 25
    batches = [next(task.batches(seed, 2)) for seed in range(8)]
    assert {inputs["scale"] for inputs, _ in batches} == {2, 3, 4}
    net = CARN.for_task(task.shape, width=4)
    for inputs, targets in batches[:2]:
        assert net(**inputs).shape == targets.shape and task.loss(net(**inputs), targets).isfinite()
    with pytest.raises(ValueError, match="expected equal shapes"):
        task.loss(torch.zeros(2, 3, 5, 5), targets)
    large = {s: target for s, (_, target) in task.held.items()}
    assert task.evaluate(lambda inputs: large[inputs["scale"]], 1)["psnr"] == float("inf")
    small = task.held[2][0]
    assert torch.equal((small * 255).round() / 255, small) and small.shape == (3, 3, 30, 30)


def test_baselines_of_the_claim_have_its_multiply_adds():
    claim = load("carn")
    sizes = type("Scale", (), claim.scales["small"])
    costs = {}
    for arm in ("CARN", "EDSR-small", "SRCNN"):
        net, side = claim.build(arm, sizes), 12
        costs[arm] = sum(cost.flops(net, torch.zeros(1, 1, side // s, side // s), scale=s) for s in (2, 3, 4))
    assert all(0.95 < costs[arm] / costs["CARN"] < 1.05 for arm in costs)


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match=r"CARN: scales \(5,\)"):
        CARN(scales=(5,))
    with pytest.raises(ValueError, match="cascade 'all' is not one of"):
        CARN(cascade="all")
    with pytest.raises(ValueError, match="width 6 is not a multiple of groups 4"):
        CARN.mobile(width=6)
    with pytest.raises(ValueError, match="scale None; this network has 2, 3, 4"):
        CARN(width=4)(torch.rand(1, 3, 4, 4))
    with pytest.raises(ValueError, match="scale 8"):
        CARN(width=4)(torch.rand(1, 3, 4, 4), scale=8)
    with pytest.raises(ValueError, match=r"expected \[batch, 3, height, width\]"):
        CARN(width=4, scales=(2,))(torch.rand(1, 1, 4, 4))
    with pytest.raises(ValueError, match="takes image data and gives image"):
        CARN.for_task(DataShape("image", "classes", classes=3, channels=3, height=8, width=8))
