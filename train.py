"""Teach a tiny video model, in the three stages of the paper: teacher forcing, consistency distillation, distribution matching.

    python train.py                                    stage tf: the toy model on bouncing shapes, minutes, on a CPU too
    python train.py --stage all --out out/all          score, tf, cd, dmd, one after the other (objectives.py says what each is)
    python train.py --stage cd                         one stage more, from what the last one left in --out
    python train.py --data digits --out out/digits     real handwritten digits that move (needs scikit-learn)
    python train.py --data clips.npy --out out/mine    your own clips
    python train.py --attention dense --out out/dense  the baseline: the same model with standard attention
    python train.py --deterministic                    the same bits every time
    python train.py --resume --steps 4000              go on from out/train.pt up to 4000 steps in all

Writes to --out: train.pt (all that is needed to go on), STAGE.pt (the weights a stage ends with), model.pt (those that sample.py plays: of
the last stage that can stream), sample.gif, loss_STAGE.png and report_STAGE.json (the figures it prints, with command, commit, device,
versions).
"""

import argparse
import contextlib
import json
import os
import signal
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean

import torch
from tqdm import tqdm

from checkpoint import load_model, previous, read_last_good, save_model, write_atomically
from mla_video import PRESETS, Config, VideoDiT
from objectives import score_loss, teacher_forcing_loss
from parallel import any_of, join, mine, rank, world as processes
from sample import (PROMPTS, SAMPLERS, GifWriter, cache_line, evaluate, pick_device, provenance, report_survival, rollout, run, to_pixels,
                    unseen_captions)
from toy_data import CAPTION_SLOTS, WORDS, encode_caption, make_world
from trainer import ON_CPU, ON_GPU, STAGES, Recipe, Trainer, recipe_for

# What a stage may start from: the first by itself, if it is in --out, another where --start names it. "" is from scratch.
STARTS = {"score": ("",), "tf": ("score", ""), "cd": ("tf",), "dmd": ("cd", "tf")}


def save(trainer: Trainer, out: Path) -> None:
    """Write train.pt; ValueError, and the file as it was, if the weights are not numbers any more."""
    learners = [trainer.learner, *([trainer.critic] if trainer.critic else [])]
    if not all(weight.isfinite().all() for learner in learners for weight in learner.weights):
        raise ValueError(f"training diverged: the weights are not finite at step {trainer.step}; the last good checkpoint is kept in {out}")
    start, state = time.perf_counter(), trainer.state()
    if rank() == 0:
        write_atomically(out / "train.pt", state, keep=True)
    trainer.saving += time.perf_counter() - start


@contextlib.contextmanager
def between_steps():
    """Ctrl-C and SIGTERM wait until a step is whole, or the weights that are saved would be half-way between two steps; a second one
    does not wait. Yields the list of signals so far."""
    asked = []

    def ask(number, frame):
        if asked:
            raise KeyboardInterrupt(number)
        asked.append(number)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def repeatable(asked: bool, device: torch.device):
    """Within it, if asked, torch takes only algorithms that give the same bits every time; ValueError in one line where there is none.

    Data and noise depend on (seed, step) alone, so what is left is the order in which a GPU's threads add: in index_add and its kind, and
    in attention's backward pass, where torch now takes flash or memory-efficient attention in their ordered form, never cuDNN's.
    cuBLAS, too, adds in an order that depends on its scratch memory, whose size it reads from the environment when it starts: at the
    first product, so after this line. On a CPU the order is that of the threads, so their number must be the same.
    """
    if not asked:
        yield
        return
    if device.type == "mps":
        raise ValueError("--deterministic is for cpu and cuda: Apple's MPS makes no such promise")
    if device.type == "cuda" and os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8") not in (":4096:8", ":16:8"):
        raise ValueError("--deterministic needs the environment's CUBLAS_WORKSPACE_CONFIG to be :4096:8 or :16:8, or not set; it is "
                         + repr(os.environ["CUBLAS_WORKSPACE_CONFIG"]))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:                          # its first sentence names the operation
        if "determinis" not in str(error).lower():
            raise
        raise ValueError(f"--deterministic cannot be kept on this {device.type}: {str(error).split('. ')[0]}") from error
    finally:
        torch.use_deterministic_algorithms(before)


