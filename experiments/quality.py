"""What each stage is worth over a minute of video, MLA beside dense, over seeds.

    python -m experiments.quality              trains what is missing in --runs, judges, writes
                                               results/quality.json and the pictures
    python -m experiments.quality --redraw     the picture and the table again, from the JSON
    python -m experiments.quality --data digits    the same for the digits world, in
                                               results/quality_digits.json

For each attention and seed there is a folder of `train.py --stage all`. Every stage that can
stream makes --rollouts videos of --frames frames (960 = one minute at 16 frames a second, 80
times a training clip) for captions of clips it has not seen. Each stretch of 12 frames is
judged by itself, beside true clips judged by the same functions:

    alive, colour, shape, moving, survival    metrics.survival_report of that stretch: shares
               of rollouts; in the digits world class instead of shape (engine/digit_metrics.py)
    match      share of frames that show what the caption says, its speed word included
    speed      mean speed, over that of true clips of the same captions; 1 is right, 0 is frozen
    speeds     distance (Wasserstein-1) between generated and true speeds, over the true mean:
               the whole distribution, not its mean
    residual   what is left of the motion when straight flight with elastic reflections is taken
               away, over that of true clips; of shapes, whose walls are known
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import mean, median_high

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

if not __package__:                    # started by its path
    sys.path.insert(0, str(Path(__file__).parent.parent))

import metrics
import train
from engine import digit_metrics
from engine.checkpoint import load_model
from engine.command_line import check_bounds, default_device, pick_device, provenance, run
from engine.streaming import FastStream
from engine.video_files import to_pixels
from experiments.stamp import stamp
from flow import SAMPLERS, Draws, Stream, rollout
from metrics import motion_residual
from mla_video import VideoDiT
from toy_data import make_world

STRETCH = 12                   # frames that are judged together: a training clip
METRICS = ("survival", "alive", "colour", "shape", "class", "moving", "match", "speed",
           "speeds", "residual")
# Worlds whose stretches can be judged one by one, and what sees them: modules that have the same
# names. (A passage of the occluder takes longer than a stretch.)
EYES = {"shapes": metrics, "digits": digit_metrics}
# What is judged: a name, the stage whose model it is, and what differs from its own sampler.
JUDGED = (
    ("tf", "tf", {}),
    ("tf, 48 steps", "tf", {"steps": 48}),                 # passes a chunk, instead of 12
    ("cd", "cd", {}),
    ("dmd", "dmd", {}),
)


# ---- judging --------------------------------------------------------------------------------

def judge(video: Tensor, captions: Tensor, truth: Tensor, eyes=metrics) -> dict[str, float]:
    """The metrics of one stretch [B, 12, 3, h, w], given true clips of the same captions."""
    found = eyes.survival_report(video, captions)
    found["match"] = eyes.caption_match(video, captions).float().mean().item()
    found["speed"], found["speeds"] = judge_speeds(video, truth, eyes)
    if eyes is metrics:                    # a digit's middle turns where its picture decides
        residual = motion_residual(video).nanmean() / motion_residual(truth).nanmean()
        found["residual"] = residual.item()
    return {name: round(value, 4) for name, value in found.items()}


def judge_speeds(video: Tensor, truth: Tensor, eyes=metrics) -> tuple[float, float]:
    """(speed, speeds) of the videos whose subject is there in nine frames of ten."""
    there = eyes.alive(video).float().mean(1) >= 0.9       # [B]
    if not there.any():
        return float("nan"), float("nan")
    pace = eyes.speed(video).mean(1)[there]
    every_true_pace = eyes.speed(truth).mean(1)
    true_pace = every_true_pace[there]                     # of the same captions
    levels = torch.linspace(0, 1, 101, device=video.device)
    apart = (pace.quantile(levels) - true_pace.quantile(levels)).abs().mean()
    return (pace.mean() / true_pace.mean()).item(), (apart / every_true_pace.mean()).item()


def timed(chunks: Iterator[Tensor], device: torch.device) -> Iterator[tuple[float, Tensor]]:
    """(seconds, chunk) of each chunk of a rollout."""
    while True:
        synchronise(device)
        start = time.perf_counter()
        chunk = next(chunks, None)
        if chunk is None:
            return
        synchronise(device)
        yield time.perf_counter() - start, chunk


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def begin(model: VideoDiT, captions: Tensor) -> Stream:
    """Videos with these captions, as fast as the device makes them."""
    if not model.embed.weight.is_cuda:
        return Stream(model, captions)
    # CUDA graphs without Inductor: a toy pass is all launches, and there are 24 models to wait
    # for.
    return FastStream(model, captions, backend="eager")


def draws_on(device: torch.device, seed: int) -> Draws:
    return Draws(torch.Generator(device).manual_seed(seed))


@torch.no_grad()
def curves(model: VideoDiT, captions: Tensor, truth: Tensor, frames: int, seed: int,
           eyes=metrics, **how):
    """(curves, seconds a chunk for the whole batch, frames of the first 4 videos).

    Curves are {metric: [its value in each stretch]}; `how` goes to `rollout`.
    """
    device = model.embed.weight.device
    captions = captions.to(device)
    truth = truth.to(device)
    stream = begin(model, captions)
    chunks = rollout(stream, frames, draws_on(device, seed), **how)
    times = []
    kept = []
    stretch = []
    points = defaultdict(list)
    for seconds, chunk in timed(chunks, device):
        times.append(seconds)
        kept.append(chunk[:4].cpu().clone())               # a view would keep all videos
        stretch.append(chunk)
        if len(stretch) * model.config.chunk == STRETCH:
            found = judge(torch.cat(stretch, 1).float(), captions, truth, eyes)
            for name, value in found.items():
                points[name].append(value)
            stretch.clear()
    return dict(points), median_high(times), torch.cat(kept, 1)


@torch.no_grad()
def switch_test(model: VideoDiT, captions: Tensor, seed: int, at: int = 48, eyes=metrics,
                **how) -> list[float]:
    """How soon a new caption shows: it changes at frame `at` to that of another clip.

    Returns the share of rollouts that show the new colour and shape, in each chunk after that.
    """
    device = model.embed.weight.device
    captions = captions.to(device)
    other = captions.roll(1, 0)
    # A caption that happens to be the same would prove nothing.
    differ = (captions[:, :2] != other[:, :2]).any(1)
    wanted = other.clone()
    wanted[:, 2:] = 0                                      # whatever the speed
    stream = begin(model, captions)
    shares = []
    made = 0
    for chunk in rollout(stream, at + 24, draws_on(device, seed), **how):
        if made >= at:
            shown = eyes.caption_match(chunk.float(), wanted).all(1)
            shares.append(round(shown[differ].float().mean().item(), 4))
        made += chunk.shape[1]
        if made >= at:
            stream.caption = other                         # of the next chunk
    return shares


# ---- runs -----------------------------------------------------------------------------------

def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description="Exact metrics of each stage over a minute of video, MLA beside dense.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", default="shapes", choices=tuple(EYES), help="the world")
    add("--runs", help="folder of the runs (default: out/quality, out/quality_DATA); what is "
                       "missing is trained")
    add("--attention", nargs="+", default=["mla", "dense"], choices=("mla", "dense"))
    add("--seeds", type=int, default=3)
    add("--rollouts", type=int, default=256)
    add("--frames", type=int, default=960)
    add("--steps", type=int, help="steps of each stage, if not train.py's own")
    add("--json", help="default: results/quality.json, results/quality_DATA.json")
    add("--redraw", action="store_true",
        help="draw the picture and print the table of the JSON; nothing is run")
    add("--device", default=default_device())
    run(quality, parser.parse_args(argv))


def quality(args) -> None:
    check_bounds(args, seeds=(1, 10_000), rollouts=(2, 2**20), frames=(2 * STRETCH, 10**9))
    name = "quality"
    if args.data != "shapes":              # the tables and the README are of these
        name += f"_{args.data}"
    args.runs = args.runs or f"out/{name}"
    path = Path(args.json or f"results/{name}.json")
    result = json.loads(path.read_text()) if args.redraw else judge_all(args, path)
    picture = path.with_suffix(".png")
    if result.get("data", "shapes") == "shapes":
        draw(result, picture)
    else:
        draw_shares(result, picture)
    table(result)


def judge_all(args, path: Path) -> dict:
    """Every run, judged. The JSON is written after each, so that an hour's work is not lost."""
    device = pick_device(args.device)
    result = provenance(device)
    result |= {"data": args.data, "rollouts": args.rollouts, "frames": args.frames, "runs": []}
    path.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds):
        for attention in args.attention:
            folder = Path(args.runs, f"{attention}_{seed}")
            train_missing(args, attention, seed, device, folder)
            judged = judge_run(args, attention, seed, device, folder, path)
            result["runs"].append(judged)
            path.write_text(json.dumps(result))
    return result


