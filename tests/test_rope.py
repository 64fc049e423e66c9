"""Rotary position in three dimensions is what complex multiplication says it is, and depends on
coordinate differences only.

Proved here, for any number of channels, any grid, any integer coordinates: (R1) and (R2) equal
complex numbers in numpy; (R3) holds axis by axis; a rotation keeps lengths, composes and can be
undone; a chunk's rotation is that part of the whole video's; the narrow key turns exactly like
the fastest channels of a full head; nothing happens at the end of any table, because there is
none.
"""

import math

import pytest
import torch
from hypothesis import strategies as st

import oracles
from lab import EXACT, HEADS, NARROW, Dice, assert_same, forall, numbers, seeds

AXES = ("time", "height", "width")
counts = st.integers(1, 20)
# (R, full head); R = d is the dense baseline's
narrow = st.sampled_from(NARROW + [(d, d) for d in HEADS])


def turn(code, x, at, R, head, **more):
    """`x` rotated to the points `at` [tokens, 3]."""
    rope = code.rope3d.Rope3D(R, head, **more)
    return code.rope3d.rotate(x, rope.table(at, torch.float64))


def one_step(axis: int, length: int) -> torch.Tensor:
    """A step (t, y, x) along one axis."""
    step = torch.zeros(3, dtype=torch.long)
    step[axis] = length
    return step


@forall(shape=narrow, B=st.integers(1, 2), H=st.integers(0, 3), L=counts,
        reach=st.sampled_from([3, 100, 10**6]), seed=seeds)
def test_rotation_is_complex_multiplication(code, shape, B, H, L, reach, seed):
    R, head = shape
    dice = Dice(seed)
    # Negative coordinates too, and far beyond any precomputed table.
    at = dice.below(2 * reach, L, 3) - reach
    heads = [H] if H else []
    x = dice.normal(B, L, *heads, R)

    if H:                                                 # the oracle wants tokens next to last
        by_head = numbers(x.transpose(1, 2))
        want = oracles.rope(by_head, at.numpy(), head).swapaxes(1, 2)
    else:
        want = oracles.rope(numbers(x), at.numpy(), head)

    # At coordinate 10^6 an angle is known to 10^6 * 1.1e-16, twice over: 1e-9 is the width of
    # that, not of the arithmetic.
    tolerance = 1e-9 if reach > 100 else EXACT
    assert_same(turn(code, x, at, R, head), want, tolerance,
                "(R1) (R2): rotation differs from multiplication by exp(i angle). Pairs are "
                "neighbours (2i, 2i+1), time has the first pairs, band i of an axis is "
                "theta ** (-i / pairs of that axis in the FULL head)")


@forall(shape=narrow, L=counts, T=counts, seed=seeds)
def test_scores_depend_on_differences_only_along_each_axis(code, shape, L, T, seed):
    R, head = shape
    dice = Dice(seed)
    q = dice.normal(1, L, R)
    k = dice.normal(1, T, R)
    q_at = dice.points(L)
    k_at = dice.points(T)

    def scores(q_at, k_at):
        return turn(code, q, q_at, R, head) @ turn(code, k, k_at, R, head).mT

    before = scores(q_at, k_at)
    for axis, name in enumerate(AXES):
        step = one_step(axis, 37)
        after = scores(q_at + step, k_at + step)
        assert_same(after, before, EXACT,
                    f"(R3): moving every token along {name} must not change a score")
        change = scores(q_at + step, k_at) - before
        assert change.norm() > 1e-6 * before.norm(), \
            f"moving only the queries along {name} changed nothing: that axis is unused"


@forall(shape=narrow, L=counts, seed=seeds)
def test_a_step_along_one_axis_turns_that_axis_channels_alone(code, shape, L, seed):
    R, head = shape
    dice = Dice(seed)
    x = dice.normal(1, L, R)
    at = dice.points(L)
    before = turn(code, x, at, R, head)
    start = 0
    for axis, pairs in enumerate(oracles.axis_split(R)):
        end = start + 2 * pairs
        after = turn(code, x, at + one_step(axis, 5), R, head)
        differs = (after != before).any(1).flatten()                # [R]
        changed = differs.nonzero().flatten().tolist()
        assert changed == list(range(start, end)), \
            f"(R1): a step along {AXES[axis]} turned channels {changed}, " \
            f"not {start}..{end - 1}: are two axes swapped?"
        start = end


@forall(shape=narrow, L=counts, seed=seeds)
def test_rotation_keeps_lengths_composes_and_undoes(code, shape, L, seed):
    R, head = shape
    dice = Dice(seed)
    x = dice.normal(2, L, R)
    p = dice.points(L)
    s = dice.points(L)

    def lengths(x):
        return x.unflatten(-1, (-1, 2)).norm(dim=-1)

    once = turn(code, x, p, R, head)
    assert_same(lengths(once), lengths(x), EXACT, "(R2): every pair keeps its length")
    assert_same(turn(code, once, s, R, head), turn(code, x, p + s, R, head), EXACT,
                "(R2): turning by p, then by s, is turning by p + s")
    assert_same(turn(code, once, -p, R, head), x, EXACT,
                "(R2): turning back gives the vector back")


@forall(shape=narrow, rows=st.integers(1, 4), columns=st.integers(1, 4),
        frames=st.integers(2, 6), first=st.integers(0, 10**5), seed=seeds)
