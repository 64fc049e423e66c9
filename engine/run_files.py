"""The files of a training run: what it may start from, what it goes on from, what it writes.

    train.pt             all that is needed to go on (train.prev.pt: the save before it)
    STAGE.pt, model.pt   the weights that a stage ends with; model.pt is what sample.py plays
    sample.gif, loss_STAGE.png, report_STAGE.json
"""

import argparse
import contextlib
import json
import math
import os
import shlex
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean

import torch

from engine import wan_training
from engine.checkpoint import (find_model, load_model, previous, read_last_good, save_model,
                               write_atomically)
from engine.clips import open_world
from engine.command_line import UserError, as_user_error
from engine.convert import (CLIPS, MLA_ALONE, check_alike, convert, moments_of_weights,
                            moments_on)
from engine.homogeneous import model_of
from engine.judging import JUDGES, evaluate, report_survival, unseen_captions
from engine.latent_clips import Latents, are_latents
from engine.loader import WorkerDied
from engine.locks import lock
from engine.normal import RECIPE_BEFORE, judge_next_chunk, loss_lines, next_chunk_line
from engine.parallel import processes, rank, say
from engine.progress import watched
from engine.trainer import Resumable
from engine.video_files import GifWriter, to_pixels
from engine.wan import is_wan
from flow import SAMPLERS, Draws, Stream, rollout
from mla_video import PRESETS, Config, VideoDiT
from objectives import score_loss, teacher_forcing_loss
from toy_data import CAPTION_SLOTS, WORDS, WORLDS

OPTIMISERS = ("muon", "adamw")            # of matrices
SHARES = ("final", "ema", "drop", "restart", "switch")     # of a recipe: at most 1
ABOVE_0 = ("lr_muon", "lr_adamw", "clip", "spread", "critic", "shift", "every")
# What not every stage has a use for.
USED_BY = {"drop": ("score", "tf"), "spread": ("score", "tf"), "guidance": ("cd", "dmd"),
           "critic": ("dmd",), "shift": ("dmd",), "every": ("dmd",), "restart": ("dmd",),
           "switch": ("dmd",)}
STAGES = ("score", *SAMPLERS)                              # a score model cannot stream
STATE = {"config", "recipe", "asked", "step", "seconds", "learner", "critic", "frozen",
         "videos", "ema", "losses", "recent"}
# The flags that a run is begun with and keeps: --resume takes them from train.pt.
KEPT = {"stage": str, "data": str, "layout": (str, type(None)), "border": bool, "preset": str,
        "attention": str, "config": list, "steps": (int, type(None)),
        "batch": (int, type(None)), "seed": int, "deterministic": bool,
        "from_dense": (str, type(None)), "conversion": str, "rate": float, "recipe": list}
# What a train.pt that is older than a flag was begun with.
BEFORE = {"from_dense": None, "conversion": "data", "started": "", "rate": 1.0, "recipe": [],
          "judge": ""}
# And what train.pt holds besides: the kind of device that the recipe is for, which data it was,
# whatever its file is called, the stage of the weights that the run started from, and the
# attention of the real score, "" where there is none.
ASKED = {**KEPT, "machine": str, "fingerprint": str, "started": str, "judge": str}
JUDGE_KINDS = ("", "mla", "dense", "homogeneous")
GIF_CLIPS = 10                            # the frames of sample.gif, in clips of the training
# The dense models that a stage may start from, as MLA.
DENSE = {"tf": ("score", "tf"), "cd": ("tf",), "dmd": ("cd", "tf")}


# ---- may it begin? ---------------------------------------------------------------------------

def trainable() -> list[str]:
    """The presets that train.py can train."""
    return [name for name, preset in PRESETS.items() if fits_the_data(preset)]


def fits_the_data(config: Config) -> bool:
    return config.height == config.width and config.channels == 3


def make_config(args: argparse.Namespace, state: dict | None = None) -> Config:
    """The preset, with --attention and every --config NAME=N; for latents, the sizes of the
    weights, or of the run that goes on."""
    if are_latents(args.data):
        return wan_training.config_for(args, state)
    if args.from_dense and is_wan(args.from_dense):
        raise UserError(f"{args.from_dense} holds released weights: they learn on latents with "
                        "rows of text, so name a .safetensors file of them with --data")
    sizes = read_sizes(args.config)
    with as_user_error():
        config = replace(PRESETS[args.preset], attention=args.attention, words=len(WORDS),
                         slots=CAPTION_SLOTS, **sizes)
    if not fits_the_data(config):
        raise UserError("the data makes square RGB frames; the config wants "
                        f"{config.channels} x {config.height} x {config.width}")
    return config


