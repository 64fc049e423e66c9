"""Wan's real size on one GPU, with random weights: how fast it streams, what the width C of the
content latent costs in time and in memory, and which inference the paper can have timed.

    python -m experiments.wan_speed --json results/wan_speed.json
    python -m experiments.wan_speed --only latent --json results/wan_speed.json
    python -m experiments.wan_speed --quick                toy sizes, on a CPU, in seconds

Sections. `model`: the whole model, 30 layers, by FastStream over a full window, compiled, as
`sample.py` runs it. `latent`: *one* block, eager, as a CUDA graph, over C, windows and routes;
frames/s are those of so many blocks as the model has, without embedding and head, and no form is
timed whose attention was not checked against float64 in that run. `batch`: bytes
a video, and the largest batch. The JSON is written after every row, and a run goes on from the
rows that are there.

A latent frame is 4 frames of video; a chunk is 3 latent frames, made in 4 passes and committed in
a fifth. It stands beside bench.py and not in it: bench.py has one geometry and measures anew.

What was timed? The paper says both that inference rebuilds keys and values (its D.4) and that it
never forms them (its Appendix E, with merged matrices), and reports frames/s of one H100 for four
widths (its table 5a). What a clock counts besides attention (VAE, text, launches) does not depend
on C, so *differences* of time a frame can be compared, whatever else was on that clock.
The rule, written before any run, and after counting operations:

    grows   ms a frame of video at the widest C less that at the narrowest, 10th to 90th percentile
    range   of the paper's four figures, in ms a frame: 0.29
    can     have been timed: at one of the windows it grows by at most 3 ranges
    cannot  at every window it grows by more than 10 ranges
    cannot be told: anything else, or no time for one of the two widths

Three ranges are within the noise of four figures, one of which falls where none can; ten are not.
tests/test_wan_speed.py: the merged form is the reference's in float64, and the rule can fail.
"""

import argparse
import contextlib
import copy
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

if not __package__:                    # started by its path
    sys.path.insert(0, str(Path(__file__).parent.parent))

from attention import MLA, Route, attend_absorbed, attend_reference, sdpa
from cache import Rows
from engine.command_line import UserError, run
from engine.routes import ROUTES
from experiments.bench import PASSES, Bench
from experiments.measure import RELEASED, attention_sizes
from mla_video import Config, VideoDiT
from rope3d import Table, grid_coords, rotate

VIDEO_FRAMES = 4                       # of video for a latent frame, by Wan's VAE
WIDTHS = (64, 128, 192, 256, 512)      # C
# Frames that a chunk sees, its own among them: a training clip; one sink frame and 6 before the
# chunk; one and 3, if the paper's 6 include the chunk. It does not say which.
WINDOWS = (21, 10, 7)
# The same shape twice: "mla" as the paper's layer is, "homogeneous" as released weights become it,
# with norms and biases (engine/homogeneous.py), in rows as wide.
KINDS = ("dense", "mla", "homogeneous")
FORMS = ("materialised", "absorbed", "fused", "merged")

# The paper's figure 7, one B200: GB a video, and videos that fit over those of dense attention.
PAPER_BATCH = {"dense": ("6.26", "1.0"), "C = 64": ("0.57", "11.4 or more"),
               "C = 192": ("", "8.0"), "C = 512": ("1.43", "4.6")}
# The paper's table 5a, frames/s by C, one H100 80GB.
PAPER = {64: 26.93, 128: 27.00, 256: 26.93, 512: 26.79}
RANGE = 1000 / min(PAPER.values()) - 1000 / max(PAPER.values())    # ms a frame
CAN = 3 * RANGE
CANNOT = 10 * RANGE


# ---- Appendix E ------------------------------------------------------------------------------

