"""Transcoders: the loss and a step against the authors' equations, circuits against sums and patterns, refusals."""

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from interlayer.cli import app
from interlayer.core import taps
from interlayer.core.extras import need
from interlayer.models import Transformer
from interlayer.probe.transcoders import (
    EXAMPLE,
    Circuit,
    Coder,
    Decoder,
    Trainer,
    Transcoders,
    fit,
    greater_than,
    spliced_loss,
    years,
)
from interlayer.probe.transcoders.coder import loss
from interlayer.probe.transcoders.reading import activations, mlps

WORDS = {"vocab_size": 40, "bos_token_id": None, "eos_token_id": None}
SMALL = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}


def model_of(name):
    torch.manual_seed(0)
    hf = need("transformers", "hf", "test")
    if name == "gpt2":
        model = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=24, n_layer=3, n_head=3, n_positions=32, **WORDS))
    elif name == "llama":
        model = hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=2, **SMALL, **WORDS))
    elif name == "neox":
        model = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL, **WORDS))
    else:
        model = Transformer(
            40, 32, 3, 32, 4, **({"norm": "rmsnorm", "kv_heads": 2, "mlp": "glu"} if name == "glu" else {})
        )
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    return model.eval()


def circuit_of(model, tokens, features=48):
    names = mlps(model, None)
    decoder = Decoder(model, names, tokens)
    width = decoder.seen[names[0]].input.shape[1]
    coders = {}
    for name in names:
        coder = coders[name] = Coder(width, width, features).requires_grad_(False)
        for p in (coder.bias, coder.before, coder.after):
            nn.init.normal_(p)
    return Circuit(decoder, coders)


def naive_loss(c, x, y, l1, dead):
    """The authors' equations, one sample and one feature after the other."""
    fits, ghosts, penalty = [], [], 0.0
    for a, b in zip(x, y, strict=True):
        scores = [c.encoder[i] @ (a - c.before) + c.bias[i] for i in range(len(c.bias))]
        z = [s.clamp(min=0) for s in scores]
        out = sum(z[i] * c.decoder[i] for i in range(len(z))) + c.after
        fits.append((out - b) ** 2 / (b**2).sum() ** 0.5)
        penalty = penalty + sum(z)
        residual = (b - out).detach()
        ghost = sum(scores[i].exp() * c.decoder[i] for i in range(len(z)) if dead[i])
        ghost = ghost * (residual.norm() / (1e-6 + 2 * ghost.norm())).detach()
        ghosts.append((ghost - residual) ** 2 / (residual**2).sum() ** 0.5)
    fit_, ghost_ = torch.stack(fits), torch.stack(ghosts)
    return fit_.mean() + l1 * penalty / len(x) + ((fit_ / (ghost_ + 1e-6)).detach() * ghost_).mean()


