"""Bad input by the thousand: flags, settings, clip files, checkpoints (test_forged.py has those
made by hand). Claims, each held by calling `main` in this process: no traceback, no hang, exit
code 2 with one line, nothing in the folder changed, and no code of a checkpoint executed.

    pytest tests/test_hostile.py                                  60 generated inputs per
    property HYPOTHESIS_PROFILE=thorough pytest tests/test_hostile.py      2,500 per property,
    more than
                                                                  10,000 in all
"""

import contextlib
import hashlib
import io
import signal
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image

import sample
import train
from engine.checkpoint import load_model, save_model
from mla_video import PRESETS, Config, VideoDiT
from toy_data import WORDS, Clips

pytestmark = pytest.mark.rest             # pytest.ini says what that means

SIZES = dict(dim=32, layers=1, heads=2, latent=8, query_latent=16, rope=6, ffn=32)
TINY = replace(PRESETS["toy"], **SIZES, words=len(WORDS))
SMALL = [f"--config={name}={value}" for name, value in SIZES.items()]
TWO_STEPS = [*SMALL, "--steps=2", "--batch=2", "--evaluate=0", "--device=cpu"]

thorough = settings().max_examples > 40
# No shrinking: to shrink an input that hangs takes an hour.
many = settings(max_examples=2500 if thorough else 60, phases=[Phase.generate])
SECONDS = 20                                       # a refusal takes milliseconds


# ---- asking ----------------------------------------------------------------------------------

class Content(bytes):
    """Bytes that do not fill the screen when a test fails."""
    def __repr__(self):
        return f"<{len(self)} bytes>"


class Accepted(Exception):
    """The input was good and the work would begin."""


def files(folder: Path) -> dict[str, str]:
    """The hash of each file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = str(path.relative_to(folder))
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@contextlib.contextmanager
def limited(seconds: int, argv: list[str]) -> Iterator[None]:
    """AssertionError if it hangs. Its own seconds: a busy machine's do not count."""
    def hung(number, frame):
        raise AssertionError(f"still busy after {seconds} s with {argv}")

    signal.signal(signal.SIGPROF, hung)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


@contextlib.contextmanager
def heard() -> Iterator[io.StringIO]:
    """All that is said on stderr. A warning is a line, too."""
    said = io.StringIO()

    def warn(message, kind, *where):
        print(f"{kind.__name__}: {message}", file=said)

    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), \
            warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = warn
        yield said


def ask(main: Callable, argv: list[str], folder: Path) -> str | None:
    """The one line of a refusal, None if the input was accepted; AssertionError, or what it
    raised, if the program did anything else."""
    before = files(folder)
    try:
        with limited(SECONDS, argv), heard() as said:
            main(argv)
        return None
    except Accepted:
        return None
    except SystemExit as stop:
        if stop.code == 0:
            return None
        assert stop.code == 2, f"exit code {stop.code}, expected 2, for {argv}"
    changed = set(files(folder).items()) ^ set(before.items())
    assert not changed, f"a refused command changed {changed}"
    return the_one_line(said.getvalue().splitlines(), argv)


def the_one_line(lines: list[str], argv: list[str]) -> str:
    if lines[0].startswith("usage:"):      # argparse says how to call it, and then its line
        lines = [line for line in lines[1:] if not line.startswith(" ")]
    assert len(lines) == 1, f"one line says what is wrong; {argv} got {lines}"
    line = lines[0]
    assert line.strip(), f"one line says what is wrong; {argv} got {lines}"
    assert len(line) < 2000, f"one line, and not a book: {line[:200]}..."
    return line


@pytest.fixture(scope="module")
def good() -> Content:
    """A small checkpoint, as bytes."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "good.pt"
        save_model(path, VideoDiT(TINY), data="shapes", stage="tf", steps=0, seed=0)
        return Content(path.read_bytes())


@contextlib.contextmanager
def folder_with(name: str, content) -> Iterator[Path]:
    """A folder that holds one file: bytes, or what torch.save makes of anything else."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        yield path


def play(content) -> str | None:
    """What `python sample.py` says to this checkpoint; it really plays what it accepts."""
    with folder_with("bad.pt", content) as path:
        folder = path.parent
        argv = [f"--checkpoint={path}", f"--out={folder / 'clip.gif'}", "--device=cpu",
                "--frames=3", "--steps=1", "--prompt=slow red disc"]
        return ask(sample.main, argv, folder)


def same(name: str, data: bytes) -> bytes:
    return data