class Merged(nn.Module):
    """MLA by merged matrices, as the paper's Appendix E has it. Interface and answer of `MLA`.

    A_h = W_UK^h' W_UQ^h takes the query latent to the content latent, and B_h = W_O^h W_UV^h
    takes the mean latent to the output: no query, key or value of a head is made. The rope part
    stays apart. exercises/ex3_merged.py has the derivation of A. There is one way to compute
    it, so `attend` is not asked.
    """

    def __init__(self, mla: MLA):
        super().__init__()
        H = mla.heads
        self.heads = H
        self.rope = mla.rope
        self.scale = mla.scale
        self.widths = mla.widths
        self.W_DKV = mla.W_DKV
        self.W_KR = mla.W_KR
        self.W_DQ = mla.W_DQ
        self.W_QR = mla.W_QR
        self.norm_kv = mla.norm_kv
        self.norm_q = mla.norm_q
        W_UQ = mla.W_UQ.weight.double().unflatten(0, (H, -1))              # [H, N, Q]
        W_UK = mla.W_UK.weight.double().unflatten(0, (H, -1))              # [H, N, C]
        W_UV = mla.W_UV.weight.double().unflatten(0, (H, -1))              # [H, V, C]
        W_O = mla.W_O.weight.double().unflatten(1, (H, -1))                # [E, H, V]
        A = einsum(W_UK, W_UQ, "h n c, h n q -> h c q")
        B = einsum(W_O, W_UV, "e h v, h v c -> e h c")
        self.A = nn.Parameter(A.flatten(0, 1).to(mla.W_O.weight))          # [H * C, Q]
        self.B = nn.Parameter(B.flatten(1).to(mla.W_O.weight))             # [E, H * C]

    def rows(self, x: Tensor) -> Rows:
        """As MLA's."""
        return self.norm_kv(self.W_DKV(x)), self.W_KR(x)

    def forward(self, x: Tensor, rows: Rows, q_table: Table, k_table: Table,
                mask: Tensor | None = None, attend: Route | None = None) -> Tensor:
        """x [B, L, E] attends to `rows` of T tokens: [B, L, E]."""
        c_kv, k_rope = rows
        q = self.norm_q(self.W_DQ(x))                                      # [B, L, Q]
        q_latent = F.linear(q, self.A).unflatten(-1, (self.heads, -1))     # [B, L, H, C]
        q_rope = self.W_QR(q).unflatten(-1, (self.heads, -1))              # [B, L, H, R]
        q = torch.cat((q_latent, rotate(q_rope, q_table)), dim=-1)         # [B, L, H, C + R]
        q = rearrange(q, "b l h d -> b 1 (l h) d")
        k = torch.cat((c_kv, rotate(k_rope, k_table)), dim=-1)             # [B, T, C + R]
        if mask is not None:
            mask = mask.repeat_interleave(self.heads, dim=0)
        latent = sdpa(q, k[:, None], c_kv[:, None], mask, self.scale)      # [B, 1, L H, C]
        latent = rearrange(latent, "b 1 (l h) c -> b l (h c)", h=self.heads)
        return F.linear(latent, self.B)


# ---- what was timed? -------------------------------------------------------------------------

def growth(row: dict, chunk_frames: int, layers: int) -> tuple[float, float] | None:
    """By how many ms a frame of video the narrowest C is quicker than the widest, at least and
    at most; None if one of the two has no time. `row` is {C: times of a block's chunk}."""
    widths = sorted(row, key=int)
    narrow = row[widths[0]]
    wide = row[widths[-1]]
    if "ms" not in narrow or "ms" not in wide or len(widths) < 2:
        return None
    blocks = layers / chunk_frames
    return blocks * (wide["low"] - narrow["high"]), blocks * (wide["high"] - narrow["low"])


def could_be(growths: list[tuple[float, float] | None]) -> str:
    """ "can", "cannot" or "cannot be told" of a form, from its growth at each window."""
    known = [pair for pair in growths if pair is not None]
    if any(high <= CAN for _, high in known):
        return "can"
    if growths and len(known) == len(growths) and all(low > CANNOT for low, _ in known):
        return "cannot"
    return "cannot be told"


VERDICTS = {
    ("can", "cannot"): "D.4, which rebuilds keys and values, can have been timed; Appendix E, "
                       "which never forms them, cannot",
    ("cannot", "can"): "Appendix E, which never forms keys and values, can have been timed; "
                       "D.4, which rebuilds them, cannot",
    ("can", "can"): "either can have been timed",
    ("cannot", "cannot"): "neither can have been timed, as they run here",
}


