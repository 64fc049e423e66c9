"""Claim: kill a training run at any moment, as often as you like; `--resume` always goes on, and the weights at the end are those of a run
that nobody disturbed.

    python tests/kill.py --kills 100

Trains a tiny model once in peace. Then starts the same run again and again, each time killing it (SIGKILL: no handler runs, no buffer is
flushed) after a random time, and goes on with --resume until it is finished; and starts over until there were enough kills. After every
kill: the step of the last good save is no earlier than before, and no further from the last step shown than a save interval.
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

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import train  # noqa: E402
from checkpoint import previous, read_last_good  # noqa: E402

EVERY = 10
SMALL = [f"--config={item}" for item in ("dim=32", "layers=1", "heads=2", "latent=8", "query_latent=16", "rope=6", "ffn=32")]


def start(out: Path, log: Path, flags: list[str]) -> int:
    """`python train.py flags`, as a child whose imports are done: a kill then meets training and not the loading of torch."""
    if child := os.fork():
        return child
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    code = 70
    try:
        train.main([*SMALL, "--batch=2", "--evaluate=0", "--device=cpu", f"--save-every={EVERY}", f"--out={out}", *flags])
        code = 0
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.stdout.flush()
        os._exit(code)


def saved_step(out: Path) -> int:
    path = out / "train.pt"
    return read_last_good(path, {"step"})["step"] if path.exists() or previous(path).exists() else 0


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--steps", type=int, default=3000, help="steps of the run")
    parser.add_argument("--longest", type=float, default=1.2, help="seconds that a run lives at most")
    parser.add_argument("--stage", default="tf")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    origin = train.provenance(torch.device("cpu"))
    flags, dice, began = [f"--steps={args.steps}", f"--stage={args.stage}"], random.Random(args.seed), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        _, status = os.waitpid(start(folder / "whole", folder / "log", flags), 0)
        assert status == 0, f"the undisturbed run failed: {(folder / 'log').read_text()[-500:]}"
        whole = read_last_good(folder / "whole" / "train.pt", {"ema"})
        kills, rounds, saving, training, lost = 0, 0, 0, 0, []
        while kills < args.kills or rounds == 0:
            out, before = folder / f"round{rounds}", 0
            while True:
                child = start(out, folder / "log", [*flags, "--resume"] if before else flags)
                deadline = time.perf_counter() + (dice.uniform(0, args.longest) if kills < args.kills else 10**6)
                while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.perf_counter() < deadline:
                    time.sleep(0.001)
                if ended[0]:
                    assert ended[1] == 0, f"restart after kill {kills} failed: {(folder / 'log').read_text()[-500:]}"
                    break
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                kills += 1
                shown = [int(step) for step in re.findall(rf"(\d+)/{args.steps}\b", (folder / "log").read_text())]
                now = saved_step(out)
                lost.append(max([now, *shown]) - now)
                training += now < args.steps               # the others met the pictures and figures after the last step
                saving += (out / "train.pt.part").exists()
                assert now >= before, f"kill {kills}: step {before} was saved once, and now the last good save is of step {now}"
                assert lost[-1] <= EVERY, f"kill {kills} cost {lost[-1]} steps; it saves every {EVERY}"
                before = now
            parts = read_last_good(out / "train.pt", {"ema"})
            for name, value in whole["ema"].items():
                assert torch.equal(value, parts["ema"][name]), f"{name} differs from the undisturbed run's after {kills} kills"
            assert parts["losses"] == whole["losses"], "the curve of losses differs from the undisturbed run's"
            rounds += 1
            print(f"{kills} kills, {rounds} finished runs, all equal to the undisturbed one, bit for bit", flush=True)
    report = {**origin, "stage": args.stage, "kills": kills, "good_restarts": kills, "runs_finished": rounds,
              "kills_in_training": training, "kills_within_a_save": saving,
              "steps": args.steps, "save_every": EVERY, "most_steps_lost": max(lost), "mean_steps_lost": round(sum(lost) / len(lost), 1),
              "seconds": round(time.perf_counter() - began)}
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
