import pytest
import torch

from interlayer.core.cost import flops
from interlayer.core.data import DataShape
from interlayer.models import DiT, build


def filled(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            p.copy_(torch.randn(p.shape, generator=generator) * (0.2 if p.ndim > 1 else 0.1))
    return model.eval()


def test_it_computes_what_the_authors_code_computes():
    """Figures of DiT's models.py (in YuchuanTian/U-DiT, commit 7fcce5e) with these weights and inputs."""
    model = filled(DiT(2, 16, classes=5, depth=2, width=16, heads=2))
    x = torch.randn(3, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    out = model(x, torch.tensor([0, 17, 999]), torch.tensor([0, 3, 5]))
    torch.testing.assert_close(out[:, 0, 3, 5], torch.tensor([0.4246, 1.0188, 0.1030]), rtol=0, atol=2e-4)
    torch.testing.assert_close(out.square().mean(), torch.tensor(1.5593), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("sizes", "giga"), [((12, 384, 6), 6.06), ((28, 1152, 16), 118.64)])
def test_published_cost(sizes, giga):
    """Multiply-adds of DiT-S/2 and DiT-XL/2 for a 32 x 32 latent."""
    depth, width, heads = sizes
    with torch.device("meta"):
        given = torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, dtype=torch.long)
        assert abs(flops(DiT(depth=depth, width=width, heads=heads), *given) / 2e9 / giga - 1) < 0.002


def test_a_rectangle_and_the_slots():
    shape = DataShape("image", "noise", classes=3, channels=2, height=4, width=8)
    model = build("dit", shape, mlp="glu", depth=1)
    assert not model(torch.randn(2, 2, 4, 8), torch.zeros(2), torch.tensor([0, 3])).any()  # zero at initialisation
    model = filled(model)
    x = torch.randn(2, 2, 4, 8)
    assert model(x, torch.zeros(2), torch.tensor([0, 3])).shape == x.shape
    with pytest.raises(ValueError, match=r"DiT: images \(2, 2, 8, 4\); expected \[batch, 2, 4, 8\]"):
        model(x.mT, torch.zeros(2), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"these can: \[.*dit"):
        build("mlp", shape)
