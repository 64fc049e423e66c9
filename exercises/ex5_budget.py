"""Exercise 5: a RoPE budget per axis.

A positional key of R = 32 channels has 16 rotating pairs to spend on time, height and width. The paper deals them out evenly, (6, 5, 5). Is
that right for video? Fast motion in a small picture might want (10, 3, 3). The cache does not care: whatever the split, it keeps R numbers.
You write the rotation for any split, each axis with the fastest bands that a full head has for it, and you find where those bands sit in
a full head, which is what an initialisation from a dense checkpoint needs. (Then try one: put your class into `Config.make_rope` and run
`python train.py`.)

Read first: rope3d.py, all of it: (R1) to (R3), `Rope3D.table`, and why the *first* bands are kept; `fastest_channels` at the end of
attention.py.
Hint: of `Rope3D.table` one thing changes, how many bands an axis gets; what a band *is* (which omega) must not: it is set by the axis'
share of the full head. In a full head an axis' channels begin where the earlier axes' full shares end.

    python -m pytest exercises/ex5_budget.py            today: NotImplementedError, "exercise 5: ..."
"""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from attention import MLA, fastest_channels
from lab import EXACT, NARROW, Dice, assert_same, enliven, forall, seeds
from rope3d import Rope3D, axis_pairs, rotate


