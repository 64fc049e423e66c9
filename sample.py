"""Streaming generation: `rollout()` yields a video chunk by chunk, and the command line writes it to a GIF as it grows.

    python sample.py                                  plays checkpoints/toy.pt, 120 frames, four captions
    python sample.py --prompt "red disc" --frames 480 --route absorbed
    python sample.py --frames 0 --pictures            without end until Ctrl-C, a PNG file a frame
    python sample.py --checkpoint out/model.pt --evaluate 64        exact metrics over 64 rollouts

The flow-matching convention of the whole repository stands here, beside the sampler that relies on it (objectives.py
imports it for the losses, so that sign and direction of time cannot disagree):
    x_sigma = (1 - sigma) x0 + sigma eps            sigma = 0 clean, sigma = 1 noise                          (F1)
    v*      = d x_sigma / d sigma = eps - x0        what the network predicts                                 (F2)
    x_sigma' = x_sigma - (sigma - sigma') v         one Euler step towards the data                           (F3)
    x0      = x_sigma - sigma v                     the answer that v implies                                 (F4)
"""

import argparse
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import GifImagePlugin, Image
from torch import Tensor

from cache import RollingCache
from checkpoint import load_model
from compiled import CompiledChunk
from mla_video import ROUTES, VideoDiT
from toy_data import WORDS, decode_caption, encode_caption, make_world, survival_report

SHIFT = 3.0                                                # spends more of training and of sampling at high noise
FEW_STEPS, FEW_SHIFT = 4, 5.0                              # the few-step sampler of stages 2 and 3: its levels are the literature's
SAMPLERS = {"tf": dict(sampler="euler", steps=12), "cd": dict(sampler="consistency", steps=FEW_STEPS),
            "dmd": dict(sampler="consistency", steps=FEW_STEPS)}       # how a model of each stage is meant to be sampled
PROMPTS = ("slow red disc", "slow blue square", "fast green triangle", "fast yellow disc")


# ---- flow matching --------------------------------------------------------------------------------------------------

def shift(u, k: float = SHIFT):
    """S_k(u) = k u / (1 + (k - 1) u): a uniform u in [0, 1] becomes a noise level sigma that dwells near 1. Large latents
    need k = 5 (averaging many pixels sees through noise); for 16 x 16 pixels 3 is better."""
    return k * u / (1 + (k - 1) * u)


def add_noise(x0: Tensor, eps: Tensor, sigma: Tensor) -> Tensor:
    """(F1) for video [B, F, ...] with one sigma per frame [B, F]."""
    sigma = sigma[..., None, None, None]
    return (1 - sigma) * x0 + sigma * eps


