"""Charts of a study: learning curves, differences to the baseline, quality against cost, and the table of learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from interlayer.core.chart import CARD, SOFT, Chart, colour, shorten, variable
from interlayer.study.result import COSTS, ArmRow, Result

Curves = dict[str, dict[float, dict[int, float]]]  # metric by arm, step (or seconds) and seed
SCALES = {"step_time": 1e3, "peak_memory": 1e-6, "disk": 1e-6, "latency_1": 1e3, "latency_64": 1e3}
UNITS = {"step_time": "ms", "peak_memory": "MB", "disk": "MB", "latency_1": "ms", "latency_64": "ms"}


def numbers(result: Result) -> dict[str, int]:
    """Colour number of each arm: -1 for the baseline."""
    others = [a.name for a in result.spec.arms if a.name != result.spec.baseline]
    return {result.spec.baseline: -1, **{name: i for i, name in enumerate(others)}}


def key(number: int, name: str) -> str:
    """A name with its colour."""
    return f'<i class="key" style="background:{variable(number)}"></i>{escape(name)}'


def _figure(title: str, caption: str, drawing: str, one: bool = False) -> str:
    kind = ' class="one"' if one else ""
    return f"<figure{kind}><h3>{escape(title)}</h3><figcaption>{escape(caption)}</figcaption>{drawing}</figure>"


def _number(value: float, sign: bool = False) -> str:
    return f"{round(value, 5):{'+' if sign and value else ''}.10g}".replace("-", "−")


def _unit(result: Result) -> str:
    return f" ({result.about['unit']})" if result.about["metric"] == "loss" else ""


def _curves(result: Result) -> Curves:
    """The points that all the arm's finished seeds have."""
    metric, seconds = result.about["metric"], result.spec.seconds
    found: Curves = {}
    for arm in result.spec.arms:
        runs = [r for r in result.of(arm.name) if r.state == "done"]
        by_step: dict[float, dict[int, float]] = {}
        for run in runs:
            for i, point in enumerate(run.record.curve):
                at = point["step"] if seconds is None else (i + 1) / len(run.record.curve) * seconds
                by_step.setdefault(at, {})[run.seed] = point[metric]
        whole = {s: v for s, v in sorted(by_step.items()) if len(v) == len(runs)}
        if len(whole) > 1:
            found[arm.name] = whole
    return found


def _draw(curves: Curves, number: dict[str, int], x: str, y: str, unit: str, apart: bool = False) -> str:
    chart, ends = Chart(x, y), {}
    # The first evaluations can dwarf the rest of a difference: its axis follows the later part.
    last = max(s for c in curves.values() for s in c)
    later = [x for c in curves.values() for s, v in c.items() if not apart or s >= last * 0.35 for x in v.values()]
    low, high = min([*later, 0.0] if apart else later), max([*later, 0.0] if apart else later)
    pad = (high - low) * 0.07 or abs(high) * 0.07 or 1.0
    for name, curve in curves.items():
        kept = {s: v for s, v in curve.items() if all(low - pad <= x <= high + pad for x in v.values())}
        if kept:
            tips = [
                f"{name}, step {s:.0f}: {_number(sum(v.values()) / len(v), apart)}{unit}"
                f" (seeds {', '.join(_number(x, apart) for x in v.values())})"
                for s, v in kept.items()
            ]
            end = chart.band(list(kept), [list(v.values()) for v in kept.values()], number[name], tips)
            ends[name] = (end, number[name])
    if apart:
        chart.axes.axhline(0, color=SOFT, linewidth=0.9, linestyle=(0, (3, 3)))
    chart.axes.set(xlim=(0, last), ylim=(low - pad, high + pad))
    chart.names(ends)
    return chart.svg(y)


