"""Independent oracles: the paper's equations a second time, written to be obvious and slow, importing nothing of the code under test.

One misunderstanding must not be on both sides of an equation. So: numpy instead of torch, float64 always, one video at a time, loops over
heads and queries instead of einsum, complex numbers instead of cos and sin, a Python list instead of a ring buffer, a table of "who may
look" written cell by cell. Numbers in brackets are the equations in the header of attention.py.
"""

import numpy as np
import torch

# ---- rotation -------------------------------------------------------------------------------------------------------


def axis_split(channels: int) -> tuple[int, int, int]:
    """Channel pairs of time, height, width: deal the pairs out in threes, what is left over goes to time."""
    pairs = [0, 0, 0]
    left = channels // 2
    while left >= 3:
        pairs, left = [n + 1 for n in pairs], left - 3
    return pairs[0] + left, pairs[1], pairs[2]


def rope(x: np.ndarray, at: np.ndarray, head: int, theta: float = 1e4) -> np.ndarray:
    """Rotate x [..., tokens, R] at integer points `at` [tokens, 3]: channels (2i, 2i + 1) are one complex number, multiplied by
    exp(i * coordinate * theta^(-k/n)), where band k of an axis counts from the fastest and n is that axis' share of a *full* head."""
    spins = [np.outer(at[:, axis], theta ** (-np.arange(mine) / full))
             for axis, (mine, full) in enumerate(zip(axis_split(x.shape[-1]), axis_split(head)))]
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * np.concatenate(spins, axis=1))
    return np.stack((z.real, z.imag), axis=-1).reshape(x.shape)


# ---- attention ------------------------------------------------------------------------------------------------------


def attention(q, k, v, scale: float, visible) -> tuple[np.ndarray, np.ndarray]:
    """Equations (6)-(8) for q [H, L, d], k [H, T, d], v [H, T, V], visible [L, T]; returns o [H, L, V] and p [H, L, T]."""
    p = np.zeros((q.shape[0], q.shape[1], k.shape[1]))
    for h in range(q.shape[0]):
        for i in range(q.shape[1]):
            score = k[h, visible[i]] @ q[h, i] * scale                                                        # (6)
            weight = np.exp(score - score.max())
            p[h, i, visible[i]] = weight / weight.sum()                                                       # (7)
    return p @ v, p                                                                                           # (8)


def rms_norm(x: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
    """x over its root mean square, times a learned weight; no weight, no norm. The epsilon is torch's: that of float64."""
    return x if weight is None else x / np.sqrt((x * x).mean(-1, keepdims=True) + np.finfo(np.float64).eps) * weight


def mla(x, keys, w: dict, *, heads: int, scale: float, head: int, x_at, keys_at, visible, theta=1e4):
    """A whole latent attention layer for one video: tokens x [L, E] at points x_at look at tokens `keys` [T, E] at keys_at.

    `w` names the weights as the paper does. Returns y [L, E] and the probabilities [H, L, T].
    """
    c_kv = rms_norm(keys @ w["W_DKV"].T, w.get("norm_kv"))                                                    # (1)
    k_rope = rope(keys @ w["W_KR"].T, keys_at, head, theta)                                                   # (2)
    latent = rms_norm(x @ w["W_DQ"].T, w.get("norm_q"))                                                       # (3)
    outputs, probabilities = [], []
    for h in range(heads):
        up_q, up_r, up_k, up_v = (np.split(w[name], heads)[h] for name in ("W_UQ", "W_QR", "W_UK", "W_UV"))
        q = np.concatenate((latent @ up_q.T, rope(latent @ up_r.T, x_at, head, theta)), axis=1)               # (4)
        k = np.concatenate((c_kv @ up_k.T, k_rope), axis=1)                                                   # (5)
        o, p = attention(q[None], k[None], (c_kv @ up_v.T)[None], scale, visible)                             # (5)-(8)
        outputs.append(o[0])
        probabilities.append(p[0])
    return np.concatenate(outputs, axis=1) @ w["W_O"].T, np.stack(probabilities)                              # (8)


def dense(x, keys, w: dict, *, heads: int, x_at=None, keys_at=None, visible=None, theta=1e4):
    """Standard attention with full 3D RoPE in every head (none if x_at is None), for one video; as `mla`."""
    width = w["W_Q"].shape[0] // heads
    outputs, probabilities = [], []
    q_all, k_all = rms_norm(x @ w["W_Q"].T, w.get("norm_q")), rms_norm(keys @ w["W_K"].T, w.get("norm_k"))
    for h in range(heads):
        mine = slice(h * width, (h + 1) * width)
        q, k, v = q_all[:, mine], k_all[:, mine], keys @ w["W_V"][mine].T
        if x_at is not None:
            q, k = rope(q, x_at, width, theta), rope(k, keys_at, width, theta)
        o, p = attention(q[None], k[None], v[None], width ** -0.5, visible)
        outputs.append(o[0])
        probabilities.append(p[0])
    return np.concatenate(outputs, axis=1) @ w["W_O"].T, np.stack(probabilities)


# ---- the whole network ----------------------------------------------------------------------------------------------


def layer_norm(x, weight=1.0, bias=0.0):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred ** 2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def video_dit(W: dict, video, times, features, caption, visible, c) -> np.ndarray:
    """v of one video [F, channels, h, w] whose frames stand at `times`, token by token. `W` is the state dict in numpy, `features`
    [F, 256] the sinusoids of the noise level, `visible` [tokens, tokens] the mask, `c` the config."""
    p, tokens, silu = c.patch, c.tokens, lambda z: z / (1 + np.exp(-z))
    places = [(f, y, x) for f in range(len(video)) for y in range(c.height // p) for x in range(c.width // p)]
    at = np.array([(times[f], y, x) for f, y, x in places])

    def part(prefix):
        return {name.removeprefix(prefix).removesuffix(".weight"): w for name, w in W.items() if name.startswith(prefix)}

    def linear(name, x):
        return x @ W[name + ".weight"].T + W[name + ".bias"]

    x = linear("embed", np.stack([video[f, :, i * p:(i + 1) * p, j * p:(j + 1) * p].ravel() for f, i, j in places]))
    if "place" in W:                                       # says where in its frame a token stands, and not when
        x = x + np.stack([W["place"][i * (c.width // p) + j] for _, i, j in places])
    time = linear("time.2", silu(linear("time.0", features)))                          # [F, E]
    level = linear("level.1", silu(time)).reshape(len(video), 6, c.dim)
    words, everything = W["words.weight"][caption], np.ones((len(at), len(caption)), bool)
    for i in range(c.layers):
        b = f"blocks.{i}."
        shift1, scale1, gate1, shift2, scale2, gate2 = (level + W[b + "modulation"]).repeat(tokens, 0).swapaxes(0, 1)
        h = layer_norm(x) * (1 + scale1) + shift1
        sizes = dict(heads=c.heads, x_at=at, keys_at=at, visible=visible)
        if c.attention == "mla":
            sizes |= dict(head=c.dim // c.heads, scale=(c.dim // c.heads) ** -0.5)
        o, _ = (mla if c.attention == "mla" else dense)(h, h, part(b + "attention."), **sizes)
        x = x + gate1 * o
        asked = layer_norm(x, W[b + "norm_caption.weight"], W[b + "norm_caption.bias"])
        x = x + dense(asked, words, part(b + "caption."), heads=c.heads, visible=everything)[0]
        z = linear(b + "ffn.0", layer_norm(x) * (1 + scale2) + shift2)
        x = x + gate2 * linear(b + "ffn.2", z / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z ** 3))))
    shift, scale = (time[:, None] + W["head_modulation"]).repeat(tokens, 0).swapaxes(0, 1)
    out, v = linear("head", layer_norm(x) * (1 + scale) + shift), np.zeros_like(video)
    for (f, i, j), patch in zip(places, out):
        v[f, :, i * p:(i + 1) * p, j * p:(j + 1) * p] = patch.reshape(-1, p, p)
    return v


# ---- who may look at whom -------------------------------------------------------------------------------------------


def may_look(q: int, q_noisy: bool, k: int, k_noisy: bool, *, chunk: int, window: int, sink: int) -> bool:
    """The teacher-forcing table, cell by cell, for query frame q and key frame k."""
    a, b = q // chunk, k // chunk
    if a == b:
        return q_noisy == k_noisy                          # a chunk sees itself: clean sees clean, noisy sees noisy
    if b > a or k_noisy:
        return False                                       # nobody sees the future, nobody sees another chunk's noise
    kept = window - chunk - sink                           # frames that the cache keeps besides the sink
    return k < sink or k >= a * chunk - kept


# ---- the cache ------------------------------------------------------------------------------------------------------


class ListCache:
    """What the rolling cache means: remember every frame for ever, and on reading pick those that may be seen. Drop-in for the model."""

    def __init__(self, *, tokens: int, chunk: int, window: int, sink: int, horizon: int):
        self.tokens, self.chunk, self.window, self.sink, self.horizon = tokens, chunk, window, sink, horizon
        self.past = []                                     # past[frame][layer] = (content rows, position rows)

    def commit(self, rows, detach: bool = True) -> None:
        P = self.tokens
        for f in range(self.chunk):
            self.past.append([tuple(part[:, f * P:(f + 1) * P].detach().clone() for part in layer) for layer in rows])

    def kept(self) -> list[int]:
        """Absolute indices of the frames that may be seen, oldest first."""
        seen, room = len(self.past), self.window - self.chunk - self.sink
        return [f for f in range(seen) if f < self.sink or f >= seen - room]

    def times(self) -> tuple[list[int], list[int]]:
        """Where kept frames and the new chunk stand: absolute, until the new chunk would stand beyond the horizon; then the window stands
        still at the end of the horizon, and the sink where it always was."""
        seen = len(self.past)
        late = max(0, seen + self.chunk - self.horizon)
        return [f if f < self.sink else f - late for f in self.kept()], [seen - late + i for i in range(self.chunk)]

    def positions(self):
        past, own = self.times()
        return torch.tensor(past, dtype=torch.long), torch.tensor(own)

    def peek(self, layer: int, rows):
        return tuple(torch.cat([self.past[f][layer][i] for f in self.kept()] + [new], dim=1) for i, new in enumerate(rows))
