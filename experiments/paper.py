"""The paper's choices, table by table: what each is worth in quality over a minute of video.

    python -m experiments.paper latent --jobs 6 --minutes 9    trains, judges, and writes
                                               results/paper_latent.json; again: goes on
    python -m experiments.paper all --jobs 24 --minutes 9      all five, on several GPUs
    python -m experiments.paper split --quick --seeds 1        a tiny model, minutes on a CPU

    latent   C from E/32 to E/2, and dense attention (the paper's table 5a)
    split    N content and R position channels of heads of 64, on the preset small (table 5b)
    start    how MLA begins that a dense model becomes: cut by the weights with the mean of the
             heads' rope keys, cut by its inputs with the better key (engine/convert.py), or
             with attention at random; after few steps and many, at three rates of learning
    window   1 sink frame and 6 more against the whole clip. Either the 7 stand before the chunk
             (10 frames are seen in all), or its 3 frames are among them (7). Times are counted
             anew from the clip's length on, from the window's, or never: since attention knows
             only how far apart two frames are, what this changes is how far away the sink seems
    recipe   stage dmd with the paper's critic rate (0.2 of the generator's), guidance and
             optimiser (AdamW, 0 and 0.999), one at a time and together. Its shift, 5, is ours
             too; the row "shift 3" has that of stage tf

Recipes are the GPU's with fewer steps (`Plan`). The models of `latent`, `window` and `recipe`
begin as the paper's do: a dense model of whole clips (`score`, in the place of Wan) becomes MLA
by train.py --from-dense and goes through tf, cd and dmd, where the same dense model is the real
score. Those of `start` come from a dense model after tf, and are trained by tf alone; those of
`split` by tf alone, too, and from scratch. In `window` dmd makes new videos at every step
(restart 1), since the paper's training never leaves the clip.

A run is a process of train.py, a judging one of this program. Both are dealt out to the GPUs
there are. They lie in folders of --runs which tables share, and whose names end in a hash of
all that decides what is found: flags, what a run takes from others, code. So nothing of another
plan is ever taken for one of this. What --minutes, Ctrl-C or SIGTERM broke off is gone on with;
the JSON is written whenever a row is judged, and each row says which commit judged it.

Each model makes videos of 960 frames for captions of clips that it has not seen, judged by
experiments/quality.py: `early` has means over the first 120 frames, `late` over the last 120.
(Models of stage tf, which have 12 passes a chunk instead of 4, make 120 in all, but for those
of `split`.) `place` is the share of frames of a last chunk, made after a true past, with the
subject within a pixel of its true place. `loss` is of teacher forcing, on unseen clips.
experiments/paper_verdicts.py has the rules.
"""

import argparse
import functools
import hashlib
import json
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

if not __package__:                    # started by its path
    sys.path.insert(0, str(Path(__file__).parent.parent))

from engine.checkpoint import previous
from engine.code import code_hash
from engine.command_line import (ROOT, UserError, check_bounds, default_device, pick_device,
                                 provenance, run)
from engine.convert import MLA_ALONE
from engine.trainer import fast_products
from experiments.normal import STOPPED, Curves
from experiments.paper_models import fit, judge_model, make
from experiments.quality import STRETCH
from experiments.verdicts import STUDENT
from train import ON_GPU

MOST_SEEDS = max(STUDENT)              # verdicts are of no more
NEVER = 2**20                          # a horizon that no video reaches
MODELS = "experiments/paper_models.py"
Sizes = tuple[tuple[str, int], ...]    # names and values of --config


# ---- what is trained -------------------------------------------------------------------------

class Way(NamedTuple):
    """A training: its folder, and a command of train.py. Equal ways are one training."""
    name: str
    stage: str
    steps: int
    sizes: Sizes = ()                  # those in which it differs from the plan's
    start: "Way | None" = None         # whose weights it takes
    dense: "Way | None" = None         # whose weights become MLA
    score: "Way | None" = None         # the real score
    made: str = ""                     # how: "" as train.py does, "mean", "random"
    flags: tuple[str, ...] = ()        # the others

    def __str__(self) -> str:
        return self.name

    def needs(self) -> list["Way"]:
        return [way for way in (self.start, self.dense, self.score) if way]


class Model(NamedTuple):
    """What a row has judged: a trained way, read with some horizon (0: its own)."""
    label: str
    way: Way
    horizon: int = 0
    frames: int = 0                    # of its videos, at most; 0: the plan's number


