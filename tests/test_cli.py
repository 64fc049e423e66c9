"""What a user types. Good input gives a file. Bad input gives one line that says what is wrong
and what would be right, exit code 2, no traceback, and nothing already written is lost. A
mistake in the program itself, such as a student makes in the model, gives a traceback.
"""

import json
import os
import re
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import mla_video
import sample
import train
from cache import RollingCache
from engine import command_line
from engine.checkpoint import save_model, write_atomically
from engine.command_line import UserError, as_user_error, provenance
from engine.judging import cache_line
from engine.video_files import GifWriter, to_pixels
from experiments import endurance
from mla_video import PRESETS, Config, VideoDiT
from toy_data import WORDS, decode_caption

ROOT = Path(__file__).parent.parent
SIZES = dict(dim=32, layers=1, heads=2, latent=8, query_latent=16, rope=6, ffn=32)
TINY = replace(PRESETS["toy"], **SIZES, words=len(WORDS))
SMALL = [f"--config={name}={value}" for name, value in SIZES.items()]
ONE_STEP = [*SMALL, "--device=cpu", "--batch=2", "--steps=1", "--evaluate=0"]


@pytest.fixture
def model_file(tmp_path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "model.pt"
    save_model(path, VideoDiT(TINY), data="shapes", stage="tf", steps=0, seed=0)
    return path


def fails_in_one_line(capsys, main, argv: list[str], *words: str, at_most=10_000) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    errors = [line for line in capsys.readouterr().err.splitlines() if line]
    assert stop.value.code == 2, f"exit code {stop.value.code}, expected 2"
    assert "Traceback" not in "".join(errors)
    if errors[0].startswith("usage:"):     # argparse says how to call it, and then its line
        errors = errors[-1:]
    assert len(errors) == 1, f"one line is enough: {errors}"
    assert len(errors[0]) <= at_most, f"a page in one line is no line: {errors[0]}"
    for word in words:
        assert word in errors[0], f"the message should say {word!r}: {errors[0]}"


# ---- train -----------------------------------------------------------------------------------

@pytest.mark.parametrize("flags, words", [
    (["--data=missing.npy"], ["missing.npy"]),
    (["--config=height=15", "--config=width=15"], ["patches of 4", "multiple"]),
    (["--config=rope=7"], ["even number"]),
    (["--config=rope=32"], ["no content channel"]),
    (["--config=window=3", "--config=sink=1"], ["window of 3", "at least 4"]),
    (["--config=window=24"], ["longer than the 12 frames"]),
    (["--config=heads=5"], ["5 heads do not divide"]),
    (["--config=frames=10"], ["whole chunks"]),
    (["--config=colour=3"], ["NAME=N", "window"]),
    (["--config=layers=0"], ["layers must be an integer, 1 to 1024"]),
    (["--steps=0"], ["--steps must be at least 1"]),
    (["--device=quantum"], ["quantum"]),
    (["--attention=sparse"], ["sparse", "mla"]),
    (["--resume"], ["there is no checkpoint"]),
    (["--stage=score", "--curve=5"], ["--curve", "shapes, digits, occluder", "score model"]),
])
def test_train_refuses(capsys, tmp_path, flags, words):
    fails_in_one_line(capsys, train.main, [f"--out={tmp_path / 'out'}", *flags], *words)
    assert not (tmp_path / "out").exists(), "a refused command must not write anything"


def test_train_does_not_overwrite_a_run(capsys, tmp_path):
    (tmp_path / "train.pt").write_bytes(b"precious")
    there = f"--out={tmp_path}"
    fails_in_one_line(capsys, train.main, [there], "train.pt", "not a readable checkpoint")
    assert (tmp_path / "train.pt").read_bytes() == b"precious"


@pytest.mark.rest
def test_a_stage_says_what_it_may_start_from(capsys, tmp_path):
    score = f"{tmp_path}/score.pt"
    there = f"--out={tmp_path}"
    elsewhere = f"--out={tmp_path}/new"

    def refused(flags: list[str], *words: str) -> None:
        fails_in_one_line(capsys, train.main, [*ONE_STEP, *flags], *words)

    train.main([*ONE_STEP, "--stage=score", there])
    capsys.readouterr()
    refused(["--stage=cd", there], "needs a tf model", "tf.pt", "--stage tf", "--start")
    refused(["--stage=cd", there, f"--start={score}"], "its stage is score", "tf is needed")
    refused(["--stage=tf", "--attention=dense", there], "its attention is mla",
            "dense is needed")
    refused(["--stage=tf", "--config=latent=4", there], "its latent is 8", "4 is needed")
    refused(["--stage=tf", "--data=occluder", there], "its data is shapes", "and occluder",
            "is needed")
    refused(["--stage=all", "--start=x", elsewhere], "--start", "--stage all")
    refused(["--stage=score", "--start=x", elsewhere], "--start", "--stage score")
    refused(["--stage=tf", "--score=x", elsewhere], "--score for dmd", "--stage tf")
    plays_no_score = [f"--checkpoint={score}"]
    fails_in_one_line(capsys, sample.main, plays_no_score, "is a score model", "tf, cd, dmd")

    train.main([*ONE_STEP, "--stage=tf", there])
    said = capsys.readouterr().out
    assert "starts from " + score in said, "tf starts from the score model that is there"
    train.main([*ONE_STEP, "--stage=cd", there])
    capsys.readouterr()
    (tmp_path / "score.pt").rename(tmp_path / "elsewhere.pt")
    refused(["--stage=dmd", there], "needs a score model", "--score")
    train.main([*ONE_STEP, "--stage=dmd", there, f"--score={tmp_path}/elsewhere.pt"])
    made = {path.name for path in tmp_path.iterdir()}
    assert {"tf.pt", "cd.pt", "dmd.pt", "model.pt"} <= made


@pytest.mark.rest
def test_all_stages_in_one_command_with_their_curves(tmp_path):
    """A score model cannot stream, so it has no curve; the other stages do."""
    flags = [*SMALL, "--config=frames=6", "--config=window=6", "--device=cpu", "--batch=2",
             "--steps=2", "--evaluate=0", "--stage=all", "--curve=2", f"--out={tmp_path}"]
    train.main(flags)
    steps = {}
    for stage in train.STAGES:
        report = json.loads((tmp_path / f"report_{stage}.json").read_text())
        steps[stage] = [point["step"] for point in report["curve"]]
    assert steps == {"score": [], "tf": [2], "cd": [2], "dmd": [2]}


def test_resume_names_what_differs(capsys, tmp_path):
    flags = [*ONE_STEP, f"--out={tmp_path}"]

    def refused(more: list[str], *words: str) -> None:
        fails_in_one_line(capsys, train.main, [*flags, *more], *words)

    train.main(flags)
    capsys.readouterr()
    before = (tmp_path / "train.pt").read_bytes()
    refused([], "--resume", "--out", "stage tf, step 1")
    refused(["--stage=all"], "--resume", "--out")
    refused(["--stage=cd", "--resume"], "at stage tf", "cd")
    refused(["--resume", "--config=latent=4"], "latent", "8", "4")
    refused(["--resume", "--attention=dense"], "dense", "mla")
    refused(["--resume", "--seed=1"], "seed")
    assert (tmp_path / "train.pt").read_bytes() == before


# ---- sample ----------------------------------------------------------------------------------

class Hostile:
    def __reduce__(self):
        return exec, ("open('owned', 'w').write('code ran')",)


def spoiled(kind: str, good: Path) -> bytes | dict:
    content = torch.load(good, weights_only=True)
    if kind == "truncated":
        return good.read_bytes()[:-500]
    if kind == "text":
        return b"this is not a checkpoint"
    if kind == "code":
        return pickle.dumps(Hostile())
    if kind == "other config":
        content["config"]["dim"] = 64
    if kind == "impossible config":
        content["config"]["heads"] = 7
    if kind == "unknown setting":
        content["config"]["colour"] = 3
    if kind == "other model":
        content = {"state_dict": content["model"]}
    if kind == "nan":
        content["model"]["head.weight"].fill_(torch.nan)
    if kind == "no tensors":
        content["model"] = {"head.weight": "a string"}
    return content


@pytest.mark.parametrize("kind, words", [
    ("missing", ["there is no checkpoint"]),
    ("truncated", ["not a readable checkpoint"]),
    ("text", ["not a readable checkpoint"]),
    ("code", ["not a readable checkpoint"]),
    ("other config", ["of another config", "tensors differ"]),
    ("impossible config", ["7 heads"]),
    ("unknown setting", ["colour"]),
    ("other model", ["lacks"]),
    ("nan", ["NaN"]),
    ("no tensors", ["tensors"]),
])
def test_sample_refuses_a_bad_checkpoint(
        capsys, tmp_path, model_file, kind, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pt"
    if kind != "missing":
        content = spoiled(kind, model_file)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
    flags = [f"--checkpoint={path}", "--out=clip.gif"]
    fails_in_one_line(capsys, sample.main, flags, *words)
    assert not Path("owned").exists(), "code from a checkpoint was executed"
    assert not Path("clip.gif").exists()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
SAFETENSORS = b"\x10\0\0\0\0\0\0\0" + b'{"a":{"dtype":1}}' + b"\0" * 8


@pytest.mark.parametrize("kind, words", [
    ("training state", ["train.pt is a training state", "model.pt"]),
    ("folder of a run that goes on", ["no model.pt yet", "training state"]),
    ("empty folder", ["no checkpoint model.pt in the folder"]),
    ("Hugging Face", ["Hugging Face"]),
    ("safetensors", ["--text FILE"]),
    ("safetensors by another name", ["--text FILE"]),
    ("pointer", ["Git LFS", "git lfs pull"]),
])
def test_a_checkpoint_of_another_kind_is_named(capsys, tmp_path, kind, words):
    path = tmp_path / "run"
    path.mkdir()
    if kind in ("training state", "folder of a run that goes on"):
        write_atomically(path / "train.pt", {"step": 3, "recipe": {}, "config": {}})
    if kind == "training state":
        path = path / "train.pt"
    if kind == "Hugging Face":
        (path / "config.json").write_text("{}")
        (path / "pytorch_model.bin").write_bytes(LFS)
    if kind.startswith("safetensors"):
        path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pt")
        path.write_bytes(SAFETENSORS)
    if kind == "pointer":
        path = tmp_path / "toy.pt"
        path.write_bytes(LFS)
    fails_in_one_line(capsys, sample.main, [f"--checkpoint={path}"], *words, at_most=400)


def test_a_folder_is_as_good_as_its_model(capsys, model_file):
    sample.main([f"--checkpoint={model_file.parent}", "--about"])
    assert "stage        tf, 0 steps" in capsys.readouterr().out


def test_about_says_what_a_checkpoint_is(capsys, tmp_path, model_file):
    sample.main([f"--checkpoint={model_file}", f"--out={tmp_path / 'new'}", "--about"])
    said = capsys.readouterr().out
    for line in ("stage        tf, 0 steps of training, seed 0", "data         shapes",
                 "words        red green blue yellow magenta cyan, disc square triangle, slow fast",
                 "frames       3 x 16 x 16 pixels in patches of 4, 3 a chunk, 12 a training clip, "
                 "a window of 12", cache_line(VideoDiT(TINY), 1)):
        assert line in said.splitlines()
    assert "dim 32, layers 1, heads 2" in said
    assert not (tmp_path / "new").exists(), "no video was asked for"


def test_a_checkpoint_is_written_as_a_cpus(tmp_path):
    """A GPU's tensors would ask for a GPU when they are read. Where there is none, torch's
    device without memory stands for it: nothing can be copied from there to the CPU, so the
    attempt shows."""
    with torch.device("meta"):
        model = VideoDiT(TINY)
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        save_model(tmp_path / "model.pt", model)
    nested = {"learner": [{"moments": (torch.empty(2, device="meta"),)}]}
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):
        write_atomically(tmp_path / "train.pt", nested)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags, words", [
    (["--prompt=purple disc"], ["purple", "red"]),
    (["--prompt=red blue disc"], ["red", "blue"]),
    (["--prompt=white disc"], ["shapes has never seen", "white", "cyan"]),
    (["--prompt=disc", "--prompt=9: seven"], ["shapes has never seen", "seven"]),
    (["--prompt=48: red disc"], ["48: red disc", "before it"]),
    (["--frames=-1"], ["--frames"]),
    (["--steps=0"], ["--steps"]),
    (["--guidance=nan"], ["--guidance"]),
    (["--switch=jump"], ["jump", "recache"]),
    (["--start=missing.gif"], ["no clip and no picture", "missing.gif"]),
    (["--layout=NTHW"], ["--layout", "--start"]),
    (["--out=a.webp"], [".webp", ".gif, .mp4, .webm", "folder"]),
    (["--out=deep/a.avi"], [".avi", ".gif, .mp4, .webm"]),
    (["--evaluate=2", "--frames=11"], ["--evaluate", "at least 12 frames"]),
    (["--route=magic"], ["magic"]),
    (["--device=quantum"], ["quantum"]),
    (["--route=fused", "--device=cpu"], ["fused", "materialised"]),
    (["--device=mps"], ["'mps'"]),
    (["--pictures"], ["--pictures", "folder", "clip.gif"]),
    (["--pictures", "--out=clip.MP4"], ["--pictures", "folder", "clip.MP4"]),
])
def test_sample_refuses(capsys, tmp_path, model_file, flags, words):
    given = [f"--checkpoint={model_file}", f"--out={tmp_path / 'clip.gif'}", *flags]
    fails_in_one_line(capsys, sample.main, given, *words, at_most=400)
    assert not (tmp_path / "clip.gif").exists()


