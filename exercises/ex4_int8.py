"""Exercise 4: an int8 latent cache.

Latents made the cache 13.7 times smaller; eight bits instead of sixteen nearly halve it once
more. Latents are easy to quantise: content is normed, so of even size, and nothing is rotated
in the cache, so a row is written once and never again. The discipline is what can go wrong.
Quantise on commit and only there: a row that is dequantised and quantised again at every step
may drift. Keep the chunk being made exact: its rows are provisional. Count the scales: a cache
is as large as all its buffers.

You write symmetric quantisation with one scale per token and part (content, position), and the
two verbs of the cache.

Read first: cache.py, `peek` and `commit` (both loop over however many buffers there are, and
take whatever dtype a buffer has), and `bytes_per_token`.
Hint: to the parent class an int8 row and its scale are just two more things to store: call
super().commit with four tensors a layer. One number more: rounding to the nearest of steps of
size s errs by at most s / 2, and s = max|row| / 127. What does a row of zeros do?

    python -m pytest exercises/ex4_int8.py          today: three lines, "exercise 4: ..."
"""

import torch
from hypothesis import strategies as st
from torch import Tensor

from cache import RollingCache, Rows
from lab import Dice, configs, enliven, error, forall, seeds
from mla_video import PRESETS, Config, VideoDiT

# ---- yours to write -------------------------------------------------------------------------


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 values [..., width] and a float32 scale [..., 1] for rows x [..., width].

    x is nearly values * scale. Symmetric: zero stays zero and the largest magnitude of a row
    becomes 127. A row of zeros has a scale of 1, by which one may divide.
    """
    raise NotImplementedError("exercise 4: `quantise`, a row in int8 and its scale")


def dequantise(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows that `quantise` stands for, in `dtype`."""
    raise NotImplementedError("exercise 4: `dequantise`, rows from int8 and scale")


class Int8Cache(RollingCache):
    """A `RollingCache` whose committed rows are int8.

    Buffers: content, position (int8), content's scale, position's scale (float32). `dtype` is
    there for the parent's signature and decides nothing.
    """

    def __init__(self, layers: int, batch: int, widths: tuple[int, int], *, device=None,
                 dtype=torch.float32, **sizes):
        super().__init__(layers, batch, widths, device=device, dtype=torch.int8, **sizes)
        scales = [torch.empty(*values.shape[:3], 1, device=device) for values in self.buffers]
        self.buffers += tuple(scales)

    def peek(self, layer: int, rows: Rows) -> Rows:
        """As the parent's: committed rows, then the chunk's own. Changes nothing.

        Committed rows are dequantised to the dtype of `rows`; the chunk's own stay exact.
        """
        raise NotImplementedError(
            "exercise 4: `Int8Cache.peek`, dequantise what was committed and nothing else")

    def commit(self, rows: list[Rows], detach: bool = True) -> None:
        """As the parent's: quantise the rows of all layers once, store values and scales."""
        raise NotImplementedError(
            "exercise 4: `Int8Cache.commit`, quantise once and store values and scales")


# ---- the tests ------------------------------------------------------------------------------


def within(got: Tensor, want: Tensor, message: str) -> None:
    """Every number within half a step of its row, max|row| / 254, and the scale's rounding."""
    assert got.shape == want.shape, \
        f"{message}: shape {list(got.shape)}, expected {list(want.shape)}"
    half_step = want.abs().amax(dim=-1, keepdim=True) / 254
    wrong = (got - want).abs() / half_step
    assert (wrong <= 1 + 1e-4).all(), (
        f"{message}: off by {wrong.max():.2f} half steps, must be 1 at most. Truncated instead "
        "of rounded? scale not per token?")


@forall(shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9)), seed=seeds)
def test_rounding_errs_by_half_a_step_at_most(shape, seed):
    dice = Dice(seed)
    x = dice.normal(*shape)
    x = x * torch.exp(3 * dice.normal(*shape[:2], 1))      # rows of very different size
    values, scale = quantise(x)
    found = f"{values.dtype} {list(values.shape)}, {scale.dtype} {list(scale.shape)}"
    want = f"torch.int8 {list(shape)}, torch.float32 {[*shape[:2], 1]}"
    assert found == want, f"values int8, one float32 scale a row: {want}, not {found}"
    largest = values.int().abs().amax(dim=-1)
    assert (largest == 127).all(), (
        f"the largest magnitude of each row must become 127, not {largest.tolist()}: bits "
        "wasted, or overflow")
    within(dequantise(values, scale, x.dtype), x, "a row came back wrong")


def test_zeros_stay_zeros():
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    values, scale = quantise(x)
    assert scale[0] == 1, (
        f"a row of zeros has scale {scale[0].item()}: 0 / 0 is NaN, and what NaN is in int8 no "
        "one has defined")
    back = dequantise(values, scale, torch.float64)
    assert back.dtype == torch.float64, \
        f"dequantise was asked for float64 and gave {back.dtype}"
    assert torch.allclose(back, x.double(), rtol=1e-6, atol=0), \
        f"{x.tolist()} came back as {back.tolist()}"


LAYERS = 2
WIDTHS = 4, 3


