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
FPS = 8


# ---- the figure -----------------------------------------------------------------------------

def name_of(found: dict, kind: str) -> str:
    facts = found["kinds"][kind]
    attention = {"mla": "MLA", "dense": "dense"}[facts["attention"]]
    return f"{attention}, {facts['window']} frames: {facts['cache_bytes']:,} bytes"


def by_length(found: dict, kind: str, metric: str) -> tuple[list[int], list[list[float]]]:
    """(lengths of curtains, for each seed the share behind each of them)."""
    shares = []
    for run in found["runs"]:
        if run["kind"] == kind:
            curtains = run["curtains"]
            shares.append([behind["openings"][0][metric] for behind in curtains.values()])
    return [int(length) for length in curtains], shares


def by_opening(found: dict, kind: str, metric: str) -> tuple[list[int], list[list[float]]]:
    """(1, 2, ..., for each seed the share at each opening of the longest curtain)."""
    shares = []
    for run in found["runs"]:
        if run["kind"] == kind:
            *_, longest = run["curtains"].values()
            shares.append([opening[metric] for opening in longest["openings"]])
    return list(range(1, len(shares[0]) + 1)), shares


def draw_figure(found: dict, path: Path) -> None:
    """Columns: colour, shape. Rows: behind curtains of each length; at each opening."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update({"font.size": 14})
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 8.6), sharey=True)
    kinds = [kind for kind in found["kinds"] if any(run["kind"] == kind for run in found["runs"])]
    for row, points in zip(axes, (by_length, by_opening)):
        for axis, metric in zip(row, CHANCE):
            for kind in kinds:
                x, shares = points(found, kind, metric)
                band(axis, x, shares, name_of(found, kind), COLOURS[kind], linewidth=2.2,
                     **STYLES[kind])
            axis.axhline(CHANCE[metric], **THIN)
            axis.set_ylim(0, 1.04)
            axis.set_xticks(x)
    reach = found["kinds"]["dense"]["reach"]
    for axis, metric in zip(axes[0], CHANCE):
        axis.set_title(f"{metric} right")
        axis.axvline(reach - 1.5, color="0.85", linewidth=5, zorder=0)
        axis.set_xlabel("frames behind the curtain")
    for axis in axes[1]:
        axis.set_xlabel(f"opening, curtain of {x_longest(found)} frames")
    axes[0][0].text(reach - 0.9, 0.93, "no news passes\nfrom here on", fontsize=11, va="top",
                    color=COLOURS["dense"])
    axes[0][0].text(x_longest(found), CHANCE["colour"] + 0.02, "chance", fontsize=11, ha="right")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=1, frameon=False)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    functions = draw_figure, by_length, by_opening, name_of, x_longest
    figure.savefig(path, dpi=110, metadata={"drawn_by": stamp(found, *functions)})
    pyplot.close(figure)


def x_longest(found: dict) -> int:
    return max(map(int, found["runs"][0]["curtains"]))


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
        colour = MLA if name.startswith("MLA") else DENSE
        draw.rectangle((x, bars, x + round(share * side) - 1, bars + 17), fill=colour)
        text(draw, (x, bars + 22), f"cache {bytes_of[name]:,} bytes", 20)
        text(draw, (x, bars + 46), said[i][name], 18, INK)
    return picture


def draw_gif(videos: dict, bytes_of: dict, said: list[dict], found: dict, path: Path) -> None:
    """`videos` [4, F, 3, h, w] by name, truth first; `said` what stands below each, by frame and
    name."""
    grids = {name: grid(video) for name, video in videos.items()}
    drawn = [panels(grids, bytes_of, said, i) for i in range(len(said))]
    palette = side_by_side(drawn[::3]).quantize(255)       # one for all: nothing flickers
    pictures = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in drawn]
    comment = f"drawn_by {stamp(found, draw_gif, panels, side_by_side)}"
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=1000 // FPS,
                     loop=0, optimize=True, disposal=1, comment=comment)


def side_by_side(pictures: list[Image.Image]) -> Image.Image:
    wide = pictures[0].width
    whole = Image.new("RGB", (wide * len(pictures), pictures[0].height))
    for i, picture in enumerate(pictures):
        whole.paste(picture, (i * wide, 0))
    return whole
