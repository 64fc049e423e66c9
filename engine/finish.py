"""Latent attention with W_UV applied: the merge of the splits and the product in one launch.

    B batch    L query tokens    H heads    G = L * H queries    S splits of the keys
    C content latent    V value channels

With few query tokens a kernel takes microseconds, and starting one is a good part of that.
fused.py merges the splits in a kernel of its own, (K8), and W_UV is a product after it. Here a
program takes some query tokens of one head, merges their parts, (K8), and multiplies the means
by that head's W_UV. They never leave the chip in between.

Tests: tests/test_finish.py, in Triton's interpreter, and compiled for sm_90 and sm_100.
"""

import math

import torch
from torch import Tensor

import fused

if fused.HAS_TRITON:
    import triton
    import triton.language as tl

    # L and S vary from call to call: see fused.py.
    @triton.jit(do_not_specialize=["L", "S"])
    def _finish_kernel(parts, lse, W_UV, out, L, S, H: tl.constexpr, C: tl.constexpr,
                       V: tl.constexpr, VP: tl.constexpr, SP: tl.constexpr,
                       TOKENS: tl.constexpr, CHANNELS: tl.constexpr, PDL: tl.constexpr):
        """out [B, L, H, V] for TOKENS query tokens of one head.

        All S parts of CHANNELS channels are fetched at once, as a tile of SP >= S lines.
        """
        if PDL:
            tl.extra.cuda.gdc_wait()                     # until _attend_kernel is done
        h = tl.program_id(0)
        token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
        b = tl.program_id(2)
        B = tl.num_programs(2)
        s = tl.arange(0, SP)
        iv = tl.arange(0, VP)
        there = token < L
        real = (s < S)[:, None] & there[None, :]
        line = (s * B + b).to(tl.int64) * (H * L)
        query = h * L + token
        g = line[:, None] + query[None, :]               # place in [S, B, H, L]
        # A split that does not exist has the weight 2^-inf = 0. A token that does not exist
        # gets one weight, of a part that is read as zero.
        z = tl.load(lse + g, mask=real, other=-float("inf"))
        z = tl.where(there[None, :], z, 0.0)
        top = tl.max(z, 0)
        w = tl.exp2(z - top[None, :])
        total = tl.sum(w, 0)
        w = w / total[None, :]                           # [SP, TOKENS]
        acc = tl.zeros([TOKENS, VP], tl.float32)
        for first in tl.static_range(0, C, CHANNELS):
            i = first + tl.arange(0, CHANNELS)
            wanted = i < C
            inside = real[:, :, None] & wanted[None, None, :]
            at = g[:, :, None] * C + i[None, None, :]
            x = tl.load(parts + at, mask=inside, other=0.0)
            x = x.to(tl.float32) * w[:, :, None]
            mean = tl.sum(x, 0)                          # (K8) [TOKENS, CHANNELS]
            row = h * V + iv
            inside = (iv < V)[:, None] & wanted[None, :]
            at = row[:, None] * C + i[None, :]
            up = tl.load(W_UV + at, mask=inside, other=0.0)                  # [VP, CHANNELS]
            mean = mean.to(up.dtype)
            acc = tl.dot(mean, up.T, acc, input_precision="ieee")
        place = (b.to(tl.int64) * L + token) * H + h     # in [B, L, H]
        at = place[:, None] * V + iv[None, :]
        inside = there[:, None] & (iv < V)[None, :]
        answer = acc.to(out.dtype.element_ty)
        tl.store(out + at, answer, mask=inside)


TOKENS = 4                      # of a program: small, for all parts of a token are read at once
CHANNELS = 64                   # of an iteration
ENTRIES = 8192                  # of the tile of parts, at most: what 8 warps hold in registers


def _finish(parts: Tensor, lse: Tensor, W_UV: Tensor, out: Tensor, tile: fused.Tile) -> None:
    """Fill out [B, L, H, V]."""
    S = len(parts)
    B, L, H, V = out.shape
    SP = triton.next_power_of_2(S)
    VP = triton.next_power_of_2(V)
    fitting = ENTRIES // (SP * TOKENS)
    channels = max(16, min(CHANNELS, fitting))
    blocks = math.ceil(L / TOKENS)
    _finish_kernel[(H, blocks, B)](
        parts, lse, W_UV.contiguous(), out, L, S, H=H, C=parts.shape[-1], V=V,
        VP=max(16, VP), SP=SP, TOKENS=TOKENS, CHANNELS=channels,
        PDL=tile.pdl, num_warps=8, **fused._launch_options(tile))


def _launch(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, q_cos, q_sin, k_cos, k_sin, scale: float,
            tile: fused.Tile | None = None, splits: int | None = None) -> Tensor:
    """The kernels for arguments that were checked. `tile` and `splits` are for tests."""
    B, L, H, _ = q_nope.shape
    parts, lse, tile = fused._launch_splits(q_nope, q_rope, c_kv, k_rope, W_UK, q_cos, q_sin,
                                            k_cos, k_sin, scale, tile, splits)
    out = q_nope.new_empty(B, L, H, W_UV.shape[1])
    with torch.cuda.device_of(q_nope):                   # Triton launches on the current device
        _finish(parts, lse, W_UV, out, tile)
    return out


@torch.library.custom_op("videomla::latent_values", mutates_args=())
def latent_values(
        q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, W_UK: Tensor, W_UV: Tensor,
        q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, scale: float) -> Tensor:
    """`fused.latent_attention`, and W_UV [H, V, C] applied to its answer -> [B, L, H, V].

    It takes and refuses what that takes and refuses.
    """
    fused._check(q_nope, q_rope, c_kv, k_rope, W_UK, q_cos, q_sin, k_cos, k_sin, scale)
    if not fused.HAS_TRITON or not (q_nope.is_cuda or fused.INTERPRETED):
        raise RuntimeError(f"latent_values needs Triton and a CUDA GPU, not {q_nope.device.type}")
    if q_rope.numel() == 0:                              # no query, so no kernel
        return _empty(q_nope, W_UV)
    return _launch(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, q_cos, q_sin, k_cos, k_sin, scale)


def _empty(q_nope: Tensor, W_UV: Tensor) -> Tensor:
    return q_nope.new_empty(*q_nope.shape[:3], W_UV.shape[1])


@latent_values.register_fake
def _(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, q_cos, q_sin, k_cos, k_sin, scale):
    fused._check(q_nope, q_rope, c_kv, k_rope, W_UK, q_cos, q_sin, k_cos, k_sin, scale)
    return _empty(q_nope, W_UV)


def _refuse_gradients(*_args, **_kwargs):
    raise RuntimeError("latent_values is inference only; wrap it in torch.no_grad(), or train "
                       "with route='materialised'")


latent_values.register_autograd(_refuse_gradients, setup_context=_refuse_gradients)
