"""Clips of one's own to try: two handwritten digits a clip bounce on black, as in Moving MNIST.

    python -m experiments.digit_pairs clips.npz        writes 2000 clips of 20 frames of 64 x 64

They are scikit-learn's pictures of 8 x 8, enlarged to 24 x 24. Where two meet, the brighter
pixel shows. In the file are `clips`, uint8 [N, T, 64, 64], and `captions`, [N], which name the
two digits, for instance "three seven". A clip is a pure function of --seed and its number.
train.py takes the file with --layout NTHW: by its shape alone it could be time first.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate

if not __package__:                    # started by its path
    sys.path.insert(0, str(Path(__file__).parent.parent))

from engine.command_line import UserError, as_user_error, check_bounds, run
from toy_data import DIGITS, bounce, require

SIZE = 64                              # pixels, of a frame
DIGIT = 24                             # pixels, of a digit
SPEED = (2.0, 4.0)                     # pixels a frame


def enlarged() -> tuple[np.ndarray, np.ndarray]:
    """(pictures uint8 [1797, 24, 24], what they are [1797], 0 to 9)"""
    digits = require("sklearn.datasets", "scikit-learn", "handwritten digits").load_digits()
    small = torch.from_numpy(digits.images).float() / 16               # [1797, 8, 8]
    large = interpolate(small[:, None], (DIGIT, DIGIT), mode="bicubic", align_corners=False)
    pictures = (255 * large[:, 0].clamp(0, 1)).round().to(torch.uint8)
    return pictures.numpy(), digits.target


def clip(pictures: np.ndarray, labels: np.ndarray, frames: int,
         rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """(video uint8 [T, 64, 64], its caption)"""
    video = np.zeros((frames, SIZE, SIZE), np.uint8)
    which = rng.integers(len(pictures), size=2)
    for number in which:
        start = rng.uniform(0, SIZE - DIGIT, 2)            # of the upper left corner, (y, x)
        angle = rng.uniform(0, 2 * math.pi)
        velocity = rng.uniform(*SPEED) * np.array([math.sin(angle), math.cos(angle)])
        corners = bounce(start, velocity, frames, 0, SIZE - DIGIT).round().astype(int)
        for frame, (y, x) in zip(video, corners):
            under = frame[y:y + DIGIT, x:x + DIGIT]        # a view: what is drawn, stays
            np.maximum(under, pictures[number], out=under)
    return video, " ".join(DIGITS[labels[number]] for number in which)


def write(args: argparse.Namespace) -> None:
    check_bounds(args, clips=(1, 20_000), frames=(3, 1000), seed=(0, 2**31))
    if not args.path.endswith(".npz"):
        raise UserError(f"{args.path}: expected a name that ends in .npz")
    with as_user_error():
        pictures, labels = enlarged()
        made = [clip(pictures, labels, args.frames, np.random.default_rng((args.seed, number)))
                for number in range(args.clips)]
        videos, captions = zip(*made)
        np.savez_compressed(args.path, clips=np.stack(videos), captions=np.array(captions))
    print(f"wrote {args.path}: {args.clips} clips of {args.frames} frames of {SIZE}x{SIZE}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("path", help="where to write, a name that ends in .npz")
    flag("--clips", type=int, default=2000)
    flag("--frames", type=int, default=20)
    flag("--seed", type=int, default=0)
    run(write, parser.parse_args(argv))


if __name__ == "__main__":
    main()
