"""Claim: however long the video, a chunk costs the same time and the memory does not grow.

    python -m experiments.endurance --frames 100000 --json results/endurance.json

Streams one video into a GIF, as `sample.py --frames 0` does, and watches the process: resident memory after the first 1,000 frames against
the most and the last that it was afterwards, and the time of a chunk in each tenth of the video: the median, and the
10th percentile, which other work on the machine disturbs less.
"""

import argparse
import json
import resource
import sys
import tempfile
from array import array
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


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/toy.pt")
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=4, help="Euler steps a chunk")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    origin = provenance(torch.device("cpu"))               # now: a long run must name the commit it started from
    model, _ = load_model(args.checkpoint)
    chunks, settled = -(-args.frames // model.config.chunk), min(1000, args.frames // 3) // model.config.chunk
    times, early, most = array("d", bytes(8 * chunks)), 0, 0     # filled in place: a list of times would be the growth that is looked for
    with tempfile.TemporaryDirectory() as folder:
        gif, start = GifWriter(Path(folder) / "endless.gif"), perf_counter()
        for i, chunk in enumerate(rollout(model, encode_caption("fast red disc")[None], args.frames, steps=args.steps)):
            gif.append(to_pixels(chunk, zoom=1))
            times[i] = perf_counter() - start
            if i == settled:
                early = resident_kib()
            if i > settled and i % 100 == 0:
                most = max(most, resident_kib())
            start = perf_counter()
        written = gif.path.stat().st_size
    last = resident_kib()
    tenth = [times[i * chunks // 10:(i + 1) * chunks // 10] for i in range(10)]
    report = {**origin, "threads": torch.get_num_threads(), "frames": chunks * model.config.chunk, "chunks": chunks,
              "ms_per_chunk_by_tenth": [round(1000 * median(part), 2) for part in tenth],
              "ms_per_chunk_p10_by_tenth": [round(1000 * sorted(part)[len(part) // 10], 2) for part in tenth],
              "resident_kib_after_1000_frames": early, "memory_growth_kib": last - early, "peak_memory_growth_kib": max(most, last) - early,
              "cache_bytes": model.make_cache(1).nbytes, "gif_bytes": written}
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
