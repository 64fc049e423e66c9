"""What each stage is worth over a minute of video: exact metrics as curves, MLA beside dense, over seeds.

    python -m experiments.quality                      trains what is missing in --runs, judges, writes results/quality.*
    python -m experiments.quality --redraw             the picture and the table again, from the JSON

For each attention and seed there is a folder of `train.py --stage all`. Every stage that can stream makes --rollouts videos of --frames
frames (960 = one minute at 16 frames a second, 80 times a training clip) for captions of clips it has not seen, and each stretch of 12
frames is judged by itself, beside true clips judged by the same functions:
    alive, colour, shape, moving, survival    toy_data.survival_report of that stretch: shares of rollouts
    match      share of frames that show what the caption says, its speed word included
    speed      mean speed, over that of true clips of the same captions; 1 is right, 0 is frozen
    speeds     distance (Wasserstein-1) between generated and true speeds, over the true mean: the whole distribution, not its mean
    residual   what is left of the motion when straight flight with elastic reflections is taken away, over that of true clips
"""

import argparse
import json
import time
from pathlib import Path
from statistics import mean

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import train
from checkpoint import load_model
from experiments.stamp import stamp
from sample import SAMPLERS, pick_device, provenance, rollout, run, to_pixels
from toy_data import alive, caption_match, make_world, motion_residual, speed, survival_report

STRETCH = 12                                               # frames that are judged together: a training clip
METRICS = ("survival", "alive", "colour", "shape", "moving", "match", "speed", "speeds", "residual")


def judge(video, captions, truth) -> dict[str, float]:
    """The metrics of one stretch [B, 12, 3, h, w], given true clips [B, 12, 3, h, w] of the same captions."""
    there = alive(video).float().mean(1) >= 0.9
    pace, true_pace = speed(video).mean(1)[there], speed(truth).mean(1)
    nan = float("nan")
    found = {**survival_report(video, captions), "match": caption_match(video, captions).float().mean().item()}
    found["speed"] = (pace.mean() / true_pace[there].mean()).item() if there.any() else nan
    levels = torch.linspace(0, 1, 101, device=video.device)
    apart = (pace.quantile(levels) - true_pace[there].quantile(levels)).abs().mean() if there.any() else torch.tensor(nan)
    found["speeds"] = (apart / true_pace.mean()).item()
    found["residual"] = (motion_residual(video).nanmean() / motion_residual(truth).nanmean()).item()
    return {name: round(value, 4) for name, value in found.items()}


