"""The files of a training run: what it may start from, what it goes on from, what it writes.

    train.pt             all that is needed to go on (train.prev.pt: the save before it)
    STAGE.pt, model.pt   the weights that a stage ends with; model.pt is what sample.py plays
    sample.gif, loss_STAGE.png, report_STAGE.json
"""

import argparse
import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean

import torch

from engine.checkpoint import load_model, previous, read_last_good, save_model, write_atomically
from engine.command_line import UserError, as_user_error
from engine.judging import PROMPTS, evaluate, report_survival, unseen_captions
from engine.parallel import processes, rank
from engine.trainer import Resumable
from engine.video_files import GifWriter, to_pixels
from flow import SAMPLERS, Draws, Stream, rollout
from mla_video import PRESETS, Config, VideoDiT
from objectives import score_loss, teacher_forcing_loss
from toy_data import CAPTION_SLOTS, WORDS, encode_caption

STAGES = ("score", *SAMPLERS)                              # a score model cannot stream
STATE = {"config", "recipe", "data", "step", "seconds", "learner", "critic", "frozen", "videos",
         "ema", "losses", "recent"}


# ---- may it begin? ---------------------------------------------------------------------------

def make_config(args: argparse.Namespace) -> Config:
    """The preset, with --attention and every --config NAME=N."""
    preset = PRESETS[args.preset]
    sizes = []
    for name, value in asdict(preset).items():
        if isinstance(value, int) and name not in ("words", "slots"):
            sizes.append(name)
    chosen = {}
    for item in args.config:
        name, _, value = item.partition("=")
        if name not in sizes or not value.lstrip("-").isdigit():
            raise UserError(f"--config takes NAME=N with one of {', '.join(sizes)}; "
                            f"got {item!r}")
        chosen[name] = int(value)
    with as_user_error():
        config = replace(preset, attention=args.attention, words=len(WORDS),
                         slots=CAPTION_SLOTS, **chosen)
    if config.height != config.width or config.channels != 3:
        raise UserError("the data makes square RGB frames; the config wants "
                        f"{config.channels} x {config.height} x {config.width}")
    return config


def check_flags(args: argparse.Namespace, recipes: dict, world) -> None:
    """UserError for flags that do not go together."""
    if args.shard and processes() == 1:
        raise UserError("--shard divides a model among several processes: start them with "
                        "torchrun --nproc_per_node=N train.py ...")
    if args.shard and args.compile:
        raise UserError("--shard and --compile do not go together: weights that are put "
                        "together block by block break the graphs")
    for recipe in recipes.values():
        if recipe.batch % processes():
            raise UserError(f"a batch of {recipe.batch} clips cannot be divided among "
                            f"{processes()} processes: choose another --batch")
    if args.curve and (world.name != "shapes" or args.stage == "score"):
        raise UserError("--curve judges rollouts in the shapes world, whose truth is known; "
                        f"not in {world.name}, nor of a score model")
    idle_start = args.start and args.stage in ("score", "all")
    idle_score = args.score and args.stage != "dmd"
    if idle_start or idle_score:
        raise UserError("--start is for the stages tf, cd and dmd, and --score for dmd; "
                        f"--stage {args.stage} has no use for what you name")


def check_memory(config: Config, device: torch.device, shards: int) -> None:
    """UserError if weights, gradients, average and optimisers cannot fit: better than the
    system's sudden end."""
    one, two = (count_weights(replace(config, layers=layers)) for layers in (1, 2))
    weights = one + (config.layers - 1) * (two - one)
    need = 4 * 5 * weights // shards           # bytes: weight, gradient, average, two moments
    room = memory_of(device)
    if room is not None and need > room:
        raise UserError(f"training this model takes {need / 2**30:,.0f} GiB for weights and "
                        f"optimisers alone, and there are {room / 2**30:,.0f}: choose a "
                        "smaller --preset or --config, or more processes and --shard")


def count_weights(config: Config) -> int:
    with torch.device("meta"):                             # allocates nothing
        model = VideoDiT(config)
    return sum(weight.numel() for weight in model.parameters())


