"""Teach a tiny video model, in the three stages of the paper: teacher forcing, consistency
distillation, distribution matching.

    python train.py                            stage tf: the toy model on bouncing shapes
    python train.py --stage all --out out/all  score, tf, cd, dmd, one after the other
    python train.py --stage cd                 one stage more, from what the last left in --out
    python train.py --data digits              real handwritten digits that move (scikit-learn)
    python train.py --data clips.npy           your own clips
    python train.py --attention dense          the baseline: the same model, standard attention
    python train.py --from-dense PATH          such a model becomes MLA and learns on, as the
                                               paper's did
    python train.py --from-dense wan.safetensors --data latents.safetensors
                                               released weights, on latents with rows of text
    python train.py --deterministic            the same bits every time
    python train.py --resume                   go on from out/train.pt, with its flags
    python train.py --resume --steps 4000      the same, up to 4000 steps in all

objectives.py says what each stage minimises. Here is how: the recipe, a step of each stage, the
loop, and the command line. engine/trainer.py makes a step exact, resumable and fast, and
engine/run_files.py has the files that a run reads and writes.
"""

import argparse
import math
import random
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from engine.command_line import (UserError, between_steps, check_bounds, default_device,
                                 pick_device, provenance, read_flags, repeatable, run)
from engine.homogeneous import model_of
from engine.judging import cache_line
from engine.muon import Muon
from engine.parallel import (any_of, join, mean_over_processes, my_device, processes, rank,
                             recordable, say, shard)
from engine.progress import Progress
from engine.run_files import (as_begun, asked_for, check_conversion, check_flags, check_memory,
                              check_nothing_is_lost, check_resumable, finish, judge,
                              judge_like, kept, make_config, make_world, overrides,
                              read_losses, read_state, report, save, size_name, sole_writer,
                              starting_weights, trainable, with_words_of)
from engine.trainer import (Resumable, blend, compiled, fast_products, frozen_copy,
                            recompute, rename_window, reopen_window, side_by_side)
from flow import FEW_SHIFT, FEW_STEPS, SAMPLERS, Stream
from mla_video import Config, VideoDiT
from objectives import (consistency_loss, critic_loss, dmd_gradient, dmd_loss, score_loss,
                        self_rollout, teacher_forcing_loss)

# The stages in their order, and what each may start from: the first unasked, if it is there;
# another where --start names it; "" is from scratch.
STARTS = {"score": ("",), "tf": ("score", ""), "cd": ("tf",), "dmd": ("cd", "tf")}
STAGES = tuple(STARTS)


# ---- the recipe ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Recipe:
    """How to train a stage."""

    stage: str = "tf"
    steps: int = 2000              # dmd: of the critic; every fifth is the generator's, too
    batch: int = 16
    lr_muon: float = 3e-3          # of the matrices of the blocks
    lr_adamw: float = 1.5e-3       # of everything else
    warmup: int = 50
    final: float = 0.05            # the rate at the end, as a share of the peak
    ema: float = 0.99              # what the moving average keeps of itself at a step
    clip: float = 1.0
    drop: float = 0.1              # score, tf: captions replaced by "none", so guidance exists
    spread: float = 1.0            # of the logit-normal noise level before its shift
    guidance: float = 1.0          # of the teacher in cd, of the real score in dmd; 1 is none
    critic: float = 1.0            # the critic's rates, as a multiple of the generator's
    shift: float = FEW_SHIFT       # dmd: of the noise at which videos are judged
    optimiser: str = "muon"        # of the matrices; "adamw": of all, betas (0, 0.999)
    every: int = 5                 # critic updates for one of the generator
    # Sampler steps at which the last chunk of a self-rollout may end.
    exits: tuple[int, ...] = tuple(range(FEW_STEPS))
    # Share of self-rollouts that begin new videos. Few, since old videos are what is used: a
    # speed that is right on average over young and old is too fast in the old. (To train on old
    # videos is ours: the paper's training never goes beyond the frames of a clip.)
    restart: float = 0.01
    switch: float = 0.1            # share of videos whose caption changes at a clip's end
    seed: int = 0


