import copy

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

from interlayer.layers.stream.enc_dec_bridge import EncDecBridge

transformers = pytest.importorskip("transformers")

SPECIAL = {"vocab_size": 20, "d_model": 16, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 2}
SIZES = {"encoder_layers": 3, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
SIZES |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 32, "forced_eos_token_id": None}


def marian():
    return transformers.MarianMTModel(transformers.MarianConfig(scale_embedding=True, **SPECIAL, **SIZES))


def bart():
    return transformers.BartForConditionalGeneration(transformers.BartConfig(bos_token_id=2, **SPECIAL, **SIZES))


def t5():
    sizes = {"d_kv": 8, "d_ff": 16, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**SPECIAL, **sizes))


def built(make):
    torch.manual_seed(0)
    model = make().eval()
    source, target = torch.randint(3, 20, (2, 7)), torch.randint(3, 20, (2, 5))
    mask = torch.ones_like(source)
    mask[1, 5:] = 0
    return model, {"input_ids": source, "attention_mask": mask, "decoder_input_ids": target}


def disturb(bridge):
    with torch.no_grad():
        bridge.weight.add_(0.3 * torch.randn_like(bridge.weight))


@pytest.mark.parametrize("make", [marian, bart, t5])
def test_original_connections_change_no_bit_and_detaching_leaves_nothing(make):
    model, inputs = built(make)
    kinds = {name: type(m) for name, m in model.named_modules()}
    logits = model(**inputs).logits
    words = {k: inputs[k] for k in ("input_ids", "attention_mask")} | {"max_new_tokens": 4}
    greedy, beams = model.generate(**words), model.generate(**words, num_beams=3)
    bridge = EncDecBridge.attach(model)
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(model.generate(**words), greedy) and torch.equal(model.generate(**words, num_beams=3), beams)
    disturb(bridge)
    assert not torch.equal(model(**inputs).logits, logits)
    bridge.detach()
    assert {name: type(m) for name, m in model.named_modules()} == kinds
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize("make", [marian, bart, t5])
def test_each_decoder_layer_reads_its_map_of_all_encoder_layers(make):
    model, inputs = built(make)
    bridge = EncDecBridge.attach(model)
    disturb(bridge)
    states = model.get_encoder()(inputs["input_ids"], inputs["attention_mask"], output_hidden_states=True).hidden_states
    expected = bridge(torch.stack(states[1:], 1))
    heard = []
    stack = next(m for m in model.get_decoder().modules() if isinstance(m, nn.ModuleList))
    keys = [
        next(m for n, m in layer.named_modules() if n.lower().endswith(("encoder_attn", "encdecattention")))
        for layer in stack
    ]
    keys = [next(m for n, m in k.named_modules() if n in ("k_proj", "k")) for k in keys]
    hooks = [k.register_forward_hook(lambda m, args, out: heard.append(args[0])) for k in keys]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    for m, got in enumerate(heard):
        torch.testing.assert_close(got.view_as(expected[:, m]), expected[:, m])


def test_the_maps_are_linear_in_all_layers():
    bridge = EncDecBridge(2, 2, 1, start="random")
    with torch.no_grad():
        bridge.weight.copy_(torch.tensor([[[1.0, 2, 3, 4], [5, 6, 7, 8]]]))
    states = torch.tensor([[[[1.0, 0]], [[0, 1]]]])  # layer 1 gives (1, 0), layer 2 (0, 1)
    assert bridge(states).tolist() == [[[[1 + 4, 5 + 8]]]]


def test_starts():
    states = torch.randn(2, 4, 3, 5)
    assert torch.equal(EncDecBridge(5, 4, 2)(states), states[:, [3, 3]])
    assert torch.equal(EncDecBridge(5, 4, start="granularity")(states), states.flip(1))
    assert torch.equal(EncDecBridge(5, 4, 2, start="granularity")(states), states[:, [3, 1]])
    torch.testing.assert_close(EncDecBridge(5, 4, start="ones")(states)[0, 1, 2, 3], states[0, :, 2].sum())
    weight = EncDecBridge(50, 4, start="random").weight
    assert weight.abs().max() <= 200**-0.5 and abs(weight.std() * 200**0.5 - 3**-0.5) < 0.02


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_is_the_argmax_of_full_passes(num_beams):
    model, inputs = built(t5)
    disturb(EncDecBridge.attach(model, start="granularity"))
    words = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    generated = model.generate(
        **words, num_beams=num_beams, max_new_tokens=4, output_scores=True, return_dict_in_generate=True
    )
    logits = model(**words, decoder_input_ids=generated.sequences).logits
    if num_beams == 1:
        assert torch.equal(logits[:, :4].argmax(-1), generated.sequences[:, 1:5])
    else:
        chosen = logits[:, :4].log_softmax(-1).gather(-1, generated.sequences[:, 1:5, None]).squeeze(-1)
        real = (generated.sequences[:, 1:5] != 0).float()
        torch.testing.assert_close(
            (chosen * real).sum(1) / real.sum(1), generated.sequences_scores, rtol=1e-4, atol=1e-4
        )


def test_it_trains_copies_and_loads_with_its_model(tmp_path):
    model, inputs = built(marian)
    bridge = EncDecBridge.attach(model)
    disturb(bridge)
    logits = model(**inputs).logits
    logits.sum().backward()
    assert bridge.weight.grad.abs().sum() > 0
    assert any(p is bridge.weight for p in model.parameters())
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.bridge.weight.zero_()
    assert torch.equal(model(**inputs).logits, logits) and not torch.equal(twin(**inputs).logits, logits)
    save_model(model, str(tmp_path / "model.safetensors"))
    other = marian().eval()
    EncDecBridge.attach(other)
    load_model(other, str(tmp_path / "model.safetensors"))
    assert torch.equal(other(**inputs).logits, logits)


def test_clear_errors():
    with pytest.raises(ValueError, match="start 'one'"):
        EncDecBridge(4, 2, start="one")
    model, inputs = built(marian)
    EncDecBridge.attach(model)
    with pytest.raises(ValueError, match="has a bridge"):
        EncDecBridge.attach(model)
    with pytest.raises(ValueError, match="no encoder and decoder"):
        EncDecBridge.attach(nn.Linear(2, 2))
    old = model.get_encoder()(inputs["input_ids"])
    model.get_encoder()(inputs["input_ids"].flip(0))
    with pytest.raises(ValueError, match="latest run"):
        model(encoder_outputs=old, decoder_input_ids=inputs["decoder_input_ids"])
    dropping = marian()
    dropping.config.encoder_layerdrop = 0.1
    with pytest.raises(ValueError, match="encoder_layerdrop"):
        EncDecBridge.attach(dropping)
