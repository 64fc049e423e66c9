"""The rolling cache of past frames: a ring for the window, a few sink frames that stay, two verbs.

    frames        0 1 2 3 4 5 6 7 8          sink 1, chunk 3, window 6: what chunk (6 7 8) may look at
    slots         [0][4][5]                  = sink frame 0, the two frames before it (4 5), and itself
                   |  +--+-- ring: the next frames overwrite the oldest slot, nothing is ever moved
                   +-------- sink: never evicted

Two facts make it this small.
1.  Attention is a sum over keys, so the order of slots is irrelevant once positions are data (`positions`). A ring needs
    no shifting; released research code copies gigabytes per chunk to keep slots in temporal order.
2.  What is stored has no place in time. MLA stores the normed latent c_kv and the *unrotated* positional key
    k_rope, the dense baseline its unrotated keys and its values; rotation happens at read. So a slot can be given
    another position tomorrow without being touched.

Positions at read. The chunk at frame s stands at  base = min(s, horizon - chunk),  a window frame f at  f - (s - base),  a
sink frame f at f. Up to `horizon` frames (the training length) that is the absolute time, so cached inference equals
the teacher-forced pass exactly; beyond it no position leaves the range seen in training, however long the rollout.
horizon = window is the "re-index everything" of LongLive and Infinity-RoPE, horizon = infinity the absolute positions of
Self-Forcing; here it is one number.

Letters: B batch, T visible key tokens, P tokens per frame. tests/test_cache.py runs this class against a Python list of frames.
"""

import torch
from torch import Tensor

Rows = tuple[Tensor, Tensor]                               # what one layer stores for a chunk, each [B, n * P, width]


