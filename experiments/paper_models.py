"""What the runs of experiments/paper.py start from, and how their models are judged.

The code of this file and of all that it imports is part of what makes two runs the same
(`Tables.key`): the tables themselves stand elsewhere, so that a new row costs no old one.
tests/test_paper.py.
"""

import math
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from engine.checkpoint import load_model, save_model
from engine.convert import convert, moments_of_weights
from experiments.convert import by_the_mean, narrow, random_start
from experiments.quality import curves, draws_on
from flow import SAMPLERS, Stream, rollout
from metrics import alive, centroid
from mla_video import VideoDiT
from objectives import teacher_forcing_loss
from toy_data import make_world

UNSEEN = 10_000                # seeds from here on are of clips that no training draws
ENDS = 10                      # stretches of 12 frames, of `early` and of `late`
AT_ONCE = 64                   # clips in a pass, or six judgings would not fit a GPU


# ---- what a run starts from ------------------------------------------------------------------

def fit(dense: Path, sizes: tuple[tuple[str, int], ...], path: Path) -> Path:
    """The dense model with another window and sink: one of whole clips needs neither."""
    model, about = load_model(dense)
    copy = VideoDiT(replace(model.config, **dict(sizes)))
    copy.load_state_dict(model.state_dict())
    save_model(path, copy, **about)
    return path


def make(how: str, dense: Path, C: int, seed: int, path: Path) -> Path:
    """The MLA model that the dense one becomes: with attention at "random", or cut by its
    weights with the "mean" of the heads' rope keys."""
    model, about = load_model(dense)
    config = narrow(model.config, C)
    if how == "random":
        made = random_start(model, config, seed)
    else:
        made = convert(model, config, moments_of_weights(model), make=by_the_mean)
    save_model(path, made, **{**about, "stage": ""})
    return path


# ---- judging a model -------------------------------------------------------------------------

@torch.no_grad()
def place_after_truth(model: VideoDiT, clips: Tensor, captions: Tensor, seed: int,
                      **how) -> float:
    """The share of frames of a last chunk, made after its true past, with the subject within a
    pixel (of 16) of its true place. The caption does not tell where that is."""
    chunk = model.config.chunk
    draws = draws_on(clips.device, seed)
    found = []
    for part, words in zip(clips.split(AT_ONCE), captions.split(AT_ONCE)):
        stream = Stream(model, words)
        *past, last = part.split(chunk, dim=1)
        for clean in past:
            stream.commit(clean)
        made = next(rollout(stream, chunk, draws, **how))
        distance = (centroid(made) - centroid(last)).norm(dim=-1)
        near = (distance <= clips.shape[-1] / 16) & alive(made)
        found += near.flatten().tolist()
    return mean(found)


@torch.no_grad()
def held_out_loss(model: VideoDiT, clips: Tensor, captions: Tensor, seed: int) -> float:
    draws = draws_on(clips.device, seed)
    losses = []
    for part, words in zip(clips.split(AT_ONCE), captions.split(AT_ONCE)):
        loss, _, _ = teacher_forcing_loss(model, part, words, draws, drop=0.0)
        losses += [loss.item()] * len(part)
    return mean(losses)


def plain(values: list[float]) -> float | None:
    """The mean of those that are numbers, for JSON; None if nothing was there to be judged."""
    numbers = [value for value in values if math.isfinite(value)]
    return round(mean(numbers), 4) if numbers else None


def judge_model(path: Path, horizon: int, frames: int, videos: int, seed: int,
                device: torch.device) -> dict:
    """What is found of one model. Its videos are made with another `horizon`, if it is not
    0."""
    model, about = load_model(path)
    model.to(device)
    stage = about["stage"]
    how = SAMPLERS[stage]
    c = model.config
    world = make_world("shapes", c.frames, c.height, UNSEEN + seed)
    clips, captions = world.batch(range(4 * videos))  # one pass or chunk of each is cheap
    on_device = [part.to(device) for part in (clips, captions)]
    found = {"place": round(place_after_truth(model, *on_device, seed, **how), 4)}
    if stage == "tf":
        found["loss"] = round(held_out_loss(model, *on_device, seed), 5)
    if horizon:
        model.config = replace(c, horizon=horizon)
    points, seconds, _ = curves(model, captions[:videos], clips[:videos],
                                frames, seed, **how)
    for name, part in (("early", slice(ENDS)), ("late", slice(-ENDS, None))):
        found[name] = {metric: plain(values[part]) for metric, values in points.items()}
    cache = model.make_cache(1)
    found["seconds_per_chunk"] = round(seconds, 5)
    found |= {"frames": frames, "cache_bytes": cache.nbytes,
              "bytes_per_token": cache.bytes_per_token}
    return found
