"""Sections of experiments/bench.py about the fused route's parts, and the targets they serve.

`up`: the up-projection alone, by each way that engine/routes.py knows, beside its floors.
`short`: few query tokens; what each kernel takes, and how the work could be cut otherwise.
`lifetime`: the memory of a process that makes many rollouts.
`targets`: what was to be reached, what was measured, and whether it was met.
"""

import functools
import gc
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import fused
from engine import expand, flash4, routes
from engine.streaming import FastStream
from experiments.measure import RELEASED, Measure, cell
from flow import euler

# Ways to cut the up-projection's kernel. The first is what is shipped for Hopper.
EXPAND_TILES = [expand.ExpandTile(64, 64, 4, 3, 2), expand.ExpandTile(64, 64, 4, 2, 3),
                expand.ExpandTile(64, 64, 8, 3, 2), expand.ExpandTile(128, 64, 4, 2, 2),
                expand.ExpandTile(128, 64, 8, 2, 2), expand.ExpandTile(64, 128, 8, 2, 2),
                expand.ExpandTile(64, 32, 4, 3, 3), expand.ExpandTile(128, 128, 8, 2, 1)]
# Ways to cut attention for few query tokens, likewise.
ATTEND_TILES = [fused.Tile(64, 64, 4, 3, 2, True), fused.Tile(64, 64, 4, 2, 2, True),
                fused.Tile(64, 128, 4, 2, 1, True), fused.Tile(64, 128, 8, 2, 1, True),
                fused.Tile(128, 64, 8, 3, 1, True), fused.Tile(128, 128, 8, 2, 1, True)]
SHORT = 16, 32, 64, 256                # query tokens
PARTS = {"_prepare_kernel": "prepare", "_attend_kernel": "attend", "_merge_kernel": "merge"}
SHOWN = "", "W_UV by a kernel", "prepare", "attend", "merge", "W_UV"
MIB = 2**20


def by_way(name: str, call: Callable, choice: str = "UP") -> Callable:
    """`call` with this way to make K and V, or another `choice` of engine/routes.py."""
    def changed(*args, **options):
        before = getattr(routes, choice)
        setattr(routes, choice, name)
        try:
            return call(*args, **options)
        finally:
            setattr(routes, choice, before)
    return changed


