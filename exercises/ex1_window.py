"""Exercise 1: the mask of a sliding window with sink frames.

A long video looks back at a window: a few sink frames that stay for ever, the frames just
before the chunk, and the chunk itself. Streaming gets that from the cache, which has simply
forgotten the rest. Training runs all chunks in one pass and gets it from a mask. If the two
disagree nothing crashes: the model is just used on a past that it was never trained on.
(Released training code ignores the window that its own inference has, and trains on the full
history.)

You write the mask as a predicate on *token* indices, the form that FlexAttention takes, for a
sequence of clean frames. The tests hold it against what the cache keeps, and then run a layer
both ways.

Read first: cache.py, its header (the table of sink and ring) and `RollingCache` (what its
window counts); `grid_coords` in rope3d.py for the order of tokens. `allowed` in mla_video.py
solves the same for the two halves of teacher forcing: look there last, to compare.
Hint: there are three ways to be seen, joined by "or". They need three integers: the query's
chunk, that chunk's first frame, and the key's frame. Two traps: a sink frame is not yet a sink
frame before it exists, and frames of the query's own chunk are never too old.

    python -m pytest exercises/ex1_window.py        today: one line, "exercise 1: ..."
"""

import torch
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_mask

from attention import MLA
from cache import RollingCache
from lab import EXACT, Dice, assert_same, enliven, forall, seeds
from rope3d import Rope3D, grid_coords

# ---- yours to write -------------------------------------------------------------------------


def visible(q, k, *, P: int, chunk: int, window: int, sink: int):
    """May token `q` look at token `k`? Integer tensors that broadcast; returns a bool tensor.

    Tokens are counted from the start of the video, P to a frame, `chunk` frames to a chunk.
    All tokens of a chunk see the same: the whole chunk; of the frames before it the last
    window - chunk - sink; and the first `sink` frames of the video, as far as they are past.
    No `if` on a value and no loop: FlexAttention calls it on symbols, not on numbers.
    """
    raise NotImplementedError(
        "exercise 1: `visible`, who may look at whom through a window with sink frames")


# ---- the tests ------------------------------------------------------------------------------

WINDOWS = dict(
    P=st.integers(1, 3),
    chunk=st.integers(1, 3),
    sink=st.integers(0, 4),
    ring=st.integers(0, 4),
    chunks=st.integers(1, 5),
)


def mask_of(P, chunk, sink, ring, chunks):
    L = chunks * chunk * P
    token = torch.arange(L)
    window = sink + ring + chunk
    mask = visible(token[:, None], token[None], P=P, chunk=chunk, window=window, sink=sink)
    found = f"{mask.dtype} {list(mask.shape)}"
    assert found == f"torch.bool [{L}, {L}]", \
        f"q [{L}, 1] and k [1, {L}] must give a bool tensor [{L}, {L}], not {found}"
    return mask


def empty_cache(P, chunk, sink, ring, chunks, widths=(1, 1)):
    """For one layer and a video that ends before the horizon: positions are absolute times."""
    window = sink + ring + chunk
    horizon = window + chunks * chunk
    return RollingCache(1, 1, widths, tokens=P, chunk=chunk, window=window, sink=sink,
                        horizon=horizon, dtype=torch.float64)


@forall(**WINDOWS)
def test_a_frame_is_visible_if_the_cache_still_has_it(P, chunk, sink, ring, chunks):
    mask = mask_of(P, chunk, sink, ring, chunks)
    cache = empty_cache(P, chunk, sink, ring, chunks)
    nothing = torch.zeros(1, chunk * P, 1, dtype=torch.float64)
    for start in range(0, chunks * chunk, chunk):
        own = set(range(start, start + chunk))
        kept = own | set(cache.frames().tolist())
        want = {frame * P + i for frame in kept for i in range(P)}
        for q in range(start * P, (start + chunk) * P):
            got = set(mask[q].nonzero().flatten().tolist())
            extra = frames_of(got - want, P)
            missing = frames_of(want - got, P)
            assert got == want, (
                f"chunk {chunk}, sink {sink}, window {sink + ring + chunk}: a query in frame "
                f"{q // P} (chunk of frames {sorted(own)}) sees frames {extra} that the cache "
                f"does not have, and misses {missing} that it has. "
                + advice(own, extra, missing))
        cache.commit([(nothing, nothing)])


def frames_of(tokens: set[int], P: int) -> list[int]:
    return sorted({token // P for token in tokens})


def advice(own: set[int], extra: list[int], missing: list[int]) -> str:
    if any(frame > max(own) for frame in extra):
        return "The future leaks: is a sink frame visible before it exists?"
    if own.intersection(missing):
        return "A chunk sees all of itself, later tokens too."
    return ("The window counts the sink and the chunk itself, and it is measured from the "
            "chunk's first frame.")


@forall(seed=seeds, **WINDOWS)
def test_one_masked_pass_is_streaming_through_the_cache(P, chunk, sink, ring, chunks, seed):
    """The reason for all this: one layer over a clip, by mask and by cache."""
    rope = Rope3D(6, 8)
    layer = enliven(MLA(10, 2, C=4, Q=6, N=3, V=5, rope=rope).double(), seed)

    def table(frames):
        return rope.table(grid_coords(frames, 1, P), torch.float64)

    clip = torch.arange(chunks * chunk)
    x = Dice(seed).normal(1, len(clip) * P, 10)            # [B, L, E]
    mask = mask_of(P, chunk, sink, ring, chunks)
    whole = layer(x, layer.rows(x), table(clip), table(clip), mask)

    cache = empty_cache(P, chunk, sink, ring, chunks, layer.widths)
    parts = []
    for now in x.split(chunk * P, dim=1):
        past, own = cache.positions()
        rows = layer.rows(now)
        seen = torch.cat((past, own))
        parts.append(layer(now, cache.peek(0, rows), table(own), table(seen)))
        cache.commit([rows])
    assert_same(whole, torch.cat(parts, dim=1), EXACT,
                "training with your mask and streaming through the cache are two models")


@forall(**WINDOWS)
def test_it_is_a_predicate_that_flex_attention_can_take(P, chunk, sink, ring, chunks):
    window = sink + ring + chunk
    L = chunks * chunk * P

    def rule(b, h, q, k):
        return visible(q, k, P=P, chunk=chunk, window=window, sink=sink)

    mask = create_mask(rule, None, None, L, L, device="cpu")[0, 0]
    assert torch.equal(mask, mask_of(P, chunk, sink, ring, chunks)), \
        "called on one pair of indices at a time, `visible` gives another mask"
