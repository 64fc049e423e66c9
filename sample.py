"""Stream a video out of a trained model, into a GIF or PNG files that grow with it.

    python sample.py
        plays checkpoints/toy.pt: 120 frames of four captions, side by side
    python sample.py --prompt "red disc" --frames 480 --route absorbed
        one caption, four times as long, attention by another route
    python sample.py --prompt "red disc" --prompt "48: blue disc"
        one video, whose caption changes at frame 48
    python sample.py --frames 0 --pictures
        without end until Ctrl-C, a PNG file a frame
    python sample.py --checkpoint out/model.pt --evaluate 64
        exact metrics over 64 rollouts

The loop over chunks is `flow.rollout`. What the flags add is added around it: compiled passes
and guidance are other kinds of stream (`open_stream`), and captions change between two chunks
(`write`). tests/test_cli.py.
"""

import argparse
import re
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint import load_model
from engine.command_line import (UserError, as_user_error, check_bounds, default_device,
                                 pick_device, run)
from engine.judging import PROMPTS, cache_line, report_survival
from engine.routes import ROUTES, route_name, why_not_fused
from engine.streaming import FastStream
from engine.video_files import GifWriter, PictureWriter, to_pixels
from flow import SAMPLERS, Draws, GuidedStream, Stream, consistency, euler, rollout
from mla_video import VideoDiT
from toy_data import WORDS, decode_caption, encode_caption

TOY = Path(__file__).parent / "checkpoints/toy.pt"


def main(argv: list[str] | None = None) -> None:
    """The command line; `argv` None takes the process' own. Exits with code 2 and one line on
    input it cannot use."""
    run(play, read_flags(argv))


def play(args: argparse.Namespace) -> None:
    """Check, load, stream, write, report."""
    check_flags(args)
    device = pick_device(args.device)
    model, about = open_model(args.checkpoint, device)
    check_route(args.route, model)
    how = sampling(args, about["stage"])
    if args.evaluate:
        judge(args, model, about, how)
        return

    schedule = captions_by_frame(args, about)
    stream = open_stream(args, model, schedule[0])
    with as_user_error():                          # --out may be no path at all
        video = open_video(args)
    start = time.perf_counter()
    made = write(video, stream, schedule, args, how)
    seconds = time.perf_counter() - start

    written = video.path
    if args.pictures:
        written = video.path / "*.png"
    videos = len(stream.caption)
    frames_per_second = videos * made / seconds
    for frame, captions in schedule.items():
        print_captions(frame, captions)
    print(f"speed        {frames_per_second:.1f} frames/s, everything included "
          f"({videos} videos at once, {device.type}, {how['steps']} {how['sampler'].__name__} "
          f"steps a chunk, route {route_name(model, videos, args.route)})")
    print(cache_line(model, videos))
    print(f"wrote        {written}")


# ---- parse and check -------------------------------------------------------------------------

def read_flags(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--checkpoint", default=str(TOY), help="a file written by train.py")
    flag("--prompt", action="append",
         help='a caption such as "fast red disc"; given again, a second video; "48: blue '
              'square" is no video of its own but changes the caption of the one before it at '
              "frame 48")
    flag("--frames", type=int, default=120, help="frames to make; 0 streams until Ctrl-C")
    flag("--sampler", choices=("euler", "consistency"),
         help="default: what the checkpoint's stage was trained for")
    flag("--steps", type=int,
         help="passes per chunk; default: 12 after tf, 4 after cd and dmd")
    flag("--guidance", type=float, default=1.0,
         help="classifier-free guidance weight; 1 is off")
    flag("--route", default="auto", choices=tuple(ROUTES),
         help="how attention is computed; the answer is the same")
    flag("--out", default="out", help="a folder (for sample.gif) or the name of a .gif")
    flag("--pictures", action="store_true",
         help="write a PNG file for each frame, in the folder OUT/sample, instead of a GIF")
    flag("--evaluate", type=int, default=0, metavar="N",
         help="print exact metrics over N rollouts instead of a GIF")
    flag("--compile", action=argparse.BooleanOptionalAction, default=None,
         help="one compiled graph per pass, once the window is full; default: on a GPU yes, "
              "on a CPU no")
    flag("--seed", type=int, default=0)
    flag("--device", default=default_device())
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace) -> None:
    """What can be refused before anything is loaded."""
    check_bounds(args, frames=(0, 10**18), steps=(1, 1000), evaluate=(0, 10_000),
                 seed=(0, 2**63 - 1), guidance=(-1000, 1000))
    if args.pictures and args.out.endswith(".gif"):
        raise UserError(f"--pictures writes a folder of PNG files, and --out {args.out} names "
                        "a GIF: give --out a folder")
    if args.evaluate:
        most = 2**20 // args.evaluate
        if not 12 <= args.frames <= most:
            raise UserError("--evaluate judges the last 12 of --frames frames and keeps all: "
                            f"at least 12 frames, and at most {most} for {args.evaluate} "
                            f"rollouts; got {args.frames}")


# ---- load ------------------------------------------------------------------------------------

def open_model(path: str, device: torch.device) -> tuple[VideoDiT, dict]:
    """A checkpoint's model and the facts about its training; UserError if it cannot play."""
    model, about = load_model(path)
    c = model.config
    if c.words < len(WORDS) or c.channels not in (1, 3):
        raise UserError(f"{path} knows {c.words} words and makes frames of {c.channels} "
                        f"channels; captions have {len(WORDS)} words, a GIF 1 or 3 channels")
    stage = about.setdefault("stage", "tf")
    if stage not in SAMPLERS:
        raise UserError(f"{path} is a {stage} model: it sees past and future at once, so it "
                        f"cannot stream; give one of {', '.join(SAMPLERS)}")
    return model.to(device), about