# What differs by stage. Distillation moves little, and at a high rate it shakes what teacher
# forcing has learned: motion turns jerky. The target of cd must pass an answer up 48 levels,
# so its average is short.
DISTILL = {
    "cd": dict(lr_muon=1.5e-4, lr_adamw=7.5e-5, ema=0.98),
    "dmd": dict(lr_muon=1e-4, lr_adamw=5e-5, critic=4.0),
}
# And by machine. A GPU has steps enough for lower rates and longer averages. The critic's own
# rate (critic x lr) is the same on both: it must keep up.
ON_CPU = {
    "score": dict(steps=1000),
    "tf": dict(steps=1600),
    "cd": dict(steps=300),
    "dmd": dict(steps=300),
}
ON_GPU = {
    "score": dict(steps=14_000, batch=64, lr_muon=4.5e-3, ema=0.998),
    "tf": dict(steps=20_000, batch=64, lr_muon=4.5e-3, ema=0.998),
    "cd": dict(steps=2000, batch=64, lr_muon=7.5e-5, lr_adamw=4e-5, ema=0.99),
    "dmd": dict(steps=1600, batch=64, lr_muon=4e-5, lr_adamw=2e-5, critic=10.0),
}


def recipe_for(stage: str, device: torch.device, **given) -> Recipe:
    """The recipe of a stage on this kind of device, with what is given."""
    machine = ON_GPU
    if device.type == "cpu":
        machine = ON_CPU
    settings = {**DISTILL.get(stage, {}), **machine[stage], **given}
    return Recipe(stage=stage, **settings)


def rate_at(step: int, recipe: Recipe) -> float:
    """The learning rate as a share of its peak: warm-up, then a cosine down to `final`."""
    if step < recipe.warmup:
        return (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    falling = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))           # 1 ... 0
    return recipe.final + (1 - recipe.final) * falling


def decay_at(step: int, recipe: Recipe) -> float:
    """What the moving average keeps of itself. While a network learns fast (score, tf) it is
    short: it spans about the last tenth of the steps so far."""
    if recipe.stage in ("cd", "dmd"):
        return recipe.ema
    return min(recipe.ema, (1 + step) / (10 + step))


# ---- one step --------------------------------------------------------------------------------

class Learner:
    """A network and the optimisers of its weights.

    Muon makes an update orthogonal, so that every direction of a matrix learns at one pace.
    There is one for the matrices of each block, and an AdamW for everything else. `times`
    multiplies the rates.
    """

    def __init__(self, model: VideoDiT, recipe: Recipe, times: float = 1.0):
        self.model = model
        self.clip = recipe.clip
        self.weights = list(model.parameters())
        self.optimisers = []
        others = {id(weight): weight for weight in self.weights}
        for block in model.blocks:
            matrices = [weight for weight in block.parameters() if is_matrix(weight)]
            if recipe.optimiser == "adamw":                # the paper's
                first = self.adamw(matrices, times * recipe.lr_muon, (0.0, 0.999), 0.01)
            else:
                first = Muon(matrices, lr=times * recipe.lr_muon, weight_decay=0.01)
            self.optimisers.append(first)
            for weight in matrices:
                del others[id(weight)]
        betas = (0.0, 0.999) if recipe.optimiser == "adamw" else (0.9, 0.95)
        rest = self.adamw(list(others.values()), times * recipe.lr_adamw, betas, 0.0)
        self.optimisers.append(rest)

    def adamw(self, weights: list[Tensor], lr: float, betas: tuple[float, float],
              decay: float) -> torch.optim.AdamW:
        return torch.optim.AdamW(weights, lr=lr, betas=betas, weight_decay=decay,
                                 capturable=recordable(self.weights[0].device))

    def step(self, loss: Tensor, rate: Tensor) -> Tensor:
        """Change the weights so that the loss falls; returns the loss, without its graph."""
        loss.backward()
        loss = mean_over_processes(loss, self.weights)     # and their gradients, too
        clip_grad_norm_(self.weights, self.clip)
        before = [weight.detach().clone() for weight in self.weights]
        for optimiser in side_by_side(self.optimisers, loss.device):
            optimiser.step()
        # The optimisers took a step at the peak rate. Both move weights in proportion to their
        # rate, so the step is shortened to `rate` of its length, and they never learn of it.
        blend(self.weights, before, 1 - rate)
        for weight in self.weights:
            weight.grad = None
        return loss.detach()