class Row(NamedTuple):
    """A row of a table: its name, what sets it apart, its models."""
    table: str
    name: str
    facts: tuple[tuple[str, float | str], ...]
    models: tuple[Model, ...]

    def __str__(self) -> str:
        return self.name

    def needs(self) -> list[Way]:
        return list(dict.fromkeys(model.way for model in self.models))


class Job(NamedTuple):
    """A way to train or a row to judge, with a seed."""
    way: Way | Row
    seed: int

    def needs(self) -> list["Job"]:
        return [Job(way, self.seed) for way in self.way.needs()]


@dataclass(frozen=True)
class Plan:
    """How much of everything."""
    dim: int                           # E
    flags: tuple[str, ...]             # of all trainings but those of `split`
    score: int                         # steps of the stages
    tf: int
    cd: int
    dmd: int
    split: int                         # steps of a model of `split`
    split_flags: tuple[str, ...]
    short: int                         # steps after which starts are judged
    long: int
    videos: int                        # that a model is judged by
    split_videos: int
    frames: int                        # of each


# Stages of a chain have a seventh to two fifths of the GPU recipe's steps: the table `latent`
# has 18 chains of three, and a step takes 15 ms on an H100 however many runs share it. 256
# videos, since with 64 chance alone moves a share by 0.06, and 0.10 decides.
FULL = Plan(128, (), score=5000, tf=3000, cd=800, dmd=600, split=2000,
            split_flags=("--preset=small", "--batch=16"), short=300, long=1200, videos=256,
            split_videos=128, frames=960)
TINY = ("--config=layers=2", "--config=ffn=128", "--batch=4", "--save-every=1000")
QUICK = Plan(64, (*TINY, "--config=dim=64", "--config=heads=2", "--config=query_latent=32"),
             score=20, tf=20, cd=6, dmd=6, split=20,
             split_flags=(*TINY, "--config=dim=128", "--config=heads=2"), short=4, long=20,
             videos=4, split_videos=4, frames=36)


# The average is of the generator's updates, every fifth step: after 600 steps 0.97 keeps 3 % of
# the cd model, as train.py's 0.99 keeps 4 % after its 1600.
AVERAGE = ("--recipe=ema=0.97",)


def chain(name: str, plan: Plan, sizes: Sizes, flags: tuple[str, ...] = ()) -> list[Way]:
    """The ways tf, cd and dmd of MLA with these sizes, from the dense score model; `flags` are
    more of dmd."""
    real = dense_score(plan)
    tf = Way(f"{name}/tf", "tf", plan.tf, sizes, dense=real, flags=plan.flags)
    cd = Way(f"{name}/cd", "cd", plan.cd, sizes, start=tf, flags=plan.flags)
    dmd = Way(f"{name}/dmd", "dmd", plan.dmd, sizes, start=cd, score=real,
              flags=plan.flags + AVERAGE + flags)
    return [tf, cd, dmd]


def dense_score(plan: Plan) -> Way:
    """What stands in the place of Wan: it begins all chains, and judges in dmd."""
    return Way("dense/score", "score", plan.score, flags=(*plan.flags, "--attention=dense"))


def dense_chain(plan: Plan) -> list[Way]:
    """The same stages with dense attention."""
    real = dense_score(plan)
    tf = Way("dense/tf", "tf", plan.tf, start=real, flags=real.flags)
    cd = Way("dense/cd", "cd", plan.cd, start=tf, flags=real.flags)
    dmd = Way("dense/dmd", "dmd", plan.dmd, start=cd, score=real, flags=real.flags + AVERAGE)
    return [tf, cd, dmd]


def paper_chain(plan: Plan) -> list[Way]:
    """MLA in the paper's proportion, C = E / 8."""
    C = plan.dim // 8
    return chain(f"C{C}", plan, (("latent", C),))


SHORT = 120                            # frames of a model that goes on to other stages


def by_stage(ways: list[Way]) -> tuple[Model, ...]:
    """Models of these ways; of stage tf short videos do, since its chunks take longest."""
    return tuple(Model(way.stage, way, frames=SHORT * (way.stage == "tf")) for way in ways)


# ---- the tables ------------------------------------------------------------------------------

def latent(plan: Plan) -> list[Row]:
    rows = []
    for share in (32, 16, 8, 4, 2):
        C = plan.dim // share
        ways = chain(f"C{C}", plan, (("latent", C),))
        rows.append(Row("latent", f"E/{share}", (("C", C),), by_stage(ways)))
    rows.append(Row("latent", "dense", (), by_stage(dense_chain(plan))))
    return rows