def train_missing(args, attention: str, seed: int, device, folder: Path) -> None:
    """All stages of a run, unless they are there already."""
    if (folder / "report_dmd.json").exists():
        return
    words = ["--stage=all", f"--data={args.data}", f"--attention={attention}", f"--seed={seed}",
             f"--out={folder}", "--evaluate=0", f"--device={args.device}"]
    if args.steps:
        words.append(f"--steps={args.steps}")
    if device.type == "cuda":
        words.append("--compile")
    if (folder / "train.pt").exists():
        words.append("--resume")
    train.main(words)


def judge_run(args, attention: str, seed: int, device, folder: Path, path: Path) -> dict:
    """Judge the stages of a run that stream, on clips that no training run draws.

    Several processes may share the work, a run each: what one has judged is kept in the folder,
    and taken from there unless the run was trained again since.
    """
    kept = folder / f"judged_{args.rollouts}_{args.frames}.json"
    if kept.exists() and kept.stat().st_mtime > (folder / "dmd.pt").stat().st_mtime:
        return json.loads(kept.read_text())
    world = make_world(args.data, frames=STRETCH, seed=10_000 + seed)
    eyes = EYES[args.data]
    truth, captions = world.batch(range(args.rollouts))
    found = {"attention": attention, "seed": seed, "stages": {},
             "training_seconds": {stage: training_seconds(folder, stage)
                                  for stage in train.STAGES}}
    for name, stage, differs in JUDGED:
        model, _ = load_model(folder / f"{stage}.pt")
        model.to(device)
        how = SAMPLERS[stage] | differs
        points, seconds, video = curves(model, captions, truth, args.frames, seed, eyes, **how)
        found["stages"][name] = {
            "frames": args.frames,
            "seconds_per_chunk": round(seconds, 5),
            "curves": points,
            "switch": switch_test(model, captions, seed, eyes=eyes, **how),
        }
        if (attention, seed) == ("mla", 0) and name == stage:
            contact_sheet(video, path.with_name(f"{path.stem}_{stage}.png"))
        last = ", ".join(f"{metric} {values[-1]:.3f}" for metric, values in points.items())
        print(f"{attention} {seed} {name:12} at frame {args.frames}: {last}", flush=True)
        torch.compiler.reset()  # or the graphs of one model count against the next one's limit
    kept.write_text(json.dumps(found))
    return found


