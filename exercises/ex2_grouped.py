"""Exercise 2: grouped-query attention, the rival.

Latents are not the only way to shrink a cache, and a comparison with dense attention alone
flatters them. Grouped-query attention (GQA) keeps whole keys and values but fewer of them: H
query heads share G key/value heads, H / G to each. G = H is dense attention, G = 1 multi-query
attention. Most open language models use it. It is simpler than MLA, and it caches 2 * G * d_h
numbers per token and layer. At the paper's geometry (d_h = 128) even G = 1, one key for all
twelve heads, costs 256 numbers: more than MLA's 224, out of which every head still gets a key
of its own. You write the layer. It must be a drop-in for `Dense`, down to running inside the
shipped model.

Read first: `Dense` in attention.py, all of it; equations (6) to (8) in that file's header;
`RollingCache.bytes_per_token` in cache.py.
Hint: `Dense` needs four changes: the shapes of W_K and W_V, the width of norm_k, `widths`, and
who reads which head in `forward`. `repeat_interleave` gives query heads 0 .. H/G - 1 the first
key head, as the contract wants; `repeat` does not. Repeat what was *read*, never what is
stored, or nothing is saved.

    python -m pytest exercises/ex2_grouped.py       today: one line, "exercise 2: ..."
"""

import pytest
import torch
from hypothesis import strategies as st
from torch import nn

from attention import Dense, linear, sdpa  # noqa: F401  (yours to use)
from cache import RollingCache
from lab import EXACT, Dice, assert_same, configs, enliven, forall, seeds
from mla_video import PRESETS, Config, VideoDiT
from rope3d import Rope3D, rotate  # noqa: F401

# ---- yours to write -------------------------------------------------------------------------


class GroupedQuery(nn.Module):
    """`Dense` with G key/value heads: query head h reads key/value head h // (H / G).

    Parameters W_Q, W_K, W_V, W_O, norms norm_q, norm_k and the attribute `rope` are named and
    laid out as in `Dense`, but keys and values are G * d_h wide. Each norm is over all its
    heads together. `rows(x)` gives unrotated keys and values [B, L, G * d_h], `widths` says how
    wide. `forward` has the arguments of `Dense.forward`, of which `attend` decides nothing
    here either. Raises ValueError unless G divides H.
    (Replace this __init__ and add the other methods.)
    """

    def __init__(self, E: int, H: int, G: int, rope: Rope3D | None, norm: bool = True):
        raise NotImplementedError(
            "exercise 2: `GroupedQuery`, attention whose query heads share G key/value heads")


# ---- the tests ------------------------------------------------------------------------------

HEADS_AND_GROUPS = [(1, 1), (2, 1), (2, 2), (4, 2), (6, 2), (6, 3)]


@st.composite
def layers(draw):
    """Keywords of GroupedQuery, most often 1 < G < H, where the order of heads shows."""
    d = draw(st.sampled_from([6, 8, 12]))
    H, G = draw(st.sampled_from(HEADS_AND_GROUPS))
    rope = draw(st.sampled_from([Rope3D(d, d), None]))
    return dict(E=H * d, H=H, G=G, rope=rope, norm=draw(st.booleans()))


TOKENS = dict(L=st.integers(1, 6), T=st.integers(1, 9))


def dense_beside(sizes):
    return Dense(sizes["E"], sizes["H"], sizes["rope"], sizes["norm"]).double()


def attend_last(layer, L, T, seed):
    """The answer [B, L, E] of the last L of T + L tokens, which look at all of them."""
    dice = Dice(seed)
    x = dice.normal(2, T + L, layer.W_O.out_features)      # [B, T + L, E]
    at = dice.points(T + L)
    if layer.rope is None:
        return layer(x[:, T:], layer.rows(x), None, None)
    q_table = layer.rope.table(at[T:], torch.float64)
    k_table = layer.rope.table(at, torch.float64)
    return layer(x[:, T:], layer.rows(x), q_table, k_table)


@forall(sizes=layers(), seed=seeds, **TOKENS)
def test_with_a_group_for_every_head_it_is_dense_attention(sizes, seed, L, T):
    grouped = GroupedQuery(**sizes | {"G": sizes["H"]}).double()
    dense = enliven(dense_beside(sizes), seed)
    grouped.load_state_dict(dense.state_dict())            # raises if names or shapes differ
    got = attend_last(grouped, L, T, seed)
    want = attend_last(dense, L, T, seed)
    assert_same(got, want, EXACT,
                "G = H must be dense attention. Norms, rotation, scale 1 / sqrt(d_h)?")


