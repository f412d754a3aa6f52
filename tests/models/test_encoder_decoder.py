"""The encoder-decoder: what each part sees, and the slot of the bridge."""

import pytest
import torch

from interlayer.models import EncoderDecoder

TINY = {"vocab": 12, "source": 7, "length": 6, "depth": 2, "width": 16, "heads": 2}


def built(**options):
    torch.manual_seed(0)
    return EncoderDecoder(**TINY, **options), torch.randint(12, (3, 7)), torch.randint(12, (3, 6))


def test_a_target_token_sees_the_whole_source_and_earlier_target_tokens_only():
    model, source, target = built()
    before = model(source, target)
    changed = target.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 12
    after = model(source, changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])
    last = source.clone()
    last[:, -1] = (last[:, -1] + 1) % 12
    assert ((model(last, target) - before).abs().amax(-1) > 1e-6).all()


def test_each_decoder_layer_reads_its_own_part_of_the_bridge():
    model, source, target = built()
    memory = model.encode(source)
    assert memory.shape == (3, 2, 7, 16) and torch.equal(memory[:, 0], memory[:, 1])
    x = model._embedded(target, 1)
    other = torch.randn_like(memory)
    expected = model.decoder[1](model.decoder[0](x, other[:, 0]), other[:, 1])
    torch.testing.assert_close(model.decode(other, target), model.head(model.norms[1](expected)))


def test_the_bridge_of_the_catalogue_starts_at_the_plain_model_and_reads_all_layers():
    plain, source, target = built()
    bridged, *_ = built(bridge="enc-dec-bridge")
    torch.testing.assert_close(bridged(source, target), plain(source, target))
    mirrored, *_ = built(bridge="enc-dec-bridge(start='granularity')")
    x, states = mirrored._embedded(source, 0), []
    for layer in mirrored.encoder:
        x = layer(x)
        states.append(mirrored.norms[0](x))
    torch.testing.assert_close(mirrored.encode(source), torch.stack(states[::-1], 1))
    bridged(source, target).sum().backward()
    assert (bridged.bridge.weight.grad.abs().sum((0, 1)) > 0).all()


def test_generation_is_the_argmax_of_full_passes():
    model, source, _ = built()
    given = model.generate(source, 5, start=2)
    before = torch.cat([torch.full((3, 1), 2), given[:, :-1]], 1)
    assert torch.equal(model(source, before).argmax(-1), given)


def test_clear_errors():
    model, source, target = built()
    with pytest.raises(TypeError, match=r"source of torch\.float32"):
        model(source.float(), target)
    with pytest.raises(ValueError, match="target of 7 tokens, but the model was built for 6"):
        model(source, source)
    with pytest.raises(ValueError, match="nothing called 'first' fills the slot 'bridge'"):
        EncoderDecoder(**TINY, bridge="first")
    with pytest.raises(ValueError, match="activation='relu' has no effect"):
        EncoderDecoder(**TINY, mlp="none", activation="relu")