def is_matrix(weight: Tensor) -> bool:
    """Biases are not, nor is the modulation: six vectors that stand in one tensor."""
    return weight.dim() == 2 and min(weight.shape) > 6


def flow_step(trainer: "Trainer", x0: Tensor, caption: Tensor, rate: Tensor, fresh: Tensor):
    """score and tf: flow matching, of whole clips or of chunks given the clean ones before."""
    recipe = trainer.recipe
    objective = score_loss if recipe.stage == "score" else teacher_forcing_loss
    model = trainer.on_clips["model"]
    with trainer.precision():
        loss, _, _ = objective(model, x0, caption, trainer.draws,
                               drop=recipe.drop, spread=recipe.spread)
    loss = trainer.learner.step(loss, rate)
    trainer.average(fresh)
    return (loss,)


def distillation_step(trainer: "Trainer", x0: Tensor, caption: Tensor, rate: Tensor,
                      fresh: Tensor):
    """cd: the student is the model, its target the moving average, and its teacher the model as
    it was at the start."""
    student = trainer.on_clips["model"]
    target = trainer.on_clips["ema"]
    teacher = trainer.on_clips["teacher"]
    with trainer.precision():
        loss = consistency_loss(student, target, teacher, x0, caption, trainer.draws,
                                guidance=trainer.recipe.guidance)
    loss = trainer.learner.step(loss, rate)
    trainer.average(fresh)
    return (loss,)


STEPS = {"score": flow_step, "tf": flow_step, "cd": distillation_step}


def generator_step(trainer: "Trainer", exit: int, rate: Tensor, fresh: Tensor, *start: Tensor):
    """dmd: the model makes videos, and moves to where they are more likely to be real."""
    video, caption, end = own_video(trainer, exit, True, *start)
    real = trainer.on_clips["score"]
    fake = trainer.on_clips["critic"]
    with trainer.precision():
        gradient = dmd_gradient(video, caption, real, fake, trainer.draws,
                                guidance=trainer.recipe.guidance, k=trainer.recipe.shift)
    loss = trainer.learner.step(dmd_loss(video, gradient), rate)
    trainer.average(fresh)
    return (loss, *end)


def critic_step(trainer: "Trainer", exit: int, rate: Tensor, *start: Tensor):
    """dmd: the critic learns the score of the videos that the model makes now."""
    video, caption, end = own_video(trainer, exit, False, *start)
    critic = trainer.on_clips["critic"]
    with trainer.precision():
        loss = critic_loss(critic, video, caption, trainer.draws, k=trainer.recipe.shift)
    loss = trainer.critic.step(loss, rate)
    return (loss, *end)


def own_video(trainer: "Trainer", exit: int, record: bool, caption: Tensor,
              before: Tensor | None = None, *buffers: Tensor):
    """A clip length [B, F, ...] of the model's own making: new videos, or, given the captions
    `before` and the cache's buffers, more of those under way, some with another caption.

    Returns (video, its captions, what the next step needs to go on with it). In the end the
    window's frames are numbered anew (`rename_window`): so the next step, which may be
    a recorded CUDA graph, meets the same numbers.
    """
    cache = trainer.model.make_cache(len(caption))
    if buffers:
        reopen_window(cache, buffers)
        change = trainer.draws.uniform(len(caption), 1) < trainer.recipe.switch
        caption = torch.where(change, caption, before)
    stream = Stream(trainer.model, caption, cache)
    video = self_rollout(stream, trainer.draws, exit, record)
    rename_window(cache)
    return video, caption, (caption, *cache.buffers)


