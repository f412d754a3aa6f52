"""Charts of a study as inline SVG: learning curves, differences to the baseline, quality against cost, learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from interlayer.study.result import ArmRow, Result

# Okabe and Ito's colours, which colour-blind readers can emit apart; (light page, dark page). The baseline is grey.
GREY = ("#5f6670", "#a3abb6")
COLOURS = (
    ("#0072b2", "#4aa8e0"), ("#d55e00", "#f08a45"), ("#009e73", "#2fc79c"), ("#b0578d", "#dd8fbe"),
    ("#9a6f00", "#e0ad2e"), ("#2f9bd6", "#86cdf5"), ("#6a4fb3", "#ab97ea"), ("#8a8f00", "#c9ce4a"),
)  # fmt: skip
DASHES = ("", "7 4", "2 3")


def colours(result: Result) -> dict[str, int]:
    """Colour number of each arm: -1 for the baseline."""
    others = [a.name for a in result.spec.arms if a.name != result.spec.baseline]
    return {result.spec.baseline: -1, **{name: i for i, name in enumerate(others)}}


def var(number: int) -> str:
    """The CSS variable of a colour number."""
    return f"var(--c{number % len(COLOURS) if number >= 0 else 'base'})"


def variables() -> str:
    """Style of all colours, for light and dark pages."""
    pairs = {"base": GREY, **{str(i): c for i, c in enumerate(COLOURS)}}
    light, dark = ("".join(f"--c{k}:{v[j]};" for k, v in pairs.items()) for j in (0, 1))
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two ends.

    >>> ticks(0.0, 1.0)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    span = high - low if high > low else abs(high) or 1.0
    rough = span / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if rough <= power * m * 1.0001)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(value: float, sign: bool = False) -> str:
    text = f"{value:{'+' if sign and value else ''}.10g}"
    return text.replace("-", "−")


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move label positions apart until each has ``gap``, in their order and inside the ends.

    >>> spread([10.0, 11.0, 50.0], 10.0, 0.0, 100.0)
    [10.0, 20.0, 50.0]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    found = [0.0] * len(wanted)
    at = low - gap
    for i in order:
        at = max(wanted[i], at + gap)
        found[i] = at
    at = high + gap
    for i in reversed(order):
        at = min(found[i], at - gap)
        found[i] = at
    return found


class Axes:
    """A plot area with scales, grid and labelled axes.

    Args:
        x: Ends of the horizontal axis.
        y: Ends of the vertical axis.
        labels: What the axes show, with units.
        size: Width and height of the drawing.
        right: Room for labels on the right.
        signed: Whether the vertical numbers carry their sign.
    """

    def __init__(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        labels: tuple[str, str],
        *,
        size: tuple[int, int] = (500, 330),
        right: int = 120,
        signed: bool = False,
    ) -> None:
        self.size, self.x, self.y = size, x, y
        self.left, self.top, self.right, self.bottom = 54, 26, size[0] - right, size[1] - 44
        self.parts: list[str] = []
        for v in ticks(*y):
            self.parts.append(
                f'<line class="grid" x1="{self.left}" x2="{self.right}" y1="{self.py(v):.1f}" y2="{self.py(v):.1f}"/>'
            )
            self.text(self.left - 8, self.py(v) + 4, _number(v, signed), "end")
        for v in ticks(*x, count=4 if right > 60 else 5):
            self.text(self.px(v), self.bottom + 19, _number(v), "middle")
            self.parts.append(
                f'<line class="axis" x1="{self.px(v):.1f}" x2="{self.px(v):.1f}" y1="{self.bottom}" y2="{self.bottom + 4}"/>'
            )
        self.parts.append(
            f'<line class="axis" x1="{self.left}" x2="{self.right}" y1="{self.bottom}" y2="{self.bottom}"/>'
        )
        self.text((self.left + self.right) / 2, size[1] - 6, labels[0], "middle")
        self.text(0, 11, labels[1], "start")

    def px(self, v: float) -> float:
        """Horizontal place of a value."""
        return self.left + (v - self.x[0]) / (self.x[1] - self.x[0] or 1) * (self.right - self.left)

    def py(self, v: float) -> float:
        """Vertical place of a value."""
        return self.bottom - (v - self.y[0]) / (self.y[1] - self.y[0] or 1) * (self.bottom - self.top)

    def text(self, x: float, y: float, text: str, anchor: str, extra: str = "") -> None:
        """Write."""
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>{escape(text)}</text>')

    def zero(self) -> None:
        """A line at zero."""
        if self.y[0] <= 0 <= self.y[1]:
            self.parts.append(
                f'<line class="zero" x1="{self.left}" x2="{self.right}" y1="{self.py(0):.1f}" y2="{self.py(0):.1f}"/>'
            )

    def curve(
        self,
        steps: Sequence[float],
        runs: Sequence[Sequence[float]],
        number: int,
        name: str,
        unit: str,
        sign: bool = False,
    ) -> float:
        """A line through the means with a band from the lowest to the highest seed; its last height."""
        means = [sum(v) / len(v) for v in runs]
        colour = var(number)
        low, high = ([(self.px(s), self.py(f(v))) for s, v in zip(steps, runs, strict=True)] for f in (min, max))
        outline = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*high, *reversed(low)])
        if any(len(v) > 1 for v in runs):
            self.parts.append(f'<polygon class="band" fill="{colour}" points="{outline}"/>')
        path = " ".join(f"{self.px(s):.1f},{self.py(m):.1f}" for s, m in zip(steps, means, strict=True))
        dash = DASHES[max(number, 0) // len(COLOURS) % len(DASHES)]
        self.parts.append(f'<polyline class="curve" stroke="{colour}" stroke-dasharray="{dash}" points="{path}"/>')
        for s, m, v in zip(steps, means, runs, strict=True):
            text = f"{name}, step {s:.0f}: {_number(round(m, 5), sign)} {unit}"
            text += f" (seeds {', '.join(_number(round(x, 5), sign) for x in v)})" if len(v) > 1 else ""
            x, y = self.px(s), self.py(m)
            self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"/>')
            self.parts.append(
                f'<circle class="hit" style="color:{colour}" cx="{x:.1f}" cy="{y:.1f}" r="9"><title>{escape(text)}</title></circle>'
            )
        return self.py(means[-1])

    def names(self, places: dict[str, tuple[float, int]]) -> None:
        """Names at the right end, beside their lines."""
        moved = spread([y for y, _ in places.values()], 16, self.top + 4, self.bottom)
        for (name, (y, number)), at in zip(places.items(), moved, strict=True):
            if abs(at - y) > 3:
                line = f'x1="{self.right + 3}" y1="{y:.1f}" x2="{self.right + 11}" y2="{at:.1f}"'
                self.parts.append(f'<line {line} stroke="{var(number)}" stroke-width="1"/>')
            self.text(self.right + 14, at + 4, shorten(name, 17), "start", f'class="name" style="fill:{var(number)}"')

    def svg(self, label: str) -> str:
        """The drawing."""
        w, h = self.size
        return f'<svg viewBox="0 0 {w} {h}" role="img" aria-label="{escape(label)}">{"".join(self.parts)}</svg>'


def shorten(text: str, most: int) -> str:
    """A long name with its end cut off."""
    return text if len(text) <= most else text[: most - 1] + "…"


def _padded(values: Sequence[float], share: float = 0.06) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * share or abs(high) * share or 1.0
    return low - pad, high + pad


def _curves(result: Result) -> dict[str, dict[float, dict[int, float]]]:
    """Metric by arm, step (or share of the time) and seed, where all the arm's finished seeds have it."""
    metric = result.about["metric"]
    found: dict[str, dict[float, dict[int, float]]] = {}
    for arm in result.spec.arms:
        by_step: dict[float, dict[int, float]] = {}
        runs = [r for r in result.of(arm.name) if r.state == "done"]
        for run in runs:
            for i, point in enumerate(run.record.curve):
                at = (
                    point["step"]
                    if result.spec.seconds is None
                    else (i + 1) / len(run.record.curve) * result.spec.seconds
                )
                by_step.setdefault(at, {})[run.seed] = point[metric]
        if by_step:
            found[arm.name] = {s: v for s, v in sorted(by_step.items()) if len(v) == len(runs)}
    return found


