"""fused.py on a machine without a GPU: what the kernel computes (Triton's interpreter, float32) and what it becomes (offline compile).

Triton decides when a kernel is *decorated* whether it will be interpreted or compiled, so one process cannot do both, and neither may
leak into other tests. Hence this file is also a program: `python tests/test_fused.py interpret|compile` runs the checks of one kind and
prints one JSON line; the fixtures start both children, at once, and each check is reported as a test of its own. Triton is required.
"""
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings, strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import fused  # noqa: E402  (in a child, TRITON_INTERPRET was set or unset before the process began)

few = lambda n: settings(max_examples=n, deadline=None, derandomize=True, database=None)


def reference(q_nope, q_rope, c_kv, k_rope, W_UK, q_cos, q_sin, k_cos, k_sin, scale):
    """Equations (0), (1) and (2) of fused.py in float64, with nothing clever."""
    q_nope, q_rope, c_kv, k_rope, W_UK = (x.double() for x in (q_nope, q_rope, c_kv, k_rope, W_UK))

    def turn(x, cos, sin):
        a, b, cos, sin = x[..., 0::2], x[..., 1::2], cos.double(), sin.double()
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    q_lat = torch.einsum("blhn,hnc->blhc", q_nope, W_UK)
    position = torch.einsum("blhr,btr->blht", turn(q_rope, q_cos[:, None], q_sin[:, None]), turn(k_rope, k_cos, k_sin))
    s = scale * (torch.einsum("blhc,btc->blht", q_lat, c_kv) + position)
    return torch.einsum("blht,btc->bhlc", s.softmax(-1), c_kv), s.abs().max().item()


