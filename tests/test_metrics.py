"""Properties of metrics.py: true clips are called true, and spoiled clips spoiled.

Each spoiler must fail the metric it is aimed at: a gate that cannot fail proves nothing.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf

import metrics
from toy_data import WORDS, make_world

DISC = WORDS.index("disc")


@pytest.fixture(scope="module")
def true():
    """120 true clips of 24 frames of the shapes world, and their captions."""
    return make_world("shapes", frames=24, seed=7).batch(range(120))


def share(right: torch.Tensor) -> float:
    return right.float().mean().item()


def noise_like(video: torch.Tensor, draw) -> torch.Tensor:
    """The same numbers for the same shape, whenever it is called."""
    return draw(video.shape, generator=torch.Generator().manual_seed(0))


# ---- true clips ----------------------------------------------------------------------------

@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_metrics_are_right_on_true_clips(true, noise):
    video, captions = true
    video = video + noise * noise_like(video, torch.randn)
    colour = captions[:, :1] - 1
    shape = captions[:, 1:2] - DISC
    assert share(metrics.alive(video)) >= 0.995
    assert share(metrics.colour_index(video) == colour) >= 0.995
    assert share(metrics.shape_index(video) == shape) >= 0.995
    assert share(metrics.caption_match(video, captions)) >= 0.99
    residual = metrics.motion_residual(video)
    assert residual.max() < 0.15, "straight lines with reflections must fit true motion"

    report = metrics.survival_report(video, captions)
    assert set(report) == {"alive", "colour", "shape", "moving", "survival"}
    assert min(report.values()) >= 0.99, report
    unasked = metrics.survival_report(video, captions * 0)
    first_rules = unasked["colour"] >= 0.99
    assert first_rules, "without a colour word the first chunk's colour is the norm"


# ---- spoiled clips -------------------------------------------------------------------------

def black(video):
    return video * 0 - 1


def grey(video):
    return video * 0


def noise(video):
    return noise_like(video, torch.rand) * 2 - 1


def faded(video):
    return (video + 1) * 0.35 - 1


def washed_out(video):
    return video * 0.2


def grown(video):
    frames = video.flatten(0, 1)
    return nnf.max_pool2d(frames, 5, stride=1, padding=2).view_as(video)


def scattered(video):
    elsewhere = torch.arange(256) * 77 % 256
    pixels = video.flatten(-2)
    return pixels[..., elsewhere].view_as(video)


def two_subjects(video):
    twin = video.roll((8, 8), (-2, -1))
    return torch.maximum(video, twin)


def colour_swapped(video):
    swapped = video.roll(1, 2)
    return torch.cat([video[:, :12], swapped[:, 12:]], 1)


def frozen(video):
    return video[:, :1].expand_as(video)


def upside_down(video):
    return video.flip(-2)


# What must notice the damage.
SPOILED = {
    black: "alive",
    grey: "alive",
    noise: "alive",
    faded: "alive",
    washed_out: "alive",
    grown: "alive",
    scattered: "alive",
    two_subjects: "alive",
    colour_swapped: "colour",
    frozen: "moving",
    upside_down: "shape",
}


@pytest.mark.parametrize("spoil", SPOILED)
def test_spoiled_clips_fail(true, spoil):
    name = spoil.__name__
    metric = SPOILED[spoil]
    video, captions = true
    asked = [captions, captions * 0]
    if spoil is upside_down:
        triangles = captions[:, 1] == WORDS.index("triangle")
        video = video[triangles]
        captions = captions[triangles]
        asked = [captions]                     # unasked, upside down is as good as any shape
    spoiled = spoil(video)
    for words in asked:
        report = metrics.survival_report(spoiled, words)
        found = report[metric]
        seen = found <= 0.05
        assert seen, f"{name}: {metric} is {found:.2f}, the metric does not see the damage"
        assert metric == "shape" or report["survival"] <= 0.05, report
    match = metrics.caption_match(spoiled, captions)[:, 12:]
    assert share(match) < 0.3, f"{name} still matches its caption"


def test_jitter_is_not_smooth_motion(true):
    video = true[0].clone()
    rng = np.random.default_rng(0)
    for frame in video.flatten(0, 1):          # a view: what is copied into it stays
        jump = rng.integers(-1, 2, 2).tolist()
        frame.copy_(frame.roll(tuple(jump), (-2, -1)))
    residual = metrics.motion_residual(video)
    assert residual.median() > 0.5, "a pixel of jitter must show"
    assert metrics.motion_residual(black(video)).isnan().all(), "no subject has no motion"


WRONG_WORDS = [
    ("red", "green"),
    ("disc", "square"),
    ("slow", "fast"),
]


def test_wrong_words_do_not_match(true):
    video, captions = true
    for slot, (word, other) in enumerate(WRONG_WORDS):
        asked = captions[:, slot]
        right = WORDS.index(word)
        wrong = WORDS.index(other)
        instead = torch.where(asked == right, wrong, right)
        swapped = captions.clone()
        swapped[:, slot] = instead
        match = metrics.caption_match(video, swapped)
        assert share(match) < 0.02, f"slot {slot} of the caption is not looked at"
