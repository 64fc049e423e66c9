"""Claim: a video goes on from true frames without a seam, and from a single picture it moves.

    python -m experiments.starts --device cuda --json results/starts.json

Takes --videos true clips that the model has not seen. It commits the first frames of each,
makes 24 more, and compares with how the true clip goes on. A step is how far the middle of the
shape moves from one frame to the next, in pixels:

    seam       the step from the last true frame to the first one made
    true       the true step there, and in all of the clip
    later      the steps from the third made frame on
    frozen     share of videos that move by less than a quarter of the true step later
    kept       share of made frames that have the colour, and the shape, of the first

--levels tries other noise levels for a single picture (engine/starts.py, class Held).
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

if not __package__:                    # started by its path
    sys.path.insert(0, str(Path(__file__).parent.parent))

from engine import starts
from engine.checkpoint import load_model
from engine.command_line import check_bounds, default_device, pick_device, provenance, run
from engine.routes import attend_auto
from flow import SAMPLERS, Stream, VideoDraws
from metrics import colour_index, shape_index, speed
from mla_video import VideoDiT
from toy_data import make_world

MORE = 24                              # frames that are made
LENGTHS = (12, 11, 10, 3, 2, 1)        # of the starts; 1 is a picture
LEVELS = {                             # of a picture, when the rest of its chunk is at sigma
    "clean": lambda sigma: 0.0,
    "as noisy as the rest": lambda sigma: sigma,
    "0.6 at most": lambda sigma: min(sigma, 0.6),
    "0.9 sigma^2": lambda sigma: 0.9 * sigma**2,
    "0.9 sigma^3": lambda sigma: 0.9 * sigma**3,
}


class Levelled(starts.Held):
    """Held frames at a noise level that is asked for."""

    def __init__(self, level, *args, **named):
        super().__init__(*args, **named)
        self.level = level


def continued(model: VideoDiT, clips: Tensor, captions: Tensor, length: int, seed: int,
              stage: str) -> Tensor:
    """Videos [B, length + MORE, 3, h, w] that begin with `length` frames of the clips."""
    stream = Stream(model, captions, attend=attend_auto)
    draws = VideoDraws(seed, len(captions))
    chunks = starts.go_on_from(clips[:, :length], stream, MORE, draws, **SAMPLERS[stage])
    video = torch.cat([chunk.float().cpu() for chunk in chunks], dim=1)
    return video[:, :length + MORE]


def compare(video: Tensor, clips: Tensor, length: int) -> dict[str, float]:
    """The figures above, of videos whose first `length` frames are those of the clips."""
    steps = speed(video)                                   # [B, F - 1]
    true_steps = speed(clips)
    later = steps[:, length + 2:].mean(1)
    figures = {
        "seam": steps[:, length - 1].mean(),
        "true at the seam": true_steps[:, length - 1].mean(),
        "later": later.mean(),
        "true": true_steps.mean(),
        "frozen": (later < true_steps.mean() / 4).float().mean(),
    }
    for name, index in (("colour", colour_index), ("shape", shape_index)):
        found = index(video)
        same = found[:, length:] == found[:, :1]
        figures[f"{name} kept"] = same.float().mean()
    return {name: round(value.item(), 3) for name, value in figures.items()}


def measure(model: VideoDiT, stage: str, videos: int, seed: int) -> list[dict]:
    """A row of figures for each length of start, with the clips' captions and with none."""
    world = make_world("shapes", frames=max(LENGTHS) + MORE, seed=20_000 + seed)
    clips, captions = world.batch(range(videos))
    rows = []
    for length in LENGTHS:
        for words, asked in (("own", captions), ("none", torch.zeros_like(captions))):
            video = continued(model, clips, asked, length, seed, stage)
            rows.append({"start": length, "caption": words, **compare(video, clips, length)})
            print_row(rows[-1])
    return rows


def measure_levels(model: VideoDiT, stage: str, videos: int, seed: int) -> list[dict]:
    """The same for single pictures at different noise levels."""
    world = make_world("shapes", frames=1 + MORE, seed=20_000 + seed)
    clips, captions = world.batch(range(videos))
    plain = starts.Held
    rows = []
    for name, level in LEVELS.items():
        starts.Held = partial(Levelled, level)
        for words, asked in (("own", captions), ("none", torch.zeros_like(captions))):
            video = continued(model, clips, asked, 1, seed, stage)
            rows.append({"level": name, "caption": words, **compare(video, clips, 1)})
            print_row(rows[-1])
    starts.Held = plain
    return rows


def print_row(row: dict) -> None:
    print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/toy.pt")
    parser.add_argument("--videos", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--levels", action="store_true")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--json", type=Path)
    run(report, parser.parse_args(argv))


def report(args: argparse.Namespace) -> None:
    check_bounds(args, videos=(1, 10_000), seed=(0, 10_000))
    device = pick_device(args.device)
    origin = provenance(device)        # now: a run must name the commit that it started from
    model, about = load_model(args.checkpoint)
    work = measure_levels if args.levels else measure
    rows = work(model.to(device), about["stage"], args.videos, args.seed)
    if args.json:
        content = {**origin, "checkpoint": args.checkpoint, "videos": args.videos, "rows": rows}
        args.json.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
