"""Streaming as fast as the device allows: once the window is full nothing changes from chunk to chunk but numbers, so a pass can be
compiled once and, on a GPU, recorded once and replayed.

`FullWindow` is the rolling cache in that form, `CompiledChunk` the model's two verbs on it. sample.py goes over to them by itself.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from cache import RollingCache, Rows
from mla_video import VideoDiT


class FullWindow(RollingCache):
    """A cache whose window is full, in the form that a compiled graph can use: nothing about it changes from chunk to chunk but the
    content of tensors. `seen` is a tensor, so counting recompiles nothing and no number travels between host and GPU; and the
    provisional chunk lives in the buffers, behind the slots, so that `peek` returns them as they are and copies no window.

    Made from a full `RollingCache`, which stays as it was; ValueError if it is not full. The contract differs: `peek` writes the provisional
    stretch, `commit` stores what the last peeks wrote, and there is no way back (no reset, no rewind). Inference only.
    tests/test_fast_path.py: equal to RollingCache.
    """

    def __init__(self, cache: RollingCache):
        if cache.filled < cache.slots:
            raise ValueError(f"the window is not full yet ({cache.filled} of {cache.slots} frames): go on with the RollingCache")
        vars(self).update(vars(cache))
        room = (0, 0, 0, self.chunk * self.tokens)
        self.rows = [tuple(F.pad(buffer[i].detach(), room) for buffer in cache.buffers) for i in range(len(cache.buffers[0]))]
        self.buffers = self.rows[0]                        # a layer's: widths and device; each layer has tensors of its own,
        self.seen = torch.tensor(cache.seen, device=self.buffers[0].device)    # since a graph that writes to views of one must copy

    @property
    def filled(self) -> int:
        return self.slots

    def _base(self) -> Tensor:
        return self.seen.clamp(max=self.horizon - self.chunk)

    def peek(self, layer: int, rows: Rows) -> Rows:
        for buffer, new in zip(self.rows[layer], rows):
            buffer[:, self.slots * self.tokens:] = new
        return self.rows[layer]

    def commit(self, rows: list[Rows] | None = None, detach: bool = True) -> None:
        """`rows` are those that the last pass peeked with, already in place; only the ring can be their goal, the sink being full."""
        stay = min(self.chunk, self.ring)
        frame = self.seen + self.chunk - stay + torch.arange(stay, device=self.seen.device)
        goal = self.sink + (frame - self.sink) % max(self.ring, 1)
        for buffers in self.rows:
            for buffer in buffers:
                frames = buffer.unflatten(1, (self.slots + self.chunk, self.tokens))
                frames[:, :self.slots].index_copy_(1, goal, frames[:, self.slots + self.chunk - stay:])
        self.seen += self.chunk

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffers in self.rows for buffer in buffers)


class CompiledChunk:
    """A model's `denoise` and `commit` over one full window, compiled: the same two verbs, for the same chunk shape.

    All blocks run the same code on tensors of the same shapes, so *one* block is compiled, and every layer calls that graph with its own
    weights and rows; a graph of all 30 layers takes Inductor minutes and runs no faster. `fullgraph=True`: what cannot be compiled raises
    here and is not skipped. Positions, slots and the counter are tensors, so no pass recompiles and none waits for the host. The commit is
    the same pass at sigma = 0, then a copy of the chunk's rows to their slots. On a GPU both are captured whole as CUDA graphs: a pass is
    one launch, and its result stands in a buffer that the next pass overwrites.
    `cache` is replaced by `window`, which starts as its copy. tests/test_fast_path.py: one graph, no recompilation, same video.
    """

    class Layer:
        """A block as `VideoDiT` calls it. What it sees comes from a window of one layer: a number of the layer would be a constant of the
        graph, and each layer would get a graph of its own."""

        def __init__(self, block, window: FullWindow, layer: int, step):
            self.block, self.attention, self.window, self.step = block, block.attention, copy.copy(window), step
            self.window.rows = window.rows[layer:layer + 1]

        def __call__(self, x, level, caption, see, *rest):
            return self.step(self.block, self.window, x, level, caption, *rest)

    @torch.no_grad()
    def __init__(self, model: VideoDiT, cache: RollingCache, caption: Tensor, route: str = "auto", backend: str = "inductor"):
        c, weight = model.config, model.embed.weight
        self.window = window = cache if isinstance(cache, FullWindow) else FullWindow(cache)
        self.x = weight.new_zeros(len(caption), c.chunk, c.channels, c.height, c.width)
        self.sigma, self.caption = weight.new_zeros(self.x.shape[:2]), caption.clone()
        if backend == "inductor" and weight.is_cuda and sum(p.numel() for p in model.parameters()) < 10**8:
            backend = "eager"                              # a small model's time is its launches, which the CUDA graph removes: no code
                                                           # that Inductor could write in its seconds would earn them back
        step = torch.compile(lambda block, see, x, level, caption, *rest: block(x, level, caption, lambda rows: see.peek(0, rows), *rest),
                             fullgraph=True, dynamic=False, backend=backend)
        twin = copy.copy(model)                            # the same weights, but its blocks are the compiled one
        twin._modules = model._modules | {"blocks": [self.Layer(block, window, i, step) for i, block in enumerate(model.blocks)]}
        self._pass = lambda x, sigma, caption: twin.denoise(x, sigma, caption, window, route)
        self.v = self._pass(self.x, self.sigma, self.caption)                          # compiles; writes the provisional rows alone
        self._replay = self._store = None
        if self.x.is_cuda:
            stream = torch.cuda.Stream()                   # a capture must not meet first-time work: run once more, aside
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._pass(self.x, self.sigma, self.caption)
            torch.cuda.current_stream().wait_stream(stream)
            self._replay, self._store = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._replay):
                self.v = self._pass(self.x, self.sigma, self.caption)
            with torch.cuda.graph(self._store):            # recorded, not run: the window does not move here
                window.commit()
            torch.cuda.synchronize()

    def _check(self, x: Tensor, cache) -> None:
        if cache is not self.window or x.shape != self.x.shape:
            raise ValueError(f"this graph was made for chunks {tuple(self.x.shape)} and its own window; make another CompiledChunk")

    def denoise(self, x: Tensor, sigma: Tensor, caption: Tensor, cache: FullWindow, route: str = "auto") -> Tensor:
        self._check(x, cache)
        if self._replay is None:
            return self._pass(x, sigma, caption)
        self.x.copy_(x)
        self.sigma.copy_(sigma)
        self.caption.copy_(caption)
        self._replay.replay()
        return self.v

    def commit(self, x: Tensor, caption: Tensor, cache: FullWindow, route: str = "auto") -> None:
        self.denoise(x, x.new_zeros(x.shape[:2]), caption, cache)
        self.window.commit() if self._store is None else self._store.replay()
