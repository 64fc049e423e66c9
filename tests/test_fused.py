"""fused.py without a GPU: what the kernels compute, and what they are compiled to.

What they compute is checked in Triton's interpreter, in float32. What they become is checked by
compiling every shipped tile offline.

Triton decides when a kernel is *decorated* whether it will be interpreted or compiled. So one
process cannot do both, and neither may leak into other tests. Hence this file is also a program:
`python tests/test_fused.py interpret|compile` runs the checks of one kind and prints one line of
JSON. The fixture starts both at once, and each check is reported as a test of its own. Triton is
required.
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
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import fused  # noqa: E402  (in a child, TRITON_INTERPRET was set or unset before it began)

pytestmark = pytest.mark.rest             # pytest.ini says what that means

NAMES = "q_nope q_rope c_kv k_rope W_UK q_cos q_sin k_cos k_sin scale".split()


def few(number: int) -> settings:
    return settings(max_examples=number, deadline=None, derandomize=True, database=None)


def turned(x, cos, sin):
    a = x[..., 0::2]
    b = x[..., 1::2]
    cos = cos.double()
    sin = sin.double()
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def reference(q_nope, q_rope, c_kv, k_rope, W_UK, q_cos, q_sin, k_cos, k_sin, scale):
    """(K0) to (K2) of fused.py in float64, with nothing clever; and the largest score."""
    c_kv = c_kv.double()
    q_lat = torch.einsum("blhn,hnc->blhc", q_nope.double(), W_UK.double())
    q_turned = turned(q_rope.double(), q_cos[:, None], q_sin[:, None])
    k_turned = turned(k_rope.double(), k_cos, k_sin)
    content = torch.einsum("blhc,btc->blht", q_lat, c_kv)
    position = torch.einsum("blhr,btr->blht", q_turned, k_turned)
    s = scale * (content + position)
    return torch.einsum("blht,btc->bhlc", s.softmax(-1), c_kv), s.abs().max().item()


def inputs(B, L, H, T, C, R, N=24, seed=0, dtype=torch.float32):
    """The arguments of `latent_attention`, drawn at random."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    q_angle = 10 * normal(L, R // 2)
    k_angle = 10 * normal(T, R // 2)
    queries = [normal(B, L, H, N), normal(B, L, H, R)]
    cache = [normal(B, T, C), normal(B, T, R)]
    W_UK = normal(H, N, C) * max(N, 1) ** -0.5
    tensors = [x.to(dtype) for x in (*queries, *cache, W_UK)]
    tables = [q_angle.cos(), q_angle.sin(), k_angle.cos(), k_angle.sin()]
    return *tensors, *tables, (C + R) ** -0.5


def assert_close(out, args):
    """Relative to the largest output: 1e-5, plus what no float32 softmax escapes.

    1e-5 are some hundred float32 roundings (2^-24 = 6e-8 each, over sums of up to 320 + T terms).
    A score of size |s| is known to |s| 2^-24 absolutely, and the exponential makes that relative.
    """
    want, size = reference(*args)
    error = ((out.double() - want).abs().max() / want.abs().max()).item()
    assert error <= 1e-5 + 8 * size * 2**-24, (error, size)


# ---- what the kernels compute (child process, TRITON_INTERPRET=1) ---------------------------------


def check_any_size():
    """Sizes that divide nothing: channels beyond a power of two, a ragged last tile, splits of
    unequal length, a head with no content."""
    @few(14)
    @given(B=st.integers(1, 2), L=st.integers(1, 5), H=st.integers(1, 4), T=st.integers(1, 150),
           c=st.integers(1, 16), r=st.integers(1, 8), N=st.integers(0, 40),
           block=st.sampled_from([(16, 16), (32, 64), (64, 32)]),
           splits=st.sampled_from([None, 1, 2, 3, 7, 128]), seed=st.integers(0, 99))
    def agrees(B, L, H, T, c, r, N, block, splits, seed):
        args = inputs(B, L, H, T, 16 * c, 8 * r, N, seed)
        tile = fused.Tile(*block, warps=4, stages=2, resident=1)
        assert_close(fused._launch(*args, tile=tile, splits=splits), args)

    agrees()


def check_paper_and_toy_widths():
    widths = [(192, 32, 96, 7, 130), (16, 8, 24, 70, 65), (192, 32, 96, 7, 1), (256, 64, 64, 7, 64)]
    for C, R, N, L, T in widths:
        args = inputs(1, L, 6, T, C, R, N)
        assert_close(fused.latent_attention(*args), args)
        tile = fused.choose_tile(C, R, 2, (9, 0))        # the tile that bfloat16 would get
        assert_close(fused._launch(*args, tile=tile, splits=2), args)


def check_strided_inputs_and_poison():
    """A cache is a slice of a bigger buffer. What lies beyond the slice is NaN here and must not
    be touched, aligned or not."""
    for pad in (16, 3):                # 3 floats: lines are not on 16 bytes, a copy is made
        q_nope, q_rope, c_kv, k_rope, W_UK, q_cos, *tables, scale = inputs(2, 3, 4, 75, 32, 8)
        c_big = torch.full((2, 90, 32 + pad), math.nan)
        k_big = torch.full((2, 90, 8 + pad), math.nan)
        c_big[:, :75, :32] = c_kv
        k_big[:, :75, :8] = k_rope
        # [B, L, H, N] stored as [B, H, L, N], and a table stored transposed.
        q_view = q_nope.transpose(1, 2).contiguous().transpose(1, 2)
        cos_view = q_cos.t().contiguous().t()
        one_for_all = c_kv[:1].expand(2, -1, -1)         # stride 0 over the batch
        for c in (c_big[:, :75, :32], one_for_all):
            args = (q_view, q_rope, c, k_big[:, :75, :8], W_UK, cos_view, *tables, scale)
            out = fused.latent_attention(*args)
            assert out.is_contiguous()
            assert_close(out, args)


def check_huge_and_tiny_scores():
    """Scores of 1e4 (a hard choice; e^1e4 overflows anything), of 1e-6 (a plain mean), and a
    maximum that rises in every tile."""
    tile = fused.Tile(16, 16, warps=4, stages=1, resident=1)
    *rest, scale = inputs(1, 4, 2, 130, 32, 16)
    for factor in (1e4, 1e-6):
        for splits in (1, 4):
            args = (*rest, scale * factor)
            assert_close(fused._launch(*args, tile=tile, splits=splits), args)
    q_nope, q_rope, c_kv, *rest = inputs(1, 4, 2, 130, 32, 16)
    slope = torch.linspace(0, 30, 130)[:, None]
    for sign in (1.0, -1.0):
        ramp = (q_nope.abs(), q_rope, c_kv.abs() * slope * sign, *rest)
        assert_close(fused._launch(*ramp, tile=tile, splits=3), ramp)


def check_merge_alone():
    """(K8) by itself: weights from lse that differ by hundreds, counts that are no power of two."""
    @few(8)
    @given(S=st.integers(1, 9), G=st.integers(1, 5), C=st.sampled_from([16, 48, 192]),
           spread=st.sampled_from([1e-3, 3.0, 300.0]), seed=st.integers(0, 99))
    def merges(S, G, C, spread, seed):
        generator = torch.Generator().manual_seed(seed)
        parts = torch.randn(S, 2, G, C, generator=generator)
        lse = spread * torch.randn(S, 2, G, generator=generator)
        out = torch.empty(2, G, C)
        SP = 1 << (S - 1).bit_length()
        grid = G, math.ceil(C / 64), 2
        fused._merge_kernel[grid](parts, lse, out, G, S, C=C, SP=SP, CHANNELS=64, PDL=False)
        weight = (lse.double() * math.log(2)).softmax(0)
        want = (weight[..., None] * parts.double()).sum(0)
        tolerance = 1e-5 * (1 + spread / 10)             # the weights inherit the rounding of lse
        assert (out - want).abs().max() <= tolerance * want.abs().max()

    merges()


def check_op_composes():
    """The fake tells the truth (opcheck), and torch.compile sees one graph, also around the op."""
    args = inputs(2, 3, 2, 40, 16, 8)
    tests = "test_schema", "test_faketensor"
    torch.library.opcheck(fused.latent_attention, args, test_utils=tests)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, *rest):
        return 2 * fused.latent_attention(q + 0, *rest)

    assert_close(step(*args) / 2, args)
    q_nope, q_rope, c_kv, k_rope, W_UK, q_cos, q_sin, *rest = args
    no_queries = q_nope[:, :0], q_rope[:, :0], c_kv, k_rope, W_UK, q_cos[:0], q_sin[:0], *rest
    assert fused.latent_attention(*no_queries).shape == (2, 2, 0, 16)