# ---- the trainer -----------------------------------------------------------------------------

class Trainer(Resumable):
    """The networks of a stage and what is done with them at a step.

    `model` is trained; `ema` is its moving average, which the stage ends with. In cd a frozen
    copy of the model is the teacher. In dmd `score` is the real score, frozen too, and the
    critic starts as its copy. `sharded` divides all of them among the processes. `compile`
    names a torch.compile backend for the passes over whole clips (`on_clips`).
    """

    def __init__(self, model: VideoDiT, recipe: Recipe, world, device: torch.device,
                 score: VideoDiT | None = None, sharded: bool = False,
                 compile: str | None = None):
        super().__init__(recipe, world, device)
        self.model = model.to(device).train()
        self.ema = frozen_copy(self.model)
        self.frozen = {}
        networks = {"model": self.model, "ema": self.ema}
        if recipe.stage == "cd":
            self.frozen["teacher"] = frozen_copy(self.model)
        if recipe.stage == "dmd":
            self.frozen["score"] = frozen_copy(score.to(device))
            networks["critic"] = frozen_copy(score).train().requires_grad_(True)
        networks.update(self.frozen)
        if sharded:                        # before the optimisers, which must hold the shards
            for network in networks.values():
                shard(network)
        if model.config.text:              # Wan's size: what one clip leaves would fill a GPU
            recompute(self.model)
        self.learner = Learner(self.model, recipe)
        self.critic = None
        if recipe.stage == "dmd":
            self.critic = Learner(networks["critic"], recipe, recipe.critic)
        torch.compiler.reset()             # an earlier stage's graphs do not count for this one
        self.on_clips = {}
        for name, network in networks.items():
            self.on_clips[name] = compiled(network, compile)

    def update(self, x0: Tensor, caption: Tensor) -> Tensor:
        """One step on one batch; returns its loss (on the device: to read it would wait for a
        GPU). `recorded` calls a step function, on a GPU by replaying its recording."""
        recipe = self.recipe
        self.seed_draws()                                  # from (seed, step)
        x0 = self.to_device(x0)
        caption = self.to_device(caption)
        rate = self.number(rate_at(self.step, recipe))
        fresh = self.number(1 - decay_at(self.step, recipe))
        if recipe.stage == "dmd":
            # Python's dice: the shape of the computation depends on what they show.
            dice = random.Random(f"{recipe.seed} {self.step}")
            if self.step % recipe.every == 0:
                self.on_own_videos("generator", generator_step, dice, rate, fresh, caption)
            loss = self.on_own_videos("critic", critic_step, dice, rate, caption)
        else:
            step = STEPS[recipe.stage]
            loss, = self.recorded(recipe.stage, step, x0, caption, rate, fresh)
            self.note(recipe.stage, loss)
        self.step += 1
        return loss

    def on_own_videos(self, name: str, step, dice: random.Random, *inputs: Tensor) -> Tensor:
        """A step of dmd: on new videos now and then, else on those of the last step, which
        become a clip length older each time."""
        exit = dice.choice(self.recipe.exits)
        under_way = self.videos
        new = under_way is None or dice.random() < self.recipe.restart
        if new:
            under_way = ()

        def step_with_exit(trainer, *inputs):
            return step(trainer, exit, *inputs)

        # Exit and kind of start change the computation: one recording for each.
        key = (name, exit, new)
        loss, *self.videos = self.recorded(key, step_with_exit, *inputs, *under_way)
        self.note(name, loss)
        return loss

    @torch.no_grad()
    def average(self, fresh: Tensor) -> None:
        """ema += fresh * (model - ema)"""
        blend(list(self.ema.parameters()), self.learner.weights, fresh)


# ---- the loop --------------------------------------------------------------------------------

