"""The same bytes, ten times the memory: who still knows what the curtain hides?

    python -m experiments.memory               trains, judges, results/memory.json, pictures
    python -m experiments.memory --quick       a tiny model on few clips: minutes on a CPU
    python -m experiments.memory --only draw   the pictures again, from the JSON and the models

In the recall world (toy_data.py) a subject is in view for 6 frames, a curtain hides it for up to
24, and so on. Every frame shows how long the curtain will stay, so the subject alone must be
remembered. Three models learn it alike, by teacher forcing on clips of 36 frames whose curtains
are of all lengths, so that one model can be judged behind each:

    mla     MLA with a window of 36 frames
    dense   dense attention with a window of 6: the same bytes, within 5 %
    wide    dense attention with a window of 36: ten times the bytes

Each makes --videos videos from 6 true frames on. Judged are the 6 frames in which the curtain
must be open again, by metrics.recalled: shares of them that show one subject (alive), in its
colour, in its shape, in both (survival). A frame that still shows the curtain shows none. Chance
is 1 of 6 colours and 1 of 3 shapes.

What can a window of 6 know? A chunk looks at 3 frames before it, but the rows of those frames
were made by layers that looked at 3 more. So 5 layers pass news on over 15 frames
(`reach`): behind a curtain of 12 frames the subject could come through, behind one of 15 not a
bit of it. tests/test_memory.py holds that by gradients.
"""

import argparse
import contextlib
import json
import math
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import active_children, get_context
from pathlib import Path
from statistics import mean
from threading import BrokenBarrierError

import torch
from torch import Tensor

if not __package__:                    # started by its path
    sys.path.insert(0, str(Path(__file__).parent.parent))

from engine.checkpoint import load_model, save_model
from engine.command_line import (UserError, check_bounds, default_device, pick_device,
                                 provenance, run, tell)
from engine.trainer import fast_products
from experiments.memory_figure import draw_figure, draw_gif
from flow import SAMPLERS, Draws, Stream, rollout
from metrics import alive, centroid, in_view, recalled
from mla_video import PRESETS, Config, VideoDiT
from toy_data import CAPTION_SLOTS, COLOURS, WORDS, Recall
from train import Trainer, recipe_for

SEEN = Recall.SEEN
KINDS = ("mla", "dense", "wide")
TURNS = 3                      # openings in the videos that are drawn
UNSEEN = 10_000                # seeds from here on are of clips that no training draws
# Seconds that a run takes besides its steps. Of several at a time the judging is slower.
BEGINNING = 20
JUDGING = 15
JUDGING_BESIDE = 6
TOY = replace(PRESETS["toy"], words=len(WORDS), slots=CAPTION_SLOTS)


@dataclass(frozen=True)
class Plan:
    """How much of everything."""
    config: Config                     # of mla; the others differ in attention and window
    small: int                         # the window of dense
    lengths: tuple[int, ...]           # of the curtains that are judged, the longest last
    openings: int                      # of the longest curtain, in a stream
    steps: int
    batch: int
    videos: int
    lr_muon: float
    ema: float

    def config_of(self, kind: str) -> Config:
        if kind == "mla":
            return self.config
        window = self.config.window
        if kind == "dense":
            window = self.small
        return replace(self.config, attention="dense", window=window)


FULL = Plan(replace(TOY, frames=36, window=36), small=6, lengths=(3, 6, 9, 12, 15, 18, 21, 24),
            openings=8, steps=4000, batch=24, videos=256, lr_muon=4e-3, ema=0.997)
QUICK = Plan(replace(TOY, dim=64, heads=2, layers=2, ffn=256, frames=15, window=15), small=6,
             lengths=(3, 6), openings=2, steps=40, batch=8, videos=8, lr_muon=3e-3, ema=0.99)


# ---- what they can know ---------------------------------------------------------------------

def cache_bytes(config: Config) -> int:
    """Of one video, of the buffers that exist."""
    return VideoDiT(config).make_cache(1).nbytes


def reach(config: Config) -> int:
    """The frames before a chunk from which anything at all can come to it: each layer passes it
    on over the frames that a window keeps."""
    return config.layers * (config.window - config.chunk)


