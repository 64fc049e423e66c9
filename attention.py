"""Multi-head latent attention (MLA) four ways, one answer; and the dense attention it replaces.

Dense attention remembers, for every past token, a key and a value per head: 2 * H * d_h numbers. MLA remembers one short
*content latent* shared by all heads and one short *positional key* shared by all heads: C + R numbers.

Letters (a letter never changes its meaning):
    B batch    L query tokens    T key tokens    E model width    H heads    d_h = N + R = V in the paper
    N content ("nope") channels per head    R rope channels, one shared key    V value channels per head
    C content latent width (192)            Q query latent width (768)

Derivation. For a token x [E], with (x) the RMSNorm of the latents left out:
    c_kv   = W_DKV x                    [C]        what is cached: content, no position                       (1)
    k_rope = W_KR x                     [R]        what is cached: position's carrier, not yet rotated        (2)
    q      = W_DQ x                     [Q]        queries are never cached, their latent only saves weights  (3)
    q_nope = W_UQ^h q                   [N]        q_rope = W_QR^h q  [R]                                     (4)
    k_nope = W_UK^h c_kv                [N]        v      = W_UV^h c_kv  [V]                                  (5)
    s_h(l, t) = (q_nope . k_nope + rot(q_rope, p_l) . rot(k_rope, p_t)) * scale,   scale = 1 / sqrt(N + R)    (6)
    p_h = softmax_t(s_h)                                                                                      (7)
    o_h(l) = sum_t p_h(l, t) v_h(t),    y = W_O [o_1 .. o_H]                                                  (8)

Absorption is associativity and nothing else. The content score is a product of three factors, and so is the output:
    q_nope . (W_UK c)          = (W_UK^T q_nope) . c          so the *query* can be lifted to the latent      (9)
    sum_t p(t) (W_UV c(t))     = W_UV (sum_t p(t) c(t))       so the *mean* can be taken over latents         (10)
Then no key or value of any head ever exists: it is multi-query attention with one key [c_kv | rot(k_rope)] of C + R
channels for all heads, whose value c_kv is a slice of that key. (Do not pre-multiply W_UK^T W_UQ into one matrix:
H * C * Q weights instead of H * N * (C + Q), slower and larger.) Rotation is why R is split off: with RoPE between W_UK
and q the bracket in (9) would contain a matrix that depends on l - t, and could not be moved. For the same reason
nothing may be normalised *after* the up-projection (5): a norm is not linear, (9) would no longer hold.

What each order of brackets costs, per layer, multiply-adds times two:
    materialised:  2 L T H (N + R + V)   + 2 T H C (N + V)        up-projects every *key*                     (11)
    absorbed:      2 L T H (2 C + R)     + 2 L H C (N + V)        up-projects every *query*                   (12)
Equal, for T >> L, at                L* = C (N + V) / (2 C - N - V),  269 tokens at the paper's geometry      (13)
Fewer query tokens: absorb. A language model decodes L = 1, so "absorb when decoding" became folklore. A video *chunk* is
L = 4680 tokens: there absorption costs 1.57x the operations, and what it buys is memory (no K and V scratch). And where
2 C <= N + V (our toy: C = 16, N + V = 56) the crossing does not exist: absorbed needs fewer operations at every L.

tests/test_routes.py: the routes agree, in outputs and gradients; (11)-(13) equal torch's own count exactly.
"""

import functools
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fused
from rope3d import Rope3D, axis_pairs, rotate

Table = tuple[Tensor, Tensor]                              # (cos, sin), each [tokens, R/2]

Spans = list[tuple[slice, list[slice]]]                    # (query tokens, all the key tokens they see): a mask in block form


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Spans | None, scale: float) -> Tensor:
    """softmax(q k^T scale) v for q [B, H, L, d], k [B, H, T, d], v [B, H, T, V]. With `Spans` instead of a mask, the blocks that
    nobody may see are never computed; for teacher forcing that is two thirds of the square."""
    if isinstance(mask, list):
        return torch.cat([sdpa(q[:, :, rows], *(torch.cat([part[:, :, see] for see in keys], dim=2) for part in (k, v)), None, scale)
                          for rows, keys in mask], dim=2)
    if q.device.type == "cpu" and mask is None and q.shape[2] * k.shape[2] <= 2**16:
        return (q @ k.mT * scale).softmax(dim=-1) @ v      # few scores: two plain products beat the CPU's tiled kernel severalfold
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


