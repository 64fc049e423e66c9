"""Multi-head latent attention (MLA) computed in several orders, with one answer; and the dense
attention that it replaces.

Dense attention remembers a key and a value per head for every past token: 2 * H * d_h numbers.
MLA remembers one short *content latent* and one short *positional key*, both shared by all
heads: C + R numbers. At the paper's sizes that is 224 instead of 3072.

Letters. In this file a letter has one meaning; in brackets the paper's sizes:
    B batch    L query tokens    T key tokens    E model width (1536)    H heads (12)
    N content channels per head (96)       R channels of the shared positional key (32)
    V value channels per head (128)        d_h = N + R = V, a head's width (but see E2)
    C content latent width (192)           Q query latent width (768)

Derivation. x is a token, [E]; ^h marks what every head h has for itself; l counts queries, t
counts keys; rot(l) rotates a vector to the position of token l, by RoPE:
    c_kv   = RMSNorm(W_DKV x)           [C]    cached: content, without position           (1)
    k_rope = W_KR x                     [R]    cached: carries position, not yet rotated   (2)
    q      = RMSNorm(W_DQ x)            [Q]    not cached; narrow, as in DeepSeek          (3)
    q_nope = W_UQ^h q   [N]             q_rope = W_QR^h q  [R]                             (4)
    k_nope = W_UK^h c_kv  [N]           v      = W_UV^h c_kv  [V]                          (5)
    s(l, t) = (q_nope . k_nope + rot(l) q_rope . rot(t) k_rope) / sqrt(N + R)              (6)
    p(l, t) = softmax over t of s(l, t)                                                    (7)
    o(l)    = sum_t p(l, t) v(t)        y = W_O [o of head 1, ..., o of head H]            (8)

Absorption is associativity and nothing else. The content score is a product of three factors,
and so is the output:
    q_nope . (W_UK c)      =  (W_UK^T q_nope) . c       so the *query* can be lifted       (9)
    sum_t p(t) (W_UV c(t)) =  W_UV (sum_t p(t) c(t))    so the *mean* can be of latents   (10)
Then no key or value of any head is ever made. All heads look at the same key, the row
[c_kv | rot(t) k_rope] of C + R channels, whose value is its own slice c_kv. One key for all
heads is called multi-query attention.

Why position has a key of its own. RoPE multiplies query and key by rotations. Rotating the
content score would put the matrix rot(l - t), a turn by the difference of the two positions,
between W_UK^T and q_nope in (9). It differs for every pair of tokens, so the bracket could not
be computed once per query. Nor may there be a norm after the up-projection (5): it is not
linear, and (9) would not hold unless the norm's divisor were cached, too.

What each order of brackets costs per layer, in multiply-adds times two:
    materialised:  2 L T H (N + R + V)  +  2 T H C (N + V)      up-projects every *key*   (11)
    absorbed:      2 L T H (2 C + R)    +  2 L H C (N + V)      up-projects every *query* (12)
For T much larger than L they are equal at
    L* = C (N + V) / (2 C - N - V),  269 tokens at the paper's sizes                      (13)
With fewer query tokens absorbing is cheaper. A language model decodes one token at a time, so
"absorb when decoding" became folklore. A *chunk* of video has 4680 tokens (3 frames of 30 x 52)
and looks at 32,760 (21 frames): there absorbing costs 1.57 times the operations, and what it
buys is the memory of K and V. (The paper says both: its D.4 materialises, its Appendix E
absorbs. Its frames/s hardly change from C = 64 to 512; those of absorbed attention would.)
And where 2 C <= N + V (our toy model: C = 16, N + V = 56) there is no crossing: absorbing never
needs more operations, for L <= T.

Appendix E also multiplies W_UK^T W_UQ into a matrix A_h, and W_O W_UV into B_h. Do not: A has H
C Q numbers instead of H N (C + Q). At the paper's sizes that is more, and slower (exercise 3).

tests/test_routes.py: all routes agree, outputs and gradients; (11) to (13) equal torch's count.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from cache import Rows
from rope3d import Rope3D, Table, axis_pairs, rotate

# ---- softmax attention itself --------------------------------------------------------------

def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(q k^T * scale) v: q [B, H, L, d], k [B, H, T, d], v [B, H, T, V] -> [B, H, L, V].

    `mask` is bool [L, T], True where a query may look at a key; None: everywhere. It is torch's
    kernel, but for two cases in which a CPU is faster without it.
    """
    if mask is not None:
        check_mask(mask, q.shape[2], k.shape[2])
    if q.device.type == "cpu":
        queries, keys = q.shape[2], k.shape[2]
        if mask is None and queries * keys <= 2**16:       # few scores: two plain products
            q = q * scale              # before the product: scores may pass float16's 65504
            return (q @ k.mT).softmax(dim=-1) @ v
        if mask is not None and not torch.compiler.is_compiling():
            patterns, runs = torch.unique_consecutive(mask, dim=0, return_counts=True)
            if 8 * len(runs) <= queries:                   # neighbours see the same keys
                return sdpa_by_runs(q, k, v, patterns, runs.tolist(), scale)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def check_mask(mask: Tensor, L: int, T: int) -> None:
    """ValueError unless bool [L, T] and (checked on a CPU only) every query sees a key."""
    if mask.dtype != torch.bool or mask.shape != (L, T):
        raise ValueError(f"a mask is bool [L, T], here {[L, T]}, one for all videos and heads; "
                         f"got {mask.dtype} {list(mask.shape)}")
    compiling = torch.compiler.is_compiling()
    if mask.is_cpu and not compiling and not mask.any(dim=1).all():
        raise ValueError("a query that sees no key has no mean of values: it is 0 / 0")


