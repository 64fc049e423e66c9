"""Exercise 7: another sink rule.

Sink frames are kept because a model that loses its first frames loses its footing; but where do they *stand*? With absolute positions
(Self-Forcing) their distance grows with the video, until it is one that no training clip had. Here, beyond the horizon, the window stands
still at the horizon's end and sinks stay at the positions 0, 1, ... they always had: a distance seen in training, but the largest of those.
Rolling Forcing chose the smallest: sinks stand immediately before the window. Rows are cached unrotated, so this does not concern what
the cache holds: one method decides. You write it. Up to the horizon nothing may change, or streaming would not be what training saw.

Read first: cache.py, "Positions at read" in its header, `positions`, `_base`, and (R3) in rope3d.py.
Hint: the ring holds `self.ring` frames, the oldest of them stands at base - ring once the window is full; and beyond the horizon it
always is (why?). When ring = 0 "immediately before the window" is before the chunk.

    python -m pytest exercises/ex7_sinks.py             today: NotImplementedError, "exercise 7: ..."
"""

import torch
from hypothesis import strategies as st
from torch import Tensor

from attention import MLA
from cache import RollingCache
from lab import EXACT, Dice, assert_same, configs, enliven, forall, seeds
from mla_video import Config, VideoDiT
from rope3d import Rope3D, grid_coords


# ---- yours to write -------------------------------------------------------------------------------------------------


class AdjacentSinks(RollingCache):
    """A `RollingCache` in which, beyond the horizon, sink frames stand immediately before the oldest frame of the ring."""

    def positions(self) -> tuple[Tensor, Tensor]:
        """As the parent's: times of the filled slots [filled], and of the chunk being made [chunk].

        As long as the chunk being made ends within the horizon, the parent's. Beyond it: window and chunk as the parent's, sinks just
        before them, in their own order.
        """
        raise NotImplementedError("exercise 7: `AdjacentSinks.positions`, sinks immediately before the window")


# ---- the tests ------------------------------------------------------------------------------------------------------

SIZES = dict(chunk=st.integers(1, 3), sink=st.integers(0, 3), ring=st.integers(0, 4), spare=st.integers(0, 6))


def both(chunk, sink, ring, spare, P=1, widths=(1, 1)):
    """(shipped, yours), empty; the horizon is `spare` frames beyond the window."""
    window = sink + ring + chunk
    sizes = dict(tokens=P, chunk=chunk, window=window, sink=sink, horizon=window + spare, dtype=torch.float64)
    return RollingCache(1, 1, widths, **sizes), AdjacentSinks(1, 1, widths, **sizes)


def zeros(chunk, P=1):
    return [tuple(torch.zeros(1, chunk * P, 1, dtype=torch.float64) for _ in range(2))]


@forall(**SIZES)
def test_up_to_the_horizon_nothing_changes(chunk, sink, ring, spare):
    shipped, mine = both(chunk, sink, ring, spare)
    while shipped.seen + chunk <= shipped.horizon:
        got, want = ([part.tolist() for part in cache.positions()] for cache in (mine, shipped))
        assert got == want, f"the chunk at frame {shipped.seen} ends within the horizon of {shipped.horizon}: cached frames and chunk " \
                            f"must stand at {want}, not {got}"
        for cache in (shipped, mine):
            cache.commit(zeros(chunk))


@forall(**SIZES)
def test_beyond_it_sinks_window_and_chunk_are_one_run(chunk, sink, ring, spare):
    shipped, mine = both(chunk, sink, ring, spare)
    for _ in range(12):
        if shipped.seen + chunk > shipped.horizon:
            (past, own), (shipped_past, shipped_own) = mine.positions(), shipped.positions()
            frames = mine.frames()
            local = frames >= sink
            assert torch.equal(own, shipped_own) and torch.equal(past[local], shipped_past[local]), \
                f"only sinks move: the window stands at {shipped_past[local].tolist()}, the chunk at {shipped_own.tolist()}"
            run = [*past[frames.argsort()].tolist(), *own.tolist()]
            want = list(range(shipped.horizon - shipped.slots - chunk, shipped.horizon))
            assert run == want, f"sink {sink}, ring {ring}, chunk {chunk}: from old to young, frames stand at {run}, must be {want}"
        for cache in (shipped, mine):
            cache.commit(zeros(chunk))
    assert torch.equal(mine.frames(), shipped.frames()), "which frames are kept is not a matter of positions"


@forall(seed=seeds, P=st.integers(1, 2), **SIZES)
def test_moving_the_sinks_alone_is_moving_the_whole_window(seed, P, chunk, sink, ring, spare):
    """Scores know differences only, (R3): beyond the horizon the answer is that of "re-index everything from 0" (horizon = window)."""
    rope, window = Rope3D(6, 8), sink + ring + chunk
    layer, dice = enliven(MLA(10, 2, C=4, Q=6, N=3, V=5, rope=rope).double(), seed), Dice(seed)
    _, mine = both(chunk, sink, ring, spare, P, layer.widths)
    from_zero = RollingCache(1, 1, layer.widths, tokens=P, chunk=chunk, window=window, sink=sink, horizon=window, dtype=torch.float64)
    for _ in range(8):
        x, answers = dice.normal(1, chunk * P, 10), []
        for cache in (mine, from_zero):
            past, own = cache.positions()
            tables = (rope.table(grid_coords(frames, 1, P), torch.float64) for frames in (own, torch.cat((past, own))))
            answers.append(layer(x, cache.peek(0, layer.rows(x)), *tables))
        if mine.seen + chunk > mine.horizon:
            assert_same(*answers, EXACT, "distances between frames differ from those of a window that is re-indexed from 0")
        for cache in (mine, from_zero):
            cache.commit([layer.rows(x)])


@forall(sizes=configs(min_chunks=2, layers=2), seed=seeds)
def test_the_shipped_model_streams_with_it(sizes, seed):
    """Equal to the shipped cache up to the horizon, and finite beyond."""
    config = Config(**sizes)
    model, dice = enliven(VideoDiT(config).double(), seed), Dice(seed)
    shipped = model.make_cache(1)
    mine = AdjacentSinks(config.layers, 1, model.blocks[0].attention.widths, tokens=config.tokens, chunk=config.chunk, window=config.window,
                         sink=config.sink, horizon=config.frames, dtype=torch.float64)
    caption, sigma = dice.below(5, 1, config.slots), torch.full((1, config.chunk), 0.5).double()
    with torch.no_grad():
        for start in range(0, config.frames + 2 * config.chunk, config.chunk):
            x = dice.normal(1, config.chunk, config.channels, config.height, config.width)
            want, got = (model.denoise(x, sigma, caption, cache) for cache in (shipped, mine))
            if start + config.chunk <= config.frames:
                assert_same(got, want, EXACT, f"the chunk at frame {start} ends within the horizon of {config.frames}: nothing may change")
            assert got.isfinite().all(), f"v of the chunk at frame {start} is not finite"
            for cache in (shipped, mine):
                model.commit(x, caption, cache)
