"""The figure of experiments/spectrum.py: six panels, one question each.

Controls are grey. Bands span the seeds, from the least to the most. It is drawn narrow and in
large type, because it is read on phones, too. `python -m experiments.spectrum --redraw
results/spectrum.json` draws it again.
"""

from pathlib import Path
from statistics import mean

import torch

from experiments.stamp import stamp
from experiments.verdicts import OBJECTS, reached

BLUE = "#0072b2"
ORANGE = "#d55e00"
GREEN = "#009e73"
PURPLE = "#a0489f"
GREY = "0.62"
THIN = {"color": "0.3", "linestyle": ":", "linewidth": 1.6}


def band(ax, x, runs: list[list[float]], label: str, color: str, **style) -> None:
    """The mean over seeds as a line, and the span from the least to the most behind it."""
    runs = torch.tensor(runs, dtype=torch.float64)         # [seeds, points]
    ax.plot(x, runs.mean(0), color=color, label=label, **style)
    ax.fill_between(x, runs.amin(0), runs.amax(0), color=color, alpha=0.2, linewidth=0)


def along_C(ax, found: dict) -> None:
    """The axis of latent widths, with a mark at the paper's proportion."""
    widths = found["widths"]
    ax.set_xscale("log", base=2)
    ax.set_xticks(widths, [str(width) for width in widths])
    ax.axvline(found["C"], color="0.88", linewidth=6, zorder=0)
    ax.set_xlabel(f"latent width C  (band: E / 8 = {found['C']})")


def per_width(found: dict, kind: str, key: str) -> list[list[float]]:
    """A metric at every C, a list a seed; kind "converted" or "tuned"."""
    runs = []
    for q in found["quality"]:
        runs.append([q[kind][str(width)][key] for width in found["widths"]])
    return runs


def lost(found: dict, key: str) -> list[list[float]]:
    """Percent of [K; V] that a cut loses at every C, a list a seed."""
    runs = []
    for run in found["reconstruction"]:
        runs.append([100 * run[str(width)][key] for width in found["widths"]])
    return runs


def mean_over_layers(layers: list[dict]) -> list[float]:
    columns = zip(*(layer["energy"] for layer in layers))
    return [mean(column) for column in columns]


# ---- the panels ------------------------------------------------------------------------------

def panel_weights(ax, found: dict) -> None:
    """Cumulative energy of the weights' directions: trained, untrained, and in theory."""
    E = found["E"]
    share = [100 * (i + 1) / E for i in range(E)]

    def kept(name: str) -> list[list[float]]:
        runs = [mean_over_layers(layers) for layers in found["spectra"][name]]
        return (100 * torch.tensor(runs).cumsum(1)).tolist()

    band(ax, share, kept("untrained"), "untrained", GREY, linewidth=6)
    band(ax, share, kept("AdamW"), "trained, AdamW", ORANGE)
    band(ax, share, kept("Muon"), "trained, Muon", BLUE)
    theory = 100 * torch.tensor(found["chance_energy"]).cumsum(0)
    ax.plot(share, theory, label="noise, in theory", **THIN)
    ax.plot(12.5, 46, marker="*", markersize=14, color="black", linestyle="none",
            label="paper: 46 % at E / 8")
    ax.set(title="1 Are trained weights low-rank?", xlim=(0, 100), ylim=(0, 101),
           xlabel="directions of [W_K; W_V] kept (% of E)", ylabel="energy kept (%)")
    ax.legend(loc="lower right")


def panel_cut(ax, found: dict) -> None:
    """What a cut to C loses, in weights and on data."""
    widths = found["widths"]
    measured = torch.tensor(lost(found, "measured")).mean(0)
    chance = torch.tensor(found["chance_energy"]).cumsum(0)
    noise = [100 * (1 - chance[width - 1]) for width in widths]

    band(ax, widths, lost(found, "predicted"), "weights: predicted", BLUE)
    ax.plot(widths, measured, "o", color=BLUE, markersize=8, label="weights: measured")
    band(ax, widths, lost(found, "data"), "data: this cut", ORANGE)
    band(ax, widths, lost(found, "data_best"), "data: best cut", GREEN)
    ax.plot(widths, noise, color=GREY, linewidth=6, zorder=0, label="noise weights")
    along_C(ax, found)
    ax.set(title="2 What does a cut to C lose?", ylabel="[K; V] lost (% of energy)",
           ylim=(0, 148), yticks=range(0, 101, 20))
    ax.legend(loc="upper right")


