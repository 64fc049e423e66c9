"""The fast path: latent attention as a Triton kernel, for a GPU and few query tokens.

    B batch    L query tokens    T key tokens    H heads
    G = L * H queries, one per token and head
    N content channels of a query    R rope channels    C content latent

What is computed. Absorbed attention, (9) and (10) of attention.py, works on the cache itself.
A query is lifted to the latent. Then token t has one key for all heads, the C + R numbers
[c_kv[t] | rot(k_rope[t])]. Its value is c_kv[t]: *a slice of the key*.

    q_lat[g] = W_UK^T q_nope[g]                                                   [C]    (K0)
    s[g, t]  = scale * (q_lat[g] . c_kv[t]  +  rot(q_rope[g]) . rot(k_rope[t]))          (K1)
    out[g]   = sum_t softmax_t(s[g, t]) c_kv[t]                                   [C]    (K2)

W_UK is that of the query's head. W_UV is applied outside.

Why a kernel of our own. cuDNN does not split the keys, so with 64 query tokens most of a GPU
would idle. FlexAttention pads 224/192 channels to 256/256, and cannot know that K and V are
one tensor. Here a tile of latents is fetched once and used twice. All heads share the keys,
so the queries of all heads become the lines of one matrix: 64 tokens x 12 heads are 768
lines for the tensor cores.

How a Triton kernel reads. A *program* is one instance of the kernel function. The *grid*
says how many programs are started, and `tl.program_id` tells each which part of the output
is its own. A program handles *tiles*: small matrices held by its threads, in registers or
shared memory. Their sides are powers of two, known at compile time (`tl.constexpr`).
`tl.load` and `descriptor.load` bring a tile from global memory. `tl.dot` multiplies two
tiles on the tensor cores. `tl.store` writes a tile back. All else is arithmetic on tiles.

Online softmax. T keys do not fit on the chip, so a program walks over them tile by tile. It
keeps three running things for each query: the largest score so far (`top`), the sum of
exponentials (`den`) and the weighted sum of values (`acc`). A new tile of scores s makes
of them

    top' = max(top, max_t s)                                                             (K3)
    p    = 2^(s - top')                                                                  (K4)
    fix  = 2^(top - top')                                                                (K5)
    den' = den * fix + sum_t p                                                           (K6)
    acc' = acc * fix + p @ c_kv                                                          (K7)

`fix` expresses the old sums relative to the new maximum. So no exponent is ever positive,
and scores of any size are safe. The base is 2 because the hardware's exponential is 2^x;
the scale carries a factor log2(e) for it. At the end out = acc / den, and
lse = top + log2(den).

Splitting the keys. The queries alone do not fill the GPU, so the keys are cut into S splits,
and each split is a program of its own. A split divides by its *own* denominator, so a plain
mean of the splits would be wrong. A split's share of the true denominator is 2^lse:

    out = sum_s w_s out_s,    w_s = 2^lse_s / sum_s' 2^lse_s'                            (K8)

The largest lse is subtracted first, as in (K4).

Order of the file: the kernels, how the work is cut, the launch, what is taken, the op. When
the kernel is worth calling is the question of engine/routes.py.

Tests: tests/test_fused.py checks all of the above in Triton's interpreter. It also compiles
every shipped tile for sm_90 and sm_100, without a GPU.
"""

import importlib.util
import math
from typing import NamedTuple

import torch
from torch import Tensor

# This file can be imported without Triton.
HAS_TRITON = importlib.util.find_spec("triton") is not None

