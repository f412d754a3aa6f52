"""Self-contained pages: style, tables and figures in one file, readable on a phone; nothing is fetched from anywhere."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from interlayer.core.kinds import Finding

STYLE = """
:root{color-scheme:light dark;--page:#fbfbf9;--card:#fff;--ink:#1c1e21;--soft:#5d636b;--line:#e3e3de;--faint:#f1f1ec;--bad:#a8321a}
@media(prefers-color-scheme:dark){:root{--page:#16181b;--card:#1d2024;--ink:#e8e8e4;--soft:#a0a6ae;--line:#343940;--faint:#25292e;--bad:#ff9678}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 "Source Sans 3","Segoe UI",system-ui,-apple-system,"Helvetica Neue",sans-serif;
 text-rendering:optimizeLegibility;-webkit-font-smoothing:antialiased}
main{max-width:1120px;margin:0 auto;padding:56px 28px 80px}
header p.kind{margin:0;color:var(--soft);font-size:14px;letter-spacing:.02em}
h1{font-size:31px;line-height:1.22;font-weight:650;letter-spacing:-.012em;margin:6px 0 12px;max-width:26em;text-wrap:balance}
h2{font-size:20px;font-weight:650;letter-spacing:-.005em;margin:52px 0 4px}
h3{font-size:15px;font-weight:600;margin:0 0 2px}
p{max-width:46em;margin:0 0 12px}p.soft{max-width:62em}p.soft,figcaption{color:var(--soft);font-size:14.5px}
figcaption{margin:0 0 10px;max-width:62em}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:18px 20px 10px;min-width:0}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:20px;margin-top:16px}
.one{margin-top:16px}
@media(max-width:820px){.pair{grid-template-columns:1fr}}
svg{display:block;width:100%;height:auto;overflow:visible;font:13px "Source Sans 3","Segoe UI",system-ui,-apple-system,"Helvetica Neue",sans-serif;
 font-variant-numeric:tabular-nums}
svg text{font-family:inherit!important}
figure{overflow-x:auto}figure.one>svg{min-width:600px}
.scroll{overflow-x:auto;margin-top:16px;border:1px solid var(--line);border-radius:8px;background:var(--card)}
table{border-collapse:collapse;width:100%;font-size:14.5px;font-variant-numeric:tabular-nums}
th,td{padding:9px 10px;text-align:right;white-space:nowrap;border-top:1px solid var(--line)}
thead th{border-top:0;color:var(--soft);font-weight:600;font-size:13px;vertical-align:bottom;white-space:normal;min-width:5.5em}
th:first-child,td:first-child{text-align:left;font-weight:600}
tr.best td{background:var(--faint)}
i.key{display:inline-block;width:11px;height:11px;border-radius:50%;margin-right:9px;vertical-align:-1px}
details{margin-top:12px;border:1px solid var(--line);border-radius:8px;background:var(--card)}
summary{cursor:pointer;padding:11px 16px;font-size:15px}summary b{font-weight:600}
.bad{color:var(--bad)}
pre{margin:0;padding:14px 16px;overflow-x:auto;font:13px/1.5 ui-monospace,"SF Mono","Cascadia Mono",Menlo,Consolas,monospace}
details pre{border-top:1px solid var(--line)}
.box{margin-top:14px;border:1px solid var(--line);border-radius:8px;background:var(--card)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:5px 22px;font-size:14.5px;margin:14px 0 0}dt{color:var(--soft)}dd{margin:0}
figure.plot{background:#fff}figure.plot svg text{fill:#33373d}
@media print{body{background:#fff}main{padding:0}figure,.scroll{break-inside:avoid}}
"""


def document(title: str, body: str, style: str = "") -> str:
    """A whole page.

    Args:
        title: Of the window.
        body: The page's content as HTML.
        style: Style sheets beside the common one.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head><body><main>{body}</main></body></html>\n"
    )


def header(kind: str, title: str, lead: str = "") -> str:
    """What the page is about: a small line, the headline, and a sentence below it."""
    return f'<header><p class="kind">{escape(kind)}</p><h1>{escape(title)}</h1><p>{escape(lead)}</p></header>'


def table(headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table that scrolls sideways where it is too wide.

    Examples:
        >>> "<td>0.5</td>" in table(["arm", "loss"], [["plain", 0.5]])
        True
    """
    head = "".join(f"<th>{escape(h)}</th>" for h in headings)
    body = "".join(f"<tr>{''.join(f'<td>{escape(text(v))}</td>' for v in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def text(value: Any) -> str:
    """A value as people read it: five digits of a number.

    >>> text(0.123456789), text(3), text("plain")
    ('0.12346', '3', 'plain')
    """
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def figure(drawn: Any) -> str:
    """A matplotlib figure as part of a page."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "interlayer", "svg.fonttype": "none"}):
        drawn.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return f'<figure class="one plot">{buffer.getvalue().partition("<svg")[1]}{buffer.getvalue().partition("<svg")[2]}</figure>'


def rows(found: Finding, name: str) -> list[list[Any]]:
    """The rows of a table of a finding."""
    return [list(row) for row in zip(*found.tables[name].values(), strict=True)]


def write(found: Finding, out: Path, kind: str, title: str, lead: str = "", most: int = 200) -> Path:
    """Write a finding to a folder: a CSV file for each table, and ``report.html``.

    Args:
        found: What a probe saw or a simulator measured.
        out: The folder.
        kind: The small line above the title.
        title: Headline of the page.
        lead: A sentence below it.
        most: Rows of a table that the page shows; the CSV file has all.

    Returns:
        The page.
    """
    out.mkdir(parents=True, exist_ok=True)
    parts = [header(kind, title, lead)]
    if found.figure is not None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        drawn = found.figure()
        parts.append(figure(drawn))
        pyplot.close(drawn)
    for name in found.tables:
        lines = rows(found, name)
        with (out / f"{_file(name)}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([found.headings(name), *lines])
        more = (
            f'<p class="soft">The first {most} of {len(lines)} rows; all are in {escape(_file(name))}.csv.</p>'
            if len(lines) > most
            else ""
        )
        parts.append(f"<h2>{escape(name)}</h2>{table(found.headings(name), lines[:most])}{more}")
    path = out / "report.html"
    path.write_text(document(title, "".join(parts)), encoding="utf-8")
    return path


def _file(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())


def printed(found: Finding, most: int = 30) -> Mapping[str, Any]:
    """Each table of a finding for the terminal, by name."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    tables = {}
    for name in found.tables:
        shown = Table(title=Text(name), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for heading in found.headings(name):
            shown.add_column(Text(heading), justify="left" if not shown.columns else "right")
        lines = rows(found, name)
        for line in lines[:most]:
            shown.add_row(*(Text(text(value)) for value in line))
        if len(lines) > most:
            shown.title = Text(f"{name}, the first {most} of {len(lines)} rows")
        tables[name] = shown
    return tables
