"""The harness of the claims: verdicts, controls, failures and the stored result."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest

from interlayer import claims
from interlayer.claims import Claim, ClaimResult, fits, highest, lowest, ordered, run

SCALES = {"smoke": {"n": 1}, "small": {"n": 2}, "full": {"n": 3}}
NOISE = (0.0, 0.3, -0.2, 0.1, 0.25)


def claim(levels, expect=None, **options):
    """Arms with a level each; the seeds add a shared shift and an arm's own small noise."""

    def measure(arm, seed, scale):
        assert isinstance(scale, SimpleNamespace)
        level = levels[arm]
        level = level(seed) if callable(level) else level
        return {"loss": level + 5 * seed + 0.1 * NOISE[(seed + len(arm)) % 5]}

    arms = [a for a in levels if a != "broken"]
    return Claim(
        "ours is lowest",
        measure,
        arms=arms,
        expect=expect or lowest("loss", "ours"),
        control="broken",
        scales=SCALES,
        **options,
    )


def test_clear_win_holds_although_the_seeds_differ_more_than_the_arms():
    result = run(claim({"plain": 2.0, "ours": 1.0, "broken": 2.0}))
    (row,) = result.comparisons
    assert result.verdict == "holds" and result.control_failed
    assert row.low <= row.gain <= row.high and row.gain == pytest.approx(1.0, abs=0.1)
    assert result.seeds == [0, 1, 2] and result.values["ours"]["loss"][2] == pytest.approx(11.0, abs=0.1)


def test_the_subject_must_beat_every_arm():
    result = run(claim({"plain": 2.0, "better": 0.5, "ours": 1.0, "broken": 3.0}))
    assert result.verdict == "partly"  # met against one, not the other
    assert [c.met for c in result.comparisons] == [True, False]
    assert run(claim({"better": 0.5, "ours": 1.0, "broken": 3.0})).verdict == "not at this scale"


def test_right_direction_without_interval_is_partly():
    noisy = claim({"plain": lambda seed: 1.0 + (2.0, -1.0, 1.0)[seed], "ours": 1.0, "broken": 9.0})
    assert run(noisy).verdict == "partly"


def test_one_seed_never_holds():
    result = run(claim({"plain": 2.0, "ours": 1.0, "broken": 2.0}), scale="smoke")
    assert result.seeds == [0] and result.verdict == "partly" and "One seed" in result.note


def test_control_that_does_not_fail_voids():
    result = run(claim({"plain": 2.0, "ours": 1.0, "broken": 0.0}))
    assert result.verdict == "void" and not result.control_failed and "tells nothing: loss (broken)" in result.note
    assert all(c.arm == "broken" and c.than == "plain" for c in result.control_comparisons)


def test_control_that_raises_voids():
    def boom(seed):
        raise RuntimeError("no")

    result = run(claim({"plain": 2.0, "ours": 1.0, "broken": boom}))
    assert result.verdict == "void" and "raised" in result.note


def test_an_arm_that_raises_is_recorded_and_not_met():
    def boom(seed):
        if seed == 1:
            raise RuntimeError("out of luck")
        return 2.0

    result = run(claim({"plain": 2.0, "other": boom, "ours": 1.0, "broken": 2.0}))
    assert result.verdict == "partly" and "out of luck" in result.errors["other"]["1"]
    assert {c.than: c.met for c in result.comparisons} == {"plain": True, "other": False}
    assert math.isnan(result.values["other"]["loss"][1]) and len(result.values["other"]["loss"]) == 3
    assert run(claim({"plain": 2.0, "ours": boom, "broken": 2.0})).verdict == "not at this scale"


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_divergence_counts_as_worst_on_either_side(bad):
    def sometimes(seed):
        return bad if seed == 0 else 2.0

    assert run(claim({"plain": lambda seed: bad, "ours": 1.0, "broken": 2.0, "x": 2.0})).verdict == "holds"
    assert run(claim({"plain": sometimes, "ours": 1.0, "broken": 2.0, "x": 2.0})).verdict == "holds"
    assert run(claim({"plain": 2.0, "ours": sometimes, "broken": 2.0})).verdict == "not at this scale"
    assert (
        run(claim({"plain": lambda seed: bad, "ours": lambda seed: bad, "broken": 2.0, "x": 2.0})).comparisons[0].met
        is False
    )


