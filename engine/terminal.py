"""A video in the terminal while it is made. tests/test_terminal.py.

A character is about twice as high as wide. The block that fills its upper half, in one colour
on another, makes two pixels of it, one above the other.
"""

import os
import shutil
import sys
import time
from typing import TextIO

import numpy as np
from torch import Tensor

from engine.video_files import FPS, to_pixels

UPPER_HALF = "\N{UPPER HALF BLOCK}"
PLAIN = "\x1b[0m"
HIDE_CURSOR = "\x1b[?25l"
SHOW_CURSOR = "\x1b[?25h"
CLEAR = "\x1b[2J\x1b[H"


def drawn(picture: np.ndarray) -> list[str]:
    """A picture uint8 [h, w, 3] as lines of text in 24-bit colour, two rows of pixels each. An
    odd last row gets a black one below it."""
    h, w, _ = picture.shape
    picture = np.pad(picture, ((0, h % 2), (0, 0), (0, 0)))
    lines = []
    for upper, lower in zip(picture[::2], picture[1::2]):
        line = ""
        before = None
        for pair in np.concatenate((upper, lower), axis=1).tolist():       # six numbers
            if pair != before:                             # most neighbours are alike
                line += "\x1b[38;2;{};{};{};48;2;{};{};{}m".format(*pair)
                before = pair
            line += UPPER_HALF
        lines.append(line + PLAIN)
    return lines


def why_not(file: TextIO, width: int, height: int) -> str:
    """Why a picture of so many pixels cannot be drawn there; "" if it can."""
    if not file.isatty():
        return "the output is no terminal"
    if os.environ.get("TERM", "dumb") in ("", "dumb", "vt100"):
        return f"a terminal of kind {os.environ.get('TERM', '')!r} has no colours"
    if os.environ.get("TERM_PROGRAM") == "Apple_Terminal":
        return "Apple's Terminal has no 24-bit colours; others, such as iTerm2, have"
    try:
        UPPER_HALF.encode(file.encoding)
    except (UnicodeEncodeError, LookupError):
        return f"the encoding {file.encoding} has no half blocks; set PYTHONIOENCODING=utf-8"
    columns, lines = shutil.get_terminal_size()
    if width > columns or height > 2 * (lines - 1):
        return (f"it has {columns} columns and {lines} lines, and the picture needs {width} and "
                f"{height // 2 + 1}: make it larger, or give fewer prompts")
    return ""


def open_screen(like: Tensor, file: TextIO | None = None) -> "Screen | None":
    """A Screen for chunks of that shape, [B, F, c, h, w], on stdout unless said otherwise. None
    where it cannot be, after a line that says why: the video is made all the same."""
    file = file or sys.stdout
    videos, _, _, h, w = like.shape
    width = videos * (w + 1) - 1                           # a column between two videos
    reason = why_not(file, width, h)
    if reason:
        print(f"--live cannot draw here: {reason}", file=sys.stderr)
        return None
    return Screen(file, width, h)


class Screen:
    """Where a stream is shown, pictures of `width` x `height` pixels."""

    def __init__(self, file: TextIO, width: int, height: int, fps: float = FPS):
        self.file = file
        self.width = width
        self.height = height
        self.fps = fps
        self.room = None                                   # the terminal's size
        self.lines = 0                                     # of the picture that stands there
        self.due = 0.0                                     # when the next frame is

    def append(self, chunk: Tensor) -> None:
        """Show the frames of a chunk, each for its time at least."""
        for picture in to_pixels(chunk, self.zoom()):
            time.sleep(max(0.0, self.due - time.monotonic()))
            self.due = time.monotonic() + 1 / self.fps
            self.show(picture)

    def zoom(self) -> int:
        """Columns, and halves of lines, for a pixel of the video: as many as there is room for.
        Where the room has changed, the old picture goes."""
        room = shutil.get_terminal_size()
        if self.room not in (None, room):
            self.file.write(CLEAR)
            self.lines = 0
        self.room = room
        across = room.columns // self.width
        down = 2 * (room.lines - 1) // self.height
        return max(1, min(across, down))

    def show(self, picture: np.ndarray) -> None:
        """Draw a picture over the one before."""
        lines = drawn(picture)
        back = f"\x1b[{self.lines}A" if self.lines else ""
        self.lines = len(lines)
        self.file.write(HIDE_CURSOR + back + "\r" + "\n".join(lines) + "\n")
        self.file.flush()

    def close(self) -> None:
        """The last picture stays, and the cursor comes back below it."""
        self.file.write(PLAIN + SHOW_CURSOR)
        self.file.flush()