def train(trainer: Trainer, out: Path, curve: int = 0, save_every: int | None = None) -> list[dict]:
    """Run up to recipe.steps in all. Saves at once (what cannot be written is better known now), every `save_every` steps, at the end,
    and on Ctrl-C or SIGTERM. With `curve`, judges 64 rollouts every so many steps and returns what it found; trainer.seconds counts
    training with its saves, and not the judging. ValueError that names the loss that went first if training diverges; train.pt is then
    the last good one."""
    steps, stage, found = trainer.recipe.steps, trainer.recipe.stage, []
    save_every = save_every or (250 if trainer.device.type == "cpu" else 1000)         # a GPU's steps are short beside a save
    bar = tqdm(total=steps, initial=trainer.step, desc=f"training {stage}", dynamic_ncols=True, disable=rank() > 0)
    if trainer.step == 0:
        save(trainer, out)
    start = time.perf_counter() - trainer.seconds
    with between_steps() as asked, bar:
        for x0, caption in trainer.batches():
            trainer.update(x0, caption)
            bar.update()
            saving = trainer.step % save_every == 0 or trainer.step == steps
            if trainer.step % 10 == 0 or trainer.step == steps:        # reading losses waits for the GPU: not every step
                try:
                    trainer.read_losses()
                except ValueError as error:
                    raise ValueError(f"{error}; the last good checkpoint is kept in {out}") from None
                bar.set_postfix({name: f"{mean(value for _, value in values[-10:]):.4f}" for name, values in trainer.losses.items()})
            trainer.seconds = time.perf_counter() - start
            if saving:
                save(trainer, out)
            if curve and trainer.step % curve == 0:
                report = evaluate(trainer.ema, unseen_captions(64, trainer.recipe.seed), 10 * trainer.model.config.frames,
                                  trainer.recipe.seed, **SAMPLERS[stage])
                found.append({"step": trainer.step, "seconds": round(trainer.seconds, 1), **report})
                tqdm.write(f"step {trainer.step}, {trainer.seconds:.0f} s: survival {100 * report['survival']:.0f} %")
                start = time.perf_counter() - trainer.seconds
            if any_of(bool(asked), trainer.device):
                save(trainer, out)
                finish(trainer, out)
                raise KeyboardInterrupt(*asked[:1])
    return found


def finish(trainer: Trainer, out: Path) -> None:
    """Write the moving average: STAGE.pt, from which the next stage starts, and model.pt, which sample.py plays."""
    r = trainer.recipe
    trainer.put_together()
    if rank():
        return
    for name in (r.stage, "model") if r.stage in SAMPLERS else (r.stage,):
        save_model(out / f"{name}.pt", trainer.ema, data=trainer.world.name, stage=r.stage, steps=trainer.step, seed=r.seed)


