"""Claim: every caption that is accepted works, however few words it has.

    python -m experiments.captions --json results/captions.json

A caption of the shapes world names a colour, a shape and a speed, or leaves any of them out.
For each of the eight subsets of the three, videos are made with random words of it. sample.py
draws the words that are left out (toy_data.fill_in); with --as-said the model is told the
caption as it is. Judged are the last 12 of 120 frames: is a subject alive, and does the frame
show what was said (`metrics.caption_match`)? A video counts if that holds in 90 % of these
frames.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

if not __package__:                    # started by its path
    sys.path.insert(0, str(Path(__file__).parent.parent))

from engine.checkpoint import load_model
from engine.command_line import check_bounds, default_device, pick_device, provenance, run
from flow import SAMPLERS, GuidedStream, Stream, VideoDraws, rollout
from metrics import caption_match
from toy_data import WORDS, fill_in, words_of

PARTS = ("colour", "shape", "speed")
LAST = 12                              # frames that are judged
ENOUGH = 0.97                          # share of the videos of a subset that must
ROOT = Path(__file__).resolve().parent.parent


def sayable() -> list[list[int]]:
    """The ids of the words that the shapes world uses, for each place of a caption."""
    ids = []
    for words in words_of("shapes"):
        ids.append([WORDS.index(word) for word in words])
    return ids


def captions_with(said: tuple[int, ...], number: int, seed: int) -> Tensor:
    """Random captions [number, 3] in which exactly the places `said` have a word."""
    generator = torch.Generator().manual_seed(seed)
    captions = torch.zeros(number, len(PARTS), dtype=torch.long)
    words = sayable()
    for place in said:
        ids = torch.tensor(words[place])
        chosen = torch.randint(len(ids), (number,), generator=generator)
        captions[:, place] = ids[chosen]
    return captions


def judge(model, captions: Tensor, told: Tensor, frames: int, seed: int, guidance: float,
          how: dict) -> dict:
    """What the last frames show of the captions, when the model was `told` these."""
    stream = Stream(model, told)
    if guidance != 1:
        stream = GuidedStream(stream, Stream(model, torch.zeros_like(captions)), guidance)
    draws = VideoDraws(seed, len(captions))
    kept = []                          # the last chunks alone: a video may be long
    for chunk in rollout(stream, frames, draws, **how):
        kept.append(chunk.float().cpu())
        kept = kept[-2 - LAST // chunk.shape[1]:]          # two more: a speed takes frames
    video = torch.cat(kept, dim=1)
    match = caption_match(video, captions)[:, -LAST:].float()          # [B, LAST]
    videos = match.mean(dim=1) >= 0.9
    return {"videos": videos.float().mean().item(), "frames": match.mean().item()}


def verdict(subsets: list[dict]) -> str:
    """Does every subset reach ENOUGH, and is it there with guidance, too?"""
    short = []
    for row in subsets:
        if row["videos"] < ENOUGH:
            short.append(f"{row['said']} {100 * row['videos']:.0f} % at guidance "
                         f"{row['guidance']:g}")
    if short:
        return f"{len(short)} of {len(subsets)} are below {100 * ENOUGH:.0f} %: {', '.join(short)}"
    return f"all {len(subsets)} reach {100 * ENOUGH:.0f} % of the videos"


def measure(args: argparse.Namespace) -> None:
    check_bounds(args, videos=(1, 10_000), frames=(2 * LAST, 10_000), seed=(0, 2**31))
    device = pick_device(args.device)
    model, about = load_model(args.checkpoint)
    model.to(device)
    how = SAMPLERS[about["stage"]]
    found = {**provenance(device), "checkpoint": about, "videos": args.videos,
             "frames": args.frames, "seed": args.seed, "filled_in": not args.as_said,
             "subsets": []}
    for guidance in (1.0, 3.0):
        for words in range(len(PARTS) + 1):
            for said in itertools.combinations(range(len(PARTS)), words):
                name = " + ".join(PARTS[place] for place in said) or "nothing said"
                captions = captions_with(said, args.videos, args.seed)
                told = captions
                if not args.as_said:
                    told = torch.stack([fill_in(caption, "shapes", args.seed + i)
                                        for i, caption in enumerate(captions)])
                shown = judge(model, captions, told, args.frames, args.seed, guidance, how)
                found["subsets"].append({"said": name, "guidance": guidance, **shown})
                shares = [f"{part} {100 * share:5.1f} %" for part, share in shown.items()]
                print(f"guidance {guidance:g}   {name:<24}", *shares, flush=True)
    print(verdict(found["subsets"]))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--checkpoint", default=str(ROOT / "checkpoints/toy.pt"), help="of the shapes world")
    flag("--videos", type=int, default=64, help="for each subset of words")
    flag("--frames", type=int, default=120)
    flag("--as-said", action="store_true", help="tell the model the caption as it is")
    flag("--seed", type=int, default=0)
    flag("--device", default=default_device())
    flag("--json", metavar="PATH", help="write what was found")
    run(measure, parser.parse_args(argv))


if __name__ == "__main__":
    main()
