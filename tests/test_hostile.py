"""Bad input by the thousand: flags, settings, clip files, checkpoints (test_forged.py has those made by hand). Claims, each held by calling
`main` in this process: no traceback, no hang, exit code 2 with one line, nothing in the folder changed, and no code of a checkpoint executed.

    pytest tests/test_hostile.py                                  60 generated inputs per property
    HYPOTHESIS_PROFILE=thorough pytest tests/test_hostile.py      2,500 per property, more than 10,000 in all
"""

import contextlib
import hashlib
import io
import signal
import tempfile
import time
import warnings
import zipfile
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
from checkpoint import load_model, save_model
from mla_video import PRESETS, Config, VideoDiT
from toy_data import WORDS, Clips

TINY = replace(PRESETS["toy"], dim=32, layers=1, heads=2, latent=8, query_latent=16, rope=6, ffn=32, words=len(WORDS))
SMALL = [f"--config={name}={getattr(TINY, name)}" for name in ("dim", "layers", "heads", "latent", "query_latent", "rope", "ffn")]
many = settings(max_examples=60 if settings().max_examples <= 40 else 2500, phases=[Phase.generate])  # shrinking a hang takes an hour
SECONDS = 20                                               # a refusal takes milliseconds


class Content(bytes):
    """Bytes that do not fill the screen when a test fails."""
    def __repr__(self):
        return f"<{len(self)} bytes>"


class Accepted(Exception):
    """The input was good and the work would begin."""


def files(folder: Path) -> dict[str, str]:
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def ask(main, argv: list[str], folder: Path) -> str | None:
    """The one line of a refusal, None if the input was accepted; AssertionError if the program did anything else."""
    before, said = files(folder), io.StringIO()

    def hung(number, frame):
        raise AssertionError(f"still busy after {SECONDS} s with {argv}")

    signal.signal(signal.SIGPROF, hung)                    # its own seconds: those of a busy machine's other work do not count
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("always")                # a warning is a second line
            warnings.showwarning = lambda message, kind, *where: print(f"{kind.__name__}: {message}", file=said)
            main(argv)
        return None
    except Accepted:
        return None
    except SystemExit as stop:
        if stop.code == 0:
            return None
        lines = said.getvalue().splitlines()
        if lines[0].startswith("usage:"):                  # argparse says how to call it, then its one line
            lines = [line for line in lines[1:] if not line.startswith(" ")]
        assert stop.code == 2, f"exit code {stop.code}, expected 2, for {argv}"
        assert len(lines) == 1 and lines[0].strip(), f"one line says what is wrong; {argv} got {lines}"
        assert len(lines[0]) < 2000, f"one line, and not a book: {lines[0][:200]}..."
        assert files(folder) == before, f"a refused command changed {set(files(folder).items()) ^ set(before.items())}"
        return lines[0]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


@pytest.fixture(scope="module")
def good() -> Content:
    """A small checkpoint, as bytes."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder) / "good.pt", VideoDiT(TINY), data="shapes", stage="tf", steps=0, seed=0)
        return Content((Path(folder) / "good.pt").read_bytes())


@contextlib.contextmanager
def folder_with(name: str, content):
    """A folder that holds one file: bytes, or what torch.save makes of anything else."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        yield path


def play(content) -> str | None:
    """What `python sample.py` says to this checkpoint; it really plays what it accepts."""
    with folder_with("bad.pt", content) as path:
        return ask(sample.main, [f"--checkpoint={path}", f"--out={path.parent / 'clip.gif'}", "--frames=3", "--steps=1",
                                 "--prompt=slow red disc", "--device=cpu"], path.parent)


def zipped(content: dict, compression: int = zipfile.ZIP_STORED, edit=lambda name, data: data) -> bytes:
    """torch.save, taken apart and put together again with right checksums: what a forger can do."""
    plain, made = io.BytesIO(), io.BytesIO()
    torch.save(content, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(made, "w", compression) as new:
        for member in old.infolist():
            new.writestr(member.filename, edit(member.filename, old.read(member)))
    return made.getvalue()


# ---- by the thousand ------------------------------------------------------------------------------------------------

numbers = st.one_of(st.integers(-3, 40), st.integers(), st.sampled_from([2**31, 2**63, 2**64, 10**30, -(2**63) - 1]))
words = st.text(st.characters(codec="utf-8"), max_size=12)
plain = st.recursive(st.one_of(st.none(), st.booleans(), numbers, st.floats(), words),
                     lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)), max_leaves=6)


@st.composite
def damage(draw, content: bytes) -> bytes:
    """Bytes flipped, cut, doubled, or put elsewhere."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        kind, at = draw(st.sampled_from(("flip", "byte", "cut", "drop", "double", "noise"))), draw(st.integers(0, max(len(content) - 1, 0)))
        if draw(st.booleans()):                            # headers stand at both ends
            at = at % 200 if draw(st.booleans()) else max(len(content) - 1 - at % 200, 0)
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
    """A byte may be flipped where nothing is stored, e.g. in a zip's padding; then what is read must be what was written."""
    content = data.draw(damage(good))
    if play(content) is None:
        with folder_with("bad.pt", content) as path, folder_with("good.pt", good) as other:
            (model, about), (expected, facts) = load_model(path), load_model(other)
        assert about == facts and model.config == expected.config
        for name, value in expected.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), f"{name} was read with other numbers and nobody noticed"


