"""Exercise 7: another sink rule.

Sink frames are kept because a model that loses its first frames loses its footing. But where do
they *stand*? With absolute positions (Self-Forcing) their distance grows with the video, until
it is one that no training clip had. Here, beyond the horizon, the window stands still at the
horizon's end and sinks stay at the positions 0, 1, ... they always had: a distance seen in
training, but the largest of those. Rolling Forcing chose the smallest: sinks stand immediately
before the window. Rows are cached unrotated, so this does not concern what the cache holds: one
method decides. You write it. Up to the horizon nothing may change, or streaming would not be
what training saw.

Read first: cache.py, "Which position?" in its header with (P1) to (P3), `positions`, and (R3)
in rope3d.py.
Hint: the ring holds `self.ring` frames, the oldest of them stands at base - ring once the
window is full; and beyond the horizon it always is (why?). When ring = 0 "immediately before
the window" is before the chunk.

    python -m pytest exercises/ex7_sinks.py         today: one line, "exercise 7: ..."
"""

import torch
from hypothesis import strategies as st
from torch import Tensor

from attention import MLA
from cache import RollingCache
from lab import EXACT, Dice, assert_same, configs, enliven, forall, seeds
from mla_video import Config, VideoDiT
from rope3d import Rope3D, grid_coords

# ---- yours to write -------------------------------------------------------------------------


class AdjacentSinks(RollingCache):
    """A `RollingCache` with another place for the sink frames beyond the horizon.

    They stand immediately before the oldest frame of the ring.
    """

    def positions(self) -> tuple[Tensor, Tensor]:
        """As the parent's: times of the frames kept [filled], of the chunk being made [chunk].

        As long as the chunk being made ends within the horizon, the parent's. Beyond it: window
        and chunk as the parent's, sinks just before them, in their own order.
        """
        raise NotImplementedError(
            "exercise 7: `AdjacentSinks.positions`, sinks immediately before the window")


# ---- the tests ------------------------------------------------------------------------------

SIZES = dict(
    chunk=st.integers(1, 3),
    sink=st.integers(0, 3),
    ring=st.integers(0, 4),
    spare=st.integers(0, 6),
)


def both(chunk, sink, ring, spare, P=1, widths=(1, 1)):
    """(shipped, yours), empty; the horizon is `spare` frames beyond the window."""
    window = sink + ring + chunk
    sizes = dict(tokens=P, chunk=chunk, window=window, sink=sink, horizon=window + spare)
    shipped = RollingCache(1, 1, widths, dtype=torch.float64, **sizes)
    mine = AdjacentSinks(1, 1, widths, dtype=torch.float64, **sizes)
    return shipped, mine


def commit_zeros(*caches) -> None:
    for cache in caches:
        nothing = torch.zeros(1, cache.chunk * cache.tokens, 1, dtype=torch.float64)
        cache.commit([(nothing, nothing)])


def beyond(cache) -> bool:
    """Does the chunk being made end beyond the horizon?"""
    return cache.seen + cache.chunk > cache.horizon


def stand(cache) -> list[list[int]]:
    return [part.tolist() for part in cache.positions()]


@forall(**SIZES)
def test_up_to_the_horizon_nothing_changes(chunk, sink, ring, spare):
    shipped, mine = both(chunk, sink, ring, spare)
    while not beyond(shipped):
        got = stand(mine)
        want = stand(shipped)
        assert got == want, (
            f"the chunk at frame {shipped.seen} ends within the horizon of {shipped.horizon}: "
            f"cached frames and chunk must stand at {want}, not {got}")
        commit_zeros(shipped, mine)


@forall(**SIZES)
def test_beyond_it_sinks_window_and_chunk_are_one_run(chunk, sink, ring, spare):
    shipped, mine = both(chunk, sink, ring, spare)
    for _ in range(12):
        if beyond(shipped):
            assert_one_run(shipped, mine)
        commit_zeros(shipped, mine)
    assert torch.equal(mine.frames(), shipped.frames()), \
        "which frames are kept is not a matter of positions"


