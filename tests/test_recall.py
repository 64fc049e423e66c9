"""The recall world: what its curtain hides, what its gauge tells, and how its videos are
judged. Clips as functions of (seed, index): test_toy_data.py, for every world."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import metrics
import toy_data as td

LENGTHS = st.integers(1, 8).map(lambda chunks: 3 * chunks)


def steady(frames: int, curtain: int = 24, size: int = 16, seed: int = 0) -> td.Recall:
    return td.Recall("recall", frames, size, seed, curtain, vary=False)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**62), indices=st.lists(st.integers(0, 2**62), min_size=1, max_size=4),
       size=st.integers(8, 24), vary=st.booleans())
def test_a_batch_is_its_clips_bit_for_bit(seed, indices, size, vary):
    world = td.Recall("recall", 40, size, seed, vary=vary)
    video, captions = world.batch(indices)
    assert video.shape == (len(indices), 40, 3, size, size)
    assert video.dtype == torch.float32
    assert video.abs().max() <= 1
    assert not captions.any(), "nothing is said about what must be remembered"
    for b, index in enumerate(indices):
        alone, _ = td.Recall("recall", 40, size, seed, vary=vary).clip(index)
        assert torch.equal(alone, video[b])


@given(LENGTHS)
@settings(max_examples=8, deadline=None)
def test_the_curtain_closes_and_opens_for_ever(length):
    period = 6 + length
    video, _ = steady(4 * period, length).batch(range(6))
    open_frames = torch.arange(4 * period) % period < 6
    assert (metrics.in_view(video) == open_frames).all()
    assert (metrics.alive(video) == open_frames).all()


@given(LENGTHS, st.integers(0, 2**31))
@settings(max_examples=8, deadline=None)
def test_a_closed_curtain_hides_every_pixel(length, seed):
    """Closed frames are the same for every subject."""
    video, _ = steady(80, length, seed=seed).batch(range(12))
    closed = torch.arange(80) % (6 + length) >= 6
    hidden = video[:, closed]
    assert (hidden == hidden[:1]).all()
    assert (video[:, ~closed] != video[:1, ~closed]).any(), "open frames differ"


def test_a_frame_tells_all_about_the_curtain():
    """No two of (length, place in the period) look alike at the frame's foot: a window of 3
    frames knows as much about the curtain as one of 36."""
    looks = {}
    for length in range(3, 27, 3):
        video, _ = steady(6 + length, length).batch([0])
        for place, frame in enumerate(video[0]):
            closed = not metrics.in_view(frame[None, None]).item()
            foot = frame[:, -2:].numpy().tobytes()
            assert (closed, foot) not in looks, f"{(length, place)} looks like {looks[closed, foot]}"
            looks[closed, foot] = (length, place)
            assert (frame[:, -2:] == frame[:1, -1:]).all(), "the gauge is grey and of two rows"


def test_the_subject_flies_on_behind_the_curtain_and_never_under_the_gauge():
    bare = steady(90, 24)
    bare.SEEN = 90                                         # as if the curtain never closed
    seen, _ = bare.batch(range(40))
    video, _ = steady(90, 24).batch(range(40))
    above = slice(None, -2)
    for start in (0, 30, 60):
        span = slice(start, start + 6)
        assert torch.equal(video[:, span, :, above], seen[:, span, :, above])
    mass = metrics.subject_mass(seen) / metrics.true_mass(16)
    assert mass.min() > 0.75 and mass.max() < 1.15, "a subject is cut"


def test_clips_for_training_vary():
    """Every length; half begin in view, the others anywhere; the subject is that of the steady
    world."""
    world = td.make_world("recall", 36)
    schedules = [world.schedule(index) for index in range(2000)]
    assert {length for length, _ in schedules} == set(range(3, 27, 3))
    assert all(begin % 3 == 0 and begin < 6 + length for length, begin in schedules)
    begins = [begin for length, begin in schedules if length == 24]
    assert set(begins) == set(range(0, 30, 3))
    share = begins.count(0) / len(begins)
    assert 0.45 < share < 0.65, "1/2 + 1/2 * 1/10"
    assert world.plan(5).colour == steady(36).plan(5).colour
    assert torch.equal(world.batch([5])[0], world.batch([5])[0])


def test_all_colours_and_shapes_alike():
    world = steady(6)
    plans = [world.plan(index) for index in range(3000)]
    for colour in list(td.COLOURS)[:td.HUES]:
        assert abs(sum(plan.colour == colour for plan in plans) / 3000 - 1 / 6) < 0.03
    for kind in range(3):
        assert abs(sum(plan.thing == kind for plan in plans) / 3000 - 1 / 3) < 0.04


@pytest.mark.parametrize("curtain", [0, 4, 27, -3])
def test_impossible_curtains_are_refused(curtain):
    with pytest.raises(ValueError, match="a curtain closes for 3, 6, ... 24 frames"):
        steady(36, curtain)


# ---- the report ------------------------------------------------------------------------------

@pytest.mark.parametrize("vary", [False, True])
def test_true_videos_recall_everything(vary):
    world = td.Recall("recall", 90, 16, 3, vary=vary)
    video, captions = world.batch(range(100))
    assert metrics.recall_report(video, captions) == {"alive": 1, "colour": 1, "shape": 1}


def opened_again() -> tuple[torch.Tensor, torch.Tensor, td.Recall]:
    world = steady(36)
    video, captions = world.batch(range(60))
    return video, captions, world


def test_the_subject_of_another_clip_is_noticed():
    video, captions, world = opened_again()
    other = torch.cat((video[:, :30], video[:, 30:].roll(1, 0)), 1)
    report = metrics.recall_report(other, captions)
    plans = [world.plan(index) for index in range(60)]
    pairs = list(zip(plans, plans[-1:] + plans[:-1]))
    same_colour = sum(a.colour == b.colour for a, b in pairs) / 60
    same_shape = sum(a.thing == b.thing for a, b in pairs) / 60
    assert report["alive"] == 1
    assert report["colour"] == pytest.approx(same_colour)
    assert report["shape"] == pytest.approx(same_shape)


def test_another_colour_is_no_other_shape():
    video, captions, _ = opened_again()
    swapped = video.clone()
    swapped[:, 30:] = video[:, 30:].roll(1, 2)             # red becomes green ...
    report = metrics.recall_report(swapped, captions)
    assert report == {"alive": 1, "colour": 0, "shape": 1}


def test_a_curtain_that_stays_closed_recalls_nothing():
    video, captions, _ = opened_again()
    shut = torch.cat((video[:, :30], video[:, 24:30]), 1)
    assert metrics.recall_report(shut, captions) == {"alive": 0, "colour": 0, "shape": 0}
    black = video.clone()
    black[:, 30:] = -1
    assert metrics.recall_report(black, captions) == {"alive": 0, "colour": 0, "shape": 0}


def test_half_of_the_frames_are_half():
    video, captions, _ = opened_again()
    video[:, 33:] = -1
    assert metrics.recall_report(video, captions) == {"alive": 0.5, "colour": 0.5, "shape": 0.5}
