"""The fast path end to end: the fused route, its plan, the full window, the compiled chunk, and the bench that measures them.

Triton's interpreter has to be chosen before the process imports triton, so the fused route is checked in a child
(`python tests/test_fast_path.py`), as in test_fused.py.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import attention  # noqa: E402
import fused  # noqa: E402
from compiled import CompiledChunk, FullWindow  # noqa: E402
from experiments.measure import fit  # noqa: E402
from mla_video import PRESETS, Config, VideoDiT  # noqa: E402
from rope3d import Rope3D, grid_coords  # noqa: E402
from sample import full_route, rollout  # noqa: E402

PAPER = dict(H=12, N=96, R=32, V=128, C=192)
SMALL = Config(dim=32, layers=2, heads=2, latent=16, query_latent=16, rope=8, ffn=32, height=8, width=8, frames=15, window=9, sink=1)


def route_inputs(B=2, L=7, T=60, H=3, N=24, R=8, V=32, C=16, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=g).to(dtype)
    table = Rope3D(R, N + R).table(grid_coords(torch.arange(4), 5, T // 20))
    return (rand(B, L, H, N), rand(B, L, H, R), rand(B, T, C), rand(B, T, R), rand(H, N, C), rand(H, V, C),
            tuple(part[-L:] for part in table), table, (N + R) ** -0.5)


def interpreted():
    """In the child: every form of the route equals the reference, eager and compiled as one graph, and turns of videos change nothing."""
    args = route_inputs()
    want = attention.attend_reference(*args)
    for cut in (0, 3, 7, None):
        compiled = torch.compile(lambda *a: attention.attend_fused(*a, cut=cut), fullgraph=True, backend="aot_eager")
        for got in (attention.attend_fused(*args, cut=cut), compiled(*args)):
            assert (got - want).abs().max() <= 2e-5 * want.abs().max(), cut
    attention.SCRATCH = 1                                  # one video at a time
    assert (attention.attend_fused(*args, cut=3) - want).abs().max() <= 2e-5 * want.abs().max()
    views = [torch.cat((x, torch.full_like(x, torch.nan)), -1)[..., :x.shape[-1]] for x in args[:4]]     # non-contiguous, NaN between
    assert (attention.attend_fused(*views, *args[4:], cut=3) - want).abs().max() <= 2e-5 * want.abs().max()
    refused("is inference only", args[0].requires_grad_(), *args[1:])
    args[0].requires_grad_(False)
    refused("takes no mask", *args, torch.ones(7, 60, dtype=torch.bool))
    refused("takes C a multiple of 16", *route_inputs(C=12))
    refused("takes C a multiple of 16", *route_inputs(N=28))
    refused("float32", *route_inputs(dtype=torch.float64))


def refused(words, *args):
    with pytest.raises(ValueError, match=words) as caught:
        attention.attend_fused(*args)
    assert "\n" not in str(caught.value) and str(caught.value).endswith("use route='materialised'")


def test_fused_route_is_the_reference_in_the_interpreter():
    subprocess.run([sys.executable, __file__], env=os.environ | {"TRITON_INTERPRET": "1"}, check=True, timeout=300)


def test_fused_is_refused_on_a_cpu_and_auto_never_takes_it():
    refused("runs on a CUDA GPU, not on cpu", *route_inputs())
    model = VideoDiT(SMALL)
    assert full_route(model, 1, "auto").split()[-1] in ("materialised", "absorbed")
    assert full_route(model, 1, "reference") == "reference"
    with pytest.raises(ValueError, match="route='fused' runs on a CUDA GPU"), torch.no_grad():
        model.denoise(torch.zeros(1, 3, 3, 8, 8), torch.ones(1, 3), torch.zeros(1, 3, dtype=torch.long), model.make_cache(1), "fused")


def test_plan():
    """At the paper's size: few tokens by the kernel, a chunk by cuDNN in whole waves (132 SMs, 12 heads: 11, 22, 33 tiles of 128) and
    the rest by the kernel; never more predicted time than either form alone."""
    gpu, order = fused.Gpu(), [PAPER[k] for k in "HNRVC"]
    assert [fused.plan(1, L, 32760, *order, gpu) for L in (16, 64, 256, 1560, 2340, 4680)] == [0, 0, 0, 1408, 2340, 4224]
    assert [fused.plan(1, L, 32760, *order, None) for L in (256, 4680)] == [0, 4680]       # an unmeasured GPU: (13) decides
    assert fused.plan(1, 4680, 32760, 4, 24, 8, 32, 16, None) == 0                         # 2C <= N + V: no crossing
    for B, L, T in [(1, 1, 1), (1, 4680, 1560), (3, 1560, 9360), (16, 4680, 32760)]:
        cut = fused.plan(B, L, T, *order, gpu)
        times = [gpu.seconds(fused.form_counts(c, B, L, T, *order, gpu.sms)) for c in (cut, 0, L)]
        assert 0 <= cut <= L and times[0] == min(times) > 0


def test_constants_are_the_fit_of_the_committed_results():
    """Nothing about a GPU is known by hand: fused.Gpu is what `bench --fit` makes of results/bench_h100.json, rounded, up to what one run
    differs from another; and with it the predicted times are the measured ones, within a fifth on average over routes and sizes."""
    out = json.loads((ROOT / "results/bench_h100.json").read_text())
    for name, fitted, written in zip(fused.Gpu._fields, fit(out), fused.Gpu()):
        assert abs(fitted / written - 1) < 0.15, f"fused.Gpu.{name} is {written:.3g}, the fit says {fitted:.3g}"
    wrong = [abs(p["predicted_ms"][route] / p["timing"][route]["ms"] - 1) for p in out["sections"]["attention"]["points"]
             for route in attention.ROUTES if "ms" in p["timing"][route]]
    assert sum(wrong) / len(wrong) < 0.2


def test_auto_by_measured_constants():
    """fused where it may run; without it, by time: a GPU's materialised route loses to the reference only where both are tiny."""
    for L in (16, 256, 1560, 4680):
        assert attention.choose_route(L, 32760, **PAPER, gpu=fused.Gpu(), fusable=True) == "fused"
        assert attention.choose_route(L, 32760, **PAPER, gpu=fused.Gpu()) != "fused"
    assert attention.choose_route(4680, 32760, **PAPER, gpu=fused.Gpu()) == "materialised"
    assert attention.choose_route(4680, 32760, **PAPER) == "materialised" and attention.choose_route(64, 32760, **PAPER) == "absorbed"
    assert attention.choose_route(64, 32760, **PAPER, fusable=True) == "fused"             # a GPU that was never measured