@forall(sizes=layers(), seed=seeds, **TOKENS)
def test_it_is_dense_attention_whose_heads_agree_within_a_group(sizes, seed, L, T):
    """Dense attention with the same key and value weights in all heads of a group.

    It has the same answer, and caches H / G times as much.
    """
    H, G = sizes["H"], sizes["G"]
    grouped = enliven(GroupedQuery(**sizes).double(), seed)
    dense = dense_beside(sizes)
    weights = grouped.state_dict()
    for name in ("W_K.weight", "W_V.weight", "norm_k.weight"):
        if name in weights:
            groups = weights[name].unflatten(0, (G, -1))                       # [G, d_h, ...]
            weights[name] = groups.repeat_interleave(H // G, 0).flatten(0, 1)  # [H * d_h, ...]
    dense.load_state_dict(weights)
    got = attend_last(grouped, L, T, seed)
    want = attend_last(dense, L, T, seed)
    assert_same(got, want, EXACT,
                f"{H} heads, {G} groups: does query head h read key/value head h // {H // G}? "
                f"(`repeat` makes it h % {G}.) If the test before this one fails too, begin "
                "there")


def bytes_per_token(widths):
    """Of a cache in bfloat16, from buffers that exist."""
    return RollingCache(1, 1, widths, tokens=2, chunk=1, window=2, sink=0, horizon=2,
                        dtype=torch.bfloat16).bytes_per_token


def test_bytes_of_the_cache():
    """The paper's geometry: dense, three groupings, and MLA below them all."""
    c = PRESETS["wan1.3b"]
    x = torch.empty(1, 1, c.dim, device="meta")
    cost = {}
    for G in (12, 4, 2, 1):
        with torch.device("meta"):
            layer = GroupedQuery(c.dim, c.heads, G, None)
        cost[G] = bytes_per_token(layer.widths)
        for W in (layer.W_K, layer.W_V):
            assert W.weight.shape == (G * 128, c.dim), \
                "fewer heads are projected, not just fewer kept"
        widths = [row.shape[-1] for row in layer.rows(x)]
        assert widths == list(layer.widths), "rows must be as wide as `widths` says"
    assert cost == {12: 6144, 4: 2048, 2: 1024, 1: 512}, \
        f"bytes per token and layer by groups: {cost}. 2 * G * d_h numbers of 2 bytes?"
    mla = bytes_per_token((c.latent, c.rope))
    assert mla == 448 < cost[1], "MLA keeps less than a single key/value head"


def test_groups_must_divide_heads():
    for H, G in ((4, 3), (2, 4)):
        with pytest.raises(ValueError):
            GroupedQuery(6 * H, H, G, None)


@forall(sizes=configs(min_chunks=2, layers=2, attention=("dense",)), seed=seeds)
def test_it_streams_in_the_shipped_model(sizes, seed):
    """In place of every self-attention: teacher forcing still equals cached streaming.

    From a cache that is H times smaller (G = 1).
    """
    c = Config(**sizes)
    model = VideoDiT(c)
    for block in model.blocks:
        block.attention = GroupedQuery(c.dim, c.heads, 1, c.make_rope(), c.norm)
    model = enliven(model.double(), seed)

    dice = Dice(seed)
    clean, noisy = dice.normal(2, 1, c.frames, c.channels, c.height, c.width)
    sigma = dice.normal(1, c.frames).sigmoid()
    caption = dice.below(5, 1, c.slots)
    whole = model(clean, noisy, sigma, caption)

    cache = model.make_cache(1)
    one_head = 2 * 8 * c.dim // c.heads                    # bytes of its keys and values
    assert cache.bytes_per_token == one_head, "the model's cache must be as wide as one head"
    parts = []
    for now in torch.arange(c.frames).split(c.chunk):
        parts.append(model.denoise(noisy[:, now], sigma[:, now], caption, cache))
        model.commit(clean[:, now], caption, cache)
    assert_same(torch.cat(parts, dim=1), whole, EXACT,
                "one masked pass and cached streaming disagree: rows unrotated? mask used?")