# Every route has this signature. q_nope [B, L, H, N], q_rope [B, L, H, R], c_kv [B, T, C], k_rope [B, T, R], both rope parts
# unrotated; W_UK [H, N, C], W_UV [H, V, C]; tables of the query and key positions; mask bool [L, T], True = may look
# (materialised takes Spans, too). Returns [B, L, H, V].

def attend_reference(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, q_table, k_table, scale, mask=None) -> Tensor:
    """Equations (5)-(8), line by line. Slow, holds all L x T scores, and is what the other routes are tested against."""
    k_nope = einsum(c_kv, W_UK, "b t c, h n c -> b t h n")                                                    # (5)
    v = einsum(c_kv, W_UV, "b t c, h v c -> b t h v")                                                         # (5)
    content = einsum(q_nope, k_nope, "b l h n, b t h n -> b h l t")                                           # (6)
    position = einsum(rotate(q_rope, q_table), rotate(k_rope, k_table), "b l h r, b t r -> b h l t")          # (6)
    score = (content + position) * scale                                                                      # (6)
    if mask is not None:
        score = score.masked_fill(~mask, -math.inf)
    return einsum(score.softmax(dim=-1), v, "b h l t, b t h v -> b l h v")                                    # (7) (8)


def attend_materialised(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, q_table, k_table, scale, mask=None) -> Tensor:
    """Keys and values of every head are made from the latents, then forgotten: standard attention, which at the
    paper's widths (N + R = V = 128) every fast kernel takes."""
    k_nope = einsum(c_kv, W_UK, "b t c, h n c -> b h t n")                                                    # (5)
    v = einsum(c_kv, W_UV, "b t c, h v c -> b h t v")                                                         # (5)
    shared = rotate(k_rope, k_table)[:, None].expand(-1, W_UK.shape[0], -1, -1)    # one positional key for all heads
    q = torch.cat((q_nope, rotate(q_rope, q_table)), dim=-1).transpose(1, 2)       # [B, H, L, N + R]
    k = torch.cat((k_nope, shared), dim=-1)                                        # [B, H, T, N + R]
    return sdpa(q, k, v, mask, scale).transpose(1, 2)                              # (6)-(8)


def attend_absorbed(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, q_table, k_table, scale, mask=None) -> Tensor:
    """Attention on the latents themselves, by (9) and (10). All heads share one key, so heads are just more query
    rows: [B, L * H, C + R] against [B, T, C + R], one matrix product."""
    heads = W_UK.shape[0]
    q_latent = einsum(q_nope, W_UK, "b l h n, h n c -> b l h c")                                              # (9)
    q = torch.cat((q_latent, rotate(q_rope, q_table)), dim=-1).flatten(1, 2)       # [B, L * H, C + R]
    k = torch.cat((c_kv, rotate(k_rope, k_table)), dim=-1)                         # [B, T, C + R], of which c_kv is the value
    if mask is not None:
        mask = mask.repeat_interleave(heads, dim=0)                                # a row (l, h) may look where l may
    latent = sdpa(q[:, None], k[:, None], c_kv[:, None], mask, scale)
    latent = rearrange(latent, "b 1 (l h) c -> b l h c", h=heads)                                             # (10)
    return einsum(latent, W_UV, "b l h c, h v c -> b l h v")                                                  # (10)


@torch.compiler.assume_constant_result
def _generation(index: int | None) -> int:
    return torch.cuda.get_device_capability(index)[0]


def why_not_fused(device: torch.device, dtype: torch.dtype, N: int, R: int, V: int, C: int, mask=None,
                  needs_grad: bool = False) -> str | None:
    """Why `attend_fused` would refuse such a call, in words that follow "route='fused'"; None if it takes it."""
    if mask is not None:
        return "takes no mask (it is the path of a cached chunk, which sees every key)"
    if needs_grad:
        return "is inference only (wrap it in torch.no_grad())"
    if not fused.HAS_TRITON:
        return "needs Triton, which is not installed here"
    if device.type != "cuda" and not fused.INTERPRETED:
        return f"runs on a CUDA GPU, not on {device.type}"
    if device.type == "cuda" and _generation(device.index) not in (9, 10):
        return "needs a Hopper or datacentre Blackwell GPU (compute capability 9.x or 10.x)"
    if C % 16 or not 16 <= C <= 256 or R % 8 or not 8 <= R <= 64 or (N + R) % 8 or N + R > 128 or V % 8 or V > 128:
        return f"takes C a multiple of 16 up to 256, R of 8 up to 64, N + R and V of 8 up to 128, not C={C}, R={R}, N + R={N + R}, V={V}"
    if dtype not in ((torch.float32,) if fused.INTERPRETED else (torch.bfloat16, torch.float16)):
        return f"takes bfloat16 or float16 (in Triton's interpreter float32), not {dtype}"
    return None


