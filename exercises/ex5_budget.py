"""Exercise 5: a RoPE budget per axis.

A positional key of R = 32 channels has 16 rotating pairs to spend on time, height and width.
The paper deals them out evenly, (6, 5, 5). Is that right for video? Fast motion in a small
picture might want (10, 3, 3). The cache does not care: whatever the split, it keeps R numbers.

You write the rotation for any split, each axis with the fastest bands that a full head has for
it. And you find where those bands sit in a full head, which is what an initialisation from a
dense checkpoint needs. (Then try one: put your class into `Config.make_rope` and run
`python train.py`.)

Read first: rope3d.py, all of it: (R1) to (R3), `Rope3D.table`, and why the *first* bands are
kept; `fastest_channels` in attention.py.
Hint: of `Rope3D.table` one thing changes, how many bands an axis gets. What a band *is* (which
omega) must not: it is set by the axis' share of the full head. In a full head an axis' channels
begin where the earlier axes' full shares end.

    python -m pytest exercises/ex5_budget.py        today: two lines, "exercise 5: ..."
"""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from attention import MLA, attend_absorbed, attend_reference, fastest_channels
from lab import EXACT, NARROW, Dice, assert_same, enliven, forall, seeds
from rope3d import Rope3D, axis_pairs, rotate

# ---- yours to write -------------------------------------------------------------------------