def learning(result: Result, number: dict[str, int]) -> str:
    """Learning curves, and their paired difference to the baseline."""
    about, curves = result.about, _curves(result)
    if not curves:
        return ""
    unit = about["unit"] if about["metric"] == "loss" else ""
    time = "training steps" if result.spec.seconds is None else "seconds of training"
    values = [x for c in curves.values() for v in c.values() for x in v.values()]
    steps = [s for c in curves.values() for s in c]
    axes = Axes(
        (0, max(steps)), _padded(values), (time, f"validation {about['metric']}" + (f" ({unit})" if unit else ""))
    )
    places = {}
    for name, curve in curves.items():
        runs = [list(v.values()) for v in curve.values()]
        places[name] = (axes.curve(list(curve), runs, number[name], name, unit), number[name])
    axes.names(places)
    out = f"<figure><h3>How they learn</h3><figcaption>Mean of the seeds; the band reaches from the lowest to the highest.</figcaption>{axes.svg('learning curves')}</figure>"
    base = curves.get(result.spec.baseline)
    others = {n: c for n, c in curves.items() if n != result.spec.baseline}
    if base is None or not others:
        return f'<div class="one">{out}</div>'
    apart = {
        n: {s: {k: x - base[s][k] for k, x in v.items() if k in base[s]} for s, v in c.items() if s in base}
        for n, c in others.items()
    }
    apart = {n: {s: v for s, v in c.items() if v} for n, c in apart.items()}
    apart = {n: c for n, c in apart.items() if c}
    # The first evaluations can dwarf the rest: the axis follows the later half, and lines leave it at the top.
    later = [x for c in apart.values() for s, v in c.items() if s >= max(steps) * 0.35 for x in v.values()]
    if not later:
        return f'<div class="one">{out}</div>'
    low, high = _padded([*later, 0.0], 0.1)
    axes = Axes(
        (0, max(steps)),
        (low, high),
        (time, f"difference to {result.spec.baseline}" + (f" ({unit})" if unit else "")),
        signed=True,
    )
    axes.zero()
    places = {}
    for name, curve in apart.items():
        kept = {s: v for s, v in curve.items() if all(low <= x <= high for x in v.values())}
        if kept:
            runs = [list(v.values()) for v in kept.values()]
            places[name] = (axes.curve(list(kept), runs, number[name], name, unit, sign=True), number[name])
    axes.names(places)
    better = "Above" if about["higher"] else "Below"
    caption = (
        f"Paired by seed. {better} zero is better than {result.spec.baseline}. Early points off the scale are left out."
    )
    out += f"<figure><h3>The same, against {escape(result.spec.baseline)}</h3><figcaption>{escape(caption)}</figcaption>{axes.svg('differences')}</figure>"
    return f'<div class="pair">{out}</div>'


