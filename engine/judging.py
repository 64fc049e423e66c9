"""What a model is judged by: rollouts with captions of clips that it has not seen, and the
bytes that its cache takes.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from engine.progress import watched
from engine.quantised import Format, make_cache
from flow import Draws, GuidedStream, Stream, rollout
from metrics import survival_report
from mla_video import VideoDiT
from toy_data import make_world

PROMPTS = ("slow red disc", "slow blue square", "fast green triangle", "fast yellow disc")


def unseen_captions(number: int, seed: int) -> Tensor:
    """Captions [number, S] of shapes clips that no run with a seed below 10,000 trains on."""
    _, captions = make_world("shapes", seed=10_000 + seed).batch(range(number))
    return captions


# A function of model and captions [B, S] that begins their videos: Stream itself, or e.g. one
# that adds guidance.
StreamOf = Callable[[VideoDiT, Tensor], Stream | GuidedStream]


def evaluate(model: VideoDiT, captions: Tensor, frames: int, seed: int, *,
             stream_of: StreamOf = Stream, watch: str = "", **how) -> dict[str, float]:
    """`metrics.survival_report` of the end of one rollout per caption.

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
    return survival_report(video, captions)


def report_survival(model: VideoDiT, rollouts: int, frames: int, seed: int, *,
                    stream_of: StreamOf = Stream, **how) -> dict[str, float]:
    """Print and return what `evaluate` finds for the captions of `rollouts` unseen clips."""
    captions = unseen_captions(rollouts, seed)
    watch = f"judging {rollouts} rollouts, frames"
    report = evaluate(model, captions, frames, seed, stream_of=stream_of, watch=watch, **how)
    clips = frames / model.config.frames
    shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in report.items())
    print(f"{rollouts} rollouts of {frames} frames ({clips:.0f}x the training clip), "
          f"last 12 frames: {shares}")
    return report


def cache_line(model: VideoDiT, batch: int, format: Format | None = None) -> str:
    """Bytes of this model's cache, and of its dense twin's if it is not dense itself, both read
    from allocated buffers."""
    cache = make_cache(model, batch, format)
    if not cache.nbytes:
        return "cache        0 bytes: a chunk fills the window, nothing of the past is kept"
    videos = "video" if batch == 1 else "videos"
    inside = f" in {format.name}" if format else ""
    line = f"cache        {cache.nbytes:,} bytes{inside} for {batch} {videos}, however long"
    if model.config.attention == "dense":
        return line
    dtype = model.embed.weight.dtype
    with torch.device("meta"):
        twin = VideoDiT(replace(model.config, attention="dense"))
        dense = twin.make_cache(batch, dtype)
    less = 100 * (1 - cache.nbytes / dense.nbytes)
    beside = f" in {str(dtype).removeprefix('torch.')}" if format else ""
    return f"{line}; dense attention keeps {dense.nbytes:,}{beside} ({less:.1f} % less)"
