"""The pictures of experiments/memory.py: what is remembered, as curves, and as videos.

The figure is drawn narrow and in large type, because it is read on phones, too. Bands span the
seeds, from the least to the most. `python -m experiments.memory --only draw` draws both again.
"""

from pathlib import Path

from PIL import Image, ImageDraw

from experiments.pictures import BACK, DENSE, FAINT, GAP, INK, MLA, grid, text
from experiments.spectrum_figure import THIN, band
from experiments.stamp import stamp

COLOURS = {"mla": "#009e73", "dense": "#d55e00", "wide": "0.45"}
STYLES = {"mla": dict(marker="o", zorder=3), "dense": dict(marker="s"),
          "wide": dict(marker="^", linestyle="--")}
CHANCE = {"colour": 1 / 6, "shape": 1 / 3}
BARS = {"mla": MLA, "dense": DENSE}
FPS = 10


# ---- the figure -----------------------------------------------------------------------------

def name_of(facts: dict) -> str:
    attention = {"mla": "MLA", "dense": "dense"}[facts["attention"]]
    return f"{attention}, {facts['window']} frames: {facts['cache_bytes']:,} bytes"


def runs_of(found: dict, kind: str) -> list[dict]:
    return [run for run in found["runs"] if run["kind"] == kind]


def longest(found: dict) -> int:
    """Frames of the longest curtain."""
    curtains = found["runs"][0]["curtains"]
    return max(map(int, curtains))


def by_length(found: dict, kind: str, metric: str) -> list[list[float]]:
    """For each seed the share behind curtains of each length, when they first open."""
    seeds = []
    for run in runs_of(found, kind):
        firsts = [behind["openings"][0] for behind in run["curtains"].values()]
        seeds.append([first[metric] for first in firsts])
    return seeds


def by_opening(found: dict, kind: str, metric: str) -> list[list[float]]:
    """For each seed the share at each opening of the longest curtain. That of the shape is of
    the frames in which somebody is there."""
    seeds = []
    for run in runs_of(found, kind):
        openings = run["curtains"][str(longest(found))]["openings"]
        shares = [opening[metric] for opening in openings]
        if metric == "shape":
            shares = [opening["shape"] / max(opening["alive"], 1e-9) for opening in openings]
        seeds.append(shares)
    return seeds


def curves(axis, found: dict, metric: str, x: list[int], points) -> None:
    """A line for each kind and one for chance."""
    for kind, facts in found["kinds"].items():
        if seeds := points(found, kind, metric):
            band(axis, x, seeds, name_of(facts), COLOURS[kind], linewidth=2.2, **STYLES[kind])
    if metric in CHANCE:
        axis.axhline(CHANCE[metric], **THIN)
        axis.text(x[-1], CHANCE[metric] + 0.03, "chance", fontsize=11, ha="right")
    axis.set_ylim(0, 1.04)
    axis.set_xticks(x)


def draw_figure(found: dict, path: Path) -> None:
    """Above, behind curtains of each length; below, at each opening of the longest."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update({"font.size": 14})
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 9), sharey=True)
    curtain = longest(found)
    lengths = [int(length) for length in found["runs"][0]["curtains"]]
    openings = len(found["runs"][0]["curtains"][str(curtain)]["openings"])
    turns = list(range(1, openings + 1))
    end = found["kinds"]["dense"]["reach"] - 1.5           # between two lengths
    for axis, metric in zip(axes[0], ("colour", "shape")):
        axis.set_title(f"{metric} right")
        axis.axvline(end, color="0.88", linewidth=5, zorder=0)
        axis.set_xlabel("frames that the curtain stays closed")
        curves(axis, found, metric, lengths, by_length)
    titles = {"alive": "in view when it must be", "shape": "shape right, where in view"}
    for axis, metric in zip(axes[1], titles):
        axis.set_title(titles[metric])
        axis.set_xlabel(f"opening of a curtain of {curtain} frames")
        curves(axis, found, metric, turns, by_opening)
    words = "what is farther\nback cannot\nreach a window\nof 6 frames"
    axes[0][0].text(end + 0.7, 0.88, words, fontsize=11, va="top", color=COLOURS["dense"])
    handles = axes[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="lower center", frameon=False)
    figure.tight_layout(rect=(0, 0.125, 1, 1), h_pad=1.5)
    drawers = draw_figure, curves, by_length, by_opening, longest, runs_of, name_of
    figure.savefig(path, dpi=110, metadata={"drawn_by": stamp(found, *drawers)})
    pyplot.close(figure)


# ---- the videos -----------------------------------------------------------------------------

def panels(grids: dict, said: dict[str, str], found: dict, i: int) -> Image.Image:
    """Frame `i`: truth, dense and MLA side by side, each a grid of four videos; below, the bytes
    of a video's cache as a bar, to one scale, and what is said of it."""
    side = grids["truth"].shape[1]
    wide = side + 2 * GAP
    top = 34
    bars = top + side + 10
    most = max(found["kinds"][kind]["cache_bytes"] for kind in BARS)
    picture = Image.new("RGB", (3 * wide, bars + 70), BACK)
    draw = ImageDraw.Draw(picture)
    for n, (kind, frames) in enumerate(grids.items()):
        x = n * wide + GAP
        picture.paste(Image.fromarray(frames[i]), (x, top))
        if kind == "truth":
            text(draw, (x + side / 2, 6), kind, 22, anchor="ma")
            text(draw, (x, bars - 3), f"frame {i + 1}", 22)
            text(draw, (x, bars + 23), said[kind], 18, FAINT)
            continue
        name, nbytes = name_of(found["kinds"][kind]).split(": ")
        text(draw, (x + side / 2, 6), name, 22, anchor="ma")
        length = round(found["kinds"][kind]["cache_bytes"] / most * side)
        draw.rectangle((x, bars, x + length - 1, bars + 17), fill=BARS[kind])
        text(draw, (x, bars + 22), f"cache {nbytes}", 20)
        text(draw, (x, bars + 46), said[kind], 18, INK)
    return picture


def draw_gif(videos: dict, said: list[dict], found: dict, path: Path) -> None:
    """`videos` [4, F, 3, h, w] by kind, truth first; `said` what stands below each, by frame and
    kind."""
    grids = {kind: grid(video) for kind, video in videos.items()}
    drawn = [panels(grids, said[i], found, i) for i in range(len(said))]
    palette = side_by_side(drawn[::3]).quantize(255)       # one for all: nothing flickers
    pictures = []
    for picture in drawn:
        pictures.append(picture.quantize(palette=palette, dither=Image.Dither.NONE))
    comment = f"drawn_by {stamp(found, draw_gif, panels, side_by_side, name_of)}"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=1000 // FPS,
                     loop=0, optimize=True, disposal=1, comment=comment)


def side_by_side(pictures: list[Image.Image]) -> Image.Image:
    wide = pictures[0].width
    whole = Image.new("RGB", (wide * len(pictures), pictures[0].height))
    for i, picture in enumerate(pictures):
        whole.paste(picture, (i * wide, 0))
    return whole