def zipped(content: dict, compression=zipfile.ZIP_STORED, edit: Callable = same) -> bytes:
    """torch.save, taken apart and put together again with right checksums: what a forger can
    do. `edit` maps the name and the bytes of a member to other bytes."""
    plain = io.BytesIO()
    made = io.BytesIO()
    torch.save(content, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(made, "w", compression) as new:
        for member in old.infolist():
            data = edit(member.filename, old.read(member))
            new.writestr(member.filename, data)
    return made.getvalue()


# ---- checkpoints -----------------------------------------------------------------------------

HUGE = [2**31, 2**63, 2**64, 10**30, -(2**63) - 1]
numbers = st.one_of(st.integers(-3, 40), st.integers(), st.sampled_from(HUGE))
words = st.text(st.characters(codec="utf-8"), max_size=12)
values = st.one_of(st.none(), st.booleans(), numbers, st.floats(), words)


def collections(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3))


plain = st.recursive(values, collections, max_leaves=6)


@st.composite
def places(draw, content: bytearray) -> int:
    """Anywhere, but often near an end: that is where headers stand."""
    last = max(len(content) - 1, 0)
    at = draw(st.integers(0, last))
    if draw(st.booleans()):
        return at
    if draw(st.booleans()):
        return at % 200
    return max(last - at % 200, 0)