def growing_operations(form: str, L: int, T: int, C: int, config: Config) -> int:
    """Operations of one pass through a block that depend on C, multiply-adds times two: of the
    down-projection, and of what the form does with latents ((11) and (12) of attention.py)."""
    E = config.dim
    s = attention_sizes(config)
    H = s["H"]
    down = 2 * L * E * C
    if form == "merged":
        return down + 4 * L * T * H * C + 2 * L * H * C * (config.query_latent + E)
    if form == "absorbed":
        return down + 4 * L * T * H * C + 2 * L * H * C * (s["N"] + s["V"])
    return down + 2 * T * H * C * (s["N"] + s["V"])


def verdict(section: dict) -> dict:
    """What the section `latent` says of both descriptions."""
    found = {}
    for name, form in {"D.4": "materialised", "E": "merged"}.items():
        growths = []
        for row in section["rows"].values():
            if row["form"] == form:
                growths.append(growth(row["by C"], section["video frames"], section["layers"]))
        found[name] = could_be(growths)
        found[f"{name} grows"] = growths
    pair = found["D.4"], found["E"]
    found["verdict"] = VERDICTS.get(pair, f"cannot be told: D.4 {pair[0]}, Appendix E {pair[1]}")
    return found


# ---- measuring -------------------------------------------------------------------------------

