"""The rolling cache of past frames: what every layer remembers of the video so far, in buffers
that never grow.

A video is made in chunks of a few frames. While a chunk is made it looks back at a *window* of
frames: the latest ones, and perhaps a few *sink* frames from the very beginning, which stay for
good. Example: sink 1, chunk 3, window 6 (the window counts the sink and the chunk itself, so 6
- 3 = 3 frames are kept), and a model that was trained on clips of 9 frames, its *horizon*:

    the chunk       is made when these    and they stand      and it stands
                    frames are kept       at the times        at the times
                    at index 0  1  2      index 0  1  2
    0  1  2                  -  -  -            -  -  -       0 1 2
    3  4  5                  0  1  2            0  1  2       3 4 5
    6  7  8                  0  5  4            0  5  4       6 7 8
    9 10 11                  0  7  8            0  4  5       6 7 8
                             |  |  |           (the last row's times: P1 to P3 below)
                             |  +--+-- the ring: a new frame overwrites the oldest one
                             +-------- the sink: never overwritten

When 3 4 5 was committed, frame 3 was dropped at once, since of a chunk that is longer than the
ring only the youngest frames stay; 4 went to index 2, over frame 2, and 5 to index 1, over 1.

Nothing is ever shifted. Attention is a sum over keys, so the order of the frames in the buffer
does not matter once their positions are data. `positions` gives them in the order of the
buffer, which changes with every commit: ask once per chunk, and never keep the answer.
(Released research code moves gigabytes a chunk to keep frames in order. `peek` copies what is
kept, at every pass; engine/streaming.py, which runs on GPUs, does without.)

What is stored has no place in time. MLA stores the normed latent c_kv and the *unrotated*
positional key k_rope; the dense baseline stores unrotated keys and values. Rotation happens at
read. So a stored frame can be given another time tomorrow without being touched.

Which time? A model has been trained on clips of `horizon` frames and knows no time beyond. So:

    a chunk that begins at frame s stands at    base = min(s, horizon - chunk)       (P1)
    a frame f of the ring stands at             f - (s - base)                       (P2)
    a sink frame f stands at                    f                                    (P3)

While s <= horizon - chunk these are the absolute times, and cached inference equals the
teacher-forced training pass exactly. Later chunk and ring are *re-indexed*: the chunk stays at
the end of the trained range, its past just before it, and no position leaves what training has
seen, however long the video. A horizon as long as the window is Infinity-RoPE's rule, which
the paper's long videos follow; an infinite one gives the absolute positions of Self-Forcing.
(The paper keeps 1 sink frame and 6 more. LongLive's 6 count sink and chunk, as `window` does.)

Only distances in time count, and chunk and ring move together. So without a sink re-indexing is
exact. With one it is an approximation: rows of deeper layers remember an older distance to it.

Letters: B batch, T visible key tokens, P tokens a frame; for the widths of what is stored, C
and R (MLA) and H heads of d_h channels (dense attention), see attention.py. This file imports
nothing else of this repository. tests/test_cache.py runs the class against a plain Python list
of frames.
"""

import torch
from torch import Tensor

# Two tensors [B, tokens, width] of one layer: what a chunk's tokens leave, or all that it sees.
Rows = tuple[Tensor, Tensor]


def frames_at(index: Tensor, seen: int | Tensor, sink: int, ring: int) -> Tensor:
    """Which frame stands at each `index` of a buffer after `seen` frames: the youngest of those
    that share the index.

    Index i < sink holds frame i. An index of the ring has been the goal of frames i, i + ring,
    i + 2 ring, ... (`seen` is a tensor where counting must not leave a GPU:
    engine/streaming.py.)
    """
    period = max(ring, 1)         # a ring of no frames is never asked, but must not divide by 0
    turns = (seen - 1 - index) // period     # how often the ring came round to this index again
    return torch.where(index < sink, index, index + turns * period)


def read_positions(frames: Tensor, seen: int | Tensor, sink: int, base: int | Tensor) -> Tensor:
    """Times at which the kept `frames` stand, by (P2) and (P3), when a chunk that begins at
    frame `seen` stands at `base`."""
    return torch.where(frames < sink, frames, frames - (seen - base))


