"""Prompts: which caption each video has at each frame, however its captions change."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from lab import forall

CAPTIONS = ("red disc", "blue disc", "slow square", "fast green triangle", "")

# A video: its first caption, and what is changed, at which frame, in the order of the flags.
changes = st.lists(st.tuples(st.integers(0, 12), st.sampled_from(CAPTIONS)), max_size=4)
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
    schedule = code.sample.read_prompts(as_flags(videos))
    for frame in range(15):
        captions = code.sample.captions_at(frame, schedule)
        for number, video in enumerate(videos):
            wanted = code.sample.encode_caption(caption_at(video, frame))
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


@forall(videos=videos, frames=st.integers(1, 15))
def test_a_chunk_is_made_under_the_captions_of_its_first_frame(code, videos, frames):
    """A change inside a chunk waits for the next one; one at frame 0 holds from the start."""
    schedule = code.sample.read_prompts(as_flags(videos))
    stream = Recorder(code.sample.captions_at(0, schedule))
    file = Nowhere()
    how = dict(sampler=code.flow.euler, steps=1)
    code.sample.write(file, stream, schedule, SimpleNamespace(seed=0, frames=frames), how)
    assert file.frames == frames, "as many frames as were asked for"
    for number, captions in enumerate(stream.under):
        wanted = [caption_at(video, number * stream.chunk) for video in videos]
        said = [code.sample.decode_caption(caption) for caption in captions]
        assert said == wanted, f"chunk {number} was made under {said}, not {wanted}"


def test_a_change_needs_a_video_before_it(code):
    with pytest.raises(ValueError, match="there is none"):
        code.sample.read_prompts(["48: blue square", "red disc"])