# ---- training -------------------------------------------------------------------------------

@dataclass(frozen=True)
class How:
    """On what, and until when, by time.time()."""
    device: torch.device
    workers: int                       # processes that draw the clips of a training
    compile: str | None                # a backend of torch.compile
    out: Path
    keep: int                          # models of so many seeds are written
    jobs: int                          # trainings at a time
    deadline: float

    def judging(self) -> float:
        """Seconds to keep for it."""
        return JUDGING + JUDGING_BESIDE * self.jobs


def make_trainer(kind: str, seed: int, plan: Plan, how: How) -> Trainer:
    c = plan.config
    world = Recall("recall", c.frames, c.height, seed, plan.lengths[-1])
    recipe = recipe_for("tf", how.device, steps=plan.steps, batch=plan.batch, seed=seed,
                        lr_muon=plan.lr_muon, ema=plan.ema)
    torch.manual_seed(seed)
    model = VideoDiT(plan.config_of(kind))
    return Trainer(model, recipe, world, how.device, compile=how.compile)


def fit(trainer: Trainer, workers: int, until: float) -> None:
    """Train to the end of the recipe, or to the time `until`."""
    batches = trainer.batches(workers)
    with fast_products():
        for x0, caption in batches:
            trainer.update(x0, caption)
            if trainer.step % 50 == 0:                     # to read losses waits for the GPU
                trainer.read_losses()
            if time.time() > until:
                break
    trainer.read_losses()
    batches.close()


# Several processes train on one GPU. How fast a step is then, they find out together.
WARM = 20                              # steps before that: compiling and recording
TIMED = 60
_meeting = None                        # a barrier


def begin(meeting) -> None:
    """What a process does first."""
    global _meeting
    _meeting = meeting


def seconds_a_step(kind: str, plan: Plan, how: How) -> float:
    """Of this kind, while the other processes do the same."""
    trainer = make_trainer(kind, 0, plan, how)
    batches = trainer.batches(how.workers)
    with fast_products():
        for x0, caption in batches:
            trainer.update(x0, caption)
            if trainer.step == WARM:
                trainer.read_losses()                      # waits for the GPU
                with contextlib.suppress(BrokenBarrierError):
                    _meeting.wait(180)
                start = time.perf_counter()
            if trainer.step == WARM + TIMED:
                break
    trainer.read_losses()
    seconds = time.perf_counter() - start
    batches.close()
    trainer.close()
    return seconds / TIMED


def train_and_judge(kind: str, seed: int, plan: Plan, how: How) -> dict | None:
    """A run as it stands in the JSON; None if no time was left to begin it."""
    begun = time.perf_counter()
    if time.time() + 2 * BEGINNING + how.judging() > how.deadline:
        return None
    trainer = make_trainer(kind, seed, plan, how)
    fit(trainer, how.workers, how.deadline - how.judging())
    trained = time.perf_counter()
    model = trainer.ema.eval()
    steps = trainer.step
    losses = trainer.losses["tf"]
    trainer.close()
    facts = {"kind": kind, "seed": seed, "steps": steps, "loss": round(losses[-1][1], 4)}
    if seed < how.keep:
        save_model(how.out / f"{kind}_{seed}.pt", model, stage="tf", data="recall", **facts)
    with fast_products():
        lengths = judge(model, plan, seed)
    facts |= {
        "cache_bytes": cache_bytes(model.config),
        "training_seconds": round(trained - begun, 1),
        "judging_seconds": round(time.perf_counter() - trained, 1),
        "curtains": lengths,
    }
    return facts


# ---- judging --------------------------------------------------------------------------------

@torch.no_grad()
def continued(model: VideoDiT, truth: Tensor, captions: Tensor, seed: int) -> Tensor:
    """Videos as long as `truth` [B, F, ...], that begin with its first 6 frames."""
    device = model.embed.weight.device
    truth = truth.to(device)
    stream = Stream(model, captions)
    for chunk in truth[:, :SEEN].split(model.config.chunk, dim=1):
        stream.commit(chunk)
    frames = truth.shape[1] - SEEN
    draws = Draws(torch.Generator().manual_seed(seed))
    made = rollout(stream, frames, draws, **SAMPLERS["tf"])
    return torch.cat((truth[:, :SEEN], *made), dim=1)


