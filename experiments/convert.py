"""What a dense model loses when it becomes MLA: right after the cut, and after learning on.

    python -m experiments.convert --dense A/model.pt B/model.pt C/model.pt
    python -m experiments.convert --dense PATH --steps 0        the cut alone

The models are of `python train.py --attention dense`, one a seed; those of results/convert.json
are small, for a CPU, by --steps 600 --batch 8 and --config frames=6, window=6, height=12,
width=12, layers=3. Each is converted with several shared keys, of which one shall be the
default:

    mean        the mean of the heads' rope keys
    factors     the nearest key up to one complex factor a head and pair (attention.py, E4)
    weighed     factors, with keys and values cut where scores and outputs lose least
                (`weigh`)

at C = E, where the rank of the content costs nothing, and at C = E / 8, the paper's proportion;
by the weights alone and by the inputs of the layers (moments_of_weights, moments_on). After
that all learn on by teacher forcing, with the same clips and noise, at C = E / 8 by the inputs;
so does a model whose attention starts at random.

The rule was written down before either file of results, and not blindly: two smaller models
had been looked at, and it was changed from differences to ratios after them. Ratios are of the
same seed, intervals those of verdicts.py (Student's, 95 %) for their logarithms.
    1. "factors" replaces "mean" if at C = E / 8 by the inputs its error right after the cut is
       less (the interval of the ratio lies below 1), and its loss after learning on is not more
       (that interval does not lie above 1).
    2. "weighed" replaces "factors" by the same rule.
It said: "factors" is the default, and "weighed" is not worth its lines. (On toys by the GPU's
recipe, results/convert_toy.json, cut alone, "factors" was nearer for each of three seeds, and
the interval of the ratio reaches beyond 1.)

`error` is |v - v_dense| / |v_dense| of the velocities of held-out clips at training's noise
levels. `place` is the share of frames of a last chunk, made from noise given its true past and
no caption, with the subject within a pixel of its true place.
"""

import argparse
import copy
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

if not __package__:                    # started by its path
    sys.path.insert(0, str(Path(__file__).parent.parent))

from attention import MLA, Dense, fastest_channels, low_rank
from engine.checkpoint import load_model
from engine.command_line import UserError, check_bounds, pick_device, provenance, run
from engine.convert import convert, moments_of_weights, moments_on, roots
from engine.progress import Progress
from engine.trainer import fast_products
from experiments.spectrum import QUICK, Pool, last_chunk, share
from experiments.verdicts import interval
from flow import Draws
from metrics import centroid
from mla_video import Config, VideoDiT
from objectives import teacher_forcing_loss
from train import Recipe, Trainer

CLIPS = 64                             # held out; as many more tell the inputs of the layers
BATCH = 8


def by_the_mean(plain: Dense, C: int, Q: int, R: int) -> MLA:
    """`MLA.from_dense` with the mean of the heads' rope keys for a shared key."""
    mla = MLA.from_dense(plain, C, Q, R)
    H = plain.heads
    W_K = plain.W_K.weight.unflatten(0, (H, -1))               # [H, d, E]
    turning = fastest_channels(R, W_K.shape[1])
    up, _ = low_rank(plain.W_Q.weight, Q)
    up = up.unflatten(0, (H, -1))                              # [H, d, Q]
    mla.W_KR.weight.copy_(W_K[:, turning].mean(dim=0))
    mla.W_QR.weight.copy_(up[:, turning].flatten(0, 1))
    return mla


def by_who_asks(plain: Dense, C: int, Q: int, R: int) -> MLA:
    """`MLA.from_dense` after `weigh`."""
    plain = copy.deepcopy(plain)
    weigh(plain, R)
    return MLA.from_dense(plain, C, Q, R)


