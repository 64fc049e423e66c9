"""What a model of each world is worth, judged by the world's own judge (engine/judging.py).

    python -m experiments.worlds checkpoints/toy.pt out/digits/model.pt
        judges --rollouts videos of --frames frames of each, with captions of clips that it has
        not seen, and writes a row a world into results/worlds.json, and a contact sheet of the
        world's default captions, results/worlds_WORLD.png; rows of other worlds stay

Each row has its own command, commit and machine. RESULTS.md shows them as one table.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

if not __package__:                    # started by its path
    sys.path.insert(0, str(Path(__file__).parent.parent))

from engine.checkpoint import load_model
from engine.command_line import (UserError, as_user_error, check_bounds, default_device,
                                 pick_device, provenance, run)
from engine.judging import JUDGES, report_survival
from experiments.quality import contact_sheet
from flow import SAMPLERS, Stream, VideoDraws, rollout
from mla_video import VideoDiT
from toy_data import encode_caption, make_world, prompts_of

NAMES = {"mla": "MLA", "dense": "dense"}


def measure(args: argparse.Namespace) -> None:
    check_bounds(args, frames=(12, 10_000), rollouts=(1, 10_000), seed=(0, 2**31))
    device = pick_device(args.device)
    origin = provenance(device)
    models = [open_model(path) for path in args.checkpoint]
    path = Path(args.json)
    found = {"worlds": {}}
    if path.exists():
        found = json.loads(path.read_text())
    for model, about in models:
        model.to(device)
        row = judge(model, about, args)
        found["worlds"][about["data"]] = {**origin, **row}
        found |= origin                                    # of the latest row
        path.write_text(json.dumps(found, indent=1) + "\n")
        draw(model, about, args, path.with_name(f"{path.stem}_{about['data']}.png"))


def open_model(path: str) -> tuple[VideoDiT, dict]:
    """A model that streams, of a world that has a judge; UserError for another."""
    model, about = load_model(path)
    data = str(about.get("data"))
    if data not in JUDGES or about.get("stage") not in SAMPLERS:
        raise UserError(f"{path} is a {about.get('stage')} model of {data[:40]!r}: give models "
                        f"that stream, of {', '.join(JUDGES)}")
    with as_user_error():                                  # it may want an optional package
        make_world(data)
    return model, about


def judge(model: VideoDiT, about: dict, args: argparse.Namespace) -> dict:
    """A world's row: which model it is, how it was judged, and what was found."""
    data = about["data"]
    how = SAMPLERS[about["stage"]]
    shares = report_survival(model, args.rollouts, args.frames, args.seed, data, **how)
    row = {"checkpoint": about, "attention": model.config.attention,
           "rollouts": args.rollouts, "frames": args.frames, "seed": args.seed,
           "looks_at": JUDGES[data].looks_at,
           "shares": {name: round(share, 4) for name, share in shares.items()}}
    if JUDGES[data].own_accuracy:
        row["judge"] = JUDGES[data].own_accuracy(model.config.height)
    return row


def draw(model: VideoDiT, about: dict, args: argparse.Namespace, path: Path) -> None:
    """A contact sheet of the world's default captions: a column a video, time downwards."""
    captions = torch.stack([encode_caption(prompt) for prompt in prompts_of(about["data"])])
    stream = Stream(model, captions)
    draws = VideoDraws(args.seed, len(captions))
    how = SAMPLERS[about["stage"]]
    chunks = [chunk.float().cpu() for chunk in rollout(stream, args.frames, draws, **how)]
    contact_sheet(torch.cat(chunks, 1), path)
    print(f"wrote {path}")


# ---- the table -------------------------------------------------------------------------------

def table(found: dict) -> tuple[list[str], list[list[str]], str]:
    """(head, rows, what stands below) of results/worlds.json."""
    rows = []
    below = []
    for data, row in found["worlds"].items():
        about = row["checkpoint"]
        shares = [f"{name} {100 * share:.0f} %" for name, share in row["shares"].items()]
        shares[-1] = f"**{shares[-1]}**"
        rows.append([
            f"`{data}`",
            f"{NAMES[row['attention']]}, `{about['stage']}`, {about.get('steps', '?')} steps",
            f"{row['rollouts']} videos of {row['frames']} frames, {row['looks_at']}",
            ", ".join(shares),
            f"[frames](results/worlds_{data}.png)",
        ])
        versions = row["versions"].split(",")[0]
        below.append(f"`{data}`: `{row['command']}` on {row['device']}, {versions}, commit "
                     f"{row['commit']}.")
        if "judge" in row:
            below.append(f"There {row['judge']}.")
    head = ["world", "model", "judged", "shares", "seen"]
    return head, rows, f"{' '.join(below)} All: [worlds.json](results/worlds.json)."


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("checkpoint", nargs="+", help="models, each of a world of its own")
    flag("--rollouts", type=int, default=256, metavar="N")
    flag("--frames", type=int, default=120)
    flag("--seed", type=int, default=0)
    flag("--json", default="results/worlds.json", metavar="PATH")
    flag("--device", default=default_device())
    run(measure, parser.parse_args(argv))


if __name__ == "__main__":
    main()