def judge(model: VideoDiT, plan: Plan, seed: int) -> dict[str, dict]:
    """What is found behind curtains of each length, the last of which closes again and again."""
    found = {}
    for length in plan.lengths:
        openings = 1
        if length == plan.lengths[-1]:
            openings = plan.openings
        found[str(length)] = judge_length(model, plan, seed, length, openings)
    return found


def judge_length(model: VideoDiT, plan: Plan, seed: int, length: int, openings: int) -> dict:
    """`curtain`, the share of made frames in which it is as it should be, and the list of
    `openings`, each judged by its 6 frames."""
    period = SEEN + length
    frames = SEEN + openings * period
    world = Recall("recall", frames, plan.config.height, UNSEEN + seed, length, vary=False)
    truth, captions = world.batch(range(plan.videos))
    video = continued(model, truth, captions, seed).float().cpu()
    right = in_view(video) == in_view(truth)
    judged = []
    for start in range(period, frames, period):
        span = slice(start, start + SEEN)
        judged.append(judge_opening(video[:, span], truth[:, span], world))
    return {"curtain": mean_of(right[:, SEEN:]), "openings": judged}


def judge_opening(video: Tensor, truth: Tensor, world: Recall) -> dict:
    """Shares of `recalled`, and how far from its true place the subject is, in pixels, beside
    how far it is from that of another video. In `videos` the frames of six that are right, a
    digit for each video."""
    plans = [world.plan(index) for index in range(len(video))]
    found = {"videos": {}}
    for name, share in shares_of(video, plans).items():
        frames = (SEEN * share).round().int().tolist()
        found[name] = mean_of(share)
        found["videos"][name] = "".join(map(str, frames))
    place = centroid(video)
    true_place = centroid(truth)
    there = alive(video)
    for name, other in (("place", true_place), ("place of another", true_place.roll(1, 0))):
        away = (place - other).norm(dim=-1)                                # [B, 6]
        found[name] = mean_of(away[there])
    return found


def shares_of(video: Tensor, plans: list) -> dict[str, Tensor]:
    """`recalled` of all frames of videos with these plans."""
    colour = torch.tensor([list(COLOURS).index(plan.colour) for plan in plans])
    shape = torch.tensor([plan.thing for plan in plans])
    every = torch.ones(video.shape[:2], dtype=torch.bool)
    return recalled(video, colour, shape, every)


def mean_of(values: Tensor) -> float | None:
    """None of nothing: JSON has no NaN."""
    if values.numel() == 0:
        return None
    return round(values.float().mean().item(), 4)


# ---- the runs --------------------------------------------------------------------------------

def measure(args: argparse.Namespace, plan: Plan) -> dict:
    """All runs, judged. The JSON is written after each: it is whole whenever this is cut."""
    device = pick_device(args.device)
    found = provenance(device) | describe(plan)
    backend = "inductor" if args.compile else None
    deadline = time.time() + 60 * (args.minutes or 10**6)
    workers = args.workers
    if workers is None:
        workers = 3 if device.type == "cuda" else 0
    how = How(device, workers, backend, args.out, args.keep, args.jobs, deadline)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    jobs = [(kind, seed) for seed in range(args.seeds) for kind in KINDS]
    context = get_context("spawn")
    timed = KINDS[:args.jobs]
    meeting = context.Barrier(len(timed))
    with ProcessPoolExecutor(args.jobs, context, begin, (meeting,)) as pool:
        if args.minutes and not args.steps:
            rounds = math.ceil(len(jobs) / args.jobs)
            plan = replace(plan, steps=steps_that_fit(pool, timed, rounds, plan, how))
        found["steps"] = plan.steps
        runs = [pool.submit(train_and_judge, *job, plan, how) for job in jobs]
        try:
            for done in as_completed(runs):
                note(done, found, args.json)
        except KeyboardInterrupt:                          # else the pool would wait for them
            for child in active_children():
                child.kill()
            raise
    return found


