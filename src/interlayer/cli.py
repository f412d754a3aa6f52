"""The command: list, show, compare, claim, apply, probe, run, report."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from interlayer import __version__, catalog

app = typer.Typer(
    name="interlayer",
    help="Published ideas for what happens inside and between the layers of neural networks: compare, apply, check.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Scale(StrEnum):
    """How large a claim is run."""

    smoke = "smoke"
    small = "small"
    full = "full"


@contextmanager
def _short_errors() -> Iterator[None]:
    """Print errors that the user can fix in one line, without a traceback."""
    try:
        yield
    except (LookupError, ValueError, TypeError, ImportError, OSError) as error:
        if isinstance(error, KeyError | IndexError):
            raise
        _stop(str(error))


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"interlayer {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None: ...


@app.command("list")
def list_(
    text: Annotated[str, typer.Argument(help="Show only systems with this text in slug, title or goal.")] = "",
    room: Annotated[str, typer.Option(help="Only this room, for example layers.stream, or a wing: layers.")] = "",
    kind: Annotated[str, typer.Option(help="layer, model, transform, rule or probe.")] = "",
    state: Annotated[str, typer.Option(help="ready, partial or planned.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON array.")] = False,
    taxonomy: Annotated[
        bool, typer.Option("--taxonomy", help="The tree of Transformer variants, with a part for each.")
    ] = False,
) -> None:
    """Show what there is, what is ready first; planned systems have no code yet."""
    if taxonomy:
        _tree(as_json)
        return
    for given, known, what in ((kind, catalog.KINDS, "kind"), (state, catalog.STATES, "state")):
        if given and given not in known:
            _stop(f"list: no {what} {given!r}.{catalog.nearest(given, known)} There are {', '.join(known)}.")
    if room and not any(r == room or r.startswith(room + ".") for r in catalog.rooms()):
        _stop(
            f"list: no room {room!r}.{catalog.nearest(room, catalog.rooms())} There are {', '.join(catalog.rooms())}."
        )
    rows = [
        s
        for s in catalog.load().values()
        if text.lower() in f"{s.slug} {s.title} {s.works}".lower()
        and (not room or s.room == room or s.room.startswith(room + "."))
        and (not kind or s.kind == kind)
        and (not state or s.state == state)
    ]
    rows.sort(key=lambda s: catalog.STATES.index(s.state))
    if as_json:
        keys = ("slug", "title", "room", "kind", "state", "slot", "paper")
        typer.echo(json.dumps([{k: getattr(s, k) for k in keys} for s in rows], ensure_ascii=False, indent=1))
        return
    wide = max((len(s.slug) for s in rows), default=0)
    for s in rows:
        typer.echo(f"{s.state:<8} {s.slug:<{wide}}  {s.kind:<9} {s.room:<19} {s.title}")
    counts = {st: sum(s.state == st for s in rows) for st in catalog.STATES}
    typer.echo(f"{len(rows)} systems: " + ", ".join(f"{n} {st}" for st, n in counts.items()) + ".", err=True)
    if counts["planned"] and not state:
        typer.echo("Planned: no code yet. `interlayer list --state ready` shows what works.", err=True)


def _tree(as_json: bool) -> None:
    """Print the leaves below their branches."""
    leaves = list(catalog.taxonomy().values())
    if as_json:
        keys = ("at", "method", "paper", "use", "state")
        typer.echo(json.dumps([{k: getattr(leaf, k) for k in keys} for leaf in leaves], ensure_ascii=False, indent=1))
        return
    above: tuple[str, ...] = ()
    wide = max(2 * len(leaf.at) + len(leaf.at[-1]) for leaf in leaves)
    for leaf in leaves:
        for depth, branch in enumerate(leaf.at[:-1]):
            if above[: depth + 1] != leaf.at[: depth + 1]:
                typer.echo("  " * depth + branch)
        above = leaf.at
        name = "  " * (len(leaf.at) - 1) + leaf.at[-1]
        use = ", ".join(f"{slot}={what}" for slot, what in leaf.use.items())
        typer.echo(f"{name:<{wide}}{leaf.state:<8} {use}  ({leaf.method}{', ' + leaf.paper if leaf.paper else ''})")
    typer.echo(f"{len(leaves)} leaves: {sum(leaf.state == 'ready' for leaf in leaves)} ready", err=True)


def _slug(ctx: typer.Context, incomplete: str) -> list[str]:
    return [s for s in catalog.load() if s.startswith(incomplete)]


Slug = Annotated[str, typer.Argument(help="A system's slug.", autocompletion=_slug)]
Model = Annotated[str, typer.Option(help="package.module:function, a saved folder, or hf:NAME_OR_PATH.")]
Other = Annotated[list[str] | None, typer.Option(help="A further model, as --model; as often as the system takes one.")]
Page = Annotated[Path | None, typer.Option(help="Folder for the page and the tables as CSV.")]
Options = Annotated[list[str] | None, typer.Option("--option", "-o", help="name=value, as often as needed.")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]


@app.command()
@_short_errors()
def show(slug: Slug) -> None:
    """Show one system: idea, paper, code, options, goal, and what its claim last measured."""
    s = catalog.get(slug)
    typer.echo(f"{s.slug}: {s.title}")
    rows = {
        "state": s.state + (f" (lacks {', '.join(s.missing)})" if s.missing else ""),
        "kind": s.kind,
        "room": s.room,
    }
    if s.idea:
        rows["idea"] = s.idea
    if s.paper:
        rows["paper"] = s.paper
    if s.slot:
        rows["slot"] = s.slot
    if s.task:
        rows["compare"] = f"interlayer compare --task {s.task} --arms plain,{s.slug}"
    if "code" not in s.missing:
        rows["code"] = f"from {s.module} import {s.code}"
        rows["options"] = ", ".join(f"{k}={v}" for k, v in s.options.items()) or "none"
    rows["goal"] = s.works
    for key, value in rows.items():
        typer.echo(f"  {key:<10} {value}")
    if result := s.measured():
        typer.echo(f"  {'claim':<10} {result['says']}")
        note = f". {result['note']}" if result["note"] else ""
        typer.echo(
            f"  {'measured':<10} {result['verdict']} ({result['scale']} scale, {len(result['seeds'])} seeds){note}"
        )
        for statement in result["statements"]:
            typer.echo(f"  {'':<10} {statement['sort']}, {statement['verdict']}: {statement['says']}")
    else:
        typer.echo(f"  {'claim':<10} not measured yet" + (f": interlayer claim {s.slug}" if s.claim.exists() else ""))


@app.command()
@_short_errors()
def compare(
    study: Annotated[Path | None, typer.Option(help="A study as TOML file; options here change it.")] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="A task of the catalogue (digits, stdlib-bytes, ...), package.module:function, file:PATH, hf:NAME."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "--base",
            help="The base: transformer, vit, mlp, convnet, ..., package.module:function, a saved folder, or hf:NAME; "
            "trained:BASE is trained once for each seed and shared by arms that are transforms.",
        ),
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: plain, slugs, slug(option=value), norm=rmsnorm, joined by +; stream=* for all streams."
        ),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="How many seeds for each arm, or 4..12: until the arm is decided.")
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate of all arms, instead of the best of --rates for each.")
    ] = None,
    rates: Annotated[str | None, typer.Option(help="Comma-separated learning rates to try for each arm.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps for each run; 0 judges the base as it is.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Training time for each run, instead of steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples in one training step.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the trained weights of every arm and seed.")] = False,
    workers: Annotated[int | None, typer.Option(help="Runs at a time, each in a process of its own.")] = None,
    storage: Annotated[
        str | None, typer.Option(help="Database URL for the records; defaults to SQLite in the output folder.")
    ] = None,
    export: Annotated[str | None, typer.Option(help="Other forms of the records: parquet, tensorboard.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for records and report.")] = None,
    allow_equal: Annotated[
        bool, typer.Option("--allow-equal", help="Allow arms that equal the baseline (an A/A study).")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume/--fresh", help="Keep the existing records, or start afresh.")
    ] = True,
) -> None:
    """Train several ideas side by side on one task, and report which one helps at what cost.

    Without options: byte-level language modelling of Python's standard library with a nano Transformer and five arms.
    """
    from interlayer.study import StudySpec
    from interlayer.study import compare as run_study

    given = {
        "task": task, "base": model, "arms": arms, "seeds": seeds, "steps": steps, "seconds": seconds,
        "workers": workers, "storage": storage, "out": str(out) if out else None, "lr": lr,
        "rates": rates.split(",") if rates else None, "allow_equal": allow_equal or None,
        "batch_size": batch_size, "device": device, "keep": keep or None, "export": export,
    }  # fmt: skip
    spec = StudySpec.from_values(study, {k: v for k, v in given.items() if v is not None})
    if not run_study(spec, resume=resume).finished:
        raise typer.Exit(1)


@app.command()
def claim(
    slugs: Annotated[
        list[str] | None, typer.Argument(help="Systems. Defaults to all that have a claim.", autocompletion=_slug)
    ] = None,
    scale: Annotated[Scale, typer.Option(help="smoke: seconds; small: minutes; full: a GPU.")] = Scale.small,
    seeds: Annotated[
        int | None, typer.Option(help="How many seeds, instead of 4 to 12, until each statement is decided.")
    ] = None,
    store: Annotated[bool, typer.Option(help="Write the result to the catalogue's results.")] = False,
) -> None:
    """Check a paper's claim by experiment, each statement with a control that must fail."""
    from interlayer.claims import load, run

    with _short_errors():
        chosen = [catalog.get(s) for s in slugs] if slugs else [s for s in catalog.load().values() if s.claim.exists()]
    for system in chosen:
        if not system.claim.exists():
            _stop(f"claim: {system.slug!r} has no claim yet. `interlayer list --state ready` shows those that have.")
    for system in chosen:
        result = run(
            load(system.slug), scale=scale.value, seeds=seeds, progress=_progress if sys.stderr.isatty() else None
        )
        typer.echo(f"{system.slug}: {result}")
        if store:
            result.save(system.result)


