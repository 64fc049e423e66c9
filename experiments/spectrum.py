"""Is video attention low-rank, and does it matter? The paper's surprise in minutes, in a way
that could come out wrong.

    python -m experiments.spectrum             everything, 3 seeds (one H100: 5 minutes)
    python -m experiments.spectrum --quick     a smaller model (2 CPU cores: 4 minutes)
    python -m experiments.spectrum --redraw results/spectrum.json      an earlier run's figure again
    python -m experiments.spectrum --weights PATH      the paper's figure 1 for any file of weights

The paper (arXiv 2605.30351; its numbers are quoted as reported) finds that trained video
attention is *not* low-rank, cuts it to rank C = E / 8 all the same, and reports no loss (no
dense model of the same recipe stands beside it): the bottleneck, and not the spectrum, sets the
rank. experiments/verdicts.py holds its claims, and two
predictions of ours, each as a rule on intervals over 3 seeds. Rules and predictions were
committed before the first run (verdicts.py names the one exception).

What makes such numbers mean anything is chance. A matrix of noise of the shape of [W_K; W_V] (2
E x E) keeps 29 % of its energy in its best E / 8 directions and needs 93 % of all for 99 % of
it (Marchenko-Pastur). A product of two noise matrices at the paper's geometry uses 0.973 of its
budget, a noise matrix cut to C 0.988. So every measure stands beside its control. A second
optimiser stands beside Muon, which the repository trains with: Muon makes every update
orthogonal, that is of full rank by construction.

What toy scale cannot show: the spectrum of weights trained on real video for weeks, and whether
192 latents are enough for *that*.

Letters: E width, C latent width, N and V content and value channels per head, H heads. M =
[W_UK W_DKV; W_UV W_DKV] (rank.py).
"""

import argparse
import copy
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median

import torch

if not __package__:                    # started by its path
    sys.path.insert(0, str(Path(__file__).parent.parent))

from attention import MLA, attend_materialised
from engine.checkpoint import load_model
from engine.command_line import (UserError, as_user_error, check_bounds, pick_device, provenance,
                                 run)
from engine.judging import evaluate
from engine.progress import Progress
from engine.trainer import fast_products
from experiments import rank
from experiments.spectrum_figure import draw
from experiments.verdicts import OBJECTS, OPTIMISERS, breaking, judge
from flow import Draws, Stream, rollout
from metrics import centroid, colour_index, shape_index
from mla_video import PRESETS, Config, VideoDiT
from objectives import teacher_forcing_loss
from toy_data import CAPTION_SLOTS, WORDS, make_world
from train import Recipe, Trainer

SEEDS = (0, 1, 2)
# norm=False: a norm between W_DKV and W_UK (or behind W_K) is not linear. M would not be the
# whole story, and from_dense would not be exact.
TOY = replace(PRESETS["toy"], attention="dense", norm=False, words=len(WORDS),
              slots=CAPTION_SLOTS)
SMALL = replace(TOY, dim=64, heads=2, layers=2, ffn=256, frames=6, window=6, height=8, width=8)


@dataclass(frozen=True)
class Plan:
    """How much of everything. Captions are dropped from half the clips, since quality is judged
    without any: what a rollout keeps then, colour, shape and motion, it can only have from its
    own past, through the latents."""
    config: Config
    widths: tuple[int, ...]                                # C of the sweep, E / 8 among them
    dense_steps: int
    tune_steps: int
    object_steps: int
    batch: int
    rollouts: int
    frames: int
    lr: float                                              # of the matrices, either optimiser
    clips: int = 2048                                      # a pool, gone round and round
    held_out: int = 128
    euler: int = 8                                         # passes of a rollout's chunk

    @property
    def C(self) -> int:
        """The paper's proportion."""
        return self.config.dim // 8


FULL = Plan(TOY, (1, 2, 4, 8, 16, 32, 128), dense_steps=600, tune_steps=200, object_steps=200,
            batch=32, rollouts=512, frames=24, lr=1e-2)
QUICK = Plan(SMALL, (1, 4, 8, 16, 64), dense_steps=300, tune_steps=100, object_steps=100,
             batch=32, rollouts=64, frames=18, lr=2e-2, held_out=256)


# ---- what is trained -------------------------------------------------------------------------

