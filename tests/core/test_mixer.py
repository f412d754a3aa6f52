import pytest
import torch
from torch import nn

from interlayer.core.mixer import Attention, Cache, Context, attend
from interlayer.core.position import Learned, Rotary, Sinusoidal
from interlayer.core.stream import QKV
from interlayer.models import Transformer, VisionTransformer


def naive(q, k, v, causal, mask=None):
    """The equation, one query at a time."""
    group = q.shape[1] // k.shape[1]
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                last = k.shape[2] - q.shape[2] + i + 1 if causal else k.shape[2]
                keep = [j for j in range(last) if mask is None or mask[b, j]]
                score = (k[b, h // group, keep] @ q[b, h, i]) / q.shape[-1] ** 0.5
                out[b, h, i] = score.softmax(0) @ v[b, h // group, keep]
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("new", "kv"), [(5, 4), (1, 2), (3, 1)])
def test_attend_equals_the_equation(causal, new, kv):
    q, k, v = (torch.randn(2, h, s, 6, dtype=torch.double) for h, s in ((4, new), (kv, 7), (kv, 7)))
    torch.testing.assert_close(attend(q, k, v, causal=causal), naive(q, k, v, causal))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, 1:3] = False
    torch.testing.assert_close(attend(q, k, v, causal=causal, mask=mask), naive(q, k, v, causal, mask))


def test_separate_inputs_equal_the_fused_projection():
    attention = Attention(12, 3, kv_heads=1)
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(attention(QKV(x, x, x)), attention(x))
    y = torch.randn(2, 5, 12)
    assert not torch.allclose(attention(QKV(x, x, y)), attention(x))

    class Wrapped(nn.Linear):
        pass

    attention.qkv.__class__ = Wrapped  # any other linear map goes the general way
    torch.testing.assert_close(attention(QKV(x, x, x)), attention(x))


def test_cache_grows_and_counts_only_what_is_stored():
    cache, attention = Cache(), Attention(8, 2, causal=True)
    x = torch.randn(1, 40, 8)
    seen = []
    for i in range(40):
        seen.append(attention(x[:, i : i + 1], Context(cache=cache)))
        cache.length += 1
    torch.testing.assert_close(torch.cat(seen, 1), attention(x))
    assert cache.bytes == 2 * 40 * 8 * 4


def test_wrong_mask_and_heads_are_told():
    q = torch.randn(1, 1, 3, 2)
    with pytest.raises(ValueError, match=r"expected bool \(1, 3\)"):
        attend(q, q, q, causal=False, mask=torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="multiple of heads"):
        Attention(10, 3)


def test_rotary_scores_depend_on_distance_alone():
    turn = Rotary(length=64, head_width=8)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)
    at = [turn.rotate(q, k, offset) for offset in (0, 3, 20, 23)]
    torch.testing.assert_close((at[0][0] * at[1][1]).sum(), (at[2][0] * at[3][1]).sum())
    assert not torch.allclose((at[0][0] * at[1][1]).sum(), (at[0][0] * at[2][1]).sum())
    torch.testing.assert_close(at[3][0].norm(), q.norm())


def test_embedded_positions_start_at_the_offset():
    for position in (Learned(8, 16), Sinusoidal(8, 16)):
        x = torch.zeros(1, 16, 8)
        torch.testing.assert_close(position.embed(x)[:, 5:], position.embed(x[:, 5:], 5))
    with pytest.raises(ValueError, match="odd"):
        Sinusoidal(7, 4)
    with pytest.raises(ValueError, match="odd"):
        Rotary(4, 7)


def test_sinusoids_do_not_drown_the_embedding():
    model = Transformer(vocab=50, length=32, depth=1, width=64, heads=2, position="sinusoidal")
    ratio = model.trunk.position.table.std() / model.embed.weight.std()
    assert 0.5 < ratio < 1  # 0.7 in the paper: unit variance beside sines of amplitude 1
    images = VisionTransformer(1, 8, patch=2, depth=1, width=64, heads=2, position="sinusoidal")
    ratio = images.trunk.position.table.std() / images.patches(torch.randn(20, 1, 8, 8)).std()
    assert 0.5 < ratio < 3


def test_another_kind_of_attention_changes_what_heads_read_alone():
    class Uniform(Attention):
        def mix(self, q, k, v, mask=None):
            return v.mean(-2, keepdim=True).expand_as(q)

    layer = Uniform(8, 2)
    x = torch.randn(2, 5, 8)
    wanted = layer.out(layer.qkv(x)[..., 16:].mean(1, keepdim=True).expand(2, 5, 8))
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*jit.trace.*:DeprecationWarning")
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_attention_can_be_traced_and_exported_with_a_dynamic_batch(kv_heads):
    layer, x = Attention(8, 2, kv_heads=kv_heads, causal=True).eval(), torch.randn(3, 5, 8)
    torch.testing.assert_close(torch.jit.trace(layer, (x[:2],))(x), layer(x))
    exported = torch.export.export(layer, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(exported.module()(x), layer(x))


def test_the_last_query_is_rotated_like_the_last_key():
    turn = Rotary(length=16, head_width=4)
    q, k = torch.randn(1, 1, 9, 4), torch.randn(1, 1, 9, 4)
    whole, last = turn.rotate(q, k, 2), turn.rotate(q[:, :, 6:], k, 2)
    torch.testing.assert_close(last[0], whole[0][:, :, 6:])
    torch.testing.assert_close(last[1], whole[1])


def test_a_cache_stores_once_what_sublayers_share():
    cache, k, v = Cache(), torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    assert torch.equal(cache.extend("v", 0, v), v) and torch.equal(cache.extend("v", 2, v), v)
    assert torch.equal(cache.extend("k", 2, k), k) and set(cache.buffers) == {("v", 0), ("k", 2)}
    cache.length = 3
    assert cache.bytes == 2 * 24 * 4
    more = torch.randn(1, 2, 2, 4)
    assert torch.equal(cache.extend("v", 0, more), torch.cat((v, more), 2))
    assert torch.equal(cache.extend("v", 2, more), torch.cat((v, more), 2))