@torch.no_grad()
def rollout(model: VideoDiT, caption: Tensor, frames: int, *, steps: int = 12, sampler: str = "euler", guidance: float = 1.0,
            route: str = "auto", switch: dict[int, Tensor] | None = None, exit: int | None = None, record: bool = False,
            memory: RollingCache | None = None, generator: torch.Generator | None = None, compile: bool | str = False,
            say=lambda line: None) -> Iterator[Tensor]:
    """Yield chunks [B, chunk, channels, height, width] in about [-1, 1] until `frames` frames are made, whole chunks (0: without end).

    Every chunk starts as noise, takes `steps` passes while it looks at the cache of its predecessors, and is then committed.
    Memory and time per chunk do not depend on how long the video already is.
      sampler   "euler" follows the flow, (F3). "consistency", for models after stage 2, jumps to the answer (F4) and goes back to the
                next level with *fresh* noise; its levels are S_5(1 - i / steps): for 4 steps 1, 0.9375, 0.8333, 0.625, kept as floats.
      guidance  w > 1 uses v(none) + w (v(caption) - v(none)), and the caption-free model needs *its own* cache: its past means
                something else (sharing one is a classic silent bug).
      switch    {frame: caption [B, slots]}: from the chunk that begins at or after `frame` on, another caption.
      exit      leave every chunk after pass `exit` with its answer (F4); `record` then records the gradient of that one pass.
                This is the rollout that stage 3 trains on, too (objectives.self_rollout).
      memory    go on with the video of this cache, and leave its end there: without guidance, which needs two, and without compiling,
                whose window is a copy.
      compile   True, or the name of a torch.compile backend: go over to a `CompiledChunk` once the window is full; until then shapes
                still grow, and passes run eagerly. `say` is told so.
    """
    if sampler not in ("euler", "consistency"):
        raise ValueError(f"sampler must be 'euler' or 'consistency', got {sampler!r}")
    if memory is not None and (guidance != 1 or compile):
        raise ValueError("memory is one plain cache: guidance needs a second past, and compiled chunks have a window of their own")
    c, device, few = model.config, model.embed.weight.device, sampler == "consistency"
    sigmas = [shift(1 - i / steps, FEW_SHIFT if few else SHIFT) for i in range(steps + 1)]     # 1 ... 0
    caption, none = caption.to(device), torch.zeros_like(caption, device=device)
    memory = model.make_cache(len(caption)) if memory is None else memory
    memory_none = model.make_cache(len(caption)) if guidance != 1 else None
    dtype, model_none, eager, switch = model.embed.weight.dtype, model, True, dict(sorted((switch or {}).items()))
    home = generator.device if generator is not None else device
    for made in itertools.count(0, c.chunk) if frames == 0 else range(0, frames, c.chunk):
        while switch and next(iter(switch)) <= made:
            caption = switch.pop(next(iter(switch))).to(device)
        if compile and eager and memory.filled == memory.slots:
            say(f"compiling   the window is full after {memory.seen} frames: one graph per pass from here on")
            eager, start, backend = False, time.perf_counter(), compile if isinstance(compile, str) else "inductor"
            if guidance != 1:
                model_none = CompiledChunk(model, memory_none, none, route, backend)
                memory_none = model_none.window
            model = CompiledChunk(model, memory, caption, route, backend)
            memory = model.window
            say(f"compiled    in {time.perf_counter() - start:.0f} s" + ", captured as a CUDA graph" * (device.type == "cuda"))
        shape = len(caption), c.chunk, c.channels, c.height, c.width

        def noise() -> Tensor:
            return torch.randn(shape, generator=generator, device=home).to(device, dtype)

        x = noise()
        for step, (now, then) in enumerate(zip(sigmas, sigmas[1:])):
            leave = step == exit
            with torch.set_grad_enabled(record and leave):
                sigma = x.new_full(shape[:2], now)
                v = model.denoise(x, sigma, caption, memory, route)
                if guidance != 1:
                    v_none = model_none.denoise(x, sigma, none, memory_none, route)
                    v = v_none + guidance * (v - v_none)
                if few or leave:
                    x = x - now * v                                                                           # (F4)
                else:
                    x = x - (now - then) * v                                                                  # (F3)
            if leave:
                break
            if few and then > 0:
                x = add_noise(x, noise(), x.new_full(shape[:2], then))                                        # (F1)
        model.commit(x, caption, memory, route)
        if guidance != 1:
            model_none.commit(x, none, memory_none, route)
        yield x


# ---- pictures -------------------------------------------------------------------------------------------------------

def to_pixels(chunk: Tensor, zoom: int = 8) -> np.ndarray:
    """uint8 [F, zoom * h, zoom * (B * (w + 1) - 1), 3]: the videos of a batch side by side, pixels blown up, a grey pixel between them."""
    pixels = ((chunk.float().clamp(-1, 1) + 1) * 127.5).round().byte().cpu().permute(1, 0, 3, 4, 2)   # [F, B, h, w, 3]
    pixels = pixels.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    pixels = torch.nn.functional.pad(pixels, (0, 0, 0, zoom), value=128)               # a grey gap right of each video
    return pixels.permute(0, 2, 1, 3, 4).flatten(2, 3)[:, :, :-zoom].expand(-1, -1, -1, 3).numpy()


