"""Charts: in the page's colours, with a tooltip on each mark, whatever the names."""

import re

import numpy as np
import pytest

from interlayer.core.chart import COLOURS, Chart, colour, dash, matrix, samples, shorten, spread, variable, variables

LONG = "a-name-that-is-far-too-long & <odd>"


def test_lines_have_a_tooltip_at_every_point_and_no_colour_of_their_own():
    chart = Chart("steps", "loss (nats)")
    ends = {}
    for number, name in ((-1, "plain"), (0, LONG), (8, "nine")):
        tips = [f"{name}, step {x}" for x in (1, 2)]
        ends[name] = (chart.band([1, 2], [[1.0, 3.0], [number, number]], number, tips), number)
    chart.names(ends)
    drawing = chart.svg("curves & more")
    assert ends == {"plain": (-1.0, -1), LONG: (0.0, 0), "nine": (8.0, 8)}
    for name in ("plain", "a-name-that-is-far-too-long &amp; &lt;odd&gt;", "nine"):
        assert all(f"<title>{name}, step {x}</title>" in drawing for x in (1, 2))
    assert (
        "a-name-that-is-far-…" in drawing and "loss (nats)" in drawing and 'aria-label="curves &amp; more"' in drawing
    )
    assert "var(--c0)" in drawing and "var(--cbase)" in drawing and "var(--soft)" in drawing
    assert not set(re.findall(r"#[0-9a-f]{6}\b", drawing)) & {pair[0] for pair in COLOURS}
    assert not re.search(r"https?:|<script|width=\"\d+pt", drawing)


def test_colours_come_round_with_other_dashes():
    assert [variable(n) for n in (-1, 0, 7, 8)] == ["var(--cbase)", "var(--c0)", "var(--c7)", "var(--c0)"]
    assert colour(8) == colour(0) and dash(8) != dash(0) == "-"
    sheet = variables()
    assert all(f"--c{i}:{one};" in sheet and f"--c{i}:{two};" in sheet for i, (one, two) in enumerate(COLOURS))


def test_a_matrix_shows_its_numbers_and_leaves_out_what_is_missing():
    drawing = matrix([[1.0, -0.5], [np.nan, 0.25]], ["first", LONG], ["a", "b"], "weights")
    assert drawing.count("<title>") == 3 and "<title>first, b: -0.5</title>" in drawing and "0.25" in drawing
    assert "nan" not in drawing
    assert (
        matrix([[1.0, -0.5], [np.nan, 0.25]], ["first", LONG], ["a", "b"], "weights") == drawing
    )  # the same every time
    assert matrix([[np.nan]], ["r"], ["c"], "nothing").count("<title>") == 0


def test_samples_stand_in_a_grid():
    drawing = samples(np.random.default_rng(0).random((10, 4, 4)), "samples", columns=4)
    assert drawing.count("<image") == 10 and 'aria-label="samples"' in drawing
    assert samples(np.zeros((2, 4, 4, 3)), "in colour").count("<image") == 2


@pytest.mark.parametrize(("wanted", "found"), [([1.0, 1.0], [1.0, 2.0]), ([9.5, 9.9], [9.0, 10.0]), ([], [])])
def test_labels_move_apart_inside_the_ends(wanted, found):
    assert spread(wanted, 1.0, 0.0, 10.0) == pytest.approx(found)
    assert shorten("abc", 3) == "abc" and shorten("abcd", 3) == "ab…"
