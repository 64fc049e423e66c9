"""Claim: a video does not flicker where one chunk ends and the next begins.

    python -m experiments.flicker --json results/flicker.json

The change between two frames is the mean absolute difference of their values, of 2. Over
--videos videos of --frames frames the mean change at the borders of chunks is put over the mean
change inside them: 1 is no flicker, and the target is 1.1 at most, in every tenth of the video,
too.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

if not __package__:                    # started by its path
    sys.path.insert(0, str(Path(__file__).parent.parent))

from engine.checkpoint import load_model
from engine.command_line import check_bounds, default_device, pick_device, provenance, run
from engine.judging import unseen_captions
from engine.progress import watched
from engine.routes import attend_auto
from flow import SAMPLERS, Stream, VideoDraws, rollout

TENTHS = 10


def changes(chunks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean change in chunks [B, chunk, ...]: (at the border before each but the first
    [chunks - 1], inside each [chunks])."""
    borders = []
    insides = []
    last = None
    for chunk in chunks:
        chunk = chunk.float().cpu()
        insides.append(chunk.diff(dim=1).abs().mean())
        if last is not None:
            borders.append((chunk[:, 0] - last).abs().mean())
        last = chunk[:, -1]
    return torch.stack(borders), torch.stack(insides)


def ratios(borders: Tensor, insides: Tensor) -> dict:
    """Change at the borders over change inside: of the whole, and of each tenth."""
    insides = insides[1:]                  # a border and the chunk behind it
    tenths = []
    for border, inside in zip(borders.tensor_split(TENTHS), insides.tensor_split(TENTHS)):
        tenths.append(round((border.mean() / inside.mean()).item(), 4))
    return {
        "border": round(borders.mean().item(), 5),
        "inside": round(insides.mean().item(), 5),
        "ratio": round((borders.mean() / insides.mean()).item(), 4),
        "by_tenth": tenths,
    }


def report(args: argparse.Namespace) -> None:
    check_bounds(args, videos=(1, 10_000), frames=(60, 10**7), seed=(0, 10_000))
    device = pick_device(args.device)
    origin = provenance(device)        # now: a run must name the commit that it started from
    model, about = load_model(args.checkpoint)
    captions = unseen_captions(args.videos, args.seed, about["data"])
    stream = Stream(model.to(device), captions, attend=attend_auto)
    draws = VideoDraws(args.seed, args.videos)
    made = rollout(stream, args.frames, draws, **SAMPLERS[about["stage"]])
    found = ratios(*changes(watched(made, "looking for flicker, frames", args.frames)))
    print(f"change between frames: at borders of chunks {found['border']}, inside them "
          f"{found['inside']}: {found['ratio']} times; by tenth of the video "
          f"{', '.join(map(str, found['by_tenth']))}")
    if args.json:
        content = {**origin, "checkpoint": args.checkpoint, "videos": args.videos,
                   "frames": args.frames, **found}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/toy.pt")
    parser.add_argument("--videos", type=int, default=64)
    parser.add_argument("--frames", type=int, default=960)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--json", type=Path)
    run(report, parser.parse_args(argv))


if __name__ == "__main__":
    main()
