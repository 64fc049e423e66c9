"""Every file under results/ again, each by its own command, on one GPU or several.

    python -m experiments.everything --list                what would run, how long, and why
    python -m experiments.everything --minutes 9 --out D   one call on a lent GPU; again: goes on
    python -m experiments.everything --only toy hero       these alone

A job is up to date if its JSON names the hash of today's code of its program (engine/code.py);
that what it needs was made anew is not looked at. A training that others need runs only if one
of them does, and goes on from the train.pt that it finds. What a job prints is in
out/everything/NAME.log. After --minutes what can go on later is sent SIGTERM, which makes it
save; no other job is begun that would not end in time, so `quality`, `memory` and `bench`
need longer than 9 minutes (bench in two calls: see its head).
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

if not __package__:                    # started by its path
    sys.path.insert(0, str(Path(__file__).parent.parent))

from engine.code import ROOT, code_hash
from engine.command_line import UserError, check_bounds, run

LOGS = ROOT / "out/everything"
LARGEST = 16 * 2**20                   # bytes of a file that --out makes


class Job(NamedTuple):
    """A command, as one types it in the root of the repository, and what it makes."""
    name: str
    command: str
    makes: str                         # files, the JSON that tells first
    needs: str                         # names of jobs
    where: str                         # "gpu", "2 gpus", "gpus" (all), "2 cores", "cpu"
    minutes: float
    goes_on: bool = False              # SIGTERM makes it save, and it goes on when run again

    def is_training(self) -> bool:
        """It leaves a model, which others take."""
        return self.makes.startswith("out/")


def training(attention: str, seed: int) -> Job:
    out = f"out/quality/{attention}_{seed}"
    command = (f"python train.py --stage all --compile --attention {attention} --seed {seed} "
               f"--evaluate 0 --out {out}")
    makes = f"{out}/report_dmd.json {out}/dmd.pt"
    return Job(f"train_{attention}_{seed}", command, makes, "", "gpu", 8, goes_on=True)


def world(data: str, minutes: float, *words: str, needs: str = "") -> Job:
    """A model of one of the other worlds. What they need of stages and sizes was found by
    trial: dmd makes digits last, and a subject come out from behind the bar too early."""
    stage = "dmd" if "--stage all" in words else "tf"
    name = Path(data).stem
    out = f"out/worlds/{name}"
    command = " ".join((f"python train.py --data {data} --compile --evaluate 0", *words,
                        f"--out {out}"))
    return Job(f"train_{name}", command, f"{out}/report_{stage}.json {out}/model.pt", needs,
               "gpu", minutes, goes_on=True)


WIDE = ("--config dim=256 --config heads=8 --config latent=32 --config query_latent=128 "
        "--config ffn=1024")
PAIRS = "out/worlds/pairs.npz"
WORLDS = [
    Job("pairs", f"python -m experiments.digit_pairs {PAIRS}", PAIRS, "", "cpu", 0.2),
    world("digits", 11, "--stage all", WIDE),
    world("occluder", 6, "--config frames=24 --config window=24"),
    world("recall", 8, "--config frames=36 --config window=36 --batch 24 --steps 8000"),
    world(PAIRS, 8, "--layout NTHW --config frames=20 --config window=20 --config chunk=4 "
          "--config height=64 --config width=64 --config patch=8", WIDE,
          "--batch 32 --steps 8000", needs="pairs"),
]
MODELS = " ".join(f"out/worlds/{name}/model.pt"
                  for name in ("digits", "occluder", "recall", "pairs"))
TRAININGS = [training(attention, seed) for seed in range(3) for attention in ("mla", "dense")]
ALL_SIX = " ".join(job.name for job in TRAININGS)
HERO = "out/quality/dense_0/dmd.pt"
PAPER = " ".join(f"results/paper_{table}.json"
                 for table in ("latent", "split", "start", "window", "recipe"))
X = "python -m experiments."

JOBS = [
    *TRAININGS,
    *WORLDS,
    Job("normal", X + "normal curves --device cuda --jobs 6 --threads 4",
        "results/normal_h100.json", "", "gpus", 15, goes_on=True),
    Job("paper", X + "paper all --jobs 24 --workers 2", PAPER, "", "gpus", 25,
        goes_on=True),
    Job("quality", X + "quality", "results/quality.json results/quality.png", ALL_SIX, "gpu", 14),
    Job("bench", X + "bench --json results/bench_h100.json", "results/bench_h100.json", "",
        "gpu", 13),
    Job("spectrum", X + "spectrum", "results/spectrum.json results/spectrum.png", "", "gpu", 5),
    Job("memory", X + "memory --jobs 9 --workers 1 --compile --minutes 8.83",
        "results/memory.json results/memory.gif results/memory.png", "", "gpu", 9.5),
    Job("captions", X + "captions --json results/captions.json", "results/captions.json", "",
        "gpu", 1),
    Job("starts", X + "starts --json results/starts.json", "results/starts.json", "", "gpu", 1),
    Job("switches", X + "switches --json results/switches.json", "results/switches.json", "",
        "gpu", 1),
    Job("flicker", X + "flicker --json results/flicker.json", "results/flicker.json", "",
        "gpu", 1),
    Job("eight_bits", X + f"eight_bits --dense {HERO} --recall out/worlds/recall/model.pt",
        "results/eight_bits.json", "train_dense_0 train_recall", "gpu", 9),
    Job("wan_speed", X + "wan_speed --json results/wan_speed.json", "results/wan_speed.json", "",
        "gpu", 4),
    Job("parallel_h100", "python tests/test_parallel.py 50 results/parallel_h100.json cuda",
        "results/parallel_h100.json", "", "2 gpus", 2),
    Job("hero", X + f"pictures hero --dense {HERO}", "results/hero.json results/hero.gif",
        "train_dense_0", "cpu", 2),
    Job("convert_toy", X + "convert --dense out/quality/dense_0/tf.pt out/quality/dense_1/tf.pt "
        "out/quality/dense_2/tf.pt --steps 0 --json results/convert_toy.json",
        "results/convert_toy.json", "train_dense_0 train_dense_1 train_dense_2", "cpu", 5),
    Job("toy", X + "ship toy out/quality/mla_0",
        "results/toy.json results/toy.gif checkpoints/toy.pt", "train_mla_0", "cpu", 1),
    Job("ship_cpu", X + "ship cpu", "results/train_mla_cpu.json results/stages_cpu.json", "",
        "2 cores", 45, goes_on=True),
    Job("normal_cpu", X + "normal curves --device cpu --stages tf --jobs 1 --threads 2",
        "results/normal_cpu.json", "", "2 cores", 45, goes_on=True),
    Job("failures", X + "failures", "results/failures.json results/failures.png", "", "cpu", 2),
    Job("worlds", X + f"worlds checkpoints/toy.pt {MODELS} --clips {PAIRS} --layout NTHW "
        "--frames 960", "results/worlds.json", " ".join(job.name for job in WORLDS), "gpu", 4),
    Job("endurance", X + "endurance --json results/endurance.json", "results/endurance.json",
        "", "2 cores", 30),
    Job("kills", "python tests/kill.py --kills 100 --json results/kills.json",
        "results/kills.json", "", "2 cores", 3),
    Job("stops", "python tests/kill.py --kills 20 --signal TERM --workers 2 --steps 1500 "
        "--longest 4 --json results/stops.json", "results/stops.json", "", "2 cores", 3),
    Job("parallel", "python tests/test_parallel.py 50 results/parallel.json",
        "results/parallel.json", "", "2 cores", 3),
    Job("wan_memory", X + "wan_memory --json results/wan_memory.json", "results/wan_memory.json",
        "", "2 cores", 3),
]


# ---- what has to run -------------------------------------------------------------------------

def program_of(job: Job) -> Path:
    words = shlex.split(job.command)
    if words[1] == "-m":
        return ROOT / (words[2].replace(".", "/") + ".py")
    return ROOT / words[1]


def why(job: Job) -> str:
    """The reason for which what it made is not of today's code; "" if it is."""
    for name in job.makes.split():
        if not (ROOT / name).exists():
            return f"there is no {name}"
        if not name.endswith(".json"):
            continue
        found = json.loads((ROOT / name).read_text())
        if found.get("code") != code_hash(program_of(job)):
            return "made by other code"
        if not found.get("whole", True):
            return f"{name} lacks a part"
    return ""