def _progress(done: int, arm: str, seed: int) -> None:
    typer.echo(f"\r\033[Krun {done + 1}: {arm}, seed {seed}", nl=False, err=True)


@app.command("apply")
@_short_errors()
def apply_(
    slug: Slug,
    model: Model,
    out: Annotated[Path | None, typer.Option(help="Folder for the new model.")] = None,
    data: Annotated[
        str | None,
        typer.Option(help="package.module:function that gives batches, or a text file for a language model."),
    ] = None,
    other: Other = None,
    base: Annotated[
        str | None,
        typer.Option(help="package.module:function that makes the base of a saved folder, where it is needed."),
    ] = None,
    bake: Annotated[
        bool | None, typer.Option("--bake/--no-bake", help="Plain weights, or masks that further training keeps.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only show what would be done.")] = False,
    option: Options = None,
) -> None:
    """Apply a transform to a trained model and save the result, which apply takes again."""
    system = _of_kind(slug, "transform")
    if not plan and out is None:
        _stop("apply: no output folder. Give --out DIR, or --plan to see what would be done.")
    _check_models("apply", model, other)
    if data and not (_is_function(data) or Path(data).is_file()):
        _stop(f"apply: --data {data!r}; expected package.module:function, or a text file.")
    if base and not _is_function(base):
        _stop(f"apply: --base {base!r}; expected package.module:function.")
    if base and not any(Path(path).is_dir() for path in (model, *(other or []))):
        _stop("apply: --base makes the base of a saved folder, and none was given. Leave it out.")
    pairs = _options(option)
    if bake is not None:
        pairs["bake"] = bake
    from interlayer.core import options, recipe

    make = system.resolve()
    transform = make(**options.checked(make, pairs, f"apply {slug}"))
    the_model, *others = [_model(path, base) for path in (model, *(other or []))]
    batches = _batches(data, the_model, model) if data else None
    planned = transform.plan(the_model, batches, others=tuple(others))
    typer.echo(str(planned))
    if not plan and out is not None:
        recipe.save(planned.apply(), out)
        typer.echo(f"saved to {out}")


