"""Exercise 4: how many bits a key needs.

`sample.py --cache int8` keeps a byte for each number of a key and hopes for the best
(engine/quantised.py). Attention is a softmax, which is forgiving where scores are small and
merciless where they are large, so hope is not enough: how far can rounding a key move the
attention that it gets? You answer for whole numbers of any number of bits. A row is stored as
multiples of its step, max|row| / (2^(bits - 1) - 1), which is max|row| / 127 for int8. So every
number of it errs by half a step at most, and that is all that is known.

Three of your answers are promises: nothing may exceed them, and something must reach them, or
bits are wasted. One is what to expect: the errors of many numbers mostly cancel. The key that
carries position is the odd one: it is rounded first and turned later, by an angle that is not
known when it is stored. Its error is turned, too.

Read first: cache.py, its header ("What is stored has no place in time"); equations (6) and (7)
in attention.py; `rotate` in rope3d.py.
Hint: a score is a sum of products. Each product is largest when its error is, and has the sign
of its query. A turn acts on pairs of channels and keeps their length; which length has the
longest error of a pair? What is uniform between -1/2 and 1/2 has a variance of 1/12. For the
softmax think of two keys, of scores -z and z: after both have changed by delta for the worst,
how far has p moved? Then find the z for which that is most. Many keys are no worse than two.

    python -m pytest exercises/ex4_int8.py          today: five lines, "exercise 4: ..."
"""

import itertools
import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from lab import Dice, forall, seeds
from rope3d import rotate

# ---- yours to write -------------------------------------------------------------------------


def score_error(q: Tensor, step: Tensor) -> Tensor:
    """The most by which rounding can change each score q . k: [L, T].

    q [L, C] are queries, the scale of scores included; step [T] is that of each key. The key
    itself need not be known.
    """
    raise NotImplementedError("exercise 4: `score_error`, the most that rounding does to a score")


def turned_score_error(q: Tensor, step: Tensor) -> Tensor:
    """The same for q . rot k, k being turned after it was rounded, each pair of channels (2 i,
    2 i + 1) by some angle of its own: [L, T], whatever the angles.

    q [L, R], step [T].
    """
    raise NotImplementedError(
        "exercise 4: `turned_score_error`, the same for a key that is turned after rounding")


def expected_error(q: Tensor, step: Tensor) -> Tensor:
    """The standard deviation of each score's error, [L, T], if errors of numbers are
    independent and uniform within half a step. Arguments as above; turned or not is the
    same."""
    raise NotImplementedError(
        "exercise 4: `expected_error`, what rounding does to a score on average")


def moved(delta: float) -> float:
    """The largest share of attention that can go over from some keys to others, half the sum of
    |p' - p|, if no score changes by more than `delta`; whatever the scores."""
    raise NotImplementedError(
        "exercise 4: `moved`, how much attention a change of the scores can move")


def bits_needed(q: Tensor, k: Tensor, share: float) -> int:
    """The fewest bits, 2 or more, with which no query q [L, C] can have more than a `share` of
    its attention moved by rounding the keys k [T, C] (not turned)."""
    raise NotImplementedError(
        "exercise 4: `bits_needed`, the fewest bits that keep attention where it is")


# ---- the tests ------------------------------------------------------------------------------

SIZES = dict(
    L=st.integers(1, 3),
    T=st.integers(1, 4),
    seed=seeds,
)
ANGLES = 720
TRIES = 20_000


def queries_and_steps(L: int, T: int, C: int, seed: int) -> tuple[Tensor, Tensor]:
    """Queries [L, C] of any size, steps [T] of any size."""
    dice = Dice(seed)
    size = torch.exp(dice.normal(L, 1))
    q = size * dice.normal(L, C)
    step = torch.exp(2 * dice.normal(T))
    return q, step


def corners(C: int) -> Tensor:
    """All errors of C numbers in which each is half a step off, in steps: [2^C, C]."""
    signs = itertools.product((-0.5, 0.5), repeat=C)
    return torch.tensor(list(signs), dtype=torch.float64)


def turn_by(angle: Tensor):
    """What `rotate` takes, for angles [..., pairs]."""
    return angle.cos(), angle.sin()


def assert_promise(name: str, got: Tensor, worst: Tensor, slack: float) -> None:
    """`got` may not be exceeded, and must be reached up to `slack`."""
    shape = list(got.shape)
    wanted = list(worst.shape)
    assert shape == wanted, f"{name}: a number for each query and key, {wanted}, not {shape}"
    reached = worst / got
    most = reached.max().item()
    least = reached.min().item()
    assert most <= 1 + 1e-9, f"{name}: an error can be {most:.3f} times as large as you promise"
    assert least >= 1 - slack, (
        f"{name}: no error is larger than {least:.3f} of what you promise. Who promises more "
        "than can happen pays for bits")


@forall(C=st.integers(1, 7), **SIZES)
def test_no_rounding_changes_a_score_by_more_and_one_by_as_much(L, T, C, seed):
    q, step = queries_and_steps(L, T, C, seed)
    got = score_error(q, step)
    changes = q @ corners(C).T                             # [L, 2^C]
    worst = changes.amax(dim=1)
    assert_promise("score_error", got, worst[:, None] * step, 1e-9)


