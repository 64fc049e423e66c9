"""Claim: a cache in eight bits makes the same videos for half the bytes.

    python -m experiments.eight_bits --dense out/dense/model.pt

One model makes --videos videos of --frames frames (960: a minute at 16 frames a second) for
each of --seeds seeds of sampling, with its cache in each format: as it is (float32), in eight
bits (engine/quantised.py) and, as the limit, in four (`int4`: whole numbers up to 7, still a
byte each here). All formats are given the same captions and the same noise. The last 120 frames
are judged as in experiments/quality.py, and:

    apart      mean difference of pixel values, of 2, from the video of float32 with the same
               noise, in the first 24 frames. (Later videos go apart whatever the cause.)

How much is little? Other noise makes other videos, too. So a format is as good as float32 if
each metric, in the mean over seeds, differs from float32's by no more than float32's own
differ from seed to seed of sampling (most - least). A second yardstick are models that were
trained with other seeds, of results/quality.json. The JSON is written after every run; the same
command, of the same commit and on the same device, goes on from what is in it.

--recall names a model of the recall world, judged by metrics.recall_report of whole videos:
there an error that the cache keeps has the time of a curtain to show.
"""

import argparse
import itertools
import json
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

if not __package__:                    # started by its path
    sys.path.insert(0, str(Path(__file__).parent.parent))

from cache import RollingCache
from engine.checkpoint import load_model
from engine.command_line import (UserError, check_bounds, default_device, pick_device,
                                 provenance, run)
from engine.progress import watched
from engine.quantised import FP8, INT8, Format, make_cache
from engine.streaming import FastStream
from experiments.quality import METRICS as METRICS_OF_ALL
from experiments.quality import STRETCH, draws_on, judge
from flow import SAMPLERS, Stream, rollout
from metrics import recall_report
from mla_video import PRESETS, VideoDiT
from toy_data import make_world

ROOT = Path(__file__).resolve().parent.parent
METRICS = tuple(name for name in METRICS_OF_ALL if name != "class")    # shapes have none
INT4 = Format("int4", torch.int8, 7)
FORMATS = {"float32": None, "int8": INT8, "fp8": FP8, "int4": INT4}
WORLD_OF = {"mla": "shapes", "dense": "shapes", "recall": "recall"}
LAST = 120                             # frames that are judged
CLOSE = 24                             # frames in which videos are compared pixel by pixel


# ---- one rollout -----------------------------------------------------------------------------

def begin(model: VideoDiT, captions: Tensor, format: Format | None) -> Stream:
    """Videos with these captions, as fast as the device makes them."""
    cache = make_cache(model, len(captions), format)
    if not model.embed.weight.is_cuda:
        return Stream(model, captions, cache)
    return FastStream(model, captions, cache, backend="eager")