def check_refusals():
    good = dict(zip(NAMES, inputs(1, 2, 2, 8, 16, 8)))

    def refused(error, *words, **bad):
        with pytest.raises(error) as caught:
            fused.latent_attention(*(good | bad).values())
        said = str(caught.value)
        assert "\n" not in said and all(word in said for word in words), said

    wants_gradient = good["q_nope"].clone().requires_grad_()
    refused(RuntimeError, "inference only", "no_grad", q_nope=wants_gradient)
    refused(TypeError, "share one of", c_kv=good["c_kv"].half())
    bfloat16 = {name: good[name].bfloat16() for name in NAMES[:5]}
    refused(ValueError, "interpreter", "float32", **bfloat16)
    refused(TypeError, "cos and sin", k_cos=good["k_cos"].double())
    refused(ValueError, "c_kv", c_kv=good["c_kv"][:, 1:])
    refused(ValueError, "q_cos", q_cos=good["q_cos"][:, 1:])
    refused(ValueError, "W_UK must be", W_UK=good["W_UK"][1:])
    narrow = dict(c_kv=good["c_kv"][..., :8], W_UK=good["W_UK"][..., :8])
    refused(ValueError, "multiple of 16", **narrow)
    no_keys = {name: good[name][:, :0] for name in ("c_kv", "k_rope")}
    no_keys |= {name: good[name][:0] for name in ("k_cos", "k_sin")}
    refused(ValueError, "T must be 1", **no_keys)
    refused(ValueError, "q_nope [B, L, H, N]", q_nope=good["q_nope"][0])
    for bad in (0.0, -1.0, math.nan, math.inf):
        refused(ValueError, "scale", scale=bad)