@app.command()
@_short_errors()
def probe(
    slug: Slug,
    model: Model,
    data: Annotated[str, typer.Option(help="package.module:function that gives batches.")],
    other: Other = None,
    out: Page = None,
    option: Options = None,
    seed: Seed = 0,
) -> None:
    """Look into a model, or compare several: tables on the terminal, and a page with pictures."""
    make = _of_kind(slug, "probe").resolve()
    _check_models(slug, model, other)
    if not _is_function(data):
        _stop(f"probe: --data {data!r}; expected package.module:function.")
    given = _options(option)
    import torch

    from interlayer.core.kinds import Comparison
    from interlayer.core.options import checked

    look = make(**checked(make, given, f"probe {slug}"))
    if other and not isinstance(look, Comparison):
        _stop(f"probe: {slug!r} looks at one model. Leave out --other.")
    the_model, *others = [_model(path, None) for path in (model, *(other or []))]
    batches, more = _call(data), {"others": tuple(others)} if isinstance(look, Comparison) else {}
    torch.manual_seed(seed)
    _show(look(the_model, batches, **more), out, slug, " and ".join([f"{slug}: {model}", *(other or [])]))


@app.command("run")
@_short_errors()
def run_(
    slug: Slug,
    scenario: Annotated[Path | None, typer.Option(help="A scenario as TOML file; the default one otherwise.")] = None,
    out: Page = None,
    option: Options = None,
    seed: Seed = 0,
) -> None:
    """Run a simulator: what a network, channel or device would do."""
    make = _of_kind(slug, "simulator").resolve()
    given = _options(option)
    from interlayer.core.options import checked

    wanted = _toml(scenario) if scenario else None
    simulator = make(**checked(make, given, f"run {slug}"))
    title = f"{slug}: {scenario.stem if scenario else 'the default scenario'}"
    _show(simulator.run(wanted, seed), out, slug, title)