@pytest.mark.parametrize("flags", [[], ["--guidance=2"], ["--route=reference"],
                                   ["--route=materialised"], ["--route=absorbed"]])
def test_sample_writes_the_frames_it_was_asked_for(capsys, tmp_path, model_file, flags):
    out = tmp_path / "clip.gif"
    sample.main([f"--checkpoint={model_file}", f"--out={out}", "--frames=7", "--steps=2",
                 "--prompt=fast red disc", "--device=cpu", *flags])
    with Image.open(out) as gif:
        assert gif.n_frames == 7
        assert gif.size == (128, 128)
    said = capsys.readouterr().out
    assert "fast red disc" in said
    assert "frames/s" in said
    assert "% less" in said


def test_evaluate_prints_the_survival(capsys, model_file):
    sample.main([f"--checkpoint={model_file}", "--evaluate=2", "--frames=12", "--steps=1"])
    assert "2 rollouts of 12 frames" in capsys.readouterr().out
    for flag in ("--prompt=red disc", "--start=clip.gif", "--live", "--out=a.gif"):
        fails_in_one_line(capsys, sample.main, [f"--checkpoint={model_file}", "--evaluate=2", flag],
                          "leave out", flag.partition("=")[0])


def test_a_reader_who_has_enough_is_no_error(model_file):
    """`sample.py --about | head -1` ends without a word."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "sample.py", f"--checkpoint={model_file}", "--about"]
    done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 128 + 13


def test_another_pipe_that_breaks_is_a_mistake():
    """That of a worker or a film's encoder: no reader had enough."""
    program = """if 1:
        from engine.command_line import run
        def action(args):
            raise BrokenPipeError("the encoder is gone")
        run(action, None)"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "the encoder is gone" in done.stderr


def captions_heard(monkeypatch, model_file: Path, prompts: list[str], frames: int) -> list:
    """The captions, video by video, that the model is given for each chunk."""
    heard = []

    def listen(stream, frames, draws, **how):
        chunk = torch.zeros(len(stream.caption), TINY.chunk, 3, TINY.height, TINY.width)
        for _ in range(0, frames, TINY.chunk):
            heard.append([decode_caption(caption) for caption in stream.caption])
            yield chunk

    monkeypatch.setattr(sample, "rollout", listen)
    flags = [f"--prompt={prompt}" for prompt in prompts]
    sample.main([f"--checkpoint={model_file}", f"--out={model_file.parent}/clip.gif",
                 f"--frames={frames}", "--device=cpu", *flags])
    return heard


def test_a_caption_changes_with_the_chunk_that_begins_at_its_frame_or_after(
        capsys, monkeypatch, model_file):
    """Frame 4 lies within the chunk of frames 3 to 5, so the new caption begins with frame 6. A
    later change of one video keeps what another was told before."""
    prompts = ["slow red disc", "4: slow blue square", "slow red triangle", "9: fast red triangle",
               "6: slow cyan disc"]
    heard = captions_heard(monkeypatch, model_file, prompts, 15)
    assert heard == [["slow red disc", "slow red triangle"],           # frames 0 to 2
                     ["slow red disc", "slow red triangle"],           # 3 to 5
                     ["slow blue square", "slow cyan disc"],           # 6 to 8: "4:" and "6:"
                     ["slow blue square", "fast red triangle"],        # 9 to 11
                     ["slow blue square", "fast red triangle"]]        # 12 to 14
    said = capsys.readouterr().out
    for line in ("captions     slow red disc, slow red triangle",
                 "captions     from 4: slow blue square, slow red triangle",
                 "captions     from 6: slow blue square, slow cyan disc",
                 "captions     from 9: slow blue square, fast red triangle"):
        assert line in said.splitlines()


def test_a_caption_may_change_at_once(monkeypatch, model_file):
    heard = captions_heard(monkeypatch, model_file, ["fast red disc", "0: fast blue disc"], 3)
    assert heard == [["fast blue disc"]]


def test_words_that_are_left_out_are_drawn_by_seed_and_video(monkeypatch, model_file):
    """The same for all captions of a video, whatever stands beside it; none for no caption."""
    both = captions_heard(monkeypatch, model_file, ["red disc", "3: blue", "square", ""], 6)
    (first, other, silent), (later, *_) = both
    assert set(first.split()) > {"red", "disc"} and len(first.split()) == 3
    assert "square" in other and len(other.split()) == 3
    assert silent == ""
    assert later.split()[:2] == [first.split()[0], "blue"]
    alone = captions_heard(monkeypatch, model_file, ["red disc"], 3)
    assert alone == [[first]]


def test_what_is_never_shown_is_said(capsys, model_file):
    prompts = ["red disc", "9: blue disc", "7: green disc", "8: cyan disc", "0: magenta disc"]
    flags = [f"--prompt={prompt}" for prompt in prompts]
    sample.main([f"--checkpoint={model_file}", f"--out={model_file.parent}/clip.gif",
                 "--frames=12", "--steps=1", "--device=cpu", "--prompt=disc", *flags,
                 "--prompt=10: disc", "--prompt=12: square"])
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if "never shown" in line]
    assert len(said) == 5
    assert "from 9: " in out and "from 10: " not in out, f"no chunk begins behind frame 9: {out}"
    for start in ("'red disc' is never shown: '0: magenta disc' takes its place in the chunk "
                  "that begins at frame 0",
                  "'7: green disc' is never shown: '8: cyan disc'",
                  "'8: cyan disc' is never shown: '9: blue disc' takes its place in the chunk "
                  "that begins at frame 9",
                  "'10: disc' is never shown: the last of 12 frames",
                  "'12: square' is never shown"):
        assert any(line.startswith(f"warning: prompt {start}") for line in said), start


def test_progress_in_a_log_is_plain_lines(model_file):
    command = [sys.executable, "sample.py", f"--checkpoint={model_file}", "--frames=24",
               "--steps=1", "--device=cpu", f"--out={model_file.parent}/clip.gif"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"\r" not in done.stdout + done.stderr
    assert b"frames: 24/24" in done.stderr.splitlines()[-1]


def test_evaluate_says_how_far_it_is(capsys, model_file):
    sample.main([f"--checkpoint={model_file}", "--evaluate=2", "--frames=12", "--steps=1"])
    assert "12/12" in capsys.readouterr().err


def test_sample_leaves_the_gif_of_training_alone(capsys, tmp_path, model_file):
    """`train.py --out X` writes X/sample.gif, and so would `sample.py --out X`."""
    (tmp_path / "train.pt").write_bytes(b"a training state")
    (tmp_path / "sample.gif").write_bytes(b"the one of training")
    sample.main([f"--checkpoint={model_file}", f"--out={tmp_path}", "--frames=3", "--steps=1",
                 "--device=cpu"])
    assert (tmp_path / "sample.gif").read_bytes() == b"the one of training"
    assert f"wrote        {tmp_path / 'played.gif'}" in capsys.readouterr().out
    with Image.open(tmp_path / "played.gif") as gif:
        assert gif.n_frames == 3


@pytest.mark.parametrize("flags", [["--out=a.gif"], ["--out=deep"], ["--out=deep", "--pictures"]])
def test_one_process_at_a_time_writes_a_video(capsys, monkeypatch, tmp_path, model_file, flags):
    """A second one that comes while the first writes is told by whom, and harms nothing."""
    monkeypatch.chdir(tmp_path)
    given = [f"--checkpoint={model_file}", "--frames=6", "--steps=1", "--device=cpu", *flags]
    plain = sample.rollout

    def rollout(*arguments, **how):
        for chunk in plain(*arguments, **how):
            yield chunk
            monkeypatch.setattr(sample, "rollout", plain)
            capsys.readouterr()
            fails_in_one_line(capsys, sample.main, given, "another process", str(os.getpid()))

    monkeypatch.setattr(sample, "rollout", rollout)
    sample.main(given)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*"))
    if "--pictures" in flags:
        assert left == [*(f"deep/sample/{i:09d}.png" for i in range(6)), "model.pt"]
        return
    name = "a.gif" if "--out=a.gif" in flags else "deep/sample.gif"
    assert left == sorted([name, "model.pt"])
    with Image.open(name) as gif:
        assert gif.n_frames == 6


# ---- video files -----------------------------------------------------------------------------

def test_a_gif_is_whole_after_every_append(tmp_path):
    """What is on disk can be opened at any time, pure colours survive the palette, frames come
    back in order, and each ends at its sixteenth of a second, as nearly as a GIF can say it."""
    path = tmp_path / "clip.gif"
    gif = GifWriter(path)
    video = torch.full((1, 6, 3, 8, 8), -1.0)
    for i in range(6):
        video[0, i, i % 3] = 1.0                   # red, green, blue, red, ...
    for i in range(0, 6, 3):
        gif.append(to_pixels(video[:, i:i + 3], zoom=2))
        with Image.open(path) as picture:
            assert picture.n_frames == i + 3
            end = 0
            for frame in range(i + 3):
                picture.seek(frame)
                end += picture.info["duration"]
                assert end == 10 * round(100 * (frame + 1) / 16)
                expected = [0, 0, 0]
                expected[frame % 3] = 255
                pixel = picture.convert("RGB").getpixel((5, 5))
                assert list(pixel) == expected, f"frame {frame}"


INTERRUPTED = """
import sample, sys
plain = sample.rollout
def rollout(*args, **how):
    for i, chunk in enumerate(plain(*args, **how)):
        yield chunk
        if i == 4: raise KeyboardInterrupt
