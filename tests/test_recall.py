"""The recall world: what its curtain hides, what its gauge tells, and how its videos are
judged."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import metrics
import toy_data as td
import train

LENGTHS = tuple(range(3, 27, 3))
lengths = st.sampled_from(LENGTHS)
indices = st.lists(st.integers(0, 2**62), min_size=1, max_size=4)
FEW = settings(max_examples=6, deadline=None)
NAMES = ("alive", "colour", "shape", "survival")
ALL = dict.fromkeys(NAMES, 1)
HALF = dict.fromkeys(NAMES, 0.5)
NOTHING = dict.fromkeys(NAMES, 0)


def steady(frames: int, curtain: int = 24, size: int = 16, seed: int = 0) -> td.Recall:
    return td.Recall("recall", frames, size, seed, curtain, vary=False)


# ---- the world -------------------------------------------------------------------------------

@FEW
@given(st.integers(0, 2**62), indices, st.integers(8, 24), st.booleans())
def test_a_batch_is_its_clips_bit_for_bit(seed, indices, size, vary):
    video, captions = td.Recall("recall", 40, size, seed, vary=vary).batch(indices)
    assert video.shape == (len(indices), 40, 3, size, size)
    assert video.dtype == torch.float32
    assert video.abs().max() <= 1
    assert not captions.any(), "nothing is said about what must be remembered"
    for b, index in enumerate(indices):
        alone, _ = td.Recall("recall", 40, size, seed, vary=vary).clip(index)
        assert torch.equal(alone, video[b])


@FEW
@given(lengths)
def test_the_curtain_closes_and_opens_for_ever(length):
    period = 6 + length
    video, _ = steady(3 * period, length).batch(range(4))
    place = torch.arange(3 * period) % period
    in_view = (place < 6).expand(4, -1)
    assert torch.equal(metrics.in_view(video), in_view)
    assert torch.equal(metrics.alive(video), in_view)


@FEW
@given(lengths, st.integers(0, 2**31))
def test_a_closed_curtain_hides_every_pixel(length, seed):
    """Closed frames are the same for every subject."""
    video, _ = steady(60, length, seed=seed).batch(range(8))
    place = torch.arange(60) % (6 + length)
    closed = place >= 6
    a, b = video.chunk(2)
    same = (a == b).flatten(2)
    same = same.all(2)                                     # [4, F]
    assert same[:, closed].all()
    assert not same.all()


def test_a_frame_tells_all_about_the_curtain():
    """No two of (length, place in the period) look alike but for the subject: a window of 3
    frames knows as much about the curtain as one of 36."""
    looks = {}
    for length in LENGTHS:
        video, _ = steady(6 + length, length).batch([0])
        closed = ~metrics.in_view(video)[0]
        gauge = video[0, :, :, -2:]                        # [F, 3, 2, w]
        row = gauge[:, :1, -1:]
        assert torch.equal(gauge, row.expand_as(gauge)), "it is grey, and its rows are alike"
        for place, (shut, levels) in enumerate(zip(closed.tolist(), row.flatten(1).tolist())):
            look = (shut, *levels)
            assert look not in looks, f"{(length, place)} looks like {looks[look]}"
            looks[look] = (length, place)


def test_the_subject_flies_on_behind_the_curtain_and_never_under_the_gauge():
    bare = steady(66)
    bare.SEEN = 66                                         # as if it were never closed
    seen, _ = bare.batch(range(20))
    video, _ = steady(66).batch(range(20))
    video = video[..., :-2, :]                             # without the gauge
    for start in (0, 30, 60):
        span = slice(start, start + 6)
        assert torch.equal(video[:, span], seen[:, span, :, :-2])
    mass = metrics.subject_mass(seen) / metrics.true_mass(16)
    assert mass.min() > 0.75, "a subject is cut"
    assert mass.max() < 1.15


def test_clips_for_training_vary():
    """All lengths are as likely; one half of the clips begins in view, the other anywhere."""
    world = td.make_world("recall", 36)
    schedules = Counter(world.schedule(index) for index in range(4000))
    for length in LENGTHS:
        places = range(0, 6 + length, 3)
        clips = [schedules[length, begin] for begin in places]
        total = sum(clips)
        assert 400 < total < 600
        assert min(clips) > 0
        in_view = 0.5 + 0.5 / len(places)
        assert clips[0] / total == pytest.approx(in_view, abs=0.1)
    assert world.plan(5).colour == steady(36).plan(5).colour, "the subject is the steady world's"


def test_all_colours_and_shapes_alike():
    world = steady(6)
    plans = [world.plan(index) for index in range(1200)]
    colours = Counter(plan.colour for plan in plans)
    shapes = Counter(plan.thing for plan in plans)
    assert len(colours) == td.HUES
    assert len(shapes) == 3
    assert min(colours.values()) > 150
    assert min(shapes.values()) > 340


@pytest.mark.parametrize("curtain", [0, 4, 27, -3])
def test_impossible_curtains_are_refused(curtain):
    with pytest.raises(ValueError, match="a curtain closes for 3, 6, ... 24 frames"):
        steady(36, curtain)


# ---- the report ------------------------------------------------------------------------------

@pytest.mark.parametrize("vary", [False, True])
def test_true_videos_recall_everything(vary):
    world = td.Recall("recall", 72, 16, 3, vary=vary)
    video, captions = world.batch(range(40))
    assert metrics.recall_report(video, captions) == ALL


@pytest.fixture(scope="module")
def clips():
    """36 frames, the last 6 of which are in view again, and captions."""
    return steady(36).batch(range(30))


def report(clips, ending: torch.Tensor) -> dict[str, float]:
    """Of the clips, with these frames [B, n, ...] in place of their last ones."""
    video, captions = clips
    before = video[:, :-ending.shape[1]]
    return metrics.recall_report(torch.cat((before, ending), 1), captions)


def test_the_subject_of_another_clip_is_noticed(clips):
    video, _ = clips
    others = video.roll(1, 0)
    found = report(clips, others[:, 30:])
    world = steady(36)
    plans = [world.plan(index) for index in range(30)]
    same_colour = 0
    same_shape = 0
    same = 0
    for i, plan in enumerate(plans):
        same_colour += plan.colour == plans[i - 1].colour
        same_shape += plan.thing == plans[i - 1].thing
        same += (plan.colour, plan.thing) == (plans[i - 1].colour, plans[i - 1].thing)
    assert found["alive"] == 1
    assert found["colour"] == pytest.approx(same_colour / 30)
    assert found["shape"] == pytest.approx(same_shape / 30)
    assert found["survival"] == pytest.approx(same / 30)


def test_another_colour_is_no_other_shape(clips):
    red_is_green = clips[0][:, 30:].roll(1, 2)
    assert report(clips, red_is_green) == ALL | {"colour": 0, "survival": 0}


def test_a_curtain_that_stays_closed_recalls_nothing(clips):
    video, _ = clips
    assert report(clips, video[:, 24:30]) == NOTHING
    black = torch.full_like(video, -1)
    assert report(clips, black[:, :6]) == NOTHING, "nobody is there"


def test_half_of_the_frames_are_half(clips):
    video, _ = clips
    black = torch.full_like(video, -1)
    assert report(clips, black[:, :3]) == HALF


def test_clips_too_short_for_the_curtain_are_said_to_be(tmp_path, monkeypatch, capsys):
    """They are trained on all the same: the subject is seldom seen again in them."""
    monkeypatch.setattr(train, "report", lambda *rest: None)
    flags = ["--data=recall", "--device=cpu", "--steps=1", "--batch=1", "--evaluate=0"]
    for frames, said in ((12, True), (36, False)):
        train.main([*flags, f"--config=frames={frames}", f"--config=window={frames}",
                    f"--out={tmp_path / str(frames)}"])
        line = "does not show all of recall: --config frames=36 --config window=36 does"
        assert (line in capsys.readouterr().out) == said, frames