def reasons(jobs: list[Job], only: list[str]) -> dict[str, str]:
    """{name of a job that has to run: why}. Trainings run for others, or where they are
    named."""
    by_name = {job.name: job for job in jobs}
    ahead = []
    for job in jobs:
        if job.name in only or not (only or job.is_training()):
            ahead.append(job)
    found = {}
    while ahead:
        job = ahead.pop()
        reason = why(job)
        if reason and job.name not in found:
            found[job.name] = reason
            needed = [by_name[name] for name in job.needs.split()]
            ahead += [other for other in needed if other.is_training()]
    return found


# ---- running ---------------------------------------------------------------------------------

class Runner:
    """Starts jobs where there is room, and sees them end."""

    def __init__(self, waiting: list[Job], args: argparse.Namespace):
        self.waiting = waiting
        self.names = {job.name for job in waiting}
        self.all_cards = range(args.gpus)
        self.cards = list(self.all_cards) * args.per_gpu
        self.cores = sorted(os.sched_getaffinity(0))
        self.running = {}                  # {name: (job, process, cards, cores)}
        self.failed = []
        self.stopped = []
        self.done = set()
        self.deadline = time.monotonic() + 60 * args.minutes

    def left(self) -> float:
        return (self.deadline - time.monotonic()) / 60

    def room(self, job: Job) -> tuple[list[int], list[int]] | None:
        """(cards, cores) that it would take; None if they are taken, or time is short."""
        waits = self.names & set(job.needs.split()) - self.done
        if waits or (not job.goes_on and job.minutes > self.left()):
            return None
        every = max(1, len(self.all_cards))
        cards = {"gpu": 1, "2 gpus": 2, "gpus": every}.get(job.where, 0)
        cores = {"2 cores": 2, "cpu": 2}.get(job.where, 0)
        free = sorted(set(self.cards))
        if len(free) < cards or len(self.cores) < cores:
            return None
        return free[:cards], self.cores[:cores]

    def start(self, job: Job, cards: list[int], cores: list[int]) -> None:
        words = shlex.split(job.command)
        words[0] = sys.executable
        if job.goes_on and (ROOT / job.makes.split()[0]).with_name("train.pt").exists():
            words.append("--resume")
        for card in cards:
            self.cards.remove(card)
        self.cores = [core for core in self.cores if core not in cores]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(map(str, cards))}
        with open(LOGS / f"{job.name}.log", "a") as log:
            process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log,
                                       stderr=subprocess.STDOUT, start_new_session=True)
        if cores:
            os.sched_setaffinity(process.pid, cores)
        self.running[job.name] = (job, process, cards, cores)
        print(f"{job.name}: begun, about {job.minutes:g} minutes", flush=True)

    def end(self, name: str) -> None:
        job, process, cards, cores = self.running.pop(name)
        self.cards += cards
        self.cores += cores
        if process.returncode == 0:
            self.done.add(name)
            print(f"{name}: done", flush=True)
        elif process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM):
            self.stopped.append(name)
        else:
            lines = (LOGS / f"{name}.log").read_text().split("\n")
            said = [line for line in lines if line.strip()] or ["no output"]
            self.failed.append(f"{name}: {said[-1]}")
            print(f"{name}: failed", flush=True)

    def look(self) -> None:
        for name, (_, process, _, _) in list(self.running.items()):
            if process.poll() is not None:
                self.end(name)

    def work(self) -> None:
        try:
            while self.left() > 0:
                for job in list(self.waiting):
                    if place := self.room(job):
                        self.waiting.remove(job)
                        self.start(job, *place)
                if not self.running:
                    break
                time.sleep(0.2)
                self.look()
        finally:
            for _, process, _, _ in self.running.values():
                process.terminate()
            for _, process, _, _ in self.running.values():
                process.wait()
            self.look()