def learning(result: Result, number: dict[str, int]) -> str:
    """Learning curves, and their paired difference to the baseline."""
    about, curves, base = result.about, _curves(result), result.spec.baseline
    if not curves:
        return ""
    time = "training steps" if result.spec.seconds is None else "seconds of training"
    caption = "Mean of the seeds; the band reaches from the lowest to the highest."
    unit = _unit(result)
    out = _figure("How they learn", caption, _draw(curves, number, time, f"validation {about['metric']}{unit}", unit))
    first = curves.get(base, {})
    apart: Curves = {}
    for name, curve in curves.items():
        points = {
            s: {k: x - first[s][k] for k, x in v.items() if k in first[s]} for s, v in curve.items() if s in first
        }
        if name != base and any(points.values()):
            apart[name] = {s: v for s, v in points.items() if v}
    if not apart:
        return f'<div class="one">{out}</div>'
    caption = (
        f"Paired by seed. {'Above' if about['higher'] else 'Below'} zero is better than {base}. Early points off the scale are "
        "left out."
    )
    drawing = _draw(apart, number, time, f"difference to {shorten(base)}{unit}", unit, apart=True)
    return f'<div class="pair">{out}{_figure(f"The same, against {base}", caption, drawing)}</div>'


def forest(result: Result, found: Sequence[ArmRow], number: dict[str, int]) -> str:
    """Final paired difference of each arm: each seed a dot, the mean a diamond, the interval a line."""
    metric, base, higher = result.about["metric"], result.values(result.spec.baseline), result.about["higher"]
    dots = {r.arm: {s: v - base[s] for s, v in result.values(r.arm, metric).items() if s in base} for r in found}
    shown = [(r.arm, r.difference, dots[r.arm]) for r in found if r.difference is not None and dots[r.arm]]
    if not shown:
        return ""
    every = [x for *_, values in shown for x in values.values()]
    ends = [e for _, d, _ in shown if not math.isnan(d.half) for e in (d.low, d.high)]
    reach = max(map(abs, every)) or 1e-3
    low, high = max(min([*every, *ends, 0.0]), -2.2 * reach), min(max([*every, *ends, 0.0]), 2.2 * reach)
    low, high = (low, high) if high - low > 1e-9 else (-reach, reach)
    pad = 0.06 * (high - low)
    words = ("← worse", "better →") if higher else ("← better", "worse →")
    chart = Chart(
        f"validation {metric} minus {shorten(result.spec.baseline)}'s{_unit(result)}",
        size=(9.4, 0.95 + 0.36 * len(shown)),
    )
    axes = chart.axes
    axes.grid(visible=False, axis="y")
    axes.axvline(0, color=SOFT, linewidth=0.9, linestyle=(0, (3, 3)))
    for row, (name, apart, values) in enumerate(shown):
        paint = colour(number[name])
        with chart.tip(f"{name}: {apart.text(sign=True)}"):
            if not math.isnan(apart.half):
                for at, marker in ((apart.low, "|"), (apart.high, "|")):
                    inside = low - pad <= at <= high + pad
                    edge = min(max(at, low - pad), high + pad)
                    axes.plot(
                        [edge],
                        [row],
                        marker if inside else ("<" if at < 0 else ">"),
                        color=paint,
                        markersize=7,
                        clip_on=False,
                    )
                axes.plot(
                    [max(apart.low, low - pad), min(apart.high, high + pad)], [row, row], color=paint, linewidth=2
                )
            axes.plot([apart.mean], [row], "D", color=paint, markersize=6.5)
        for seed, value in values.items():
            with chart.tip(f"{name}, seed {seed}: {_number(value, True)}"):
                axes.plot(
                    [value], [row], "o", markeredgecolor=paint, markerfacecolor=CARD, markersize=4.6, clip_on=True
                )
        axes.annotate(
            apart.text(sign=True), (1.02, row), xycoords=("axes fraction", "data"), va="center", color=SOFT, fontsize=9.5,
            annotation_clip=False,
        )  # fmt: skip
    axes.set(xlim=(low - pad, high + pad), ylim=(len(shown) - 0.4, -0.6))
    axes.set_yticks(range(len(shown)), [shorten(name) for name, *_ in shown], fontsize=9.5, weight="bold")
    for tick, (name, *_) in zip(axes.get_yticklabels(), shown, strict=True):
        tick.set_color(colour(number[name]))
    for text, side, shift in ((words[0], "right", -8), (words[1], "left", 8)):
        axes.annotate(
            text, (0, 1), xycoords=("data", "axes fraction"), xytext=(shift, 3), textcoords="offset points", ha=side,
            va="bottom", color=SOFT, fontsize=9.5,
        )  # fmt: skip
    caption = "Filled: mean. Open: each seed."
    if result.spec.looks[-1] > 1:
        caption += " Line: the interval; an arrow means that it goes on beyond the edge."
    return _figure(
        f"Difference to {result.spec.baseline} at the end", caption, chart.svg("paired differences"), one=True
    )