@torch.no_grad()
def curves(model, captions, truth, frames: int, seed: int, switch=None, **how):
    """(curves over stretches {metric: [...]}, seconds a chunk for the whole batch, frames of the first 4 videos)."""
    device, stretch, found, kept = model.embed.weight.device, [], [], []
    generator = torch.Generator(device).manual_seed(seed)
    captions, truth = captions.to(device), truth.to(device)
    chunks, times = rollout(model, captions, frames, generator=generator, switch=switch, **how), []
    while True:
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        if (chunk := next(chunks, None)) is None:
            break
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        stretch.append(chunk)
        kept.append(chunk[:4].cpu().clone())               # on a CPU a view would keep all videos
        if len(stretch) * model.config.chunk == STRETCH:
            found.append(judge(torch.cat(stretch, 1).float(), captions, truth))
            stretch.clear()
    return {name: [point[name] for point in found] for name in found[0]}, sorted(times)[len(times) // 2], torch.cat(kept, 1)


@torch.no_grad()
def switch_test(model, captions, seed: int, at: int = 48, **how) -> list[float]:
    """Share of rollouts that show the new colour and shape, in each chunk after a switch at frame `at` to a caption of another clip."""
    device = model.embed.weight.device
    captions = captions.to(device)
    other = captions.roll(1, 0)
    differ = (captions[:, :2] != other[:, :2]).any(1)      # a caption that happens to be the same would prove nothing
    wanted = torch.cat((other[:, :2], torch.zeros_like(other[:, 2:])), 1)
    generator = torch.Generator(device).manual_seed(seed)
    chunks = list(rollout(model, captions, at + 24, generator=generator, switch={at: other}, **how))[at // model.config.chunk:]
    return [round(caption_match(chunk.float(), wanted)[differ].all(1).float().mean().item(), 4) for chunk in chunks]


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description="Exact metrics of each stage over a minute of video, MLA beside dense, over seeds.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--runs", default="out/quality", help="folder of the runs; what is missing is trained")
    parser.add_argument("--attention", nargs="+", default=["mla", "dense"], choices=("mla", "dense"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=256)
    parser.add_argument("--frames", type=int, default=960)
    parser.add_argument("--steps", type=int, help="steps of each stage, if not train.py's own")
    parser.add_argument("--json", default="results/quality.json")
    parser.add_argument("--redraw", action="store_true", help="draw the picture and print the table of the JSON; nothing is run")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run(quality, parser.parse_args(argv))


def quality(args) -> None:
    for name, low in (("seeds", 1), ("rollouts", 2), ("frames", 2 * STRETCH)):
        if getattr(args, name) < low:
            raise ValueError(f"--{name} must be at least {low}, got {getattr(args, name)}")
    path = Path(args.json)
    if args.redraw:
        result = json.loads(path.read_text())
    else:
        device = pick_device(args.device)
        result = {**provenance(device), "rollouts": args.rollouts, "frames": args.frames, "runs": []}
        path.parent.mkdir(parents=True, exist_ok=True)
        for seed in range(args.seeds):
            for attention in args.attention:
                result["runs"].append(judge_run(args, attention, seed, device, path))
                path.write_text(json.dumps(result))
    draw(result, path.with_suffix(".png"))
    table(result)


def judge_run(args, attention: str, seed: int, device, path: Path) -> dict:
    """Train all stages if they are not there, and judge those that stream; "tf, 48 steps" is tf with 48 passes a chunk instead of 12."""
    folder = Path(args.runs) / f"{attention}_{seed}"
    if not (folder / "report_dmd.json").exists():
        steps = [f"--steps={args.steps}"] if args.steps else []
        train.main(["--stage=all", f"--attention={attention}", f"--seed={seed}", f"--out={folder}", "--evaluate=0",
                    f"--device={args.device}", *steps, *["--compile"] * (device.type == "cuda"),
                    *["--resume"] * (folder / "train.pt").exists()])
    kept = folder / f"judged_{args.rollouts}_{args.frames}.json"                       # several processes may share the work, a run each
    if kept.exists() and kept.stat().st_mtime > (folder / "dmd.pt").stat().st_mtime:   # not what was judged before it was trained again
        return json.loads(kept.read_text())
    truth, captions = make_world("shapes", frames=STRETCH, seed=10_000 + seed).batch(range(args.rollouts))
    found = {"attention": attention, "seed": seed, "stages": {}, "training_seconds": {
        stage: json.loads((folder / f"report_{stage}.json").read_text())["training_seconds"] for stage in train.STAGES}}
    for name, stage, how in (("tf", "tf", {}), ("tf, 48 steps", "tf", {"steps": 48}), ("cd", "cd", {}), ("dmd", "dmd", {})):
        model, _ = load_model(folder / f"{stage}.pt")
        model.to(device)
        # One CUDA graph a pass, without Inductor: a toy pass is all launches, and there are 24 models to wait for.
        how = {**SAMPLERS[stage], **how, "compile": "eager" if device.type == "cuda" else False}
        points, seconds, video = curves(model, captions, truth, args.frames, seed, **how)
        found["stages"][name] = {"frames": args.frames, "seconds_per_chunk": round(seconds, 5), "curves": points,
                                 "switch": switch_test(model, captions, seed, **how)}
        if (attention, seed) == ("mla", 0) and name == stage:
            contact_sheet(video, path.with_name(f"quality_{stage}.png"))
        last = ", ".join(f"{metric} {values[-1]:.3f}" for metric, values in points.items())
        print(f"{attention} {seed} {name:12} at frame {args.frames}: {last}", flush=True)
        torch._dynamo.reset()                              # or the graphs of one model count against the next one's limit
    kept.write_text(json.dumps(found))
    return found


def contact_sheet(video, path: Path) -> None:
    """Each column a video, each row a moment: twelve, from its first frame to its last."""
    picks = torch.linspace(0, video.shape[1] - 1, 12).round().long()
    rows = [Image.fromarray(to_pixels(video[:, pick:pick + 1], 4)[0]) for pick in picks]
    sheet = Image.new("RGB", (rows[0].width, (rows[0].height + 4) * len(rows) - 4), (128, 128, 128))
    for i, row in enumerate(rows):
        sheet.paste(row, (0, i * (row.height + 4)))
    text = PngInfo()
    text.add_text("drawn_by", stamp(None, contact_sheet))
    sheet.save(path, pnginfo=text)


def over_seeds(result: dict, attention: str, stage: str, metric: str):
    """[mean], [least], [most] over the seeds of the mean over 10 stretches, up to each stretch but the first nine."""
    curves = [run["stages"][stage]["curves"][metric] for run in result["runs"] if run["attention"] == attention and stage in run["stages"]]
    values = [[mean(curve[i:i + 10]) for i in range(max(len(curve) - 9, 1))] for curve in curves]
    return [[of(point) for point in zip(*values)] for of in (mean, min, max)]


def draw(result: dict, path: Path) -> None:
    """A panel for each question, a line for each stage, a band for the seeds; dense is dashed."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    panels = (("survival", "there, in its colour, and moving"), ("match", "frames that show their caption"), ("shape", "shape kept"),
              ("speed", "mean speed / true"), ("speeds", "speeds: distance to the true ones"), ("residual", "jerkiness / true clips'"))
    pyplot.rcParams.update({"font.size": 14})
    figure, axes = pyplot.subplots(3, 2, figsize=(9, 11), layout="constrained", sharex=True)
    for axis, (metric, title) in zip(axes.flat, panels):
        for stage, colour in (("tf", "C1"), ("cd", "C2"), ("dmd", "C0")):
            for attention, line in (("mla", "-"), ("dense", "--")):
                centre, low, high = over_seeds(result, attention, stage, metric)
                frames = [STRETCH * (i + 10) for i in range(len(centre))]
                if centre:
                    axis.plot(frames, centre, line, color=colour, label=f"{stage}, {attention}", linewidth=2)
                    axis.fill_between(frames, low, high, color=colour, alpha=0.12, linewidth=0)
        if metric in ("speed", "residual"):
            axis.axhline(1, color="0.6", linewidth=0.8)
        axis.set_title(title)
        axis.set_ylim(0, None if metric in ("speed", "speeds", "residual") else 1.05)
    for axis in axes[-1]:
        axis.set_xlabel("frame (trained on 12), mean of 120")
    axes[0][0].legend(loc="lower right")
    figure.savefig(path, dpi=110, metadata={"drawn_by": stamp(result, draw, over_seeds)})
    pyplot.close(figure)


def table(result: dict) -> None:
    """Markdown: each stage over its last 120 frames, mean over seeds and, in brackets, the least and the most. (One stretch of 12 frames
    alone is noise: a speed measured over 12 frames changes by a tenth from one to the next.)"""
    head = ["attention, stage", "frames", *METRICS, "new caption after 3 chunks", "ms a chunk"]
    print(f"| {' | '.join(head)} |\n|" + "---|" * len(head))
    for attention in dict.fromkeys(run["attention"] for run in result["runs"]):
        for stage in ("tf", "tf, 48 steps", "cd", "dmd"):
            rows = [run["stages"][stage] for run in result["runs"] if run["attention"] == attention]
            cells = []
            for metric in METRICS:
                values = [mean(row["curves"][metric][-10:]) for row in rows]
                cells.append(f"{mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]")
            switched = [row["switch"][2] for row in rows]
            cells += [f"{mean(switched):.3f} [{min(switched):.3f}, {max(switched):.3f}]",
                      f"{1000 * min(row['seconds_per_chunk'] for row in rows):.2f}"]
            last = rows[0]["frames"]
            print(f"| {attention}, {stage} | {max(0, last - 120)} to {last} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