sample.rollout = rollout
sample.main(sys.argv[1:])
"""


@pytest.mark.parametrize("flags", [[], ["--pictures"]])
def test_ctrl_c_ends_an_endless_stream_with_a_valid_video(tmp_path, model_file, flags):
    """Interrupts from inside the stream, so that the test does not depend on timing."""
    command = [sys.executable, "-c", INTERRUPTED, f"--checkpoint={model_file}",
               f"--out={tmp_path}", "--frames=0", "--steps=1", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr[-500:]
    assert "Traceback" not in done.stderr, done.stderr[-500:]
    where = tmp_path / ("sample" if flags else "sample.gif")
    last = done.stderr.splitlines()[-1]
    assert last == f"stopped; {5 * TINY.chunk} frames are in {where}"
    if not flags:
        with Image.open(tmp_path / "sample.gif") as gif:
            assert gif.n_frames == 5 * TINY.chunk
        return
    pictures = sorted((tmp_path / "sample").iterdir())
    assert [path.name for path in pictures] == [f"{i:09d}.png" for i in range(5 * TINY.chunk)]
    for path in pictures:
        assert Image.open(path).convert("RGB").getbbox(), "a picture is black or cut short"


# ---- mistakes in the program itself ----------------------------------------------------------

MISTAKE = "a mistake in the model"
PLACES = {"a layer": (mla_video.Block, "forward"),
          "its construction": (mla_video.Block, "__init__"),
          "its formulas": (mla_video, "modulate"),
          "the cache": (RollingCache, "commit")}
MISTAKES = (ValueError, RuntimeError, TypeError, AssertionError)


def make_a_mistake(monkeypatch, place: str, kind: type[Exception]) -> None:
    def broken(*args, **how):
        raise kind(MISTAKE)

    owner, name = PLACES[place]
    monkeypatch.setattr(owner, name, broken)


@pytest.mark.parametrize("kind", MISTAKES)
@pytest.mark.parametrize("place", PLACES)
def test_a_mistake_in_the_model_is_not_taken_for_wrong_input(
        tmp_path, monkeypatch, model_file, place, kind):
    """What Python gets ends in its traceback and exit code 1: no line, and no exit code 2."""
    make_a_mistake(monkeypatch, place, kind)
    with pytest.raises(kind, match=MISTAKE):
        sample.main([f"--checkpoint={model_file}", f"--out={tmp_path}", "--steps=1"])


@pytest.mark.parametrize("kind", MISTAKES)
@pytest.mark.parametrize("place", ["a layer", "its construction", "its formulas"])
def test_a_mistake_in_the_model_is_not_taken_for_wrong_input_by_train(
        tmp_path, monkeypatch, place, kind):
    make_a_mistake(monkeypatch, place, kind)
    with pytest.raises(kind, match=MISTAKE):
        train.main([*ONE_STEP, f"--out={tmp_path}"])


BROKEN = """
import sys, mla_video, sample
def forward(*args, **how):
    raise ValueError("a mistake in the model")
