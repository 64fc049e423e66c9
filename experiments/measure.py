"""What every section of experiments/bench.py uses.

The clock, the device's own ceilings, models and full windows of noise, tables, JSON.
"""

import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.utils import counters

from attention import Dense
from engine.command_line import provenance
from engine.homogeneous import config_of, model_of
from engine import flash4
from engine.routes import FA4, GPUS, H100, Counts, Gpu, form_counts, route_counts, waves
from engine.streaming import FullWindow
from mla_video import PRESETS, Config, VideoDiT
from rope3d import rotate

CPU_ROUTES = ("reference", "materialised", "absorbed")

# Self-Forcing's released block, ms of 5 passes at wan1.3b's sizes (dense, 21 frames), on one H100 with
# torch 2.11, its flash-attn replaced by cuDNN's attention. Its code cannot be kept here, so this
# was timed once, by hand, and is in no file of results/.
RELEASED = {"eager": 17.1, "compiled, with graph breaks": 14.5}


def graphs() -> tuple[int, int]:
    """(graphs compiled, graph breaks) so far in this process, as torch.compile counts."""
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def cell(row: dict | None) -> str:
    """A row of a table of times: milliseconds, or why there are none."""
    if row is None:
        return ""
    if "ms" not in row:
        return row["failed"].split(":")[0]
    return f"{row['ms']:.4f}" if row["ms"] < 10 else f"{row['ms']:.2f}"


def attention_sizes(c: Config) -> dict[str, int]:
    """The letters of attention.py."""
    head = c.dim // c.heads
    return dict(H=c.heads, N=head - c.rope, R=c.rope, V=head, C=c.latent)


# ---- the constants of a card -----------------------------------------------------------------


def fit(out: dict) -> Gpu:
    """The constants of `engine.routes.Gpu` from the section `attention` of a results file.

    Every row of that table is one linear equation, counts times constants = measured seconds.
    All are solved for the least squares of their *relative* errors. A constant of which no row
    says anything (FA4 was not installed) stays that of the H100.
    """
    known = GPUS[H100]
    sms = out.get("sms", known.sms)
    equations = []
    for point in out["sections"]["attention"]["points"]:
        for name, counts in counted(point["L"], point["T"], sms).items():
            row = point.get("timing", {}).get(name, {})
            if "ms" in row:
                equations.append([1e3 * count / row["ms"] for count in counts])
    A = torch.tensor(equations, dtype=torch.float64)
    size = A.amax(0)                       # columns differ by twenty orders of magnitude
    said = size > 0
    one = torch.ones(len(A), 1, dtype=A.dtype)
    A = A[:, said] / size[said]
    constants = torch.tensor(known[1:], dtype=A.dtype)
    constants[said] = torch.linalg.lstsq(A, one).solution[:, 0] / size[said]
    return Gpu(sms, *constants.tolist())


def counted(L: int, T: int, sms: int) -> dict[str, Counts]:
    """{contender: what it costs} at the paper's widths, where costs can be counted."""
    gpu = GPUS[H100]._replace(sms=sms)
    sizes = attention_sizes(PRESETS["wan1.3b"])
    counts = {}
    for route in CPU_ROUTES:
        counts[route] = route_counts(route, 1, L, T, **sizes, gpu=gpu)
    ready = waves(L, sizes["H"], gpu.sms) * T
    counts["dense cuDNN, K V ready"] = Counts(launch=1, key=ready)
    counts["fused, kernel only"] = form_counts(0, 1, L, T, **sizes, sms=gpu.sms)
    counts["fused, cuDNN only"] = form_counts(L, 1, L, T, **sizes, sms=gpu.sms)
    counts["dense FA4, K V ready"] = Counts(launch=1, flash_key=ready)
    counts["fused, FA4 only"] = form_counts(L, 1, L, T, **sizes, sms=gpu.sms, dense=FA4)
    return counts


# ---- the strongest dense contender -----------------------------------------------------------


class StoredRotated(Dense):
    """Dense attention whose cache holds keys already rotated to absolute positions, as released
    code keeps them.

    Nothing is rotated at read, and the window cannot be re-indexed. Here not even the chunk's
    own keys are rotated. It is the strongest dense contender. `flash` says that FlashAttention-4
    attends, and not what torch prefers.
    """
    flash = False

    @classmethod
    def like(cls, dense: Dense, E: int, flash: bool = False) -> "StoredRotated":
        """A layer with the weights of `dense`, of width E, on its device and in its dtype."""
        bias = dense.W_Q.bias is not None
        layer = cls(E, dense.heads, dense.rope, bias=bias, eps=dense.norm_q.eps)
        layer.to(dense.W_Q.weight)
        layer.load_state_dict(dense.state_dict())
        layer.flash = flash
        return layer.requires_grad_(False)

    def forward(self, x, rows, q_table=None, k_table=None, mask=None, attend=None) -> Tensor:
        keys, values = rows
        q = self.norm_q(self.W_Q(x)).unflatten(-1, (self.heads, -1))       # [B, L, H, d_h]
        k = keys.unflatten(-1, (self.heads, -1))                           # [B, T, H, d_h]
        v = values.unflatten(-1, (self.heads, -1))
        q = rotate(q, q_table)
        if self.flash:
            return self.W_O(flash4.flash4(q, k, v, self.scale).flatten(2))
        q = q.transpose(1, 2)
        o = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2),
                                           scale=self.scale)
        return self.W_O(o.transpose(1, 2).flatten(2))