class RollingCache:
    """The past of B videos, for all layers. MLA's rows are (C, R) wide, those of dense
    attention (H d_h, H d_h).

    All videos are of one age, and every chunk has `chunk` frames. Use it under torch.no_grad,
    except where gradients are wanted. `window` counts frames, the sink and the chunk being made
    included; so `capacity` = window - chunk frames are kept. Buffers are allocated once (where
    gradients are disabled), uninitialised: whether something stands in them is told by `seen`
    alone. Raises ValueError if the window cannot hold the sink and one chunk, or is longer than
    the horizon.
    """

    def __init__(self, layers: int, batch: int, widths: tuple[int, int], *, tokens: int,
                 chunk: int, window: int, sink: int, horizon: int,
                 device=None, dtype=torch.float32):
        if window < sink + chunk:
            raise ValueError(f"a window of {window} frames cannot hold {sink} sink frames "
                             f"and a chunk of {chunk}: it must be at least {sink + chunk}")
        if horizon < window:
            raise ValueError(f"the horizon (training length, {horizon} frames) must be at "
                             f"least the window ({window})")
        self.tokens = tokens                               # P, tokens of a frame
        self.chunk = chunk
        self.sink = sink
        self.horizon = horizon
        self.capacity = window - chunk                     # frames kept: sink, then ring
        self.ring = self.capacity - sink                   # may be 0: sink only
        self.seen = 0                  # frames committed since the start, evicted ones included
        shape = layers, batch, self.capacity * tokens
        self.buffers = tuple(torch.empty(*shape, width, device=device, dtype=dtype)
                             for width in widths)

    # ---- what there is -----------------------------------------------------------------------

    @property
    def filled(self) -> int:
        """Frames kept at present. They fill the buffer from its beginning, so a slice is all
        the mask there is."""
        return min(self.seen, self.capacity)

    def frames(self) -> Tensor:
        """Which frame stands at each filled index: [filled]."""
        index = torch.arange(self.filled, device=self.buffers[0].device)
        return frames_at(index, self.seen, self.sink, self.ring)

    def positions(self) -> tuple[Tensor, Tensor]:
        """Times to rotate by: of the frames kept [filled], and of the chunk being made [chunk].
        All < horizon."""
        base = min(self.seen, self.horizon - self.chunk)                              # (P1)
        past = read_positions(self.frames(), self.seen, self.sink, base)
        own = base + torch.arange(self.chunk, device=past.device)
        return past, own

    # ---- the two verbs -----------------------------------------------------------------------

    def peek(self, layer: int, rows: Rows) -> Rows:
        """All rows that the chunk may look at in `layer`: those kept, then its own `rows`; each
        [B, T, width].

        Changes nothing. Every denoising pass of a chunk peeks, and none leaves a trace. The
        rows are copies, so a later commit cannot disturb a pass whose gradient was recorded.
        """
        kept = self.filled * self.tokens
        visible = []
        for buffer, own in zip(self.buffers, rows):
            past = buffer[layer, :, :kept].to(own.dtype)                      # [B, kept, width]
            visible.append(torch.cat((past, own), dim=1))
        return tuple(visible)

    def commit(self, rows: list[Rows], detach: bool = True) -> None:
        """Keep a finished chunk: its `rows` of every layer. What falls out of the window is
        overwritten.

        Gradients stop here: what is kept is detached. With detach=False they flow from later
        chunks into the rows of earlier ones. Where gradients are enabled the buffers are
        replaced and not written to, so that recorded graphs stay as they were. Raises
        ValueError, and keeps nothing, if any rows are not those of a chunk.
        """
        layers = len(self.buffers[0])
        taken = [(x.shape[1], self.chunk * self.tokens, x.shape[-1]) for x in self.buffers]
        given = [list(map(Tensor.size, layer)) for layer in rows]
        if given != [taken] * layers:
            raise ValueError(f"commit takes whole chunks: {self.chunk} frames of {self.tokens} "
                             f"tokens, rows {taken} of all {layers} layers; got {given}")
        source, goal = self._moves()
        buffers = []
        for buffer, parts in zip(self.buffers, zip(*rows)):
            new = torch.stack(parts).to(buffer.dtype)            # [layers, B, chunk * P, width]
            new = new.unflatten(2, (self.chunk, self.tokens))    # [layers, B, chunk, P, width]
            new = new[:, :, source]                              # [layers, B, kept, P, width]
            if detach:
                new = new.detach()
            frames = buffer.unflatten(2, (self.capacity, self.tokens))
            if torch.is_grad_enabled():
                frames = frames.index_copy(2, goal, new)   # a new tensor
            else:
                frames.index_copy_(2, goal, new)           # in place
            buffers.append(frames.flatten(2, 3))
        self.buffers = tuple(buffers)
        self.seen += self.chunk

    def _moves(self) -> tuple[Tensor, Tensor]:
        """Which frames of the new chunk are kept (counted within it), and at which index each
        goes."""
        device = self.buffers[0].device
        start = self.seen
        stop = self.seen + self.chunk
        # Frames start .. sink_stop - 1 belong to the sink.
        sink_stop = max(start, min(self.sink, stop))
        # A chunk may be longer than the ring: then its own oldest frames are evicted at once.
        ring_start = min(stop, max(sink_stop, stop - self.ring))
        to_sink = torch.arange(start, sink_stop, device=device)
        to_ring = torch.arange(ring_start, stop, device=device)
        ring_index = self.sink + (to_ring - self.sink) % max(self.ring, 1)
        source = torch.cat((to_sink, to_ring)) - start
        goal = torch.cat((to_sink, ring_index))
        return source, goal

    def reset(self) -> None:
        """Forget the video, keep the buffers."""
        self.seen = 0

    # ---- what it costs -----------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that exist."""
        return sum(buffer.nbytes for buffer in self.buffers)

    @property
    def bytes_per_token(self) -> int:
        """Bytes that a kept token costs in one layer, read from the buffers: (C + R) or 2 H d_h
        numbers."""
        return sum(buffer.shape[-1] * buffer.element_size() for buffer in self.buffers)