def size_name(args: argparse.Namespace, config: Config) -> str:
    """The preset, or what stands for it where sizes are those of released weights."""
    return "of Wan's shape" if config.text else args.preset


def with_words_of(world, config: Config) -> Config:
    """The config for the captions of this world: a user's own have words of their own."""
    vocabulary = world.vocabulary
    if not vocabulary:
        return config
    return replace(config, words=1 + len(vocabulary.words), slots=vocabulary.slots)


def read_sizes(items: list[str]) -> dict[str, int]:
    """The NAME=N of --config; UserError for anything else."""
    sizes = []
    for name, value in asdict(Config()).items():
        if isinstance(value, int) and name not in ("words", "slots", "text"):
            sizes.append(name)
    chosen = {}
    for item in items:
        name, _, value = item.partition("=")
        if name not in sizes or not value.lstrip("-").isdigit():
            raise UserError(f"--config takes NAME=N with one of {', '.join(sizes)}; "
                            f"got {item!r}")
        chosen[name] = int(value)
    return chosen


def overrides(items: list[str], recipe) -> dict:
    """The NAME=VALUE of --recipe, for a `recipe` whose values tell the kinds; UserError for
    anything else."""
    kinds = {}
    for name, value in asdict(recipe).items():
        if name not in ("stage", "steps", "batch", "seed", "exits"):   # most have their flags
            kinds[name] = type(value)
    chosen = {}
    for item in items:
        name, _, text = item.partition("=")
        if name not in kinds:
            raise UserError(f"--recipe takes NAME=VALUE with one of {', '.join(kinds)}; got "
                            f"{item!r}")
        chosen[name] = recipe_value(item, name, text, kinds[name])
    return chosen


def as_values(items: list[str]) -> dict[str, float | str]:
    """{name: value} of --recipe, to be compared: guidance=3 is guidance=3.0."""
    values = {}
    for item in items:
        name, _, text = str(item).partition("=")
        values[name] = text
        with contextlib.suppress(ValueError):
            values[name] = float(text)
    return values


def recipe_value(item: str, name: str, text: str, kind: type) -> float | int | str:
    if kind is str:
        if text not in OPTIMISERS:
            raise UserError(f"--recipe {item!r}: there are {', '.join(OPTIMISERS)}")
        return text
    number = "a whole number" if kind is int else "a number"
    bounds = "above 0" if name in ABOVE_0 else "of 0 or more"
    most = math.inf
    if name in SHARES:
        bounds = "from 0 to 1"
        most = 1.0
    with contextlib.suppress(ValueError):
        value = kind(text)
        good = 0 <= value <= most and value < math.inf
        if good and (value > 0 or name not in ABOVE_0):
            return value
    raise UserError(f"--recipe {item!r} wants {number} {bounds}")


def make_world(args: argparse.Namespace, config: Config):
    """The clips of --data, for a model of this config."""
    with as_user_error():
        if are_latents(args.data):
            return Latents(Path(args.data), config, args.seed)
        return open_world(args.data, config.frames, config.height, args.seed, args.layout,
                          args.border)


def check_flags(args: argparse.Namespace, recipes: dict, world, config: Config) -> None:
    """UserError for flags that do not go together; a line for a world that they cut short."""
    if world.frames < world.whole:
        say(f"a clip of {world.frames} frames does not show all of {world.name}: "
            f"--config frames={world.whole} --config window={world.whole} does")
    for item in args.recipe:
        name, _, _ = item.partition("=")
        users = USED_BY.get(name, tuple(recipes))
        if not set(users).intersection(recipes):
            raise UserError(f"--recipe {item}: stage {args.stage} has no use for it; "
                            f"{' and '.join(users)} has")
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
    if "dmd" in recipes and config.horizon > config.frames:
        raise UserError("stage dmd goes on with videos whose chunks stand at the horizon, which "
                        "so may be no longer than a clip: leave --config horizon away")
    if args.curve and (world.name not in JUDGES or args.stage == "score"):
        raise UserError("--curve judges rollouts in a world whose truth is known "
                        f"({', '.join(JUDGES)}); not in {world.name}, nor of a score model")
    if "conversion" in args.given and not args.from_dense:
        raise UserError("--conversion says how a dense model becomes MLA: name the model with "
                        "--from-dense")
    if args.from_dense and (args.attention == "dense" or args.stage == "score" or args.start):
        raise UserError("--from-dense makes the MLA model that stage tf, cd or dmd starts from:"
                        " it does not go with --attention dense, --stage score or --start")
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
        model = model_of(config)
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
    name, else what the stage before left in --out, else the new weights given. `args.started`
    becomes the stage of the model's weights, or "scratch"."""
    out = Path(args.out)
    args.started = "scratch"
    args.judge = ""
    origins = []
    start = Path(args.start or out / f"{allowed[0]}.pt")
    left = allowed[0] != "" and start.is_file()
    if stage == converting_stage(args):
        model = from_dense(args, stage, model.config, world)
        args.started = "dense"
        origins.append(f"{args.from_dense}, made MLA by its {args.conversion}")
    elif args.start or left or "" not in allowed:
        model, args.started = load_start(start, stage, allowed, model.config, world)
        origins.append(str(start))
    if stage == "dmd":
        path = Path(args.score or out / "score.pt")
        score, _ = load_start(path, stage, ("score",), model.config, world)
        args.judge = score.config.attention
        origins.append(str(path))
    return model, score, " and ".join(origins) or "scratch"