def assert_one_run(shipped, mine) -> None:
    past, own = mine.positions()
    shipped_past, shipped_own = shipped.positions()
    frames = mine.frames()
    local = frames >= mine.sink
    same = torch.equal(past[local], shipped_past[local])
    assert same and torch.equal(own, shipped_own), (
        f"only sinks move: the window stands at {shipped_past[local].tolist()}, the chunk at "
        f"{shipped_own.tolist()}")
    run = past[frames.argsort()].tolist() + own.tolist()
    window = mine.sink + mine.ring + mine.chunk
    want = list(range(mine.horizon - window, mine.horizon))
    assert run == want, (
        f"sink {mine.sink}, ring {mine.ring}, chunk {mine.chunk}: from old to young, frames "
        f"stand at {run}, must be {want}")


def answer(layer, cache, x) -> Tensor:
    """The layer's for tokens x [1, chunk * P, E], which look at the cache and themselves."""
    past, own = cache.positions()
    q_at = grid_coords(own, 1, cache.tokens)
    k_at = grid_coords(torch.cat((past, own)), 1, cache.tokens)
    q_table = layer.rope.table(q_at, torch.float64)
    k_table = layer.rope.table(k_at, torch.float64)
    return layer(x, cache.peek(0, layer.rows(x)), q_table, k_table)


@forall(seed=seeds, P=st.integers(1, 2), **SIZES)
def test_moving_the_sinks_alone_is_moving_the_whole_window(seed, P, chunk, sink, ring, spare):
    """Scores know differences only, (R3).

    So beyond the horizon the answer is that of "re-index everything from 0" (horizon = window).
    """
    layer = enliven(MLA(10, 2, C=4, Q=6, N=3, V=5, rope=Rope3D(6, 8)).double(), seed)
    dice = Dice(seed)
    _, mine = both(chunk, sink, ring, spare, P, layer.widths)
    from_zero, _ = both(chunk, sink, ring, 0, P, layer.widths)
    for _ in range(8):
        x = dice.normal(1, chunk * P, 10)
        got = answer(layer, mine, x)
        want = answer(layer, from_zero, x)
        if beyond(mine):
            assert_same(got, want, EXACT, "distances between frames differ from those of a "
                        "window that is re-indexed from 0")
        mine.commit([layer.rows(x)])
        from_zero.commit([layer.rows(x)])


@forall(sizes=configs(min_chunks=2, layers=2), seed=seeds)
def test_the_shipped_model_streams_with_it(sizes, seed):
    """Equal to the shipped cache up to the horizon, and finite beyond."""
    c = Config(**sizes)
    model = enliven(VideoDiT(c).double(), seed)
    shipped = model.make_cache(1)
    widths = model.blocks[0].attention.widths
    mine = AdjacentSinks(c.layers, 1, widths, tokens=c.tokens, chunk=c.chunk, window=c.window,
                         sink=c.sink, horizon=c.frames, dtype=torch.float64)
    dice = Dice(seed)
    caption = dice.below(5, 1, c.slots)
    sigma = torch.full((1, c.chunk), 0.5).double()
    with torch.no_grad():
        for start in range(0, c.frames + 2 * c.chunk, c.chunk):
            x = dice.normal(1, c.chunk, c.channels, c.height, c.width)
            want = model.denoise(x, sigma, caption, shipped)
            got = model.denoise(x, sigma, caption, mine)
            if not beyond(shipped):
                assert_same(got, want, EXACT, f"the chunk at frame {start} ends within the "
                            f"horizon of {c.frames}: nothing may change")
            assert got.isfinite().all(), f"v of the chunk at frame {start} is not finite"
            model.commit(x, caption, shipped)
            model.commit(x, caption, mine)