@st.composite
def damage(draw, content: bytes) -> bytes:
    """Bytes flipped, cut, doubled, or put elsewhere."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(("flip", "byte", "cut", "drop", "double", "noise")))
        at = draw(places(content))
        n = draw(st.integers(1, 64))
        if kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte" and content:
            content[at] = draw(st.sampled_from((0, 1, 0x7F, 0x80, 0xFF)))
        elif kind == "cut":
            content = content[:at]
        elif kind == "drop":
            del content[at:at + n]
        elif kind == "double":
            content[at:at] = content[at:at + n]
        else:
            content[at:at + n] = draw(st.binary(min_size=n, max_size=n))
    return bytes(content)


@many
@given(data=st.data())
def test_a_damaged_checkpoint_is_refused_or_as_good_as_new(good, data):
    """A byte may be flipped where nothing is stored, e.g. in a zip's padding; then what is read
    must be what was written."""
    content = data.draw(damage(good))
    if play(content) is not None:
        return
    with folder_with("bad.pt", content) as path:
        model, about = load_model(path)
    with folder_with("good.pt", good) as path:
        expected, facts = load_model(path)
    assert about == facts
    assert model.config == expected.config
    weights = model.state_dict()
    for name, value in expected.state_dict().items():
        same_numbers = torch.equal(weights[name], value)
        assert same_numbers, f"{name} was read with other numbers and nobody noticed"


DTYPES = (torch.float32, torch.float64, torch.int8, torch.bool, torch.complex64, torch.bfloat16,
          torch.float8_e4m3fn)


def with_other_settings(content: dict, draw: Callable) -> dict:
    names = st.sampled_from(sorted(content["config"]))
    for name in draw(st.lists(names, min_size=1, max_size=3)):
        content["config"][name] = draw(st.one_of(plain, st.integers(1, 40)))
    return content


def with_another_tensor(content: dict, draw: Callable) -> dict:
    name = draw(st.sampled_from(sorted(content["model"])))
    value = content["model"][name].to(draw(st.sampled_from(DTYPES)))
    others = [value, value[None], value[:0]]
    others.append(value.T if value.dim() == 2 else value)
    content["model"][name] = draw(st.one_of(st.sampled_from(others), plain))
    return content


def with_other_facts(content: dict, draw: Callable) -> dict:
    content["about"] = draw(st.one_of(plain, st.fixed_dictionaries({"data": plain})))
    return content


def of_anything(content: dict, draw: Callable) -> dict:
    shape = {"config": plain, "model": plain, "about": plain}
    return draw(st.one_of(plain, st.fixed_dictionaries(shape)))


def with_another_pickle(content: dict, draw: Callable) -> bytes:
    damaged = draw(st.booleans())

    def edit(name: str, member: bytes) -> bytes:
        if not name.endswith(".pkl"):
            return member
        if damaged:
            return draw(damage(member))
        return draw(st.binary(max_size=60))

    return zipped(content, edit=edit)


def of_another_model(content: dict, draw: Callable) -> dict:
    def one_of(*choices):
        return draw(st.sampled_from(choices))

    chunk = one_of(1, 2, 3)
    config = dict(
        attention=one_of("mla", "dense"), norm=one_of(True, False),
        dim=one_of(16, 24), heads=one_of(1, 2), layers=one_of(1, 2), ffn=one_of(1, 8),
        latent=one_of(1, 4), query_latent=one_of(1, 4), rope=6,
        channels=one_of(1, 2, 3, 4), height=one_of(2, 4, 8), width=one_of(2, 4, 8),
        patch=one_of(1, 2), words=one_of(1, 2, len(WORDS), 64), slots=one_of(1, 3, 5),
        chunk=chunk, frames=2 * chunk, window=2 * chunk)
    try:
        weights = VideoDiT(Config(**config)).state_dict()
    except ValueError:
        return content
    about = {"data": one_of("shapes", "digits", None)}
    return {"config": config, "model": weights, "about": about}


FORGERS = (with_other_settings, with_another_tensor, with_other_facts, of_anything,
           with_another_pickle, of_another_model)


@many
@given(data=st.data())
def test_a_checkpoint_of_anything_is_played_or_refused(good, data):
    """Right container, wrong content: settings, tensors and facts replaced at random, or a
    model of another size altogether."""
    content = torch.load(io.BytesIO(good), weights_only=True)
    forge = data.draw(st.sampled_from(FORGERS))
    play(forge(content, data.draw))


# ---- clip files ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def clips() -> dict[str, bytes]:
    """Small clip files of every kind that numpy and Pillow read."""
    video = np.random.default_rng(0).integers(0, 256, (2, 14, 8, 8, 3), dtype=np.uint8)
    made = {name: io.BytesIO() for name in ("a.npy", "f.npy", "a.npz", "c.npz", "a.gif")}
    np.save(made["a.npy"], video)
    np.save(made["f.npy"], (video / 255).astype(np.float32))
    np.savez(made["a.npz"], clips=video)
    np.savez_compressed(made["c.npz"], video=video)
    first, *others = [Image.fromarray(frame) for frame in video[0]]
    first.save(made["a.gif"], "GIF", save_all=True, append_images=others)
    return {name: Content(file.getvalue()) for name, file in made.items()}


def header(shape: tuple, dtype: str) -> bytes:
    """An .npy file that promises `shape` of `dtype` and holds 64 bytes."""
    file = io.BytesIO()
    promise = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, promise)
    return file.getvalue() + bytes(64)


LENGTHS = st.one_of(st.integers(0, 20), st.sampled_from((2**31, 2**62)))
KINDS = ("|u1", "<f4", ">f4", "<f8", "<f2", "<i8", "|b1", "<c8", "<U4", "|O", "<M8[s]", "<f16")


@st.composite
def wrong_clips(draw, clips: dict[str, bytes]) -> tuple[str, bytes]:
    """(name, content) of a damaged clip file, or of one whose header promises anything."""
    if draw(st.integers(0, 3)) > 0:
        name = draw(st.sampled_from(sorted(clips)))
        return name, draw(damage(clips[name]))
    shape = tuple(draw(st.lists(LENGTHS, max_size=6)))
    content = header(shape, draw(st.sampled_from(KINDS)))
    if draw(st.booleans()):
        return "h.npy", content
    archive = io.BytesIO()                         # the same inside one, with a right checksum
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("clips.npy", content)
    return "h.npz", archive.getvalue()


def start_training(*parts, **named):
    """Instead of a Trainer: reads the clips that it was given, and stops."""
    given = [*parts, *named.values()]
    world = next(part for part in given if isinstance(part, Clips))
    video, _ = world.batch(range(3))
    assert video.isfinite().all(), "clips must come as numbers in [-1, 1]"
    assert video.abs().max() <= 1, "clips must come as numbers in [-1, 1]"
    raise Accepted


@many
@given(data=st.data())
def test_a_damaged_clip_file_is_refused_or_read(clips, data):
    name, content = data.draw(wrong_clips(clips))
    with folder_with(name, content) as path, pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Trainer", start_training)
        argv = [f"--data={path}", f"--out={path.parent / 'out'}", "--device=cpu", *SMALL]
        ask(train.main, argv, path.parent)


def a_gif_bomb() -> bytes:
    """250 empty pictures on a screen of 9000 x 9000."""
    pictures = [Image.new("P", (1, 1), i) for i in range(250)]
    made = io.BytesIO()
    pictures[0].save(made, "GIF", save_all=True, append_images=pictures[1:], optimize=False)
    screen = (9000).to_bytes(2, "little") * 2
    content = made.getvalue()
    return content[:6] + screen + content[10:]


def write_an_archive_bomb(path: Path) -> None:
    """0.6 MB that unfold to 5 GB: 40 names for the same 128 MB of zeros."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("clips.npy", bytes(2**27))
        archive.filelist += archive.filelist * 39


