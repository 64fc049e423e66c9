"""Pictures of videos that went wrong, each made by making the mistake.

    python -m experiments.failures     results/failures.png and failures.json

A row of the picture is one mistake: the frames of a video that the shipped model, or a model
that is trained here for a minute, made in the wrong way. --videos videos of each are judged
from their pixels:

    speed      pixels that the subject moves in a frame
    alive      share of frames that show one subject of about the right size
    colour     share of frames whose subject has the colour of its first frame
    change     mean change of a value between frames, of 2

experiments/normal.py puts rows and figures into RESULTS.md.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

if not __package__:                    # started by its path
    sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from engine.checkpoint import load_model
from engine.clips import open_world
from engine.command_line import check_bounds, default_device, pick_device, provenance, run
from engine.starts import go_on_from
from engine.trainer import fast_products, frozen_copy
from engine.video_files import to_pixels
from experiments.stamp import stamp
from flow import SAMPLERS, GuidedStream, Stream, VideoDraws, consistency, euler, rollout
from metrics import alive, colour_index, speed
from mla_video import VideoDiT
from toy_data import Shapes, encode_caption, make_world

FRAMES = 48
SHOWN = (0, 1, 2, 3, 4, 5, 8, 11, 14, 17, 23, 35, 47)
ZOOM = 3
GAP = 4
LABEL = 330                            # pixels for the words beside a row
BACK = (246, 246, 242)
INK = (28, 28, 34)


class Studio:
    """The shipped model, captions for `videos` videos, and the mistakes one can make."""

    def __init__(self, path: str, videos: int, device: torch.device):
        self.model, about = load_model(path)
        self.model = self.model.to(device)
        self.right = SAMPLERS[about["stage"]]
        self.videos = videos
        self.device = device
        captions = [encode_caption(prompt) for prompt in Shapes.prompts]
        self.captions = torch.stack(captions)[torch.arange(videos) % len(captions)]

    def stream(self, model: VideoDiT | None = None, captions: Tensor | None = None) -> Stream:
        captions = self.captions if captions is None else captions
        return Stream(model or self.model, captions)

    def make(self, stream, frames: int = FRAMES, **how) -> Tensor:
        """Videos [B, frames, 3, h, w]; as the shipped model wants to be sampled, except for
        `how`."""
        draws = VideoDraws(0, self.videos)
        chunks = rollout(stream, frames, draws, **{**self.right, **how})
        return torch.cat([chunk.float().cpu() for chunk in chunks], dim=1)

    # -- nothing wrong

    def nothing(self) -> Tensor:
        return self.make(self.stream())

    # -- mistakes in use

    def repeated_picture(self) -> Tensor:
        stream = self.stream()
        picture = self.make(self.stream(), frames=3)[:, :1]
        still = picture.expand(-1, 3, -1, -1, -1)
        stream.commit(still.to(self.device))
        return torch.cat((still, self.make(stream, FRAMES - 3)), dim=1)

    def one_pass(self) -> Tensor:
        return self.make(self.stream(), sampler=consistency, steps=1)

    def guidance(self) -> Tensor:
        plain = self.stream(captions=torch.zeros_like(self.captions))
        return self.make(GuidedStream(self.stream(), plain, 10.0))

    def with_another_past(self, change: Callable[[Tensor], Tensor | None]) -> Tensor:
        """What is committed is change(chunk), nothing if that is None. The captions name a
        shape alone, so that colours stand in the past and nowhere else."""
        stream = self.stream(captions=self.captions * torch.tensor([0, 1, 0]))
        commit = stream.commit

        def commit_changed(chunk: Tensor) -> None:
            changed = change(chunk)
            if changed is not None:
                commit(changed)

        stream.commit = commit_changed
        return self.make(stream)

    def no_past(self) -> Tensor:
        return self.with_another_past(lambda chunk: None)

    def past_from_0_to_1(self) -> Tensor:
        return self.with_another_past(lambda chunk: (chunk + 1) / 2)

    def past_in_bytes(self) -> Tensor:
        return self.with_another_past(lambda chunk: (chunk + 1) * 127.5)

    def misread_axes(self) -> Tensor:
        """As `sample.py --start clips.npy --layout NHTWC`, of an array that is NTHWC."""
        clips, _ = make_world("shapes", frames=16).batch(range(self.videos))
        pixels = np.stack([picture_values(clip) for clip in clips])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "clips.npy")
            np.save(path, pixels)
            world = open_world(str(path), layout="NHTWC")
            windows = [world.window(clip, 0) for clip in range(self.videos)]
        chunks = go_on_from(torch.stack(windows), self.stream(), FRAMES - 12,
                            VideoDraws(0, self.videos), **self.right)
        return torch.cat([chunk.float().cpu() for chunk in chunks], dim=1)

    # -- mistakes in training

    def trained(self, model: VideoDiT, count: int, **given) -> VideoDiT:
        """After `count` steps of stage tf by this device's recipe, with another number in it;
        as the steps left it, not averaged."""
        recipe = train.recipe_for("tf", self.device, **given)
        trainer = train.Trainer(model, recipe, make_world("shapes"), self.device)
        with fast_products():
            for _ in range(count):
                trainer.update(*trainer.batch(trainer.step))
        return frozen_copy(trainer.model)

    def too_short(self) -> Tensor:
        torch.manual_seed(0)
        model = self.trained(VideoDiT(self.model.config), 60, batch=4, steps=60)
        return self.make(self.stream(model), sampler=euler, steps=12)

    def too_fast(self) -> Tensor:
        """From the shipped weights, so that what is shown is what the rate destroyed."""
        model = self.trained(frozen_copy(self.model).requires_grad_(True), 16, batch=4,
                             lr_muon=0.02, lr_adamw=0.01, warmup=1)
        return self.make(self.stream(model), sampler=euler, steps=12)


class Failure(NamedTuple):
    symptom: str
    mistake: str
    cure: str
    make: Callable[[Studio], Tensor]


FAILURES = {
    "right": Failure(
        "as it should be", "the shipped model, 4 passes a chunk", "-", Studio.nothing),
    "static": Failure(
        "static: nothing moves, for a second",
        "one picture, repeated until it\nfills the first chunk",
        "give the picture alone: `--start picture.png`", Studio.repeated_picture),
    "blur": Failure(
        "blur at first, motion too slow", "1 pass a chunk instead of 4",
        "the sampler and passes of the stage: `flow.SAMPLERS`", Studio.one_pass),
    "torn": Failure(
        "torn shapes, glaring specks", "guidance 10",
        "`--guidance` from 1 to 3", Studio.guidance),
    "jumps": Failure(
        "each chunk has another colour and place", "no chunk is committed to the cache\n"
        "(the caption names a shape alone)",
        "one stream for the whole video, and its `commit` after each chunk", Studio.no_past),
    "drift": Failure(
        "colours drift, shapes melt", "frames are handed back in [0, 1]\n"
        "(the caption names a shape alone)",
        "frames in [-1, 1], everywhere", Studio.past_from_0_to_1),
    "stripes": Failure(
        "stripes and crosses", "frames are handed back as 0 to 255\n"
        "(the caption names a shape alone)",
        "frames in [-1, 1], everywhere", Studio.past_in_bytes),
    "streaks": Failure(
        "streaks that grow, and nothing one knows", "axes of an array misread: NHTWC\n"
        "for NTHWC (frames 0 to 11; then the\nmodel goes on from them)",
        "the axes as they are: `--layout NTHWC`", Studio.misread_axes),
    "noise": Failure(
        "noise and nothing else", "60 training steps of 4 clips",
        "train on; losses of good runs stand above", Studio.too_short),
    "dissolving": Failure(
        "shapes dissolve in noise", "Muon's rate 0.02 instead of 0.003, for\n"
        "16 steps from good weights",
        "the recipe's rates; go back to a checkpoint of before", Studio.too_fast),
}


# ---- figures and the picture -----------------------------------------------------------------

def judge(video: Tensor) -> dict[str, float]:
    """The figures above, of videos [B, F, 3, h, w]."""
    colour = colour_index(video)
    same = (colour == colour[:, :1]) & (colour >= 0)
    found = {"speed": speed(video).mean(), "alive": alive(video).float().mean(),
             "colour": same.float().mean(), "change": video.diff(dim=1).abs().mean()}
    return {name: round(value.item(), 3) for name, value in found.items()}


def picture_values(video: Tensor) -> np.ndarray:
    """A video [F, 3, h, w] as uint8 [F, h, w, 3]."""
    return to_pixels(video[None], zoom=1)


def strip(video: Tensor) -> Image.Image:
    """Some frames of a video [F, 3, h, w] side by side."""
    pixels = picture_values(video)
    side = ZOOM * pixels.shape[1]
    picture = Image.new("RGB", (len(SHOWN) * (side + GAP) - GAP, side), BACK)
    for place, frame in enumerate(SHOWN):
        one = Image.fromarray(pixels[frame]).resize((side, side), Image.Resampling.NEAREST)
        picture.paste(one, (place * (side + GAP), 0))
    return picture


def sheet(strips: dict[str, list[Image.Image]]) -> Image.Image:
    """Rows of strips, their words to the left, the numbers of the frames on top."""
    font = ImageFont.load_default(14)
    wide, tall = next(iter(strips.values()))[0].size
    rows = sum(len(pictures) for pictures in strips.values())
    height = 30 + rows * (tall + GAP) + 3 * GAP * len(strips)
    page = Image.new("RGB", (LABEL + wide + GAP, height), BACK)
    draw = ImageDraw.Draw(page)
    for place, frame in enumerate(SHOWN):
        left = LABEL + place * (wide + GAP) // len(SHOWN)
        draw.text((left, 8), f"frame {frame}" if place == 0 else f"{frame}", INK, font)
    top = 30
    for words, pictures in strips.items():
        draw.multiline_text((GAP, top), words, INK, font)
        for picture in pictures:
            page.paste(picture, (LABEL, top))
            top += tall + GAP
        top += 3 * GAP
    return page


def report(args: argparse.Namespace) -> None:
    check_bounds(args, videos=(4, 10_000))
    device = pick_device(args.device)
    content = provenance(device)       # now: a run must name the commit that it started from
    studio = Studio(args.checkpoint, args.videos, device)
    content |= {"checkpoint": args.checkpoint, "videos": args.videos, "frames": FRAMES,
                "failures": {}}
    strips = {}
    for name in args.only or FAILURES:
        failure = FAILURES[name]
        video = failure.make(studio).clamp(-1, 1)
        found = judge(video)
        content["failures"][name] = {
            "symptom": failure.symptom, "mistake": failure.mistake, "cure": failure.cure, **found}
        print(f"{name}: " + ", ".join(f"{what} {value}" for what, value in found.items()),
              flush=True)
        strips[f"{failure.symptom}\n{failure.mistake}"] = [strip(video[0]), strip(video[2])]
    args.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    note = PngInfo()
    note.add_text("drawn_by", stamp(content, sheet, strip))
    sheet(strips).save(args.out, pnginfo=note, optimize=True)
    print(f"wrote {args.out}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/toy.pt")
    parser.add_argument("--videos", type=int, default=4)
    parser.add_argument("--only", nargs="+", choices=list(FAILURES), help="default: all")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--out", type=Path, default=Path("results/failures.png"))
    run(report, parser.parse_args(argv))


if __name__ == "__main__":
    main()