def test_a_chunk_is_rotated_as_part_of_the_whole(
        code, shape, rows, columns, frames, first, seed):
    R, head = shape
    P = rows * columns
    times = torch.arange(frames) + first
    x = Dice(seed).normal(1, frames * P, R)

    def turned(part, times):
        at = code.rope3d.grid_coords(times, rows, columns)
        return turn(code, part, at, R, head)

    cut = 1 + seed % (frames - 1)
    before = turned(x[:, :cut * P], times[:cut])
    after = turned(x[:, cut * P:], times[cut:])
    assert torch.equal(torch.cat((before, after), 1), turned(x, times)), \
        "the same numbers, bit for bit, whether a video is rotated whole or chunk by chunk"


@forall(rows=st.integers(1, 5), columns=st.integers(1, 5),
        times=st.lists(st.integers(0, 10**6), min_size=1, max_size=4))
def test_tokens_are_laid_out_frame_by_frame_row_by_row(code, rows, columns, times):
    want = []
    for t in times:
        for y in range(rows):
            want += [[t, y, x] for x in range(columns)]
    got = code.rope3d.grid_coords(torch.tensor(times), rows, columns).tolist()
    assert got == want, f"grid_coords must count (t, y, x) with x fastest: got {got[:4]}..., " \
                        f"expected {want[:4]}..."


@forall(shape=st.sampled_from(NARROW), L=counts, seed=seeds)
def test_a_narrow_key_turns_like_the_fastest_channels_of_a_full_head(code, shape, L, seed):
    R, head = shape
    dice = Dice(seed)
    x = dice.normal(1, L, head)
    at = dice.points(L)
    chosen = code.attention.fastest_channels(R, head)
    assert len(set(chosen)) == R
    narrow_key = turn(code, x[..., chosen], at, R, head)
    full_head = turn(code, x, at, head, head)
    assert_same(narrow_key, full_head[..., chosen], EXACT,
                "R channels must turn at the full head's own speeds: band i is "
                "theta ** (-i / n) with n of the full head, fastest first")


@forall(head=st.sampled_from(HEADS), copies=st.integers(1, 4), L=counts, seed=seeds)
def test_copies_give_every_head_its_own_slice(code, head, copies, L, seed):
    dice = Dice(seed)
    x = dice.normal(1, L, copies * head)
    at = dice.points(L)
    alone = [turn(code, part, at, head, head) for part in x.split(head, -1)]
    together = turn(code, x, at, head, head, copies=copies)
    assert_same(together, torch.cat(alone, -1), EXACT, "each slice turns like a head alone")


@forall(shape=narrow, L=counts, seed=seeds,
        low=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_angles_stay_in_float32_when_the_model_does_not(code, shape, L, seed, low):
    rope = code.rope3d.Rope3D(*shape)
    dice = Dice(seed)
    at = dice.points(L) + 300
    cos, sin = rope.table(at, low)
    assert cos.dtype == sin.dtype == torch.float32, \
        "the table must not be rounded to the model's precision"
    # An angle of 312 is known to 312 * 2^-24 = 2e-5 in float32, and to one whole radian in
    # bfloat16.
    exact = rope.table(at, torch.float64)
    assert_same(torch.stack((cos, sin)), torch.stack(exact), 5e-5,
                "(R1): angles at position 300 need float32")

    x = dice.normal(1, L, rope.channels).to(low)
    turned = code.rope3d.rotate(x, (cos, sin))
    in_float32 = code.rope3d.rotate(x.float(), (cos, sin))
    assert turned.dtype == low, f"rotate must give back the dtype it was given, {low}"
    assert torch.equal(turned, in_float32.to(low)), "rotate in float32, round once at the end"


@pytest.mark.parametrize("channels, split", [
    (6, (1, 1, 1)),
    (8, (2, 1, 1)),
    (32, (6, 5, 5)),
    (44, (8, 7, 7)),
    (128, (22, 21, 21))])
def test_the_split_of_channels_is_the_papers(code, channels, split):
    assert code.rope3d.axis_pairs(channels) == split == oracles.axis_split(channels), \
        "a third each, the remainder to time"


def test_impossible_splits_are_refused_in_words(code):
    for channels in (0, 4, 7, 33):
        with pytest.raises(ValueError, match="even number of channels, 6 or more"):
            code.rope3d.axis_pairs(channels)
    with pytest.raises(ValueError, match="choose fewer rope channels or a wider head"):
        code.rope3d.Rope3D(32, 16)
    # Fewer channels, yet more pairs of time: (3, 1, 1) > (2, 2, 2).
    with pytest.raises(ValueError, match="choose fewer"):
        code.rope3d.Rope3D(10, 12)


def test_the_oracle_itself_turns_by_a_known_angle():
    """With theta = 1 every band turns one radian per step: 1 + 0i becomes exp(i * step)."""
    x = numbers([[1.0, 0.0] * 3])
    at = numbers([[1, 2, 3]])
    by_hand = []
    for angle in (1, 2, 3):
        by_hand += [math.cos(angle), math.sin(angle)]
    assert_same(oracles.rope(x, at, 6, theta=1.0), [by_hand], 1e-15,
                "the oracle itself is wrong")
