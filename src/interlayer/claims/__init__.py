"""One executable experiment for each system."""

from interlayer.claims.expect import Comparison, fits, highest, lowest, ordered
from interlayer.claims.harness import PILOT, Claim, Scale, Statement, check, effect, load, measured, mechanism, run
from interlayer.claims.result import ClaimResult, Judged

__all__ = [
    "PILOT",
    "Claim",
    "ClaimResult",
    "Comparison",
    "Judged",
    "Scale",
    "Statement",
    "check",
    "effect",
    "fits",
    "highest",
    "load",
    "lowest",
    "measured",
    "mechanism",
    "ordered",
    "run",
]
