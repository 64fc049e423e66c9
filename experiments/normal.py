"""What is normal? The losses of good runs over seeds, and pictures of runs that went wrong.

    python -m experiments.normal curves --jobs 5 --threads 3 --minutes 9
                               trains what results/normal_cpu.json lacks, so many runs at once,
                               each with so many threads; --device cuda: normal_h100.json,
                               the runs dealt out to the GPUs there are

`curves` trains with train.py, by the recipe of the device, in a folder of --runs for each
run. A run that is finished is never made again, and one that --minutes, Ctrl-C or SIGTERM broke
off goes on where it stopped as long as its folder is there. The JSON is written whenever a run
has ended. engine/normal.py reads it, and has the rule of what is normal.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch

if not __package__:                    # started by its path
    sys.path.insert(0, str(Path(__file__).parent.parent))

from engine.checkpoint import read_last_good
from engine.command_line import (ROOT, UserError, check_bounds, default_device, pick_device,
                                 provenance, run)
from engine.locks import lock
from engine.normal import FEWEST, kind_of_run, loss_at, range_of

POINTS = 20                            # of a curve
PAUSE = 0.2                            # seconds between looks at what runs
# How train.py ends that was asked to stop: by itself, or before it could handle a signal.
STOPPED = (0, 128 + signal.SIGTERM, -signal.SIGTERM)


# ---- curves ----------------------------------------------------------------------------------

class Way(NamedTuple):
    """A stage, and the ways whose weights it takes."""
    stage: str
    start: str = ""
    score: str = ""


# The first is what `python train.py` does, the others are `python train.py --stage all`.
WAYS = {
    "tf": Way("tf"),
    "score": Way("score"),
    "tf-after-score": Way("tf", start="score"),
    "cd": Way("cd", start="tf-after-score"),
    "dmd": Way("dmd", start="cd", score="score"),
}


class Job(NamedTuple):
    """A run: a way, with a seed."""
    way: str
    seed: int

    def needs(self) -> list["Job"]:
        way = WAYS[self.way]
        return [Job(name, self.seed) for name in (way.start, way.score) if name]


class Curves:
    """Trains jobs side by side, and keeps what has been learned of them in a file."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = pick_device(args.device)
        self.origin = provenance(self.device)
        self.found = {}                    # {job: its entry in the file}
        self.read()
        self.running = {}                  # {job: process}
        self.cards = {}                    # {job that runs: its GPU}
        self.trained = set()               # those whose weights lie in their folders
        self.failed = []
        self.deadline = time.monotonic() + 60 * args.minutes

    def read(self) -> None:
        """What the file has."""
        if not self.args.json.exists():
            return
        for entry in json.loads(self.args.json.read_text())["runs"]:
            self.found[Job(entry["way"], entry["seed"])] = entry

    # -- one job

    def folder(self, job: Job) -> Path:
        return self.args.runs / self.device.type / job.way / f"seed_{job.seed}"

    def weights(self, job: Job) -> Path:
        return self.folder(job) / f"{WAYS[job.way].stage}.pt"

    def look_for_weights(self, job: Job) -> None:
        """Are those of its end there? A run that was stopped leaves weights, too; and at its
        end train.pt is written before them."""
        state = self.state(job)
        weights = self.weights(job)
        if state is None or not weights.exists():
            return
        newer = weights.stat().st_mtime >= (self.folder(job) / "train.pt").stat().st_mtime
        if newer and state["step"] >= state["recipe"]["steps"]:
            self.trained.add(job)

    def state(self, job: Job) -> dict | None:
        path = self.folder(job) / "train.pt"
        if not path.exists():
            return None
        return read_last_good(path, {"recipe", "step", "losses", "asked", "config"})

    def command(self, job: Job) -> list[str]:
        way = WAYS[job.way]
        folder = self.folder(job)
        words = [sys.executable, "train.py", "--stage", way.stage, "--seed", str(job.seed),
                 "--device", self.device.type, "--evaluate", "0", "--out", str(folder)]
        if (folder / "train.pt").exists():
            words.append("--resume")
        elif way.start:
            words += ["--start", str(self.weights(Job(way.start, job.seed)))]
        if way.score:
            words += ["--score", str(self.weights(Job(way.score, job.seed)))]
        return words + shlex.split(self.args.flags)

    def begin(self, job: Job) -> None:
        self.folder(job).mkdir(parents=True, exist_ok=True)
        added = {"OMP_NUM_THREADS": str(self.args.threads)}
        if self.device.type == "cuda":
            self.cards[job] = self.emptiest_card()
            added["CUDA_VISIBLE_DEVICES"] = name_of_card(self.cards[job])
        with open(self.folder(job) / "log.txt", "a") as log:
            self.running[job] = subprocess.Popen(
                self.command(job), cwd=ROOT, env={**os.environ, **added}, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True)
        print(f"{job.way}, seed {job.seed}: begun", flush=True)

    def emptiest_card(self) -> int:
        """The GPU with the fewest runs: of all, or the one that --device names."""
        _, _, named = self.args.device.partition(":")
        if named:
            return int(named)
        taken = list(self.cards.values())
        return min(range(torch.cuda.device_count()), key=taken.count)

    def end(self, job: Job) -> None:
        """The job's process has ended: keep what it learned."""
        code = self.running.pop(job).returncode
        self.cards.pop(job, None)
        if code not in STOPPED:
            lines = (self.folder(job) / "log.txt").read_text().splitlines() or ["no output"]
            self.failed.append(f"{job.way}, seed {job.seed}: {lines[-1]}")
            return
        self.look_for_weights(job)
        self.enter(job)

    def enter(self, job: Job) -> None:
        """Keep what a run in its folder has learned so far."""
        state = self.state(job)
        if not state or not state["losses"]:
            return
        entry = entry_of(job, state)
        entry |= {"commit": self.origin["commit"], "threads": self.args.threads}
        self.found[job] = entry
        print(f"{job.way}, seed {job.seed}: step {entry['step']} in "
              f"{entry['seconds'] / 60:.1f} minutes, {entry['end']}", flush=True)
        self.save()

    # -- all of them

    def asked(self) -> list[Job]:
        """All that the flags name."""
        return [Job(way, seed) for way in self.args.stages for seed in self.args.seeds]

    def wanted(self) -> list[Job]:
        """The jobs that are asked for and not yet known, and what they need of others."""
        wanted = []
        for job in self.asked():
            if self.known(job):
                continue
            self.add(job, wanted)
            if job in self.trained:        # the file was lost, and the folder was not
                self.enter(job)
        return wanted

    def known(self, job: Job) -> bool:
        entry = self.found.get(job)
        return entry is not None and entry["step"] >= entry["kind"]["recipe"]["steps"]

    def add(self, job: Job, wanted: list[Job]) -> None:
        """What a job needs comes before it."""
        self.look_for_weights(job)
        if job in wanted or job in self.trained:
            return
        for other in job.needs():
            self.add(other, wanted)
        wanted.append(job)

    def work(self) -> None:
        """Until all is done, or the time is over."""
        with lock(self.args.runs):
            self.work_alone()

    def work_alone(self) -> None:
        waiting = self.wanted()
        print(f"{len(waiting)} runs to make", flush=True)
        try:
            while waiting or self.running:
                if time.monotonic() > self.deadline:
                    print("the time is over", flush=True)
                    break
                for job in self.ready(waiting):
                    waiting.remove(job)
                    self.begin(job)
                time.sleep(PAUSE)
                self.look()
                if not self.running and not self.ready(waiting):
                    break
        finally:
            self.stop()

    def ready(self, waiting: list[Job]) -> list[Job]:
        """Jobs that can begin now."""
        free = self.args.jobs - len(self.running)
        able = [job for job in waiting if self.trained.issuperset(job.needs())]
        return able[:free]

    def look(self) -> None:
        """See who has ended."""
        for job, process in list(self.running.items()):
            if process.poll() is not None:
                self.end(job)

    def stop(self) -> None:
        """Ask all to save and end, and wait for them."""
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            process.wait()
        self.look()

    def save(self) -> None:
        entries = sorted(self.found.values(), key=lambda entry: (entry["way"], entry["seed"]))
        ways = {job.way for job in self.found}.union(self.args.stages)
        whole = all(self.known(Job(way, seed)) for way in ways for seed in self.args.seeds)
        content = {**self.origin, "jobs": self.args.jobs, "whole": whole, "runs": entries}
        text = json.dumps(content, indent=1)
        self.args.json.parent.mkdir(parents=True, exist_ok=True)
        part = self.args.json.with_suffix(".part")
        part.write_text(text + "\n")
        part.replace(self.args.json)       # a kill in the middle loses nothing


