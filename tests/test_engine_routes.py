"""engine/routes.py: the fused route, its plan, the choice among routes and its constants.

Triton's interpreter has to be chosen before the process imports Triton. So the fused route is
checked in a child (`python tests/test_engine_routes.py`), as in test_fused.py.
"""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from attention import attend_cheaper, attend_reference  # noqa: E402
from engine import routes  # noqa: E402
from experiments.measure import counted, fit  # noqa: E402
from mla_video import PRESETS, Config, VideoDiT  # noqa: E402
from rope3d import Rope3D, grid_coords  # noqa: E402
from test_flash4 import install  # noqa: E402

PAPER = dict(H=12, N=96, R=32, V=128, C=192)
H100 = routes.GPUS[routes.H100]
SMALL = Config(dim=32, layers=2, heads=2, latent=16, query_latent=16, rope=8, ffn=32, height=8,
               width=8, frames=15, window=9, sink=1)


def route_inputs(B=2, L=7, T=60, H=3, N=24, R=8, V=32, C=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    cos, sin = Rope3D(R, N + R).table(grid_coords(torch.arange(4), 5, T // 20))
    queries = normal(B, L, H, N), normal(B, L, H, R)
    rows = normal(B, T, C), normal(B, T, R)
    weights = normal(H, N, C), normal(H, V, C)
    q_table = cos[-L:], sin[-L:]
    return *queries, *rows, *weights, q_table, (cos, sin), (N + R) ** -0.5


def assert_close(got, want):
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()


def refused(words, *args):
    with pytest.raises(ValueError, match=words) as caught:
        routes.attend_fused(*args)
    said = str(caught.value)
    assert "\n" not in said and said.endswith("use route='materialised'")


# ---- the fused route ------------------------------------------------------------------------------


def interpreted():
    """In the child: every form of the route equals the reference, eager and compiled as one
    graph, and turns of videos change nothing."""
    args = route_inputs()
    want = attend_reference(*args)
    finish, up = routes.FINISH, routes.UP
    for cut in (0, 3, 7, None):
        def attend(*some, cut=cut):
            return routes.attend_fused(*some, cut=cut)

        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        assert_close(attend(*args), want)
        assert_close(compiled(*args), want)
    for routes.FINISH in routes.FINISHES:                    # both ways to apply W_UV
        assert_close(routes.attend_fused(*args, cut=3), want)
        torch.compiler.reset()
        compiled = torch.compile(routes.attend_fused, fullgraph=True, backend="aot_eager")
        assert_close(compiled(*args), want)
    routes.FINISH = finish
    for routes.UP in routes.UPS:                             # every way to make K and V
        assert_close(routes.attend_fused(*args, cut=3), want)
        torch.compiler.reset()
        compiled = torch.compile(partial(routes.attend_fused, cut=3), fullgraph=True,
                                 backend="aot_eager")
        assert_close(compiled(*args), want)
    install(routes.flash4)                                   # and the other backend
    for cut, routes.UP in itertools.product((3, 7), routes.UPS):
        def by_flash(*some, cut=cut):
            return routes.attend_fused(*some, cut=cut, dense=routes.FA4)

        assert_close(by_flash(*args), want)
        assert_close(torch.compile(by_flash, fullgraph=True, backend="aot_eager")(*args), want)
    routes.UP = up
    routes.SCRATCH = 1                                       # one video at a time
    assert_close(routes.attend_fused(*args, cut=3), want)
    views = []                                               # not contiguous, NaN between
    for x in args[:4]:
        poisoned = torch.cat((x, torch.full_like(x, torch.nan)), -1)
        views.append(poisoned[..., :x.shape[-1]])
    assert_close(routes.attend_fused(*views, *args[4:], cut=3), want)
    refused("is inference only", args[0].requires_grad_(), *args[1:])
    args[0].requires_grad_(False)
    refused("takes no mask", *args, torch.ones(7, 60, dtype=torch.bool))
    refused("takes C a multiple of 16", *route_inputs(C=12))
    refused("takes N \\+ R and V multiples of 8", *route_inputs(N=28))
    refused("float32", *route_inputs(dtype=torch.float64))


@pytest.mark.rest
def test_fused_route_is_the_reference_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, __file__], env=environment, check=True, timeout=300)


def test_fused_is_refused_on_a_cpu_and_auto_never_takes_it():
    refused("runs on a CUDA GPU, not on cpu", *route_inputs())
    model = VideoDiT(SMALL)
    name = routes.route_name(model, 1, "auto")
    assert name.split()[-1] in ("materialised", "absorbed")
    assert routes.route_name(model, 1, "reference") == "reference"
    assert routes.route_name(VideoDiT(replace(SMALL, attention="dense")), 1, "auto") == "dense"
    chunk = torch.zeros(1, 3, 3, 8, 8)
    caption = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="route='fused' runs on a CUDA GPU"), torch.no_grad():
        model.denoise(chunk, torch.ones(1, 3), caption, model.make_cache(1), routes.attend_fused)