class GifWriter:
    """A GIF that can be appended to and is a valid file at every moment, whatever stops the program. All frames share one fixed palette
    (7 x 7 x 5 levels), so that nothing written has to be looked at again: memory does not grow with the video."""

    def __init__(self, path: Path, fps: int = 16):
        self.path, self.fps, self.end = path, fps, 0
        levels = [(r, g, b) for r in range(7) for g in range(7) for b in range(5)]
        self.palette = Image.new("P", (1, 1))
        self.palette.putpalette([round(255 * value / top) for rgb in levels for value, top in zip(rgb, (6, 6, 4))])

    def append(self, frames: np.ndarray) -> None:
        """uint8 [F, h, w, 3]. The first call moves a whole file over an older one; what fails before leaves that as it was."""
        pictures = [Image.fromarray(frame).quantize(palette=self.palette, dither=Image.Dither.NONE) for frame in frames]
        duration = round(1000 / self.fps / 10) * 10        # GIF counts in hundredths of a second
        blocks = [block for picture in pictures
                  for block in GifImagePlugin.getdata(picture, duration=duration, include_color_table=False)]
        if self.end == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            header, scratch = GifImagePlugin.getheader(pictures[0], info={"loop": 0})[0], self.path.with_name(self.path.name + ".part")
            self.end = scratch.write_bytes(b"".join([*header, *blocks, b";"])) - 1
            scratch.replace(self.path)
            return
        # Readers stop at the trailer ";". So first all that belongs behind it, then one byte that turns it into the next frame.
        data = b"".join([*blocks, b";"])
        with open(self.path, "r+b", buffering=0) as file:
            file.seek(self.end + 1)
            if file.write(data[1:]) < len(data) - 1:
                raise OSError(f"the disk is full: {self.path} ends here")
            file.seek(self.end)
            file.write(data[:1])
        self.end += len(data) - 1


class PictureWriter:
    """The same as PNG files 000000000.png, 000000001.png, ...: each is whole from the moment on at which it has its name, and none is
    touched again. ValueError if the folder has pictures already: an older, longer video's would stay behind the new ones."""

    def __init__(self, path: Path):
        self.path, self.end = path, 0
        if any(path.glob("*.png")):
            raise ValueError(f"{path} has pictures already: choose another folder with --out, or empty it")

    def append(self, frames: np.ndarray) -> None:
        """uint8 [F, h, w, 3]."""
        self.path.mkdir(parents=True, exist_ok=True)
        scratch = self.path / "next.part"
        for frame in frames:
            Image.fromarray(frame).save(scratch, "PNG")
            scratch.replace(self.path / f"{self.end:09d}.png")
            self.end += 1


# ---- judging --------------------------------------------------------------------------------------------------------

def evaluate(model: VideoDiT, captions: Tensor, frames: int, seed: int, **how) -> dict[str, float]:
    """`toy_data.survival_report` over the end of one rollout per caption [B, slots]; `how` goes to `rollout`."""
    generator = torch.Generator().manual_seed(seed)
    video = torch.cat([chunk.float().cpu() for chunk in rollout(model, captions, frames, generator=generator, **how)], dim=1)
    return survival_report(video, captions)


def provenance(device: torch.device) -> dict[str, str]:
    """Where figures come from: command, commit, device, versions. Goes into every file of results/."""
    commit = os.environ.get("COMMIT", "")                  # first: a copied tree may lie inside another repository
    if not commit and shutil.which("git"):
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
        commit = git.stdout.strip()
    name = torch.cuda.get_device_name(device).replace("NVIDIA ", "").replace(" HBM3", "") if device.type == "cuda" else \
        f"{os.cpu_count()} CPU cores"
    spec = sys.modules["__main__"].__spec__                # set by `python -m`
    path, root = Path(sys.argv[0]).resolve(), Path(__file__).resolve().parent
    program = ["-m", spec.name] if spec else [str(path.relative_to(root) if path.is_relative_to(root) else path.name)]
    return {"command": " ".join(["python", *program, *sys.argv[1:]]), "commit": commit or "not in a git checkout",
            "device": name, "versions": f"torch {torch.__version__}, numpy {np.__version__}, Python {sys.version.split()[0]}"}