def train(trainer: Trainer, out: Path, curve: int = 0, save_every: int | None = None,
          workers: int | None = None) -> list[dict]:
    """Run up to recipe.steps in all.

    Saves train.pt at once (what cannot be written is better known now), every `save_every`
    steps, at the end, and when asked to stop (Ctrl-C, SIGTERM, SIGHUP). With `curve`, judges 64
    rollouts every so many steps and returns what it found. `workers` processes draw the clips.
    trainer.seconds counts training with its saves, and not the judging. UserError that names
    the loss that went first if training diverges; then train.pt is the last good one.
    """
    steps = trainer.recipe.steps
    found = []
    if save_every is None:
        # A GPU's steps are short beside a save.
        save_every = 250 if trainer.device.type == "cpu" else 1000
    if trainer.step == 0:
        save(trainer, out)
    progress = Progress(f"training {trainer.recipe.stage}", steps, trainer.step,
                        shown=rank() == 0)
    start = time.perf_counter() - trainer.seconds
    with between_steps() as signals, progress:
        for step, (x0, caption) in enumerate(trainer.batches(workers), start=trainer.step + 1):
            trainer.update(x0, caption)
            if step % 10 == 0 or step == steps:            # to read losses waits for the GPU
                progress.note(read_losses(trainer, out))
            progress.advance()
            trainer.seconds = time.perf_counter() - start
            if step % save_every == 0 or step == steps:
                save(trainer, out)
            if curve and step % curve == 0:
                found.append(judge(trainer))
                start = time.perf_counter() - trainer.seconds
            if any_of(bool(signals), trainer.device):
                save(trainer, out)
                finish(trainer, out)
                raise KeyboardInterrupt(*signals[:1])
    return found


# ---- the command line ------------------------------------------------------------------------

def train_from(args: argparse.Namespace) -> None:
    """Everything is checked before anything is written. UserError for what the user can
    mend."""
    check_bounds(args, rate=(1e-6, 1e6), steps=(1, 10**9), batch=(1, 2**16), evaluate=(0, 10_000),
                 curve=(0, 10**9), save_every=(1, 10**9), seed=(0, 2**31), workers=(0, 64))
    device = pick_device(my_device(args.device))
    args.machine = device.type
    args.judge = ""
    join(device)
    out = Path(args.out)
    with sole_writer(out):
        state = None
        if args.resume:
            state = read_state(out / "train.pt")
            args = as_begun(args, state)
        train_stages(args, state, device)


def train_stages(args: argparse.Namespace, state: dict | None, device: torch.device) -> None:
    """The stages that are asked for, from the start, or from `state` on."""
    path = Path(args.out) / "train.pt"
    config = make_config(args, state)
    check_memory(config, device, processes() if args.shard else 1)
    world = make_world(args, config)
    config = with_words_of(world, config)
    stages = [args.stage]
    if args.stage == "all":
        stages = list(STAGES)
    recipes = {stage: make_recipe(args, stage, world) for stage in stages}
    ahead = stages
    if state is None:
        check_nothing_is_lost(path, recipes)
    else:
        check_resumable(path, state, args, stages, config, world)
        reached = state["recipe"]["stage"]
        recipes[reached] = recipe_to_go_on(args, state)
        stages = stages[stages.index(reached):]
        ahead = stages[1:]
    check_flags(args, recipes, world, config)
    check_conversion(args, ahead, config, world)
    any_of(False, device)                  # process 0 writes when all have seen what was there
    with fast_products(), repeatable(args.deterministic, device):
        for stage in stages:
            train_stage(args, recipes[stage], config, world, state, device)
            any_of(False, device)          # all wait for what the next stage starts from
            state = None


def make_recipe(args: argparse.Namespace, stage: str, world) -> Recipe:
    """`recipe_for` with what the world and the command line set, and its own value where they
    set nothing."""
    given = {**getattr(world, "recipe", {}), "seed": args.seed}
    for name in ("steps", "batch"):
        value = getattr(args, name)
        if value is not None:
            given[name] = value
    given |= overrides(args.recipe, Recipe())
    recipe = recipe_for(stage, torch.device(args.machine), **given)
    return replace(recipe, lr_muon=args.rate * recipe.lr_muon,
                   lr_adamw=args.rate * recipe.lr_adamw)