def memory_of(device: torch.device) -> int | None:
    """Bytes; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def starting_weights(args: argparse.Namespace, model: VideoDiT, score: VideoDiT | None,
                     stage: str, allowed: tuple[str, ...],
                     world) -> tuple[VideoDiT, VideoDiT | None, str]:
    """(model, score, where they come from) of a stage that begins: what --start and --score
    name, else what the stage before left in --out, else the new weights given."""
    out = Path(args.out)
    origins = []
    start = Path(args.start or out / f"{allowed[0]}.pt")
    left = allowed[0] != "" and start.is_file()
    if args.start or left or "" not in allowed:
        model = load_start(start, stage, allowed, model.config, world)
        origins.append(str(start))
    if stage == "dmd":
        path = Path(args.score or out / "score.pt")
        score = load_start(path, stage, ("score",), model.config, world)
        origins.append(str(path))
    return model, score, " and ".join(origins) or "scratch"


def load_start(path: Path, stage: str, allowed: tuple[str, ...], config: Config,
               world) -> VideoDiT:
    """The weights that a stage starts from; UserError that names both sides if they are of
    another kind. `allowed` are the stages that it may start from, "" being from scratch."""
    names = [name for name in allowed if name]
    if not path.is_file():
        needed = " or ".join(f"a {name} model" for name in names)
        flag = "--start"
        if stage == "dmd" and allowed == ("score",):
            flag = "--score"
        raise UserError(f"stage {stage} needs {needed}, and there is none at {path}: train it "
                        f"with --stage {allowed[0] or stage}, or name one with {flag}")
    model, about = load_model(path)
    found = {"stage": about.get("stage"), "data": about.get("data"), **asdict(model.config)}
    needed = {"stage": " or ".join(names), "data": world.name, **asdict(config)}
    if found["stage"] in allowed:
        needed["stage"] = found["stage"]
    for what, theirs in found.items():
        if theirs != needed[what]:
            raise UserError(f"stage {stage} cannot start from {path}: its {what} is {theirs}, "
                            f"and {needed[what]} is needed")
    return model.float()


# ---- going on --------------------------------------------------------------------------------

def read_state(path: Path) -> dict:
    """The training state at `path`, or the one saved before it; UserError if it is none."""
    state = read_last_good(path, STATE)
    recipe = state["recipe"]
    good = isinstance(state["config"], dict) and isinstance(recipe, dict)
    if good:
        numbers = [state["step"], recipe.get("steps"), recipe.get("batch"), recipe.get("seed")]
        whole = all(type(number) is int for number in numbers)
        good = whole and recipe.get("stage") in STAGES
    if not good:
        raise UserError(f"{path} is not a training state: its config, recipe or step is not of "
                        "a run of this program")
    return state


def load_state(path: Path, recipes: dict, config: Config, world) -> dict:
    """The training state at `path`, if it is a run of one of these recipes {stage: recipe}, and
    of this config and data; UserError otherwise."""
    state = read_state(path)
    theirs = state["recipe"]
    stage = theirs["stage"]
    if stage not in recipes:
        raise UserError(f"cannot resume {path}: it is at stage {stage}, and you ask for "
                        f"{' '.join(recipes)}")
    mine = recipes[stage]
    check_same(path, "config", state["config"], asdict(config))
    check_same(path, "data", state["data"], world.name)
    check_same(path, "batch", theirs["batch"], mine.batch)
    check_same(path, "seed", theirs["seed"], mine.seed)
    return state


def check_same(path: Path, what: str, theirs, mine) -> None:
    if theirs == mine:
        return
    if isinstance(mine, dict):                             # name the settings that differ alone
        differ = [key for key in mine if mine[key] != theirs.get(key)]
        theirs = {key: theirs[key] for key in differ if key in theirs}
        mine = {key: mine[key] for key in differ}
    raise UserError(f"cannot resume {path}: it was trained with {what} {str(theirs)[:200]}, "
                    f"and you ask for {mine}")


def check_nothing_is_lost(path: Path, recipes: dict) -> None:
    """UserError if a run that begins anew would write over one that is not finished, or over a
    run of its own stage."""
    if not path.exists() and not previous(path).exists():
        return
    state = read_state(path)
    stage = state["recipe"]["stage"]
    finished = state["step"] >= state["recipe"]["steps"]
    if stage in recipes or not finished:
        raise UserError(f"{path} exists (stage {stage}, step {state['step']}): go on from it "
                        "with --resume, or choose another folder with --out")


# ---- while it runs ---------------------------------------------------------------------------

def save(trainer: Resumable, out: Path) -> None:
    """Write train.pt; UserError, and the file as it was, if the weights are not numbers any
    more."""
    learners = [trainer.learner]
    if trainer.critic:
        learners.append(trainer.critic)
    for learner in learners:
        if not all(weight.isfinite().all() for weight in learner.weights):
            raise UserError("training diverged: the weights are not finite at step "
                            f"{trainer.step}; the last good checkpoint is kept in {out}")
    start = time.perf_counter()
    state = trainer.state()
    if rank() == 0:
        write_atomically(out / "train.pt", state, keep=True)
    trainer.saving += time.perf_counter() - start


def read_losses(trainer: Resumable, out: Path) -> dict[str, str]:
    """{name: mean of the last hundred steps, as text}; UserError if training diverged."""
    try:
        trainer.read_losses()
    except UserError as error:
        raise UserError(f"{error}; the last good checkpoint is kept in {out}") from None
    shown = {}
    for name, pairs in trainer.losses.items():
        shown[name] = f"{mean(loss for _, loss in pairs[-10:]):.4f}"
    return shown


def judge(trainer: Resumable) -> dict:
    """A point of --curve: 64 rollouts, ten times as long as a training clip."""
    stage = trainer.recipe.stage
    seed = trainer.recipe.seed
    frames = 10 * trainer.model.config.frames
    found = evaluate(trainer.ema, unseen_captions(64, seed), frames, seed, **SAMPLERS[stage])
    return {"step": trainer.step, "seconds": round(trainer.seconds, 1), **found}


# ---- at its end ------------------------------------------------------------------------------

def finish(trainer: Resumable, out: Path) -> None:
    """Write the moving average: STAGE.pt, from which the next stage starts, and model.pt, which
    sample.py plays."""
    recipe = trainer.recipe
    trainer.put_together()
    if rank() != 0:
        return
    names = [recipe.stage]
    if recipe.stage in SAMPLERS:                           # a score model cannot stream
        names.append("model")
    for name in names:
        save_model(out / f"{name}.pt", trainer.ema, data=trainer.world.name,
                   stage=recipe.stage, steps=trainer.step, seed=recipe.seed)


def draw_losses(trainer: Resumable, path: Path) -> None:
    """The loss curves as a picture, with their running means."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, pairs in trainer.losses.items():
        steps = [step for step, _ in pairs]
        values = [loss for _, loss in pairs]
        running = [mean(values[max(0, i - 9):i + 1]) for i in range(len(values))]
        axes.semilogy(steps, values, color="0.8")
        axes.semilogy(steps, running, label=f"{name}, mean of the last 100 steps")
    axes.set(xlabel="step", ylabel="loss", title=f"stage {trainer.recipe.stage}")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


