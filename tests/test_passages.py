"""Properties of engine/passages.py: in true videos every passage is right, whatever their seed,
and each way of spoiling a passage fails what it is aimed at.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine import passages
from toy_data import WORDS, make_world


WORLD = make_world("occluder", frames=90, seed=7)


@pytest.fixture(scope="module")
def true():
    """12 true videos of 90 frames, and their captions."""
    return WORLD.batch(range(12))


def crossing_of(b: int) -> float:
    """Frames from wall to wall in true video b."""
    _, across = WORLD.plan(b).velocity
    span = 16 - 2 * WORLD.box
    return span / abs(across)


def passages_of(video):
    """The passages of one video [F, 3, h, w], of which nothing is said."""
    beside = passages.look(video[None])
    visits = passages.visits_of(beside, 0)
    twice = beside.seen.all(0).numpy()
    return passages.judge_video(visits, twice[0], 16, -1, -1)


# ---- true videos -----------------------------------------------------------------------------

@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.sampled_from([16, 24]), noise=st.booleans(),
       words=st.booleans())
def test_true_passages_are_right(seed, size, noise, words):
    """All of them, and with noise, too: 16 pixels and more are fine enough to tell."""
    world = make_world("occluder", frames=70, size=size, seed=seed)
    video, captions = world.batch(range(3))
    random = torch.Generator().manual_seed(seed)
    noises = torch.randn(video.shape, generator=random)
    video = video + 0.1 * noise * noises
    report = passages.passage_report(video, captions * words)
    assert [*report] == ["out", "colour", "shape", "time", "place", "survival"]
    assert min(report.values()) == 1, report


def test_each_crossing_is_judged(true):
    """As many passages as turns at a wall, but for the first and what the end cuts off."""
    for b, video in enumerate(true[0]):
        judged = len(passages_of(video))
        crossings = 90 / crossing_of(b)
        assert crossings - 2.5 <= judged <= crossings + 0.5


def test_turns_are_where_the_world_has_them(true):
    """To less than half a frame: the plan of each clip is known."""
    beside = passages.look(true[0])
    for b in range(12):
        plan = WORLD.plan(b)
        _, across = plan.velocity
        _, x = plan.start
        wall = WORLD.box
        if across > 0:
            wall = 16 - wall
        first_turn = (wall - x) / across
        visits = passages.visits_of(beside, b)
        for visit in visits[1:-1]:                           # the clip cuts the others
            course = passages.fit(visit, 16)
            crossings = (course.turn - first_turn) / crossing_of(b)
            off = crossings - round(crossings)
            assert abs(off) * crossing_of(b) < 0.4, f"video {b}: its turn at {course.turn:.2f}"


# ---- spoiled ones ----------------------------------------------------------------------------

def hidden_frame(video) -> int:
    """One of one video [F, 3, h, w] in which the subject is behind the bar, for the second time:
    when a clip begins, it may be seen too shortly to foretell anything."""
    beside = passages.look(video[None])
    _, second, *_ = passages.visits_of(beside, 0)
    *_, last = second.frames.tolist()
    return last + 1


def other_colour(video, at):
    end = video[at:].roll(1, 1)
    return torch.cat([video[:at], end])


def other_side(video, at):
    end = video[at:].flip(-1)
    return torch.cat([video[:at], end])


def three_frames_late(video, at):
    still = video[at:at + 1].expand(3, -1, -1, -1)
    return torch.cat([video[:at], still, video[at:-3]])


def upside_down(video, at):
    end = video[at:].flip(-2)
    return torch.cat([video[:at], end])


def twin(video, at):
    mirrored = video.flip(-1)
    return torch.maximum(video, mirrored)


def never_out(video, at):
    frames = len(video) - at
    bar = video[at:at + 1].expand(frames, -1, -1, -1)
    return torch.cat([video[:at], bar])


WRONG = {other_colour: "colour", other_side: "out", three_frames_late: "time", twin: "out"}


@pytest.mark.parametrize("spoil", WRONG)
def test_what_is_spoiled_behind_the_bar_fails(true, spoil):
    """And what it is not aimed at does not."""
    metric = WRONG[spoil]
    for video in true[0]:
        spoiled = spoil(video, hidden_frame(video))
        wrong = [passage for passage in passages_of(spoiled) if not passage[metric]]
        assert wrong, f"{spoil.__name__} is not seen"
        first = wrong[0]
        for name in {"colour", "shape"} - {metric}:
            assert first[name]


def test_a_triangle_upside_down_is_another_shape(true):
    video, captions = true
    triangle = captions[:, 1] == WORDS.index("triangle")
    assert triangle.sum() >= 2
    for one in video[triangle]:
        spoiled = upside_down(one, hidden_frame(one))
        right = [passage["shape"] for passage in passages_of(spoiled)]
        assert not all(right)


def test_who_stays_away_fails_every_passage_that_there_was_time_for(true):
    video, captions = true
    whole = passages.passage_report(video, captions)
    assert whole["out"] == 1
    for one in video:
        gone = passages_of(never_out(one, hidden_frame(one)))
        every = len(passages_of(one))
        came_out = sum(passage["out"] for passage in gone)
        assert came_out <= 1, "before it went"
        assert len(gone) >= every - 1 - every // 4
        assert len(gone) <= every + 1 + every // 4
    black = torch.full_like(video, -1)
    still = video[:, :1].expand_as(video)
    glimpse = torch.cat([video[:, :1], black[:, 1:]], 1)
    for dead in (black, still, glimpse):
        report = passages.passage_report(dead, captions)
        assert max(report.values()) == 0, "black, still, or gone at once"


def test_a_caption_that_is_not_shown_fails(true):
    video, captions = true
    wrong = captions.clone()
    wrong[:, 0] = wrong[:, 0] % 6 + 1                        # the next of six colours
    report = passages.passage_report(video, wrong)
    assert report["colour"] == report["survival"] == 0
    assert report["shape"] == report["time"] == 1


def test_a_few_frames_foretell_nothing(true):
    video, captions = true
    report = passages.passage_report(video[:, :3], captions)
    for value in report.values():
        assert math.isnan(value)
