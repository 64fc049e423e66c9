"""Claim: however long the video, a chunk costs the same time and the memory does not grow.

    python -m experiments.endurance --frames 100000 --json results/endurance.json

Streams one video into a GIF, as `sample.py --frames 0` does, and watches the process: resident memory after the first 1,000 frames against
the most and the last that it was afterwards, and the time of a chunk in each tenth of the video, median and 10th percentile. Other work on
the machine shows in both. So every tenth chunk is followed by one of a *young* video, begun anew every 1,000 chunks: what the old one
costs against it is a question of age alone, for whatever else slows one slows the other.
"""

import argparse
import json
import resource
import sys
import tempfile
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from checkpoint import load_model
from sample import GifWriter, provenance, rollout, to_pixels
from toy_data import encode_caption


def resident_kib() -> int:
    """Memory that this process has in RAM now; where there is no /proc, the most that it ever had."""
    if Path("/proc/self/statm").exists():
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)


def timed(video: Iterator, gif: GifWriter) -> float:
    """Seconds for the next chunk, made and written."""
    start = perf_counter()
    gif.append(to_pixels(next(video), zoom=1))
    return perf_counter() - start


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/toy.pt")
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=4, help="Euler steps a chunk")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if args.frames < 300:
        parser.error("tenths of a video, and pairs in each, need at least 300 --frames")
    origin = provenance(torch.device("cpu"))               # now: a long run must name the commit it started from
    model, _ = load_model(args.checkpoint)
    chunks, settled = -(-args.frames // model.config.chunk), min(1000, args.frames // 3) // model.config.chunk
    # Filled in place: a list of times would be the growth that is looked for.
    times, ratios, levels = array("d", bytes(8 * chunks)), array("d", bytes(8 * -(-chunks // 10))), array("q", bytes(80))
    early, most = 0, 0
    caption, full = encode_caption("fast red disc")[None], -(-model.config.frames // model.config.chunk)
    with tempfile.TemporaryDirectory() as folder:
        old, gif = rollout(model, caption, args.frames, steps=args.steps), GifWriter(Path(folder) / "endless.gif")
        for i in range(chunks):
            times[i] = timed(old, gif)
            if i % 1000 == 0:
                young, its_gif = rollout(model, caption, 0, steps=args.steps), GifWriter(Path(folder) / "young.gif")
                for chunk in islice(young, full):          # its window is full, too, and its file begun
                    its_gif.append(to_pixels(chunk, zoom=1))
            if i % 10 == 0:
                ratios[i // 10] = times[i] / timed(young, its_gif) if i >= full else 1.0
            if i == settled:
                early = resident_kib()
            if i > settled and i % 100 == 0:
                most = max(most, resident_kib())
            if (i + 1) * 10 // chunks > i * 10 // chunks:
                levels[i * 10 // chunks] = resident_kib()
        written = gif.path.stat().st_size
    last = resident_kib()
    tenth, pairs = ([row[i * len(row) // 10:(i + 1) * len(row) // 10] for i in range(10)] for row in (times, ratios))
    report = {**origin, "threads": torch.get_num_threads(), "frames": chunks * model.config.chunk, "chunks": chunks,
              "ms_per_chunk_by_tenth": [round(1000 * median(part), 2) for part in tenth],
              "ms_per_chunk_p10_by_tenth": [round(1000 * sorted(part)[len(part) // 10], 2) for part in tenth],
              "time_against_a_young_video_by_tenth": [round(median(part), 3) for part in pairs],
              "resident_kib_after_1000_frames": early, "resident_kib_at_the_end_of_each_tenth": list(levels),
              "memory_growth_kib": last - early, "peak_memory_growth_kib": max(most, last) - early,
              "cache_bytes": model.make_cache(1).nbytes, "gif_bytes": written}
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