# ---- what the kernels become (child process, no interpreter, no GPU) ------------------------------

# name -> (C, R, N), L, H, dtype, option fields of Tile.
# T = 32760 is the paper's window (21 latent frames of 1560 tokens), not a multiple of 64.
PAPER = 192, 32, 96
TOY = 16, 8, 24
GEOMETRIES = {
    "paper": (PAPER, 64, 12, torch.bfloat16, {}),
    "paper, dependent launch": (PAPER, 64, 12, torch.bfloat16, {"pdl": True}),     # ships on sm_90
    "paper, plain launch": (PAPER, 64, 12, torch.bfloat16, {"pdl": False}),
    "widest": ((256, 64, 64), 64, 12, torch.float16, {}),
    "toy": (TOY, 16, 4, torch.bfloat16, {}),
    "toy, float32": (TOY, 16, 4, torch.float32, {}),
    "paper, float32": (PAPER, 16, 12, torch.float32, {}),
}
T = 32760
KERNELS = {"_prepare_kernel", "_attend_kernel", "_merge_kernel"}
SHARED_LIMIT = 232_448                 # bytes that one program may take, on sm_90 and on sm_100
SHARED_ON_SM = 233_472                 # bytes per multiprocessor
RESERVED = 1024                        # of them go with every program
REGISTERS_ON_SM = 65_536


class Recorder(NamedTuple):
    """In place of a kernel: compiles what a GPU would be given, and stops there."""
    kernel: object
    found: dict

    def __getitem__(self, grid):
        def launch(*args, **options):
            self.found[self.kernel.__name__] = self.kernel.warmup(*args, grid=grid, **options)
        return launch


def pretend(capability: int) -> None:
    """Let Triton believe in a GPU of this compute capability."""
    import triton
    from triton.backends.compiler import GPUTarget

    triton.runtime.driver.set_active(SimpleNamespace(
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32)))