def bring_home(folder: Path) -> None:
    """results/ and the models of the trainings, as few files. UserError if one is too large."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = {"results.tar.gz": [ROOT / "results", LOGS]}
    for attention in ("mla", "dense"):
        run_folder = ROOT / f"out/quality/{attention}_0"
        parts[f"{attention}_0.tar.gz"] = sorted(run_folder.glob("[!t]*.[pj]*"))
    for name, paths in parts.items():
        with tarfile.open(folder / name, "w:gz") as tar:
            for path in paths:
                tar.add(path, path.relative_to(ROOT))
        if (folder / name).stat().st_size > LARGEST:
            raise UserError(f"{folder / name} is larger than 16 MiB")


def everything(args: argparse.Namespace) -> None:
    check_bounds(args, gpus=(0, 64), per_gpu=(1, 16), minutes=(0, 10**6))
    known = [job.name for job in JOBS]
    if wrong := set(args.only) - set(known):
        raise UserError(f"no job {', '.join(wrong)}; there are {', '.join(known)}")
    found = reasons(JOBS, args.only)
    for job in JOBS if args.list else ():
        print(f"{job.name:16} {job.where:8} {job.minutes:5g} min  "
              f"{found.get(job.name, 'up to date, or not asked for')}")
    if args.list:
        return
    LOGS.mkdir(parents=True, exist_ok=True)
    runner = Runner([job for job in JOBS if job.name in found], args)
    try:
        runner.work()
    finally:
        if args.out:
            bring_home(args.out)
    for names, said in ((runner.stopped, "stopped, to be run again"),
                        ([job.name for job in runner.waiting], "not begun")):
        if names:
            print(f"{said}: {', '.join(names)}", flush=True)
    if runner.failed:
        raise UserError("; ".join(runner.failed))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--list", action="store_true", help="say what would run; nothing is run")
    add("--only", nargs="+", default=[], metavar="NAME", help="these jobs, and what they need")
    add("--gpus", type=int, default=torch.cuda.device_count(), help="how many may be used")
    add("--per-gpu", type=int, default=1, help="jobs at once on a GPU")
    add("--minutes", type=float, default=10**6, help="then all stop")
    add("--out", type=Path, help="folder for copies of what was made")
    run(everything, parser.parse_args(argv))


if __name__ == "__main__":
    main()
