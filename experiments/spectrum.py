"""Is video attention low-rank, and does it matter? The paper's surprise in minutes, in a way that could come out wrong.

    python -m experiments.spectrum                         everything, 3 seeds (one H100: 5 minutes); what results/spectrum.json holds
    python -m experiments.spectrum --quick                 a smaller model, the same shapes (2 CPU cores: 4 minutes)
    python -m experiments.spectrum --redraw results/spectrum.json                      the figure again, from the figures of an earlier run

The paper (arXiv 2605.30351; its numbers are quoted as reported) finds that trained video attention is *not* low-rank, cuts it to rank
C = E / 8 all the same, and loses nothing: "the bottleneck, not the spectrum, sets the rank". `judge` holds its claims, and two
predictions of ours, each as a rule on intervals over 3 seeds; rules and predictions were committed before the first run (`judge` names
the one exception).

What makes such numbers mean anything is chance. A matrix of noise of the shape of [W_K; W_V] (2 E rows, E columns) keeps 29 % of its energy
in its best E / 8 directions and needs 93 % of all for 99 % of it (Marchenko-Pastur); a product of two noise matrices at the paper's
geometry uses 0.973 of its budget, a noise matrix cut to C 0.988. So every measure stands beside its control, and a second optimiser
beside Muon, which the repository trains with: Muon makes every update orthogonal, that is of full rank by construction.

What toy scale cannot show: the spectrum of weights trained on real video for weeks, and whether 192 latents are enough for *that*.

Letters: E width, C latent width, N, V nope and value channels per head, H heads. M = [W_UK W_DKV; W_UV W_DKV], [H (N + V), E].
"""

import argparse
import copy
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

import torch

from attention import MLA
from experiments.rank import (OBJECTS, OPTIMISERS, breaking, budget, composite, covariances, dense_spectrum, effective_rank,
                              energy, energy_rank, judge, latent_rank, marchenko_pastur, random_product, reached, reconstruction)
from experiments.stamp import stamp
from mla_video import PRESETS, Config, VideoDiT
from objectives import teacher_forcing_loss
from sample import evaluate, pick_device, provenance, rollout, run
from toy_data import CAPTION_SLOTS, WORDS, centroid, colour_index, make_world, shape_index
from trainer import Recipe, Trainer

SEEDS = (0, 1, 2)
# norm=False: a norm between W_DKV and W_UK (or behind W_K) is not linear, M would not be the whole story, from_dense would not be exact.
TOY = replace(PRESETS["toy"], attention="dense", norm=False, words=len(WORDS), slots=CAPTION_SLOTS)


@dataclass(frozen=True)
class Plan:
    """How much of everything. Captions are dropped from half the clips, since quality is judged without any: what a rollout keeps
    then, colour, shape and motion, it can only have from its own past, through the latents."""
    config: Config
    widths: tuple[int, ...]                                # C of the sweep; E / 8, the paper's proportion, must be among them
    dense_steps: int
    tune_steps: int
    object_steps: int
    batch: int
    rollouts: int
    frames: int
    lr: float                                              # of the matrices, either optimiser: Muon's update has AdamW's size
    clips: int = 2048                                      # a pool that training goes round and round
    held_out: int = 128
    euler: int = 8                                         # steps of a rollout's chunk

    @property
    def C(self) -> int:
        return self.config.dim // 8


FULL = Plan(TOY, (1, 2, 4, 8, 16, 32, 128), dense_steps=600, tune_steps=200, object_steps=200, batch=32, rollouts=512, frames=24, lr=1e-2)
QUICK = Plan(replace(TOY, dim=64, heads=2, layers=2, ffn=256, frames=6, window=6, height=8, width=8), (1, 4, 8, 16, 64),
             dense_steps=300, tune_steps=100, object_steps=100, batch=32, rollouts=64, frames=18, lr=2e-2, held_out=256)


# ---- what is trained ------------------------------------------------------------------------------------------------