class Pool:
    """Clips made once, dealt round and round. With more than one object: the pixelwise maximum
    of that many independent clips."""

    def __init__(self, clips: int, config: Config, seed: int, device, objects: int = 1,
                 captions: bool = True):
        world = make_world("shapes", config.frames, config.height, seed)
        videos = []
        for i in range(objects):
            video, caption = world.batch(range(i * clips, (i + 1) * clips))
            videos.append(video)
            if i == 0:
                self.caption = (caption * captions).to(device)
        self.video = torch.stack(videos).amax(0).to(device)

    def batch(self, indices):
        pick = torch.tensor([i % len(self.video) for i in indices])
        return self.video[pick], self.caption[pick]


def pools(plan: Plan, seed: int, device, **how) -> tuple[Pool, Pool]:
    """Clips to train on, and clips that no training has seen."""
    pool = Pool(plan.clips, plan.config, seed, device, **how)
    held = Pool(plan.held_out, plan.config, 10_000 + seed, device, **how)
    return pool, held


def use_adamw(trainer: Trainer, lr: float, device) -> None:
    """AdamW for the matrices, too. Everything else has it anyway, and is the last of the
    optimisers."""
    optimisers = trainer.learner.optimisers
    for i, muon in enumerate(optimisers[:-1]):
        matrices = muon.param_groups[0]["params"]
        optimisers[i] = torch.optim.AdamW(matrices, lr=lr, betas=(0.9, 0.95), weight_decay=0.01,
                                          capturable=device.type == "cuda")