def main(argv: list[str] | None = None) -> None:
    """The command line; `argv` None takes the process' own. Exits with code 2 and one line on input it cannot use."""
    parser = argparse.ArgumentParser(description="Stream a video out of a trained model, into a GIF or PNG files that grow with it.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", default=str(Path(__file__).parent / "checkpoints/toy.pt"), help="a file written by train.py")
    parser.add_argument("--prompt", action="append", help='a caption such as "fast red disc"; given again, a second video; "48: blue square" '
                        "is no video of its own but changes the caption of the one before it at frame 48")
    parser.add_argument("--frames", type=int, default=120, help="frames to make; 0 streams until Ctrl-C")
    parser.add_argument("--sampler", choices=("euler", "consistency"), help="default: what the checkpoint's stage was trained for")
    parser.add_argument("--steps", type=int, help="passes per chunk; default: 12 after tf, 4 after cd and dmd")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance weight; 1 is off")
    parser.add_argument("--route", default="auto", choices=("auto", *ROUTES), help="how attention is computed; the answer is the same")
    parser.add_argument("--out", default="out", help="a folder (for sample.gif) or the name of a .gif")
    parser.add_argument("--pictures", action="store_true", help="write a PNG file for each frame, in the folder OUT/sample, instead of a GIF")
    parser.add_argument("--evaluate", type=int, default=0, metavar="N", help="print exact metrics over N rollouts instead of a GIF")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=None, help="one compiled graph per pass, once the "
                        "window is full; default: on a GPU yes, on a CPU no")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run(sample_from, parser.parse_args(argv))


def run(action, arguments) -> None:
    """Run a command line: what the user can mend is said in one line, exit code 2; Ctrl-C is no error, and SIGTERM is a Ctrl-C
    (exit code 128 + the signal's number, as shells count)."""
    def terminate(number, frame):
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        action(arguments)
    except (ValueError, OSError, ModuleNotFoundError, MemoryError, torch.OutOfMemoryError) as error:
        print("error:", *(str(error) or "out of memory").split(), file=sys.stderr)     # in one line, whatever names it quotes
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print("\nstopped", file=sys.stderr)
        sys.exit(128 + (stop.args[0] if stop.args else signal.SIGINT))
    finally:
        signal.signal(signal.SIGTERM, before)


def pick_device(name: str) -> torch.device:
    """A device that exists; ValueError in one line otherwise."""
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"no device {name!r} here: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"{name!r} is no device that this program runs on; give cpu, cuda, cuda:N or mps")
    return torch.device("cpu") if device.type == "cpu" else device


def sample_from(args) -> None:
    """Check the flags, load, stream, write, report. ValueError in one line for what the user can mend."""
    for name, low, top in (("frames", 0, 10**18), ("steps", 1, 1000), ("evaluate", 0, 10_000), ("seed", 0, 2**63 - 1),
                           ("guidance", -1000, 1000)):
        if (value := getattr(args, name)) is not None and not low <= value <= top:
            raise ValueError(f"--{name} must be at least {low} and at most {top}, got {value}")
    device = pick_device(args.device)
    model, about = load_model(args.checkpoint)
    model.to(device)
    if model.config.words < len(WORDS) or model.config.channels not in (1, 3):
        raise ValueError(f"{args.checkpoint} knows {model.config.words} words and makes frames of {model.config.channels} channels; "
                         f"captions have {len(WORDS)} words, and a GIF 1 or 3 channels")
    compile = device.type == "cuda" if args.compile is None else args.compile
    if (stage := about.get("stage", "tf")) not in SAMPLERS:
        raise ValueError(f"{args.checkpoint} is a {stage} model: it sees past and future at once, so it cannot stream; give one of "
                         + ", ".join(SAMPLERS))
    how = {**SAMPLERS[stage], **{name: value for name in ("sampler", "steps") if (value := getattr(args, name)) is not None},
           "guidance": args.guidance, "route": args.route, "compile": compile, "say": lambda line: print(line, file=sys.stderr)}
    data = about.get("data")
    if args.evaluate:
        if data != "shapes":
            raise ValueError(f"--evaluate needs a model of the shapes world, whose truth is known; this one saw {str(data)[:40]!r}")
        if args.frames < 12 or args.evaluate * args.frames > 2**20:
            raise ValueError(f"--evaluate judges the last 12 of --frames frames and keeps all: at least 12 frames, and at most "
                             f"{2**20 // args.evaluate} for {args.evaluate} rollouts; got {args.frames}")
        report_survival(model, args.evaluate, args.frames, args.seed, **how)
        return
    prompts = args.prompt or list(PROMPTS if data == "shapes" else [""] * 4)
    captions, switch = read_prompts(prompts)
    generator = torch.Generator().manual_seed(args.seed)
    if args.pictures and args.out.endswith(".gif"):
        raise ValueError(f"--pictures writes a folder of PNG files, and --out {args.out} names a GIF: give --out a folder")
    path = Path(args.out) if args.out.endswith(".gif") else Path(args.out) / ("sample" if args.pictures else "sample.gif")
    video, made, start = PictureWriter(path) if args.pictures else GifWriter(path), 0, time.perf_counter()
    try:
        for chunk in rollout(model, captions, args.frames, switch=switch, generator=generator, **how):
            video.append(to_pixels(chunk)[:max(args.frames - made, 0) or None])
            made += model.config.chunk
            print(f"\r{made} frames", end="", file=sys.stderr)
    finally:
        print(file=sys.stderr)
    seconds = time.perf_counter() - start
    for frame, now in {0: captions, **switch}.items():
        print(f"captions     {f'from {frame}: ' * bool(frame)}{', '.join(decode_caption(caption) or '(none)' for caption in now)}")
    print(f"speed        {len(captions) * made / seconds:.1f} frames/s, everything included ({len(captions)} videos at once, "
          f"{device.type}, {how['steps']} {how['sampler']} steps a chunk, route {full_route(model, len(captions), args.route)})")
    print(cache_line(model, len(captions)))
    print(f"wrote        {path}" + "/*.png" * args.pictures)