def load_start(path: Path, stage: str, allowed: tuple[str, ...], config: Config,
               world) -> tuple[VideoDiT, str]:
    """(the weights that a stage starts from, the stage that left them); UserError that names
    both sides if they are of another kind. `allowed` are the stages that it may start from, ""
    being from scratch."""
    names = [name for name in allowed if name]
    if not path.is_file():
        needed = " or ".join(f"a {name} model" for name in names)
        flag = "--start"
        if stage == "dmd" and allowed == ("score",):
            flag = "--score"
        raise UserError(f"stage {stage} needs {needed}, and there is none at {path}: train it "
                        f"with --stage {allowed[0] or stage}, or name one with {flag}")
    model, about = load_model(path)
    if allowed == ("score",) and model.config.attention == "dense":
        config = dense_like(model.config, config)          # it may judge MLA of any sizes
    check_start(path, model.config, about, stage, allowed, config, world)
    return model.float(), about["stage"]


def dense_like(theirs: Config, config: Config) -> Config:
    """`config` with dense attention, and for sizes that it has no use for those of `theirs`."""
    own = asdict(theirs)
    unused = {name: own[name] for name in MLA_ALONE}
    return replace(config, **{**unused, "attention": "dense"})


def judge_like(args: argparse.Namespace, config: Config) -> Config:
    """That of the real score of a run: of the model, or dense."""
    if args.judge == "dense":
        return replace(config, attention="dense")
    return config


def check_start(path: Path, theirs: Config, about: dict, stage: str, allowed: tuple[str, ...],
                config: Config, world) -> None:
    """UserError that names both sides unless a model of this config, trained so, may start a
    `stage` of `config` in `world`."""
    names = [name for name in allowed if name]
    found = {"stage": about.get("stage"), "data": about.get("data"), **asdict(theirs)}
    needed = {"stage": " or ".join(names), "data": world.name, **asdict(config)}
    if found["stage"] in allowed:
        needed["stage"] = found["stage"]
    if about.get("fingerprint") == world.fingerprint:      # the same clips by another name
        needed["data"] = found["data"]
    elif "fingerprint" in about and found["data"] == world.name:       # other clips by the same
        found["data"] += f" ({about['fingerprint']})"
        needed["data"] += f" ({world.fingerprint})"
    for what, theirs in found.items():
        if theirs != needed[what]:
            raise UserError(f"stage {stage} cannot start from {path}: its {what} is {theirs}, "
                            f"and {needed[what]} is needed")


def converting_stage(args: argparse.Namespace) -> str | None:
    """The stage that starts from the model of --from-dense; None without one. The score model
    is not made from it: it is of another kind."""
    if not args.from_dense:
        return None
    return "tf" if args.stage == "all" else args.stage


def check_conversion(args: argparse.Namespace, ahead: list[str], config: Config, world) -> None:
    """UserError if one of the stages `ahead` is to start from a dense model that cannot become
    MLA of `config`: now, and not when that stage begins."""
    stage = converting_stage(args)
    if stage in ahead and are_latents(args.data):
        wan_training.load_dense(args, config)
    elif stage in ahead:
        load_dense(args.from_dense, stage, config, world)


def load_dense(source: str, stage: str, config: Config, world) -> VideoDiT:
    """The dense model of --from-dense; UserError for a file of another kind, or whose sizes,
    stage or data do not fit."""
    path = find_model(Path(source))
    if not path.is_file():
        raise UserError(f"--from-dense names a dense model, and there is none at {path}: train "
                        "one with `python train.py --attention dense`")
    model, about = load_model(path)
    needed = dense_like(model.config, config)
    check_start(path, model.config, about, stage, DENSE[stage], needed, world)
    with as_user_error():
        check_alike(model.config, config)
    return model.float()