@many
@given(data=st.data())
def test_a_checkpoint_of_anything_is_played_or_refused(good, data):
    """Right container, wrong content: settings, tensors and facts replaced at random, or a model of another size altogether."""
    content = torch.load(io.BytesIO(good), weights_only=True)
    kind = data.draw(st.sampled_from(("config", "weights", "about", "top", "pickle", "other")))
    if kind == "config":
        for name in data.draw(st.lists(st.sampled_from(sorted(content["config"])), min_size=1, max_size=3)):
            content["config"][name] = data.draw(st.one_of(plain, st.integers(1, 40)))
    elif kind == "weights":
        name = data.draw(st.sampled_from(sorted(content["model"])))
        kinds = torch.float32, torch.float64, torch.int8, torch.bool, torch.complex64, torch.bfloat16, torch.float8_e4m3fn
        value = content["model"][name].to(data.draw(st.sampled_from(kinds)))
        others = value, value[None], value[:0], value.T if value.dim() == 2 else value
        content["model"][name] = data.draw(st.one_of(st.sampled_from(others), plain))
    elif kind == "about":
        content["about"] = data.draw(st.one_of(plain, st.fixed_dictionaries({"data": plain})))
    elif kind == "top":
        content = data.draw(st.one_of(plain, st.fixed_dictionaries({"config": plain, "model": plain, "about": plain})))
    elif kind == "pickle":
        noise = data.draw(st.sampled_from((lambda d: data.draw(damage(d)), lambda d: data.draw(st.binary(max_size=60)))))
        content = zipped(content, edit=lambda name, member: noise(member) if name.endswith(".pkl") else member)
    else:
        draw = lambda *choices: data.draw(st.sampled_from(choices))
        chunk = draw(1, 2, 3)
        config = dict(dim=draw(16, 24), heads=draw(1, 2), layers=draw(1, 2), latent=draw(1, 4), query_latent=draw(1, 4), rope=6,
                      ffn=draw(1, 8), channels=draw(1, 2, 3, 4), height=draw(2, 4, 8), width=draw(2, 4, 8), patch=draw(1, 2),
                      words=draw(1, 2, len(WORDS), 64), slots=draw(1, 3, 5), chunk=chunk, frames=2 * chunk, window=2 * chunk,
                      norm=draw(True, False), attention=draw("mla", "dense"))
        with contextlib.suppress(ValueError):
            weights = VideoDiT(Config(**config)).state_dict()
            content = {"config": config, "model": weights, "about": {"data": draw("shapes", "digits", None)}}
    play(content)


@pytest.fixture(scope="module")
def clips() -> dict[str, bytes]:
    """Small clip files of every kind that numpy and Pillow read."""
    video = np.random.default_rng(0).integers(0, 256, (2, 14, 8, 8, 3), dtype=np.uint8)
    made = {name: io.BytesIO() for name in ("a.npy", "f.npy", "a.npz", "c.npz", "a.gif")}
    np.save(made["a.npy"], video)
    np.save(made["f.npy"], (video / 255).astype(np.float32))
    np.savez(made["a.npz"], clips=video)
    np.savez_compressed(made["c.npz"], video=video)
    first, *rest = [Image.fromarray(frame) for frame in video[0]]
    first.save(made["a.gif"], "GIF", save_all=True, append_images=rest)
    return {name: Content(file.getvalue()) for name, file in made.items()}


