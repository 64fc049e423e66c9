"""Kills, full disks, endless videos, other machines: nothing is lost, nothing grows, nothing is
needed that was not asked for.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sample
from attention import attend_absorbed, attend_cheaper, attend_materialised, attend_reference
from engine import checkpoint, video_files
from engine.checkpoint import previous, read_checkpoint, read_last_good, write_atomically
from engine.streaming import FullWindow
from engine.video_files import GifWriter, PictureWriter, to_pixels
from flow import Draws, GuidedStream, Stream, consistency, euler, rollout
from mla_video import PRESETS, VideoDiT
from toy_data import WORDS, encode_caption

pytestmark = pytest.mark.rest             # pytest.ini says what that means

ROOT = Path(__file__).parent.parent
TINY = replace(PRESETS["toy"], dim=32, layers=1, heads=2, latent=8, query_latent=16, rope=6,
               ffn=32, words=len(WORDS))


# ---- saving ----------------------------------------------------------------------------------

class Kill(BaseException):
    """The process ends here: nothing after this line runs (no `except Exception` may pretend
    otherwise)."""


torch_save = torch.save


def cut_short(content: dict, file) -> None:
    """torch.save, as far as half of the bytes."""
    torch_save(content, file)
    file.truncate(file.tell() // 2)


def save_and_die_at(moment: int, path: Path, content: dict, monkeypatch) -> bool:
    """Save, and die just before the `moment`-th thing that a save does to the disk; in the
    midst of it if that is a write."""
    moments = iter(range(10**6))

    def deadly(function: Callable) -> Callable:
        def call(*arguments, **named):
            if next(moments) == moment:
                if function is torch_save:
                    cut_short(*arguments)
                raise Kill
            return function(*arguments, **named)
        return call

    with monkeypatch.context() as patch:
        for owner, name in ((torch, "save"), (checkpoint.os, "fsync"), (Path, "replace")):
            patch.setattr(owner, name, deadly(getattr(owner, name)))
        try:
            write_atomically(path, content, keep=True)
        except Kill:
            return True
    return False


def test_a_save_may_die_at_any_moment(tmp_path, monkeypatch, capsys):
    path = tmp_path / "train.pt"
    moment = 0
    while True:
        path.unlink(missing_ok=True)
        previous(path).unlink(missing_ok=True)
        write_atomically(path, {"step": 1}, keep=True)
        write_atomically(path, {"step": 2}, keep=True)
        died = save_and_die_at(moment, path, {"step": 3}, monkeypatch)
        step = read_last_good(path, {"step"})["step"]
        good = (2, 3) if died else (3,)
        assert step in good, (f"killed at moment {moment} of a save, "
                              f"and the last good step read back was {step}")
        if not died:
            break
        moment += 1
    assert moment == 5, ("a save is: bytes, fsync, two renames, fsync of the folder; "
                         f"the test met {moment} moments")
    assert read_checkpoint(previous(path), {"step"}) == {"step": 2}


@pytest.mark.parametrize("harm", ["cut", "flipped", "empty", "gone"])
def test_a_damaged_save_falls_back_to_the_one_before_and_says_so(tmp_path, capsys, harm):
    path = tmp_path / "train.pt"
    numbers = torch.arange(100.0)
    for step in (1, 2):
        write_atomically(path, {"step": step, "model": numbers}, keep=True)
    content = path.read_bytes()
    if harm == "cut":
        path.write_bytes(content[:-100])
    if harm == "flipped":
        at = content.index(numbers.numpy().tobytes()) + 9
        path.write_bytes(content[:at] + b"\xff" + content[at + 1:])
    if harm == "empty":
        path.write_bytes(b"")
    if harm == "gone":
        path.unlink()
    assert read_last_good(path, {"step"})["step"] == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1, f"a fallback loses steps and must be said in one line: {said}"
    assert "train.prev.pt" in said[0]


FULL = """
import resource, signal, sys, pathlib, torch
from engine.checkpoint import write_atomically
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
path = pathlib.Path(sys.argv[1])
write_atomically(path, {"step": 2, "model": torch.zeros(100_000)}, keep=True)
"""


def test_a_full_disk_costs_nothing(tmp_path):
    """As good as a real one: the system refuses to write beyond 50,000 bytes."""
    path = tmp_path / "train.pt"
    write_atomically(path, {"step": 1}, keep=True)
    command = [sys.executable, "-c", FULL, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "OSError" in done.stderr, done.stderr[-300:]
    assert "could not be written" in done.stderr, done.stderr[-300:]
    assert read_last_good(path, {"step"}) == {"step": 1}
    left = [file.name for file in tmp_path.iterdir()]
    assert left == ["train.pt"], "half a file stayed on a full disk"


def test_a_folder_that_cannot_be_written_is_said_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    out = tmp_path / "file" / "deep" / "clip.gif"
    with pytest.raises(SystemExit) as stop:
        sample.main([f"--out={out}", "--frames=3", "--steps=1", "--device=cpu"])
    said = capsys.readouterr().err.splitlines()
    errors = [line for line in said if line.startswith("error")]
    assert stop.value.code == 2
    assert len(errors) == 1 and "file" in errors[0], errors


# ---- a GIF at every moment -------------------------------------------------------------------

def frames_of(path: Path) -> np.ndarray:
    with Image.open(path) as gif:
        frames = []
        for i in range(gif.n_frames):
            gif.seek(i)
            frames.append(np.asarray(gif.convert("RGB")))
    return np.stack(frames)


class Recorder:
    """A file that notes in `writes` each byte that is written, and where."""

    def __init__(self, file, writes: list[tuple[int, bytes]]):
        self.file = file
        self.writes = writes

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def seek(self, at: int) -> int:
        self.at = at
        return self.file.seek(at)

    def write(self, data: bytes) -> int:
        for i, byte in enumerate(data):
            self.writes.append((self.at + i, bytes([byte])))
        return self.file.write(data)


def test_a_gif_is_whole_after_every_single_byte(tmp_path, monkeypatch):
    """Stop the second append after each byte that it writes: the file holds the frames of the
    first, or all of them, and opens."""
    path = tmp_path / "clip.gif"
    video = np.random.default_rng(0).integers(0, 2, (4, 6, 6, 3), dtype=np.uint8) * 255
    gif = GifWriter(path)
    gif.append(video[:2])
    content = bytearray(path.read_bytes())
    writes = []

    def recorded(*arguments, **named):
        return Recorder(open(*arguments, **named), writes)

    monkeypatch.setattr(video_files, "open", recorded, raising=False)
    gif.append(video[2:])
    assert len(writes) > 50
    part = tmp_path / "part.gif"
    for done, (at, byte) in enumerate(writes, 1):
        content[at:at + 1] = byte
        part.write_bytes(content)
        found = frames_of(part)
        where = f"after {done} of {len(writes)} bytes"
        assert len(found) == (2 if done < len(writes) else 4), f"{len(found)} frames {where}"
        assert (found == video[:len(found)]).all(), f"a frame changed {where}"
    assert bytes(content) == path.read_bytes()


def test_an_older_gif_stays_until_the_new_one_has_frames(tmp_path, monkeypatch):
    def die(*_):
        raise Kill

    path = tmp_path / "clip.gif"
    GifWriter(path).append(np.zeros((3, 4, 4, 3), dtype=np.uint8))
    before = path.read_bytes()
    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(Kill):
        GifWriter(path).append(np.zeros((1, 4, 4, 3), dtype=np.uint8))
    assert path.read_bytes() == before


def append_and_die_at(moment: int, writer: PictureWriter, frames, monkeypatch) -> bool:
    """Append, and die in the midst of the `moment`-th thing that it does to the disk if that is
    bytes, and before it if that is a rename."""
    moments = iter(range(100))
    plain_save = Image.Image.save
    plain_replace = Path.replace

    def save(picture, path, kind):
        plain_save(picture, path, kind)
        if next(moments) == moment:
            os.truncate(path, os.path.getsize(path) // 2)
            raise Kill

    def replace_or_die(path, goal):
        if next(moments) == moment:
            raise Kill
        plain_replace(path, goal)

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", save)
        patch.setattr(Path, "replace", replace_or_die)
        try:
            writer.append(frames)
        except Kill:
            return True
    return False


def test_a_folder_of_pictures_is_whole_at_every_moment(tmp_path, monkeypatch):
    """Whenever an append dies, every .png there is a frame, to the pixel, none is missing in
    between, and what the next file will be is no .png yet."""
    video = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
    for moment in range(7):                # bytes and rename, three times; then none is met
        writer = PictureWriter(tmp_path / str(moment))
        writer.append(video[:2])
        died = append_and_die_at(moment, writer, video[2:], monkeypatch)
        assert died == (moment < 6), f"an append does {moment} things to the disk, expected 6"
        killed = f"killed at moment {moment}"
        names = sorted(path.name for path in writer.path.glob("*.png"))
        assert names == [f"{i:09d}.png" for i in range(2 + moment // 2)], f"{killed}: {names}"
        for name, frame in zip(names, video):
            picture = np.asarray(Image.open(writer.path / name))
            assert (picture == frame).all(), f"{killed}: {name} is not its frame"


def test_pictures_of_another_video_are_not_mixed_with_new_ones(tmp_path):
    PictureWriter(tmp_path).append(np.zeros((1, 4, 4, 3), dtype=np.uint8))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="choose another folder"):
        PictureWriter(tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


# ---- without end -----------------------------------------------------------------------------

@pytest.mark.parametrize("sizes", [dict(window=12, sink=0), dict(window=6, sink=1),
                                   dict(window=6, sink=2), dict(window=4, sink=1)])
def test_after_two_hundred_million_years_a_chunk_stands_where_it_stood(sizes):
    """Positions of frame 10**17 (at 16 frames a second, two hundred million years) are those of
    a window just filled."""
    cache = VideoDiT(replace(TINY, **sizes)).make_cache(1)
    ring = max(cache.ring, 1)
    young = cache.sink + ring * 12 + TINY.frames
    old = young + ring * (10**17 // ring)
    for later in range(2 * ring):
        cache.seen = young + later
        expected = cache.positions()
        cache.seen = old + later
        found = cache.positions()
        full = FullWindow(cache).positions()
        for what, a, b, c in zip(("past", "chunk"), expected, found, full):
            where = f"{what} at frame {cache.seen}"
            assert torch.equal(b, c), f"{where}: the compiled window stands elsewhere"
            assert torch.equal(a, b), f"{where}: {b.tolist()}, at the start {a.tolist()}"
            assert b.max() < TINY.frames, f"{where}: {b.tolist()}"


# ---- other machines --------------------------------------------------------------------------

class NoWideNumbers(TorchDispatchMode):
    """MPS has no float64 and no complex64 worth the name, and a GPU crawls through both. Fails,
    too, if it saw no product of matrices: then it did not look where the work is done."""

    def __enter__(self):
        self.seen = set()
        return super().__enter__()

    def __exit__(self, kind, *others):
        super().__exit__(kind, *others)
        products = self.seen & {"mm", "addmm", "bmm"}
        assert kind or products, f"no product of matrices among {self.seen}"

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.overloadpacket.__name__)
        result = function(*args, **(kwargs or {}))
        for part in tree_leaves(result):
            if isinstance(part, torch.Tensor):
                wide = part.dtype == torch.float64 or part.is_complex()
                assert not wide, f"{function} made {part.dtype} on the hot path"
        return result


@pytest.mark.parametrize("attention, attend", [
    ("mla", attend_absorbed), ("mla", attend_materialised), ("mla", attend_reference),
    ("dense", attend_cheaper)])
def test_no_float64_and_no_complex_where_video_is_made(attention, attend):
    model = VideoDiT(replace(TINY, attention=attention))
    cache = model.make_cache(1)
    caption = torch.zeros(1, 3, dtype=torch.long)
    x = torch.randn(1, TINY.chunk, 3, 16, 16)
    sigma = torch.rand(1, TINY.chunk)
    with torch.no_grad(), NoWideNumbers():
        for _ in range(3):
            model.denoise(x, sigma, caption, cache, attend)
            model.commit(x, caption, cache, attend)


def guided_stream(model: VideoDiT, caption: torch.Tensor) -> GuidedStream:
    plain = Stream(model, torch.zeros_like(caption))
    return GuidedStream(Stream(model, caption), plain, 2.0)


@pytest.mark.parametrize("make_stream, sampler, steps", [
    (guided_stream, euler, 2), (Stream, consistency, 4)])
def test_no_float64_and_no_complex_from_noise_to_pixels(make_stream, sampler, steps):
    """A whole rollout, from an empty window until it is full and beyond the training length:
    noise, both samplers, guidance, a caption that changes, pictures."""
    model = VideoDiT(replace(TINY, window=6, sink=1)).eval()
    caption = encode_caption("slow red disc")[None]
    draws = Draws(torch.Generator().manual_seed(0))
    with NoWideNumbers():
        stream = make_stream(model, caption)
        for number, chunk in enumerate(rollout(stream, 18, draws, sampler, steps)):
            to_pixels(chunk)
            if number == 1:
                stream.caption = caption + 1


def test_the_guard_above_can_fail():
    for wide, said in ((torch.float64, "float64"), (torch.complex64, "complex64"),
                       (torch.float32, "no product of matrices")):
        with pytest.raises(AssertionError, match=said), NoWideNumbers():
            torch.zeros(2).to(wide)


# What the standard library got after 3.10, as far as anybody here might reach for it.
YOUNGER = set("tomllib Self Never LiteralString assert_never override Required NotRequired "
              "Unpack TypeVarTuple StrEnum UTC batched file_digest ExceptionGroup "
              "BaseExceptionGroup "
              "add_note TaskGroup full_match from_uri copy_into move_into".split())


def too_young(source: str) -> set[str]:
    """The names in a source that Python 3.10 does not know; SyntaxError if it cannot read it."""
    names = set()
    for node in ast.walk(ast.parse(source, feature_version=(3, 10))):
        if isinstance(node, ast.Attribute):
            names.add(node.attr)
        if isinstance(node, ast.Name):
            names.add(node.id)
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.name for alias in node.names}
    return names & YOUNGER


def sources() -> Iterator[Path]:
    for folder in ("", "engine/", "tests/", "experiments/", "exercises/"):
        yield from ROOT.glob(folder + "*.py")


def test_the_source_is_python_3_10():
    """The oldest that is promised; 3.11 to 3.13 read all that 3.10 reads. (3.12's quotes within
    an f-string's quotes are the one thing that ast lets pass where it runs on 3.12 itself; on
    3.10 and 3.11 they are a syntax error.)"""
    for path in sources():
        found = too_young(path.read_text())
        assert not found, f"{path.name} uses {found}, which Python 3.10 has not"
    for source in ("import tomllib", "from typing import Self", "from itertools import batched",
                   "datetime.UTC"):
        assert too_young(source), f"the check is blind: it lets {source!r} pass"
    with pytest.raises(SyntaxError):
        too_young("try: pass\nexcept* ValueError: pass")


def test_what_must_be_installed_exists_for_python_3_10():
    """These support 3.10 no longer: one pin for all Pythons would leave the oldest without."""
    requirements = (ROOT / "requirements.txt").read_text()
    pin = r"^([\w-]+)==\S+; python_version (<|>=) \"3.11\"$"
    pins = re.findall(pin, requirements, re.MULTILINE)
    for name in ("numpy", "pillow", "matplotlib", "hypothesis", "scikit-learn"):
        marks = {mark for other, mark in pins if other == name}
        assert marks == {"<", ">="}, f"{name} needs a pin for 3.10 and one for later Pythons"


BARE = """
import sys
sys.modules["triton"] = None                               # an import of it raises
import shutil, subprocess
real = subprocess.Popen
def popen(command, *rest, **how):
    # a CUDA build of torch looks for its libraries
    assert command[0].split("/")[-1] in ("git", "ldconfig"), f"started {command}"
    return real(command, *rest, **how)
subprocess.Popen = popen
import sample, train
out = sys.argv[1]
sample.main(["--frames=24", "--steps=1", "--device=cpu", f"--out={out}/clip.gif"])
train.main(["--steps=2", "--batch=2", "--evaluate=0", "--device=cpu", f"--out={out}/run"])
assert "torch._inductor.codecache" not in sys.modules, "the compiler was loaded"
"""


def test_nothing_needs_a_compiler_unless_asked_to_compile(tmp_path):
    """A machine without triton and with nothing on PATH: no C compiler, no headers, no git."""
    env = {"PATH": str(tmp_path)}
    for name, value in os.environ.items():
        if name not in ("PATH", "CC", "CXX"):
            env[name] = value
    command = [sys.executable, "-c", BARE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-800:]
    assert (tmp_path / "clip.gif").exists()
    assert (tmp_path / "run" / "model.pt").exists()
