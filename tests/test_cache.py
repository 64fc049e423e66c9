"""The rolling cache is a plain Python list of frames, kept in buffers that never grow.

Proved here: any sequence of commit, peek and reset gives the rows, frames and positions that a
list gives (a stateful machine against oracles.ListCache), and a video of any age what a young
one would; sinks stay, the oldest frame goes first, bytes and memory addresses never change;
peeking changes not one bit; what is not filled never reaches an answer, be it NaN; the order of
frames in the ring means nothing; committing while gradients are recorded leaves earlier reads
intact and lets no gradient through.

Two kinds of poison: what is *sliced* away may be NaN. What is *masked* away may only be huge,
because 0 * NaN is NaN: a masked product with NaN in it would fail although it is correct
(test_a_masked_key_never_reaches_an_output).
"""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (RuleBasedStateMachine, initialize, invariant, precondition,
                                 rule, run_state_machine_as_test)

from lab import (CPU_ROUTES, EXACT, Dice, a_clip, a_model, assert_same, assert_zero, configs,
                 forall, seeds, sizes)
from oracles import ListCache, frames_kept, times
from test_routes import inputs, run

WIDTHS = (3, 2)                                            # C and R of the caches below


def same_bits(a, b) -> bool:
    """Equality that NaN passes."""
    return torch.equal(a.view(torch.int64), b.view(torch.int64))


def copies(cache) -> list:
    return [buffer.clone() for buffer in cache.buffers]


def addresses(cache) -> list[int]:
    return [buffer.data_ptr() for buffer in cache.buffers]


def fill(cache, value: float) -> None:
    """Write over every buffer: uninitialised memory may hold anything."""
    for buffer in cache.buffers:
        buffer.fill_(value)


def in_order_of_frames(part, frames: list[int], tokens: int):
    """Rows [B, T, width] read from a ring, whose frames may be in any order, with the frames
    sorted by age; the rows of the chunk itself come last, as they did."""
    past = part[:, :len(frames) * tokens]
    own = part[:, len(frames) * tokens:]
    by_frame = dict(zip(frames, past.split(tokens, dim=1)))
    return torch.cat([by_frame[f] for f in sorted(frames)] + [own], dim=1)


