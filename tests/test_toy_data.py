"""Properties of toy_data.py: a clip is a function of (seed, index) and shows its caption."""

import itertools
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import metrics
import toy_data as td

WORLDS = ("shapes", "digits", "occluder")
seeds = st.integers(0, 2**62)
some_indices = st.lists(st.integers(0, 2**62), min_size=1, max_size=5)


# ---- any clip again, in any order ----------------------------------------------------------

@pytest.mark.parametrize("name", WORLDS)
@settings(max_examples=8, deadline=None)
@given(seed=seeds, indices=some_indices, frames=st.integers(1, 15), size=st.integers(8, 24))
def test_a_batch_is_its_clips_bit_for_bit(name, seed, indices, frames, size):
    video, captions = td.make_world(name, frames, size, seed).batch(indices)
    B = len(indices)
    assert video.shape == (B, frames, 3, size, size)
    assert video.dtype == torch.float32
    assert captions.shape == (B, td.CAPTION_SLOTS)
    assert captions.dtype == torch.long
    assert (captions > 0).all()
    assert video.abs().max() <= 1, "frames must stay in [-1, 1]"
    for b, index in enumerate(indices):
        alone, words = td.make_world(name, frames, size, seed).clip(index)
        same = torch.equal(alone, video[b]) and torch.equal(words, captions[b])
        assert same, f"clip {index} depends on its batch or on the object"


@pytest.mark.parametrize("name", WORLDS)
def test_seeds_and_indices_give_different_clips(name):
    different = set()
    for seed in (1, 2):
        video, _ = td.make_world(name, seed=seed).batch(range(20))
        different.update(clip.numpy().tobytes() for clip in video)
    assert len(different) == 40, "two of 40 clips are the same: seed or index is ignored"


@pytest.mark.parametrize("bad", [{"frames": 0}, {"size": 4}, {"seed": -1}])
def test_impossible_worlds_are_refused(bad):
    with pytest.raises(ValueError, match="a world needs"):
        td.make_world("shapes", **bad)


def test_unknown_worlds_are_refused():
    with pytest.raises(ValueError, match="no world called 'cubes'.*shapes, digits, occluder"):
        td.make_world("cubes")


# ---- motion --------------------------------------------------------------------------------

@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([12, 16, 32]))
def test_the_subject_stays_whole_and_inside(seed, size):
    video, _ = td.make_world("shapes", 60, size, seed).batch(range(4))
    mass = metrics.subject_mass(video) / metrics.true_mass(size)
    least = mass.min()
    most = mass.max()
    whole = least > 0.75 and most < 1.15
    assert whole, f"mass strays to {least:.2f}..{most:.2f} of the true one: cut by a wall?"
    centre = metrics.centroid(video) / size
    inside = centre.min() > 0.2 and centre.max() < 0.85
    assert inside, "a centre may not come nearer to a wall than a shape's half size"


def test_speed_is_in_the_captions_band_between_bounces():
    # Large frames: the pixels of small ones would blur the measured centroid.
    video, captions = td.make_world("shapes", frames=16, size=64).batch(range(40))
    for word, (low, high) in td.SPEEDS.items():
        says_so = captions[:, 2] == td.WORDS.index(word)
        step = metrics.speed(video[says_so]) * 16 / 64
        fastest = step.max()
        assert fastest < high + 0.05, (
            f"a {word} subject moved {fastest:.2f} pixels in a frame; "
            "bounces can only shorten a step")
        typical = step.sort(dim=1).values[:, 11]             # the upper third sees no bounce
        in_band = (typical > low - 0.03) & (typical < high + 0.03)
        assert in_band.all(), f"{word} is not {low}..{high} pixels a frame: {typical}"


@given(start=st.floats(2, 8), velocity=st.floats(-3, 3))
def test_bounce_is_stepwise_reflection(start, velocity):
    path = td.bounce(np.full(2, start), np.full(2, velocity), 40, 2.0, 8.0)
    position = start
    # The naive simulation that the closed form replaces.
    for frame in range(40):
        found = path[frame, 0]
        assert abs(found - position) < 1e-9, f"frame {frame}: {found} instead of {position}"
        position += velocity
        if position < 2:
            position = 2 * 2 - position
            velocity = -velocity
        elif position > 8:
            position = 2 * 8 - position
            velocity = -velocity


# ---- what is drawn -------------------------------------------------------------------------

def test_the_three_shapes_are_about_equally_large():
    kinds = torch.arange(3)
    middle = torch.full((3, 2), 8.0)
    area = td.coverage(kinds, middle, 16, 16).sum((-2, -1))
    ratio = area.max() / area.min()
    assert ratio < 1.15, f"areas {area.tolist()}: mass alone would give the shape away"


