"""Stream a video out of a trained model, into a file that grows with it.

    python sample.py
        plays checkpoints/toy.pt: 120 frames of four captions, side by side
    python sample.py --prompt "red disc" --frames 480 --route absorbed
        one caption, four times as long, attention by another route
    python sample.py --prompt "red disc" --prompt "48: blue disc"
        one video, whose caption changes at frame 48
    python sample.py --start clip.mp4 --prompt "red disc" --out more.mp4
        goes on from the frames of a clip or a picture of your own
    python sample.py --frames 0 --live
        without end until Ctrl-C, and drawn in the terminal meanwhile
    python sample.py --checkpoint out/model.pt --evaluate 64
        exact metrics over 64 rollouts
    python sample.py --checkpoint wan.safetensors --text rows.safetensors --out made.safetensors
        released weights: captions are rows of a text encoder, and latents are made

The loop over chunks is `flow.rollout`. What the flags add is added around it: compiled passes
and guidance are other kinds of stream (`open_stream`), a start is committed before the first
chunk (`make`), and captions change between two chunks (`write`). Models of Wan's shape go
another way (engine/latents.py). tests/test_cli.py.
"""

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine import command_line, latents
from engine.about import about_lines
from engine.checkpoint import load_model
from engine.command_line import (UserError, as_user_error, check_bounds, default_device,
                                 pick_device, run)
from engine.judging import JUDGES, cache_line, report_survival
from engine.locks import lock
from engine.progress import Progress
from engine.own_words import Vocabulary, vocabulary_of
from engine.prompts import captions_at, complete, never_shown, read_prompts
from engine.quantised import FORMATS, make_cache, why_not
from engine.routes import ROUTES, route_name, why_not_fused
from engine.starts import go_on_from, read_start
from engine.streaming import FastStream
from engine.switching import SWITCHES, Keep
from engine.terminal import Screen, open_screen
from engine.video_files import Writer, open_video, path_of, to_pixels
from flow import SAMPLERS, GuidedStream, Stream, VideoDraws, consistency, euler, rollout
from mla_video import VideoDiT
from toy_data import CAPTION_SLOTS, WORDS, decode_caption, encode_caption, make_world, prompts_of

TOY = Path(__file__).parent / "checkpoints/toy.pt"


def main(argv: list[str] | None = None) -> None:
    """The command line; `argv` None takes the process' own. Exits with code 2 and one line on
    input it cannot use."""
    run(play, read_flags(argv))


def play(args: argparse.Namespace) -> None:
    """Check, load, stream, write, report."""
    check_flags(args)
    if latents.wanted(args):
        latents.play(args, pick_device(args.device), partial(open_stream, args))
        return
    path = path_of(args.out, args.pictures)
    device = pick_device(args.device)
    model, about = open_model(args.checkpoint, device)
    if args.about:
        print("\n".join(about_lines(model, about)))
        return
    check_route(args.route, model)
    check_cache(args.cache, device)
    how = sampling(args, about["stage"])
    if args.evaluate:
        judge(args, model, about, how)
        return

    start = frames_of_start(args, model)
    frames = args.frames and args.frames + start.shape[1]
    prompts = prompts_for(args, about)
    words = vocabulary_of(about, model.config.slots)
    schedule = captions_by_frame(prompts, model.config.chunk, frames, words)
    if not words:
        with as_user_error():                      # the model may not know a word
            schedule = complete(schedule, str(about.get("data")), args.seed)
    stream = open_stream(args, model, schedule[0])
    screen = open_screen(stream.chunk_like()) if args.live else None
    switch = SWITCHES[args.switch](stream, args.seed, **how)

    begin = time.perf_counter()
    with lock(path.parent, path.name):             # one process at a time writes a video
        with as_user_error():                      # --out may be no path at all
            video = open_video(path)
        made = write(make(args, stream, start, how), frames, schedule, switch, video, screen)
    seconds = time.perf_counter() - begin
    report(args, model, how, schedule, made, seconds, words)
    print(f"wrote        {video.path / '*.png' if args.pictures else video.path}")


