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
BARS = {"MLA": MLA, "dense": DENSE}
FPS = 8


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
    """For each seed the share at each opening of the longest curtain."""
    seeds = []
    for run in runs_of(found, kind):
        behind = run["curtains"][str(longest(found))]
        seeds.append([opening[metric] for opening in behind["openings"]])
    return seeds


def curves(axis, found: dict, metric: str, x: list[int], points) -> None:
    """A line for each kind and one for chance."""
    for kind, facts in found["kinds"].items():
        if seeds := points(found, kind, metric):
            band(axis, x, seeds, name_of(facts), COLOURS[kind], linewidth=2.2, **STYLES[kind])
    axis.axhline(CHANCE[metric], **THIN)
    axis.set_ylim(0, 1.04)
    axis.set_xticks(x)


def draw_figure(found: dict, path: Path) -> None:
    """Columns: colour, shape. Rows: behind curtains of each length; at each opening."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update({"font.size": 14})
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 8.6), sharey=True)
    curtain = longest(found)
    lengths = [int(length) for length in found["runs"][0]["curtains"]]
    openings = len(found["runs"][0]["curtains"][str(curtain)]["openings"])
    turns = list(range(1, openings + 1))
    end = found["kinds"]["dense"]["reach"] - 1.5           # between two lengths
    for metric, (above, below) in zip(CHANCE, axes.T):
        above.set_title(f"{metric} right")
        above.axvline(end, color="0.85", linewidth=5, zorder=0)
        above.set_xlabel("frames that the curtain stays closed")
        below.set_xlabel(f"opening, curtain of {curtain} frames")
        curves(above, found, metric, lengths, by_length)
        curves(below, found, metric, turns, by_opening)
    first = axes[0][0]
    words = "of what was\nmore frames ago\na window of 6\nknows nothing"
    first.text(end + 0.5, 0.9, words, fontsize=11, va="top", color=COLOURS["dense"])
    first.text(curtain, CHANCE["colour"] + 0.02, "chance", fontsize=11, ha="right")
    figure.legend(*first.get_legend_handles_labels(), loc="lower center", frameon=False)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    drawers = draw_figure, curves, by_length, by_opening, longest, runs_of, name_of
    figure.savefig(path, dpi=110, metadata={"drawn_by": stamp(found, *drawers)})
    pyplot.close(figure)


# ---- the videos -----------------------------------------------------------------------------

def panels(videos: dict, bytes_of: dict, said: list[str], i: int) -> Image.Image:
    """Frame `i`: truth, dense and MLA side by side, each a grid of four videos; below, the bytes
    of a video's cache as a bar, to one scale, and how many of the four are as before."""
    side = videos["truth"].shape[1]
    wide = side + 2 * GAP
    top = 34
    bars = top + side + 10
    picture = Image.new("RGB", (3 * wide, bars + 70), BACK)
    draw = ImageDraw.Draw(picture)
    for n, (name, frames) in enumerate(videos.items()):
        x = n * wide + GAP
        picture.paste(Image.fromarray(frames[i]), (x, top))
        text(draw, (x + side / 2, 6), name, 22, anchor="ma")
        if name not in bytes_of:
            text(draw, (x, bars - 3), f"frame {i + 1}", 22)
            text(draw, (x, bars + 23), said[i][name], 18, FAINT)
            continue
        share = bytes_of[name] / max(bytes_of.values())
        end = x + round(share * side) - 1
        draw.rectangle((x, bars, end, bars + 17), fill=BARS[name])
        text(draw, (x, bars + 22), f"cache {bytes_of[name]:,} bytes", 20)
        text(draw, (x, bars + 46), said[i][name], 18, INK)
    return picture


def draw_gif(videos: dict, bytes_of: dict, said: list[dict], found: dict, path: Path) -> None:
    """`videos` [4, F, 3, h, w] by name, truth first; `said` what stands below each, by frame and
    name."""
    grids = {name: grid(video) for name, video in videos.items()}
    drawn = [panels(grids, bytes_of, said, i) for i in range(len(said))]
    palette = side_by_side(drawn[::3]).quantize(255)       # one for all: nothing flickers
    pictures = []
    for picture in drawn:
        pictures.append(picture.quantize(palette=palette, dither=Image.Dither.NONE))
    comment = f"drawn_by {stamp(found, draw_gif, panels, side_by_side)}"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=1000 // FPS,
                     loop=0, optimize=True, disposal=1, comment=comment)


def side_by_side(pictures: list[Image.Image]) -> Image.Image:
    wide = pictures[0].width
    whole = Image.new("RGB", (wide * len(pictures), pictures[0].height))
    for i, picture in enumerate(pictures):
        whole.paste(picture, (i * wide, 0))
    return whole
