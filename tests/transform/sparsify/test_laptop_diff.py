import copy
import itertools
from pathlib import Path

import families
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from typer.testing import CliRunner

from interlayer import load
from interlayer.cli import app
from interlayer.core import taps
from interlayer.core.fit import fit
from interlayer.transform.sparsify import laptop_diff
from interlayer.transform.sparsify.laptop_diff import Distillation, LaptopDiff, Skip, losses, removable, without


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self, width=6, size=None):
        super().__init__()
        self.up, self.down = nn.Linear(width, size or width), nn.Linear(size or width, width)

    def forward(self, x):
        return x + self.down(self.up(x).tanh())


class Net(nn.Module):
    """Residual blocks of several sizes between two maps."""

    def __init__(self, sizes=(4, 8, 12, 16, 20)):
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 6), nn.Linear(6, 2)
        self.blocks = nn.ModuleList(Block(6, size) for size in sizes)

    def forward(self, x):
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.leave(x)


def silent(branch):
    """A layer's branch multiplied by 0."""

    class Zero(nn.Module):
        def forward(self, weight):
            return 0 * weight

    for layer in branch:
        for name in ("weight", "bias"):
            parametrize.register_parametrization(layer, name, Zero())


def unet():
    model, given = laptop_diff._unet()
    return model.eval(), given


def test_a_removed_layer_of_a_unet_is_the_layer_with_a_silent_branch():
    model, given = unet()
    there, _ = removable(model, given)
    assert there["up_blocks.0.resnets.0"] == {"shortcut": "conv_shortcut", "scale": 1.0, "packed": False}
    for name in there:
        quiet = copy.deepcopy(model)
        layer = quiet.get_submodule(name)
        silent([layer.conv2] if hasattr(layer, "conv2") else [layer.to_out[0]])
        gone = without(copy.deepcopy(model), {name: there[name]})
        torch.testing.assert_close(gone(**given).sample, quiet(**given).sample)
        assert sum(p.numel() for p in gone.parameters()) < sum(p.numel() for p in model.parameters())


def test_losses_are_what_leaving_out_one_layer_does_to_the_output_over_all_batches():
    model, x = Net(), torch.randn(10, 3)
    there, skipped = removable(model, x)
    assert [*there] == [f"blocks.{i}" for i in range(5)] and not skipped
    found = losses(model, there, [x[:4], (x[4:], torch.zeros(6))])
    for i in range(5):
        less = copy.deepcopy(model)
        del less.blocks[i]
        torch.testing.assert_close(found[f"blocks.{i}"], (less(x) - model(x)).square().mean().item())


@pytest.mark.parametrize("share", [0.2, 0.4, 0.6])
def test_the_choice_is_the_best_of_all_sets_that_are_large_enough(share):
    model, x = Net(), torch.randn(10, 3)
    there, _ = removable(model, x)
    found, total = losses(model, there, x), sum(p.numel() for p in model.parameters())
    size = {n: sum(p.numel() for p in model.get_submodule(n).parameters()) for n in there}
    sets = [s for k in range(6) for s in itertools.combinations(there, k) if sum(map(size.get, s)) >= share * total]
    best = min(sets, key=lambda s: sum(found[n] for n in s))
    plan = LaptopDiff(share=share).plan(model, x)
    assert {r.name for r in plan.touched} == set(best)
    new = plan.apply()
    assert sum(p.numel() for p in new.parameters()) == total - sum(size[n] for n in best) <= (1 - share) * total
    assert all(isinstance(new.get_submodule(n), Skip) and not [*new.get_submodule(n).parameters()] for n in best)