def test_auto_on_a_cpu_is_the_cheaper_route():
    for sizes in (dict(L=7), dict(L=60, C=48)):
        args = route_inputs(**sizes)
        assert torch.equal(routes.attend_auto(*args), attend_cheaper(*args))


def test_cudnn_takes_every_call_of_the_default_path(monkeypatch):
    """At the paper's geometry, the widths of every SDPA call, those of the fused route by cuDNN,
    of captions and of the dense twin, are at most 128 and multiples of 8. cuDNN's forward takes
    that on sm_90 and sm_100; 224/192 and 160/128 would both be refused on sm_100."""
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention

    def noted(q, k, v, **rest):
        calls.append((q.shape[-1], v.shape[-1]))
        return real(q, k, v, **rest)

    def all_by_cudnn(*args):
        return routes.attend_fused(*args, cut=args[0].shape[1])

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noted)
    monkeypatch.setattr(routes, "why_not_fused", lambda *rest: None)
    for kind in ("mla", "dense"):
        with torch.device("meta"), torch.no_grad():
            c = replace(PRESETS["wan1.3b"], attention=kind)
            model = VideoDiT(replace(c, layers=1)).bfloat16()
            cache = model.make_cache(1)
            cache.seen = cache.capacity
            chunk = torch.empty(1, c.chunk, c.channels, c.height, c.width, dtype=torch.bfloat16)
            sigma = chunk.new_empty(1, c.chunk)
            caption = chunk.new_empty(1, c.slots, c.text)
            model.denoise(chunk, sigma, caption, cache, all_by_cudnn)
    assert len(calls) == 4, calls
    for call in calls:
        assert all(width <= 128 and width % 8 == 0 for width in call), calls


# ---- what routes cost, and which is taken ---------------------------------------------------------


def test_plan():
    """At the paper's size: few tokens by the kernel, a chunk by cuDNN in whole waves (132 SMs, 12
    heads: 11, 22, 33 tiles of 128) and the rest by the kernel; never more predicted time than
    either form alone."""
    cuts = [routes.plan(1, L, 32760, **PAPER, gpu=H100) for L in (16, 64, 256, 1560, 2340, 4680)]
    assert cuts == [0, 0, 0, 1408, 2340, 4224]
    # FA4 has the same waves and is faster: what it gets can only grow.
    cuts = [routes.plan(1, L, 32760, **PAPER, gpu=H100, dense=routes.FA4)
            for L in (16, 64, 256, 1560, 2340, 4680)]
    assert cuts == [0, 0, 0, 1408, 2340, 4224]
    assert routes.plan(1, 1024, 32760, **PAPER, gpu=H100, dense=routes.FA4) == 1024
    # A GPU that was not measured: (13) decides.
    assert [routes.plan(1, L, 32760, **PAPER, gpu=None) for L in (256, 4680)] == [0, 4680]
    # 2C <= N + V: there is no crossing.
    assert routes.plan(1, 4680, 32760, 4, 24, 8, 32, 16, None) == 0
    sizes = [(1, 1, 1), (1, 4680, 1560), (3, 1560, 9360), (16, 4680, 32760)]
    for (B, L, T), dense in itertools.product(sizes, (routes.CUDNN, routes.FA4)):
        cut = routes.plan(B, L, T, **PAPER, gpu=H100, dense=dense)
        times = []
        for choice in (cut, 0, L):
            counts = routes.form_counts(choice, B, L, T, **PAPER, sms=H100.sms, dense=dense)
            times.append(H100.seconds(counts))
        assert 0 <= cut <= L and times[0] == min(times) > 0