if HAS_TRITON:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    # ---- before attention: lift the queries, turn the keys -----------------------------------

    @triton.jit
    def _rotated(x, cos, sin, token, tokens, R: tl.constexpr):
        """Rotate a tile x [some tokens, RP] in float32, by the tables [tokens, R/2].

        Pairs are adjacent channels: (a, b) -> (a cos - b sin, a sin + b cos).
        """
        TOKENS: tl.constexpr = x.shape[0]
        PAIRS: tl.constexpr = x.shape[1] // 2
        pair = tl.arange(0, PAIRS)
        angle = token[:, None] * (R // 2) + pair[None, :]
        inside = (token < tokens)[:, None] & (pair < R // 2)[None, :]
        c = tl.load(cos + angle, mask=inside, other=0.0)
        s = tl.load(sin + angle, mask=inside, other=0.0)
        a, b = tl.split(x.to(tl.float32).reshape(TOKENS, PAIRS, 2))
        turned = tl.join(a * c - b * s, a * s + b * c)   # [TOKENS, PAIRS, 2]
        return turned.reshape(TOKENS, 2 * PAIRS).to(x.dtype)

    @triton.jit
    def _lifted(q_nope, W_UK, h, source, real, i, N: tl.constexpr, C: tl.constexpr):
        """(K0) for some query tokens of head h and the channels i of the latent.

        `source` [tokens, 1] says where the queries stand, `real` which of them exist.
        """
        acc = tl.zeros([source.shape[0], i.shape[0]], tl.float32)
        for first in tl.static_range(0, N, 32):
            n = first + tl.arange(0, 32)
            inside = real & (n < N)[None, :]
            q = tl.load(q_nope + source * N + n[None, :], mask=inside, other=0.0)
            inside_up = (n < N)[:, None] & (i < C)[None, :]
            up_at = W_UK + (h * N + n)[:, None] * C + i[None, :]
            up = tl.load(up_at, mask=inside_up, other=0.0)
            acc = tl.dot(q, up, acc, input_precision="ieee")
        return acc

    # L, T and G vary from call to call. Without `do_not_specialize`, Triton would compile a
    # kernel again whenever 16 begins or ceases to divide one of them.
    @triton.jit(do_not_specialize=["T", "L"])
    def _prepare_kernel(
            q_nope, q_rope, k_rope, W_UK, q_cos, q_sin, k_cos, k_sin,
            q_lat, q_turned, k_turned, T, L, batch_stride, token_stride,
            H: tl.constexpr, N: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
            RP: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
            KEYS: tl.constexpr, PDL: tl.constexpr):
        """Everything before attention, in one launch. A program does one of two tasks.

        Either it lifts TOKENS query tokens of one head to CHANNELS channels of the latent,
        (K0). Who makes the first of these channels also rotates the queries' rope part.
        Or it rotates KEYS keys: once here, and not again for every tile of queries.

        Queries come out as [B, H, L]. Heads are the batch of both products, this one and
        W_UV's, so no copy is needed to bring them there. RP and PDL: see _attend_kernel.
        """
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()        # _attend_kernel may start; it waits
        task = tl.program_id(0)
        b = tl.program_id(1).to(tl.int64)
        ir = tl.arange(0, RP)
        # The first tasks lift: all tokens of a head, head by head, for the first channels,
        # then for the next. The other tasks rotate keys.
        blocks = tl.cdiv(L, TOKENS)
        lifts = H * blocks * tl.cdiv(C, CHANNELS)
        if task < lifts:
            h = task // blocks % H
            token = task % blocks * TOKENS + tl.arange(0, TOKENS)
            i = task // (blocks * H) * CHANNELS + tl.arange(0, CHANNELS)
            real = (token < L)[:, None]
            source = ((b * L + token) * H + h)[:, None]   # place in [B, L, H]
            goal = ((b * H + h) * L + token)[:, None]     # place in [B, H, L]
            lifted = _lifted(q_nope, W_UK, h, source, real, i, N, C)
            inside = real & (i < C)[None, :]
            q_lat_at = q_lat + goal * C + i[None, :]
            tl.store(q_lat_at, lifted.to(q_lat.dtype.element_ty), mask=inside)
            if task < H * blocks:
                inside_q = real & (ir < R)[None, :]
                q = tl.load(q_rope + source * R + ir[None, :], mask=inside_q, other=0.0)
                q_at = q_turned + goal * R + ir[None, :]
                tl.store(q_at, _rotated(q, q_cos, q_sin, token, L, R), mask=inside_q)
        else:
            t = (task - lifts) * KEYS + tl.arange(0, KEYS)
            inside_k = (t < T)[:, None] & (ir < R)[None, :]
            k_at = k_rope + b * batch_stride + t[:, None].to(tl.int64) * token_stride
            k = tl.load(k_at + ir[None, :], mask=inside_k, other=0.0)
            k_turned_at = k_turned + (b * T + t[:, None]) * R + ir[None, :]
            tl.store(k_turned_at, _rotated(k, k_cos, k_sin, t, T, R), mask=inside_k)

    # ---- attention: a tile of queries against one split of the keys --------------------------

    @triton.jit
    def _scores(q0, q1, qr, k0, k1, kr, C1: tl.constexpr):
        """(K1) without its scale, for a tile of queries and a tile of keys -> [QUERIES, KEYS].

        The dots over blocks of channels add into one tile, which is new in every iteration.
        (Up to version 3.7, Triton miscompiles two dots into one accumulator that is *carried*
        from iteration to iteration on datacentre Blackwell.) "ieee" concerns float32 alone:
        without it, Triton would round it to TF32.
        """
        s = tl.dot(q0, k0.T, input_precision="ieee")
        if C1:
            s = tl.dot(q1, k1.T, s, input_precision="ieee")
        return tl.dot(qr, kr.T, s, input_precision="ieee")

    @triton.jit
    def _softmax_step(s, top, den, scale2):
        """(K3) to (K6) for a tile of scores s [QUERIES, KEYS]. scale2 is scale * log2(e)."""
        new = tl.maximum(top, tl.max(s, 1) * scale2)     # (K3)
        p = tl.exp2(s * scale2 - new[:, None])           # (K4) one multiply-add, one 2^x
        fix = tl.exp2(top - new)                         # (K5)
        den = den * fix + tl.sum(p, 1)                   # (K6) p is not yet rounded to 16 bits
        return p, fix, new, den

    @triton.jit
    def _store_mean(parts, g, i, inside, acc, den, C: tl.constexpr):
        """The weighted mean of values, acc / den, becomes the channels i of part g."""
        at = parts + g[:, None] * C + i[None, :]
        mean = acc / den[:, None]
        tl.store(at, mean.to(parts.dtype.element_ty), mask=inside)

    @triton.jit(do_not_specialize=["T", "G", "keys_per_split"])
    def _attend_kernel(
            q_lat, q_rope, keys0, keys1, ropes, parts, lse, scale2, T, G, keys_per_split,
            C: tl.constexpr, R: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr,
            RP: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
            STAGES: tl.constexpr, PDL: tl.constexpr):
        """(K1) to (K7) for QUERIES queries against one split of the keys.

        Tile sides are powers of two, and C = 192 is none. So the channels are two blocks,
        C0 = 128 and C1 = 64; padding to 256 would cost a third more products. C1 = 0 says
        that one block is enough. RP >= R is the power of two that holds the rope channels.
        PDL says that kernels may start before the one ahead of them has ended (Tile).

        keys0, keys1 and ropes are *tensor descriptors*. The GPU's copy engine (TMA) fetches a
        box [1, KEYS, width] in one instruction. It fills what lies outside the tensor with
        zeros, so T and C need not be multiples of anything.
        """
        query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
        split = tl.program_id(1)
        b = tl.program_id(2)
        B = tl.num_programs(2)
        i0 = tl.arange(0, C0)
        i1 = C0 + tl.arange(0, C1 if C1 else 1)
        ir = tl.arange(0, RP)
        real = (query < G)[:, None]                      # the others' results nobody stores
        g = (b * G + query)[:, None].to(tl.int64)        # q_lat [B, H, L, C] is read [B * G, C]
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()        # _merge_kernel may start; it waits
            tl.extra.cuda.gdc_wait()                     # until _prepare_kernel is done

        # The queries [QUERIES, width] stay on the chip until the end; so do the running sums.
        q0 = tl.load(q_lat + g * C + i0[None, :], mask=real, other=0.0)
        inside_r = real & (ir < R)[None, :]
        qr = tl.load(q_rope + g * R + ir[None, :], mask=inside_r, other=0.0)
        q1 = q0                                          # without a second block: not used
        if C1:
            inside1 = real & (i1 < C)[None, :]
            q1 = tl.load(q_lat + g * C + i1[None, :], mask=inside1, other=0.0)
            acc1 = tl.zeros([QUERIES, C1], tl.float32)
        acc0 = tl.zeros([QUERIES, C0], tl.float32)
        top = tl.full([QUERIES], -float("inf"), tl.float32)
        den = tl.zeros([QUERIES], tl.float32)

        first = split * keys_per_split
        last = tl.minimum(first + keys_per_split, T)
        for t0 in tl.range(first, last, KEYS, num_stages=STAGES):
            # Tiles of keys [KEYS, width]. STAGES of them are on their way at once: one arrives
            # while another is multiplied.
            k0 = keys0.load([b, t0, 0]).reshape(KEYS, C0)
            k1 = k0
            if C1:
                k1 = keys1.load([b, t0, C0]).reshape(KEYS, C1)
            kr = ropes.load([b, t0, 0]).reshape(KEYS, RP)
            t = t0 + tl.arange(0, KEYS)
            s = _scores(q0, q1, qr, k0, k1, kr, C1)      # (K1) [QUERIES, KEYS]
            if t0 + KEYS > T:                            # keys that do not exist
                s = tl.where((t < T)[None, :], s, -float("inf"))
            p, fix, top, den = _softmax_step(s, top, den, scale2)
            # The same tiles of latents, now as values. An accumulator gets one dot, no more.
            p = p.to(k0.dtype)
            acc0 = tl.dot(p, k0, acc0 * fix[:, None], input_precision="ieee")      # (K7)
            if C1:
                acc1 = tl.dot(p, k1, acc1 * fix[:, None], input_precision="ieee")

        g = (split * B + b).to(tl.int64) * G + query     # parts [S, B, G, C], lse [S, B, G]
        _store_mean(parts, g, i0, real, acc0, den, C)
        if C1:
            _store_mean(parts, g, i1, real & (i1 < C)[None, :], acc1, den, C)
        tl.store(lse + g, top + tl.log2(den), mask=query < G)

    # ---- after attention: the splits become one ----------------------------------------------

    @triton.jit(do_not_specialize=["G", "S"])
    def _merge_kernel(parts, lse, out, G, S, C: tl.constexpr, SP: tl.constexpr,
                      CHANNELS: tl.constexpr, PDL: tl.constexpr):
        """(K8) for one query and CHANNELS channels.

        All S parts are fetched at once, as one tile of SP >= S lines: what this kernel costs
        is waiting for memory.
        """
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()        # W_UV's kernel may start, if it is next
            tl.extra.cuda.gdc_wait()
        query = tl.program_id(0)
        i = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        b = tl.program_id(2)
        B = tl.num_programs(2)
        s = tl.arange(0, SP)
        g = (s * B + b).to(tl.int64) * G + query
        # A split that does not exist has the weight 2^-inf = 0.
        z = tl.load(lse + g, mask=s < S, other=-float("inf"))
        w = tl.exp2(z - tl.max(z, 0))
        inside = (s < S)[:, None] & (i < C)[None, :]
        x = tl.load(parts + g[:, None] * C + i[None, :], mask=inside, other=0.0)
        x = x.to(tl.float32)                             # [SP, CHANNELS]
        w = w / tl.sum(w, 0)
        x = tl.sum(x * w[:, None], 0)                    # (K8)
        inside = i < C
        out_at = out + (b * G + query).to(tl.int64) * C + i
        tl.store(out_at, x.to(out.dtype.element_ty), mask=inside)


# Was TRITON_INTERPRET=1 in the environment when the kernels were decorated?
INTERPRETED = HAS_TRITON and not isinstance(_attend_kernel, triton.JITFunction)


# ---- how the work is cut ---------------------------------------------------------------------

class Tile(NamedTuple):
    """How the work of _attend_kernel is cut. There are few of them, each with its reason."""
    queries: int                # of a program
    keys: int                   # of an iteration
    warps: int                  # 4 warps issue Hopper's matrix instruction, for 64 queries
    stages: int                 # tiles of keys on their way
    resident: int               # programs that share one multiprocessor
    pdl: bool = False           # programmatic dependent launch: start as the last one drains


MAX_SPLITS = 128                # _merge_kernel holds one tile of that many parts
LIFT_TOKENS = 16                # of a program of _prepare_kernel: small, latency is its cost
LIFT_CHANNELS = 64
TURN_KEYS = 64
MERGE_CHANNELS = 64             # of a program of _merge_kernel: small, so that all fit at once


def choose_tile(C: int, R: int, itemsize: int, capability: tuple[int, int]) -> Tile:
    """The tile for these widths, bytes per number and GPU (its compute capability).

    test_fused.py::test_compiles_offline holds each to registers and shared memory.
    """
    generation = capability[0]
    # float32 is exact here and never uses tensor cores. Small tiles, or registers spill.
    if itemsize == 4:
        return Tile(16, 16, warps=8, stages=1, resident=1)
    if C > 192 or R > 32 or generation not in (9, 10):
        return Tile(64, 32, warps=4, stages=2, resident=2 if generation == 9 else 1)
    # Blackwell's matrix unit (tcgen05) is 128 lines high.
    if generation == 10:
        return Tile(128, 64, warps=8, stages=2, resident=1)
    # Hopper: two small programs share a multiprocessor. They do not wait for each other:
    # while one computes exponentials, the other has the tensor cores. Three stages of 64 keys
    # are the deepest of which two fit (115 kB each, of 228 kB).
    return Tile(64, 64, warps=4, stages=3, resident=2, pdl=True)


def iterations(programs: int, key_tiles: int, at_once: int, splits: int) -> int:
    """What the time of _attend_kernel is proportional to: waves times the length of a program.

    `programs` would run without splitting, and `at_once` fit on the GPU. Starting, draining,
    writing a part and merging it cost about as much as four iterations.
    """
    OVERHEAD = 4
    waves = math.ceil(programs * splits / at_once)
    return waves * (math.ceil(key_tiles / splits) + OVERHEAD)


def choose_splits(programs: int, key_tiles: int, at_once: int) -> int:
    """Into how many splits to cut the keys: the smallest number with the fewest `iterations`.

    The paper's widths, L = 64, 132 multiprocessors: 12 tiles of queries x 22 splits are 264
    programs, exactly one wave of two per multiprocessor.
    """
    most = min(key_tiles, MAX_SPLITS)
    return min(range(1, most + 1), key=lambda S: iterations(programs, key_tiles, at_once, S))


# ---- the launch ------------------------------------------------------------------------------

def _launch(q_nope, q_rope, c_kv, k_rope, W_UK, q_cos, q_sin, k_cos, k_sin, scale: float,
            tile: Tile | None = None, splits: int | None = None) -> Tensor:
    """The three kernels, one after the other, for arguments that were checked.

    `tile` and `splits` are for tests and for timing sweeps.
    """
    B, L, H, _ = q_nope.shape
    T, C = c_kv.shape[1:]
    R = k_rope.shape[-1]
    capability, multiprocessors = _gpu_of(q_nope)
    if tile is None:
        tile = choose_tile(C, R, q_nope.element_size(), capability)
    if INTERPRETED:
        tile = tile._replace(pdl=False)                  # it runs one program after the other
    key_tiles = math.ceil(T / tile.keys)
    if splits is None:
        query_tiles = math.ceil(L * H / tile.queries)
        splits = choose_splits(B * query_tiles, key_tiles, multiprocessors * tile.resident)
    tiles_per_split = math.ceil(key_tiles / splits)
    # No split may be empty: its denominator would be zero.
    splits = math.ceil(key_tiles / tiles_per_split)

    tables = [x.contiguous() for x in (q_cos, q_sin, k_cos, k_sin)]
    with torch.cuda.device_of(q_nope):                   # Triton launches on the current device
        q_lat, q_turned, k_turned = _prepare(q_nope, q_rope, k_rope, W_UK, tables, tile)
        # Parts have the input's dtype. Rounding them adds at most what rounding the output
        # does, and halves what the merge has to read.
        parts = q_nope.new_empty(splits, B, L * H, C)
        lse = q_nope.new_empty(splits, B, L * H, dtype=torch.float32)
        keys_per_split = tiles_per_split * tile.keys
        _attend(q_lat, q_turned, c_kv, k_turned, parts, lse, scale, keys_per_split, tile)
        if splits == 1:
            return parts.view(B, H, L, C)
        out = q_nope.new_empty(B, H, L, C)
        _merge(parts, lse, out, tile)
    return out


def _gpu_of(x: Tensor) -> tuple[tuple[int, int], int]:
    """Compute capability and multiprocessors. The interpreter plays a small Hopper GPU."""
    if not x.is_cuda:
        return (9, 0), 4
    gpu = torch.cuda.get_device_properties(x.device)
    return (gpu.major, gpu.minor), gpu.multi_processor_count


def _padded(R: int) -> int:
    """The power of two that holds R channels. Tensor cores take at least 16."""
    return max(16, triton.next_power_of_2(R))


def _launch_options(tile: Tile) -> dict:
    """Options of a kernel that may start while the one before it drains."""
    return {"launch_pdl": True} if tile.pdl else {}


def _prepare(q_nope, q_rope, k_rope, W_UK, tables, tile) -> tuple[Tensor, Tensor, Tensor]:
    """(K0) and rotation -> q_lat [B, H, L, C], q_turned [B, H, L, R], k_turned [B, T, R]."""
    B, L, H, N = q_nope.shape
    T, R = k_rope.shape[1:]
    C = W_UK.shape[-1]
    k_rope = _fetchable(k_rope)
    q_lat = q_nope.new_empty(B, H, L, C)
    q_turned = q_nope.new_empty(B, H, L, R)
    k_turned = q_nope.new_empty(B, T, R)
    lifts = H * math.ceil(L / LIFT_TOKENS) * math.ceil(C / LIFT_CHANNELS)
    turns = math.ceil(T / TURN_KEYS)
    _prepare_kernel[(lifts + turns, B)](
        q_nope.contiguous(), q_rope.contiguous(), k_rope, W_UK.contiguous(), *tables,
        q_lat, q_turned, k_turned, T, L, k_rope.stride(0), k_rope.stride(1),
        H=H, N=N, C=C, R=R, RP=_padded(R), TOKENS=LIFT_TOKENS, CHANNELS=LIFT_CHANNELS,
        KEYS=TURN_KEYS, PDL=tile.pdl, num_warps=4)
    return q_lat, q_turned, k_turned


def _attend(q_lat, q_turned, c_kv, k_turned, parts, lse, scale, keys_per_split, tile) -> None:
    """(K1) to (K7): fill parts [S, B, G, C] and lse [S, B, G]."""
    T, C = c_kv.shape[1:]
    R = k_turned.shape[-1]
    S, B, G = lse.shape
    # Two blocks of channels: the largest power of two in C, and one for the rest.
    C0 = 1 << (C.bit_length() - 1)
    C1 = triton.next_power_of_2(C - C0) if C > C0 else 0
    RP = _padded(R)
    c_kv = _fetchable(c_kv)
    keys0 = TensorDescriptor.from_tensor(c_kv, [1, tile.keys, C0])
    keys1 = TensorDescriptor.from_tensor(c_kv, [1, tile.keys, C1 or C0])
    ropes = TensorDescriptor.from_tensor(k_turned, [1, tile.keys, RP])
    # Tiles of queries are the fastest axis of the grid. Programs that run together then read
    # the same keys: once from global memory, and often from its cache.
    _attend_kernel[(math.ceil(G / tile.queries), S, B)](
        q_lat, q_turned, keys0, keys1, ropes, parts, lse, scale * math.log2(math.e),
        T, G, keys_per_split, C=C, R=R, C0=C0, C1=C1, RP=RP,
        QUERIES=tile.queries, KEYS=tile.keys, STAGES=tile.stages, PDL=tile.pdl,
        num_warps=tile.warps, **_launch_options(tile))


def _merge(parts, lse, out, tile) -> None:
    """(K8): fill out [B, H, L, C]."""
    S, B, G = lse.shape
    C = out.shape[-1]
    _merge_kernel[(G, math.ceil(C / MERGE_CHANNELS), B)](
        parts, lse, out, G, S, C=C, SP=triton.next_power_of_2(S), CHANNELS=MERGE_CHANNELS,
        PDL=tile.pdl, num_warps=1, **_launch_options(tile))


def _fetchable(x: Tensor) -> Tensor:
    """x if the copy engine can read it, else a copy: unit last stride, 16-byte steps."""
    steps = [stride * x.element_size() for stride in x.stride()[:-1]]
    aligned = x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)
    if aligned and x.stride(-1) == 1:
        return x
    return x.clone(memory_format=torch.contiguous_format)


# ---- what is taken, and the op ---------------------------------------------------------------

def why_not(N: int, R: int, C: int, dtype: torch.dtype) -> str | None:
    """Why the kernels refuse such widths or numbers, in words that follow "it", or None.

    The one place where these limits stand. The op asks here, and so does engine/routes.py.
    """
    if C % 16 or not 16 <= C <= 256 or R % 8 or not 8 <= R <= 64 or not 0 <= N <= 128:
        return (f"takes C a multiple of 16 up to 256, R a multiple of 8 up to 64, N up to 128, "
                f"not C={C}, R={R}, N={N}")
    if INTERPRETED and dtype != torch.float32:
        return (f"takes float32 in Triton's interpreter (which multiplies bfloat16 wrongly), "
                f"not {dtype}")
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"takes bfloat16, float16 or float32, not {dtype}"
    return None


def _check(q_nope, q_rope, c_kv, k_rope, W_UK, q_cos, q_sin, k_cos, k_sin, scale) -> None:
    """Refuse in one line what the kernels do not compute.

    The op's fake asks, too, so that torch.compile refuses it while it traces.
    """
    if q_nope.ndim != 4 or k_rope.ndim != 3 or c_kv.ndim != 3:
        raise ValueError(
            f"latent_attention takes q_nope [B, L, H, N], c_kv [B, T, C], k_rope [B, T, R], "
            f"not {[*q_nope.shape]}, {[*c_kv.shape]}, {[*k_rope.shape]}")
    B, L, H, N = q_nope.shape
    T, R = k_rope.shape[1:]
    C = c_kv.shape[-1]
    numbers = {"q_rope": (q_rope, (B, L, H, R)), "c_kv": (c_kv, (B, T, C)),
               "k_rope": (k_rope, (B, T, R)), "W_UK": (W_UK, (H, N, C))}
    tables = {"q_cos": (q_cos, (L, R // 2)), "q_sin": (q_sin, (L, R // 2)),
              "k_cos": (k_cos, (T, R // 2)), "k_sin": (k_sin, (T, R // 2))}
    for name, (x, shape) in {**numbers, **tables}.items():
        if tuple(x.shape) != shape:
            raise ValueError(f"latent_attention: {name} must be {shape} to go with q_nope "
                             f"{(B, L, H, N)}, not {tuple(x.shape)}")
        if x.device != q_nope.device:
            raise ValueError(f"latent_attention: {name} is on {x.device} but q_nope on "
                             f"{q_nope.device}; put them on one device")
    dtypes = [q_nope.dtype] + [x.dtype for x, _ in numbers.values()]
    if len(set(dtypes)) > 1:
        raise TypeError(f"latent_attention: queries, cache and W_UK must share one of "
                        f"bfloat16, float16, float32, not {dtypes}")
    dtypes = [x.dtype for x, _ in tables.values()]
    if set(dtypes) != {torch.float32}:
        raise TypeError(f"latent_attention: cos and sin must be float32 (the rotation is done "
                        f"in it), not {dtypes}")
    if T < 1:
        raise ValueError("latent_attention: no keys: T must be 1 or more")
    if not 0 < scale < math.inf:
        raise ValueError(f"latent_attention: scale must be positive and finite, not {scale}")
    reason = why_not(N, R, C, q_nope.dtype)
    if reason is not None:
        raise ValueError(f"latent_attention {reason}")


@torch.library.custom_op("videomla::latent_attention", mutates_args=())
def latent_attention(
        q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, W_UK: Tensor,
        q_cos: Tensor, q_sin: Tensor, k_cos: Tensor, k_sin: Tensor, scale: float) -> Tensor:
    """(K0) to (K2): attention over the latents, for the queries of every head -> [B, H, L, C].

    q_nope [B, L, H, N], q_rope [B, L, H, R], c_kv [B, T, C], k_rope [B, T, R], both rope parts
    not yet rotated; W_UK [H, N, C]; tables [L, R/2] of the queries and [T, R/2] of the keys in
    float32.

    Every query sees every key: there is no mask, since this is the path of a full window.
    Inference only. Never runs anything but the Triton kernels: on a CPU it needs
    TRITON_INTERPRET=1 from the start of the process (slow, for tests), and raises
    RuntimeError otherwise. ValueError or TypeError in one line for what it does not take.
    """
    _check(q_nope, q_rope, c_kv, k_rope, W_UK, q_cos, q_sin, k_cos, k_sin, scale)
    if not HAS_TRITON:
        raise RuntimeError("latent_attention needs Triton, which is not installed here; "
                           "use route='materialised'")
    if not q_nope.is_cuda and not INTERPRETED:
        raise RuntimeError(f"latent_attention runs on a CUDA GPU, not on {q_nope.device.type}; "
                           f"use route='materialised'")
    if q_rope.numel() == 0:                              # no query, so no kernel
        return _empty(q_nope, c_kv)
    return _launch(q_nope, q_rope, c_kv, k_rope, W_UK, q_cos, q_sin, k_cos, k_sin, scale)


def _empty(q_nope: Tensor, c_kv: Tensor) -> Tensor:
    B, L, H, _ = q_nope.shape
    return q_nope.new_empty(B, H, L, c_kv.shape[-1])


@latent_attention.register_fake
def _(q_nope, q_rope, c_kv, k_rope, W_UK, q_cos, q_sin, k_cos, k_sin, scale):
    _check(q_nope, q_rope, c_kv, k_rope, W_UK, q_cos, q_sin, k_cos, k_sin, scale)
    return _empty(q_nope, c_kv)


def _refuse_gradients(*_args, **_kwargs):
    raise RuntimeError("latent_attention is inference only; wrap it in torch.no_grad(), or "
                       "train with route='materialised'")


# setup_context runs in the forward pass: the refusal comes where the mistake is made.
latent_attention.register_autograd(_refuse_gradients, setup_context=_refuse_gradients)