@pytest.mark.parametrize("tied", [False, True])
def test_loss_and_gradients_are_the_authors(tied):
    torch.manual_seed(0)
    coder = Coder(5, 5 if tied else 3, 7, tied=tied).double()
    x = torch.randn(11, 5).double()
    y = x if tied else torch.randn(11, 3).double()
    dead = torch.tensor([1, 0, 0, 1, 0, 0, 1]).bool()
    found = []
    for value in (loss(coder, x, y, 0.03, dead)[0], naive_loss(coder, x, y, 0.03, dead)):
        coder.zero_grad()
        value.backward()
        found.append([value, *(p.grad.clone() for p in coder.parameters())])
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_a_step_keeps_unit_decoders_and_moves_across_them():
    torch.manual_seed(0)
    coder, x, y = Coder(4, 6, 16), torch.randn(64, 4), torch.randn(64, 6)
    trainer = Trainer(coder, 0.01, lr=1e-2, warmup=3)
    twin = Coder(4, 6, 16)
    twin.load_state_dict(coder.state_dict())
    trainer.step(x, y)
    optimiser = torch.optim.Adam(twin.parameters(), lr=1e-2 / 4)
    loss(twin, x, y, 0.01)[0].backward()
    for row, grad in zip(twin.decoder.detach(), twin.decoder.grad, strict=True):
        grad -= (grad @ row) * row
    optimiser.step()
    twin.normalise()
    torch.testing.assert_close(coder.state_dict(), twin.state_dict(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(coder.decoder.norm(dim=1), torch.ones(16))


def test_dead_features_come_back():
    torch.manual_seed(0)
    x, y = torch.randn(256, 4), torch.randn(256, 4)
    alive = []
    for patience in (10**9, 20):
        torch.manual_seed(1)
        coder = Coder(4, 4, 16)
        nn.init.constant_(coder.bias, -6.0)
        trainer = Trainer(coder, 0.0, lr=2e-2, patience=patience)
        for _ in range(150):
            trainer.step(x, y)
        alive.append(int((coder.encode(x).amax(0) > 0).sum()))
    assert alive[0] == 0 and alive[1] > 8


def test_it_learns_what_an_mlp_does():
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6)).requires_grad_(False)
    x = torch.randn(2000, 6)
    y = mlp(x)
    left = [
        float((fit(x, y, 48, l1, steps=200, batch=256, lr=1e-2)(x) - y).square().sum() / y.var(0).sum() / 2000)
        for l1 in (0.001, 0.3)
    ]
    assert left[0] < 0.1 and left[1] > 0.15


def test_the_scale_of_the_activations_does_not_matter():
    torch.manual_seed(0)
    x = torch.randn(200, 4) + 1
    y = torch.randn(200, 6) - 2
    found = []
    for a, b in ((1.0, 1.0), (64.0, 2.0**-10)):
        torch.manual_seed(1)
        found.append(fit(a * x, b * y, 16, 0.05, steps=20, lr=1e-2)(a * x) / b)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox", "own", "glu"])
def test_parts_add_up_to_the_feature(name):
    """Exactly, with the feature parts as z (dec . enc), and with an attention bias that no position changes."""
    model, tokens = model_of(name), torch.randint(40, (1, 11))
    with torch.no_grad():
        circuit = circuit_of(model, tokens)
        biases = []
        for t in (4, 9):
            to = circuit.feature(1, 5, t)
            site, parts = circuit.layers[1], circuit.parts(to)
            coder, frozen = circuit.coders[site.name], circuit.decoder.frozen[site.name]
            seen, before = circuit.seen(site), circuit.coders[circuit.layers[0].name]
            want = (seen.input[t] - frozen.bias) @ coder.encoder[5]
            torch.testing.assert_close(torch.tensor(sum(p.contribution for p in parts)), want, rtol=1e-4, atol=1e-4)
            scale = (seen.input[t] - frozen.bias).norm() / (frozen.gain * frozen.centre(seen.stream[t])).norm()
            for p in parts:
                if p.kind == "feature":
                    z = before.encode(circuit.seen(circuit.layers[0]).input[t])[p.index]
                    gain = frozen.centre(frozen.gain * coder.encoder[5])
                    torch.testing.assert_close(
                        torch.tensor([p.input, p.weight]),
                        torch.stack([z * scale, before.decoder[p.index] @ gain]),
                        rtol=1e-4,
                        atol=1e-5,
                    )
            biases.append(next(p.weight for p in parts if p.kind == "bias"))
        assert biases[0] == pytest.approx(biases[1], abs=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "llama", "neox"])
def test_patterns_are_those_of_the_model(name):
    model, tokens = model_of(name), torch.randint(40, (1, 11))
    with torch.no_grad():
        circuit = circuit_of(model, tokens)
        model.set_attn_implementation("eager")
        for block, found in enumerate(model(tokens, output_attentions=True).attentions):
            torch.testing.assert_close(circuit.patterns[block], found[0], rtol=1e-4, atol=1e-5)


