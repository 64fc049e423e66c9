"""experiments/memory.py compares equals, and its limit of what news can pass is one."""

import json
from dataclasses import replace

import pytest
import torch

from experiments import memory
from mla_video import VideoDiT
from toy_data import Recall


def test_the_caches_are_equal_within_five_percent():
    """Of the buffers that streams allocate."""
    nbytes = {kind: memory.cache_bytes(memory.FULL.config_of(kind)) for kind in memory.KINDS}
    assert nbytes["mla"] == 253_440
    assert abs(nbytes["dense"] / nbytes["mla"] - 1) < 0.05
    assert nbytes["wide"] > 10 * nbytes["mla"]
    cache = VideoDiT(memory.FULL.config).make_cache(1)
    assert sum(buffer.numel() * buffer.element_size() for buffer in cache.buffers) == nbytes["mla"]


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
    video = Recall("recall", 36, 16, 0, curtain, vary=False).batch([0])[0].double()
    clean = video.requires_grad_()
    noisy = torch.randn(1, 36, 3, 16, 16, dtype=torch.double)
    v = model(clean, noisy, torch.full((1, 36), 0.9), torch.zeros(1, 3, dtype=torch.long))
    opening = 6 + curtain
    v[:, opening:opening + 3].square().sum().backward()
    felt = clean.grad[:, :6].abs().sum()
    assert (felt > 0) == passes
    if kind == "dense":
        assert (curtain < memory.reach(model.config)) == passes


def test_judging_knows_the_truth(monkeypatch):
    """True videos are right in everything; another subject's are not."""
    plan = replace(memory.FULL, lengths=(3, 6), openings=2, videos=24)
    monkeypatch.setattr(memory, "continued", lambda model, truth, captions, seed: truth)
    for length, behind in memory.judge(None, plan, 0).items():
        assert behind["curtain"] == 1
        assert len(behind["openings"]) == (2 if length == "6" else 1)
        for opening in behind["openings"]:
            assert opening["alive"] == opening["colour"] == opening["shape"] == 1
            assert opening["place"] == 0 < 2 < opening["place of another"]
            assert opening["videos"]["shape"] == "6" * 24

    def late(model, truth, captions, seed):
        return truth.roll(3, 1)                            # a chunk late

    monkeypatch.setattr(memory, "continued", late)
    opening = memory.judge(None, plan, 0)["6"]["openings"][0]
    assert opening["alive"] == opening["colour"] == 0.5, "three of six frames show the curtain"


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


def test_what_is_drawn_is_said():
    found = {"runs": [], "kinds": {"mla": dict(attention="mla", window=36, cache_bytes=1234)}}
    for colour in (0.5, 0.7):
        opening = dict(alive=1.0, colour=colour, shape=0.25)
        found["runs"].append({"kind": "mla", "curtains": {"24": {"openings": [opening]}}})
    assert "| mla | 36 | 1,234 | 100 % [100, 100] | 60 % [50, 70] | 25 % [25, 25] |" in memory.table(found)


@pytest.mark.rest
def test_a_quick_run_ends_in_json_models_and_pictures(tmp_path):
    memory.main(["--quick", "--seeds=1", "--steps=2", "--batch=2", "--videos=4", f"--out={tmp_path}"])
    found = json.loads((tmp_path / "memory.json").read_text())
    assert [run["kind"] for run in found["runs"]] == list(memory.KINDS)
    assert all(run["steps"] == 2 for run in found["runs"])
    for name in ("memory.png", "memory.gif", "mla_0.pt", "dense_0.pt", "wide_0.pt"):
        assert (tmp_path / name).stat().st_size > 1000
