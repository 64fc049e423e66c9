"""Prompts: which caption each video has at each frame, however its captions change."""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from lab import forall

CAPTIONS = ("red disc", "blue disc", "slow square", "fast green triangle", "")

# A video: its first caption, and what is changed, at which frame, in the order of the flags. Half
# of the frames are the first of a chunk.
frame_numbers = st.one_of(st.integers(0, 12), st.sampled_from([3, 6, 9, 12]))
changes = st.lists(st.tuples(frame_numbers, st.sampled_from(CAPTIONS)), max_size=4)
videos = st.lists(st.tuples(st.sampled_from(CAPTIONS), changes), min_size=1, max_size=3)


def as_flags(videos) -> list[str]:
    """What is given to --prompt, one after the other."""
    prompts = []
    for first, changes in videos:
        prompts.append(first)
        prompts += [f"{frame}: {caption}" for frame, caption in changes]
    return prompts


def caption_at(video, frame: int) -> str:
    """By a dictionary: of all that was said for frames until now, what is latest. Where two are
    for one frame, what was said last."""
    first, changes = video
    said = {-1: first}
    for start, caption in changes:
        said[start] = caption
    return said[max(start for start in said if start <= frame)]


@forall(videos=videos)
def test_each_video_shows_its_own_latest_caption_at_each_frame(code, videos):
    schedule = code.prompts.read_prompts(as_flags(videos))
    for frame in range(15):
        captions = code.prompts.captions_at(frame, schedule)
        for number, video in enumerate(videos):
            wanted = code.toy_data.encode_caption(caption_at(video, frame))
            assert torch.equal(captions[number], wanted), \
                f"frame {frame}, video {number}: not {caption_at(video, frame)!r}"


class Recorder:
    """A stream that notes under which captions each of its chunks was made."""

    chunk = 3

    def __init__(self, captions):
        self.caption = captions
        self.under = []

    def chunk_like(self):
        return torch.empty(len(self.caption), self.chunk, 3, 2, 2)

    def velocity(self, x, sigma):
        return torch.zeros_like(x)

    def commit(self, x):
        self.under.append(self.caption)


class Nowhere:
    """A video file that keeps the number of its frames alone."""

    frames = 0

    def append(self, frames: np.ndarray) -> None:
        self.frames += len(frames)

    def close(self) -> None:
        self.closed = True


@forall(videos=videos, frames=st.sampled_from([15, 14, 13, 12, 7, 2]))
def test_a_chunk_is_made_under_the_captions_of_its_first_frame(code, videos, frames):
    """A change inside a chunk waits for the next one; one at frame 0 holds from the start."""
    schedule = code.prompts.read_prompts(as_flags(videos))
    stream = Recorder(code.prompts.captions_at(0, schedule))
    file = Nowhere()
    chunks = code.flow.rollout(stream, frames, code.flow.Draws(), steps=1)
    code.sample.write(chunks, frames, schedule, code.switching.Keep(stream), file)
    assert file.frames == frames, "as many frames as were asked for"
    assert file.closed
    for number, captions in enumerate(stream.under):
        wanted = [caption_at(video, number * stream.chunk) for video in videos]
        said = [code.toy_data.decode_caption(caption) for caption in captions]
        assert said == wanted, f"chunk {number} was made under {said}, not {wanted}"


@forall(videos=videos, seed=st.integers(0, 5))
def test_a_word_that_a_later_caption_leaves_out_stays(code, videos, seed):
    """"48: blue" of a slow red disc is a slow blue disc."""
    schedule = code.prompts.read_prompts(as_flags(videos))
    completed = code.prompts.complete(schedule, "shapes", seed)
    assert list(completed) == sorted(schedule)
    for number in range(len(videos)):
        now = None
        for frame in sorted(schedule):
            said, told = schedule[frame][number], completed[frame][number]
            assert said.any() == told.any(), "the null caption stays one, and no other is"
            assert torch.equal(told[said != 0], said[said != 0]), "what was said holds"
            if said.any():
                assert told.all()
            if said.any() and now is not None and now.any():
                assert torch.equal(told[said == 0], now[said == 0]), "and what was not said, stays"
            now = told


def test_a_change_needs_a_video_before_it(code):
    with pytest.raises(ValueError, match="there is none"):
        code.prompts.read_prompts(["48: blue square", "red disc"])


# ---- what may be said ------------------------------------------------------------------------

@forall(words=st.lists(st.sampled_from(["fast", "red", "disc"]), unique=True, min_size=1),
        plural=st.booleans(), separator=st.sampled_from([" ", ", ", ",", "  "]),
        article=st.sampled_from(["", "a ", "the ", "A ", "and "]))
def test_articles_commas_and_plurals_do_not_matter(code, words, plural, separator, article):
    said = [word + "s" if plural and word == "disc" else word for word in words]
    found = code.toy_data.encode_caption(article + separator.join(said) + ".")
    assert torch.equal(found, code.toy_data.encode_caption(" ".join(words)))


def test_every_thing_has_a_plural(code):
    for thing in code.toy_data.SHAPES + code.toy_data.DIGITS:
        ending = "es" if thing == "six" else "s"
        found = code.toy_data.encode_caption(thing + ending)
        assert code.toy_data.decode_caption(found) == thing


def test_a_word_that_is_none_is_named_as_it_was_said(code):
    for text, word in (("purple discs", "purple"), ("a red thes", "thes"), ("dis", "dis"),
                       ("red-disc", "red-disc")):
        with pytest.raises(ValueError, match=f"unknown word '{word}'"):
            code.toy_data.encode_caption(text)


@forall(videos=videos, frames=st.integers(1, 15))
def test_what_is_never_shown_is_what_no_chunk_is_made_under(code, videos, frames):
    """By trying: under which prompts are chunks made, if each prompt is known by its caption?"""
    prompts = as_flags(videos)
    schedule = code.prompts.read_prompts(prompts)
    lines = code.prompts.never_shown(prompts, 3, frames)
    silent = {line.split(" is never shown")[0] for line in lines}
    changes = code.prompts.read_changes(prompts)
    heard = set()
    for first in range(0, frames, 3):
        for video in range(len(videos)):
            until_now = [change for change in changes
                         if change.video == video and change.frame <= first]
            latest = max(change.frame for change in until_now)
            said = [change for change in until_now if change.frame == latest][-1]
            heard.add(repr(said.prompt))
            assert torch.equal(code.prompts.captions_at(first, schedule)[video], said.caption)
    unheard = {repr(change.prompt) for change in changes} - heard
    assert unheard <= silent, "what is never shown is said"
    assert len(lines) >= len(unheard)
