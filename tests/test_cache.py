"""The rolling cache is a plain Python list of frames, kept in buffers that never grow.

Proved here: any sequence of commit, peek and reset gives the rows, frames and positions that a list gives (a stateful machine against
oracles.ListCache); sinks stay, the oldest frame goes first, bytes and memory addresses never change; peeking changes not one bit; slots
that are not in use never reach an answer, be they NaN; the order of slots means nothing; committing while gradients are recorded leaves
earlier reads intact and lets no gradient through.

Two kinds of poison: what is *sliced* away may be NaN. What is *masked* away may only be huge, because 0 * NaN is NaN: a masked product with
NaN in it would fail although it is correct (test_a_masked_key_never_reaches_an_output).
"""

import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from lab import CPU_ROUTES, EXACT, Dice, Sizes, assert_same, assert_zero, configs, enliven, forall, seeds, sizes
from oracles import ListCache
from test_routes import inputs, run

WIDTHS = (3, 2)                                            # C and R of the caches below


def same_bits(a, b) -> bool:
    """Equality that NaN passes."""
    return torch.equal(a.view(torch.int64), b.view(torch.int64))


class CacheMachine(RuleBasedStateMachine):
    """RollingCache against a list. `code` is the first argument so that test_mutants.py can run it on a broken cache."""

    def __init__(self, code):
        super().__init__()
        self.code = code

    @initialize(layers=st.integers(1, 2), batch=st.integers(1, 2), tokens=st.integers(1, 3), chunk=st.integers(1, 3),
                sink=st.integers(0, 3), ring=st.integers(0, 4),
                spare=st.integers(0, 4), poison=st.sampled_from([float("nan"), 1e30]), seed=seeds)
    def build(self, layers, batch, tokens, chunk, sink, ring, spare, poison, seed):
        window = sink + ring + chunk
        sizes = dict(tokens=tokens, chunk=chunk, window=window, sink=sink, horizon=window + spare)
        self.layers, self.batch, self.dice, self.ring = layers, batch, Dice(seed), ring
        self.cache = self.code.cache.RollingCache(layers, batch, WIDTHS, dtype=torch.float64, **sizes)
        self.list, self.empty = ListCache(**sizes), functools.partial(ListCache, **sizes)
        for buffer in self.cache.buffers:
            buffer.fill_(poison)                           # uninitialised memory may hold anything
        self.home = [buffer.data_ptr() for buffer in self.cache.buffers]
        self.nbytes = layers * batch * (window - chunk) * tokens * sum(WIDTHS) * 8

    def rows(self):
        n = self.list.chunk * self.list.tokens
        return [tuple(self.dice.normal(self.batch, n, width) for width in WIDTHS) for _ in range(self.layers)]

    @rule()
    def commit(self):
        rows = self.rows()
        with torch.no_grad():
            self.cache.commit(rows)
        self.list.commit(rows)

    @rule()
    def commit_while_gradients_are_recorded(self):
        rows, before = [tuple(part.requires_grad_() for part in layer) for layer in self.rows()], self.cache.buffers
        copies = [buffer.clone() for buffer in before]
        self.cache.commit(rows)
        self.list.commit(rows)
        assert all(same_bits(a, b) for a, b in zip(before, copies)), "commit wrote into buffers that earlier reads wait for"
        assert not any(buffer.requires_grad for buffer in self.cache.buffers), \
            "what is committed must be detached: the cache-gradient leak"
        self.home = [buffer.data_ptr() for buffer in self.cache.buffers]

    @precondition(lambda self: len(self.list.past) > 0)
    @rule()
    def reset(self):
        self.cache.reset()
        self.list = self.empty()

    @rule(layer=st.integers(0, 1))
    def peek(self, layer):
        layer, rows = layer % self.layers, self.rows()[0]
        before = [buffer.clone() for buffer in self.cache.buffers]
        got, want, P = self.cache.peek(layer, rows), self.list.peek(layer, rows), self.list.tokens
        for a, b in zip(before, self.cache.buffers):
            assert same_bits(a, b), "peek changed a bit of the cache"
        kept, frames = self.list.kept(), self.cache.frames().tolist()
        assert [part.shape for part in got] == [part.shape for part in want], \
            "peek must give the filled slots and the chunk, nothing else"
        for part, expected in zip(got, want):
            by_frame = dict(zip(frames, part.split(P, dim=1)))             # slots may be in any order: find each frame by its label
            own = (len(kept) * P, part.shape[1])
            assert torch.equal(torch.cat([by_frame[f] for f in kept] + [part[:, slice(*own)]], 1), expected), \
                f"frames {frames} of the ring do not hold what was committed for them"

    @invariant()
    def frames_are_those_of_the_list(self):
        if hasattr(self, "list"):
            frames, kept = self.cache.frames().tolist(), self.list.kept()
            assert sorted(frames) == kept, \
                f"kept frames {sorted(frames)}, a list keeps {kept}: sink evicted, or the wrong end of the window?"
            assert self.cache.filled == len(kept), "`filled` counts slots in use"

    @invariant()
    def positions_are_those_of_the_list(self):
        if hasattr(self, "list"):
            past, own = self.cache.positions()
            by_frame = dict(zip(self.cache.frames().tolist(), past.tolist()))
            want, mine = self.list.times()
            assert [by_frame[f] for f in self.list.kept()] == want, f"past frames stand at {by_frame}, should at {want}"
            assert own.tolist() == mine, f"the chunk being made stands at {own.tolist()}, should at {mine}"
            assert max(own.tolist() + want) < self.list.horizon and min(own.tolist() + want) >= 0, \
                "a position left the trained range"

    @invariant()
    def memory_is_constant(self):
        if hasattr(self, "list"):
            assert self.cache.nbytes == self.nbytes, "bytes must not depend on how much was committed"
            assert self.cache.bytes_per_token == sum(WIDTHS) * 8
            assert [buffer.data_ptr() for buffer in self.cache.buffers] == self.home, \
                "a ring moves nothing: buffers must stay where they are"


