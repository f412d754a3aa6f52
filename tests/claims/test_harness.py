"""The harness of the claims: verdicts of statements, controls, mutants, checks, early stops and the stored result."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch

from interlayer import claims
from interlayer.claims import Claim, ClaimResult, check, effect, fits, highest, lowest, mechanism, ordered, run
from interlayer.claims.expect import compare
from interlayer.claims.result import mean
from interlayer.study.stats import critical

SCALES = {"smoke": {"n": 1}, "small": {"n": 2}, "full": {"n": 3}}
NOISE = (0.0, 0.3, -0.2, 0.1, 0.25)
BEATS_PLAIN = effect("ours beats plain", lowest("loss", "ours", than=("plain",)), control="broken")


def claim(levels, *statements, checks=()):
    """Arms with a level each; the seeds add a shared shift and an arm's own small noise."""

    def measure(arm, seed, scale):
        assert isinstance(scale, SimpleNamespace)
        level = levels[arm]
        level = level(seed) if callable(level) else level
        return {"loss": level + 5 * seed + 0.1 * NOISE[(seed + len(arm)) % 5]}

    statements = statements or (BEATS_PLAIN,)
    twins = {name for s in statements for name in s.twins}
    arms = [a for a in levels if a not in twins]
    return Claim("ours is lowest", measure, arms=arms, statements=statements, scales=SCALES, checks=checks)


def verdicts(made, **options):
    return [s.verdict for s in run(made, **options).statements]


def test_a_clear_win_holds_after_four_seeds_although_the_seeds_differ_more_than_the_arms():
    result = run(claim({"plain": 2.0, "ours": 1.0, "broken": 2.0}))
    (judged,) = result.statements
    (row,) = judged.comparisons
    assert result.verdict == judged.verdict == "holds" and result.seeds == [0, 1, 2, 3]
    assert row.low <= row.gain <= row.high and row.gain == pytest.approx(1.0, abs=0.1) and row.n == 4
    assert not judged.twins["broken"][0].met


def test_a_loss_is_contrary_and_chance_is_undecided_after_twelve_seeds():
    assert verdicts(claim({"plain": 1.0, "ours": 2.0, "broken": 2.0})) == ["contrary"]
    result = run(claim({"plain": lambda seed: 1.0 + (2.0, -2.0)[seed % 2], "ours": 1.0, "broken": 9.0}))
    assert result.statements[0].verdict == "undecided" and len(result.seeds) == 12
    assert result.verdict == "not at this scale"


def test_the_subject_must_beat_every_arm_of_its_statement():
    both = effect("", lowest("loss", "ours", than=("plain", "better")), control="broken")
    result = run(claim({"plain": 2.0, "better": 0.5, "ours": 1.0, "broken": 3.0}, both))
    assert result.statements[0].verdict == "contrary"
    assert [c.met for c in result.statements[0].comparisons] == [True, False]
    assert result.statements[0].says == "loss of ours lower than of plain, better"


def test_a_statement_that_its_control_or_mutant_meets_shows_nothing():
    level = {"plain": 2.0, "ours": 1.0, "broken": 0.5, "mutated": 3.0}
    assert verdicts(claim(level)) == ["shows nothing"]
    made = mechanism("", lowest("loss", "ours", than=("plain",)), control="broken", mutant="mutated")
    assert verdicts(claim(level | {"broken": 3.0}, made)) == ["holds"]
    assert verdicts(claim(level | {"broken": 3.0, "mutated": 0.5}, made)) == ["shows nothing"]
    assert verdicts(claim(level, made)) == ["shows nothing"]


def test_a_claim_holds_partly_if_some_statements_do():
    worse = effect("ours is higher", highest("loss", "ours", than=("plain",)), control="broken")
    result = run(claim({"plain": 2.0, "ours": 1.0, "broken": 2.0}, BEATS_PLAIN, worse))
    assert [s.verdict for s in result.statements] == ["holds", "contrary"] and result.verdict == "partly"


def test_only_arms_of_undecided_statements_run_on():
    close = effect("", lowest("loss", "ours", than=("twin",)), control="broken")
    levels = {"plain": 2.0, "twin": lambda seed: 1.0 + 0.5 * (-1) ** seed, "ours": 1.0, "broken": 3.0}
    result = run(claim(levels, BEATS_PLAIN, close))
    counts = {arm: len(found["loss"]) for arm, found in result.values.items()}
    assert counts == {"plain": 4, "twin": 12, "ours": 12, "broken": 12}
    assert result.statements[0].comparisons[0].n == 4 and result.statements[1].comparisons[0].n == 12


def test_a_check_that_does_not_hold_voids_the_claim():
    weak = check("plain is competent", fits("loss", "plain", high=-10.0))
    result = run(claim({"plain": 2.0, "ours": 1.0, "broken": 2.0}, checks=(weak,)))
    assert result.verdict == "void" and "plain is competent" in result.note
    assert result.checks[0].verdict == "contrary" and result.statements[0].verdict == "holds"
    fair = check("plain is competent", fits("loss", "plain", low=0.0))
    assert run(claim({"plain": 2.0, "ours": 1.0, "broken": 2.0}, checks=(fair,))).verdict == "holds"


