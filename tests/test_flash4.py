"""engine/flash4.py, and the choice of backend in engine/routes.py, with and without the package.

The package needs a GPU. A stand-in with its signature takes its place here; that it computes
the same on a GPU is measured by `python -m experiments.bench`, whose every time is checked.
"""

import os
import subprocess
import sys
import types
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from engine import flash4, routes
from mla_video import PRESETS


def stand_in(q, k, v, softmax_scale=None, causal=False):
    """flash_attn_func for CPUs: [B, L, H, D]; like the real one it answers with a pair."""
    assert not causal
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    o = F.scaled_dot_product_attention(*heads_first, scale=softmax_scale)
    return o.transpose(1, 2).contiguous(), None


def install(module, found=stand_in, monkeypatch=None):
    """Let `flash4` find a package (None: find none), for the process or for a test."""
    fake = types.ModuleType(flash4.MODULE)
    fake.flash_attn_func = found
    entry = None if found is None else fake              # None makes an import fail
    packages = {"flash_attn": types.ModuleType("flash_attn"),
                "flash_attn.cute": types.ModuleType("flash_attn.cute"), flash4.MODULE: entry}
    for name, package in packages.items():
        if monkeypatch is None:
            sys.modules[name] = package
        else:
            monkeypatch.setitem(sys.modules, name, package)
    module._imported.cache_clear()


@pytest.fixture(autouse=True)
def forget():
    yield
    flash4._imported.cache_clear()


def inputs(L=5, T=9, H=3, D=16, V=8):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, L, H, D), (2, T, H, D), (2, T, H, V)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


def test_the_op_is_attention_alone_and_compiled(monkeypatch):
    """In the layout [B, L, H, channels], other widths for values, strides as they come."""
    install(flash4, monkeypatch=monkeypatch)
    q, k, v = inputs()
    scores = torch.einsum("blhd,bthd->bhlt", q, k) * 0.3
    want = torch.einsum("bhlt,bthv->blhv", scores.softmax(-1), v)
    both = torch.cat((k, v), -1)                             # a key and its value in one row
    strided = q, both[..., :16], both[..., 16:]
    compiled = torch.compile(lambda *some: flash4.flash4(*some, 0.3) + 1, fullgraph=True,
                             backend="aot_eager")
    for some in ((q, k, v), strided):
        torch.testing.assert_close(flash4.flash4(*some, 0.3), want)
        torch.testing.assert_close(compiled(*some), want + 1)


def test_it_is_inference_only(monkeypatch):
    install(flash4, monkeypatch=monkeypatch)
    q, k, v = inputs()
    with pytest.raises(RuntimeError, match="inference only"):
        flash4.flash4(q.requires_grad_(), k, v, 1.0)


def test_without_the_package(monkeypatch):
    """It says so, and runs nothing else in its place."""
    install(flash4, None, monkeypatch)
    assert "cannot be imported" in flash4.why_not(9)
    with pytest.raises(RuntimeError, match="flash-attn-4 cannot be imported"):
        flash4.flash4(*inputs(), 1.0)


def test_a_package_that_is_broken_is_named_aloud(monkeypatch):
    """Installed, but its import fails: a warning, once, for the time would be another."""
    install(flash4, None, monkeypatch)
    monkeypatch.setattr(flash4, "version", lambda: "4.0.0b36")
    with pytest.warns(UserWarning, match="flash-attn-4 cannot be imported here .*cuDNN attends"):
        flash4.why_not(9)
    assert "cannot be imported" in flash4.why_not(9)


def test_which_cards(monkeypatch):
    install(flash4, monkeypatch=monkeypatch)
    assert flash4.why_not(9) is None
    assert flash4.why_not(10) is None
    for generation in (None, 8, 11, 12):
        assert "compute capability" in flash4.why_not(generation)


