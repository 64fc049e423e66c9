"""What a model of each world is worth, judged by the world's own judge (engine/judging.py).

    python -m experiments.worlds checkpoints/toy.pt out/digits/model.pt
        judges --rollouts videos of --frames frames of each, with captions of clips that it has
        not seen, and writes a row a world into results/worlds.json, and a contact sheet of the
        world's default captions, results/worlds_WORLD.png; rows of other worlds stay

    python -m experiments.worlds out/clips/model.pt --clips clips.npy
        a model of clips of your own: no judge knows their truth, so the row has the mean square
        error of the next chunk after a true past, beside that of the last frame repeated

Each row has its own command, commit and machine. RESULTS.md shows them as one table. On a GPU
the passes are recorded as CUDA graphs.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

if not __package__:                    # started by its path
    sys.path.insert(0, str(Path(__file__).parent.parent))

from engine.checkpoint import load_model
from engine.clips import Stored, open_world
from engine.command_line import (UserError, as_user_error, check_bounds, default_device,
                                 pick_device, provenance, run, short_commit)
from engine.judging import JUDGES, report_survival
from engine.normal import WINDOWS, next_chunk_errors
from experiments.quality import begin, contact_sheet
from flow import SAMPLERS, VideoDraws, rollout
from mla_video import VideoDiT
from toy_data import Clips, make_world

NAMES = {"mla": "MLA", "dense": "dense"}


def measure(args: argparse.Namespace) -> None:
    check_bounds(args, frames=(12, 10_000), rollouts=(1, 10_000), seed=(0, 2**31))
    device = pick_device(args.device)
    origin = provenance(device)
    models = [open_model(path, args) for path in args.checkpoint]
    path = Path(args.json)
    found = {"worlds": {}}
    if path.exists():
        found = json.loads(path.read_text())
    for model, about, world in models:
        model.to(device)
        row = judge(model, about, world, args)
        found["worlds"][about["data"]] = {**origin, **row}
        found |= origin                                    # of the latest row
        path.write_text(json.dumps(found, indent=1) + "\n")
        draw(model, about, world, args, picture_of(path, about["data"]))
        torch.compiler.reset()         # or one model's graphs count against the next one's


def open_model(path: str, args: argparse.Namespace) -> tuple[VideoDiT, dict, Clips]:
    """A model that streams, and its world; UserError for another model, and for one of clips
    of your own that are not those of --clips."""
    model, about = load_model(path)
    config = model.config
    data = str(about.get("data"))
    if about.get("stage") not in SAMPLERS:
        raise UserError(f"{path} is a {about.get('stage')} model: give models that stream")
    with as_user_error():                                  # it may want an optional package
        if data in JUDGES:
            return model, about, make_world(data, config.frames, config.height)
        if not args.clips:
            raise UserError(f"{path} is a model of {data[:40]!r}, and no world of this program "
                            f"({', '.join(JUDGES)}): name its clips with --clips")
        world = open_world(args.clips, config.frames, config.height, layout=args.layout,
                           border=args.border)
    if world.fingerprint != about.get("fingerprint"):
        raise UserError(f"{path} was trained on {data[:40]!r}, and {args.clips} holds other "
                        "clips, or is read with another --layout or --border")
    if config.frames == config.chunk:
        raise UserError(f"{path}: its clips are one chunk long, and no chunk has a past")
    return model, about, world


def judge(model: VideoDiT, about: dict, world: Clips, args: argparse.Namespace) -> dict:
    """A world's row: which model it is, how it was judged, and what was found."""
    data = about["data"]
    how = SAMPLERS[about["stage"]]
    row = {"checkpoint": about, "attention": model.config.attention, "seed": args.seed}
    if isinstance(world, Stored):
        return row | judge_next(model, world, args.seed, how)
    shares = report_survival(model, args.rollouts, args.frames, args.seed, data,
                             stream_of=begin, **how)
    row |= {"rollouts": args.rollouts, "frames": args.frames,
            "looks_at": JUDGES[data].looks_at,
            "shares": {name: round(share, 4) for name, share in shares.items()}}
    if JUDGES[data].own_accuracy:
        row["judge"] = JUDGES[data].own_accuracy(model.config.height)
    return row


