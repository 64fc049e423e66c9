"""3D rotary position embedding (RoPE) from integer coordinates (time, height, width).

A token of a video sits at an integer point p = (t, y, x). RoPE takes the channels of a query or
key in pairs and turns each pair by an angle that is proportional to one coordinate: t for the
first pairs, then y, then x. omega_i is the pair's speed, in radians a step:

    angle_i = p[axis(i)] * omega_i                                                    (R1)
    (a, b)  ->  (a cos - b sin,  a sin + b cos)         for each pair (a, b)          (R2)

The query is turned by its own angle and the key by its own. What is left in their inner product
is the difference:

    <rot(q, p), rot(k, s)> = <rot(q, p - s), k>                                       (R3)

Two things follow. Adding one constant to every position changes nothing. And a cache may keep
its keys *unrotated* and rotate them when they are read, at whatever position they have by then.

The same numbers occur in two layouts. Here, as in Wan and in DeepSeek's reference code, a pair
is two *neighbouring* channels (2i, 2i + 1), that is, one complex number. Llama-style code pairs
channel i with channel i + d/2 ("rotate half"). The two differ by a fixed permutation of
channels, which a trained checkpoint has baked into W_Q and W_K.

Letters: B batch, L tokens, H heads, R rotated channels. tests/test_rope.py holds (R1) to (R3)
against complex numbers in numpy.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

Table = tuple[Tensor, Tensor]                # (cos, sin) of every token and pair, each [L, R/2]


def axis_pairs(channels: int) -> tuple[int, int, int]:
    """How many pairs of `channels` channels belong to time, to height and to width.

    A third each, rounded down to whole pairs, and time takes what is left over: 32 channels
    give (6, 5, 5) and 128 give (22, 21, 21), the paper's split and Wan's. Raises ValueError
    unless `channels` is even and at least 6, so that every axis has a pair.
    """
    if channels % 2 or channels < 6:
        raise ValueError("3D RoPE needs an even number of channels, 6 or more "
                         f"(a pair for each of t, h, w); got {channels}")
    pairs = channels // 2
    third = pairs // 3
    return pairs - 2 * third, third, third


@dataclass(frozen=True)
class Rope3D:
    """The rotation of `channels` channels, taken from a full head of `head_dim` channels.

    In a full head an axis with n pairs has the speeds omega_i = theta ** (-i / n) for i = 0 ..
    n - 1: from one radian a step down to almost none. A narrow positional key has room for
    fewer pairs. It keeps the *first* of each axis, which are the fastest. Those tell neighbours
    apart, whereas the slow ones hardly turn over a window of a few dozen frames and are nearly
    content already.

    `copies` > 1 lays the same table side by side that many times, for a key with a slice for
    every head. MLA.from_dense alone uses it, to show that MLA contains full per-head RoPE
    (attention.py, E2): skip it at first reading.

    Raises ValueError if the head has fewer pairs on an axis than `channels` asks for.
    """

    channels: int
    head_dim: int
    theta: float = 10_000.0
    copies: int = 1

    def __post_init__(self):
        wanted = axis_pairs(self.channels)
        there = axis_pairs(self.head_dim)
        if any(pairs > limit for pairs, limit in zip(wanted, there)):
            raise ValueError(f"{self.channels} rope channels need {wanted} pairs for "
                             f"(t, h, w), but a head of {self.head_dim} has only {there}: "
                             "choose fewer rope channels or a wider head")

    def table(self, coords: Tensor, dtype: torch.dtype = torch.float32) -> Table:
        """(cos, sin), each [L, copies * channels / 2], for integer `coords` [L, 3] in the order
        (t, y, x).

        Computed from the coordinates themselves, on their device: there is no length at which a
        table ends, and no GPU waits for its host. Precision is float32 at least, or float64 if
        `dtype` is. (bfloat16 has 8 significant bits: position 301 would become 300.)
        """
        dtype = torch.promote_types(dtype, torch.float32)
        angles = []
        for axis in range(3):
            pairs = axis_pairs(self.channels)[axis]
            pairs_of_full_head = axis_pairs(self.head_dim)[axis]
            i = torch.arange(pairs, device=coords.device, dtype=dtype)
            omega = self.theta ** (-i / pairs_of_full_head)             # [pairs], fastest first
            position = coords[:, axis, None].to(dtype)                          # [L, 1]
            angles.append(position * omega)                       # [L, pairs]          (R1)
        angles = angles * self.copies              # the list again and again, not multiplied
        angle = torch.cat(angles, dim=-1)                                       # [L, R/2]
        return angle.cos(), angle.sin()


def rotate(x: Tensor, table: Table) -> Tensor:
    """(R2) for `x` [B, L, R] or, with heads, [B, L, H, R]; `table` = (cos, sin), each [L, R/2].

    Real arithmetic in the table's precision; the result has the dtype of `x`. (Complex numbers
    and float64 are what makes released code slow here: torch.compile cannot fuse the one, and
    many GPUs are slow at the other.)
    """
    if x.shape[-1] == 0:                                   # a layer without position
        return x
    cos, sin = table
    if x.dim() == 4:                               # all heads of a token turn by the same angle
        cos = cos[:, None]                                                      # [L, 1, R/2]
        sin = sin[:, None]
    pairs = x.to(cos.dtype).unflatten(-1, (-1, 2))                   # [..., R/2, 2]: neighbours
    a, b = pairs.unbind(-1)
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)              # (R2)
    return turned.flatten(-2).to(x.dtype)


def grid_coords(frames: Tensor, height: int, width: int) -> Tensor:
    """Coordinates (t, y, x) of every token of the frames at integer times `frames` [F]: [F *
    height * width, 3].

    In the order in which tokens are laid out: frame by frame, line by line. Height and width
    count tokens.
    """
    y = torch.arange(height, device=frames.device)
    x = torch.arange(width, device=frames.device)
    t, y, x = torch.meshgrid(frames, y, x, indexing="ij")              # each [F, height, width]
    return torch.stack((t, y, x), dim=-1).flatten(0, 2)