HEAD = 64
SPLITS = (8, 16, 32, 48)               # R; the paper's 16, 32, 64, 96 of heads of 128


def split(plan: Plan) -> list[Row]:
    rows = []
    for R in SPLITS:
        way = Way(f"split/R{R}", "tf", plan.split, (("rope", R),), flags=plan.split_flags)
        facts = (("N", HEAD - R), ("R", R))
        rows.append(Row("split", f"{HEAD - R}/{R}", facts, (Model("tf", way),)))
    return rows


STARTS = {"mean": "by weights, mean key", "": "by inputs, better key", "random": "random"}
RATES = (0.3, 1.0, 3.0)


def start(plan: Plan) -> list[Row]:
    """A row for each start, rate and number of steps: {start}, {rate}, {short or long}."""
    dense, *_ = dense_chain(plan)
    sizes = (("latent", plan.dim // 8),)
    rows = []
    for length in ("short", "long"):
        steps = getattr(plan, length)
        for made, name in STARTS.items():
            for rate in RATES:
                folder = f"start/{made or 'factors'}_{rate:g}_{steps}"
                way = Way(folder, "tf", steps, sizes, dense=dense, made=made,
                          flags=(*plan.flags, f"--rate={rate:g}"))
                facts = (("start", name), ("rate", rate), ("steps", steps))
                row = f"{name}, rate {rate:g}, {length}"
                rows.append(Row("start", row, facts, by_stage([way])))
    return rows


WINDOWS = {                            # {name: (window, sink)}; the window counts all
    "1 + 6, then the chunk": (10, 1),
    "1 + 6 with the chunk": (7, 1),
}
AT_NEW = ("--recipe=restart=1",)       # dmd: at every step videos begin


def window(plan: Plan) -> list[Row]:
    C = ("latent", plan.dim // 8)
    tf, cd, dmd = paper_chain(plan)
    young = dmd._replace(name="window/whole/dmd", flags=dmd.flags + AT_NEW)
    facts = (("window", 12), ("sink", 0), ("horizon", "clip"))
    rows = [Row("window", "whole clip", facts, by_stage([cd, young]))]
    for name, (frames, sink) in WINDOWS.items():
        sizes = (C, ("window", frames), ("sink", sink))
        ways = chain(f"window/{frames}", plan, sizes, AT_NEW)[1:]
        for when, horizon in (("clip", 0), ("window", frames), ("never", NEVER)):
            models = tuple(Model(way.stage, way, horizon) for way in ways)
            facts = (("window", frames), ("sink", sink), ("horizon", when))
            rows.append(Row("window", f"{name}, {when}", facts, models))
    old = (Model("dmd", dmd),)
    facts = (("window", 12), ("sink", 0))
    rows.append(Row("window", "whole clip, old videos in dmd", facts, old))
    return rows


# Guidance w is uncond + w (cond - uncond) here, and cond + w (cond - uncond) in Self-Forcing's
# code: its 3, if the paper means that, is our 4. An update of AdamW without its first moment
# has a root mean square of about 1 at rate 1, Muon's is made 0.2, and AdamW's with our (0.9,
# 0.95) is near that: so with the paper's AdamW all rates are a fifth.
RATES_OF_ADAMW = [f"{name}={ON_GPU['dmd'][name] / 5:g}" for name in ("lr_muon", "lr_adamw")]
ADAMW = ("optimiser=adamw", *RATES_OF_ADAMW)
RECIPES = {
    "ours": (),
    "critic 0.2": ("critic=0.2",),
    "guidance 3": ("guidance=3",),
    "guidance 4 (3 in Self-Forcing's code)": ("guidance=4",),
    "AdamW": ADAMW,
    "shift 3": ("shift=3",),
    "all three, guidance 3": ("critic=0.2", "guidance=3", *ADAMW),
}


def recipe(plan: Plan) -> list[Row]:
    *_, ours = paper_chain(plan)
    rows = []
    for number, (name, values) in enumerate(RECIPES.items()):
        way = ours
        if values:
            flags = tuple(f"--recipe={value}" for value in values)
            way = ours._replace(name=f"recipe/{number}", flags=ours.flags + flags)
        rows.append(Row("recipe", name, (), (Model("dmd", way),)))
    return rows


# In the order in which they are made, should the time not do for all.
TABLES = {"latent": latent, "recipe": recipe, "window": window, "split": split, "start": start}


# ---- training and judging them all -----------------------------------------------------------

class Tables(Curves):
    """Trains what the rows of some tables need, judges them, and keeps what is found in a file
    for each table."""

    def __init__(self, args: argparse.Namespace, tables: list[str], plan: Plan):
        self.tables = {name: TABLES[name](plan) for name in tables}
        self.rows = sum(self.tables.values(), [])
        self.plan = plan
        self.keys = {}
        super().__init__(args)

    def path(self, table: str) -> Path:
        return self.args.results / f"paper_{table}.json"

    def read(self) -> None:
        """What the files have of these rows, by this plan and this code. UserError if they have
        others, which would be lost: unless --anew says that they may be."""
        for table, rows in self.tables.items():
            path = self.path(table)
            if not path.exists():
                continue
            keys = {self.key(row): row for row in rows}
            others = 0
            for entry in json.loads(path.read_text())["rows"]:
                if entry["key"] in keys:
                    self.found[Job(keys[entry["key"]], entry["seed"])] = entry
                else:
                    others += 1
            if others and not self.args.anew:
                raise UserError(f"{path} has {others} rows of another plan, other flags or "
                                "other code: give --anew to lose them, or another --results")

    # -- one job

    def key(self, way: Way | Row) -> str:
        """A hash of all that decides what a training or a judging finds, but for its seed."""
        if way not in self.keys:
            takes = [self.key(other) for other in way.needs()]
            if isinstance(way, Row):
                decides = [code_of(MODELS), way.table, way.name, *self.judging_flags(way)]
            else:
                roles = [bool(other) for other in (way.start, way.dense, way.score)]
                decides = [code_of("train.py"), *self.training_flags(way), way.made, roles]
                if way.made or other_places(way):
                    decides.append(code_of(MODELS))
            text = repr([self.device.type, takes, decides])
            self.keys[way] = hashlib.sha256(text.encode()).hexdigest()[:8]
        return self.keys[way]

    def folder(self, job: Job) -> Path:
        name = job.way.name
        if isinstance(job.way, Row):
            name = f"judged/{job.way.table}/{name.replace('/', '_')}"
        folder = f"seed_{job.seed}_{self.key(job.way)}"
        return self.args.runs / self.device.type / name / folder

    def look_for_weights(self, job: Job) -> None:
        """Is it done? A training that ended has a report, one that was stopped has none."""
        report = self.report(job)
        if not report.exists():
            return
        try:
            found = json.loads(report.read_text())
        except ValueError:                 # it was killed while it wrote
            return
        if isinstance(job.way, Row):
            done = len(found["models"]) == len(job.way.models)
        else:
            done = found["steps"] >= job.way.steps
        if done:
            self.trained.add(job)

    def report(self, job: Job) -> Path:
        """The file that a job writes at its end."""
        if isinstance(job.way, Row):
            return self.folder(job) / "judged.json"
        return self.folder(job) / f"report_{job.way.stage}.json"

    def weights(self, job: Job) -> Path:
        return self.folder(job) / f"{job.way.stage}.pt"

    def command(self, job: Job) -> list[str]:
        if isinstance(job.way, Row):
            return self.judging(job)
        folder = self.folder(job)
        words = [sys.executable, "train.py", *self.training_flags(job.way),
                 f"--seed={job.seed}", f"--device={self.device.type}",
                 f"--workers={self.args.workers}", f"--out={folder}"]
        state = folder / "train.pt"
        if state.exists() or previous(state).exists():
            return [*words, "--resume"]
        return words + self.begins_from(job)

    def training_flags(self, way: Way) -> list[str]:
        """Those that are the same for every seed, and name no folder."""
        words = [f"--stage={way.stage}", f"--steps={way.steps}", "--evaluate=0"]
        words += [f"--config={name}={value}" for name, value in way.sizes]
        return [*words, *way.flags, *shlex.split(self.args.flags)]

    def begins_from(self, job: Job) -> list[str]:
        """The flags that name what a way takes from others."""
        way = job.way
        words = []
        if way.start:
            words.append(f"--start={self.weights(Job(way.start, job.seed))}")
        if way.made:
            words.append(f"--start={self.made(job)}")
        elif way.dense:
            words.append(f"--from-dense={self.fitted(way.dense, job)}")
        if way.score:
            words.append(f"--score={self.fitted(way.score, job)}")
        return words

    def fitted(self, dense: Way, job: Job) -> Path:
        """The weights of a dense model; with other window and sink, if the way has others."""
        path = self.weights(Job(dense, job.seed))
        other = other_places(job.way)
        if not other:
            return path
        return fit(path, other, self.folder(job) / "dense.pt")

    def made(self, job: Job) -> Path:
        """A file with the MLA model that a dense one becomes otherwise than by train.py."""
        way = job.way
        dense = self.weights(Job(way.dense, job.seed))
        C = dict(way.sizes)["latent"]
        return make(way.made, dense, C, job.seed, self.folder(job) / "start.pt")

    def judging(self, job: Job) -> list[str]:
        words = [sys.executable, "-m", "experiments.paper", "judge", f"--seed={job.seed}",
                 f"--device={self.device.type}", f"--out={self.report(job)}",
                 *self.judging_flags(job.way)]
        for model in job.way.models:
            words += ["--weights", model.label, str(self.weights(Job(model.way, job.seed)))]
        return words

    def judging_flags(self, row: Row) -> list[str]:
        """Those that are the same for every seed, and name no folder."""
        videos = self.plan.videos
        if row.table == "split":
            videos = self.plan.split_videos
        words = [f"--videos={videos}"]
        for model in row.models:
            frames = min(self.plan.frames, model.frames or self.plan.frames)
            words += ["--model", model.label, str(model.horizon), str(frames)]
        return words

    def end(self, job: Job) -> None:
        process = self.running.pop(job)
        self.cards.pop(job, None)
        if process.returncode not in STOPPED:
            lines = (self.folder(job) / "log.txt").read_text().splitlines() or ["no output"]
            self.failed.append(f"{job.way}, seed {job.seed}: {lines[-1]}")
            print(f"failed: {self.failed[-1]}", flush=True)
            return
        self.look_for_weights(job)
        if job in self.trained:
            print(f"{job.way}, seed {job.seed}: done", flush=True)
            self.enter(job)

    def enter(self, job: Job) -> None:
        """Keep what a judging found."""
        if not isinstance(job.way, Row):
            return
        found = json.loads(self.report(job).read_text())
        trained = {}
        for model in job.way.models:
            report = json.loads(self.report(Job(model.way, job.seed)).read_text())
            trained[model.label] = report["training_seconds"]
        self.found[job] = {"row": job.way.name, "seed": job.seed, "key": self.key(job.way),
                           **dict(job.way.facts), "training_seconds": trained, **found}
        self.write(job.way.table)

    # -- all of them

    def asked(self) -> list[Job]:
        return [Job(row, seed) for row in self.rows for seed in range(self.args.seeds)]

    def known(self, job: Job) -> bool:
        return job in self.found

    def judged(self) -> tuple[int, int]:
        """Rows that are judged, and all, each with every seed."""
        jobs = self.asked()
        return sum(map(self.known, jobs)), len(jobs)

    def write(self, table: str) -> None:
        """The file of a table: all rows that are known, of whatever seeds, and the command that
        found the last of them."""
        rows = self.tables[table]
        jobs = [Job(row, seed) for row in rows for seed in range(MOST_SEEDS)]
        found = [self.found[job] for job in jobs if self.known(job)]
        seeds = max(self.args.seeds, *(1 + entry["seed"] for entry in found))
        content = {**self.origin, "table": table, "whole": len(found) == len(rows) * seeds,
                   "quick": self.args.quick, "jobs": self.args.jobs, "E": self.plan.dim,
                   "frames": self.plan.frames, "steps": steps_of(rows), "rows": found}
        path = self.path(table)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n")
        part.replace(path)                 # a kill in the middle loses nothing


def other_places(way: Way) -> Sizes:
    """The sizes of a way that a dense model has, too: its window and sink."""
    return tuple((name, size) for name, size in way.sizes if name not in MLA_ALONE)


@functools.cache
def code_of(program: str) -> str:
    return code_hash(ROOT / program)


def steps_of(rows: list[Row]) -> dict[str, list[int]]:
    """{stage: the different numbers of its steps}, of all that the rows need."""
    waiting = [way for row in rows for way in row.needs()]
    found = {}
    while waiting:
        way = waiting.pop()
        waiting += way.needs()
        found.setdefault(way.stage, set()).add(way.steps)
    return {stage: sorted(steps) for stage, steps in found.items()}


# ---- judging a row ---------------------------------------------------------------------------

def judge(args: argparse.Namespace) -> None:
    """The models that --model names, one after the other. What --out has of a call that was
    stopped is not judged again."""
    check_bounds(args, videos=(2, 2**16), seed=(0, 10**6))
    weights = dict(args.weights)
    device = pick_device(args.device)
    found = {"models": {}, "judging_seconds": 0.0, **provenance(device)}
    del found["command"], found["code"]    # those of the table say it
    if args.out.exists():
        found = json.loads(args.out.read_text())
    for label, *numbers in args.model:
        if label in found["models"]:
            continue
        if label not in weights:
            raise UserError(f"--model {label} needs its file: --weights {label} PATH")
        horizon, frames = read_numbers(label, numbers)
        begun = time.perf_counter()
        with fast_products():
            model = judge_model(Path(weights[label]), horizon, frames, args.videos, args.seed,
                                device)
        found["models"][label] = model
        seconds = found["judging_seconds"] + time.perf_counter() - begun
        found["judging_seconds"] = round(seconds, 1)
        part = args.out.with_suffix(".part")
        part.write_text(json.dumps(found))
        part.replace(args.out)
        print(f"{label}: place {model['place']}, late {model['late']}", flush=True)
        torch.compiler.reset()


def read_numbers(label: str, numbers: list[str]) -> tuple[int, int]:
    """(horizon, frames) of --model; UserError for what is neither."""
    if not all(number.isdigit() for number in numbers):
        raise UserError(f"--model {label} takes two whole numbers, a horizon (0: the model's "
                        f"own) and frames; got {' '.join(numbers)}")
    horizon, frames = map(int, numbers)
    if frames < STRETCH:
        raise UserError(f"--model {label}: {frames} frames are too few, {STRETCH} are judged "
                        "together")
    return horizon, frames


# ---- the command line ------------------------------------------------------------------------

def measure(args: argparse.Namespace) -> None:
    check_bounds(args, jobs=(1, 256), threads=(1, 256), minutes=(0.01, 10**6),
                 seeds=(1, MOST_SEEDS))
    plan = QUICK if args.quick else FULL
    folder = Path("out/paper_quick") if args.quick else Path("out/paper")
    args.runs = args.runs or folder
    args.results = args.results or (args.runs if args.quick else Path("results"))
    if args.quick and args.results.resolve() == ROOT / "results":
        raise UserError("--quick makes tables of tiny models: give another --results")
    tables = list(TABLES) if args.table == "all" else [args.table]
    work = Tables(args, tables, plan)
    work.work()
    done, of = work.judged()
    print(f"{done} of {of} rows judged", flush=True)
    if work.failed:
        raise UserError("; ".join(work.failed))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parts = parser.add_subparsers(required=True, dest="table")
    for name in TABLES:
        add_table(parts.add_parser(name, help=f"the table {name}"))
    add_table(parts.add_parser("all", help="all tables; what several need is trained once"))
    part = parts.add_parser("judge", help="one row: what a table does for each")
    part.set_defaults(action=judge)
    add = part.add_argument
    add("--model", action="append", nargs=3, required=True,
        metavar=("LABEL", "HORIZON", "FRAMES"), help="horizon 0 is the model's own")
    add("--weights", action="append", nargs=2, required=True, metavar=("LABEL", "PATH"))
    add("--seed", type=int, default=0)
    add("--videos", type=int, default=256)
    add("--device", default=default_device())
    add("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    run(args.action, args)


def add_table(part: argparse.ArgumentParser) -> None:
    part.set_defaults(action=measure)
    add = part.add_argument
    add("--quick", action="store_true", help="tiny models, few steps, short videos")
    add("--seeds", type=int, default=3, help=f"at most {MOST_SEEDS}")
    add("--device", default=default_device())
    add("--jobs", type=int, default=1, help="processes at once")
    add("--threads", type=int, default=1, help="of each")
    add("--minutes", type=float, default=10**6, help="then all stop, and can go on later")
    add("--runs", type=Path, help="folder of the runs (default: out/paper, out/paper_quick)")
    add("--workers", type=int, default=0, help="of each training, which draw its clips")
    add("--flags", default="", help='more flags for train.py, e.g. "--compile"')
    add("--anew", action="store_true",
        help="lose the rows of another plan, other flags or other code that --results has")
    add("--results", type=Path,
        help="folder of paper_TABLE.json (default: results; with --quick that of the runs)")


if __name__ == "__main__":
    main()
