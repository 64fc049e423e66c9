"""The routes of attention by name, among them the one for GPUs, and which of them is fastest.

    B batch    L query tokens    T key tokens    H heads    N content channels per head
    R rope channels    V value channels per head    C content latent       (as in attention.py)

The fused route. Few query tokens go to the kernel of fused.py, which works on the latents.
Many need fewer operations with K and V made per head, (11) and (12) of attention.py, and then
a dense kernel. There are two of these, the *backends*: FlashAttention-4 (FA4, engine/flash4.py)
where it is installed, and cuDNN's elsewhere. Both give a multiprocessor (SM) 128 query tokens
of one head and *all* the keys, so their time comes in whole waves of SMs. A chunk of 4680
tokens and 12 heads makes 444 such tiles: 3.4 waves on the 132 SMs of an H100, and they cost 4.
`plan` therefore gives the backend the 4224 tokens that fill three waves to the last SM. The
other 456 go to our kernel, which can split keys. Both need the same latents, and nothing but
the latents.

Which route is the fastest? On a card that was measured, a linear model of its time answers
(`Gpu`). On any other card operations are counted: what was measured on one card says nothing
about another, even of the same generation. `route_name` says so then.

Tests: tests/test_engine_routes.py.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fused
from engine import flash4
from engine.expand import expand as expand_kernel
from engine.finish import latent_values
from attention import (attend_absorbed, attend_materialised, attend_reference,
                       crossing, route_flops)
from rope3d import rotate

# ---- the fused route -------------------------------------------------------------------------

# The dense kernels that the fused route knows, by the names under which people see them.
FA4 = "FA4"
CUDNN = "cuDNN"

# torch prefers cuDNN on Hopper and Blackwell. With neither of these two SDPA raises: there is
# no quiet third choice. (Never give set_priority=True: when it is left, it may write back an
# order in which flash is first. Then every later SDPA of the process is slow, also that of
# dense layers.)
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]

# Bytes of K and V at a time (paper: 201 MB a video). Beyond it the videos of a batch take turns.
SCRATCH = 2**31


@torch.compiler.assume_constant_result
def _generation(index: int | None) -> int:
    """Major compute capability of a CUDA device.

    torch.compile takes the answer as a constant: it asks while it traces, and looks no further
    into it. So it does with `_plan_on` and `_choose_on`.
    """
    return torch.cuda.get_device_capability(index)[0]


def backend(device: torch.device) -> str:
    """Which dense kernel takes the fused route's many queries on this device."""
    if device.type != "cuda":
        return CUDNN                   # as it is planned for; what runs is torch's plain formula
    return _backend_on(device.index)


@torch.compiler.assume_constant_result
def _backend_on(index: int | None) -> str:
    """`backend` for CUDA device `index`."""
    return CUDNN if flash4.why_not(_generation(index)) else FA4


def why_not_fused(device: torch.device, dtype: torch.dtype, N: int, R: int, V: int, C: int,
                  mask: Tensor | None = None, needs_grad: bool = False) -> str | None:
    """Why `attend_fused` would refuse such a call, in words to follow "route='fused'", or None.

    The kernel's limits are asked of fused.py. Those stated here are cuDNN's and FA4's, which
    take the queries that the kernel does not get.
    """
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
    reason = fused.why_not(N, R, C, dtype)
    if reason is not None:
        return reason
    if (N + R) % 8 or N + R > 128 or V % 8 or V > 128:
        return f"takes N + R and V multiples of 8 up to 128, not N + R={N + R}, V={V}"
    if device.type == "cuda" and dtype == torch.float32:
        return f"takes bfloat16 or float16, not {dtype}"
    return None


