"""Switching captions in mid-video: keep, recache, cut. Each is told from the others by what the
cache holds afterwards, and no video notices what its neighbours do."""

from dataclasses import replace

import pytest
import torch
from hypothesis import strategies as st

from engine.streaming import FastStream
from engine.switching import SWITCHES, rows_by_layer
from flow import GuidedStream, Stream, VideoDraws, euler, rollout
from lab import forall, seeds
from mla_video import PRESETS, VideoDiT
from toy_data import WORDS, encode_caption

TINY = replace(PRESETS["toy"], dim=32, layers=2, heads=2, latent=8, query_latent=16, rope=6,
               ffn=32, words=len(WORDS), frames=12)
HOW = dict(sampler=euler, steps=1)
RED = encode_caption("red disc")
BLUE = encode_caption("fast blue square")
WINDOWS = [dict(window=12, sink=0), dict(window=9, sink=1), dict(window=12, sink=4),
           dict(window=5, sink=1), dict(window=3, sink=0)]


def untrained(seed: int = 0, **sizes) -> VideoDiT:
    """Weights that make every input matter: the layers that begin at zero, too."""
    torch.manual_seed(seed)
    model = VideoDiT(replace(TINY, **sizes)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


def stream_of(model, captions, guided=False, kind=Stream):
    stream = kind(model, captions)
    if guided:
        return GuidedStream(stream, kind(model, torch.zeros_like(captions)), 2.0)
    return stream


def compiled(model, captions):
    return FastStream(model, captions, backend="eager")


def kept_rows(cache) -> list[torch.Tensor]:
    """What is kept of each layer, in the order of the frames' numbers."""
    order = cache.frames().argsort()
    found = []
    for buffers in rows_by_layer(cache):
        for buffer in buffers:
            kept = buffer[:, :cache.filled * cache.tokens]
            kept = kept.unflatten(1, (cache.filled, cache.tokens))
            found.append(kept[:, order].clone())
    return found


def switched(model, name: str, before: int, captions, later, after: int = 3, guided=False,
             kind=Stream, seed=0):
    """(stream, video) of `before` chunks under `captions`, and `after` under the `later`."""
    stream = stream_of(model, captions, guided, kind)
    switch = SWITCHES[name](stream, seed, **HOW)
    draws = VideoDraws(seed, len(captions))
    chunks = []
    for chunk in rollout(stream, 3 * (before + after), draws, **HOW):
        chunks.append(chunk)
        switch.after(chunk, later if len(chunks) >= before else captions)
    return stream, torch.cat(chunks, 1)


@pytest.mark.parametrize("sizes", WINDOWS)
@pytest.mark.parametrize("kind", [Stream, compiled])
@pytest.mark.parametrize("before", [1, 2, 4, 9])
def test_recache_is_the_past_committed_under_the_new_caption(sizes, kind, before):
    """The window's frames, and nothing else: a stream that was shown those chunks alone, under
    the new caption, has the same rows, each for the same frame."""
    model = untrained(**sizes)
    one = RED[None]
    stream, video = switched(model, "recache", before, one, BLUE[None], 0, kind=kind)
    cache = stream.cache
    c = model.config
    sink_chunks = -(-c.sink // 3)
    ring_chunks = -(-(c.window - 3 - c.sink) // 3)
    numbers = list(range(before))
    if before > sink_chunks + ring_chunks:
        numbers = numbers[:sink_chunks] + numbers[before - ring_chunks:]
    fresh = Stream(model, BLUE[None])
    for number in numbers:
        fresh.commit(video[:, 3 * number:3 * number + 3])
    assert torch.equal(stream.caption, BLUE[None])
    assert cache.filled == fresh.cache.filled and int(cache.seen) == 3 * before
    for found, wanted in zip(kept_rows(cache), kept_rows(fresh.cache)):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_keep_leaves_the_past_as_it_is():
    model = untrained()
    stream, _ = switched(model, "keep", 5, RED[None], BLUE[None], 0)
    plain, _ = switched(model, "keep", 5, RED[None], RED[None], 0)
    assert torch.equal(stream.caption, BLUE[None])
    for found, wanted in zip(kept_rows(stream.cache), kept_rows(plain.cache)):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("kind", [Stream, compiled])
def test_cut_goes_on_from_a_video_that_never_had_the_old_caption(guided, kind):
    """Nothing of the past is left in the cache: with other videos before it, the rest is the
    same. And it is the rest of a video: its window was filled unseen."""
    model = untrained()
    _, ours = switched(model, "cut", 5, RED[None], BLUE[None], guided=guided, kind=kind)
    green = encode_caption("slow green triangle")[None]
    _, other = switched(model, "cut", 5, green, BLUE[None], guided=guided, kind=kind)
    assert not torch.allclose(ours[:, :15], other[:, :15])
    torch.testing.assert_close(ours[:, 15:], other[:, 15:], atol=1e-4, rtol=1e-4)


def test_cut_takes_no_noise_twice():
    model = untrained()
    stream, video = switched(model, "cut", 4, RED[None], BLUE[None], 0)
    begun = torch.cat(list(rollout(Stream(model, BLUE[None]), 9, VideoDraws(0, 1), **HOW)), 1)
    fresh = Stream(model, BLUE[None])
    for first in (0, 3, 6):
        fresh.commit(begun[:, first:first + 3])
    same = [torch.allclose(a, b) for a, b in
            zip(kept_rows(stream.cache), kept_rows(fresh.cache))]
    assert not any(same), "the unseen video is the one whose noise was used before"


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("kind", [Stream, compiled])
@pytest.mark.parametrize("before", [2, 6])
def test_a_switch_is_the_business_of_its_own_video(name, guided, kind, before):
    """Three videos, of which the second switches: it goes on as it would alone, and the others
    as if nothing had been."""
    model = untrained(1)
    three = torch.stack([RED, encode_caption("slow green triangle"), BLUE])
    later = three.clone()
    later[1] = encode_caption("cyan disc")
    how = dict(guided=guided, kind=kind)
    _, videos = switched(model, name, before, three, later, **how)
    _, unchanged = switched(model, "keep", before, three, three, **how)
    for i in (0, 2):
        torch.testing.assert_close(videos[i], unchanged[i], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(videos[1, 3 * before:], unchanged[1, 3 * before:])
    _, pair = switched(model, name, before, three[:2], later[:2], **how)
    torch.testing.assert_close(videos[1], pair[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", SWITCHES)
def test_a_caption_that_stays_changes_nothing(name):
    model = untrained(2)
    _, videos = switched(model, name, 5, RED[None], RED[None])
    _, plain = switched(model, "keep", 5, RED[None], RED[None])
    assert torch.equal(videos, plain)


@forall(window=st.integers(4, 12), sink=st.integers(0, 4), old=st.integers(1, 12),
        new=st.integers(0, 12), full=st.booleans(), seed=seeds)
def test_rows_are_implanted_by_the_age_of_their_frames(code, window, sink, old, new, full, seed):
    """With rows that say which frame they are of: after `new` chunks or more, as many as fill
    the window or as there are, the rows of a video are those of the same age."""
    sink = min(sink, window - 3)
    sizes = dict(tokens=2, chunk=3, window=window, sink=sink, horizon=12)
    if old * 3 < window:
        new = old
    else:
        least = -(-sink // 3) - (-(window - 3 - sink) // 3) + 1
        new += least

    def told(chunks: int, sign: int, videos: int):
        cache = code.cache.RollingCache(2, videos, (1, 1), **sizes)
        for first in range(0, 3 * chunks, 3):
            frames = torch.arange(first, first + 3).repeat_interleave(2) + 1.0
            rows = (sign * frames)[None, :, None].expand(videos, -1, -1)
            cache.commit([(rows, rows)] * 2)
        return cache

    cache = told(old, 1, 3)
    frames = cache.frames()
    if full and cache.filled == cache.capacity:
        cache = code.streaming.FullWindow(cache)
    fresh = told(new, -1, 2)
    with torch.no_grad():
        code.switching.implant(cache, fresh, torch.tensor([0, 2]))
    wanted = torch.where(frames < sink, frames, frames - 3 * old + 3 * new)
    for buffers in code.switching.rows_by_layer(cache):
        for buffer in buffers:
            kept = buffer[:, :2 * cache.filled, 0].unflatten(1, (-1, 2))
            for video, rows in ((0, -1 - wanted), (1, frames + 1), (2, -1 - wanted)):
                for token in (0, 1):
                    assert torch.equal(kept[video, :, token], rows.float())


def test_what_is_remembered_does_not_grow():
    model = untrained(window=9, sink=1)
    stream = Stream(model, RED[None])
    switch = SWITCHES["recache"](stream)
    for _ in range(50):
        switch.after(torch.zeros(1, 3, 3, 16, 16), RED[None])
    assert len(switch.first) + len(switch.latest) == 3     # one of the sink, two of the ring