def steps_that_fit(pool: ProcessPoolExecutor, kinds: tuple[str, ...], rounds: int, plan: Plan,
                   how: How) -> int:
    """For every run alike. They are trained in so many rounds, how.jobs at a time.

    These kinds are timed side by side. If they keep the GPU busy, a step of more at a time takes
    longer by as much as there are more.
    """
    timed = [pool.submit(seconds_a_step, kind, plan, how) for kind in kinds]
    slowest = max(answer.result() for answer in timed)
    step = 1.05 * slowest * how.jobs / len(kinds)
    round_seconds = (how.deadline - time.time()) / rounds
    steps = int((round_seconds - BEGINNING - how.judging()) / step)
    print(f"a step takes {1000 * slowest:.1f} ms, {len(kinds)} at a time, and there will be "
          f"{how.jobs}: {steps} steps", flush=True)
    if steps < 1:
        raise UserError("--minutes leaves no time for a step")
    return steps


def note(done: Future, found: dict, path: Path) -> None:
    """Take a run to the others, and all of them to the file."""
    try:
        facts = done.result()
    except UserError as error:                             # it diverged; the others may not
        tell(f"error: {error}")
        return
    if facts is None:
        tell("no time was left for a run")
        return
    found["runs"].append(facts)
    found["runs"].sort(key=lambda run: (run["seed"], KINDS.index(run["kind"])))
    path.write_text(json.dumps(found))
    last = list(facts["curtains"].items())[-1]
    print(one_line(facts, *last), flush=True)


def one_line(facts: dict, length: str, behind: dict) -> str:
    first = behind["openings"][0]
    shares = [f"{name} {first[name]:.3f}" for name in ("alive", "colour", "shape")]
    return (f"{facts['kind']} {facts['seed']}: {facts['steps']} steps in "
            f"{facts['training_seconds']} s, loss {facts['loss']}; behind {length} frames "
            f"{', '.join(shares)}, curtain {behind['curtain']:.3f}; judged in "
            f"{facts['judging_seconds']} s")


# ---- pictures and table ---------------------------------------------------------------------

def draw(args: argparse.Namespace) -> None:
    """The figure, and the videos of the first seed's models."""
    found = json.loads(args.json.read_text())
    draw_figure(found, args.json.with_suffix(".png"))
    print(table(found))
    models = {}
    for kind in ("dense", "mla"):
        path = args.out / f"{kind}_0.pt"
        if not path.exists():
            tell(f"there is no {path}, so no videos are drawn")
            return
        models[kind], _ = load_model(path)
    curtain = max(map(int, found["runs"][0]["curtains"]))
    period = SEEN + curtain
    frames = SEEN + TURNS * period
    height = models["mla"].config.height
    world = Recall("recall", frames, height, UNSEEN, curtain, vary=False)
    indices = four_colours(world)
    plans = [world.plan(index) for index in indices]
    truth, captions = world.batch(indices)
    videos = {"truth": truth}
    for kind, model in models.items():
        videos[kind] = continued(model, truth, captions, seed=0)
    said = [below(videos, plans, period, i) for i in range(frames)]
    draw_gif(videos, said, found, args.json.with_suffix(".gif"))


def four_colours(world: Recall) -> list[int]:
    """The first four clips of four colours."""
    first = {}
    for index in range(1000):
        first.setdefault(world.plan(index).colour, index)
    return list(first.values())[:4]


def below(videos: dict[str, Tensor], plans: list, period: int, i: int) -> dict[str, str]:
    """What stands under frame i of each: from an opening on how many of the videos show their
    subject in it, its colour and its shape in every frame."""
    closed = i % period >= SEEN
    words = {"truth": "the curtain is closed" if closed else "made by both"}
    if i < SEEN:
        words["truth"] = "given to both"
    start = i // period * period
    for name in list(videos)[1:]:
        words[name] = ""
        if start:
            share = shares_of(videos[name][:, start:start + SEEN], plans)["survival"]
            words[name] = f"remembers {int((share > 0.9).sum())} of {len(plans)}"
    return words


# ---- the table ------------------------------------------------------------------------------

