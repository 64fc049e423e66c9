"""What a model is judged by: rollouts with captions of clips that it has not seen, the judge of
its world, and the bytes that its cache takes.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from engine import digit_metrics
from engine.passages import passage_report
from engine.progress import watched
from flow import Draws, GuidedStream, Stream, rollout
from metrics import survival_report
from mla_video import VideoDiT
from toy_data import make_world

# Video [B, F, 3, h, w] and captions [B, S] -> shares by name. The last one is "survival", the
# number to quote.
Report = Callable[[Tensor, Tensor], dict[str, float]]


class Judge(NamedTuple):
    """How rollouts of a world are judged."""
    report: Report
    looks_at: str = "last 12 frames"
    own_accuracy: Callable[[int], str] | None = None       # a line, for frames of that size


# Worlds whose truth is known. A world that is not here, as your own clips, has no judge.
JUDGES = {
    "shapes": Judge(survival_report),
    "digits": Judge(digit_metrics.survival_report, own_accuracy=digit_metrics.accuracy_line),
    "occluder": Judge(passage_report, "passages behind the bar"),
}


def unseen_captions(number: int, seed: int, data: str) -> Tensor:
    """Captions [number, S] of clips of the world `data` that no run with a seed below 10,000
    trains on."""
    _, captions = make_world(data, frames=1, seed=10_000 + seed).batch(range(number))
    return captions


# A function of model and captions [B, S] that begins their videos: Stream itself, or e.g. one
# that adds guidance.
StreamOf = Callable[[VideoDiT, Tensor], Stream | GuidedStream]


def evaluate(model: VideoDiT, captions: Tensor, frames: int, seed: int, *,
             report: Report = survival_report, stream_of: StreamOf = Stream, watch: str = "",
             **how) -> dict[str, float]:
    """What `report` says of one rollout per caption.

    `how` goes to `rollout`: sampler and steps. With a name to `watch` it by, it shows how far
    it has come.
    """
    stream = stream_of(model, captions)
    draws = Draws(torch.Generator().manual_seed(seed))
    made = rollout(stream, frames, draws, **how)
    if watch:
        made = watched(made, watch, frames)
    chunks = [chunk.float().cpu() for chunk in made]
    video = torch.cat(chunks, dim=1)                       # [B, F, 3, h, w]
    return report(video, captions)


def report_survival(model: VideoDiT, rollouts: int, frames: int, seed: int, data: str, *,
                    stream_of: StreamOf = Stream, **how) -> dict[str, float]:
    """Print and return what the judge of the world `data` finds in `rollouts` videos of it, with
    captions of unseen clips."""
    judge = JUDGES[data]
    captions = unseen_captions(rollouts, seed, data)
    watch = f"judging {rollouts} rollouts, frames"
    report = evaluate(model, captions, frames, seed, report=judge.report, stream_of=stream_of,
                      watch=watch, **how)
    clips = frames / model.config.frames
    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in report.items())
    print(f"{rollouts} rollouts of {frames} frames ({clips:.0f}x the training clip), "
          f"{judge.looks_at}: {shares}")
    if judge.own_accuracy:
        print(judge.own_accuracy(model.config.height))
    return report


def cache_line(model: VideoDiT, batch: int) -> str:
    """Bytes of this model's cache, and of its dense twin's if it is not dense itself, both read
    from allocated buffers."""
    cache = model.make_cache(batch)
    if not cache.nbytes:
        return "cache        0 bytes: a chunk fills the window, nothing of the past is kept"
    videos = "video" if batch == 1 else "videos"
    line = f"cache        {cache.nbytes:,} bytes for {batch} {videos}, however long"
    if model.config.attention == "dense":
        return line
    with torch.device("meta"):
        twin = VideoDiT(replace(model.config, attention="dense"))
        dense = twin.make_cache(batch, cache.buffers[0].dtype)
    less = 100 * (1 - cache.nbytes / dense.nbytes)
    return f"{line}; dense attention keeps {dense.nbytes:,} ({less:.1f} % less)"