def inputs(B, L, H, T, C, R, N=24, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape, std=1.0: std * torch.randn(*shape, generator=g)
    q_angle, k_angle = 10 * rand(L, R // 2), 10 * rand(T, R // 2)
    tensors = (x.to(dtype) for x in (rand(B, L, H, N), rand(B, L, H, R), rand(B, T, C), rand(B, T, R), rand(H, N, C, std=max(N, 1)**-0.5)))
    return *tensors, q_angle.cos(), q_angle.sin(), k_angle.cos(), k_angle.sin(), (C + R) ** -0.5


def assert_close(out, args):
    """Relative to the largest output: 1e-5, some hundred float32 roundings (2^-24 = 6e-8 each, over sums of up to 320 + T terms), plus what
    no float32 softmax escapes: a score of size |s| is known to |s| 2^-24 absolutely, and the exponential makes that relative."""
    want, size = reference(*args)
    error = ((out.double() - want).abs().max() / want.abs().max()).item()
    assert error <= 1e-5 + 8 * size * 2**-24, (error, size)


# --- what the kernel computes (child process, TRITON_INTERPRET=1) ------------------------------------------------------------------

def check_any_size():
    """Sizes that divide nothing: channels beyond a power of two, a ragged last tile, splits of unequal length, a head with no content."""
    @few(14)
    @given(st.integers(1, 2), st.integers(1, 5), st.integers(1, 4), st.integers(1, 150), st.integers(1, 16), st.integers(1, 8),
           st.integers(0, 40), st.sampled_from([(16, 16), (32, 64), (64, 32)]), st.sampled_from([None, 1, 2, 3, 7, 128]),
           st.integers(0, 99))
    def agrees(B, L, H, T, c, r, N, block, splits, seed):
        args = inputs(B, L, H, T, 16 * c, 8 * r, N, seed)
        assert_close(fused._launch(*args, tile=fused.Tile(*block, 4, 2, 1), splits=splits), args)
    agrees()


def check_paper_and_toy_widths():
    for C, R, N, L, T in [(192, 32, 96, 7, 200), (16, 8, 24, 70, 65), (192, 32, 96, 7, 1), (256, 64, 64, 7, 64)]:
        args = inputs(2, L, 12, T, C, R, N)
        assert_close(fused.latent_attention(*args), args)
        assert_close(fused._launch(*args, tile=fused.choose_tile(C, R, 2, (9, 0)), splits=2), args)     # the tile bfloat16 would get


def check_strided_inputs_and_poison():
    """A cache is a slice of a bigger buffer: what lies beyond the slice is NaN here and must not be touched, aligned or not."""
    for pad in (16, 3):                                                       # 3 floats: rows are not on 16 bytes, a copy is made
        q_nope, q_rope, c_kv, k_rope, W_UK, *tables, scale = inputs(2, 3, 4, 75, 32, 8)
        c_big, k_big = torch.full((2, 90, 32 + pad), math.nan), torch.full((2, 90, 8 + pad), math.nan)
        c_big[:, :75, :32], k_big[:, :75, :8] = c_kv, k_rope
        q_view = q_nope.transpose(1, 2).contiguous().transpose(1, 2)          # [B, L, H, N] stored as [B, H, L, N]
        shared = c_kv[:1].expand(2, -1, -1)                                   # stride 0 over the batch
        for c in (c_big[:, :75, :32], shared):
            args = (q_view, q_rope, c, k_big[:, :75, :8], W_UK, tables[0].t().contiguous().t(), *tables[1:], scale)
            out = fused.latent_attention(*args)
            assert out.is_contiguous()
            assert_close(out, args)


def check_huge_and_tiny_scores():
    """Scores of 1e4 (a hard choice; e^1e4 overflows anything), of 1e-6 (a plain mean), and a maximum that rises in every tile."""
    for factor in (1e4, 1e-6):
        *rest, scale = inputs(1, 4, 2, 130, 32, 16)
        for splits in (1, 4):
            assert_close(fused._launch(*rest, scale * factor, tile=fused.Tile(16, 16, 4, 1, 1), splits=splits), (*rest, scale * factor))
    q_nope, q_rope, c_kv, *rest = inputs(1, 4, 2, 130, 32, 16)
    for slope in (1.0, -1.0):
        ramp = (q_nope.abs(), q_rope, c_kv.abs() * torch.linspace(0, 30, 130)[:, None] * slope, *rest)
        assert_close(fused._launch(*ramp, tile=fused.Tile(16, 16, 4, 1, 1), splits=3), ramp)


def check_merge_alone():
    """Equation (8) by itself: weights from lse that differ by hundreds, counts that are no power of two."""
    @few(8)
    @given(st.integers(1, 9), st.integers(1, 5), st.sampled_from([16, 48, 192]), st.sampled_from([1e-3, 3.0, 300.0]), st.integers(0, 99))
    def merges(S, M, C, spread, seed):
        g = torch.Generator().manual_seed(seed)
        parts, lse, out = torch.randn(S, 2, M, C, generator=g), spread * torch.randn(S, 2, M, generator=g), torch.empty(2, M, C)
        fused._merge_kernel[(M, math.ceil(C / 64), 2)](parts, lse, out, M, S, C=C, SP=1 << (S - 1).bit_length(), BLOCK_C=64, PDL=False)
        want = ((lse.double() * math.log(2)).softmax(0)[..., None] * parts.double()).sum(0)
        assert (out - want).abs().max() <= 1e-5 * (1 + spread / 10) * want.abs().max()          # the weights inherit the rounding of lse
    merges()


def check_op_composes():
    """The fake tells the truth (opcheck), and torch.compile sees one graph, also around the op."""
    args = inputs(2, 3, 2, 40, 16, 8)
    torch.library.opcheck(fused.latent_attention, args, test_utils=("test_schema", "test_faketensor"))
    step = torch.compile(lambda q, *rest: 2 * fused.latent_attention(q + 0, *rest), fullgraph=True, backend="aot_eager")
    assert_close(step(*args) / 2, args)
    none = (args[0][:, :0], args[1][:, :0], *args[2:5], args[5][:0], args[6][:0], *args[7:])
    assert fused.latent_attention(*none).shape == (2, 2, 0, 16)


def check_refusals():
    names = "q_nope q_rope c_kv k_rope W_UK q_cos q_sin k_cos k_sin scale".split()
    good = dict(zip(names, inputs(1, 2, 2, 8, 16, 8)))

    def refused(error, *words, **bad):
        with pytest.raises(error) as caught:
            fused.latent_attention(*(good | bad).values())
        assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words), str(caught.value)

    refused(RuntimeError, "inference only", "no_grad", q_nope=good["q_nope"].clone().requires_grad_())
    refused(TypeError, "share one of", c_kv=good["c_kv"].half())
    refused(TypeError, "interpreter", "float32", **{name: good[name].bfloat16() for name in names[:5]})
    refused(TypeError, "cos and sin", k_cos=good["k_cos"].double())
    refused(ValueError, "c_kv", c_kv=good["c_kv"][:, 1:])
    refused(ValueError, "q_cos", q_cos=good["q_cos"][:, 1:])
    refused(ValueError, "W_UK must be", W_UK=good["W_UK"][1:])
    refused(ValueError, "multiple of 16", c_kv=good["c_kv"][..., :8], W_UK=good["W_UK"][..., :8])
    refused(ValueError, "q_nope [B, L, H, N]", q_nope=good["q_nope"][0])
    for bad in (0.0, -1.0, math.nan, math.inf):
        refused(ValueError, "scale", scale=bad)


# --- what the kernel becomes (child process, no interpreter, no GPU) ---------------------------------------------------------------

# name -> (C, R, N), L, H, dtype, option fields of Tile. T = 32760 is the paper's window (21 latent frames of 1560), not a multiple of 64.
GEOMETRIES = {
    "paper": ((192, 32, 96), 64, 12, torch.bfloat16, {}),
    "paper, dependent launch": ((192, 32, 96), 64, 12, torch.bfloat16, {"pdl": True}),      # on sm_90 that is what ships
    "paper, plain launch": ((192, 32, 96), 64, 12, torch.bfloat16, {"pdl": False}),
    "widest": ((256, 64, 64), 64, 12, torch.float16, {}),
    "toy": ((16, 8, 24), 16, 4, torch.bfloat16, {}),
    "toy, float32": ((16, 8, 24), 16, 4, torch.float32, {}),
    "paper, float32": ((192, 32, 96), 16, 12, torch.float32, {}),
}
KERNELS = {"_prepare_kernel", "_attend_kernel", "_merge_kernel"}
SHARED_LIMIT = 232_448                                   # bytes one program may take, sm_90 and sm_100 alike
SHARED_ON_SM, REGISTERS_ON_SM, RESERVED = 233_472, 65_536, 1024       # per multiprocessor; RESERVED bytes go with every program


def compiled(geometry, capability):
    """Run fused's own host code with recorders in place of the kernels: each compiles what a GPU would be given, and stops there."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Recorder(NamedTuple):
        kernel: object

        def __getitem__(self, grid):
            return lambda *args, **options: found.update({self.kernel.__name__: self.kernel.warmup(*args, grid=grid, **options)})

    triton.runtime.driver.set_active(SimpleNamespace(
        get_current_device=lambda: capability, get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32)))
    (C, R, N), L, H, dtype, options = geometry
    tile, found = fused.choose_tile(C, R, dtype.itemsize, (capability // 10, 0))._replace(**options), {}
    with pytest.MonkeyPatch.context() as patch:
        for name in KERNELS:
            patch.setattr(fused, name, Recorder(getattr(fused, name)))
        fused._launch(*inputs(1, L, H, 32760, C, R, N, dtype=dtype), tile=tile, splits=22)
    assert set(found) == KERNELS
    return tile, found


def registers_and_stack(kernel):
    """From the binary itself, by the disassembler that Triton brings along. A spilled register needs a stack frame."""
    import triton.backends.nvidia
    tool = Path(triton.backends.nvidia.__path__[0]) / "bin" / "cuobjdump"
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    text = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    return tuple(int(re.search(rf"\b{word}:(\d+)", text)[1]) for word in ("REG", "STACK"))


def longest_carried_chain(ttir):
    """Through how many dots one loop-carried accumulator passes in an iteration, at most. Read off Triton's IR: follow each dot's third
    operand back through arithmetic (not through the broadcasts, which bring in softmax factors) to other dots and to loop arguments."""
    carried = set(re.findall(r"(%[\w#]+) = ", " ".join(re.findall(r"iter_args\((.*?)\)", ttir))))
    defined = {m[1]: (m[2], re.findall(r"%[\w#]+", m[3])) for m in re.finditer(r"^\s*(%[\w#]+) = ([\w.]+) (.*?)(?: : .*)?$", ttir, re.M)}

    def dots_to_loop_argument(value):                                         # -1: the accumulator is fresh
        if value in carried:
            return 0
        op, operands = defined.get(value, ("", []))
        if op == "tt.dot":
            below = dots_to_loop_argument(operands[2])
            return below + 1 if below >= 0 else -1
        return max([dots_to_loop_argument(x) for x in operands], default=-1) if op.startswith("arith.") else -1
    return max(dots_to_loop_argument(v) for v, (op, _) in defined.items() if op == "tt.dot")


def check_compile(name, capability):
    tile, found = compiled(GEOMETRIES[name], capability)
    for kernel_name, kernel in found.items():
        registers, stack = registers_and_stack(kernel)
        shared, threads = kernel.metadata.shared, 32 * kernel.metadata.num_warps
        print(f"{name}, sm_{capability}, {kernel_name}: {shared} B shared, {registers} registers", file=sys.stderr)
        assert stack == 0, f"{kernel_name}: {stack} bytes of spilled registers"
        assert shared < SHARED_LIMIT, f"{kernel_name}: {shared} bytes of shared memory"
        if kernel_name == "_attend_kernel":
            assert tile.resident * (shared + RESERVED) <= SHARED_ON_SM and tile.resident * registers * threads <= REGISTERS_ON_SM
            assert longest_carried_chain(kernel.asm["ttir"]) == 1             # 0 would mean that the reader above sees nothing
            if GEOMETRIES[name][3].itemsize == 2:
                assert {90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability] in kernel.asm["ptx"]


def check_chain_reader_can_fail():
    """The pattern that Triton miscompiles on Blackwell (two dots on one carried accumulator) is recognised."""
    bad = """%r = scf.for %n = %a to %b step %c iter_args(%acc = %zero) -> (tensor<64x64xf32>) : i32 {
               %x = tt.dot %p, %q, %acc, inputPrecision = tf32 : tensor<64x64xbf16> * tensor<64x64xbf16> -> tensor<64x64xf32>
               %y = tt.dot %u, %v, %x, inputPrecision = tf32 : tensor<64x64xbf16> * tensor<64x64xbf16> -> tensor<64x64xf32>"""
    assert longest_carried_chain(bad) == 2


def check_cpu_without_interpreter_is_refused():
    with pytest.raises(RuntimeError, match="CUDA GPU, not on cpu; use route='materialised'"):
        fused.latent_attention(*inputs(1, 2, 2, 8, 16, 8))


# --- the two kinds of check as programs, and as tests ------------------------------------------------------------------------------

CHECKS = {
    "interpret": {f.__name__[6:]: f for f in (check_any_size, check_paper_and_toy_widths, check_strided_inputs_and_poison,
                                              check_huge_and_tiny_scores, check_merge_alone, check_op_composes, check_refusals)},
    "compile": {f"{name}, sm_{cc}": lambda name=name, cc=cc: check_compile(name, cc) for name in GEOMETRIES for cc in (90, 100)}
    | {f.__name__[6:]: f for f in (check_chain_reader_can_fail, check_cpu_without_interpreter_is_refused)},
}


@pytest.fixture(scope="session")
def children(tmp_path_factory):
    if importlib.util.find_spec("triton") is None:
        pytest.fail("tests/test_fused.py needs Triton, also without a GPU: pip install triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    running = {kind: subprocess.Popen([sys.executable, __file__, kind], env=env | more, stdout=-1, stderr=-1, text=True)    # -1: a pipe
               for kind, more in {"interpret": {"TRITON_INTERPRET": "1"}, "compile": {}}.items()}
    output = {kind: child.communicate(timeout=300) for kind, child in running.items()}
    assert not any(child.returncode for child in running.values()), f"a child died: {output}"
    return {kind: json.loads(out.splitlines()[-1]) for kind, (out, err) in output.items()}


@pytest.mark.parametrize("name", CHECKS["interpret"])
def test_in_interpreter(children, name):
    assert children["interpret"][name] is None, children["interpret"][name]


@pytest.mark.parametrize("name", CHECKS["compile"])
def test_compiles_offline(children, name):
    assert children["compile"][name] is None, children["compile"][name]


def test_splits_fill_the_gpu_in_whole_waves():
    assert fused.choose_splits(12, 512, 264) == 22                            # L = 64: one wave of 264 programs
    assert fused.choose_splits(48, 512, 264) == 11                            # L = 256: two whole waves beat one of 240
    assert fused.choose_splits(10_000, 512, 264) <= 2 and fused.choose_splits(1, 1, 264) == 1
    assert all(1 <= fused.choose_splits(a, b, c) <= min(b, fused.MAX_SPLITS) for a in (1, 99, 500) for b in (1, 7, 3000) for c in (1, 264))


def test_imports_without_triton():
    """Only torch is needed to import the file; calling the op then says what is missing."""
    code = """if 1:
        import importlib.util as u, torch; find = u.find_spec
        u.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
        import fused; u.find_spec = find
        ones = (torch.ones(s) for s in [(1, 1, 1, 8), (1, 1, 1, 8), (1, 1, 16), (1, 1, 8), (1, 8, 16)] + 4 * [(1, 4)])
        try: fused.latent_attention(*ones, 1.0)
        except RuntimeError as error: assert "needs Triton" in str(error) and "materialised" in str(error)
        else: raise SystemExit("no error")"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


if __name__ == "__main__":
    def outcome(check):
        try:
            check()
        except BaseException:
            return traceback.format_exc()
    print(json.dumps({name: outcome(check) for name, check in CHECKS[sys.argv[1]].items()}))