class CacheMachine(RuleBasedStateMachine):
    """RollingCache against a list. `code` is the first argument so that test_mutants.py can run
    it on a broken cache."""

    def __init__(self, code):
        super().__init__()
        self.code = code
        self.list = None                                   # until `build` has run

    @initialize(layers=st.integers(1, 2), batch=st.integers(1, 2), tokens=st.integers(1, 3),
                chunk=st.integers(1, 3), sink=st.integers(0, 3), ring=st.integers(0, 4),
                spare=st.integers(0, 4), poison=st.sampled_from([float("nan"), 1e30]),
                seed=seeds)
    def build(self, layers, batch, tokens, chunk, sink, ring, spare, poison, seed):
        window = sink + ring + chunk
        horizon = window + spare
        sizes = dict(tokens=tokens, chunk=chunk, window=window, sink=sink, horizon=horizon)
        self.layers = layers
        self.batch = batch
        self.dice = Dice(seed)
        self.cache = self.code.cache.RollingCache(layers, batch, WIDTHS, dtype=torch.float64,
                                                  **sizes)
        fill(self.cache, poison)
        self.empty = functools.partial(ListCache, **sizes)
        self.list = self.empty()
        self.home = addresses(self.cache)
        kept_tokens = layers * batch * (window - chunk) * tokens
        self.nbytes = kept_tokens * sum(WIDTHS) * 8

    def rows_of_a_layer(self):
        n = self.list.chunk * self.list.tokens
        return tuple(self.dice.normal(self.batch, n, width) for width in WIDTHS)

    def rows(self):
        return [self.rows_of_a_layer() for _ in range(self.layers)]

    @rule()
    def commit(self):
        rows = self.rows()
        with torch.no_grad():
            self.cache.commit(rows)
        self.list.commit(rows)

    @rule()
    def commit_while_gradients_are_recorded(self):
        rows = self.rows()
        for content, position in rows:
            content.requires_grad_()
            position.requires_grad_()
        before = self.cache.buffers
        contents = copies(self.cache)
        self.cache.commit(rows)
        self.list.commit(rows)
        assert all(map(same_bits, before, contents)), \
            "commit wrote into buffers that earlier reads wait for"
        assert not any(buffer.requires_grad for buffer in self.cache.buffers), \
            "what is committed must be detached: the cache-gradient leak"
        self.home = addresses(self.cache)

    @precondition(lambda self: len(self.list.past) > 0)
    @rule()
    def reset(self):
        self.cache.reset()
        self.list = self.empty()

    @rule(layer=st.integers(0, 1))
    def peek(self, layer):
        layer = layer % self.layers
        rows = self.rows_of_a_layer()
        before = copies(self.cache)
        got = self.cache.peek(layer, rows)
        want = self.list.peek(layer, rows)
        assert all(map(same_bits, before, self.cache.buffers)), \
            "peek changed a bit of the cache"
        assert [part.shape for part in got] == [part.shape for part in want], \
            "peek must give the frames kept and the chunk, nothing else"
        frames = self.cache.frames().tolist()
        for part, expected in zip(got, want):
            assert torch.equal(in_order_of_frames(part, frames, self.list.tokens), expected), \
                f"frames {frames} of the ring do not hold what was committed for them"

    @invariant()
    def frames_are_those_of_the_list(self):
        if self.list is None:
            return
        frames = sorted(self.cache.frames().tolist())
        kept = self.list.kept()
        assert frames == kept, f"kept frames {frames}, a list keeps {kept}: sink evicted, or " \
                               f"the wrong end of the window?"
        assert self.cache.filled == len(kept), "`filled` counts the frames kept"

    @invariant()
    def positions_are_those_of_the_list(self):
        if self.list is None:
            return
        past, own = self.cache.positions()
        stands_at = dict(zip(self.cache.frames().tolist(), past.tolist()))
        got = [stands_at[f] for f in self.list.kept()]
        own = own.tolist()
        want, mine = self.list.times()
        assert got == want, f"past frames stand at {stands_at}, should at {want}"
        assert own == mine, f"the chunk being made stands at {own}, should at {mine}"
        assert 0 <= min(own + want) and max(own + want) < self.list.horizon, \
            "a position left the trained range"

    @invariant()
    def memory_is_constant(self):
        if self.list is None:
            return
        assert self.cache.nbytes == self.nbytes, \
            "bytes must not depend on how much was committed"
        assert self.cache.bytes_per_token == sum(WIDTHS) * 8
        assert addresses(self.cache) == self.home, \
            "a ring moves nothing: buffers must stay where they are"


STEPS = settings(stateful_step_count=25)


def test_the_cache_is_a_list_of_frames(code):
    run_state_machine_as_test(functools.partial(CacheMachine, code), settings=STEPS)


def hunt(code):
    """The same for a mutant: the first counterexample will do."""
    first = settings(STEPS, phases=[Phase.generate], report_multiple_bugs=False)
    run_state_machine_as_test(functools.partial(CacheMachine, code), settings=first)


test_the_cache_is_a_list_of_frames.hunt = hunt


# ---- very long videos -----------------------------------------------------------------------


# Whole turns of the ring that a video is older than another. The ends of float32 and float64,
# as whole numbers, and of int32 are among them.
many_turns = st.one_of(st.integers(10_000, 10**15),
                       st.sampled_from([10_000, 2**24 + 1, 2**31, 2**53 + 1]))


@forall(seen=many_turns, sink=st.integers(0, 3), ring=st.integers(0, 4),
        filled=st.integers(0, 7), late=st.integers(0, 10**6))
def test_a_counter_on_the_device_counts_like_pythons_own(code, seen, sink, ring, filled, late):
    """A recorded graph keeps `seen` in a tensor: the same frames, the same positions."""
    index = torch.arange(min(filled, sink + ring))
    on_device = torch.tensor(seen)
    frames = code.cache.frames_at(index, seen, sink, ring)
    assert torch.equal(code.cache.frames_at(index, on_device, sink, ring), frames)
    base = seen - late
    positions = code.cache.read_positions(frames, seen, sink, base)
    again = code.cache.read_positions(frames, on_device, sink, torch.tensor(base))
    assert torch.equal(again, positions)


def older(cache, turns: int):
    """The same cache, said to have been turned that many times more. A whole turn of the ring
    brings every frame's successor to the same place."""
    cache = copy.deepcopy(cache)
    cache.seen += turns * cache.chunk * max(cache.ring, 1)
    return cache