def judge_next(model: VideoDiT, world: Stored, seed: int, how: dict) -> dict:
    """The errors of the next chunk, made and repeated, on clips that are held out if any are."""
    device = model.embed.weight.device
    clips, captions = world.to_judge(WINDOWS)
    made, repeated = next_chunk_errors(model, clips.to(device), captions, seed, **how)
    print(f"{world.name}: next chunk {made:.4f}, the last frame repeated {repeated:.4f}")
    return {"windows": len(clips), "held_out": len(world.held_out),
            "made": round(made, 5), "repeated": round(repeated, 5)}


def picture_of(path: Path, data: str) -> Path:
    """Where the contact sheet of a world goes, beside the JSON at `path`."""
    return path.with_name(f"{path.stem}_{Path(data).stem}.png")


def draw(model: VideoDiT, about: dict, world: Clips, args: argparse.Namespace,
         path: Path) -> None:
    """A contact sheet of the world's default captions: a column a video, time downwards."""
    captions = torch.stack([world.encode(prompt) for prompt in world.prompts])
    stream = begin(model, captions)
    draws = VideoDraws(args.seed, len(captions))
    how = SAMPLERS[about["stage"]]
    made = rollout(stream, args.frames, draws, **how)
    chunks = [chunk.float().cpu().clone() for chunk in made]
    contact_sheet(torch.cat(chunks, 1), path)
    print(f"wrote {path}")


# ---- the table -------------------------------------------------------------------------------

def table(found: dict) -> tuple[list[str], list[list[str]], str]:
    """(head, rows, what stands below) of results/worlds.json."""
    rows = []
    below = []
    for data, row in found["worlds"].items():
        about = row["checkpoint"]
        judged, shares = in_words(row)
        rows.append([
            f"`{data}`" if data in JUDGES else f"clips of one's own, {data}",
            f"{NAMES[row['attention']]}, `{about['stage']}`, {about.get('steps', '?')} steps",
            judged,
            shares,
            f"[frames](results/{picture_of(Path('worlds.json'), data)})",
        ])
        versions = row["versions"].split(",")[0]
        below.append(f"{rows[-1][0]}: `{row['command']}` on {row['device']}, {versions}, "
                     f"commit {short_commit(row['commit'])}.")
        if "judge" in row:
            below.append(f"There {row['judge']}.")
    if edited := found.get("edited_by_hand"):
        below.append(f"Edited by hand: {edited}.")
    head = ["world", "model", "judged", "found", "seen"]
    return head, rows, f"{' '.join(below)} All: [worlds.json](results/worlds.json)."


def in_words(row: dict) -> tuple[str, str]:
    """(how it was judged, what was found)"""
    if "made" in row:
        whose = "held out" if row["held_out"] else "of the training clips"
        return (f"next chunk after a true past, {row['windows']} windows {whose}",
                f"mean square error **{row['made']:.4f}**; the last frame repeated "
                f"{row['repeated']:.4f}")
    shares = [f"{name} {100 * share:.0f} %" for name, share in row["shares"].items()]
    shares[-1] = f"**{shares[-1]}**"
    return (f"{row['rollouts']} videos of {row['frames']} frames, {row['looks_at']}",
            ", ".join(shares))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("checkpoint", nargs="+", help="models, each of a world of its own")
    flag("--rollouts", type=int, default=256, metavar="N")
    flag("--frames", type=int, default=120)
    flag("--clips", metavar="PATH", help="the clips of a model of clips of your own")
    flag("--layout", metavar="AXES", help="as in train.py, of --clips")
    flag("--border", action="store_true", help="as in train.py, of --clips")
    flag("--seed", type=int, default=0)
    flag("--json", default="results/worlds.json", metavar="PATH")
    flag("--device", default=default_device())
    run(measure, parser.parse_args(argv))


if __name__ == "__main__":
    main()
