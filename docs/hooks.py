"""Pages that the catalogue writes: the catalogue itself and one page for each room that has code."""

from __future__ import annotations

from mkdocs.structure.files import File

from interlayer import catalog
from interlayer.claims.result import mean

PRIMITIVES = (
    "stream",
    "slots",
    "mixer",
    "position",
    "order",
    "trunk",
    "taps",
    "values",
    "select",
    "swap",
    "wiring",
    "wiring.shrink",
    "transport",
    "paths",
    "renormalise",
    "weights",
    "attach",
    "options",
    "delivery",
    "fields",
    "aside",
    "schedule",
    "scan",
    "recurrent",
    "solve",
    "reversible",
    "allocate",
    "search",
    "routing",
    "spike",
    "skipping.skip",
    "skipping.decoder",
    "skipping.kept",
    "tune",
    "pairing",
    "equal",
    "recipe",
    "record",
    "cost",
    "traced",
    "nano",
    "kinds",
    "events",
    "process",
    "process.whole",
    "conditioning",
    "faults.cells",
    "faults.memory",
    "faults.sram",
    "quantizer.grid",
    "quantizer.observe",
    "quantizer.packing",
    "quantizer.layers",
    "quantizer.nearest",
    "attack",
    "channel",
    "degraded",
    "datasets",
    "speech",
    "experiences",
    "online",
    "rl",
    "task",
    "fit",
    "chart",
    "page",
)
VERDICTS = {"holds": "What held", "contrary": "What came out the other way", "undecided": "What stayed undecided",
            "shows nothing": "What a broken twin did as well"}  # fmt: skip
PARTS = ("sparse", "nodes", "linear", "compressed", "prior", "positions", "depth", "parts")


def _row(s: catalog.System) -> str:
    name = f"[`{s.slug}`](rooms/{s.room}.md#{s.module}.{s.code})" if s.state != "planned" else f"`{s.slug}`"
    measured = s.measured()
    verdict = f"{measured['verdict']} ({measured['scale']}, {len(measured['seeds'])} seeds)" if measured else ""
    return f"| {name} | {s.title} | {s.kind} | {s.state} | {verdict} |"


def _catalogue() -> str:
    lines = [
        "# Catalogue",
        "",
        "Every system with its state and what its claim last measured. The search above finds titles too.",
        "",
    ]
    for room, holds in catalog.rooms().items():
        lines += [
            f"## {room}",
            "",
            f"{holds.capitalize()}.",
            "",
            "| system | paper | kind | state | claim |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [_row(s) for s in catalog.load().values() if s.room == room] + [""]
    return "\n".join(lines)


def _room(room: str) -> str:
    lines = [f"# {room}", "", f"{catalog.rooms()[room].capitalize()}.", ""]
    for s in catalog.load().values():
        if s.room != room or s.state == "planned":
            continue
        lines += [f"::: {s.module}.{name}\n" for name in (s.code, s.network) if name]
        if result := s.measured():
            lines += [
                f"**Claim.** {result['says']}",
                "",
                f"**Measured:** {result['verdict']}, {result['scale']} scale, {len(result['seeds'])} seeds. {result['note']}",
                "",
                "| statement | sort | verdict | gain against, with interval |",
                "| --- | --- | --- | --- |",
                *map(_statement, result["statements"] + result["checks"]),
                "",
                *([f"Pilots: {result['pilots']}", ""] if result["pilots"] else []),
            ]
            metrics = list(dict.fromkeys(m for arm in result["values"].values() for m in arm))
            lines += ["| arm | " + " | ".join(metrics) + " |", "| --- |" + " --- |" * len(metrics)]
            for arm, found in result["values"].items():
                means = [_mean(found[m]) if m in found else "" for m in metrics]
                lines.append(
                    f"| {arm}{' (control)' if arm in result['controls'] else ''} | " + " | ".join(means) + " |"
                )
            lines.append("")
    return "\n".join(lines)


def _statement(judged: dict) -> str:
    return f"| {judged['says']} | {judged['sort']} | {judged['verdict']} | {_gains(judged)} |"


def _gains(judged: dict) -> str:
    gains = []
    for c in judged["comparisons"]:
        ends = "" if c["low"] == "nan" else f" [{float(c['low']):.3g}, {float(c['high']):.3g}]"
        gains.append(f"{c['than']}: {float(c['gain']):.3g}{ends}, {c['n']} seeds")
    return "; ".join(gains)


def _link(s: catalog.System) -> str:
    return f"[`{s.slug}`](rooms/{s.room}.md#{s.module}.{s.code})"


def _helped() -> str:
    """Every effect that a claim measured, by verdict, and how many there are."""
    measured = [(s, s.measured()) for s in catalog.load().values() if s.state == "ready"]
    effects = [(s, e) for s, found in measured if found for e in found["statements"] if e["sort"] == "effect"]
    lines = [f"{len(effects)} effects of {len({s.slug for s, _ in effects})} systems have been measured.", ""]
    for verdict, heading in VERDICTS.items():
        rows = [(s, e) for s, e in effects if e["verdict"] == verdict]
        lines += [
            f"## {heading} ({len(rows)})",
            "",
            "| system | effect | gain over what was asked |",
            "| --- | --- | --- |",
        ]
        lines += [f"| {_link(s)} | {e['says']} | {_gains(e)} |" for s, e in rows] + [""]
    return "\n".join(lines)


def _mean(values: list[float | str]) -> str:
    return f"{mean([float(v) for v in values]):.4g}"


def _taxonomy() -> str:
    lines = [
        "# Transformer variants",
        "",
        "The tree of Lin et al., *A Survey of Transformers* ([arXiv:2106.04554](https://arxiv.org/abs/2106.04554)): a working part",
        "for each leaf. `interlayer list --taxonomy` prints it. Every part can be named in a slot of any backbone, and",
        '`XFormer(leaf="...")` is the vanilla Transformer (sinusoids, post-norm, ReLU) with the parts of one leaf.',
        "",
        "| leaf | part | stands for | state |",
        "| --- | --- | --- | --- |",
    ]
    for leaf in catalog.taxonomy().values():
        use = ", ".join(f"`{slot}={what}`" for slot, what in leaf.use.items())
        kind, _, number = leaf.paper.partition(":")
        host = {"arXiv": "https://arxiv.org/abs/", "doi": "https://doi.org/"}.get(kind, "")
        paper = f" ([{leaf.paper}]({host}{number}))" if leaf.paper else ""
        lines.append(f"| {' / '.join(leaf.at)} | {use} | {leaf.method}{paper} | {leaf.state} |")
    parts = "\n\n".join(f"::: interlayer.layers.mixing.x_formers.{part}" for part in PARTS)
    return "\n".join([*lines, "", parts])


def _core() -> str:
    return "# core\n\nThe primitives. Nothing here knows a paper.\n\n" + "\n\n".join(
        f"::: interlayer.core.{p}" for p in PRIMITIVES
    )


def on_files(files, config):
    """Add the pages that follow from the catalogue."""
    rooms = [r for r in catalog.rooms() if any(s.room == r and s.state != "planned" for s in catalog.load().values())]
    pages = {
        "catalogue.md": _catalogue(),
        "taxonomy.md": _taxonomy(),
        "rooms/core.md": _core(),
        **{f"rooms/{r}.md": _room(r) for r in rooms},
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    config["nav"].append({"Rooms": [{r: f"rooms/{r}.md"} for r in ("core", *rooms)]})
    return files


def on_page_markdown(markdown, page, config, files):
    """Put the tables of effects behind the text of their page."""
    return markdown + "\n" + _helped() if page.file.src_uri == "what-helped.md" else markdown