def sdpa_by_runs(q, k, v, patterns: Tensor, runs: list[int], scale: float) -> Tensor:
    """`sdpa` for a mask in which runs of queries are alike: the next `runs[i]` of them see the
    keys `patterns[i]` [T].

    All tokens of a chunk see the same keys. So each run is computed with the keys that it sees,
    and no score is made only to be masked: in teacher forcing that saves two thirds or more.
    """
    outputs = []
    start = 0
    for pattern, length in zip(patterns, runs):
        seen = stretches(pattern)
        k_seen = torch.cat([k[:, :, keys] for keys in seen], dim=2)
        v_seen = torch.cat([v[:, :, keys] for keys in seen], dim=2)
        outputs.append(sdpa(q[:, :, start:start + length], k_seen, v_seen, None, scale))
        start += length
    return torch.cat(outputs, dim=2)


def stretches(pattern: Tensor) -> list[slice]:
    """The stretches of True in a bool [T]: 0 1 1 0 1 gives [1:3] and [4:5]."""
    padded = F.pad(pattern.int(), (1, 1))                  # a stretch may touch either end
    edges = padded.diff().nonzero().flatten().tolist()     # begin, end, begin, end, ...
    return [slice(begin, end) for begin, end in zip(edges[0::2], edges[1::2])]


# ---- the routes: orders of computing (5) to (8) --------------------------------------------
# All routes have one signature and one answer, [B, L, H, V]. They are given
#     q_nope [B, L, H, N]    q_rope [B, L, H, R]    c_kv [B, T, C]    k_rope [B, T, R]
#     W_UK [H, N, C]         W_UV [H, V, C]
# both rope parts unrotated, the tables of query and key positions (Rope3D.table),
# the scale of (6) and a mask as in `sdpa`. On a GPU pass `attend_auto` of engine/routes.py: it
# also knows the kernel of fused.py.

Route = Callable[..., Tensor]