def test_margin_fits_highest_ordered_and_several_expectations():
    levels = {"plain": 2.0, "ours": 1.0, "broken": 2.5}
    assert run(claim(levels, lowest("loss", "ours", margin=2.0))).verdict == "not at this scale"
    assert run(claim(levels, lowest("loss", "plain", margin=-1.3))).verdict == "holds"  # no worse by 1.3
    assert run(claim(levels, highest("loss", "plain", than=("ours",)))).verdict == "void"  # broken is higher still
    assert run(claim(levels, ordered("loss", "ours", "plain"))).verdict == "void"
    assert run(claim(levels | {"broken": 0.0}, ordered("loss", "ours", "plain"))).verdict == "holds"
    both = (lowest("loss", "ours"), highest("loss", "ours"))
    assert run(claim(levels, both)).verdict == "partly"


def test_a_fitted_quantity_must_lie_in_its_range():
    def measure(arm, seed, scale):
        return {"exponent": {"ours": 0.5, "broken": 0.0}[arm] + 0.01 * NOISE[seed]}

    made = [
        Claim(
            "it grows",
            measure,
            arms=("ours",),
            expect=fits("exponent", "ours", low, high),
            control="broken",
            scales=SCALES,
        )
        for low, high in ((0.4, 0.6), (0.4, math.inf), (0.6, 0.7))
    ]
    assert [run(c).verdict for c in made] == ["holds", "holds", "not at this scale"]  # below 0.7 is the control too


def test_result_survives_strict_json(tmp_path):
    result = run(claim({"plain": lambda seed: math.inf, "ours": 1.0, "broken": 2.0}))
    result.save(tmp_path / "deep" / "some-slug.json")
    text = (tmp_path / "deep" / "some-slug.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    again = ClaimResult.from_json(text)
    assert again.to_json() == text and again.verdict == result.verdict
    assert again.values["plain"]["loss"] == [math.inf] * 3 and again.versions["torch"]
    assert "ours" in str(again) and "control broken" in str(again)


def test_progress_and_seeds_and_global_generator():
    import torch

    seen = []
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    result = run(claim({"plain": 2.0, "ours": 1.0, "broken": 2.0}), seeds=[4, 1], progress=lambda *a: seen.append(a))
    assert torch.equal(before, torch.random.get_rng_state())
    assert result.seeds == [4, 1] and seen[0] == (0, 6, "plain", 4) and seen[-1] == (5, 6, "broken", 1)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="wanted smoke, small and full"):
        Claim("x", lambda *a: {}, arms=("a",), expect=lowest("l", "a"), control="c", scales={"small": {}})
    with pytest.raises(ValueError, match="one of the arms"):
        Claim("x", lambda *a: {}, arms=("a",), expect=lowest("l", "a"), control="a", scales=SCALES)
    with pytest.raises(ValueError, match="'z'"):
        Claim("x", lambda *a: {}, arms=("a",), expect=lowest("l", "z"), control="c", scales=SCALES)
    with pytest.raises(ValueError, match="no scale 'huge'"):
        run(claim({"plain": 2.0, "ours": 1.0, "broken": 2.0}), scale="huge")
    with pytest.raises(LookupError, match="no system"):
        claims.load("rmsnrm")


def test_a_comparison_that_the_control_meets_too_does_not_make_a_claim_hold_partly():
    level = {"best": 2.0, "easy": 9.0, "hard": 1.0, "twin": 3.0}
    claim = Claim(
        says="best is lowest",
        measure=lambda arm, seed, scale: {"x": level[arm] + 0.01 * seed},
        arms=("best", "easy", "hard"),
        expect=lowest("x", "best"),
        control="twin",
        scales=SCALES,
    )
    result = run(claim)
    assert [c.met for c in result.comparisons] == [True, False]
    assert result.control_failed
    assert result.verdict == "not at this scale"
    assert "met, but by the control too" in str(result)


def test_each_expectation_has_its_own_control():
    level = {"ours": 1.0, "plain": 2.0, "broken": 3.0, "blind": 0.5}
    claim = Claim(
        says="ours is lowest, and between 0 and 2",
        measure=lambda arm, seed, scale: {"x": level[arm] + 0.01 * seed},
        arms=("ours", "plain"),
        expect=(lowest("x", "ours"), fits("x", "ours", 0.0, 2.0)),
        control=("broken", "blind"),
        scales=SCALES,
    )
    result = run(claim)
    assert result.controls == ["broken", "blind"] and list(result.values) == ["ours", "plain", "broken", "blind"]
    assert all(c.met for c in result.comparisons)
    assert result.verdict == "partly"  # the second control is within the bounds too
    assert result.control_failed and "tells nothing: x (blind)" in result.note
    held = run(replace(claim, control="broken"))
    assert held.verdict == "holds" and held.controls == ["broken"]
    with pytest.raises(ValueError, match="1 controls for 2 expectations"):
        replace(claim, control=("broken",))