def compiled(geometry, capability: int):
    """The tile and the three compiled kernels: fused's own host code runs, with recorders."""
    pretend(capability)
    (C, R, N), L, H, dtype, options = geometry
    tile = fused.choose_tile(C, R, dtype.itemsize, (capability // 10, 0))._replace(**options)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in KERNELS:
            patch.setattr(fused, name, Recorder(getattr(fused, name), found))
        fused._launch(*inputs(1, L, H, T, C, R, N, dtype=dtype), tile=tile, splits=22)
    assert set(found) == KERNELS
    return tile, found


def registers_and_stack(kernel) -> tuple[int, int]:
    """From the binary itself, by the disassembler that Triton brings along. A spilled register
    needs a stack frame."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__path__[0]) / "bin" / "cuobjdump"
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [tool, "-res-usage", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers = re.search(r"\bREG:(\d+)", text)
    stack = re.search(r"\bSTACK:(\d+)", text)
    return int(registers[1]), int(stack[1])


def longest_carried_chain(ttir: str) -> int:
    """Through how many dots one loop-carried accumulator passes in an iteration, at most.

    Read off Triton's IR: each dot's third operand is followed back to other dots and to loop
    arguments. The way leads through arithmetic, not through broadcasts, which bring in the
    factors of the softmax.
    """
    loops = " ".join(re.findall(r"iter_args\((.*?)\)", ttir))
    carried = set(re.findall(r"(%[\w#]+) = ", loops))
    defined = {}
    for line in re.finditer(r"^\s*(%[\w#]+) = ([\w.]+) (.*?)(?: : .*)?$", ttir, re.M):
        value, op, operands = line.groups()
        defined[value] = op, re.findall(r"%[\w#]+", operands)

    def dots_to_loop_argument(value):                    # -1: the accumulator is fresh
        if value in carried:
            return 0
        op, operands = defined.get(value, ("", []))
        if op == "tt.dot":
            below = dots_to_loop_argument(operands[2])
            return below + 1 if below >= 0 else -1
        if not op.startswith("arith."):
            return -1
        return max([dots_to_loop_argument(x) for x in operands], default=-1)

    dots = [value for value, (op, _) in defined.items() if op == "tt.dot"]
    return max(dots_to_loop_argument(value) for value in dots)


def check_compile(name: str, capability: int):
    tile, found = compiled(GEOMETRIES[name], capability)
    for kernel_name, kernel in found.items():
        registers, stack = registers_and_stack(kernel)
        shared = kernel.metadata.shared
        print(f"{name}, sm_{capability}, {kernel_name}: {shared} B shared, {registers} registers",
              file=sys.stderr)
        assert stack == 0, f"{kernel_name}: {stack} bytes of spilled registers"
        assert shared < SHARED_LIMIT, f"{kernel_name}: {shared} bytes of shared memory"
    # As many programs as the tile promises fit on a multiprocessor.
    attend = found["_attend_kernel"]
    registers, _ = registers_and_stack(attend)
    threads = 32 * attend.metadata.num_warps
    assert tile.resident * (attend.metadata.shared + RESERVED) <= SHARED_ON_SM
    assert tile.resident * registers * threads <= REGISTERS_ON_SM
    assert longest_carried_chain(attend.asm["ttir"]) == 1    # 0: the reader above sees nothing
    dtype = GEOMETRIES[name][3]
    if dtype.itemsize == 2:
        instruction = {90: "wgmma.mma_async", 100: "tcgen05.mma"}[capability]
        assert instruction in attend.asm["ptx"]


def check_chain_reader_can_fail():
    """What Triton miscompiles on Blackwell, two dots on one carried accumulator, is recognised."""
    kind = "inputPrecision = tf32 : tensor<64x64xbf16> * tensor<64x64xbf16> -> tensor<64x64xf32>"
    loop = "scf.for %n = %a to %b step %c iter_args(%acc = %zero) -> (tensor<64x64xf32>) : i32 {"
    bad = f"""%r = {loop}
               %x = tt.dot %p, %q, %acc, {kind}
               %y = tt.dot %u, %v, %x, {kind}"""
    assert longest_carried_chain(bad) == 2


def check_cpu_without_interpreter_is_refused():
    with pytest.raises(RuntimeError, match="CUDA GPU, not on cpu; use route='materialised'"):
        fused.latent_attention(*inputs(1, 2, 2, 8, 16, 8))


# ---- the two kinds of check as programs, and as tests ---------------------------------------------


def by_name(*checks) -> dict:
    return {check.__name__.removeprefix("check_"): check for check in checks}


def every_compilation() -> dict:
    checks = {}
    for name in GEOMETRIES:
        for capability in (90, 100):
            checks[f"{name}, sm_{capability}"] = (
                lambda name=name, capability=capability: check_compile(name, capability))
    return checks


CHECKS = {
    "interpret": by_name(
        check_any_size, check_paper_and_toy_widths, check_strided_inputs_and_poison,
        check_huge_and_tiny_scores, check_merge_alone, check_op_composes, check_refusals),
    "compile": every_compilation() | by_name(
        check_chain_reader_can_fail, check_cpu_without_interpreter_is_refused),
}


def outcomes_of(program: str, folder: Path) -> dict:
    """{kind: {check: None, or the traceback of its failure}} of a test file like this one."""
    if importlib.util.find_spec("triton") is None:
        pytest.fail(f"{program} needs Triton, also without a GPU: pip install triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder)}
    environment.pop("TRITON_INTERPRET", None)
    running = {}
    for kind, more in (("interpret", {"TRITON_INTERPRET": "1"}), ("compile", {})):
        running[kind] = subprocess.Popen([sys.executable, program, kind], text=True,
                                         env=environment | more, stdout=subprocess.PIPE,
                                         stderr=subprocess.PIPE)
    outcomes = {}
    for kind, child in running.items():
        out, err = child.communicate(timeout=300)
        assert child.returncode == 0, f"the child {kind!r} died: {out} {err}"
        outcomes[kind] = json.loads(out.splitlines()[-1])
    return outcomes


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory):
    return outcomes_of(__file__, tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize("name", CHECKS["interpret"])
def test_in_interpreter(outcomes, name):
    assert outcomes["interpret"][name] is None, outcomes["interpret"][name]


@pytest.mark.parametrize("name", CHECKS["compile"])
def test_compiles_offline(outcomes, name):
    assert outcomes["compile"][name] is None, outcomes["compile"][name]


def test_splits_fill_the_gpu_in_whole_waves():
    assert fused.choose_splits(12, 512, 264) == 22       # L = 64: one wave of 264 programs
    assert fused.choose_splits(48, 512, 264) == 11       # L = 256: two whole waves beat one of 240
    assert fused.choose_splits(10_000, 512, 264) <= 2
    assert fused.choose_splits(1, 1, 264) == 1
    for programs in (1, 99, 500):
        for tiles in (1, 7, 3000):
            for at_once in (1, 264):
                splits = fused.choose_splits(programs, tiles, at_once)
                assert 1 <= splits <= min(tiles, fused.MAX_SPLITS)


def test_limits_are_stated_once():
    """What `why_not` refuses is what the op refuses, in the same words."""
    meta = lambda *shape: torch.empty(*shape, device="meta")
    for N, R, C in [(8, 8, 16), (0, 64, 256), (128, 8, 192), (129, 8, 16), (8, 12, 16), (8, 72, 16),
                    (8, 8, 24), (8, 8, 272), (8, 0, 16)]:
        tensors = meta(1, 2, 3, N), meta(1, 2, 3, R), meta(1, 5, C), meta(1, 5, R), meta(3, N, C)
        tables = meta(2, R // 2), meta(2, R // 2), meta(5, R // 2), meta(5, R // 2)
        reason = fused.why_not(N, R, C, torch.float32)
        taken = 0 <= N <= 128 and R in range(8, 65, 8) and C in range(16, 257, 16)
        assert (reason is None) == taken
        if reason is None:
            fused._check(*tensors, *tables, 1.0)
            continue
        with pytest.raises(ValueError) as caught:
            fused._check(*tensors, *tables, 1.0)
        assert str(caught.value) == f"latent_attention {reason}"
    assert fused.why_not(8, 8, 16, torch.bfloat16) is None
    assert "float64" in fused.why_not(8, 8, 16, torch.float64)


def test_imports_without_triton():
    """Only torch is needed to import the file; calling the op then says what is missing."""
    code = """if 1:
        import importlib.util as u, torch; find = u.find_spec
        u.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
        import fused; u.find_spec = find
        shapes = [(1, 1, 1, 8), (1, 1, 1, 8), (1, 1, 16), (1, 1, 8), (1, 8, 16)] + 4 * [(1, 4)]
        try: fused.latent_attention(*map(torch.ones, shapes), 1.0)
        except RuntimeError as error:
            assert "needs Triton" in str(error) and "materialised" in str(error)
        else: raise SystemExit("no error")"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def outcome(check) -> str | None:
    try:
        check()
    except BaseException:
        return traceback.format_exc()


if __name__ == "__main__":
    print(json.dumps({name: outcome(check) for name, check in CHECKS[sys.argv[1]].items()}))
