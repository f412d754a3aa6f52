"""What nodes and fibres are made of: parameters in SI units with their sources, and the elementary link that follows from them."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

from interlayer import catalog
from interlayer.domains.quantum.netsquid.noise import Weights, dephasing, product, werner

TIMES = ("t1", "t2", "storage_t1", "storage_t2", "emission", "swap_time", "move_time")
UNITS = dict.fromkeys(TIMES, "s") | {"phase": "rad", "loss": "dB/m", "speed": "m/s"}
SHARES = (
    "efficiency", "bright", "visibility", "dark", "pair_fidelity", "swap_success", "swap_noise", "move_noise", "attempt_dephasing",
)  # fmt: skip
HERALDS = ("direct", "single-click", "double-click")


@dataclass(frozen=True)
class Device:
    """A node's hardware. The defaults are those of an ideal node: certain, instant and noiseless but for the fibre.

    Args:
        t1: Relaxation time of the qubit that talks to the fibre, in s.
        t2: Its coherence time in s.
        storage_t1: Relaxation time of the storage qubit in s.
        storage_t2: Coherence time of the storage qubit in s.
        efficiency: Probability that an excitation would give a click if there were no fibre.
        herald: ``double-click`` (Barrett and Kok), ``single-click`` (Cabrillo), or ``direct``: one photon all the way.
        bright: Share of the bright state in a single-click attempt.
        visibility: Indistinguishability of the photons.
        phase: Standard deviation of the optical phase in a single-click attempt, in rad.
        dark: Probability of a dark count for each detector and attempt.
        pair_fidelity: Fidelity of the source's own pairs, Werner noise on top of the rest.
        emission: Time of preparing and emitting in s.
        modes: Attempts multiplexed into one.
        swap_time: Time of a Bell measurement in s.
        swap_success: Probability that it works.
        swap_noise: Depolarising probability of it.
        interfaces: Optical interfaces of a node: with one, its two links take turns.
        move_time: Time of moving a qubit into storage in s, where there is one interface.
        move_noise: Depolarising probability of it.
        attempt_dephasing: Probability of a Z on the stored qubit for each attempt of the other link.
        loss: Attenuation of the fibre in dB/m.
        speed: Speed of light in the fibre in m/s.
    """

    t1: float = math.inf
    t2: float = math.inf
    storage_t1: float = math.inf
    storage_t2: float = math.inf
    efficiency: float = 1.0
    herald: str = "direct"
    bright: float = 0.1
    visibility: float = 1.0
    phase: float = 0.0
    dark: float = 0.0
    pair_fidelity: float = 1.0
    emission: float = 0.0
    modes: int = 1
    swap_time: float = 0.0
    swap_success: float = 1.0
    swap_noise: float = 0.0
    interfaces: int = 2
    move_time: float = 0.0
    move_noise: float = 0.0
    attempt_dephasing: float = 0.0
    loss: float = 0.2e-3
    speed: float = 2e8

    def __post_init__(self) -> None:
        if self.herald not in HERALDS:
            raise ValueError(f"netsquid: herald {self.herald!r}; expected one of {', '.join(HERALDS)}.")
        for name in ("t1", "t2", "storage_t1", "storage_t2", "speed", "modes"):
            if not _number(getattr(self, name)) or not getattr(self, name) > 0:
                raise ValueError(f"netsquid: {name} is {getattr(self, name)!r}; expected a number above 0.")
        for name in ("phase", "emission", "swap_time", "move_time", "loss"):
            value = getattr(self, name)
            if not _number(value) or not 0 <= value < math.inf:
                raise ValueError(f"netsquid: {name} is {value!r}; expected a finite number of at least 0.")
        for name in SHARES:
            if not _number(getattr(self, name)) or not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"netsquid: {name} is {getattr(self, name)!r}; expected a number from 0 to 1.")
        for t1, t2 in (("t1", "t2"), ("storage_t1", "storage_t2")):
            long, short = getattr(self, t2), getattr(self, t1)
            if long > 2 * short:
                raise ValueError(
                    f"netsquid: {t2} is {long:g} s where {t1} is {short:g} s; expected at most 2 {t1}. Lower {t2}."
                )
        if not self.efficiency or not self.swap_success:
            raise ValueError("netsquid: efficiency or swap_success is 0; nothing would ever be delivered.")
        if self.modes != int(self.modes) or self.interfaces not in (1, 2):
            raise ValueError("netsquid: modes must be a whole number, and interfaces 1 or 2.")
        if self.interfaces == 1 and self.swap_success < 1:
            raise ValueError("netsquid: interfaces = 1 needs swap_success = 1. Use interfaces = 2 for swaps that fail.")

    def table(self) -> dict[str, list[str]]:
        """All parameters, as a finding's table."""
        rows = {f.name: getattr(self, f.name) for f in fields(self)}
        shown = [v if isinstance(v, str) else f"{v:.6g}" for v in rows.values()]
        return {"parameter": list(rows), "value": shown, "unit": [UNITS.get(name, "") for name in rows]}

    def link(self, length: float) -> Link:
        """The elementary link over a fibre of this length in m."""
        return Link.over(self, length)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True)
