"""Rotary position in three dimensions is what complex multiplication says it is, and depends on coordinate differences only.

Proved here, for any number of channels, any grid, any integer coordinates: (R1) and (R2) equal complex numbers in numpy; (R3) holds axis
by axis; a rotation keeps lengths, composes and can be undone; a chunk's rotation is that part of the whole video's; the narrow key turns
exactly like the fastest channels of a full head; nothing happens at the end of any table, because there is none.
"""

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import oracles
from lab import EXACT, HEADS, NARROW, Dice, assert_same, forall, numbers, seeds

AXES = ("time", "height", "width")
narrow = st.sampled_from(NARROW + [(d, d) for d in HEADS])  # (R, full head), R = d is the dense baseline's
counts = st.integers(1, 20)


def turn(code, x, at, R, head, **more):
    return code.rope3d.rotate(x, code.rope3d.Rope3D(R, head, **more).table(at, torch.float64))


@forall(shape=narrow, B=st.integers(1, 2), H=st.integers(0, 3), L=counts, reach=st.sampled_from([3, 100, 10**6]), seed=seeds)
def test_rotation_is_complex_multiplication(code, shape, B, H, L, reach, seed):
    (R, head), dice = shape, Dice(seed)
    at = dice.below(2 * reach, L, 3) - reach               # negative coordinates too, and far beyond any precomputed table
    x = dice.normal(B, L, *((H,) if H else ()), R)
    want = numbers(x.transpose(1, 2) if H else x)          # the oracle wants tokens next to last
    want = oracles.rope(want, at.numpy(), head)
    # At coordinate 10^6 an angle is known to 10^6 * 1.1e-16, twice over: 1e-9 is the width of that, not of the arithmetic.
    assert_same(turn(code, x, at, R, head), want.swapaxes(1, 2) if H else want, 1e-9 if reach > 100 else EXACT,
                "(R1) (R2): rotation differs from multiplication by exp(i angle). Pairs are neighbours (2i, 2i+1), time has the first "
                "pairs, band i of an axis is theta ** (-i / pairs of that axis in the FULL head)")


@forall(shape=narrow, L=counts, T=counts, seed=seeds)
def test_scores_depend_on_differences_only_along_each_axis(code, shape, L, T, seed):
    (R, head), dice = shape, Dice(seed)
    q, k, p, s = dice.normal(1, L, R), dice.normal(1, T, R), dice.points(L), dice.points(T)
    before = turn(code, q, p, R, head) @ turn(code, k, s, R, head).mT
    for axis, name in enumerate(AXES):
        step = torch.zeros(3, dtype=torch.long)
        step[axis] = 37
        after = turn(code, q, p + step, R, head) @ turn(code, k, s + step, R, head).mT
        assert_same(after, before, EXACT, f"(R3): moving every token along {name} must not change a score")
        moved = turn(code, q, p + step, R, head) @ turn(code, k, s, R, head).mT
        assert (moved - before).norm() > 1e-6 * before.norm(), \
            f"moving only the queries along {name} changed nothing: that axis is unused"


@forall(shape=narrow, L=counts, seed=seeds)
def test_a_step_along_one_axis_turns_that_axis_channels_alone(code, shape, L, seed):
    (R, head), dice = shape, Dice(seed)
    x, at, end = dice.normal(1, L, R), dice.points(L), 0
    for axis, pairs in enumerate(oracles.axis_split(R)):
        step = torch.zeros(3, dtype=torch.long)
        step[axis] = 5
        changed = (turn(code, x, at, R, head) != turn(code, x, at + step, R, head)).any(1).flatten().nonzero().flatten().tolist()
        start, end = end, end + 2 * pairs
        assert changed == list(range(start, end)), \
            f"(R1): a step along {AXES[axis]} turned channels {changed}, not {start}..{end - 1}: are two axes swapped?"


@forall(shape=narrow, L=counts, seed=seeds)
def test_rotation_keeps_lengths_composes_and_undoes(code, shape, L, seed):
    (R, head), dice = shape, Dice(seed)
    x, p, s = dice.normal(2, L, R), dice.points(L), dice.points(L)
    once = turn(code, x, p, R, head)
    assert_same(once.unflatten(-1, (-1, 2)).norm(dim=-1), x.unflatten(-1, (-1, 2)).norm(dim=-1), EXACT,
                "(R2): every pair keeps its length")
    assert_same(turn(code, once, s, R, head), turn(code, x, p + s, R, head), EXACT,
                "(R2): turning by p, then by s, is turning by p + s")
    assert_same(turn(code, once, -p, R, head), x, EXACT, "(R2): turning back gives the vector back")


