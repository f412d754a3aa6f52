"""Every claim runs at its smallest scale: all arms and controls measure all that the statements ask for."""

import math
from types import SimpleNamespace

import pytest
import torch

from interlayer import catalog
from interlayer.claims import ClaimResult, load, run

CLAIMS = [s.slug for s in catalog.load().values() if s.claim.exists()]


@pytest.mark.parametrize("slug", CLAIMS)
def test_claim_runs(slug):
    claim = load(slug)
    result = run(claim, scale="smoke")
    assert result.errors == {}
    assert set(result.values) == {*claim.arms, *claim.controls}
    for statement in (*claim.statements, *claim.checks):
        for arm in statement.arms:
            assert not math.isnan(result.values[arm][statement.expect.metric][0]), (arm, statement.says)
    assert ClaimResult.from_json(result.to_json()).verdict == result.verdict


@pytest.mark.parametrize("slug", CLAIMS)
def test_stored_result_is_of_this_claim(slug):
    stored = catalog.get(slug).measured()
    claim = load(slug)
    assert stored is not None and stored["says"] == claim.says
    assert set(stored["values"]) == {*claim.arms, *claim.controls}
    for part, made in ((stored["statements"], claim.statements), (stored["checks"], claim.checks)):
        assert [(s["says"], s["sort"]) for s in part] == [(s.says, s.sort) for s in made]
    assert len(stored["seeds"]) >= 4 and min(stored["seeds"]) == claim.first_seed
    assert stored["errors"] == {}


WITHOUT_MODEL = ("netsquid", "parametric-spans")


@pytest.mark.parametrize("slug", [slug for slug in CLAIMS if slug not in WITHOUT_MODEL])
def test_the_models_of_the_full_scale_can_be_built(slug):
    claim = load(slug)
    subjects = dict.fromkeys(s.expect.arm for s in claim.statements)  # what the other arms change is of the same size
    with torch.device("meta"):
        models = [claim.build(arm, SimpleNamespace(**claim.scales["full"])) for arm in subjects]
    assert all(sum(p.numel() for p in model.parameters()) > 0 and next(model.parameters()).is_meta for model in models)


def test_a_claim_of_two_sorts_has_pilots_and_checks():
    """Claims that state a mechanism are in the whole form: they say what the pilots were, and check their baselines."""
    whole = [c for c in map(load, CLAIMS) if any(s.sort == "mechanism" for s in c.statements)]
    assert len(whole) >= 5 and all(c.pilots and c.checks for c in whole)