@torch.no_grad()
def first_and_last(model: VideoDiT, captions: Tensor, format: Format | None, frames: int,
                   seed: int, how: dict, said: str, kept: int) -> tuple[Tensor, Tensor]:
    """The first CLOSE and the last `kept` frames of one rollout."""
    device = model.embed.weight.device
    stream = begin(model, captions.to(device), format)
    chunk = model.config.chunk
    first = []
    last = deque(maxlen=-(-kept // chunk))
    made = rollout(stream, frames, draws_on(device, seed), **how)
    for part in watched(made, said, frames):
        part = part.float().cpu().clone()                  # a view would keep all videos
        last.append(part)
        if len(first) < CLOSE // chunk:
            first.append(part)
    return torch.cat(first, dim=1), torch.cat(list(last), dim=1)


def judge_end(video: Tensor, captions: Tensor, truth: Tensor, device: torch.device) -> dict:
    """Each metric of experiments/quality.py, its mean over the stretches of the video."""
    captions = captions.to(device)
    truth = truth.to(device)
    parts = video.to(device).split(STRETCH, dim=1)
    found = [judge(part, captions, truth) for part in parts]
    return {name: round(mean(each[name] for each in found), 4) for name in METRICS}


# ---- all of them -----------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--checkpoint", default="checkpoints/toy.pt", help="an MLA model of the shapes world")
    flag("--dense", metavar="PATH", help="a dense model to judge beside it")
    flag("--recall", metavar="PATH", help="a model of the recall world to judge, too")
    flag("--formats", nargs="+", default=list(FORMATS), choices=tuple(FORMATS),
         help="beside float32")
    flag("--videos", type=int, default=64, help="of each seed")
    flag("--seeds", type=int, default=3, help="seeds of sampling")
    flag("--frames", type=int, default=960)
    flag("--device", default=default_device())
    flag("--json", type=Path, default=ROOT / "results/eight_bits.json")
    run(measure, parser.parse_args(argv))


def measure(args: argparse.Namespace) -> None:
    check_bounds(args, videos=(2, 10_000), seeds=(1, 1000), frames=(LAST, 10**6))
    device = pick_device(args.device)
    found = provenance(device)         # now: a run must name the commit that it started from
    found |= {"videos": args.videos, "frames": args.frames, "models": {}}
    paths = {"mla": args.checkpoint}
    if args.dense:
        paths["dense"] = args.dense
    if args.recall:
        paths["recall"] = args.recall
    found["asked"] = {**{name: str(path) for name, path in paths.items()},
                      "formats": args.formats, "seeds": args.seeds}
    found["models"] = earlier(args.json, found)
    for name, path in paths.items():
        model, about = load_model(path)
        world = about.get("data", "shapes")
        if world != WORLD_OF[name]:
            raise UserError(f"{path} is a model of {str(world)[:40]!r}, and one of "
                            f"{WORLD_OF[name]} is asked for")
        model.to(device)
        entry = {"stage": about["stage"], "steps": about.get("steps"), "seed": about.get("seed"),
                 "formats": {}}
        for format in dict.fromkeys(["float32", *args.formats]):           # each once
            cost = bytes_of(model, FORMATS[format])
            entry["formats"][format] = {"bytes": cost, "runs": []}
        entry = found["models"].setdefault(name, entry)
        for seed in range(args.seeds):
            judge_seed(args, model, name, seed, found)


def earlier(path: Path, found: dict) -> dict:
    """The models that an interrupted run of the same command has judged so far; {} if there was
    none."""
    if not path.exists():
        return {}
    old = json.loads(path.read_text())
    same = ("asked", "videos", "frames", "commit", "device", "versions")
    return old["models"] if all(old.get(key) == found[key] for key in same) else {}


def bytes_of(model: VideoDiT, format: Format | None) -> dict[str, int]:
    """Bytes of a token and layer: of this model, and at the paper's size, of its dense or MLA
    attention, where rows that are not quantised are in bfloat16."""
    return {"model": make_cache(model, 1, format).bytes_per_token,
            "paper": papers_cache(model.config.attention, format).bytes_per_token}


def papers_cache(attention: str, format: Format | None) -> RollingCache:
    """A cache at the paper's size, allocated where nothing takes memory."""
    config = replace(PRESETS["wan1.3b"], attention=attention, layers=1)
    with torch.device("meta"):
        model = VideoDiT(config).bfloat16()
        return make_cache(model, 1, format)


def judge_seed(args: argparse.Namespace, model: VideoDiT, name: str, seed: int,
               found: dict) -> None:
    """All formats with the captions and the noise of one seed."""
    entry = found["models"][name]
    how = SAMPLERS[entry["stage"]]
    world = make_world(WORLD_OF[name], frames=STRETCH, seed=10_000 + seed)
    kept = args.frames if name == "recall" else LAST
    rows = entry["formats"].values()
    if all(len(row["runs"]) > seed for row in rows):
        return
    for row in rows:                   # a seed that was interrupted is judged again, whole
        del row["runs"][seed:]
    truth, captions = world.batch(range(args.videos))
    for format, row in entry["formats"].items():
        said = f"{name} {format}, seed {seed}, frames"
        first, last = first_and_last(model, captions, FORMATS[format], args.frames, seed, how,
                                     said, kept)
        if format == "float32":
            exact = first
        if name == "recall":
            report = recall_report(last, captions)
            judged = {metric: round(share, 4) for metric, share in report.items()}
        else:
            judged = judge_end(last, captions, truth, model.embed.weight.device)
        apart = (first - exact).abs().mean()
        judged["apart"] = round(apart.item(), 5)
        row["runs"].append(judged)
        args.json.write_text(json.dumps(found, indent=1))
        shown = ", ".join(f"{metric} {value:.3f}" for metric, value in judged.items())
        print(f"{name} {format} {seed}: {shown}", flush=True)
        torch.compiler.reset()         # or one format's graphs count against the next one's


# ---- the table -------------------------------------------------------------------------------

HEADS = {"mla": "MLA", "dense": "dense", "recall": "MLA, recall"}
SHOWN = {  # column: (metric, digits behind the point, in percent?)
    "frames that show their caption": ("match", 0, True),
    "survive": ("survival", 0, True),
    "colour right": ("colour", 0, True),
    "shape right": ("shape", 0, True),
    "speed / true": ("speed", 2, False),
    "distance of speeds": ("speeds", 2, False),
    "jerkiness / true": ("residual", 2, False),
    "apart from float32": ("apart", 4, False),
}


def values_of(row: dict, metric: str) -> list[float]:
    """One for each seed."""
    return [judged[metric] for judged in row["runs"] if metric in judged]


def cell(row: dict, metric: str, digits: int, percent: bool) -> str:
    """Mean over the seeds and, if there are several, [least, most]."""
    values = values_of(row, metric)
    if not values:
        return "-"
    unit = " %" if percent else ""
    factor = 100 if percent else 1
    shown = [f"{factor * value:.{digits}f}" for value in (mean(values), min(values), max(values))]
    spread = f" [{shown[1]}, {shown[2]}]" if len(values) > 1 else ""
    return f"{shown[0]}{unit}{spread}"


def table(found: dict) -> tuple[list[str], list[list[str]]]:
    """(head, rows) of what was found."""
    head = ["cache", "bytes a token and layer, paper's size", "the same, this model", *SHOWN]
    rows = []
    for name, entry in found["models"].items():
        for format, row in entry["formats"].items():
            if not row["runs"]:
                continue
            cells = [f"{HEADS[name]}, `{entry['stage']}`, {format}"]
            cells += [shown_bytes(format, row["bytes"][size]) for size in ("paper", "model")]
            cells += [cell(row, *how) for how in SHOWN.values()]
            rows.append(cells)
    return head, rows


def shown_bytes(format: str, number: int) -> str:
    """Four bits are only played: each takes a byte here."""
    return "-" if format == "int4" else str(number)


def metrics_of(entry: dict) -> list[str]:
    """What its videos are judged by."""
    return [name for name in entry["formats"]["float32"]["runs"][0] if name != "apart"]


def width(values: list[float]) -> float:
    return max(values) - min(values)


def outside(entry: dict, format: str, widths: dict[str, float]) -> list[str]:
    """Metrics in whose mean over seeds a format differs from float32 by more than `widths`."""
    exact = entry["formats"]["float32"]
    row = entry["formats"][format]
    wrong = []
    for metric in widths:
        moved = abs(mean(values_of(row, metric)) - mean(values_of(exact, metric)))
        if moved > widths[metric] + 1e-9:
            wrong.append(f"{metric} by {moved:.4f}, of {widths[metric]:.4f}")
    return wrong


def over_sampling(entry: dict) -> dict[str, float]:
    """How far float32's metrics lie apart between seeds of sampling."""
    exact = entry["formats"]["float32"]
    return {metric: width(values_of(exact, metric)) for metric in metrics_of(entry)}


def over_training(quality: dict, attention: str, stage: str) -> dict[str, float]:
    """How far metrics lie apart between seeds of training, in results/quality.json."""
    widths = {}
    for metric in METRICS:
        values = []
        for judged in quality["runs"]:
            if judged["attention"] == attention:
                curve = judged["stages"][stage]["curves"][metric]
                values.append(mean(curve[-LAST // STRETCH:]))
        widths[metric] = width(values)
    return widths


def yardsticks(found: dict, name: str, quality: dict) -> dict[str, dict[str, float]]:
    """What counts as little, by the name of the seeds that say so: as far as there are several
    seeds, and as videos are as long as theirs."""
    entry = found["models"][name]
    there = {}
    if len(entry["formats"]["float32"]["runs"]) > 1:
        there["sampling"] = over_sampling(entry)
    if WORLD_OF[name] == "shapes" and found["frames"] == quality["frames"]:
        there["training"] = over_training(quality, name, entry["stage"])
    return there


def verdict(found: dict, quality: dict) -> tuple[list[str], list[list[str]]]:
    """(head, rows): which metrics move by more than each yardstick, for each model and format."""
    head = ["cache", "metrics that move by more than float32's seeds", "moved, of what is allowed"]
    rows = []
    for name, entry in found["models"].items():
        judged = [format for format, row in entry["formats"].items() if row["runs"]]
        rounded = [format for format in judged if format != "float32"]
        sticks = yardsticks(found, name, quality)
        for format, seeds in itertools.product(rounded, sticks):
            wrong = outside(entry, format, sticks[seeds])
            rows.append([f"{HEADS[name]}, {format}",
                         f"of {seeds}: {len(wrong)} of {len(sticks[seeds])}",
                         "; ".join(wrong) or "-"])
    return head, rows


def conditions(found: dict) -> str:
    """How many videos of how many frames, and what bytes are beside those of dense attention."""
    formats = found["models"]["mla"]["formats"]
    runs = len(formats["float32"]["runs"])
    seeds = "1 seed" if runs == 1 else f"each of {runs} seeds"
    for name, entry in found["models"].items():
        fewer = len(entry["formats"]["float32"]["runs"])
        if fewer != runs:
            seeds += f" ({HEADS[name]}: {fewer})"
    dense = papers_cache("dense", None).bytes_per_token
    times = dense / papers_cache("mla", INT8).bytes_per_token
    means = "means" if runs == 1 else "means [least, most] of the seeds"
    return (f"{found['videos']} videos of {found['frames']} frames for {seeds} of sampling; "
            f"{means} over the last {LAST} frames. At the paper's size float32 stands for "
            f"bfloat16, and dense attention keeps {dense} bytes there, {times:.0f} times what "
            "MLA keeps in int8. Four bits take a byte here.")


if __name__ == "__main__":
    main()