def name_of_card(index: int) -> str:
    """That of a GPU, for CUDA_VISIBLE_DEVICES: of those that this process may use, if they are
    named there."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return visible.split(",")[index].strip() if visible else str(index)


def entry_of(job: Job, state: dict) -> dict:
    """What the file keeps of a run, from its train.pt."""
    recipe = state["recipe"]
    curves = {}
    end = {}
    for name, points in state["losses"].items():
        curves[name] = curve_of(points, state["step"], recipe["steps"])
        end[name] = round(loss_at(points, state["step"]), 5)
    return {"way": job.way, "stage": recipe["stage"], "seed": job.seed, "step": state["step"],
            "seconds": round(state["seconds"], 1), "end": end, "curve": curves,
            "kind": kind_of_run(recipe, state["config"], state["asked"])}


def curve_of(points: list, step: int, steps: int) -> list[list]:
    """[[step, mean loss of the hundred steps before]] at 20 points of the run, up to `step`."""
    curve = []
    for number in range(1, POINTS + 1):
        at = number * steps / POINTS
        loss = loss_at(points, at)
        if at <= step and loss is not None:
            curve.append([round(at), round(loss, 5)])
    return curve


def curves(args: argparse.Namespace) -> None:
    check_bounds(args, jobs=(1, 256), threads=(1, 256), minutes=(0.01, 10**6))
    wrong = set(args.stages) - set(WAYS)
    if wrong:
        raise UserError(f"--stages takes {', '.join(WAYS)}; got {', '.join(wrong)}")
    kind = "cpu" if pick_device(args.device).type == "cpu" else "h100"
    args.json = args.json or Path("results", f"normal_{kind}.json")
    work = Curves(args)
    work.work()
    if work.failed:
        raise UserError("; ".join(work.failed))


# ---- the section of RESULTS.md ---------------------------------------------------------------

# Where the time of a stage is from, and how it is called there.
TIMES = {"tf": "train_mla_cpu.json", "score": "stages_cpu.json",
         "tf-after-score": "stages_cpu.json", "cd": "stages_cpu.json", "dmd": "stages_cpu.json"}
Results = Callable[[str], dict]            # the content of a file of results/


def section(results: Results, markdown: Callable, origin: Callable) -> str:
    """What is normal, as tables: `results` reads a file, `markdown` and `origin` write."""
    parts = []
    for path in sorted((ROOT / "results").glob("normal_*.json")):
        runs = results(path.name)["runs"]
        parts += [losses(runs, markdown), f"{how_to_read(runs)} {origin(path.name)}"]
    parts.append(times(results, markdown))
    parts.append("H100: mean [least, most] of 3 seeds while 2 to 4 runs shared the card "
                 "([quality.json](results/quality.json)). CPU: 2 cores, one seed "
                 "([stages_cpu.json](results/stages_cpu.json), "
                 "[train_mla_cpu.json](results/train_mla_cpu.json)).")
    parts += [mistakes(results, markdown), PICTURE, origin("failures.json")]
    parts += [borders(results, markdown), origin("flicker.json")]
    return "\n\n".join(parts)


PICTURE = ('<img src="results/failures.png" alt="frames of a good video and of videos that '
           'went wrong, each with the symptom and the mistake">')


def by_way(runs: list[dict]) -> dict[str, list[dict]]:
    """{way: its runs}, in the order of WAYS."""
    found = {}
    for way in WAYS:
        made = [run for run in runs if run["way"] == way]
        if made:
            found[way] = made
    return found


def losses(runs: list[dict], markdown: Callable) -> str:
    """A row for each twentieth of the run, and a column for each loss."""
    columns = []                           # (head, steps of the recipe, curves of the seeds)
    ranges = []
    for way, made in by_way(runs).items():
        steps = made[0]["kind"]["recipe"]["steps"]
        reached = min(run["step"] for run in made)
        far = f"{steps:,} steps" if reached == steps else f"{reached:,} of {steps:,} steps"
        for name in made[0]["end"]:
            loss = f", {name}" if len(made[0]["end"]) > 1 else ""
            curves = [dict(map(tuple, run["curve"][name])) for run in made]
            columns.append((f"`{way}`{loss}, {far}, {len(made)} seeds", steps, curves))
            ranges.append(normal_at_last(curves))
    rows = []
    for number in range(1, POINTS + 1):
        cells = []
        for _, steps, curves in columns:
            at = round(number * steps / POINTS)
            cells.append(over_seeds([curve[at] for curve in curves if at in curve]))
        if any(cells):
            rows.append([f"{100 * number // POINTS} %", *cells])
    rows.append(["normal at the last of these", *ranges])
    return markdown(["of the run", *(head for head, _, _ in columns)], rows)


def over_seeds(values: list[float]) -> str:
    if not values:
        return ""
    return f"{mean(values):.3g} [{min(values):.3g}, {max(values):.3g}]"


def normal_at_last(curves: list[dict]) -> str:
    """Where 19 of 20 good runs are at the last step that these share."""
    if len(curves) < FEWEST:
        return f"fewer than {FEWEST} seeds"
    last = max(set.intersection(*map(set, curves)))
    low, high = range_of([curve[last] for curve in curves])
    return f"{low:.3g} to {high:.3g}"


def how_to_read(runs: list[dict]) -> str:
    threads = sorted({run["threads"] for run in runs})
    return ("Mean [least, most] of the seeds; each number is a mean over the hundred steps "
            "before. *Normal* is where 19 of 20 good runs are (the 95 % prediction interval of so "
            "few seeds, so it is wider than what they span): `train.py` compares itself with "
            "that at its end. `tf` is what `python train.py` does, the others are "
            "`python train.py --stage all`. The losses of `dmd` are of two networks that chase "
            "each other, so they need not fall. "
            f"Threads of a run: {', '.join(map(str, threads))}.")


def times(results: Results, markdown: Callable) -> str:
    seeds = [run["training_seconds"] for run in results("quality.json")["runs"]
             if run["attention"] == "mla"]
    rows = []
    for way, name in TIMES.items():
        stage = WAYS[way].stage
        found = results(name)
        report = found["stages"][stage] if "stages" in found else found
        minutes = [seconds[stage] / 60 for seconds in seeds]
        on_gpu = f"{mean(minutes):.1f} [{min(minutes):.1f}, {max(minutes):.1f}]"
        if way == "tf":
            on_gpu = "as `tf-after-score`"
        rows.append([f"`{way}`", f"{report['training_seconds'] / 60:.1f}", on_gpu])
    return markdown(["training, minutes", "2 CPU cores", "H100, its longer recipe"], rows)


def mistakes(results: Results, markdown: Callable) -> str:
    rows = []
    for found in results("failures.json")["failures"].values():
        pace = f"{found['speed']:.2f}" if found["alive"] > 0.5 else "-"   # else of no subject
        rows.append([
            found["symptom"],
            found["mistake"].replace("\n", " "),
            found["cure"],
            pace,
            f"{100 * found['alive']:.0f} %",
            f"{100 * found['colour']:.0f} %",
            f"{found['change']:.3f}",
        ])
    head = ["symptom", "made by", "cure", "px a frame", "frames with one subject",
            "frames in the first one's colour", "change a frame, of 2"]
    return markdown(head, rows)


def borders(results: Results, markdown: Callable) -> str:
    found = results("flicker.json")
    tenths = found["by_tenth"]
    return markdown(["flicker", "found", "target"], [[
        f"change between frames at the borders of chunks, over that inside them, "
        f"{found['videos']} videos of {found['frames']} frames",
        f"{found['ratio']:.3f} (a tenth of the video: {min(tenths):.3f} to {max(tenths):.3f})",
        "at most 1.1",
    ]])


# ---- the command line ------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parts = parser.add_subparsers(required=True)
    part = parts.add_parser("curves", help="losses of good runs")
    part.set_defaults(action=curves)
    add = part.add_argument
    add("--stages", nargs="+", default=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2])
    add("--device", default=default_device())
    add("--jobs", type=int, default=1, help="runs at once")
    add("--threads", type=int, default=torch.get_num_threads(), help="of each")
    add("--minutes", type=float, default=10**6, help="then all stop, and can go on later")
    add("--runs", type=Path, default=Path("out/normal"), help="folder of the runs")
    add("--flags", default="", help='more flags for train.py, e.g. "--compile"')
    add("--json", type=Path)
    args = parser.parse_args(argv)
    run(args.action, args)


if __name__ == "__main__":
    main()