class FastPath(Measure):
    """The sections. `attention_inputs` and `checked_error` are Bench's."""

    # ---- up-projection -----------------------------------------------------------------------

    def up(self) -> dict:
        """K and V from the latents, alone: few query tokens, so that q costs nothing."""
        T = 192 if self.quick else 32760
        sets = [self.attention_inputs(16, T, seed)[:8] for seed in range(3)]
        # Two tokens in every hundred are checked.
        some = torch.arange(0, T, 50, device=self.device)
        q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, q_table, (cos, sin) = sets[0]
        exact = [q_nope, q_rope, c_kv[:, some], k_rope[:, some], W_UK, W_UV]
        exact = [x.double() for x in exact]
        k_table = cos[some].double(), sin[some].double()
        _, *want = routes.expand_heads(*exact, q_table, k_table)

        def run(call: Callable) -> dict:
            _, *got = call(*sets[0])
            errors = []
            for x, y in zip(got, want):
                errors.append(self.checked_error(x[:, :, some], y))
            calls = [lambda args=args: call(*args) for args in sets]
            return {"error": max(errors), "recorded": self.recorded(calls)}

        timing = {}
        for name, call in self.ways().items():
            timing[name] = self.attempt(lambda: run(call))
        recorded = {name: row.pop("recorded") for name, row in timing.items() if "error" in row}
        for name, clock in self.timed_in_turn(recorded).items():
            timing[name] |= clock
        result = self.up_floors(T) | {"T": T, "taken": routes.UP, "timing": timing}
        lines = []
        for name, row in timing.items():
            lines.append([name, cell(row), f"{row.get('error', 0):.1e}"])
        for name in ("product_ms", "bytes_ms"):
            lines.append([f"floor: {name}", f"{result[name]:.4f}", ""])
        self.table(f"up-projection alone, T = {T} (taken: {routes.UP})",
                   ["way", "ms", "error"], lines)
        return result

    def ways(self) -> dict[str, Callable]:
        """{name: function of expand_heads' arguments}: the ways, and other cuts of the kernel."""
        found = {}
        for name, way in routes.UPS.items():
            if name != "kernel" or self.gpu:
                found[name] = routes._compiled(way) if self.gpu else way
        if not self.gpu:
            return found

        def cut(tile, q_nope, q_rope, c_kv, k_rope, W_UK, W_UV, q_table, k_table):
            k, v = expand._launch(c_kv, k_rope, W_UK, W_UV, *k_table, tile=tile)
            return None, k.transpose(1, 2), v.transpose(1, 2)

        for tile in EXPAND_TILES:
            name = f"kernel, {tuple(tile)[:4]} tokens, columns, warps, stages"
            found[name] = functools.partial(cut, tile)
        return found

    def up_floors(self, T: int) -> dict:
        """What the product and the bytes alone take at the run's own ceilings."""
        s = self.sizes()
        operations = 2 * T * s["H"] * s["C"] * (s["N"] + s["V"])
        size = T * s["H"] * (s["N"] + s["R"] + s["V"]) * self.dtype.itemsize
        ceilings = self.out["ceilings"]
        return dict(gflop=operations / 1e9, megabytes=size / 1e6,
                    product_ms=operations / ceilings["matmul_tflops"] / 1e9,
                    bytes_ms=size / ceilings["copy_gbs"] / 1e6)

    # ---- few query tokens --------------------------------------------------------------------

    def short(self) -> dict:
        """What bounds few query tokens: the time of each kernel, and of other cuts."""
        if not self.gpu:
            return {"note": "the kernels need a GPU"}
        points = {}
        for L in SHORT:
            points[str(L)] = self.attempt(lambda: self.short_point(L, 32760))
        lines = []
        for L, point in points.items():
            if "failed" in point:
                print(f"L={L}: {point['failed']}")
                continue
            times = {"": point["ms"], **point["parts"]}
            times["W_UV by a kernel"] = point["finishes"]["kernel"]["ms"]
            shown = [f"{1000 * times.get(name, 0):.1f}" for name in SHOWN]
            share = f"{point['percent_of_ceiling']:.0f}"
            lines.append([L, *shown, share, point["best_cut"]])
        self.table("few query tokens, T = 32760, microseconds (parts overlap)",
                   ["L", "in all", "with W_UV by a kernel", *SHOWN[2:], "attend, % of ceiling",
                    "best cut (queries, keys, warps, stages)"], lines)
        return points

    def short_point(self, L: int, T: int) -> dict:
        sets = [self.attention_inputs(L, T, seed) for seed in range(3)]

        def whole(args):
            return routes.attend_fused(*args, cut=0)

        recorded = {}
        for finish in routes.FINISHES:
            call = by_way(finish, whole, "FINISH")
            recorded[finish] = self.recorded([functools.partial(call, args) for args in sets])
        finishes = self.timed_in_turn(recorded)
        row = finishes[routes.FINISH] | {"finishes": finishes}
        row["parts"] = self.parts(lambda: [whole(args) for args in sets], 3)
        s = self.sizes()
        useful = 2 * L * T * s["H"] * (2 * s["C"] + s["R"])
        ceiling = self.out["ceilings"]["matmul_tflops"]
        row["percent_of_ceiling"] = useful / row["parts"]["attend"] / 1e7 / ceiling
        row["cuts"] = {}
        for tile in ATTEND_TILES:
            calls = [functools.partial(self.by_tile, args, tile) for args in sets]
            row["cuts"][str(tuple(tile)[:4])] = self.attempt(lambda: self.timed(calls))
        timed = {name: cut["ms"] for name, cut in row["cuts"].items() if "ms" in cut}
        row["best_cut"] = min(timed, key=timed.get, default="-")
        return row

    def by_tile(self, args: tuple, tile: fused.Tile) -> Tensor:
        """The three kernels without W_UV, cut by `tile`."""
        *tensors, _, q_table, k_table, scale = args
        return fused._launch(*tensors, *q_table, *k_table, scale, tile=tile)

    def parts(self, work: Callable, calls: int) -> dict[str, float]:
        """ms of each kernel in one call, by torch's profiler. What is none of ours is W_UV."""
        work()
        activity = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activity) as profiler:
            for _ in range(10):
                work()
            torch.cuda.synchronize()
        found = {}
        for event in profiler.key_averages():
            part = PARTS.get(event.key, "W_UV")
            ms = event.self_device_time_total / 1e3 / (10 * calls)
            found[part] = found.get(part, 0) + ms
        return found

    # ---- a long-lived process ----------------------------------------------------------------

    def lifetime(self) -> dict:
        """Compiled rollouts one after the other, and what stays allocated after each.

        Python's cycle collector is off: reference counting alone must give everything back.
        """
        rollouts = 100 if self.gpu else 3
        model = self.model("mla", layers=2)
        backend = "inductor" if self.gpu else "aot_eager"
        left = []
        used = []
        gc.collect()
        gc.disable()
        try:
            for seed in range(rollouts):
                self.short_rollout(model, backend, seed)
                left.append(torch.cuda.memory_allocated() if self.gpu else 0)
                free, total = torch.cuda.mem_get_info() if self.gpu else (0, 0)
                used.append(total - free)
        finally:
            gc.enable()
        settled = min(10, rollouts) - 1
        growth = left[-1] - left[settled]
        lines = []
        for name, sizes in (("MiB allocated", left), ("MiB in use on the card", used)):
            shown = [sizes[0], sizes[settled], sizes[-1]]
            lines.append([name, *(f"{size / MIB:.1f}" for size in shown)])
        self.table(f"{rollouts} compiled rollouts in one process, without gc.collect()",
                   ["", "after the 1st", f"after {settled + 1}", "after the last"], lines)
        return dict(rollouts=rollouts, bytes_left=left, bytes_used=used, level=growth <= 0,
                    mib_growth=growth / MIB)

    def short_rollout(self, model, backend: str, seed: int) -> None:
        """Two chunks over a full window of its own, in one step each."""
        fast = FastStream(model, self.caption(), self.window(model), routes.attend_auto, backend)
        generator = torch.Generator(self.device).manual_seed(seed)
        shape = fast.chunk_like().shape

        def noise() -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)

        for _ in range(2):
            fast.commit(euler(fast.velocity, noise, 1))

    # ---- targets -----------------------------------------------------------------------------

    def targets(self) -> dict:
        """Each target beside what this run measured."""
        rows = judge(self.out["sections"])
        lines = []
        for row in rows:
            measured = row["measured"]
            shown = "-" if measured is None else f"{measured:.3f}"
            lines.append([row["target"], f"{row['sense']} {row['limit']:g}", shown, row["verdict"]])
        self.table("targets", ["what", "is to be", "measured", ""], lines)
        return {"rows": rows}


