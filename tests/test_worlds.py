"""A world says itself what its captions, defaults and metrics are, and the programs ask it."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sample
import train
from engine import digit_metrics
from engine.checkpoint import save_model
from engine.judging import JUDGES, report_survival, unseen_captions
from experiments import quality, worlds
from flow import Stream
from mla_video import VideoDiT
from test_cli import SMALL, TINY, fails_in_one_line
from toy_data import (WORLDS, check_words, decode_caption, encode_caption, make_world, prompts_of,
                      words_of)

ROOT = Path(__file__).parent.parent
pytest.importorskip("sklearn")


@pytest.fixture
def model_of(tmp_path):
    """A model that has learned nothing, and says that it saw these data."""
    def write(data: str, **sizes) -> Path:
        torch.manual_seed(0)
        path = tmp_path / "model.pt"
        save_model(path, VideoDiT(replace(TINY, **sizes)), data=data, stage="tf")
        return path
    return write


# ---- what a world says -----------------------------------------------------------------------

@pytest.mark.parametrize("data", WORLDS)
def test_a_world_has_captions_of_its_own_to_show_itself(data):
    prompts = prompts_of(data)
    assert prompts == make_world(data).prompts
    assert len(prompts) == 4
    if not any(words_of(data)):
        assert not any(prompts), "a world without words"
        return
    assert len(set(prompts)) == 4
    for prompt in prompts:
        caption = encode_caption(prompt)
        check_words(caption, data)
        assert caption.all(), "a word that is left out would be drawn"


def test_own_clips_have_no_captions():
    assert prompts_of("clips.npy") == ("",) * 4


@pytest.mark.parametrize("data", WORLDS)
def test_a_world_has_a_judge_that_calls_its_true_clips_true(data):
    video, captions = make_world(data, frames=48, seed=4).batch(range(30))
    for asked in (captions, captions * 0):
        report = JUDGES[data].report(video, asked)
        assert [*report][-1] == "survival", "the number to quote comes last"
        assert report["survival"] >= 0.96, report
        assert all(type(share) is float for share in report.values())


@pytest.mark.parametrize("data", WORLDS)
def test_the_judge_of_a_world_sees_that_another_is_another(data):
    """Nothing of one world survives in the next one's eyes when it is told the wrong captions."""
    video, captions = make_world(data, frames=48, seed=4).batch(range(30))
    report = JUDGES[data].report(video, captions.roll(1, 0))
    assert report["survival"] <= 0.45


@pytest.mark.parametrize("data", WORLDS)
def test_captions_to_judge_by_are_of_unseen_clips_of_the_world(data):
    captions = unseen_captions(6, 3, data)
    _, same = make_world(data, seed=10_003).batch(range(6))
    assert torch.equal(captions, same)


def test_no_program_knows_a_world_by_its_name():
    names = "|".join(WORLDS)
    for path in [ROOT / "sample.py", ROOT / "train.py", *(ROOT / "engine").glob("*.py")]:
        found = re.findall(rf'[=!]= "(?:{names})"', path.read_text())
        assert not found, f"{path.name} asks {found}"


# ---- who asks it -----------------------------------------------------------------------------

@pytest.mark.parametrize("data", ["digits", "occluder", "clips.npy"])
def test_sample_shows_the_worlds_own_captions(capsys, tmp_path, model_of, data):
    sample.main([f"--checkpoint={model_of(data)}", f"--out={tmp_path / 'a.gif'}", "--frames=3",
                 "--steps=1", "--device=cpu"])
    captions = [decode_caption(encode_caption(prompt)) or "(none)" for prompt in prompts_of(data)]
    assert f"captions     {', '.join(captions)}" in capsys.readouterr().out


def test_evaluate_judges_digits_and_the_judge(capsys, model_of):
    sample.main([f"--checkpoint={model_of('digits')}", "--evaluate=2", "--frames=12", "--steps=1"])
    said = capsys.readouterr().out
    assert re.search(r"2 rollouts of 12 frames .*, last 12 frames: alive \d+ %, .*class", said)
    (right,) = re.findall(r"the judge of digits is right on ([\d.]+) % of true frames", said)
    assert float(right) >= 97


def test_evaluate_judges_passages(capsys, model_of):
    sample.main([f"--checkpoint={model_of('occluder')}", "--evaluate=2", "--frames=36",
                 "--steps=1"])
    assert "passages behind the bar: out " in capsys.readouterr().out


