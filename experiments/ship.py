"""What is shipped of trainings: the checkpoint of the README, and how long a CPU takes.

    python -m experiments.ship toy out/quality/mla_0    a run of `train.py --stage all` becomes
                               checkpoints/toy.pt, results/toy.json and results/toy.gif
    python -m experiments.ship cpu    trains what the README times on two cores (45 minutes),
                               and writes results/train_mla_cpu.json and stages_cpu.json

`toy` copies the model of the last stage, puts the reports of the stages together, and has
sample.py make the GIF, which is what `python sample.py` shows. `cpu` goes on with runs that
were broken off. A run whose stages are of several commits, devices or versions is refused: one
command makes what is shipped.
"""

import argparse
import json
import shlex
import shutil
import sys
from pathlib import Path

import torch

if not __package__:                    # started by its path
    sys.path.insert(0, str(Path(__file__).parent.parent))

import sample
import train
from engine.command_line import ROOT, UserError, provenance, run

ORIGIN = ("commit", "device", "versions")


def reports(folder: Path, stages: tuple[str, ...] = train.STAGES) -> dict[str, dict]:
    """{stage: its report}; UserError if one is missing, or they are of different origin."""
    found = {}
    for stage in stages:
        path = folder / f"report_{stage}.json"
        if not path.exists():
            raise UserError(f"there is no {path}: the run has not come to its end")
        found[stage] = json.loads(path.read_text())
    for name in ORIGIN:
        values = sorted({report[name] for report in found.values()})
        if len(values) > 1:
            raise UserError(f"the stages in {folder} are of several {name}: "
                            f"{', '.join(values)}")
    return found


def write(root: Path, name: str, content: dict) -> None:
    """A file of results/, with the hash of this program, which imports the trainer."""
    path = root / "results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    content["code"] = provenance(torch.device("cpu"))["code"]
    path.write_text(json.dumps(content, indent=1) + "\n")


def together(stages: dict[str, dict]) -> dict:
    """Reports of the stages of one command as one."""
    first = stages[train.STAGES[0]]
    origin = {name: first[name] for name in ("command", *ORIGIN)}
    return {**origin, "stages": stages}


def toy(args: argparse.Namespace) -> None:
    stages = reports(args.folder)
    model = args.root / "checkpoints/toy.pt"
    model.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(args.folder / "dmd.pt", model)
    write(args.root, "toy.json", together(stages))
    sample.main([f"--checkpoint={model}", f"--out={args.root / 'results/toy.gif'}"])


def cpu(args: argparse.Namespace) -> None:
    flags = shlex.split(args.flags)
    alone = trained(args.runs / "tf", *flags)
    write(args.root, "train_mla_cpu.json", reports(alone, ("tf",))["tf"])
    whole = trained(args.runs / "all", "--stage=all", *flags)
    write(args.root, "stages_cpu.json", together(reports(whole)))


def trained(out: Path, *flags: str) -> Path:
    """The folder of a run on the CPU: it is made, or gone on with, unless it is at its end."""
    last = "dmd" if "--stage=all" in flags else "tf"
    if not (out / f"report_{last}.json").exists():
        words = [*flags, "--device=cpu", f"--out={out}"]
        if (out / "train.pt").exists():
            words.append("--resume")
        train.main(words)
    return out


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(required=True)
    part = parts.add_parser("toy", help="the checkpoint")
    part.set_defaults(action=toy)
    part.add_argument("folder", type=Path, help="--out of the run")
    part.add_argument("--root", type=Path, default=ROOT, help="of checkpoints/ and results/")
    part = parts.add_parser("cpu", help="the times of a CPU")
    part.set_defaults(action=cpu)
    part.add_argument("--root", type=Path, default=ROOT, help="of results/")
    part.add_argument("--runs", type=Path, default=Path("out/cpu"), help="folder of the runs")
    part.add_argument("--flags", default="", help='more of train.py, as --flags="--steps=9"')
    args = parser.parse_args(argv)
    run(args.action, args)


if __name__ == "__main__":
    main()
