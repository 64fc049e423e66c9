"""engine/streaming.py: the full window is the rolling cache, the compiled stream the stream."""

import gc
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from engine.streaming import FastStream, FullWindow  # noqa: E402
from flow import Draws, GuidedStream, Stream, rollout  # noqa: E402
from mla_video import Config, VideoDiT  # noqa: E402

SMALL = Config(dim=32, layers=2, heads=2, latent=16, query_latent=16, rope=8, ffn=32, height=8,
               width=8, frames=15, window=9, sink=1)
NONE = torch.zeros(2, 3, dtype=torch.long)


def lively_model(kind: str) -> VideoDiT:
    """Gates and head start at zero, and a silent block proves nothing."""
    torch.manual_seed(0)
    model = VideoDiT(replace(SMALL, attention=kind)).eval().requires_grad_(False)
    for p in model.parameters():
        p += 0.05 * torch.randn_like(p)
    return model


def video_of(stream, frames: int) -> torch.Tensor:
    draws = Draws(torch.Generator().manual_seed(1))
    return torch.cat(list(rollout(stream, frames, draws, steps=2)), dim=1)


@pytest.mark.parametrize("kind", ["mla", "dense"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_compiled_stream_is_one_graph_and_the_same_video(kind, guidance):
    """aot_eager runs the traced, functionalised graph without Inductor: same numbers, one graph,
    no break and no recompilation over 13 chunks with the window full, and past the horizon, where
    positions are re-indexed."""
    model = lively_model(kind)
    caption = torch.randint(1, 20, (2, 3))
    said = []

    def slow(caption):
        return Stream(model, caption)

    def fast(caption):
        say = said.append if caption is not NONE else lambda line: None
        return FastStream(model, caption, backend="aot_eager", say=say)

    def video(made_by):
        stream = made_by(caption)
        if guidance != 1:
            stream = GuidedStream(stream, made_by(NONE), guidance)
        return video_of(stream, 45)

    want = video(slow)
    torch._dynamo.reset()
    counters.clear()
    got = video(fast)
    assert want.std() > 0.1 and (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert len(said) == 2 and "window is full after 6 frames" in said[0]


def test_a_caption_may_change_after_going_over():
    model = lively_model("mla")
    first, second = torch.randint(1, 20, (2, 2, 3))

    def video(stream):
        draws = Draws(torch.Generator().manual_seed(1))
        chunks = []
        for chunk in rollout(stream, 30, draws, steps=2):
            chunks.append(chunk)
            if len(chunks) == 6:
                stream.caption = second
        return torch.cat(chunks, dim=1)

    want = video(Stream(model, first))
    got = video(FastStream(model, first, backend="eager"))
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    stayed = video_of(Stream(model, first), 30)
    assert (want - stayed).abs().max() > 1e-3 * want.abs().max()      # the caption does matter


def test_a_dropped_stream_leaves_nothing_behind():
    """Reference counting alone frees the stream, its window and its model: there are no cycles,
    and what is compiled holds none of them. A second stream of the same sizes compiles nothing."""
    torch._dynamo.reset()
    counters.clear()
    gc.disable()
    try:
        for _ in range(2):
            model = lively_model("mla")
            stream = FastStream(model, NONE, backend="aot_eager")
            video_of(stream, 12)
            buffer = stream.cache.layers[0].buffers[0]
            left = [weakref.ref(thing) for thing in (stream, stream.cache, buffer, model)]
            del model, stream, buffer
            assert [ref() for ref in left] == [None] * 4
    finally:
        gc.enable()
    assert counters["stats"]["unique_graphs"] == 1


def test_other_shapes_are_refused():
    model = lively_model("mla")
    stream = FastStream(model, NONE, backend="eager")
    video_of(stream, 9)
    x = torch.zeros(2, 3, 3, 8, 8)
    stream.velocity(x, 0.5)
    with pytest.raises(ValueError, match="make another FastStream"):
        stream.velocity(x[:1], 0.5)
    with pytest.raises(ValueError, match="makes 2 videos, and there are 1 captions"):
        stream.caption = NONE[:1]
    stream.caption = NONE[:, :2]                           # as many videos, shorter captions
    with pytest.raises(ValueError, match="make another FastStream"):
        stream.velocity(x, 0.5)


@pytest.mark.parametrize("window, sink", [(9, 1), (5, 1), (4, 1), (6, 0), (3, 0)])
def test_full_window(window, sink):
    """Positions and content as RollingCache has them, for rings shorter and longer than a chunk,
    and none at all. A window that is not full is refused."""
    model = VideoDiT(replace(SMALL, window=window, sink=sink))
    cache = model.make_cache(2)

    def new_rows():
        size = 3 * SMALL.tokens
        return [(torch.randn(2, size, 16), torch.randn(2, size, 8)) for _ in range(2)]

    while cache.filled < cache.capacity:
        with pytest.raises(ValueError, match="not full yet"):
            FullWindow(cache)
        cache.commit(new_rows())
    full = FullWindow(cache)
    assert full.nbytes * cache.capacity == cache.nbytes * window
    assert full.bytes_per_token == cache.bytes_per_token
    for _ in range(5):
        rows = new_rows()
        assert torch.equal(full.frames(), cache.frames())
        for mine, theirs in zip(full.positions(), cache.positions()):
            assert torch.equal(mine, theirs)
        for layer in range(2):
            seen = cache.peek(layer, rows[layer])
            for mine, theirs in zip(full.peek(layer, rows[layer]), seen):
                assert torch.equal(mine, theirs)
        with torch.no_grad():
            cache.commit(rows)
            full.commit(rows)
    assert full.seen == cache.seen
