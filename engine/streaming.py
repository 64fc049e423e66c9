"""Streaming as fast as the device allows.

Once the window is full, nothing changes from chunk to chunk but the numbers in tensors. So a
pass can be compiled once and, on a GPU, recorded once and replayed. `FullWindow` is the rolling
cache in that form. `FastStream` is a Stream that goes over to it by itself.

Tests: tests/test_fast_stream.py.
"""

import functools
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attention import Route
from cache import RollingCache, Rows, frames_at, read_positions
from engine.quantised import QuantisedCache, QuantisedRows, format_of
from engine.routes import attend_auto
from flow import Stream, one_level
from mla_video import Block, VideoDiT
from rope3d import Table

# Inductor's code pays from this many parameters on. A smaller model's time on a GPU is its
# launches, which the CUDA graph removes: nothing that Inductor could write would earn back the
# seconds that writing it takes.
LARGE = 10**8

# ---- a window that is full -------------------------------------------------------------------


class LayerRows:
    """What a chunk may look at in one layer: two tensors [B, T, width], always the same.

    They hold the kept rows first, then a stretch for those of the chunk being made. `peek`
    writes that stretch and returns the tensors themselves: no window is ever copied. `keep`
    copies from the stretch to the kept rows.
    """

    def __init__(self, buffers: Rows, kept: int):
        self.buffers = buffers
        self.kept = kept               # tokens; what stands behind them is provisional

    def peek(self, layer: int, rows: Rows) -> Rows:
        """As RollingCache's. `layer` is not asked for: this is one layer."""
        for buffer, new in zip(self.buffers, rows):
            buffer[:, self.kept:] = new
        return self.buffers

    def keep(self, goal: Tensor, tokens: int) -> None:
        """Copy the youngest frames of the chunk, `tokens` to a frame, to the frames `goal`, one
        for each."""
        for buffer in self.buffers:
            frames = buffer.unflatten(1, (-1, tokens))                     # [B, end, P, width]
            youngest = frames.shape[1] - len(goal)
            kept = self.kept // tokens
            frames[:, :kept].index_copy_(1, goal, frames[:, youngest:])

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, the provisional stretch included."""
        return sum(buffer.nbytes for buffer in self.buffers)


class FullWindow:
    """The cache of a video whose window is full, in the form that a compiled graph can use.

    Nothing about it changes from chunk to chunk but the content of tensors. The counter `seen`
    is a tensor, too: counting recompiles nothing, and no number travels between host and GPU.

    Made from a full RollingCache, which stays as it was; ValueError if it is not full. It has
    RollingCache's verbs, with two differences: `peek` writes the provisional stretch, and
    `commit` keeps what the last peeks wrote. There is no way back to an empty window. Inference
    only. tests/test_fast_stream.py: equal to RollingCache.
    """

    def __init__(self, cache: RollingCache):
        if cache.filled < cache.capacity:
            raise ValueError(f"the window is not full yet ({cache.filled} of {cache.capacity} "
                             "frames): go on with the RollingCache")
        self.tokens = cache.tokens
        self.chunk = cache.chunk
        self.sink = cache.sink
        self.ring = cache.ring
        self.capacity = cache.capacity
        self.filled = cache.capacity
        self.horizon = cache.horizon
        self.bytes_per_token = cache.bytes_per_token
        self.format = format_of(cache)
        self.seen = torch.tensor(cache.seen, device=cache.buffers[0].device)
        # Each layer has tensors of its own: a graph that writes to views of one must copy.
        self.layers = [layer_rows(cache, layer) for layer in range(len(cache.buffers[0]))]

    def frames(self) -> Tensor:
        """Which frame stands at each index: [capacity]."""
        index = torch.arange(self.capacity, device=self.seen.device)
        return frames_at(index, self.seen, self.sink, self.ring)

    def positions(self) -> tuple[Tensor, Tensor]:
        """Times to rotate by: of the kept frames [capacity], and of the chunk [chunk]."""
        base = self.seen.clamp(max=self.horizon - self.chunk)
        past = read_positions(self.frames(), self.seen, self.sink, base)
        own = base + torch.arange(self.chunk, device=past.device)
        return past, own

    def peek(self, layer: int, rows: Rows) -> Rows:
        """Put the chunk's own `rows` in their place -> all rows of the layer, [B, T, width]."""
        return self.layers[layer].peek(layer, rows)

    def commit(self, rows: list[Rows] | None = None, detach: bool = True) -> None:
        """Keep the chunk whose rows the last peeks wrote (`rows`, which are not needed).

        The sink is full, so only the ring can be their goal. A chunk may be longer than the
        ring: its youngest frames stay.
        """
        stay = min(self.chunk, self.ring)
        frame = self.seen + self.chunk - stay + torch.arange(stay, device=self.seen.device)
        goal = self.sink + (frame - self.sink) % max(self.ring, 1)
        for layer in self.layers:
            layer.keep(goal, self.tokens)
        self.seen += self.chunk

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers, the provisional stretch included."""
        return sum(layer.nbytes for layer in self.layers)


def layer_rows(cache: RollingCache, layer: int) -> LayerRows | QuantisedRows:
    """What a full cache keeps of a layer, in tensors of its own."""
    if isinstance(cache, QuantisedCache):
        return QuantisedRows(cache, layer)
    room = (0, 0, 0, cache.chunk * cache.tokens)           # behind the kept rows, for the chunk
    buffers = tuple(F.pad(buffer[layer].detach(), room) for buffer in cache.buffers)
    return LayerRows(buffers, cache.capacity * cache.tokens)


# ---- passes over it --------------------------------------------------------------------------


def one_block(block: Block, rows: LayerRows | QuantisedRows, x: Tensor, level: Tensor, words: Tensor,
              q_table: Table, k_table: Table, attend: Route) -> Tensor:
    """What is compiled: one block, over the rows of one layer.

    All blocks run the same code on tensors of the same shapes. So every layer calls the same
    graph with its own weights and rows. (A graph of all 30 layers takes Inductor minutes and
    runs no faster.) The layer's number does not occur: it would be a constant of the graph, and
    each layer would get a graph of its own.
    """
    x, _ = block(x, level, words, q_table, k_table, cache=rows, attend=attend)
    return x


class CompiledPass:
    """`VideoDiT.denoise` over a full window, its blocks compiled.

    fullgraph=True: what cannot be compiled raises, and is not skipped in silence. Positions,
    indices and the counter are tensors, so no pass recompiles and none waits for the host.
    """

    def __init__(self, model: VideoDiT, window: FullWindow, attend: Route, backend: str):
        self.model = model
        self.window = window
        self.attend = attend
        self.step = torch.compile(one_block, fullgraph=True, dynamic=False, backend=backend)

    def __call__(self, chunk: Tensor, sigma: Tensor, caption: Tensor) -> Tensor:
        """v of the chunk; the provisional rows of all layers are written."""
        x, sigma_emb, level, words = self.model.enter(chunk, sigma, caption)
        q_table, k_table = self.model.tables(self.window, x.dtype)
        for block, rows in zip(self.model.blocks, self.window.layers):
            x = self.step(block, rows, x, level, words, q_table, k_table, self.attend)
        return self.model.leave(x, sigma_emb)

    def commit(self) -> None:
        """Keep the chunk of the last pass."""
        self.window.commit()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Where passes are recorded. There is one for a device: every CUDA stream that multiplies
    matrices keeps a workspace of cuBLAS, on an H100 32 MB, until the process ends."""
    return torch.cuda.Stream(device)


