"""Exercise 2: grouped-query attention, the rival.

Latents are not the only way to shrink a cache, and a comparison with dense attention alone flatters them. Grouped-query attention (GQA)
keeps whole keys and values but fewer of them: H query heads share G key/value heads, H / G to each; G = H is dense attention, G = 1
multi-query attention. Most open language models use it, it is simpler than MLA, and it caches 2 * G * d_h numbers per token and layer. At
the paper's geometry (d_h = 128) even G = 1, one key for all twelve heads, costs 256 numbers: more than MLA's 224, out of which every head
still gets a key of its own. You write the layer; it must be a drop-in for `Dense`, down to running inside the shipped model.

Read first: `Dense` in attention.py, all of it; equations (6) to (8) in that file's header; `RollingCache.bytes_per_token` in cache.py.
Hint: `Dense` needs four changes: the shapes of W_K and W_V, the width of norm_k, `widths`, and who reads which head in `forward`.
`repeat_interleave` gives query heads 0 .. H/G - 1 the first key head, as the contract wants; `repeat` does not. Repeat what was *read*,
never what is stored, or nothing is saved.

    python -m pytest exercises/ex2_grouped.py           today: NotImplementedError, "exercise 2: ..."
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


# ---- yours to write -------------------------------------------------------------------------------------------------


class GroupedQuery(nn.Module):
    """`Dense` with G key/value heads: query head h reads key/value head h // (H / G).

    Parameters W_Q, W_K, W_V, W_O, norms norm_q, norm_k and the attribute `rope` are named and laid out as in `Dense`, but keys and values
    are G * d_h wide; each norm is over all its heads together. `rows(x)` gives unrotated keys and values [B, L, G * d_h], `widths` says
    how wide. `forward` has the arguments of `Dense.forward` (a mask may be a tensor or Spans; `sdpa` takes both). Raises ValueError unless
    G divides H. (Replace this __init__ and add the other methods.)
    """

    def __init__(self, E: int, H: int, G: int, rope: Rope3D | None, norm: bool = True):
        raise NotImplementedError("exercise 2: `GroupedQuery`, attention whose query heads share G key/value heads")


# ---- the tests ------------------------------------------------------------------------------------------------------


@st.composite
def layers(draw):
    """Keywords of GroupedQuery, most often 1 < G < H, where the order of heads shows; and how many tokens."""
    d, (H, G) = draw(st.sampled_from([6, 8, 12])), draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2), (6, 2), (6, 3)]))
    rope = Rope3D(d, d) if draw(st.booleans()) else None
    return dict(E=H * d, H=H, G=G, rope=rope, norm=draw(st.booleans())), draw(st.integers(1, 6)), draw(st.integers(1, 9))


def ask(layer, L, T, seed):
    """The last L of T + L tokens look at all of them."""
    dice = Dice(seed)
    x, at = dice.normal(2, T + L, layer.W_O.out_features), dice.points(T + L)
    table = (None, None) if layer.rope is None else layer.rope.table(at, torch.float64)
    return layer(x[:, T:], layer.rows(x), tuple(part if part is None else part[T:] for part in table), table)


@forall(case=layers(), seed=seeds)
def test_with_a_group_for_every_head_it_is_dense_attention(case, seed):
    sizes, L, T = case
    grouped = GroupedQuery(**sizes | {"G": sizes["H"]}).double()
    dense = enliven(Dense(sizes["E"], sizes["H"], sizes["rope"], sizes["norm"]).double(), seed)
    grouped.load_state_dict(dense.state_dict())            # raises if names or shapes differ
    assert_same(ask(grouped, L, T, seed), ask(dense, L, T, seed), EXACT,
                "G = H must be dense attention. Norms, rotation, scale 1 / sqrt(d_h)?")


@forall(case=layers(), seed=seeds)
def test_it_is_dense_attention_whose_heads_agree_within_a_group(case, seed):
    """Dense attention with the same key and value weights in all heads of a group has the same answer and caches H / G times as much."""
    sizes, L, T = case
    H, G, dense = sizes["H"], sizes["G"], Dense(sizes["E"], sizes["H"], sizes["rope"], sizes["norm"]).double()
    grouped = enliven(GroupedQuery(**sizes).double(), seed)

    def for_every_head(name, weight):
        ours = name in ("W_K.weight", "W_V.weight", "norm_k.weight")
        return weight.unflatten(0, (G, -1)).repeat_interleave(H // G, 0).flatten(0, 1) if ours else weight

    dense.load_state_dict({name: for_every_head(name, weight) for name, weight in grouped.state_dict().items()})
    assert_same(ask(grouped, L, T, seed), ask(dense, L, T, seed), EXACT,
                f"{H} heads, {G} groups: does query head h read key/value head h // {H // G}? (`repeat` makes it h % {G}.) "
                "If the test before this one fails too, begin there")


def test_bytes_of_the_cache():
    """The paper's geometry in bfloat16, from buffers that exist: dense, three groupings, and MLA below them all."""
    c = PRESETS["wan1.3b"]

    def bytes_per_token(widths):
        sizes = dict(tokens=2, chunk=1, window=2, sink=0, horizon=2)
        return RollingCache(1, 1, widths, dtype=torch.bfloat16, **sizes).bytes_per_token

    with torch.device("meta"):
        groups = {G: GroupedQuery(c.dim, c.heads, G, None) for G in (12, 4, 2, 1)}
    cost = {G: bytes_per_token(layer.widths) for G, layer in groups.items()}
    assert cost == {12: 6144, 4: 2048, 2: 1024, 1: 512}, f"bytes per token and layer by groups: {cost}. 2 * G * d_h numbers of 2 bytes?"
    assert bytes_per_token((c.latent, c.rope)) == 448 < cost[1], "MLA keeps less than a single key/value head"
    for G, layer in groups.items():
        assert layer.W_K.weight.shape == layer.W_V.weight.shape == (G * 128, c.dim), "fewer heads are projected, not just fewer kept"
        rows = layer.rows(torch.empty(1, 1, c.dim, device="meta"))
        assert [row.shape[-1] for row in rows] == list(layer.widths), "rows must be as wide as `widths` says"


def test_groups_must_divide_heads():
    for H, G in ((4, 3), (2, 4)):
        with pytest.raises(ValueError):
            GroupedQuery(6 * H, H, G, None)


@forall(sizes=configs(min_chunks=2, layers=2, attention=("dense",)), seed=seeds)
def test_it_streams_in_the_shipped_model(sizes, seed):
    """In place of every self-attention: teacher forcing still equals cached streaming, from a cache that is H times smaller (G = 1)."""
    config = Config(**sizes)
    model = VideoDiT(config)
    for block in model.blocks:
        block.attention = GroupedQuery(config.dim, config.heads, 1, config.make_rope(), config.norm)
    model, dice, n = enliven(model.double(), seed), Dice(seed), config.chunk
    clean, noisy = dice.normal(2, 1, config.frames, config.channels, config.height, config.width)
    sigma, caption = dice.normal(1, config.frames).sigmoid(), dice.below(5, 1, config.slots)
    whole, cache, parts = model(clean, noisy, sigma, caption), model.make_cache(1), []
    assert cache.bytes_per_token == 2 * 8 * config.dim // config.heads, "the cache of the model must be as wide as one head"
    for now in torch.arange(config.frames).split(n):
        parts.append(model.denoise(noisy[:, now], sigma[:, now], caption, cache))
        model.commit(clean[:, now], caption, cache)
    assert_same(torch.cat(parts, dim=1), whole, EXACT, "one masked pass and cached streaming disagree: rows unrotated? mask used?")