class Link:
    """Heralded entanglement over one fibre.

    Args:
        success: Probability of an attempt.
        period: Time of an attempt in s: emission, photons to the midpoint, and the herald back.
        weights: Bell weights of the pair that a success leaves.
        delay: Time of a classical message from end to end in s.
        held: How long the left and the right qubit have waited, in s, when the herald comes.
    """

    success: float
    period: float
    weights: Weights
    delay: float
    held: tuple[float, float]

    @classmethod
    @lru_cache(maxsize=256)  # equal fibres share one
    def over(cls, d: Device, length: float) -> Link:
        """Where s is the signal and n the noise clicks, an attempt succeeds with s + n and leaves the signal's state with s/(s + n).

        With arms of half the length, eta = efficiency 10^(-loss length / 20): single-click has s = 2 bright eta and fidelity
        (1 - bright)(1 + sqrt(V) exp(-phase²/2)) / 2; double-click has s = eta² / 2 and fidelity (1 + V) / 2. ``direct`` sends
        one photon over the whole fibre, and its herald back.
        """
        delay = length / d.speed
        arm = d.efficiency * 10 ** (-d.loss * length / 20)
        if d.herald == "direct":
            signal, noise, state = d.efficiency * 10 ** (-d.loss * length / 10), 2 * d.dark, (1.0, 0.0, 0.0, 0.0)
        elif d.herald == "single-click":
            signal, noise = 2 * d.bright * arm, 2 * d.dark
            both = d.bright / 2  # both bright: a product state, X and Y errors alike
            contrast = math.sqrt(d.visibility) * math.exp(-(d.phase**2) / 2)
            state = product((1 - d.bright, both, both, 0.0), dephasing((1 - contrast) / 2).paulis)
        else:
            signal, noise = arm**2 / 2, 4 * d.dark * arm * (1 - arm) + 4 * (d.dark * (1 - arm)) ** 2
            state = dephasing((1 - d.visibility) / 2).paulis
        chance = min(signal + noise, 1.0)
        if chance < 1e-300:
            raise ValueError(f"netsquid: a link of {length:g} m never succeeds. Use a shorter one, or more nodes.")
        clean = signal / (signal + noise)
        w0, w1, w2, w3 = product(state, werner(d.pair_fidelity))
        rest = (1 - clean) / 4
        mixed = (clean * w0 + rest, clean * w1 + rest, clean * w2 + rest, clean * w3 + rest)
        held = (2 * delay, delay) if d.herald == "direct" else (delay, delay)
        success = -math.expm1(d.modes * math.log1p(-chance)) if chance < 1 else 1.0
        return cls(success, d.emission + held[0], mixed, delay, held)


# NV centres: Humphreys et al., doi:10.1038/s41586-018-0200-5 (clicks: the mean of 2.8e-4 and 4.2e-4 at two detectors; visibility,
# phase, 5.5 us an attempt, 20 dark counts/s in 25 ns); electron under decoupling, Abobeih et al., doi:10.1038/s41467-018-04916-z
# (T1 1 h, T2 1.46 s); carbon T2 of 1 s and T1 of 10 h, and 2% depolarising for each electron-carbon gate (two of them in a move,
# two in a swap), as used in doi:10.1038/s42005-021-00647-8; gate of 0.5 ms. Each attempt dephases the carbon: bright/2 (1 -
# exp(-(2 pi 77 kHz 163 ns)²/2)), Kalb et al., arXiv:1802.05996. Fibre after conversion to telecom light: 0.5 dB/km, 30% efficient.
NV = Device(
    t1=3600.0, t2=1.46, storage_t1=36000.0, storage_t2=1.0, efficiency=3.5e-4, herald="single-click", bright=0.1,
    visibility=0.9, phase=math.radians(15), dark=5e-7, emission=5.5e-6, swap_time=1e-3, swap_noise=1 - 0.98**2, interfaces=1,
    move_time=1e-3, move_noise=1 - 0.98**2, attempt_dephasing=1.55e-4, loss=0.5e-3,
)  # fmt: skip
# Atomic ensembles: Sangouard et al., arXiv:0906.2699: two-photon detection, memories and detectors of 0.9, fibre of 0.2 dB/km, linear
# optics, whose Bell measurement works for half of the outcomes, each with both read-outs and clicks. A hundred modes and a
# millisecond are round figures for rare-earth and cold-gas memories, to be replaced by those of the device in question.
ENSEMBLE = Device(
    t1=0.1, t2=1e-2, storage_t1=0.1, storage_t2=1e-2, efficiency=0.81, herald="double-click", visibility=0.95, dark=1e-6,
    pair_fidelity=0.98, emission=1e-6, modes=100, swap_success=0.5 * 0.81**2,
)  # fmt: skip
DEVICES = {"ideal": Device(), "nv": NV, "ensemble": ENSEMBLE}


def device(name: str, changes: dict[str, Any]) -> Device:
    """A device by name, with some parameters changed.

    Raises:
        ValueError: The name or a parameter is unknown, or a value is out of range.
    """
    if name not in DEVICES:
        raise ValueError(
            f"netsquid: no device {name!r}.{catalog.nearest(name, DEVICES)} There are {', '.join(DEVICES)}."
        )
    known = [f.name for f in fields(Device)]
    if unknown := [key for key in changes if key not in known]:
        near = catalog.nearest(unknown[0], known)
        raise ValueError(f"netsquid: no parameter {unknown[0]!r} of a device.{near} There are {', '.join(known)}.")
    return replace(DEVICES[name], **changes)
