"""Each contract catches a component that is broken on purpose, and lets its sound twin pass."""

import copy
import dataclasses
import itertools
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interlayer import catalog, testing
from interlayer.core import delivery, recipe
from interlayer.core.data import Experience
from interlayer.core.example import Backbone, Example
from interlayer.core.kinds import Construction, Finding, NotBegun, Plan, Probe, Row, Rule, Simulator, Transform
from interlayer.core.stream import PreNorm
from interlayer.testing import ContractError, check, contracts, example_of, hold, kind_of


class Sound(nn.Module):
    """A linear map that keeps every contract; the broken ones below change one thing each."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4) / 2)

    def forward(self, x):
        if x.shape[-1] != 4:
            raise ValueError(f"Sound: input {tuple(x.shape)}; expected [..., 4].")
        return torch.tanh(x @ self.weight)


class Unused(Sound):
    def __init__(self):
        super().__init__()
        self.spare = nn.Parameter(torch.ones(2))


class WrongGradient(Sound):
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0]  # the factor 2 is missing

    def forward(self, x):
        return self.Square.apply(super().forward(x))


class EvenOnly(Sound):
    def forward(self, x):
        if x.shape[1] % 2:
            raise RuntimeError("odd")
        return super().forward(x)


class NoLengthOne(Sound):
    def forward(self, x):
        y = super().forward(x)
        return y / y.var(1, keepdim=True)  # of one position: not a number


class NoEmptyBatch(Sound):
    def forward(self, x):
        return super().forward(x) * (x.amax() > -100)


class SeesTheFuture(Sound):
    def forward(self, x):
        return super().forward(x) + x.flip(1)


class FixedBatch(Sound):
    def forward(self, x):
        return torch.cat([super(FixedBatch, self).forward(x[i : i + 1]) for i in range(len(x))])


class CountsByHand(Sound):
    def forward(self, x):
        return super().forward(x) + torch.zeros(len(x), 1, 1)  # the tracer keeps the number


class SavesByHook(Sound):
    def forward(self, x):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return super().forward(x)


class NoLowPrecision(Sound):
    def forward(self, x):
        y = super().forward(x)
        return y * (float("inf") if y.dtype == torch.bfloat16 else 1)


class HiddenWeights(Sound):
    def __init__(self):
        super().__init__()
        self.shift = torch.randn(4)  # neither parameter nor buffer

    def forward(self, x):
        return super().forward(x) + self.shift.to(x.dtype)


class SharedStorage(Sound):
    def __init__(self):
        super().__init__()
        self.part = nn.Parameter(torch.ones(3, 4)[1])  # a view of a larger tensor

    def forward(self, x):
        return super().forward(x) * self.part


class LooksAtValues(Sound):
    def forward(self, x):
        y = super().forward(x)
        return y if y.sum().item() > 0 else 2 * y


class SharesWithCopies(Sound):
    def __deepcopy__(self, memo):
        twin = type(self)()
        twin.weight = self.weight
        return twin


class FreshNoise(Sound):
    calls = 0

    def forward(self, x):
        FreshNoise.calls += 1
        return super().forward(x) + FreshNoise.calls


class LeaksAcrossBatch(Sound):
    def forward(self, x):
        return super().forward(x) - x.mean(0)


class Remembers(Sound):
    def __init__(self):
        super().__init__()
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x):
        y = super().forward(x) + self.last
        self.last = x.detach().mean((0, 1))
        return y


class RemembersAndForgets(Remembers):
    def reset(self):
        self.last = torch.zeros_like(self.last)


class StepsWithoutState(Sound):
    def start(self, batch):
        return torch.zeros(batch, 4, dtype=self.weight.dtype)

    def step(self, x, state):
        return super().forward(x) + state, state + x


class TakesAnything(Sound):
    def forward(self, x):
        return torch.tanh(x[..., :4] @ self.weight)


class KnowsItsProcess(Sound):
    def forward(self, x):
        return super().forward(x) * (1 + torch.distributed.is_initialized())


def layer(cls, **more):
    inputs, odd = (lambda: (torch.randn(3, 6, 4),)), (lambda: (torch.randn(2, 7, 4),))
    return Example(make=cls, inputs=inputs, odd=odd, **{"axis": 1, "causal": True, **more})


BROKEN = {
    "shapes": Unused,
    "gradient": WrongGradient,
    "odd": EvenOnly,
    "lengths": NoLengthOne,
    "empty": NoEmptyBatch,
    "causal": SeesTheFuture,
    "autocast": NoLowPrecision,
    "state_dict": HiddenWeights,
    "compile": LooksAtValues,
    "export": FixedBatch,
    "trace": CountsByHand,
    "per_example": SavesByHook,
    "deepcopy": SharesWithCopies,
    "seed": FreshNoise,
    "batch": LeaksAcrossBatch,
    "state": Remembers,
    "steps": StepsWithoutState,
    "ddp": KnowsItsProcess,
    "wrong": TakesAnything,
}


def test_a_sound_layer_keeps_all():
    assert set(check(Sound, layer(Sound)).values()) == {"kept"}
    assert BROKEN.keys() == contracts("layer").keys()


@pytest.mark.parametrize(("name", "cls"), BROKEN.items(), ids=BROKEN)
def test_a_broken_layer_is_caught(name, cls):
    with pytest.raises(ContractError, match=name):
        hold(name, "layer", layer(cls, streams=name == "steps"))


@pytest.mark.parametrize("name", ["shapes", "lengths", "empty", "autocast"])
def test_a_broken_mode_is_caught(name):
    with pytest.raises(ContractError, match=rf"{name}: .*mode 'odd one'"):
        hold(name, "layer", layer(Sound, modes={"odd one": BROKEN[name]}))


def test_a_wrong_gradient_is_named_in_little_time():
    class Wide(WrongGradient):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(200, 4))  # its Jacobian takes 9600 passes

        def forward(self, x):
            return super().forward(x + self.table.mean(0))

    before = time.process_time()
    with pytest.raises(ContractError, match="gradient of weight along a random line"):
        hold("gradient", "layer", layer(Wide))
    assert time.process_time() - before < 1


def test_length_0_and_an_empty_batch_work_or_say_why():
    class Refuses(Sound):
        def forward(self, x):
            if not x.numel():
                raise ValueError("Refuses: an empty input; give at least one position.")
            return super().forward(x)

    assert {hold(name, "layer", layer(Refuses)) for name in ("lengths", "empty")} == {"kept"}

    class Fails(Refuses):
        def forward(self, x):
            return torch.stack(list(super().forward(x).unbind(1)), 1) if x.numel() else torch.stack([])

    for name in ("lengths", "empty"):
        with pytest.raises(ContractError, match="RuntimeError"):
            hold(name, "layer", layer(Fails))


def test_more_breaks_of_layers():
    with pytest.raises(ContractError, match="state_dict"):
        hold("state_dict", "layer", layer(SharedStorage))
    with pytest.raises(ContractError, match="RuntimeError"):
        hold("wrong", "layer", Example(make=lambda: nn.Linear(4, 4), inputs=lambda: (torch.randn(2, 4),)))
    assert hold("state", "layer", layer(RemembersAndForgets)) == "kept"
    tokens = Example(make=lambda: nn.Embedding(9, 4), inputs=lambda: (torch.randint(9, (2, 3)),))
    assert hold("gradient", "layer", tokens) == "kept"


def test_exceptions_are_strict():
    assert (
        hold("batch", "layer", layer(LeaksAcrossBatch, exceptions={"batch": "the mean is the point"}))
        == "the mean is the point"
    )
    with pytest.raises(ContractError, match="kept, although"):
        hold("batch", "layer", layer(Sound, exceptions={"batch": "not true"}))
    with pytest.raises(ValueError, match="'bach'"):
        check(Sound, layer(Sound, exceptions={"bach": "mistyped"}))


def test_check_names_every_break():
    class Bad(LeaksAcrossBatch, TakesAnything):
        pass

    with pytest.raises(ContractError, match=r"breaks 2 of 19(?s:.*)batch(?s:.*)wrong"):
        check(Bad, layer(Bad))


def test_streams_are_held_in_a_backbone():
    make = lambda: Backbone(PreNorm)  # noqa: E731
    example = Example(make=make, inputs=lambda: (torch.randn(2, 5, 8),))
    for name in ("shapes", "gradient", "batch", "ddp", "wrong"):
        assert hold(name, "layer", example) == "kept"


def test_a_model_must_learn():
    def train(rate):
        def run():
            torch.manual_seed(0)
            x = torch.randn(64, 4)
            y = x @ torch.ones(4, 1)
            net = nn.Linear(4, 1)
            optimiser = torch.optim.SGD(net.parameters(), rate)
            for _ in range(30):
                loss = F.mse_loss(net(x), y)
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
            return loss.item(), y.var().item()

        return run

    assert hold("training", "model", layer(Sound, train=train(0.1))) == "kept"
    with pytest.raises(ContractError, match="trivial"):
        hold("training", "model", layer(Sound, train=train(0.0)))
    with pytest.raises(ContractError, match="digits"):
        hold("training", "model", layer(Sound))

    def digits():
        return Example(make=lambda: nn.Linear(64, 10), inputs=lambda: (torch.randn(2, 64),))

    assert hold("training", "model", digits()) == "kept"


class Halve(Transform):
    slug = "lamp"  # the recipe resolves it through the catalogue; ``saved`` is proved with the real one

    def plan(self, model, data=None, **options):
        rows = [Row(n, "halved") for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        if not rows:
            raise ValueError("Halve: no linear layer to halve.")

        def build():
            new = copy.deepcopy(model)
            with torch.no_grad():
                for row in rows:
                    new.get_submodule(row.name).weight.mul_(0.5)
            return new

        return Plan(self.slug, {}, rows, build=build)


class InPlace(Halve):
    def plan(self, model, data=None, **options):
        plan = super().plan(model, data)
        plan.build = lambda: model.apply(lambda m: m.weight.data.mul_(0.5) if isinstance(m, nn.Linear) else None)
        return plan


class PlansInEvalMode(Halve):
    def plan(self, model, data=None, **options):
        return super().plan(model.eval(), data)


class SharesWeights(Halve):
    def plan(self, model, data=None, **options):
        plan = super().plan(model, data)
        plan.build = lambda: nn.Sequential(*model)
        return plan


class LeavesHook(Halve):
    def plan(self, model, data=None, **options):
        model[0].register_forward_hook(lambda *a: None)
        return super().plan(model, data)


class SilentNothing(Halve):
    def plan(self, model, data=None, **options):
        return Plan(self.slug, {}, [], build=lambda: copy.deepcopy(model))


class Undetermined(Halve):
    calls = 0

    def plan(self, model, data=None, **options):
        plan = super().plan(model, data)
        Undetermined.calls += 1
        scale = float(Undetermined.calls)

        def build():
            new = copy.deepcopy(model)
            new[0].weight.data.mul_(scale)
            return new

        plan.build = build
        return plan


class Picky(Halve):
    def plan(self, model, data=None, *, others=()):
        self.take(others)
        return super().plan(model, data)


class Rewires(Halve):
    """Has a Hugging Face model run its first block twice, which the format of its weights cannot say."""

    def plan(self, model, data=None, **options):
        plan = super().plan(nn.Linear(1, 1))

        def build():
            new = copy.deepcopy(model)
            new.transformer.h[1] = new.transformer.h[0]
            return new

        plan.build = build
        return plan


class RefusesOnly(Rewires):
    def plan(self, model, data=None, **options):
        plan = super().plan(model, data)
        build = plan.build
        plan.build = lambda: delivery.guard(build(), "a block that runs twice")
        return plan


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=16, use_cache=False, initializer_range=0.3)
    return GPT2LMHeadModel(config), torch.randint(16, (2, 5))


class NoReason(Halve):
    def plan(self, model, data=None, **options):
        plan = super().plan(model, data)
        plan.skipped.append(Row("1", "left alone"))
        return plan


def transform(cls):
    return Example(
        make=cls, inputs=lambda: (nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(3, 4))
    )


def test_a_sound_transform_keeps_its_contracts():
    for name in ("untouched", "plain", "seed", "nothing"):
        assert hold(name, "transform", transform(Halve)) == "kept"
    assert hold("others", "transform", transform(Picky)) == "kept"
    assert hold("pretrained", "transform", dataclasses.replace(transform(RefusesOnly), hf=gpt2)) == "kept"


def test_a_result_that_from_pretrained_changes_is_caught():
    with pytest.raises(ContractError, match="pretrained"):
        hold("pretrained", "transform", dataclasses.replace(transform(Rewires), hf=gpt2))


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("untouched", InPlace),
        ("untouched", PlansInEvalMode),
        ("untouched", SharesWeights),
        ("untouched", LeavesHook),
        ("plain", SilentNothing),
        ("plain", NoReason),
        ("others", Halve),  # ignores them
        ("pretrained", Halve),  # no Hugging Face model in the example
        ("hf", Halve),  # no Hugging Face model in the example
        ("saved", Halve),  # records no step
        ("seed", Undetermined),
        ("nothing", SilentNothing),
    ],
)
def test_a_broken_transform_is_caught(name, cls):
    with pytest.raises(ContractError, match=name):
        hold(name, "transform", transform(cls))


def test_a_result_that_its_recipe_cannot_rebuild_is_caught():
    class Forgets(Halve):
        """Records a step, but what it builds has a module that ``restore`` knows nothing of."""

        def plan(self, model, data=None, **options):
            plan = super().plan(model, data)

            def build():
                new = copy.deepcopy(model).append(nn.Linear(2, 2))
                recipe.record(new, recipe.BAKE, {}, {})
                return new

            plan.build = build
            return plan

    with pytest.raises(ContractError, match="saved"):
        hold("saved", "transform", transform(Forgets))


class Descent(Rule):
    """Plain gradient descent with momentum on a linear classifier."""

    slug = "descent"

    def __init__(self, climb=False, hook=False, forget=False, noise=False):
        self.model = nn.Linear(8, 2)
        self.optimiser = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9, maximize=climb)
        self.hook, self.forget, self.noise, self.steps = hook, forget, noise, 0

    def step(self, batch):
        x, y = batch
        if self.hook:
            self.model.register_forward_hook(lambda *a: None)
        loss = F.cross_entropy(self.model(x), y)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        Descent.total = getattr(Descent, "total", 0) + 1
        return {"loss": loss.item() + (1e-6 * Descent.total if self.noise else 0)}

    def state_dict(self):
        return {} if self.forget else self.optimiser.state_dict()

    def load_state_dict(self, state):
        if state:
            self.optimiser.load_state_dict(state)


def rule(**options):
    def batches():
        x = torch.randn(12, 16, 8)
        return tuple((each, (each[:, 0] > 0).long()) for each in x)

    return Example(make=lambda: Descent(**options), inputs=batches)


def test_a_sound_rule_keeps_all():
    assert set(check(Descent, rule()).values()) == {"kept"}


@pytest.mark.parametrize(
    ("name", "options"),
    [("learns", {"climb": True}), ("resumes", {"forget": True}), ("hooks", {"hook": True}), ("seed", {"noise": True})],
)
def test_a_broken_rule_is_caught(name, options):
    with pytest.raises(ContractError, match=name):
        hold(name, "rule", rule(**options))


class Heads(Rule):
    """A linear map for each experience, after one that stays; broken on purpose in one way each."""

    slug = "heads"

    def __init__(self, broken=""):
        self.model, self.broken = nn.Linear(8, 6), broken
        self.heads, self.current = {}, ""

    def begin(self, experience):
        self.heads[experience.name], self.current = nn.Linear(6, experience.classes), experience.name

    def at(self, experience):
        if experience.name not in self.heads:
            raise NotBegun(experience.name)
        self.current = experience.name

    def predict(self, inputs):
        with torch.no_grad():
            scores = self.heads[self.current](self.model(inputs))
        return scores[:, :2] if self.broken == "narrow" else scores

    def step(self, batch):
        x, y = batch
        trained = [*self.heads[self.current].parameters(), *(self.model.parameters() if self.broken == "moves" else ())]
        loss = F.cross_entropy(self.heads[self.current](self.model(x)), y)
        with torch.no_grad():
            for p, g in zip(trained, torch.autograd.grad(loss, trained), strict=True):
                p -= 0.3 * g
        return {"loss": loss.item()}

    def state_dict(self):
        names = [self.current] if self.broken == "forgetful" else list(self.heads)
        return {n: {k: v.detach().clone() for k, v in self.heads[n].state_dict().items()} for n in names}

    def load_state_dict(self, state):
        for name, values in state.items():
            self.heads[name], self.current = nn.Linear(6, len(values["bias"])), name
            self.heads[name].load_state_dict(values)


def stream_rule(broken=""):
    def experiences():
        x = torch.randn(3, 64, 8)
        data = [(each, each[:, :classes].argmax(1)) for each, classes in zip(x, (2, 3, 2), strict=True)]
        return [Experience(str(i), pair, pair, int(pair[1].max()) + 1) for i, pair in enumerate(data)]

    def batches():
        x = torch.randn(12, 16, 8)
        return tuple((each, (each[:, 0] < each[:, 1]).long()) for each in x)

    return Example(make=lambda: Heads(broken), inputs=batches, experiences=experiences, forgets=False)


def test_a_sound_rule_of_a_stream_keeps_all():
    assert set(check(Heads, stream_rule()).values()) == {"kept"}
    forgets = dataclasses.replace(stream_rule("moves"), forgets=True)
    assert hold("remembers", "rule", forgets) == "kept"


@pytest.mark.parametrize(
    ("name", "broken", "says"),
    [
        ("begins", "narrow", "prediction of '1' is"),
        ("remembers", "moves", "'0' after learning '1'"),
        ("resumes_stream", "forgetful", "NotBegun"),
    ],
)
def test_a_broken_rule_of_a_stream_is_caught(name, broken, says):
    with pytest.raises(ContractError, match=rf"{name}: .*{says}"):
        hold(name, "rule", stream_rule(broken))


def test_a_rule_of_a_stream_has_experiences_in_its_example():
    with pytest.raises(ContractError, match="its example no experiences"):
        hold("begins", "rule", dataclasses.replace(stream_rule(), experiences=None))
    with pytest.raises(ContractError, match="gave 1; expected at least 2"):
        hold("begins", "rule", dataclasses.replace(stream_rule(), experiences=lambda: stream_rule().experiences()[:1]))


class Norms(Probe):
    """The norm of every weight."""

    slug = "norms"

    def look(self, model, data):
        return {n: float(p.detach().norm()) for n, p in model.named_parameters()}

    def __call__(self, model, data):
        found = self.look(model, data)
        return Finding({"norms": {"name": list(found), "norm": list(found.values())}})


class SwitchesMode(Norms):
    def look(self, model, data):
        return super().look(model.eval(), data)


class ClearsGradients(Norms):
    def look(self, model, data):
        model.zero_grad()
        return super().look(model, data)


class ReplacesForward(Norms):
    def look(self, model, data):
        plain = model.forward
        model.forward = lambda x: plain(x) + 0
        return super().look(model, data)


class Uneven(Norms):
    def __call__(self, model, data):
        return Finding({"norms": {"name": ["a", "b"], "norm": [1.0]}})


class Moody(Norms):
    calls = 0

    def look(self, model, data):
        Moody.calls += 1
        return {n: v + Moody.calls for n, v in super().look(model, data).items()}


def probe(cls):
    def inputs():
        model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.Linear(3, 3))
        nn.init.zeros_(model[2].weight)  # planted
        return model, torch.randn(2, 3)

    def planted(finding):
        table = finding.tables["norms"]
        return table["norm"][table["name"].index("2.weight")] == 0

    return Example(make=cls, inputs=inputs, planted=planted)


def test_a_sound_probe_keeps_all():
    assert set(check(Norms, probe(Norms)).values()) == {"kept"}


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("no_trace", SwitchesMode),
        ("no_trace", ClearsGradients),
        ("no_trace", ReplacesForward),
        ("finding", Uneven),
        ("seed", Moody),
        ("planted", Moody),
    ],
)
def test_a_broken_probe_is_caught(name, cls):
    with pytest.raises(ContractError, match=name):
        hold(name, "probe", probe(cls))


def test_kinds_and_examples():
    assert [kind_of(c) for c in (Sound, Halve, Descent, Norms)] == ["layer", "transform", "rule", "probe"]
    assert example_of(catalog.get("rmsnorm").resolve()).make().width == 12
    with pytest.raises(LookupError, match="EXAMPLE"):
        example_of(nn.Linear)
    with pytest.raises(ValueError, match="kind 'leyer'"):
        contracts("leyer")
    assert testing.check is check


class Coin(Simulator):
    """Heads among tosses; broken on purpose in one way each."""

    slug = "coin"

    def __init__(self, broken=""):
        self.broken = broken

    def run(self, scenario=None, seed=0):
        given = {"tosses": 100, **(scenario or {})}
        if (unknown := set(given) - {"tosses"}) and self.broken != "scenario":
            raise ValueError(f"coin: no key {unknown.pop()!r}; expected tosses.")
        generator = None if self.broken == "seed" else torch.Generator().manual_seed(seed)
        heads = torch.randint(2, (given["tosses"],), generator=generator).sum().item()
        return Finding({"tosses": {"heads": [heads]}}, units={} if self.broken == "finding" else {"heads": "1"})

    def known(self, seed=0):
        heads = self.run({"tosses": 10_000}, seed).tables["tosses"]["heads"][0] / 10_000
        return {"share of heads": (heads + (self.broken == "known"), 0.5, 0.02)}


class Inverse(Construction):
    """A linear map that inverts a matrix."""

    slug = "inverse"

    def __init__(self, broken=""):
        self.broken = broken

    def build(self, matrix):
        if self.broken == "wrong":
            matrix = matrix[:2, :2]
        if matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"inverse: {tuple(matrix.shape)}; expected a square matrix.")
        if self.broken == "untouched":
            matrix[0, 0] += 1
        model = nn.Linear(*matrix.shape, bias=False, dtype=matrix.dtype)
        with torch.no_grad():
            model.weight.copy_(matrix.inverse() * (1.001 if self.broken == "exact" else 1))
            if self.broken == "seed":
                model.weight += 1e-12 * torch.rand(1).item() * next(COUNT)
        return model

    def reference(self, matrix):
        return torch.eye(len(matrix), dtype=matrix.dtype)


COUNT = itertools.count()


class Reversed:
    """Puts the rows of a dictionary's tensor into the reverse order."""

    def __init__(self, broken=""):
        self.broken = broken

    def __call__(self, data):
        if self.broken == "untouched":
            data["x"][0] = 7
        x = data["x"] if self.broken == "changes" else data["x"].flip(0)
        return {"x": x + torch.rand(1).item() * next(COUNT) if self.broken == "seed" else x}


