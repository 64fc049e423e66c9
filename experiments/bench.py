r"""Where latent attention wins and where it loses, measured on one device in one run.

    python -m experiments.bench                            all this device can hold
    python -m experiments.bench --only attention --json results/bench_h100.json
    python -m experiments.bench --quick                    small sizes; what a CPU gets anyway
    python -m experiments.bench --judge results/bench_h100.json    each target: met, or missed

On one H100 the whole takes about 12 minutes. --minutes ends it earlier, and --add keeps what an
earlier call of the same commit on the same card wrote, so that two short calls do:

    F=results/bench_h100.json
    python -m experiments.bench --minutes 9 --json $F --only attention --only up --only short \
        --only lifetime --only memory --only b200
    python -m experiments.bench --minutes 9 --json $F --add --only rollout --only block \
        --only batch --only targets

Sections: memory, rollout, attention, block, up, short, lifetime, batch, a prediction for a B200,
and targets (experiments/fast_path.py has up, short, lifetime and targets). Rows of
FlashAttention-4 (FA4) are there where it is installed: `pip install flash-attn-4`.

"The fastest dense" is the fastest of all rows whose name begins with "dense".

Attention is timed only on tensors whose answer was checked against float64 in this run. A
contender that fails (wrong, out of memory, no such backend) stays in the table and says why;
losing rows stay. Times are medians over replays of a CUDA graph that goes round several input
sets (cold L2), with the 10th and 90th percentile in the JSON. Predictions come from the cost
model of engine/routes.py.
"""

import argparse
import copy
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

if not __package__:                    # started by its path
    sys.path.insert(0, str(Path(__file__).parent.parent))

from attention import Route, crossing, route_flops
from engine.routes import (CUDNN, FA4, GPUS, H100, ROUTES, UP, UPS, attend_auto, attend_fused, backend,
                           choose_route, gpu_constants, measured_as, plan, route_counts,
                           short_version)
from engine.streaming import FastStream, FullWindow, LayerRows
from experiments.fast_path import FastPath, by_flash4, by_sdpa, by_way, judge
from experiments.measure import CPU_ROUTES, StoredRotated, attention_sizes, cell, fit, graphs
from flow import euler
from mla_video import PRESETS, VideoDiT
from rope3d import Rope3D, grid_coords, rotate

STEPS = 4                              # denoising passes of a chunk, and one more to commit
PASSES = STEPS + 1
WAN_GRID = 30, 52                      # tokens of a frame at the paper's size
SKIP_REFERENCE = 12e9                  # bytes of scores that the reference would hold

# Public figures of a B200: bytes and operations a second. cuDNN 9.19 at 128/128 on GB200 from
# NVIDIA's cudnn-frontend benchmarks; FA4 from its paper and its repository; large products in
# bf16 at 1.7 of 2.25 PFLOP/s; 8 TB/s, of which 85 % are taken.
B200 = {"memory": 8e12, "memory taken": 0.85, "product": 1.7e15, "cuDNN": 1.670e15,
        "FA4, paper": 1.613e15, "FA4, best": 1.749e15}


