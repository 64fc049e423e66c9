"""Claim: kill a training run at any moment, as often as you like; `--resume` always goes on, and
the weights at the end are those of a run that nobody disturbed.

    python tests/kill.py --kills 100

Trains a tiny model once in peace. Then starts the same run again and again, each time killing it
(SIGKILL: no handler runs, no buffer is flushed) after a random time, and goes on with --resume
until it is finished; and starts over until there were enough kills. After every kill: the step of
the last good save is no earlier than before, and no further from the last step shown than a save
interval.
"""

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train  # noqa: E402
from engine.checkpoint import previous, read_last_good  # noqa: E402
from engine.command_line import provenance  # noqa: E402

EVERY = 10
SIZES = dict(dim=32, layers=1, heads=2, latent=8, query_latent=16, rope=6, ffn=32)
SMALL = [f"--config={name}={size}" for name, size in SIZES.items()]


def start(out: Path, log: Path, flags: list[str]) -> int:
    """`python train.py flags`, as a child whose imports are done: a kill then meets training and
    not the loading of torch. Returns its process number."""
    child = os.fork()
    if child:
        return child
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    code = 70
    try:
        train.main([*SMALL, "--batch=2", "--evaluate=0", "--device=cpu",
                    f"--save-every={EVERY}", f"--out={out}", *flags])
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait_or_kill(child: int, seconds: float) -> int | None:
    """The exit status of a child that ends in that time; else it is killed, and None."""
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def saved_step(out: Path) -> int:
    path = out / "train.pt"
    if path.exists() or previous(path).exists():
        return read_last_good(path, {"step"})["step"]
    return 0


class Killer:
    """Runs of the same training, killed and gone on with, and what was seen."""

    def __init__(self, folder: Path, kills: int, steps: int, longest: float, stage: str,
                 seed: int):
        self.folder = folder
        self.log = folder / "log"
        self.steps = steps
        self.flags = [f"--steps={steps}", f"--stage={stage}"]
        self.wanted = kills
        self.longest = longest
        self.dice = random.Random(seed)
        self.kills = 0
        self.rounds = 0
        self.in_training = 0               # others met the pictures and figures after the end
        self.in_saves = 0
        self.lost = []                     # steps that each kill cost

    def undisturbed(self) -> dict:
        out = self.folder / "whole"
        _, status = os.waitpid(start(out, self.log, self.flags), 0)
        assert status == 0, f"the undisturbed run failed: {self.said()}"
        return read_last_good(out / "train.pt", {"ema"})

    def disturbed(self) -> dict:
        """A run from its start to its end, killed on the way as long as kills are wanted."""
        out = self.folder / f"round{self.rounds}"
        before = 0
        while True:
            seconds = 10**6
            if self.kills < self.wanted:
                seconds = self.dice.uniform(0, self.longest)
            flags = self.flags
            if before:
                flags = [*flags, "--resume"]
            status = wait_or_kill(start(out, self.log, flags), seconds)
            if status is not None:
                assert status == 0, f"restart after kill {self.kills} failed: {self.said()}"
                self.rounds += 1
                return read_last_good(out / "train.pt", {"ema"})
            before = self.after_a_kill(out, before)

    def after_a_kill(self, out: Path, before: int) -> int:
        """The step of the last good save, of which not less than `before` may be left."""
        self.kills += 1
        shown = re.findall(rf"(\d+)/{self.steps}\b", self.log.read_text())
        now = saved_step(out)
        lost = max([now, *map(int, shown)]) - now
        self.lost.append(lost)
        self.in_training += now < self.steps
        self.in_saves += (out / "train.pt.part").exists()
        assert now >= before, (f"kill {self.kills}: step {before} was saved once, and now the "
                               f"last good save is of step {now}")
        assert lost <= EVERY, f"kill {self.kills} cost {lost} steps; it saves every {EVERY}"
        return now

    def compare(self, parts: dict, whole: dict) -> None:
        for name, value in whole["ema"].items():
            assert torch.equal(value, parts["ema"][name]), \
                f"{name} differs from the undisturbed run's after {self.kills} kills"
        assert parts["losses"] == whole["losses"], \
            "the curve of losses differs from the undisturbed run's"
        print(f"{self.kills} kills, {self.rounds} finished runs, all equal to the undisturbed "
              "one, bit for bit", flush=True)

    def said(self) -> str:
        return self.log.read_text()[-500:]


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--kills", type=int, default=100)
    add("--steps", type=int, default=3000, help="steps of the run")
    add("--longest", type=float, default=1.2, help="seconds that a run lives at most")
    add("--stage", default="tf")
    add("--seed", type=int, default=0, help="of the moments")
    add("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    origin = provenance(torch.device("cpu"))
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        killer = Killer(Path(folder), args.kills, args.steps, args.longest, args.stage,
                        args.seed)
        whole = killer.undisturbed()
        while killer.kills < args.kills or killer.rounds == 0:
            killer.compare(killer.disturbed(), whole)
    report = {
        **origin, "stage": args.stage, "kills": killer.kills, "good_restarts": killer.kills,
        "runs_finished": killer.rounds, "kills_in_training": killer.in_training,
        "kills_within_a_save": killer.in_saves, "steps": args.steps, "save_every": EVERY,
        "most_steps_lost": max(killer.lost), "mean_steps_lost": round(mean(killer.lost), 1),
        "seconds": round(time.perf_counter() - began)}
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
