"""What a user types. Good input gives a file; bad input gives one line that says what is wrong and what would be right, exit code 2,
no traceback, and nothing already written is lost."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import sample
import train
from experiments import endurance
from mla_video import PRESETS, Config, VideoDiT
from checkpoint import save_model
from sample import GifWriter, to_pixels
from toy_data import WORDS
from trainer import STAGES

ROOT = Path(__file__).parent.parent
TINY = replace(PRESETS["toy"], dim=32, layers=1, heads=2, latent=8, query_latent=16, rope=6, ffn=32, words=len(WORDS))


@pytest.fixture
def model_file(tmp_path) -> Path:
    torch.manual_seed(0)
    path = tmp_path / "model.pt"
    save_model(path, VideoDiT(TINY), data="shapes", stage="tf", steps=0, seed=0)
    return path


def fails_in_one_line(capsys, main, argv: list[str], *words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    errors = [line for line in capsys.readouterr().err.splitlines() if line]
    assert stop.value.code == 2, f"exit code {stop.value.code}, expected 2"
    assert "Traceback" not in "".join(errors)
    if errors[0].startswith("usage:"):                     # argparse prints how to call it, then its one line
        errors = errors[-1:]
    assert len(errors) == 1, f"one line is enough: {errors}"
    for word in words:
        assert word in errors[0], f"the message should say {word!r}: {errors[0]}"


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
    (["--config=layers=0"], ["layers must be a positive integer"]),
    (["--steps=0"], ["--steps must be at least 1"]),
    (["--device=quantum"], ["quantum"]),
    (["--attention=sparse"], ["sparse", "mla"]),
    (["--resume"], ["there is no checkpoint"]),
    (["--data=digits", "--curve=5"], ["--curve"]),
])
def test_train_refuses(capsys, tmp_path, flags, words):
    fails_in_one_line(capsys, train.main, [f"--out={tmp_path / 'out'}", *flags], *words)
    assert not (tmp_path / "out").exists(), "a refused command must not write anything"


def test_train_does_not_overwrite_a_run(capsys, tmp_path):
    (tmp_path / "train.pt").write_bytes(b"precious")
    fails_in_one_line(capsys, train.main, [f"--out={tmp_path}"], "train.pt", "not a readable checkpoint")
    assert (tmp_path / "train.pt").read_bytes() == b"precious"


def test_a_stage_says_what_it_may_start_from(capsys, tmp_path):
    sizes = [f"--config={item}" for item in ("dim=32", "layers=1", "heads=2", "latent=8", "query_latent=16", "rope=6", "ffn=32")]
    flags = [*sizes, "--device=cpu", "--batch=2", "--steps=1", "--evaluate=0"]
    train.main([*flags, "--stage=score", f"--out={tmp_path}"])
    capsys.readouterr()
    score, there = f"{tmp_path}/score.pt", f"--out={tmp_path}"
    fails_in_one_line(capsys, train.main, [*flags, "--stage=cd", there], "needs a tf model", "tf.pt", "--stage tf", "--start")
    fails_in_one_line(capsys, train.main, [*flags, "--stage=cd", there, f"--start={score}"], "its stage is score", "tf is needed")
    fails_in_one_line(capsys, train.main, [*flags, "--stage=tf", "--attention=dense", there], "its attention is mla", "dense is needed")
    fails_in_one_line(capsys, train.main, [*flags, "--stage=tf", "--config=latent=4", there], "its latent is 8", "4 is needed")
    fails_in_one_line(capsys, train.main, [*flags, "--stage=tf", "--data=occluder", there], "its data is shapes", "occluder is needed")
    fails_in_one_line(capsys, train.main, [*flags, "--stage=all", "--start=x", f"--out={tmp_path}/new"], "--start", "--stage all")
    fails_in_one_line(capsys, train.main, [*flags, "--stage=score", "--start=x", f"--out={tmp_path}/new"], "--start", "--stage score")
    fails_in_one_line(capsys, train.main, [*flags, "--stage=tf", "--score=x", f"--out={tmp_path}/new"], "--score for dmd", "--stage tf")
    fails_in_one_line(capsys, sample.main, [f"--checkpoint={score}"], "is a score model", "tf, cd, dmd")
    train.main([*flags, "--stage=tf", there])
    assert "starts from " + score in capsys.readouterr().out, "tf starts from the score model that is there, and says so"
    train.main([*flags, "--stage=cd", there])
    capsys.readouterr()
    (tmp_path / "score.pt").rename(tmp_path / "elsewhere.pt")
    fails_in_one_line(capsys, train.main, [*flags, "--stage=dmd", there], "needs a score model", "--score")
    train.main([*flags, "--stage=dmd", there, f"--score={tmp_path}/elsewhere.pt"])
    assert {"tf.pt", "cd.pt", "dmd.pt", "model.pt"} <= {path.name for path in tmp_path.iterdir()}


def test_all_stages_in_one_command_with_their_curves(tmp_path):
    """A score model cannot stream, so it has no curve; the other stages do."""
    sizes = ("dim=32", "layers=1", "heads=2", "latent=8", "query_latent=16", "rope=6", "ffn=32", "frames=6", "window=6")
    train.main([*(f"--config={item}" for item in sizes), "--device=cpu", "--batch=2", "--steps=2", "--evaluate=0", "--stage=all",
                "--curve=2", f"--out={tmp_path}"])
    curves = {stage: json.loads((tmp_path / f"report_{stage}.json").read_text())["curve"] for stage in STAGES}
    assert {stage: [point["step"] for point in points] for stage, points in curves.items()} == \
        {"score": [], "tf": [2], "cd": [2], "dmd": [2]}


def test_resume_names_what_differs(capsys, tmp_path):
    flags = ["--device=cpu", "--batch=2", "--steps=1", "--evaluate=0", f"--out={tmp_path}"] + \
        [f"--config={item}" for item in ("dim=32", "layers=1", "heads=2", "latent=8", "query_latent=16", "rope=6", "ffn=32")]
    train.main(flags)
    capsys.readouterr()
    before = (tmp_path / "train.pt").read_bytes()
    fails_in_one_line(capsys, train.main, flags, "--resume", "--out", "stage tf, step 1")
    fails_in_one_line(capsys, train.main, [*flags, "--stage=all"], "--resume", "--out")
    fails_in_one_line(capsys, train.main, [*flags, "--stage=cd", "--resume"], "at stage tf", "cd")
    fails_in_one_line(capsys, train.main, [*flags, "--resume", "--config=latent=4"], "latent", "8", "4")
    fails_in_one_line(capsys, train.main, [*flags, "--resume", "--attention=dense"], "dense", "mla")
    fails_in_one_line(capsys, train.main, [*flags, "--resume", "--seed=1"], "seed")
    assert (tmp_path / "train.pt").read_bytes() == before


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
    ("missing", ["there is no checkpoint"]), ("truncated", ["not a readable checkpoint"]), ("text", ["not a readable checkpoint"]),
    ("code", ["not a readable checkpoint"]), ("other config", ["another config", "tensors differ"]), ("impossible config", ["7 heads"]),
    ("unknown setting", ["colour"]), ("other model", ["lacks"]), ("nan", ["NaN"]), ("no tensors", ["tensors"])])
def test_sample_refuses_a_bad_checkpoint(capsys, tmp_path, model_file, kind, words, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "bad.pt"
    if kind != "missing":
        content = spoiled(kind, model_file)
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    if kind == "other config":
        words = ["of another config"]
    fails_in_one_line(capsys, sample.main, [f"--checkpoint={path}", "--out=clip.gif"], *words)
    assert not Path("owned").exists(), "code from a checkpoint was executed"
    assert not Path("clip.gif").exists()


@pytest.mark.parametrize("flags, words", [
    (["--prompt=purple disc"], ["purple", "red"]), (["--prompt=red blue disc"], ["red", "blue"]), (["--frames=-1"], ["--frames"]),
    (["--steps=0"], ["--steps"]), (["--route=magic"], ["magic"]), (["--device=quantum"], ["quantum"]),
    (["--route=fused", "--device=cpu"], ["fused", "materialised"]), (["--pictures"], ["--pictures", "folder", "clip.gif"])])
def test_sample_refuses(capsys, tmp_path, model_file, flags, words):
    fails_in_one_line(capsys, sample.main, [f"--checkpoint={model_file}", f"--out={tmp_path / 'clip.gif'}", *flags], *words)
    assert not (tmp_path / "clip.gif").exists()


@pytest.mark.parametrize("flags", [[], ["--guidance=2"], ["--route=reference"], ["--route=materialised"], ["--route=absorbed"]])
def test_sample_writes_the_frames_it_was_asked_for(capsys, tmp_path, model_file, flags):
    out = tmp_path / "clip.gif"
    sample.main([f"--checkpoint={model_file}", f"--out={out}", "--frames=7", "--steps=2", "--prompt=fast red disc", "--device=cpu", *flags])
    with Image.open(out) as gif:
        assert gif.n_frames == 7 and gif.size == (128, 128)
    said = capsys.readouterr().out
    assert "fast red disc" in said and "frames/s" in said and "% less" in said


def test_evaluate_prints_the_survival(capsys, model_file):
    sample.main([f"--checkpoint={model_file}", "--evaluate=2", "--frames=12", "--steps=1"])
    assert "2 rollouts of 12 frames" in capsys.readouterr().out


def test_a_gif_is_whole_after_every_append(tmp_path):
    """What is on disk can be opened at any time, colours survive the fixed palette, and frames come back in order."""
    path = tmp_path / "clip.gif"
    gif, video = GifWriter(path), torch.full((1, 6, 3, 8, 8), -1.0)
    for i in range(6):
        video[0, i, i % 3] = 1.0                           # red, green, blue, red, ...
    for i in range(0, 6, 3):
        gif.append(to_pixels(video[:, i:i + 3], zoom=2))
        with Image.open(path) as picture:
            assert picture.n_frames == i + 3
            for frame in range(i + 3):
                picture.seek(frame)
                expected = [255 if channel == frame % 3 else 0 for channel in range(3)]
                assert list(picture.convert("RGB").getpixel((5, 5))) == expected, f"frame {frame}"


@pytest.mark.parametrize("flags", [[], ["--pictures"]])
def test_ctrl_c_ends_an_endless_stream_with_a_valid_video(tmp_path, model_file, flags):
    """Interrupts from inside the stream, so that the test does not depend on timing."""
    code = ("import sample, sys\nplain = sample.rollout\ndef rollout(*args, **how):\n    for i, chunk in enumerate(plain(*args, **how)):\n"
            "        yield chunk\n        if i == 4: raise KeyboardInterrupt\nsample.rollout = rollout\nsample.main(sys.argv[1:])")
    done = subprocess.run([sys.executable, "-c", code, f"--checkpoint={model_file}", f"--out={tmp_path}", "--frames=0", "--steps=1",
                           *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.stderr[-500:]
    if flags:
        assert sorted(path.name for path in (tmp_path / "sample").iterdir()) == [f"{i:09d}.png" for i in range(5 * TINY.chunk)]
        assert all(Image.open(path).convert("RGB").getbbox() for path in (tmp_path / "sample").iterdir()), "a picture is black or cut short"
        return
    with Image.open(tmp_path / "sample.gif") as gif:
        assert gif.n_frames == 5 * TINY.chunk


def test_importing_does_nothing():
    """No output, no files, no change of torch's global state."""
    code = ("import torch; before = torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.random.get_rng_state().sum()\n"
            "import rope3d, cache, attention, mla_video, toy_data, sample, train\n"
            "assert before == (torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.random.get_rng_state().sum())")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout and not done.stderr, done.stderr


