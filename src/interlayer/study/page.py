"""The report as one self-contained page; nothing is fetched from anywhere."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape
from typing import Any

from interlayer.core.chart import variables
from interlayer.core.page import document, header
from interlayer.study.charts import costs, forest, key, learning, numbers, rates
from interlayer.study.result import ArmRow, Result, headline


def _table(result: Result, found: Sequence[ArmRow], lines: Sequence[dict[str, str]], number: dict[str, int]) -> str:
    metric = result.about["metric"]
    judged = [r for r in found if metric in r.metrics]
    best = (
        (max if result.about["higher"] else min)(judged, key=lambda r: r.metrics[metric].mean).arm if judged else None
    )
    head = "".join(f"<th>{escape(h)}</th>" for h in lines[0])
    body = []
    for row, line in zip(found, lines, strict=True):
        name = key(number[row.arm], row.arm)
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
        "Training": "none; the base is judged as it is"
        if spec.steps == 0
        else f"{budget}; AdamW, learning rate {f'{spec.lr:g}' if spec.lr else 'searched for each arm'}, {warm}, weight decay {spec.weight_decay:g}, gradients clipped at {spec.clip:g}",
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
        "one training step, weights and optimiser state with them, by the allocator's own events. On disk: the files that "
        "interlayer.save writes. Forward of 1 and of 64: median time of a forward pass over that many samples."
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
    number = numbers(result)
    title, sure = headline(result, found)
    about = result.about
    kind = f"{about['name']} · {result.base} · {len(result.spec.arms)} arms · {result.spec.seeds} seeds"
    body = (
        f"{header(kind, title, sure)}"
        f'{_table(result, found, lines, number)}<p class="soft" style="margin-top:10px">{escape(note)}</p>'
        f"{_failures(result)}<h2>Quality</h2>{forest(result, found, number)}{learning(result, number)}"
        f"{costs(result, found, number)}{rates(result, number)}{_what(result)}"
    )
    title = f"{about['name']}: {', '.join(a.name for a in result.spec.arms)}"
    return document(title, body, variables())
