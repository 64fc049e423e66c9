"""FlashAttention-4 as one op of torch, where it is installed.

    B batch    L query tokens    T key tokens    H heads
    D channels of a query and a key    V value channels

FlashAttention-4 is the package flash-attn-4 (`pip install flash-attn-4`, optional; of its kin
this one is written in Python and compiled at the first call of each kind). On Hopper and
datacentre Blackwell it takes less time than cuDNN for keys and values of 128 channels. torch
can also put it behind its own scaled_dot_product_attention, but what torch 2.11 and 2.13
expect of it is an older version's answer. So it is an op here: torch.compile does not look
inside (fullgraph=True holds), and a CUDA graph records its launch as any other.

Tests: tests/test_flash4.py.
"""

import functools
import importlib
import importlib.metadata
import warnings

import torch
from torch import Tensor

PACKAGE = "flash-attn-4"
MODULE = "flash_attn.cute.interface"


@functools.cache
def _imported():
    """(the function, None), or (None, why there is none). Asked once: it imports a compiler."""
    try:
        return importlib.import_module(MODULE).flash_attn_func, None
    except Exception as error:         # its compiler looks for a driver and for libraries
        reason = f"{PACKAGE} cannot be imported here ({error})"
        if version() is not None:      # it is there, and somebody wanted it
            warnings.warn(f"{reason}; cuDNN attends in its place", stacklevel=2)
        return None, reason


def why_not(generation: int | None) -> str | None:
    """Why FlashAttention-4 is not used, in words, or None.

    `generation` is the GPU's major compute capability; None says that there is no GPU.
    """
    if generation not in (9, 10):
        return "no Hopper or datacentre Blackwell GPU (compute capability 9.x or 10.x)"
    return _imported()[1]


def version() -> str | None:
    """The version that is installed, for the record."""
    try:
        return importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return None


@torch.library.custom_op("videomla::flash4", mutates_args=())
def flash4(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of q [B, L, H, D] over k [B, T, H, D] and v [B, T, H, V] -> [B, L, H, V].

    bfloat16 or float16. Every query sees every key. Inference only. It never runs anything
    but FlashAttention-4: without it it raises RuntimeError.
    """
    attention, reason = _imported()
    if attention is None:
        raise RuntimeError(f"flash4: {reason}")
    answer = attention(q, k, v, softmax_scale=scale)
    return answer[0] if isinstance(answer, tuple) else answer        # beside it: the lse


@flash4.register_fake
def _(q, k, v, scale):
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def _refuse_gradients(*_args, **_kwargs):
    raise RuntimeError("flash4 is inference only; wrap it in torch.no_grad()")


flash4.register_autograd(_refuse_gradients, setup_context=_refuse_gradients)