@forall(tokens=st.integers(1, 3), chunk=st.integers(1, 3), sink=st.integers(0, 3),
        ring=st.integers(0, 4), spare=st.integers(0, 4), turns=many_turns, seed=seeds)
@torch.no_grad()
def test_an_old_cache_is_a_young_one_some_turns_later(
        code, tokens, chunk, sink, ring, spare, turns, seed):
    """Frames and positions are those of the list's arithmetic at any age, and commit and peek
    do with an old cache, bit for bit, what they do with a young one."""
    window = sink + ring + chunk
    horizon = window + spare
    dice = Dice(seed)

    def rows():
        return tuple(dice.normal(1, chunk * tokens, width) for width in WIDTHS)

    young = code.cache.RollingCache(1, 1, WIDTHS, tokens=tokens, chunk=chunk, window=window,
                                    sink=sink, horizon=horizon, dtype=torch.float64)
    fill(young, float("nan"))
    while young.seen < horizon:                      # until the window is full and stands still
        young.commit([rows()])
    old = older(young, turns)
    for _ in range(4):
        frames = old.frames().tolist()
        assert sorted(frames) == frames_kept(old.seen, chunk=chunk, window=window, sink=sink), \
            f"after {old.seen} frames the ring is said to hold {frames}"
        past, own = old.positions()
        in_order = [at for _, at in sorted(zip(frames, past.tolist()))]
        want = times(old.seen, chunk=chunk, window=window, sink=sink, horizon=horizon)
        assert (in_order, own.tolist()) == want, \
            f"after {old.seen} frames the past stands at {in_order} and the chunk at " \
            f"{own.tolist()}, should at {want}"

        new = rows()
        assert all(map(same_bits, old.peek(0, new), young.peek(0, new))), \
            f"after {old.seen} frames peek reads something else than after {young.seen}"
        old.commit([new])
        young.commit([new])


# ---- in the model ---------------------------------------------------------------------------


def a_list_for(config) -> ListCache:
    """An empty ListCache of the sizes of a model's cache."""
    return ListCache(tokens=config.tokens, chunk=config.chunk, window=config.window,
                     sink=config.sink, horizon=config.frames)


@forall(sizes=configs(), B=st.integers(1, 2), chunks=st.integers(1, 8), seed=seeds)
@torch.no_grad()
def test_streaming_with_the_ring_is_streaming_with_a_list(code, sizes, B, chunks, seed):
    """Far beyond the horizon, for both kinds of attention: the same model on a list that keeps
    everything and picks what may be seen."""
    model, dice = a_model(code, sizes, seed)
    ring = model.make_cache(B)
    plain = a_list_for(model.config)
    # What is not filled is sliced away: one NaN read would be everywhere.
    fill(ring, float("nan"))
    for number in range(chunks):
        x, sigma, caption = a_clip(model, dice, B, model.config.chunk)
        with_ring = model.denoise(x, sigma, caption, ring)
        with_list = model.denoise(x, sigma, caption, plain)
        assert_same(with_ring, with_list, EXACT,
                    f"chunk {number}: the ring and the list disagree")
        model.commit(x, caption, ring)
        model.commit(x, caption, plain)


@torch.no_grad()
def test_a_model_may_have_a_horizon_of_its_own(code):
    """`horizon` is that of its cache; 0 is the clip's length, and none is below the window."""
    config = replace(code.mla_video.Config(), dim=32, layers=1, heads=2, rope=6, window=6, sink=1)
    for horizon, wanted in ((0, 12), (6, 6), (2**20, 2**20)):
        model = code.mla_video.VideoDiT(replace(config, horizon=horizon))
        cache = model.make_cache(1)
        assert cache.horizon == wanted
        cache.seen = 9
        _, own = cache.positions()
        assert own[0] == min(9, wanted - 3)
    with pytest.raises(ValueError, match="horizon of 5 frames is shorter than the window of 6"):
        replace(config, horizon=5)


@forall(sizes=configs(), B=st.integers(1, 2), committed=st.integers(0, 4),
        steps=st.integers(1, 3), recorded=st.booleans(), seed=seeds)