def _of_kind(slug: str, kind: str) -> catalog.System:
    system = catalog.get(slug)
    if system.kind != kind:
        _stop(f"{slug!r} is of kind {system.kind}, not {kind}. `interlayer list --kind {kind}` shows those.")
    return system


def _check_models(who: str, model: str, other: list[str] | None) -> None:
    for name, path in (("--model", model), *(("--other", path) for path in other or [])):
        if not (path.startswith("hf:") or Path(path).is_dir() or _is_function(path)):
            _stop(f"{who}: {name} {path!r}; expected package.module:function, a saved folder, or hf:NAME_OR_PATH.")


def _toml(path: Path) -> dict[str, Any]:
    import tomllib

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"run: {path} cannot be read as TOML: {error}.") from error


def _show(found: Any, out: Path | None, slug: str, title: str) -> None:
    """Print the tables of a finding, and write them with a page where asked."""
    from rich.console import Console

    from interlayer.core import page

    console = Console()
    for table in page.printed(found).values():
        (console if console.is_terminal else Console(width=180)).print(table)
    if out is not None:
        system = catalog.get(slug)
        typer.echo(f"page: {page.write(found, out, system.title, title)}")


def _is_function(text: str) -> bool:
    """Whether a text has the form ``package.module:function``."""
    module, _, name = text.partition(":")
    return all(part.isidentifier() for part in (*module.split("."), name))


def _options(pairs: list[str] | None) -> dict[str, Any]:
    """Options from ``name=value``: a Python literal, ``package.module:name``, or else the text itself."""
    import ast

    options: dict[str, Any] = {}
    for pair in pairs or []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"apply: option {pair!r} is not name=value.")
        if _is_function(value):
            options[name.replace("-", "_")] = _load(value)
            continue
        try:
            options[name.replace("-", "_")] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name.replace("-", "_")] = value
    return options


def _load(path: str) -> Any:
    from interlayer.study.objects import load_object

    return load_object(path)


def _call(path: str) -> Any:
    return _load(path)()


def _batches(data: str, model: Any, source: str) -> Any:
    """What a function gives, or windows of a text file."""
    if not Path(data).is_file():
        return _call(data)
    from interlayer.core.texts import windows

    return windows(data, model, source)


def _model(path: str, base: str | None) -> Any:
    from interlayer.core import recipe
    from interlayer.core.extras import need

    if path.startswith("hf:"):
        config = Path(path[3:], "config.json")
        kind = json.loads(config.read_text(encoding="utf-8")).get("_class_name") if config.is_file() else None
        if kind:
            return getattr(need("diffusers", "hf", "interlayer apply"), kind).from_pretrained(path[3:])
        hf = need("transformers", "hf", "interlayer apply")
        named = hf.AutoConfig.from_pretrained(path[3:]).architectures
        return getattr(hf, named[0] if named else "AutoModel").from_pretrained(path[3:])
    if Path(path).is_dir():
        try:
            return recipe.load(path, base=_load(base) if base else None)
        except ValueError as error:
            hint = "" if base or "base=" not in str(error) else " On the command line: --base package.module:function."
            raise ValueError(f"{error}{hint}") from error
    model = _call(path)
    if not callable(getattr(model, "named_modules", None)):
        raise TypeError(f"apply: {path} gave {type(model).__name__}; expected a torch.nn.Module.")
    return model


@app.command()
@_short_errors()
def report(
    out: Annotated[Path, typer.Argument(help="Folder of a study.")],
    export: Annotated[str, typer.Option(help="Other forms of the records: parquet, tensorboard.")] = "",
) -> None:
    """Write a study's table, CSV and report.html again from its records."""
    from interlayer.study import report as write

    write(out, export=export)


def _stop(message: str) -> None:
    typer.echo(f"interlayer: {message}", err=True)
    raise typer.Exit(2)


def main() -> None:
    """Entry point of the command."""
    if sys.argv[1:] != ["list"]:
        app()
        return
    try:
        list_()  # without options it needs no parser, whose converter takes longer to load than all the rest
        sys.stdout.flush()
    except BrokenPipeError:  # `interlayer list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
