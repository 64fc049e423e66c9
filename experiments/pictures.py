"""The README's two pictures, by command.

    python -m experiments.pictures hero     results/hero.gif: truth, dense and MLA side by side, cache bytes below (and hero.json)
    python -m experiments.pictures cache    results/cache.png: what is cached per token, to scale

hero wants a dense model that was trained as checkpoints/toy.pt was: `python train.py --stage all --attention dense --out out/dense`. Both get
the first frames of true clips into their caches and go on from there, 40 times as long as the clips that they were trained on. The world is
deterministic, so the truth of every frame is known. But a model is told "slow" or "fast" and not how fast, and makes small errors: after a
while its subject is elsewhere, and still has to be the same subject. Bytes are read from the caches' buffers.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from attention import crossing
from checkpoint import load_model
from experiments.stamp import digest, stamp
from mla_video import PRESETS, VideoDiT
from sample import PROMPTS, SAMPLERS, GifWriter, provenance, rollout, run, to_pixels
from toy_data import centroid, decode_caption, make_world, survival_report

# Hero: colours that GifWriter's palette has, on an opaque dark card, which suits light and dark pages.
BACK, INK, FAINT, DENSE, MLA = (42, 42, 64), (255, 255, 255), (170, 170, 191), (255, 128, 64), (85, 212, 128)
ZOOM, GAP = 6, 6
STRIDE, FPS = 2, 20                                        # every other frame, at a speed one can follow


# ---- hero -----------------------------------------------------------------------------------------------------------

def true_clips(frames: int, prompts=PROMPTS, seed: int = 10_000):
    """(video [B, F, 3, h, w], captions [B, slots]): of the clips no training run draws, the first with each caption."""
    captions = make_world("shapes", frames=1, seed=seed).batch(range(1000))[1]
    said = [decode_caption(caption) for caption in captions]
    return make_world("shapes", frames=frames, seed=seed).batch([said.index(prompt) for prompt in prompts])


@torch.no_grad()
def continued(path: Path, truth, captions, seed: int = 0):
    """A video as long as `truth`: the frames that the window holds beside a chunk, then what the model makes of them. Returns it, the
    bytes of one video's cache after each frame, those of a cache that evicts nothing, how many frames were given, facts about the model."""
    model, about = load_model(path)
    if about.get("stage", "tf") not in SAMPLERS or about.get("data") != "shapes":
        raise ValueError(f"{path} must be a model of the shapes world that can stream, as train.py's model.pt is")
    c, memory, frames = model.config, model.make_cache(len(truth)), truth.shape[1]
    given, per_frame, held = memory.slots // c.chunk * c.chunk, memory.bytes_per_token * c.tokens * c.layers, []
    for start in range(0, given, c.chunk):
        model.commit(truth[:, start:start + c.chunk], captions, memory)
        held += [memory.filled * per_frame] * c.chunk
    chunks = rollout(model, captions, frames - given, memory=memory, generator=torch.Generator().manual_seed(seed),
                     **SAMPLERS[about.get("stage", "tf")])
    video = torch.cat([truth[:, :given], *chunks], dim=1)[:, :frames]
    held += [memory.nbytes // len(truth)] * (frames - given)                           # full: all of its buffers
    return video, held, [per_frame * c.chunk * (i // c.chunk + 1) for i in range(frames)], given, about


def grid(video) -> np.ndarray:
    """uint8 [F, h, w, 3]: the four videos of a batch as two rows of two, a grey line between."""
    top, bottom = to_pixels(video[:2], ZOOM), to_pixels(video[2:], ZOOM)
    return np.concatenate((top, np.full_like(top[:, :ZOOM], 128), bottom), axis=1)


def text(draw, at, words, size, colour=INK, anchor="la") -> None:
    draw.text(at, words, fill=colour, font=ImageFont.load_default(size), anchor=anchor)


def panels(videos: dict, held: dict, forever: dict, given: int, i: int) -> Image.Image:
    """Frame `i` of the picture: three grids, a bar of cache bytes under those that have a cache, to one scale."""
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
            text(draw, (x, bars + 23), "given to both" if i < given else "made by both", 18, FAINT)
            continue
        share, colour = held[name][i] / max(map(max, held.values())), MLA if name == "MLA" else DENSE
        draw.rectangle((x, bars, x + side - 1, bars + 17), fill=(85, 85, 64))
        draw.rectangle((x, bars, x + max(2, round(share * side)) - 1, bars + 17), fill=colour)
        text(draw, (x, bars + 22), f"cache {held[name][i]:,} bytes", 20)
        text(draw, (x, bars + 46), f"if all kept {forever[name][i]:,}", 18, FAINT)
    return picture


def hero(args) -> None:
    origin = provenance(torch.device("cpu"))
    truth, captions = true_clips(args.frames)
    videos, held, forever, report = {"truth": truth}, {}, {}, {}
    for name, path in (("dense", args.dense), ("MLA", args.mla)):
        videos[name], held[name], forever[name], given, about = continued(Path(path), truth, captions, args.seed)
        away = (centroid(videos[name]) - centroid(truth)).norm(dim=-1) > 4             # a quarter of the frame
        apart = [int(row.int().argmax()) if row.any() else None for row in away]
        report[name] = {"stage": about.get("stage", "tf"), "survival": survival_report(videos[name], captions), "apart_after": apart,
                        "cache_bytes": held[name][-1], "unbounded_bytes": forever[name][-1], "checkpoint": digest(Path(path).read_bytes())}
    grids = {name: grid(video) for name, video in videos.items()}
    palette = GifWriter(args.out).palette                  # fixed: nothing flickers
    pictures = [panels(grids, held, forever, given, i).quantize(palette=palette, dither=Image.Dither.NONE)
                for i in range(0, args.frames, STRIDE)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    # `optimize` keeps of each picture what differs from the one before: half the size.
    pictures[0].save(args.out, save_all=True, append_images=pictures[1:], duration=1000 // FPS, loop=0, optimize=True, disposal=1,
                     comment=f"drawn_by {stamp(report, panels, text, grid, continued, true_clips)}")
    out = {**origin, "captions": [decode_caption(caption) for caption in captions], "frames": args.frames, "given": given,
           "shown_every": STRIDE, "models": report}
    args.out.with_suffix(".json").write_text(json.dumps(out, indent=1) + "\n")
    print(f"wrote {args.out}, {args.out.stat().st_size / 1e6:.2f} MB; {json.dumps(report, indent=1)}")


# ---- cache ----------------------------------------------------------------------------------------------------------

KEY, VALUE, QUERY, LATENT, ROPE, DARK, QUIET = "#e8a33d", "#f0cf94", "#5b7fb8", "#2f8f5b", "#7a4fb5", "#1c1c22", "#55555f"


def layout() -> dict:
    """What the picture shows, from the caches that the paper's geometry allocates (in bf16), not from a formula."""
    with torch.device("meta"):
        caches = {kind: VideoDiT(replace(PRESETS["wan1.3b"], attention=kind)).make_cache(1, torch.bfloat16) for kind in ("dense", "mla")}
    c = PRESETS["wan1.3b"]
    return {"heads": c.heads, "head": c.dim // c.heads, "chunk": c.chunk * c.tokens, "crossing": round(crossing(c.dim // c.heads - c.rope,
            c.dim // c.heads, c.latent)), **{kind: [buffer.shape[-1] for buffer in cache.buffers] for kind, cache in caches.items()},
            "bytes": {kind: cache.bytes_per_token for kind, cache in caches.items()}}


def draw_cache(shape: dict, path: Path) -> None:
    """One page, narrow and large for a phone, on an opaque light card for dark mode. 3 picture units are one cached number."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    H, d, (C, R) = shape["heads"], shape["head"], shape["mla"]
    figure = pyplot.figure(figsize=(9, 12.25), facecolor="#f7f6f2")
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, 900), ylim=(1225, 0))
    axis.axis("off")
    left, unit, tall = 66, 3, 22

    def row(x, y, *parts, scale=unit, height=tall):
        """A row of cached numbers: (how many, in which colour) ..."""
        for numbers, colour in parts:
            axis.add_patch(pyplot.Rectangle((x, y), numbers * scale, height, facecolor=colour, edgecolor="#f7f6f2", linewidth=1.5))
            x += numbers * scale

    def say(x, y, words, size=20, colour=DARK, **how):
        axis.text(x, y, words, fontsize=size, color=colour, va="top", linespacing=1.3, **how)

    def arrow(start, end, colour=QUIET):
        axis.annotate("", end, start, arrowprops=dict(arrowstyle="-|>,head_width=.5,head_length=.8", color=colour, linewidth=2.5))

    say(left, 24, "One token in the cache of one layer", 27, weight="bold")
    say(left, 76, f"Dense: a key and a value for each of {H} heads", 21)
    for h in range(H):
        row(left, 116 + h * tall, (d, KEY), (d, VALUE))
        if h in (0, H - 1):
            axis.text(left - 10, 127 + h * tall, h + 1, fontsize=17, color=QUIET, ha="right", va="center")
    for n, (name, colour) in enumerate((("key", KEY), ("value", VALUE))):
        axis.text(left + (n + 0.5) * d * unit, 116 + H * tall / 2, f"{name}: {d} numbers",
                  fontsize=21, color=DARK, ha="center", va="center", bbox=dict(facecolor=colour, edgecolor="none", pad=5))
    y = 116 + H * tall + 12
    say(left, y, f"{sum(shape['dense'])} numbers, {shape['bytes']['dense']} bytes", 21, weight="bold")

    y += 66
    say(left, y, "MLA: what these are made of, once for all heads", 21)
    row(left, y + 42, (C, LATENT), (R, ROPE))
    say(left, y + 70, f"latent c_kv: {C}", 20, LATENT, weight="bold")
    say(left + (C + R) * unit, y + 70, f"k_rope: {R}", 20, ROPE, weight="bold", ha="right")
    saved = 1 - shape["bytes"]["mla"] / shape["bytes"]["dense"]
    say(left, y + 102, "content: no position,\nnever touched again", 19, LATENT)
    say(left + (C + R) * unit, y + 102, "position: stored unrotated,\nturned when it is read, by its\nplace (t, y, x) in the window",
        19, ROPE, ha="right")
    say(left, y + 214, f"{C + R} numbers, {shape['bytes']['mla']} bytes: {100 * saved:.1f} % less", 21, weight="bold")

    y += 274
    axis.plot((left, 834), (y, y), color="#c9c7bf", linewidth=2)
    say(left, y + 20, "Two ways to read it, one answer", 25, weight="bold")
    y += 84
    for x, name, lines in ((left, "materialise", f"W_UK and W_UV make {H}\nkeys and values per token,\nused once and forgotten.\n"
                            f"Work per key: cheaper for\nmany queries (a video chunk\nhas {shape['chunk']})."),
                           (left + 410, "absorb", f"W_UK$^T$ lifts the queries;\nall heads attend the cache\nitself; W_UV comes last.\n"
                            f"Work per query: cheaper\nfor fewer than {shape['crossing']} queries\n(text decodes 1).")):
        say(x, y, name, 22, weight="bold")
        at, small, thin = y + 50, 0.68, 7.2
        if name == "materialise":
            row(x, at + 36, (C, LATENT), (R, ROPE), scale=small, height=14)
            arrow((x + 158, at + 43), (x + 192, at + 43))
            for h in range(H):
                row(x + 200, at + h * thin, (d - R, KEY), (R, ROPE), (d, VALUE), scale=small, height=thin)
        else:
            for h in range(H):
                row(x, at + h * thin, (d - R, QUERY), (R, ROPE), scale=small, height=thin)
                row(x + 134, at + h * thin, (C, QUERY), (R, ROPE), scale=small, height=thin)
            arrow((x + 94, at + 43), (x + 128, at + 43))
            row(x + 134, at + 94, (C, LATENT), (R, ROPE), scale=small, height=14)
            say(x, at + 90, f"{H} queries", 15, QUIET)
        say(x, at + 122, lines, 18.5)
    figure.savefig(path, dpi=100, metadata={"drawn_by": stamp(shape, draw_cache)})
    pyplot.close(figure)


def cache(args) -> None:
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw_cache(layout(), args.out)
    print(f"wrote {args.out}")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("what", choices=("hero", "cache"))
    parser.add_argument("--mla", default="checkpoints/toy.pt", help="hero: a checkpoint of latent attention")
    parser.add_argument("--dense", default="out/dense/model.pt", help="hero: a checkpoint of dense attention")
    parser.add_argument("--frames", type=int, default=480)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: results/hero.gif or results/cache.png")
    args = parser.parse_args(argv)
    args.out = args.out or Path("results", {"hero": "hero.gif", "cache": "cache.png"}[args.what])
    run({"hero": hero, "cache": cache}[args.what], args)


if __name__ == "__main__":
    main()
