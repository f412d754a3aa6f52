"""Charts for pages: drawn by matplotlib as SVG in the page's own colours, light and dark, with a tooltip on every mark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any

import numpy as np

# Okabe and Ito's colours, which colour-blind readers can tell apart; (light page, dark page). Number -1 is grey.
COLOURS = (
    ("#0072b2", "#4aa8e0"), ("#d55e00", "#f08a45"), ("#009e73", "#2fc79c"), ("#b0578d", "#dd8fbe"),
    ("#9a6f00", "#e0ad2e"), ("#2f9bd6", "#86cdf5"), ("#6a4fb3", "#ab97ea"), ("#8a8f00", "#c9ce4a"),
)  # fmt: skip
GREY = ("#5f6670", "#a3abb6")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2.5)), (0, (1.2, 1.8)))
PAGE = {"#5d636b": "var(--soft)", "#e3e3de": "var(--line)", "#fffffe": "var(--card)"}
SOFT, LINE, CARD = PAGE
NAME = 20  # letters of a name that a chart shows


def colour(number: int) -> str:
    """The colour of a number on a light page."""
    return COLOURS[number % len(COLOURS)][0] if number >= 0 else GREY[0]


def dash(number: int) -> Any:
    """The line style of a number: solid until the colours come round."""
    return DASHES[max(number, 0) // len(COLOURS) % len(DASHES)]


def variable(number: int) -> str:
    """The CSS variable of a number's colour."""
    return f"var(--c{number % len(COLOURS) if number >= 0 else 'base'})"


def variables() -> str:
    """A style sheet with all colours, for light and dark pages."""
    pairs = {"base": GREY, **{str(i): c for i, c in enumerate(COLOURS)}}
    light, dark = ("".join(f"--c{k}:{v[j]};" for k, v in pairs.items()) for j in (0, 1))
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


def shorten(text: str, most: int = NAME) -> str:
    """A long name with its end cut off."""
    return text if len(text) <= most else text[: most - 1] + "…"


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move label positions apart until each has ``gap``, in their order and inside the ends.

    >>> spread([10.0, 11.0, 50.0], 10.0, 0.0, 100.0)
    [10.0, 20.0, 50.0]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    found = [0.0] * len(wanted)
    at = low - gap
    for i in order:
        found[i] = at = max(wanted[i], at + gap)
    at = high + gap
    for i in reversed(order):
        found[i] = at = min(found[i], at - gap)
    return found


class Chart:
    """One set of axes.

    Args:
        x: What the horizontal axis shows, with its unit.
        y: What the vertical axis shows.
        size: Width and height in inches.

    Examples:
        >>> chart = Chart("step", "loss")
        >>> with chart.tip("plain, step 1: 0.5"):
        ...     _ = chart.axes.plot([1], [0.5], "o", color=colour(0))
        >>> "<title>plain, step 1: 0.5</title>" in chart.svg("curves"), "var(--c0)" in chart.svg("curves")
        (True, True)
    """

    def __init__(self, x: str = "", y: str = "", *, size: tuple[float, float] = (5.2, 3.5)) -> None:
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=size)
        self.axes: Any = self.figure.subplots()
        self.tips: list[str] = []
        self.axes.set_xlabel(x, color=SOFT, fontsize=9.5)
        self.axes.set_title(y, color=SOFT, fontsize=9.5, loc="left", x=0, pad=8)
        self.axes.spines[["top", "right", "left"]].set_visible(False)
        self.axes.spines["bottom"].set_color(SOFT)
        self.axes.tick_params(colors=SOFT, labelsize=9, left=False)
        self.axes.grid(axis="y", color=LINE, linewidth=0.8)
        self.axes.set_axisbelow(True)

    @contextmanager
    def tip(self, text: str) -> Iterator[None]:
        """Give what is drawn within a tooltip."""
        before = set(self.axes.get_children())
        yield
        for artist in self.axes.get_children():
            if artist not in before:
                artist.set_gid(f"tip-{len(self.tips)}")
                self.tips.append(text)

    def band(self, x: Sequence[float], runs: Sequence[Sequence[float]], number: int, tips: Sequence[str]) -> float:
        """A line through the means, a dot with a tooltip at each, and a band from the lowest to the highest; the last mean."""
        means = [float(np.mean(v)) for v in runs]
        paint = colour(number)
        self.axes.fill_between(x, [min(v) for v in runs], [max(v) for v in runs], color=paint, alpha=0.14, linewidth=0)
        self.axes.plot(x, means, color=paint, linestyle=dash(number), linewidth=1.8)
        for at, mean, text in zip(x, means, tips, strict=True):
            with self.tip(text):
                self.axes.plot([at], [mean], "o", color=paint, markersize=3.6)
        return means[-1]

    def names(self, ends: Mapping[str, tuple[float, int]]) -> None:
        """Names at the right edge, beside the heights at which their lines end."""
        low, high = self.axes.get_ylim()
        moved = spread([y for y, _ in ends.values()], (high - low) * 0.066, low, high)
        for (name, (y, number)), at in zip(ends.items(), moved, strict=True):
            self.axes.annotate(
                shorten(name), (1, y), (1.04, at), ("axes fraction", "data"), ("axes fraction", "data"), va="center",
                color=colour(number), fontsize=9.5, weight="bold", annotation_clip=False,
                arrowprops={"arrowstyle": "-", "color": colour(number), "linewidth": 0.7, "shrinkA": 1, "shrinkB": 2, "relpos": (0, 0.5)},
            )  # fmt: skip

    def svg(self, label: str) -> str:
        """The drawing.

        Args:
            label: What it shows, for readers who do not see it.
        """
        import matplotlib

        buffer = io.StringIO()
        with matplotlib.rc_context(
            {"svg.hashsalt": "interlayer", "svg.fonttype": "none", "image.composite_image": False}
        ):
            self.figure.savefig(
                buffer, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.06, metadata={"Date": None}
            )
        drawing = buffer.getvalue()
        drawing = re.sub(r"<metadata>.*?</metadata>", "", drawing[drawing.index("<svg") :], flags=re.DOTALL)
        drawing = re.sub(r' xmlns(:xlink)?="[^"]*"', "", drawing)  # which HTML does not need
        drawing = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", drawing, count=1)
        drawing = re.sub(
            r'(<svg[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{escape(label)}"', drawing, count=1
        )
        for number, text in enumerate(self.tips):
            drawing = drawing.replace(f'<g id="tip-{number}">', f"<g><title>{escape(text)}</title>", 1)
        names = {colour(i): variable(i) for i in range(-1, len(COLOURS))} | PAGE
        return re.sub("|".join(names), lambda found: names[found[0]], drawing)


