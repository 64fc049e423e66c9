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

SIZES = dict(L=st.integers(1, 3), T=st.integers(1, 4), seed=seeds)


def queries_and_steps(L: int, T: int, C: int, seed: int) -> tuple[Tensor, Tensor]:
    """Queries of any size, keys of steps of any size."""
    dice = Dice(seed)
    q = dice.normal(L, C) * torch.exp(dice.normal(L, 1))
    return q, torch.exp(2 * dice.normal(T))


def corners(C: int) -> Tensor:
    """All errors of C numbers in which each is half a step off: [2^C, C]."""
    return torch.tensor(list(itertools.product((-0.5, 0.5), repeat=C))).double()


def assert_promise(got: Tensor, worst: Tensor, slack: float, what: str) -> None:
    """`got` may not be exceeded, and must be reached up to `slack`."""
    assert got.shape == worst.shape, \
        f"{what}: one number for each query and key, {[*worst.shape]}, not {[*got.shape]}"
    share = worst / got
    assert (share <= 1 + 1e-9).all(), \
        f"{what}: there is an error {share.max():.3f} times as large as you promise"
    assert (share >= 1 - slack).all(), (
        f"{what}: no error is larger than {share.min():.3f} of what you promise. Who promises "
        "more than can happen pays for bits")


@forall(C=st.integers(1, 7), **SIZES)
def test_no_rounding_changes_a_score_by_more_and_one_by_as_much(L, T, C, seed):
    q, step = queries_and_steps(L, T, C, seed)
    got = score_error(q, step)
    worst = (q @ corners(C).T).abs().amax(dim=1)                               # [L]
    assert_promise(got, worst[:, None] * step, 1e-9, "score_error")


@forall(pairs=st.integers(1, 4), **SIZES)
def test_the_worst_turn_is_counted_and_nothing_worse(L, T, pairs, seed):
    """Every pair finds its worst corner and, of 720, its worst angle."""
    q, step = queries_and_steps(L, T, 2 * pairs, seed)
    got = turned_score_error(q, step)
    angle = torch.arange(720).double()[:, None] * math.tau / 720               # [720, 1]
    table = angle.cos(), angle.sin()
    worst = 0
    for pair in q.unflatten(-1, (pairs, 2)).unbind(1):                         # [L, 2]
        errors = corners(2)[:, None].expand(-1, 720, -1)                       # [4, 720, 2]
        turned = rotate(errors, table)
        worst = worst + (turned.flatten(0, 1) @ pair.T).amax(dim=0)            # [L]
    assert_promise(got, worst[:, None] * step, 1e-4, "turned_score_error")
    still = score_error(q, step)
    assert (got >= still * (1 - 1e-9)).all(), "no turn at all is one of the turns"


@forall(pairs=st.integers(1, 16), seed=seeds)
def test_errors_of_many_numbers_mostly_cancel(pairs, seed):
    q, step = queries_and_steps(2, 2, 2 * pairs, seed)
    got = expected_error(q, step)
    dice = Dice(seed + 1)
    tries = 20_000
    errors = (dice.uniform(tries, 2, 2 * pairs) - 0.5) * step[:, None]         # [tries, T, R]
    angle = 10 * dice.uniform(2, pairs)
    for name, error in {"as it is": errors, "turned": rotate(errors, angle_table(angle))}.items():
        seen = torch.einsum("l r, n t r -> n l t", q, error).std(dim=0)        # [L, T]
        assert got.shape == seen.shape, f"one number for each query and key, not {[*got.shape]}"
        off = (seen / got - 1).abs().max()
        assert off < 0.05, (
            f"of {tries} roundings ({name}) the scores spread {(seen / got).flatten().tolist()} "
            "times as far as you expect. Variances add, not errors")


def angle_table(angle: Tensor) -> tuple[Tensor, Tensor]:
    return angle.cos(), angle.sin()


def gone_over(before: Tensor, after: Tensor) -> Tensor:
    """The share of attention [...] that is with other keys, for scores [..., T]."""
    return (after.softmax(-1) - before.softmax(-1)).abs().sum(-1) / 2


@forall(T=st.integers(1, 9), delta=st.floats(0, 8), seed=seeds)
def test_no_softmax_moves_further(T, delta, seed):
    dice = Dice(seed)
    scores = 3 * dice.normal(500, T)
    change = delta * (2 * dice.uniform(500, T) - 1)
    change[::2] = delta * change[::2].sign()                       # the worst are at the ends
    most = gone_over(scores, scores + change).max().item()
    assert most <= moved(delta) + 1e-12, (
        f"scores of {T} keys that change by {delta:.3f} at most moved {most:.4f} of the "
        f"attention; you say {moved(delta):.4f} at most")


@forall(delta=st.floats(1e-3, 8))
def test_two_keys_move_as_far(delta):
    z = torch.linspace(-10, 10, 20_001).double()
    scores = torch.stack((-z, z), dim=-1)                                      # [z, 2]
    change = torch.tensor([delta, -delta], dtype=torch.float64)
    most = gone_over(scores, scores + change).max().item()
    got = moved(delta)
    assert most <= got + 1e-12, f"two keys moved {most:.6f} at {delta:.3f}, you say {got:.6f}"
    assert most >= got * (1 - 1e-4), (
        f"at delta {delta:.3f} two keys move {most:.6f} of their attention at most; you say "
        f"{got:.6f}, which nothing reaches")


def steps_of(k: Tensor, bits: int) -> Tensor:
    """[T]"""
    return k.abs().amax(dim=-1) / (2**(bits - 1) - 1)


@forall(L=st.integers(1, 3), T=st.integers(2, 5), C=st.integers(1, 32), seed=seeds,
        share=st.floats(1e-4, 0.5))
def test_so_many_bits_are_needed_and_no_more(L, T, C, seed, share):
    dice = Dice(seed)
    q = dice.normal(L, C) * C**-0.5                                # scores of about 1
    k = dice.normal(T, C)
    bits = bits_needed(q, k, share)

    def promised(bits: int) -> float:
        return moved(score_error(q, steps_of(k, bits)).max().item())

    assert promised(bits) <= share, (
        f"with {bits} bits {promised(bits):.2e} of the attention can move, by your own count, "
        f"and {share:.2e} may")
    assert bits == 2 or promised(bits - 1) > share, (
        f"{bits - 1} bits are enough, by your own count: {promised(bits - 1):.2e} can move, "
        f"and {share:.2e} may")
    step = steps_of(k, bits)[:, None]
    rounded = (k / step).round() * step
    most = gone_over(q @ k.T, q @ rounded.T).max().item()
    assert most <= share, f"{bits} bits moved {most:.2e}, and {share:.2e} may"
