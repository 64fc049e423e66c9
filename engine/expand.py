"""K and V of every head from the cached latents, as one Triton kernel: the up-projection.

    B batch    T key tokens    H heads    N content channels    R rope channels
    V value channels    C content latent

A dense kernel wants a key [W_UK^h c_kv | rot(k_rope)] and a value W_UV^h c_kv per head and token
((11) of attention.py): 201 MB at the paper's size, from a cache of 15 MB. The product itself is
short (31 GFLOP). So what counts is that each byte is written once, in the layout
in which the dense kernel reads it, [B, T, H, channels], and that nothing is written in between.

How the work is cut. A program holds TOKENS rows of the cache on the chip and walks over columns
of the weights, COLUMNS at a time. W_UK is seen as one matrix of H * N lines, and W_UV as one of
H * V: a tile need not end where a head ends, so N = 96, which is no power of two, costs nothing.
Only the store has to know where a column belongs. The columns are cut into groups, so that
programs fill the GPU when there are few tokens. The first group also rotates the rope part of
its keys and writes it into all heads.

Tests: tests/test_expand.py, in Triton's interpreter, and compiled for sm_90 and sm_100.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

import fused

if fused.HAS_TRITON:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    from fused import _rotated

    @triton.jit
    def _columns(rows0, rows1, up0, up1, column, C0: tl.constexpr, C1: tl.constexpr,
                 COLUMNS: tl.constexpr):
        """The rows times COLUMNS lines of a weight, from `column` on: [TOKENS, COLUMNS]."""
        x = tl.dot(rows0, up0.load([column, 0]).T, input_precision="ieee")
        if C1:
            x = tl.dot(rows1, up1.load([column, C0]).T, x, input_precision="ieee")
        return x

    # T varies from call to call: see fused.py.
    @triton.jit(do_not_specialize=["T"])
    def _expand_kernel(
            rows0, rows1, keys0, keys1, values0, values1, k_rope, k_cos, k_sin, k, v,
            T, batch_stride, token_stride,
            H: tl.constexpr, N: tl.constexpr, R: tl.constexpr, V: tl.constexpr,
            C0: tl.constexpr, C1: tl.constexpr, RP: tl.constexpr, TOKENS: tl.constexpr,
            COLUMNS: tl.constexpr, STAGES: tl.constexpr):
        """TOKENS tokens and one group of columns of k [B, T, H, N+R] and v [B, T, H, V].

        rows0, rows1: c_kv in two blocks of channels, as in fused.py. keys0, keys1, values0 and
        values1: W_UK as [H * N, C] and W_UV as [H * V, C], likewise. All are tensor
        descriptors; what lies outside the tensors is read as zero.
        """
        group = tl.program_id(1)
        groups = tl.num_programs(1)
        b = tl.program_id(2)
        t0 = tl.program_id(0) * TOKENS
        t = t0 + tl.arange(0, TOKENS)
        real = (t < T)[:, None]
        line = (b.to(tl.int64) * T + t)[:, None]             # place in [B, T]
        if group == 0:
            ir = tl.arange(0, RP)
            inside = real & (ir < R)[None, :]
            k_at = k_rope + b.to(tl.int64) * batch_stride + t[:, None].to(tl.int64) * token_stride
            turned = tl.load(k_at + ir[None, :], mask=inside, other=0.0)
            turned = _rotated(turned, k_cos, k_sin, t, T, R)
            k_at = k + line * (H * (N + R)) + N + ir[None, :]
            for h in range(H):
                tl.store(k_at + h * (N + R), turned, mask=inside)

        r0 = rows0.load([b, t0, 0]).reshape(TOKENS, C0)
        r1 = r0
        if C1:
            r1 = rows1.load([b, t0, C0]).reshape(TOKENS, C1)
        step = groups * COLUMNS
        if N:
            for first in tl.range(group * COLUMNS, H * N, step, num_stages=STAGES):
                x = _columns(r0, r1, keys0, keys1, first, C0, C1, COLUMNS)
                j = first + tl.arange(0, COLUMNS)
                place = j // N * (N + R) + j % N             # head j // N, channel j % N
                inside = real & (j < H * N)[None, :]
                k_at = k + line * (H * (N + R)) + place[None, :]
                tl.store(k_at, x.to(k.dtype.element_ty), mask=inside)
        for first in tl.range(group * COLUMNS, H * V, step, num_stages=STAGES):
            x = _columns(r0, r1, values0, values1, first, C0, C1, COLUMNS)
            j = first + tl.arange(0, COLUMNS)
            inside = real & (j < H * V)[None, :]
            v_at = v + line * (H * V) + j[None, :]
            tl.store(v_at, x.to(v.dtype.element_ty), mask=inside)


class ExpandTile(NamedTuple):
    """How the work of _expand_kernel is cut."""
    tokens: int                 # of a program
    columns: int                # of an iteration
    warps: int
    stages: int                 # tiles of weights on their way
    resident: int               # programs that share one multiprocessor


def choose_expand_tile(C: int, itemsize: int, capability: tuple[int, int]) -> ExpandTile:
    """The tile for this latent, bytes per number and GPU (its compute capability).

    test_expand.py::test_compiles_offline holds each to registers and shared memory.
    """
    if itemsize == 4:                                    # float32 is for the interpreter alone
        return ExpandTile(16, 16, warps=4, stages=1, resident=1)
    # Two programs share a multiprocessor: while one stores, the other multiplies. Three tiles of
    # weights on their way are the most of which two programs fit; with C > 192 it is two.
    return ExpandTile(64, 64, warps=4, stages=3 if C <= 192 else 2, resident=2)


def choose_groups(blocks: int, columns: int, at_once: int) -> int:
    """Into how many groups to cut `columns` tiles of columns, for so many blocks of tokens.

    The smallest number with the least time: waves, times the tiles of a program and what
    fetching its rows costs, about one tile more.
    """
    def time(groups: int) -> int:
        return math.ceil(blocks * groups / at_once) * (math.ceil(columns / groups) + 1)

    return min(range(1, columns + 1), key=time)


def _launch(c_kv, k_rope, W_UK, W_UV, k_cos, k_sin,
            tile: ExpandTile | None = None, groups: int | None = None) -> tuple[Tensor, Tensor]:
    """The kernel for arguments that were checked. `tile` and `groups` are for tests."""
    B, T, C = c_kv.shape
    H, N, _ = W_UK.shape
    V = W_UV.shape[1]
    R = k_rope.shape[-1]
    capability, multiprocessors = fused._gpu_of(c_kv)
    if tile is None:
        tile = choose_expand_tile(C, c_kv.element_size(), capability)
    blocks = math.ceil(T / tile.tokens)
    if groups is None:
        columns = math.ceil(H * max(N, V) / tile.columns)
        groups = choose_groups(B * blocks, columns, multiprocessors * tile.resident)
    k = c_kv.new_empty(B, T, H, N + R)
    v = c_kv.new_empty(B, T, H, V)
    C0 = 1 << (C.bit_length() - 1)
    C1 = triton.next_power_of_2(C - C0) if C > C0 else 0

    def in_blocks(x: Tensor, lines: int) -> list:
        """Descriptors of x [.., lines, C]: its first C0 channels, and the rest."""
        box = [1] * (x.ndim - 2) + [lines]
        return [TensorDescriptor.from_tensor(x, [*box, width]) for width in (C0, C1 or C0)]

    with torch.cuda.device_of(c_kv):                     # Triton launches on the current device
        rows = in_blocks(fused._fetchable(c_kv), tile.tokens)
        values = in_blocks(fused._fetchable(W_UV.reshape(H * V, C)), tile.columns)
        keys = values                                    # N = 0: nothing is read of them
        if N > 0:
            keys = in_blocks(fused._fetchable(W_UK.reshape(H * N, C)), tile.columns)
        k_rope = fused._fetchable(k_rope)
        _expand_kernel[(blocks, groups, B)](
            *rows, *keys, *values, k_rope, k_cos.contiguous(), k_sin.contiguous(), k, v,
            T, k_rope.stride(0), k_rope.stride(1), H=H, N=N, R=R, V=V, C0=C0, C1=C1,
            RP=fused._padded(R), TOKENS=tile.tokens, COLUMNS=tile.columns, STAGES=tile.stages,
            num_warps=tile.warps)
    return k, v


@torch.library.custom_op("videomla::expand", mutates_args=())
def expand(c_kv: Tensor, k_rope: Tensor, W_UK: Tensor, W_UV: Tensor, k_cos: Tensor,
           k_sin: Tensor) -> tuple[Tensor, Tensor]:
    """k [B, T, H, N+R] and v [B, T, H, V] of c_kv [B, T, C] and k_rope [B, T, R], not rotated.

    W_UK [H, N, C], W_UV [H, V, C]; tables [T, R/2] of the keys in float32. Widths as in
    `fused.why_not`, of whom the caller asks. Inference only.
    """
    if not fused.HAS_TRITON:
        raise RuntimeError("expand needs Triton, which is not installed here")
    if not c_kv.is_cuda and not fused.INTERPRETED:
        raise RuntimeError(f"expand runs on a CUDA GPU, not on {c_kv.device.type}")
    return _launch(c_kv, k_rope, W_UK, W_UV, k_cos, k_sin)


@expand.register_fake
def _(c_kv, k_rope, W_UK, W_UV, k_cos, k_sin):
    B, T, _ = c_kv.shape
    H, N, _ = W_UK.shape
    keys = c_kv.new_empty(B, T, H, N + k_rope.shape[-1])
    return keys, c_kv.new_empty(B, T, H, W_UV.shape[1])


def _refuse_gradients(*_args, **_kwargs):
    raise RuntimeError("expand is inference only; wrap it in torch.no_grad(), or train with "
                       "route='materialised'")


expand.register_autograd(_refuse_gradients, setup_context=_refuse_gradients)
