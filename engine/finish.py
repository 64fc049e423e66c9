"""Latent attention with W_UV applied, as one chain of kernels that start early.

    B batch    L query tokens    H heads    C content latent    V value channels

With few query tokens a kernel takes microseconds, and starting one is a good part of that.
The kernels of fused.py therefore start while the one before drains, which a product of torch's
does not. Here W_UV is such a kernel, too: it fetches its weights while the splits are merged,
and then waits for them.

Tests: tests/test_finish.py, in Triton's interpreter, and compiled for sm_90 and sm_100.
"""

import math

import torch
from torch import Tensor

import fused

if fused.HAS_TRITON:
    import triton
    import triton.language as tl

    # L varies from call to call: see fused.py.
    @triton.jit(do_not_specialize=["L"])
    def _values_kernel(latent, W_UV, out, L, H: tl.constexpr, C: tl.constexpr, V: tl.constexpr,
                       CP: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
                       PDL: tl.constexpr):
        """COLUMNS channels of out [B, L, H, V], for TOKENS query tokens of one head.

        CP is the power of two that holds the C channels of latent [B, H, L, C].
        """
        first = tl.program_id(0) * TOKENS
        token = first + tl.arange(0, TOKENS)
        blocks = tl.cdiv(V, COLUMNS)
        h = tl.program_id(1) // blocks
        first = tl.program_id(1) % blocks * COLUMNS
        v = first + tl.arange(0, COLUMNS)
        b = tl.program_id(2).to(tl.int64)
        i = tl.arange(0, CP)
        channels = (i < C)[None, :]
        real = (token < L)[:, None]

        row = h * V + v                                  # of W_UV, as [H * V, C]
        at = row[:, None] * C + i[None, :]
        inside = (v < V)[:, None] & channels
        up = tl.load(W_UV + at, mask=inside, other=0.0)  # [COLUMNS, CP]
        if PDL:
            tl.extra.cuda.gdc_wait()                     # until the latents are there
        line = (b * H + h) * L + token                   # of latent, as [B * H * L, C]
        at = line[:, None] * C + i[None, :]
        x = tl.load(latent + at, mask=real & channels, other=0.0)            # [TOKENS, CP]
        x = tl.dot(x, up.T, input_precision="ieee")      # [TOKENS, COLUMNS]

        place = (b * L + token) * H + h                  # in [B, L, H]
        at = place[:, None] * V + v[None, :]
        inside = real & (v < V)[None, :]
        x = x.to(out.dtype.element_ty)
        tl.store(out + at, x, mask=inside)


TOKENS = 16                     # of a program, and its value channels: small, so that there are
COLUMNS = 32                    # enough programs (64 tokens, 12 heads of 128: 192)


def _values(latent: Tensor, W_UV: Tensor, out: Tensor, tile: fused.Tile) -> None:
    """Fill out [B, L, H, V] from latent [B, H, L, C]."""
    B, L, H, V = out.shape
    C = latent.shape[-1]
    grid = math.ceil(L / TOKENS), H * math.ceil(V / COLUMNS), B
    _values_kernel[grid](
        latent, W_UV.contiguous(), out, L, H=H, C=C, V=V, CP=triton.next_power_of_2(C),
        TOKENS=TOKENS, COLUMNS=COLUMNS, PDL=tile.pdl, num_warps=4,
        **fused._launch_options(tile))


def _launch(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, q_cos, q_sin, k_cos, k_sin, scale: float,
            tile: fused.Tile | None = None, splits: int | None = None) -> Tensor:
    """The kernels for arguments that were checked. `tile` and `splits` are for tests."""
    B, L, H, _ = q_nope.shape
    if tile is None:
        tile = fused.choose_tile(c_kv.shape[-1], k_rope.shape[-1], q_nope.element_size(),
                                 fused._gpu_of(q_nope)[0])
    if fused.INTERPRETED:
        tile = tile._replace(pdl=False)                  # it runs one program after the other
    latent = fused._launch(q_nope, q_rope, c_kv, k_rope, W_UK, q_cos, q_sin, k_cos, k_sin,
                           scale, tile, splits)
    out = q_nope.new_empty(B, L, H, W_UV.shape[1])
    with torch.cuda.device_of(q_nope):                   # Triton launches on the current device
        _values(latent, W_UV, out, tile)
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
