"""How much memory it takes to load a file of Wan2.1-T2V-1.3B's real size, and to run a pass.

    python -m experiments.wan_memory --json results/wan_memory.json

The file is random, in bfloat16, 2.8 GB; it is written tensor by tensor into a temporary folder
and deleted in the end. It is loaded by a process of its own, whose peak is the answer: the
resident set, of which pages of the mapped file are the most, and without them what the process
itself allocated.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from engine.command_line import UserError, provenance, run
from engine.wan import load_wan, their_name
from mla_video import PRESETS, VideoDiT

SMALL = dict(height=4, width=4)                # of the pass: 4 tokens a frame; weights are all read


def shapes_of_file() -> dict[str, list[int]]:
    """Names and shapes of the released model's tensors."""
    config = replace(PRESETS["wan1.3b"], attention="dense")
    with torch.device("meta"):
        model = VideoDiT(config)
    shapes = {}
    for name, value in model.state_dict().items():
        shape = list(value.shape)
        if name.endswith("modulation"):
            shape = [1, *shape]
        if name == "embed.weight":
            shape = [config.dim, config.channels, 1, config.patch, config.patch]
        shapes[their_name(name, 0)] = shape
    return shapes


def write_random(path: Path) -> None:
    """Such a file, never more of it in memory than one tensor."""
    header = {}
    end = 0
    for name, shape in shapes_of_file().items():
        begin = end
        end += 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)              # numbers begin at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in header.values():
            value = torch.empty(tensor["shape"], dtype=torch.bfloat16).normal_(std=0.02)
            file.write(value.view(torch.uint8).numpy().tobytes())


def memory() -> dict[str, int]:
    """Megabytes of this process now and at its peak, by Linux."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmHWM", "RssAnon", "RssFile"):
            found[name] = int(value.split()[0]) // 1024
    return found


def load_and_run(path: str) -> dict:
    """Load the file, then make one pass over a chunk; memory after each."""
    start = time.perf_counter()
    found = {"start": memory()}
    model = load_wan(path, **SMALL)
    found["loaded"] = memory()
    found["load_s"] = round(time.perf_counter() - start, 1)
    c = model.config
    chunk = torch.zeros(1, c.chunk, c.channels, c.height, c.width, dtype=torch.bfloat16)
    caption = chunk.new_zeros(1, c.slots, c.text)
    with torch.no_grad():
        model.denoise(chunk, torch.ones(1, c.chunk), caption, model.make_cache(1))
    found["after a pass"] = memory()
    found["parameters"] = sum(value.numel() for value in model.parameters())
    return found


def measure(args: argparse.Namespace) -> None:
    """Write the file, load it elsewhere, report."""
    if not Path("/proc/self/status").exists():
        raise UserError("memory is read from /proc, which only Linux has")
    if args.load:
        print(json.dumps(load_and_run(args.load)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wan.safetensors"
        write_random(path)
        size = path.stat().st_size
        command = [sys.executable, "-m", "experiments.wan_memory", "--load", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    out = {**provenance(torch.device("cpu")), "file_mb": size // 2**20, **found}
    print(f"file         {out['file_mb']:,} MB, {out['parameters']:,} parameters")
    for name in ("start", "loaded", "after a pass"):
        now = found[name]
        print(f"{name:12} peak {now['VmHWM']:,} MB; now {now['RssFile']:,} MB of mapped files and "
              f"{now['RssAnon']:,} MB of its own")
    if args.json:
        Path(args.json).write_text(json.dumps(out, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", metavar="PATH", help="write the result there, too")
    parser.add_argument("--load", metavar="PATH", help="load this file and print memory as JSON")
    run(measure, parser.parse_args(argv))


if __name__ == "__main__":
    main()
