"""The fast path: latent attention as a Triton kernel, for few query tokens, and when to use it.

    B batch   L query tokens   T key tokens   H heads   C content latent   R rope channels   M = L*H rows of queries

Absorbed MLA is multi-query attention over the cache itself. Once a query is lifted to the latent, each token t has ONE key for all
heads, the row [c_kv[t] | rope(k_rope[t])] of C + R numbers, and its value is c_kv[t]: *a slice of the key*.

    (0)  q_lat[m] = W_UK^T q_nope[m]                                      [C]; one product per head
    (1)  s[m,t]  = scale * ( q_lat[m] . c_kv[t]  +  rope(q_rope[m]) . rope(k_rope[t]) )          m = (head, query token), in M
    (2)  out[m]  = sum_t softmax_t(s[m,t]) c_kv[t]                                               [C]; W_UV is applied outside

Why a kernel of our own: cuDNN does not split the key range, so 64 query tokens leave most of a GPU idle; FlexAttention pads 224/192 to
256/256 and cannot know that K and V are one tensor. Here the tile of latents is fetched once and used twice, and all heads are packed
with the query tokens into the rows of one matrix, because they share the key: 64 tokens x 12 heads are 768 rows for the tensor cores.

How a Triton kernel reads. A *program* is one instance of the kernel function; the grid says how many are started, and
`tl.program_id` tells each which part of the output is its own. A program handles *tiles*: small matrices held by its threads (in
registers or shared memory), with power-of-two sides known at compile time (`tl.constexpr`). `tl.load` and `descriptor.load` bring a tile
from global memory, `tl.dot` multiplies two tiles on the tensor cores, `tl.store` writes one back; the rest is arithmetic on whole tiles.

Online softmax. T keys do not fit on chip, so a program walks over them tile by tile and keeps three running things per row:
the largest score so far (`top`), the sum of exponentials (`den`) and the weighted sum of values (`acc`). For a new tile of scores s:

    (3)  top' = max(top, max_t s)            (4)  p = 2^(s - top')            (5)  fix = 2^(top - top')
    (6)  den' = den * fix + sum_t p          (7)  acc' = acc * fix + p @ c_kv

`fix` re-expresses the old sums relative to the new maximum, so no exponent is ever positive: scores of any size are safe. The base is 2
(scale carries a factor log2 e) since the hardware's exponential is 2^x. At the end out = acc / den, and lse = top + log2 den.

Splitting the keys. Rows alone do not fill the GPU, so the key range is cut into S splits, each a program of its own. Each split
normalises by its *own* denominator, so plain averaging would be wrong; its share of the true denominator is 2^lse:

    (8)  out = sum_s w_s out_s,   w_s = 2^lse_s / sum_s' 2^lse_s'            (shifted by max lse, as in (4))

Many query tokens need fewer operations with K and V made per head (attention.py (13)), and there cuDNN's kernel is the fastest. It gives
each multiprocessor (SM) 128 query tokens of a head and *all* the keys, so time comes in whole waves: 4680 tokens x 12 heads are 444 such
tiles, on 132 SMs 3.4 waves, and they cost 4. `plan` therefore gives cuDNN the 4224 tokens that fill three waves to the last SM and the
other 456 to the kernel above, which can split keys. Both need the same latents, and nothing but the latents.

Order of the file: the three kernels, their launch, the op, the plan.

Tests: tests/test_fused.py (all of the above in Triton's interpreter; every shipped tile compiled for sm_90 and sm_100 without a GPU).
"""
import importlib.util
import math
from typing import NamedTuple

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None      # a machine without Triton can still import this file

