"""Streaming a model of Wan's shape: its captions are rows of a text encoder, and what it makes
are latents, into a file that grows with them.

    python sample.py --checkpoint self_forcing_dmd.pt --text embeddings.safetensors
        --out latents.safetensors --frames 120

The file that --text names holds `prompt_embeds` [S, width] or [B, S, width] and, for --guidance,
`negative_prompt_embeds`: diffusers' names for what its pipelines return. The file that is
written holds `latents` [F, B, channels, height, width], frames first, so that it can grow; for a
VAE of diffusers `latents.permute(1, 2, 0, 3, 4)` has its order of axes.

With --prompt and a folder of diffusers' parts (--parts) captions are encoded and videos decoded
here, too: engine/wan_video.py. Memory does not depend on the number of frames.
tests/test_wan.py.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.checkpoint import load_model
from engine.command_line import UserError
from engine.judging import cache_line
from engine.locks import lock
from engine.progress import Progress
from engine.routes import route_name
from engine.video_files import ENDINGS
from engine.wan import FREE, is_wan, load_wan, map_weights
from engine.wan_video import VideoOfLatents, encode
from flow import (FEW_SHIFT, FEW_STEPS, GuidedStream, Stream, VideoDraws, consistency, euler,
                  rollout)
from mla_video import VideoDiT

# How such models are sampled: distilled ones in 4 passes, as Self-Forcing; by Euler's steps, for
# one that was not distilled, in Wan's 50.
STEPS = {"consistency": FEW_STEPS, "euler": 50}
LATENTS = ".safetensors"

# Flags of sample.py that mean something for videos of pixels alone.
OF_PIXELS = ("start", "layout", "live", "evaluate", "pictures", "switch", "about")


def wanted(args: argparse.Namespace) -> bool:
    """Whether these flags of sample.py are about such a model."""
    return bool(args.text or args.parts or args.config) or is_wan(args.checkpoint)


def play(args: argparse.Namespace, device: torch.device,
         stream_of: Callable[..., Stream | GuidedStream]) -> None:
    """Load, stream, write, report: what sample.py does with such a model.
    `stream_of(model, captions, negative)` opens the stream."""
    check_flags(args)
    path = path_of(args)
    model, stage = open_model(args, device)
    captions, negative = captions_for(args, model)
    frames = args.frames if "frames" in args.given else model.config.frames
    how = sampling(args, stage)
    stream = stream_of(model, captions, negative)
    begin = time.perf_counter()
    with lock(path.parent, path.name):             # one process at a time writes a file
        writer = open_writer(path, args, device)
        chunks = rollout(stream, frames, VideoDraws(args.seed, len(captions)), **how)
        made = write(chunks, frames, writer)
    seconds = time.perf_counter() - begin
    route = route_name(model, len(captions), args.route)
    print(f"speed        {len(captions) * made / seconds:.2f} latent frames/s, everything "
          f"included ({len(captions)} at once, {device.type}, {how['steps']} steps a chunk, "
          f"route {route})")
    print(cache_line(model, len(captions)))
    print(f"wrote        {path}, {made} latent frames")


# ---- flags -----------------------------------------------------------------------------------

def add_flags(flag: Callable) -> None:
    """The flags of sample.py that are for such models alone."""
    flag("--text", metavar="FILE",
         help="for a model of Wan's shape: captions as rows of its text encoder, a .safetensors "
              "file with prompt_embeds and, for --guidance, negative_prompt_embeds")
    flag("--parts", metavar="FOLDER",
         help="for such a model: diffusers' folder of Wan2.1, whose text encoder reads --prompt "
              "and whose VAE decodes latents for an --out of .mp4")
    flag("--config", action="append", default=[], metavar="NAME=N",
         help="what released weights do not tell, e.g. window=9, sink=3; may be repeated")


def check_flags(args: argparse.Namespace) -> None:
    """UserError for flags that such a model has no use for."""
    strange = [name for name in OF_PIXELS if name in args.given]
    if strange:
        raise UserError(f"--{strange[0]} is for models of pixels; {args.checkpoint} makes "
                        "latents")
    if bool(args.text) == bool(args.prompt):
        raise UserError("a model of Wan's shape takes its captions from --text FILE, rows of its "
                        "text encoder, or from --prompt with --parts FOLDER")


def path_of(args: argparse.Namespace) -> Path:
    """Where --out says that it goes; UserError for an ending that is of no kind of file."""
    path = Path(args.out)
    if path.is_dir() or not path.suffix:
        return path / ("latents" + LATENTS)
    if path.suffix.lower() not in (LATENTS, *ENDINGS):
        raise UserError(f"--out {args.out} ends in {path.suffix}: give a name that ends in "
                        f"{LATENTS}, or in {', '.join(ENDINGS)} with --parts")
    if path.suffix.lower() != LATENTS and parts_folder(args) is None:
        raise UserError(f"--out {args.out} is a video, for which latents must be decoded: give "
                        f"--parts FOLDER with a VAE, or a name that ends in {LATENTS}")
    return path


def parts_folder(args: argparse.Namespace) -> Path | None:
    """Where text encoder and VAE are: --parts, or a checkpoint that is diffusers' whole
    folder."""
    if args.parts:
        return Path(args.parts)
    path = Path(args.checkpoint)
    return path if (path / "vae").is_dir() else None


def read_sizes(items: list[str]) -> dict[str, int]:
    """The NAME=N of --config; UserError for anything else."""
    sizes = {}
    for item in items:
        name, _, value = item.partition("=")
        if name not in FREE or not value.isdigit():
            raise UserError(f"--config takes NAME=N with one of {', '.join(FREE)}; got {item!r}")
        sizes[name] = int(value)
    return sizes


def sampling(args: argparse.Namespace, stage: str = "") -> dict:
    """How a chunk is sampled; levels are shifted as Self-Forcing's and Wan's, by 5. By default
    as a distilled model is, unless it is known to be of stage tf."""
    sampler = args.sampler or ("euler" if stage == "tf" else "consistency")
    function = {"euler": euler, "consistency": consistency}[sampler]
    return dict(sampler=partial(function, k=FEW_SHIFT), steps=args.steps or STEPS[sampler])


# ---- what goes in ----------------------------------------------------------------------------

def open_model(args: argparse.Namespace, device: torch.device) -> tuple[VideoDiT, str]:
    """The model of --checkpoint: released weights, or train.py's own that take rows; and the
    stage of training that it ended, "" if nobody says. On a GPU it runs in bfloat16, as its
    authors run it, elsewhere in the dtype of its file."""
    stage = ""
    sizes = read_sizes(args.config)
    if is_wan(args.checkpoint):
        model = load_wan(args.checkpoint, **sizes)
    elif sizes:
        raise UserError(f"--config says what released weights do not; {args.checkpoint} says "
                        "all sizes itself")
    else:
        model, about = load_model(args.checkpoint)
        stage = str(about.get("stage"))
    if not model.config.text:
        raise UserError(f"{args.checkpoint} takes words, not rows of a text encoder: "
                        "use --prompt alone")
    if model.config.attention == "homogeneous" and args.route in ("reference", "fused"):
        raise UserError(f"--route {args.route} is not for {args.checkpoint}, which was made of "
                        "released weights: use --route materialised or absorbed")
    if model.config.attention == "homogeneous" and args.cache != "float32":
        raise UserError(f"--cache {args.cache} would round the size of a row, by which values are "
                        f"divided: {args.checkpoint} takes --cache float32")
    if device.type == "cuda":
        return model.to(device, torch.bfloat16), stage
    return model.to(device), stage


def captions_for(args: argparse.Namespace, model: VideoDiT) -> tuple[Tensor, Tensor | None]:
    """Rows [B, slots, width] of the captions, and of the negative caption if there is one."""
    if args.text:
        captions, negative = read_rows(Path(args.text), model)
    else:
        captions, negative = encode(parts_folder(args), args.prompt, args.device)
        captions = padded(captions, model)
        negative = padded(negative, model)
    if args.guidance == 1:
        return captions, None
    if negative is None:
        raise UserError(f"--guidance needs negative_prompt_embeds in {args.text}: what it leads "
                        "away from")
    if len(negative) not in (1, len(captions)):
        raise UserError(f"{args.text} has {len(captions)} captions and {len(negative)} negative "
                        "ones: one for all, or as many")
    return captions, negative.expand_as(captions)


def read_rows(path: Path, model: VideoDiT) -> tuple[Tensor, Tensor | None]:
    """What the file of --text holds; UserError for anything else."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; --text names rows of the text encoder")
    found = map_weights(path)
    names = {"prompt_embeds", "negative_prompt_embeds"}
    if "prompt_embeds" not in found or not found.keys() <= names:
        raise UserError(f"{path} must hold prompt_embeds and may hold negative_prompt_embeds; "
                        f"it holds {', '.join(sorted(found))[:80] or 'nothing'}")
    for name, rows in found.items():
        fits = rows.dim() in (2, 3) and rows.shape[-1] == model.config.text and rows.numel() > 0
        if not (fits and rows.is_floating_point() and rows.isfinite().all()):
            raise UserError(f"{name} in {path} must be finite rows [S, {model.config.text}] or "
                            f"[B, S, {model.config.text}]; it is {rows.dtype} "
                            f"{list(rows.shape)}")
    ready = {name: padded(rows, model) for name, rows in found.items()}
    return ready["prompt_embeds"], ready.get("negative_prompt_embeds")