class WanSpeed(Bench):
    """The three sections. A row is measured once: what the JSON has is not measured again."""

    def __init__(self, args):
        super().__init__(args)
        self.widths = WIDTHS
        self.windows = WINDOWS
        if self.quick:
            self.widths = tuple(width // 8 for width in WIDTHS)
            self.windows = (12, 10, 7)
            self.config = replace(self.config, sink=1)
        self.layers = self.config.layers
        if args.json and Path(args.json).exists():
            self.go_on_from(Path(args.json))

    def go_on_from(self, path: Path) -> None:
        """Take the rows of an earlier run; UserError if it was another program or machine."""
        found = json.loads(path.read_text())
        for name in ("commit", "device", "versions", "sizes"):
            mine = self.sizes_in_words() if name == "sizes" else self.out[name]
            if found.get(name) != mine:
                raise UserError(f"{path} was measured with {name} {found.get(name)}, and this is "
                                f"{mine}: name another file, or delete it")
        self.out["sections"] = found["sections"]
        if found["command"] != self.out["command"]:
            self.out["command"] = f"{found['command']} && {self.out['command']}"

    def sizes_in_words(self) -> str:
        c = self.config
        return f"{c.dim} wide, {self.layers} layers, {c.tokens} tokens a frame, {self.dtype}"

    def row(self, section: str, name: str, measure: Callable[[], dict], **facts) -> None:
        """Measure a row unless it is there, print it, write it down."""
        rows = self.out["sections"].setdefault(section, {}).setdefault("rows", {})
        if name not in rows:
            self.reset_peak()
            rows[name] = facts | self.attempt(measure, forget=True)
            self.save()
        print(f"  {section}: {name}: {in_words(rows[name])}", flush=True)

    @contextlib.contextmanager
    def sized(self, **sizes) -> Iterator[None]:
        """Within it models have these sizes."""
        whole = self.config
        self.config = replace(whole, **sizes)
        try:
            yield
        finally:
            self.config = whole

    def reset_peak(self) -> None:
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int | None:
        """The most bytes that tensors took since `reset_peak`; a CPU does not say."""
        return torch.cuda.max_memory_allocated() if self.gpu else None

    # ---- model -------------------------------------------------------------------------------

    def model_section(self) -> None:
        """Headline: whole models, streamed; and a block of each, compiled where it is a GPU."""
        for window in self.windows[:2]:
            for kind in KINDS:
                with self.sized(window=window):
                    self.row("model", f"{kind}, {window} frames",
                             lambda: self.streamed(kind), kind=kind, window=window)
        for kind in KINDS:
            for compiled in (False, True):
                if compiled and not self.gpu:
                    continue
                name = f"block, {kind}, {'compiled' if compiled else 'eager'}"
                self.row("model", name,
                         lambda: self.block_contender(kind, ROUTES["auto"], compiled, None),
                         kind=kind, window=self.config.window)

    def streamed(self, kind: str) -> dict:
        model = self.model(kind)
        window = self.window(model)
        cache = window.nbytes
        weights = sum(p.nbytes for p in model.parameters())
        self.reset_peak()                                  # to build a model takes more than to run it
        backend = "inductor" if self.gpu else "aot_eager"
        found = self.stream(model, window, 10 if self.gpu else 3, backend)
        found["video_frames_per_s"] = VIDEO_FRAMES * found["frames_per_s"]
        return found | dict(weights_bytes=weights, cache_bytes=cache, peak_bytes=self.peak())

    # ---- latent ------------------------------------------------------------------------------

    def latent_section(self) -> None:
        """One block over C, for each window and form, all C in turn."""
        section = self.out["sections"].setdefault("latent", {})
        section |= {"layers": self.layers, "video frames": VIDEO_FRAMES * self.config.chunk,
                    "measured": f"one eager block, {PASSES} passes, times the layers"}
        for window in self.windows:
            for form in FORMS:
                with self.sized(window=window):
                    self.row("latent", f"{form}, {window} frames",
                             lambda: {"by C": self.by_width(form)}, form=form, window=window,
                             growth_by_operations=self.growth_by_operations(form))
        section["judged"] = verdict(section)
        if self.quick:
            section["judged"]["verdict"] = "cannot be told: these are not Wan's sizes"
        print(section["judged"]["verdict"])
        self.save()

    def by_width(self, form: str) -> dict[str, dict]:
        """{C: ms of a chunk's passes through a block, and frames of video a second}."""
        recorded = {}
        found = {}
        for C in self.widths:
            with self.sized(latent=C):
                row = self.attempt(lambda: self.recorded_block(form))
            if "failed" in row:
                found[str(C)] = row
            else:
                recorded[str(C)] = row.pop("recorded")
                found[str(C)] = row
        frames = VIDEO_FRAMES * self.config.chunk
        for C, times in self.timed_in_turn(recorded, replays=9).items():
            seconds = self.layers * times["ms"] / 1e3
            found[C] |= times | {"video_frames_per_s": frames / seconds}
        return {C: found[C] for C in sorted(found, key=int)}

    def growth_by_operations(self, form: str) -> float:
        """By how many ms a frame of video the form grows from the narrowest C to the widest if
        time is operations, all as fast as in this card's largest product. (It can grow by less:
        where C is narrow, making keys waits for memory and not for operations.)"""
        c = self.config
        L = c.chunk * c.tokens
        T = c.window * c.tokens
        ends = []
        for C in (self.widths[0], self.widths[-1]):
            ends.append(growing_operations(form, L, T, C, c))
        passes = PASSES * self.layers / (VIDEO_FRAMES * c.chunk)
        teraflops = self.out["ceilings"]["matmul_tflops"]
        return passes * (ends[1] - ends[0]) / teraflops / 1e9

    def recorded_block(self, form: str) -> dict:
        """The passes of a chunk through one block, by this form, ready to be timed, and the error
        of its attention."""
        model = self.model("mla", layers=1)
        attend = ROUTES.get(form, attend_absorbed)
        block = model.blocks[0]
        exact = copy.deepcopy(block.attention).double()
        if form == "merged":
            block.attention = Merged(block.attention).requires_grad_(False)
        error = self.error_of(block.attention, attend, exact)
        chunk = self.block_chunk(model, attend, compiled=False)
        return dict(error=error, recorded=self.recorded([chunk]))

    def error_of(self, layer: MLA | Merged, attend: Route, exact: MLA) -> float:
        """Relative error of a layer's output against the reference in float64, for the last
        tokens of a frame or two; ValueError if it is more than rounding. No time without it."""
        c = self.config
        frames = torch.arange(2, device=self.device)
        coords = grid_coords(frames, c.height // c.patch, c.width // c.patch)[-2048:]
        cos, sin = layer.rope.table(coords)
        queries = min(512, len(coords))
        x = self.noise_like(torch.empty(1, len(coords), c.dim, device="meta"))
        end = x[:, -queries:]
        last = cos[-queries:], sin[-queries:]
        got = layer(end, layer.rows(x), last, (cos, sin), None, attend)
        want = exact(end.double(), exact.rows(x.double()), last, (cos, sin), None, attend_reference)
        return self.checked_error(got, want)

    # ---- batch -------------------------------------------------------------------------------

    def batch_section(self) -> None:
        """Figure 7: GB a video with a window of a whole clip, and how many videos fit."""
        self.row("batch", "dense", lambda: self.videos("dense", (1, 3)), kind="dense")
        for C in self.widths:
            with self.sized(latent=C):
                self.row("batch", f"C = {C}", lambda: self.videos("mla", (2, 8)), kind="mla", C=C)

    def videos(self, kind: str, batches: tuple[int, int]) -> dict:
        """The slope of allocated memory between two batches, and the largest batch that fits.

        A pass of all videos at once through two layers, where the peak is that of all, while
        every layer's cache is there (`Bench.largest`).
        """
        model = self.model(kind)
        peaks = []
        for videos in batches:
            self.reset_peak()
            if not self.fits(model, videos, 2, None):
                raise MemoryError(f"{videos} videos do not fit")
            peaks.append(self.peak() or self.window(model, videos).nbytes)
        few, many = batches
        slope = (peaks[1] - peaks[0]) / (many - few)
        found = dict(batches=batches, peaks=peaks, bytes_a_video=slope,
                     cache_bytes_a_video=self.window(model).nbytes)
        if not self.gpu:
            return found | dict(note="CPU: bytes of the cache, and no limit sought")
        room = torch.cuda.mem_get_info()[1]
        predicted = many + int((room - peaks[1]) / slope)
        return found | dict(predicted=predicted) | self.near(model, predicted)

    def near(self, model: VideoDiT, predicted: int) -> dict:
        """The largest batch found that fits, and the least that does not, from `predicted` on
        in steps of 2 %."""
        step = max(1, predicted // 50)
        tried = {}
        videos = predicted
        while len(tried) < 12 and videos > 0:
            tried[videos] = self.fits(model, videos, 2, None)
            if len(set(tried.values())) == 2:
                break
            videos += step if tried[videos] else -step
        fits = [n for n, good in tried.items() if good]
        fails = [n for n, good in tried.items() if not good]
        return dict(videos=max(fits, default=None), too_many=min(fails, default=None))


# ---- in words --------------------------------------------------------------------------------

def in_words(row: dict) -> str:
    """A row for people."""
    if "failed" in row:
        return row["failed"]
    if "by C" in row:
        return ", ".join(f"C = {C}: {rate(times)}" for C, times in row["by C"].items())
    names = ("ms", "video_frames_per_s", "peak_bytes", "bytes_a_video", "videos", "too_many")
    return ", ".join(f"{name} {row[name]:,.4g}" for name in names if row.get(name) is not None)


def rate(times: dict) -> str:
    """Frames of video a second, if there are any."""
    if "failed" in times:
        return "-"
    return f"{times['video_frames_per_s']:.2f}"


def gigabytes(count: float | None) -> str:
    return "" if count is None else f"{count / 1e9:.2f}"


def model_rows(rows: dict) -> list[list]:
    """Of whole models."""
    lines = []
    for name, row in rows.items():
        if name.startswith("block"):
            continue
        if "failed" in row:
            lines.append([name, row["failed"], "", "", "", "", ""])
            continue
        lines.append([name, f"{row['frames_per_s']:.2f}", f"{row['video_frames_per_s']:.1f}",
                      f"{row['ms']:.0f}", gigabytes(row["weights_bytes"]),
                      gigabytes(row["cache_bytes"]), gigabytes(row["peak_bytes"])])
    return lines


def block_rows(rows: dict) -> list[list]:
    """Of one block of each kind, and of the released code's."""
    lines = []
    for name, row in rows.items():
        if name.startswith("block"):
            shown = row.get("failed") or f"{row['ms']:.1f}"
            lines.append([name.removeprefix("block, "), shown])
    for how, ms in RELEASED.items():
        lines.append([f"Self-Forcing's released block, {how} (timed once, by hand)", ms])
    return lines


def latent_rows(rows: dict) -> list[list]:
    lines = []
    for name, row in rows.items():
        if "failed" in row:
            lines.append([name, row["failed"]])
            continue
        line = [name]
        line += [rate(times) for times in row["by C"].values()]
        lines.append([*line, f"{row['growth_by_operations']:.2f}"])
    widths = list(next(row["by C"] for row in rows.values() if "by C" in row))
    if widths == [str(C) for C in WIDTHS]:
        line = [f"{PAPER[C]:.2f}" if C in PAPER else "" for C in WIDTHS]
        lines.append(["the paper's table 5a, by its own clock", *line])
    return lines


def batch_rows(rows: dict) -> list[list]:
    dense = rows.get("dense", {})
    lines = []
    for name, row in rows.items():
        if "failed" in row:
            lines.append([name, row["failed"]])
            continue
        paper = PAPER_BATCH.get(name, ("", ""))
        videos = row.get("videos")
        over = f"{videos / dense['videos']:.1f}" if videos and dense.get("videos") else ""
        lines.append([name, gigabytes(row["bytes_a_video"]),
                      gigabytes(row["cache_bytes_a_video"]), videos or "", over, *paper])
    return lines


def tables(found: dict) -> list[tuple[list, list[list]]]:
    """(head, rows) of each table, of the sections that there are."""
    sections = found["sections"]
    made = []
    if "model" in sections:
        rows = sections["model"]["rows"]
        made.append((["whole model, window", "latent frames/s", "frames of video/s", "ms a chunk",
                      "GB of weights", "of cache", "at most allocated"], model_rows(rows)))
        made.append((["one block, five passes", "ms"], block_rows(rows)))
    if "latent" in sections:
        rows = sections["latent"]["rows"]
        timed = [row["by C"] for row in rows.values() if "by C" in row]
        if timed:
            widths = [f"C = {C}" for C in timed[0]]
            made.append((["frames of video/s, by blocks alone", *widths,
                          "grows by operations, ms a frame"], latent_rows(rows)))
    if "batch" in sections:
        made.append((["window of a whole clip", "GB a video", "of it cache", "videos that fit",
                      "/ dense", "GB, the paper", "/ dense, the paper (B200)"],
                     batch_rows(sections["batch"]["rows"])))
    filled = []
    for head, rows in made:
        filled.append((head, [[*row, *[""] * (len(head) - len(row))] for row in rows]))
    return filled


def said(found: dict) -> str:
    """What follows, in words."""
    missing = {}
    for row in found["sections"].get("latent", {}).get("rows", {}).values():
        for C, times in row.get("by C", {}).items():
            if "failed" in times:
                missing[f"{row['form']} at C = {C} ({times['failed']})"] = None    # once each
    without = f" Without a time: {'; '.join(missing)}." if missing else ""
    judged = found["sections"].get("latent", {}).get("judged")
    if judged is None:
        return ""
    paper = ", ".join(f"{shown:.2f} at C = {C}" for C, shown in PAPER.items())
    return (f"The paper's table 5a has {paper}: a range of {RANGE:.2f} ms a frame. A form can have "
            f"been timed if from the narrowest C to the widest it grows by at most {CAN:.2f} ms "
            f"a frame at one of the windows, and cannot if it grows by more than {CANNOT:.1f} at "
            f"all. Verdict: {judged['verdict']}. (The last column: how much it would grow if "
            "time were operations, all at the speed of this card's largest product; it can be less "
            f"where narrow products wait for memory.){without}")


# ---- the command line ------------------------------------------------------------------------

SECTIONS = ("model", "latent", "batch")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=" ".join(__doc__.split("\n\n")[0].split()))
    parser.add_argument("--only", action="append", choices=SECTIONS,
                        help="a section; may be given again; default: all")
    parser.add_argument("--json", metavar="PATH", help="where rows are written, and gone on from")
    parser.add_argument("--quick", action="store_true", help="small sizes (always on a CPU)")
    parser.add_argument("--cpu", action="store_true", help="the CPU although there is a GPU")
    parser.add_argument("--layers", type=int, help="fewer layers than the preset")
    return parser.parse_args(argv)


@torch.no_grad()
def measure(args: argparse.Namespace) -> None:
    torch._dynamo.config.recompile_limit = 256     # one function meets many shapes, all meant
    args.budget = float("inf")
    args.markdown = False
    speed = WanSpeed(args)
    speed.out["sizes"] = speed.sizes_in_words()
    speed.ceilings()
    for name in args.only or SECTIONS:
        getattr(speed, f"{name}_section")()
    speed.save()
    for head, rows in tables(speed.out):
        speed.table(head[0], head, rows)
    print("\n" + said(speed.out))


def main(argv: list[str] | None = None) -> None:
    run(measure, parse(argv))


if __name__ == "__main__":
    main()