class RecordedPass:
    """A CompiledPass on a GPU as two CUDA graphs, one for each verb: a verb is one launch.

    Inputs are copied to where the graph expects them. The result stands in a tensor that the
    next pass overwrites.
    """

    def __init__(self, compiled: CompiledPass, chunk: Tensor, sigma: Tensor, caption: Tensor):
        self.chunk = chunk.clone()
        self.sigma = sigma.clone()
        self.caption = caption.clone()
        inputs = self.chunk, self.sigma, self.caption
        self.passing = torch.cuda.CUDAGraph()
        self.committing = torch.cuda.CUDAGraph()
        aside = _side_stream(chunk.device)
        aside.wait_stream(torch.cuda.current_stream(chunk.device))
        with torch.cuda.stream(aside):
            compiled(*inputs)          # a recording must not meet first-time work: once more
        torch.cuda.current_stream(chunk.device).wait_stream(aside)
        with torch.cuda.graph(self.passing, stream=aside):
            self.v = compiled(*inputs)
        with torch.cuda.graph(self.committing, stream=aside):
            compiled.commit()          # recorded, not run: the window does not move here
        torch.cuda.synchronize()
        self.compiled = compiled       # its tensors must live as long as the graphs

    def __call__(self, chunk: Tensor, sigma: Tensor, caption: Tensor) -> Tensor:
        """As CompiledPass."""
        self.chunk.copy_(chunk)
        self.sigma.copy_(sigma)
        self.caption.copy_(caption)
        self.passing.replay()
        return self.v

    def commit(self) -> None:
        """As CompiledPass."""
        self.committing.replay()