@dataclass(frozen=True)
class BudgetRope(Rope3D):
    """`Rope3D` with `pairs` = (time, height, width) chosen by hand.

    An axis with none has no position at all.
    """

    pairs: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self):
        full = axis_pairs(self.head_dim)
        channels = 2 * sum(self.pairs)
        if channels != self.channels:
            raise ValueError(f"{self.pairs} pairs are {channels} channels, not {self.channels}")
        for mine, has in zip(self.pairs, full):
            if not 0 <= mine <= has:
                raise ValueError(f"a head of {self.head_dim} has {full} pairs for (t, h, w); "
                                 f"{self.pairs} asks for what is not there")

    def table(self, coords: Tensor, dtype=torch.float32) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [L, copies * channels / 2], as `Rope3D.table`.

        Time's pairs first, then height's, then width's.
        """
        raise NotImplementedError(
            "exercise 5: `BudgetRope.table`, angles for an uneven split of the channels")


def budget_channels(pairs: tuple[int, int, int], head_dim: int) -> list[int]:
    """The channels of a full head that turn like those of BudgetRope(..., pairs=pairs).

    In that order, two for a pair.
    """
    raise NotImplementedError(
        "exercise 5: `budget_channels`, where in a full head those bands are")


# ---- the tests ------------------------------------------------------------------------------

AXES = "time", "height", "width"


@st.composite
def budgets(draw):
    """Any split of any part of a full head, none of an axis included."""
    head = draw(st.sampled_from([12, 16, 20, 32]))
    shares = [st.integers(0, has) for has in axis_pairs(head)]
    pairs = draw(st.tuples(*shares).filter(any))
    return BudgetRope(2 * sum(pairs), head, pairs=pairs)


def turned(rope, x, at):
    return rotate(x, rope.table(at, torch.float64))


def steps_along(axis: int, steps: int) -> Tensor:
    """The vector (t, y, x) of so many steps."""
    vector = torch.zeros(3, dtype=torch.long)
    vector[axis] = steps
    return vector


@forall(split=st.sampled_from(NARROW), copies=st.integers(1, 3), seed=seeds)
def test_the_even_budget_is_the_shipped_rope(split, copies, seed):
    at = Dice(seed).points(5)
    shipped = Rope3D(*split, copies=copies)
    even = BudgetRope(*split, copies=copies, pairs=axis_pairs(shipped.channels))
    for got, want in zip(even.table(at, torch.float64), shipped.table(at, torch.float64)):
        found = f"{got.dtype} {list(got.shape)}"
        expected = f"{want.dtype} {list(want.shape)}"
        assert found == expected, f"a table of {found}, expected {expected}. `copies`?"
        assert_same(got, want, EXACT,
                    f"pairs {even.pairs} are the shipped split, but the table differs")


@forall(rope=budgets(), axis=st.integers(0, 2), steps=st.integers(1, 40), seed=seeds)
def test_scores_depend_on_differences_along_each_axis(rope, axis, steps, seed):
    """(R3): moving query and key together along an axis changes no score.

    Moving the key alone does, if that axis has a budget.
    """
    dice = Dice(seed)
    q = dice.normal(1, 4, rope.channels)
    k = dice.normal(1, 4, rope.channels)
    q_at = dice.points(4)
    k_at = dice.points(4)
    move = steps_along(axis, steps)

    def score(q_at, k_at):
        return (turned(rope, q, q_at) * turned(rope, k, k_at)).sum(-1)

    still = score(q_at, k_at)
    together = score(q_at + move, k_at + move)
    alone = score(q_at, k_at + move)
    assert torch.allclose(together, still, rtol=0, atol=1e-9), (
        f"pairs {rope.pairs}: {steps} steps along {AXES[axis]} by both tokens changed their "
        "score: is an angle coordinate times omega?")
    if rope.pairs[axis]:
        assert not torch.allclose(alone, still, rtol=0, atol=1e-9), \
            f"pairs {rope.pairs}: the score does not see {AXES[axis]}"
    else:
        assert torch.equal(alone, still), \
            f"pairs {rope.pairs}: {AXES[axis]} has no budget, but the score sees it"


@forall(rope=budgets(), axis=st.integers(0, 2))
def test_a_step_along_an_axis_turns_that_axis_channels_alone(rope, axis):
    cos, sin = rope.table(steps_along(axis, 1)[None], torch.float64)
    angle = torch.atan2(sin, cos)[0]                       # [R / 2]
    pairs = sum(rope.pairs)
    assert len(angle) == pairs, f"pairs {rope.pairs} are {pairs} angles, not {len(angle)}"
    start = sum(rope.pairs[:axis])
    own = list(range(start, start + rope.pairs[axis]))
    moved = angle.nonzero().flatten().tolist()
    assert moved == own, (
        f"pairs {rope.pairs}: a step along {AXES[axis]} turned pairs {moved}, its own are "
        f"{own}")
    if own:
        assert abs(angle[start] - 1) < EXACT, (
            f"the first band of {AXES[axis]} must turn by one radian a step, not "
            f"{angle[start]:.3f}")


@forall(rope=budgets(), seed=seeds)
def test_it_turns_like_the_same_channels_of_a_full_head(rope, seed):
    """What a dense checkpoint has learned for a channel must stay true.

    It does only if the narrow key turns that channel exactly as the full head did.
    """
    at = Dice(seed).points(5)
    d = rope.head_dim
    chosen = budget_channels(rope.pairs, d)
    different = set(chosen) & set(range(d))
    assert len(chosen) == len(different) == rope.channels, (
        f"pairs {rope.pairs} of a head of {d} need {rope.channels} different channels of it, "
        f"got {chosen}")
    x = Dice(seed + 1).normal(1, 5, d)
    got = turned(rope, x[..., chosen], at)
    want = turned(Rope3D(d, d), x, at)[..., chosen]
    assert_same(got, want, EXACT,
                f"pairs {rope.pairs}: channels {chosen} turn differently in a full head of "
                f"{d}. Bands are those of the *full* share")


def test_the_even_budget_is_the_papers_choice_of_channels():
    for R, d in ((32, 128), (8, 32), (6, 12)):
        got = budget_channels(axis_pairs(R), d)
        want = fastest_channels(R, d)
        assert got == want, f"R {R}, head {d}: {got}, the shipped choice is {want}"


@forall(rope=budgets(), seed=seeds)
def test_a_layer_takes_it_and_the_cache_stays_as_it_is(rope, seed):
    layer = enliven(MLA(12, 2, C=4, Q=6, N=3, V=5, rope=rope).double(), seed)
    x = Dice(seed).normal(1, 4, 12)
    table = rope.table(Dice(seed).points(4), torch.float64)
    reference = layer(x, layer.rows(x), table, table, attend=attend_reference)
    absorbed = layer(x, layer.rows(x), table, table, attend=attend_absorbed)
    assert layer.widths == (4, rope.channels), "whatever the split, R numbers are cached"
    assert_same(absorbed, reference, EXACT, "the routes disagree on this table")