def _expand(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, q_table, k_table) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, L, N+R], k [B, H, T, N+R], v [B, H, T, V] for SDPA, from unrotated rope parts.

    Identity-augmented: k = [c_kv | rotated k_rope] @ [[W_UK, 0], [0, I]], so each key is written once, by the product itself; making
    k_nope and concatenating would write 100 MB at the paper's size twice. The values' rows are a slice of the same left-hand side.
    """
    H, N, C = W_UK.shape
    R = k_rope.shape[-1]
    row = torch.cat((c_kv, rotate(k_rope, k_table)), dim=-1)                                       # [B, T, C + R]
    eye = torch.eye(R, device=row.device, dtype=row.dtype)[:, None].expand(R, H, R)
    W_K = torch.cat((F.pad(W_UK.permute(2, 0, 1), (0, R)), F.pad(eye, (N, 0))))                    # [C + R, H, N + R]
    k = (row @ W_K.flatten(1)).unflatten(-1, (H, N + R))
    v = (row[..., :C] @ W_UV.flatten(0, 1).T).unflatten(-1, (H, -1))
    q = torch.cat((q_nope, rotate(q_rope, q_table)), dim=-1)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


@functools.cache
def _compiled(function):
    """For callers that are not compiled themselves: the elementwise parts fused, compiled at the first call and never at import."""
    return torch.compile(function, fullgraph=True)


# torch prefers cuDNN on Hopper and Blackwell; with neither of the two SDPA raises: no quiet third choice. (Never set_priority=True: leaving
# it may write back an order in which flash is first, and then every later SDPA of the process, dense layers too, is slow.)
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
SCRATCH = 2**31                 # bytes of K and V at a time; beyond it the videos of a batch take turns (paper: 201 MB a video)


def attend_fused(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, q_table, k_table, scale, mask=None, cut: int | None = None) -> Tensor:
    """The route for GPUs, same signature and answer as the others (test_fast_path.py): `plan` says which query tokens
    go to cuDNN by way of K and V and which to `latent_attention`; `cut` overrides it. Raises ValueError, in a line that names the route
    that works, for what it does not take (`why_not_fused`)."""
    (B, L, H, N), (T, C), R, V = q_nope.shape, c_kv.shape[1:], k_rope.shape[-1], W_UV.shape[1]
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q_nope, q_rope, c_kv, k_rope, W_UK, W_UV))
    reason = why_not_fused(q_nope.device, q_nope.dtype, N, R, V, C, mask, needs_grad)
    if reason:
        raise ValueError(f"route='fused' {reason}; use route='materialised'")
    per_video = T * H * (N + R + V) * q_nope.element_size()
    videos = max(1, SCRATCH // per_video)
    if B > videos:
        turns = (x.split(videos) for x in (q_nope, q_rope, c_kv, k_rope))
        return torch.cat([attend_fused(*turn, W_UK, W_UV, q_table, k_table, scale, None, cut) for turn in zip(*turns)])
    if cut is None:
        cut = fused.plan_on(q_nope.device.index, B, L, T, H, N, R, V, C) if q_nope.is_cuda else 0
    out, (head, tail) = [], ([part[at] for part in q_table] for at in (slice(cut), slice(cut, None)))
    if cut:
        expand = _compiled(_expand) if q_nope.is_cuda and not torch.compiler.is_compiling() else _expand
        q, k, v = expand(q_nope[:, :cut], q_rope[:, :cut], c_kv, k_rope, W_UK, W_UV, head, k_table)
        with sdpa_kernel(BACKENDS if q.is_cuda else [SDPBackend.MATH]):
            out.append(F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2))       # [B, cut, H, V]
    if cut < L:
        latent = fused.latent_attention(q_nope[:, cut:], q_rope[:, cut:], c_kv, k_rope, W_UK, *tail, *k_table, scale)     # [B, H, L, C]
        out.append(torch.einsum("bhlc,hvc->blhv", latent, W_UV))
    return out[0] if len(out) == 1 else torch.cat(out, dim=1)


ROUTES = {"reference": attend_reference, "materialised": attend_materialised, "absorbed": attend_absorbed, "fused": attend_fused}


def route_flops(route: str, L: int, T: int, H: int, N: int, R: int, V: int, C: int) -> int:
    """Operations of one layer for one video, (11) and (12); the reference does what materialised does."""
    if route == "absorbed":
        return 2 * L * T * H * (2 * C + R) + 2 * L * H * C * (N + V)                                          # (12)
    return 2 * L * T * H * (N + R + V) + 2 * T * H * C * (N + V)                                              # (11)


def crossing(N: int, V: int, C: int) -> float:
    """L* of (13): with fewer query tokens (and many keys) absorbed needs fewer operations; infinite if it always does."""
    return C * (N + V) / (2 * C - N - V) if 2 * C > N + V else math.inf


def route_counts(route: str, B: int, L: int, T: int, H: int, N: int, R: int, V: int, C: int, gpu: fused.Gpu) -> tuple:
    """What one layer costs in bfloat16, counted in the order of `fused.Gpu`: launches, keys and wide keys per wave, kernel operations,
    product operations, bytes. `gpu.seconds` makes a predicted time of it, which experiments/bench.py prints beside the clock."""
    if route == "fused":
        return fused.form_counts(fused.plan(B, L, T, H, N, R, V, C, gpu), B, L, T, H, N, R, V, C, gpu.sms)
    if route == "absorbed":                                                            # one key head: rows are (token, head)
        return 9, 0, fused.waves(L * H, B, gpu.sms) * T, 0, 2 * B * L * H * C * (N + V), 4 * B * (2 * L * H + T) * (C + R)
    made, up = 2 * B * (T * H * (N + R + V) + L * H * (N + R)), 2 * B * T * H * C * (N + V)        # bytes of q, k, v; up-projection
    if route == "materialised":                                                        # parts made, then joined: three passes
        return 9, fused.waves(L, B * H, gpu.sms) * T, 0, 0, up, 3 * made
    return 10, 0, 0, 0, up + 2 * B * L * T * H * (N + R + V), made + 18 * B * H * L * T            # a score: 9 passes of 2 bytes


def choose_route(L: int, T: int, H: int, N: int, R: int, V: int, C: int, *, B: int = 1, gpu: fused.Gpu | None = None,
                 fusable: bool = False) -> str:
    """What route="auto" takes. On a GPU with measured constants the route with the least predicted time, "fused" among them if `fusable`;
    elsewhere the one with fewer operations, (11) against (12), or fused (whose `plan` counts likewise) where it runs."""
    if gpu is not None:
        names = ("reference", "materialised", "absorbed") + (("fused",) if fusable else ())
        return min(names, key=lambda route: gpu.seconds(route_counts(route, B, L, T, H, N, R, V, C, gpu)))
    if fusable:
        return "fused"
    return min(("materialised", "absorbed"), key=lambda route: route_flops(route, L, T, H, N, R, V, C))


@torch.compiler.assume_constant_result
def _choose_on(index: int | None, fusable: bool, B: int, *sizes: int) -> str:
    """`choose_route` for CUDA device `index`; for torch.compile a constant, as fused.plan_on."""
    return choose_route(*sizes, B=B, gpu=fused.gpu_constants(index), fusable=fusable)


# ---- The two layers -------------------------------------------------------------------------------------------------
# In both `rows(x)` is what a token leaves in the cache, `widths` how wide that is, and `forward(x, rows, ...)` attends from the tokens x
# to the rows it is given, its own included. Who may see whom is decided outside.


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A projection [..., inputs] -> [..., outputs] with no bias: every projection of attention is a plain matrix here."""
    return nn.Linear(inputs, outputs, bias=False)


