"""Exercise 3: merging the absorbed weights, and why it loses.

Absorption lifts the query to the latent: q' = W_UK^T (W_UQ q). Two constant matrices stand next
to each other, so why not multiply them once and for all into W_M = W_UK^T W_UQ? ("Absorb W_UK
into W_UQ" can be read that way, and the paper's Appendix E does so: its A_h is W_M of head h,
its B_h = W_O W_UV. Its D.4 rebuilds keys and values instead, and needs neither.) Because the
detour through N channels is what makes it cheap: W_M is C x Q numbers per head that hold a
matrix of rank N. The answer is the same, the work and the weights are larger. You write the
merged form and count both. The tests hold the answers equal, and your counts against torch's
own.

Read first: the header of attention.py, "Absorption is associativity and nothing else",
equations (4), (6) and (9), then `attend_absorbed`.
Hint: per head and query token a product with an [m, n] matrix is 2 m n operations, and its m n
numbers must be read. Setting both counts equal leaves an equation in N whose solution is a
product over a sum. Why is it the same N for operations and for weights?

    python -m pytest exercises/ex3_merged.py        today: three lines, "exercise 3: ..."
"""

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from attention import MLA, attend_absorbed
from lab import EXACT, Dice, Sizes, assert_same, enliven, forall, sizes
from mla_video import PRESETS
from rope3d import Rope3D


class Cost(NamedTuple):
    operations: int        # of lifting L query tokens, multiply-adds times two
    weights: int           # numbers that stand in memory and are read for it


def lift_factored(q: Tensor, W_UQ: Tensor, W_UK: Tensor) -> Tensor:
    """What the repository does, (4) then (9).

    Query latents q [B, L, Q] by W_UQ [H, N, Q] and W_UK [H, N, C] to [B, L, H, C].
    """
    q_nope = torch.einsum("b l q, h n q -> b l h n", q, W_UQ)                  # (4)
    return torch.einsum("b l h n, h n c -> b l h c", q_nope, W_UK)             # (9)


# ---- yours to write -------------------------------------------------------------------------


def merge(W_UQ: Tensor, W_UK: Tensor) -> Tensor:
    """W_M = W_UK^T W_UQ of every head: [H, N, Q] and [H, N, C] to [H, C, Q].

    Done once, when weights are loaded.
    """
    raise NotImplementedError(
        "exercise 3: `merge`, both projections of a head in one matrix")


def lift_merged(q: Tensor, W_M: Tensor) -> Tensor:
    """`lift_factored` by one product: q [B, L, Q], W_M [H, C, Q] to [B, L, H, C]."""
    raise NotImplementedError(
        "exercise 3: `lift_merged`, query latents to the content latent in one product")


def factored_cost(L: int, H: int, N: int, C: int, Q: int) -> Cost:
    """Of `lift_factored`, for one video."""
    raise NotImplementedError(
        "exercise 3: `factored_cost`, operations and weights of two small matrices")


def merged_cost(L: int, H: int, N: int, C: int, Q: int) -> Cost:
    """Of `lift_merged`, for one video. (`merge` itself is free: it happens once.)"""
    raise NotImplementedError(
        "exercise 3: `merged_cost`, operations and weights of one merged matrix")


def break_even(C: int, Q: int) -> float:
    """The N at which both cost the same. With fewer content channels a head, merging loses."""
    raise NotImplementedError(
        "exercise 3: `break_even`, the head width from which on merging pays")


# ---- the tests ------------------------------------------------------------------------------


