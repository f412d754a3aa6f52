"""One executable experiment for each system."""

from interlayer.claims.harness import (
    Claim,
    ClaimResult,
    Comparison,
    Scale,
    fits,
    highest,
    load,
    lowest,
    measured,
    ordered,
    run,
)

__all__ = [
    "Claim",
    "ClaimResult",
    "Comparison",
    "Scale",
    "fits",
    "highest",
    "load",
    "lowest",
    "measured",
    "ordered",
    "run",
]
