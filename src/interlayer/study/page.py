"""The report as one self-contained page: charts drawn as inline SVG, nothing fetched from anywhere."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape
from typing import Any

from interlayer.study.charts import colours, costs, forest, learning, rates, var, variables
from interlayer.study.result import ArmRow, Result, headline

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
svg text{fill:var(--soft)}svg text.name{font-weight:600}
.grid{stroke:var(--line);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}.zero{stroke:var(--soft);stroke-width:1;stroke-dasharray:3 3}
.curve{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}.band{opacity:.14}.seed{opacity:.5}
.hit{fill:transparent;stroke:none}.hit:hover{fill:currentColor;fill-opacity:.25}
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
@media print{body{background:#fff}main{padding:0}figure,.scroll{break-inside:avoid}}
"""


def _table(result: Result, found: Sequence[ArmRow], lines: Sequence[dict[str, str]], number: dict[str, int]) -> str:
    metric = result.about["metric"]
    judged = [r for r in found if metric in r.metrics]
    best = (
        (max if result.about["higher"] else min)(judged, key=lambda r: r.metrics[metric].mean).arm if judged else None
    )
    head = "".join(f"<th>{escape(h)}</th>" for h in lines[0])
    body = []
    for row, line in zip(found, lines, strict=True):
        name = f'<i class="key" style="background:{var(number[row.arm])}"></i>{escape(row.arm)}'
        if row.state and row.metrics:
            name += f' <span class="bad">({escape(row.state)})</span>'
        first = ' class="bad"' if row.state and not row.metrics else ""
        cells = "".join(f"<td{'' if i else first}>{escape(v)}</td>" for i, v in enumerate(list(line.values())[1:]))
        body.append(f'<tr class="{"best" if row.arm == best else ""}"><td>{name}</td>{cells}</tr>')
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _failures(result: Result) -> str:
    bad = [r for r in result.runs if r.state in ("failed", "diverged")]
    if not bad:
        return ""
    shown: dict[tuple[str, str, str], list[Any]] = {}
    for r in bad:
        shown.setdefault((r.arm, r.state, r.error), []).append(r)
    parts = [
        f'<details><summary><b>{escape(arm)}</b>, seed {", ".join(str(r.seed) for r in runs)}: <span class="bad">{state}</span>. {escape(error.splitlines()[0] if error else "")}</summary>'
        f"<pre>{escape(runs[0].traceback or error)}</pre></details>"
        for (arm, state, error), runs in shown.items()
    ]
    return f"<h2>What failed</h2>{''.join(parts)}"


def _shares(result: Result) -> str:
    """How much of each arm's initial noise is the baseline's."""
    others = {arm: share for arm, share in result.shared.items() if arm != result.spec.baseline}
    if not others:
        return "nothing to pair"
    parts = ", ".join(f"{arm} {share:.0%}" for arm, share in others.items())
    return f"share of the random initial numbers that are {result.spec.baseline}'s: {parts}"


def _what(result: Result) -> str:
    spec, about = result.spec, result.about
    places = list({r.where["cpu"] + r.where["torch"]: r.where for r in result.runs if r.where}.values())
    budget = (
        f"{spec.budget['steps']:,} steps of {spec.batch_size}"
        if "steps" in spec.budget
        else f"{spec.seconds:g} s of training steps"
    )
    warm = f"{spec.warmup:.0%} warm-up, then {spec.schedule}"
    items = {
        "Task": f"{about['name']}: {about['about']}",
        "Base": result.base,
        "Training": f"{budget}; AdamW, learning rate {f'{spec.lr:g}' if spec.lr else 'searched for each arm'}, {warm}, weight decay {spec.weight_decay:g}, gradients clipped at {spec.clip:g}",
        "Seeds": f"0 to {spec.looks[-1] - 1}"
        + (f", looked at after {', '.join(map(str, spec.looks))}" if spec.until_decided else ""),
        "Paired": _shares(result),
        "Workers": f"{spec.workers}, with {spec.threads} thread{'s' if spec.threads > 1 else ''} each",
    }
    for i, w in enumerate(places):
        text = f"{w['cpu']}; GPU {w['gpu']}; {w['system']}; Python {w['python']}, PyTorch {w['torch']}, Optuna {w['optuna']}, Interlayer {w['interlayer']}"
        items["Machine" + (f" {i + 1}" if len(places) > 1 else "")] = text
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in items.items())
    toml = spec.model_copy(update={"storage": None}).to_toml()
    again = (
        f"interlayer compare --study {shlex.quote(str(result.out / 'study.toml'))}"
        if spec.from_text
        else "interlayer.compare(...) again, with the same objects"
    )
    measured = (
        "Costs are counted, not estimated. FLOPs: one forward pass by PyTorch's counter, a multiply-add is two. Step time: median of the "
        "run's training steps without evaluation, while the other workers were busy too. Peak memory: most bytes of tensors alive at once in "
        "one training step, weights and optimiser state with them, by the allocator's own events."
    )
    return (
        f'<h2>What was run, and where</h2><dl>{rows}</dl><p class="soft" style="margin-top:16px">{measured}</p>'
        f'<div class="box"><pre>{escape(again)}</pre></div><details open><summary>The study as a file</summary><pre>{escape(toml)}</pre></details>'
    )


def page(result: Result, found: Sequence[ArmRow], lines: Sequence[dict[str, str]], note: str) -> str:
    """The whole page.

    Args:
        result: The study's outcome.
        found: The table's lines as numbers.
        lines: The table's lines as text.
        note: What the intervals are.
    """
    number = colours(result)
    title, sure = headline(result, found)
    about = result.about
    kind = f"{about['name']} · {result.base} · {len(result.spec.arms)} arms · {result.spec.seeds} seeds"
    body = (
        f'<header><p class="kind">{escape(kind)}</p><h1>{escape(title)}</h1><p>{escape(sure)}</p></header>'
        f'{_table(result, found, lines, number)}<p class="soft" style="margin-top:10px">{escape(note)}</p>'
        f"{_failures(result)}<h2>Quality</h2>{forest(result, found, number)}{learning(result, number)}"
        f"{costs(result, found, number)}{rates(result, number)}{_what(result)}"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(about['name'])}: {escape(', '.join(a.name for a in result.spec.arms))}</title><style>{STYLE}{variables()}</style></head><body><main>{body}</main></body></html>\n"
    )