def test_occluder_hides_the_subject_and_gives_it_back():
    video, _ = td.make_world("occluder", frames=30).batch(range(60))
    mass = metrics.subject_mass(video)
    in_view = mass > 3
    assert in_view[:, 0].all(), "a clip must begin with its subject in view"
    hidden = mass < 0.05
    assert (hidden.sum(1) >= 2).all(), "every subject must vanish for some frames"
    hidden_before = hidden.cumsum(1) > 0
    out_again = (in_view & hidden_before).any(1)
    assert out_again.float().mean() > 0.95, "subjects must come out again"


def test_digits_are_sharp_enough_to_tell_apart():
    video, captions = td.make_world("digits", frames=1).batch(range(300))
    digits = {td.WORDS.index(word) for word in td.DIGITS}
    assert set(captions[:, 1].tolist()) == digits
    brightest = video.amax((1, 2, 3, 4))
    assert (brightest > 0.4).all(), "a digit has faded in resampling"


def test_digits_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        td.make_world("digits")


# ---- captions ------------------------------------------------------------------------------

one_word_or_none = [st.sampled_from(("",) + slot) for slot in td.SLOTS]


@given(words=st.tuples(*one_word_or_none), order=st.permutations(range(3)))
def test_caption_round_trip_in_any_order(words, order):
    shuffled = [words[i] for i in order]
    ids = td.encode_caption(" ".join(shuffled))
    assert [td.WORDS[i] for i in ids] == list(words)
    spoken = td.decode_caption(ids)
    assert torch.equal(td.encode_caption(spoken), ids)


BAD_CAPTIONS = [
    ("purple disc", "'purple'.*red.*disc"),
    ("red blue disc", "both 'red' and 'blue'"),
    ("disc seven", "both"),
    ("slow fast", "both"),
    ("red red", "both"),
]


@pytest.mark.parametrize("text, says", BAD_CAPTIONS)
def test_bad_captions_are_explained(text, says):
    with pytest.raises(ValueError, match=says) as caught:
        td.encode_caption(text)
    assert "\n" not in str(caught.value)


# ---- captions with words left out ------------------------------------------------------------


@pytest.mark.parametrize("data", ["shapes", "occluder", "digits"])
def test_words_that_are_left_out_are_drawn_and_those_said_are_kept(data):
    """For every subset of words: what is said stays, the rest are words of this world, each about
    as often as any other; a seed draws the same; nothing said stays nothing."""
    words = td.words_of(data)
    full = torch.tensor([td.WORDS.index(part[0]) for part in words])
    for said in itertools.product((0, 1), repeat=3):
        caption = full * torch.tensor(said)
        filled = torch.stack([td.fill_in(caption, data, seed) for seed in range(300)])
        if not any(said):
            assert not filled.any(), "the null caption is a caption of its own"
            continue
        for slot in range(3):
            found = {td.WORDS[i] for i in filled[:, slot].tolist()}
            if said[slot]:
                assert found == {words[slot][0]}
                continue
            assert found == set(words[slot]), f"{data}: {found} for a word that was left out"
            counts = filled[:, slot].bincount()
            assert counts.max() < 0.65 * 300, "one word is drawn much more often than others"
        assert torch.equal(filled[7], td.fill_in(caption, data, 7))


def test_a_word_that_is_left_open_stays_the_same_when_others_change():
    """The speed of "red disc" is that of "blue disc", for one seed: a caption may be switched."""
    for seed in range(20):
        red = td.fill_in(td.encode_caption("red disc"), "shapes", seed)
        blue = td.fill_in(td.encode_caption("blue square"), "shapes", seed)
        assert red[2] == blue[2] > 0


@pytest.mark.parametrize("data, text, word", [
    ("shapes", "white disc", "white"), ("shapes", "red seven", "seven"),
    ("digits", "red disc", "disc"), ("clips.npy", "red", "red")])
def test_a_word_that_a_model_has_never_seen_is_refused_by_name(data, text, word):
    with pytest.raises(ValueError, match=f"never seen the word '{word}'"):
        td.check_words(td.encode_caption(text), data)


def test_words_of_a_world_are_those_of_its_clips():
    for data in ("shapes", "occluder", "digits"):
        _, captions = td.make_world(data).batch(range(400))
        for slot, words in enumerate(td.words_of(data)):
            seen = {td.WORDS[i] for i in captions[:, slot].tolist()}
            assert seen == set(words), f"{data}: its clips say {seen}"
            td.check_words(captions[0], data)
