import ast
import configparser
import dataclasses
import subprocess
import sys

import pytest

from interlayer import audit, catalog


def test_all_systems_are_there():
    systems = catalog.load()
    assert len(systems) == 212
    assert all(
        s.slug and s.title and s.room in catalog.rooms() and s.kind in catalog.KINDS and s.works
        for s in systems.values()
    )


def test_state_follows_from_what_exists(tmp_path, monkeypatch):
    planned = catalog.System("no-such", "t", "probe", "probe", "w")
    assert planned.state == "planned"
    assert planned.missing[:2] == ["paper", "code"]
    rezero = catalog.get("rezero")
    assert rezero.state in ("partial", "ready")
    monkeypatch.setattr(catalog, "CHECKOUT", tmp_path)
    (tmp_path / "tests").mkdir()
    elsewhere = dataclasses.replace(rezero)
    assert elsewhere.state == "partial"
    assert "test" in elsewhere.missing


def test_idea_and_options_are_read_from_the_source():
    dense = catalog.get("denseformer")
    assert dense.idea.startswith("Each block is followed by a depth-weighted average")
    assert dense.options["dilation"] == "1"
    assert dense.resolve().__name__ == "DenseFormer"
    for system in catalog.load().values():
        doc = (ast.get_docstring(system._class) if system._class else None) or ""
        assert system.idea == " ".join(doc.split("\n\n")[0].split()) and bool(system.idea) == bool(system.code)


def test_unknown_and_planned_systems_are_told():
    with pytest.raises(LookupError, match="Did you mean 'rezero'"):
        catalog.get("rezeor")
    with pytest.raises(LookupError, match="planned"):
        next(s for s in catalog.load().values() if s.state == "planned").resolve()


def test_reading_the_catalogue_needs_no_torch():
    code = (
        "import sys, interlayer\nfrom interlayer import catalog, cli\n"
        "[s.state for s in catalog.load().values()]; catalog.get('rezero').options\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_catalogue_files_and_readme_agree():
    assert audit.faults() == []


def test_the_layers_of_the_house_name_every_room_that_has_code():
    rules = configparser.ConfigParser()
    rules.read(catalog.CHECKOUT / ".importlinter")
    house = rules["importlinter:contract:house"]["layers"]
    apart = rules["importlinter:contract:rooms"]["modules"].split()
    for room in {s.room for s in catalog.load().values() if s.code}:
        top = room.partition(".")[0]
        assert f"interlayer.{top}" in house.replace("|", " ").split(), room
        assert f"interlayer.{room}" in apart or f"interlayer.{room.rpartition('.')[0]}.*" in apart, room


def test_a_clause_needs_what_shows_it():
    rezero = catalog.get("rezero")
    first, *others = audit.clauses(rezero.works)

    def faults(*names):
        return audit._unshown(rezero, {first: list(names), **{other: ["contract: shapes"] for other in others}})

    there = ["test: test_there_is_no_norm", "claim: the Jacobian of 32 layers", "measured: steps at 128"]
    assert faults(*there, "measured: Transformer loss of rezero", "contract: shapes", "benchmark: sweeps") == []
    assert faults() == [f"rezero: nothing shows {first!r}"]
    assert len(audit._unshown(rezero, {})) == len(others) + 1
    for wrong in (
        "test: test_there_is_no_nrom",
        "claim: the Jacobian of 33 layers",
        "claim: ",
        "measured: Transformer loss",  # not of every arm
        "contract: shape",
        "benchmark: lamp",  # which does not name ReZero
        "test_there_is_no_norm",
    ):
        assert faults(*there, wrong) == [f"rezero: {first!r} names {wrong!r}, which is not there"]
    stranger = {**dict.fromkeys((first, *others), there), "It is fast": there}
    assert audit._unshown(rezero, stranger) == ["rezero: works.toml has 'It is fast', which its row has not"]


def test_a_table_of_no_system_is_a_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(audit, "WORKS", tmp_path / "works.toml")
    monkeypatch.setattr(
        catalog, "load", lambda: {"no-such": catalog.System("no-such", "t", "probe", "probe", "It works.")}
    )
    audit.WORKS.write_text("[rezeor]\n", encoding="utf-8")
    assert audit.unshown() == ["works.toml: no system 'rezeor'"]


def test_every_clause_of_the_ready_systems_is_shown():
    assert audit.unshown() == []