@torch.no_grad()
def loss_by_noise(trainer: Resumable, bins: int = 5) -> list[tuple[float, float, float]]:
    """[(sigma from, to, mean loss)] of the averaged model on 4 unseen batches. The mean loss
    hides that low noise (detail) and high noise (what, where) are learned at different
    times."""
    recipe = trainer.recipe
    objective = score_loss if recipe.stage == "score" else teacher_forcing_loss
    losses = torch.zeros(bins)
    frames = torch.zeros(bins)
    for i in range(4):
        x0, caption = (trainer.to_device(part) for part in trainer.batch(2**31 + i))
        draws = Draws(torch.Generator(trainer.device).manual_seed(i), trainer.device)
        _, sigma, error = objective(trainer.ema, x0, caption, draws,
                                    drop=0.0, spread=recipe.spread)
        index = (sigma.cpu() * bins).long().clamp(max=bins - 1).flatten()
        losses.index_add_(0, index, error.cpu().flatten())
        frames.index_add_(0, index, torch.ones(index.shape))
    found = []
    for i in range(bins):
        if frames[i]:
            found.append((i / bins, (i + 1) / bins, (losses[i] / frames[i]).item()))
    return found


def write_sample(trainer: Resumable, path: Path) -> None:
    """A GIF of four videos, ten times as long as a training clip."""
    prompts = ("",) * 4
    if trainer.world.name == "shapes":
        prompts = PROMPTS
    captions = torch.stack([encode_caption(prompt) for prompt in prompts])
    draws = Draws(torch.Generator().manual_seed(trainer.recipe.seed))
    frames = 10 * trainer.model.config.frames
    gif = GifWriter(path)
    how = SAMPLERS[trainer.recipe.stage]
    for chunk in rollout(Stream(trainer.ema, captions), frames, draws, **how):
        gif.append(to_pixels(chunk))


def report(trainer: Resumable, out: Path, rollouts: int, about: dict) -> None:
    """Write pictures, sample and figures of a stage that has ended, and print what it learned.
    `about` goes into report_STAGE.json, too."""
    recipe = trainer.recipe
    stage = recipe.stage
    config = trainer.model.config
    by_noise = judged = None
    if trainer.losses:
        draw_losses(trainer, out / f"loss_{stage}.png")
    if stage in ("score", "tf"):
        by_noise = loss_by_noise(trainer)
        shown = ", ".join(f"{low:.1f}-{top:.1f}: {loss:.4f}" for low, top, loss in by_noise)
        print(f"loss by noise level: {shown}")
    if stage in SAMPLERS:
        write_sample(trainer, out / "sample.gif")
    if stage in SAMPLERS and rollouts and trainer.world.name == "shapes":
        judged = report_survival(trainer.ema, rollouts, 10 * config.frames, recipe.seed,
                                 **SAMPLERS[stage])
    figures = {
        **about, "stage": stage, "attention": config.attention, "steps": trainer.step,
        "batch": recipe.batch, "seed": recipe.seed,
        "training_seconds": round(trainer.seconds, 1),
        "saving_seconds": round(trainer.saving, 2),
        "processes": processes(), "threads": torch.get_num_threads(),
        "loss_by_noise": by_noise, "rollouts": rollouts, "survival": judged}
    (out / f"report_{stage}.json").write_text(json.dumps(figures, indent=1))
    files = ", ".join(sorted(path.name for path in out.iterdir()))
    print(f"trained {trainer.step} steps in {trainer.seconds / 60:.1f} minutes; in {out} now: "
          f"{files}")
    if stage in SAMPLERS:
        print(f"next: python sample.py --checkpoint {out / 'model.pt'} --frames 480 "
              f"--out {out / 'long.gif'}")