# ---- dense by FlashAttention-4 ---------------------------------------------------------------


def by_flash4(qkv: list[Tensor], scale: float, queries=slice(None)) -> Tensor:
    """FA4 for q, k, v in the layout [B, H, ., channels] -> [B, L, H, V]."""
    q, k, v = (x.transpose(1, 2) for x in qkv)
    return flash4.flash4(q[:, queries], k, v, scale)


def by_sdpa(backend: SDPBackend, qkv: list[Tensor], scale: float, queries=slice(None)) -> Tensor:
    q, k, v = qkv
    with sdpa_kernel([backend]):
        o = F.scaled_dot_product_attention(q[:, :, queries], k, v, scale=scale)
    return o.transpose(1, 2)


# ---- what was to be reached ------------------------------------------------------------------


class Target(NamedTuple):
    what: str
    sense: str                             # "at most" or "at least"
    limit: float
    measured: Callable[[dict], float]      # of the sections; KeyError: not in this run


def point_of(sections: dict, L: int, T: int = 32760) -> dict[str, float]:
    """{contender: ms} of one size of the section `attention`."""
    for point in sections["attention"]["points"]:
        if (point["L"], point["T"]) == (L, T):
            return {name: row["ms"] for name, row in point["timing"].items() if "ms" in row}
    raise KeyError(L)


