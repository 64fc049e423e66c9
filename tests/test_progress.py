"""Progress is for people in a terminal, and for whoever reads a log."""

import errno
import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch

import train
from engine import progress
from engine.progress import Progress, counted, watched

ROOT = Path(__file__).parent.parent
SIZES = dict(dim=32, layers=1, heads=2, latent=8, query_latent=16, rope=6, ffn=32)
SMALL = [f"--config={name}={size}" for name, size in SIZES.items()]

COUNT = """
from engine.progress import Progress
with Progress("counting", 3) as progress:
    for i in range(3):
        progress.note({"square": f"{i * i}"})
        progress.advance()
"""


def test_a_log_gets_plain_lines(capsys):
    with Progress("training tf", 2000, 10) as bar:
        for _ in range(5):
            bar.advance()
        assert capsys.readouterr().err.count("\n") == 1, "the first step, and then now and then"
        bar.note({"tf": "0.2113"})
        bar.advance(1985)
    said = capsys.readouterr().err
    assert said.startswith("training tf: 2000/2000, tf 0.2113, ") and said.endswith(" left\n")
    assert "\r" not in said


def test_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(progress, "SECONDS", 0.0)
    list(counted(range(4), "chunks"))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"chunks: {i}/4" for i in (1, 2, 3, 4)]
    chunks = [torch.zeros(2, 3, 1)] * 4
    assert len(list(watched(chunks, "frames", 12))) == 4
    assert capsys.readouterr().err.startswith("frames: 3/12")
    with Progress("no end", 0) as bar:
        bar.advance(3)
    assert capsys.readouterr().err == "no end: 3, 0 s\n"
    with Progress("another process", 5, shown=False) as bar:
        bar.advance()
    assert capsys.readouterr().err == ""


def set_width(terminal: int, columns: int) -> None:
    size = struct.pack("HHHH", 24, columns, 0, 0)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)


def said_in_a_terminal(columns: int) -> str:
    mine, its = pty.openpty()
    set_width(its, columns)
    subprocess.run([sys.executable, "-c", COUNT], cwd=ROOT, stderr=its, check=True)
    os.close(its)
    said = os.read(mine, 10_000).decode()
    os.close(mine)
    return said


def test_a_terminal_gets_a_bar():
    said = said_in_a_terminal(80)
    assert "\r" in said and "3/3" in said and "square=4" in said
    assert "counting: 3/3, square 4, " in said_in_a_terminal(0), "a terminal without a size"


@pytest.mark.parametrize("number", [errno.EIO, errno.EPIPE])
def test_a_terminal_that_is_gone_stops_nothing(monkeypatch, number):
    class Gone:
        def isatty(self):
            return False

        def write(self, text):
            raise OSError(number, "gone")

    monkeypatch.setattr(sys, "stderr", Gone())
    assert list(counted(range(3), "chunks")) == [0, 1, 2]


def test_training_and_judging_say_how_far_they_are(tmp_path, capsys):
    """`--evaluate 64` was silent for a minute."""
    train.main([*SMALL, "--batch=2", "--steps=2", "--evaluate=2", "--device=cpu",
                f"--out={tmp_path}"])
    said = capsys.readouterr().err
    assert "\r" not in said
    for line in ("training tf: 2/2, ", "judging 2 rollouts, frames: 3/120, ",
                 "judging 2 rollouts, frames: 120/120, "):
        assert f"\n{line}" in f"\n{said}", f"no line begins with {line!r}: {said}"