def recipe_to_go_on(args: argparse.Namespace, state: dict) -> Recipe:
    """That of train.pt, whatever machine this is, up to --steps if they are given.

    With other --steps the rate is that of a run of so many from here on: past the end of a run
    it rises again, and falls once more. (Twice the steps of a toy run so brought its loss from
    0.28 to 0.23; at the last rate, to 0.26; an unbroken run of that length reaches 0.21. The
    average gets no worse meanwhile.)
    """
    saved = state["recipe"]
    kinds = {name: type(value) for name, value in asdict(Recipe()).items()}
    if kinds != {name: type(value) for name, value in saved.items()}:
        raise UserError("the recipe in train.pt is of another version of this program")
    old = Recipe(**saved)
    new = old
    if "steps" in args.given:
        new = replace(old, steps=args.steps)
    step = state["step"]
    if "steps" in args.given and args.steps < step:
        raise UserError(f"stage {new.stage} has made {step} steps already: --steps says how many "
                        "there will be in all")
    if step >= new.steps:
        say(f"stage {new.stage} is at its end, step {step} of {new.steps} (further: more "
            "--steps)")
    elif new.steps != old.steps:
        say(f"{new.steps} steps instead of {old.steps}: the learning rate is now that of a run "
            f"of {new.steps}, and goes from {rate_at(step, old):.0%} of its peak to "
            f"{rate_at(step, new):.0%}")
    return new


def train_stage(args: argparse.Namespace, recipe: Recipe, config: Config, world,
                state: dict | None, device: torch.device) -> None:
    """One stage from its start, or from `state`, to its files and its figures."""
    stage = recipe.stage
    out = Path(args.out)
    torch.manual_seed(args.seed)       # initial weights; all else depends on (seed, step)
    model = model_of(config)
    score = None
    if stage == "dmd":
        score = VideoDiT(judge_like(args, config))
    origin = "train.pt"
    if state is None:
        model, score, origin = starting_weights(args, model, score, stage,
                                                STARTS[stage], world)
    backend = "inductor" if args.compile else None
    trainer = Trainer(model, recipe, world, device, score, args.shard, backend)
    trainer.asked = asked_for(args, world)
    if state is not None:
        trainer.restore(state)
    about = provenance(device)         # now: a long run must name the commit it started from
    out.mkdir(parents=True, exist_ok=True)
    weights = sum(weight.numel() for weight in model.parameters())
    where = device.type
    if args.machine != where:
        where += f", by train.pt's recipe, which is for {args.machine}"
    say(f"{stage}: {config.attention} {size_name(args, config)}, {weights:,} parameters; "
        f"{recipe.batch} clips of {config.frames} frames a step from {world.name}; "
        f"{where}; starts from {origin}")
    if world.reads:
        say(f"data         {world.reads}")
    say(cache_line(trainer.model, 1))
    curve = args.curve
    if stage not in SAMPLERS:                              # a score model cannot stream
        curve = 0
    with kept(trainer, out):
        found = train(trainer, out, curve, args.save_every, args.workers)
        finish(trainer, out)
        trainer.close()
        if rank() == 0:
            about |= {"deterministic": args.deterministic, "curve": found}
            report(trainer, out, args.evaluate, about)