def weigh(dense: Dense, R: int) -> None:
    """In place, for a plain layer of white inputs: its outputs stay, and equal errors of its
    keys and values become equal errors of scores and outputs.

    An error e of a key costs q . e in a score, of mean square e^T E[q q^T] e, and an error e of
    a value costs W_O e. So keys become S k and values T v, with S S = E[q q^T] and T T = W_O^T
    W_O, head by head; queries become S^-1 q and W_O becomes W_O T^-1. A pair of channels that
    turns may only be multiplied by a number: there S is the root mean square of the query's.
    """
    H = dense.heads
    d = dense.W_Q.in_features // H
    turning = fastest_channels(R, d)
    content = [channel for channel in range(d) if channel not in turning]
    # Views: what is written here, the layer has.
    W_Q = dense.W_Q.weight.unflatten(0, (H, d))
    W_K = dense.W_K.weight.unflatten(0, (H, d))
    W_V = dense.W_V.weight.unflatten(0, (H, d))
    W_O = dense.W_O.weight.unflatten(1, (H, d))            # [E, H, d]
    for h in range(H):
        S, inverse = roots(W_Q[h, content] @ W_Q[h, content].T)
        W_K[h, content] = S @ W_K[h, content]
        W_Q[h, content] = inverse @ W_Q[h, content]

        pairs = W_Q[h, turning].square().sum(dim=1).unflatten(0, (-1, 2))
        size = pairs.mean(dim=1).clamp_min(1e-300).sqrt().repeat_interleave(2)[:, None]
        W_K[h, turning] = W_K[h, turning] * size
        W_Q[h, turning] = W_Q[h, turning] / size

        S, inverse = roots(W_O[:, h].T @ W_O[:, h])
        W_V[h] = S @ W_V[h]
        W_O[:, h] = W_O[:, h] @ inverse


KEYS = {"mean": by_the_mean, "factors": MLA.from_dense, "weighed": by_who_asks}


# ---- what is measured ------------------------------------------------------------------------

class Kept:
    """A model that keeps the velocities that it said."""

    def __init__(self, model: VideoDiT):
        self.model = model
        self.config = model.config

    def __call__(self, *inputs) -> Tensor:
        self.v = self.model(*inputs)
        return self.v


@torch.no_grad()
def measured(model: VideoDiT, held: Pool, true: Tensor | None = None) -> tuple[dict, Tensor]:
    """({loss, error, place}, velocities) on held-out clips; `error` against the velocities
    `true` of the dense model, with the same noise."""
    device = held.video.device
    kept = Kept(model.to(device).eval())
    draws = Draws(torch.Generator(device).manual_seed(0))
    loss, _, _ = teacher_forcing_loss(kept, held.video, held.caption, draws, drop=0.0)
    made, there = last_chunk(model, QUICK, held, draws)
    distance = (centroid(made) - centroid(there)).norm(dim=-1)
    found = {"loss": loss.item(), "place": share(distance <= 1)}
    if true is not None:
        error = (kept.v - true).norm() / true.norm()
        found["error"] = error.item()
    return found, kept.v