class Pool:
    """Clips made once, dealt round and round. With more than one object: the pixelwise maximum of that many independent clips."""

    def __init__(self, clips: int, config: Config, seed: int, device, objects: int = 1, captions: bool = True):
        world = make_world("shapes", config.frames, config.height, seed)
        parts = [world.batch(range(i * clips, (i + 1) * clips)) for i in range(objects)]
        self.video = torch.stack([video for video, _ in parts]).amax(0).to(device)
        self.caption = (parts[0][1] * captions).to(device)

    def batch(self, indices):
        pick = torch.tensor([i % len(self.video) for i in indices])
        return self.video[pick], self.caption[pick]


def fit(model: VideoDiT, plan: Plan, optimiser: str, steps: int, world, seed: int, device, probe=None):
    """Train a copy of `model` by teacher forcing. Returns the averaged model, and probe(model) at steps 0, 1, 2, 5, 10, 20, ..., last."""
    recipe = Recipe(steps=steps, batch=plan.batch, lr_muon=plan.lr, lr_adamw=plan.lr / 2, warmup=min(50, steps // 4), drop=0.5, seed=seed)
    trainer = Trainer(copy.deepcopy(model), recipe, world, device)
    if optimiser == "AdamW":                               # for the matrices, too; everything else has it anyway
        optimisers = trainer.learner.optimisers
        optimisers[:-1] = [torch.optim.AdamW(muon.param_groups[0]["params"], lr=plan.lr, betas=(0.9, 0.95), weight_decay=0.01,
                                             capturable=device.type == "cuda") for muon in optimisers[:-1]]
    due = {0, steps} | {m * 10**e for e in range(5) for m in (1, 2, 5)}
    curve = []
    for step in range(steps + 1):
        if probe and step in due:
            curve.append({"step": step, **probe(trainer.model)})
        if step < steps:
            trainer.update(*trainer.batch(trainer.step))
    trainer.read_losses()                                  # raises if it diverged
    trainer.recorded.clear()                               # the recorded step refers to its trainer: on a GPU gigabytes would stay
    return trainer.ema, curve


@torch.no_grad()
def convert(model: VideoDiT, C: int, init: str = "spectral") -> VideoDiT:
    """The dense model with every self-attention replaced by `MLA.from_dense`. Queries keep full width (Q = E), so that C and the narrow
    positional key are all that is approximated: C = E shows the second alone."""
    c, model = model.config, copy.deepcopy(model).cpu()
    mla = VideoDiT(replace(c, attention="mla", latent=C, query_latent=c.dim))
    mla.load_state_dict({name: value for name, value in model.state_dict().items() if ".attention." not in name}, strict=False)
    for new, old in zip(mla.blocks, model.blocks):
        new.attention = MLA.from_dense(old.attention, C, c.dim, c.rope, init)
    return mla.requires_grad_(True)


# ---- what is measured -----------------------------------------------------------------------------------------------

@torch.no_grad()
def quality(model: VideoDiT, plan: Plan, held: Pool, seed: int) -> dict:
    """All without captions. Held-out loss (one draw of noise for all models of a seed); the last chunk of held-out clips, made from noise
    given their true past: share of frames with the true colour, the true shape, and the subject within a pixel of its true place,
    which only the past can tell; and `survival` of long rollouts, whose past is the model's own."""
    device, c, none = model.embed.weight.device, model.config, torch.zeros_like(held.caption)
    noise = torch.Generator(device).manual_seed(seed)
    found = {"loss": teacher_forcing_loss(model, held.video, none, Recipe(), noise)[0].item()}
    cache, chunks = model.make_cache(len(none)), held.video.split(c.chunk, dim=1)
    for chunk in chunks[:-1]:
        model.commit(chunk, none, cache, "materialised")
    made = next(rollout(model, none, c.chunk, steps=plan.euler, route="materialised", memory=cache, generator=noise)).float().cpu()
    true = chunks[-1].cpu()
    found["colour"], found["shape"] = ((index(made) == index(true)).float().mean().item() for index in (colour_index, shape_index))
    found["place"] = ((centroid(made) - centroid(true)).norm(dim=-1) <= 1).float().mean().item()
    none = torch.zeros(plan.rollouts, CAPTION_SLOTS, dtype=torch.long)
    return found | {"survival": evaluate(model, none, plan.frames, seed, steps=plan.euler, route="materialised")["survival"]}


def measure(plan: Plan, device, keep) -> None:
    """All of it, seed by seed: everything `judge` and `draw` need, and nothing judged yet. `keep` is given what there is after each."""
    c, C = plan.config, plan.C
    rows = c.dim - c.heads * c.rope + c.dim                # of M: H (N + V)
    noise = [random_product(rows, C, c.dim, seed) for seed in range(20)]
    found = {"E": c.dim, "C": C, "layers": c.layers, "widths": list(plan.widths),
             "chance_energy": energy(marchenko_pastur(c.dim, 0.5)).tolist(),
             "chance_budget": {"rank99": [energy_rank(s) / C for s in noise], "effective": [effective_rank(s) / C for s in noise]},
             "chance_widths": {width: energy_rank(random_product(rows, width, c.dim, 0)) for width in plan.widths},
             "spectra": {name: [] for name in ("untrained", *OPTIMISERS)}, "reconstruction": [], "quality": [], "rank_by_width": [],
             "budget": {optimiser: {"spectral": [], "random": []} for optimiser in OPTIMISERS}, "latents": []}

    def tune(mla, optimiser, pool, seed):                  # the averaged model and the curve of M's budget
        start = [composite(block.attention) for block in mla.blocks]
        return fit(mla, plan, optimiser, plan.tune_steps, pool, seed + 100, device,
                   lambda model: budget([block.attention for block in model.blocks], start))

    for seed in SEEDS:
        torch.manual_seed(seed)
        start = VideoDiT(c)
        pool, held = (Pool(clips, c, s, device) for clips, s in ((plan.clips, seed), (plan.held_out, 10_000 + seed)))
        found["spectra"]["untrained"].append([dense_spectrum(block.attention) for block in start.blocks])
        for optimiser in OPTIMISERS:
            dense, _ = fit(start, plan, optimiser, plan.dense_steps, pool, seed, device)
            found["spectra"][optimiser].append([dense_spectrum(a.attention, b.attention) for a, b in zip(dense.blocks, start.blocks)])
            if optimiser == "Muon":                        # the sweep: conversion and quality at every C
                q, lost, ranks = {"dense": quality(dense, plan, held, seed), "converted": {}, "tuned": {}}, {}, {}
                again = fit(dense.requires_grad_(True), plan, optimiser, plan.tune_steps, pool, seed + 100, device)[0]    # trained as long
                q["dense_tuned"] = quality(again, plan, held, seed)
                moments = covariances(dense, held.video, held.caption)
                for width in plan.widths:
                    mla = convert(dense, width)
                    layers = [reconstruction(old.attention, new.attention, cov) for old, new, cov in zip(dense.blocks, mla.blocks, moments)]
                    lost[width] = {key: mean(layer[key] for layer in layers) for key in layers[0]}
                    q["converted"][width] = quality(copy.deepcopy(mla).to(device), plan, held, seed)
                    tuned, curve = tune(mla, optimiser, pool, seed)
                    q["tuned"][width], ranks[width] = quality(tuned, plan, held, seed), width * curve[-1]["rank99"]
                    if width == C:
                        spectral = curve
                for name, row in (("quality", q), ("reconstruction", lost), ("rank_by_width", ranks)):
                    found[name].append(row)
            else:
                spectral = tune(convert(dense, C), optimiser, pool, seed)[1]
            found["budget"][optimiser]["spectral"].append(spectral)
            found["budget"][optimiser]["random"].append(tune(convert(dense, C, "random"), optimiser, pool, seed)[1])
        found["latents"].append(latents(plan, seed, device))
        keep(json.loads(json.dumps(found)))                # keys become strings, as they will be when it is read from its file


def latents(plan: Plan, seed: int, device) -> dict:
    """Effective rank of the latents of an MLA model trained from scratch on 1, 2 or 4 objects. C = E / 2: wide, so that the world and not
    the budget may set the rank."""
    torch.manual_seed(seed)
    model = VideoDiT(replace(plan.config, attention="mla", latent=plan.config.dim // 2, query_latent=plan.config.dim)).to(device)
    found = {"trained": {}, "untrained": {}, "noise": {}}
    for objects in OBJECTS:
        pool, held = (Pool(clips, plan.config, s, device, objects, captions=False)
                      for clips, s in ((plan.clips, seed), (plan.held_out, 10_000 + seed)))
        trained, _ = fit(model, plan, "Muon", plan.object_steps, pool, seed, device)
        static = torch.randn(held.video.shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1).to(device)
        for name, net, video in (("trained", trained, held.video), ("untrained", model, held.video), ("noise", trained, static)):
            found[name][objects] = latent_rank(net, video, held.caption)
    return found


# ---- the figure -----------------------------------------------------------------------------------------------------

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#a0489f", "0.62"


def draw(found: dict, path: Path) -> None:
    """Six panels, one question each, controls in grey; bands span the seeds. Drawn narrow and in large type: it is read on phones, too."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    pyplot.rcParams.update({"font.size": 13, "axes.titlesize": 14, "axes.titleweight": "bold", "axes.titlelocation": "left",
                            "lines.linewidth": 2.4, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
                            "legend.fontsize": 11.5, "legend.handlelength": 1.4, "legend.labelspacing": 0.3})
    figure, axes = pyplot.subplots(3, 2, figsize=(9, 12.5), layout="constrained")
    figure.get_layout_engine().set(hspace=0.06, wspace=0.04)
    E, C, widths, Q = found["E"], found["C"], found["widths"], found["quality"]
    ticks = [str(width) for width in widths]

    def line(ax, x, runs, label, color, **style):
        """The mean over seeds and the span from the least to the most."""
        runs = torch.tensor(runs, dtype=torch.float64)
        ax.plot(x, runs.mean(0), color=color, label=label, **style)
        ax.fill_between(x, runs.amin(0), runs.amax(0), color=color, alpha=0.2, linewidth=0)

    def along_C(ax):
        ax.set_xscale("log", base=2)
        ax.set_xticks(widths, ticks)
        ax.axvline(C, color="0.88", linewidth=6, zorder=0)
        ax.set_xlabel(f"latent width C  (band: E / 8 = {C})")

    ax, share = axes[0, 0], [100 * (i + 1) / E for i in range(E)]
    for name, color in (("untrained", GREY), ("AdamW", ORANGE), ("Muon", BLUE)):
        runs = [[mean(column) for column in zip(*(layer["energy"] for layer in layers))] for layers in found["spectra"][name]]
        wide = {"linewidth": 6} if name == "untrained" else {}
        line(ax, share, (100 * torch.tensor(runs).cumsum(1)).tolist(), f"trained, {name}" if not wide else name, color, **wide)
    thin = {"color": "0.3", "linestyle": ":", "linewidth": 1.6}
    ax.plot(share, 100 * torch.tensor(found["chance_energy"]).cumsum(0), label="noise, in theory", **thin)
    ax.plot(12.5, 46, marker="*", markersize=14, color="black", linestyle="none", label="paper: 46 % at E / 8")
    ax.set(title="1 Are trained weights low-rank?", xlabel="directions of [W_K; W_V] kept (% of E)", ylabel="energy kept (%)",
           xlim=(0, 100), ylim=(0, 101))
    ax.legend(loc="lower right")

    ax = axes[0, 1]
    lost = lambda key: [[100 * run[width][key] for width in ticks] for run in found["reconstruction"]]
    line(ax, widths, lost("predicted"), "weights: predicted", BLUE)
    ax.plot(widths, torch.tensor(lost("measured")).mean(0), "o", color=BLUE, markersize=8, label="weights: measured")
    line(ax, widths, lost("data"), "data: this cut", ORANGE)
    line(ax, widths, lost("data_best"), "data: best cut", GREEN)
    chance = torch.tensor(found["chance_energy"]).cumsum(0)
    ax.plot(widths, [100 * (1 - chance[width - 1]) for width in widths], color=GREY, linewidth=6, zorder=0, label="noise weights")
    along_C(ax)
    ax.set(title="2 What does a cut to C lose?", ylabel="[K; V] lost (% of energy)", ylim=(0, 148), yticks=range(0, 101, 20))
    ax.legend(loc="upper right")

    ax = axes[1, 0]
    value = lambda kind, key: [[q[kind][width][key] for width in ticks] for q in Q]
    line(ax, widths, [[q["dense_tuned"]["loss"]] * len(widths) for q in Q], "dense, trained as long", GREY)
    line(ax, widths, value("converted", "loss"), "right after the cut", ORANGE)
    line(ax, widths, value("tuned", "loss"), "after a short tuning", BLUE)
    along_C(ax)
    ax.set(title="3 Does the quality go with it?", ylabel="held-out loss (mean squared error)")
    ax.set_ylim(bottom=0)
    ax.legend()

    ax = axes[1, 1]
    ax.axhline(0, color=GREY, label="dense, trained as long")
    for i, (name, color) in enumerate(zip(reached(found), (ORANGE, PURPLE, BLUE, GREEN))):
        behind = 100 * torch.tensor([[q["tuned"][width][name] - q["dense_tuned"][name] for width in ticks] for q in Q])
        middle, at = behind.mean(0), [width * 1.06 ** (i - 1.5) for width in widths]   # side by side, or the bars hide one another
        ax.errorbar(at, middle, (middle - behind.amin(0), behind.amax(0) - middle), color=color, marker="o", elinewidth=1.2, label=name)
    along_C(ax)
    ax.set(title="4 Which C breaks what?", ylabel="MLA - dense (% of frames)")
    ax.legend(loc="lower right")

    ax = axes[2, 0]
    chance = found["chance_budget"]["rank99"]
    for optimiser, color in (("Muon", BLUE), ("AdamW", ORANGE)):
        for init, style in (("spectral", "-"), ("random", "--")):
            curves = found["budget"][optimiser][init]
            runs = [[100 * point["rank99"] for point in curve] for curve in curves]
            line(ax, [point["step"] for point in curves[0]], runs, f"{init}, {optimiser}", color, linestyle=style)
    ax.axhspan(100 * min(chance), 100 * max(chance), color=GREY, alpha=0.6, linewidth=0, zorder=0, label="product of noise")
    ax.axhline(99, label="most there can be", **thin)
    ax.set_xscale("symlog", linthresh=1)
    ax.set_xticks([0, 1, 10, 100], ["0", "1", "10", "100"])
    ax.set(title="5 Does M use its budget?", xlabel="step of tuning", ylabel=f"99 %-energy rank (% of C = {C})",
           xlim=(-0.2, None), ylim=(80, 100), yticks=range(80, 101, 5))
    ax.legend()

    ax, steps = axes[2, 1], [str(n) for n in OBJECTS]
    ranks = lambda kind: [[run[kind][n]["effective"] for n in steps] for run in found["latents"]]
    line(ax, OBJECTS, ranks("noise"), "trained, white noise", GREY, linestyle="--")
    line(ax, OBJECTS, ranks("untrained"), "untrained", GREY)
    line(ax, OBJECTS, ranks("trained"), "trained", BLUE, marker="o")
    first = mean(run["trained"]["1"]["effective"] for run in found["latents"])
    ax.plot(OBJECTS, [first * n for n in OBJECTS], label="as degrees of freedom", **thin)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    ax.set_xticks(OBJECTS, steps)
    ax.yaxis.set_major_formatter("{x:.0f}")
    ax.set(title="6 Do latents follow the world?", xlabel="objects in the world", ylabel="effective rank of latents",
           ylim=(first / 3, first * 6))
    ax.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"drawn_by": stamp(found, draw)})
    pyplot.close(figure)


# ---- the command line -----------------------------------------------------------------------------------------------

def report(out: dict) -> None:
    """Verdicts as text: the claim, the rule, the intervals that decide, the control."""
    for v in out["verdicts"]:
        print(f"\n{v['verdict'].upper():20} {v['claim']}\n{'':20} rule: {v['rule']}")
        for name, (middle, low, high) in v["intervals"].items():
            print(f"{'':20} {name}: {middle:.3f} [{low:.3f}, {high:.3f}]")
        for line in [f"not met: {need}" for need in v["unmet"]] + [f"control: {v['control']}"] * bool(v["control"]):
            print(f"{'':20} {line}")
        if v["noise"]:
            print(f"{'':20} (noise, or no training, passes this rule: true, and no discovery)")
    print("\nthe widest C that breaks it: " + ", ".join(f"{name} {width or 'none'}" for name, width in out["breaking"].items()))


def main(argv: list[str] | None = None) -> None:
    """The command line; `argv` None takes the process' own. Exits with code 2 and one line on input it cannot use."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model and shorter training, for a CPU")
    parser.add_argument("--times", type=int, default=1, metavar="N", help="train everything N times as long")
    parser.add_argument("--json", type=Path, help="where the results go (default: results/spectrum.json, with --quick out/spectrum.json)")
    parser.add_argument("--figure", type=Path, help="where the figure goes (default: beside the results, .png)")
    parser.add_argument("--redraw", type=Path, metavar="JSON", help="judge and draw the results in this file; nothing is trained")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run(spectrum, parser.parse_args(argv))


def spectrum(args) -> None:
    """Measure (or read), judge, write, draw. ValueError or OSError in one line for what the user can mend, before the minutes are spent."""
    path = args.redraw or args.json or Path("out/spectrum.json" if args.quick else "results/spectrum.json")
    figure = args.figure or path.with_suffix(".png")
    if args.redraw:
        out = read(path)
    else:
        if args.times < 1:
            raise ValueError(f"--times must be at least 1, got {args.times}")
        device, plan, start = pick_device(args.device), QUICK if args.quick else FULL, time.perf_counter()
        plan = replace(plan, **{name: args.times * getattr(plan, name) for name in ("dense_steps", "tune_steps", "object_steps")})
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()                             # a path that cannot be written raises now
        torch.set_float32_matmul_precision("medium")       # as train.py
        out = {**provenance(device), "seconds": 0, "verdicts": [], "breaking": {}, "plan": asdict(plan), "seeds": SEEDS}

        def keep(found):                                   # whatever stops the rest, what is measured stays
            out.update(found=found, seconds=round(time.perf_counter() - start, 1))
            path.write_text(json.dumps(out, indent=1) + "\n")
            print(f"{out['seconds']:5.0f} s  {len(found['latents'])} of {len(SEEDS)} seeds measured", flush=True)

        measure(plan, device, keep)
    out |= {"verdicts": judge(out["found"]), "breaking": breaking(out["found"])}
    report(out)
    if not args.redraw:
        path.write_text(json.dumps(out, indent=1) + "\n")
    try:
        draw(out["found"], figure)
        print(f"wrote {figure}")
    except ModuleNotFoundError:                            # minutes of work are in the JSON already: no reason to fail
        print(f"no figure: matplotlib is not installed here. Where it is, --redraw {path} draws it")


def read(path: Path) -> dict:
    """The results of an earlier run; ValueError in one line for a file of anything else."""
    try:
        out = json.loads(path.read_text())
        judge(out["found"])
        return out
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} is no results file of this experiment ({type(error).__name__}: {error}); give one it wrote") from None


if __name__ == "__main__":
    main()