def training_seconds(folder: Path, stage: str) -> float:
    report = json.loads((folder / f"report_{stage}.json").read_text())
    return report["training_seconds"]


# ---- pictures and table ---------------------------------------------------------------------

# The stamps of three pictures, whose models are not kept, hold its text: it must stay.
def contact_sheet(video, path: Path) -> None:
    """Each column a video, each row a moment: twelve, from its first frame to its last."""
    picks = torch.linspace(0, video.shape[1] - 1, 12).round().long()
    rows = [Image.fromarray(to_pixels(video[:, pick:pick + 1], 4)[0]) for pick in picks]
    sheet = Image.new("RGB", (rows[0].width, (rows[0].height + 4) * len(rows) - 4),
                      (128, 128, 128))
    for i, row in enumerate(rows):
        sheet.paste(row, (0, i * (row.height + 4)))
    text = PngInfo()
    text.add_text("drawn_by", stamp(None, contact_sheet))
    sheet.save(path, pnginfo=text)


def over_seeds(result: dict, attention: str, stage: str, metric: str):
    """[mean], [least], [most] over the seeds, up to each stretch but the first nine.

    Of the mean over 10 stretches: one stretch of 12 frames alone is noise.
    """
    smooth = []
    for run in result["runs"]:
        if run["attention"] == attention and stage in run["stages"]:
            curve = run["stages"][stage]["curves"][metric]
            starts = range(max(len(curve) - 9, 1))
            smooth.append([mean(curve[start:start + 10]) for start in starts])
    points = list(zip(*smooth))                            # at each stretch, the seeds' values
    centre = [mean(point) for point in points]
    return centre, [min(point) for point in points], [max(point) for point in points]