MORE = {
    "simulator": (Coin, lambda b: Example(make=lambda: Coin(b), inputs=lambda: ({"tosses": 20},))),
    "construction": (
        Inverse,
        lambda b: Example(
            make=lambda: Inverse(b),
            inputs=lambda: (torch.randn(3, 3, dtype=torch.float64),),
            wrong=lambda: (torch.randn(3, 2, dtype=torch.float64),),
            outputs=lambda model, matrix: model(matrix.T).T,
            precision=1e-9,
        ),
    ),
    "data-transform": (
        Reversed,
        lambda b: Example(
            make=lambda: Reversed(b),
            inputs=lambda: ({"x": torch.arange(4.0)},),
            known=lambda: {"sum": (6.0 + (b == "known"), 6.0, 1e-6)},
            invariances={"sum": lambda t, d: bool((t(d)["x"].sum() == d["x"].sum()) ^ (b == "invariances"))},
        ),
    ),
}


@pytest.mark.parametrize("kind", MORE)
def test_the_kinds_beside_networks_keep_their_contracts_and_broken_twins_break_one(kind):
    component, example = MORE[kind]
    assert kind_of(component) == kind
    assert set(check(component, example("")).values()) == {"kept"}
    for name in contracts(kind):
        with pytest.raises(ContractError, match=f"(?m)^{name}|  {name}"):
            check(component, example(name))
