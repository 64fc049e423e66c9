"""Which axis of a stored array is which.

A layout is a word with a letter for each axis: N clips, T frames, C channels (1 grey, 3 RGB,
4 RGBA), H and W pixels. A missing N is one clip, a missing C is grey.

The user says the layout, or the shape does. Then this rule decides, and nothing else:

1. Of READINGS those count that have a letter for each axis, a C of 1, 3 or 4, H and W of at
   least 8, and a T that a window fits in. Time comes last only where its pictures are at
   least as near to a square as those of the last two axes.
2. Readings that differ in axes of length 1 alone are one.
3. If one is left, it is taken; of several none is, and the user is asked for --layout.

So grey clips need the flag as soon as there are as many clips as a window has frames: then
their first axis might be time. One file is known without it, the published Moving MNIST.
"""

import numpy as np

from engine.command_line import UserError

READINGS = (
    "THW", "HWT",
    "NTHW", "TNHW", "NHWT", "THWC", "TCHW", "CTHW",
    "NTHWC", "NTCHW", "NCTHW",             # with five axes time comes first by the flag alone
)
CHANNELS = (1, 3, 4)
LEAST_SIDE = 8
MOVING_MNIST = (20, 10_000, 64, 64)        # time first, grey, uint8


class TooShort(UserError):
    """Clips that no window fits in."""


def check_layout(layout: str) -> str:
    """The layout as a word of capitals; UserError if it is none."""
    word = "".join(letter for letter in layout.upper() if letter.isalpha())
    letters = set(word)
    complete = letters >= set("THW") and letters <= set("NTCHW")
    if not complete or len(letters) < len(word):
        raise UserError(f"--layout {layout}: expected a letter for each axis of the array, "
                        "T (frames), H and W (pixels), and where there are such axes N "
                        "(clips) and C (channels), e.g. NTHW or TCHW")
    return word


def find_layout(array: np.ndarray, frames: int, given: str | None) -> str:
    """The layout of clips that windows of `frames` frames are drawn from: the given one, if
    the array can have it, or the one that follows from the shape. UserError, without the
    file's name, if there is none or more than one."""
    shape = list(array.shape)
    if not array.size:
        raise UserError(f"the array is empty (shape {shape}); expected clips such as "
                        "[N, T, H, W]")
    if given:
        check_given(given, shape)
        check_length(given, shape, frames)
        return given
    if array.shape == MOVING_MNIST and array.dtype == np.uint8:
        return "TNHW"
    possible = [word for word in READINGS if is_possible(word, shape)]
    if not possible:
        raise UserError(f"cannot read shape {shape} as clips; expected e.g. [N, T, H, W], "
                        "[T, N, H, W] (Moving MNIST) or [N, T, H, W, C] with C of 1, 3 or 4, "
                        "or an order that --layout names")
    long_enough = [word for word in possible if lengths(word, shape)["T"] >= frames]
    if not long_enough:
        check_length(possible[0], shape, frames)
    different = {}
    for word in long_enough:
        different.setdefault(essence(word, shape), word)
    if len(different) > 1:
        raise UserError(ask_which(shape, list(different.values())))
    return long_enough[0]


def as_clips(array: np.ndarray, layout: str) -> np.ndarray:
    """A view [N, T, H, W, C] of an array with that layout."""
    for letter in "NC":
        if letter not in layout:
            array = array[None]
            layout = letter + layout
    return array.transpose([layout.index(letter) for letter in "NTHWC"])


# ---- the rule --------------------------------------------------------------------------------

def lengths(layout: str, shape: list[int]) -> dict[str, int]:
    """The length of every letter's axis, 1 where it has none."""
    return dict.fromkeys("NTHWC", 1) | dict(zip(layout, shape))


def is_possible(layout: str, shape: list[int]) -> bool:
    """Point 1 of the rule, but for the window."""
    if len(layout) != len(shape):
        return False
    found = lengths(layout, shape)
    height = found["H"]
    width = found["W"]
    if min(height, width) < LEAST_SIDE or found["C"] not in CHANNELS:
        return False
    return layout[-1] != "T" or oblong(height, width) <= oblong(*shape[-2:])


def oblong(height: int, width: int) -> float:
    """How many times as long as the other the longer side is: 1 for a square."""
    return max(height, width) / min(height, width)


def essence(layout: str, shape: list[int]) -> str:
    """The letters of the axes that are longer than 1."""
    return "".join(letter for letter, length in zip(layout, shape) if length > 1)


def check_given(layout: str, shape: list[int]) -> None:
    if len(layout) != len(shape):
        raise UserError(f"--layout {layout} has {len(layout)} letters, and the array of shape "
                        f"{shape} has {len(shape)} axes")
    channels = lengths(layout, shape)["C"]
    if channels not in CHANNELS:
        raise UserError(f"--layout {layout} makes {channels} channels of shape {shape}; "
                        "expected 1 (grey), 3 (RGB) or 4 (RGBA)")


def check_length(layout: str, shape: list[int], frames: int) -> None:
    length = lengths(layout, shape)["T"]
    if length < frames:
        raise TooShort(f"clips of {several(length, 'frame')} (shape {shape} read as {layout}) "
                       f"are too short; expected {frames} or more")


# ---- in words --------------------------------------------------------------------------------

def several(number: int, thing: str) -> str:
    """"1 clip", "2 clips" """
    return f"{number:,} {thing}" + ("" if number == 1 else "s")


def in_words(layout: str, shape: list[int]) -> str:
    """For instance "3 clips of 20 grey frames of 64x48", width x height as one says it."""
    found = lengths(layout, shape)
    colour = "grey" if found["C"] == 1 else "colour"
    clips = several(found["N"], "clip")
    frames = several(found["T"], f"{colour} frame")
    return f"{clips} of {frames} of {found['W']}x{found['H']}"


def ask_which(shape: list[int], readings: list[str]) -> str:
    said = [f"{word} ({in_words(word, shape)})" for word in readings]
    return (f"shape {shape} can be read as {', '.join(said[:-1])} or {said[-1]}: say which, "
            f"e.g. --layout {readings[0]}")