class Dense(nn.Module):
    """Standard multi-head attention, the baseline: rows are the keys and values of every head, [B, L, H * d_h] each.

    Keys are cached unrotated and all d_h channels rotate at read (`rope` None: no position at all). `norm` is Wan's
    RMSNorm of queries and keys over all heads together.
    """

    def __init__(self, E: int, H: int, rope: Rope3D | None, norm: bool = True):
        super().__init__()
        if rope is not None and rope.channels * H != E:
            raise ValueError(f"dense attention rotates whole heads: {E // H} channels, but its rope has {rope.channels}")
        self.heads, self.rope, self.scale, self.widths = H, rope, (E // H) ** -0.5, (E, E)
        self.W_Q, self.W_K, self.W_V, self.W_O = (linear(E, E) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(E) if norm else nn.Identity() for _ in range(2))

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm_k(self.W_K(x)), self.W_V(x)

    def forward(self, x, rows, q_table=None, k_table=None, mask=None, route="auto") -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (self.norm_q(self.W_Q(x)), *rows))
        if self.rope is not None:
            q, k = rotate(q, q_table), rotate(k, k_table)
        o = sdpa(*(part.transpose(1, 2) for part in (q, k, v)), mask, self.scale)
        return self.W_O(o.transpose(1, 2).flatten(2))