def make_parser() -> argparse.ArgumentParser:
    """All flags; engine/run_files.py says which of them a run keeps."""
    parser = argparse.ArgumentParser(
        description="Train a causal video diffusion transformer on small clips, in the paper's "
                    "three stages.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_what(parser.add_argument)
    add_how(parser.add_argument)
    return parser


def add_what(add) -> None:
    """Flags that say what is trained, and from what."""
    add("--stage", default="tf", choices=(*STAGES, "all"),
        help="score: bidirectional model of whole clips, which tf may start from and dmd "
             "needs; tf: teacher forcing; cd: consistency distillation; dmd: distribution "
             "matching; all: one after the other")
    add("--attention", default="mla", choices=("mla", "dense"))
    add("--data", default="shapes",
        help="shapes, digits, occluder, recall (which needs --config frames=36 --config "
             "window=36), or clips of your own: a .npy, .npz, .gif or video file, a folder of "
             "them, or of numbered pictures. For released weights: a .safetensors file with "
             "latents [clips, frames, channels, h, w] and text [clips, rows, width]")
    add("--layout", metavar="AXES",
        help="the axes of your array in their order: N clips, T frames, C channels, H and W "
             "pixels, e.g. NTHW; needed where its shape does not tell")
    add("--border", action="store_true",
        help="put whole frames of your clips into a black border, instead of cutting out their "
             "centre")
    add("--preset", default="toy", choices=trainable(), help="size of the model")
    add("--config", action="append", default=[], metavar="NAME=N",
        help="another size, e.g. window=6; may be repeated")
    add("--out", default="out", help="folder for everything that is written")
    add("--start", metavar="PATH",
        help="weights that the stage starts from (default: OUT/score.pt for tf, if it is "
             "there; OUT/tf.pt for cd, OUT/cd.pt for dmd)")
    add("--from-dense", metavar="PATH",
        help="a model of --attention dense, trained on the same data; as MLA it is what the "
             "stage starts from (with --stage all: stage tf). Or released weights of Wan's "
             "shape, with latents as --data")
    add("--conversion", default="data", choices=("data", "weights"),
        help="where --from-dense cuts: where inputs made of 32 clips lose least, or by the "
             "weights alone")
    add("--score", metavar="PATH", help="score model that dmd needs (default: OUT/score.pt)")
    add("--resume", action="store_true",
        help="go on from the checkpoint in --out, with the flags that it was begun with, up to "
             "--steps in all; more steps than before make a longer schedule, whose learning "
             "rate is higher at first")


def add_how(add) -> None:
    """Flags that say how long, how fast, and how it is judged."""
    defaults = []
    for stage in STAGES:
        defaults.append(f"{stage} {ON_CPU[stage]['steps']} / {ON_GPU[stage]['steps']}")
    add("--steps", type=int,
        help="steps of each stage, earlier runs included (default, on a CPU / a GPU: "
             f"{', '.join(defaults)})")
    add("--batch", type=int, help="clips per step (default: 16 on a CPU, 64 on a GPU)")
    add("--rate", type=float, default=1.0, metavar="TIMES",
        help="learning rates, as a multiple of the recipe's")
    add("--recipe", action="append", default=[], metavar="NAME=VALUE",
        help="another value in the recipe of every stage that is trained, e.g. guidance=3; may "
             "be repeated (class Recipe in train.py)")
    add("--seed", type=int, default=0)
    add("--device", default=default_device())
    add("--evaluate", type=int, default=64, metavar="N",
        help="rollouts to judge at the end of a stage; 0: none")
    add("--curve", type=int, default=0, metavar="STEPS",
        help="judge 64 rollouts every so many steps, too; 0: never")
    add("--save-every", type=int, metavar="STEPS",
        help="steps between two saves of train.pt (default: 250 on a CPU, 1000 on a GPU)")
    add("--workers", type=int, metavar="N",
        help="processes that draw clips, besides the one that trains (default: 0 on a CPU, 4 "
             "on a GPU)")
    add("--shard", action="store_true",
        help="with torchrun: divide weights and optimisers among the processes, too")
    add("--compile", action="store_true",
        help="let torch.compile fuse the passes over whole clips: on a GPU faster steps, after "
             "a minute of compiling; needs a C compiler")
    add("--deterministic", action="store_true",
        help="the same bits from every run with the same flags, device, number of processes "
             "and threads, and versions; slower on a GPU")


def main(argv: list[str] | None = None) -> None:
    """The command line; `argv` None takes the process' own. Input that it cannot use is said in
    one line, exit code 2."""
    run(train_from, read_flags(make_parser(), argv))


if __name__ == "__main__":
    main()
