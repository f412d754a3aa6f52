"""Findings as pages, files and tables on the terminal."""

import csv
import io
import re

import pytest
from rich.console import Console

from interlayer.core import page
from interlayer.core.kinds import Finding


def found(rows=3):
    def figure():
        from matplotlib import pyplot

        drawn, axes = pyplot.subplots()
        axes.plot([0, 1], [0, 1])
        axes.set_xlabel("distance [km]")
        return drawn

    columns = {"distance": [float(i) for i in range(rows)], "<who>": ["a & b"] * rows}
    return Finding({"link by distance": columns}, figure, {"distance": "km"})


def test_a_page_stands_alone_and_files_hold_all_rows(tmp_path):
    path = page.write(found(250), tmp_path, "Paper", "demo & more", most=20)
    html = path.read_text()
    assert not re.search(r"<script|@import|url\(http|src=", html.replace("xlink:href", ""))
    assert "demo &amp; more" in html and "&lt;who&gt;" in html and "a &amp; b" in html and "distance [km]" in html
    assert html.count("<svg") == 1 == html.count("</svg>") and html.count("<tr>") == 21
    assert "The first 20 of 250 rows; all are in link-by-distance.csv." in html
    with (tmp_path / "link-by-distance.csv").open() as file:
        lines = list(csv.reader(file))
    assert lines[0] == ["distance [km]", "<who>"] and len(lines) == 251 and float(lines[-1][0]) == 249
    assert path.read_text() == page.write(found(250), tmp_path, "Paper", "demo & more", most=20).read_text()


def test_tables_are_printed_with_units():
    console = Console(file=io.StringIO(), width=100)
    for shown in page.printed(found(40)).values():
        console.print(shown)
    text = console.file.getvalue()
    assert "distance [km]" in text and "the first 30 of 40 rows" in " ".join(text.split())


@pytest.mark.parametrize(
    ("value", "text"), [(1234567.0, "1.2346e+06"), (float("nan"), "nan"), (True, "True"), ("x", "x")]
)
def test_values_are_short(value, text):
    assert page.text(value) == text