mla_video.Block.forward = forward
sample.main(sys.argv[1:])
"""


def test_a_mistake_in_the_model_gives_a_traceback(tmp_path, model_file):
    command = [sys.executable, "-c", BROKEN, f"--checkpoint={model_file}", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "in forward" in done.stderr, done.stderr[-500:]


@pytest.mark.parametrize("error", [OSError("the disk is full"), MemoryError(),
                                   torch.OutOfMemoryError("CUDA out of memory"),
                                   ModuleNotFoundError("this needs av: pip install av")])
def test_what_the_machine_lacks_is_said_in_one_line(
        capsys, monkeypatch, tmp_path, model_file, error):
    def fail(*args, **how):
        raise error

    monkeypatch.setattr(sample, "rollout", fail)
    flags = [f"--checkpoint={model_file}", f"--out={tmp_path}"]
    fails_in_one_line(capsys, sample.main, flags, str(error) or "out of memory")


def test_only_a_value_error_about_input_becomes_a_user_error():
    with pytest.raises(UserError, match="no such word"), as_user_error():
        raise ValueError("no such word")
    for kind in (TypeError, RuntimeError, FileNotFoundError):
        with pytest.raises(kind), as_user_error():
            raise kind


# ---- the rest --------------------------------------------------------------------------------

def test_figures_say_where_they_come_from(monkeypatch, tmp_path):
    """The command as typed in the repository's root, from wherever it was started."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMMIT", "abc123")
    monkeypatch.setattr(command_line.sys.modules["__main__"], "__spec__", None)
    for program, expected in ((ROOT / "tests" / "kill.py", "python tests/kill.py --x"),
                              (ROOT / "sample.py", "python sample.py --x"),
                              (tmp_path / "mine.py", "python mine.py --x")):
        monkeypatch.setattr(command_line.sys, "argv", [str(program), "--x"])
        origin = provenance(torch.device("cpu"))
        assert origin["command"] == expected
        assert origin["commit"] == "abc123"
        assert f"torch {torch.__version__}" in origin["versions"]
    assert command_line.ROOT == ROOT.resolve()