def header(shape, dtype) -> bytes:
    """An .npy file that promises `shape` of `dtype` and holds 64 bytes."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(64)


def start_training(*parts, **rest):
    """Instead of a Trainer: reads the clips that it was given, and stops."""
    world = next(part for part in (*parts, *rest.values()) if isinstance(part, Clips))
    video, _ = world.batch(range(3))
    assert video.isfinite().all() and video.abs().max() <= 1, "clips must come as numbers in [-1, 1]"
    raise Accepted


@many
@given(data=st.data())
def test_a_damaged_clip_file_is_refused_or_read(clips, data):
    name = data.draw(st.sampled_from(sorted(clips)))
    if data.draw(st.integers(0, 3)) == 0:                  # a header of any kind before 64 bytes
        shape = tuple(data.draw(st.lists(st.one_of(st.integers(0, 20), st.sampled_from((2**31, 2**62))), max_size=6)))
        dtype = data.draw(st.sampled_from(("|u1", "<f4", ">f4", "<f8", "<f2", "<i8", "|b1", "<c8", "<U4", "|O", "<M8[s]", "<f16")))
        content, name = header(shape, dtype), "h.npy"
    else:
        content = data.draw(damage(clips[name]))
    if name == "h.npy" and data.draw(st.booleans()):       # the same inside an archive, with a right checksum
        archive, name = io.BytesIO(), "h.npz"
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("clips.npy", content)
        content = archive.getvalue()
    with folder_with(name, content) as path, pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "Trainer", start_training)
        ask(train.main, [f"--data={path}", f"--out={path.parent / 'out'}", "--device=cpu", *SMALL], path.parent)


def test_clip_files_that_would_fill_the_memory_are_refused_before_they_do(tmp_path):
    """A GIF of 300 empty pictures on a screen of 9000 x 9000, and an archive of 0.6 MB that unfolds to 5 GB."""
    pictures, made = [Image.new("P", (1, 1), i) for i in range(250)], io.BytesIO()
    pictures[0].save(made, "GIF", save_all=True, append_images=pictures[1:], optimize=False)
    screen = (9000).to_bytes(2, "little") * 2
    (tmp_path / "bomb.gif").write_bytes(made.getvalue()[:6] + screen + made.getvalue()[10:])
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("clips.npy", bytes(2**27))
        archive.filelist += archive.filelist * 39          # 40 names for the same 128 MB of zeros
    for name, word in (("bomb.gif", "would fill the memory"), ("bomb.npz", "unfolds")):
        start = time.perf_counter()
        said = ask(train.main, [f"--data={tmp_path / name}", f"--out={tmp_path / 'out'}", "--device=cpu"], tmp_path)
        assert said and word in said, f"{name}: {said}"
        assert time.perf_counter() - start < 5, f"{name}: refused, but only after {time.perf_counter() - start:.0f} s"


@st.composite
def flags(draw, known: dict[str, st.SearchStrategy]) -> list[str]:
    """Some of a program's flags with values that fit and values that do not."""
    chosen = draw(st.lists(st.sampled_from(sorted(known)), max_size=4))
    argv = [f"--{name}={draw(st.one_of(known[name], known[name], numbers, st.floats(), words))}" for name in chosen]
    return argv + ([" ".join(draw(words).split())] if draw(st.integers(0, 9)) == 0 else [])


SAMPLE = dict(prompt=st.lists(st.sampled_from([*WORDS, "purple", "48:"])).map(" ".join), frames=numbers, steps=numbers,
              evaluate=numbers, seed=numbers, sampler=st.sampled_from(["euler", "consistency"]),
              guidance=st.floats(), route=st.sampled_from(["auto", "reference", "materialised", "absorbed", "fused"]),
              device=st.sampled_from(["cpu", "cuda", "cuda:7", "mps", "meta", "cpu:1", "xla"]), checkpoint=words, out=words)


@many
@given(argv=flags(SAMPLE))
def test_sample_answers_any_flags(good, argv):
    def begin(*arguments, **rest):
        raise Accepted
        yield

    with folder_with("good.pt", good) as path, pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)
        patch.setattr(sample, "rollout", begin)
        ask(sample.main, [f"--checkpoint={path}", *argv, *["--pictures"] * (len(argv) % 2)], path.parent)


sizes = st.sampled_from(sorted(asdict(TINY)))
settings_of_a_config = st.one_of(st.builds("{}={}".format, sizes, st.one_of(st.integers(1, 64), numbers)), words)
TRAIN = {"save-every": numbers} | dict(attention=st.sampled_from(["mla", "dense"]), data=st.sampled_from(["shapes", "digits", "occluder"]), steps=numbers,
             batch=numbers, config=settings_of_a_config, evaluate=numbers, curve=numbers, seed=numbers, start=words, score=words,
             stage=st.sampled_from(["tf", "cd", "score", "dmd", "all"]),
             preset=st.sampled_from(sorted(PRESETS)), device=SAMPLE["device"], out=words)


@many
@given(argv=flags(TRAIN))
def test_train_answers_any_flags(argv):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(train, "Trainer", start_training)
        ask(train.main, [f"--out={folder}/out", *SMALL, *argv, *["--deterministic"] * (len(argv) % 2)], Path(folder))


@pytest.fixture(scope="module")
def started() -> Content:
    """The train.pt of a small run."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train.main([*SMALL, "--steps=2", "--batch=2", "--evaluate=0", "--device=cpu", f"--out={folder}"])
        return Content((Path(folder) / "train.pt").read_bytes())


@many
@given(data=st.data())
def test_a_damaged_run_is_refused_or_goes_on(started, data):
    """`--resume` from a damaged train.pt, or from one with a part replaced; the file is never touched."""
    if data.draw(st.booleans()):
        content = data.draw(damage(started))
    else:
        content = torch.load(io.BytesIO(started), weights_only=True)
        part = data.draw(st.sampled_from(sorted(content)))
        content[part] = data.draw(st.one_of(plain, st.sampled_from([content[other] for other in sorted(content)])))

    def begin(trainer, *arguments, **rest):
        raise Accepted

    with folder_with("train.pt", content) as path, pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train", begin)
        argv = [*SMALL, "--steps=2", "--batch=2", "--evaluate=0", "--device=cpu", f"--out={path.parent}"]
        ask(train.main, argv + ["--resume"] * data.draw(st.sampled_from((1, 1, 1, 0))), path.parent)
