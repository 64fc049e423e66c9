"""Claim: however long the video, a chunk costs the same time and the memory does not grow.

    python -m experiments.endurance --frames 100000 --json results/endurance.json

Streams one video into a GIF, as `sample.py --frames 0` does, and watches the process.

Memory: what is resident after the first 1,000 frames, against the most and the last afterwards.

Time: that of a chunk in each tenth of the video, median and 10th percentile. Other work on the
machine shows in both. So every tenth chunk is followed by one of a *young* video, which is
begun anew every 1,000 chunks. What slows the one slows the other, and what the old one costs
against it is a question of age alone.
"""

import argparse
import json
import math
import resource
import sys
import tempfile
from array import array
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

if not __package__:                    # started by its path
    sys.path.insert(0, str(Path(__file__).parent.parent))

from engine.checkpoint import load_model
from engine.command_line import provenance
from engine.progress import counted
from engine.video_files import GifWriter, to_pixels
from flow import Draws, Stream, rollout
from toy_data import encode_caption


def resident_kib() -> int:
    """Memory that this process has in RAM now; without a /proc, the most it ever had."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        pages = int(statm.read_text().split()[1])
        return pages * resource.getpagesize() // 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most // 1024 if sys.platform == "darwin" else most      # macOS counts bytes


class Video:
    """A video without an end, which is written into a GIF while it is made."""

    def __init__(self, model, steps: int, path: Path):
        caption = encode_caption("fast red disc")[None]
        self.chunks = rollout(Stream(model, caption), 0, Draws(), steps=steps)
        self.gif = GifWriter(path)

    def grow(self) -> float:
        """Make and write one more chunk. Returns the seconds that this took."""
        start = perf_counter()
        self.gif.append(to_pixels(next(self.chunks), zoom=1))
        return perf_counter() - start


def young_video(model, steps: int, path: Path) -> Video:
    """A young one, but its window is full, as the old one's is, and its file is begun."""
    video = Video(model, steps, path)
    for _ in range(chunks_of(model, model.config.frames)):
        video.grow()
    return video


def chunks_of(model, frames: int) -> int:
    return math.ceil(frames / model.config.chunk)


def watch(model, frames: int, steps: int) -> dict:
    """Stream `frames` frames. Returns what the report says of time and memory."""
    chunks = chunks_of(model, frames)
    full = chunks_of(model, model.config.frames)
    settled = min(1000, frames // 3) // model.config.chunk
    # Filled in place: a list of times would be the growth that is looked for.
    times = array("d", [0.0]) * chunks
    ratios = array("d", [1.0]) * math.ceil(chunks / 10)
    levels = array("q", [0]) * 10
    early = 0
    most = 0
    with tempfile.TemporaryDirectory() as folder:
        old = Video(model, steps, Path(folder, "endless.gif"))
        for i in counted(range(chunks), "streaming, chunks"):
            times[i] = old.grow()
            if i % 1000 == 0:
                young = young_video(model, steps, Path(folder, "young.gif"))
            if i % 10 == 0 and i >= full:
                ratios[i // 10] = times[i] / young.grow()
            if i == settled:
                early = resident_kib()
            if i > settled and i % 100 == 0:
                most = max(most, resident_kib())
            tenth = i * 10 // chunks
            if (i + 1) * 10 // chunks > tenth:             # the last chunk of its tenth
                levels[tenth] = resident_kib()
        written = old.gif.path.stat().st_size
    last = resident_kib()
    return {
        "frames": chunks * model.config.chunk,
        "chunks": chunks,
        "ms_per_chunk_by_tenth": [round(1000 * median(part), 2) for part in tenths(times)],
        "ms_per_chunk_p10_by_tenth": [round(1000 * low(part), 2) for part in tenths(times)],
        "time_against_a_young_video_by_tenth": [
            round(median(part), 3) for part in tenths(ratios)],
        "resident_kib_after_1000_frames": early,
        "resident_kib_at_the_end_of_each_tenth": list(levels),
        "memory_growth_kib": last - early,
        "peak_memory_growth_kib": max(most, last) - early,
        "cache_bytes": model.make_cache(1).nbytes,
        "gif_bytes": written,
    }


def verdict(report: dict) -> str:
    """What the figures say of the claim, in a sentence."""
    frames = report["frames"]
    first, *_, last = report["time_against_a_young_video_by_tenth"]
    grown = mebibytes(report["memory_growth_kib"])
    most = mebibytes(report["peak_memory_growth_kib"])
    return (f"{frames:,} frames: in the last tenth a chunk took {last:.2f} times as long as one "
            f"of a young video (in the first {first:.2f}); the memory changed by {grown} since it "
            f"had settled, and by {most} at most")


def mebibytes(kib: int) -> str:
    return f"{kib / 1024:+.1f} MiB"


def tenths(values: array) -> list[array]:
    edges = [i * len(values) // 10 for i in range(11)]
    return [values[start:end] for start, end in zip(edges, edges[1:])]


def low(values: array) -> float:
    """The 10th percentile."""
    return sorted(values)[len(values) // 10]


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--checkpoint", default="checkpoints/toy.pt")
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=4, help="Euler steps a chunk")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if args.frames < 300:
        parser.error("tenths of a video, and pairs in each, need at least 300 --frames")
    # Now, not at the end: a long run must name the commit that it started from.
    report = {**provenance(torch.device("cpu")), "threads": torch.get_num_threads()}
    model, _ = load_model(args.checkpoint)
    report |= watch(model, args.frames, args.steps)
    text = json.dumps(report, indent=1)
    if args.json:
        args.json.write_text(text)
        print(f"wrote {args.json}")
    else:
        print(text)
    print(verdict(report))
    return report


if __name__ == "__main__":
    main()