def test_the_cache_is_a_list_of_frames(code):
    run_state_machine_as_test(functools.partial(CacheMachine, code), settings=settings(stateful_step_count=25))


def hunt(code):
    """The same for a mutant: the first counterexample will do."""
    run_state_machine_as_test(functools.partial(CacheMachine, code),
                              settings=settings(stateful_step_count=25, phases=[Phase.generate], report_multiple_bugs=False))


test_the_cache_is_a_list_of_frames.hunt = hunt


# ---- in the model ---------------------------------------------------------------------------------------------------


def a_model(code, sizes, seed):
    model = enliven(code.mla_video.VideoDiT(code.mla_video.Config(**sizes)).double(), seed)
    return model, Dice(seed + 1)


def a_clip(model, dice, B, frames):
    c = model.config
    return (dice.normal(B, frames, c.channels, c.height, c.width), torch.rand(B, frames, generator=dice.generator, dtype=torch.float64),
            dice.below(c.words, B, c.slots))


@forall(sizes=configs(), B=st.integers(1, 2), chunks=st.integers(1, 8), seed=seeds)
def test_streaming_with_the_ring_is_streaming_with_a_list(code, sizes, B, chunks, seed):
    """Far beyond the horizon, for both kinds of attention: the same model on a list that keeps everything and picks what may be seen."""
    model, dice = a_model(code, sizes, seed)
    c = model.config
    ring = model.make_cache(B)
    plain = ListCache(tokens=c.tokens, chunk=c.chunk, window=c.window, sink=c.sink, horizon=c.frames)
    for buffer in ring.buffers:
        buffer.fill_(float("nan"))                         # unused slots are sliced away: one NaN read would be everywhere
    with torch.no_grad():
        for _ in range(chunks):
            x, sigma, caption = a_clip(model, dice, B, c.chunk)
            assert_same(model.denoise(x, sigma, caption, ring), model.denoise(x, sigma, caption, plain), EXACT,
                        f"chunk {len(plain.past) // c.chunk}: the ring and the list disagree")
            model.commit(x, caption, ring)
            model.commit(x, caption, plain)


@forall(sizes=configs(), B=st.integers(1, 2), committed=st.integers(0, 4), steps=st.integers(1, 3), recorded=st.booleans(), seed=seeds)
def test_denoising_leaves_no_trace(code, sizes, B, committed, steps, recorded, seed):
    model, dice = a_model(code, sizes, seed)
    cache = model.make_cache(B)
    with torch.no_grad():
        for _ in range(committed):
            x, _, caption = a_clip(model, dice, B, model.config.chunk)
            model.commit(x, caption, cache)
    seen, before = cache.seen, [buffer.clone() for buffer in cache.buffers]
    assert seen == committed * model.config.chunk, "commit must count its frames"
    with torch.set_grad_enabled(recorded):
        for _ in range(steps):
            model.denoise(*a_clip(model, dice, B, model.config.chunk), cache)
    assert cache.seen == seen, "denoising committed: only `commit` may"
    assert all(same_bits(a, b) for a, b in zip(before, cache.buffers)), "denoising changed the cache"


