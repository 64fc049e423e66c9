"""Is video attention low-rank, and does it matter? The paper's surprise in minutes, in a way that could come out wrong.

    python -m experiments.spectrum                             everything, 3 seeds (one H100: about 4 minutes)
    python -m experiments.spectrum --quick                     a smaller model, the same shapes (2 CPU cores: under 5 minutes)
    python -m experiments.spectrum --redraw results/spectrum.json      the figure again, from the figures of an earlier run

The paper (arXiv 2605.30351; its numbers are quoted as reported) finds that trained video attention is *not* low-rank, cuts it to rank
C = E / 8 all the same, and loses nothing: "the bottleneck, not the spectrum, sets the rank". `judge` holds its claims, and three
predictions of ours, each as a rule on intervals over 3 seeds; rules and predictions were committed before the first run.

What makes such numbers mean anything is chance. A matrix of noise of the shape of [W_K; W_V] (2 E rows, E columns) keeps 29 % of its energy in
its best E / 8 directions and needs 93 % of them for 99 % of it (Marchenko-Pastur); a product of two noise matrices at the paper's geometry
uses 0.973 of its budget, a truncated noise matrix 0.988. So every measure stands beside its control, and a second optimiser stands beside
Muon, which the repository trains with: Muon makes every update orthogonal, that is of full rank by construction.

What toy scale cannot show: the spectrum of weights trained on real video for weeks, and whether 192 latents are enough for *that*.

Letters: E width, C latent width, N, V nope and value channels per head, H heads. M = [W_UK W_DKV; W_UV W_DKV], [H (N + V), E].
"""

import argparse
import copy
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median

import torch
from torch import Tensor

from attention import MLA, Dense, fastest_channels
from experiments.rank import (decide, effective_rank, energy, energy_kept, energy_rank, interval, marchenko_pastur, random_product, slope)
from mla_video import PRESETS, Config, VideoDiT
from sample import evaluate, pick_device, provenance, run
from toy_data import CAPTION_SLOTS, WORDS, make_world
from train import Recipe, Trainer, teacher_forcing_loss

SEEDS = (0, 1, 2)
OPTIMISERS = ("Muon", "AdamW")
OBJECTS = (1, 2, 4)
METRICS = ("alive", "colour", "shape", "moving", "survival")
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
    clips: int = 4096                                      # a pool that training goes round and round; 6 or so epochs
    held_out: int = 128
    euler: int = 8                                         # steps of a rollout's chunk

    @property
    def C(self) -> int:
        return self.config.dim // 8


FULL = Plan(TOY, widths=(1, 2, 4, 8, 16, 32, 128), dense_steps=800, tune_steps=200, object_steps=300, batch=32, rollouts=512, frames=36)
QUICK = Plan(replace(TOY, dim=64, heads=2, layers=2, ffn=256, frames=6, window=6), widths=(1, 2, 4, 8, 16, 64), dense_steps=400,
             tune_steps=100, object_steps=100, batch=16, rollouts=64, frames=18, clips=2048, held_out=64)


# ---- what is trained ------------------------------------------------------------------------------------------------

class Pool:
    """Clips made once, dealt round and round. With more than one object: the pixelwise maximum of that many independent clips."""

    def __init__(self, clips: int, config: Config, seed: int, objects: int = 1, captions: bool = True):
        world = make_world("shapes", config.frames, config.height, seed)
        parts = [world.batch(range(i * clips, (i + 1) * clips)) for i in range(objects)]
        self.video, self.caption = torch.stack([video for video, _ in parts]).amax(0), parts[0][1] * captions
        self.name, self.frames, self.size, self.seed, self.reads = "shapes", config.frames, config.height, seed, ""

    def batch(self, indices):
        pick = torch.tensor([i % len(self.video) for i in indices])
        return self.video[pick], self.caption[pick]


