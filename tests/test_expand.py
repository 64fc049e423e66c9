"""engine/expand.py: K and V of every head by one kernel, and by one product.

As in test_fused.py the kernel runs in a child of its own, in Triton's interpreter, and is
compiled in another for sm_90 and sm_100, without a GPU.
"""

import itertools
import json
import math
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from engine import expand, routes  # noqa: E402
from test_fused import (  # noqa: E402
    REGISTERS_ON_SM, RESERVED, SHARED_LIMIT, SHARED_ON_SM, Recorder, by_name, outcome, outcomes_of,
    pretend, registers_and_stack, turned)


def inputs(B, T, H, N, R, V, C, dtype=torch.float32, seed=0):
    """The arguments of `expand`, drawn at random."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    angle = 10 * torch.randn(T, R // 2, generator=generator)
    rows = normal(B, T, C), normal(B, T, R)
    return *rows, normal(H, N, C), normal(H, V, C), angle.cos(), angle.sin()


def reference(c_kv, k_rope, W_UK, W_UV, k_cos, k_sin):
    """[W_UK^h c_kv | rot(k_rope)] and W_UV^h c_kv in float64, with nothing clever."""
    c_kv = c_kv.double()
    content = torch.einsum("btc,hnc->bthn", c_kv, W_UK.double())
    position = turned(k_rope.double(), k_cos, k_sin)
    position = position[:, :, None].expand(-1, -1, len(W_UK), -1)
    keys = torch.cat((content, position), -1)
    values = torch.einsum("btc,hvc->bthv", c_kv, W_UV.double())
    return keys, values


def assert_close(got, want):
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        assert x.isfinite().all()
        error = (x.double() - y).abs().max()
        assert error <= 1e-5 * y.abs().max()


# ---- in the interpreter ---------------------------------------------------------------------------


# B, T, H, N, R, V, C: the paper's, the toy's, and what divides nothing
WIDTHS = [(1, 37, 12, 96, 32, 128, 192), (2, 20, 4, 24, 8, 32, 16), (2, 33, 3, 40, 24, 72, 80),
          (1, 1, 2, 8, 8, 8, 256)]


def check_any_width():
    """Tiles and groups that divide nothing, too; a tile that spans heads; a group without work."""
    for sizes in WIDTHS:
        args = inputs(*sizes)
        want = reference(*args)
        assert_close(expand.expand(*args), want)
        for tokens, columns, groups in [(16, 32, 1), (32, 16, 3), (16, 64, 2), (16, 64, 30)]:
            tile = expand.ExpandTile(tokens, columns, warps=4, stages=2, resident=1)
            assert_close(expand._launch(*args, tile=tile, groups=groups), want)


def check_the_shipped_tile():
    args = inputs(1, 150, 12, 96, 32, 128, 192)
    tile = expand.choose_expand_tile(192, 2, (9, 0))
    assert_close(expand._launch(*args, tile=tile), reference(*args))


def check_no_content_at_all():
    """A head of rope channels alone: W_UK has no lines, so there is nothing to multiply."""
    args = inputs(1, 20, 2, 0, 16, 16, 32)
    assert_close(expand.expand(*args), reference(*args))


def check_slices_of_a_cache():
    """What stands beside and behind the rows is NaN, and is not touched."""
    c_kv, k_rope, *rest = inputs(2, 21, 3, 16, 8, 24, 32)
    want = reference(c_kv, k_rope, *rest)
    for pad in (16, 3):
        c_big = torch.full((2, 40, 32 + pad), math.nan)
        k_big = torch.full((2, 40, 8 + pad), math.nan)
        c_big[:, :21, :32] = c_kv
        k_big[:, :21, :8] = k_rope
        assert_close(expand.expand(c_big[:, :21, :32], k_big[:, :21, :8], *rest), want)


def check_it_composes():
    """One graph with what stands around it, and its fake tells the shapes."""
    args = inputs(2, 9, 3, 16, 8, 24, 32)
    torch.library.opcheck(expand.expand, args, test_utils=("test_schema", "test_faketensor"))
    keys, _ = expand.expand(*args)

    def step(*some):
        keys, _ = expand.expand(*some)
        return keys * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), 2 * keys)
    args[0].requires_grad_()
    with pytest.raises(RuntimeError, match="inference only"):
        expand.expand(*args)


# ---- compiled for absent GPUs ---------------------------------------------------------------------


GEOMETRIES = {                         # H, N, R, V, C, dtype
    "paper": (12, 96, 32, 128, 192, torch.bfloat16),
    "widest": (12, 64, 64, 128, 256, torch.float16),
    "toy": (4, 24, 8, 32, 16, torch.bfloat16),
}
T = 32760


def compiled(sizes, capability: int, tile=None):
    """The tile and the compiled kernel: the module's own host code runs, with a recorder."""
    pretend(capability)
    H, N, R, V, C, dtype = sizes
    tile = tile or expand.choose_expand_tile(C, dtype.itemsize, (capability // 10, 0))
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(expand, "_expand_kernel", Recorder(expand._expand_kernel, found))
        expand._launch(*inputs(1, T, H, N, R, V, C, dtype), tile=tile)
    return tile, found["_expand_kernel"]


def check_compile(name: str, capability: int):
    """No register is spilled, and as many programs as promised share a multiprocessor. The
    tensor cores multiply what the copy engine brings, and stores are of 16 bytes."""
    tile, kernel = compiled(GEOMETRIES[name], capability)
    registers, stack = registers_and_stack(kernel)
    shared = kernel.metadata.shared
    print(f"{name}, sm_{capability}: {shared} B shared, {registers} registers", file=sys.stderr)
    assert stack == 0, f"{stack} bytes of spilled registers"
    assert shared < SHARED_LIMIT, f"{shared} bytes of shared memory"
    assert tile.resident * (shared + RESERVED) <= SHARED_ON_SM
    threads = 32 * tile.warps
    assert tile.resident * registers * threads <= REGISTERS_ON_SM
    ptx = kernel.asm["ptx"]
    instruction = {90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
    for wanted in (instruction, "cp.async.bulk.tensor", "st.global.v4"):
        assert wanted in ptx, wanted


CHECKS = {
    "interpret": by_name(check_any_width, check_the_shipped_tile, check_no_content_at_all,
                         check_slices_of_a_cache, check_it_composes),
    "compile": {},
}
for name, capability in itertools.product(GEOMETRIES, (90, 100)):
    CHECKS["compile"][f"{name}, sm_{capability}"] = partial(check_compile, name, capability)


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory):
    return outcomes_of(__file__, tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("name", CHECKS["interpret"])
def test_in_interpreter(outcomes, name):
    assert outcomes["interpret"][name] is None, outcomes["interpret"][name]


@pytest.mark.rest
@pytest.mark.parametrize("name", CHECKS["compile"])
def test_compiles_offline(outcomes, name):
    assert outcomes["compile"][name] is None, outcomes["compile"][name]


# ---- without Triton -------------------------------------------------------------------------------


def test_one_product_is_two():
    """`expand_by_product` makes the same keys and values, in lines that a dense kernel reads as
    they are: unit stride, every line on 16 bytes in bfloat16."""
    B, T, H, N, R, V, C = 2, 9, 3, 16, 8, 24, 32
    c_kv, k_rope, W_UK, W_UV, cos, sin = inputs(B, T, H, N, R, V, C)
    q_nope, q_rope = torch.randn(B, 5, H, N), torch.randn(B, 5, H, R)
    q_table = cos[:5], sin[:5]
    args = q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, q_table, (cos, sin)
    q, k, v = routes.expand_by_product(*args)
    assert_close((k.transpose(1, 2), v.transpose(1, 2)),
                 reference(c_kv, k_rope, W_UK, W_UV, cos, sin))
    assert torch.equal(q, routes.expand_heads(*args)[0])
    for x in (k, v):
        *steps, unit = x.stride()
        assert unit == 1
        assert all(step % 8 == 0 for step in steps)


def test_groups_fill_the_gpu():
    assert expand.choose_groups(256, 24, 264) == 1       # the paper's window: one wave as it is
    assert expand.choose_groups(74, 24, 264) == 3
    assert expand.choose_groups(1, 24, 264) == 24
    for blocks in (1, 99, 5000):
        assert 1 <= expand.choose_groups(blocks, 24, 264) <= 24


def test_off_a_gpu_it_says_so():
    with pytest.raises(RuntimeError, match="CUDA GPU, not on cpu"):
        expand.expand(*inputs(1, 4, 2, 8, 8, 8, 16))


if __name__ == "__main__":
    print(json.dumps({name: outcome(check) for name, check in CHECKS[sys.argv[1]].items()}))