@pytest.mark.parametrize("data, sizes, words", [
    ("clips.npy", {}, ["clips.npy", "shapes, digits, occluder"]),
    ("shapes", {"height": 8}, ["square", "3 x 8 x 16"]),
    ("digits", {"channels": 1}, ["RGB", "1 x 16 x 16"]),
])
def test_evaluate_says_whom_it_cannot_judge(capsys, model_of, data, sizes, words):
    flags = [f"--checkpoint={model_of(data, **sizes)}", "--evaluate=2", "--frames=12"]
    fails_in_one_line(capsys, sample.main, flags, "--evaluate", *words)


def test_the_judge_gets_the_videos_of_its_captions(monkeypatch):
    """Each row of the captions goes to the video of the same row, in the world's own words."""
    heard = {}

    def report(video, captions):
        heard["captions"] = captions
        heard["shape"] = tuple(video.shape)
        return {"survival": 0.5}

    monkeypatch.setitem(JUDGES, "digits", JUDGES["digits"]._replace(report=report))
    told = []

    def stream_of(model, captions):
        told.append(captions)
        return Stream(model, captions)

    torch.manual_seed(0)
    found = report_survival(VideoDiT(TINY), 3, 6, 5, "digits", stream_of=stream_of, steps=1)
    assert found == {"survival": 0.5}
    assert heard["shape"] == (3, 6, 3, 16, 16)
    assert torch.equal(heard["captions"], unseen_captions(3, 5, "digits"))
    assert torch.equal(told[0], heard["captions"])


@pytest.mark.rest
@pytest.mark.parametrize("data, part", [("digits", "class"), ("occluder", "time")])
def test_training_judges_and_shows_every_world(capsys, tmp_path, data, part):
    """At its end and on the way, with the same judge; and its GIF has the world's captions."""
    train.main([*SMALL, "--config=frames=6", "--config=window=6", f"--data={data}", "--batch=2",
                "--steps=2", "--evaluate=2", "--curve=2", f"--out={tmp_path}", "--device=cpu"])
    report = json.loads((tmp_path / "report_tf.json").read_text())
    assert part in report["survival"]
    assert part in report["curve"][0]
    assert (tmp_path / "sample.gif").is_file()
    assert f"{part} " in capsys.readouterr().out


# ---- the experiments -------------------------------------------------------------------------

def test_quality_judges_stretches_of_digits():
    """True clips, judged against themselves, are right, and as fast as they are."""
    video, captions = make_world("digits", frames=12, seed=4).batch(range(40))
    found = quality.judge(video, captions, video, digit_metrics)
    assert found["class"] >= 0.95 and found["match"] >= 0.95
    assert found["speed"] == 1 and found["speeds"] == 0
    assert "residual" not in found and "shape" not in found
    for name in set(found) - {"speeds"}:
        assert found[name] >= 0.95


@pytest.mark.rest
def test_quality_shows_what_a_world_has(capsys, tmp_path):
    video, captions = make_world("digits", frames=12, seed=4).batch(range(20))
    found = quality.judge(video, captions, video, digit_metrics)
    stage = {"frames": 36, "seconds_per_chunk": 0.1, "switch": [1.0] * 8,
             "curves": {name: [value] * 3 for name, value in found.items()}}
    runs = [{"attention": "mla", "seed": seed, "stages": {name: stage for name, *_ in quality.JUDGED}}
            for seed in (0, 1)]
    path = tmp_path / "quality_digits.json"
    path.write_text(json.dumps({"data": "digits", "runs": runs}))
    quality.main(["--redraw", "--data=digits", f"--json={path}"])
    head = capsys.readouterr().out.splitlines()[0]
    assert "| class |" in head and "shape" not in head and "residual" not in head
    assert (tmp_path / "quality_digits.png").stat().st_size > 5000


def test_the_table_of_worlds_keeps_the_rows_of_other_worlds(tmp_path, model_of):
    path = tmp_path / "worlds.json"
    few = ["--rollouts=2", "--frames=12", f"--json={path}", "--device=cpu"]
    worlds.main([str(model_of("digits")), *few])
    worlds.main([str(model_of("shapes")), *few])
    found = json.loads(path.read_text())
    assert [*found["worlds"]] == ["digits", "shapes"]
    head, rows, below = worlds.table(found)
    for (data, row), shown in zip(found["worlds"].items(), rows):
        assert len(shown) == len(head)
        survival = 100 * row["shares"]["survival"]
        assert f"**survival {survival:.0f} %**" in shown[3]
        assert (tmp_path / f"worlds_{data}.png").is_file()
        assert row["commit"] in below
    assert "of true frames" in below, "the judge of digits is judged"


def test_the_table_of_worlds_is_of_worlds(capsys, tmp_path, model_of):
    flags = [str(model_of("clips.npy")), f"--json={tmp_path / 'worlds.json'}"]
    fails_in_one_line(capsys, worlds.main, flags, "clips.npy", "shapes, digits, occluder")
    assert not (tmp_path / "worlds.json").exists()
