"""What the numbers in a file of clips are, and what they mean as brightness.

Letters: N clips, T frames.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from engine.command_line import UserError

PIECE = 2**26                              # bytes that are looked at together
SAMPLE = 2**30                             # bytes: of larger uint8 files a sample is looked at
NARROW = 0.1                               # of the range: less contrast is warned of
EXPECTED = "expected finite floats in [0, 1], [-1, 1] or [0, 255], or uint8"


def pieces(clips: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Slices of clips and of frames that cut clips [N, T, ...] into pieces of about PIECE."""
    count, length = clips.shape[:2]
    clip_bytes = clips[0].size * clips.itemsize
    if clip_bytes <= PIECE:
        step = PIECE // clip_bytes
        for first in range(0, count, step):
            yield slice(first, first + step), slice(None)
        return
    step = max(1, length * PIECE // clip_bytes)
    for clip in range(count):
        for first in range(0, length, step):
            yield slice(clip, clip + 1), slice(first, first + step)


class Scale(NamedTuple):
    """gain * stored + offset is in [-1, 1]; stored values lie in bottom..top."""
    bottom: float
    top: float

    @property
    def gain(self) -> float:
        return 2 / (self.top - self.bottom)

    @property
    def offset(self) -> float:
        return -1 - self.gain * self.bottom


class Values:
    """The least and the greatest value of all that was noted, all of one dtype."""

    def __init__(self):
        self.dtype = None
        self.low = np.inf
        self.high = -np.inf
        self.distinct = set()              # the different values, as long as they are two
        self.sampled = False

    def note_array(self, clips: np.ndarray) -> None:
        """Note clips [N, T, H, W, C]; of a very large array of bytes, whose scale no value can
        change, evenly spaced pieces. UserError for what cannot be brightness."""
        dtype = clips.dtype
        if dtype.kind not in "buif":
            raise UserError(f"values are {dtype}; {EXPECTED}: convert them, e.g. by "
                            "array.real or array.astype(np.float32)")
        if self.dtype not in (None, dtype):
            raise UserError(f"values are {dtype}, and {self.dtype} in the files before it; "
                            "expected one dtype in a folder")
        self.dtype = dtype
        parts = list(pieces(clips))
        if clips.size > SAMPLE and dtype == np.uint8:
            step = -(-clips.size // SAMPLE)                # rounded up
            parts = parts[::step]
            self.sampled = True
        for which, when in parts:
            part = clips[which, when]
            self.note(part)
            if not np.isfinite([self.low, self.high]).all():
                raise UserError(not_finite(part, which.start, when.start or 0))
        self.scale()

    def note(self, part: np.ndarray) -> None:
        """Note any values of the dtype."""
        self.dtype = part.dtype
        low = part.min()
        high = part.max()
        self.low = float(np.minimum(self.low, low))        # Python's min would lose a NaN
        self.high = float(np.maximum(self.high, high))
        if len(self.distinct) <= 2:
            self.distinct |= {float(low), float(high)}
            between = (part != low) & (part != high)
            if between.any():
                self.distinct.add(float(part[between][0]))

    def scale(self) -> Scale:
        """What the values mean; UserError, without the file's name, if that is not known."""
        kind = self.dtype.kind
        if kind == "b":
            return Scale(0, 1)
        if kind in "ui":
            return self.scale_of_integers()
        for bottom, top in ((0, 1), (-1, 1), (0, 255)):
            if bottom - 1e-3 <= self.low and self.high <= top + 1e-3:
                return Scale(bottom, top)
        raise UserError(f"values from {self.low:g} to {self.high:g}; {EXPECTED}: scale them "
                        f"first, e.g. by {self.conversion()}")

    def scale_of_integers(self) -> Scale:
        """Small ones are bytes in a wider type."""
        if 0 <= self.low and self.high <= 255:
            return Scale(0, 255)
        if (self.dtype.kind, self.dtype.itemsize) == ("u", 2):   # in either order of bytes
            return Scale(0, 65535)
        raise UserError(f"values are {self.dtype} from {self.low:g} to {self.high:g}; expected "
                        f"integers in 0..255, or uint16: scale them, e.g. by "
                        f"{self.conversion()}")

    def conversion(self) -> str:
        return f"(array - {self.low:g}) / {self.high - self.low:g}"

    # -- in words

    def in_words(self) -> str:
        scale = self.scale()
        found = f"values {self.low:g} to {self.high:g}"
        if self.sampled:
            found += " (of a sample)"
        return f"{found} in {scale.bottom}..{scale.top}"

    def warnings(self) -> list[str]:
        scale = self.scale()
        if self.low == self.high:
            return [f"every value is {self.low:g}: a constant picture teaches nothing"]
        found = f"values {self.low:g} to {self.high:g} of {scale.bottom}..{scale.top}"
        if self.high - self.low < NARROW * (scale.top - scale.bottom):
            advice = f"scale them, e.g. by {self.conversion()}"
            if len(self.distinct) == 2:
                advice = f"of a mask make booleans, e.g. by array != {self.low:g}"
            return [f"{found}: almost one grey; {advice}"]
        if len(self.distinct) == 2:
            return [f"binary: only the two values {self.low:g} and {self.high:g} of "
                    f"{scale.bottom}..{scale.top}"]
        return []


def not_finite(part: np.ndarray, clip: int, frame: int) -> str:
    """Where the first value is that is no number, in clips [n, t, ...] that begin at `clip` and
    `frame`."""
    first = tuple(np.argwhere(~np.isfinite(part))[0])
    return (f"there is {part[first]} in frame {frame + first[1]} of clip {clip + first[0]} "
            f"(counted from 0); {EXPECTED}: mend or leave out such clips")
