"""What a new caption does to the past: three ways to change captions in mid-video.

The cache of a video was made under its old caption. Every block reads the caption, so what it
left in the cache has heard the old words.

    keep       leave the past as it is; the next chunk is made under the new caption
    recache    commit the window again under the new caption: as if it had been said all along
    cut        forget the past: another video begins, in the middle of its course

All are for each video by itself: the others of the batch do not notice. tests/test_switching.py.
experiments/switches.py measures how fast each follows, and how much the picture jumps.
"""

from collections import deque

import torch
from torch import Tensor

from cache import RollingCache
from engine.quantised import format_of, make_cache
from engine.streaming import FullWindow
from flow import GuidedStream, Stream, VideoDraws, rollout


class Keep:
    """Tells a stream its captions between two chunks."""

    def __init__(self, stream: Stream | GuidedStream, seed: int = 0, **how):
        """`how` goes to `rollout`, and `seed` is where off-screen noise comes from."""
        self.stream = stream
        self.seed = seed
        self.how = how
        self.chunks = 0                                    # how many there are
        self.captions = stream.caption.cpu()

    def after(self, chunk: Tensor, captions: Tensor) -> None:
        """`chunk` was the last one, and the next is made under `captions` [B, S]."""
        changed = (captions != self.captions).any(1).nonzero()[:, 0]       # numbers of videos
        self.captions = captions
        self.chunks += 1
        self.remember(chunk)
        if len(changed):
            self.stream.caption = captions
            self.change(changed)

    def remember(self, chunk: Tensor) -> None:
        """What `change` will need."""

    def change(self, changed: Tensor) -> None:
        """These videos have new captions."""


class Recache(Keep):
    """`recache`: keeps the chunks whose frames the window holds, and commits them again."""

    def __init__(self, stream: Stream | GuidedStream, seed: int = 0, **how):
        super().__init__(stream, seed, **how)
        cache = sides(stream)[0].cache
        self.first = []                                    # the chunks that hold sink frames
        self.sinks = -(-cache.sink // cache.chunk)         # how many; rounded up
        self.latest = deque(maxlen=-(-cache.ring // cache.chunk))

    def remember(self, chunk: Tensor) -> None:
        if len(self.first) < self.sinks:
            self.first.append(chunk)
        else:
            self.latest.append(chunk)

    @torch.no_grad()
    def change(self, changed: Tensor) -> None:
        # The side without caption of guided videos has heard nothing of the change.
        side = sides(self.stream)[0]
        fresh = another(side, self.captions[changed])
        for chunk in [*self.first, *self.latest]:
            fresh.commit(chunk[changed.to(chunk.device)])
        implant(side.cache, fresh.cache, changed)


class Cut(Recache):
    """`cut`: makes as much of a new video as the window holds, unseen, and takes its past."""

    @torch.no_grad()
    def change(self, changed: Tensor) -> None:
        chunks = len(self.first) + len(self.latest)
        begun = []
        for side in sides(self.stream):
            captions = side.caption.cpu()[changed]
            begun.append(another(side, captions))
        unseen = begun[0]
        if isinstance(self.stream, GuidedStream):
            unseen = GuidedStream(*begun, self.stream.weight)
        draws = VideoDraws((self.seed + self.chunks) % 2**63, len(self.captions))
        draws.generators = [draws.generators[i] for i in changed.tolist()]
        if chunks:
            frames = chunks * self.stream.chunk_like().shape[1]
            deque(rollout(unseen, frames, draws, **self.how), maxlen=0)    # run it to its end
        for side, new in zip(sides(self.stream), begun):
            implant(side.cache, new.cache, changed)


SWITCHES = {"keep": Keep, "recache": Recache, "cut": Cut}


# ---- the cache of some videos ----------------------------------------------------------------

def sides(stream: Stream | GuidedStream) -> list[Stream]:
    """The streams that have caches, the captioned one first."""
    if isinstance(stream, GuidedStream):
        return [stream.captioned, stream.plain]
    return [stream]


def another(side: Stream, captions: Tensor) -> Stream:
    """Other videos of the same model, their cache of the same kind."""
    cache = make_cache(side.model, len(captions), format_of(side.cache))
    return Stream(side.model, captions, cache, side.attend)


def implant(cache: RollingCache | FullWindow, fresh: RollingCache, videos: Tensor) -> None:
    """Put what `fresh` keeps, a cache of these `videos` alone, in their place in `cache`.

    Sink frames go to sink frames, and ring frames to those of the same age. Both caches must
    have the same window, and `fresh` be filled as far.
    """
    if cache.filled == 0:
        return
    frames = cache.frames()
    same_age = frames - (cache.seen - fresh.seen)          # numbers of frames in `fresh`
    in_ring = fresh.sink + (same_age - fresh.sink) % max(fresh.ring, 1)
    source = torch.where(frames < cache.sink, frames, in_ring)             # index in `fresh`
    videos = videos.to(source.device)
    for old_rows, new_rows in zip(rows_by_layer(cache), rows_by_layer(fresh)):
        for old, new in zip(old_rows, new_rows):
            kept = old[:, :cache.filled * cache.tokens]                    # a view, as below
            kept = kept.unflatten(1, (cache.filled, cache.tokens))         # [B, filled, P, width]
            new = new.unflatten(1, (-1, cache.tokens))
            kept[videos] = new[:, source]


def rows_by_layer(cache: RollingCache | FullWindow) -> list[tuple[Tensor, ...]]:
    """The buffers [B, tokens, width] of each layer, as views."""
    if isinstance(cache, FullWindow):
        return [layer.buffers for layer in cache.layers]
    return list(zip(*cache.buffers))
