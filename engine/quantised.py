"""Rows in eight bits: a rolling cache that keeps a byte for each number, and a scale for each
row.

    scale  = max |x| / top           float32, one for each token and part                  (Q1)
    values = round(x / scale)        a byte for each of the row's numbers                  (Q2)
    x      = values * scale          when it is read, up to rounding                       (Q3)

int8 rounds to whole numbers up to top = 127, so a number errs by half a scale at most. fp8 is a
float of 4 bits of exponent and 3 of mantissa (e4m3), top = 448: a number errs by a sixteenth of
itself at most, so the small numbers of a row come back better than from int8, and the large
ones worse.

A part is what has a size of its own: MLA's content latent, which is normed, its positional key,
which is not; in dense attention the key of a head, or its value. At the paper's sizes a token
of a layer takes 192 + 32 bytes and two scales of 4: 232, where bfloat16 takes 448.

A row is quantised once, when its chunk is committed. The cache never turns or moves a row, so
it is never quantised again: errors do not add up. The rows of the chunk being made stay exact.

fp8 is how bytes are stored, not how products are computed: rows come back in the model's dtype.

tests/test_quantised.py. experiments/eight_bits.py measures what it costs over a minute.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cache import RollingCache, Rows
from mla_video import VideoDiT

TINY = torch.finfo(torch.float32).tiny         # the least scale: of a row of zeros, by which
                                               # one may divide


# ---- a row in eight bits ---------------------------------------------------------------------

class Format(NamedTuple):
    """What the bytes of a row mean."""
    name: str
    dtype: torch.dtype         # of one byte
    top: float                 # what the largest magnitude of a part becomes

    def quantise(self, x: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
        """Rows x [..., width], of `groups` equal parts, to bytes [..., width], held as int8,
        and scales [..., groups] in float32, by (Q1) and (Q2)."""
        parts = x.unflatten(-1, (groups, -1))                  # [..., groups, width / groups]
        largest = parts.abs().amax(dim=-1, keepdim=True)       # [..., groups, 1]
        scale = (largest.float() / self.top).clamp(min=TINY)                           # (Q1)
        values = parts / scale
        if not self.dtype.is_floating_point:
            values = values.round()                            # `to` would cut off
        values = values.to(self.dtype).flatten(-2)                                     # (Q2)
        return values.view(torch.int8), scale[..., 0]

    def dequantise(self, values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows [..., width] that `quantise` stands for, in `dtype`, by (Q3)."""
        numbers = values.view(self.dtype).to(scale.dtype)
        parts = numbers.unflatten(-1, (scale.shape[-1], -1))   # [..., groups, width / groups]
        x = parts * scale[..., None]                                                   # (Q3)
        return x.flatten(-2).to(dtype)


INT8 = Format("int8", torch.int8, 127)
FP8 = Format("fp8", torch.float8_e4m3fn, 448)

# The choices of `sample.py --cache`; None keeps rows as the model made them.
FORMATS = {"float32": None, "int8": INT8, "fp8": FP8}


def why_not(format: Format | None, device: torch.device) -> str | None:
    """Why rows in this format cannot be kept on a device; None if they can."""
    if format != FP8 or device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"{device.type} has no 8-bit floats"
    if torch.cuda.get_device_capability(device) < (8, 9):
        return "this GPU has no 8-bit floats (they begin with compute capability 8.9)"
    return None


# ---- the cache -------------------------------------------------------------------------------

