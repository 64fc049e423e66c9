"""experiments/memory.py compares equals, and its limit of what news can pass is one."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.command_line import UserError
from experiments import memory
from mla_video import VideoDiT
from toy_data import Recall


def test_the_caches_are_equal_within_five_percent():
    """Of the buffers that streams allocate."""
    nbytes = {}
    for kind in memory.KINDS:
        cache = VideoDiT(memory.FULL.config_of(kind)).make_cache(1)
        nbytes[kind] = sum(buffer.nbytes for buffer in cache.buffers)
        assert nbytes[kind] == memory.cache_bytes(memory.FULL.config_of(kind))
    assert nbytes["mla"] == 253_440
    assert nbytes["dense"] == pytest.approx(nbytes["mla"], rel=0.05)
    assert nbytes["wide"] > 10 * nbytes["mla"]


def small(kind: str):
    """A narrow model of a kind, with weights none of which are zero."""
    config = memory.FULL.config_of(kind)
    config = replace(config, dim=16, heads=2, latent=4, query_latent=8, rope=6, ffn=16)
    torch.manual_seed(0)
    model = VideoDiT(config).double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


@pytest.mark.parametrize("kind, curtain, passes", [
    ("dense", 9, True), ("dense", 12, True), ("dense", 15, False), ("dense", 24, False),
    ("mla", 24, True), ("wide", 24, True)])
def test_how_far_news_of_the_subject_can_come(kind, curtain, passes):
    """The gradient of the first chunk after the curtain by the frames in view before it."""
    model = small(kind)
    video, captions = Recall("recall", 36, 16, 0, curtain, vary=False).batch([0])
    clean = video.double().requires_grad_()
    noisy = torch.randn_like(clean)
    sigma = torch.full((1, 36), 0.9)
    v = model(clean, noisy, sigma, captions)
    opening = slice(6 + curtain, 9 + curtain)
    loss = v[:, opening].square().sum()
    loss.backward()
    felt = clean.grad[:, :6].abs().max()
    assert (felt > 0) == passes
    assert (curtain < memory.reach(model.config)) == passes


def test_judging_knows_the_truth(monkeypatch):
    """True videos are right in everything; another subject's are not."""
    plan = replace(memory.FULL, lengths=(3, 6), openings=2, videos=24)
    monkeypatch.setattr(memory, "continued", lambda model, truth, captions, seed: truth)
    found = memory.judge(None, plan, 0)
    openings = found["3"]["openings"] + found["6"]["openings"]
    assert len(openings) == 3
    for opening in openings:
        assert [opening[name] for name in ("alive", "colour", "shape", "place")] == [1, 1, 1, 0]
        assert opening["place of another"] > 2
        assert opening["videos"]["shape"] == "6" * 24
    assert found["6"]["curtain"] == 1


def test_a_curtain_that_opens_late_is_noticed(monkeypatch):
    plan = replace(memory.FULL, lengths=(6,), openings=1, videos=6)
    monkeypatch.setattr(memory, "continued", lambda model, truth, captions, seed: truth.roll(3, 1))
    found = memory.judge(None, plan, 0)["6"]
    opening, = found["openings"]
    assert opening["alive"] == opening["colour"] == 0.5, "3 of its 6 frames show the curtain"
    assert found["curtain"] == 0.5


def test_true_frames_are_what_is_given():
    """A rollout begins with them, and sees them: other first frames, another video."""
    plan = replace(memory.QUICK, videos=2)
    model = VideoDiT(plan.config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    truth, captions = Recall("recall", 12, 16, 5, 3, vary=False).batch([0, 1])
    video = memory.continued(model, truth, captions, 0)
    assert torch.equal(video[:, :6], truth[:, :6])
    other = memory.continued(model, truth.roll(1, 0), captions, 0)
    assert not torch.equal(video[:, 6:9], other[:, 6:9])
    assert torch.equal(video, memory.continued(model, truth, captions, 0))


def test_the_table_is_of_the_first_opening_and_of_the_last():
    """There colour and shape are of the frames in view."""
    found = {"runs": [], "kinds": {"mla": dict(attention="mla", window=36, cache_bytes=1234)}}
    for colour in (0.5, 0.7):
        first = dict(alive=1.0, colour=colour, shape=0.25)
        last = dict(alive=0.5, colour=0.4, shape=0.1)
        found["runs"].append({"kind": "mla", "curtains": {"24": {"openings": [first, last]}}})
    cells = "| MLA | 36 | 1,234 | 100 % [100, 100] | 60 % [50, 70] | 25 % [25, 25] "
    cells += "| 50 % [50, 50] | 80 % [80, 80] | 20 % [20, 20] |"
    assert cells in memory.table(found)


class Timed:
    """A pool in which a step takes a tenth of a second."""

    def submit(self, *work):
        return self

    def result(self):
        return 0.1


def test_as_many_steps_as_fit():
    """Nine at a time are three times slower than three; judging has its time, too."""
    how = memory.How(torch.device("cpu"), 0, None, Path("out"), 1, 9, time.time() + 400)
    steps = memory.steps_that_fit(Timed(), memory.KINDS, 1, memory.FULL, how)
    seconds = 400 - memory.BEGINNING - how.judging()
    assert steps == pytest.approx(seconds / (1.05 * 0.3), abs=5)
    in_two_rounds = memory.steps_that_fit(Timed(), memory.KINDS, 2, memory.FULL, how)
    assert in_two_rounds < steps / 2
    late = replace(how, deadline=time.time() + 60)
    with pytest.raises(UserError, match="--minutes leaves no time for a step"):
        memory.steps_that_fit(Timed(), memory.KINDS, 1, memory.FULL, late)
    assert memory.train_and_judge("mla", 0, memory.FULL, late) is None, "nor begins a run"


@pytest.mark.rest
def test_a_quick_run_ends_in_json_models_and_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "QUICK", replace(memory.QUICK, lengths=(3,), openings=1))
    monkeypatch.setattr(memory, "TURNS", 1)
    memory.main(["--quick", "--seeds=1", "--steps=2", "--batch=2", "--videos=4", f"--out={tmp_path}"])
    found = json.loads((tmp_path / "memory.json").read_text())
    runs = [(run["kind"], run["steps"]) for run in found["runs"]]
    assert runs == [("mla", 2), ("dense", 2), ("wide", 2)]
    for name in ("memory.png", "memory.gif", "mla_0.pt", "dense_0.pt", "wide_0.pt"):
        assert (tmp_path / name).stat().st_size > 1000