def draw(result: dict, path: Path) -> None:
    """A panel a question, a line a stage, a band for the seeds. Dense is dashed."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    panels = {
        "survival": "there, in its colour, and moving",
        "match": "frames that show their caption",
        "shape": "shape kept",
        "speed": "mean speed / true",
        "speeds": "speeds: distance to the true ones",
        "residual": "jerkiness / true clips'",
    }
    colours = {"tf": "C1", "cd": "C2", "dmd": "C0"}
    lines = {"mla": "-", "dense": "--"}
    pyplot.rcParams.update({"font.size": 14})
    figure, axes = pyplot.subplots(3, 2, figsize=(9, 11), layout="constrained", sharex=True)
    for axis, metric in zip(axes.flat, panels):
        axis.set_title(panels[metric])
        for stage, attention in product(colours, lines):
            centre, low, high = over_seeds(result, attention, stage, metric)
            if not centre:
                continue
            frames = [STRETCH * (i + 10) for i in range(len(centre))]
            axis.plot(frames, centre, lines[attention], color=colours[stage], linewidth=2,
                      label=f"{stage}, {attention}")
            axis.fill_between(frames, low, high, color=colours[stage], alpha=0.12, linewidth=0)
        if metric in ("speed", "residual"):
            axis.axhline(1, color="0.6", linewidth=0.8)    # as true clips
        is_share = metric in ("survival", "match", "shape")
        axis.set_ylim(0, 1.05 if is_share else None)
    for axis in axes[-1]:
        axis.set_xlabel("frame (trained on 12), mean of 120")
    axes[0][0].legend(loc="lower right")
    figure.savefig(path, dpi=110, metadata={"drawn_by": stamp(result, draw, over_seeds)})
    pyplot.close(figure)


def draw_shares(result: dict, path: Path) -> None:
    """A panel for every share of rollouts that the world's report has; lines as in `draw`."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    shares = [name for name in measured(result) if name not in ("speed", "speeds")]
    figure, axes = pyplot.subplots(len(shares), figsize=(7, 2.4 * len(shares)), sharex=True,
                                   layout="constrained")
    for axis, metric in zip(axes, shares):
        axis.set_title(metric)
        axis.set_ylim(0, 1.05)
        for stage, attention in product(result["runs"][0]["stages"], ("mla", "dense")):
            centre, low, high = over_seeds(result, attention, stage, metric)
            frames = [STRETCH * (i + 10) for i in range(len(centre))]
            line = "--" if attention == "dense" else "-"
            axis.plot(frames, centre, line, label=f"{stage}, {attention}")
    axes[-1].set_xlabel(f"frame (trained on {STRETCH}), mean of 120")
    axes[0].legend()
    figure.savefig(path, dpi=110,
                   metadata={"drawn_by": stamp(result, draw_shares, over_seeds, measured)})
    pyplot.close(figure)


def measured(result: dict) -> list[str]:
    """Which of METRICS its curves have."""
    stages = result["runs"][0]["stages"]
    curves = next(iter(stages.values()))["curves"]
    return [name for name in METRICS if name in curves]


def table(result: dict) -> None:
    """Markdown: each stage over its last 120 frames.

    Mean over seeds and, in brackets, the least and the most. (One stretch of 12 frames alone is
    noise: a speed measured over 12 frames changes by a tenth from one to the next.)
    """
    names = measured(result)
    head = ["attention, stage", "frames", *names, "new caption after 3 chunks", "ms a chunk"]
    print(f"| {' | '.join(head)} |\n|" + "---|" * len(head))
    for attention in dict.fromkeys(run["attention"] for run in result["runs"]):
        runs = [run["stages"] for run in result["runs"] if run["attention"] == attention]
        for name, _, _ in JUDGED:
            print(table_row(attention, name, names, [stages[name] for stages in runs]))


def table_row(attention: str, name: str, metrics: list[str], seeds: list[dict]) -> str:
    last = seeds[0]["frames"]
    cells = [f"{attention}, {name}", f"{max(0, last - 120)} to {last}"]
    for metric in metrics:
        cells.append(spread([mean(found["curves"][metric][-10:]) for found in seeds]))
    cells.append(spread([found["switch"][2] for found in seeds]))
    fastest = min(found["seconds_per_chunk"] for found in seeds)
    cells.append(f"{1000 * fastest:.2f}")
    return f"| {' | '.join(cells)} |"


def spread(values: list[float]) -> str:
    return f"{mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


if __name__ == "__main__":
    main()
