"""Three ways to change a caption in mid-video: how fast each follows, how much the picture jumps.

    python -m experiments.switches --device cuda --json results/switches.json

--videos videos of 24 frames get another caption, which differs in colour, shape and speed from
the first, and 24 frames more. For each way of switching (engine/switching.py):

    shown       share of videos all of whose frames have the new colour and shape, in the first,
                second, ... chunk after the switch
    speed       the same for the word of speed, which takes some frames to be seen
    step        how far the middle of the shape moves at the switch, in pixels, and elsewhere
    change      mean change of a value of the picture at the switch, of 2, and elsewhere
    ms          what the switch itself takes
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

if not __package__:                    # started by its path
    sys.path.insert(0, str(Path(__file__).parent.parent))

from engine.checkpoint import load_model
from engine.command_line import check_bounds, default_device, pick_device, provenance, run
from engine.routes import attend_auto
from engine.switching import SWITCHES
from flow import SAMPLERS, GuidedStream, Stream, VideoDraws, rollout
from metrics import FIRST_COLOUR, FIRST_SHAPE, colour_index, pace_word, shape_index, speed
from mla_video import VideoDiT
from toy_data import COLOURS, HUES, SHAPES, SPEEDS, encode_caption

BEFORE = 24                            # frames; the window is full by then
AFTER = 24


def captions_of(videos: int, seed: int) -> tuple[Tensor, Tensor]:
    """(first captions, second captions), [videos, S] each: all three words are others."""
    dice = torch.Generator().manual_seed(seed)
    captions = ([], [])
    for _ in range(videos):
        words = []
        for choices in (list(SPEEDS), list(COLOURS)[:HUES], list(SHAPES)):
            order = torch.randperm(len(choices), generator=dice).tolist()
            words.append([choices[i] for i in order[:2]])
        for number in (0, 1):
            spoken = " ".join(pair[number] for pair in words)
            captions[number].append(encode_caption(spoken))
    return torch.stack(captions[0]), torch.stack(captions[1])


def switched(model: VideoDiT, name: str, first: Tensor, second: Tensor, how: dict, seed: int,
             guidance: float = 1.0) -> tuple[Tensor, float]:
    """(videos [B, BEFORE + AFTER, 3, h, w] whose caption changes, seconds of the switch)"""
    stream = Stream(model, first, attend=attend_auto)
    if guidance != 1:
        plain = Stream(model, torch.zeros_like(first), attend=attend_auto)
        stream = GuidedStream(stream, plain, guidance)
    switch = SWITCHES[name](stream, seed, **how)
    chunks = []
    made = 0
    seconds = 0.0
    for chunk in rollout(stream, BEFORE + AFTER, VideoDraws(seed, len(first)), **how):
        chunks.append(chunk.float().cpu())                 # waits for the device
        made += chunk.shape[1]
        begin = time.perf_counter()
        switch.after(chunk, first if made < BEFORE else second)
        if made == BEFORE:
            if chunk.is_cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - begin
    return torch.cat(chunks, dim=1), seconds


def by_chunk(right: Tensor, chunk: int) -> list[float]:
    """bool [B, F] -> for each chunk the share of videos all of whose frames are right."""
    whole = right.unflatten(1, (-1, chunk)).all(2)         # [B, chunks]
    return [round(share, 3) for share in whole.float().mean(0).tolist()]


def judge(video: Tensor, captions: Tensor, chunk: int) -> dict:
    """The figures above, of videos that have these captions from frame BEFORE on."""
    after = video[:, BEFORE:]
    colour, shape, pace = captions.T[..., None]            # [B, 1] each
    colour_right = colour_index(after) == colour - FIRST_COLOUR
    shape_right = shape_index(after) == shape - FIRST_SHAPE
    pace_right = pace_word(after) == pace
    steps = speed(video)                                   # [B, F - 1]
    changes = video.diff(dim=1).abs().mean((2, 3, 4))
    at = BEFORE - 1                                        # from the frame before the switch
    return {
        "shown": by_chunk(colour_right & shape_right, chunk),
        "speed": by_chunk(pace_right, chunk),
        "step": round(steps[:, at].mean().item(), 3),
        "step elsewhere": round(steps[:, :at].mean().item(), 3),
        "change": round(changes[:, at].mean().item(), 4),
        "change elsewhere": round(changes[:, :at].mean().item(), 4),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/toy.pt")
    parser.add_argument("--videos", type=int, default=256)
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--json", type=Path)
    run(report, parser.parse_args(argv))


def report(args: argparse.Namespace) -> None:
    check_bounds(args, videos=(1, 10_000), seed=(0, 10_000), guidance=(-1000, 1000))
    device = pick_device(args.device)
    content = provenance(device)       # now: a run must name the commit that it started from
    content |= {"checkpoint": args.checkpoint, "videos": args.videos, "guidance": args.guidance}
    model, about = load_model(args.checkpoint)
    model = model.to(device)
    how = SAMPLERS[about["stage"]]
    first, second = captions_of(args.videos, args.seed)
    for name in SWITCHES:
        video, seconds = switched(model, name, first, second, how, args.seed, args.guidance)
        found = judge(video, second, model.config.chunk)
        found["ms"] = round(1000 * seconds, 2)
        content[name] = found
        print(f"{name}: " + ", ".join(f"{what} {value}" for what, value in found.items()),
              flush=True)
    if args.json:
        args.json.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