def test_scales_and_tuples_are_kept():
    attention = pytest.importorskip("diffusers.models.attention_processor").Attention(
        8, heads=2, dim_head=4, residual_connection=True, rescale_output_factor=2.0
    )

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.list = nn.ModuleList([attention, nn.Sequential(nn.Linear(8, 8))])

        def forward(self, x):
            return self.list[1](self.list[0](x))

    class Packed(Block):
        def forward(self, hidden=None, mask=None):
            return (super().forward(hidden),)

    x = torch.randn(2, 3, 8)
    assert removable(Wrapped(), x)[0]["list.0"]["scale"] == 2.0
    assert torch.equal(Skip(scale=2.0)(x), x / 2)
    net = Net()
    net.blocks[1] = Packed()
    net.blocks[1].register_forward_hook(lambda m, a, o: o)  # a tuple reaches the next layer unless it is opened
    net.forward = lambda x: net.leave(net.blocks[1](hidden=net.enter(x), mask=None)[0])
    how = removable(net, torch.randn(4, 3))[0]["blocks.1"]
    assert how["packed"] and torch.equal(Skip(packed=True)(hidden=x, mask=None)[0], x)


def test_at_chooses_and_what_cannot_go_says_why():
    class Odd(Net):
        def __init__(self):
            super().__init__()
            self.blocks[1] = self.blocks[0]
            self.unused = nn.ModuleList([Block()])
            self.tied = nn.ModuleList([Block()])
            self.tied[0].up = self.blocks[3].up = nn.Linear(6, 6)
            self.blocks[3].down = nn.Linear(6, 6)

        def forward(self, x):
            return super().forward(x) + self.leave(self.tied[0](self.enter(x)))

    model, x = Odd(), torch.randn(4, 3)
    there, skipped = removable(model, x)
    why = {r.name: r.why for r in skipped}
    assert [*there] == ["blocks.2", "blocks.4"]
    assert why["blocks.0"] == "runs 2 times in a pass" and why["unused.0"] == "never ran on the data"
    assert "shares weights with" in why["blocks.3"] and "shares weights with" in why["tied.0"]
    plan = LaptopDiff(share=0.1, at=["blocks.4"]).plan(model, x)
    assert [r.name for r in plan.touched] == ["blocks.4"]
    model, given = unet()
    why = {r.name: r.why for r in removable(model, given)[1]}
    assert "no shortcut" in why["down_blocks.0.downsamplers.0"] and "3 tensors" in why["down_blocks.0"]


@pytest.mark.parametrize("name", ["unet", "dit", "gpt2", "llama", "mamba", "bert", "vit", "resnet", "t5", "bart"])
def test_families_lose_layers_are_saved_and_generate(name, tmp_path):
    new = families.transformed(LaptopDiff(share=0.05), name, tmp_path / name, refuses="removed layers")
    assert any(isinstance(m, Skip) for m in new.modules())


def test_a_stage_of_several_blocks_goes_block_by_block():
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.UNet2DConditionModel(
        sample_size=4, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",), cross_attention_dim=4, attention_head_dim=4,
        transformer_layers_per_block=3,
    ).eval()  # fmt: skip
    given = {
        "sample": torch.randn(2, 1, 4, 4),
        "timestep": torch.tensor([1, 9]),
        "encoder_hidden_states": torch.randn(2, 3, 4),
    }
    there, skipped = removable(model, given)
    assert {f"down_blocks.0.attentions.0.transformer_blocks.{i}" for i in range(3)} < there.keys()
    assert "3 layers" in {r.name: r.why for r in skipped}["down_blocks.0.attentions.0"]
    new = LaptopDiff(share=0.3).plan(model, given).apply()
    assert new(**given).sample.shape == (2, 1, 4, 4)