def test_denoising_leaves_no_trace(code, sizes, B, committed, steps, recorded, seed):
    model, dice = a_model(code, sizes, seed)
    chunk = model.config.chunk
    cache = model.make_cache(B)
    with torch.no_grad():
        for _ in range(committed):
            x, _, caption = a_clip(model, dice, B, chunk)
            model.commit(x, caption, cache)
    assert cache.seen == committed * chunk, "commit must count its frames"
    before = copies(cache)
    with torch.set_grad_enabled(recorded):
        for _ in range(steps):
            x, sigma, caption = a_clip(model, dice, B, chunk)
            model.denoise(x, sigma, caption, cache)
    assert cache.seen == committed * chunk, "denoising committed: only `commit` may"
    assert all(map(same_bits, before, cache.buffers)), "denoising changed the cache"


@forall(sizes=configs(), turns=many_turns, seed=seeds)
@torch.no_grad()
def test_a_video_of_any_age_goes_on_like_a_young_one(code, sizes, turns, seed):
    """Beyond the horizon nothing depends on how far beyond, not in one bit."""
    model, dice = a_model(code, sizes, seed)
    c = model.config
    young = model.make_cache(1)
    while young.seen < c.frames:
        x, _, caption = a_clip(model, dice, 1, c.chunk)
        model.commit(x, caption, young)
    old = older(young, turns)
    for _ in range(3):
        x, sigma, caption = a_clip(model, dice, 1, c.chunk)
        of_old = model.denoise(x, sigma, caption, old)
        of_young = model.denoise(x, sigma, caption, young)
        assert torch.equal(of_old, of_young), \
            f"after {old.seen} frames a chunk is another than after {young.seen}"
        model.commit(x, caption, old)
        model.commit(x, caption, young)


@forall(sizes=configs(sink=0), turns=st.integers(1, 10_000), seed=seeds)
@torch.no_grad()
def test_without_a_horizon_only_distances_in_time_count(code, sizes, turns, seed):
    """A horizon that never comes: positions are absolute and grow for ever, and by (R3) an old
    video still goes on like a young one."""
    model, dice = a_model(code, sizes, seed)
    c = model.config
    young = code.cache.RollingCache(
        c.layers, 1, model.blocks[0].attention.widths, tokens=c.tokens, chunk=c.chunk,
        window=c.window, sink=0, horizon=2**62, dtype=torch.float64)
    while young.seen < c.frames:
        x, _, caption = a_clip(model, dice, 1, c.chunk)
        model.commit(x, caption, young)
    old = older(young, turns)
    x, sigma, caption = a_clip(model, dice, 1, c.chunk)
    of_old = model.denoise(x, sigma, caption, old)
    of_young = model.denoise(x, sigma, caption, young)
    # At position 10^5 an angle is known to 10^5 * 1.1e-16, and a few layers make more of it.
    assert_same(of_old, of_young, 1e-8,
                f"after {old.seen} frames the distances to the past are others")