@pytest.mark.parametrize("found, want", [(stand_in, "FA4"), (None, "cuDNN")])
def test_the_backend_and_its_name(monkeypatch, found, want):
    """FA4 where it can be imported, cuDNN elsewhere; what programs print says which, for how
    many query tokens, and whether the card was measured."""
    install(flash4, found, monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    device = SimpleNamespace(type="cuda", index=0)
    assert routes.backend(device) == want
    assert routes.backend(torch.device("cpu")) == "cuDNN"

    c = PRESETS["wan1.3b"]
    weight = SimpleNamespace(device=device, dtype=torch.bfloat16, is_cuda=True)
    model = SimpleNamespace(config=c, embed=SimpleNamespace(weight=weight))
    shown = {}
    for card in (routes.H100[0], "NVIDIA H200"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, card=card: card)
        shown[card] = routes.route_name(model, 1, "fused")
    assert shown[routes.H100[0]] == (f"fused (4224 query tokens by {want}, 456 by our kernel)")
    assert shown["NVIDIA H200"] == (f"fused (4680 query tokens by {want}; cut by counted "
                                    "operations: NVIDIA H200 was never measured)")
    monkeypatch.setattr(routes, "why_not_fused", lambda *rest: None)
    assert routes.route_name(model, 1, "auto") == f"auto: {shown['NVIDIA H200']}"


@pytest.mark.rest
@pytest.mark.parametrize("capability, sms", [(90, 132), (100, 148)])
def test_the_package_compiles_for_absent_gpus(capability, sms):
    """The real one, if it is installed, for the shapes of a chunk at the paper's size."""
    pytest.importorskip("cutlass", reason="needs flash-attn-4 and nvidia-cutlass-dsl")
    environment = os.environ | {"FLASH_ATTENTION_ARCH": f"sm_{capability}",
                                "CUTE_DSL_ARCH": f"sm_{capability}a",
                                "FLASH_ATTENTION_NUM_SMS": str(sms)}
    child = subprocess.run([sys.executable, "-c", OFFLINE.replace("SMS", str(sms))],
                           env=environment, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    assert "(1, 4224, 12, 128)" in child.stdout


# Fake tensors make the package compile and not launch. The number of SMs is asked of the driver.
OFFLINE = """if 1:
    import cutlass.utils, torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    class Info:
        def get_device_multiprocessor_count(self): return SMS
        def get_max_active_clusters(self, size): return SMS // size

    cutlass.utils.HardwareInfo = Info
    from flash_attn.cute import interface
    with FakeTensorMode(allow_non_fake_inputs=True):
        like = dict(dtype=torch.bfloat16, device="cuda:0")
        q, k = torch.empty(1, 4224, 12, 128, **like), torch.empty(1, 32760, 12, 128, **like)
        out = interface._flash_attn_fwd(q, k, torch.empty_like(k), softmax_scale=0.1)[0]
    print(tuple(out.shape))"""


def test_the_kernel_alone_names_no_backend():
    assert routes.fused_name(0, 64, "FA4", "card", True) == "fused (64 by our kernel)"


def test_the_fused_route_gives_it_its_layout(monkeypatch):
    """[B, L, H, channels], widths of at most 128 at the paper's size: what FA4 takes on sm_90
    and sm_100 alike."""
    seen = []

    def noted(q, k, v, softmax_scale=None, causal=False):
        seen.append([tuple(x.shape[1:]) for x in (q, k, v)])
        return stand_in(q, k, v, softmax_scale)

    install(flash4, noted, monkeypatch)
    monkeypatch.setattr(routes, "why_not_fused", lambda *rest: None)
    monkeypatch.setattr(routes, "UP", "two products")      # the kernel's: test_engine_routes.py
    B, L, T, H, N, R, V, C = 1, 4, 6, 12, 96, 32, 128, 192
    queries = torch.randn(B, L, H, N), torch.randn(B, L, H, R)
    rows = torch.randn(B, T, C), torch.randn(B, T, R)
    weights = torch.randn(H, N, C), torch.randn(H, V, C)
    q_table, k_table = torch.randn(2, L, R // 2), torch.randn(2, T, R // 2)
    o = routes.attend_fused(*queries, *rows, *weights, tuple(q_table), tuple(k_table), 0.1,
                            cut=L, dense=routes.FA4)
    assert seen == [[(L, H, N + R), (T, H, N + R), (T, H, V)]]
    assert o.shape == (B, L, H, V)
