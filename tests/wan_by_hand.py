"""Wan's transformer and Self-Forcing's cache once more, as plainly as they can be said: for one
video, over a dictionary of weights with the original names, in float64.

Written from what the models compute and not from this repository's code: keys are cached
*rotated*, at absolute positions, whereas ours are cached as they are and rotated when read.
"""

import math
import zlib
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


class Sizes(NamedTuple):
    """Of a model; patches are of 2 x 2."""
    heads: int
    head: int
    layers: int
    ffn: int
    channels: int
    text: int

    @property
    def dim(self) -> int:
        return self.heads * self.head


def shapes(s: Sizes) -> dict[str, tuple]:
    """The tensors of such a model by their original names."""
    E = s.dim
    pixels = 4 * s.channels
    found = {"patch_embedding.weight": (E, s.channels, 1, 2, 2), "patch_embedding.bias": (E,)}
    linears = {"text_embedding.0": (E, s.text), "text_embedding.2": (E, E),
               "time_embedding.0": (E, 256), "time_embedding.2": (E, E),
               "time_projection.1": (6 * E, E), "head.head": (pixels, E)}
    for i in range(s.layers):
        block = f"blocks.{i}."
        for attention in ("self_attn", "cross_attn"):
            for name in "qkvo":
                linears[f"{block}{attention}.{name}"] = (E, E)
            for name in ("norm_q", "norm_k"):
                found[f"{block}{attention}.{name}.weight"] = (E,)
        linears[f"{block}ffn.0"] = (s.ffn, E)
        linears[f"{block}ffn.2"] = (E, s.ffn)
        found[f"{block}norm3.weight"] = (E,)
        found[f"{block}norm3.bias"] = (E,)
        found[f"{block}modulation"] = (1, 6, E)
    for name, (outputs, inputs) in linears.items():
        found[f"{name}.weight"] = (outputs, inputs)
        found[f"{name}.bias"] = (outputs,)
    found["head.modulation"] = (1, 2, E)
    return found


def numbers(name: str, shape: tuple, seed: int) -> np.ndarray:
    """Standard normal numbers that depend on the name and the seed alone."""
    dice = np.random.RandomState(zlib.crc32(f"{name} {seed}".encode()))
    return dice.standard_normal(shape)


def weights(s: Sizes, seed: int) -> dict[str, Tensor]:
    """Random weights that bfloat16 can hold, in float32, so that every dtype has the same."""
    made = {}
    for name, shape in shapes(s).items():
        value = 0.3 * numbers(name, shape, seed)
        if len(shape) in (2, 5):                           # a matrix keeps the size of its input
            value = numbers(name, shape, seed) / math.sqrt(math.prod(shape[1:]))
        if "norm" in name and name.endswith("weight"):
            value = 1 + value
        made[name] = torch.from_numpy(value).bfloat16().float()
    return made


def inputs(s: Sizes, seed: int, frames: int) -> tuple[Tensor, Tensor, Tensor]:
    """Video [2, F, channels, 4, 6], one sigma a frame [2, F], rows of text [2, 5, text]; they
    can be held in bfloat16, and 1000 sigma is a whole number."""
    video = torch.from_numpy(numbers("video", (2, frames, s.channels, 4, 6), seed))
    text = torch.from_numpy(numbers("text", (2, 5, s.text), seed))
    times = np.random.RandomState(seed).randint(0, 1001, (2, frames))
    return video.bfloat16().double(), torch.from_numpy(times / 1000), text.bfloat16().double()


# ---- Self-Forcing's stream -------------------------------------------------------------------