class RollingCache:
    """Past rows of every layer. For MLA widths = (C, R); for dense attention (H * d_h, H * d_h).

    `window` counts frames and includes the sink *and* the chunk being made, as in released code ("local window 6,
    sink 1"), so window - chunk frames are kept. Buffers are allocated once; their content is never a sign of
    validity, only the counter `seen` is, so they start uninitialised.
    Raises ValueError if the window cannot hold the sink and one chunk, or exceeds the horizon.
    """

    def __init__(self, layers: int, batch: int, widths: tuple[int, int], *, tokens: int, chunk: int, window: int,
                 sink: int, horizon: int, device=None, dtype=torch.float32):
        if window < sink + chunk:
            raise ValueError(f"a window of {window} frames cannot hold {sink} sink frames and a chunk of {chunk}: "
                             f"it must be at least {sink + chunk}")
        if horizon < window:
            raise ValueError(f"the horizon (training length, {horizon} frames) must be at least the window ({window})")
        self.tokens, self.chunk, self.sink, self.horizon = tokens, chunk, sink, horizon
        self.ring = window - chunk - sink                  # frames in the ring; 0 is allowed: sink only
        self.slots = window - chunk                        # sink + ring
        self.buffers = tuple(torch.empty(layers, batch, self.slots * tokens, width, device=device, dtype=dtype)
                             for width in widths)
        self.seen = 0                                      # frames committed since the start, evicted ones included: Python's int,
                                                           # which has no end; frames() is int64 and good for 10^18

    # ---- what there is ------------------------------------------------------------------------------------------

    @property
    def filled(self) -> int:
        """Slots in use. They are always the first ones, so a slice is all the masking that is needed."""
        return min(self.seen, self.slots)

    def frames(self) -> Tensor:
        """Absolute index of the frame in each filled slot [filled]: of all frames f that share a ring slot, the
        youngest, i.e. the largest  f = sink + j + m * ring  below `seen`."""
        slot = torch.arange(self.filled, device=self.buffers[0].device)
        j = slot - self.sink
        turns = (self.seen - 1 - slot) // max(self.ring, 1)                            # whole turns since slot j's first
        return torch.where(j < 0, slot, slot + turns * self.ring)

    def positions(self) -> tuple[Tensor, Tensor]:
        """Times to rotate by: of the filled slots [filled], and of the chunk being made [chunk]. All < horizon."""
        base, frames = self._base(), self.frames()
        past = torch.where(frames < self.sink, frames, frames - (self.seen - base))
        return past, base + torch.arange(self.chunk, device=past.device)

    def _base(self):
        """Where the chunk stands."""
        return min(self.seen, self.horizon - self.chunk)

    # ---- the two verbs ------------------------------------------------------------------------------------------

    def peek(self, layer: int, rows: Rows) -> Rows:
        """Committed rows of `layer`, then the provisional `rows` of the chunk [B, chunk * P, width]: each
        [B, T, width]. Changes nothing: every denoising step of a chunk peeks, and none leaves a trace."""
        return tuple(torch.cat((buffer[layer, :, :self.filled * self.tokens], new), dim=1)
                     for buffer, new in zip(self.buffers, rows))

    def commit(self, rows: list[Rows], detach: bool = True) -> None:
        """Store a clean chunk for good, all layers at once, and evict what falls out of the window.

        What is stored is detached: gradients stop at the chunk that is being made (released code leaks them
        through this write; detach=False is the true context gradient). While gradients are recorded
        the buffer is replaced and not overwritten: `peek` copies, but a reader that keeps a view may await its backward pass.
        """
        now = self.seen + self.chunk
        if any(row.shape[1] != self.chunk * self.tokens for layer in rows for row in layer):
            raise ValueError(f"commit takes whole chunks: {self.chunk} frames of {self.tokens} tokens")
        device = self.buffers[0].device
        # A chunk may be longer than the ring (released: chunk 3, ring 2): its own oldest frames are evicted at once.
        sink = torch.arange(self.seen, max(self.seen, min(self.sink, now)), device=device)
        ring = torch.arange(min(now, max(self.seen, self.sink, now - self.ring)), now, device=device)
        slots = torch.cat((sink, self.sink + (ring - self.sink) % max(self.ring, 1)))
        source = torch.cat((sink, ring)) - self.seen                                   # which frames of the chunk stay
        buffers = []
        for buffer, new in zip(self.buffers, zip(*rows)):
            new = torch.stack(new).to(buffer.dtype).unflatten(2, (self.chunk, self.tokens))[:, :, source]
            new = new.detach() if detach else new                                      # [layers, B, frames, P, width]
            view = buffer.unflatten(2, (self.slots, self.tokens))
            view = view.index_copy(2, slots, new) if torch.is_grad_enabled() else view.index_copy_(2, slots, new)
            buffers.append(view.flatten(2, 3))
        self.buffers, self.seen = tuple(buffers), now

    def rewind(self) -> None:
        """Name the frames of a full window anew, as if the video were as young as it can be with a full window and its chunk at the
        horizon: what is visible, its positions and the order of eviction stay (test_an_old_window_can_be_renamed). So long videos of any
        age are one case for what must not change from call to call (a recorded graph), and `seen` never overflows."""
        if self.seen < self.horizon - self.chunk:
            raise ValueError(f"only a full window at the horizon can be renamed; {self.seen} frames were seen")
        if self.ring:
            oldest = (self.seen - self.sink) % self.ring   # its slot in the ring becomes the first
            self.buffers = tuple(torch.cat((view[:, :, :self.sink], view[:, :, self.sink:].roll(-oldest, 2)), 2).flatten(2, 3)
                                 for view in (buffer.unflatten(2, (self.slots, self.tokens)) for buffer in self.buffers))
        self.seen = self.renamed

    @property
    def renamed(self) -> int:
        """`seen` after `rewind`, the same for every video: the first whole turn of the ring with the chunk at the horizon."""
        turns = -(-(self.horizon - self.chunk - self.sink) // max(self.ring, 1))       # rounded up
        return self.sink + turns * max(self.ring, 1)

    def reset(self) -> None:
        """Forget everything, keep the memory."""
        self.seen = 0

    # ---- what it costs ------------------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers that exist."""
        return sum(buffer.nbytes for buffer in self.buffers)

    @property
    def bytes_per_token(self) -> int:
        """Bytes a cached token costs in one layer, from the buffers: (C + R) or 2 * H * d_h numbers."""
        return sum(buffer.shape[-1] * buffer.element_size() for buffer in self.buffers)