def check_route(route: str, model: VideoDiT) -> None:
    """UserError if it is the fused one and would refuse this model; the others take any."""
    c = model.config
    if route != "fused" or c.attention == "dense":
        return
    V = c.dim // c.heads
    weight = model.embed.weight
    reason = why_not_fused(weight.device, weight.dtype, V - c.rope, c.rope, V, c.latent)
    if reason is not None:
        raise UserError(f"--route fused {reason}; use --route materialised")


def sampling(args: argparse.Namespace, stage: str) -> dict:
    """How a chunk is sampled: as the stage was trained for, unless flags say otherwise."""
    how = dict(SAMPLERS[stage])
    if args.sampler:
        how["sampler"] = {"euler": euler, "consistency": consistency}[args.sampler]
    if args.steps:
        how["steps"] = args.steps
    return how


def captions_by_frame(args: argparse.Namespace, about: dict) -> dict[int, Tensor]:
    """The captions of --prompt, or else those that suit the data: {frame: captions [B, S] from
    there on}, beginning with frame 0."""
    prompts = [""] * 4
    if about.get("data") == "shapes":
        prompts = PROMPTS
    with as_user_error():
        return read_prompts(args.prompt or prompts)


def read_prompts(prompts: list[str]) -> dict[int, Tensor]:
    """{frame: captions [B, S] from there on}, beginning with frame 0.

    Each prompt is a video of its own. But one that begins with "FRAME:" changes the caption of
    the video before it. ValueError for a word that is none.
    """
    captions = []
    changes = []                                   # (frame, number of the video, caption)
    for prompt in prompts:
        parts = re.fullmatch(r"(?:\s*(\d+)\s*:)?(.*)", prompt, re.DOTALL)
        frame, text = parts.groups()               # "48: blue" gives "48" and " blue"
        caption = encode_caption(text)             # [S]
        if frame is None:
            captions.append(caption)
        elif captions:
            changes.append((int(frame), len(captions) - 1, caption))
        else:
            raise ValueError(f"prompt {prompt!r} changes the caption of the video before it, "
                             "and there is none: give a prompt without a frame first")
    now = torch.stack(captions)
    schedule = {0: now}
    for frame, number, caption in sorted(changes, key=lambda change: change[0]):
        now = now.clone()
        now[number] = caption
        schedule[frame] = now
    return schedule


# ---- stream and write ------------------------------------------------------------------------

def open_stream(args: argparse.Namespace, model: VideoDiT,
                captions: Tensor) -> Stream | GuidedStream:
    """Videos to be made with these captions: by which route, compiled or not, guided or not."""
    compiled = args.compile
    if compiled is None:
        compiled = model.embed.weight.is_cuda
    attend = ROUTES[args.route]
    if compiled:
        begin = partial(FastStream, model, attend=attend, say=print_aside)
    else:
        begin = partial(Stream, model, attend=attend)
    stream = begin(captions)
    if args.guidance == 1:
        return stream
    plain = begin(torch.zeros_like(captions))
    return GuidedStream(stream, plain, args.guidance)


def print_aside(line: str) -> None:
    print(line, file=sys.stderr)


def open_video(args: argparse.Namespace) -> GifWriter | PictureWriter:
    if args.out.endswith(".gif"):
        return GifWriter(Path(args.out))
    if args.pictures:
        return PictureWriter(Path(args.out) / "sample")
    return GifWriter(Path(args.out) / "sample.gif")


def write(video: GifWriter | PictureWriter, stream: Stream | GuidedStream,
          schedule: dict[int, Tensor], args: argparse.Namespace, how: dict) -> int:
    """Make --frames frames, each chunk under the captions of its first frame, and write each
    chunk as soon as it is made. Returns how many frames were made, in whole chunks."""
    draws = Draws(torch.Generator().manual_seed(args.seed))
    made = 0
    try:
        for chunk in rollout(stream, args.frames, draws, **how):
            pixels = to_pixels(chunk)
            if args.frames:
                pixels = pixels[:args.frames - made]       # the last chunk may be too long
            video.append(pixels)
            made += chunk.shape[1]
            stream.caption = captions_at(made, schedule)
            print(f"\r{made} frames", end="", file=sys.stderr)
    finally:
        print(file=sys.stderr)
    return made


def captions_at(frame: int, schedule: dict[int, Tensor]) -> Tensor:
    """The latest captions that begin at `frame` or before."""
    latest = max(start for start in schedule if start <= frame)
    return schedule[latest]


def print_captions(frame: int, captions: Tensor) -> None:
    since = ""
    if frame > 0:
        since = f"from {frame}: "
    names = [decode_caption(caption) or "(none)" for caption in captions]
    print(f"captions     {since}{', '.join(names)}")


# ---- or judge --------------------------------------------------------------------------------

def judge(args: argparse.Namespace, model: VideoDiT, about: dict, how: dict) -> None:
    """Print exact metrics instead of writing a video."""
    data = about.get("data")
    if data != "shapes":
        raise UserError("--evaluate needs a model of the shapes world, whose truth is known; "
                        f"this one saw {str(data)[:40]!r}")
    report_survival(model, args.evaluate, args.frames, args.seed,
                    stream_of=partial(open_stream, args), **how)


if __name__ == "__main__":
    main()