def attend_reference(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, q_table, k_table, scale: float,
                     mask: Tensor | None = None) -> Tensor:
    """Equations (5) to (8), line by line: slow, obvious, what the other routes must equal."""
    k_nope = einsum(c_kv, W_UK, "b t c, h n c -> b t h n")                             # (5)
    v = einsum(c_kv, W_UV, "b t c, h v c -> b t h v")                                  # (5)
    q_turned = rotate(q_rope, q_table)                         # [B, L, H, R]
    k_turned = rotate(k_rope, k_table)                         # [B, T, R]
    content = einsum(q_nope * scale, k_nope, "b l h n, b t h n -> b h l t")            # (6)
    position = einsum(q_turned * scale, k_turned, "b l h r, b t r -> b h l t")         # (6)
    score = content + position                                                         # (6)
    if mask is not None:
        check_mask(mask, *score.shape[2:])
        score = score.masked_fill(~mask, -math.inf)
    p = score.softmax(dim=-1)                                                          # (7)
    return einsum(p, v, "b h l t, b t h v -> b l h v")                                 # (8)


def attend_materialised(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, q_table, k_table,
                        scale: float, mask: Tensor | None = None) -> Tensor:
    """Make keys and values of every head from the latents, use them, forget them.

    That is standard attention, of widths N + R and V: 128 and 128 in the paper, which every
    fast kernel takes.
    """
    heads = W_UK.shape[0]
    k_nope = einsum(c_kv, W_UK, "b t c, h n c -> b h t n")                             # (5)
    v = einsum(c_kv, W_UV, "b t c, h v c -> b h t v")                                  # (5)
    k_shared = rotate(k_rope, k_table)[:, None]                # [B, 1, T, R]
    k_shared = k_shared.expand(-1, heads, -1, -1)              # [B, H, T, R], no copy
    k = torch.cat((k_nope, k_shared), dim=-1)                  # [B, H, T, N + R]
    q = torch.cat((q_nope, rotate(q_rope, q_table)), dim=-1)   # [B, L, H, N + R]
    o = sdpa(q.transpose(1, 2), k, v, mask, scale)             # [B, H, L, V]     (6) to (8)
    return o.transpose(1, 2)


def attend_absorbed(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, q_table, k_table, scale: float,
                    mask: Tensor | None = None) -> Tensor:
    """Attend to the latents themselves, by (9) and (10).

    All heads share one key, so a head is just one more query: L * H queries of C + R
    channels against T keys, in one matrix product.
    """
    heads = W_UK.shape[0]
    q_latent = einsum(q_nope, W_UK, "b l h n, h n c -> b l h c")                       # (9)
    q = torch.cat((q_latent, rotate(q_rope, q_table)), dim=-1)     # [B, L, H, C + R]
    q = rearrange(q, "b l h d -> b 1 (l h) d")
    k = torch.cat((c_kv, rotate(k_rope, k_table)), dim=-1)         # [B, T, C + R]
    if mask is not None:
        mask = mask.repeat_interleave(heads, dim=0)                # (l, h) may look where l may
    latent = sdpa(q, k[:, None], c_kv[:, None], mask, scale)       # [B, 1, L * H, C]
    latent = rearrange(latent, "b 1 (l h) c -> b l h c", h=heads)                     # (10)
    return einsum(latent, W_UV, "b l h c, h v c -> b l h v")                          # (10)


def attend_cheaper(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, q_table, k_table, scale: float,
                   mask: Tensor | None = None) -> Tensor:
    """Materialised or absorbed, whichever needs fewer operations at these sizes."""
    _, L, H, N = q_nope.shape
    _, T, C = c_kv.shape
    sizes = dict(L=L, T=T, H=H, N=N, R=k_rope.shape[-1], V=W_UV.shape[1], C=C)
    attend = attend_materialised
    if route_flops("absorbed", **sizes) < route_flops("materialised", **sizes):
        attend = attend_absorbed
    return attend(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, q_table, k_table, scale, mask)


def route_flops(route: str, L: int, T: int, H: int, N: int, R: int, V: int, C: int) -> int:
    """Operations of one layer for one video by "absorbed", (12), or by another route, (11)."""
    if route == "absorbed":
        return 2 * L * T * H * (2 * C + R) + 2 * L * H * C * (N + V)                  # (12)
    return 2 * L * T * H * (N + R + V) + 2 * T * H * C * (N + V)                      # (11)