@forall(pairs=st.integers(1, 4), **SIZES)
def test_the_worst_turn_is_counted_and_nothing_worse(L, T, pairs, seed):
    """Every pair finds its worst corner and, of 720, its worst angle."""
    q, step = queries_and_steps(L, T, 2 * pairs, seed)
    got = turned_score_error(q, step)
    angle = torch.arange(ANGLES, dtype=torch.float64) * math.tau / ANGLES
    errors = corners(2)[:, None].expand(-1, ANGLES, -1)    # [4, ANGLES, 2]
    turned = rotate(errors, turn_by(angle[:, None]))
    turned = turned.flatten(0, 1)                          # [4 * ANGLES, 2]
    worst = torch.zeros(L, dtype=torch.float64)
    for pair in q.split(2, dim=-1):                        # [L, 2]
        changes = pair @ turned.T
        worst += changes.amax(dim=1)
    assert_promise("turned_score_error", got, worst[:, None] * step, 1e-4)


@forall(pairs=st.integers(1, 16), turned=st.booleans(), seed=seeds)
def test_errors_of_many_numbers_mostly_cancel(pairs, turned, seed):
    q, step = queries_and_steps(2, 2, 2 * pairs, seed)
    got = expected_error(q, step)
    dice = Dice(seed + 1)
    uniform = dice.uniform(TRIES, 2, 2 * pairs) - 0.5
    errors = uniform * step[:, None]                       # [TRIES, T, R]
    if turned:
        angle = 10 * dice.uniform(2, pairs)
        errors = rotate(errors, turn_by(angle))
    changes = torch.einsum("l r, n t r -> n l t", q, errors)
    seen = changes.std(dim=0)                              # [L, T]
    assert got.shape == seen.shape, "a number for each query and key"
    times = seen / got
    off = (times - 1).abs().max()
    assert off < 0.05, (
        f"over {TRIES} roundings the scores spread {times.flatten().tolist()} times as far as "
        f"you expect (turned: {turned}). Variances add, not errors")


def gone_over(before: Tensor, after: Tensor) -> float:
    """The largest share of attention that is with other keys, of rows of scores [..., T]."""
    p = before.softmax(dim=-1)
    changes = after.softmax(dim=-1) - p
    shares = changes.abs().sum(dim=-1) / 2
    return shares.max().item()


@forall(T=st.integers(1, 9), delta=st.floats(0, 8), at_the_ends=st.booleans(), seed=seeds)
def test_no_softmax_moves_further(T, delta, at_the_ends, seed):
    dice = Dice(seed)
    scores = 3 * dice.normal(500, T)
    change = 2 * dice.uniform(500, T) - 1                  # within -1 and 1
    if at_the_ends:
        change = change.sign()
    most = gone_over(scores, scores + delta * change)
    got = moved(delta)
    assert most <= got + 1e-12, (
        f"scores of {T} keys that change by {delta:.3f} at most moved {most:.4f} of the "
        f"attention; you say {got:.4f} at most")


@forall(delta=st.floats(1e-3, 8))
def test_two_keys_move_as_far(delta):
    z = torch.linspace(-10, 10, 20_001, dtype=torch.float64)
    scores = torch.stack((-z, z), dim=-1)                  # [z, 2]
    change = torch.tensor([delta, -delta], dtype=torch.float64)
    most = gone_over(scores, scores + change)
    got = moved(delta)
    assert most <= got + 1e-12, f"two keys moved {most:.6f} at {delta:.3f}, you say {got:.6f}"
    assert most >= 0.9999 * got, (
        f"at delta {delta:.3f} two keys move {most:.6f} of their attention at most; you say "
        f"{got:.6f}, which nothing reaches")


def steps_of(k: Tensor, bits: int) -> Tensor:
    """Of keys [T, C]: [T]."""
    largest = k.abs().amax(dim=-1)
    return largest / (2**(bits - 1) - 1)


def promised(q: Tensor, k: Tensor, bits: int) -> float:
    """How much of its attention a query may have moved, by the student's own count."""
    errors = score_error(q, steps_of(k, bits))
    worst = errors.max().item()
    return moved(worst)


@forall(L=st.integers(1, 3), T=st.integers(2, 5), C=st.integers(1, 32), seed=seeds,
        share=st.floats(1e-4, 0.5))
def test_so_many_bits_are_needed_and_no_more(L, T, C, seed, share):
    dice = Dice(seed)
    q = dice.normal(L, C) * C**-0.5                        # scores of about 1
    k = dice.normal(T, C)
    bits = bits_needed(q, k, share)
    may = promised(q, k, bits)
    assert may <= share, (
        f"with {bits} bits {may:.2e} of the attention can move, by your own count, and "
        f"{share:.2e} may")
    if bits > 2:
        may = promised(q, k, bits - 1)
        assert may > share, (
            f"{bits - 1} bits are enough, by your own count: {may:.2e} can move, and "
            f"{share:.2e} may")
    step = steps_of(k, bits)[:, None]
    whole = (k / step).round()
    rounded = whole * step
    most = gone_over(q @ k.T, q @ rounded.T)
    assert most <= share, f"{bits} bits moved {most:.2e}, and {share:.2e} may"
