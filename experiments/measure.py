"""What every section of experiments/bench.py uses: the clock, the device's own ceilings, models and full windows of noise, tables, JSON."""
import gc
import itertools
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import fused
from attention import Dense, route_counts
from compiled import FullWindow
from mla_video import PRESETS, VideoDiT
from rope3d import rotate
from sample import provenance


def graphs() -> tuple[int, int]:
    """(graphs compiled, graph breaks) so far in this process, from torch.compile's own counters."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def cell(row: dict | None) -> str:
    if row is None or "ms" not in row:
        return "" if row is None else row["failed"].split(":")[0]
    return f"{row['ms']:.4f}" if row["ms"] < 10 else f"{row['ms']:.2f}"


def fit(out: dict) -> fused.Gpu:
    """The constants of `fused.Gpu` from the section `attention` of a results file: every row is one linear equation, counts times
    constants = measured seconds, and all of them are solved for the least squares of the *relative* errors."""
    c, gpu, equations = PRESETS["wan1.3b"], fused.Gpu(), []
    for point in (point for point in out["sections"]["attention"]["points"] if "timing" in point):
        L, T, ms = point["L"], point["T"], {name: row["ms"] for name, row in point["timing"].items() if "ms" in row}
        sizes = 1, L, T, c.heads, c.dim // c.heads - c.rope, c.rope, c.dim // c.heads, c.latent
        counts = {route: route_counts(route, *sizes, gpu) for route in ("reference", "materialised", "absorbed")} | {
            "dense cuDNN, K V ready": (1, fused.waves(L, c.heads, gpu.sms) * T, 0, 0, 0, 0),
            "fused, kernel only": fused.form_counts(0, *sizes, gpu.sms), "fused, cuDNN only": fused.form_counts(L, *sizes, gpu.sms)}
        equations += [[1e3 * n / ms[name] for n in count] for name, count in counts.items() if name in ms]
    A = torch.tensor(equations, dtype=torch.float64)
    size = A.amax(0)                                       # columns differ by twenty orders of magnitude
    return fused.Gpu(gpu.sms, *(torch.linalg.lstsq(A / size, torch.ones(len(A), 1, dtype=A.dtype)).solution[:, 0] / size).tolist())


class StoredRotated(Dense):
    """A dense layer whose cache holds keys already rotated to absolute positions, as released code keeps them: no rotation at read,
    and no re-indexing of the window either; here not even the chunk's own. The strongest dense contender."""

    def forward(self, x, rows, q_table=None, k_table=None, mask=None, route="auto"):
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.norm_q(self.W_Q(x)), *rows))
        q = rotate(q.transpose(1, 2), q_table).transpose(1, 2)
        return self.W_O(F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2))