def crossing(N: int, V: int, C: int) -> float:
    """L* of (13): with fewer query tokens (and many keys) absorbing needs fewer operations.

    Infinite where it always does.
    """
    if 2 * C <= N + V:
        return math.inf
    return C * (N + V) / (2 * C - N - V)


# ---- the two layers ------------------------------------------------------------------------
# Both share two methods. `rows(x)` is what tokens leave in the cache, of the `widths` that the
# layer states. `forward(x, rows, ...)` lets the tokens x attend to the rows that it is given
# and to nothing else: in self-attention the caller has put x's own rows among them (cache.peek
# does).


# An RMSNorm adds it to the mean square: float32's last bit, whatever the dtype of the model.
RMS_EPS = 2.0**-23


def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    """A projection [..., inputs] -> [..., outputs]; only Wan's layers have a bias."""
    return nn.Linear(inputs, outputs, bias)


def rms_norm(width: int, norm: bool, eps: float) -> nn.Module:
    """An RMSNorm over the last `width` channels, or nothing."""
    return nn.RMSNorm(width, eps) if norm else nn.Identity()


class Dense(nn.Module):
    """Standard multi-head attention, the baseline. Rows: keys and values, [B, T, H * d_h] each.

    Keys are cached unrotated and whole heads rotate at read; `rope` None means no position at
    all. `norm` is Wan's RMSNorm of queries and keys, over all heads together; `bias` adds Wan's
    biases to all four projections. Raises ValueError for a rope that is narrower than a head.
    """

    def __init__(self, E: int, H: int, rope: Rope3D | None, norm: bool = True,
                 bias: bool = False, eps: float = RMS_EPS):
        super().__init__()
        if rope is not None and rope.channels * H != E:
            raise ValueError(f"dense attention rotates whole heads: {E // H} channels, "
                             f"but its rope has {rope.channels}")
        self.heads = H
        self.rope = rope
        self.scale = (E // H) ** -0.5
        self.widths = (E, E)
        self.W_Q = linear(E, E, bias)
        self.W_K = linear(E, E, bias)
        self.W_V = linear(E, E, bias)
        self.W_O = linear(E, E, bias)
        self.norm_q = rms_norm(E, norm, eps)
        self.norm_k = rms_norm(E, norm, eps)

    def rows(self, x: Tensor) -> Rows:
        """x [B, T, E] to its keys and values, [B, T, E] each."""
        return self.norm_k(self.W_K(x)), self.W_V(x)

    def forward(self, x: Tensor, rows: Rows, q_table: Table | None = None,
                k_table: Table | None = None, mask: Tensor | None = None,
                attend: Route | None = None) -> Tensor:
        """x [B, L, E] attends to `rows` of T tokens: [B, L, E]. (`attend` is for MLA alone.)"""
        k, v = rows
        q = self.norm_q(self.W_Q(x)).unflatten(-1, (self.heads, -1))       # [B, L, H, d_h]
        k = k.unflatten(-1, (self.heads, -1))                              # [B, T, H, d_h]
        v = v.unflatten(-1, (self.heads, -1))                              # [B, T, H, d_h]
        if self.rope is not None:
            q = rotate(q, q_table)
            k = rotate(k, k_table)
        o = sdpa(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, self.scale)
        return self.W_O(o.transpose(1, 2).flatten(2))


class MLA(nn.Module):
    """Multi-head latent attention. Rows: the normed content latent [B, T, C] and the unrotated
    positional key [B, T, R].

    `norm` puts an RMSNorm on both latents, as DeepSeek and the paper do. Without it the layer
    can equal a dense one exactly (`from_dense`). The two pure cases of that equivalence have N
    = 0 (position only) or `rope` None (content only). `scale` is 1 / sqrt(N + R) by default.
    """

    def __init__(self, E: int, H: int, C: int, Q: int, N: int, V: int, rope: Rope3D | None,
                 norm: bool = True, scale: float | None = None, eps: float = RMS_EPS):
        super().__init__()
        R = 0 if rope is None else rope.channels * rope.copies
        self.heads = H
        self.rope = rope
        self.widths = (C, R)
        self.scale = scale if scale is not None else (N + R) ** -0.5      # both parts count (6)
        self.W_DKV = linear(E, C)                                                      # (1)
        self.W_KR = linear(E, R)                                                       # (2)
        self.W_DQ = linear(E, Q)                                                       # (3)
        self.W_UQ = linear(Q, H * N)                                                   # (4)
        self.W_QR = linear(Q, H * R)                                                   # (4)
        self.W_UK = linear(C, H * N)                                                   # (5)
        self.W_UV = linear(C, H * V)                                                   # (5)
        self.W_O = linear(H * V, E)                                                    # (8)
        self.norm_kv = rms_norm(C, norm, eps)
        self.norm_q = rms_norm(Q, norm, eps)

    def rows(self, x: Tensor) -> Rows:
        """x [B, T, E] to (c_kv [B, T, C], k_rope [B, T, R]). The norm is paid once, not at
        every read."""
        c_kv = self.norm_kv(self.W_DKV(x))                                             # (1)
        k_rope = self.W_KR(x)                                                          # (2)
        return c_kv, k_rope

    def forward(self, x: Tensor, rows: Rows, q_table: Table | None = None,
                k_table: Table | None = None, mask: Tensor | None = None,
                attend: Route = attend_cheaper) -> Tensor:
        """x [B, L, E] attends to `rows` of T tokens by the route `attend`: [B, L, E]."""
        c_kv, k_rope = rows
        q = self.norm_q(self.W_DQ(x))                                     # [B, L, Q]    (3)
        q_nope = self.W_UQ(q).unflatten(-1, (self.heads, -1))             # [B, L, H, N]  (4)
        q_rope = self.W_QR(q).unflatten(-1, (self.heads, -1))             # [B, L, H, R]  (4)
        W_UK = self.W_UK.weight.unflatten(0, (self.heads, -1))             # [H, N, C]
        W_UV = self.W_UV.weight.unflatten(0, (self.heads, -1))             # [H, V, C]
        o = attend(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, q_table, k_table, self.scale, mask)
        return self.W_O(o.flatten(2))                                                  # (8)

    @classmethod
    @torch.no_grad()
    def from_dense(cls, dense: Dense, C: int, Q: int | None = None, R: int | None = None,
                   init: str = "spectral") -> "MLA":
        """An MLA layer made from `dense` (built with norm=False), in its dtype, on its device.

        Which channels of a head keep their rotation depends on R:
          dense.rope None   No channel; R = 0. Equal to the dense layer once
                            C >= rank [W_K; W_V].                                       (E1)
          R = H * d_h       All; N = 0. The wide key has a slice for every head, and a head's
                            rope query is zero outside its own; no content is left in the
                            score. Equal to full per-head RoPE once C >= rank W_V.      (E2)
          R < d_h           The R fastest, axis by axis; the others carry content and no
                            longer turn. The heads share the key of (E4). In general inexact;
                            exact if the heads' rope keys agree up to a complex factor a pair,
                            the other pairs do not turn (all positions 0, say), and C >= rank
                            of [K; W_V], K the other channels of W_K. Here the approximation
                            starts.
        Everything else is two cuts by singular value decomposition: `split_content` for keys
        and values, `low_rank` for queries (Q is E by default: exact). The softmax scale is the
        dense layer's. The paper says "SVD-style" and no more. init="random" draws fresh weights
        of the same sizes instead; the paper has such a control, and does not describe it.

        `scale` and `rope` are not among the weights of a state_dict: whoever stores the layer
        must store them, too. engine/convert.py converts whole models, normed ones as well, and
        cuts where their inputs lose least.

        ValueError for a normed or biased layer, an unknown init, or sizes out of range.
        tests/test_full_rank.py.
        """
        E = dense.W_Q.in_features
        H = dense.heads
        d = E // H
        Q = E if Q is None else Q
        if not isinstance(dense.norm_q, nn.Identity) or dense.W_Q.bias is not None:
            raise ValueError("from_dense needs a dense layer without RMSNorm on q and k and "
                             "without biases (norm=False): a norm is not linear")
        if init not in ("spectral", "random"):
            raise ValueError(f"init must be 'spectral' or 'random', got {init!r}")
        turning, rope = turning_channels(dense.rope, R, H, d)
        if not (1 <= C <= E and 1 <= Q <= E):
            raise ValueError(f"C and Q must be between 1 and E = {E}, got C = {C}, Q = {Q}")
        N = d - len(turning)
        mla = cls(E, H, C, Q, N, d, rope, norm=False, scale=dense.scale)
        mla.to(dense.W_Q.weight)                               # its dtype and device
        mla.W_O.weight.copy_(dense.W_O.weight)
        if init == "spectral":
            fill_by_svd(mla, dense, turning)
        return mla


# ---- a dense layer becomes MLA (skip this at first reading) ----------------------------------

def fill_by_svd(mla: MLA, dense: Dense, turning: list[int]) -> None:
    """Copy into `mla` what a dense layer knows; `turning` are the channels of a head that keep
    their rotation. The cases are those of `MLA.from_dense`."""
    H = dense.heads
    C, _ = mla.widths
    Q = mla.W_DQ.out_features
    W_K = dense.W_K.weight.unflatten(0, (H, -1))               # [H, d, E]
    content = [channel for channel in range(W_K.shape[1]) if channel not in turning]

    K = W_K[:, content].flatten(0, 1)                          # [H * N, E]
    W_DKV, W_UK, W_UV = split_content(K, dense.W_V.weight, C)
    mla.W_DKV.weight.copy_(W_DKV)                                                      # (1)
    mla.W_UK.weight.copy_(W_UK)                                                        # (5)
    mla.W_UV.weight.copy_(W_UV)                                                        # (5)

    up, W_DQ = low_rank(dense.W_Q.weight, Q)
    up = up.unflatten(0, (H, -1))                              # [H, d, Q]
    mla.W_DQ.weight.copy_(W_DQ)                                                        # (3)
    mla.W_UQ.weight.copy_(up[:, content].flatten(0, 1))                                # (4)

    if mla.rope is None:                                                              # (E1)
        return
    if not content:                                                                   # (E2)
        mla.W_QR.weight.copy_(own_slices(up))                                          # (4)
        mla.W_KR.weight.copy_(W_K.flatten(0, 1))                                       # (2)
    else:
        alpha, kappa = shared_key(W_K[:, turning])                                    # (E4)
        up = turned_back(up[:, turning], alpha)                # [H, R, Q]
        mla.W_QR.weight.copy_(up.flatten(0, 1))                                        # (4)
        mla.W_KR.weight.copy_(kappa)                                                   # (2)


# One key for heads that differ. To RoPE a pair of channels is one complex number, which it
# turns by a unit factor; a score is Re conj(query) key. Complex factors commute, so one that
# multiplies a head's key can multiply its query instead:
#     Re conj(rot q^h) rot (alpha^h kappa)  =  Re conj(rot (conj(alpha^h) q^h)) rot kappa  (E3)
# Heads whose keys are alpha^h kappa share kappa, exactly; the mean over heads is the case alpha
# = 1. The nearest to any heads is a cut to rank 1 of a pair's H maps to complex numbers,
#     [k^1; ...; k^H]  ~  alpha kappa    of shape [H, E]                                  (E4)


def shared_key(K: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha [H, R/2], complex, and kappa [R, E]) of (E4) from the heads' rope keys K
    [H, R, E]. The mean square of |alpha| over heads is 1."""
    H = len(K)
    k = as_complex(K).transpose(0, 1)                          # [R/2, H, E]
    U, _, _ = torch.linalg.svd(k, full_matrices=False)
    alpha = U[:, :, :1] * H**0.5                               # [R/2, H, 1]
    kappa = alpha.mH @ k / H                                   # [R/2, 1, E]
    kappa = torch.cat((kappa.real, kappa.imag), dim=1)         # [R/2, 2, E]
    return alpha.squeeze(2).T, kappa.flatten(0, 1)


def turned_back(up: Tensor, alpha: Tensor) -> Tensor:
    """(E3): the rope queries `up` [H, R, Q] with conj(alpha), alpha [H, R/2], folded in."""
    q = as_complex(up)                                         # [H, R/2, Q]
    q = q * alpha.conj().unsqueeze(2)
    return torch.stack((q.real, q.imag), dim=2).flatten(1, 2)


def as_complex(W: Tensor) -> Tensor:
    """Maps W [H, R, E] to pairs of neighbouring channels as maps to complex numbers, [H, R/2,
    E], in float32 at least."""
    W = W.to(torch.promote_types(W.dtype, torch.float32))
    a, b = W.unflatten(1, (-1, 2)).unbind(2)
    return torch.complex(a, b)


def turning_channels(rope: Rope3D | None, R: int | None, H: int,
                     d: int) -> tuple[list[int], Rope3D | None]:
    """Which channels of a dense head keep their rotation in MLA, and the rope of the MLA layer.

    The three cases of `MLA.from_dense`; ValueError for an R that is none of them.
    """
    if rope is None and R in (None, 0):
        return [], None
    if rope is None:
        raise ValueError(f"a dense layer without position has nothing to rotate, got R = {R}")
    if R == H * d:
        return list(range(d)), replace(rope, copies=H)
    if R is not None and R < d:
        return fastest_channels(R, d), replace(rope, channels=R)
    raise ValueError(f"R must be H * d_h = {H * d} (exact) or less than d_h = {d} "
                     f"(shared key), got {R}")


def fastest_channels(R: int, d: int) -> list[int]:
    """The R channels of a head of d that turn fastest, in the order in which Rope3D(R, d) has
    them: the first pairs of each axis."""
    chosen = []
    start = 0
    for pairs, pairs_of_full_head in zip(axis_pairs(R), axis_pairs(d)):
        chosen += range(start, start + 2 * pairs)
        start += 2 * pairs_of_full_head
    return chosen


def low_rank(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(up, down) with up @ down as near to W as a product of that rank can be (Eckart-Young).

    By singular values: W = U diag(values) Z, up = (U diag(values))[:, :rank], down = Z[:rank].
    What is left over is the tail of the values. In float32 at least.
    """
    W = W.to(torch.promote_types(W.dtype, torch.float32))
    U, values, Z = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank] * values[:rank], Z[:rank]