def fit(model: VideoDiT, plan: Plan, optimiser: str, steps: int, world, seed: int, device,
        probe: Callable = lambda model: {}) -> tuple[VideoDiT, list[dict]]:
    """Train a copy of `model` by teacher forcing. Returns the averaged model, and the curve of
    probe(model) at steps 0, 1, 2, 5, 10, 20, ..., last."""
    recipe = Recipe(steps=steps, batch=plan.batch, lr_muon=plan.lr, lr_adamw=plan.lr / 2,
                    warmup=min(50, steps // 4), drop=0.5, seed=seed)
    trainer = Trainer(copy.deepcopy(model), recipe, world, device)
    if optimiser == "AdamW":
        use_adamw(trainer, plan.lr, device)
    due = {0, steps}
    for exponent in range(5):
        due |= {10**exponent, 2 * 10**exponent, 5 * 10**exponent}

    curve = []
    name = f"seed {seed % 100}, {model.config.attention} model with {optimiser}"
    with Progress(name, steps, passing=True) as progress:
        for step in range(steps + 1):
            if step in due:
                curve.append({"step": step, **probe(trainer.model)})
            if step < steps:
                trainer.update(*trainer.batch(trainer.step))
                progress.advance()
    trainer.read_losses()                                  # raises if it diverged
    trainer.close()
    return trainer.ema, curve


def tune(mla: VideoDiT, plan: Plan, optimiser: str, pool: Pool, seed: int,
         device) -> tuple[VideoDiT, list[dict]]:
    """Train a converted model on. Returns the averaged model and the curve of M's budget."""
    start = [rank.composite(block.attention) for block in mla.blocks]

    def used(model: VideoDiT) -> dict:
        layers = [block.attention for block in model.blocks]
        return rank.budget(layers, start)

    return fit(mla, plan, optimiser, plan.tune_steps, pool, seed + 100, device, used)


@torch.no_grad()
def convert(model: VideoDiT, C: int, init: str = "spectral") -> VideoDiT:
    """The dense model with every self-attention replaced by `MLA.from_dense`. Queries keep full
    width (Q = E), so that C and the narrow positional key are all that is approximated: C = E
    shows the second alone."""
    config = model.config
    model = copy.deepcopy(model).cpu()
    mla = VideoDiT(replace(config, attention="mla", latent=C, query_latent=config.dim))
    weights = model.state_dict()
    others = {name: weights[name] for name in weights if ".attention." not in name}
    mla.load_state_dict(others, strict=False)
    for new, old in zip(mla.blocks, model.blocks):
        new.attention = MLA.from_dense(old.attention, C, config.dim, config.rope, init)
    return mla.requires_grad_(True)


# ---- what is measured ------------------------------------------------------------------------

def share(hits: torch.Tensor) -> float:
    return hits.float().mean().item()


@torch.no_grad()
def last_chunk(model: VideoDiT, plan: Plan, held: Pool,
               draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
    """(made, true): the last chunk of held-out clips made from noise, without a caption, given
    its true past."""
    none = torch.zeros_like(held.caption)
    cache = model.make_cache(len(none))
    chunks = held.video.split(model.config.chunk, dim=1)
    for chunk in chunks[:-1]:
        model.commit(chunk, none, cache, attend_materialised)
    stream = Stream(model, none, cache, attend_materialised)
    made = next(rollout(stream, model.config.chunk, draws, steps=plan.euler))
    return made.float().cpu(), chunks[-1].cpu()


@torch.no_grad()
def quality(model: VideoDiT, plan: Plan, held: Pool, seed: int) -> dict:
    """All without captions.

    loss           held-out, with one draw of noise for all models of a seed
    colour, shape  of the last chunk given its true past: share of frames with the true one
    place          share of those frames with the subject within a pixel of its true place, which
                   only the past can tell
    survival       of long rollouts, whose past is the model's own
    """
    none = torch.zeros_like(held.caption)
    draws = Draws(torch.Generator(model.embed.weight.device).manual_seed(seed))
    loss, _, _ = teacher_forcing_loss(model, held.video, none, draws)
    made, true = last_chunk(model, plan, held, draws)
    distance = (centroid(made) - centroid(true)).norm(dim=-1)
    captions = torch.zeros(plan.rollouts, CAPTION_SLOTS, dtype=torch.long)
    stream_of = functools.partial(Stream, attend=attend_materialised)
    rollouts = evaluate(model, captions, plan.frames, seed, stream_of=stream_of, steps=plan.euler)
    return {
        "loss": loss.item(),
        "colour": share(colour_index(made) == colour_index(true)),
        "shape": share(shape_index(made) == shape_index(true)),
        "place": share(distance <= 1),
        "survival": rollouts["survival"],
    }


def mean_reconstruction(dense: VideoDiT, mla: VideoDiT, moments: list[torch.Tensor]) -> dict:
    """`rank.reconstruction`, mean over layers; `moments` are the covariances of their
    inputs."""
    layers = []
    for old, new, cov in zip(dense.blocks, mla.blocks, moments):
        layers.append(rank.reconstruction(old.attention, new.attention, cov))
    means = {}
    for key in layers[0]:
        means[key] = mean(layer[key] for layer in layers)
    return means


def sweep(dense: VideoDiT, plan: Plan, pool: Pool, held: Pool, seed: int, device,
          found: dict) -> list[dict]:
    """Conversion and quality at every C. Adds a seed's results to `found`, returns the curve of
    M's budget at C = E / 8."""
    dense.requires_grad_(True)
    as_long, _ = fit(dense, plan, "Muon", plan.tune_steps, pool, seed + 100, device)
    results = {
        "dense": quality(dense, plan, held, seed),
        "converted": {},
        "tuned": {},
        "dense_tuned": quality(as_long, plan, held, seed),
    }
    lost = {}
    ranks = {}
    curves = {}
    moments = rank.covariances(dense, held.video, held.caption)
    for C in plan.widths:
        mla = convert(dense, C)
        lost[C] = mean_reconstruction(dense, mla, moments)
        results["converted"][C] = quality(copy.deepcopy(mla).to(device), plan, held, seed)
        tuned, curves[C] = tune(mla, plan, "Muon", pool, seed, device)
        results["tuned"][C] = quality(tuned, plan, held, seed)
        ranks[C] = C * curves[C][-1]["rank99"]
    found["quality"].append(results)
    found["reconstruction"].append(lost)
    found["rank_by_width"].append(ranks)
    return curves[plan.C]


def latents(plan: Plan, seed: int, device) -> dict:
    """Effective rank of the latents of an MLA model trained from scratch on 1, 2 or 4 objects.
    C = E / 2: wide, so that the world and not the budget may set the rank."""
    torch.manual_seed(seed)
    E = plan.config.dim
    config = replace(plan.config, attention="mla", latent=E // 2, query_latent=E)
    model = VideoDiT(config).to(device)
    found = {"trained": {}, "untrained": {}, "noise": {}}
    for objects in OBJECTS:
        pool, held = pools(plan, seed, device, objects=objects, captions=False)
        trained, _ = fit(model, plan, "Muon", plan.object_steps, pool, seed, device)
        noise = torch.Generator().manual_seed(seed)
        static = torch.randn(held.video.shape, generator=noise).clamp(-1, 1).to(device)
        found["trained"][objects] = rank.latent_rank(trained, held.video, held.caption)
        found["untrained"][objects] = rank.latent_rank(model, held.video, held.caption)
        found["noise"][objects] = rank.latent_rank(trained, static, held.caption)
    return found


def chance(plan: Plan) -> dict:
    """What is known before anything is trained, and empty places for the rest."""
    config = plan.config
    E = config.dim
    C = plan.C
    height = 2 * E - config.heads * config.rope            # of M: H (N + V)
    noise = [rank.random_product(height, C, E, seed) for seed in range(20)]
    widths = {}
    for width in plan.widths:
        widths[width] = rank.energy_rank(rank.random_product(height, width, E, 0))
    return {
        "E": E,
        "C": C,
        "layers": config.layers,
        "widths": list(plan.widths),
        "chance_energy": rank.energy(rank.marchenko_pastur(E, 0.5)).tolist(),
        "chance_budget": {
            "rank99": [rank.energy_rank(s) / C for s in noise],
            "effective": [rank.effective_rank(s) / C for s in noise],
        },
        "chance_widths": widths,
        "spectra": {name: [] for name in ("untrained", *OPTIMISERS)},
        "reconstruction": [],
        "quality": [],
        "rank_by_width": [],
        "budget": {name: {"spectral": [], "random": []} for name in OPTIMISERS},
        "latents": [],
    }


def measure(plan: Plan, device, keep: Callable) -> None:
    """All of it, seed by seed: everything that `judge` and `draw` need, and nothing judged yet.
    `keep` is given what there is after each seed."""
    found = chance(plan)
    for seed in SEEDS:
        torch.manual_seed(seed)
        start = VideoDiT(plan.config)
        pool, held = pools(plan, seed, device)
        untrained = [rank.dense_spectrum(block.attention) for block in start.blocks]
        found["spectra"]["untrained"].append(untrained)
        for optimiser in OPTIMISERS:
            dense, _ = fit(start, plan, optimiser, plan.dense_steps, pool, seed, device)
            spectra = []
            for block, before in zip(dense.blocks, start.blocks):
                spectra.append(rank.dense_spectrum(block.attention, before.attention))
            found["spectra"][optimiser].append(spectra)
            if optimiser == "Muon":
                spectral = sweep(dense, plan, pool, held, seed, device, found)
            else:
                _, spectral = tune(convert(dense, plan.C), plan, optimiser, pool, seed, device)
            fresh = convert(dense, plan.C, "random")
            _, random = tune(fresh, plan, optimiser, pool, seed, device)
            found["budget"][optimiser]["spectral"].append(spectral)
            found["budget"][optimiser]["random"].append(random)
        found["latents"].append(latents(plan, seed, device))
        # Keys become strings, as they will be when it is read from its file.
        keep(json.loads(json.dumps(found)))


# ---- the command line ------------------------------------------------------------------------

def report(out: dict) -> None:
    """Verdicts as text: the claim, the rule, the intervals that decide, the control."""
    blank = 20 * " "
    for verdict in out["verdicts"]:
        print(f"\n{verdict['verdict'].upper():20} {verdict['claim']}")
        print(f"{blank} rule: {verdict['rule']}")
        for name, (middle, low, high) in verdict["intervals"].items():
            print(f"{blank} {name}: {middle:.3f} [{low:.3f}, {high:.3f}]")
        for need in verdict["unmet"]:
            print(f"{blank} not met: {need}")
        if verdict["control"]:
            print(f"{blank} control: {verdict['control']}")
        if verdict["noise"]:
            print(f"{blank} (noise, or no training, passes this rule: true, and no discovery)")
    widest = [f"{name} {width or 'none'}" for name, width in out["breaking"].items()]
    print("\nthe widest C that breaks it:", ", ".join(widest))


def main(argv: list[str] | None = None) -> None:
    """The command line; `argv` None takes the process' own. Exits with code 2 and one line on
    input it cannot use."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quick", action="store_true",
                        help="a smaller model and shorter training, for a CPU")
    parser.add_argument("--times", type=int, default=1, metavar="N",
                        help="train everything N times as long")
    parser.add_argument("--json", type=Path, help="where the results go (default: "
                        "results/spectrum.json, with --quick out/spectrum.json)")
    parser.add_argument("--figure", type=Path,
                        help="where the figure goes (default: beside the results, .png)")
    parser.add_argument("--redraw", type=Path, metavar="JSON",
                        help="judge and draw the results in this file; nothing is trained")
    parser.add_argument("--weights", type=Path, metavar="PATH",
                        help="the spectrum of this checkpoint, layer by layer (ours, or Wan's in "
                             ".safetensors); nothing is trained")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    run(of_weights if args.weights else spectrum, args)


def lengthened(plan: Plan, times: int) -> Plan:
    return replace(
        plan,
        dense_steps=times * plan.dense_steps,
        tune_steps=times * plan.tune_steps,
        object_steps=times * plan.object_steps,
    )


def measured(args, path: Path) -> dict:
    """Train and measure; after each seed `path` holds what there is. What the user can mend is
    refused before the minutes are spent."""
    check_bounds(args, times=(1, 1000))
    device = pick_device(args.device)
    plan = lengthened(QUICK if args.quick else FULL, args.times)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.open("a").close()                                 # what cannot be written raises now
    start = time.perf_counter()
    out = {
        **provenance(device),
        "seconds": 0,
        "verdicts": [],
        "breaking": {},
        "plan": asdict(plan),
        "seeds": SEEDS,
    }

    def keep(found: dict) -> None:                         # whatever stops the rest, this stays
        out["found"] = found
        out["seconds"] = round(time.perf_counter() - start, 1)
        path.write_text(json.dumps(out, indent=1) + "\n")
        done = len(found["latents"])
        print(f"{out['seconds']:5.0f} s  {done} of {len(SEEDS)} seeds measured", flush=True)

    with fast_products():                                  # as train.py
        measure(plan, device, keep)
    return out


def load_weights(path: Path) -> VideoDiT:
    if path.suffix == ".safetensors":
        from engine.wan import load_wan
        return load_wan(path)
    model, _ = load_model(path)
    return model


def of_weights(args) -> None:
    """Print the paper's figure 1 of a file of weights, beside noise of the same shape; with
    --json, write it."""
    start = time.perf_counter()
    model = load_weights(args.weights)
    E = model.config.dim
    rows = rank.of_weights(model)
    C = rows[0]["C"]
    noise = rank.marchenko_pastur(E, 0.5)
    if model.config.attention == "mla":
        layer = model.blocks[0].attention
        height = layer.W_UK.out_features + layer.W_UV.out_features
        noise = rank.random_product(height, C, E, 0)
    print(f"layer   99 % rank of {E}   energy in the best {C}")
    control = {"rank99": math.ceil(rank.energy_rank(noise)), "kept": rank.energy_kept(noise, C)}
    for name, row in [*enumerate(rows), ("noise", control)]:
        print(f"{name:>5}   {row['rank99']:14}   {row['kept']:.3f}")
    middle = median(row["kept"] for row in rows)
    print(f"median energy {middle:.3f} (the paper, at 192 of 1536: 0.458; it does not say whether "
          "energy is sigma or its square: here it is the square)")
    if args.json:
        out = {**provenance(torch.device("cpu")), "E": E, "C": C, "layers": rows,
               "noise": control, "median_kept": middle,
               "seconds": round(time.perf_counter() - start, 1)}
        args.json.write_text(json.dumps(out, indent=1) + "\n")


def spectrum(args) -> None:
    """Measure (or read), judge, write, draw."""
    default = "out/spectrum.json" if args.quick else "results/spectrum.json"
    path = args.redraw or args.json or Path(default)
    with as_user_error():                                  # a folder has no name to put .png behind
        figure = args.figure or path.with_suffix(".png")
    out = read(path) if args.redraw else measured(args, path)
    out["verdicts"] = judge(out["found"])
    out["breaking"] = breaking(out["found"])
    report(out)
    if not args.redraw:
        path.write_text(json.dumps(out, indent=1) + "\n")
    try:
        draw(out["found"], figure)
        print(f"wrote {figure}")
    except ModuleNotFoundError:                            # the JSON has the minutes' work
        print("no figure: matplotlib is not installed here. "
              f"Where it is, --redraw {path} draws it")


def read(path: Path) -> dict:
    """The results of an earlier run; UserError for a file of anything else."""
    try:
        out = json.loads(path.read_text())
        judge(out["found"])
        return out
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is no results file of this experiment ({type(error).__name__}: "
                         f"{error}); give one it wrote") from None


if __name__ == "__main__":
    main()
