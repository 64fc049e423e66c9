"""engine/finish.py: latent attention and W_UV as one chain of kernels.

As in test_fused.py it runs in a child of its own, in Triton's interpreter, and is compiled in
another for sm_90 and sm_100, without a GPU.
"""

import itertools
import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import fused  # noqa: E402
import test_fused  # noqa: E402
from engine import finish  # noqa: E402
from test_fused import (  # noqa: E402
    SHARED_LIMIT, Recorder, by_name, outcome, outcomes_of, pretend, reference,
    registers_and_stack)


def inputs(B, L, H, T, C, R, N, V, dtype=torch.float32):
    """The arguments of `latent_values`."""
    *before, q_cos, q_sin, k_cos, k_sin, scale = test_fused.inputs(B, L, H, T, C, R, N, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    W_UV = torch.randn(H, V, C, generator=generator).to(dtype)
    return *before, W_UV, q_cos, q_sin, k_cos, k_sin, scale


def expected(args):
    *before, W_UV, q_cos, q_sin, k_cos, k_sin, scale = args
    latent, _ = reference(*before, q_cos, q_sin, k_cos, k_sin, scale)
    return torch.einsum("bhlc,hvc->blhv", latent, W_UV.double())


def assert_close(got, args):
    want = expected(args)
    assert got.shape == want.shape
    error = (got.double() - want).abs().max()
    assert error <= 3e-5 * want.abs().max()


def check_any_size():
    """Tokens and channels that divide nothing, one split and many, values of any width."""
    sizes = [(2, 7, 3, 75, 32, 8, 24, 40), (1, 5, 12, 90, 192, 32, 96, 128),
             (2, 4, 2, 33, 80, 16, 8, 8), (1, 1, 1, 1, 16, 8, 0, 24)]
    for size, splits in itertools.product(sizes, (None, 1, 3, 5)):
        args = inputs(*size)
        tile = fused.Tile(16, 16, warps=4, stages=2, resident=1)
        assert_close(finish._launch(*args, tile=tile, splits=splits), args)


def check_weights_are_those_of_the_splits():
    """Scores so large that one split holds all the weight."""
    args = list(inputs(1, 6, 2, 96, 32, 8, 24, 16))
    args[0] = 30 * args[0]
    tile = fused.Tile(16, 16, warps=4, stages=2, resident=1)
    assert_close(finish._launch(*args, tile=tile, splits=6), args)


def check_it_composes():
    """One graph with what stands around it; refused like fused.py's op."""
    args = inputs(1, 3, 2, 20, 32, 8, 16, 24)
    torch.library.opcheck(finish.latent_values, args,
                          test_utils=("test_schema", "test_faketensor"))

    def step(*some):
        return finish.latent_values(*some) * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), step(*args))
    with pytest.raises(ValueError, match="scale must be positive"):
        finish.latent_values(*args[:-1], 0.0)
    args[0].requires_grad_()
    with pytest.raises(RuntimeError, match="inference only"):
        finish.latent_values(*args)


def check_compile(C: int, V: int, capability: int):
    """No register is spilled, and the kernel waits on Hopper, where it may start early."""
    pretend(capability)
    found = {}
    B, L, H = 1, 64, 12
    like = dict(dtype=torch.bfloat16)
    tile = fused.choose_tile(C, 32, 2, (capability // 10, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "_values_kernel", Recorder(finish._values_kernel, found))
        finish._values(torch.empty(B, H, L, C, **like), torch.empty(H, V, C, **like),
                       torch.empty(B, L, H, V, **like), tile)
    kernel = found["_values_kernel"]
    registers, stack = registers_and_stack(kernel)
    shared = kernel.metadata.shared
    print(f"C={C}, V={V}, sm_{capability}: {shared} B shared, {registers} registers",
          file=sys.stderr)
    assert stack == 0, f"{stack} bytes of spilled registers"
    assert shared < SHARED_LIMIT, f"{shared} bytes of shared memory"
    assert "mma" in kernel.asm["ptx"]
    assert ("griddepcontrol.wait" in kernel.asm["ptx"]) == tile.pdl


CHECKS = {
    "interpret": by_name(check_any_size, check_weights_are_those_of_the_splits,
                         check_it_composes),
    "compile": {},
}
for (C, V), capability in itertools.product(((192, 128), (16, 32), (256, 128)), (90, 100)):
    name = f"C={C}, V={V}, sm_{capability}"
    CHECKS["compile"][name] = partial(check_compile, C, V, capability)


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory):
    return outcomes_of(__file__, tmp_path_factory.mktemp("triton"))


@pytest.mark.rest
@pytest.mark.parametrize("name", CHECKS["interpret"])
def test_in_interpreter(outcomes, name):
    assert outcomes["interpret"][name] is None, outcomes["interpret"][name]


@pytest.mark.rest
@pytest.mark.parametrize("name", CHECKS["compile"])
def test_compiles_offline(outcomes, name):
    assert outcomes["compile"][name] is None, outcomes["compile"][name]


if __name__ == "__main__":
    print(json.dumps({name: outcome(check) for name, check in CHECKS[sys.argv[1]].items()}))