def attend_fused(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, q_table, k_table, scale,
                 mask=None, cut: int | None = None, dense: str | None = None) -> Tensor:
    """The route for GPUs, with the signature and the answer of all routes (attention.py).

    The first `cut` query tokens go to a dense kernel, by way of K and V, and the others to
    ours; `plan` says how many, unless it is given, and `backend` which, unless `dense` names
    it. For what it does not take it raises ValueError, in one line that names the route that
    works. tests/test_engine_routes.py: equal to the reference.
    """
    B, L, H, N = q_nope.shape
    T, C = c_kv.shape[1:]
    R = k_rope.shape[-1]
    V = W_UV.shape[1]
    needs_grad = _records(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV)
    reason = why_not_fused(q_nope.device, q_nope.dtype, N, R, V, C, mask, needs_grad)
    if reason is not None:
        raise ValueError(f"route='fused' {reason}; use route='materialised'")

    bytes_per_video = T * H * (N + R + V) * q_nope.element_size()
    at_once = max(1, SCRATCH // bytes_per_video)
    if B > at_once:
        answers = []
        for first in range(0, B, at_once):
            turn = slice(first, first + at_once)
            answers.append(attend_fused(q_nope[turn], q_rope[turn], c_kv[turn], k_rope[turn],
                                        W_UK, W_UV, q_table, k_table, scale, None, cut, dense))
        return torch.cat(answers)

    if dense is None:
        dense = backend(q_nope.device)
    if cut is None:
        sizes = B, L, T, H, N, R, V, C
        cut = _plan_on(q_nope.device.index, dense, *sizes) if q_nope.is_cuda else 0
    cos, sin = q_table
    answers = []
    if cut > 0:
        table = cos[:cut], sin[:cut]
        answers.append(_by_dense(q_nope[:, :cut], q_rope[:, :cut], c_kv, k_rope,
                                 W_UK, W_UV, table, k_table, scale, dense))
    if cut < L:
        table = cos[cut:], sin[cut:]
        answers.append(_by_kernel(q_nope[:, cut:], q_rope[:, cut:], c_kv, k_rope,
                                  W_UK, W_UV, table, k_table, scale))
    return answers[0] if len(answers) == 1 else torch.cat(answers, dim=1)


def _records(*tensors: Tensor) -> bool:
    """Would a gradient be wanted of what is computed from these?"""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _by_kernel(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, q_table, k_table, scale) -> Tensor:
    """Attention over the latents, then W_UV: [B, L, H, V]."""
    if FINISH == "kernel":
        return latent_values(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, *q_table, *k_table, scale)
    latent = fused.latent_attention(q_nope, q_rope, c_kv, k_rope, W_UK,
                                    *q_table, *k_table, scale)         # [B, H, L, C]
    return torch.einsum("bhlc,hvc->blhv", latent, W_UV)


# Who applies W_UV after our kernels: a product of torch's, or one kernel more (engine/finish.py).
# `python -m experiments.bench --only short` times both.
FINISHES = "product", "kernel"
FINISH = "product"


def _by_dense(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, q_table, k_table, scale,
              dense: str) -> Tensor:
    """K and V per head, then a dense kernel: [B, L, H, V]."""
    expand = UPS[UP]
    if q_nope.is_cuda and not torch.compiler.is_compiling():
        expand = _compiled(expand)
    q, k, v = expand(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, q_table, k_table)
    if dense == FA4:
        return flash4.flash4(*(x.transpose(1, 2) for x in (q, k, v)), scale)
    with sdpa_kernel(BACKENDS if q.is_cuda else [SDPBackend.MATH]):
        o = F.scaled_dot_product_attention(q, k, v, scale=scale)       # [B, H, L, V]
    return o.transpose(1, 2)


def expand_heads(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV,
                 q_table, k_table) -> tuple[Tensor, Tensor, Tensor]:
    """q [B, H, L, N+R], k [B, H, T, N+R] and v [B, H, T, V] for SDPA.

    A key of head h is [W_UK^h c_kv | rot(k_rope)]. As one product, with an identity matrix I:

        k = [c_kv | rot(k_rope)] @ [[W_UK^h, 0],
                                    [0,      I]]

    So the product itself writes each key, once. Making k_nope first and joining the parts
    would write 100 MB twice at the paper's size. Values are made from a slice of the same
    tensor.
    """
    H, N, C = W_UK.shape
    R = k_rope.shape[-1]
    rows = torch.cat((c_kv, rotate(k_rope, k_table)), dim=-1)          # [B, T, C + R]
    upper = F.pad(W_UK.permute(2, 0, 1), (0, R))                       # [C, H, N + R]
    identity = torch.eye(R, device=rows.device, dtype=rows.dtype)
    identity = identity[:, None].expand(R, H, R)                       # the same for all heads
    lower = F.pad(identity, (N, 0))                                    # [R, H, N + R]
    W_K = torch.cat((upper, lower))                                    # [C + R, H, N + R]
    k = (rows @ W_K.flatten(1)).unflatten(-1, (H, N + R))              # [B, T, H, N + R]
    v = rows[..., :C] @ W_UV.flatten(0, 1).T                           # [B, T, H * V]
    v = v.unflatten(-1, (H, -1))                                       # [B, T, H, V]
    q = torch.cat((q_nope, rotate(q_rope, q_table)), dim=-1)           # [B, L, H, N + R]
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def expand_by_product(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV,
                      q_table, k_table) -> tuple[Tensor, Tensor, Tensor]:
    """As `expand_heads`, keys and values by one product: they share each token's line.

        [k | v] = [c_kv | rot(k_rope)] @ [[W_UK^h, 0, W_UV^h],
                                          [0,      I, 0     ]]

    The rows are read once for both. R * V operations a head and token multiply zeros.
    """
    H, N, C = W_UK.shape
    R = k_rope.shape[-1]
    V = W_UV.shape[1]
    rows = torch.cat((c_kv, rotate(k_rope, k_table)), dim=-1)          # [B, T, C + R]
    nothing = W_UK.new_zeros(H, R, C)
    upper = torch.cat((W_UK, nothing, W_UV), 1).permute(2, 0, 1)       # [C, H, N + R + V]
    identity = torch.eye(R, device=rows.device, dtype=rows.dtype)
    lower = F.pad(identity, (N, V))[:, None].expand(R, H, N + R + V)
    W = torch.cat((upper, lower)).flatten(1)                           # [C + R, H (N + R + V)]
    both = (rows @ W).unflatten(-1, (H, N + R + V)).transpose(1, 2)    # [B, H, T, N + R + V]
    q = torch.cat((q_nope, rotate(q_rope, q_table)), dim=-1)           # [B, L, H, N + R]
    return q.transpose(1, 2), both[..., :N + R], both[..., N + R:]


def expand_by_kernel(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV,
                     q_table, k_table) -> tuple[Tensor, Tensor, Tensor]:
    """As `expand_heads`, keys and values by the kernel of engine/expand.py."""
    k, v = expand_kernel(c_kv, k_rope, W_UK, W_UV, *k_table)
    q = torch.cat((q_nope, rotate(q_rope, q_table)), dim=-1)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


# The ways to make K and V. `UP` is the one that is taken, since it is the fastest:
# `python -m experiments.bench --only up` times all of them.
UPS = {"two products": expand_heads, "product": expand_by_product, "kernel": expand_by_kernel}
UP = "kernel"


@functools.cache
def _compiled(expand):
    """For callers that are not compiled themselves: the elementwise parts become one kernel.
    Compiled at the first call, and never at import."""
    return torch.compile(expand, fullgraph=True)


# ---- what routes cost ------------------------------------------------------------------------

class Counts(NamedTuple):
    """What one layer costs in bfloat16, in the units of `Gpu`, in its order."""
    launch: int = 0             # kernels that wait for the one before
    key: int = 0                # keys, times waves of query tiles, in cuDNN at 128/128
    wide_key: int = 0           # the same at (C + R)/C
    kernel: int = 0             # operations of the longest program of _attend_kernel
    product: int = 0            # operations of matrix products
    byte: int = 0               # bytes that elementwise passes read or write
    flash_key: int = 0          # as `key`, in FlashAttention-4


class Gpu(NamedTuple):
    """Seconds that a card takes for each thing that `Counts` counts, and its multiprocessors.

    Every route's time is taken as *linear* in these, so they are one least-squares fit to the
    measured table: `python -m experiments.bench --fit results/bench_h100.json`.
    tests/test_engine_routes.py: they are that fit's, within the 15 % that runs differ by.
    """
    sms: int
    launch: float               # a kernel in a CUDA graph: start, ramp and drain
    key: float                  # one key, for one wave of query tiles, in cuDNN
    wide_key: float             # the same at 224/192, padded to 256: the absorbed route
    kernel: float               # one operation of _attend_kernel on one SM
    product: float              # one operation of a product, inner width some hundreds
    byte: float                 # one byte of an elementwise pass
    flash_key: float            # one key, for one wave of query tiles, in FlashAttention-4

    def seconds(self, counts: Counts) -> float:
        return sum(each * count for each, count in zip(self[1:], counts, strict=True))


# By the name that torch.cuda.get_device_name gives the measured card, and the torch there.
H100 = "NVIDIA H100 80GB HBM3", "2.11"         # cuDNN 9.19, flash-attn-4 4.0.0b36
GPUS = {H100: Gpu(sms=132, launch=6.0e-6, key=1.3e-8, wide_key=2.2e-8, kernel=2.1e-13,
                  product=2.3e-15, byte=3.5e-13, flash_key=1.05e-8)}

QUERY_TILE = 128                # query tokens of a head that cuDNN or FA4 gives an SM


def short_version(torch_version: str) -> str:
    """"2.11" of "2.11.0+cu130"."""
    return ".".join(torch_version.split(".")[:2])


def measured_as(card: str, torch_version: str) -> tuple[str, str] | None:
    """The key of GPUS for this card; None if it was never measured.

    Under a torch that was not measured it is the last one of this card: libraries move a
    card's times by some percent, another card by a factor.
    """
    exact = card, short_version(torch_version)
    if exact in GPUS:
        return exact
    same_card = [key for key in GPUS if key[0] == card]
    return same_card[-1] if same_card else None


def gpu_constants(index: int | None) -> Gpu | None:
    """The constants of CUDA device `index`; None for a card that was never measured."""
    return GPUS.get(measured_as(torch.cuda.get_device_name(index), torch.__version__))


def waves(queries: int, heads: int, sms: int) -> int:
    """Rounds of SMs that a backend needs for `queries` queries in each of `heads` heads."""
    tiles = heads * math.ceil(queries / QUERY_TILE)
    return math.ceil(tiles / sms)


def form_counts(cut: int, B: int, L: int, T: int, H: int, N: int, R: int, V: int, C: int,
                sms: int, dense: str = CUDNN) -> Counts:
    """What the fused route costs if its first `cut` query tokens go to the backend `dense`."""
    launch = keys = kernel = product = byte = 0
    if cut > 0:
        launch += 2
        keys += waves(cut, B * H, sms) * T
        product += 2 * B * T * H * C * (N + R + V)
        byte += 2 * B * T * H * (N + R + V)
    if cut < L:
        launch += 2             # preparing and merging hide behind their neighbours (pdl)
        kernel += _kernel_operations(B, L - cut, T, H, R, C, sms)
        product += 2 * B * (L - cut) * H * C * (N + V)
    key, flash_key = (0, keys) if dense == FA4 else (keys, 0)
    return Counts(launch, key, 0, kernel, product, byte, flash_key)


def _kernel_operations(B: int, L: int, T: int, H: int, R: int, C: int, sms: int) -> int:
    """Operations that one SM does, one after the other, in _attend_kernel."""
    tile = fused.choose_tile(C, R, 2, (9, 0))              # the cards in GPUS are Hopper's
    programs = B * math.ceil(L * H / tile.queries)
    key_tiles = math.ceil(T / tile.keys)
    at_once = sms * tile.resident
    splits = fused.choose_splits(programs, key_tiles, at_once)
    iterations = fused.iterations(programs, key_tiles, at_once, splits)
    return iterations * 2 * tile.queries * tile.keys * (2 * C + R) * tile.resident


def plan(B: int, L: int, T: int, H: int, N: int, R: int, V: int, C: int,
         gpu: Gpu | None, dense: str = CUDNN) -> int:
    """How many of L query tokens go to the backend: none, all, or what fills whole waves of SMs.

    On a card that was not measured operations decide: all beyond the crossing (13), else none.
    """
    if gpu is None:
        return L if L > crossing(N, V, C) else 0
    cuts = [0]
    for wave in range(1, waves(L, B * H, gpu.sms) + 1):
        full = QUERY_TILE * (wave * gpu.sms // (B * H))
        if full < L:
            cuts.append(full)
    cuts.append(L)

    def seconds(cut: int) -> float:
        return gpu.seconds(form_counts(cut, B, L, T, H, N, R, V, C, gpu.sms, dense))

    return min(cuts, key=seconds)


@torch.compiler.assume_constant_result
def _plan_on(index: int | None, dense: str, *sizes: int) -> int:
    """`plan` for CUDA device `index`."""
    return plan(*sizes, gpu_constants(index), dense)


def route_counts(route: str, B: int, L: int, T: int, H: int, N: int, R: int, V: int, C: int,
                 gpu: Gpu, dense: str = CUDNN) -> Counts:
    """What a route costs on a card.

    `gpu.seconds` makes a predicted time of it. experiments/bench.py prints that beside the
    clock.
    """
    if route == "fused":
        cut = plan(B, L, T, H, N, R, V, C, gpu, dense)
        return form_counts(cut, B, L, T, H, N, R, V, C, gpu.sms, dense)
    if route == "absorbed":
        # One key for all heads: the queries of all heads are queries of one.
        wide_key = waves(L * H, B, gpu.sms) * T
        lift = 2 * B * L * H * C * (N + V)
        byte = 4 * B * (2 * L * H + T) * (C + R)
        return Counts(launch=9, wide_key=wide_key, product=lift, byte=byte)
    up = 2 * B * T * H * C * (N + V)                               # the up-projection
    made = 2 * B * (T * H * (N + R + V) + L * H * (N + R))         # bytes of q, k and v
    if route == "materialised":                    # parts are made, then joined: three passes
        key = waves(L, B * H, gpu.sms) * T
        return Counts(launch=9, key=key, product=up, byte=3 * made)
    scores = B * H * L * T                         # of the reference: 9 passes of 2 bytes
    product = up + 2 * scores * (N + R + V)
    return Counts(launch=10, product=product, byte=made + 18 * scores)


# ---- which route to take ---------------------------------------------------------------------

def choose_route(L: int, T: int, H: int, N: int, R: int, V: int, C: int, *, B: int = 1,
                 gpu: Gpu | None = None, fusable: bool = False, dense: str = CUDNN) -> str:
    """The name of the route that "auto" takes; "fused" is among the choices if it is `fusable`.

    On a measured card that of least predicted time. Elsewhere "fused" where it runs (its `plan`
    counts operations), or of the other two the one with fewer operations, (11) against (12).
    """
    if gpu is None:
        if fusable:
            return "fused"
        absorbed = route_flops("absorbed", L, T, H, N, R, V, C)
        materialised = route_flops("materialised", L, T, H, N, R, V, C)
        return "absorbed" if absorbed < materialised else "materialised"

    def seconds(route: str) -> float:
        return gpu.seconds(route_counts(route, B, L, T, H, N, R, V, C, gpu, dense))

    routes = ["reference", "materialised", "absorbed"]
    if fusable:
        routes.append("fused")
    return min(routes, key=seconds)


@torch.compiler.assume_constant_result
def _choose_on(index: int | None, fusable: bool, B: int, *sizes: int) -> str:
    """`choose_route` for CUDA device `index`."""
    return choose_route(*sizes, B=B, gpu=gpu_constants(index), fusable=fusable,
                        dense=_backend_on(index))


def auto_route(device: torch.device, dtype: torch.dtype, B: int, L: int, T: int, H: int,
               N: int, R: int, V: int, C: int, mask=None, needs_grad: bool = False) -> str:
    """The name of the route that "auto" takes on a device.

    Off a GPU that is never "fused": there it is interpreted, or not there at all.
    """
    if device.type != "cuda":
        return choose_route(L, T, H, N, R, V, C)
    fusable = why_not_fused(device, dtype, N, R, V, C, mask, needs_grad) is None
    return _choose_on(device.index, fusable, B, L, T, H, N, R, V, C)


def attend_auto(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, q_table, k_table, scale,
                mask=None) -> Tensor:
    """The route that is expected to be the fastest on this device."""
    B, L, H, N = q_nope.shape
    T, C = c_kv.shape[1:]
    R = k_rope.shape[-1]
    V = W_UV.shape[1]
    needs_grad = _records(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV)
    name = auto_route(q_nope.device, q_nope.dtype, B, L, T, H, N, R, V, C, mask, needs_grad)
    attend = ROUTES[name]
    return attend(q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, q_table, k_table, scale, mask)


ROUTES = {
    "auto": attend_auto,
    "reference": attend_reference,
    "materialised": attend_materialised,
    "absorbed": attend_absorbed,
    "fused": attend_fused,
}


def route_name(model, batch: int, name: str) -> str:
    """What `name` comes to for a chunk of `batch` videos with a full window, for people.

    That is "dense", or the route itself, or "auto: " and the route that is taken. Of the fused
    route its kernels are named, too.
    """
    c = model.config
    if c.attention == "dense":
        return "dense"
    if c.attention == "homogeneous":               # it knows two: engine/homogeneous.py
        return "absorbed" if name == "absorbed" else "materialised"
    V = c.dim // c.heads
    weight = model.embed.weight
    sizes = dict(B=batch, L=c.chunk * c.tokens, T=c.window * c.tokens, H=c.heads, N=V - c.rope,
                 R=c.rope, V=V, C=c.latent)
    taken = auto_route(weight.device, weight.dtype, **sizes) if name == "auto" else name
    shown = taken
    if taken == "fused" and weight.is_cuda:
        dense = backend(weight.device)
        card = torch.cuda.get_device_name(weight.device)
        gpu = gpu_constants(weight.device.index)
        cut = plan(**sizes, gpu=gpu, dense=dense)
        shown = fused_name(cut, sizes["L"], dense, card, gpu is not None)
    return f"auto: {shown}" if name == "auto" else shown


def fused_name(cut: int, L: int, dense: str, card: str, measured: bool) -> str:
    """The fused route for people: which kernels take how many of L query tokens, and by what."""
    kernels = []
    if cut > 0:
        kernels.append(f"{cut} query tokens by {dense}")
    if cut < L:
        kernels.append(f"{L - cut} by our kernel")
    by = "" if measured else f"; cut by counted operations: {card} was never measured"
    return f"fused ({', '.join(kernels)}{by})"
