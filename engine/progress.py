"""How far something long has come: a bar in a terminal, and in a pipe or a log a line now and
then."""

import contextlib
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

from torch import Tensor
from tqdm import tqdm

SECONDS = 15.0                 # between two lines


class Progress:
    """with Progress("training tf", 2000) as progress: ... progress.advance()

    `done` of `total` are done at the start; total 0 has no end. `passing` takes the bar away in
    the end, for one of many. It writes to stderr, and never fails: a terminal may be closed, and
    what goes on in it shall not end with it. tests/test_progress.py.
    """

    def __init__(self, what: str, total: int, done: int = 0, *, shown: bool = True,
                 passing: bool = False):
        self.what = what
        self.total = total
        self.done = done
        self.first = done
        self.notes = {}
        self.began = time.monotonic()
        self.next_line = self.began
        terminal = has_width(sys.stderr)
        self.lines = shown and not terminal
        self.bar = tqdm(total=total or None, initial=done, desc=what, dynamic_ncols=True,
                        disable=not (shown and terminal), leave=not passing)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        with contextlib.suppress(OSError):
            self.bar.close()

    def note(self, notes: dict[str, str]) -> None:
        """What stands beside the number from now on."""
        self.notes = notes
        with contextlib.suppress(OSError):
            self.bar.set_postfix(notes, refresh=False)

    def advance(self, by: int = 1) -> None:
        """So many more are done."""
        self.done += by
        now = time.monotonic()
        due = now >= self.next_line or self.done == self.total
        with contextlib.suppress(OSError):
            self.bar.update(by)
            if self.lines and due:
                self.next_line = now + SECONDS
                print(self.line(now), file=sys.stderr, flush=True)

    def line(self, now: float) -> str:
        """training tf: 300/2000, tf 0.2113, 41 s, 232 s left"""
        seconds = now - self.began
        if not self.total:
            return f"{self.what}: {self.done}, {seconds:.0f} s"
        notes = [f"{name} {note}" for name, note in self.notes.items()]
        left = seconds * (self.total - self.done) / max(1, self.done - self.first)
        parts = [f"{self.done}/{self.total}", *notes, f"{seconds:.0f} s", f"{left:.0f} s left"]
        return f"{self.what}: {', '.join(parts)}"


def has_width(stream: TextIO) -> bool:
    """Is it a terminal in which a bar has room? (Some, e.g. in containers, have no size.)"""
    return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0


def counted(items: Sequence, what: str) -> Iterator:
    """The items, with a progress of one for each that was dealt with."""
    with Progress(what, len(items)) as progress:
        for item in items:
            yield item
            progress.advance()


def watched(chunks: Iterable[Tensor], what: str, frames: int) -> Iterator[Tensor]:
    """The chunks [B, F, ...] of a video of so many frames, with a progress in frames."""
    with Progress(what, frames, passing=True) as progress:
        for chunk in chunks:
            progress.advance(chunk.shape[1])
            yield chunk
