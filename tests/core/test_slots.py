import pytest
from torch import nn

from interlayer.core.slots import choose, fill, parse_spec


@pytest.mark.parametrize(
    ("spec", "read"),
    [
        ("rezero", ("rezero", {})),
        ("denseformer(dilation=4, period=2)", ("denseformer", {"dilation": 4, "period": 2})),
        ("value-residual(mode='shared')", ("value-residual", {"mode": "shared"})),
    ],
)
def test_specs_read(spec, read):
    assert parse_spec(spec) == read


@pytest.mark.parametrize(
    "spec", ["a(", "a(4)", "a(x=open('f'))", "a(x=)", "a(b={[]: 1})", "a(b=1)(c=2)", "a(**{})", "a(b=" + "[" * 9999]
)
def test_specs_that_do_not_read(spec):
    with pytest.raises(ValueError, match="does not read as"):
        parse_spec(spec)


def test_a_constructor_gets_what_it_names_and_options_come_first():
    class Part(nn.Module):
        def __init__(self, width, *, gain=1.0):
            super().__init__()
            self.width, self.gain = width, gain

    part = fill("norm", Part, width=3, depth=9, gain=2.0)
    assert (part.width, part.gain) == (3, 2.0)
    assert fill("stream", "denseformer(dilation=2)", depth=4, width=8, dilation=1).sources[4] == [0, 2]
    assert fill("linear", "linear", inputs=2, outputs=3).weight.shape == (3, 2)


def test_errors_name_slot_and_mend():
    with pytest.raises(ValueError, match=r"no slot 'strem'. Did you mean 'stream'"):
        fill("strem", "rezero")
    with pytest.raises(ValueError, match="Did you mean 'rezero'"):
        fill("stream", "rezzero", depth=1)
    with pytest.raises(ValueError, match="fills the slot 'norm'"):
        fill("stream", "rmsnorm", depth=1)
    with pytest.raises(ValueError, match=r"no option 'dilatoin'. Did you mean 'dilation'"):
        fill("stream", "denseformer(dilatoin=2)", depth=1, width=4)
    with pytest.raises(TypeError, match="finished Linear"):
        fill("norm", nn.Linear(2, 2))


def test_choose_builds_from_a_table_with_options_of_its_own():
    class Plain(nn.Module):
        pass

    class Scaled(nn.Module):
        def __init__(self, width, scale=2.0):
            super().__init__()
            self.width, self.scale = width, scale

    table = {"plain": Plain, "scaled": Scaled}
    assert isinstance(choose("Net: path", "plain", table, width=3), Plain)
    for what, scale in (
        ("scaled", 2.0),
        ("scaled(scale=0.5)", 0.5),
        (Scaled, 2.0),
        (lambda width: Scaled(width, 7), 7),
    ):
        made = choose("Net: path", what, table, width=3)
        assert (made.width, made.scale) == (3, scale)
    for what, message in (
        ("scald", "path 'scald' is not one of .* Did you mean 'scaled'"),
        ("plain(scale=1)", r"'plain\(scale=1\)' has no option 'scale'; it has \[\]"),
        ("scaled(width=1)", r"no option 'width'; it has \['scale'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            choose("Net: path", what, table, width=3)
