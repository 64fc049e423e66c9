"""A dense layer with norms and biases as MLA, exactly: latents in homogeneous coordinates.

`MLA.from_dense` (attention.py) needs a plain layer. Wan's have biases everywhere and an RMSNorm
of queries and keys, over all heads together:

    k = g_K * (W_K x + b_K) / rho(x),    rho(x) = sqrt(mean (W_K x + b_K)^2 + eps)       (H1)
    v = W_V x + b_V                      q = g_Q * (W_Q x + b_Q) / rho_Q(x)

A norm behind the up-projection is what absorption cannot have, since it is not linear. But this
one divides by a *number*, the same for all heads. Let c = W_DKV x, W_K = A W_DKV and W_V = W_UV
W_DKV, and cache

    s = [c ; 1] / rho            C + 1 numbers; the last, s_1 = 1 / rho, tells rho       (H2)
    k_rope = (W_KR x + b_KR) / rho                                                       (H3)

As points of projective space s and [c ; 1] are the same, and everything is linear in s again:

    k_nope = [W_UK | b_UK] s,    W_UK = g_K * A and b_UK = g_K * b_K, content rows       (H4)
    v      = [W_UV | b_V] (s / s_1)                                                      (H5)
    sum_t p_t v_t  =  [W_UV | b_V]  sum_t p_t (s_t / s_1,t)                              (H6)

So queries are lifted to s as they were to c, (9) of attention.py, and what is summed is s / s_1
= [c ; 1], (10): one cached row is key and value, as in MLA. Where rho comes from: A c + b_K is
W_K x + b_K, so

    rho^2 = |F [c ; 1]|^2 + eps,    F^T F = [A | b_K]^T [A | b_K] / E                    (H7)

with F of C + 1 by C + 1 numbers: the layer needs no W_K. Queries are not cached, so their norm
stays where it is, and W_Q is the dense layer's.

Exact where C >= rank [W_K; W_V] and, for what turns, in the three cases of MLA.from_dense: no
rope; R = H * d_h, a slice a head; or a shared key of R < d_h channels, where heads agree up to
complex factors (E4) and the other channels do not turn. Below that it is an approximation by
the same cuts, of which three parts stay exact: queries, biases, gains and W_O, at any C; content
and rho for inputs that lie in no more than C directions, if their moment says so (C1); and what
does not turn in (H3). tests/test_homogeneous.py: norms and biases on and off, both routes, masks.

MLA of attention.py cannot hold such rows: it has no constant beside its latent, and its norm
divides the latent for values as well. So a released model becomes a `HomogeneousDiT`, in which
this layer stands for the dense one. It trains, streams and is saved as any model is; its config
says attention "homogeneous". Only sizes of `HomogeneousConfig` and its layer are new.
"""

import copy
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from attention import (Dense, Route, attend_absorbed, attend_materialised, linear, sdpa,
                       shared_key, split_content, turning_channels)
from cache import Rows
from engine.convert import roots
from mla_video import Config, VideoDiT, need
from rope3d import Rope3D, Table, rotate