@forall(sizes=configs(min_chunks=2, attention=("mla",), layers=1), seed=seeds)
def test_the_order_of_slots_means_nothing(code, sizes, seed):
    """Frames, rows and positions shuffled together: attention is a sum over keys."""
    model, dice = a_model(code, sizes | {"window": sizes["frames"]}, seed)
    c, cache = model.config, model.make_cache(1)
    x, sigma, caption = a_clip(model, dice, 1, c.chunk)
    with torch.no_grad():
        for _ in range(sizes["frames"] // c.chunk):
            model.commit(a_clip(model, dice, 1, c.chunk)[0], caption, cache)
        before, (past, own) = model.denoise(x, sigma, caption, cache), cache.positions()
        order = torch.randperm(len(past), generator=dice.generator)
        cache.buffers = tuple(buffer.unflatten(2, (-1, c.tokens))[:, :, order].flatten(2, 3) for buffer in cache.buffers)
        cache.positions = lambda: (past[order], own)
        assert_same(model.denoise(x, sigma, caption, cache), before, EXACT,
                    f"slots in the order {order.tolist()} gave another answer")


@forall(s=sizes(), seed=seeds)
def test_a_masked_key_never_reaches_an_output(code, s, seed):
    s = Sizes(**{**vars(s), "T": s.T + 1})
    tensors, _, tables, scale, may = inputs(code, s, "random")
    may = may | (torch.arange(s.T) == 0)                   # everyone sees key 0,
    may[:, -1] = False                                     # nobody the last
    for route in CPU_ROUTES:
        before = run(code, route, tensors, tables, scale, may)
        poisoned = {name: x.clone() for name, x in tensors.items()}
        poisoned["c_kv"][:, -1], poisoned["k_rope"][:, -1] = 1e30, -1e30
        assert torch.equal(run(code, route, poisoned, tables, scale, may), before), \
            f"{route}: a key that nobody may see changed the answer"


# ---- gradients ------------------------------------------------------------------------------------------------------


@forall(sizes=configs(min_chunks=3), chunks=st.integers(2, 5), seed=seeds)
def test_no_gradient_passes_through_the_cache(code, sizes, chunks, seed):
    """Released code leaks it through the write of a denoising step; here it is exactly zero, unless asked for with detach=False. And a
    backward pass through all chunks works after every commit: nothing that it needs was overwritten."""
    sizes |= {"window": sizes["frames"], "sink": 0}
    for detach in (True, False):
        model, dice = a_model(code, sizes, seed)
        c, cache, noises, outputs = model.config, model.make_cache(1), [], []
        for _ in range(chunks):
            x, sigma, caption = a_clip(model, dice, 1, c.chunk)
            noises.append(x.requires_grad_())
            outputs.append(model.denoise(x, sigma, caption, cache))
            model.commit(outputs[-1], caption, cache, detach=detach)
        first, *_, last = torch.autograd.grad(outputs[-1].square().sum(), noises, retain_graph=True, allow_unused=True)
        assert last.any(), "a chunk depends on its own noise"
        if detach:
            assert_zero(first, "the loss of the last chunk reached the noise of the first through the cache")
        elif chunks <= c.frames // c.chunk:
            assert first is not None and first.any(), "detach=False is the true context gradient: it must not be cut"
        sum(o.square().sum() for o in outputs).backward()
        assert all(noise.grad.isfinite().all() for noise in noises)


# ---- sizes ----------------------------------------------------------------------------------------------------------


def test_the_paper_saves_93_percent_of_the_bytes(code):
    """Read from buffers (on the meta device: they have a size and no memory), not from a formula. 224 numbers for 3,072."""
    wan = code.mla_video.PRESETS["wan1.3b"]
    with torch.device("meta"):
        mla, dense = (code.mla_video.VideoDiT(replace(wan, attention=kind, layers=1)) for kind in ("mla", "dense"))
    mla, dense = (model.make_cache(1, dtype=torch.bfloat16) for model in (mla, dense))
    assert (mla.bytes_per_token, dense.bytes_per_token) == (2 * 224, 2 * 3072)
    assert round(100 * (1 - mla.nbytes / dense.nbytes), 1) == 92.7
    assert dense.nbytes == (21 - 3) * 1560 * 6144, "the window includes the chunk being made: 18 frames are kept"


def test_impossible_windows_are_refused_in_words(code):
    make = functools.partial(code.cache.RollingCache, 1, 1, WIDTHS, tokens=2, chunk=3)
    with pytest.raises(ValueError, match="cannot hold 2 sink frames and a chunk of 3: it must be at least 5"):
        make(window=4, sink=2, horizon=12)
    with pytest.raises(ValueError, match="must be at least the window"):
        make(window=6, sink=0, horizon=5)
    assert make(window=5, sink=2, horizon=5).slots == 2, "the smallest window that fits is allowed: sink only, no ring"
    cache = make(window=6, sink=0, horizon=6)
    with pytest.raises(ValueError, match="whole chunks: 3 frames of 2 tokens"):
        cache.commit([tuple(torch.zeros(1, 4, width) for width in WIDTHS)])