def curves(x: str, y: str, at: Sequence[Any], lines: Mapping[str, Sequence[float]]) -> Any:
    """A matplotlib figure of several lines over the same positions.

    Args:
        x: What the horizontal axis shows, with its unit.
        y: What the vertical axis shows.
        at: The positions, numbers or names.
        lines: The values of each line, by its name.

    Examples:
        >>> figure = curves("width", "barrier [nat]", [8, 16], {"matched": [0.2, 0.1], "unmatched": [0.5, 0.6]})
        >>> len(figure.axes[0].lines) > 2
        True
    """
    named = any(isinstance(a, str) for a in at)
    chart, ends, places = Chart(x, y), {}, list(range(len(at))) if named else [float(a) for a in at]
    for number, (name, values) in enumerate(lines.items()):
        tips = [f"{name}, {a}: {v:.4g}" for a, v in zip(at, values, strict=True)]
        ends[name] = chart.band(places, [[v] for v in values], number, tips), number
    if named:
        chart.axes.set_xticks(places, [shorten(str(a), 12) for a in at], rotation=35, ha="right")
    chart.names(ends)
    return chart.figure


def matrix(values: Any, rows: Sequence[str], columns: Sequence[str], label: str, text: str = "{:.2g}") -> str:
    """A table of numbers as a heat map, each with its number.

    Args:
        values: Numbers [rows, columns]; NaN stays empty.
        rows: Names of the rows.
        columns: Names of the columns.
        label: What it shows.
        text: Format of the numbers.
    """
    table = np.asarray(values, dtype=float)
    chart = Chart(size=(1.6 + 0.55 * table.shape[1], 0.7 + 0.42 * table.shape[0]))
    axes = chart.axes
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    largest = np.nanmax(np.abs(table)) if np.isfinite(table).any() else 1.0
    for (i, j), value in np.ndenumerate(table):
        if np.isfinite(value):
            with chart.tip(f"{rows[i]}, {columns[j]}: {value:.5g}"):
                axes.fill([j - 0.5, j + 0.5, j + 0.5, j - 0.5], [i - 0.5, i - 0.5, i + 0.5, i + 0.5],
                          color=colour(0 if value >= 0 else 1), alpha=0.75 * abs(value) / (largest or 1.0), linewidth=0)  # fmt: skip
            axes.text(j, i, text.format(value), ha="center", va="center", fontsize=8.5, color=SOFT)
    axes.set(xlim=(-0.5, table.shape[1] - 0.5), ylim=(table.shape[0] - 0.5, -0.5))
    axes.set_xticks(range(table.shape[1]), [shorten(c, 12) for c in columns], rotation=35, ha="right")
    axes.set_yticks(range(table.shape[0]), [shorten(r) for r in rows])
    return chart.svg(label)


def samples(images: Any, label: str, columns: int = 8) -> str:
    """A grid of images.

    Args:
        images: [N, H, W] or [N, H, W, 3], from 0 to 1.
        label: What they show.
        columns: In a row.
    """
    pictures = np.clip(np.asarray(images, dtype=float), 0, 1)
    lines = -(-len(pictures) // columns)
    chart = Chart(size=(5.2, 5.2 * lines / columns))
    chart.axes.set_axis_off()
    for n, picture in enumerate(pictures):
        x, y = n % columns, n // columns
        chart.axes.imshow(picture, cmap="gray", vmin=0, vmax=1, extent=(x + 0.04, x + 0.96, y + 0.96, y + 0.04))
    chart.axes.set(xlim=(0, columns), ylim=(lines, 0))
    return chart.svg(label)