def test_an_arm_that_raises_is_recorded_and_decides_nothing():
    def boom(seed):
        raise RuntimeError("out of luck")

    for who in ("plain", "ours"):
        result = run(claim({"plain": 2.0, "ours": 1.0, "broken": 2.0} | {who: boom}))
        assert result.statements[0].verdict == "undecided" and "out of luck" in result.errors[who]["1"]
        assert f"Raised: {who}" in result.note


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_divergence_counts_as_worst_on_either_side(bad):
    def sometimes(seed):
        return bad if seed == 0 else 2.0

    assert verdicts(claim({"plain": lambda seed: bad, "ours": 1.0, "broken": lambda seed: bad})) == ["holds"]
    assert verdicts(claim({"plain": sometimes, "ours": 1.0, "broken": 2.0})) == ["holds"]
    assert verdicts(claim({"plain": 2.0, "ours": sometimes, "broken": 2.0})) == ["undecided"]
    assert verdicts(claim({"plain": lambda seed: bad, "ours": lambda seed: bad, "broken": 2.0})) == ["undecided"]


def test_intervals_of_looks_are_those_of_the_table_and_fixed_seeds_those_of_student():
    gains = [0.5, 1.0, 0.2, 0.9]
    seen, fixed = compare("x", "a", "b", gains, claims.harness.LOOKS), compare("x", "a", "b", gains)
    assert (seen.high - seen.low) / (fixed.high - fixed.low) == pytest.approx(critical((4, 6, 8, 12))[0] / 3.1824, 1e-3)
    assert not seen.met and fixed.met
    assert compare("x", "a", "b", [0.3] * 4, claims.harness.LOOKS).met  # nothing varies
    assert not compare("x", "a", "b", [0.3] * 3, claims.harness.LOOKS).met  # too few


def test_margins_ranges_and_orders():
    level = {"plain": 2.0, "ours": 1.0, "broken": 9.5}

    def one(expect, **more):
        return verdicts(claim(level | more, effect("", expect, control="broken")), seeds=5)[0]

    assert one(lowest("loss", "ours", than=("plain",), margin=2.0)) == "contrary"
    assert one(lowest("loss", "plain", than=("ours",), margin=-1.5)) == "holds"  # no worse by 1.5
    assert one(highest("loss", "plain", than=("ours",)), broken=0.0) == "holds"
    assert one(ordered("loss", "ours", "plain"), broken=0.0) == "holds"
    assert one(ordered("loss", "plain", "ours"), broken=0.0) == "contrary"
    assert one(fits("loss", "ours", -5.0, 30.0), broken=50.0) == "holds"
    assert one(fits("loss", "ours", 50.0)) == "contrary"


def test_one_seed_decides_nothing():
    result = run(claim({"plain": 2.0, "ours": 1.0, "broken": 2.0}), scale="smoke")
    assert result.seeds == [0] and result.verdict == "not at this scale" and "One seed" in result.note


def test_result_survives_strict_json(tmp_path):
    result = run(claim({"plain": lambda seed: math.inf, "ours": 1.0, "broken": 2.0}, BEATS_PLAIN))
    result.save(tmp_path / "deep" / "some-slug.json")
    text = (tmp_path / "deep" / "some-slug.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    again = ClaimResult.from_json(text)
    assert again.to_json() == text and again.verdict == result.verdict
    assert again.values["plain"]["loss"][0] == math.inf and again.versions["torch"]
    assert "effect, shows nothing: ours beats plain" in str(again) and "broken: meets it too" in str(again)


def test_a_mean_leaves_out_values_that_were_not_measured():
    assert mean([1.0, math.nan, 3.0]) == 2.0
    assert math.isnan(mean([math.nan])) and math.isnan(mean([]))


def test_progress_and_seeds_and_global_generator():
    seen = []
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    result = run(claim({"plain": 2.0, "ours": 1.0, "broken": 2.0}), seeds=[4, 1], progress=lambda *a: seen.append(a))
    assert torch.equal(before, torch.random.get_rng_state())
    assert result.seeds == [4, 1] and seen[0] == (0, "plain", 4) and seen[-1] == (5, "broken", 1)
    later = dataclasses.replace(claim({"plain": 2.0, "ours": 1.0, "broken": 2.0}), first_seed=100)
    assert run(later).seeds == [100, 101, 102, 103] and run(later, seeds=2).seeds == [100, 101]
    assert run(later, "smoke").seeds == [100]


def test_mistakes_are_named():
    made = effect("x is low", lowest("l", "a", than=("b",)), control="c")
    with pytest.raises(ValueError, match="expected smoke, small and full"):
        Claim("x", lambda *a: {}, arms=("a", "b"), statements=(made,), scales={"small": {}})
    with pytest.raises(ValueError, match="one of the arms"):
        Claim("x", lambda *a: {}, arms=("a", "b", "c"), statements=(made,), scales=SCALES)
    with pytest.raises(ValueError, match="'x is low' names 'b'"):
        Claim("x", lambda *a: {}, arms=("a",), statements=(made,), scales=SCALES)
    with pytest.raises(ValueError, match="no scale 'huge'"):
        run(claim({"plain": 2.0, "ours": 1.0, "broken": 2.0}), scale="huge")
    with pytest.raises(ValueError, match="no seed"):
        run(claim({"plain": 2.0, "ours": 1.0, "broken": 2.0}), seeds=[])
    with pytest.raises(LookupError, match="no system"):
        claims.load("rmsnrm")