def from_dense(args: argparse.Namespace, stage: str, config: Config, world) -> VideoDiT:
    """The MLA model of `config` that the model of --from-dense becomes, by the inputs of its
    layers on clips of `world` or by its weights alone."""
    if are_latents(args.data):
        return wan_training.become_mla(args, config, world)
    dense = load_dense(args.from_dense, stage, config, world)
    if args.conversion == "weights":
        moments = moments_of_weights(dense)
    else:
        video, caption = world.batch(range(CLIPS))
        moments = moments_on(dense, video, caption, args.seed)
    return convert(dense, config, moments)


# ---- going on --------------------------------------------------------------------------------

@contextlib.contextmanager
def sole_writer(out: Path) -> Iterator[None]:
    """Within it no other run writes to `out`. Process 0 writes for all, so it has the lock."""
    with contextlib.ExitStack() as held:
        if rank() == 0:
            held.enter_context(lock(out))
        yield


def asked_for(args: argparse.Namespace, world) -> dict:
    """What train.pt holds of the flags, so that --resume need not be given them again."""
    kept = {name: getattr(args, name) for name in KEPT}
    return {**kept, "machine": args.machine, "fingerprint": world.fingerprint,
            "started": args.started, "judge": args.judge}


def as_begun(args: argparse.Namespace, state: dict) -> argparse.Namespace:
    """The flags that are given now, and else those that the run was begun with."""
    asked = state["asked"]
    flags = dict(vars(args))
    for name in KEPT:
        if name not in args.given:
            flags[name] = asked[name]
    if "config" in args.given:             # a size that is not named again is no contradiction
        flags["config"] = [*asked["config"], *args.config]
    data = flags["data"]
    if "data" not in args.given and data not in WORLDS and not Path(data).exists():
        raise UserError(f"the run in {args.out} was trained on {data!r}, and there is no such "
                        "file now: name where it is with --data")
    flags["machine"] = asked["machine"]
    flags["started"] = asked["started"]
    flags["judge"] = asked["judge"]
    return argparse.Namespace(**flags)


def read_state(path: Path) -> dict:
    """The training state at `path`, or the one saved before it; UserError if it is none."""
    if not path.exists() and not previous(path).exists():
        raise UserError(f"there is no checkpoint at {path}, so no run to go on with: begin one "
                        "without --resume, or name the folder of another with --out")
    state = read_last_good(path, STATE)
    recipe = state["recipe"]
    if isinstance(state["asked"], dict):
        state["asked"] = {**BEFORE, **state["asked"]}
    good = isinstance(state["config"], dict) and isinstance(recipe, dict)
    if isinstance(recipe, dict):
        recipe = state["recipe"] = {**RECIPE_BEFORE, **recipe}
    if good:
        # An older file does not say what was no choice then: it is at its default.
        state["config"] = {**asdict(Config()), **state["config"]}
        numbers = [state["step"], recipe.get("steps"), recipe.get("batch"), recipe.get("seed")]
        whole = all(type(number) is int for number in numbers)
        good = whole and recipe.get("stage") in STAGES and were_flags(state["asked"])
    if not good:
        raise UserError(f"{path} is not a training state: its config, recipe, flags or step is "
                        "not of a run of this program")
    return state


def were_flags(asked) -> bool:
    """Is it something that `asked_for` can have said?"""
    if not isinstance(asked, dict) or asked.keys() != ASKED.keys():
        return False
    if not all(isinstance(asked[name], kind) for name, kind in ASKED.items()):
        return False
    stages = (*STAGES, "all")
    if asked["conversion"] not in ("data", "weights") or asked["judge"] not in JUDGE_KINDS:
        return False
    return (asked["stage"] in stages and asked["preset"] in PRESETS
            and asked["machine"] in ("cpu", "cuda", "mps"))