def table(found: dict) -> str:
    """Markdown: each kind behind the longest curtain, first and last time, over the seeds."""
    length = max(map(int, found["runs"][0]["curtains"]))
    turns = len(found["runs"][0]["curtains"][str(length)]["openings"])
    head = ["attention", "window", "bytes a video", f"in view behind {length} frames", "colour",
            "shape", f"in view at opening {turns}", "of these, colour", "of these, shape"]
    lines = [head, ["---"] * len(head)]
    for kind, facts in found["kinds"].items():
        runs = [run for run in found["runs"] if run["kind"] == kind]
        openings = [run["curtains"][str(length)]["openings"] for run in runs]
        firsts = [seed[0] for seed in openings]
        lasts = [seed[-1] for seed in openings]
        name = {"mla": "MLA", "dense": "dense"}[facts["attention"]]
        cells = [name, facts["window"], f"{facts['cache_bytes']:,}"]
        cells += [spread(firsts, metric) for metric in ("alive", "colour", "shape")]
        cells.append(spread(lasts, "alive"))
        cells += [spread(lasts, metric, "alive") for metric in ("colour", "shape")]
        lines.append(cells)
    lines.append(["chance", "", "", "", "17 %", "33 %", "", "17 %", "33 %"])
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def spread(openings: list[dict], metric: str, of: str | None = None) -> str:
    """Mean over seeds [least, most], in per cent; of the frames with another metric, if that is
    given."""
    values = []
    for opening in openings:
        whole = opening[of] if of else 1
        values.append(100 * opening[metric] / max(whole, 1e-9))
    return f"{mean(values):.0f} % [{min(values):.0f}, {max(values):.0f}]"


def describe(plan: Plan) -> dict:
    """What all runs share."""
    kinds = {}
    for kind in KINDS:
        config = plan.config_of(kind)
        kinds[kind] = {
            "attention": config.attention,
            "window": config.window,
            "cache_bytes": cache_bytes(config),
            "reach": reach(config),
            "parameters": sum(weight.numel() for weight in VideoDiT(config).parameters()),
        }
    return {"kinds": kinds, "frames": plan.config.frames, "batch": plan.batch,
            "videos": plan.videos, "lr_muon": plan.lr_muon, "ema": plan.ema, "runs": []}


# ---- the command line ------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Who remembers what a curtain hides: MLA beside dense attention.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--quick", action="store_true", help="a tiny model on few clips")
    add("--only", choices=("measure", "draw"), help="one half of the work (default: both)")
    add("--seeds", type=int, default=3)
    add("--steps", type=int, help="of a training (default: 4000, or what fits into --minutes)")
    add("--batch", type=int, help="clips a step")
    add("--videos", type=int, help="that are judged, for each curtain")
    add("--minutes", type=float, help="end in this time, with what is done then")
    add("--jobs", type=int, default=1, help="trainings at a time, each a process")
    add("--workers", type=int, help="processes that draw clips for a training (default: 0 on a "
                                    "CPU, 3 on a GPU)")
    add("--compile", action="store_true", help="let torch.compile fuse the training passes")
    add("--keep", type=int, default=1, metavar="N", help="write the models of N seeds")
    add("--device", default=default_device())
    add("--out", type=Path, default=Path("out/memory"), help="folder of the models")
    add("--json", type=Path, help="default: results/memory.json, or with --quick "
                                  "OUT/memory.json")
    run(memory, parser.parse_args(argv))


def memory(args: argparse.Namespace) -> None:
    check_bounds(args, seeds=(1, 100), steps=(1, 10**6), batch=(1, 2**12), videos=(2, 2**14),
                 minutes=(0.1, 10**6), jobs=(1, 64), workers=(0, 64), keep=(0, 100))
    plan = QUICK if args.quick else FULL
    for name in ("steps", "batch", "videos"):
        value = getattr(args, name)
        if value is not None:
            plan = replace(plan, **{name: value})
    if args.json is None:
        args.json = Path("results/memory.json")
        if args.quick:
            args.json = args.out / "memory.json"
    if args.only != "draw":
        measure(args, plan)
    if args.only != "measure":
        draw(args)


if __name__ == "__main__":
    main()