def test_a_path_through_a_head_is_the_product_of_its_factors():
    model, tokens = model_of("own"), torch.randint(40, (1, 6))
    with torch.no_grad():
        circuit = circuit_of(model, tokens)
        to = circuit.feature(1, 3, 5)
        head = max(
            (p for p in circuit.parts(to) if p.kind == "head" and p.block == 1), key=lambda p: abs(p.contribution)
        )
        further = circuit.follow(to, head)
        below = circuit.parts(further)
        frozen = circuit.decoder.frozen[further.site.name]
        heads = circuit.decoder.heads[1]
        constant = frozen.bias @ heads.values[head.index] @ heads.outs[head.index] @ to.vector * head.input
        assert sum(p.contribution for p in below) + float(constant) == pytest.approx(
            head.contribution, rel=1e-3, abs=1e-4
        )
        assert all(a.position == head.position for a in below if a.kind == "feature")


def test_the_planted_circuit_is_recovered_from_the_weights():
    model, data = greater_than(), years()
    out = model(data)[:, -1, :10]
    assert torch.equal(out > 0, torch.arange(10) > data[:, 1:2])
    for seed in range(2):
        torch.manual_seed(seed)
        assert EXAMPLE.planted(EXAMPLE.make()(model, data))


def test_de_embeddings_name_what_a_planted_feature_reads_and_writes():
    """Neuron 3 reads "to" directly and the years from 3 up through head 0, and lowers the logit of year 3."""
    model, data = greater_than(), years()
    with torch.no_grad():
        names, coders = mlps(model, None), {}
        for name in names:
            mlp = model.get_submodule(name)
            coder = coders[name] = Coder(64, 64, 12).requires_grad_(False)
            for mine, given in (
                (coder.encoder, mlp.up.weight),
                (coder.bias, mlp.up.bias),
                (coder.decoder, mlp.down.weight.T),
            ):
                mine.copy_(given)
        circuit = Circuit(Decoder(model, names, data[:1]), coders)
        to = circuit.feature(1, 3, 2)
        tokens = torch.arange(21)
        assert torch.equal(circuit.embedded(to.vector), (tokens == 20).float())
        through = dict(circuit.through(to.vector, None, to.site))
        assert torch.equal(circuit.embedded(through["attn0[0]"]), ((tokens >= 3) & (tokens < 10)).float())
        assert not circuit.embedded(through["attn0[1]"]).any()
        assert torch.equal(circuit.unembedded(1, 3), -2.0 * (tokens == 3))


def test_the_frontier_trades_loss_for_sparsity():
    torch.manual_seed(0)
    probe = Transcoders(at="trunk.blocks.1.mlp", expansion=1, sparsity=(0.1, 10.0), steps=150, batch=64, lr=1e-2)
    table = probe(greater_than(), years()).tables["frontier"]
    assert table["kind"] == ["transcoder", "transcoder", "sae", "sae", "the MLP", "its mean"]
    for at in (0, 2):
        assert table["active features"][at] > 1.5 * table["active features"][at + 1]
        assert table["unexplained"][at] < 0.5 * table["unexplained"][at + 1]
    assert table["unexplained"][4:] == [0.0, 1.0]


def test_one_feature_and_one_prompt_can_be_named():
    torch.manual_seed(0)
    found = Transcoders(expansion=1, sparsity=(0.2,), steps=20, layer=0, feature=7, position=1)(greater_than(), years())
    assert all(path.startswith("mlp0[7]@1") for path in found.tables["circuit"]["path"])
    assert "connections" not in found.tables


def test_padding_and_keywords_of_hugging_face():
    model = model_of("gpt2")
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 6:] = 0
    batch = {"input_ids": torch.randint(40, (2, 9)), "attention_mask": mask}
    with torch.no_grad():
        name = mlps(model, None)[0]
        x, y = activations(model, [name], [batch])[name]
        assert len(x) == len(y) == 15
        whole = spliced_loss(model, [batch], name)
        parts = [spliced_loss(model, [t], name) for t in (batch["input_ids"][:1, :6], batch["input_ids"][1:])]
    assert whole == pytest.approx((5 * parts[0] + 8 * parts[1]) / 13, rel=1e-4)
    found = Transcoders(expansion=1, sparsity=(0.1,), steps=5)(model, [batch])
    assert max(found.tables["circuit"]["position"]) <= 5