class MLA(nn.Module):
    """Multi-head latent attention: rows are the normed content latent [B, L, C] and the unrotated positional key [B, L, R].

    `norm` puts an RMSNorm on both latents, as DeepSeek does; without it the layer is linear in its weights' products
    and can equal a dense layer exactly (`from_dense`). N = 0 (position only) and `rope` None (content only) are the two
    pure cases of that equivalence. `scale` defaults to 1 / sqrt(N + R).
    """

    def __init__(self, E: int, H: int, C: int, Q: int, N: int, V: int, rope: Rope3D | None, norm: bool = True,
                 scale: float | None = None):
        super().__init__()
        R = rope.channels * rope.copies if rope is not None else 0
        self.heads, self.rope, self.widths = H, rope, (C, R)
        self.scale = (N + R) ** -0.5 if scale is None else scale                      # both parts: without R scores run hot
        self.W_DKV, self.W_KR = linear(E, C), linear(E, R)                                                    # (1) (2)
        self.W_DQ, self.W_UQ, self.W_QR = linear(E, Q), linear(Q, H * N), linear(Q, H * R)                    # (3) (4)
        self.W_UK, self.W_UV = linear(C, H * N), linear(C, H * V)                                             # (5)
        self.W_O = linear(H * V, E)                                                                           # (8)
        self.norm_kv, self.norm_q = (nn.RMSNorm(width) if norm else nn.Identity() for width in (C, Q))

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm_kv(self.W_DKV(x)), self.W_KR(x)                              # the norm is paid once, not per read

    def forward(self, x, rows, q_table=None, k_table=None, mask=None, route="auto") -> Tensor:
        c_kv, k_rope = rows
        W_UK, W_UV = (W.weight.unflatten(0, (self.heads, -1)) for W in (self.W_UK, self.W_UV))
        q = self.norm_q(self.W_DQ(x))                                                                         # (3)
        q_nope, q_rope = (W(q).unflatten(-1, (self.heads, -1)) for W in (self.W_UQ, self.W_QR))               # (4)
        if route == "auto":
            route = self.route_for(x, c_kv.shape[1], mask)
        o = ROUTES[route](q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, q_table, k_table, self.scale, mask)
        return self.W_O(o.flatten(2))                                                                         # (8)

    def route_for(self, x: Tensor, T: int, mask=None) -> str:
        """The name of the route that "auto" takes for tokens x [B, L, E] (device and dtype count) and T visible keys."""
        B, L, H, (C, R) = *x.shape[:2], self.heads, self.widths
        N, V = self.W_UK.out_features // H, self.W_UV.out_features // H
        if x.device.type != "cuda":                        # where it is interpreted, fused runs when asked for, not by itself
            return choose_route(L, T, H, N, R, V, C)
        needs_grad = torch.is_grad_enabled() and (x.requires_grad or self.W_UK.weight.requires_grad)
        fusable = why_not_fused(x.device, x.dtype, N, R, V, C, mask, needs_grad) is None
        return _choose_on(x.device.index, fusable, B, L, T, H, N, R, V, C)

    @classmethod
    @torch.no_grad()
    def from_dense(cls, dense: Dense, C: int, Q: int | None = None, R: int | None = None, init: str = "spectral") -> "MLA":
        """The MLA layer nearest to a dense one (built with norm=False), in the dense layer's dtype and on its device.

        Content: one SVD of [W_K; W_V] = U S Z (nope rows of W_K only), cut at C, gives W_DKV = Z[:C] and
        [W_UK; W_UV] = (U S)[:, :C]: among all latents of width C the one with the least squared error of keys and values
        together (Eckart-Young: what is left is the tail of S). K is divided by its Frobenius norm and V by its own before, and
        multiplied back after, so that both count alike whatever the scales a layer learned.
        Queries: the SVD of W_Q cut at Q (default: all E, exact).
        Position, with R channels:
          dense.rope None   no position, R = 0: equal to the dense layer once C >= rank [W_K; W_V]                       (E1)
          R = H * d_h       a slot of the wide key per head, no content in the score: equal to full per-head RoPE once
                            C >= rank W_V; each head's rope query is zero outside its own slot                           (E2)
          R < d_h           the paper's spectral initialisation: the R fastest channels of each head rotate, their keys
                            are averaged over heads (the shared key nearest to all of them), the other d_h - R carry content
                            and no longer turn. Exact if the heads agree on the rope keys, the slow bands stand still and
                            C >= rank: this is where the approximation starts.
        The softmax scale is the dense layer's. init="random" keeps these sizes and draws fresh weights instead (the paper's control).
        Raises ValueError for a normed dense layer, an unknown init, or C, Q, R out of range. tests/test_full_rank.py.
        """
        E, H, d = dense.W_Q.in_features, dense.heads, dense.W_Q.in_features // dense.heads
        Q = E if Q is None else Q
        if not isinstance(dense.norm_q, nn.Identity):
            raise ValueError("from_dense needs a dense layer without RMSNorm on q and k (norm=False): a norm is not linear")
        if init not in ("spectral", "random"):
            raise ValueError(f"init must be 'spectral' or 'random', got {init!r}")
        W_Q, W_K, W_V = (W.weight.unflatten(0, (H, d)) for W in (dense.W_Q, dense.W_K, dense.W_V))      # [H, d, E]
        content, turning, rope = list(range(d)), [], None                              # channels of a head: nope, rope
        if dense.rope is not None:
            if R == H * d:
                content, turning, rope = [], list(range(d)), replace(dense.rope, copies=H)
            elif R is not None and R < d:
                rope = replace(dense.rope, channels=R)
                turning = fastest_channels(R, d)
                content = [i for i in content if i not in turning]
            else:
                raise ValueError(f"R must be H * d_h = {H * d} (exact) or less than d_h = {d} (shared key), got {R}")
        if not (1 <= C <= E and 1 <= Q <= E):
            raise ValueError(f"C and Q must be between 1 and E = {E}, got C = {C}, Q = {Q}")
        N = len(content)
        mla = cls(E, H, C, Q, N, d, rope, norm=False, scale=dense.scale).to(W_Q)
        mla.W_O.weight.copy_(dense.W_O.weight)
        if init == "random":
            return mla
        K, V = W_K[:, content].flatten(0, 1), W_V.flatten(0, 1)
        k_size, v_size = ((W.norm() if W.numel() and W.norm() > 0 else W.new_ones(())) for W in (K, V))
        U, S, Z = torch.linalg.svd(torch.cat((K / k_size, V / v_size)), full_matrices=False)
        up = U[:, :C] * S[:C]
        mla.W_DKV.weight.copy_(Z[:C])                                                                         # (1)
        mla.W_UK.weight.copy_(up[:H * N] * k_size)                                                            # (5)
        mla.W_UV.weight.copy_(up[H * N:] * v_size)                                                            # (5)
        U, S, Z = torch.linalg.svd(W_Q.flatten(0, 1), full_matrices=False)
        mla.W_DQ.weight.copy_(Z[:Q])                                                                          # (3)
        up = (U[:, :Q] * S[:Q]).unflatten(0, (H, d))                                   # [H, d, Q]
        mla.W_UQ.weight.copy_(up[:, content].flatten(0, 1))                                                   # (4)
        if R == H * d and rope is not None:
            mla.W_QR.weight.copy_(torch.block_diag(*up.transpose(1, 2)).unflatten(0, (H, Q)).transpose(1, 2).flatten(0, 1)) # (E2)
            mla.W_KR.weight.copy_(W_K.flatten(0, 1))                                                          # (2)
        elif rope is not None:
            mla.W_QR.weight.copy_(up[:, turning].flatten(0, 1))                                               # (4)
            mla.W_KR.weight.copy_(W_K[:, turning].mean(dim=0))                                                # (2)
        return mla


def fastest_channels(R: int, d: int) -> list[int]:
    """Which R channels of a head of d carry the highest-frequency pairs of each axis, in the order in which `Rope3D(R, d)`
    lays them out: the first pairs of each axis' own stretch."""
    start, chosen = 0, []
    for mine, full in zip(axis_pairs(R), axis_pairs(d)):
        chosen += range(start, start + 2 * mine)
        start += 2 * full
    return chosen