def test_cudnn_takes_every_call_of_the_default_path(monkeypatch):
    """Widths of every SDPA call at the paper's geometry, of the fused route by cuDNN, of captions and of the dense twin: at most 128 and
    multiples of 8, which cuDNN's forward takes on sm_90 and sm_100 (both 224/192 and 160/128 would be refused on sm_100)."""
    calls, real = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention",
                        lambda q, k, v, **rest: calls.append((q.shape[-1], v.shape[-1])) or real(q, k, v, **rest))
    monkeypatch.setattr(attention, "why_not_fused", lambda *rest: None)
    monkeypatch.setattr(attention.MLA, "route_for", lambda *rest: "fused")
    plan_all, attend = 10**9, attention.attend_fused
    monkeypatch.setitem(attention.ROUTES, "fused", lambda *args: attend(*args, cut=min(plan_all, args[0].shape[1])))
    for kind in ("mla", "dense"):
        with torch.device("meta"), torch.no_grad():
            c = replace(PRESETS["wan1.3b"], attention=kind)
            model = VideoDiT(replace(c, layers=1)).bfloat16()
            cache = model.make_cache(1)
            cache.seen = cache.slots
            x = torch.empty(1, c.chunk, c.channels, c.height, c.width, dtype=torch.bfloat16)
            model.denoise(x, x.new_empty(1, c.chunk), torch.zeros(1, c.slots, dtype=torch.long), cache)
    assert len(calls) == 4 and all(width <= 128 and width % 8 == 0 for call in calls for width in call), calls