def panel_loss(ax, found: dict) -> None:
    """Held-out loss right after the cut, and after a short tuning."""
    widths = found["widths"]
    dense = []
    for q in found["quality"]:
        dense.append([q["dense_tuned"]["loss"]] * len(widths))
    band(ax, widths, dense, "dense, trained as long", GREY)
    band(ax, widths, per_width(found, "converted", "loss"), "right after the cut", ORANGE)
    band(ax, widths, per_width(found, "tuned", "loss"), "after a short tuning", BLUE)
    along_C(ax, found)
    ax.set(title="3 Does the quality go with it?", ylabel="held-out loss (mean squared error)")
    ax.set_ylim(bottom=0)
    ax.legend()


def panel_breaks(ax, found: dict) -> None:
    """How far tuned MLA is behind dense in each metric, at every C."""
    ax.axhline(0, color=GREY, label="dense, trained as long")
    for i, (name, color) in enumerate(zip(reached(found), (ORANGE, PURPLE, BLUE, GREEN))):
        dense = torch.tensor([[q["dense_tuned"][name]] for q in found["quality"]])
        mla = torch.tensor(per_width(found, "tuned", name))                # [seeds, widths]
        behind = 100 * (mla - dense)
        middle = behind.mean(0)
        bars = (middle - behind.amin(0), behind.amax(0) - middle)
        beside = 1.06 ** (i - 1.5)                         # or the bars would hide one another
        at = [width * beside for width in found["widths"]]
        ax.errorbar(at, middle, bars, color=color, marker="o", elinewidth=1.2, label=name)
    along_C(ax, found)
    ax.set(title="4 Which C breaks what?", ylabel="MLA - dense (% of frames)")
    ax.legend(loc="lower right")


def panel_budget(ax, found: dict) -> None:
    """How much of its budget M uses while it is tuned, from either start, with either
    optimiser."""
    for optimiser, color in (("Muon", BLUE), ("AdamW", ORANGE)):
        for init, style in (("spectral", "-"), ("random", "--")):
            curves = found["budget"][optimiser][init]
            steps = [point["step"] for point in curves[0]]
            runs = []
            for curve in curves:
                runs.append([100 * point["rank99"] for point in curve])
            band(ax, steps, runs, f"{init}, {optimiser}", color, linestyle=style)
    chance = found["chance_budget"]["rank99"]
    ax.axhspan(100 * min(chance), 100 * max(chance), label="product of noise", color=GREY,
               alpha=0.6, linewidth=0, zorder=0)
    ax.axhline(99, label="most there can be", **THIN)
    ax.set_xscale("symlog", linthresh=1)
    ax.set_xticks([0, 1, 10, 100], ["0", "1", "10", "100"])
    ax.set(title="5 Does M use its budget?", xlabel="step of tuning", xlim=(-0.2, None),
           ylabel=f"99 %-energy rank (% of C = {found['C']})", ylim=(80, 100),
           yticks=range(80, 101, 5))
    ax.legend()


def panel_objects(ax, found: dict) -> None:
    """Effective rank of the latents against the number of objects in the world."""
    def ranks(kind: str) -> list[list[float]]:
        runs = []
        for run in found["latents"]:
            runs.append([run[kind][str(objects)]["effective"] for objects in OBJECTS])
        return runs

    band(ax, OBJECTS, ranks("noise"), "trained, white noise", GREY, linestyle="--")
    band(ax, OBJECTS, ranks("untrained"), "untrained", GREY)
    band(ax, OBJECTS, ranks("trained"), "trained", BLUE, marker="o")
    first = mean(run[0] for run in ranks("trained"))       # with one object
    ax.plot(OBJECTS, [first * n for n in OBJECTS], label="as degrees of freedom", **THIN)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(OBJECTS, [str(n) for n in OBJECTS])
    ax.yaxis.set_major_formatter("{x:.0f}")
    ax.set(title="6 Do latents follow the world?", xlabel="objects in the world",
           ylabel="effective rank of latents", ylim=(first / 3, first * 6))
    ax.legend()


# ---- the figure ------------------------------------------------------------------------------

PANELS = (panel_weights, panel_cut, panel_loss, panel_breaks, panel_budget, panel_objects)
PARTS = (band, along_C, per_width, lost, mean_over_layers)


def draw(found: dict, path: Path) -> None:
    """Write the figure, stamped with the code that drew it and with what it shows
    (stamp.py)."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({
        "font.size": 13,
        "axes.titlesize": 14,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.linewidth": 2.4,
        "legend.frameon": False,
        "legend.fontsize": 11.5,
        "legend.handlelength": 1.4,
        "legend.labelspacing": 0.3,
    })
    figure, axes = pyplot.subplots(3, 2, figsize=(9, 12.5), layout="constrained")
    figure.get_layout_engine().set(hspace=0.06, wspace=0.04)
    for panel, ax in zip(PANELS, axes.flat):
        panel(ax, found)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"drawn_by": stamp(found, draw, *PANELS, *PARTS)})
    pyplot.close(figure)
