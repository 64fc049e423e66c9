"""Teach a tiny video model by teacher forcing: every chunk of a real clip is denoised given the clean chunks before it.

    python train.py                                    the toy model on bouncing shapes: minutes, on a CPU too
    python train.py --data digits --out out/digits     real handwritten digits that move (needs scikit-learn)
    python train.py --data clips.npy --out out/mine    your own clips
    python train.py --attention dense --out out/dense  the baseline: the same model with standard attention
    python train.py --resume --steps 4000              go on from out/train.pt up to 4000 steps in all

Writes to --out: train.pt (all that is needed to go on), model.pt (weights for sample.py), loss.png, sample.gif and report.json (the
figures it prints, with command, commit, device and versions).
"""

import argparse
import copy
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoint import read_checkpoint, save_model, write_atomically
from mla_video import PRESETS, Config, VideoDiT
from sample import (PROMPTS, GifWriter, add_noise, cache_line, evaluate, pick_device, provenance, report_survival, rollout, run, shift,
                    to_pixels, unseen_captions)
from toy_data import CAPTION_SLOTS, WORDS, encode_caption, make_world


@dataclass(frozen=True)
class Recipe:
    """How to train. Muon (momentum whose update is made orthogonal: every direction of a matrix learns at the same pace)
    for the matrices of the blocks, AdamW for everything else."""

    steps: int = 2000
    batch: int = 16
    lr_muon: float = 3e-3
    lr_adamw: float = 1.5e-3
    warmup: int = 50
    final: float = 0.05                                    # the rate at the end, as a share of the peak
    ema: float = 0.99
    clip: float = 1.0
    drop: float = 0.1                                      # captions replaced by "none", so that guidance exists
    spread: float = 1.0                                    # of the logit-normal noise level before its shift
    seed: int = 0


# ---- the objective --------------------------------------------------------------------------------------------------

