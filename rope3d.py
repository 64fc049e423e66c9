"""3D rotary position embedding (RoPE) from integer coordinates (time, height, width).

A token of a video sits at an integer point p = (t, y, x). RoPE turns each pair of channels by an angle that is
proportional to one of the three coordinates:

    angle_i = p[axis(i)] * omega_i                                                                     (R1)
    (a_i, b_i)  ->  (a_i cos - b_i sin,  a_i sin + b_i cos)                                            (R2)

Turning the query by its own angle and the key by its own leaves in their inner product only the difference:

    <rot(q, p), rot(k, s)> = <rot(q, p - s), k>                                                        (R3)

which is why the cache may keep keys *unrotated* and rotate them when they are read, at whatever position they
have by then; and why adding one constant to every position changes nothing.

The same numbers occur in two layouts. Here, as in Wan and in DeepSeek's reference code, a pair is two
*neighbouring* channels (2i, 2i+1), i.e. one complex number. Llama-style code pairs channel i with i + d/2 ("rotate
half"). The two differ by a fixed permutation of channels, which a trained checkpoint has baked into W_Q and W_K.

Letters: L tokens, R rotated channels. tests/test_rope.py holds R1-R3 against complex numbers in numpy.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def axis_pairs(channels: int) -> tuple[int, int, int]:
    """How many channel pairs (time, height, width) get out of `channels`: a third each, rounded down to whole
    pairs, and **time takes the remainder**. 32 -> (6, 5, 5), 128 -> (22, 21, 21): the paper's and Wan's split.

    Raises ValueError unless `channels` is even and gives every axis at least one pair (so at least 6).
    """
    if channels % 2 or channels < 6:
        raise ValueError(f"3D RoPE needs an even number of channels, 6 or more (a pair for each of t, h, w); got {channels}")
    third = channels // 6                                  # pairs = channels / 2, a third of them = channels / 6
    return channels // 2 - 2 * third, third, third


@dataclass(frozen=True)
class Rope3D:
    """The rotation of `channels` channels, taken from a full head of `head_dim` channels.

    A full head of width d gives axis a with n_a pairs the bands  omega_i = theta ** (-i / n_a),  i = 0 .. n_a - 1: from
    one radian per step down to almost none. A narrow positional key cannot carry all of them and keeps the
    *first*, the highest-frequency bands of each axis: those tell neighbours apart, whereas the slow bands
    hardly turn over a window of a few dozen frames and are nearly content already.

    `copies` > 1 lays that same table side by side `copies` times, for a key that carries one slot per head: with copies = H
    and channels = d_h MLA contains full per-head RoPE exactly (tests/test_full_rank.py).
    """

    channels: int
    head_dim: int
    theta: float = 10_000.0
    copies: int = 1

    def __post_init__(self):
        mine, full = axis_pairs(self.channels), axis_pairs(self.head_dim)
        if any(m > f for m, f in zip(mine, full)):
            raise ValueError(f"{self.channels} rope channels need {mine} pairs for (t, h, w), but a head of "
                             f"{self.head_dim} has only {full}: choose fewer rope channels or a wider head")

    def table(self, coords: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [L, copies * channels / 2], for integer `coords` [L, 3] in the order (t, y, x).

        Computed from the coordinates themselves, so there is no length at which a table ends, and on their device,
        so there is no host synchronisation. Precision is float32 at least (bfloat16 has 8 bits: at position 300
        the fastest band would be wrong by a whole radian), float64 if `dtype` is.
        """
        dtype = torch.promote_types(dtype, torch.float32)
        angles = []
        for axis, (mine, full) in enumerate(zip(axis_pairs(self.channels), axis_pairs(self.head_dim))):
            i = torch.arange(mine, device=coords.device, dtype=dtype)
            omega = self.theta ** (-i / full)
            angles.append(coords[:, axis, None].to(dtype) * omega)                     # [L, pairs of this axis]  (R1)
        angle = torch.cat(angles * self.copies, dim=-1)                                # [L, R/2]
        return angle.cos(), angle.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """(R2) on `x` [B, L, R] or, with heads, [B, L, H, R]; `table` = (cos, sin) [L, R/2] from `Rope3D.table`.

    Real arithmetic in the table's precision: complex numbers and float64 are what makes released code slow here
    (torch.compile cannot fuse the one, GPUs crawl through the other). The result has the dtype of `x`.
    """
    cos, sin = table if x.dim() == 3 else (part[:, None] for part in table)            # one angle for all heads
    a, b = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)                           # neighbours are a pair
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


def grid_coords(frames: Tensor, rows: int, columns: int) -> Tensor:
    """Coordinates [F * rows * columns, 3] of all tokens of the frames at integer times `frames` [F], in the order
    in which tokens are laid out: frame by frame, row by row."""
    axes = frames, torch.arange(rows, device=frames.device), torch.arange(columns, device=frames.device)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
