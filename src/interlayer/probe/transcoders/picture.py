"""The figure of the probe: frontier and circuit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from interlayer.probe.transcoders.circuit import Part


def draw(
    frontier: Mapping[str, list[Any]],
    paths: Sequence[tuple[Part, ...]],
    target: str = "",
    at: tuple[int, int] = (0, 0),
) -> Any:
    """Active features against what is lost, for each kind; and the paths into a feature, by position and depth.

    Args:
        frontier: The probe's table.
        paths: What leads into the feature, a sequence of parts each.
        target: Name of the feature.
        at: Its block and position.
    """
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, 2 if paths else 1, figsize=(11 if paths else 6, 4.2), squeeze=False, layout="constrained"
    )
    lost = "loss" if "loss" in frontier else "unexplained"
    rows = list(zip(frontier["kind"], frontier["active features"], frontier[lost], strict=True))
    left = axes[0][0]
    for kind, mark in (("transcoder", "o-"), ("sae", "s--")):
        points = sorted((x, y) for k, x, y in rows if k == kind)
        left.plot(*zip(*points, strict=True), mark, label={"sae": "SAE"}.get(kind, kind))
    base = next(y for k, _, y in rows if k == "the MLP")
    left.axhline(base, color="grey", lw=1, ls=":", label="the MLP")
    left.set(
        xlabel="active features",
        ylabel="next-token loss [nat]" if lost == "loss" else "unexplained variance",
    )
    left.legend(frameon=False)
    if not paths:
        return figure
    right = axes[0][1]
    rows_of: dict[tuple[int, float], list[str]] = {(at[1], 2 * at[0] + 1.0): [target]}
    for path in paths:
        part = path[-1]
        depth = {"feature": 2 * part.block + 1.0, "head": 2.0 * part.block}.get(part.kind, -1.0)
        row = rows_of.setdefault((part.position, depth), [])
        row += [str(part)] if str(part) not in row else []
    places: dict[str, tuple[float, float]] = {}
    ticks, start = {}, 0.0
    for position in sorted({p for p, _ in rows_of}):
        width = max(len(row) for (p, _), row in rows_of.items() if p == position)
        ticks[position] = start + (width - 1) / 2
        for (p, depth), row in rows_of.items():
            if p == position:
                places |= {name: (ticks[p] + n - (len(row) - 1) / 2, depth) for n, name in enumerate(row)}
        start += width
    strongest = max(abs(path[-1].contribution) for path in paths)
    for path in paths:
        part, before = path[-1], str(path[-2]) if len(path) > 1 else target
        (x0, y0), (x1, y1) = places[str(part)], places[before]
        right.plot([x0, x1], [y0, y1], color="tab:blue", alpha=0.6, lw=0.7 + 3.5 * abs(part.contribution) / strongest)
    for name, (x, y) in places.items():
        right.annotate(
            name.partition("@")[0],
            (x, y),
            ha="center",
            va="center",
            fontsize=8,
            bbox={"boxstyle": "round,pad=0.25", "fc": "white", "ec": "grey"},
        )
    levels = range(2 * at[0] + 2)
    right.set_yticks([-1, *levels], ["embedding", *(f"{('attention', 'MLP')[n % 2]} {n // 2}" for n in levels)])
    right.set(xlabel="position", title=f"paths into {target}")
    right.set_xticks(list(ticks.values()), list(map(str, ticks)))
    right.margins(0.15)
    return figure