def teacher_forcing_loss(model, x0: Tensor, caption: Tensor, recipe: Recipe, generator: torch.Generator):
    """Flow matching with an independent noise level per *chunk*: one pass trains every chunk at some level.

    x0 [B, F, ...] in [-1, 1], caption [B, slots]. Returns (loss, sigma [B, F], squared error [B, F]). The weight is 1 at
    every level: the released weight is 0 at sigma = 1, where every rollout starts, and a pretrained model survives
    that, one from scratch does not.
    """
    B, frames = x0.shape[:2]
    draw = dict(generator=generator, device=x0.device)
    chunk = model.config.chunk
    u = torch.sigmoid(recipe.spread * torch.randn(B, frames // chunk, **draw))
    sigma = shift(u).repeat_interleave(chunk, dim=1)                                   # one level for a chunk's frames
    eps = torch.randn(x0.shape, **draw)
    caption = caption * (torch.rand(B, 1, **draw) >= recipe.drop)                      # word 0 is "none"
    v = model(x0, add_noise(x0, eps, sigma), sigma, caption)                                                  # (F1)
    error = (v - (eps - x0)).square().flatten(2).mean(dim=2)                                                  # (F2)
    return error.mean(), sigma, error.detach()


# ---- the loop -------------------------------------------------------------------------------------------------------

class Trainer:
    """Model, its moving average, optimisers and the step counter. All randomness of step s (clips, noise, captions
    dropped) is a function of (seed, s), so going on from a checkpoint needs no generator state."""

    def __init__(self, model: VideoDiT, recipe: Recipe, world, device: torch.device):
        self.model, self.recipe, self.world, self.device = model.to(device).train(), recipe, world, device
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        matrices = [p for p in model.blocks.parameters() if p.dim() == 2 and min(p.shape) > 6]  # 6: a block's modulation
        chosen = {id(p) for p in matrices}
        others = [p for p in model.parameters() if id(p) not in chosen]
        self.optimisers = [
            torch.optim.Muon(matrices, lr=recipe.lr_muon, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=recipe.lr_adamw, betas=(0.9, 0.95), weight_decay=0.0)]
        self.peaks = [recipe.lr_muon, recipe.lr_adamw]
        self.step, self.losses, self.seconds = 0, [], 0.0

    def rate(self) -> float:
        """Warm-up, then a cosine down to `final`: the share of the peak rate at this step."""
        r = self.recipe
        if self.step < r.warmup:
            return (self.step + 1) / r.warmup
        progress = (self.step - r.warmup) / max(1, r.steps - r.warmup)
        return r.final + (1 - r.final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def batch(self, step: int):
        first = step * self.recipe.batch
        return self.world.batch(range(first, first + self.recipe.batch))

    def update(self, x0: Tensor, caption: Tensor) -> Tensor:
        """One step on one batch; returns its loss (a tensor on the device: reading it would wait for the GPU)."""
        generator = torch.Generator(self.device).manual_seed(self.recipe.seed * 1_000_003 + self.step)
        loss, sigma, error = teacher_forcing_loss(self.model, x0.to(self.device), caption.to(self.device), self.recipe, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for optimiser, peak in zip(self.optimisers, self.peaks):
            for group in optimiser.param_groups:
                group["lr"] = peak * self.rate()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))               # short memory while it learns fast
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)
        self.step += 1
        return loss.detach()

    # ---- going on, and stopping -----------------------------------------------------------------------------------

    def state(self) -> dict:
        """All that `--resume` needs, as tensors and plain values."""
        return {"config": asdict(self.model.config), "recipe": asdict(self.recipe), "data": self.world.name, "step": self.step, "seconds": self.seconds,
                "model": self.model.state_dict(), "ema": self.ema.state_dict(), "losses": self.losses,
                "optimisers": [optimiser.state_dict() for optimiser in self.optimisers]}

    def restore(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.ema.load_state_dict(state["ema"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"]):
            optimiser.load_state_dict(saved)
        self.step, self.losses, self.seconds = state["step"], list(state["losses"]), state["seconds"]


def train(trainer: Trainer, out: Path, curve: int = 0, save_every: int = 250) -> list[dict]:
    """Run up to recipe.steps in all. Saves every `save_every` steps, at the end, and on Ctrl-C. With `curve`, judges 64 rollouts
    every so many steps and returns what it found; trainer.seconds counts training alone."""
    steps, found = trainer.recipe.steps, []
    bar = tqdm(total=steps, initial=trainer.step, desc="training", dynamic_ncols=True)
    start = time.perf_counter() - trainer.seconds
    try:
        while trainer.step < steps:
            loss = trainer.update(*trainer.batch(trainer.step))
            trainer.seconds = time.perf_counter() - start
            bar.update()
            if trainer.step % 10 == 0:                     # reading the loss waits for the GPU: not every step
                trainer.losses.append((trainer.step, loss.item()))
                if not math.isfinite(loss.item()):
                    raise ValueError(f"the loss is {loss.item()} at step {trainer.step}: training diverged; the last good "
                                     f"checkpoint is kept in {out}")
                bar.set_postfix(loss=f"{mean([value for _, value in trainer.losses[-10:]]):.4f}")
            if trainer.step % save_every == 0 or trainer.step == steps:
                write_atomically(out / "train.pt", trainer.state())
            if curve and trainer.step % curve == 0:
                report = evaluate(trainer.ema, unseen_captions(64, trainer.recipe.seed), 120, trainer.recipe.seed)
                found.append({"step": trainer.step, "seconds": round(trainer.seconds, 1), **report})
                tqdm.write(f"step {trainer.step}, {trainer.seconds:.0f} s: survival {100 * report['survival']:.0f} %")
                start = time.perf_counter() - trainer.seconds
    except KeyboardInterrupt:
        write_atomically(out / "train.pt", trainer.state())
        finish(trainer, out)
        raise
    finally:
        bar.close()
    return found


def finish(trainer: Trainer, out: Path) -> None:
    """Write model.pt, the weights that sample.py plays: the moving average."""
    save_model(out / "model.pt", trainer.ema, data=trainer.world.name, stage="tf", steps=trainer.step, seed=trainer.recipe.seed)


def draw_losses(losses: list[tuple[int, float]], path: Path) -> None:
    """The loss curve as a picture, with its running mean."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    steps, values = zip(*losses)
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.semilogy(steps, values, color="0.8", label="one batch")
    smooth = [mean(values[max(0, i - 9):i + 1]) for i in range(len(values))]
    axes.semilogy(steps, smooth, label="mean of the last 100 steps")
    axes.set(xlabel="step", ylabel="mean squared error of the velocity", title="Teacher forcing")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


@torch.no_grad()
def loss_by_noise(trainer: Trainer, bins: int = 5) -> list[tuple[float, float, float]]:
    """[(sigma from, to, mean loss)] of the averaged model on 4 unseen batches: the mean loss hides that low noise (detail) and
    high noise (what, where) are learned at different times."""
    r, total = trainer.recipe, torch.zeros(2, bins)
    for i in range(4):
        x0, caption = (part.to(trainer.device) for part in trainer.batch(2**31 + i))
        generator = torch.Generator(trainer.device).manual_seed(i)
        _, sigma, error = teacher_forcing_loss(trainer.ema, x0, caption, replace(r, drop=0.0), generator)
        index = (sigma.cpu() * bins).long().clamp(max=bins - 1).flatten()
        total.index_add_(1, index, torch.stack((error.cpu().flatten(), torch.ones(index.shape))))
    return [(i / bins, (i + 1) / bins, (total[0, i] / total[1, i]).item()) for i in range(bins)]


def main(argv: list[str] | None = None) -> None:
    """The command line; `argv` None takes the process' own. Exits with code 2 and one line on input it cannot use."""
    parser = argparse.ArgumentParser(description="Train a causal video diffusion transformer by teacher forcing on small clips.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--stage", default="tf", choices=("tf",), help="what to train: tf = teacher forcing")
    parser.add_argument("--attention", default="mla", choices=("mla", "dense"))
    parser.add_argument("--data", default="shapes", help="shapes, digits, occluder, or a .npy, .npz, .gif or video file")
    parser.add_argument("--preset", default="toy", choices=tuple(PRESETS), help="size of the model")
    parser.add_argument("--config", action="append", default=[], metavar="NAME=N", help="another size, e.g. window=6; may be repeated")
    parser.add_argument("--steps", type=int, help="steps in all (default: 2000 on a CPU, 2500 on a GPU)")
    parser.add_argument("--batch", type=int, help="clips per step (default: 16 on a CPU, 32 on a GPU)")
    parser.add_argument("--out", default="out", help="folder for everything that is written")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, up to --steps in all")
    parser.add_argument("--evaluate", type=int, default=64, metavar="N", help="rollouts to judge at the end; 0: none")
    parser.add_argument("--curve", type=int, default=0, metavar="STEPS", help="judge 64 rollouts every so many steps, too; 0: never")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run(train_from, parser.parse_args(argv))


def make_config(args) -> Config:
    """The preset with --attention and every --config NAME=N applied; ValueError in one line for what cannot be."""
    sizes = {name: value for name, value in asdict(PRESETS[args.preset]).items() if isinstance(value, int) and name != "words"}
    chosen = {}
    for item in args.config:
        name, _, value = item.partition("=")
        if name not in sizes or not value.lstrip("-").isdigit():
            raise ValueError(f"--config takes NAME=N with one of {', '.join(sizes)}; got {item!r}")
        chosen[name] = int(value)
    config = replace(PRESETS[args.preset], attention=args.attention, words=len(WORDS), slots=CAPTION_SLOTS, **chosen)
    if config.height != config.width or config.channels != 3:
        raise ValueError(f"the data makes square RGB frames; the config wants {config.channels} x {config.height} x {config.width}")
    return config


def train_from(args) -> None:
    """Everything is checked before anything is written. ValueError in one line for what the user can mend."""
    device, out = pick_device(args.device), Path(args.out)
    steps, batch = (2000, 16) if device.type == "cpu" else (2500, 32)
    recipe = Recipe(steps=steps if args.steps is None else args.steps, batch=batch if args.batch is None else args.batch, seed=args.seed)
    for name, value, low in (("steps", recipe.steps, 1), ("batch", recipe.batch, 1), ("evaluate", args.evaluate, 0),
                             ("curve", args.curve, 0), ("seed", args.seed, 0)):
        if value < low:
            raise ValueError(f"--{name} must be at least {low}, got {value}")
    config = make_config(args)
    world = make_world(args.data, frames=config.frames, size=config.height, seed=args.seed)
    if args.curve and world.name != "shapes":
        raise ValueError(f"--curve judges rollouts in the shapes world, whose truth is known; not in {world.name}")
    state = load_state(out / "train.pt", config, recipe, world) if args.resume else None
    if not args.resume and (out / "train.pt").exists():
        raise ValueError(f"{out / 'train.pt'} exists: go on from it with --resume, or choose another folder with --out")
    # Products of float32 matrices may use the fast units: TF32 on a GPU, oneDNN (on AMD severalfold faster than MKL) on a CPU.
    torch.set_float32_matmul_precision("medium")
    torch.manual_seed(args.seed)                           # initial weights; everything later depends on (seed, step)
    trainer = Trainer(VideoDiT(config), recipe, world, device)
    if state:
        trainer.restore(state)
    origin = provenance(device)                            # now: a long run must name the commit it started from
    out.mkdir(parents=True, exist_ok=True)
    print(f"{args.attention} {args.preset}, {sum(p.numel() for p in trainer.model.parameters()):,} parameters; {recipe.batch} clips of "
          f"{config.frames} frames a step from {world.name}; {device.type}")
    if world.reads:
        print(f"data         {world.reads}")
    print(cache_line(trainer.model, 1))
    curve = train(trainer, out, args.curve)
    finish(trainer, out)
    if trainer.losses:
        draw_losses(trainer.losses, out / "loss.png")
    noise = loss_by_noise(trainer)
    print("loss by noise level: " + ", ".join(f"{a:.1f}-{b:.1f}: {loss:.4f}" for a, b, loss in noise))
    prompts = PROMPTS if world.name == "shapes" else ("",) * 4
    captions = torch.stack([encode_caption(prompt) for prompt in prompts])
    gif = GifWriter(out / "sample.gif")
    for chunk in rollout(trainer.ema, captions, 10 * config.frames, generator=torch.Generator().manual_seed(args.seed)):
        gif.append(to_pixels(chunk))
    judged = report_survival(trainer.ema, args.evaluate, 10 * config.frames, args.seed) if args.evaluate and world.name == "shapes" else None
    report = {**origin, "attention": args.attention, "steps": trainer.step, "batch": recipe.batch, "seed": args.seed,
              "training_seconds": round(trainer.seconds, 1), "loss_by_noise": noise, "rollouts": args.evaluate, "survival": judged, "curve": curve}
    (out / "report.json").write_text(json.dumps(report, indent=1))
    print(f"trained {trainer.step} steps in {trainer.seconds / 60:.1f} minutes; wrote {', '.join(sorted(path.name for path in out.iterdir()))} "
          f"to {out}\nnext: python sample.py --checkpoint {out / 'model.pt'} --frames 480 --out {out / 'long.gif'}")


def load_state(path: Path, config: Config, recipe: Recipe, world) -> dict:
    """The training state at `path`, if it is a run of this config, data, batch and seed; ValueError in one line otherwise."""
    state = read_checkpoint(path, {"config", "recipe", "data", "step", "seconds", "model", "ema", "losses", "optimisers"})
    for what, mine, theirs in (("config", asdict(config), state["config"]), ("data", world.name, state["data"]),
                               ("batch", recipe.batch, state["recipe"]["batch"]), ("seed", recipe.seed, state["recipe"]["seed"])):
        if mine != theirs:
            if isinstance(mine, dict):                     # name the settings that differ, not all of them
                mine, theirs = ({key: d[key] for key in mine if mine[key] != theirs.get(key) and key in d} for d in (mine, theirs))
            raise ValueError(f"cannot resume {path}: it was trained with {what} {theirs}, and you ask for {mine}")
    return state


if __name__ == "__main__":
    main()