def draw_losses(losses: dict[str, list[tuple[int, float]]], stage: str, path: Path) -> None:
    """The loss curves as a picture, with their running means."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, pairs in losses.items():
        steps, values = zip(*pairs)
        axes.semilogy(steps, values, color="0.8")
        axes.semilogy(steps, [mean(values[max(0, i - 9):i + 1]) for i in range(len(values))], label=f"{name}, mean of the last 100 steps")
    axes.set(xlabel="step", ylabel="loss", title=f"stage {stage}")
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


@torch.no_grad()
def loss_by_noise(trainer: Trainer, bins: int = 5) -> list[tuple[float, float, float]]:
    """[(sigma from, to, mean loss)] of the averaged model on 4 unseen batches: the mean loss hides that low noise (detail) and
    high noise (what, where) are learned at different times."""
    r, total = replace(trainer.recipe, drop=0.0), torch.zeros(2, bins)
    objective = score_loss if r.stage == "score" else teacher_forcing_loss
    for i in range(4):
        x0, caption = (part.to(trainer.device) for part in trainer.batch(2**31 + i))
        generator = torch.Generator(trainer.device).manual_seed(i)
        _, sigma, error = objective(trainer.ema, x0, caption, r, generator)
        index = (sigma.cpu() * bins).long().clamp(max=bins - 1).flatten()
        total.index_add_(1, index, torch.stack((error.cpu().flatten(), torch.ones(index.shape))))
    return [(i / bins, (i + 1) / bins, (total[0, i] / total[1, i]).item()) for i in range(bins) if total[1, i]]


def main(argv: list[str] | None = None) -> None:
    """The command line; `argv` None takes the process' own. Exits with code 2 and one line on input it cannot use."""
    parser = argparse.ArgumentParser(description="Train a causal video diffusion transformer on small clips, in the paper's three stages.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--stage", default="tf", choices=(*STAGES, "all"), help="score: bidirectional model of whole clips, which tf may "
                        "start from and dmd needs; tf: teacher forcing; cd: consistency distillation; dmd: distribution matching; all: one "
                        "after the other")
    parser.add_argument("--attention", default="mla", choices=("mla", "dense"))
    parser.add_argument("--data", default="shapes", help="shapes, digits, occluder, or a .npy, .npz, .gif or video file")
    parser.add_argument("--preset", default="toy", choices=tuple(PRESETS), help="size of the model")
    parser.add_argument("--config", action="append", default=[], metavar="NAME=N", help="another size, e.g. window=6; may be repeated")
    parser.add_argument("--steps", type=int, help="steps of each stage, earlier runs included (default, on a CPU / a GPU: "
                        + ", ".join(f"{stage} {ON_CPU[stage]['steps']} / {ON_GPU[stage]['steps']}" for stage in STAGES) + ")")
    parser.add_argument("--batch", type=int, help="clips per step (default: 16 on a CPU, 64 on a GPU)")
    parser.add_argument("--out", default="out", help="folder for everything that is written")
    parser.add_argument("--start", metavar="PATH", help="weights that the stage starts from (default: OUT/score.pt for tf, if it is there; "
                        "OUT/tf.pt for cd, OUT/cd.pt for dmd)")
    parser.add_argument("--score", metavar="PATH", help="score model that dmd needs (default: OUT/score.pt)")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, up to --steps in all")
    parser.add_argument("--evaluate", type=int, default=64, metavar="N", help="rollouts to judge at the end of a stage; 0: none")
    parser.add_argument("--curve", type=int, default=0, metavar="STEPS", help="judge 64 rollouts every so many steps, too; 0: never")
    parser.add_argument("--save-every", type=int, metavar="STEPS", help="steps between two saves of train.pt (default: 250 on a CPU, 1000 "
                        "on a GPU)")
    parser.add_argument("--shard", action="store_true", help="with torchrun: divide weights and optimisers among the processes, too")
    parser.add_argument("--compile", action="store_true", help="let torch.compile fuse the passes over whole clips: on a GPU faster "
                        "steps, after a minute of compiling; needs a C compiler")
    parser.add_argument("--deterministic", action="store_true", help="the same bits from every run with the same flags, device, number of "
                        "processes and threads, and versions; slower on a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run(train_from, parser.parse_args(argv))


def make_config(args) -> Config:
    """The preset with --attention and every --config NAME=N applied; ValueError in one line for what cannot be."""
    sizes = [name for name, value in asdict(PRESETS[args.preset]).items() if isinstance(value, int) and name not in ("words", "slots")]
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


def make_recipe(args, stage: str, device: torch.device) -> Recipe:
    """`trainer.recipe_for` with what the command line sets, and its own value where it sets nothing."""
    given = {name: getattr(args, name) for name in ("steps", "batch") if getattr(args, name) is not None}
    return recipe_for(stage, device, seed=args.seed, **given)


def train_from(args) -> None:
    """Everything is checked before anything is written. ValueError in one line for what the user can mend."""
    device, out = join(pick_device(mine(args.device))), Path(args.out)
    for name, low, top in (("steps", 1, 10**9), ("batch", 1, 2**16), ("evaluate", 0, 10_000), ("curve", 0, 10**9), ("save_every", 1, 10**9),
                           ("seed", 0, 2**31)):
        if (value := getattr(args, name)) is not None and not low <= value <= top:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {low} and at most {top}, got {value}")
    config = make_config(args)
    check_memory(config, device, processes() if args.shard else 1)
    world = make_world(args.data, frames=config.frames, size=config.height, seed=args.seed)
    stages = STAGES if args.stage == "all" else (args.stage,)
    if args.shard and processes() == 1:
        raise ValueError("--shard divides a model among several processes: start them with torchrun --nproc_per_node=N train.py ...")
    if args.shard and args.compile:
        raise ValueError("--shard and --compile do not go together: weights that are put together block by block break the graphs")
    for stage in stages:
        if (batch := make_recipe(args, stage, device).batch) % processes():
            raise ValueError(f"a batch of {batch} clips cannot be divided among {processes()} processes: choose another --batch")
    if args.curve and (world.name != "shapes" or args.stage == "score"):
        raise ValueError(f"--curve judges rollouts in the shapes world, whose truth is known; not in {world.name}, nor of a score model")
    if args.start and args.stage in ("score", "all") or args.score and args.stage != "dmd":
        raise ValueError(f"--start is for the stages tf, cd and dmd, and --score for dmd; --stage {args.stage} has no use for what you name")
    state = load_state(out / "train.pt", stages, config, world, args, device) if args.resume else None
    if state:
        stages = stages[stages.index(state["recipe"]["stage"]):]
    elif (out / "train.pt").exists() or previous(out / "train.pt").exists():
        other = read_state(out / "train.pt")
        if args.stage in ("all", other["recipe"]["stage"]) or other["step"] < other["recipe"]["steps"]:
            raise ValueError(f"{out / 'train.pt'} exists (stage {other['recipe']['stage']}, step {other['step']}): go on from it with "
                             "--resume, or choose another folder with --out")
    warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")       # RMSNorm under autocast is right, if slower
    # Products of float32 matrices may use the fast units: TF32 on a GPU, oneDNN (on AMD severalfold faster than MKL) on a CPU.
    torch.set_float32_matmul_precision("medium")
    with repeatable(args.deterministic, device):
        for stage in stages:
            train_stage(args, make_recipe(args, stage, device), config, world, state, device, out)
            any_of(False, device)                          # process 0 has written what the next stage starts from
            state = None


def check_memory(config: Config, device: torch.device, shards: int) -> None:
    """ValueError in one line if weights, gradients, average and optimisers cannot fit: better than the system's sudden end."""
    with torch.device("meta"):
        one, two = (sum(p.numel() for p in VideoDiT(replace(config, layers=n)).parameters()) for n in (1, 2))
    need = 4 * 5 * (one + (config.layers - 1) * (two - one)) // shards         # 4 bytes: weight, gradient, average, two moments
    room = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else \
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else need
    if need > room:
        raise ValueError(f"training this model takes {need / 2**30:,.0f} GiB for weights and optimisers alone, and there are "
                         f"{room / 2**30:,.0f}: choose a smaller --preset or --config, or more processes and --shard")


def train_stage(args, recipe: Recipe, config: Config, world, state: dict | None, device: torch.device, out: Path) -> None:
    """One stage from its start, or from `state`, to its files and its figures."""
    stage = recipe.stage
    torch.manual_seed(args.seed)                           # initial weights; everything later depends on (seed, step)
    model, score = VideoDiT(config), VideoDiT(config) if stage == "dmd" else None
    starts = []
    if state is None:
        start = Path(args.start or out / f"{STARTS[stage][0]}.pt")
        if args.start or start.is_file() and STARTS[stage][0] or "" not in STARTS[stage]:
            model = load_start(start, stage, STARTS[stage], config, world)
            starts.append(str(start))
        if stage == "dmd":
            starts.append(str(args.score or out / "score.pt"))
            score = load_start(Path(starts[-1]), stage, ("score",), config, world)
    trainer = Trainer(model, recipe, world, device, score, args.shard, "inductor" if args.compile else None)
    if state:
        trainer.restore(state)
    origin = provenance(device)                            # now: a long run must name the commit it started from
    out.mkdir(parents=True, exist_ok=True)
    print(f"{stage}: {config.attention} {args.preset}, {sum(p.numel() for p in model.parameters()):,} parameters; {recipe.batch} clips of "
          f"{config.frames} frames a step from {world.name}; {device.type}; starts from "
          + (" and ".join(starts) or ("train.pt" if state else "scratch")))
    if world.reads:
        print(f"data         {world.reads}")
    print(cache_line(trainer.model, 1))
    curve = train(trainer, out, args.curve if stage in SAMPLERS else 0, args.save_every)
    finish(trainer, out)
    if rank():
        return
    if trainer.losses:
        draw_losses(trainer.losses, stage, out / f"loss_{stage}.png")
    by_noise, judged = None, None
    if stage in ("score", "tf"):
        by_noise = loss_by_noise(trainer)
        print("loss by noise level: " + ", ".join(f"{a:.1f}-{b:.1f}: {loss:.4f}" for a, b, loss in by_noise))
    if stage in SAMPLERS:
        prompts = PROMPTS if world.name == "shapes" else ("",) * 4
        captions = torch.stack([encode_caption(prompt) for prompt in prompts])
        gif = GifWriter(out / "sample.gif")
        noise = torch.Generator().manual_seed(args.seed)
        for chunk in rollout(trainer.ema, captions, 10 * config.frames, generator=noise, **SAMPLERS[stage]):
            gif.append(to_pixels(chunk))
        if args.evaluate and world.name == "shapes":
            judged = report_survival(trainer.ema, args.evaluate, 10 * config.frames, args.seed, **SAMPLERS[stage])
    report = {**origin, "stage": stage, "attention": config.attention, "steps": trainer.step, "batch": recipe.batch, "seed": args.seed,
              "training_seconds": round(trainer.seconds, 1), "saving_seconds": round(trainer.saving, 2),
              "processes": processes(), "threads": torch.get_num_threads(), "deterministic": args.deterministic,
              "loss_by_noise": by_noise, "rollouts": args.evaluate, "survival": judged, "curve": curve}
    (out / f"report_{stage}.json").write_text(json.dumps(report, indent=1))
    print(f"trained {trainer.step} steps in {trainer.seconds / 60:.1f} minutes; in {out} now: "
          + ", ".join(sorted(path.name for path in out.iterdir())))
    if stage in SAMPLERS:
        print(f"next: python sample.py --checkpoint {out / 'model.pt'} --frames 480 --out {out / 'long.gif'}")


def load_start(path: Path, stage: str, allowed: tuple[str, ...], config: Config, world) -> VideoDiT:
    """The weights that a stage starts from; ValueError in one line that names both sides if they are of another kind."""
    if not path.is_file():
        needed = " or ".join(f"a {name} model" for name in allowed if name)
        raise ValueError(f"stage {stage} needs {needed}, and there is none at {path}: train it with --stage {allowed[0] or stage}, or name "
                         f"one with {'--score' if stage == 'dmd' and allowed == ('score',) else '--start'}")
    model, about = load_model(path)
    pairs = [("stage", about.get("stage"), " or ".join(name for name in allowed if name)), ("data", about.get("data"), world.name)]
    pairs += [(name, value, asdict(config)[name]) for name, value in asdict(model.config).items()]
    for what, theirs, mine in pairs:
        if theirs != mine and not (what == "stage" and theirs in allowed):
            raise ValueError(f"stage {stage} cannot start from {path}: its {what} is {theirs}, and {mine} is needed")
    return model.float()


def read_state(path: Path) -> dict:
    """The training state at `path`, or the one saved before it; ValueError in one line if it is none."""
    state = read_last_good(path, {"config", "recipe", "data", "step", "seconds", "learner", "critic", "frozen", "videos", "ema",
                                  "losses", "recent"})
    config, recipe = state["config"], state["recipe"]
    if not isinstance(config, dict) or not isinstance(recipe, dict) or recipe.get("stage") not in STAGES or \
            not all(type(number) is int for number in (state["step"], *(recipe.get(name) for name in ("steps", "batch", "seed")))):
        raise ValueError(f"{path} is not a training state: its config, recipe or step is not of a run of this program")
    return state


def load_state(path: Path, stages: tuple[str, ...], config: Config, world, args, device: torch.device) -> dict:
    """The training state at `path`, if it is a run of these stages, config, data, batch and seed; ValueError in one line otherwise."""
    state = read_state(path)
    stage = state["recipe"]["stage"]
    if stage not in stages:
        raise ValueError(f"cannot resume {path}: it is at stage {stage}, and you ask for {' '.join(stages)}")
    recipe = make_recipe(args, stage, device)
    for what, mine, theirs in (("config", asdict(config), state["config"]), ("data", world.name, state["data"]),
                               ("batch", recipe.batch, state["recipe"]["batch"]), ("seed", recipe.seed, state["recipe"]["seed"])):
        if mine != theirs:
            if isinstance(mine, dict):                     # name the settings that differ, not all of them
                mine, theirs = ({key: d[key] for key in mine if mine[key] != theirs.get(key) and key in d} for d in (mine, theirs))
            raise ValueError(f"cannot resume {path}: it was trained with {what} {str(theirs)[:200]}, and you ask for {mine}")
    return state


if __name__ == "__main__":
    main()