def test_clip_files_that_would_fill_the_memory_are_refused_before_they_do(tmp_path):
    (tmp_path / "bomb.gif").write_bytes(a_gif_bomb())
    write_an_archive_bomb(tmp_path / "bomb.npz")
    for name, word in (("bomb.gif", "would fill the memory"), ("bomb.npz", "unfolds")):
        argv = [f"--data={tmp_path / name}", f"--out={tmp_path / 'out'}", "--device=cpu"]
        start = time.perf_counter()
        said = ask(train.main, argv, tmp_path)
        seconds = time.perf_counter() - start
        assert said and word in said, f"{name}: {said}"
        assert seconds < 5, f"{name}: refused, but only after {seconds:.0f} s"


# ---- flags -----------------------------------------------------------------------------------

@st.composite
def flags(draw, known: dict[str, st.SearchStrategy]) -> list[str]:
    """Some of a program's flags with values that fit and values that do not."""
    argv = []
    for name in draw(st.lists(st.sampled_from(sorted(known)), max_size=4)):
        fitting = known[name]
        value = draw(st.one_of(fitting, fitting, numbers, st.floats(), words))
        argv.append(f"--{name}={value}")
    if draw(st.integers(0, 9)) == 0:
        argv.append(" ".join(draw(words).split()))
    return argv


SAMPLE = dict(
    prompt=st.lists(st.sampled_from([*WORDS, "purple", "48:"])).map(" ".join),
    frames=numbers, steps=numbers, evaluate=numbers, seed=numbers,
    sampler=st.sampled_from(["euler", "consistency"]), guidance=st.floats(),
    route=st.sampled_from(["auto", "reference", "materialised", "absorbed", "fused"]),
    device=st.sampled_from(["cpu", "cuda", "cuda:7", "mps", "meta", "cpu:1", "xla"]),
    checkpoint=words, out=words)


@many
@given(argv=flags(SAMPLE))
def test_sample_answers_any_flags(good, argv):
    def begin(*arguments, **named):
        raise Accepted
        yield

    if len(argv) % 2:
        argv = [*argv, "--pictures"]
    with folder_with("good.pt", good) as path, pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)
        patch.setattr(sample, "rollout", begin)
        ask(sample.main, [f"--checkpoint={path}", *argv], path.parent)


setting = st.builds("{}={}".format, st.sampled_from(sorted(asdict(TINY))),
                    st.one_of(st.integers(1, 64), numbers))
TRAIN = {
    "save-every": numbers, "steps": numbers, "batch": numbers, "evaluate": numbers,
    "curve": numbers, "seed": numbers, "start": words, "score": words, "out": words,
    "attention": st.sampled_from(["mla", "dense"]),
    "data": st.sampled_from(["shapes", "digits", "occluder"]),
    "config": st.one_of(setting, words),
    "stage": st.sampled_from(["tf", "cd", "score", "dmd", "all"]),
    "preset": st.sampled_from(sorted(PRESETS)),
    "device": SAMPLE["device"]}


@many
@given(argv=flags(TRAIN))
def test_train_answers_any_flags(argv):
    if len(argv) % 2:
        argv = [*argv, "--deterministic"]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train, "Trainer", start_training)
        ask(train.main, [f"--out={folder}/out", *SMALL, *argv], Path(folder))


# ---- runs ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def started() -> Content:
    """The train.pt of a small run."""
    with tempfile.TemporaryDirectory() as folder, heard():
        train.main([*TWO_STEPS, f"--out={folder}"])
        return Content((Path(folder) / "train.pt").read_bytes())


@st.composite
def wrong_runs(draw, started: bytes) -> bytes | dict:
    if draw(st.booleans()):
        return draw(damage(started))
    content = torch.load(io.BytesIO(started), weights_only=True)
    names = sorted(content)
    others = [content[name] for name in names]
    content[draw(st.sampled_from(names))] = draw(st.one_of(plain, st.sampled_from(others)))
    return content


@many
@given(data=st.data())
def test_a_damaged_run_is_refused_or_goes_on(started, data):
    """From a damaged train.pt, or one with a part replaced; the file is never touched."""
    def begin(trainer, *arguments, **named):
        raise Accepted

    content = data.draw(wrong_runs(started))
    resume = ["--resume"] * data.draw(st.sampled_from((1, 1, 1, 0)))
    with folder_with("train.pt", content) as path, pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train", begin)
        ask(train.main, [*TWO_STEPS, f"--out={path.parent}", *resume], path.parent)
