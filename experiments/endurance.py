"""Claim: however long the video, a chunk costs the same time and the memory does not grow.

    python -m experiments.endurance --frames 10000 --json results/endurance.json

Streams one video, compares the first 100 chunks after the window is full with the last 100, and the process' peak memory then
with that at the end.
"""

import argparse
import json
import resource
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from checkpoint import load_model
from sample import provenance, rollout
from toy_data import encode_caption


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--checkpoint", default="checkpoints/toy.pt")
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=4, help="Euler steps a chunk")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    model, _ = load_model(args.checkpoint)
    full = model.config.window // model.config.chunk       # chunks until the window is full
    times, peak_then, start = [], 0, perf_counter()
    for i, _ in enumerate(rollout(model, encode_caption("fast red disc")[None], args.frames, steps=args.steps)):
        times.append(perf_counter() - start)
        if i == full + 100:
            peak_then = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = perf_counter()
    first, last = times[full:full + 100], times[-100:]
    report = {**provenance(torch.device("cpu")), "frames": len(times) * model.config.chunk, "chunks": len(times),
              "ms_per_chunk_first_100": round(1000 * median(first), 2), "ms_per_chunk_last_100": round(1000 * median(last), 2),
              "peak_memory_growth_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_then,
              "cache_bytes": model.make_cache(1).nbytes}
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    return report


if __name__ == "__main__":
    main()
