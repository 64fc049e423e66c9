"""The README's two pictures, by command.

    python -m experiments.pictures hero     results/hero.gif: truth, dense and MLA side by
                                            side, cache bytes below; and hero.json
    python -m experiments.pictures cache    results/cache.png: a cached token, to scale

hero wants a dense model that was trained as checkpoints/toy.pt was: `python train.py
--stage all --attention dense --out out/dense`. Both models get the first frames of true clips
into their caches and go on from there, 40 times as long as the clips that they were trained on.
The world is deterministic, so the truth of every frame is known. But a model is told "slow" or
"fast" and not how fast, and makes small errors: after a while its subject is elsewhere, and
still has to be the same subject. Bytes are read from the caches' buffers.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

if not __package__:                    # started by its path
    sys.path.insert(0, str(Path(__file__).parent.parent))

from attention import crossing
from engine.checkpoint import load_model
from engine.command_line import UserError, provenance, run
from engine.video_files import GifWriter, to_pixels
from experiments.stamp import digest, stamp
from flow import SAMPLERS, Draws, Stream, rollout
from metrics import centroid, survival_report
from mla_video import PRESETS, VideoDiT
from toy_data import Shapes, decode_caption, make_world

# Hero: colours that GifWriter's palette has, on an opaque dark card, which suits light and dark
# pages.
BACK = (42, 42, 64)
INK = (255, 255, 255)
FAINT = (170, 170, 191)
DENSE = (255, 128, 64)
MLA = (85, 212, 128)
ZOOM = 6
GAP = 6
STRIDE = 2                     # every other frame ...
FPS = 20                       # ... at a speed one can follow


# ---- hero -----------------------------------------------------------------------------------

class Continued(NamedTuple):
    video: Tensor                          # [B, F, 3, h, w]
    held: list[int]                        # bytes of one video's cache after each frame
    forever: list[int]                     # those of a cache that evicts nothing
    given: int                             # how many frames at the beginning are true ones
    stage: str


def true_clips(frames: int, prompts=Shapes.prompts, seed: int = 10_000) -> tuple[Tensor, Tensor]:
    """(video [B, F, 3, h, w], captions [B, S]): the first clip with each caption.

    Of the clips that no training run draws.
    """
    _, captions = make_world("shapes", frames=1, seed=seed).batch(range(1000))
    said = [decode_caption(caption) for caption in captions]
    indices = [said.index(prompt) for prompt in prompts]
    return make_world("shapes", frames=frames, seed=seed).batch(indices)


@torch.no_grad()
def continued(path: Path, truth: Tensor, captions: Tensor, seed: int = 0) -> Continued:
    """A video as long as `truth`: true frames, as many as are cached, then the model's own."""
    model, about = load_model(path)
    stage = about.get("stage", "tf")
    if stage not in SAMPLERS or about.get("data") != "shapes":
        raise UserError(f"{path} must be a model of the shapes world that can stream, as "
                        "train.py's model.pt is")
    c = model.config
    stream = Stream(model, captions)
    cache = stream.cache
    given = cache.capacity // c.chunk * c.chunk
    made = truth.shape[1] - given
    if made < 1:
        raise UserError(f"--frames must be more than the {given} that are given")

    a_frame = cache.bytes_per_token * c.tokens * c.layers
    held = []
    for chunk in truth[:, :given].split(c.chunk, dim=1):
        stream.commit(chunk)
        held += [cache.filled * a_frame] * c.chunk
    draws = Draws(torch.Generator().manual_seed(seed))
    chunks = rollout(stream, made, draws, **SAMPLERS[stage])
    video = torch.cat([truth[:, :given], *chunks], dim=1)[:, :truth.shape[1]]
    held += [cache.nbytes // len(truth)] * made                        # full: all its buffers
    chunks_so_far = [i // c.chunk + 1 for i in range(len(held))]
    forever = [a_frame * c.chunk * chunks for chunks in chunks_so_far]
    return Continued(video, held, forever, given, stage)


# The stamp of results/hero.gif holds the text of these three. One of the two models that it was
# drawn from is not kept, so it cannot be drawn again, and the text must stay.

def grid(video) -> np.ndarray:
    """uint8 [F, h, w, 3]: the four videos of a batch, two above two, a grey line between."""
    top, bottom = to_pixels(video[:2], ZOOM), to_pixels(video[2:], ZOOM)
    return np.concatenate((top, np.full_like(top[:, :ZOOM], 128), bottom), axis=1)


def text(draw, at, words, size, colour=INK, anchor="la") -> None:
    draw.text(at, words, fill=colour, font=ImageFont.load_default(size), anchor=anchor)


def panels(videos: dict, held: dict, forever: dict, given: int, i: int) -> Image.Image:
    """Frame `i` of the picture: three grids, and cache bytes as bars under those that have one.

    Both bars are to one scale.
    """
    side = next(iter(videos.values())).shape[1]
    wide, top, bars = side + 2 * GAP, 34, 34 + side + 10
    picture = Image.new("RGB", (3 * wide, bars + 70), BACK)
    draw = ImageDraw.Draw(picture)
    for n, (name, frames) in enumerate(videos.items()):
        x = n * wide + GAP
        picture.paste(Image.fromarray(frames[i]), (x, top))
        text(draw, (x + side / 2, 6), name, 22, anchor="ma")
        if name not in held:
            text(draw, (x, bars - 3), f"frame {i + 1}", 22)
            text(draw, (x, bars + 23), "given to both" if i < given else "made by both", 18,
                 FAINT)
            continue
        share, colour = held[name][i] / max(map(max, held.values())), MLA if name == "MLA" else DENSE
        draw.rectangle((x, bars, x + side - 1, bars + 17), fill=(85, 85, 64))
        draw.rectangle((x, bars, x + max(2, round(share * side)) - 1, bars + 17),
                       fill=colour)
        text(draw, (x, bars + 22), f"cache {held[name][i]:,} bytes", 20)
        text(draw, (x, bars + 46), f"if all kept {forever[name][i]:,}", 18, FAINT)
    return picture


def first_apart(video, truth) -> list[int | None]:
    """For each video the first frame in which its subject is elsewhere, by a quarter of it."""
    away = (centroid(video) - centroid(truth)).norm(dim=-1) > 4                # [B, F]
    frames = []
    for video_away in away:
        found = video_away.nonzero().flatten().tolist()
        frames.append(found[0] if found else None)
    return frames


def hero(args) -> None:
    origin = provenance(torch.device("cpu"))
    truth, captions = true_clips(args.frames)
    videos = {"truth": truth}
    held = {}
    forever = {}
    report = {}
    for name, path in (("dense", args.dense), ("MLA", args.mla)):
        found = continued(Path(path), truth, captions, args.seed)
        videos[name] = found.video
        held[name] = found.held
        forever[name] = found.forever
        report[name] = {
            "stage": found.stage,
            "survival": survival_report(found.video, captions),
            "apart_after": first_apart(found.video, truth),
            "cache_bytes": found.held[-1],
            "unbounded_bytes": found.forever[-1],
            "checkpoint": digest(Path(path).read_bytes()),
        }
    grids = {name: grid(video) for name, video in videos.items()}
    palette = GifWriter(args.out).palette                  # fixed: nothing flickers
    pictures = []
    for i in range(0, args.frames, STRIDE):
        picture = panels(grids, held, forever, found.given, i)
        pictures.append(picture.quantize(palette=palette, dither=Image.Dither.NONE))
    save_gif(pictures, args.out, stamp(report, panels, text, grid))
    out = origin | {
        "captions": [decode_caption(caption) for caption in captions],
        "frames": args.frames,
        "given": found.given,
        "shown_every": STRIDE,
        "models": report,
    }
    args.out.with_suffix(".json").write_text(json.dumps(out, indent=1) + "\n")
    megabytes = args.out.stat().st_size / 1e6
    print(f"wrote {args.out}, {megabytes:.2f} MB; {json.dumps(report, indent=1)}")


def save_gif(pictures: list[Image.Image], path: Path, drawn_by: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # `optimize` keeps of each picture what differs from the one before: half the size.
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=1000 // FPS,
                     loop=0, optimize=True, disposal=1, comment=f"drawn_by {drawn_by}")


# ---- cache ----------------------------------------------------------------------------------

def layout() -> dict:
    """What the picture shows, from the caches that the paper's geometry allocates (in bf16).

    Not from a formula.
    """
    c = PRESETS["wan1.3b"]
    head = c.dim // c.heads
    shape = {
        "heads": c.heads,
        "head": head,
        "chunk": c.chunk * c.tokens,
        "crossing": round(crossing(head - c.rope, head, c.latent)),
        "bytes": {},
    }
    for kind in ("dense", "mla"):
        with torch.device("meta"):
            cache = VideoDiT(replace(c, attention=kind)).make_cache(1, torch.bfloat16)
        shape[kind] = [buffer.shape[-1] for buffer in cache.buffers]
        shape["bytes"][kind] = cache.bytes_per_token
    return shape


KEY = "#e8a33d"
VALUE = "#f0cf94"
QUERY = "#5b7fb8"
LATENT = "#2f8f5b"
ROPE = "#7a4fb5"
DARK = "#1c1c22"
QUIET = "#55555f"
CARD = "#f7f6f2"
LEFT = 66                      # where everything begins, in picture units
UNIT = 3                       # picture units that a cached number is wide
TALL = 22                      # height of a row of cached numbers


def row(axis, x, y, *parts, unit=UNIT, height=TALL) -> None:
    """A row of cached numbers from x on; a part is (how many, in which colour)."""
    from matplotlib.patches import Rectangle
    for numbers, colour in parts:
        width = numbers * unit
        look = dict(facecolor=colour, edgecolor=CARD, linewidth=1.5)
        axis.add_patch(Rectangle((x, y), width, height, **look))
        x += width


def say(axis, x, y, words, size, colour=DARK, **how) -> None:
    axis.text(x, y, words, fontsize=size, color=colour, va="top", linespacing=1.3, **how)


def arrow(axis, x, y) -> None:
    look = dict(arrowstyle="-|>,head_width=.5,head_length=.8", color=QUIET, linewidth=2.5)
    axis.annotate("", (x + 34, y), (x, y), arrowprops=look)


def dense_token(axis, y, shape) -> None:
    """A row for each head, its key and its value."""
    H = shape["heads"]
    d = shape["head"]
    say(axis, LEFT, y, f"Dense: a key and a value for each of {H} heads", 21)
    top = y + 40
    for h in range(H):
        row(axis, LEFT, top + h * TALL, (d, KEY), (d, VALUE))
    for h in (0, H - 1):
        axis.text(LEFT - 10, top + 11 + h * TALL, h + 1, fontsize=17, color=QUIET, ha="right",
                  va="center")
    for n, name, colour in ((0, "key", KEY), (1, "value", VALUE)):
        middle = LEFT + (n + 0.5) * d * UNIT
        label = dict(facecolor=colour, edgecolor="none", pad=5)
        axis.text(middle, top + H * TALL / 2, f"{name}: {d} numbers", fontsize=21, color=DARK,
                  ha="center", va="center", bbox=label)
    numbers = sum(shape["dense"])
    words = f"{numbers} numbers, {shape['bytes']['dense']} bytes"
    say(axis, LEFT, top + H * TALL + 12, words, 21, weight="bold")


def latent_token(axis, y, shape) -> None:
    """One row, the latent and the positional key."""
    C, R = shape["mla"]
    right = LEFT + (C + R) * UNIT
    say(axis, LEFT, y, "MLA: what these are made of, once for all heads", 21)
    row(axis, LEFT, y + 42, (C, LATENT), (R, ROPE))
    say(axis, LEFT, y + 70, f"latent c_kv: {C}", 20, LATENT, weight="bold")
    say(axis, right, y + 70, f"k_rope: {R}", 20, ROPE, weight="bold", ha="right")
    say(axis, LEFT, y + 102, "content: no position,\nnever touched again", 19, LATENT)
    say(axis, right, y + 102,
        "position: stored unrotated,\n"
        "turned when it is read, by its\n"
        "place (t, y, x) in the window", 19, ROPE, ha="right")
    mine = shape["bytes"]["mla"]
    saved = 100 * (1 - mine / shape["bytes"]["dense"])
    words = f"{C + R} numbers, {mine} bytes: {saved:.1f} % less"
    say(axis, LEFT, y + 214, words, 21, weight="bold")


def materialise(axis, x, y, shape) -> None:
    """The cached row, and the keys and values that are made of it."""
    H = shape["heads"]
    d = shape["head"]
    C, R = shape["mla"]
    say(axis, x, y, "materialise", 22, weight="bold")
    small = dict(unit=0.68)
    row(axis, x, y + 86, (C, LATENT), (R, ROPE), height=14, **small)
    arrow(axis, x + 158, y + 93)
    for h in range(H):
        parts = (d - R, KEY), (R, ROPE), (d, VALUE)
        row(axis, x + 200, y + 50 + h * 7.2, *parts, height=7.2, **small)
    say(axis, x, y + 172,
        f"W_UK and W_UV make {H}\n"
        "keys and values per token,\n"
        "used once and forgotten.\n"
        "Work per key: cheaper for\n"
        "many queries (a video chunk\n"
        f"has {shape['chunk']}).", 18.5)


def absorb(axis, x, y, shape) -> None:
    """The queries, lifted to the latent, above the cached row that they look at."""
    H = shape["heads"]
    d = shape["head"]
    C, R = shape["mla"]
    say(axis, x, y, "absorb", 22, weight="bold")
    small = dict(unit=0.68)
    for h in range(H):
        top = y + 50 + h * 7.2
        row(axis, x, top, (d - R, QUERY), (R, ROPE), height=7.2, **small)
        row(axis, x + 134, top, (C, QUERY), (R, ROPE), height=7.2, **small)
    arrow(axis, x + 94, y + 93)
    row(axis, x + 134, y + 144, (C, LATENT), (R, ROPE), height=14, **small)
    say(axis, x, y + 140, f"{H} queries", 15, QUIET)
    say(axis, x, y + 172,
        "W_UK$^T$ lifts the queries;\n"
        "all heads attend the cache\n"
        "itself; W_UV comes last.\n"
        "Work per query: cheaper\n"
        f"for fewer than {shape['crossing']} queries\n"
        "(text decodes 1).", 18.5)


def draw_cache(shape: dict, path: Path) -> None:
    """One page, narrow and large for a phone, on an opaque light card for dark mode."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure = pyplot.figure(figsize=(9, 12.25), facecolor=CARD)
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, 900), ylim=(1225, 0))
    axis.axis("off")
    say(axis, LEFT, 24, "One token in the cache of one layer", 27, weight="bold")
    dense_token(axis, 76, shape)
    y = 194 + shape["heads"] * TALL
    latent_token(axis, y, shape)
    axis.plot((LEFT, 834), (y + 274, y + 274), color="#c9c7bf", linewidth=2)
    say(axis, LEFT, y + 294, "Two ways to read it, one answer", 25, weight="bold")
    materialise(axis, LEFT, y + 358, shape)
    absorb(axis, LEFT + 410, y + 358, shape)
    drawers = draw_cache, dense_token, latent_token, materialise, absorb, row, say, arrow
    figure.savefig(path, dpi=100, metadata={"drawn_by": stamp(shape, *drawers)})
    pyplot.close(figure)


def cache(args) -> None:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw_cache(layout(), args.out)
    print(f"wrote {args.out}")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("what", choices=("hero", "cache"))
    add("--mla", default="checkpoints/toy.pt", help="hero: a checkpoint of latent attention")
    add("--dense", default="out/dense/model.pt", help="hero: a checkpoint of dense attention")
    add("--frames", type=int, default=480)
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="default: results/hero.gif or results/cache.png")
    args = parser.parse_args(argv)
    name = {"hero": "hero.gif", "cache": "cache.png"}[args.what]
    args.out = args.out or Path("results", name)
    run({"hero": hero, "cache": cache}[args.what], args)


if __name__ == "__main__":
    main()