@forall(s=sizes(), Q=st.integers(1, 12))
def test_merging_does_not_change_the_answer(s: Sizes, Q: int):
    """A whole layer: queries lifted as shipped, and once by your merged matrix."""
    dice = Dice(s.seed)
    rope = Rope3D(s.R, s.head)
    layer = enliven(MLA(8, s.H, s.C, Q, s.N, s.V, rope).double(), s.seed)
    x = dice.normal(s.B, s.L, 8)
    rows = layer.rows(dice.normal(s.B, s.T, 8))
    q_table = rope.table(dice.points(s.L), torch.float64)
    k_table = rope.table(dice.points(s.T), torch.float64)

    def by_head(W):
        return W.weight.unflatten(0, (s.H, -1))

    W_UQ = by_head(layer.W_UQ)                                                 # [H, N, Q]
    W_UK = by_head(layer.W_UK)                                                 # [H, N, C]
    W_M = merge(W_UQ, W_UK)
    assert W_M.shape == (s.H, s.C, Q), \
        f"W_M must be [H, C, Q] = {[s.H, s.C, Q]}, not {list(W_M.shape)}"
    q = layer.norm_q(layer.W_DQ(x))                                            # [B, L, Q]
    lifted = lift_merged(q, W_M)                                               # [B, L, H, C]
    assert_same(lifted, lift_factored(q, W_UQ, W_UK), EXACT,
                "lifted queries differ: (A B) x = A (B x), head by head, W_UK^T on the left")

    # Queries that are lifted already go through attend_absorbed with an identity for W_UK.
    q_rope = torch.einsum("b l q, h r q -> b l h r", q, by_head(layer.W_QR))   # [B, L, H, R]
    identity = torch.eye(s.C).double().expand(s.H, -1, -1)                     # [H, C, C]
    o = attend_absorbed(lifted, q_rope, *rows, identity, by_head(layer.W_UV),
                        q_table, k_table, layer.scale)                         # [B, L, H, V]
    want = layer(x, rows, q_table, k_table, attend=attend_absorbed)            # [B, L, E]
    assert_same(layer.W_O(o.flatten(2)), want, EXACT, "the layer's output differs")


def counted(lift, q, *weights) -> Cost:
    with FlopCounterMode(display=False) as count:
        lift(q, *weights)
    return Cost(count.get_total_flops(), sum(W.numel() for W in weights))


@forall(s=sizes(least=2), Q=st.integers(2, 12))
def test_the_counts_are_torchs_own(s: Sizes, Q: int):
    """No size is 1: torch does not count a product over one channel."""
    q = torch.empty(1, s.L, Q, device="meta")
    W_UQ = torch.empty(s.H, s.N, Q, device="meta")
    W_UK = torch.empty(s.H, s.N, s.C, device="meta")
    W_M = merge(W_UQ, W_UK)

    got = factored_cost(s.L, s.H, s.N, s.C, Q)
    want = counted(lift_factored, q, W_UQ, W_UK)
    assert got == want, f"factored_cost says {got}, torch counted {want}"

    got = merged_cost(s.L, s.H, s.N, s.C, Q)
    want = counted(lift_merged, q, W_M)
    assert got == want, f"merged_cost says {got}, torch counted {want}"


def test_it_loses_at_the_papers_geometry():
    c = PRESETS["wan1.3b"]
    N = c.dim // c.heads - c.rope
    sizes = dict(L=c.chunk * c.tokens, H=c.heads, N=N, C=c.latent, Q=c.query_latent)
    two = factored_cost(**sizes)
    one = merged_cost(**sizes)
    times = one.operations / two.operations, one.weights / two.weights
    assert times == (1.6, 1.6), (
        f"merged takes {times} times the operations and weights of factored, should be 1.6 of "
        "both")
    assert two.weights * 2 * c.layers == 66_355_200, \
        "in bfloat16 the two small matrices of all layers are 66 MB (merged: 106 MB)"


COUNTS = dict(
    L=st.integers(1, 5000),
    H=st.integers(1, 16),
    C=st.integers(1, 512),
    Q=st.integers(1, 1536),
    N=st.integers(1, 256),
)


@forall(**COUNTS)
def test_the_break_even_is_where_the_counts_meet(L, H, C, Q, N):
    star = break_even(C, Q)
    two = factored_cost(L, H, N, C, Q)
    one = merged_cost(L, H, N, C, Q)
    if abs(N - star) > 1e-9 * star:
        pays = (one.operations < two.operations, one.weights < two.weights)
        assert pays == (N > star, N > star), (
            f"C {C}, Q {Q}: you say that merging pays above N = {star:.1f}; at N = {N} it "
            f"costs {one}, factored {two}")
    assert star < min(C, Q), (
        f"break_even({C}, {Q}) = {star:.1f}, but at N = min(C, Q) the factors are larger "
        "already: it must lie below")