def test_constants_are_the_fit_of_the_committed_results():
    """Nothing about a GPU is known by hand. The constants are what `bench --fit` makes of
    results/bench_h100.json, rounded, up to what one run differs from another. With them the
    predicted times are the measured ones, within a fifth on average over routes and sizes."""
    out = json.loads((ROOT / "results/bench_h100.json").read_text())
    assert routes.short_version(out["torch"]) == routes.H100[1]
    for name, fitted, written in zip(routes.Gpu._fields, fit(out), H100):
        said = f"{name} is {written:.3g}, the fit says {fitted:.3g}"
        assert abs(fitted / written - 1) < 0.15, said
    wrong = []
    for point in out["sections"]["attention"]["points"]:
        for route in ("reference", "materialised", "absorbed", "fused"):
            row = point["timing"][route]
            if "ms" in row:
                wrong.append(abs(point["predicted_ms"][route] / row["ms"] - 1))
    assert sum(wrong) / len(wrong) < 0.2


def test_constants_are_of_one_card_alone(monkeypatch):
    """An H100 of another build, an H200 and a GPU of tomorrow count operations."""
    for name in ("NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "new"):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index, name=name: name)
        assert routes.gpu_constants(0) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100 80GB HBM3")
    assert routes.gpu_constants(0) == H100


def test_constants_are_of_a_card_and_a_torch(monkeypatch):
    """Those of the torch that runs; else the last measured of this card; never another card's."""
    new = H100._replace(launch=1.0)
    monkeypatch.setitem(routes.GPUS, ("NVIDIA H200", "2.11"), H100)
    monkeypatch.setitem(routes.GPUS, ("NVIDIA H200", "2.13"), new)
    found = {version: routes.measured_as("NVIDIA H200", version)
             for version in ("2.11.0+cu130", "2.13.1", "2.12.0")}
    assert [key[1] for key in found.values()] == ["2.11", "2.13", "2.13"]
    assert routes.measured_as("NVIDIA B200", "2.11.0") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H200")
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    assert routes.gpu_constants(0) is new


def test_fit_takes_what_was_measured_and_keeps_the_rest():
    """Times that the model itself makes give its constants back, on a card with other SMs, with
    FA4's rows or without them."""
    gpu = H100._replace(sms=100, flash_key=0.7e-8)
    for with_flash in (True, False):
        points = []
        for L in (16, 256, 1024, 4680):
            timing = {}
            for name, counts in counted(L, 9360, gpu.sms).items():
                if with_flash or "FA4" not in name:
                    timing[name] = {"ms": 1e3 * gpu.seconds(counts)}
            points.append(dict(L=L, T=9360, timing=timing))
        found = fit({"sms": gpu.sms, "sections": {"attention": {"points": points}}})
        want = gpu if with_flash else gpu._replace(flash_key=H100.flash_key)
        assert found == pytest.approx(want, rel=1e-6)


def test_auto_by_measured_constants():
    """Fused where it may run. Without it by time: a GPU's materialised route loses to the
    reference only where both are tiny. On a GPU that was not measured, by operations."""
    for L in (16, 256, 1560, 4680):
        assert routes.choose_route(L, 32760, **PAPER, gpu=H100, fusable=True) == "fused"
        assert routes.choose_route(L, 32760, **PAPER, gpu=H100) != "fused"
    assert routes.choose_route(4680, 32760, **PAPER, gpu=H100) == "materialised"
    assert routes.choose_route(4680, 32760, **PAPER) == "materialised"
    assert routes.choose_route(64, 32760, **PAPER) == "absorbed"
    assert routes.choose_route(64, 32760, **PAPER, fusable=True) == "fused"


if __name__ == "__main__":
    interpreted()
