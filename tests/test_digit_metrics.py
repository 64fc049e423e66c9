"""Properties of engine/digit_metrics.py: true digits are called what they are, and spoiled clips
fail the metric they are aimed at.
"""

import pytest
import torch

from engine import digit_metrics as metrics
from toy_data import COLOURS, WORDS, make_world, offsets

pytest.importorskip("sklearn")
SIZE = 16


@pytest.fixture(scope="module")
def true():
    """100 true clips of 24 frames, and their captions."""
    return make_world("digits", frames=24, size=SIZE, seed=7).batch(range(100))


def share(right: torch.Tensor) -> float:
    return right.float().mean().item()


# ---- the judge is judged first ---------------------------------------------------------------

def test_the_classifier_knows_digits_that_it_has_not_learned_from():
    judge = metrics.classifier(SIZE)
    assert judge.accuracy >= 0.97
    known, unknown = judge.pictures
    both = set(known.tolist()) & set(unknown.tolist())
    assert not both, "it was tested on pictures that it had learned"
    pictures = torch.cat([known, unknown])
    assert len(pictures) == 1797


def test_the_classifier_is_the_same_every_time(true):
    video, _ = true
    frames = metrics.subject(video[:8]).flatten(0, 1)
    judge = metrics.classifier(SIZE)
    answers = judge(frames)
    again = metrics.Classifier(SIZE)
    assert torch.equal(again(frames), answers)


def test_the_classifier_does_not_care_where_a_digit_is():
    """To a pixel it is the same digit; between pixels it is drawn otherwise, and is the same
    digit nine times of ten and more."""
    world = make_world("digits", frames=1, size=SIZE)
    judge = metrics.classifier(SIZE)
    pictures = torch.from_numpy(world.images[:150])
    found = []
    for place in ((8.0, 8.0), (7.0, 9.0), (8.4, 7.7)):
        centre = torch.tensor(place).expand(150, 1, 2)
        cover = world.cover(pictures, centre)
        answers = judge(cover[:, 0])
        found.append(answers.argmax(1))
    middle, whole_pixels, parts = found
    assert share(middle == whole_pixels) == 1
    assert share(middle == parts) >= 0.95


# ---- true clips ----------------------------------------------------------------------------

@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_metrics_are_right_on_true_clips(true, noise):
    video, captions = true
    random = torch.Generator().manual_seed(0)
    noises = torch.randn(video.shape, generator=random)
    video = video + noise * noises
    assert share(metrics.alive(video)) >= 0.995
    colour = captions[:, :1] - 1
    digit = captions[:, 1:2] - metrics.FIRST_DIGIT
    assert share(metrics.colour_index(video) == colour) >= 0.995
    assert share(metrics.digit_index(video) == digit) >= 0.98
    assert share(metrics.caption_match(video, captions)) >= 0.97
    for asked in (captions, captions * 0):
        report = metrics.survival_report(video, asked)
        assert [*report] == ["alive", "colour", "class", "moving", "survival"]
        assert min(report.values()) >= 0.96, report


def test_white_is_a_colour(true):
    """metrics.subject looks at chroma, of which white has none."""
    video, captions = true
    white = captions[:, 0] == WORDS.index("white")
    seen = metrics.colour_index(video[white])
    last = len(COLOURS) - 1
    assert white.any()
    assert (seen == last).all()


# ---- spoiled clips -------------------------------------------------------------------------

def black(video):
    return video * 0 - 1


def faded(video):
    return (video + 1) * 0.3 - 1


def two_digits(video):
    return torch.maximum(video, video.roll((8, 8), (-2, -1)))


def other_colour_at_the_end(video):
    """Red for green for blue for red; white becomes yellow."""
    end = video[:, 12:].roll(1, 2)
    least, most = end.aminmax(dim=2, keepdim=True)
    yellow = end.clone()
    yellow[:, :, 2] = -1
    end = torch.where(least == most, yellow, end)
    return torch.cat([video[:, :12], end], 1)


def other_digit_at_the_end(video):
    """That of another clip, in this one's colour."""
    bright = video.amax(2, keepdim=True) + 1                 # 0 to 2
    light = video.amax((1, 3, 4), keepdim=True) + 1          # of each clip's own colour
    other = bright.roll(1, 0) / 2
    end = other[:, 12:] * light - 1
    return torch.cat([video[:, :12], end], 1)


def frozen(video):
    return video[:, :1].expand_as(video)


SPOILED = {black: "alive", faded: "alive", two_digits: "alive", frozen: "moving",
           other_colour_at_the_end: "colour", other_digit_at_the_end: "class"}


@pytest.mark.parametrize("spoil", SPOILED)
def test_spoiled_clips_fail(true, spoil):
    video, captions = true
    metric = SPOILED[spoil]
    limit = 0.05
    if metric == "class":
        digits = captions[:, 1]
        limit += share(digits == digits.roll(1))             # by chance it is the same digit
    spoiled = spoil(video)
    for asked in (captions, captions * 0):
        report = metrics.survival_report(spoiled, asked)
        assert report[metric] <= limit, report
        assert report["survival"] <= limit, report
        others = {"alive", "colour", "class", "moving"} - {metric}
        for name in others:
            aimed = metric == "alive" or report[name] >= 0.95
            assert aimed, f"{spoil.__name__} is not aimed at {name}: {report}"


def test_what_is_no_digit_is_called_none():
    """Squares: they were never drawn."""
    video, captions = make_world("shapes", frames=1, size=SIZE).batch(range(90))
    square = captions[:, 1] == WORDS.index("square")
    found = metrics.digit_index(video[square])
    assert share(found >= 0) < 0.2


def test_a_blot_is_no_digit():
    """It is as compact as one, and too much."""
    middle = torch.tensor([8.0, 8.0])
    y, x = offsets(middle, SIZE, SIZE)
    blot = (y * y + x * x <= 30).float()
    video = (2 * blot - 1).expand(1, 1, 3, SIZE, SIZE)
    assert not metrics.alive(video).any()