def test_a_coder_in_the_place_of_the_mlp():
    """With an exact coder the loss is the model's own; with another it is that of the model with the coder put in."""
    torch.manual_seed(0)
    model, tokens = Transformer(40, 16, 2, 32, 4, activation=nn.ReLU, hidden=48).eval(), torch.randint(40, (4, 9))
    name = mlps(model, None)[1]
    mlp = model.get_submodule(name)
    for p in mlp.parameters():
        nn.init.normal_(p)
    coder = Coder(32, 32, 48).requires_grad_(False)
    pairs = ((coder.encoder, mlp.up.weight), (coder.bias, mlp.up.bias), (coder.decoder, mlp.down.weight.T))
    for mine, given in (*pairs, (coder.after, mlp.down.bias)):
        mine.copy_(given.detach())
    with torch.no_grad():
        base = spliced_loss(model, [tokens], name)
        assert spliced_loss(model, [tokens], name, coder) == pytest.approx(base, rel=1e-6)
        coder.decoder.zero_()
        coder.after.zero_()
        with taps.patch(model, {name: 0.0}):
            without = spliced_loss(model, [tokens], name)
        assert spliced_loss(model, [tokens], name, coder) == pytest.approx(without, rel=1e-6) != pytest.approx(base)


@pytest.mark.parametrize(
    ("options", "model", "data", "says"),
    [
        ({"position": 5}, "own", None, "position 5; expected one of 3"),
        ({"layer": 3}, "own", None, "layer 3; expected one of 2"),
        ({"feature": 999}, "own", None, "feature 999; expected one of 64"),
        ({}, "own", [], "no batch"),
        ({}, "post", None, "pre-norm decoder"),
        ({"at": "0"}, "nan", torch.full((4, 3), float("nan")), "NaN"),
        ({"at": "0", "circuit": True}, "nan", torch.randn(4, 3), "select.blocks|not a decoder"),
    ],
)
def test_what_cannot_be_looked_into_is_refused(options, model, data, says):
    models = {
        "own": greater_than,
        "post": lambda: Transformer(21, 3, 2, 64, 2, stream="post-norm"),
        "nan": lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh()),
    }
    with pytest.raises(ValueError, match=says):
        Transcoders(expansion=1, sparsity=(0.2,), steps=2, **options)(
            models[model](), years() if data is None else data
        )


@pytest.mark.parametrize("options", [{"sparsity": ()}, {"sparsity": (-1.0,)}, {"steps": 0}, {"lr": 0.0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="transcoders: sparsity"):
        Transcoders(**options)


def test_the_command_writes_tables_and_a_page(tmp_path, monkeypatch):
    (tmp_path / "planted_model.py").write_text(
        "from interlayer.probe.transcoders import greater_than as model, years as data\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    given = ["--model", "planted_model:model", "--data", "planted_model:data", "--out", str(tmp_path / "out")]
    options = ["-o", "steps=20", "-o", "expansion=1", "-o", "sparsity=(0.2,)", "-o", "top=2"]
    result = CliRunner().invoke(app, ["probe", "transcoders", *given, *options])
    assert result.exit_code == 0 and "attn0[0]" in result.stdout
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 1 and "reads through attn0[0]" in page
    tables = {"circuit", "connections", "features", "frontier", "tokens"}
    assert {p.stem for p in (tmp_path / "out").glob("*.csv")} == tables
    wrong = CliRunner().invoke(app, ["probe", "transcoders", *given, "-o", "position=7"])
    assert wrong.exit_code and "position 7; expected one of 3" in wrong.stderr