def costs(result: Result, found: Sequence[ArmRow], number: dict[str, int]) -> str:
    """Quality against each cost that was measured."""
    metric = result.about["metric"]
    out = []
    for cost, (title, _) in COSTS.items():
        arms = [r for r in found if metric in r.metrics and cost in r.cost]
        if len(arms) < 2:
            continue
        chart = Chart(f"{title} ({UNITS[cost]})", f"validation {metric}{_unit(result)}")
        points = []
        for row in arms:
            x, values = row.cost[cost] * SCALES[cost], list(result.values(row.arm).values())
            paint, mean = colour(number[row.arm]), row.metrics[metric].mean
            chart.axes.plot([x, x], [min(values), max(values)], color=paint, alpha=0.5, linewidth=1.8)
            with chart.tip(f"{row.arm}: {metric} {row.metrics[metric].text()}, {title} {x:.3g} {UNITS[cost]}"):
                chart.axes.plot([x], [mean], "o", color=paint, markersize=7)
            points.append((x, mean, row.arm))
        chart.axes.margins(0.12)
        _name(chart, points, number)
        caption = f"Best is {'upper' if result.about['higher'] else 'lower'} left. Bars reach over the seeds."
        out.append(_figure(f"Quality against {title}", caption, chart.svg(f"quality against {title}")))
    return f'<h2>Quality against cost</h2><div class="pair">{"".join(out)}</div>' if out else ""


def _name(chart: Chart, points: Sequence[tuple[float, float, str]], number: dict[str, int]) -> None:
    """Write each name right of its point, higher or lower where it would cover another name."""
    chart.axes.set(xlim=chart.axes.get_xlim(), ylim=chart.axes.get_ylim())  # text must not move them
    dots = {name: chart.axes.transData.transform((x, y)) for x, y, name in points}
    taken = [(left - 5, left + 5, height) for left, height in dots.values()]
    for x, y, name in sorted(points, key=lambda p: p[1]):
        left, height = dots[name] + (8, 0)
        right = left + 7.5 * len(shorten(name))
        shifts = sorted((4 * k for k in range(-20, 21)), key=abs)
        free = (d for d in shifts if all(right < a or left > b or abs(height + d - h) >= 14 for a, b, h in taken))
        shift = next(free, 0)
        taken.append((left, right, height + shift))
        chart.axes.annotate(
            shorten(name), (x, y), (8, shift * 72 / chart.figure.dpi), textcoords="offset points", va="center",
            color=colour(number[name]), fontsize=9.5, weight="bold", annotation_clip=False,
        )  # fmt: skip


def rates(result: Result, number: dict[str, int]) -> str:
    """What each learning rate of the search gave; empty without a search."""
    metric, tried = result.about["metric"], sorted(result.spec.rates)
    by = {(r.arm, r.lr): r for r in result.search}
    arms = list(dict.fromkeys(r.arm for r in result.search))
    if not arms:
        return ""
    body, edge = [], []
    for arm in arms:
        found = {lr: by[arm, lr] for lr in tried if (arm, lr) in by}
        values = {lr: r.record.metrics[metric] for lr, r in found.items() if r.state == "done"}
        best = (max if result.about["higher"] else min)(values, key=lambda lr: values[lr]) if values else None
        if best in (tried[0], tried[-1]) and len(tried) > 1:
            edge.append(arm)
        texts = {lr: f"{values[lr]:.4f}" if lr in values else found[lr].state if lr in found else "–" for lr in tried}
        cells = "".join(f"<td>{f'<b>{escape(t)}</b>' if lr == best else escape(t)}</td>" for lr, t in texts.items())
        body.append(f"<tr><td>{key(number.get(arm, -1), arm)}</td>{cells}</tr>")
    note = f"Every arm tried the same {len(tried)} learning rates on one paired seed that is not judged, and took its best (bold)."
    if edge:
        note += f" For {', '.join(edge)} the best lies at an end of the range: wider --rates may be better."
    head = "".join(f"<th>{lr:.2g}</th>" for lr in tried)
    return (
        f'<h2>Learning rates</h2><p class="soft">{escape(note)} Shown: validation {escape(metric)}.</p><div class="scroll"><table><thead><tr>'
        f"<th>learning rate</th>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )
