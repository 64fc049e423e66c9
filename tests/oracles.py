"""Independent oracles: the paper's equations a second time, written to be obvious and slow,
importing nothing of the code under test.

One misunderstanding must not be on both sides of an equation. So: numpy instead of torch,
float64 always, one video at a time, loops over heads and queries instead of einsum, complex
numbers instead of cos and sin, a Python list instead of a ring buffer, a table of "who may
look" written cell by cell. Numbers in brackets are the equations in the header of attention.py.
"""

import numpy as np
import torch

# ---- rotation -------------------------------------------------------------------------------


def axis_split(channels: int) -> tuple[int, int, int]:
    """Channel pairs of time, height, width: deal the pairs out in threes, what is left over
    goes to time."""
    time = height = width = 0
    left = channels // 2
    while left >= 3:
        time += 1
        height += 1
        width += 1
        left -= 3
    return time + left, height, width


def rope(x: np.ndarray, at: np.ndarray, head: int, theta: float = 1e4) -> np.ndarray:
    """Rotate x [..., tokens, R] at integer points `at` [tokens, 3]: channels (2i, 2i + 1) are
    one complex number, multiplied by exp(i * coordinate * theta^(-k/n)), where band k of an
    axis counts from the fastest and n is that axis' share of a *full* head."""
    mine = axis_split(x.shape[-1])
    full = axis_split(head)
    angles = []
    for axis in range(3):
        k = np.arange(mine[axis])
        radians_a_step = theta ** (-k / full[axis])
        angles.append(np.outer(at[:, axis], radians_a_step))      # [tokens, pairs of this axis]
    spin = np.exp(1j * np.concatenate(angles, axis=1))              # [tokens, R/2]
    z = x[..., 0::2] + 1j * x[..., 1::2]
    z = z * spin
    return np.stack((z.real, z.imag), axis=-1).reshape(x.shape)


# ---- attention ------------------------------------------------------------------------------


def attention(q, k, v, scale: float, visible) -> tuple[np.ndarray, np.ndarray]:
    """Equations (6)-(8) for q [H, L, d], k [H, T, d], v [H, T, V], visible [L, T]; returns o
    [H, L, V] and p [H, L, T]."""
    heads, queries, _ = q.shape
    p = np.zeros((heads, queries, k.shape[1]))
    for h in range(heads):
        for i in range(queries):
            seen = visible[i]
            score = k[h, seen] @ q[h, i] * scale                                        # (6)
            weight = np.exp(score - score.max())
            p[h, i, seen] = weight / weight.sum()                                       # (7)
    return p @ v, p                                                                     # (8)


def attention_of_one_head(q, k, v, scale: float, visible):
    """The same for q [L, d], k [T, d], v [T, V]: o [L, V] and p [L, T]."""
    o, p = attention(q[None], k[None], v[None], scale, visible)
    return o[0], p[0]


def rms_norm(x: np.ndarray, weight: np.ndarray | None) -> np.ndarray:
    """x over its root mean square, times a learned weight; no weight, no norm. The epsilon is
    that of float32, whatever the dtype."""
    if weight is None:
        return x
    mean_square = (x * x).mean(-1, keepdims=True)
    return x / np.sqrt(mean_square + np.finfo(np.float32).eps) * weight


def join_heads(outputs: list, W_O: np.ndarray) -> np.ndarray:
    """y [L, E] from each head's o [L, V], heads in order (8)."""
    return np.concatenate(outputs, axis=1) @ W_O.T


def mla(x, keys, w: dict, *, heads: int, scale: float, head: int, x_at, keys_at, visible,
        theta=1e4):
    """A whole latent attention layer for one video: tokens x [L, E] at points x_at look at
    tokens `keys` [T, E] at keys_at.

    `w` names the weights as the paper does. Returns y [L, E] and the probabilities [H, L, T].
    """
    c_kv = rms_norm(keys @ w["W_DKV"].T, w.get("norm_kv"))                              # (1)
    k_rope = rope(keys @ w["W_KR"].T, keys_at, head, theta)                             # (2)
    latent = rms_norm(x @ w["W_DQ"].T, w.get("norm_q"))                                 # (3)
    outputs = []
    probabilities = []
    for h in range(heads):
        up_q = np.split(w["W_UQ"], heads)[h]
        up_r = np.split(w["W_QR"], heads)[h]
        up_k = np.split(w["W_UK"], heads)[h]
        up_v = np.split(w["W_UV"], heads)[h]
        q_rope = rope(latent @ up_r.T, x_at, head, theta)                               # (4)
        q = np.concatenate((latent @ up_q.T, q_rope), axis=1)                           # (4)
        k = np.concatenate((c_kv @ up_k.T, k_rope), axis=1)                             # (5)
        v = c_kv @ up_v.T                                                               # (5)
        o, p = attention_of_one_head(q, k, v, scale, visible)                          # (6)-(8)
        outputs.append(o)
        probabilities.append(p)
    return join_heads(outputs, w["W_O"]), np.stack(probabilities)


def dense(x, keys, w: dict, *, heads: int, x_at=None, keys_at=None, visible=None, theta=1e4):
    """Standard attention with full 3D RoPE in every head (none if x_at is None), for one video;
    as `mla`."""
    width = w["W_Q"].shape[0] // heads
    q_all = rms_norm(x @ w["W_Q"].T, w.get("norm_q"))
    k_all = rms_norm(keys @ w["W_K"].T, w.get("norm_k"))
    v_all = keys @ w["W_V"].T
    outputs = []
    probabilities = []
    for h in range(heads):
        mine = slice(h * width, (h + 1) * width)
        q = q_all[:, mine]
        k = k_all[:, mine]
        if x_at is not None:
            q = rope(q, x_at, width, theta)
            k = rope(k, keys_at, width, theta)
        o, p = attention_of_one_head(q, k, v_all[:, mine], width ** -0.5, visible)
        outputs.append(o)
        probabilities.append(p)
    return join_heads(outputs, w["W_O"]), np.stack(probabilities)


def video_by_video(layer, x, keys, w: dict, **places):
    """`mla` or `dense` for every video of a batch: x [B, L, E], keys [B, T, E]; y [B, L, E] and
    p [B, H, L, T]."""
    outputs = []
    probabilities = []
    for tokens, seen in zip(x, keys):
        y, p = layer(tokens, seen, w, **places)
        outputs.append(y)
        probabilities.append(p)
    return np.stack(outputs), np.stack(probabilities)


# ---- the whole network ----------------------------------------------------------------------


def layer_norm(x, weight=1.0, bias=0.0):
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred ** 2).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + 1e-5) * weight + bias


def silu(z):
    return z / (1 + np.exp(-z))


def gelu(z):
    """By its approximation with a hyperbolic tangent."""
    inner = np.sqrt(2 / np.pi) * (z + 0.044715 * z ** 3)
    return z / 2 * (1 + np.tanh(inner))


def linear(W: dict, name: str, x):
    return x @ W[name + ".weight"].T + W[name + ".bias"]


def attention_weights(W: dict, prefix: str) -> dict:
    """The weights of one attention layer, by the names that `mla` and `dense` use."""
    mine = {}
    for name, value in W.items():
        if name.startswith(prefix):
            mine[name.removeprefix(prefix).removesuffix(".weight")] = value
    return mine


def all_places(frames: int, rows: int, columns: int) -> list[tuple[int, int, int]]:
    """(frame, row, column) of every token, in order."""
    places = []
    for f in range(frames):
        for y in range(rows):
            places += [(f, y, x) for x in range(columns)]
    return places


def patch_at(video, place, p: int):
    """The patch [channels, p, p] of a video at a place: a view, to read or to write."""
    f, row, column = place
    return video[f, :, row * p:(row + 1) * p, column * p:(column + 1) * p]


def cut_patches(video, places, p: int):
    """[tokens, channels * p * p]"""
    return np.stack([patch_at(video, place, p).ravel() for place in places])


def per_token(per_frame, tokens: int):
    """[F, n, E] of frames -> n arrays [F * tokens, E] of tokens."""
    return per_frame.repeat(tokens, 0).swapaxes(0, 1)


def block(W: dict, prefix: str, x, level, words, at, visible, c):
    """One block: tokens x [L, E] at points `at`, noise level [F, 6, E], words of the caption
    [S, E]."""
    modulation = per_token(level + W[prefix + "modulation"], c.tokens)
    offset1, scale1, gate1, offset2, scale2, gate2 = modulation

    h = layer_norm(x) * (1 + scale1) + offset1
    w = attention_weights(W, prefix + "attention.")
    places = dict(heads=c.heads, x_at=at, keys_at=at, visible=visible)
    if c.attention == "mla":
        head = c.dim // c.heads
        o, _ = mla(h, h, w, head=head, scale=head ** -0.5, **places)
    else:
        o, _ = dense(h, h, w, **places)
    x = x + gate1 * o

    asked = layer_norm(x, W[prefix + "norm_caption.weight"], W[prefix + "norm_caption.bias"])
    w = attention_weights(W, prefix + "caption.")
    every_word = np.ones((len(x), len(words)), bool)
    o, _ = dense(asked, words, w, heads=c.heads, visible=every_word)
    x = x + o

    z = linear(W, prefix + "ffn.0", layer_norm(x) * (1 + scale2) + offset2)
    return x + gate2 * linear(W, prefix + "ffn.2", gelu(z))