class Watch:
    """Streams the same rows through an exact cache and yours, and compares what is read."""

    def __init__(self, dice: Dice, **sizes):
        self.dice = dice
        self.exact = RollingCache(LAYERS, 1, WIDTHS, dtype=torch.float64, **sizes)
        self.small = Int8Cache(LAYERS, 1, WIDTHS, dtype=torch.float64, **sizes)
        self.first_read = {}                               # by layer, part and frame

    def chunk(self) -> None:
        """One more chunk: both caches are read in every layer, then written."""
        tokens = self.exact.chunk * self.exact.tokens
        rows = []
        for _ in range(LAYERS):
            rows.append(tuple(self.dice.normal(1, tokens, width) for width in WIDTHS))
        for layer in range(LAYERS):
            self.read(layer, rows[layer])
        self.exact.commit(rows)
        self.small.commit(rows)

    def read(self, layer: int, rows: Rows) -> None:
        past = self.exact.filled * self.exact.tokens
        before = [buffer[:, :, :past].clone() for buffer in self.small.buffers]
        got = self.small.peek(layer, rows)
        after = [buffer[:, :, :past] for buffer in self.small.buffers]
        assert all(map(torch.equal, before, after)), "peek changed the cache"
        want = self.exact.peek(layer, rows)
        for i, part in enumerate(("content", "position")):
            assert got[i].dtype == want[i].dtype, \
                f"rows come back in the dtype of the chunk, {want[i].dtype}, not {got[i].dtype}"
            within(got[i][:, :past], want[i][:, :past], f"committed {part} rows")
            assert torch.equal(got[i][:, past:], want[i][:, past:]), \
                "rows of the chunk being made are not committed: they stay exact"
            self.same_as_at_first((layer, part), got[i][:, :past])

    def same_as_at_first(self, place: tuple, rows: Tensor) -> None:
        """A frame reads the same for as long as it is in the cache."""
        frames = self.exact.frames().tolist()
        for frame, row in zip(frames, rows.split(self.exact.tokens, dim=1)):
            first = self.first_read.setdefault((*place, frame), row)
            assert torch.equal(row, first), \
                f"frame {frame} reads otherwise than at first: quantised twice?"


SIZES = dict(
    chunk=st.integers(1, 3),
    sink=st.integers(0, 2),
    ring=st.integers(0, 4),
    P=st.integers(1, 2),
    chunks=st.integers(1, 5),
)


@forall(seed=seeds, **SIZES)
def test_it_keeps_what_was_committed_and_the_chunk_exactly(seed, chunk, sink, ring, P, chunks):
    window = sink + ring + chunk
    watch = Watch(Dice(seed), tokens=P, chunk=chunk, window=window, sink=sink, horizon=20)
    for _ in range(chunks):
        watch.chunk()
    assert torch.equal(watch.small.frames(), watch.exact.frames()), \
        "the same frames must be kept"
    stored = [buffer.dtype for buffer in watch.small.buffers]
    assert stored == [torch.int8, torch.int8, torch.float32, torch.float32], \
        "what is stored is int8 and its scales"


@forall(sizes=configs(layers=2, attention=("mla",)), seed=seeds)
def test_the_model_hardly_notices(sizes, seed):
    """v of a chunk after two committed ones, random weights.

    It is off by rounding, not by much, and not by nothing.
    """
    c = Config(**sizes)
    model = enliven(VideoDiT(c).double(), seed)
    exact = model.make_cache(1)
    small = Int8Cache(c.layers, 1, (c.latent, c.rope), tokens=c.tokens, chunk=c.chunk,
                      window=c.window, sink=c.sink, horizon=c.frames, dtype=torch.float64)
    dice = Dice(seed)
    chunks = dice.normal(3, 1, c.chunk, c.channels, c.height, c.width)
    caption = dice.below(5, 1, c.slots)
    sigma = torch.full((1, c.chunk), 0.5).double()
    with torch.no_grad():
        for clean in chunks[:2]:
            model.commit(clean, caption, exact)
            model.commit(clean, caption, small)
        want = model.denoise(chunks[2], sigma, caption, exact)
        got = model.denoise(chunks[2], sigma, caption, small)
    wrong = error(got, want)
    assert wrong < 0.05, (
        f"v is off by {wrong:.1%}; eight bits cost well under 5 % here. Is every row "
        "dequantised with its own scale?")
    assert wrong > 0 or exact.filled == 0, "v is exactly the same: nothing was quantised"


def test_bytes():
    """The paper's widths, from the buffers that exist.

    224 bytes and two scales of 4, against 448 in bfloat16.
    """
    c = PRESETS["wan1.3b"]
    widths = c.latent, c.rope
    cache = Int8Cache(1, 1, widths, tokens=2, chunk=1, window=3, sink=1, horizon=3)
    cache.commit([tuple(torch.ones(1, 2, width) for width in widths)])
    assert cache.bytes_per_token == 232, \
        f"{cache.bytes_per_token} bytes a token and layer, should be 192 + 32 + 2 * 4"
    assert cache.nbytes == 928, (
        f"two frames of two tokens are 928 bytes, the buffers have {cache.nbytes}: what else "
        "is kept?")
