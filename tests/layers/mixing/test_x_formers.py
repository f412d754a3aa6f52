"""Every leaf of the tree: it builds, learns, and is another model than the root."""

import re
import zlib

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from interlayer import catalog
from interlayer.cli import app
from interlayer.core.trunk import build_trunk
from interlayer.layers.mixing.x_formers import VANILLA, XFormer, find

LEAVES = list(catalog.taxonomy())
TOKENS = torch.randint(0, 20, (2, 23), generator=torch.Generator().manual_seed(0))


def noisy(module):
    """No identity, zero or constant parameters."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))))
    return module


def of_leaf(leaf, kind):
    """A model with the leaf's parts, and the trunk of the root of the same size; None where the leaf is refused."""
    sizes, root = {"depth": 3, "width": 16, "heads": 4}, {"scale": 1.0, **VANILLA}
    try:
        if kind == "image":
            model = XFormer(leaf, channels=1, image=(8, 8), patch=2, classes=3, **sizes)
            return model, build_trunk(length=16, grid=(4, 4), causal=False, **sizes, **root)
        model = XFormer(leaf, vocab=20, classes=3 * (kind == "classes"), length=24, **sizes)
        return model, build_trunk(length=24, causal=kind == "causal", **sizes, **root)
    except ValueError:
        return None


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_leaf_is_ready_builds_and_learns(leaf):
    assert catalog.taxonomy()[leaf].state == "ready"
    torch.manual_seed(0)
    model, _ = of_leaf(leaf, "causal") or of_leaf(leaf, "classes")
    targets = torch.tensor([0, 2]) if model.classes else TOKENS.roll(-1, 1)
    optimiser = torch.optim.Adam(model.parameters(), 3e-3)

    def loss():
        return F.cross_entropy(model(TOKENS).flatten(0, -2), targets.flatten())

    before = loss().item()
    for _ in range(2):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    assert all(p.grad is not None for p in model.parameters())
    assert model.eval()(TOKENS).isfinite().all() and loss().item() < before


@pytest.mark.parametrize("leaf", LEAVES)
def test_no_leaf_builds_the_model_of_the_root(leaf):
    kinds = [found for kind in ("causal", "classes", "image") if (found := of_leaf(leaf, kind))]
    assert kinds
    for model, root in kinds:
        x = torch.randn(2, model.trunk.length, 16, generator=torch.Generator().manual_seed(0))
        ours, theirs = noisy(model.trunk).eval(), noisy(root).eval()
        answer = model.answer if model.classes else None
        assert not torch.equal(ours(x, answer=answer), theirs(x))


def test_the_root_adds_sinusoids_to_embeddings_of_variance_one():
    """Vaswani et al., sections 3.4 and 3.5."""
    torch.manual_seed(0)
    model = XFormer("head behaviour", vocab=500, length=64, depth=1, width=32, heads=4)
    table = model.trunk.position.table
    assert abs(model.embed.weight.std() - 1) < 0.05 and table[0, 1] == 1 and table[1, 0] == torch.tensor(1.0).sin()


def test_image_models_use_the_position_of_the_leaf():
    kinds = {leaf: of_leaf(leaf, "image") for leaf in LEAVES if leaf.startswith("module/position")}
    built = [type(found[0].trunk.position).__name__ for found in kinds.values() if found]
    assert built == ["Learned", "RelativeBias", "Alibi", "Rotary", "Conditional"]
    with pytest.raises(ValueError, match="without a causal mask nothing tells the order"):
        XFormer("of causal models", vocab=20, classes=3)


def test_the_tree_is_shown():
    """Every leaf below its branches, at its depth, with what fills its slots."""
    shown = CliRunner().invoke(app, ["list", "--taxonomy"])
    assert shown.exit_code == 0
    path, found = [], []
    for line in shown.stdout.splitlines():
        level = (len(line) - len(line.lstrip())) // 2
        name, *rest = re.split(r"\s+(?:ready|planned)\s+", line.strip())
        path[level:] = [name]
        found += ["/".join(path)] if rest else []
    assert found == LEAVES
    assert re.search(r"\n +band +ready +mixer=sliding-window.*arXiv:", shown.stdout)


def test_names_of_leaves():
    assert find("low rank/approximation").method == "Nystroemformer"
    with pytest.raises(ValueError, match=r"none is\. Did you mean 'module/attention/query prototypes'"):
        find("module/attention/query-prototypes")
    with pytest.raises(ValueError, match="expected text, or images and classes"):
        XFormer("query prototypes", classes=2)


def test_the_leaf_of_swiglu_keeps_its_own_activation():
    mlp = XFormer("activation", vocab=20, depth=1, width=8, heads=2).trunk.blocks[0].mlp
    x = torch.randn(3, 8)
    torch.testing.assert_close(mlp(x), mlp.down(F.silu(mlp.gate(x)) * mlp.up(x)))