def forest(result: Result, found: Sequence[ArmRow], number: dict[str, int]) -> str:
    """Final paired difference of each arm: each seed a dot, the mean a diamond, the interval a line."""
    metric, base = result.about["metric"], result.values(result.spec.baseline)
    dots = {
        r.arm: {s: v - base[s] for s, v in result.values(r.arm, metric).items() if s in base}
        for r in found
        if r.difference is not None
    }
    dots = {n: d for n, d in dots.items() if d}
    by = {r.arm: r.difference for r in found if r.difference is not None}
    if not dots:
        return ""
    every = [x for d in dots.values() for x in d.values()]
    ends = [
        e
        for r in found
        if r.difference and not math.isnan(r.difference.half)
        for e in (r.difference.low, r.difference.high)
    ]
    reach = max(abs(x) for x in every) or 1e-3
    low, high = max(min([*every, *ends, 0.0]), -2.2 * reach), min(max([*every, *ends, 0.0]), 2.2 * reach)
    if high - low < 1e-9:
        low, high = -reach, reach
    pad = 0.06 * (high - low)
    left, right, row = 150, 810, 36
    low, high, height = low - pad, high + pad, 30 + row * len(dots) + 44

    def px(v: float) -> float:
        return left + (min(max(v, low), high) - low) / (high - low) * (right - left)

    bottom = height - 44
    parts = []
    for v in ticks(low, high, 6):
        parts.append(
            f'<line class="{"zero" if v == 0 else "grid"}" x1="{px(v):.1f}" x2="{px(v):.1f}" y1="20" y2="{bottom}"/>'
        )
        parts.append(f'<text x="{px(v):.1f}" y="{bottom + 18}" text-anchor="middle">{_number(v, True)}</text>')
    higher = result.about["higher"]
    parts.append(f'<text x="{px(0) - 10:.1f}" y="11" text-anchor="end">← {"worse" if higher else "better"}</text>')
    parts.append(f'<text x="{px(0) + 10:.1f}" y="11">{"better" if higher else "worse"} →</text>')
    unit = f" ({result.about['unit']})" if metric == "loss" else ""
    label = f"validation {metric} minus {result.spec.baseline}'s{unit}"
    parts.append(f'<text x="{(left + right) / 2}" y="{height - 6}" text-anchor="middle">{escape(label)}</text>')
    for i, (name, values) in enumerate(dots.items()):
        y, colour = 20 + row * (i + 0.5), var(number[name])
        difference = by[name]
        text = f"{name}: {difference.text(sign=True)}"
        parts.append(
            f'<text class="name" x="{left - 16}" y="{y + 4}" text-anchor="end" style="fill:{colour}">{escape(shorten(name, 20))}</text>'
        )
        if not math.isnan(difference.half):
            a, b = px(difference.low), px(difference.high)
            parts.append(
                f'<line x1="{a:.1f}" x2="{b:.1f}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2.5"><title>{escape(text)}</title></line>'
            )
            for end, value, way in ((a, difference.low, -1), (b, difference.high, 1)):
                if low <= value <= high:
                    parts.append(
                        f'<line x1="{end:.1f}" x2="{end:.1f}" y1="{y - 5}" y2="{y + 5}" stroke="{colour}" stroke-width="2"/>'
                    )
                else:
                    parts.append(
                        f'<path d="M{end - 7 * way:.1f} {y - 5}L{end:.1f} {y}L{end - 7 * way:.1f} {y + 5}" fill="none" stroke="{colour}" stroke-width="2"/>'
                    )
        for seed, value in values.items():
            parts.append(
                f'<circle cx="{px(value):.1f}" cy="{y}" r="4" fill="var(--card)" stroke="{colour}" stroke-width="1.6"><title>{escape(name)}, seed {seed}: {_number(round(value, 5), True)}</title></circle>'
            )
        x = px(difference.mean)
        parts.append(f'<path d="M{x:.1f} {y - 7}l6 7l-6 7l-6 -7z" fill="{colour}"><title>{escape(text)}</title></path>')
        parts.append(f'<text x="{right + 22}" y="{y + 4}">{escape(difference.text(sign=True))}</text>')
    drawing = f'<svg viewBox="0 0 1000 {height}" role="img" aria-label="paired differences">{"".join(parts)}</svg>'
    caption = "Filled: mean. Open: each seed."
    if result.spec.looks[-1] > 1:
        caption += " Line: the interval; an arrow means that it goes on beyond the edge."
    return f'<figure class="one"><h3>Difference to {escape(result.spec.baseline)} at the end</h3><figcaption>{caption}</figcaption>{drawing}</figure>'