def turned(x: Tensor, places: list[tuple]) -> Tensor:
    """x [L, H, d], each pair of neighbours turned by its token's place (frame, row, column)."""
    d = x.shape[-1]
    side = 2 * (d // 6)
    angles = []
    for axis, width in enumerate((d - 2 * side, side, side)):
        speed = 10_000.0 ** (-torch.arange(0, width, 2).double() / width)
        at = torch.tensor([place[axis] for place in places]).double()
        angles.append(torch.outer(at, speed))
    angle = torch.cat(angles, 1)[:, None]                              # [L, 1, d / 2]
    turn = torch.polar(torch.ones_like(angle), angle)
    pairs = x.unflatten(-1, (-1, 2)).contiguous()
    pairs = torch.view_as_complex(pairs)
    return torch.view_as_real(pairs * turn).flatten(-2)


class SelfForcing:
    """A video in the making. `window` counts frames, the sink and the chunk itself included."""

    def __init__(self, W: dict[str, Tensor], s: Sizes, window: int, sink: int):
        self.W = {name: value.double() for name, value in W.items()}
        self.s = s
        self.window = window
        self.sink = sink
        self.kept = [{} for _ in range(s.layers)]          # {frame: (rotated keys, values)}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.W[f"{name}.weight"], self.W[f"{name}.bias"])

    def heads(self, name: str, norm: str | None, x: Tensor) -> Tensor:
        """Queries, keys or values [L, H, d]; the norm is over all heads together."""
        x = self.linear(name, x)
        if norm:
            mean_square = x.square().mean(-1, keepdim=True)
            x = x * (mean_square + 1e-6).rsqrt()
            x = x * self.W[norm]
        return x.unflatten(-1, (self.s.heads, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        score = torch.einsum("lhd,thd->hlt", q, k) / math.sqrt(q.shape[-1])
        p = score.softmax(-1)
        return torch.einsum("hlt,thd->lhd", p, v).flatten(1)

    def level_of(self, sigma: float) -> tuple[Tensor, Tensor]:
        """The embedding [E] of a noise level, and its six numbers a channel [6, E]."""
        band = 10_000.0 ** (-torch.arange(128).double() / 128)
        angle = 1000 * sigma * band
        features = torch.cat((angle.cos(), angle.sin()))
        time = self.linear("time_embedding.0", features)
        time = self.linear("time_embedding.2", F.silu(time))
        six = self.linear("time_projection.1", F.silu(time))
        return time, six.unflatten(0, (6, -1))

    def one_pass(self, chunk: Tensor, start: int, sigma: float, text: Tensor,
                 keep: bool) -> Tensor:
        """v of a chunk [F, channels, h, w] whose first frame is `start`; with `keep` its keys
        and values stay."""
        frames, channels, h, w = chunk.shape
        rows, columns = h // 2, w // 2
        places = []
        for f in range(frames):
            for y in range(rows):
                places += [(start + f, y, x) for x in range(columns)]
        kernel = self.W["patch_embedding.weight"][:, :, 0]
        x = F.conv2d(chunk, kernel, self.W["patch_embedding.bias"], stride=2)
        x = x.flatten(2).transpose(1, 2)                               # [F, tokens, E]
        x = x.flatten(0, 1)                                            # [L, E]
        time, six = self.level_of(sigma)
        words = self.linear("text_embedding.0", text)
        words = self.linear("text_embedding.2", F.gelu(words, approximate="tanh"))
        for i in range(self.s.layers):
            x = self.block(i, x, six, words, places, rows * columns, keep)
        offset, scale = self.W["head.modulation"][0] + time
        x = self.linear("head.head", self.normed(x) * (1 + scale) + offset)
        x = x.reshape(frames, rows, columns, 2, 2, channels)           # (p q c)
        x = x.permute(0, 5, 1, 3, 2, 4)
        return x.reshape(chunk.shape)

    def normed(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)

    def block(self, i: int, x: Tensor, six: Tensor, words: Tensor, places: list, tokens: int,
              keep: bool) -> Tensor:
        name = f"blocks.{i}."
        offset, scale, gate, offset2, scale2, gate2 = self.W[name + "modulation"][0] + six
        h = self.normed(x) * (1 + scale) + offset
        q = self.heads(name + "self_attn.q", name + "self_attn.norm_q.weight", h)
        k = self.heads(name + "self_attn.k", name + "self_attn.norm_k.weight", h)
        v = self.heads(name + "self_attn.v", None, h)
        k = turned(k, places)
        past = self.visible(i, places[0][0], len(places) // tokens)
        keys = torch.cat([*(key for key, _ in past), k])
        values = torch.cat([*(value for _, value in past), v])
        q = turned(q, places)
        o = self.attend(q, keys, values)
        x = x + gate * self.linear(name + "self_attn.o", o)
        if keep:
            for f, key, value in zip(places[::tokens], k.split(tokens), v.split(tokens)):
                self.kept[i][f[0]] = key, value

        h = self.normed(x) * self.W[name + "norm3.weight"] + self.W[name + "norm3.bias"]
        q = self.heads(name + "cross_attn.q", name + "cross_attn.norm_q.weight", h)
        k = self.heads(name + "cross_attn.k", name + "cross_attn.norm_k.weight", words)
        v = self.heads(name + "cross_attn.v", None, words)
        o = self.attend(q, k, v)
        x = x + self.linear(name + "cross_attn.o", o)

        h = self.normed(x) * (1 + scale2) + offset2
        h = self.linear(name + "ffn.0", h)
        h = F.gelu(h, approximate="tanh")
        return x + gate2 * self.linear(name + "ffn.2", h)

    def visible(self, i: int, start: int, chunk: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the frames that a chunk at `start` sees: the sink and the latest."""
        oldest = start - (self.window - self.sink - chunk)
        seen = [f for f in self.kept[i] if f < start and (f < self.sink or f >= oldest)]
        return [self.kept[i][f] for f in sorted(seen)]