def read_prompts(prompts: list[str]) -> tuple[Tensor, dict[int, Tensor]]:
    """Captions [B, slots] of the prompts, one video each; and {frame: captions from there on} of those that begin with "FRAME:"."""
    captions, changes = [], []
    for prompt in prompts:
        frame, text = re.fullmatch(r"(?:\s*(\d+)\s*:)?(.*)", prompt, re.DOTALL).groups()
        if frame is None:
            captions.append(encode_caption(text))
        elif captions:
            changes.append((int(frame), len(captions) - 1, encode_caption(text)))
        else:
            raise ValueError(f"prompt {prompt!r} changes the caption of the video before it, and there is none: give a prompt without a "
                             "frame first")
    now, switch = torch.stack(captions), {}
    for frame, video, caption in sorted(changes, key=lambda change: change[0]):
        now = switch.setdefault(frame, now.clone())
        now[video] = caption
    return torch.stack(captions), switch


def cache_line(model: VideoDiT, batch: int) -> str:
    """Bytes of this model's cache, and of its dense twin's if it is not dense itself, both read from allocated buffers."""
    mine = model.make_cache(batch)
    if not mine.nbytes:
        return "cache        0 bytes: a chunk fills the window, nothing of the past is kept"
    line = f"cache        {mine.nbytes:,} bytes for {batch} video{'s' * (batch > 1)}, however long"
    if model.config.attention == "dense":
        return line
    with torch.device("meta"):
        dense = VideoDiT(replace(model.config, attention="dense")).make_cache(batch, mine.buffers[0].dtype)
    return line + f"; dense attention keeps {dense.nbytes:,} ({100 * (1 - mine.nbytes / dense.nbytes):.1f} % less)"


def full_route(model: VideoDiT, batch: int, route: str) -> str:
    """The route that runs once the window is full; "auto" is resolved as the layers resolve it."""
    c, layer = model.config, model.blocks[0].attention
    if c.attention == "dense" or route != "auto":
        return "dense" if c.attention == "dense" else route
    with torch.no_grad():
        x = model.embed.weight.new_empty(batch, c.chunk * c.tokens, c.dim)
        return f"auto: {layer.route_for(x, c.window * c.tokens)}"


def unseen_captions(number: int, seed: int) -> Tensor:
    """Captions [number, slots] of shapes clips that no training run with a seed below 10,000 draws."""
    return make_world("shapes", seed=10_000 + seed).batch(range(number))[1]


def report_survival(model: VideoDiT, rollouts: int, frames: int, seed: int, **how) -> dict[str, float]:
    """Print and return the exact metrics of `rollouts` videos with captions of unseen clips."""
    report = evaluate(model, unseen_captions(rollouts, seed), frames, seed, **how)
    print(f"{rollouts} rollouts of {frames} frames ({frames / model.config.frames:.0f}x the training clip), last 12 frames: "
          + ", ".join(f"{name} {100 * value:.0f} %" for name, value in report.items()))
    return report


if __name__ == "__main__":
    main()