def fit(model: VideoDiT, plan: Plan, optimiser: str, steps: int, world, seed: int, device, probe=None):
    """Train a copy of `model` by teacher forcing. Returns the averaged model, and probe(model) at steps 0, 1, 2, 5, 10, 20, ..., last."""
    recipe = Recipe(steps=steps, batch=plan.batch, warmup=min(50, steps // 4), drop=0.5, seed=seed)
    trainer = Trainer(copy.deepcopy(model), recipe, world, device)
    if optimiser == "AdamW":                               # for the matrices, too; everything else has it anyway
        matrices = trainer.optimisers[0].param_groups[0]["params"]
        trainer.optimisers[0] = torch.optim.AdamW(matrices, lr=recipe.lr_adamw, betas=(0.9, 0.95), weight_decay=0.01)
        trainer.peaks[0] = recipe.lr_adamw
    due = {0, steps} | {m * 10**e for e in range(5) for m in (1, 2, 5)}
    curve = []
    for step in range(steps + 1):
        if probe and step in due:
            curve.append({"step": step, **probe(trainer.model)})
        if step < steps:
            trainer.update(*trainer.batch(trainer.step))
    return trainer.ema, curve


@torch.no_grad()
def convert(model: VideoDiT, C: int, init: str = "spectral") -> VideoDiT:
    """The dense model with every self-attention replaced by `MLA.from_dense`. Queries keep full width (Q = E), so that C and the narrow
    positional key are all that is approximated: C = E shows the second alone."""
    c, model = model.config, copy.deepcopy(model).cpu()
    mla = VideoDiT(replace(c, attention="mla", latent=C, query_latent=c.dim))
    kept = {name: value for name, value in model.state_dict().items() if ".attention." not in name}
    mla.load_state_dict(kept, strict=False)
    for new, old in zip(mla.blocks, model.blocks):
        new.attention = MLA.from_dense(old.attention, C, c.dim, c.rope, init)
    return mla.requires_grad_(True)


# ---- what is measured -----------------------------------------------------------------------------------------------

def weight(linear) -> Tensor:
    return linear.weight.detach().cpu().double()


def composite(layer: MLA) -> Tensor:
    """M [H (N + V), E]: what a layer makes of its input for keys and values together, of rank C at most."""
    return torch.cat((weight(layer.W_UK), weight(layer.W_UV))) @ weight(layer.W_DKV)


def stacked(layer: Dense, balanced: bool = False) -> Tensor:
    """[W_K; W_V] [2 E, E], as the paper takes it, or each divided by its Frobenius norm first (what from_dense balances by)."""
    return torch.cat([W / W.norm() if balanced else W for W in (weight(layer.W_K), weight(layer.W_V))])


def dense_spectrum(layer: Dense, start: Dense | None = None) -> dict:
    """The spectrum of one layer; with `start`, the layer before training, also how far training has moved it."""
    W, C = stacked(layer), layer.W_K.in_features // 8
    s, balanced = torch.linalg.svdvals(W), torch.linalg.svdvals(stacked(layer, balanced=True))
    found = {"rank99": energy_rank(s) / len(s), "kept": energy_kept(s, C), "kept_balanced": energy_kept(balanced, C),
             "rank99_balanced": energy_rank(balanced) / len(s), "K_over_V": (weight(layer.W_K).norm() / weight(layer.W_V).norm()).item(),
             "energy": energy(s).tolist()}
    if start is not None:
        update = W - stacked(start)
        found |= {"moved": (update.norm() / stacked(start).norm()).item(), "rank99_update": energy_rank(torch.linalg.svdvals(update)) / len(s)}
    return found


def budget(layers: list[MLA]) -> dict:
    """Share of its budget C that M uses, mean over layers: by the 99 % rule (0.99 at most), and by entropy (1 at most)."""
    s = [torch.linalg.svdvals(composite(layer))[:layer.widths[0]] for layer in layers]
    return {"rank99": mean(energy_rank(x) / len(x) for x in s), "effective": mean(effective_rank(x) / len(x) for x in s)}


@torch.no_grad()
def covariances(model: VideoDiT, video: Tensor, caption: Tensor) -> list[Tensor]:
    """Covariance [E, E] of the input of every self-attention over the tokens of clean clips, as `commit` sees them. Centred: a constant in
    all keys changes no softmax, one in all values is a bias."""
    device, inputs = model.embed.weight.device, []
    first = [block.attention.W_DKV if isinstance(block.attention, MLA) else block.attention.W_K for block in model.blocks]
    hooks = [layer.register_forward_hook(lambda layer, args, out: inputs.append(args[0].detach())) for layer in first]
    video = video.to(device)
    model(video, video, torch.zeros(video.shape[:2], device=device), caption.to(device))
    for hook in hooks:
        hook.remove()
    tokens = video.shape[1] * model.config.tokens          # the clean half of the sequence
    return [torch.cov(x[:, :tokens].flatten(0, 1).cpu().double().T) for x in inputs]


def latent_rank(model: VideoDiT, video: Tensor, caption: Tensor) -> dict:
    """Effective rank of the latents on these clips, mean over layers: of the covariance of M x, since that of c_kv alone would depend on the
    basis of the latent space, which nothing fixes."""
    ranks = []
    for layer, cov in zip([block.attention for block in model.blocks], covariances(model, video, caption)):
        M = composite(layer)
        ranks.append(torch.linalg.eigvalsh(M @ cov @ M.T).clamp_min(0).sqrt())
    return {"effective": mean(effective_rank(s) for s in ranks), "rank99": mean(energy_rank(s) for s in ranks)}


def reconstruction(dense: Dense, mla: MLA, cov: Tensor) -> dict:
    """Share of [K; V] that the conversion loses, K and V balanced. In weights: predicted by the tail of the singular values, and measured.
    On data, i.e. weighted by the covariance of the inputs: measured, and the least that any map of rank C could lose."""
    H, C, N = dense.heads, mla.widths[0], mla.W_UK.out_features // dense.heads
    W_K, W_V = weight(dense.W_K).unflatten(0, (H, -1)), weight(dense.W_V)
    turning = fastest_channels(mla.widths[1], W_K.shape[1])                            # W_KR carries these; M carries the rest
    content = W_K[:, [i for i in range(W_K.shape[1]) if i not in turning]].flatten(0, 1)
    sizes = content.norm(), W_V.norm()
    whole = torch.cat((content / sizes[0], W_V / sizes[1]))
    M = composite(mla)
    error = whole - torch.cat((M[:H * N] / sizes[0], M[H * N:] / sizes[1]))
    lost = lambda X, by: (torch.trace(X @ by @ X.T) / torch.trace(whole @ by @ whole.T)).item()
    values, vectors = torch.linalg.eigh(cov)
    root = vectors * values.clamp_min(0).sqrt()
    return {"predicted": 1 - energy_kept(torch.linalg.svdvals(whole), C), "measured": lost(error, torch.eye(len(cov)).double()),
            "data": lost(error, cov), "data_best": 1 - energy_kept(torch.linalg.svdvals(whole @ root), C)}


@torch.no_grad()
def quality(model: VideoDiT, plan: Plan, held: Pool, seed: int) -> dict:
    """Held-out loss (one draw of noise for all models of a seed), and what survives in rollouts: all without captions."""
    device, none = model.embed.weight.device, torch.zeros_like(held.caption)
    noise = torch.Generator(device).manual_seed(seed)
    loss = teacher_forcing_loss(model, held.video.to(device), none.to(device), Recipe(), noise)[0].item()
    captions = torch.zeros(plan.rollouts, CAPTION_SLOTS, dtype=torch.long)
    return {"loss": loss, **evaluate(model, captions, plan.frames, seed, steps=plan.euler, route="materialised")}


def measure(plan: Plan, device, say=print) -> dict:
    """All of it, per seed: everything `judge` and `draw` need, and nothing judged yet."""
    c, C = plan.config, plan.C
    rows = c.dim - c.heads * c.rope + c.dim                # of M: H (N + V)
    noise = [random_product(rows, C, c.dim, seed) for seed in range(20)]
    found = {"E": c.dim, "C": C, "layers": c.layers, "widths": list(plan.widths), "chance_energy": energy(marchenko_pastur(c.dim, 0.5)).tolist(),
             "chance_budget": {"rank99": [energy_rank(s) / C for s in noise], "effective": [effective_rank(s) / C for s in noise]},
             "chance_widths": {C: energy_rank(random_product(rows, C, c.dim, 0)) for C in plan.widths},
             "spectra": {name: [] for name in ("untrained", *OPTIMISERS)}, "reconstruction": [], "quality": [], "rank_by_width": [],
             "budget": {optimiser: {"spectral": [], "random": []} for optimiser in OPTIMISERS}, "latents": []}
    for seed in SEEDS:
        torch.manual_seed(seed)
        start = VideoDiT(c)
        pool, held = Pool(plan.clips, c, seed), Pool(plan.held_out, c, 10_000 + seed)
        found["spectra"]["untrained"].append([dense_spectrum(block.attention) for block in start.blocks])
        for optimiser in OPTIMISERS:
            dense, _ = fit(start, plan, optimiser, plan.dense_steps, pool, seed, device)
            found["spectra"][optimiser].append([dense_spectrum(new.attention, old.attention) for new, old in zip(dense.blocks, start.blocks)])
            tune = lambda model: fit(model, plan, optimiser, plan.tune_steps, pool, seed + 100, device,
                                     lambda model: budget([block.attention for block in model.blocks]))
            if optimiser == "Muon":                        # the sweep: conversion and quality at every C
                found["quality"].append({"dense": quality(dense, plan, held, seed), "converted": {}, "tuned": {}})
                found["reconstruction"].append({})
                found["rank_by_width"].append({})
                again = fit(dense.requires_grad_(True), plan, optimiser, plan.tune_steps, pool, seed + 100, device)[0]    # trained as long
                found["quality"][-1]["dense_tuned"] = quality(again, plan, held, seed)
                moments = covariances(dense, held.video, held.caption)
                for width in plan.widths:
                    mla = convert(dense, width)
                    layers = [reconstruction(old.attention, new.attention, cov) for old, new, cov in zip(dense.blocks, mla.blocks, moments)]
                    found["reconstruction"][-1][width] = {key: mean(layer[key] for layer in layers) for key in layers[0]}
                    found["quality"][-1]["converted"][width] = quality(copy.deepcopy(mla).to(device), plan, held, seed)
                    tuned, curve = tune(mla)
                    found["quality"][-1]["tuned"][width] = quality(tuned, plan, held, seed)
                    found["rank_by_width"][-1][width] = width * curve[-1]["rank99"]
                    if width == C:
                        found["budget"]["Muon"]["spectral"].append(curve)
            else:
                found["budget"][optimiser]["spectral"].append(tune(convert(dense, C))[1])
            tuned, curve = tune(convert(dense, C, "random"))
            found["budget"][optimiser]["random"].append(curve)
            if optimiser == "Muon":
                found["quality"][-1]["tuned_random"] = quality(tuned, plan, held, seed)
            say(f"seed {seed}: dense and converted, {optimiser}")
        found["latents"].append(latents(plan, seed, device))
        say(f"seed {seed}: latents of 1, 2, 4 objects")
    return json.loads(json.dumps(found))                   # keys become strings, as they will be when it is read from its file


def latents(plan: Plan, seed: int, device) -> dict:
    """Effective rank of the latents of an MLA model trained from scratch on 1, 2 or 4 objects. C = E / 2: wide, so that the world and not
    the budget may set the rank."""
    torch.manual_seed(seed)
    model = VideoDiT(replace(plan.config, attention="mla", latent=plan.config.dim // 2, query_latent=plan.config.dim)).to(device)
    found = {"trained": {}, "untrained": {}, "noise": {}}
    for objects in OBJECTS:
        pool, held = (Pool(n, plan.config, s, objects, captions=False) for n, s in ((plan.clips, seed), (plan.held_out, 10_000 + seed)))
        trained, _ = fit(model, plan, "Muon", plan.object_steps, pool, seed, device)
        static = torch.randn(held.video.shape, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1)
        for name, net, video in (("trained", trained, held.video), ("untrained", model, held.video), ("noise", trained, static)):
            found[name][objects] = latent_rank(net, video, held.caption)
    return found


# ---- what is claimed, and when it is false --------------------------------------------------------------------------

def judge(found: dict) -> list[dict]:
    """Claims of the paper, then predictions of ours ("ours: ..."), each with its rule; written, as is the rest of this file, before the data.

    Prediction about objects. An object has 4 degrees of freedom that move (position, velocity) and 2 that stay (colour, shape): 6, 12,
    24 for 1, 2, 4 objects. Were a latent a code of the world's state, its rank would double with them, slope 1. But a latent belongs to a
    *token*, a patch of 4 x 4 pixels, and a patch rarely sees more than one object: we predict a slope below 0.5."""
    E, C, spectra, Q = found["E"], str(found["C"]), found["spectra"], found["quality"]
    narrow, verdicts = str(min(found["widths"])), []
    chance = mean(layer["rank99"] for layers in spectra["untrained"] for layer in layers)
    kept = lambda name: [median(layer["kept"] for layer in layers) for layers in spectra[name]]

    def claim(name: str, rule: str, conditions: dict, low=-float("inf"), high=float("inf"), needs=None, control: str = ""):
        verdicts.append({"claim": name, "rule": rule, **decide(conditions, low, high, needs), "control": control})

    moved = min(layer["moved"] for name in OPTIMISERS for layers in spectra[name] for layer in layers)
    needs = {"training moved every [W_K; W_V] by at least half its norm": moved >= 0.5}
    claim("trained attention is not low-rank: 99 %-energy rank of [W_K; W_V] above 1300 of 1536 in every layer",
          "worst layer's rank / E >= 0.846, with both optimisers",
          {name: [min(layer["rank99"] for layer in layers) for layers in spectra[name]] for name in OPTIMISERS}, low=1300 / 1536, needs=needs,
          control=f"untrained weights {chance:.3f}")
    claim("the best E / 8 directions keep about 46 % of the energy in the median layer", "0.46 +- 0.08, with both optimisers",
          {name: kept(name) for name in OPTIMISERS}, 0.38, 0.54, needs, f"untrained weights {mean(kept('untrained')):.3f}")
    gap = lambda kind, width: [q[kind][width]["survival"] - q["dense_tuned"]["survival"] for q in Q]
    claim("cut to C = E / 8 and tuned, MLA keeps the quality", "survival within 0.10 of dense attention that was trained as long",
          {"MLA - dense": gap("tuned", C)}, low=-0.10,
          needs={"dense survives in at least half the rollouts": mean(q["dense_tuned"]["survival"] for q in Q) >= 0.5,
                 f"it can be lost: C = {narrow} falls behind by more than 0.10": interval(gap("tuned", narrow))[2] < -0.10},
          control=f"right after the cut {mean(gap('converted', C)):+.3f}, C = {narrow} tuned {mean(gap('tuned', narrow)):+.3f}")
    runs = {f"{init}, {name}": found["budget"][name][init] for name in OPTIMISERS for init in ("spectral", "random")}
    at = lambda when, key="rank99": {name: [curve[when][key] for curve in curves] for name, curves in runs.items()}
    noise = found["chance_budget"]["rank99"]
    claim("M uses about 0.98 of its budget C before training, from either start", "99 %-energy rank / C >= 0.93, four runs",
          at(0), low=0.93, control=f"trivial where noise does so too: a product of two noise matrices {mean(noise):.3f}, least of {len(noise)} {min(noise):.3f}")
    claim("... and after training", "99 %-energy rank / C >= 0.93, four runs", at(-1), low=0.93, control=f"a product of noise {mean(noise):.3f}")
    claim("... from spectral and random start alike", "difference after training within 0.05",
          {name: [a[-1]["rank99"] - b[-1]["rank99"] for a, b in zip(found["budget"][name]["spectral"], found["budget"][name]["random"])]
           for name in OPTIMISERS}, -0.05, 0.05)
    few = [width for width in found["widths"] if width <= E // 4]
    grow = lambda ranks: slope(few, [ranks[str(width)] for width in few])
    claim("the bottleneck, not the spectrum, sets the rank: M's rank grows in proportion to C", f"slope of log rank on log C in [0.9, 1.1], C <= {E // 4}",
          {"slope": [grow(ranks) for ranks in found["rank_by_width"]]}, 0.9, 1.1, control=f"products of noise {grow(found['chance_widths']):.3f}")
    lost = {key: mean(r[C][key] for r in found["reconstruction"]) for key in ("predicted", "data", "data_best")}
    claim("ours: weights overstate what the data loses at C = E / 8", "share of [K; V] lost on data / in weights <= 0.5",
          {"data / weights": [r[C]["data"] / r[C]["predicted"] for r in found["reconstruction"]]}, high=0.5,
          control=f"lost in weights {lost['predicted']:.3f}, on data {lost['data']:.3f}, by the best map on data {lost['data_best']:.3f}")
    rise = lambda kind: [slope(OBJECTS, [run[kind][str(n)]["effective"] for n in OBJECTS]) for run in found["latents"]]
    claim("ours: the rank of the latents grows more slowly than the world's degrees of freedom", "slope of log effective rank on log objects <= 0.5",
          {"slope": rise("trained")}, high=0.5, control=f"untrained {mean(rise('untrained')):.3f}, degrees of freedom 1")
    return verdicts


def breaking(found: dict) -> dict[str, int | None]:
    """For each metric the widest C at which tuned MLA is behind dense by more than 5 points (loss: by more than 5 %), interval and all."""
    def behind(q, width, key):
        return q["dense_tuned"][key] - q["tuned"][width][key] if key != "loss" else q["tuned"][width][key] / q["dense_tuned"][key] - 1

    broken = {key: [width for width in found["widths"] if interval([behind(q, str(width), key) for q in found["quality"]])[1] > 0.05]
              for key in (*METRICS, "loss")}
    return {key: max(widths, default=None) for key, widths in broken.items()}