@forall(shape=narrow, rows=st.integers(1, 4), columns=st.integers(1, 4), frames=st.integers(2, 6), first=st.integers(0, 10**5), seed=seeds)
def test_a_chunk_is_rotated_as_part_of_the_whole(code, shape, rows, columns, frames, first, seed):
    (R, head), dice = shape, Dice(seed)
    times, P = torch.arange(frames) + first, rows * columns
    x = dice.normal(1, frames * P, R)
    whole = turn(code, x, code.rope3d.grid_coords(times, rows, columns), R, head)
    cut = 1 + seed % (frames - 1)
    parts = [turn(code, x[:, :cut * P], code.rope3d.grid_coords(times[:cut], rows, columns), R, head),
             turn(code, x[:, cut * P:], code.rope3d.grid_coords(times[cut:], rows, columns), R, head)]
    assert torch.equal(torch.cat(parts, 1), whole), \
        "the same numbers, bit for bit, whether a video is rotated whole or chunk by chunk"


@forall(rows=st.integers(1, 5), columns=st.integers(1, 5), times=st.lists(st.integers(0, 10**6), min_size=1, max_size=4))
def test_tokens_are_laid_out_frame_by_frame_row_by_row(code, rows, columns, times):
    want = [[t, y, x] for t in times for y in range(rows) for x in range(columns)]
    got = code.rope3d.grid_coords(torch.tensor(times), rows, columns).tolist()
    assert got == want, f"grid_coords must count (t, y, x) with x fastest: got {got[:4]}..., expected {want[:4]}..."


@forall(shape=st.sampled_from(NARROW), L=counts, seed=seeds)
def test_a_narrow_key_turns_like_the_fastest_channels_of_a_full_head(code, shape, L, seed):
    (R, head), dice = shape, Dice(seed)
    x, at = dice.normal(1, L, head), dice.points(L)
    chosen = code.attention.fastest_channels(R, head)
    assert len(set(chosen)) == R
    assert_same(turn(code, x[..., chosen], at, R, head), turn(code, x, at, head, head)[..., chosen], EXACT,
                "R channels must turn at the full head's own speeds: band i is theta ** (-i / n) with n of the full head, fastest first")


@forall(head=st.sampled_from(HEADS), copies=st.integers(1, 4), L=counts, seed=seeds)
def test_copies_give_every_head_its_own_slot(code, head, copies, L, seed):
    dice = Dice(seed)
    x, at = dice.normal(1, L, copies * head), dice.points(L)
    slots = [turn(code, slot, at, head, head) for slot in x.split(head, -1)]
    assert_same(turn(code, x, at, head, head, copies=copies), torch.cat(slots, -1), EXACT, "each slot turns like a head alone")


@forall(shape=narrow, L=counts, seed=seeds, low=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
def test_angles_stay_in_float32_when_the_model_does_not(code, shape, L, seed, low):
    (R, head), dice = shape, Dice(seed)
    at = dice.points(L) + 300
    cos, sin = code.rope3d.Rope3D(R, head).table(at, low)
    assert cos.dtype == sin.dtype == torch.float32, "the table must not be rounded to the model's precision"
    exact = code.rope3d.Rope3D(R, head).table(at, torch.float64)
    # An angle of 312 is known to 312 * 2^-24 = 2e-5 in float32, and to one whole radian in bfloat16.
    assert_same(torch.stack((cos, sin)), torch.stack(exact), 5e-5, "(R1): angles at position 300 need float32")
    x = dice.normal(1, L, R).to(low)
    turned = code.rope3d.rotate(x, (cos, sin))
    assert turned.dtype == low, f"rotate must give back the dtype it was given, {low}"
    assert torch.equal(turned, code.rope3d.rotate(x.float(), (cos, sin)).to(low)), "rotate in float32, round once at the end"


@pytest.mark.parametrize("channels, split", [(6, (1, 1, 1)), (8, (2, 1, 1)), (32, (6, 5, 5)), (44, (8, 7, 7)), (128, (22, 21, 21))])
def test_the_split_of_channels_is_the_papers(code, channels, split):
    assert code.rope3d.axis_pairs(channels) == split == oracles.axis_split(channels), "a third each, the remainder to time"


def test_impossible_splits_are_refused_in_words(code):
    for channels in (0, 4, 7, 33):
        with pytest.raises(ValueError, match="even number of channels, 6 or more"):
            code.rope3d.axis_pairs(channels)
    with pytest.raises(ValueError, match="choose fewer rope channels or a wider head"):
        code.rope3d.Rope3D(32, 16)
    with pytest.raises(ValueError, match="choose fewer"):
        code.rope3d.Rope3D(10, 12)                         # fewer channels, yet more pairs of time: (3, 1, 1) > (2, 2, 2)


def test_the_oracle_itself_turns_by_a_known_angle():
    """With theta = 1 every band turns one radian per step, so 1 + 0i becomes cos(step) + i sin(step)."""
    x = np.array([[1.0, 0.0] * 3])
    by_hand = [[f(angle) for angle in (1, 2, 3) for f in (np.cos, np.sin)]]
    assert_same(oracles.rope(x, np.array([[1, 2, 3]]), 6, theta=1.0), by_hand, 1e-15, "the oracle itself is wrong")