def test_figures_do_not_tell_the_folders_of_a_machine(monkeypatch):
    """Whole paths become those from the root, or a name; all else stays as it was typed."""
    monkeypatch.setattr(command_line.sys.modules["__main__"], "__spec__", None)
    inside = ROOT.resolve() / "out/runs"
    arguments = ["--json", "/somewhere/else/found.json", f"--runs={inside}", "--rate=0.5", "out/x"]
    monkeypatch.setattr(command_line.sys, "argv", [str(ROOT / "sample.py"), *arguments])
    assert provenance(torch.device("cpu"))["command"] == (
        "python sample.py --json found.json --runs=out/runs --rate=0.5 out/x")


PROGRAMS = [path for path in (ROOT / "experiments").glob("*.py")
            if "__name__ ==" in path.read_text()]


@pytest.mark.rest
def test_an_experiment_starts_by_its_path_too(tmp_path):
    command = [sys.executable, str(ROOT / "experiments/worlds.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    assert "usage:" in done.stdout


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_every_experiment_begins_like_that_one(path):
    """Started by its path, it puts the repository on sys.path before it imports from it."""
    text = path.read_text()
    begins = "if not __package__:                    # started by its path\n    sys.path.insert(0, "
    assert begins in text
    before, after = text.split(begins)
    ours = r"^(import|from) (engine|experiments|mla_video|flow|toy_data|metrics|train)\b"
    assert not re.search(ours, before, re.MULTILINE)


QUIET = """
import torch
def state():
    return (torch.get_default_dtype(), torch.get_float32_matmul_precision(),
            torch.random.get_rng_state().sum())
before = state()
import rope3d, cache, attention, mla_video, flow, objectives, toy_data, metrics, sample, train
assert before == state()
"""


def test_importing_does_nothing():
    """No output, no files, no change of torch's global state."""
    command = [sys.executable, "-c", QUIET]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stdout and not done.stderr, done.stderr


def test_a_long_rollout_does_not_grow(capsys, model_file):
    report = endurance.main([f"--checkpoint={model_file}", "--frames=330", "--steps=1"])
    assert report["chunks"] == 110
    growth = report["peak_memory_growth_kib"]
    assert growth < 4096, "streaming on, with the window full, cost memory"


@pytest.mark.parametrize("changes, word", [
    (dict(attention="linear"), "mla"),
    (dict(dim=130), "divide"),
    (dict(patch=5), "patches of 5"),
    (dict(sink=-1), "sink"),
    (dict(dim=2.5), "must be an integer"),
    (dict(window=2), "window of 2"),
    (dict(rope=5), "even"),
])
def test_a_config_explains_itself(changes, word):
    with pytest.raises(ValueError, match=word):
        Config(**changes)


def test_cache_bytes_of_the_paper():
    """Read from buffers (on the meta device): 448 bytes per token and layer against 6144, 92.7
    % less, 6.04 GB against 0.44 GB."""
    sizes = {}
    for attention in ("mla", "dense"):
        with torch.device("meta"):
            model = VideoDiT(replace(PRESETS["wan1.3b"], attention=attention))
        c = model.config
        cache = model.make_cache(1, torch.bfloat16)
        kept = c.layers * c.tokens * (c.window - c.chunk)
        assert cache.nbytes == cache.bytes_per_token * kept
        sizes[attention] = cache.bytes_per_token
    assert sizes == {"mla": 448, "dense": 6144}
    assert 1 - sizes["mla"] / sizes["dense"] == pytest.approx(0.927, abs=5e-4)
    whole_window = 30 * 32_760
    gigabytes = [round(size * whole_window / 1e9, 2) for size in sizes.values()]
    assert gigabytes == [0.44, 6.04]


def test_a_chunk_that_fills_the_window_keeps_nothing():
    """Found by forged configs: no past, no bytes, and no division by them."""
    model = VideoDiT(replace(PRESETS["toy"], layers=1, chunk=12))
    assert cache_line(model, 1).startswith("cache        0 bytes")
