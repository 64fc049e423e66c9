"""What is normal? What train.py says at its end of how a run went.

Its loss is put beside those of good runs, which `python -m experiments.normal curves` trained.
A loss says nothing by itself, so runs are compared with those of their own kind alone: the same
stage and start, recipe, sizes and data. And for clips of one's own, where no good run is known,
the model's error is put beside that of a still picture.

tests/test_normal.py.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
from torch import Tensor

from engine.clips import Stored
from engine.command_line import ROOT
from engine.trainer import Resumable
from flow import FEW_SHIFT, SAMPLERS, Stream, VideoDraws, rollout
from mla_video import Config, VideoDiT

RECENT = 10                    # points of a loss, of ten steps each: the last hundred steps
FEWEST = 3                     # runs that a spread is made of
# Student's t for 95 %, by the number of runs less one; of more than ten runs the last.
STUDENT = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
SECTION = '"What is normal?" in RESULTS.md'
WINDOWS = 64                   # of own clips, on which the next chunk is judged
STILL = 1e-4                   # a mean square change that is about one level of 256
# What a recipe was that is older than these choices.
RECIPE_BEFORE = {"shift": FEW_SHIFT, "optimiser": "muon"}


# ---- the loss of good runs -------------------------------------------------------------------

class Spread(NamedTuple):
    """The losses of good runs at a step of theirs: their last, or the last that is known."""
    step: int
    low: float
    high: float
    seeds: int
    device: str


def loss_at(points: list, step: float) -> float | None:
    """The mean loss of the last hundred steps up to `step`, as the progress line shows it.
    `points` are (step, mean of ten); None if there are none so early."""
    values = [loss for at, loss in points if at <= step]
    return mean(values[-RECENT:]) if values else None


def range_of(ends: list[float]) -> tuple[float, float]:
    """Between which losses 19 of 20 more such runs end, given where some ended.

    That is the prediction interval of the logarithms, m +- t s sqrt(1 + 1/n). It is wider than
    the range of the n runs: of a fourth good run every other one lies outside of three.
    """
    logs = [math.log(end) for end in ends]
    n = len(logs)
    t = STUDENT[min(n - 1, max(STUDENT))]
    reach = t * stdev(logs) * math.sqrt(1 + 1 / n)
    return math.exp(mean(logs) - reach), math.exp(mean(logs) + reach)


def kind_of_run(recipe: dict, config: dict, asked: dict) -> dict:
    """All that decides what a run's loss should be, in JSON's types: everything but its seed.
    The arguments are those parts of train.pt."""
    recipe = {name: value for name, value in recipe.items() if name != "seed"}
    kind = {"started": asked.get("started", ""), "recipe": recipe, "config": config,
            "fingerprint": asked["fingerprint"]}
    return json.loads(json.dumps(kind))


def good_runs(kind: dict, folder: Path) -> tuple[list[dict], str]:
    """(the runs of this kind, their device) of the first file that has enough."""
    for path in sorted(folder.glob("normal_*.json")):
        found = json.loads(path.read_text())
        runs = [run for run in found["runs"] if whole(run["kind"]) == kind]
        if len(runs) >= FEWEST:
            return runs, found["device"]
    return [], ""


def whole(kind: dict) -> dict:
    """A kind with what was no choice yet when its run was made, at its default."""
    return {**kind, "config": {**asdict(Config()), **kind["config"]},
            "recipe": {**RECIPE_BEFORE, **kind["recipe"]}}


def known_spread(name: str, kind: dict, folder: Path = ROOT / "results") -> Spread | None:
    """The loss `name` of good runs of this kind, at the latest step that all of them reached;
    None where that is not known."""
    runs, device = good_runs(kind, folder)
    if not runs:
        return None
    curves = [dict(map(tuple, run["curve"][name])) for run in runs]
    shared = set.intersection(*map(set, curves))
    if not shared:
        return None
    step = max(shared)
    low, high = range_of([curve[step] for curve in curves])
    return Spread(step, low, high, len(runs), device)


def loss_lines(trainer: Resumable, folder: Path = ROOT / "results") -> list[str]:
    """A line for each loss of a run that is at its end: what it is, and what is normal."""
    kind = kind_of_run(as_saved(trainer.recipe), as_saved(trainer.model.config), trainer.asked)
    lines = []
    for name, points in trainer.losses.items():
        said = "" if len(trainer.losses) == 1 else f"{name} "
        spread = known_spread(name, kind, folder)
        lines.append(f"loss         {said}{in_words(points, trainer.step, spread)}")
    return lines


def as_saved(settings) -> dict:
    return dict(vars(settings))


def in_words(points: list, step: int, spread: Spread | None) -> str:
    said = f"{loss_at(points, step):.4f} at the end"
    if spread is None:
        return said
    loss = loss_at(points, spread.step)
    if spread.step < step:
        said += f", {loss:.4f} at step {spread.step}"
    where = "a CPU" if "CPU" in spread.device else f"an {spread.device}"
    runs = f"{spread.seeds} seeds, this recipe on {where}"
    between = f"good runs are between {spread.low:.4f} and {spread.high:.4f} there ({runs})"
    if spread.low <= loss <= spread.high:
        return f"{said}; {between}"
    side = "above" if loss > spread.high else "below"
    return f"{said}, which is {side} normal: {between}; see {SECTION}"


# ---- clips of one's own ----------------------------------------------------------------------

@torch.no_grad()
def next_chunk_errors(model: VideoDiT, clips: Tensor, captions: Tensor, seed: int,
                      **how) -> tuple[float, float]:
    """Mean square errors of the last chunk of clips [B, F, ...]: (as the model makes it after
    the true frames before it, the last of these frames repeated). `how` goes to `rollout`."""
    chunk = model.config.chunk
    past = clips[:, :-chunk]
    truth = clips[:, -chunk:]
    stream = Stream(model, captions)
    for part in past.split(chunk, dim=1):
        stream.commit(part)
    made = next(rollout(stream, chunk, VideoDraws(seed, len(clips)), **how))
    errors = []
    for answer in (made, past[:, -1:]):
        errors.append((answer - truth).square().mean().item())
    return errors[0], errors[1]


def judge_next_chunk(trainer: Resumable) -> dict | None:
    """How far the averaged model is from a still picture, on clips of the user's own; None in
    the worlds of this program, for a model that cannot stream, and for one without a past."""
    world = trainer.world
    config = trainer.model.config
    stage = trainer.recipe.stage
    alone = config.frames == config.chunk
    if not isinstance(world, Stored) or stage not in SAMPLERS or alone:
        return None
    clips, captions = world.to_judge(WINDOWS)
    model = trainer.ema
    made, repeated = next_chunk_errors(
        model, clips.to(trainer.device), captions, trainer.recipe.seed, **SAMPLERS[stage])
    return {"made": made, "repeated": repeated, "windows": len(clips),
            "held_out": len(world.held_out)}


def next_chunk_line(found: dict, steps: int) -> str:
    """What `judge_next_chunk` found, in words."""
    made = found["made"]
    repeated = found["repeated"]
    whose = "the clips that it was trained on: too few to hold some out"
    if found["held_out"]:
        whose = f"{found['held_out']} clips that it was not trained on"
    if repeated < STILL:
        judged = "these clips hardly move, so there is little to learn from that"
    elif made < repeated:
        judged = f"{repeated / made:.1f} times as far off"
    else:
        judged = ("the model is no better than a still picture yet: go on with --resume and "
                  f"--steps above {steps}, or see {SECTION}")
    return (f"next chunk   {made:.4f} is its mean square error after a true past; the last "
            f"frame repeated has {repeated:.4f}: {judged} ({found['windows']} windows of "
            f"{whose})")
