"""Kills, full disks, endless videos, other machines: nothing is lost, nothing grows, nothing is needed that was not asked for."""

import ast
import contextlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import sample
from checkpoint import previous, read_checkpoint, read_last_good, write_atomically
from compiled import FullWindow
from mla_video import PRESETS, VideoDiT
from sample import GifWriter, PictureWriter, rollout, to_pixels
from toy_data import WORDS, encode_caption

ROOT = Path(__file__).parent.parent
TINY = replace(PRESETS["toy"], dim=32, layers=1, heads=2, latent=8, query_latent=16, rope=6, ffn=32, words=len(WORDS))


# ---- saving ---------------------------------------------------------------------------------------------------------

class Kill(BaseException):
    """The process ends here: nothing after this line runs (no `except Exception` may pretend otherwise)."""


def save_and_die_at(moment: int, path: Path, content: dict, monkeypatch) -> bool:
    """Save, and die just before the `moment`-th thing that a save does to the disk; in the midst of it if that is a write."""
    moments = iter(range(10**6))

    def deadly(function):
        def call(*arguments, **rest):
            if next(moments) == moment:
                if function is torch.save:
                    function(*arguments)
                    arguments[1].truncate(arguments[1].tell() // 2)
                raise Kill
            return function(*arguments, **rest)
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
    path, moment = tmp_path / "train.pt", 0
    while True:
        for old in (path, previous(path)):
            old.unlink(missing_ok=True)
        write_atomically(path, {"step": 1}, keep=True)
        write_atomically(path, {"step": 2}, keep=True)
        died = save_and_die_at(moment, path, {"step": 3}, monkeypatch)
        step = read_last_good(path, {"step"})["step"]
        assert step in ((2, 3) if died else (3,)), f"killed at moment {moment} of a save, and the last good step read back was {step}"
        if not died:
            break
        moment += 1
    assert moment == 5, f"a save is: bytes, fsync, two renames, fsync of the folder; the test met {moment} moments"
    assert read_checkpoint(previous(path), {"step"}) == {"step": 2}


@pytest.mark.parametrize("harm", ["cut", "flipped", "empty", "gone"])
def test_a_damaged_save_falls_back_to_the_one_before_and_says_so(tmp_path, capsys, harm):
    path = tmp_path / "train.pt"
    for step in (1, 2):
        write_atomically(path, {"step": step, "model": torch.arange(100.0)}, keep=True)
    content = path.read_bytes()
    at = content.index(torch.arange(100.0).numpy().tobytes()) + 9
    path.write_bytes({"cut": content[:-100], "flipped": content[:at] + b"\xff" + content[at + 1:], "empty": b"", "gone": b""}[harm])
    if harm == "gone":
        path.unlink()
    assert read_last_good(path, {"step"})["step"] == 1
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "train.prev.pt" in said[0], f"a fallback loses steps and must be said in one line: {said}"


FULL = """
import resource, signal, sys, pathlib, torch
from checkpoint import write_atomically
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
write_atomically(pathlib.Path(sys.argv[1]), {"step": 2, "model": torch.zeros(100_000)}, keep=True)
"""


def test_a_full_disk_costs_nothing(tmp_path):
    """A real one as far as the program can tell: the system refuses to write beyond 50,000 bytes."""
    path = tmp_path / "train.pt"
    write_atomically(path, {"step": 1}, keep=True)
    done = subprocess.run([sys.executable, "-c", FULL, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert "OSError" in done.stderr and "could not be written" in done.stderr, done.stderr[-300:]
    assert read_last_good(path, {"step"}) == {"step": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["train.pt"], "half a file stayed on a full disk"


def test_a_folder_that_cannot_be_written_is_said_in_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SystemExit) as stop:
        sample.main([f"--out={tmp_path / 'file' / 'deep' / 'clip.gif'}", "--frames=3", "--steps=1", "--device=cpu"])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert stop.value.code == 2 and len(said) == 1 and "file" in said[0], said


# ---- a GIF at every moment ------------------------------------------------------------------------------------------

def frames_of(path: Path) -> np.ndarray:
    with Image.open(path) as gif:
        frames = []
        for i in range(gif.n_frames):
            gif.seek(i)
            frames.append(np.asarray(gif.convert("RGB")))
    return np.stack(frames)


def test_a_gif_is_whole_after_every_single_byte(tmp_path, monkeypatch):
    """Stop the second append after each byte that it writes: the file holds the frames of the first, or all of them, and opens."""
    path, video = tmp_path / "clip.gif", np.random.default_rng(0).integers(0, 2, (4, 6, 6, 3), dtype=np.uint8) * 255
    gif = GifWriter(path)
    gif.append(video[:2])
    before, writes = path.read_bytes(), []
    real = open

    class Recorder:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def seek(self, at):
            self.at = at
            return self.file.seek(at)

        def write(self, data):
            writes.extend((self.at + i, bytes([byte])) for i, byte in enumerate(data))
            return self.file.write(data)

    monkeypatch.setattr(sample, "open", lambda *a, **k: Recorder(real(*a, **k)), raising=False)
    gif.append(video[2:])
    assert len(writes) > 50
    part, content = tmp_path / "part.gif", bytearray(before)
    for i, (at, byte) in enumerate(writes):
        content[at:at + 1] = byte
        part.write_bytes(content)
        found, expected = frames_of(part), 2 if i + 1 < len(writes) else 4
        assert len(found) == expected, f"{len(found)} frames after {i + 1} of {len(writes)} bytes"
        assert (found == video[:len(found)]).all(), f"a frame changed after {i + 1} of {len(writes)} bytes"
    assert bytes(content) == path.read_bytes()


def test_an_older_gif_stays_until_the_new_one_has_frames(tmp_path, monkeypatch):
    path = tmp_path / "clip.gif"
    GifWriter(path).append(np.zeros((3, 4, 4, 3), dtype=np.uint8))
    before = path.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(Kill()))
    with pytest.raises(Kill):
        GifWriter(path).append(np.zeros((1, 4, 4, 3), dtype=np.uint8))
    assert path.read_bytes() == before


def test_a_folder_of_pictures_is_whole_at_every_moment(tmp_path, monkeypatch):
    """Die before or in the midst of each thing that an append does to the disk: every .png there is a frame, to the pixel, none is
    missing in between, and what the next file will be is no .png yet."""
    video = np.random.default_rng(0).integers(0, 256, (5, 6, 7, 3), dtype=np.uint8)
    plain_save, plain_replace = Image.Image.save, Path.replace
    for moment in range(7):                                # bytes, rename, bytes, rename, ... of three frames; then none is met
        done, writer = iter(range(100)), PictureWriter(tmp_path / str(moment))
        writer.append(video[:2])

        def save(picture, path, kind):
            plain_save(picture, path, kind)
            if next(done) == moment:
                os.truncate(path, os.path.getsize(path) // 2)
                raise Kill

        def replace(path, goal):
            if next(done) == moment:
                raise Kill
            plain_replace(path, goal)

        with monkeypatch.context() as patch:
            patch.setattr(Image.Image, "save", save)
            patch.setattr(Path, "replace", replace)
            with pytest.raises(Kill) if moment < 6 else contextlib.nullcontext():      # a moment that is not met fails
                writer.append(video[2:])
        names = sorted(path.name for path in writer.path.glob("*.png"))
        assert names == [f"{i:09d}.png" for i in range(2 + moment // 2)], f"killed at moment {moment}: {names}"
        for name, frame in zip(names, video):
            assert (np.asarray(Image.open(writer.path / name)) == frame).all(), f"killed at moment {moment}: {name} is not its frame"


def test_pictures_of_another_video_are_not_mixed_with_new_ones(tmp_path):
    PictureWriter(tmp_path).append(np.zeros((1, 4, 4, 3), dtype=np.uint8))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="choose another folder"):
        PictureWriter(tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


# ---- without end ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes", [dict(window=12, sink=0), dict(window=6, sink=1), dict(window=6, sink=2), dict(window=4, sink=1)])
def test_after_two_hundred_million_years_a_chunk_stands_where_it_stood(sizes):
    """Positions of frame 10**17 (at 16 frames a second, two hundred million years) are those of a window just filled."""
    model = VideoDiT(replace(TINY, **sizes))
    cache = model.make_cache(1)
    ring = max(cache.ring, 1)
    young = cache.sink + ring * 12 + TINY.frames
    far = young + ring * (10**17 // ring)
    for seen in range(far, far + 2 * ring):
        found = []
        for now in (seen, seen - far + young):
            cache.seen = now
            found.append(cache.positions())
            full = FullWindow(cache).positions()
            assert all(torch.equal(a, b) for a, b in zip(full, found[-1])), f"the compiled window stands elsewhere at frame {now}"
        for what, a, b in zip(("past", "chunk"), *found):
            assert torch.equal(a, b) and a.max() < TINY.frames, f"{what} at frame {seen}: {a.tolist()}, at the start {b.tolist()}"


# ---- other machines -------------------------------------------------------------------------------------------------

class NoWideNumbers(TorchDispatchMode):
    """MPS has no float64 and no complex64 worth the name, and a GPU crawls through both. Fails, too, if it saw no product of matrices: then
    it did not look where the work is done."""

    def __enter__(self):
        self.seen = set()
        return super().__enter__()

    def __exit__(self, kind, *rest):
        super().__exit__(kind, *rest)
        assert kind or self.seen & {"mm", "addmm", "bmm"}, f"no product of matrices among {self.seen}"

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function.overloadpacket.__name__)
        result = function(*args, **(kwargs or {}))
        for part in torch.utils._pytree.tree_leaves(result):
            if isinstance(part, torch.Tensor):
                assert part.dtype != torch.float64 and not part.is_complex(), f"{function} made {part.dtype} on the hot path"
        return result


@pytest.mark.parametrize("attention, route", [("mla", "absorbed"), ("mla", "materialised"), ("mla", "reference"), ("dense", "auto")])
def test_no_float64_and_no_complex_where_video_is_made(attention, route):
    model = VideoDiT(replace(TINY, attention=attention))
    cache, caption = model.make_cache(1), torch.zeros(1, 3, dtype=torch.long)
    x, sigma = torch.randn(1, TINY.chunk, 3, 16, 16), torch.rand(1, TINY.chunk)
    with torch.no_grad(), NoWideNumbers():
        for _ in range(3):
            model.denoise(x, sigma, caption, cache, route)
            model.commit(x, caption, cache, route)


@pytest.mark.parametrize("how", [dict(sampler="euler", steps=2, guidance=2.0), dict(sampler="consistency", steps=4)])
def test_no_float64_and_no_complex_from_noise_to_pixels(how):
    """A whole rollout, from an empty window until it is full and beyond the training length: noise, both samplers, guidance, a caption that
    changes, pictures."""
    model, caption = VideoDiT(replace(TINY, window=6, sink=1)).eval(), encode_caption("slow red disc")[None]
    with NoWideNumbers():
        for chunk in rollout(model, caption, 18, switch={6: caption + 1}, generator=torch.Generator().manual_seed(0), **how):
            to_pixels(chunk)


def test_the_guard_above_can_fail():
    for wide, said in ((torch.float64, "float64"), (torch.complex64, "complex64"), (torch.float32, "no product of matrices")):
        with pytest.raises(AssertionError, match=said), NoWideNumbers():
            torch.zeros(2).to(wide)


# What the standard library got after 3.10, as far as anybody here might reach for it.
YOUNGER = set("tomllib Self Never LiteralString assert_never override Required NotRequired Unpack TypeVarTuple StrEnum UTC batched "
              "file_digest ExceptionGroup BaseExceptionGroup add_note TaskGroup full_match from_uri copy_into move_into".split())


def too_young(source: str) -> set[str]:
    """The names in a source that Python 3.10 does not know; SyntaxError if it cannot even read it."""
    tree = ast.parse(source, feature_version=(3, 10))
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {alias.name for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names}
    return names & YOUNGER


def test_the_source_is_python_3_10():
    """The oldest that is promised; 3.11 to 3.13 read all that 3.10 reads. (3.12's quotes within an f-string's quotes are the one thing
    that ast lets pass where it runs on 3.12 itself; on 3.10 and 3.11 they are a syntax error.)"""
    for path in [path for pattern in ("*.py", "tests/*.py", "experiments/*.py", "exercises/*.py") for path in ROOT.glob(pattern)]:
        assert not (found := too_young(path.read_text())), f"{path.name} uses {found}, which Python 3.10 has not"
    for source in ("import tomllib", "from typing import Self", "from itertools import batched", "datetime.UTC"):
        assert too_young(source), f"the check is blind: it lets {source!r} pass"
    with pytest.raises(SyntaxError):
        too_young("try: pass\nexcept* ValueError: pass")


def test_what_must_be_installed_exists_for_python_3_10():
    """These ended their support of 3.10: one pin for all Pythons would leave the oldest without any."""
    pins = re.findall(r"^([\w-]+)==\S+; python_version (<|>=) \"3.11\"$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    for name in ("numpy", "pillow", "matplotlib", "hypothesis", "scikit-learn"):
        assert {mark for other, mark in pins if other == name} == {"<", ">="}, f"{name} needs a pin for 3.10 and one for later Pythons"


BARE = """
import sys
sys.modules["triton"] = None                               # an import of it raises
import shutil, subprocess
real = subprocess.Popen
def popen(command, *rest, **how):
    assert command[0].split("/")[-1] in ("git", "ldconfig"), f"started {command}"    # a CUDA build of torch looks for its libraries
    return real(command, *rest, **how)
subprocess.Popen = popen
import sample, train
out = sys.argv[1]
sample.main(["--frames=24", "--steps=1", "--device=cpu", f"--out={out}/clip.gif"])
train.main(["--steps=2", "--batch=2", "--evaluate=0", "--device=cpu", f"--out={out}/run"])
assert "torch._inductor.codecache" not in sys.modules, "the compiler was loaded"
"""


def test_nothing_needs_a_compiler_unless_asked_to_compile(tmp_path):
    """A machine without triton and with nothing on PATH: no C compiler, no Python headers, no git."""
    env = {name: value for name, value in os.environ.items() if name not in ("PATH", "CC", "CXX")} | {"PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", BARE, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-800:]
    assert (tmp_path / "clip.gif").exists() and (tmp_path / "run" / "model.pt").exists()
