import pytest
import torch
from torch import nn

from interlayer.layers.stream.rezero import ReZero
from interlayer.models import MLP, ConvNet, Transformer


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (MLP(6, 3, depth=16, width=6, stream="rezero"), torch.randn(6)),
        (Transformer(vocab=9, length=8, depth=6, width=8, heads=2, stream="rezero"), torch.randn(5, 8)),
        (ConvNet(2, 3, depth=8, width=2, stream="rezero", norm="none"), torch.randn(2, 4, 4)),
    ],
    ids=["mlp", "transformer", "convnet"],
)
def test_the_jacobian_of_the_stack_is_exactly_the_identity_at_the_start(model, x):
    stream = next(m for m in model.modules() if isinstance(m, ReZero))
    blocks = list((model.trunk if hasattr(model, "trunk") else model).blocks)

    def stack(flat):
        state = stream.start(flat.view(1, *x.shape))
        for layer in range(stream.layers):
            block = blocks[layer // stream.branches]
            branch = block if stream.branches == 1 else (block.mixer, block.mlp)[layer % 2]
            if isinstance(model, ConvNet) and branch[0].stride != (1, 1):
                break  # the identity holds within a stage
            state = stream.write(state, layer, branch(stream.read(state, layer)))
        return stream.finish(state).flatten()

    jacobian = torch.autograd.functional.jacobian(stack, x.flatten())
    assert torch.equal(jacobian, torch.eye(x.numel()))


def test_the_equation_with_one_gate_for_both_branches_of_a_block():
    stream = ReZero(2, branches=2)
    with torch.no_grad():
        stream.gate.copy_(torch.tensor([0.5, -2.0]))
    branches = [nn.Linear(4, 4) for _ in range(4)]
    x = torch.randn(3, 4)
    state = stream.start(x)
    for layer, f in enumerate(branches):
        state = stream.write(state, layer, f(stream.read(state, layer)))
    y = x
    for f, gate in zip(branches, (0.5, 0.5, -2.0, -2.0), strict=True):
        y = y + gate * f(y)
    torch.testing.assert_close(stream.finish(state), y)


def test_gates_learn_first_then_branches():
    model = MLP(6, 3, depth=4, width=6, stream="rezero")
    x = torch.randn(5, 6)
    model(x).square().sum().backward()
    assert model.stream.gate.grad.abs().sum() > 0
    assert all(p.grad.abs().sum() == 0 for p in model.blocks.parameters())


@pytest.mark.parametrize(
    "model",
    [
        MLP(6, 3, depth=2, width=6, stream="rezero"),
        Transformer(depth=2, width=16, heads=2, stream="rezero"),
        ConvNet(2, 3, depth=8, width=2, stream="rezero", norm="none"),
    ],
    ids=["mlp", "transformer", "convnet"],
)
def test_there_is_no_norm(model):
    assert not any("Norm" in type(m).__name__ for m in model.modules())
    gates = next(m for m in model.modules() if isinstance(m, ReZero))
    assert [(n, p.shape) for n, p in gates.named_parameters()] == [
        ("gate", (len(gates.gate),))
    ]  # a scalar for each block