def padded(rows: Tensor, model: VideoDiT) -> Tensor:
    """Rows [S, width] or [B, S, width] -> [B, slots, width], zeros behind them: Wan's rule.
    UserError if there are more than slots."""
    if rows.dim() == 2:
        rows = rows[None]
    missing = model.config.slots - rows.shape[1]
    if missing < 0:
        raise UserError(f"a caption is at most {model.config.slots} rows; got {rows.shape[1]}")
    return F.pad(rows, (0, 0, 0, missing))


# ---- what comes out --------------------------------------------------------------------------

class LatentWriter:
    """A .safetensors file with one tensor, `latents` [F, B, channels, height, width], that is
    whole after every chunk.

    A header of fixed room comes first. New frames go to the end of the file, and then the
    header is written again in its place. So no number of frames must be known beforehand, and
    what stops the program between two chunks costs nothing.
    """

    ROOM = 248                                     # bytes of the header; 256 with its length
    KINDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}

    def __init__(self, path: Path):
        self.path = path
        self.frames = 0

    def append(self, chunk: Tensor) -> None:
        """Add a chunk [B, F, channels, height, width]; UserError if it is not finite."""
        if not chunk.isfinite().all():
            raise UserError("the model made numbers that are not finite, so this video ends "
                            "here: its weights or its dtype do not suit it")
        frames = chunk.transpose(0, 1).contiguous().cpu()  # [F, B, c, h, w]
        content = frames.view(torch.uint8).numpy().tobytes()
        self.frames += len(frames)
        header = self._header(frames)
        if self.frames == len(frames):
            self._begin(header + content)
            return
        with open(self.path, "r+b") as file:
            file.seek(0, 2)
            file.write(content)
            file.flush()
            file.seek(0)
            file.write(header)

    def close(self) -> None:
        """Nothing is left to do."""

    def _begin(self, content: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_name(self.path.name + ".part")
        scratch.write_bytes(content)
        scratch.replace(self.path)

    def _header(self, frames: Tensor) -> bytes:
        bytes_each = frames[0].nbytes
        shape = [self.frames, *frames.shape[1:]]
        tensor = {"dtype": self.KINDS[frames.dtype], "shape": shape,
                  "data_offsets": [0, self.frames * bytes_each]}
        text = json.dumps({"latents": tensor}).ljust(self.ROOM)    # the format allows spaces
        return self.ROOM.to_bytes(8, "little") + text.encode()


def open_writer(path: Path, args: argparse.Namespace,
                device: torch.device) -> LatentWriter | VideoOfLatents:
    """The writer for a path that `path_of` gave."""
    if path.suffix.lower() == LATENTS:
        return LatentWriter(path)
    return VideoOfLatents(path, parts_folder(args), device)


def write(chunks: Iterator[Tensor], frames: int, writer: LatentWriter | VideoOfLatents) -> int:
    """Write each chunk when it is made, `frames` latent frames in all, or what comes if 0.
    Returns how many were written."""
    made = 0
    try:
        with Progress("latent frames", frames) as progress:
            for chunk in chunks:
                if frames:
                    chunk = chunk[:, :frames - made]       # the last chunk may be too long
                writer.append(chunk)
                made += chunk.shape[1]
                progress.advance(chunk.shape[1])
    finally:
        writer.close()
    return made
