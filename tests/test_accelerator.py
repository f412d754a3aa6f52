"""On a GPU, every component gives what it gives on the CPU: skipped where torch sees none."""

import copy
import warnings

import pytest
import torch
from torch.utils._pytree import tree_map

from interlayer import catalog
from interlayer.core import recipe
from interlayer.testing import example_of
from interlayer.testing.common import finite, make, same, seeded, tensors
from interlayer.testing.harness import double, low_precision, outcome, pair

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
WRITTEN = [s for s in catalog.load().values() if s.code and s.source.exists()]


def of(*kinds):
    """The written systems of these kinds, as parameters."""
    return pytest.mark.parametrize("system", [s for s in WRITTEN if s.kind in kinds], ids=lambda s: s.slug)


def on_gpu(value):
    return tree_map(lambda x: x.cuda() if isinstance(x, torch.Tensor | torch.nn.Module) else x, value)


def gaps(a, b):
    """How far apart two lists of tensors are, each relative to the first; for one that is nearly nothing, to all."""
    pairs = [(x.double(), y.cpu().double()) for x, y in zip(a, b, strict=True) if x is not None or y is not None]
    most = max((x.norm().item() for x, _ in pairs), default=0.0)
    return [(x - y).norm().item() / max(x.norm().item(), 1e-3 * most, 1e-12) for x, y in pairs]


@of("layer", "model")
def test_outputs_and_gradients_are_those_of_the_cpu(system):
    example = example_of(system.resolve())
    for build in (example.make, *example.modes.values()):
        module, inputs = make(build).double().eval(), double(make(example.inputs, 100))
        twin = copy.deepcopy(module).cuda()
        out, grads = outcome(module, inputs)
        there, slopes = outcome(twin, on_gpu(inputs))
        assert all(t.is_cuda for t in there)
        again = [outcome(module, inputs)[0] for _ in range(5)]
        if max(gap for o in again for gap in gaps(out, o)) > 0:  # it draws at evaluation; a GPU draws other numbers
            finite([there, [g for g in slopes.values() if g is not None]], "the output")
            continue
        assert max(gaps(out, there)) < 1e-6
        assert max(gaps(grads.values(), slopes.values()), default=0) < 1e-5


@of("layer", "model")
def test_half_precision_and_training(system):
    module, inputs = pair(example_of(system.resolve()))
    module, inputs = module.cuda(), on_gpu(inputs)
    with torch.no_grad():
        plain = tensors(module.eval()(*inputs))
    with torch.autocast("cuda", torch.bfloat16):
        half, _ = outcome(module, inputs)
        trained, grads = outcome(module.train(), inputs)
        finite([half, trained, [g for g in grads.values() if g is not None]], "bfloat16")
        with torch.no_grad():
            finite(module.eval()(*low_precision(inputs)), "bfloat16 inputs")
    plain = [t.cpu() for t in plain if t.is_floating_point()]
    assert max(gaps(plain, half)) < 0.1


@of("layer", "model")
def test_the_compiler_gives_the_same(system):
    example = example_of(system.resolve())
    module, inputs = pair(example)
    module, inputs = module.eval().cuda(), on_gpu(inputs)
    torch._dynamo.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with seeded(5):
            wanted = tensors(module(*inputs))
        with seeded(5):
            found = tensors(torch.compile(module, fullgraph=example.control == "static", dynamic=False)(*inputs))
    same(wanted, found, "compiled output", rtol=1e-3, atol=1e-4)


@of("transform")
def test_transforms_work_where_the_model_is(system, tmp_path):
    example = example_of(system.resolve())
    model, *data = on_gpu(make(example.inputs, 100))
    others = on_gpu(make(lambda: example.others(model)))
    with seeded(5):
        new = make(example.make).plan(model, *data, others=others).apply()
    state = new.state_dict()
    finite(list(state.values()), "the result")
    assert all(t.is_cuda for t in state.values())
    if data and isinstance(data[0], torch.Tensor):
        with torch.no_grad():
            out = new.eval()(data[0])
        recipe.save(new, tmp_path / "saved")
        again = recipe.load(tmp_path / "saved", base=lambda: copy.deepcopy(model).cpu())
        with torch.no_grad():
            same(
                [t.cpu() for t in tensors(out)],
                tensors(again.eval()(data[0].cpu())),
                "the loaded model",
                rtol=1e-3,
                atol=1e-4,
            )


@of("probe")
def test_probes_work_where_the_model_is(system):
    example = example_of(system.resolve())
    model, data = on_gpu(make(example.inputs, 100))
    others = on_gpu(make(lambda: example.others(model)))
    with seeded(5):
        assert make(example.make)(model, data, **({"others": others} if others else {})).tables