def learn_on(model: VideoDiT, steps: int, seed: int, device, name: str) -> VideoDiT:
    """The averaged model after so many steps of teacher forcing, at a third of the recipe's
    rates: the same clips and noise whatever the model."""
    recipe = Recipe(steps=steps, batch=BATCH, lr_muon=1e-3, lr_adamw=5e-4,
                    warmup=min(20, steps // 4), seed=seed)
    config = model.config
    pool = Pool(BATCH * steps, config, 20_000 + seed, device)
    trainer = Trainer(model.requires_grad_(True), recipe, pool, device)
    with Progress(name, steps, passing=True) as progress:
        for step in range(steps):
            trainer.update(*pool.batch(range(step * BATCH, (step + 1) * BATCH)))
            progress.advance()
    trainer.read_losses()                                  # raises if it diverged
    trainer.close()
    return trainer.ema


def narrow(config: Config, C: int) -> Config:
    """The MLA config of width C. Queries keep the paper's proportion, E / 2."""
    return replace(config, attention="mla", latent=C, query_latent=config.dim // 2)


def random_start(dense: VideoDiT, config: Config, seed: int) -> VideoDiT:
    """MLA with fresh attention, everything else the dense model's."""
    torch.manual_seed(seed)
    model = VideoDiT(config)
    weights = dense.state_dict()
    others = {name: weights[name] for name in weights if ".attention." not in name}
    model.load_state_dict(others, strict=False)
    return model


def measure(dense: VideoDiT, seed: int, steps: int, device) -> dict:
    """Everything about one dense model."""
    config = dense.config
    clips = Pool(CLIPS, config, seed, torch.device("cpu"))
    held = Pool(CLIPS, config, 10_000 + seed, device)
    inputs = {
        "weights": moments_of_weights(dense),
        "data": moments_on(dense, clips.video, clips.caption),
    }
    found = {"cut": {}, "tuned": {}}
    widths = {"E": config.dim, "E/8": config.dim // 8}
    starts = {}
    found["dense"], true = measured(dense, held)
    dense = dense.cpu()
    for by, moments in inputs.items():
        for width, C in widths.items():
            for key, make in KEYS.items():
                mla = convert(dense, narrow(config, C), moments, make=make)
                found["cut"][f"{width}, {by}, {key}"], _ = measured(mla, held, true)
                if width == "E/8" and by == "data":
                    starts[key] = mla
    if steps:
        starts["random"] = random_start(dense, narrow(config, config.dim // 8), seed)
        starts["dense"] = dense
    for name, start in starts.items():
        if steps:
            tuned = learn_on(start, steps, seed, device, f"seed {seed}, {name}")
            found["tuned"][name], _ = measured(tuned, held, true)
    return found


# ---- the verdict -----------------------------------------------------------------------------

def log_ratios(found: list[dict], new: str, old: str) -> dict[str, list[float]]:
    """log new / old, one value a model: of the error after the cut, and of the loss after
    learning on, both at C = E / 8 by the inputs."""
    ratios = {"error after the cut": [], "loss after learning on": []}
    errors, losses = ratios.values()
    for one in found:
        cut = {key: one["cut"][f"E/8, data, {key}"]["error"] for key in (new, old)}
        errors.append(math.log(cut[new] / cut[old]))
        if one["tuned"]:
            tuned = {key: one["tuned"][key]["loss"] for key in (new, old)}
            losses.append(math.log(tuned[new] / tuned[old]))
    return ratios


def judge(found: list[dict]) -> list[dict]:
    """The rule of this file, for each step from one key to the next. Fewer than two models, or
    none that learned on, decide nothing."""
    verdicts = []
    for old, new in (("mean", "factors"), ("factors", "weighed")):
        intervals = {}
        for name, values in log_ratios(found, new, old).items():
            if len(values) > 1:
                intervals[name] = [round(math.exp(value), 4) for value in interval(values)]
        holds = None
        if len(intervals) == 2:
            _, _, high = intervals["error after the cut"]
            _, low, _ = intervals["loss after learning on"]
            holds = high < 1 and low <= 1
        verdicts.append({"new": new, "old": old, "holds": holds, "intervals": intervals})
    return verdicts


# ---- the table -------------------------------------------------------------------------------

def spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f}"
    return f"{mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]"


def table(out: dict) -> str:
    """Markdown: a row a key."""
    found = out["found"]

    def over(read: Callable[[dict], float]) -> str:
        return spread([read(one) for one in found])

    head = ["start", "error at C = E, by weights", "by inputs",
            "error at C = E / 8, by weights", "by inputs", "loss",
            f"loss after {out['steps']} steps", "place"]
    rows = []
    names = {"mean": "mean of the heads' keys", "factors": "a complex factor a head and pair",
             "weighed": "the same, weighed by who asks", "random": "random",
             "dense": "dense attention"}
    for key, name in names.items():
        cells = [name]
        for width in ("E", "E/8"):
            for by in ("weights", "data"):
                at = f"{width}, {by}, {key}"
                known = at in found[0]["cut"]
                cells.append(over(lambda one: one["cut"][at]["error"]) if known else "-")
        loss = "-"
        if key == "dense":
            loss = over(lambda one: one["dense"]["loss"])
        elif key in KEYS:
            loss = over(lambda one: one["cut"][f"E/8, data, {key}"]["loss"])
        cells.append(loss)
        for metric in ("loss", "place"):
            known = key in found[0]["tuned"]
            cells.append(over(lambda one: one["tuned"][key][metric]) if known else "-")
        rows.append(cells)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def sentences(out: dict) -> str:
    """What the table is of, and the verdicts of the rule."""
    origins = out["dense"]
    c = Config(**origins[0]["config"])
    seeds = ", ".join(str(origin["seed"]) for origin in origins)
    steps = sorted({origin["steps"] for origin in origins})
    steps = " or ".join(str(number) for number in steps)
    after = "The cut alone."
    if out["steps"]:
        after = f"After the cut {out['steps']} steps of {out['batch']} clips."
    said = [f"{len(origins)} dense models (seeds {seeds}; {steps} steps; E = {c.dim}, {c.heads} "
            f"heads, {c.layers} layers, {c.frames} frames of {c.height} x {c.width} pixels). "
            + after]
    words = {True: "replaces", False: "does not replace", None: "is not judged against"}
    for verdict in out["verdicts"]:
        ratios = []
        for name, (middle, low, high) in verdict["intervals"].items():
            ratios.append(f"{name} times {middle:.2f} [{low:.2f}, {high:.2f}]")
        said.append(f"By the rule \"{verdict['new']}\" {words[verdict['holds']]} "
                    f"\"{verdict['old']}\": {', '.join(ratios)}.")
    return " ".join(said)


# ---- the command line ------------------------------------------------------------------------

def load_dense(path: Path) -> tuple[VideoDiT, dict]:
    """(model, where it is from); UserError for a model of another kind."""
    model, about = load_model(path)
    if model.config.attention != "dense" or about.get("data") != "shapes":
        raise UserError(f"{path} is not a dense model of the shapes world: train one with "
                        "`python train.py --attention dense`")
    origin = {key: about.get(key) for key in ("stage", "steps", "seed")}
    return model, {**origin, "config": asdict(model.config)}


def converting(args) -> None:
    """Measure, judge, write after every model."""
    check_bounds(args, steps=(0, 10**6))
    device = pick_device(args.device)
    models = [load_dense(path) for path in args.dense]
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.open("a").close()                            # what cannot be written raises now
    start = time.perf_counter()
    out = {**provenance(device), "steps": args.steps, "batch": BATCH, "dense": [], "found": []}
    with fast_products():
        for model, origin in models:
            found = measure(model, origin["seed"], args.steps, device)
            out["dense"].append(origin)
            out["found"].append(found)
            out["seconds"] = round(time.perf_counter() - start, 1)
            out["verdicts"] = judge(out["found"])
            args.json.write_text(json.dumps(out, indent=1) + "\n")
            print(f"{out['seconds']:5.0f} s  seed {origin['seed']} measured", flush=True)
    print(table(out))
    print(sentences(out))


def main(argv: list[str] | None = None) -> None:
    """The command line; `argv` None takes the process' own. Exits with code 2 and one line on
    input it cannot use."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--dense", type=Path, nargs="+", required=True, metavar="PATH",
                        help="models of python train.py --attention dense, one a seed")
    parser.add_argument("--steps", type=int, default=200,
                        help="of teacher forcing after the cut; 0: none")
    parser.add_argument("--json", type=Path, default=Path("results/convert.json"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run(converting, parser.parse_args(argv))


if __name__ == "__main__":
    main()