class Measure:
    """Device, sizes, clock and results of one run."""

    def __init__(self, args):
        self.args, self.gpu = args, torch.cuda.is_available() and not args.cpu
        self.start, self.quick = time.perf_counter(), args.quick or not self.gpu
        self.device, self.dtype = ("cuda", torch.bfloat16) if self.gpu else ("cpu", torch.float32)
        small = replace(PRESETS["toy"], layers=2, frames=12, window=12)
        self.config = small if self.quick else PRESETS["wan1.3b"]
        if args.layers:
            self.config = replace(self.config, layers=args.layers)
        self.out = provenance(torch.device(self.device))
        self.out |= {
            "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
            "triton": getattr(sys.modules.get("triton"), "__version__", None), "dtype": str(self.dtype)[6:],
            "cudnn": torch.backends.cudnn.version() if self.gpu else None, "sections": {}}

    # ---- measuring --------------------------------------------------------------------------------------------------

    def recorded(self, calls):
        """(replay, calls in it, seconds of warm-up, compilation included): the calls, made often enough for 4 ms, as one CUDA graph."""
        start = time.perf_counter()
        for call in calls + calls[:1]:
            call()
        if not self.gpu:
            return itertools.cycle(calls).__next__, 1, 0.0
        torch.cuda.synchronize()
        a, b = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        a.record(); calls[0](); b.record(); b.synchronize()
        rounds = max(1, min(100, int(4 / max(a.elapsed_time(b), 1e-3) / len(calls))))       # too few, and what ran before shows
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls * rounds:
                call()
        return graph.replay, rounds * len(calls), time.perf_counter() - start

    def clock(self, replay) -> float:
        """ms of one replay."""
        if not self.gpu:
            start = time.perf_counter()
            replay()()
            return 1e3 * (time.perf_counter() - start)
        a, b = (torch.cuda.Event(enable_timing=True) for _ in "ab")
        a.record(); replay(); b.record(); b.synchronize()
        return a.elapsed_time(b)

    def timed_in_turn(self, contenders: dict, replays=11) -> dict:
        """{name: ms of one call, median and spread} of {name: `recorded`}: they take turns, so that a GPU that grows hot, and slow, does so
        for all of them."""
        times = {name: [] for name in contenders}
        for i in range(replays + 2 if self.gpu else 5):
            for name, (replay, calls, _) in contenders.items():
                times[name] += [self.clock(replay) / calls] if i > 1 or not self.gpu else []
        return {name: dict(ms=statistics.median(found), low=sorted(found)[len(found) // 10], high=sorted(found)[-1 - len(found) // 10],
                           warmup_s=contenders[name][2]) for name, found in times.items()}

    def timed(self, calls, replays=11) -> dict:
        return self.timed_in_turn({"": self.recorded(calls)}, replays)[""]

    def attempt(self, work, forget=False) -> dict:
        """The result of `work`, or one line saying why there is none (the budget's end among the reasons). `forget`: what it compiled
        goes too, and with it the models and windows that compiled code keeps alive."""
        try:
            if time.perf_counter() - self.start > self.args.budget:
                raise TimeoutError(f"not run: the budget of {self.args.budget:.0f} s is spent")
            return work()
        except Exception as error:                         # any contender may fail in its own way; the table goes on and says so
            return {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"}
        finally:
            if forget:
                torch._dynamo.reset()
                gc.collect()
            if self.gpu:
                torch.cuda.empty_cache()

    def ceilings(self) -> None:
        n = 8192 if self.gpu else 256
        a, b = (torch.randn(n, n, device=self.device).to(self.dtype) for _ in "ab")
        product = self.timed([lambda: a @ b] * 2)["ms"]
        x = torch.empty(2**30 if self.gpu else 2**20, dtype=torch.uint8, device=self.device)
        y = torch.empty_like(x)
        moved = self.timed([lambda: y.copy_(x)])["ms"]
        self.out["ceilings"] = dict(matmul_tflops=2 * n**3 / product / 1e9, copy_gbs=2 * x.numel() / moved / 1e6)
        print(f"{self.out['device']}, torch {self.out['torch']}, triton {self.out['triton']}; ceilings: {n}^3 product "
              f"{self.out['ceilings']['matmul_tflops']:.1f} TFLOP/s, copy {self.out['ceilings']['copy_gbs']:.0f} GB/s", flush=True)

    # ---- what is measured ---------------------------------------------------------------------------------------------

    def sizes(self):
        c = self.config
        d = c.dim // c.heads
        return dict(H=c.heads, N=d - c.rope, R=c.rope, V=d, C=c.latent)

    def model(self, kind, layers=None):
        torch.manual_seed(0)
        config = replace(self.config, attention=kind, **({"layers": layers} if layers else {}))
        with torch.device(self.device):
            model = VideoDiT(config).to(self.dtype).eval().requires_grad_(False)
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)                # no gate is zero, nothing is skipped or trivially equal
        return model

    def window(self, model, videos=1):
        """A full window of noise, `seen` beyond it, as a long rollout would have."""
        with torch.device("meta"):
            empty = model.make_cache(videos, self.dtype, "meta")
        empty.seen = empty.slots
        window = FullWindow(empty)
        window.rows = [tuple(torch.empty(b.shape, device=self.device, dtype=self.dtype).normal_() for b in layer) for layer in window.rows]
        window.buffers, window.seen = window.rows[0], torch.tensor(10 * empty.slots + empty.sink, device=self.device)
        return window

    def caption(self, videos=1):
        return torch.randint(1, 20, (videos, self.config.slots), device=self.device)

    # ---- output -----------------------------------------------------------------------------------------------------

    def table(self, title, head, rows):
        cells = [[str(x) for x in row] for row in [head, *rows]]
        width = [max(len(row[i]) for row in cells) for i in range(len(head))]
        line = lambda row: " | ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(row, width)))
        print(f"\n{'### ' if self.args.markdown else ''}{title}\n" + ("" if not self.args.markdown else "\n"))
        for i, row in enumerate(cells):
            print(f"| {line(row)} |" if self.args.markdown else line(row))
            if i == 0:
                print("|" + "|".join("-" * (w + 2) for w in width) + "|" if self.args.markdown else "-" * (sum(width) + 3 * len(width)))
        sys.stdout.flush()

    def save(self):
        if self.args.json:
            path = Path(self.args.json)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.out, indent=1) + "\n")