def split_content(K: Tensor, W_V: Tensor, C: int) -> tuple[Tensor, Tensor, Tensor]:
    """(W_DKV, W_UK, W_UV) of width C from W_V and K [H * N, E], the content channels of W_K.

    One cut of [K; W_V] together: of all products of width C the nearest to these weights. Both
    are divided by their Frobenius norm before and multiplied back after, so that they count
    alike, whatever scales a layer has learned.
    """
    k_size = frobenius(K)
    v_size = frobenius(W_V)
    up, W_DKV = low_rank(torch.cat((K / k_size, W_V / v_size)), C)
    keys = K.shape[0]
    return W_DKV, up[:keys] * k_size, up[keys:] * v_size


def frobenius(W: Tensor) -> Tensor:
    """The Frobenius norm of W, or 1 if it has no entry but zeros: something to divide by."""
    size = W.norm()
    if W.numel() == 0 or size == 0:
        return W.new_ones(())
    return size


def own_slices(up: Tensor) -> Tensor:
    """Rope queries of (E2) from up [H, d, Q]: [H * (H * d), Q].

    Head h asks with H * d channels, of which only its own slice h is not zero.
    """
    H, d, Q = up.shape
    W_QR = up.new_zeros(H, H, d, Q)                            # [head, slice, d, Q]
    for h in range(H):
        W_QR[h, h] = up[h]
    return W_QR.flatten(0, 2)
