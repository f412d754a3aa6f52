import copy

import pytest
import torch
from torch import nn

from interlayer.core import taps
from interlayer.core.blockwise import Joined, Part, blockwise, error, fed, fit, runs, sequence
from interlayer.core.cost import peak_bytes
from tests.families import batch, model


class Counted(nn.Tanh):
    """Knows how often it was computed."""

    runs = 0

    def forward(self, x):
        self.runs += 1
        return super().forward(x)


class Net(nn.Module):
    """Blocks with something between them that is no module."""

    def __init__(self, depth=3, width=6, skip=False):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), Counted()) for _ in range(depth))
        self.skip = skip

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x) if self.skip else 2 * block(x)
        return x


def spoil(block):
    with torch.no_grad():
        for p in block.parameters():
            p.mul_(1.1)


def naive(net, names, data):
    """Inputs and outputs of every block, from whole passes."""
    with taps.at_rest(net), torch.no_grad():
        found = []
        for each in data:
            with taps.read(net, names, side="input") as into, taps.read(net, names) as out:
                next(taps.feed(net, each))
            found.append((dict(into), dict(out)))
    return found


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "resnet", "unet", "mha", "tied"])
@pytest.mark.parametrize("prefix", ["changed", "original"])
def test_every_block_gets_what_a_whole_pass_gives_it(name, prefix):
    start = model(name).train()
    new, data = copy.deepcopy(start), [batch(name), batch(name)]
    names = sequence(start, data)[0]
    truth = naive(start, names, data)
    seen = []
    for part in blockwise(start, data, into=new, prefix=prefix):
        source = naive(new, names, data) if prefix == "changed" else truth
        for b in range(2):
            torch.testing.assert_close(taps.first(part.inputs[b]), source[b][0][part.name], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(part.outputs[b], truth[b][1][part.name], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(part.run(1), source[1][1][part.name], atol=1e-5, rtol=1e-4)
        seen.append(part.name)
        if not isinstance(part.block, nn.Embedding):  # which the head may share
            spoil(part.block)
    assert seen == names and start.training and new.training
    for m in (start, new):
        assert not any(x._forward_pre_hooks or x._forward_hooks or "forward" in vars(x) for x in m.modules())
        assert getattr(getattr(m, "config", None), "use_cache", None) == getattr(
            getattr(model(name), "config", None), "use_cache", None
        )


def test_the_default_blocks_are_those_of_the_architecture():
    wanted = {
        "gpt2": "transformer.h.{}", "llama": "model.layers.{}", "bert": "bert.encoder.layer.{}", "vit": "vit.layers.{}",
        "dit": "transformer_blocks.{}", "t5": "decoder.block.{}", "mamba": "backbone.layers.{}",
    }  # fmt: skip
    for name, pattern in wanted.items():
        found = sequence(model(name), batch(name))[0]
        assert [n for n in found if n.rpartition(".")[0] == pattern[:-3]] == [pattern.format(i) for i in range(4)]
    assert sequence(model("resnet"), batch("resnet"))[0][1:3] == ["resnet.encoder.stages.0", "resnet.encoder.stages.1"]
    repeated = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    repeated.append(repeated[0])
    names, skipped = sequence(repeated, torch.ones(1, 2), nn.Linear)
    assert names == ["1"] and [(r.name, r.why) for r in skipped] == [("0", "runs 2 times in a pass")]


@pytest.mark.parametrize(
    ("skip", "original", "changed"), [(False, [7, 7, 7], [5, 5, 0]), (True, [12, 12, 7], [10, 10, 0])]
)
def test_a_chain_runs_each_block_once_for_each_batch_and_model(skip, original, changed):
    """Beside two passes over the first batch. Once a block reads more than the one before, all before run again."""
    start, data = Net(skip=skip), [torch.randn(2, 6) for _ in range(5)]
    new = copy.deepcopy(start)
    list(blockwise(start, data, into=new))
    assert [block[1].runs for block in start.blocks] == original
    assert [block[1].runs for block in new.blocks] == changed


@pytest.mark.parametrize("prefix", ["changed", "original"])
def test_memory_is_that_of_one_block_whatever_the_number_of_blocks(prefix):
    data = [torch.randn(64, 32) for _ in range(8)]
    peaks = []
    for depth in (3, 12):
        start = Net(depth, 32)
        new = copy.deepcopy(start)
        peaks.append(
            peak_bytes(lambda start=start, new=new: [None for part in blockwise(start, data, into=new, prefix=prefix)])
        )
    block = 2 * sum(x.numel() * 4 for x in data)  # inputs and outputs of one block
    assert peaks[1] <= peaks[0] + 0.1 * block
    assert peaks[1] <= 1.4 * block


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    start, data = Net(), torch.randn(4, 6)

    def run(stop, given=data, key=""):
        new, found = copy.deepcopy(start), []
        for part in blockwise(start, given, into=new, folder=tmp_path, key=key):
            if stop == part.name:
                break
            found.append((part.name, sorted(part.kept)))
            spoil(part.block)
            part.keep({"scale": torch.ones(2)})
        return found

    assert run("blocks.2") == [("blocks.0", []), ("blocks.1", [])]
    assert run("") == [("blocks.0", ["scale"]), ("blocks.1", ["scale"]), ("blocks.2", [])]
    assert [k for _, k in run("", key="other")] == [[], [], []]
    assert [k for _, k in run("", given=data + 1)] == [[], [], []]


def test_fitting_lowers_the_error_and_repeats():
    start, data = Net(), [torch.randn(8, 6) for _ in range(3)]
    losses = []
    for _ in range(2):
        new = copy.deepcopy(start)
        part = next(blockwise(start, data, into=new))
        spoil(part.block)
        before = sum(error(part.run(i), part.outputs[i]) for i in range(3))
        losses.append(fit(part, part.block.parameters(), steps=30, lr=1e-2, seed=4))
        assert sum(error(part.run(i), part.outputs[i]) for i in range(3)) < 0.1 * before
    assert losses[0] == losses[1]
    found = fit(part, part.block.parameters(), steps=1, lr=1e-2, penalty=lambda share: torch.tensor(5.0 + share))
    assert 5 <= found[0] < 5.1


def test_groups_have_rates_of_their_own_and_the_loss_may_be_another():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    start = [p.detach().clone() for p in layer.parameters()]
    part = Part("0", layer, [((torch.randn(8, 3),), {})], [torch.randn(8, 2)])
    groups = [{"params": [layer.weight], "lr": 0.1}, {"params": [layer.bias]}]
    losses = fit(part, groups, steps=1, lr=0.01, decay=False, loss=lambda found, wanted: (found - wanted).pow(4).mean())
    moved = [(p - s).abs() for p, s in zip(layer.parameters(), start, strict=True)]
    assert torch.allclose(moved[0], torch.full((2, 3), 0.1), atol=1e-4) and torch.allclose(
        moved[1], torch.full((2,), 0.01), atol=1e-4
    )
    first = (nn.functional.linear(part.inputs[0][0][0], *start) - part.outputs[0]).pow(4).mean()
    assert losses[0] == pytest.approx(float(first))
    held = [{"params": [layer.bias], "decay": True}, {"params": [layer.weight], "decay": False}]
    before = [p.detach().clone() for p in (layer.bias, layer.weight)]
    fit(part, held, steps=2, lr=0.1)
    late = [(p - s).abs().max() for p, s in zip((layer.bias, layer.weight), before, strict=True)]
    assert late[0] < 0.16 < late[1]  # 0.1 and 0.05 along the cosine, else twice 0.1


@pytest.mark.parametrize("name", ["gpt2", "llama", "resnet", "bert"])
@pytest.mark.parametrize("prefix", ["changed", "original"])
def test_joined_blocks_are_one_part_with_the_inputs_of_the_first_and_the_outputs_of_the_last(name, prefix):
    start, data = model(name), [batch(name), batch(name)]
    names, new = sequence(start, data)[0], copy.deepcopy(start)
    after = [k for k, joins in enumerate(fed(start, data, names)) if joins]
    assert len(after) >= 1
    pair = [names[after[0] - 1], names[after[0]]]
    truth, seen = naive(start, names, data), []
    for part in blockwise(start, data, into=new, joined=[pair], prefix=prefix):
        source = naive(new, names, data) if prefix == "changed" else truth
        first, last = part.name.split("+")[0], part.name.split("+")[-1]
        for b in range(2):
            torch.testing.assert_close(taps.first(part.inputs[b]), source[b][0][first], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(part.outputs[b], truth[b][1][last], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(part.run(b), source[b][1][last], atol=1e-5, rtol=1e-4)
        seen.append(part.name)
        if not isinstance(part.block, nn.Embedding):
            spoil(part.block)
        assert isinstance(part.block, Joined) == ("+" in part.name)
    assert "+".join(pair) in seen and len(seen) == len(names) - 1


def test_only_neighbours_with_nothing_between_are_joined():
    net, x = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4)), nn.ReLU(), nn.Linear(2, 2)), torch.zeros(1, 2)
    names = ["0", "1", "2", "3", "5"]
    assert fed(net, x, names) == [False, True, True, True, False]
    assert runs(net, x, names, [("0", "1", "2")]) == [[0, 1, 2], [3], [4]]
    assert runs(net, x, names, [("0", "1"), ("1", "2")]) == [[0, 1, 2], [3], [4]]
    assert runs(net, x, names, []) == [[0], [1], [2], [3], [4]]
    assert fed(Net(skip=True), torch.zeros(1, 6), ["blocks.0", "blocks.1"]) == [False, False]


class Bad(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def forward(self, x):
        return self.inner(x) * torch.inf


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: blockwise(Net(), [], into=Net()), "no calibration data"),
        (lambda: blockwise(Net(), None, into=Net()), "no calibration data"),
        (lambda: blockwise(Net(), ["text"], into=Net()), "does not run on a batch of type str"),
        (lambda: blockwise(Net(), torch.zeros(2, 9), into=Net()), r"does not run on a batch of type Tensor"),
        (lambda: blockwise(Net(), torch.zeros(2, 6), into=Net(), prefix="both"), "prefix 'both'"),
        (
            lambda: blockwise(Net(), torch.zeros(2, 6), ["blocks.0", "blocks.0.0"], into=Net()),
            "lies within block blocks.0",
        ),
        (
            lambda: blockwise(Net(), torch.zeros(2, 6), into=Net(), joined=[("blocks.0", "blocks.1")]),
            "cannot be joined",
        ),
        (lambda: blockwise(Net(), torch.zeros(2, 6), into=Net(), joined=[("blocks.0", "none")]), "cannot be joined"),
        (lambda: blockwise(nn.Sequential(nn.ReLU()), torch.zeros(2, 6), into=nn.ReLU()), "has no block"),
        (lambda: blockwise(nn.Sequential(Bad()), torch.ones(1, 2), "0", into=nn.Sequential(Bad())), "not finite"),
    ],
)
def test_bad_input_is_one_clear_error(call, says):
    with pytest.raises(ValueError, match=says):
        list(call())