class QuantisedCache(RollingCache):
    """A `RollingCache` whose committed rows are in eight bits.

    Its buffers are the bytes of both parts, then the scales of both, `groups` for each row. So
    `nbytes` and `bytes_per_token` count the scales. `dtype` is that of the rows it is given.
    Rows in eight bits have no gradients: ValueError for detach=False.
    """

    def __init__(self, layers: int, batch: int, widths: tuple[int, int], *, format: Format,
                 groups: int = 1, device=None, dtype=torch.float32, **sizes):
        super().__init__(layers, batch, widths, device=device, dtype=torch.int8, **sizes)
        shape = *self.buffers[0].shape[:3], groups
        self.buffers += tuple(torch.empty(shape, device=device) for _ in widths)
        self.format = format
        self.groups = groups
        self.dtype = dtype

    def peek(self, layer: int, rows: Rows) -> Rows:
        """As RollingCache's: the rows kept, dequantised, then the chunk's own, exact."""
        kept = self.filled * self.tokens
        past = [buffer[layer, :, :kept] for buffer in self.buffers]
        return visible(self.format, past, rows)

    def commit(self, rows: list[Rows], detach: bool = True) -> None:
        """As RollingCache's: the rows are quantised, here and only here."""
        if not detach:
            raise ValueError(f"rows in {self.format.name} have no gradients: commit them with "
                             "detach=True")
        super().commit([stored(self.format, layer, self.groups) for layer in rows])


def stored(format: Format, rows: Rows, groups: int) -> tuple[Tensor, ...]:
    """What a cache keeps of the rows of a layer: the bytes of both parts, the scales of
    both."""
    values = []
    scales = []
    for part in rows:
        bytes_of_part, scale = format.quantise(part.detach(), groups)
        values.append(bytes_of_part)
        scales.append(scale)
    return *values, *scales


def visible(format: Format, kept: list[Tensor], rows: Rows) -> Rows:
    """Both parts of what is `kept` of a layer, read, and behind them those of the chunk."""
    parts = []
    for values, scale, own in zip(kept[:2], kept[2:], rows):
        past = format.dequantise(values, scale, own.dtype)                 # [B, kept, width]
        parts.append(torch.cat((past, own), dim=1))
    return tuple(parts)


class QuantisedRows:
    """`LayerRows` of a full window (engine/streaming.py) in eight bits: the same two verbs.

    `buffers` hold what is kept, and `own` the rows of the chunk being made, which are exact.
    Unlike there a pass copies the window: it has to be dequantised.
    """

    def __init__(self, cache: QuantisedCache, layer: int):
        self.format = cache.format
        self.groups = cache.groups
        self.buffers = tuple(buffer[layer].clone() for buffer in cache.buffers)
        tokens = cache.chunk * cache.tokens
        self.own = tuple(buffer.new_empty(len(buffer), tokens, buffer.shape[-1],
                                          dtype=cache.dtype) for buffer in self.buffers[:2])

    def peek(self, layer: int, rows: Rows) -> Rows:
        """As RollingCache's. `layer` is not asked for: this is one layer."""
        for own, new in zip(self.own, rows):
            own.copy_(new)
        return visible(self.format, self.buffers, rows)

    def keep(self, goal: Tensor, tokens: int) -> None:
        """Quantise the youngest frames of the chunk, `tokens` to a frame, into the frames
        `goal`, one for each."""
        youngest = self.own[0].shape[1] - len(goal) * tokens
        rows = tuple(own[:, youngest:] for own in self.own)
        for buffer, new in zip(self.buffers, stored(self.format, rows, self.groups)):
            frames = buffer.unflatten(1, (-1, tokens))                     # [B, kept, P, width]
            frames.index_copy_(1, goal, new.unflatten(1, (-1, tokens)))

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept, and of the chunk's own rows."""
        return sum(buffer.nbytes for buffer in (*self.buffers, *self.own))


def make_cache(model: VideoDiT, batch: int, format: Format | None = None) -> RollingCache:
    """An empty cache of `batch` videos for this model, as `VideoDiT.make_cache`, with rows in
    this format. Dense attention has a scale for the key and the value of each head."""
    if format is None:
        return model.make_cache(batch)
    c = model.config
    weight = model.embed.weight
    groups = c.heads if c.attention == "dense" else 1
    return QuantisedCache(c.layers, batch, model.blocks[0].attention.widths, format=format,
                          groups=groups, tokens=c.tokens, chunk=c.chunk, window=c.window,
                          sink=c.sink, horizon=c.horizon or c.frames,
                          device=weight.device, dtype=weight.dtype)


def format_of(cache) -> Format | None:
    """That of the rows in a cache, compiled or not."""
    return getattr(cache, "format", None)