# ---- measuring -------------------------------------------------------------------------------


class Recording(NamedTuple):
    """Calls ready to be timed: on a GPU one CUDA graph, on a CPU one call after the other."""
    replay: Callable
    calls: int                             # in a replay
    warmup_s: float                        # seconds of the first calls, compilation included
    reads: list[Callable]                  # hold the tensors that a graph reads, or they are freed


class Measure:
    """Device, sizes, clock and results of one run."""

    def __init__(self, args):
        self.args = args
        self.start = time.perf_counter()
        self.gpu = torch.cuda.is_available() and not args.cpu
        self.quick = args.quick or not self.gpu
        self.device = "cuda" if self.gpu else "cpu"
        self.dtype = torch.bfloat16 if self.gpu else torch.float32
        self.config = PRESETS["wan1.3b"]
        if self.quick:
            self.config = replace(PRESETS["toy"], layers=2, frames=12, window=12)
        if args.layers:
            self.config = replace(self.config, layers=args.layers)
        self.out = provenance(torch.device(self.device))
        self.out["date"] = time.strftime("%Y-%m-%d")
        self.out["torch"] = torch.__version__
        self.out["triton"] = getattr(sys.modules.get("triton"), "__version__", None)
        self.out["dtype"] = str(self.dtype).removeprefix("torch.")
        self.out["cudnn"] = torch.backends.cudnn.version() if self.gpu else None
        self.out["flash4"] = flash4.version()
        if self.gpu:                                       # by these the cost model is chosen
            properties = torch.cuda.get_device_properties(0)
            self.out["card"] = properties.name
            self.out["sms"] = properties.multi_processor_count
        self.out["sections"] = {}

    # ---- the clock ---------------------------------------------------------------------------

    def recorded(self, calls: list[Callable]) -> Recording:
        """The calls, in turn and often enough for 4 ms."""
        start = time.perf_counter()
        for call in calls + calls[:1]:
            call()
        if not self.gpu:
            return Recording(itertools.cycle(calls).__next__, 1, 0.0, calls)
        torch.cuda.synchronize()
        once = max(self.gpu_time(calls[0]), 1e-3)
        # Too few rounds, and it shows what ran before.
        rounds = max(1, min(100, int(4 / once / len(calls))))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls * rounds:
                call()
        return Recording(graph.replay, rounds * len(calls), time.perf_counter() - start, calls)

    def gpu_time(self, work: Callable) -> float:
        """ms between two events around `work`."""
        before = torch.cuda.Event(enable_timing=True)
        after = torch.cuda.Event(enable_timing=True)
        before.record()
        work()
        after.record()
        after.synchronize()
        return before.elapsed_time(after)

    def clock(self, replay: Callable) -> float:
        """ms of one replay."""
        if self.gpu:
            return self.gpu_time(replay)
        call = replay()
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    def timed_in_turn(self, contenders: dict[str, Recording], replays: int = 11) -> dict:
        """{name: ms of one call, median and spread}.

        The contenders take turns, so that a GPU that grows hot, and slow, does so for all.
        """
        warmups = 2 if self.gpu else 0
        rounds = warmups + replays if self.gpu else 5
        times = {name: [] for name in contenders}
        for i in range(rounds):
            for name, recording in contenders.items():
                ms = self.clock(recording.replay) / recording.calls
                if i >= warmups:
                    times[name].append(ms)
        return {name: spread(times[name]) | {"warmup_s": recording.warmup_s}
                for name, recording in contenders.items()}

    def timed(self, calls: list[Callable], replays: int = 11) -> dict:
        """`timed_in_turn` for a single contender."""
        return self.timed_in_turn({"": self.recorded(calls)}, replays)[""]

    def attempt(self, work: Callable, forget: bool = False) -> dict:
        """The result of `work`, or one line saying why there is none (the budget may be spent).

        `forget`: what it compiled goes, too.
        """
        try:
            if time.perf_counter() - self.start > self.args.budget:
                raise TimeoutError(f"not run: the budget of {self.args.budget:.0f} s is spent")
            return work()
        except Exception as error:     # a contender may fail in its own way; the table says so
            lines = str(error).strip().splitlines() or [""]
            return {"failed": f"{type(error).__name__}: {lines[0][:160]}"}
        finally:
            if forget:
                torch._dynamo.reset()
                gc.collect()
            if self.gpu:
                torch.cuda.empty_cache()

    def ceilings(self) -> None:
        """What this device reaches in a large product and in a copy."""
        n = 8192 if self.gpu else 256
        a = torch.randn(n, n, device=self.device).to(self.dtype)
        b = torch.randn(n, n, device=self.device).to(self.dtype)
        product = self.timed([lambda: a @ b] * 2)["ms"]
        x = torch.empty(2**30 if self.gpu else 2**20, dtype=torch.uint8, device=self.device)
        y = torch.empty_like(x)
        moved = self.timed([lambda: y.copy_(x)])["ms"]
        tflops = 2 * n**3 / product / 1e9
        gbs = 2 * x.numel() / moved / 1e6
        self.out["ceilings"] = dict(matmul_tflops=tflops, copy_gbs=gbs)
        print(f"{self.out['device']}, torch {self.out['torch']}, triton {self.out['triton']}; "
              f"ceilings: {n}^3 product {tflops:.1f} TFLOP/s, copy {gbs:.0f} GB/s", flush=True)

    # ---- what is measured --------------------------------------------------------------------

    def sizes(self) -> dict[str, int]:
        return attention_sizes(self.config)

    def model(self, kind: str, layers: int | None = None) -> VideoDiT:
        """A model of the run's sizes without a gate of zero: nothing is skipped or trivial. `kind`
        is an attention, of Config or of HomogeneousConfig (then `latent` is C + 1)."""
        torch.manual_seed(0)
        sizes = {**asdict(self.config), "attention": kind, "layers": layers or self.config.layers}
        with torch.device(self.device):
            model = model_of(config_of(sizes)).to(self.dtype).eval().requires_grad_(False)
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
        return model

    def window(self, model: VideoDiT, videos: int = 1) -> FullWindow:
        """A full window of noise with `seen` beyond it, as a long rollout would have."""
        with torch.device("meta"):
            empty = model.make_cache(videos, self.dtype, "meta")
        empty.seen = empty.capacity
        window = FullWindow(empty)                                 # takes no memory yet
        for layer in window.layers:
            layer.buffers = tuple(self.noise_like(buffer) for buffer in layer.buffers)
        window.seen = torch.tensor(10 * empty.capacity + empty.sink, device=self.device)
        return window

    def noise_like(self, x: Tensor) -> Tensor:
        return torch.empty(x.shape, device=self.device, dtype=self.dtype).normal_()

    def caption(self, videos: int = 1) -> Tensor:
        """Ids of words, or rows of a text encoder: what the model takes."""
        c = self.config
        if c.text:
            return self.noise_like(torch.empty(videos, c.slots, c.text, device="meta"))
        return torch.randint(1, 20, (videos, c.slots), device=self.device)

    # ---- output ------------------------------------------------------------------------------

    def table(self, title: str, head: list, rows: list[list]) -> None:
        """Print a table, its first column to the left and all others to the right."""
        cells = [[str(x) for x in row] for row in [head, *rows]]
        widths = [max(len(text) for text in column) for column in zip(*cells)]
        lines = []
        for row in cells:
            padded = [row[0].ljust(widths[0])]
            padded += [text.rjust(width) for text, width in zip(row[1:], widths[1:])]
            lines.append(" | ".join(padded))
        rule = "-" * (sum(widths) + 3 * len(widths))
        if self.args.markdown:
            title = f"### {title}\n"
            lines = [f"| {line} |" for line in lines]
            rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
        print(f"\n{title}\n{lines[0]}\n{rule}")
        for line in lines[1:]:
            print(line)
        sys.stdout.flush()

    def go_on(self) -> None:
        """Keep the sections of an earlier call, if what it measured can stand beside this."""
        path = Path(self.args.json or "")
        if not path.is_file():
            raise SystemExit("--add needs --json with a file that is there")
        before = json.loads(path.read_text())
        for name in ("commit", "code", "card", "device", "torch", "flash4"):
            if before.get(name) != self.out.get(name):
                raise SystemExit(f"--add: {path} is of another {name} ({before.get(name)}, here "
                                 f"{self.out.get(name)}); measure all of it again")
        self.out["sections"] = before["sections"]
        self.out["command"] = f"{before['command']}; {self.out['command']}"

    def save(self) -> None:
        """Write what there is so far."""
        if self.args.json:
            path = Path(self.args.json)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.out, indent=1) + "\n")


def spread(times: list[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    ordered = sorted(times)
    tenth = len(ordered) // 10
    return dict(ms=statistics.median(times), low=ordered[tenth], high=ordered[-1 - tenth])