class FastStream(Stream):
    """A Stream that compiles its passes once the window is full.

    Until then shapes grow from chunk to chunk, and it runs as any Stream does. The first pass
    that finds the window full goes over: `cache` becomes a FullWindow, and on a GPU the passes
    are recorded as CUDA graphs. `say` is told so in two lines. `backend` is torch.compile's. A
    cache that is given may be a FullWindow already. Raises ValueError if chunks or captions
    change their shape later.
    tests/test_fast_stream.py: one graph, no recompilation, the same video; nothing outlives it.
    """

    def __init__(self, model: VideoDiT, caption: Tensor,
                 cache: RollingCache | FullWindow | None = None, attend: Route = attend_auto,
                 backend: str = "inductor", say: Callable[[str], None] = lambda line: None):
        self.fast = None
        super().__init__(model, caption, cache, attend)
        self.backend = backend
        self.say = say

    @torch.no_grad()
    def velocity(self, x: Tensor, sigma: float) -> Tensor:
        """v of the chunk x, all of whose frames are at noise level sigma.

        Once the window is full it stands in a tensor that the next pass may overwrite.
        """
        if self.fast is None and self.cache.filled == self.cache.capacity:
            self._go_over(x)
        if self.fast is None:
            return super().velocity(x, sigma)
        return self._pass(x, sigma)

    @torch.no_grad()
    def commit(self, x: Tensor) -> None:
        """The chunk x is finished: it belongs to the past of the next."""
        if self.fast is None:
            super().commit(x)
            return
        # The same pass at sigma = 0. Its answer is of no use, its rows are.
        self._pass(x, 0.0)
        self.fast.commit()

    def _pass(self, x: Tensor, sigma: float) -> Tensor:
        if (x.shape, self.caption.shape) != self.made_for:
            chunk, caption = self.made_for
            raise ValueError(f"this stream was compiled for chunks {tuple(chunk)} and "
                             f"captions {tuple(caption)}; make another FastStream")
        return self.fast(x, one_level(x, sigma), self.caption)

    def _go_over(self, x: Tensor) -> None:
        """From here on passes are compiled."""
        start = time.perf_counter()
        if not isinstance(self.cache, FullWindow):
            self.say(f"compiling   the window is full after {self.cache.seen} frames: "
                     "one graph per pass from here on")
            self.cache = FullWindow(self.cache)
        parameters = sum(p.numel() for p in self.model.parameters())
        backend = self.backend
        if backend == "inductor" and x.is_cuda and parameters < LARGE:
            backend = "eager"
        self.made_for = x.shape, self.caption.shape
        fast = CompiledPass(self.model, self.cache, self.attend, backend)
        inputs = x, one_level(x, 1.0), self.caption
        fast(*inputs)                  # compiles; writes the provisional rows alone
        recorded = ""
        if x.is_cuda:
            fast = RecordedPass(fast, *inputs)
            recorded = ", captured as a CUDA graph"
        self.fast = fast
        self.say(f"compiled    in {time.perf_counter() - start:.0f} s{recorded}")