@forall(sizes=configs(min_chunks=2, attention=("mla",), layers=1), seed=seeds)
@torch.no_grad()
def test_the_order_of_frames_in_the_ring_means_nothing(code, sizes, seed):
    """Frames, rows and positions shuffled together: attention is a sum over keys."""
    sizes["window"] = sizes["frames"]
    model, dice = a_model(code, sizes, seed)
    c = model.config
    cache = model.make_cache(1)
    x, sigma, caption = a_clip(model, dice, 1, c.chunk)
    for _ in range(c.frames // c.chunk):
        model.commit(a_clip(model, dice, 1, c.chunk)[0], caption, cache)
    before = model.denoise(x, sigma, caption, cache)

    past, own = cache.positions()
    order = torch.randperm(len(past), generator=dice.generator)
    shuffled = []
    for buffer in cache.buffers:
        frames = buffer.unflatten(2, (-1, c.tokens))       # [layers, B, frames, P, width]
        shuffled.append(frames[:, :, order].flatten(2, 3))
    cache.buffers = tuple(shuffled)
    cache.positions = lambda: (past[order], own)
    assert_same(model.denoise(x, sigma, caption, cache), before, EXACT,
                f"frames in the order {order.tolist()} gave another answer")


@forall(s=sizes(), seed=seeds)
def test_a_masked_key_never_reaches_an_output(code, s, seed):
    s = replace(s, T=s.T + 1)
    tensors, _, tables, scale, may = inputs(code, s, "random")
    may[:, 0] = True                                       # everyone sees key 0,
    may[:, -1] = False                                     # nobody the last
    poisoned = {name: x.clone() for name, x in tensors.items()}
    poisoned["c_kv"][:, -1] = 1e30
    poisoned["k_rope"][:, -1] = -1e30
    for name in CPU_ROUTES:
        before = run(code, name, tensors, tables, scale, may)
        after = run(code, name, poisoned, tables, scale, may)
        assert torch.equal(after, before), \
            f"{name}: a key that nobody may see changed the answer"


# ---- gradients ------------------------------------------------------------------------------


def denoise_and_commit(model, dice, chunks: int, detach: bool):
    """Noises and answers of so many chunks, each committed as it is."""
    cache = model.make_cache(1)
    noises = []
    answers = []
    for _ in range(chunks):
        x, sigma, caption = a_clip(model, dice, 1, model.config.chunk)
        noises.append(x.requires_grad_())
        answers.append(model.denoise(x, sigma, caption, cache))
        model.commit(answers[-1], caption, cache, detach=detach)
    return noises, answers


def squares(x):
    return x.square().sum()


@forall(sizes=configs(min_chunks=3), chunks=st.integers(2, 5), seed=seeds)
def test_no_gradient_passes_through_the_cache(code, sizes, chunks, seed):
    """Released code leaks it through the write of a denoising step; here it is exactly zero,
    unless asked for with detach=False. And a backward pass through all chunks works after every
    commit: nothing that it needs was overwritten."""
    sizes |= {"window": sizes["frames"], "sink": 0}
    for detach in (True, False):
        model, dice = a_model(code, sizes, seed)
        noises, answers = denoise_and_commit(model, dice, chunks, detach)
        gradients = torch.autograd.grad(squares(answers[-1]), noises, retain_graph=True,
                                        allow_unused=True)
        assert gradients[-1].any(), "a chunk depends on its own noise"
        first = gradients[0]
        if detach:
            assert_zero(first, "the loss of the last chunk reached the noise of the first "
                               "through the cache")
        elif chunks <= model.config.frames // model.config.chunk:
            assert first is not None and first.any(), \
                "detach=False is the true context gradient: it must not be cut"
        sum(map(squares, answers)).backward()
        assert all(noise.grad.isfinite().all() for noise in noises)


# ---- sizes ----------------------------------------------------------------------------------


def cache_on_meta(code, attention: str):
    """The cache of one layer at the paper's size, on the device where tensors have a size and
    no memory."""
    config = replace(code.mla_video.PRESETS["wan1.3b"], attention=attention, layers=1)
    with torch.device("meta"):
        model = code.mla_video.VideoDiT(config)
    return model.make_cache(1, dtype=torch.bfloat16)


def test_the_paper_saves_93_percent_of_the_bytes(code):
    """Read from buffers, not from a formula. 224 numbers for 3,072."""
    mla = cache_on_meta(code, "mla")
    dense = cache_on_meta(code, "dense")
    assert (mla.bytes_per_token, dense.bytes_per_token) == (2 * 224, 2 * 3072)
    saved = 1 - mla.nbytes / dense.nbytes
    assert round(100 * saved, 1) == 92.7
    assert dense.nbytes == (21 - 3) * 1560 * 6144, \
        "the window includes the chunk being made: 18 frames are kept"


def test_impossible_windows_are_refused_in_words(code):
    make = functools.partial(code.cache.RollingCache, 1, 1, WIDTHS, tokens=2, chunk=3)
    too_small = "cannot hold 2 sink frames and a chunk of 3: it must be at least 5"
    with pytest.raises(ValueError, match=too_small):
        make(window=4, sink=2, horizon=12)
    with pytest.raises(ValueError, match="must be at least the window"):
        make(window=6, sink=0, horizon=5)
    assert make(window=5, sink=2, horizon=5).capacity == 2, \
        "the smallest window that fits is allowed: sink only, no ring"
    cache = make(window=6, sink=0, horizon=6)
    four_rows = tuple(torch.zeros(1, 4, width) for width in WIDTHS)
    with pytest.raises(ValueError, match="whole chunks: 3 frames of 2 tokens"):
        cache.commit([four_rows])
    for buffer in cache.buffers:
        buffer.zero_()
    wide_part = tuple(torch.ones(1, 6, width + part) for part, width in enumerate(WIDTHS))
    with pytest.raises(ValueError, match="of all 1 layers"):
        cache.commit([wide_part])
    assert cache.seen == 0 and not any(buffer.any() for buffer in cache.buffers), \
        "a chunk that is refused leaves nothing, not even the part that would fit"