# ---- yours to write -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BudgetRope(Rope3D):
    """`Rope3D` with `pairs` = (time, height, width) chosen by hand; an axis with none has no position at all."""

    pairs: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self):
        full = axis_pairs(self.head_dim)
        if 2 * sum(self.pairs) != self.channels:
            raise ValueError(f"{self.pairs} pairs are {2 * sum(self.pairs)} channels, not {self.channels}")
        if not all(0 <= mine <= has for mine, has in zip(self.pairs, full)):
            raise ValueError(f"a head of {self.head_dim} has {full} pairs for (t, h, w); {self.pairs} asks for what is not there")

    def table(self, coords: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [L, copies * channels / 2], as `Rope3D.table`: time's pairs first, then height's, then width's."""
        raise NotImplementedError("exercise 5: `BudgetRope.table`, angles for an uneven split of the channels")


def budget_channels(pairs: tuple[int, int, int], head_dim: int) -> list[int]:
    """The channels of a full head of `head_dim` that turn like those of BudgetRope(..., pairs=pairs), in that order, two for a pair."""
    raise NotImplementedError("exercise 5: `budget_channels`, where in a full head those bands are")


# ---- the tests ------------------------------------------------------------------------------------------------------

AXES = "time", "height", "width"


@st.composite
def budgets(draw):
    """Any split of any part of a full head, none of an axis included."""
    head = draw(st.sampled_from([12, 16, 20, 32]))
    pairs = draw(st.tuples(*(st.integers(0, has) for has in axis_pairs(head))).filter(any))
    return BudgetRope(2 * sum(pairs), head, pairs=pairs)


def turned(rope, x, at):
    return rotate(x, rope.table(at, torch.float64))


@forall(split=st.sampled_from(NARROW), copies=st.integers(1, 3), seed=seeds)
def test_the_even_budget_is_the_shipped_rope(split, copies, seed):
    at, even = Dice(seed).points(5), BudgetRope(*split, copies=copies, pairs=axis_pairs(split[0]))
    for got, want in zip(even.table(at, torch.float64), Rope3D(*split, copies=copies).table(at, torch.float64)):
        assert got.dtype == want.dtype and got.shape == want.shape, \
            f"a table of {got.dtype} {list(got.shape)}, expected {want.dtype} {list(want.shape)}. `copies`?"
        assert_same(got, want, EXACT, f"pairs {even.pairs} are the shipped split, but the table differs")


@forall(rope=budgets(), axis=st.integers(0, 2), steps=st.integers(1, 40), seed=seeds)
def test_scores_depend_on_differences_along_each_axis(rope, axis, steps, seed):
    """(R3): moving query and key together along an axis changes no score; moving the key alone does, if that axis has a budget."""
    dice = Dice(seed)
    q, k, p, s = dice.normal(1, 4, rope.channels), dice.normal(1, 4, rope.channels), dice.points(4), dice.points(4)
    move = torch.zeros(3, dtype=torch.long).index_fill(0, torch.tensor([axis]), steps)
    score = (turned(rope, q, p) * turned(rope, k, s)).sum(-1)
    together = (turned(rope, q, p + move) * turned(rope, k, s + move)).sum(-1)
    alone = (turned(rope, q, p) * turned(rope, k, s + move)).sum(-1)
    assert torch.allclose(together, score, rtol=0, atol=1e-9), \
        f"pairs {rope.pairs}: {steps} steps along {AXES[axis]} by both tokens changed their score: is an angle coordinate times omega?"
    if rope.pairs[axis]:
        assert not torch.allclose(alone, score, rtol=0, atol=1e-9), f"pairs {rope.pairs}: the score does not see {AXES[axis]}"
    else:
        assert torch.equal(alone, score), f"pairs {rope.pairs}: {AXES[axis]} has no budget, but the score sees it"


@forall(rope=budgets(), axis=st.integers(0, 2))
def test_a_step_along_an_axis_turns_that_axis_channels_alone(rope, axis):
    step = torch.zeros(1, 3, dtype=torch.long).index_fill(1, torch.tensor([axis]), 1)
    cos, sin = rope.table(step, torch.float64)
    angle = torch.atan2(sin, cos)[0]
    assert len(angle) == sum(rope.pairs), f"pairs {rope.pairs} are {sum(rope.pairs)} angles, not {len(angle)}"
    start = sum(rope.pairs[:axis])
    mine = set(range(start, start + rope.pairs[axis]))
    moved = set(angle.nonzero().flatten().tolist())
    assert moved == mine, f"pairs {rope.pairs}: a step along {AXES[axis]} turned pairs {sorted(moved)}, its own are {sorted(mine)}"
    if mine:
        assert abs(angle[start] - 1) < EXACT, f"the first band of {AXES[axis]} must turn by one radian a step, not {angle[start]:.3f}"


@forall(rope=budgets(), seed=seeds)
def test_it_turns_like_the_same_channels_of_a_full_head(rope, seed):
    """What a dense checkpoint has learned for a channel stays true only if the narrow key turns it exactly as the full head did."""
    at, d, chosen = Dice(seed).points(5), rope.head_dim, budget_channels(rope.pairs, rope.head_dim)
    assert sorted(set(chosen)) == sorted(chosen) and all(0 <= i < d for i in chosen) and len(chosen) == rope.channels, \
        f"pairs {rope.pairs} of a head of {d} need {rope.channels} different channels of it, got {chosen}"
    x = Dice(seed + 1).normal(1, 5, d)
    assert_same(turned(rope, x[..., chosen], at), turned(Rope3D(d, d), x, at)[..., chosen], EXACT,
                f"pairs {rope.pairs}: channels {chosen} turn differently in a full head of {d}. Bands are those of the *full* share")


def test_the_even_budget_is_the_papers_choice_of_channels():
    for R, d in ((32, 128), (8, 32), (6, 12)):
        got, want = budget_channels(axis_pairs(R), d), fastest_channels(R, d)
        assert got == want, f"R {R}, head {d}: {got}, the shipped choice is {want}"


@forall(rope=budgets(), seed=seeds)
def test_a_layer_takes_it_and_the_cache_stays_as_it_is(rope, seed):
    layer = enliven(MLA(12, 2, C=4, Q=6, N=3, V=5, rope=rope).double(), seed)
    x, table = Dice(seed).normal(1, 4, 12), rope.table(Dice(seed).points(4), torch.float64)
    answers = [layer(x, layer.rows(x), table, table, None, route) for route in ("reference", "absorbed")]
    assert layer.widths == (4, rope.channels), "whatever the split, R numbers are cached"
    assert_same(*answers, EXACT, "the routes disagree on this table")
