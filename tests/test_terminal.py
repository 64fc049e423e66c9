"""The picture in the terminal: what is drawn, read back by a small terminal, is the picture."""

import io
import os
import re

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from lab import forall, seeds

PAIR = re.compile(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m")


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


def read_back(lines: list[str]) -> np.ndarray:
    """What lines of half blocks show: [2 * lines, w, 3]."""
    rows = []
    for line in lines:
        upper, lower = [], []
        colours = None
        at = 0
        while at < len(line):
            found = PAIR.match(line, at)
            if found:
                colours = [int(number) for number in found.groups()]
                at = found.end()
            elif line[at] == "\u2580":
                upper.append(colours[:3])
                lower.append(colours[3:])
                at += 1
            else:
                assert line[at:] == "\x1b[0m", "the line ends plain"
                break
        rows += [upper, lower]
    return np.array(rows, dtype=np.uint8)


@forall(height=st.integers(1, 7), width=st.integers(1, 9), levels=st.integers(1, 3), seed=seeds)
def test_half_blocks_show_the_picture(code, height, width, levels, seed):
    dice = np.random.default_rng(seed)
    picture = dice.integers(0, levels, (height, width, 3), dtype=np.uint8) * 120
    shown = read_back(code.terminal.drawn(picture))
    assert (shown[:height] == picture).all()
    assert (shown[height:] == 0).all(), "below an odd last row it is black"


@pytest.fixture
def capable(monkeypatch):
    """A terminal of 80 x 24 that can draw."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("TERM_PROGRAM", raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    return Terminal()


def chunk_of(level: float, videos: int = 1) -> torch.Tensor:
    return torch.full((videos, 2, 3, 16, 16), level)


def test_each_picture_stands_where_the_one_before_stood(code, capable):
    screen = code.terminal.open_screen(chunk_of(0.0), capable)
    screen.fps = 1000
    screen.append(chunk_of(1.0))
    screen.append(chunk_of(-1.0))
    screen.close()
    said = capable.getvalue()
    pictures = said.split("\x1b[?25l")[1:]
    assert len(pictures) == 4
    lines = 16                                     # 2 columns and a line for a pixel: 32 x 16
    for number, picture in enumerate(pictures):
        assert picture.startswith(f"\x1b[{lines}A" if number else "\r"), "back to its top"
        assert picture.count("\n") == lines
        shown = read_back(picture[picture.index("\r") + 1:].split("\n")[:lines])
        assert shown.shape == (32, 32, 3)
        assert (shown == (255 if number < 2 else 0)).all()
    assert said.endswith("\x1b[0m\x1b[?25h"), "colours and cursor come back"


def test_a_frame_is_shown_for_its_time(code, capable, monkeypatch):
    clock = [100.0]
    waits = []

    def sleep(seconds):
        waits.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(code.terminal.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(code.terminal.time, "sleep", sleep)
    screen = code.terminal.open_screen(chunk_of(0.0), capable)
    for _ in range(2):
        screen.append(chunk_of(1.0))
    assert waits == pytest.approx([0, 1 / 16, 1 / 16, 1 / 16])
    clock[0] += 10                                 # the model was slow: nothing to wait for
    screen.append(chunk_of(1.0))
    assert waits[-2:] == pytest.approx([0, 1 / 16])


def test_a_terminal_that_changes_its_size_is_drawn_anew(code, capable, monkeypatch):
    screen = code.terminal.open_screen(chunk_of(0.0), capable)
    screen.fps = 1000
    screen.append(chunk_of(1.0))
    monkeypatch.setenv("COLUMNS", "20")
    screen.append(chunk_of(1.0))
    small = capable.getvalue().split("\x1b[2J\x1b[H")[1]
    assert small.split("\x1b[?25l")[1].count("\n") == 8, "a column for a pixel"


@pytest.mark.parametrize("changes, reason", [
    (dict(TERM="dumb"), "no colours"),
    (dict(TERM=""), "no colours"),
    (dict(TERM_PROGRAM="Apple_Terminal"), "24-bit"),
    (dict(COLUMNS="15"), "15 columns"),
    (dict(LINES="8"), "8 lines"),
])
def test_what_a_terminal_cannot_is_said_in_a_line(code, capable, monkeypatch, capsys, changes,
                                                  reason):
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    assert code.terminal.open_screen(chunk_of(0.0), capable) is None
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("--live cannot draw here") and reason in said[0]
    assert capable.getvalue() == ""


def test_a_file_is_no_terminal(code, capable, capsys):
    assert code.terminal.open_screen(chunk_of(0.0), io.StringIO()) is None
    assert "no terminal" in capsys.readouterr().err
    capable.encoding = "ascii"
    assert code.terminal.open_screen(chunk_of(0.0), capable) is None
    assert "ascii" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_live_draws_in_a_real_terminal(code, tmp_path):
    """Through a pseudo-terminal, as sample.py sees it."""
    pty = pytest.importorskip("pty")
    import fcntl
    import struct
    import subprocess
    import sys
    import termios
    from pathlib import Path

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    env = {**os.environ, "TERM": "xterm", "PYTHONIOENCODING": "utf-8"}
    for name in ("COLUMNS", "LINES", "TERM_PROGRAM"):
        env.pop(name, None)
    command = [sys.executable, "sample.py", "--live", "--frames=3", "--steps=1", "--device=cpu",
               f"--out={tmp_path}", "--prompt=red disc"]
    root = Path(__file__).parent.parent
    program = subprocess.Popen(command, cwd=root, env=env, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:                            # Linux says so at the end
            break
        if not part:
            break
        said += part
    assert program.wait() == 0
    text = said.decode()
    assert text.count("\x1b[?25l") == 3, "three frames"
    assert "\u2580" in text and text.rindex("\x1b[?25h") > text.rindex("\u2580")
    assert "wrote" in text