def check_resumable(path: Path, state: dict, args: argparse.Namespace, stages: list[str],
                    config: Config, world) -> None:
    """UserError that names both sides if a flag contradicts the run at `path`."""
    theirs = state["recipe"]
    asked = state["asked"]
    if theirs["stage"] not in stages:
        raise UserError(f"cannot resume {path}: it is at stage {theirs['stage']}, and you ask "
                        f"for {' '.join(stages)}")
    check_same(path, "config", state["config"], asdict(config))
    check_same(path, "seed", theirs["seed"], args.seed)
    check_same(path, "--from-dense", asked["from_dense"], args.from_dense)
    check_same(path, "--conversion", asked["conversion"], args.conversion)
    check_same(path, "--rate", asked["rate"], args.rate)
    check_same(path, "--recipe", as_values(asked["recipe"]), as_values(args.recipe))
    if args.batch is not None:
        check_same(path, "batch", theirs["batch"], args.batch)
    # Which clips they are decides, and not what their file is called.
    if world.fingerprint != asked["fingerprint"]:
        raise UserError(f"cannot resume {path}: it was trained with data {asked['data']!r} of "
                        f"fingerprint {asked['fingerprint']}, and what is in {args.data!r} now "
                        f"has {world.fingerprint}: these are other clips")


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
    trainer.saved = trainer.step
    trainer.saving += time.perf_counter() - start


@contextlib.contextmanager
def kept(trainer: Resumable, out: Path) -> Iterator[None]:
    """If what goes on in it is stopped, the user is told what is saved and how to go on. If a
    worker died, that is saved first: it is known between two steps."""
    try:
        yield
    except WorkerDied as error:
        if processes() == 1:               # the others, of several, wait for this one's part
            save(trainer, out)
        raise UserError(f"{error}; {how_to_go_on(trainer, out)}, and if it dies again with "
                        "--workers 0") from error
    except KeyboardInterrupt as stop:
        if rank() != 0 or trainer.saved is None:
            raise
        number = stop.args[0] if stop.args else signal.SIGINT
        raise KeyboardInterrupt(number, how_to_go_on(trainer, out)) from None


def how_to_go_on(trainer: Resumable, out: Path) -> str:
    return (f"saved at step {trainer.saved}; go on with: python train.py --resume "
            f"--out {quoted(out)}")


def quoted(path: Path) -> str:
    """As one would type it in a shell."""
    return shlex.quote(str(path))


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
    data = trainer.world.name
    found = evaluate(trainer.ema, unseen_captions(64, seed, data), frames, seed,
                     report=JUDGES[data].report, watch="judging 64 rollouts, frames",
                     **SAMPLERS[stage])
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
    own = {}
    vocabulary = trainer.world.vocabulary
    if vocabulary:
        own = {"words": " ".join(vocabulary.words), "prompts": "\n".join(trainer.world.prompts)}
    for name in names:
        save_model(out / f"{name}.pt", trainer.ema, data=trainer.world.name,
                   fingerprint=trainer.world.fingerprint, stage=recipe.stage,
                   steps=trainer.step, seed=recipe.seed, **own)


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
    """A GIF of videos that are `GIF_CLIPS` times as long as a clip of the training."""
    captions = torch.stack([trainer.world.encode(prompt) for prompt in trainer.world.prompts])
    draws = Draws(torch.Generator().manual_seed(trainer.recipe.seed))
    frames = GIF_CLIPS * trainer.model.config.frames
    gif = GifWriter(path)
    how = SAMPLERS[trainer.recipe.stage]
    made = rollout(Stream(trainer.ema, captions), frames, draws, **how)
    for chunk in watched(made, f"writing {path.name}, frames", frames):
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
    more = f"--frames 480 --out {quoted(out / 'long.gif')}"
    if isinstance(trainer.world, Latents):
        more = wan_training.write_sample(trainer, out)
    elif stage in SAMPLERS:
        write_sample(trainer, out / "sample.gif")
    if stage in SAMPLERS and rollouts and trainer.world.name in JUDGES:
        judged = report_survival(trainer.ema, rollouts, 10 * config.frames, recipe.seed,
                                 trainer.world.name, **SAMPLERS[stage])
    next_chunk = judge_next_chunk(trainer)
    if next_chunk:
        print(next_chunk_line(next_chunk, recipe.steps))
    figures = {
        **about, "stage": stage, "attention": config.attention, "steps": trainer.step,
        "batch": recipe.batch, "seed": recipe.seed,
        "training_seconds": round(trainer.seconds, 1),
        "saving_seconds": round(trainer.saving, 2),
        "processes": processes(), "threads": torch.get_num_threads(),
        "loss_by_noise": by_noise, "rollouts": rollouts, "survival": judged,
        "next_chunk": next_chunk}
    (out / f"report_{stage}.json").write_text(json.dumps(figures, indent=1))
    names = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    for line in loss_lines(trainer):
        print(line)
    print(f"trained {trainer.step} steps in {trainer.seconds / 60:.1f} minutes; in {out} now: "
          f"{', '.join(names)}")
    if stage in SAMPLERS:
        print(f"next: python sample.py --checkpoint {quoted(out / 'model.pt')} {more}")
