"""Where latent attention wins and where it loses: memory, attention, block, rollout, batch, measured on one device in one run.

    python -m experiments.bench                                everything this device can hold (one H100: about 4 minutes)
    python -m experiments.bench --only attention --json results/bench_h100.json
    python -m experiments.bench --quick                        small sizes; what a CPU gets anyway

Attention is timed only on tensors whose answer was checked against float64 in this run; a contender that fails (wrong, out of memory,
no such backend) stays in the table and says why; losing rows stay. Times are medians over replays of a CUDA graph that goes round
several input sets (cold L2), with the 10th and 90th percentile in the JSON. Predictions come from attention.py's cost model.
"""
import argparse
import copy
import json
import math
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fused
from attention import ROUTES, attend_fused, choose_route, crossing, route_counts, route_flops
from compiled import CompiledChunk
from experiments.measure import Measure, StoredRotated, cell, fit, graphs
from mla_video import PRESETS, VideoDiT
from rope3d import Rope3D, grid_coords, rotate
from sample import shift

STEPS = 4                                                  # denoising passes of a chunk, and one more to commit: 5 passes


class Bench(Measure):
    """The sections; each returns what goes into the JSON and prints a table."""

    # ---- memory -----------------------------------------------------------------------------------------------------

    def memory(self) -> dict:
        rows = {}
        for preset in ("toy", "small", "wan1.3b"):
            with torch.device("meta"):
                mla, dense = (VideoDiT(replace(PRESETS[preset], attention=kind)).make_cache(1, torch.bfloat16) for kind in ("mla", "dense"))
            rows[preset] = dict(mla=mla.bytes_per_token, dense=dense.bytes_per_token, saved=1 - mla.bytes_per_token / dense.bytes_per_token,
                                mla_bytes=mla.nbytes, dense_bytes=dense.nbytes)
        self.table("cache, bf16, from the buffers", ["preset", "MLA B/token/layer", "dense", "saved %", "MLA MB/video", "dense MB/video"],
                   [[k, r["mla"], r["dense"], f"{100 * r['saved']:.1f}", f"{r['mla_bytes'] / 1e6:.1f}", f"{r['dense_bytes'] / 1e6:.1f}"]
                    for k, r in rows.items()])
        return rows

    # ---- attention --------------------------------------------------------------------------------------------------

    def attention_inputs(self, L, T, seed):
        s, g = self.sizes(), torch.Generator(self.device).manual_seed(seed)
        rand = lambda *shape, std=1.0: (std * torch.randn(*shape, generator=g, device=self.device)).to(self.dtype)
        H, N, R, V, C = (s[k] for k in "HNRVC")
        frames = torch.arange(-(-T // 1560) + 1, device=self.device)
        coords = grid_coords(frames, 30, 52)[:T]
        table = Rope3D(R, N + R).table(coords)
        q_table = tuple(part[max(T - L, 0):][:L] if T >= L else part.repeat(-(-L // T), 1)[:L] for part in table)
        return (rand(1, L, H, N), rand(1, L, H, R), rand(1, T, C), rand(1, T, R), rand(H, N, C, std=C**-0.5), rand(H, V, C, std=C**-0.5),
                q_table, table, (N + R) ** -0.5)

    def exact(self, args, rows):
        """(answer in float64 for the query tokens `rows`, [q, k, v] as a dense cache would hold them)."""
        q_nope, q_rope, c, k_rope, W_UK, W_UV = (x.double() for x in args[:6])
        q_table, k_table = (tuple(p.double() for p in table) for table in args[6:8])
        H = q_nope.shape[2]
        k = torch.cat((torch.einsum("btc,hnc->bhtn", c, W_UK), rotate(k_rope, k_table)[:, None].expand(-1, H, -1, -1)), -1)
        v = torch.einsum("btc,hvc->bhtv", c, W_UV)
        q = torch.cat((q_nope, rotate(q_rope, q_table)), -1).transpose(1, 2)
        want = ((q[:, :, rows] @ k.mT * args[8]).softmax(-1) @ v).transpose(1, 2)
        return want, [x.to(self.dtype) for x in (q, k, v)]

    def attention(self) -> dict:
        s = self.sizes()
        Ls, Ts = ((16, 32, 64, 128, 256, 512, 1024, 1560, 2340, 4680), (32760, 9360, 1560)) if not self.quick else ((4, 48), (192,))
        gpu = fused.gpu_constants(0) if self.gpu else None
        result = {"points": [], "crossing": {}, "L_star": crossing(s["N"], s["V"], s["C"])}
        for T in Ts:
            for L in Ls:
                point = self.attempt(lambda: self.attention_point(L, T, s, gpu))
                result["points"].append(dict(L=L, T=T) | point)
                self.out["sections"]["attention"] = result
                self.save()
            self.attention_table(T, result)
        return result

    def attention_point(self, L, T, s, gpu) -> dict:
        sets = [self.attention_inputs(L, T, seed) for seed in range(3)]
        rows = torch.cat((torch.arange(min(L, 32)), torch.arange(max(0, L - 32), L))).unique().to(self.device)
        want, qkv = self.exact(sets[0], rows)
        ready = [qkv] + [self.exact(x, rows[:1])[1] for x in sets[1:2]]
        scale, H = sets[0][8], s["H"]
        waves = H * -(-L // 128) // gpu.sms if gpu else 0
        cut = 128 * (waves * gpu.sms // H) if gpu else 0
        forms = {"fused, kernel only": 0, "fused, cuDNN only": L, "fused, waves + kernel": cut}       # query tokens that go to cuDNN
        planned = fused.plan(1, L, T, *(s[k] for k in "HNRVC"), gpu)

        def dense(backend):
            def call(x, at=slice(None)):
                with sdpa_kernel([backend]):
                    return F.scaled_dot_product_attention(x[0][:, :, at], x[1], x[2], scale=scale).transpose(1, 2)
            return call
        cudnn, flash = dense(SDPBackend.CUDNN_ATTENTION if self.gpu else SDPBackend.MATH), dense(SDPBackend.FLASH_ATTENTION)
        name = "cuDNN" if self.gpu else "math"
        contenders = {f"dense {name}, K V ready": (cudnn, ready), "dense flash, K V ready": (flash, ready)}
        latent = lambda fn: (lambda x: fn(*x))
        if 0 < cut < L:
            contenders["dense cuDNN waves + flash"] = (lambda x: torch.cat((cudnn(x, slice(cut)), flash(x, slice(cut, None))), 1), ready)
        for route in ("reference", "materialised", "absorbed"):
            contenders[route] = (latent(ROUTES[route]), sets)
        if 8 * L * T * H > 12e9:
            contenders["reference"] = (None, None)
        if self.gpu:
            contenders["fused"] = (latent(attend_fused), sets)
            for label, k in forms.items():
                if label != "fused, waves + kernel" or 0 < cut < L:
                    contenders[label] = (lambda x, k=k: attend_fused(*x, cut=k), sets)

        def run(call, inputs):
            if call is None:
                raise MemoryError(f"skipped: its scores would take {8 * L * T * H / 1e9:.0f} GB")
            got = call(inputs[0])[:, rows].double()
            error = ((got - want).square().mean() / want.square().mean()).sqrt().item()
            if not error < (0.02 if self.gpu else 1e-4):   # bf16 rounds at 0.004, float32 at 1e-7; NaN fails
                raise ValueError(f"wrong: relative error {error:.1e}")
            return {"error": error, "recorded": self.recorded([lambda x=x: call(x) for x in inputs])}
        timing = {label: self.attempt(lambda: run(call, inputs)) for label, (call, inputs) in contenders.items()}
        clocks = self.timed_in_turn({label: row.pop("recorded") for label, row in timing.items() if "recorded" in row})
        timing = {label: clocks.get(label, {}) | row for label, row in timing.items()}
        base = timing[f"dense {name}, K V ready"].get("error") or timing["dense flash, K V ready"].get("error")
        for row in timing.values():
            if "error" in row:
                row["error_ratio"] = row["error"] / base if base else None
        auto = choose_route(L, T, **s, gpu=gpu, fusable=self.gpu)
        # What fused does anyway is no other choice: the time of the same kernels under another name differs by chance.
        ok = {k: r["ms"] for k, r in timing.items() if "ms" in r and not k.startswith("dense") and forms.get(k) != planned}
        point = dict(timing=timing, auto=auto, cut=planned, best=min(ok, key=ok.get),
                     auto_over_best=ok[auto] / min(ok.values()) if auto in ok else None,
                     flops={r: route_flops(r, L, T, **s) for r in ("materialised", "absorbed")})
        if gpu:
            point["predicted_ms"] = {r: 1e3 * gpu.seconds(route_counts(r, 1, L, T, *(s[k] for k in "HNRVC"), gpu)) for r in ROUTES}
        return point

    def attention_table(self, T, result):
        points = [p for p in result["points"] if p["T"] == T and "timing" in p]
        for p in result["points"]:
            if p["T"] == T and "timing" not in p:
                print(f"L={p['L']} T={T}: {p['failed']}")
        if not points:
            return
        names = list(dict.fromkeys(name for p in points for name in p["timing"]))
        rows = [[name] + [cell(p["timing"].get(name)) for p in points] for name in names]
        if "predicted_ms" in points[0]:
            rows += [[f"predicted: {r}"] + [f"{p['predicted_ms'][r]:.4f}" for p in points] for r in ROUTES]
        rows.append(["auto takes (query tokens to cuDNN)"] + [f"{p['auto']} ({p['cut']})" for p in points])
        rows.append(["auto / best route"] + [f"{p['auto_over_best']:.3f}" if p["auto_over_best"] else "-" for p in points])
        rows.append(["worst error / dense error"] + [f"{max(r.get('error_ratio') or 0 for r in p['timing'].values()):.2f}" for p in points])
        useful = lambda p: 2 * p["L"] * T * self.sizes()["H"] * (2 * self.sizes()["C"] + self.sizes()["R"])
        kernel = [p["timing"].get("fused, kernel only", {}).get("ms") for p in points]
        if any(kernel):
            percent = lambda p, ms: f"{useful(p) / ms / 1e7 / self.out['ceilings']['matmul_tflops']:.0f}" if ms else "-"
            rows.append(["fused, kernel only, % of matmul ceiling"] + [percent(p, ms) for p, ms in zip(points, kernel)])
        self.table(f"attention, T = {T}, ms", ["contender"] + [f"L={p['L']}" for p in points], rows)
        pairs = {"absorbed / materialised": ("absorbed", "materialised"), "kernel / cuDNN": ("fused, kernel only", "fused, cuDNN only")}
        for label, (a, b) in pairs.items():
            both = [(p["L"], p["timing"].get(a, {}), p["timing"].get(b, {})) for p in points]
            xs = [(L, x["ms"] / y["ms"]) for L, x, y in both if "ms" in x and "ms" in y]
            for (l0, r0), (l1, r1) in zip(xs, xs[1:]):
                if r0 < 1 <= r1:                           # straight in the logarithms between two measured points
                    result["crossing"][f"{label}, T={T}"] = at = l0 * (l1 / l0) ** (math.log(1 / r0) / math.log(r1 / r0))
                    print(f"measured crossing of {label} at T = {T}: L = {at:.0f}; by operations L* = {result['L_star']:.0f}")

    # ---- block and rollout ------------------------------------------------------------------------------------------

    def block(self) -> dict:
        c, rows = self.config, {}
        L, T = c.chunk * c.tokens, c.window * c.tokens

        def contender(kind, route, compiled, stored_rotated=False):
            model = self.model(kind, layers=1)
            window, block = self.window(model), model.blocks[0]
            if stored_rotated:
                block.attention.__class__ = StoredRotated   # the same weights
            past, own = window.positions()
            grid, rope = (c.height // c.patch, c.width // c.patch), block.attention.rope
            q_table, k_table = (rope.table(grid_coords(f, *grid)) for f in (own, torch.cat((past, own))))
            x, caption = torch.randn(1, c.chunk, c.tokens, c.dim, device=self.device).to(self.dtype), model.words(self.caption())
            level = model.level(model.time(torch.randn(1, c.chunk, 256, device=self.device).to(self.dtype))).unflatten(-1, (6, c.dim))
            one = lambda x: block(x, level, caption, lambda rows: window.peek(0, rows), q_table, k_table, None, route, 0)[0]
            call = torch.compile(one, fullgraph=True, dynamic=False) if compiled else one
            return self.timed([lambda: [call(x) for _ in range(STEPS + 1)]], replays=9)
        contenders = {"dense, compiled": ("dense", "auto", True), "MLA auto, compiled": ("mla", "auto", True),
                      "dense, keys stored rotated, compiled": ("dense", "auto", True, True),
                      "MLA materialised, compiled": ("mla", "materialised", True), "MLA absorbed, compiled": ("mla", "absorbed", True),
                      "dense, eager": ("dense", "auto", False), "MLA auto, eager": ("mla", "auto", False)}
        if not self.gpu:
            contenders = {k: v for k, v in contenders.items() if not v[2]}
        for label, how in contenders.items():
            rows[label] = self.attempt(lambda: contender(*how), forget=True)
            print(f"  block: {label}: {cell(rows[label])}", flush=True)
        s, E = self.sizes(), c.dim
        weights = {"dense": 4 * E * E, "MLA": E * (s["C"] + s["R"]) + E * c.query_latent + c.query_latent * E + E * E}
        for label, row in rows.items():
            if "ms" in row:                                # useful operations: attention without up-projection, linear layers
                linear = 2 * L * (weights[label.split()[0].strip(",")] + 2 * E * E + 2 * E * c.ffn) + 4 * E * c.slots * (L + E)
                flops = (STEPS + 1) * (4 * L * T * E + linear)
                row["percent_of_ceiling"] = flops / row["ms"] / 1e7 / self.out["ceilings"]["matmul_tflops"]
                row["over_dense"] = row["ms"] / rows["dense, compiled" if self.gpu else "dense, eager"].get("ms", math.nan)
        more = lambda r: (f"{r['over_dense']:.3f}", f"{r['percent_of_ceiling']:.0f}", f"{r['warmup_s']:.0f}") if "ms" in r else [""] * 3
        self.table(f"block, a chunk of {STEPS + 1} passes, L = {L}, T = {T}", ["contender", "ms", "/ compiled dense", "% of ceiling",
                   "warm-up s"], [[k, cell(r), *more(r)] for k, r in rows.items()])
        return rows

    def stream(self, model, window, chunks, backend="inductor", more=0) -> dict:
        """Time `chunks` chunks over a full window, then make `more` of a single step (2 passes instead of 5): the same graphs, sooner
        done. On a GPU any host synchronisation in either part raises."""
        c, caption, start = model.config, self.caption(), time.perf_counter()
        fast = CompiledChunk(model, window, caption, backend=backend)
        noise, shape = torch.Generator(self.device).manual_seed(0), fast.x.shape

        def chunk(steps=STEPS):
            x = torch.randn(shape, generator=noise, device=self.device, dtype=self.dtype)
            sigmas = [shift(1 - i / steps) for i in range(steps + 1)]
            for now, then in zip(sigmas, sigmas[1:]):
                x = x - (now - then) * fast.denoise(x, x.new_full(shape[:2], now), caption, fast.window)
            fast.commit(x, caption, fast.window)
            return x
        chunk()
        if self.gpu:
            torch.cuda.synchronize()
        cold, before = time.perf_counter() - start, graphs()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(chunks + 1)] if self.gpu else []
        if self.gpu:
            torch.cuda.set_sync_debug_mode("error")
        try:
            times = []
            for i in range(chunks):
                t = time.perf_counter()
                if self.gpu:
                    events[i].record()
                x = chunk()
                times.append(time.perf_counter() - t)
            if self.gpu:
                events[-1].record()
            for _ in range(more):
                x = chunk(1)
        finally:
            if self.gpu:
                torch.cuda.set_sync_debug_mode("default")
        if self.gpu:
            torch.cuda.synchronize()
            times = [a.elapsed_time(b) / 1e3 for a, b in zip(events, events[1:])]
        after = graphs()
        return dict(ms=1e3 * statistics.median(times), low=1e3 * min(times), high=1e3 * max(times), chunks=chunks,
                    chunks_of_2_passes=more, cold_s=cold,
                    frames_per_s=c.chunk / statistics.median(times), recompiles=after[0] - before[0], graph_breaks=after[1],
                    sync_check="did not raise" if self.gpu else "no GPU", finite=bool(x.isfinite().all()))

    def rollout(self) -> dict:
        rows, backend = {}, "inductor" if self.gpu else "aot_eager"
        for kind in ("mla", "dense"):
            def run():
                model = self.model(kind)
                return self.stream(model, self.window(model), 10 if self.gpu else 3, backend, 190 if self.gpu and kind == "mla" else 0)
            rows[kind] = self.attempt(run, forget=True)
            print(f"  rollout: {kind}: {rows[kind]}", flush=True)
        if self.gpu:                                       # what `python sample.py` waits for and then takes
            keep, self.config = self.config, PRESETS["toy"]
            rows["toy"] = self.attempt(lambda: self.stream(toy := self.model("mla"), self.window(toy), 100), forget=True)
            self.config = keep
        if all("ms" in rows[k] for k in ("mla", "dense")):
            rows["mla"]["over_dense"] = rows["mla"]["frames_per_s"] / rows["dense"]["frames_per_s"]
            print(f"rollout: MLA makes {rows['mla']['over_dense']:.3f}x the frames per second of dense")
        names = ["frames_per_s", "cold_s", "chunks", "chunks_of_2_passes", "recompiles", "graph_breaks", "sync_check"]
        show = lambda x: f"{x:.2f}" if isinstance(x, float) else x
        self.table("rollout, window full", ["model", "ms/chunk", *names],
                   [[k, cell(r), *(show(r.get(n, "")) for n in names)] for k, r in rows.items()])
        return rows

    # ---- batch ------------------------------------------------------------------------------------------------------

    def batch(self) -> dict:
        rows = {}
        for kind in ("dense", "mla"):
            for at_once in ("in turns of 1 video", "all at once"):
                rows[f"{kind}, {at_once}"] = self.attempt(lambda: self.largest(kind, 1 if at_once[0] == "i" else None), forget=True)
                print(f"  batch: {kind}, {at_once}: {rows[f'{kind}, {at_once}']}", flush=True)
        for how in ("in turns of 1 video", "all at once"):
            a, b = (rows[f"{kind}, {how}"].get("videos") for kind in ("mla", "dense"))
            rows[f"mla, {how}"]["over_dense"] = a / b if a and b else None
        self.table("largest batch, window full", ["model", "videos", "MLA / dense"],
                   [[k, r.get("videos", r.get("failed")), f"{r['over_dense']:.1f}" if r.get("over_dense") else ""]
                    for k, r in rows.items()])
        return rows

    def largest(self, kind, turn) -> dict:
        """Doubling, then bisecting. Every try holds all weights and every layer's cache of all videos, and runs two layers (the second
        finds the rows of the first still held), where the peak is that of all; what is reported has passed through all of them."""
        model = self.model(kind)
        blocks, c = model.blocks, self.config

        def fits(videos, layers=2):
            model.blocks = blocks[:layers]
            window, x = None, None
            try:
                window = self.window(model, videos)
                x = torch.zeros(videos, c.chunk, c.channels, c.height, c.width, device=self.device, dtype=self.dtype)
                sigma, caption = x.new_ones(x.shape[:2]), self.caption(videos)
                for i in range(0, videos, turn or videos):
                    some, mine = slice(i, i + (turn or videos)), copy.copy(window)
                    mine.rows = [tuple(b[some] for b in layer) for layer in window.rows]
                    x[some] = model.denoise(x[some], sigma[some], caption[some], mine)
                if self.gpu:
                    torch.cuda.synchronize()
                return True
            except RuntimeError as error:                  # torch.OutOfMemoryError, or a library that could not allocate
                if "alloc" not in str(error).lower() and "memory" not in str(error):
                    raise
                return False
            finally:
                model.blocks, window, x = blocks, None, None
                if self.gpu:
                    torch.cuda.empty_cache()
        if not self.gpu:
            return dict(videos=4 if fits(4, c.layers) else 0, note="CPU: a pass through the code, no limit sought")
        good, bad, start = 0, 1, time.perf_counter()
        while fits(bad) and time.perf_counter() - start < 90:
            good, bad = bad, 2 * bad
        while bad - good > 1 and time.perf_counter() - start < 90:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if fits(middle) else (good, middle)
        passed = next((n for n in range(good, 0, -1) if fits(n, c.layers)), 0)
        return dict(videos=passed, by_two_layers=good, seconds=time.perf_counter() - start)

    # ---- paper B200 -------------------------------------------------------------------------------------------------

    def b200(self) -> dict:
        """Prediction, never measured here: public figures (8 TB/s of which 85 % taken; cuDNN 9.19 attention 128/128 at 1.67
        PFLOP/s on GB200, NVIDIA's cudnn-frontend benchmark results; dense bf16 products at 1.7 of 2.25 PFLOP/s peak)."""
        c = PRESETS["wan1.3b"]
        H, N, R, V, C, T = c.heads, c.dim // c.heads - c.rope, c.rope, c.dim // c.heads, c.latent, c.window * c.tokens
        rows = {}
        for L in (1560, 4680):
            dense = 2 * L * T * H * (N + R + V) / 1.67e15
            up = max(2 * T * H * (N + R + V) / 6.8e12, 2 * T * H * C * (N + R + V) / 1.7e15)
            rows[str(L)] = dict(dense_ms=1e3 * dense, mla_ms=1e3 * (dense + up), ratio=1 + up / dense)
        self.table("PREDICTION for a B200 (public figures, not measured), attention, T = 32760",
                   ["L", "dense ms", "MLA by K and V ms", "ratio"],
                   [[L, f"{r['dense_ms']:.3f}", f"{r['mla_ms']:.3f}", f"{r['ratio']:.3f}"] for L, r in rows.items()])
        return rows


SECTIONS = ("memory", "rollout", "attention", "block", "batch", "b200")       # rollout early: what it compiles is then really cold


@torch.no_grad()
def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", action="append", choices=SECTIONS, help="a section; may be given again; default: all, in this order")
    parser.add_argument("--json", help="where to write the results, anew after every section")
    parser.add_argument("--markdown", action="store_true", help="print the tables as markdown")
    parser.add_argument("--quick", action="store_true", help="small sizes (always on a CPU)")
    parser.add_argument("--cpu", action="store_true", help="measure the CPU although there is a GPU")
    parser.add_argument("--budget", type=float, default=900, metavar="SECONDS", help="start nothing after this time; rows left out say so")
    parser.add_argument("--layers", type=int, help="fewer layers than the preset, for a shorter run")
    parser.add_argument("--fit", metavar="PATH", help="measure nothing: print the constants of fused.Gpu that follow from a results file")
    args = parser.parse_args(argv)
    if args.fit:
        print(f"now    {fused.Gpu()}\nfitted {fit(json.loads(Path(args.fit).read_text()))}")
        return
    torch._dynamo.config.recompile_limit = 256             # one function meets many shapes here; each is meant
    bench = Bench(args)
    bench.ceilings()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as empty:             # compilers find nothing of an earlier run
        os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ["TRITON_CACHE_DIR"] = f"{empty}/inductor", f"{empty}/triton"
        for name in args.only or SECTIONS:
            start = time.perf_counter()
            bench.out["sections"][name] = bench.attempt(getattr(bench, name))
            if "failed" in bench.out["sections"][name]:
                print(f"section {name} failed: {bench.out['sections'][name]['failed']}")
            print(f"[{name}: {time.perf_counter() - start:.0f} s]", flush=True)
            bench.save()
    return bench.out


if __name__ == "__main__":
    main()