class HomogeneousMLA(nn.Module):
    """MLA made of a dense layer with norms and biases. Rows: s [B, T, C + 1] and k_rope
    [B, T, R], (H2) and (H3). Interface of `MLA`; of the routes it knows two: `attend_absorbed`,
    and for any other it materialises.

    `turning` are the channels of a head that turn, `alpha` [H, R/2] their complex factors (E3);
    none for a slice of the key a head, R = H * d_h. `eps` is that of the keys' norm; None: they
    have none, and rho is 1.
    """

    def __init__(self, dense: Dense, C: int, turning: list[int], rope, eps: float | None):
        super().__init__()
        E = dense.W_Q.in_features
        H = dense.heads
        d = E // H
        R = 0 if rope is None else rope.channels * rope.copies
        self.heads = H
        self.rope = rope
        self.scale = dense.scale
        self.eps = eps
        self.widths = (C + 1, R)
        self.turning = runs(turning)
        content = [channel for channel in range(d) if channel not in turning]
        self.content = runs(content)
        N = len(content)
        self.W_Q = copy.deepcopy(dense.W_Q)
        self.norm_q = copy.deepcopy(dense.norm_q)
        self.W_DKV = linear(E, C)
        self.W_KR = nn.Linear(E, R)                                                   # (H3)
        self.W_UK = linear(C + 1, H * N)                                              # (H4)
        self.W_UV = linear(C + 1, H * d)                                              # (H5)
        self.W_size = linear(C + 1, C + 1)                                            # F, (H7)
        self.W_O = copy.deepcopy(dense.W_O)
        self.alpha = nn.Parameter(torch.ones(2, H, len(turning) // 2))     # real, imaginary

    def rows(self, x: Tensor) -> Rows:
        """x [B, T, E] to (s [B, T, C + 1], k_rope [B, T, R])."""
        c = F.pad(self.W_DKV(x), (0, 1), value=1.0)                       # [c ; 1]
        k_rope = self.W_KR(x)
        if self.eps is None:
            return c, k_rope
        size = self.W_size(c).square().sum(dim=-1, keepdim=True)                      # (H7)
        rho = (size + self.eps).sqrt()                                    # [B, T, 1]
        return c / rho, k_rope / rho                                      # (H2), (H3)

    def forward(self, x: Tensor, rows: Rows, q_table: Table | None = None,
                k_table: Table | None = None, mask: Tensor | None = None,
                attend: Route = attend_materialised) -> Tensor:
        """x [B, L, E] attends to `rows` of T tokens: [B, L, E]."""
        s, k_rope = rows
        q = self.norm_q(self.W_Q(x)).unflatten(-1, (self.heads, -1))      # [B, L, H, d]
        q_nope = channels(q, self.content)                                # [B, L, H, N]
        q_turned = rotate(self.rope_queries(q), q_table)                  # [B, L, H, R]
        k_turned = rotate(k_rope, k_table)                                # [B, T, R]
        W_UK = self.W_UK.weight.unflatten(0, (self.heads, -1))            # [H, N, C + 1]
        W_UV = self.W_UV.weight.unflatten(0, (self.heads, -1))            # [H, d, C + 1]
        make = absorbed if attend is attend_absorbed else materialised
        o = make(q_nope, q_turned, s, k_turned, W_UK, W_UV, self.scale, mask)
        return self.W_O(o.flatten(2))

    def rope_queries(self, q: Tensor) -> Tensor:
        """q [B, L, H, d] to what asks the positional key, [B, L, H, R]."""
        if not self.turning:
            return q[..., :0]
        if not self.content:                                              # (E2): its own slice
            own = torch.eye(self.heads, dtype=q.dtype, device=q.device)
            return einsum(q, own, "b l h d, h k -> b l h k d").flatten(3)
        batch = q.shape[0]
        real, imaginary = self.alpha
        q = channels(q, self.turning)
        turned = rotate(q.flatten(0, 1), (real, -imaginary))                          # (E3)
        return turned.unflatten(0, (batch, -1))


def runs(numbers: list[int]) -> list[slice]:
    """Rising numbers as slices: 0 1 2 5 6 are [0:3] and [5:7]. (A list as an index would be
    copied to a GPU at every call, which a CUDA graph cannot hold.)"""
    found = []
    for number in numbers:
        if found and found[-1].stop == number:
            found[-1] = slice(found[-1].start, number + 1)
        else:
            found.append(slice(number, number + 1))
    return found


def channels(x: Tensor, which: list[slice]) -> Tensor:
    """The channels `which` of x [..., d]."""
    if not which:
        return x[..., :0]
    return torch.cat([x[..., run] for run in which], dim=-1)


def materialised(q_nope, q_turned, s, k_turned, W_UK, W_UV, scale, mask) -> Tensor:
    """Keys and values of every head by (H4) and (H5): [B, L, H, d]. Positions are turned."""
    heads = W_UK.shape[0]
    k_nope = einsum(s, W_UK, "b t c, h n c -> b h t n")                               # (H4)
    v = einsum(s / s[..., -1:], W_UV, "b t c, h v c -> b h t v")                      # (H5)
    k_shared = k_turned[:, None].expand(-1, heads, -1, -1)                # [B, H, T, R]
    k = torch.cat((k_nope, k_shared), dim=-1)                             # [B, H, T, N + R]
    q = torch.cat((q_nope, q_turned), dim=-1)
    return sdpa(q.transpose(1, 2), k, v, mask, scale).transpose(1, 2)


def absorbed(q_nope, q_turned, s, k_turned, W_UK, W_UV, scale, mask) -> Tensor:
    """The same from the cached rows themselves, all heads against one key, by (H6)."""
    heads = W_UK.shape[0]
    q_latent = einsum(q_nope, W_UK, "b l h n, h n c -> b l h c")
    q = torch.cat((q_latent, q_turned), dim=-1)                           # [B, L, H, C + 1 + R]
    q = rearrange(q, "b l h d -> b 1 (l h) d")
    k = torch.cat((s, k_turned), dim=-1)[:, None]                         # [B, 1, T, C + 1 + R]
    v = (s / s[..., -1:])[:, None]                                        # [B, 1, T, C + 1]
    if mask is not None:
        mask = mask.repeat_interleave(heads, dim=0)
    latent = sdpa(q, k, v, mask, scale)                                   # [B, 1, L H, C + 1]
    latent = rearrange(latent, "b 1 (l h) c -> b l h c", h=heads)
    return einsum(latent, W_UV, "b l h c, h v c -> b l h v")


# ---- from a dense layer ----------------------------------------------------------------------

@torch.no_grad()
def from_dense(dense: Dense, C: int, R: int | None = None,
               moment: Tensor | None = None) -> HomogeneousMLA:
    """The layer of width C + 1 that a dense one becomes, in its dtype and on its device; R as
    in `MLA.from_dense`. `moment` [E, E] is that of the layer's inputs (engine/convert.py, C1);
    without one every direction counts alike.

    Raises ValueError for C or R out of range.
    """
    E = dense.W_Q.in_features
    H = dense.heads
    if not 1 <= C <= E:
        raise ValueError(f"C must be between 1 and E = {E}, got {C}")
    turning, rope = turning_channels(dense.rope, R, H, E // H)
    normed = isinstance(dense.norm_k, nn.RMSNorm)
    eps = None
    if normed:
        eps = dense.norm_k.eps or torch.finfo(dense.W_K.weight.dtype).eps
    mla = HomogeneousMLA(dense, C, turning, rope, eps).to(dense.W_Q.weight)

    wide = torch.float64
    W_K, b_K = matrix_and_bias(dense.W_K, wide)
    W_V, b_V = matrix_and_bias(dense.W_V, wide)
    gain = dense.norm_k.weight.to(wide) if normed else torch.ones_like(b_K)
    K = (gain[:, None] * W_K).unflatten(0, (H, -1))                       # [H, d, E]
    bias = (gain * b_K).unflatten(0, (H, -1))                             # [H, d]
    M = torch.eye(E, dtype=wide, device=W_K.device) if moment is None else moment.to(W_K)
    S, inverse = roots(M)

    content = [channel for channel in range(E // H) if channel not in turning]
    white = K[:, content].flatten(0, 1) @ S
    W_DKV, W_UK, W_UV = split_content(white, W_V @ S, C)
    W_DKV = W_DKV @ inverse
    b_UK = bias[:, content].flatten()
    mla.W_DKV.weight.copy_(W_DKV)
    mla.W_UK.weight.copy_(torch.cat((W_UK, b_UK[:, None]), dim=1))                    # (H4)
    mla.W_UV.weight.copy_(torch.cat((W_UV, b_V[:, None]), dim=1))                     # (H5)
    nearest = W_K @ M @ W_DKV.T @ torch.linalg.pinv(W_DKV @ M @ W_DKV.T)  # A, at C >= rank
    whole = torch.cat((nearest, b_K[:, None]), dim=1) / E**0.5            # [E, C + 1]
    root, _ = roots(whole.T @ whole)
    mla.W_size.weight.copy_(root)                                                     # (H7)

    if not content:                                                                   # (E2)
        W_KR, b_KR = K.flatten(0, 1), bias.flatten()
    elif turning:
        white = torch.cat((K[:, turning] @ S, bias[:, turning, None]), dim=2)
        alpha, kappa = shared_key(white)                                              # (E4)
        W_KR, b_KR = kappa[:, :-1] @ inverse, kappa[:, -1]
        mla.alpha.copy_(torch.stack((alpha.real, alpha.imag)))
    else:                                                                             # (E1)
        W_KR, b_KR = W_K[:0], b_K[:0]
    mla.W_KR.weight.copy_(W_KR)
    mla.W_KR.bias.copy_(b_KR)
    return mla


def matrix_and_bias(projection: nn.Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    W = projection.weight.to(dtype)
    if projection.bias is None:
        return W, W.new_zeros(len(W))
    return W, projection.bias.to(dtype)


# ---- models ----------------------------------------------------------------------------------

@dataclass(frozen=True)
class HomogeneousConfig(Config):
    """A `Config` whose self-attention is `HomogeneousMLA`. `latent` is the width of a row,
    C + 1; `rope` is R, less than a head, or all of `dim`: a slice a head, exact. With attention
    "dense" it is the model that such a one is made of. `query_latent` has no meaning."""

    attention: str = "homogeneous"

    def __post_init__(self):
        plain = {**asdict(self), "attention": "dense"}
        Config(**plain)                                    # all that is checked of a dense one
        head = self.dim // self.heads
        need(self.attention in ("homogeneous", "dense"),
             f"attention must be 'homogeneous', got {str(self.attention)[:40]!r}")
        need(2 <= self.latent <= self.dim + 1,
             f"a dense model of width {self.dim} becomes MLA with latent between 2 and "
             f"{self.dim + 1}, got {self.latent}")
        need(self.rope < head or self.rope == self.dim,
             f"rope must be less than a head's {head} channels, or all {self.dim}, got "
             f"{self.rope}")
        if self.rope < head:
            Rope3D(self.rope, head)                        # raises for an impossible split


class HomogeneousDiT(VideoDiT):
    """A VideoDiT of a `HomogeneousConfig`. Its weights are drawn at random, to be loaded."""

    def __init__(self, config: HomogeneousConfig):
        super().__init__(config)                           # with dense attention
        c = config
        for block in self.blocks:
            dense = block.attention
            turning, rope = turning_channels(dense.rope, c.rope, c.heads, c.dim // c.heads)
            eps = c.eps_rms if c.norm else None
            block.attention = HomogeneousMLA(dense, c.latent - 1, turning, rope, eps)


def config_of(settings: dict) -> Config:
    """The Config, of either kind, that asdict made these settings of; TypeError or ValueError
    if it is none."""
    kind = Config
    if settings.get("attention") == "homogeneous":
        kind = HomogeneousConfig
    return kind(**settings)


def model_of(config: Config) -> VideoDiT:
    """A new model of a Config of either kind."""
    if config.attention == "homogeneous":
        return HomogeneousDiT(config)
    return VideoDiT(config)


def replace_attention(model: VideoDiT, C: int, R: int,
                      moments: list[Tensor] | None = None) -> HomogeneousDiT:
    """The model that a dense one becomes: every self-attention by `from_dense`, everything else
    as it is. It streams through the same cache, whose rows are C + 1 + R numbers. ValueError for
    C or R out of range."""
    sizes = {**asdict(model.config), "attention": "homogeneous", "latent": C + 1, "rope": R}
    config = HomogeneousConfig(**sizes)
    with torch.device("meta"):                             # allocates nothing
        made = HomogeneousDiT(config)
    weights = model.state_dict()
    for layer, block in enumerate(model.blocks):
        prefix = f"blocks.{layer}.attention."
        weights = {name: value for name, value in weights.items() if not name.startswith(prefix)}
        moment = None if moments is None else moments[layer]
        new = from_dense(block.attention, C, R, moment)
        weights |= {prefix + name: value for name, value in new.state_dict().items()}
    own = {name: value.clone() for name, value in weights.items()}     # not the dense model's
    made.load_state_dict(own, assign=True)
    return made
