"""Every claim runs at its smallest scale: all arms and the control measure all that the expectation asks for."""

import math

import pytest

from interlayer import catalog
from interlayer.claims import ClaimResult, load, run

CLAIMS = [s.slug for s in catalog.load().values() if s.claim.exists()]


@pytest.mark.parametrize("slug", CLAIMS)
def test_claim_runs(slug):
    claim = load(slug)
    result = run(claim, scale="smoke")
    assert result.errors == {}
    assert set(result.values) == {*claim.arms, *claim.controls}
    assert all(not math.isnan(v) for metrics in result.values.values() for vs in metrics.values() for v in vs)
    assert ClaimResult.from_json(result.to_json()).verdict == result.verdict


@pytest.mark.parametrize("slug", CLAIMS)
def test_stored_result_is_of_this_claim_and_its_control_failed(slug):
    stored = catalog.get(slug).measured()
    claim = load(slug)
    assert stored is not None
    assert stored["says"] == claim.says
    assert set(stored["values"]) == {*claim.arms, *claim.controls}
    assert len(stored["seeds"]) >= 3
    assert stored["control_failed"]
    assert stored["errors"] == {}