def video_dit(W: dict, video, times, features, caption, visible, c) -> np.ndarray:
    """v of one video [F, channels, h, w] whose frames stand at `times`, token by token. `W` is
    the state dict in numpy, `features` [F, 256] the sinusoids of the noise level, `visible`
    [tokens, tokens] the mask, `c` the config."""
    rows = c.height // c.patch
    columns = c.width // c.patch
    places = all_places(len(video), rows, columns)
    at = np.array([(times[f], row, column) for f, row, column in places])

    x = linear(W, "embed", cut_patches(video, places, c.patch))
    if "place" in W:                               # where in its frame a token stands, not when
        cells = [row * columns + column for _, row, column in places]
        x = x + W["place"][cells]

    time = linear(W, "time.2", silu(linear(W, "time.0", features)))                     # [F, E]
    level = linear(W, "level.1", silu(time)).reshape(len(video), 6, c.dim)
    words = W["words.weight"][caption]
    for i in range(c.layers):
        x = block(W, f"blocks.{i}.", x, level, words, at, visible, c)

    offset, scale = per_token(time[:, None] + W["head_modulation"], c.tokens)
    out = linear(W, "head", layer_norm(x) * (1 + scale) + offset)
    v = np.zeros_like(video)
    for place, numbers in zip(places, out):
        patch_at(v, place, c.patch)[:] = numbers.reshape(-1, c.patch, c.patch)
    return v


# ---- who may look at whom -------------------------------------------------------------------


def may_look(q: int, q_noisy: bool, k: int, k_noisy: bool, *, chunk: int, window: int,
             sink: int) -> bool:
    """The teacher-forcing table, cell by cell, for query frame q and key frame k."""
    a = q // chunk
    b = k // chunk
    if a == b:
        return q_noisy == k_noisy               # of its own chunk clean sees clean, noisy noisy
    if b > a:
        return False                                  # nobody sees the future
    if k_noisy:
        return False                                  # nobody sees another chunk's noise
    kept = window - chunk - sink                  # frames that the cache keeps besides the sink
    return k < sink or k >= a * chunk - kept


# ---- the cache ------------------------------------------------------------------------------


def frames_kept(seen: int, *, chunk: int, window: int, sink: int) -> list[int]:
    """Absolute indices of the frames that may be seen after `seen` frames, oldest first."""
    room = window - chunk - sink
    first = range(min(seen, sink))
    last = range(max(sink, seen - room), seen)
    return [*first, *last]


def times(seen: int, *, chunk: int, window: int, sink: int, horizon: int):
    """Where the kept frames and the new chunk stand: absolute, until the new chunk would stand
    beyond the horizon; then the window stands still at the end of the horizon, and the sink
    where it always was."""
    late = max(0, seen + chunk - horizon)
    kept = frames_kept(seen, chunk=chunk, window=window, sink=sink)
    past = [f if f < sink else f - late for f in kept]
    own = [seen - late + i for i in range(chunk)]
    return past, own


class ListCache:
    """What the rolling cache means: remember every frame for ever, and on reading pick those
    that may be seen. Drop-in for the model."""

    def __init__(self, *, tokens: int, chunk: int, window: int, sink: int, horizon: int):
        self.tokens = tokens
        self.chunk = chunk
        self.window = window
        self.sink = sink
        self.horizon = horizon
        self.past = []                               # [frame][layer] = (content, position) rows

    def commit(self, rows, detach: bool = True) -> None:
        for f in range(self.chunk):
            mine = slice(f * self.tokens, (f + 1) * self.tokens)
            frame = []
            for content, position in rows:
                frame.append((content[:, mine].detach().clone(),
                              position[:, mine].detach().clone()))
            self.past.append(frame)

    def kept(self) -> list[int]:
        """Absolute indices of the frames that may be seen, oldest first."""
        return frames_kept(len(self.past), chunk=self.chunk, window=self.window, sink=self.sink)

    def times(self) -> tuple[list[int], list[int]]:
        """Where they and the new chunk stand."""
        return times(len(self.past), chunk=self.chunk, window=self.window, sink=self.sink,
                     horizon=self.horizon)

    def positions(self):
        past, own = self.times()
        return torch.tensor(past, dtype=torch.long), torch.tensor(own)

    def peek(self, layer: int, rows):
        together = []
        for part, new in enumerate(rows):             # content, then position
            past = [self.past[f][layer][part] for f in self.kept()]
            together.append(torch.cat(past + [new], dim=1))
        return tuple(together)