def report(args: argparse.Namespace, model: VideoDiT, how: dict, schedule: dict[int, Tensor],
           made: int, seconds: float, words: Vocabulary | None = None) -> None:
    """Print what was made, how fast, and what the cache took."""
    videos = len(schedule[0])
    for frame, captions in schedule.items():
        chunk = model.config.chunk
        if -(-frame // chunk) * chunk < made:      # the next chunk begins under it
            print_captions(frame, captions, words)
    frames_per_second = videos * made / seconds
    print(f"speed        {frames_per_second:.1f} frames/s, everything included "
          f"({videos} videos at once, {model.embed.weight.device.type}, {how['steps']} "
          f"{how['sampler'].__name__} steps a chunk, route "
          f"{route_name(model, videos, args.route)})")
    print(cache_line(model, videos, FORMATS[args.cache]))


# ---- parse and check -------------------------------------------------------------------------

def read_flags(argv: list[str] | None) -> argparse.Namespace:
    """The flags, as argparse reads them; it exits with code 2 for those it does not know."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--checkpoint", default=str(TOY), help="a file of train.py, or released weights")
    flag("--prompt", action="append",
         help='a caption such as "fast red disc"; given again, a second video; "48: blue '
              'square" is no video of its own but changes the caption of the one before it at '
              "frame 48")
    flag("--switch", choices=tuple(SWITCHES), default="keep",
         help="when a caption changes: keep the past as it is, recache it under the new "
              "caption, or cut to another video")
    flag("--start", metavar="FILE",
         help="a clip (.gif, .mp4, .npy, ...) or a picture: the videos begin with its frames, "
              "cut to squares")
    flag("--layout", help="the axes of an array that --start names, e.g. NTHW")
    flag("--frames", type=int, default=120, help="frames to make; 0 streams until Ctrl-C")
    flag("--sampler", choices=("euler", "consistency"),
         help="default: what the checkpoint's stage was trained for")
    flag("--steps", type=int, help="passes per chunk; default: 12 after tf, 4 after cd and dmd")
    flag("--guidance", type=float, default=1.0, help="classifier-free guidance weight; 1 is off")
    flag("--route", default="auto", choices=tuple(ROUTES),
         help="how attention is computed; the answer is the same")
    flag("--cache", default="float32", choices=tuple(FORMATS), help="how the past is kept")
    flag("--out", default="out",
         help="a folder (for sample.gif) or a name that ends in .gif, .mp4 or .webm")
    flag("--pictures", action="store_true",
         help="write a PNG file for each frame, in the folder OUT/sample, instead of a GIF")
    flag("--live", action="store_true", help="draw the video in the terminal as it is made")
    flag("--evaluate", type=int, default=0, metavar="N",
         help="print exact metrics over N rollouts instead of a GIF")
    flag("--about", action="store_true", help="say what the checkpoint is; make no video")
    flag("--compile", action=argparse.BooleanOptionalAction, default=None,
         help="one compiled graph per pass, once the window is full; default: on a GPU yes, "
              "on a CPU no")
    flag("--seed", type=int, default=0)
    flag("--device", default=default_device())
    latents.add_flags(flag)
    return command_line.read_flags(parser, argv)


def check_flags(args: argparse.Namespace) -> None:
    """What can be refused before anything is loaded."""
    check_bounds(args, frames=(0, 10**18), steps=(1, 1000), evaluate=(0, 10_000),
                 seed=(0, 2**63 - 1), guidance=(-1000, 1000))
    if args.layout and not args.start:
        raise UserError("--layout says what the axes of an array are that --start names")
    if args.evaluate:
        most = 2**20 // args.evaluate
        if not 12 <= args.frames <= most:
            raise UserError("--evaluate judges the last 12 of --frames frames and keeps all: "
                            f"at least 12 frames, and at most {most} for {args.evaluate} "
                            f"rollouts; got {args.frames}")
        if args.prompt or args.start or args.live or "out" in args.given:
            raise UserError("--evaluate draws captions of its own and shows nothing: leave out "
                            "--prompt, --start, --live and --out")


# ---- load ------------------------------------------------------------------------------------

def open_model(path: str, device: torch.device) -> tuple[VideoDiT, dict]:
    """A checkpoint's model and the facts about its training; UserError if it cannot play."""
    model, about = load_model(path)
    c = model.config
    own = vocabulary_of(about, c.slots)
    known, slots = len(WORDS), CAPTION_SLOTS
    if own:
        known, slots = 1 + len(own.words), c.slots
    if c.words < known or c.slots != slots or c.channels not in (1, 3):
        raise UserError(f"{path} knows {c.words} words, takes {c.slots} at a time and makes "
                        f"frames of {c.channels} channels; here are {known} words, "
                        f"{slots} at a time, and 1 or 3 channels")
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


def check_cache(name: str, device: torch.device) -> None:
    """UserError if rows cannot be kept in this format on this device."""
    reason = why_not(FORMATS[name], device)
    if reason is not None:
        raise UserError(f"--cache {name}: {reason}; use --cache int8")


def sampling(args: argparse.Namespace, stage: str) -> dict:
    """How a chunk is sampled: as the stage was trained for, unless flags say otherwise."""
    how = dict(SAMPLERS[stage])
    if args.sampler:
        how["sampler"] = {"euler": euler, "consistency": consistency}[args.sampler]
    if args.steps:
        how["steps"] = args.steps
    return how


def prompts_for(args: argparse.Namespace, about: dict) -> list[str]:
    """Those of --prompt, or else the world's own, or what suits the start."""
    if args.prompt:
        return args.prompt
    if args.start:
        return [""]                                # the clip says what is shown
    if about.get("prompts"):                       # a model with words of its own
        return str(about["prompts"]).split("\n")
    return list(prompts_of(str(about.get("data"))))


def captions_by_frame(prompts: list[str], chunk: int, frames: int,
                      words: Vocabulary | None) -> dict[int, Tensor]:
    """{frame: captions [B, S] from there on}, beginning with frame 0. What no chunk of the
    video will be made under is said."""
    with as_user_error():
        encode = words.encode if words else encode_caption
        schedule = read_prompts(prompts, encode)
        for line in never_shown(prompts, chunk, frames, encode):
            print_aside(f"warning: prompt {line}")
    return schedule


def frames_of_start(args: argparse.Namespace, model: VideoDiT) -> Tensor:
    """The frames [1, F, channels, h, w] that --start names; F is 0 without it."""
    c = model.config
    if not args.start:
        return torch.empty(1, 0, c.channels, c.height, c.width)
    with as_user_error():
        start, said = read_start(args.start, c, args.layout)
    print(f"start        {said}")
    return start


# ---- stream and write ------------------------------------------------------------------------

def open_stream(args: argparse.Namespace, model: VideoDiT, captions: Tensor,
                negative: Tensor | None = None) -> Stream | GuidedStream:
    """Videos to be made with these captions: by which route, compiled or not, guided or not.
    Guidance leads away from the `negative` captions; without them, from no caption."""
    compiled = args.compile
    if compiled is None:
        compiled = model.embed.weight.is_cuda
    attend = ROUTES[args.route]
    if compiled:
        begin = partial(FastStream, model, attend=attend, say=print_aside)
    else:
        begin = partial(Stream, model, attend=attend)
    empty = partial(make_cache, model, len(captions), FORMATS[args.cache])
    stream = begin(captions, cache=empty())
    if args.guidance == 1:
        return stream
    if negative is None:
        negative = torch.zeros_like(captions)
    plain = begin(negative, cache=empty())
    return GuidedStream(stream, plain, args.guidance)


def print_aside(line: str) -> None:
    """To stderr: what is made goes on meanwhile."""
    print(line, file=sys.stderr)


def make(args: argparse.Namespace, stream: Stream | GuidedStream, start: Tensor,
         how: dict) -> Iterator[Tensor]:
    """The chunks of the videos, --frames of them after the frames of `start`, as soon as each
    is made."""
    draws = VideoDraws(args.seed, len(stream.caption))
    if args.start:
        return go_on_from(start, stream, args.frames, draws, **how)
    return rollout(stream, args.frames, draws, **how)


def write(chunks: Iterator[Tensor], frames: int, schedule: dict[int, Tensor], switch: Keep,
          video: Writer, screen: Screen | None = None) -> int:
    """Write each chunk as soon as it is made, `frames` frames in all, or what comes if 0; each
    chunk is made under the captions of its first frame. Returns how many frames were made, in
    whole chunks."""
    made = 0
    try:
        with Progress("frames", frames, shown=screen is None) as progress:
            for chunk in chunks:
                pixels = to_pixels(chunk)
                if frames:
                    pixels = pixels[:frames - made]        # the last chunk may be too long
                video.append(pixels)
                if screen:
                    screen.append(chunk)
                made += chunk.shape[1]
                switch.after(chunk, captions_at(made, schedule))
                progress.advance(len(pixels))
    except KeyboardInterrupt as stop:
        if not made:
            raise
        number = stop.args[0] if stop.args else signal.SIGINT
        raise KeyboardInterrupt(number, f"{made} frames are in {video.path}") from None
    finally:
        video.close()
        if screen:
            screen.close()
    return made


def print_captions(frame: int, captions: Tensor, words: Vocabulary | None) -> None:
    """A line with the captions [B, S] from `frame` on."""
    since = ""
    if frame > 0:
        since = f"from {frame}: "
    decode = words.decode if words else decode_caption
    names = [decode(caption) or "(none)" for caption in captions]
    print(f"captions     {since}{', '.join(names)}")


# ---- or judge --------------------------------------------------------------------------------

def judge(args: argparse.Namespace, model: VideoDiT, about: dict, how: dict) -> None:
    """Print exact metrics instead of writing a video."""
    data = str(about.get("data"))
    if data not in JUDGES:
        raise UserError("--evaluate needs a model of a world whose truth is known "
                        f"({', '.join(JUDGES)}); this one saw {data[:40]!r}")
    c = model.config
    if c.channels != 3 or c.height != c.width:
        raise UserError("--evaluate judges square RGB frames, as the worlds make them; this "
                        f"model's are {c.channels} x {c.height} x {c.width}")
    with as_user_error():                          # it may want an optional package
        make_world(data)
    report_survival(model, args.evaluate, args.frames, args.seed, data,
                    stream_of=partial(open_stream, args), **how)


if __name__ == "__main__":
    main()