def costs(result: Result, found: Sequence[ArmRow], number: dict[str, int]) -> str:
    """Quality against step time and against peak memory."""
    metric = result.about["metric"]
    arms = [r for r in found if metric in r.metrics and "step_time" in r.cost]
    if not arms:
        return ""
    kinds = (
        ("step_time", "step time", "median step time (ms)", 1e3),
        ("peak_memory", "peak memory", "peak memory (MB)", 1e-6),
    )
    out = []
    values = {r.arm: list(result.values(r.arm).values()) for r in arms}
    unit = f" ({result.about['unit']})" if metric == "loss" else ""
    for key, title, label, scale in kinds:
        xs = [r.cost[key] * scale for r in arms]
        axes = Axes(
            _padded([*xs, min(xs) * 0.97, max(xs) * 1.03]),
            _padded([v for x in values.values() for v in x], 0.12),
            (label, f"validation {metric}{unit}"),
        )
        places = [(axes.px(x), axes.py(r.metrics[metric].mean)) for x, r in zip(xs, arms, strict=True)]
        heights = _beside(places, [len(shorten(r.arm, 22)) * 7.2 + 14 for r in arms], axes)
        for r, x, (px, py), at in zip(arms, xs, places, heights, strict=True):
            colour = var(number[r.arm])
            ends = [axes.py(v) for v in (min(values[r.arm]), max(values[r.arm]))]
            text = (
                f"{r.arm}: {metric} {r.metrics[metric].text()}, {title} {x:.3g} {'ms' if key == 'step_time' else 'MB'}"
            )
            axes.parts.append(
                f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}" stroke="{colour}" stroke-width="2" class="seed"/>'
            )
            if abs(at - py) > 5:
                axes.parts.append(
                    f'<line x1="{px:.1f}" y1="{py:.1f}" x2="{px + 10:.1f}" y2="{at:.1f}" stroke="{colour}" stroke-width="1" class="seed"/>'
                )
            axes.parts.append(
                f'<circle cx="{px:.1f}" cy="{py:.1f}" r="5.5" fill="{colour}"><title>{escape(text)}</title></circle>'
            )
            axes.text(px + 12, at + 4, shorten(r.arm, 22), "start", f'class="name" style="fill:{colour}"')
        best = "upper" if result.about["higher"] else "lower"
        out.append(
            f"<figure><h3>Quality against {title}</h3><figcaption>Best is {best} left. Bars reach over the seeds.</figcaption>{axes.svg('quality against ' + title)}</figure>"
        )
    return f'<h2>Quality against cost</h2><div class="pair">{"".join(out)}</div>'