@pytest.mark.parametrize("kind", ["mla", "dense"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_compiled_chunk_is_one_graph_and_the_same_video(kind, guidance):
    """aot_eager runs the traced, functionalised graph without Inductor: same numbers, one graph, no break and no recompilation over 13
    chunks with the window full, and past the horizon, where positions are re-indexed."""
    torch.manual_seed(0)
    model = VideoDiT(replace(SMALL, attention=kind)).eval()
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)               # gates and head start at zero; a silent block proves nothing
    caption, said = torch.randint(1, 20, (2, 3)), []
    seed = lambda: torch.Generator().manual_seed(1)
    stream = lambda **how: torch.cat(list(rollout(model, caption, 45, steps=2, guidance=guidance, generator=seed(), **how)), 1)
    want = stream()
    torch._dynamo.reset()
    counters.clear()
    got = stream(compile="aot_eager", say=said.append)
    assert want.std() > 0.1 and (got - want).abs().max() <= 1e-5 * want.abs().max()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    assert len(said) == 2 and "window is full after 6 frames" in said[0]


def test_full_window():
    """Positions and content as RollingCache has them, for rings shorter and longer than a chunk, and none at all; a window that is not
    full is refused, and so is a graph's use with another window."""
    for window, sink in ((9, 1), (5, 1), (4, 1), (6, 0), (3, 0)):
        model = VideoDiT(replace(SMALL, window=window, sink=sink))
        cache = model.make_cache(2)
        rows = lambda: [tuple(torch.randn(2, 3 * SMALL.tokens, w) for w in (16, 8)) for _ in range(2)]
        while cache.filled < cache.slots:
            with pytest.raises(ValueError, match="not full yet"):
                FullWindow(cache)
            cache.commit(rows())
        full = FullWindow(cache)
        assert full.nbytes * cache.slots == cache.nbytes * window and full.bytes_per_token == cache.bytes_per_token
        for _ in range(5):
            new = rows()
            for a, b in zip((*cache.positions(), cache.frames()), (*full.positions(), full.frames())):
                assert torch.equal(a, b)
            for layer in range(2):
                assert all(torch.equal(a, b) for a, b in zip(cache.peek(layer, new[layer]), full.peek(layer, new[layer])))
            with torch.no_grad():
                cache.commit(new)
                full.commit(new)
        assert full.seen == cache.seen
    model, caption = VideoDiT(SMALL), torch.zeros(1, 3, dtype=torch.long)
    cache = model.make_cache(1)
    cache.seen = cache.slots
    cache.buffers = tuple(b.zero_() for b in cache.buffers)
    fast = CompiledChunk(model, cache, caption, backend="eager")
    with pytest.raises(ValueError, match="its own window"):
        fast.denoise(fast.x, fast.sigma, caption, cache)


def test_bench_runs_on_a_cpu(tmp_path):
    """Every section, small; the JSON has what results/ needs, and errors were measured on the tensors that were timed."""
    target = tmp_path / "bench.json"
    subprocess.run([sys.executable, "-m", "experiments.bench", "--cpu", "--markdown", "--json", str(target)], cwd=ROOT, check=True,
                   timeout=120, capture_output=True)
    out = json.loads(target.read_text())
    assert {"command", "commit", "device", "torch", "triton", "cudnn", "date", "ceilings"} <= set(out)
    assert out["command"].startswith("python -m experiments.bench --cpu")
    sections = out["sections"]
    assert set(sections) == {"memory", "attention", "block", "rollout", "batch", "b200"}
    assert not any("failed" in s for s in sections.values())
    assert (sections["memory"]["wan1.3b"]["mla"], sections["memory"]["wan1.3b"]["dense"]) == (448, 6144)
    for point in sections["attention"]["points"]:
        assert all(row["error"] < 1e-5 and row["low"] <= row["ms"] <= row["high"] for row in point["timing"].values())
    assert all(row["recompiles"] == 0 and row["graph_breaks"] == 0 and row["finite"] for row in sections["rollout"].values())


if __name__ == "__main__":
    interpreted()