def test_a_long_rollout_does_not_grow(capsys, model_file):
    report = endurance.main([f"--checkpoint={model_file}", "--frames=330", "--steps=1"])
    assert report["chunks"] == 110 and report["peak_memory_growth_kib"] < 4096, "streaming on, with the window full, cost memory"


@pytest.mark.parametrize("changes, word", [
    (dict(attention="linear"), "mla"), (dict(dim=130), "divide"), (dict(patch=5), "patches of 5"), (dict(sink=-1), "sink"),
    (dict(dim=2.5), "positive integer"), (dict(window=2), "window of 2"), (dict(rope=5), "even")])
def test_a_config_explains_itself(changes, word):
    with pytest.raises(ValueError, match=word):
        Config(**changes)


def test_cache_bytes_of_the_paper():
    """Read from buffers (on the meta device): 448 bytes per token and layer against 6144, 92.7 % less, 6.04 GB against 0.44 GB."""
    sizes = {}
    for attention in ("mla", "dense"):
        with torch.device("meta"):
            model = VideoDiT(replace(PRESETS["wan1.3b"], attention=attention))
        cache = model.make_cache(1, torch.bfloat16)
        assert cache.nbytes == cache.bytes_per_token * model.config.layers * model.config.tokens * (model.config.window - model.config.chunk)
        sizes[attention] = cache.bytes_per_token
    assert sizes == {"mla": 448, "dense": 6144}
    assert 1 - sizes["mla"] / sizes["dense"] == pytest.approx(0.927, abs=5e-4)
    whole_window = 30 * 32_760
    assert [round(size * whole_window / 1e9, 2) for size in sizes.values()] == [0.44, 6.04]


def test_a_chunk_that_fills_the_window_keeps_nothing():
    """Found by forged configs: no past, no bytes, and no division by them."""
    model = VideoDiT(replace(PRESETS["toy"], layers=1, chunk=12))
    assert sample.cache_line(model, 1).startswith("cache        0 bytes")
