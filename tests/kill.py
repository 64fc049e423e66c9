"""Claim: kill a training run at any moment, as often as you like; `--resume` always goes on, and
the weights at the end are those of a run that nobody disturbed.

    python tests/kill.py --kills 100
    python tests/kill.py --kills 20 --signal TERM --workers 2

Trains a tiny model once in peace. Then starts the same run again and again, each time killing it
after a random time, and goes on with --resume until it is finished; and starts over until there
were enough kills. After every kill: the step of the last good save is no earlier than before, and
no further from the last step shown than a save interval.

A SIGKILL is for the process that trains: no handler runs, no buffer is flushed. Any other signal
is for its whole process group, as `timeout`, schedulers and containers send it: the processes
that draw clips get it, too. Then no step may be lost, and none of them may be left.
"""

import argparse
import contextlib
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
from engine import progress, run_files  # noqa: E402
from engine.checkpoint import previous, read_last_good  # noqa: E402
from engine.command_line import provenance  # noqa: E402

EVERY = 10
SIZES = dict(dim=32, layers=1, heads=2, latent=8, query_latent=16, rope=6, ffn=32)
SMALL = [f"--config={name}={size}" for name, size in SIZES.items()]


def start(out: Path, log: Path, flags: list[str]) -> int:
    """`python train.py flags`, as a child whose imports are done: a kill then meets training and
    not the loading of torch. It leads a process group of its own. Returns its number."""
    child = os.fork()
    if child:
        with contextlib.suppress(OSError):                 # whoever of the two is the first
            os.setpgid(child, child)
        return child
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    progress.SECONDS = 0.0                                 # a line for every step
    run_files.GIF_CLIPS = 1                                # ten would take longer than the steps
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


def wait_or_kill(child: int, seconds: float, number: int) -> tuple[bool, int]:
    """(was it killed?, the exit status) of a child that has so many seconds to end by itself."""
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return False, status
        time.sleep(0.001)
    if number == signal.SIGKILL:
        os.kill(child, number)
    else:
        os.killpg(child, number)
    _, status = os.waitpid(child, 0)
    return True, status


def wait_for_group(group: int) -> None:
    """AssertionError if a process of it lives for a long time yet."""
    deadline = time.perf_counter() + 20
    while time.perf_counter() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.01)
    raise AssertionError(f"a worker of process {group} outlives it")


def saved_step(out: Path) -> int:
    path = out / "train.pt"
    if path.exists() or previous(path).exists():
        return read_last_good(path, {"step"})["step"]
    return 0


class Killer:
    """Runs of the same training, killed and gone on with, and what was seen."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        self.folder = folder
        self.log = folder / "log"
        self.steps = args.steps
        self.flags = [f"--steps={args.steps}", f"--stage={args.stage}",
                      f"--workers={args.workers}"]
        self.wanted = args.kills
        self.longest = args.longest
        self.number = signal.Signals[f"SIG{args.signal}"]
        self.dice = random.Random(args.seed)
        self.kills = 0
        self.rounds = 0
        self.in_training = 0               # others met the pictures and figures after the end
        self.in_saves = 0
        self.answered = 0                  # by "saved at step ..."
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
            if (out / "train.pt").exists():    # perhaps of step 0: the first save of all
                flags = [*flags, "--resume"]
            child = start(out, self.log, flags)
            killed, status = wait_or_kill(child, seconds, self.number)
            if not killed:
                assert status == 0, f"restart after kill {self.kills} failed: {self.said()}"
                self.rounds += 1
                return read_last_good(out / "train.pt", {"ema"})
            before = self.after_a_kill(out, before)
            if self.number != signal.SIGKILL:
                self.check_answer(child, status, before)

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
        most = EVERY if self.number == signal.SIGKILL else 0
        assert lost <= most, f"kill {self.kills} cost {lost} steps of at most {most}"
        return now

    def check_answer(self, child: int, status: int, step: int) -> None:
        """A run that was asked to stop says what it saved, and leaves no worker."""
        wait_for_group(child)
        said = self.said()
        if os.WIFSIGNALED(status):         # before its first line, or after its last
            begun = "training" in said
            assert not begun or step == self.steps, f"kill {self.kills} was not heard: {said}"
            return
        code = os.WEXITSTATUS(status)
        assert code in (0, 128 + self.number), f"kill {self.kills}: exit code {code}: {said}"
        assert "Traceback" not in said and "Error" not in said, said
        if "training" in said and code:
            assert f"saved at step {step}; go on with" in said, said
            self.answered += 1

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
    add("--signal", default="KILL", choices=("KILL", "TERM", "INT", "HUP"))
    add("--workers", type=int, default=0, help="processes that draw clips")
    add("--seed", type=int, default=0, help="of the moments")
    add("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    origin = provenance(torch.device("cpu"))
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        killer = Killer(Path(folder), args)
        whole = killer.undisturbed()
        while killer.kills < args.kills or killer.rounds == 0:
            killer.compare(killer.disturbed(), whole)
    report = {
        **origin, "stage": args.stage, "signal": args.signal, "workers": args.workers,
        "answered": killer.answered, "kills": killer.kills, "good_restarts": killer.kills,
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