class Bench(FastPath):
    """The sections; each returns what goes into the JSON and prints a table."""

    @property
    def dense(self) -> str:
        """The fused route's backend here."""
        return backend(torch.device(self.device, 0 if self.gpu else None))

    # ---- memory ------------------------------------------------------------------------------

    def memory(self) -> dict:
        """Bytes of the caches, from the buffers."""
        found = {}
        for preset in ("toy", "small", "wan1.3b"):
            caches = {}
            for kind in ("mla", "dense"):
                with torch.device("meta"):
                    model = VideoDiT(replace(PRESETS[preset], attention=kind))
                    caches[kind] = model.make_cache(1, torch.bfloat16)
            mla = caches["mla"]
            dense = caches["dense"]
            found[preset] = dict(
                mla=mla.bytes_per_token, dense=dense.bytes_per_token,
                saved=1 - mla.bytes_per_token / dense.bytes_per_token,
                mla_bytes=mla.nbytes, dense_bytes=dense.nbytes)
        lines = []
        for preset, row in found.items():
            megabytes = [f"{row[name] / 1e6:.1f}" for name in ("mla_bytes", "dense_bytes")]
            saved = f"{100 * row['saved']:.1f}"
            lines.append([preset, row["mla"], row["dense"], saved, *megabytes])
        self.table("cache, bf16, from the buffers",
                   ["preset", "MLA B/token/layer", "dense", "saved %", "MLA MB/video",
                    "dense MB/video"], lines)
        return found

    # ---- attention ---------------------------------------------------------------------------

    def attention(self) -> dict:
        """Every route and its dense rivals, alone, over query tokens L and keys T."""
        lengths = (16, 32, 64, 128, 256, 512, 1024, 1560, 2340, 4680)
        windows = (32760, 15600, 9360, 1560)               # 21, 1 + 6 + 3, 6 and 1 frames
        if self.quick:
            lengths = (4, 48)
            windows = (192,)
        s = self.sizes()
        result = {"points": [], "crossing": {}, "L_star": crossing(s["N"], s["V"], s["C"])}
        for T in windows:
            for L in lengths:
                point = self.attempt(lambda: self.attention_point(L, T))
                result["points"].append(dict(L=L, T=T) | point)
                self.out["sections"]["attention"] = result
                self.save()
            self.attention_table(T, result)
        return result

    def attention_inputs(self, L: int, T: int, seed: int) -> tuple:
        """Arguments of a route, drawn at random."""
        generator = torch.Generator(self.device).manual_seed(seed)

        def normal(*shape: int, std: float = 1.0) -> Tensor:
            x = torch.randn(*shape, generator=generator, device=self.device)
            return (std * x).to(self.dtype)

        s = self.sizes()
        H, N, R, V, C = s["H"], s["N"], s["R"], s["V"], s["C"]
        frames = torch.arange(-(-T // 1560) + 1, device=self.device)
        cos, sin = Rope3D(R, N + R).table(grid_coords(frames, *WAN_GRID)[:T])
        # The chunk is the end of the window; if it is longer, positions repeat.
        query = torch.arange(max(T - L, 0), max(T - L, 0) + L, device=self.device) % T
        queries = normal(1, L, H, N), normal(1, L, H, R)
        rows = normal(1, T, C), normal(1, T, R)
        weights = normal(H, N, C, std=C**-0.5), normal(H, V, C, std=C**-0.5)
        q_table = cos[query], sin[query]
        return *queries, *rows, *weights, q_table, (cos, sin), (N + R) ** -0.5

    def dense_inputs(self, args: tuple) -> list[Tensor]:
        """q, k, v of a route's arguments as a dense cache would hold them, in float64."""
        q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, (q_cos, q_sin), (k_cos, k_sin), _ = args
        H = q_nope.shape[2]
        k_nope = torch.einsum("btc,hnc->bhtn", c_kv.double(), W_UK.double())
        k_turned = rotate(k_rope.double(), (k_cos.double(), k_sin.double()))
        k_shared = k_turned[:, None].expand(-1, H, -1, -1)
        k = torch.cat((k_nope, k_shared), -1)                              # [B, H, T, N + R]
        v = torch.einsum("btc,hvc->bhtv", c_kv.double(), W_UV.double())    # [B, H, T, V]
        q_turned = rotate(q_rope.double(), (q_cos.double(), q_sin.double()))
        q = torch.cat((q_nope.double(), q_turned), -1).transpose(1, 2)     # [B, H, L, N + R]
        return [q, k, v]

    def attention_point(self, L: int, T: int) -> dict:
        """All contenders at one size: checked, timed in turn, and what `auto` takes."""
        gpu = gpu_constants(0) if self.gpu else None
        planned = plan(1, L, T, **self.sizes(), gpu=gpu, dense=self.dense), self.dense
        sets = [self.attention_inputs(L, T, seed) for seed in range(3)]
        # The answer is checked at the first and the last query tokens.
        first = torch.arange(min(L, 32))
        last = torch.arange(max(0, L - 32), L)
        checked = torch.cat((first, last)).unique().to(self.device)
        exact = [self.dense_inputs(args) for args in sets[:2]]
        q, k, v = exact[0]
        scores = q[:, :, checked] @ k.mT * sets[0][8]
        want = (scores.softmax(-1) @ v).transpose(1, 2)
        ready = [[x.to(self.dtype) for x in qkv] for qkv in exact]
        del exact, q, k, v, scores

        contenders = {}
        for name, call in self.dense_calls(L, sets[0][8]):
            contenders[name] = call, ready
            if "FA4" in name:                              # as a cache keeps them: [B, T, H, d]
                contenders[name] = call, [[token_major(x) for x in qkv] for qkv in ready]
        forms = self.forms(L)
        for name, call in self.latent_calls(L, T, forms):
            contenders[name] = (call, sets)

        def run(call: Callable | None, inputs: list) -> dict:
            if call is None:
                needed = 8 * L * T * self.sizes()["H"] / 1e9
                raise MemoryError(f"skipped: its scores would take {needed:.0f} GB")
            error = self.checked_error(call(inputs[0])[:, checked], want)
            calls = [lambda args=args: call(args) for args in inputs]
            return {"error": error, "recorded": self.recorded(calls)}

        timing = {}
        for name, (call, inputs) in contenders.items():
            timing[name] = self.attempt(lambda: run(call, inputs))
        self.add_clocks(timing)
        return self.judged(L, T, timing, forms, planned)

    def forms(self, L: int) -> dict[str, tuple[int, str]]:
        """Forms of the fused route: how many query tokens go to a dense kernel, and to which."""
        backends = [CUDNN, FA4] if self.dense == FA4 else [CUDNN]
        forms = {"fused, kernel only": (0, self.dense)}
        for dense in backends:
            forms[f"fused, {dense} only"] = L, dense
        cut = self.full_waves(L)
        if self.gpu and 0 < cut < L:
            for dense in backends:
                name = "fused, waves + kernel" if dense == CUDNN else "fused, FA4 waves + kernel"
                forms[name] = cut, dense
        return forms

    def full_waves(self, L: int) -> int:
        """The query tokens that fill whole waves of the GPU's multiprocessors."""
        if not self.gpu:
            return 0
        H = self.sizes()["H"]
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        waves = H * -(-L // 128) // sms                    # those that are full
        return 128 * (waves * sms // H)

    def dense_calls(self, L: int, scale: float) -> list[tuple[str, Callable]]:
        """Contenders whose keys and values are ready: (name, function of [q, k, v])."""
        def flash(qkv, queries=slice(None)):
            return by_sdpa(SDPBackend.FLASH_ATTENTION, qkv, scale, queries)

        if not self.gpu:
            return [("dense math, K V ready", lambda qkv: by_sdpa(SDPBackend.MATH, qkv, scale)),
                    ("dense flash, K V ready", flash)]

        def cudnn(qkv, queries=slice(None)):
            return by_sdpa(SDPBackend.CUDNN_ATTENTION, qkv, scale, queries)

        def flash4(qkv, queries=slice(None)):
            return by_flash4(qkv, scale, queries)

        def waves(first: Callable, qkv):
            return torch.cat((first(qkv, slice(cut)), flash(qkv, slice(cut, None))), 1)

        cut = self.full_waves(L)
        calls = [("dense cuDNN, K V ready", cudnn), ("dense flash, K V ready", flash)]
        strong = {"cuDNN": cudnn}
        if self.dense == FA4:
            calls.append(("dense FA4, K V ready", flash4))
            strong["FA4"] = flash4
        if 0 < cut < L:
            for name, call in strong.items():
                calls.append((f"dense {name} waves + flash", partial(waves, call)))
        return calls

    def latent_calls(self, L: int, T: int, forms: dict) -> list[tuple[str, Callable | None]]:
        """Contenders that start from the cache of latents: (name, function of arguments)."""
        calls = []
        for route in CPU_ROUTES:
            calls.append((route, lambda args, route=route: ROUTES[route](*args)))
        if 8 * L * T * self.sizes()["H"] > SKIP_REFERENCE:
            calls[0] = ("reference", None)
        if self.gpu:
            calls.append(("fused", lambda args: attend_fused(*args)))
            for name, form in forms.items():
                cut, dense = form
                call = partial(attend_fused, cut=cut, dense=dense)
                calls.append((name, lambda args, call=call: call(*args)))
            merged = by_way("kernel", attend_fused, "FINISH")
            calls.append(("fused, W_UV by a kernel", lambda args: merged(*args)))
            if L >= 1024:
                for name in UPS:
                    call = by_way(name, attend_fused)
                    calls.append((f"fused, up: {name}", lambda args, call=call: call(*args)))
        return calls

    def checked_error(self, got: Tensor, want: Tensor) -> float:
        """Relative error; ValueError if it is more than rounding, or NaN."""
        error = ((got.double() - want).square().mean() / want.square().mean()).sqrt().item()
        limit = 0.02 if self.gpu else 1e-4             # bf16 rounds at 0.004, float32 at 1e-7
        if not error < limit:
            raise ValueError(f"wrong: relative error {error:.1e}")
        return error

    def add_clocks(self, timing: dict) -> None:
        """Time those that passed, and set their error beside that of dense attention."""
        recorded = {}
        for name, row in timing.items():
            if "recorded" in row:
                recorded[name] = row.pop("recorded")
        for name, clock in self.timed_in_turn(recorded).items():
            timing[name] = clock | timing[name]
        ready = [row for name, row in timing.items() if name.endswith("K V ready")]
        base = ready[0].get("error") or ready[1].get("error")
        for row in timing.values():
            if "error" in row:
                row["error_ratio"] = row["error"] / base if base else None

    def judged(self, L: int, T: int, timing: dict, forms: dict, planned: tuple) -> dict:
        """What `auto` takes, beside the best of its choices and what was predicted."""
        gpu = gpu_constants(0) if self.gpu else None
        auto = choose_route(L, T, **self.sizes(), gpu=gpu, fusable=self.gpu, dense=self.dense)
        # What fused does anyway is no other choice: the time of the same kernels under another
        # name differs by chance.
        same = {name for name, form in forms.items() if form == planned}
        same.add(f"fused, up: {UP}")
        if planned[0] == L:
            same.add("fused, W_UV by a kernel")           # our kernels do not run
        choices = {}
        for name, row in timing.items():
            if "ms" in row and not name.startswith("dense") and name not in same:
                choices[name] = row["ms"]
        over_best = choices[auto] / min(choices.values()) if auto in choices else None
        point = dict(timing=timing, auto=auto, cut=planned[0], backend=planned[1], best=min(choices, key=choices.get),
                     auto_over_best=over_best, flops={})
        for route in ("materialised", "absorbed"):
            point["flops"][route] = route_flops(route, L, T, **self.sizes())
        if gpu is not None:
            point["predicted_ms"] = {}
            for route in (*CPU_ROUTES, "fused"):
                counts = route_counts(route, 1, L, T, **self.sizes(), gpu=gpu, dense=self.dense)
                point["predicted_ms"][route] = 1e3 * gpu.seconds(counts)
        return point

    def attention_table(self, T: int, result: dict) -> None:
        points = []
        for point in result["points"]:
            if point["T"] == T and "timing" in point:
                points.append(point)
            elif point["T"] == T:
                print(f"L={point['L']} T={T}: {point['failed']}")
        if not points:
            return
        names = {name: None for point in points for name in point["timing"]}       # in order
        rows = []
        for name in names:
            rows.append([name, *(cell(point["timing"].get(name)) for point in points)])
        for route in points[0].get("predicted_ms", ()):
            times = [f"{point['predicted_ms'][route]:.4f}" for point in points]
            rows.append([f"predicted: {route}", *times])
        taken = [f"{point['auto']} ({point['cut']})" for point in points]
        rows.append([f"auto takes (query tokens to {self.dense})", *taken])
        ratios = [point["auto_over_best"] for point in points]
        shown = [f"{ratio:.3f}" if ratio else "-" for ratio in ratios]
        rows.append(["auto / best route", *shown])
        rows.append(["worst error / dense error", *map(worst_error, points)])
        if any("ms" in kernel_row(point) for point in points):
            shares = [self.share_of_ceiling(point) for point in points]
            rows.append(["fused, kernel only, % of matmul ceiling", *shares])
        lengths = [f"L={point['L']}" for point in points]
        self.table(f"attention, T = {T}, ms", ["contender", *lengths], rows)
        pairs = {"absorbed / materialised": ("absorbed", "materialised"),
                 "kernel / cuDNN": ("fused, kernel only", "fused, cuDNN only"),
                 "kernel / FA4": ("fused, kernel only", "fused, FA4 only")}
        for label, (one, other) in pairs.items():
            at = measured_crossing(points, one, other)
            if at is not None:
                result["crossing"][f"{label}, T={T}"] = at
                print(f"measured crossing of {label} at T = {T}: L = {at:.0f}; by operations "
                      f"L* = {result['L_star']:.0f}")

    def share_of_ceiling(self, point: dict) -> str:
        """Useful operations of our kernel, in percent of a large product's."""
        row = kernel_row(point)
        if "ms" not in row:
            return "-"
        s = self.sizes()
        useful = 2 * point["L"] * point["T"] * s["H"] * (2 * s["C"] + s["R"])
        return f"{useful / row['ms'] / 1e7 / self.out['ceilings']['matmul_tflops']:.0f}"

    # ---- block and rollout -------------------------------------------------------------------

    def block(self) -> dict:
        """One block over a full window, all passes of a chunk."""
        # name -> attention, route, compiled, how keys are stored rotated (None: they are not)
        contenders = {
            "dense, compiled": ("dense", attend_auto, True, None),
            "MLA auto, compiled": ("mla", attend_auto, True, None),
            "dense, keys stored rotated, compiled": ("dense", attend_auto, True, CUDNN),
            "MLA materialised, compiled": ("mla", ROUTES["materialised"], True, None),
            "MLA absorbed, compiled": ("mla", ROUTES["absorbed"], True, None),
            "dense, eager": ("dense", attend_auto, False, None),
            "MLA auto, eager": ("mla", attend_auto, False, None),
        }
        if self.gpu:
            for up in UPS:
                how = "mla", attend_auto, True, None, up
                contenders[f"MLA auto, up: {up}, compiled"] = how
        if self.dense == FA4:
            contenders |= {
                "dense, keys stored rotated, FA4, compiled": ("dense", attend_auto, True, FA4),
                "MLA over cuDNN, compiled": ("mla", attend_over_cudnn, True, None)}
        rows = self.block_rows(contenders)
        if self.gpu:                                       # a window of 1 + 6 + 3 frames
            whole = self.config
            self.config = replace(whole, window=10)
            some = {name: how for name, how in contenders.items() if name in BLOCKS_SHORT}
            self.out["sections"]["block_10_frames"] = self.block_rows(some)
            self.config = whole
        return rows

    def block_rows(self, contenders: dict) -> dict:
        """The contenders at the window of the configuration, as rows, and their table."""
        rows = {}
        for name, how in contenders.items():
            compiled = how[2]
            if compiled and not self.gpu:
                continue
            up = how[4] if len(how) > 4 else UP
            work = by_way(up, self.block_contender)
            rows[name] = self.attempt(lambda: work(*how[:4]), forget=True)
            print(f"  block: {name}: {cell(rows[name])}", flush=True)
        base = rows["dense, compiled" if self.gpu else "dense, eager"].get("ms", math.nan)
        lines = []
        for name, row in rows.items():
            line = [name, cell(row), "", "", ""]
            if "ms" in row:
                flops = PASSES * self.block_flops(dense=name.startswith("dense"))
                ceiling = self.out["ceilings"]["matmul_tflops"]
                row["percent_of_ceiling"] = flops / row["ms"] / 1e7 / ceiling
                row["over_dense"] = row["ms"] / base
                line[2:] = [f"{row['over_dense']:.3f}", f"{row['percent_of_ceiling']:.0f}",
                            f"{row['warmup_s']:.0f}"]
            lines.append(line)
        c = self.config
        self.table(f"block, a chunk of {PASSES} passes, L = {c.chunk * c.tokens}, "
                   f"T = {c.window * c.tokens}",
                   ["contender", "ms", "/ compiled dense", "% of ceiling", "warm-up s"], lines)
        return rows

    def block_contender(self, kind: str, attend: Route, compiled: bool,
                        rotated: str | None) -> dict:
        model = self.model(kind, layers=1)
        if rotated:
            self.store_rotated(model, rotated)
        return self.timed([self.block_chunk(model, attend, compiled)], replays=9)

    def store_rotated(self, model: VideoDiT, kernel: str) -> None:
        """Let a dense model keep its keys rotated, and attend by this kernel."""
        for block in model.blocks:
            layer = block.attention
            block.attention = StoredRotated.like(layer, self.config.dim, flash=kernel == FA4)

    def block_chunk(self, model: VideoDiT, attend: Route, compiled: bool) -> Callable:
        """A function that makes all passes of a chunk through the one block of `model`."""
        c = self.config
        window = self.window(model)
        block = model.blocks[0]
        past, own = window.positions()
        grid = c.height // c.patch, c.width // c.patch
        rope = block.attention.rope
        q_table = rope.table(grid_coords(own, *grid))
        k_table = rope.table(grid_coords(torch.cat((past, own)), *grid))
        x = self.noise_like(torch.empty(1, c.chunk, c.tokens, c.dim, device="meta"))
        features = self.noise_like(torch.empty(1, c.chunk, 256, device="meta"))
        level = model.level(model.time(features)).unflatten(-1, (6, c.dim)).float()
        words = model.words(self.caption())

        def one_pass(x):
            return block(x, level, words, q_table, k_table, cache=window.layers[0],
                         attend=attend)[0]

        call = torch.compile(one_pass, fullgraph=True, dynamic=False) if compiled else one_pass

        def chunk():
            for _ in range(PASSES):
                call(x)

        return chunk

    def block_flops(self, dense: bool) -> int:
        """Useful operations of a pass: linear layers, and attention without up-projection."""
        c = self.config
        s = self.sizes()
        E = c.dim
        Q = c.query_latent
        L = c.chunk * c.tokens
        T = c.window * c.tokens
        weights = 4 * E * E if dense else E * (s["C"] + s["R"]) + E * Q + Q * E + E * E
        linear = 2 * L * (weights + 2 * E * E + 2 * E * c.ffn)
        caption = 4 * E * c.slots * (L + E)
        return 4 * L * T * E + linear + caption

    def rollout(self) -> dict:
        """Chunks of whole models with a full window."""
        compiler = "inductor" if self.gpu else "aot_eager"
        # name -> attention, how keys are stored rotated (None: they are not), frames of the window
        full = self.config.window
        contenders = {"mla": ("mla", None, full), "dense": ("dense", None, full)}
        if self.gpu:
            kernels = [CUDNN, FA4] if self.dense == FA4 else [CUDNN]
            for kernel in kernels:
                name = f"dense, keys stored rotated, {kernel}"
                contenders[name] = "dense", kernel, full
            contenders["mla, 10 frames"] = "mla", None, 10
            contenders[f"{name}, 10 frames"] = "dense", kernel, 10
        rows = {}
        whole = self.config
        for name, (kind, rotated, frames) in contenders.items():
            def run():
                model = self.model(kind)
                if rotated:
                    self.store_rotated(model, rotated)
                return self.stream(model, self.window(model), 10 if self.gpu else 3, compiler,
                                   more=190 if self.gpu and name == "mla" else 0)
            self.config = replace(whole, window=frames)
            rows[name] = self.attempt(run, forget=True)
            self.config = whole
            print(f"  rollout: {name}: {rows[name]}", flush=True)
        if self.gpu:                                       # what `python sample.py` waits for
            rows["toy"] = self.attempt(self.toy_stream, forget=True)
        mla = rows["mla"]
        if "ms" in mla and "ms" in rows["dense"]:
            mla["over_dense"] = mla["frames_per_s"] / rows["dense"]["frames_per_s"]
            print(f"rollout: MLA makes {mla['over_dense']:.3f}x the frames per second of dense")
        names = ["frames_per_s", "cold_s", "chunks", "chunks_of_2_passes", "recompiles",
                 "graph_breaks", "sync_check"]
        lines = []
        for kind, row in rows.items():
            values = [row.get(name, "") for name in names]
            shown = [f"{x:.2f}" if isinstance(x, float) else x for x in values]
            lines.append([kind, cell(row), *shown])
        self.table("rollout, window full", ["model", "ms/chunk", *names], lines)
        return rows

    def toy_stream(self) -> dict:
        whole = self.config
        self.config = PRESETS["toy"]
        try:
            model = self.model("mla")
            return self.stream(model, self.window(model), 100)
        finally:
            self.config = whole

    def stream(self, model: VideoDiT, window: FullWindow, chunks: int,
               backend: str = "inductor", more: int = 0) -> dict:
        """Time `chunks` chunks over a full window, then make `more` of a single step.

        These (2 passes instead of 5) run the same graphs, sooner done. On a GPU any host
        synchronisation in either part raises.
        """
        start = time.perf_counter()
        fast = FastStream(model, self.caption(), window, attend_auto, backend)
        generator = torch.Generator(self.device).manual_seed(0)
        shape = fast.chunk_like().shape

        def noise() -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)

        def chunk(steps: int = STEPS) -> Tensor:
            x = euler(fast.velocity, noise, steps)
            fast.commit(x)
            return x

        chunk()                                            # compiles
        if self.gpu:
            torch.cuda.synchronize()
        cold = time.perf_counter() - start
        before, _ = graphs()
        with no_host_synchronisation(self.gpu):
            marks, x = self.clock_chunks(chunk, chunks)
            for _ in range(more):
                x = chunk(1)
        times = self.seconds_between(marks)
        after, breaks = graphs()
        median = statistics.median(times)
        return dict(ms=1e3 * median, low=1e3 * min(times), high=1e3 * max(times), chunks=chunks,
                    chunks_of_2_passes=more, cold_s=cold,
                    frames_per_s=model.config.chunk / median,
                    recompiles=after - before, graph_breaks=breaks,
                    sync_check="did not raise" if self.gpu else "no GPU",
                    finite=bool(x.isfinite().all()))

    def clock_chunks(self, chunk: Callable, number: int) -> tuple[list, Tensor]:
        """Marks around each of so many chunks, and the last chunk. On a GPU they are events:
        reading a clock would wait for the GPU."""
        def mark():
            if not self.gpu:
                return time.perf_counter()
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            return event

        marks = [mark()]
        for _ in range(number):
            x = chunk()
            marks.append(mark())
        return marks, x

    def seconds_between(self, marks: list) -> list[float]:
        """From each mark to the next."""
        if not self.gpu:
            return [after - before for before, after in zip(marks, marks[1:])]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in zip(marks, marks[1:])]

    # ---- batch -------------------------------------------------------------------------------

    def batch(self) -> dict:
        """How many videos a GPU holds."""
        rows = {}
        for kind in ("dense", "mla"):
            for how, turn in (("in turns of 1 video", 1), ("all at once", None)):
                name = f"{kind}, {how}"
                rows[name] = self.attempt(lambda: self.largest(kind, turn), forget=True)
                print(f"  batch: {name}: {rows[name]}", flush=True)
        for how in ("in turns of 1 video", "all at once"):
            mla = rows[f"mla, {how}"].get("videos")
            dense = rows[f"dense, {how}"].get("videos")
            rows[f"mla, {how}"]["over_dense"] = mla / dense if mla and dense else None
        lines = []
        for name, row in rows.items():
            ratio = row.get("over_dense")
            videos = row.get("videos", row.get("failed"))
            lines.append([name, videos, f"{ratio:.1f}" if ratio else ""])
        self.table("largest batch, window full", ["model", "videos", "MLA / dense"], lines)
        return rows

    def largest(self, kind: str, turn: int | None) -> dict:
        """The largest batch by doubling, then bisecting.

        Every try holds all weights and every layer's cache of all videos. It runs two layers
        (the second finds the rows of the first still held), where the peak is that of all.
        What is reported has passed through all of them.
        """
        model = self.model(kind)
        layers = self.config.layers
        if not self.gpu:
            videos = 4 if self.fits(model, 4, layers, turn) else 0
            return dict(videos=videos, note="CPU: a pass through the code, no limit sought")
        start = time.perf_counter()

        def in_time() -> bool:
            return time.perf_counter() - start < 90

        good = 0
        bad = 1
        while self.fits(model, bad, 2, turn) and in_time():
            good = bad
            bad = 2 * bad
        while bad - good > 1 and in_time():
            middle = (good + bad) // 2
            if self.fits(model, middle, 2, turn):
                good = middle
            else:
                bad = middle
        passed = good
        while passed > 0 and not self.fits(model, passed, layers, turn):
            passed -= 1
        return dict(videos=passed, by_two_layers=good, seconds=time.perf_counter() - start)

    def fits(self, model: VideoDiT, videos: int, layers: int, turn: int | None) -> bool:
        """Does a pass of so many videos through so many layers fit, `turn` videos at a time?"""
        blocks = model.blocks
        model.blocks = blocks[:layers]
        try:
            self.one_pass(model, videos, turn or videos)
            return True
        except RuntimeError as error:      # out of memory, or a library that cannot allocate
            if "alloc" not in str(error).lower() and "memory" not in str(error):
                raise
            return False
        finally:
            model.blocks = blocks
            if self.gpu:
                torch.cuda.empty_cache()

    def one_pass(self, model: VideoDiT, videos: int, turn: int) -> None:
        c = self.config
        window = self.window(model, videos)
        x = torch.zeros(videos, c.chunk, c.channels, c.height, c.width, device=self.device,
                        dtype=self.dtype)
        sigma = x.new_ones(x.shape[:2])
        caption = self.caption(videos)
        for first in range(0, videos, turn):
            some = slice(first, first + turn)
            mine = of_videos(window, some)
            x[some] = model.denoise(x[some], sigma[some], caption[some], mine, attend_auto)
        if self.gpu:
            torch.cuda.synchronize()

    # ---- paper B200 --------------------------------------------------------------------------

    def b200(self) -> dict:
        """Prediction, never measured here, from public figures: `B200`."""
        c = PRESETS["wan1.3b"]
        s = attention_sizes(c)
        T = c.window * c.tokens
        widths = s["H"] * (s["N"] + s["R"] + s["V"])       # of K and V, all heads
        rows = {}
        for L in (1560, 4680):
            dense = 2 * L * T * widths / B200["cuDNN"]
            written = 2 * T * widths / (B200["memory"] * B200["memory taken"])
            multiplied = 2 * T * widths * s["C"] / B200["product"]
            up = max(written, multiplied)
            flash = [1e3 * 2 * L * T * widths / B200[name] for name in ("FA4, best", "FA4, paper")]
            rows[str(L)] = dict(dense_flash4_ms=flash, dense_ms=1e3 * dense, mla_ms=1e3 * (dense + up),
                                ratio=1 + up / dense)
        lines = []
        for L, row in rows.items():
            lines.append([L, *(f"{row[name]:.3f}" for name in ("dense_ms", "mla_ms", "ratio"))])
        self.table("PREDICTION for a B200 (public figures, not measured), attention, T = 32760",
                   ["L", "dense ms", "MLA by K and V ms", "ratio"], lines)
        return rows


def kernel_row(point: dict) -> dict:
    return point["timing"].get("fused, kernel only", {})


def worst_error(point: dict) -> str:
    """The largest error of a contender, over that of dense attention."""
    ratios = [row.get("error_ratio") or 0 for row in point["timing"].values()]
    return f"{max(ratios):.2f}"


def measured_crossing(points: list[dict], one: str, other: str) -> float | None:
    """At how many query tokens `one` begins to lose against `other`: straight in the logarithms
    between two measured points. None if it does not."""
    ratios = []
    for point in points:
        a = point["timing"].get(one, {})
        b = point["timing"].get(other, {})
        if "ms" in a and "ms" in b:
            ratios.append((point["L"], a["ms"] / b["ms"]))
    found = None
    for (l0, r0), (l1, r1) in zip(ratios, ratios[1:]):
        if r0 < 1 <= r1:
            found = l0 * (l1 / l0) ** (math.log(1 / r0) / math.log(r1 / r0))
    return found


def of_videos(window: FullWindow, some: slice) -> FullWindow:
    """The window of some of the videos: the same tensors, seen in part."""
    part = copy.copy(window)
    part.layers = []
    for layer in window.layers:
        buffers = tuple(buffer[some] for buffer in layer.buffers)
        part.layers.append(LayerRows(buffers, layer.kept))
    return part


@contextmanager
def no_host_synchronisation(gpu: bool):
    """On a GPU: what makes the host wait for it raises."""
    if gpu:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if gpu:
            torch.cuda.set_sync_debug_mode("default")


def token_major(x: Tensor) -> Tensor:
    """The same [B, H, T, d], its memory in the order [B, T, H, d]."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def attend_over_cudnn(*args) -> Tensor:
    """The fused route as it is where FA4 is not installed."""
    return attend_fused(*args, dense=CUDNN)


# Blocks that are timed over a window of 10 frames, too.
BLOCKS_SHORT = ("dense, compiled", "MLA auto, compiled",
                "dense, keys stored rotated, compiled",
                "dense, keys stored rotated, FA4, compiled")

# Rollout early: what it compiles is then really cold. Targets last: it looks at all the others.
SECTIONS = ("memory", "rollout", "attention", "up", "short", "block", "lifetime", "batch", "b200",
            "targets")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--only", action="append", choices=SECTIONS,
                        help="a section; may be given again; default: all, in this order")
    parser.add_argument("--json", help="where to write the results, anew after every section")
    parser.add_argument("--add", action="store_true",
                        help="keep the sections that this file has, of the same commit and card")
    parser.add_argument("--markdown", action="store_true", help="print the tables as markdown")
    parser.add_argument("--quick", action="store_true", help="small sizes (always on a CPU)")
    parser.add_argument("--cpu", action="store_true",
                        help="measure the CPU although there is a GPU")
    parser.add_argument("--budget", type=float, default=900, metavar="SECONDS",
                        help="start nothing after this time; rows left out say so")
    parser.add_argument("--minutes", type=float,
                        help="the same in minutes; what was measured until then is written")
    parser.add_argument("--layers", type=int,
                        help="fewer layers than the preset, for a shorter run")
    parser.add_argument("--fit", metavar="PATH",
                        help="measure nothing: print the constants of engine.routes.Gpu that "
                        "follow from a results file")
    parser.add_argument("--judge", metavar="PATH",
                        help="measure nothing: print what a results file says of the targets")
    args = parser.parse_args(argv)
    if args.minutes is not None:
        args.budget = 60 * args.minutes
    return args


def constants_said(out: dict) -> str:
    """Of which card and torch the cost model's constants are."""
    found = measured_as(out["card"], out["torch"])
    if found is None:
        return f"{out['card']} was never measured: operations are counted; see --fit"
    return f"constants of {found[0]}, torch {found[1]}"


def print_constants(out: dict) -> None:
    """What stands in engine/routes.py for the card of a results file, and what it should be."""
    key = out.get("card", H100[0]), short_version(out["torch"])
    print(f"{key}\nnow    {GPUS.get(key)}\nfitted {fit(out)}")


@torch.no_grad()
def main(argv: list[str] | None = None) -> dict | None:
    args = parse(argv)
    if args.fit:
        print_constants(json.loads(Path(args.fit).read_text()))
        return None
    if args.judge:
        for row in judge(json.loads(Path(args.judge).read_text())["sections"]):
            print(f"{row['verdict']:12s} {row['target']}: {row['measured']} "
                  f"({row['sense']} {row['limit']:g})")
        return None
    torch._dynamo.config.recompile_limit = 256     # one function meets many shapes, all meant
    bench = Bench(args)
    if args.add:
        bench.go_on()
    bench.ceilings()
    if bench.gpu:
        print(f"dense kernel of the fused route: {bench.dense}; {constants_said(bench.out)}")
    # An empty folder: the compilers find nothing of an earlier run.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as empty:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{empty}/inductor"
        os.environ["TRITON_CACHE_DIR"] = f"{empty}/triton"
        for name in args.only or SECTIONS:
            start = time.perf_counter()
            section = bench.attempt(getattr(bench, name))
            bench.out["sections"][name] = section
            if "failed" in section:
                print(f"section {name} failed: {section['failed']}")
            print(f"[{name}: {time.perf_counter() - start:.0f} s]", flush=True)
            bench.save()
    return bench.out


if __name__ == "__main__":
    main()