def test_refusals_say_what_is_wrong():
    model, x = Net(), torch.randn(4, 3)
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="share was"):
            LaptopDiff(share=share)
    with pytest.raises(ValueError, match="no calibration data"):
        LaptopDiff().plan(model)
    with pytest.raises(ValueError, match="that can be removed hold"):
        LaptopDiff(share=0.99).plan(model, x)
    with pytest.raises(ValueError, match="not finite"):
        LaptopDiff().plan(model, torch.full((2, 3), torch.nan))
    with pytest.raises(ValueError, match="expected none below 0"):
        Distillation(model, at=["blocks.*"], feature=-1)
    with pytest.raises(ValueError, match="nothing in Net"):
        Distillation(model)
    other = Net()
    other.leave = nn.Linear(6, 3)
    with pytest.raises(ValueError, match=r"the student gives \(4, 3\), the teacher \(4, 2\)"):
        Distillation(model, at=["leave"])(other, (x, None))
    other.blocks[2], other.leave = nn.Linear(6, 5), nn.Linear(5, 2)
    del other.blocks[3:]
    with pytest.raises(ValueError, match=r"blocks.2 gives \(4, 5\) in the student and \(4, 6\)"):
        Distillation(model, at=["blocks.2"])(other, (x, None))


def test_the_distillation_is_its_equation_and_squares_make_the_size_of_features_not_matter():
    teacher, student, x, y = Net(), Net(), torch.randn(5, 3), torch.randn(5, 2)
    at = ["blocks.0", "blocks.3"]
    with taps.read(teacher, at) as wanted, taps.read(student, at) as found, torch.no_grad():
        far = (teacher(x) - student(x)).square().mean()
        task = (student(x) - y).square().mean()
    terms = [((found[n] - wanted[n]).square().mean(), wanted[n].square().mean()) for n in at]
    loss = Distillation(teacher, at=at, output=2.0, feature=3.0)
    torch.testing.assert_close(loss(student, (x, y)), task + 2 * far + 3 * sum(a / b for a, b in terms))
    torch.testing.assert_close(loss(student, (x, None)), 2 * far + 3 * sum(a / b for a, b in terms))
    plain = Distillation(teacher, at=at, normalise=False)
    torch.testing.assert_close(plain(student, (x, None)), far + sum(a for a, _ in terms))
    large = [{n: 100 * h if n == "blocks.3" else h for n, h in side.items()} for side in (found, wanted)]
    torch.testing.assert_close(loss.distance(*large), loss.distance(found, wanted))
    assert plain.distance(*large) > 10 * plain.distance(found, wanted)


def test_retraining_moves_the_student_alone_and_brings_its_features_back():
    teacher, x = Net(), torch.randn(64, 3)
    before = copy.deepcopy(teacher.state_dict())
    student = LaptopDiff(share=0.3).plan(teacher, x).apply()
    loss = Distillation(teacher, at=["blocks.*"])
    losses_ = fit(student, [(x, None)] * 60, loss, steps=60, lr=1e-2)
    assert losses_[-1] < 0.5 * losses_[0] and teacher.training
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert all(p.grad is None for p in teacher.parameters())
    assert sum(isinstance(m, Skip) for m in student.modules())


def noised():
    return [laptop_diff._unet()[1]]


def test_the_command_leaves_a_smaller_unet_that_loads(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    model, given = unet()
    model.save_pretrained(tmp_path / "start")
    arguments = ["apply", "laptop-diff", "--model", f"hf:{tmp_path / 'start'}", "--data", "test_laptop_diff:noised"]
    out = CliRunner().invoke(app, [*arguments, "-o", "share=0.4", "--out", str(tmp_path / "there")])
    assert out.exit_code == 0 and "removed: " in out.output, out.output
    new = load(tmp_path / "there")
    assert sum(p.numel() for p in new.parameters()) <= 0.6 * sum(p.numel() for p in model.parameters())
    assert new(**given).sample.isfinite().all()


def test_what_is_left_is_exported_with_any_batch_cast_and_copied():
    model, x = laptop_diff._plain()
    new = LaptopDiff(share=0.4).plan(model, x).apply().eval()
    exported = torch.export.export(new, (x,), dynamic_shapes=({0: torch.export.Dim("b", min=2)},)).module()
    more = torch.randn(5, 2, 4, 4)
    torch.testing.assert_close(exported(more), new(more))
    torch.testing.assert_close(copy.deepcopy(new)(more), new(more))
    with torch.autocast("cpu", torch.bfloat16):
        assert new(more).isfinite().all()