if HAS_TRITON:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor

    @triton.jit
    def _rotated(x, cos, sin, t, T, R: tl.constexpr):
        """Rotate a tile x [tokens, RP] in fp32. Pairs are adjacent channels: (a, b) -> (a cos - b sin, a sin + b cos)."""
        i = tl.arange(0, x.shape[1] // 2)                                                # one angle per pair
        angle = t[:, None] * (R // 2) + i[None, :]
        inside = (t < T)[:, None] & (i < R // 2)[None, :]
        c, s = tl.load(cos + angle, mask=inside, other=0.0), tl.load(sin + angle, mask=inside, other=0.0)
        a, b = tl.split(x.to(tl.float32).reshape(x.shape[0], x.shape[1] // 2, 2))
        return tl.join(a * c - b * s, a * s + b * c).reshape(x.shape[0], x.shape[1]).to(x.dtype)

    @triton.jit(do_not_specialize=["T", "L"])
    def _prepare_kernel(q_nope, q_rope, k_rope, W_UK, q_cos, q_sin, k_cos, k_sin, q_lat, q_turned, k_turned, T, L,
                        batch_stride, token_stride, H: tl.constexpr, N: tl.constexpr, C: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
                        ROWS: tl.constexpr, BLOCK_C: tl.constexpr, KEYS: tl.constexpr, PDL: tl.constexpr):
        """Everything before attention, in one launch: a program either turns KEYS keys, once instead of once per row tile, or lifts ROWS
        query tokens of one head to BLOCK_C channels of the latent, (0); that of the first channels turns their rope part too. Rows come
        out as [B, H, L]: heads are the batch of both products, this one and W_UV's, and no copy is needed to bring them there."""
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()
        task, b, ir = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, RP)
        blocks = tl.cdiv(L, ROWS)
        lifts = H * blocks * tl.cdiv(C, BLOCK_C)
        if task < lifts:
            h, l = task // blocks % H, task % blocks * ROWS + tl.arange(0, ROWS)
            i = task // (blocks * H) * BLOCK_C + tl.arange(0, BLOCK_C)
            real, source, goal = (l < L)[:, None], ((b * L + l) * H + h)[:, None], ((b * H + h) * L + l)[:, None]
            acc = tl.zeros([ROWS, BLOCK_C], tl.float32)
            for first in tl.static_range(0, N, 32):
                n = first + tl.arange(0, 32)
                q = tl.load(q_nope + source * N + n[None, :], mask=real & (n < N)[None, :], other=0.0)
                up = tl.load(W_UK + (h * N + n)[:, None] * C + i[None, :], mask=(n < N)[:, None] & (i < C)[None, :], other=0.0)
                acc = tl.dot(q, up, acc, input_precision="ieee")
            tl.store(q_lat + goal * C + i[None, :], acc.to(q_lat.dtype.element_ty), mask=real & (i < C)[None, :])
            if task < H * blocks:
                x = tl.load(q_rope + source * R + ir[None, :], mask=real & (ir < R)[None, :], other=0.0)
                tl.store(q_turned + goal * R + ir[None, :], _rotated(x, q_cos, q_sin, l, L, R), mask=real & (ir < R)[None, :])
        else:
            t = (task - lifts) * KEYS + tl.arange(0, KEYS)
            inside = (t < T)[:, None] & (ir < R)[None, :]
            k = tl.load(k_rope + b * batch_stride + t[:, None].to(tl.int64) * token_stride + ir[None, :], mask=inside, other=0.0)
            tl.store(k_turned + (b * T + t[:, None]) * R + ir[None, :], _rotated(k, k_cos, k_sin, t, T, R), mask=inside)

    # T and M vary from call to call; without this, Triton would compile again whenever their divisibility by 16 changes.
    @triton.jit(do_not_specialize=["T", "M", "keys_per_split"])
    def _attend_kernel(q_lat, q_rope, keys0, keys1, ropes, out, lse, scale2, T, M, keys_per_split,
                       C: tl.constexpr, R: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, RP: tl.constexpr,
                       BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr):
        """Equations (1)-(7) for BLOCK_M rows against one split of the keys.

        Tile sides are powers of two, and C = 192 is not: its channels are two blocks, C0 = 128 and C1 = 64 (C1 = 0: one block is enough).
        Padding to 256 instead would cost a third more products. keys0, keys1, ropes are *tensor descriptors*: the GPU's copy engine (TMA)
        fetches a box [1, BLOCK_N, width] in one instruction, and fills what lies outside the tensor with zeros (T and C need not divide).
        """
        row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        split, b, B = tl.program_id(1), tl.program_id(2), tl.num_programs(2)
        i0, i1, ir = tl.arange(0, C0), C0 + tl.arange(0, C1 if C1 else 1), tl.arange(0, RP)
        real = (row < M)[:, None]                                      # rows past M compute nonsense that is never stored
        m = (b * M + row)[:, None].to(tl.int64)                        # q_lat [B, H, L, C] read as [B*M, C]
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()                      # the last kernel may be launched, and waits there
            tl.extra.cuda.gdc_wait()                                   # queries and turned keys are complete from here on
        q0 = tl.load(q_lat + m * C + i0[None, :], mask=real, other=0.0)
        qr = tl.load(q_rope + m * R + ir[None, :], mask=real & (ir < R)[None, :], other=0.0)
        if C1:
            q1 = tl.load(q_lat + m * C + i1[None, :], mask=real & (i1 < C)[None, :], other=0.0)
            acc1 = tl.zeros([BLOCK_M, C1], tl.float32)
        acc0 = tl.zeros([BLOCK_M, C0], tl.float32)
        top, den = tl.full([BLOCK_M], -float("inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)

        first = split * keys_per_split
        for n in tl.range(first, tl.minimum(first + keys_per_split, T), BLOCK_N, num_stages=STAGES):
            # Fetch. STAGES tiles are in flight at once, so the next tile arrives while this one is multiplied.
            k0 = keys0.load([b, n, 0]).reshape(BLOCK_N, C0)
            if C1:
                k1 = keys1.load([b, n, C0]).reshape(BLOCK_N, C1)
            kr = ropes.load([b, n, 0]).reshape(BLOCK_N, RP)
            t = n + tl.arange(0, BLOCK_N)

            # (1) The dots over channel blocks add into one score tile, new in every iteration. (On datacentre Blackwell, Triton up to 3.7
            # miscompiles two dots into one accumulator that is *carried* from iteration to iteration; acc0 and acc1 get one dot each.)
            s = tl.dot(q0, k0.T, input_precision="ieee")               # "ieee" concerns float32 inputs only: no silent TF32
            if C1:
                s = tl.dot(q1, k1.T, s, input_precision="ieee")
            s = tl.dot(qr, kr.T, s, input_precision="ieee")
            if n + BLOCK_N > T:                                        # only the last tile of all has keys that do not exist
                s = tl.where((t < T)[None, :], s, -float("inf"))

            new = tl.maximum(top, tl.max(s, 1) * scale2)               # (3)
            p = tl.exp2(s * scale2 - new[:, None])                     # (4) one fused multiply-add, one 2^x
            fix = tl.exp2(top - new)                                   # (5)
            top, den = new, den * fix + tl.sum(p, 1)                   # (6) the sum takes p before it is rounded to the input's type
            p = p.to(k0.dtype)
            acc0 = tl.dot(p, k0, acc0 * fix[:, None], input_precision="ieee")            # (7) the same tile, now as value
            if C1:
                acc1 = tl.dot(p, k1, acc1 * fix[:, None], input_precision="ieee")

        m = (split * B + b).to(tl.int64) * M + row                     # partial results are [S, B, M, C] and [S, B, M]
        tl.store(out + m[:, None] * C + i0[None, :], (acc0 / den[:, None]).to(out.dtype.element_ty), mask=real)
        if C1:
            tl.store(out + m[:, None] * C + i1[None, :], (acc1 / den[:, None]).to(out.dtype.element_ty), mask=real & (i1 < C)[None, :])
        tl.store(lse + m, top + tl.log2(den), mask=row < M)

    @triton.jit(do_not_specialize=["M", "S"])
    def _merge_kernel(parts, lse, out, M, S, C: tl.constexpr, SP: tl.constexpr, BLOCK_C: tl.constexpr, PDL: tl.constexpr):
        """Equation (8) for one row and BLOCK_C channels: all S parts are fetched at once as one tile, since latency is all it costs."""
        if PDL:
            tl.extra.cuda.gdc_wait()
        row, i, b, B = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C), tl.program_id(2), tl.num_programs(2)
        s = tl.arange(0, SP)
        m = (s * B + b).to(tl.int64) * M + row
        z = tl.load(lse + m, mask=s < S, other=-float("inf"))          # a split that does not exist has weight 2^-inf = 0
        w = tl.exp2(z - tl.max(z, 0))
        x = tl.load(parts + m[:, None] * C + i[None, :], mask=(s < S)[:, None] & (i < C)[None, :], other=0.0).to(tl.float32)
        x = tl.sum(x * (w / tl.sum(w, 0))[:, None], 0)                 # (8)
        tl.store(out + (b * M + row).to(tl.int64) * C + i, x.to(out.dtype.element_ty), mask=i < C)


class Tile(NamedTuple):
    """How the work is cut. Not a tuning table: few entries, each with its reason, each compiled offline by the tests."""
    block_m: int                # rows (query token, head) per program
    block_n: int                # keys per iteration
    warps: int                  # 4 warps = one warpgroup, the unit that issues a Hopper matrix instruction for 64 rows
    stages: int                 # key tiles in flight
    resident: int               # programs that share one multiprocessor
    pdl: bool = False           # programmatic dependent launch (sm_90 on): the next kernel starts while this one drains


MAX_SPLITS = 128                # the merge holds one tile of that many parts
INTERPRETED = HAS_TRITON and not isinstance(_attend_kernel, triton.JITFunction)       # TRITON_INTERPRET=1 when this file was imported
PREPARE = 16, 64, 64            # query tokens and channels of a lifting program, keys of a turning one: small, since latency is the cost
MERGE = 64, 1                   # channels and warps of a merging program: small ones, so that all of them are resident at once


def choose_tile(C: int, R: int, itemsize: int, capability: tuple[int, int]) -> Tile:
    """The tile for these widths, element size and GPU generation. Held to its limits by test_fused.py::test_compiles_offline."""
    if itemsize == 4:                              # float32 never uses tensor cores here (exactness), so small tiles or registers spill
        return Tile(16, 16, warps=8, stages=1, resident=1)
    if C > 192 or R > 32 or capability[0] not in (9, 10):
        return Tile(64, 32, warps=4, stages=2, resident=2 if capability[0] == 9 else 1)
    if capability[0] == 10:                        # 128 rows are the native height of Blackwell's matrix unit (tcgen05)
        return Tile(128, 64, warps=8, stages=2, resident=1)
    # Hopper: two small programs per multiprocessor instead of one of 128 rows. They do not wait for each other, so while one computes
    # exponentials the other has the tensor cores. Three stages of 64 keys are the deepest of which two fit (115 kB of 228 kB each).
    return Tile(64, 64, warps=4, stages=3, resident=2, pdl=True)


def choose_splits(programs: int, tiles: int, slots: int) -> int:
    """Into how many parts to cut `tiles` key tiles, when `programs` would run without cutting and the GPU runs `slots` at a time.

    Time = waves of programs x (iterations of one program + OVERHEAD), in units of one iteration; take the smallest S that is best.
    At the paper's size on 132 SMs, L = 64: 12 row tiles x 22 splits = 264 programs, exactly one wave of two per multiprocessor.
    """
    return min(range(1, min(tiles, MAX_SPLITS) + 1), key=lambda S: (iterations(programs, tiles, slots, S), S))


def iterations(programs: int, tiles: int, slots: int, splits: int) -> int:
    """What `choose_splits` minimises, and what the time of a launch is proportional to (`form_counts`)."""
    OVERHEAD = 4                                   # start, drain, writing and merging the part: about four iterations
    return math.ceil(programs * splits / slots) * (math.ceil(tiles / splits) + OVERHEAD)


def _fetchable(x: Tensor) -> Tensor:
    """x itself where the copy engine can read it (unit last stride, rows on 16 bytes), else a compact copy."""
    steps = [s * x.element_size() for s in x.stride()[:-1]]
    return x if x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and all(s > 0 and s % 16 == 0 for s in steps) else \
        x.clone(memory_format=torch.contiguous_format)


def _launch(q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, W_UK: Tensor, q_cos: Tensor, q_sin: Tensor, k_cos: Tensor,
            k_sin: Tensor, scale: float, tile: Tile | None = None, splits: int | None = None) -> Tensor:
    """The host's side of the kernels; `tile` and `splits` are for tests and timing sweeps."""
    (B, L, H, N), (T, C), R, M = q_nope.shape, c_kv.shape[1:], k_rope.shape[-1], q_nope.shape[1] * q_nope.shape[2]
    gpu = torch.cuda.get_device_properties(q_nope.device) if q_nope.is_cuda else None    # the interpreter has no GPU: play a small one
    tile = tile or choose_tile(C, R, q_nope.element_size(), (gpu.major, gpu.minor) if gpu else (9, 0))
    tile = tile._replace(pdl=tile.pdl and not INTERPRETED)             # the interpreter runs one program after the other
    rows, tiles = math.ceil(M / tile.block_m), math.ceil(T / tile.block_n)
    splits = splits or choose_splits(B * rows, tiles, (gpu.multi_processor_count if gpu else 4) * tile.resident)
    tiles_per_split = math.ceil(tiles / splits)
    S = math.ceil(tiles / tiles_per_split)                             # no split is empty: its denominator would be zero

    C0 = 1 << (C.bit_length() - 1)                                     # the largest power of two in C, and a second block for the rest
    C1 = triton.next_power_of_2(C - C0) if C > C0 else 0
    RP = max(16, triton.next_power_of_2(R))                            # tensor cores take at least 16 channels
    q_nope, q_rope, W_UK, *tables = (x.contiguous() for x in (q_nope, q_rope, W_UK, q_cos, q_sin, k_cos, k_sin))
    c_kv, k_rope, new = _fetchable(c_kv), _fetchable(k_rope), q_nope.new_empty
    q_lat, q_turned, k_turned, out = new(B, M, C), new(B, M, R), new(B, T, R), new(B, H, L, C)
    # Parts have the dtype of the input. Rounding them adds at most what rounding the output does, and halves the traffic of the merge.
    parts, lse = out if S == 1 else new(S, B, M, C), new(S, B, M, dtype=torch.float32)
    follow = {"launch_pdl": True} if tile.pdl else {}
    with torch.cuda.device_of(q_nope):                                 # Triton launches on the current device
        lift, block_c, turn = PREPARE
        _prepare_kernel[(H * math.ceil(L / lift) * math.ceil(C / block_c) + math.ceil(T / turn), B)](
            q_nope, q_rope, k_rope, W_UK, *tables, q_lat, q_turned, k_turned, T, L, k_rope.stride(0), k_rope.stride(1),
            H=H, N=N, C=C, R=R, RP=RP, ROWS=lift, BLOCK_C=block_c, KEYS=turn, PDL=tile.pdl, num_warps=4)
        box = lambda x, width: TensorDescriptor.from_tensor(x, [1, tile.block_n, width])
        # Row tiles are the fastest grid axis: programs that run together read the same keys, so global memory is read once, L2 often.
        _attend_kernel[(rows, S, B)](
            q_lat, q_turned, box(c_kv, C0), box(c_kv, C1 or C0), box(k_turned, RP), parts, lse, scale * math.log2(math.e),
            T, M, tiles_per_split * tile.block_n, C=C, R=R, C0=C0, C1=C1, RP=RP, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            STAGES=tile.stages, PDL=tile.pdl, num_warps=tile.warps, **follow)
        if S > 1:
            width, warps = MERGE
            _merge_kernel[(M, math.ceil(C / width), B)](parts, lse, out, M, S, C=C, SP=triton.next_power_of_2(S), BLOCK_C=width,
                                                        PDL=tile.pdl, num_warps=warps, **follow)
    return out


def _check(q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, W_UK: Tensor, q_cos: Tensor, q_sin: Tensor, k_cos: Tensor,
           k_sin: Tensor, scale: float) -> None:
    """Refuse in one line what the kernels do not compute; called by the op and by its fake, so torch.compile refuses it while tracing."""
    if q_nope.ndim != 4 or k_rope.ndim != 3 or c_kv.ndim != 3:
        raise ValueError(f"latent_attention takes q_nope [B, L, H, N], c_kv [B, T, C], k_rope [B, T, R], not {[*q_nope.shape]}, "
                         f"{[*c_kv.shape]}, {[*k_rope.shape]}")
    (B, L, H, N), (_, T, R), C = q_nope.shape, k_rope.shape, c_kv.shape[2]
    tables = {"q_cos": (q_cos, (L, R // 2)), "q_sin": (q_sin, (L, R // 2)), "k_cos": (k_cos, (T, R // 2)), "k_sin": (k_sin, (T, R // 2))}
    shapes = {"q_rope": (q_rope, (B, L, H, R)), "c_kv": (c_kv, (B, T, C)), "k_rope": (k_rope, (B, T, R)), "W_UK": (W_UK, (H, N, C)),
              **tables}
    for name, (x, shape) in shapes.items():
        if tuple(x.shape) != shape:
            raise ValueError(f"latent_attention: {name} must be {shape} to go with q_nope {(B, L, H, N)}, not {tuple(x.shape)}")
        if x.device != q_nope.device:
            raise ValueError(f"latent_attention: {name} is on {x.device} but q_nope on {q_nope.device}; put them on one device")
    if C % 16 or not 16 <= C <= 256 or R % 8 or not 8 <= R <= 64 or T < 1 or N > 128:
        raise ValueError("latent_attention: C a multiple of 16 up to 256, R a multiple of 8 up to 64, N up to 128, T >= 1; not "
                         f"C={C}, R={R}, N={N}, T={T}")
    dtypes = [x.dtype for x in (q_nope, q_rope, c_kv, k_rope, W_UK)]
    if len(set(dtypes)) > 1 or dtypes[0] not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"latent_attention: queries, cache and W_UK must share one of bfloat16, float16, float32, not {dtypes}")
    if any(x.dtype != torch.float32 for x, _ in tables.values()):
        raise TypeError("latent_attention: cos and sin must be float32 (the rotation is done in it), not "
                        f"{[x.dtype for x, _ in tables.values()]}")
    if not 0 < scale < math.inf:
        raise ValueError(f"latent_attention: scale must be positive and finite, not {scale}")


@torch.library.custom_op("videomla::latent_attention", mutates_args=())
def latent_attention(q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor, W_UK: Tensor, q_cos: Tensor, q_sin: Tensor,
                     k_cos: Tensor, k_sin: Tensor, scale: float) -> Tensor:
    """Equations (0)-(2): q_nope [B,L,H,N], q_rope [B,L,H,R], c_kv [B,T,C], k_rope [B,T,R], both rope parts unrotated, W_UK [H,N,C],
    tables [L,R/2] of the queries and [T,R/2] of the keys -> [B,H,L,C].

    Every key is attended to (no mask: this is the path of a full window). Inference only. Never runs anything but the Triton kernels: on
    a CPU it needs TRITON_INTERPRET=1 from the start of the process (slow, for tests), and otherwise raises.
    """
    _check(q_nope, q_rope, c_kv, k_rope, W_UK, q_cos, q_sin, k_cos, k_sin, scale)
    if not HAS_TRITON:
        raise RuntimeError("latent_attention needs Triton, which is not installed here; use route='materialised'")
    if not q_nope.is_cuda and not INTERPRETED:
        raise RuntimeError(f"latent_attention runs on a CUDA GPU, not on {q_nope.device.type}; use route='materialised'")
    if INTERPRETED and q_nope.dtype == torch.bfloat16:
        raise TypeError("Triton's interpreter multiplies bfloat16 wrongly; give latent_attention float32 there")
    return _launch(q_nope, q_rope, c_kv, k_rope, W_UK, q_cos, q_sin, k_cos, k_sin, scale) if q_rope.numel() else _empty(q_nope, c_kv)


def _empty(q_nope: Tensor, c_kv: Tensor) -> Tensor:
    B, L, H, _ = q_nope.shape
    return q_nope.new_empty(B, H, L, c_kv.shape[2])


@latent_attention.register_fake
def _(q_nope, q_rope, c_kv, k_rope, W_UK, q_cos, q_sin, k_cos, k_sin, scale):
    _check(q_nope, q_rope, c_kv, k_rope, W_UK, q_cos, q_sin, k_cos, k_sin, scale)
    return _empty(q_nope, c_kv)


def _refuse_gradients(*_args, **_kwargs):
    raise RuntimeError("latent_attention is inference only; wrap it in torch.no_grad(), or train with route='materialised'")


latent_attention.register_autograd(_refuse_gradients, setup_context=_refuse_gradients)   # setup_context runs in the forward pass already


# ---- when it pays ------------------------------------------------------------------------------------------------------------------------

class Gpu(NamedTuple):
    """What predicts times on a kind of GPU: its multiprocessors, and seconds for each thing that routes are counted in. Every route's
    time is taken as *linear* in these six, so they are one least-squares fit to the measured table: `python -m experiments.bench --fit
    results/bench_h100.json`. test_fast_path.py: these numbers are that fit's, within 15 % (what one run differs from another)."""
    sms: int = 132
    launch: float = 6.0e-6      # a kernel in a CUDA graph that waits for the one before: start, ramp and drain
    key: float = 1.3e-8         # cuDNN, 128/128: one key, for one wave of query tiles
    wide_key: float = 2.2e-8    # the same at (C + R)/C = 224/192, padded to 256: the absorbed route
    kernel: float = 2.1e-13     # one operation of _attend_kernel on one SM
    product: float = 2.5e-15    # one operation of a matrix product with an inner width of some hundreds
    byte: float = 4.3e-13       # one byte that an elementwise pass reads or writes

    def seconds(self, counts: tuple) -> float:
        return sum(each * count for each, count in zip(self[1:], counts, strict=True))


GPUS = {(9, 0): Gpu()}          # H100 80GB HBM3, torch 2.11, cuDNN 9.19
QUERY_TILE = 128                # query tokens of a head that cuDNN gives an SM; they see all the keys


def gpu_constants(index: int | None) -> Gpu | None:
    """The table's entry for CUDA device `index`, with its own count of SMs; None for a GPU that was never measured."""
    gpu = torch.cuda.get_device_properties(index)
    known = GPUS.get((gpu.major, gpu.minor))
    return known and known._replace(sms=gpu.multi_processor_count)


def waves(rows: int, heads: int, sms: int) -> int:
    """Rounds of SMs that cuDNN needs for `rows` query rows in each of `heads` heads."""
    return math.ceil(heads * math.ceil(rows / QUERY_TILE) / sms)


def form_counts(cut: int, B: int, L: int, T: int, H: int, N: int, R: int, V: int, C: int, sms: int) -> tuple:
    """What is counted, in `Gpu`'s order, when the first `cut` query tokens go through K, V and cuDNN and the others through the kernel."""
    launch = key = kernel = product = byte = 0
    if cut:
        launch, key = 2, waves(cut, B * H, sms) * T
        product, byte = 2 * B * T * H * C * (N + R + V), 2 * B * T * H * (N + R + V)
    if cut < L:                                            # prepare and merge hide behind their neighbours: programmatic dependent launch
        tile = choose_tile(C, R, 2, (9, 0))
        programs, tiles, slots = B * math.ceil((L - cut) * H / tile.block_m), math.ceil(T / tile.block_n), sms * tile.resident
        steps = iterations(programs, tiles, slots, choose_splits(programs, tiles, slots))
        launch, kernel = launch + 2, steps * 2 * tile.block_m * tile.block_n * (2 * C + R) * tile.resident
        product += 2 * B * (L - cut) * H * C * (N + V)
    return launch, key, 0, kernel, product, byte


def plan(B: int, L: int, T: int, H: int, N: int, R: int, V: int, C: int, gpu: Gpu | None) -> int:
    """How many of L query tokens go to cuDNN: none, all, or as many as fill whole waves of SMs; the rest go to the kernel.

    Without constants for this GPU only the count of operations speaks: L against (13). test_fast_path.py::test_plan.
    """
    if gpu is None:
        return L if 2 * C > N + V and L > C * (N + V) / (2 * C - N - V) else 0
    full = {QUERY_TILE * (wave * gpu.sms // (B * H)) for wave in range(1, waves(L, B * H, gpu.sms) + 1)}
    seconds = lambda cut: gpu.seconds(form_counts(cut, B, L, T, H, N, R, V, C, gpu.sms))
    return min(sorted({0, L} | {cut for cut in full if cut < L}), key=seconds)


@torch.compiler.assume_constant_result
def plan_on(index: int | None, *sizes: int) -> int:
    """`plan` for CUDA device `index`. torch.compile takes the answer as a constant: it asks while tracing, and looks no further into it."""
    return plan(*sizes, gpu_constants(index))