def over_flash4(L: int) -> Callable:
    def measured(sections):
        times = point_of(sections, L)
        return times["fused"] / times["dense FA4, K V ready"]
    return measured


def best_dense_over(L: int) -> Callable:
    def measured(sections):
        times = point_of(sections, L)
        return fastest_dense(times) / times["fused"]
    return measured


def fastest_dense(times: dict[str, float]) -> float:
    return min(time for name, time in times.items() if name.startswith("dense"))


def up_taken(sections: dict) -> float:
    up = sections["up"]
    return up["timing"][up["taken"]]["ms"]


def block_times(sections: dict) -> dict[str, float]:
    return {name: row["ms"] for name, row in sections["block"].items() if "ms" in row}


def block_over_dense(sections: dict) -> float:
    times = block_times(sections)
    return times["MLA auto, compiled"] / fastest_dense(times)


def released_over_block(how: str) -> Callable:
    return lambda sections: RELEASED[how] / block_times(sections)["MLA auto, compiled"]


def frames_over_dense(sections: dict) -> float:
    rows = sections["rollout"]
    dense = []
    for name, row in rows.items():
        if name.startswith("dense") and not name.endswith("10 frames"):
            dense.append(row.get("frames_per_s", 0))
    return rows["mla"]["frames_per_s"] / max(dense)


def worst(name: str) -> Callable:
    """The largest `auto_over_best`, or error of a latent contender, over all points."""
    def measured(sections):
        found = []
        for point in sections["attention"]["points"]:
            if name == "auto_over_best":
                found.append(point.get(name) or 0)
            for row in point.get("timing", {}).values():
                found.append(row.get(name) or 0)
        return max(found)
    return measured


def interruptions(sections: dict) -> float:
    """Recompilations and breaks of the rollout (a synchronisation would have raised)."""
    row = sections["rollout"]["mla"]
    return row["recompiles"] + row["graph_breaks"]


def chunks_watched(sections: dict) -> float:
    row = sections["rollout"]["mla"]
    return row["chunks"] + row["chunks_of_2_passes"]


TARGETS = []
for L, limit in ((4680, 1.06), (2340, 1.20), (1024, 1.35)):
    name = f"attention, L = {L}: MLA's time over dense FA4's"
    TARGETS.append(Target(name, "at most", limit, over_flash4(L)))
for L, limit in ((16, 2.5), (32, 2.0), (64, 1.7), (256, 1.15)):
    name = f"attention, L = {L}: the best dense row's time over MLA's"
    TARGETS.append(Target(name, "at least", limit, best_dense_over(L)))
TARGETS += [
    Target("up-projection, ms", "at most", 0.11, up_taken),
    Target("block: MLA's time over the fastest dense block's", "at most", 0.98, block_over_dense),
    Target("block: Self-Forcing's released, eager, over MLA's", "at least", 1.40,
           released_over_block("eager")),
    Target("block: Self-Forcing's released, compiled, over MLA's", "at least", 1.15,
           released_over_block("compiled, with graph breaks")),
    Target("whole model: MLA's frames/s over the fastest dense's", "at least", 1.03,
           frames_over_dense),
    Target("auto's time over the best route's, worst point", "at most", 1.05,
           worst("auto_over_best")),
    Target("error over dense's, worst point", "at most", 2.0, worst("error_ratio")),
    Target("recompilations and graph breaks", "at most", 0, interruptions),
    Target("chunks watched for them, and for synchronisations", "at least", 200, chunks_watched),
    Target("MiB more after the last of 100 rollouts than after the tenth", "at most", 0,
           lambda sections: sections["lifetime"]["mib_growth"]),
]


def judge(sections: dict) -> list[dict]:
    """Every target: what was measured (None: not in this run) and "met", "missed" or so."""
    rows = []
    for what, sense, limit, measured in TARGETS:
        try:
            value = measured(sections)
        except (KeyError, ValueError):             # a section, or a row of it, is not there
            value = None
        if value is None:
            verdict = "not measured"
        else:
            met = value <= limit if sense == "at most" else value >= limit
            verdict = "met" if met else "missed"
        rows.append(dict(target=what, sense=sense, limit=limit, measured=value, verdict=verdict))
    return rows
