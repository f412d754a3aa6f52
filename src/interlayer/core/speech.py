"""Synthesised speech: eSpeak NG, whose library and voices the ``audio`` extra brings, called through ctypes.

eSpeak NG is under the GNU General Public Licence 3; nothing of it is part of Interlayer.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from interlayer.core import nano
from interlayer.core.extras import need

RATE = 16_000  # samples a second of what ``say`` returns
WORDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
VOICES = {"train": ("m1", "m2", "m3", "m4", "f1", "f2", "f3", "f4"), "held": ("m5", "m6", "f5")}
SPEEDS, PITCHES = (140, 175, 210), (35, 65)
# From eSpeak NG's speak_lib.h.
_SYNCHRONOUS, _DONT_EXIT, _UTF8, _SPEED, _PITCH = 2, 0x8000, 1, 1, 3
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class _Engine:
    """The library, initialised once in a process; it keeps its voice and settings in global variables."""

    def __init__(self, loader: ModuleType) -> None:
        self.library = ctypes.CDLL(loader.get_library_path())
        self.heard: list[np.ndarray[tuple[int], np.dtype[np.int16]]] = []
        self.rate = self.library.espeak_Initialize(_SYNCHRONOUS, 0, loader.get_data_path().encode(), _DONT_EXIT)
        if self.rate <= 0:
            raise OSError(
                f"speech.say: eSpeak NG found no voices in {loader.get_data_path()}. Install espeakng-loader again."
            )
        self.library.espeak_ng_SetRandSeed(ctypes.c_long(0))  # the noise of unvoiced sounds
        self.callback = _CALLBACK(self._hear)  # kept: the library calls it as long as it lives
        self.library.espeak_SetSynthCallback(self.callback)

    def _hear(self, wave: ctypes._Pointer[ctypes.c_short], count: int, events: int | None) -> int:
        if wave and count > 0:
            self.heard.append(np.ctypeslib.as_array(wave, (count,)).copy())
        return 0


_engine = cache(_Engine)


def say(text: str, *, voice: str = "en-us", speed: int = 175, pitch: int = 50) -> Float[Tensor, " N"]:
    """The sound of a text, in mono at 16 kHz, from -1 to 1.

    The noise in it and the flutter of the pitch go on from one call to the next, so only a process that says the same texts
    in the same order gets the same numbers.

    Args:
        text: What is said.
        voice: A voice of eSpeak NG, such as ``en-us``, or with a variant ``en-us+f3`` (``m1`` to ``m7``, ``f1`` to ``f4``).
        speed: Words a minute, 80 to 450.
        pitch: 0 to 99.

    Raises:
        ImportError: The ``audio`` extra is not installed.
        ValueError: There is no such voice, or speed or pitch is out of range.
    """
    loader = need("espeakng_loader", "audio", "speech.say")
    if not (80 <= speed <= 450 and 0 <= pitch <= 99):
        raise ValueError(f"speech.say: speed {speed}, pitch {pitch}; expected 80 to 450 words a minute and 0 to 99.")
    from scipy.signal import resample_poly

    engine = _engine(loader)
    library = engine.library
    variant = voice.partition("+")[2]
    known = not variant or Path(loader.get_data_path(), "voices", "!v", variant).is_file()
    if not known or library.espeak_SetVoiceByName(voice.encode()):
        raise ValueError(
            f"speech.say: there is no voice {voice!r}; expected one of eSpeak NG, such as 'en-us' or 'en-us+f3'."
        )
    library.espeak_SetParameter(_SPEED, speed, 0)
    library.espeak_SetParameter(_PITCH, pitch, 0)
    engine.heard.clear()
    given = text.encode()
    library.espeak_Synth(given, ctypes.c_size_t(len(given) + 1), 0, 0, 0, _UTF8, None, None)
    library.espeak_Synchronize()
    wave = np.concatenate([np.zeros(0, np.int16), *engine.heard]).astype(np.float64) / 2**15
    common = np.gcd(RATE, engine.rate)
    return torch.from_numpy(resample_poly(wave, RATE // common, engine.rate // common).astype(np.float32).clip(-1, 1))


def words(split: str) -> Iterator[Float[Tensor, " N"]]:
    """Every word in every voice of a split, at three speeds and two pitches, cut or filled with silence to one second."""
    for word, voice, speed, pitch in product(WORDS, VOICES[split], SPEEDS, PITCHES):
        wave = say(word, voice=f"en-us+{voice}", speed=speed, pitch=pitch)[:RATE]
        yield torch.nn.functional.pad(wave, (0, RATE - len(wave)))


if __name__ == "__main__":  # a process of its own, so that the numbers are the same each time
    nano.keep(Path(sys.argv[1]), {split: torch.stack(list(words(split))) for split in VOICES})