def _beside(places: Sequence[tuple[float, float]], widths: Sequence[float], axes: Axes) -> list[float]:
    """Heights for names right of their points, so that names do not cover each other or other points."""
    taken: list[tuple[float, float, float]] = [(x - 6, x + 6, y) for x, y in places]
    found: dict[int, float] = {}
    for i in sorted(range(len(places)), key=lambda i: places[i][1]):
        x, y = places[i]
        offsets = sorted((k * 4 for k in range(-30, 31)), key=abs)
        fits = (
            y + d
            for d in offsets
            if axes.top <= y + d <= axes.bottom - 4
            and all(
                x + 10 > b or x + widths[i] < a or abs(y + d - h) >= 15 for j, (a, b, h) in enumerate(taken) if j != i
            )
        )
        found[i] = next(fits, y)
        taken.append((x + 10, x + widths[i], found[i]))
    return [found[i] for i in range(len(places))]


def rates(result: Result, number: dict[str, int]) -> str:
    """What each learning rate of the search gave; empty without a search."""
    if not result.search:
        return ""
    metric, tried = result.about["metric"], sorted(result.spec.rates)
    by = {(r.arm, r.lr): r for r in result.search}
    head = "".join(f"<th>{lr:.2g}</th>" for lr in tried)
    body, edge = [], []
    for arm in result.spec.arms:
        found = {lr: by[arm.name, lr] for lr in tried if (arm.name, lr) in by}
        if not found:
            continue
        values = {lr: r.record.metrics[metric] for lr, r in found.items() if r.state == "done"}
        best = (max if result.about["higher"] else min)(values, key=lambda lr: values[lr]) if values else None
        if best in (tried[0], tried[-1]) and len(tried) > 1:
            edge.append(arm.name)
        cells = "".join(
            f"<td>{'<b>' if lr == best else ''}{f'{values[lr]:.4f}' if lr in values else escape(found[lr].state) if lr in found else '–'}{'</b>' if lr == best else ''}</td>"
            for lr in tried
        )
        body.append(
            f'<tr><td><i class="key" style="background:{var(number[arm.name])}"></i>{escape(arm.name)}</td>{cells}</tr>'
        )
    note = f"Every arm tried the same {len(tried)} learning rates on one paired seed that is not judged, and took its best (bold)."
    if edge:
        note += f" For {', '.join(edge)} the best lies at an end of the range: wider --rates may be better."
    return (
        f'<h2>Learning rates</h2><p class="soft">{escape(note)} Shown: validation {escape(metric)}.</p><div class="scroll"><table><thead><tr>'
        f"<th>learning rate</th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )
